# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The full 7B-MoT shape with random weights on one GPU: does it answer and draw, how fast, in how much memory.

    python benchmarks/gpu_7b.py [--steps 49] [--tiny] [--output benchmarks/results]

Correctness first (kernels agree, a batch gives what single runs give), then speed, as ratios to SDPA in the same run.
Writes a Markdown table with card, date and commit. `--tiny` runs it with the embedded tiny model, also on a CPU.
"""

import argparse
import datetime
import gc
import importlib.util
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bagel.configuration_bagel import BagelConfig
from bagel.modeling_bagel import BagelForUnifiedMultimodal


REPOSITORY = Path(__file__).resolve().parent.parent


def random_model(tiny: bool, device: str) -> BagelForUnifiedMultimodal:
    """The 7B shape with random bfloat16 weights, made on the device; or the embedded tiny model."""
    folder = REPOSITORY / "checkpoints" / "tiny-random" if tiny else REPOSITORY
    config = BagelConfig.from_pretrained(folder)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
    try:
        with torch.device(device):
            model = BagelForUnifiedMultimodal(config)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        model.llm2vae.weight.normal_(std=0.02)
    return model.eval()


def prompt(model: Any, text_tokens: int, picture_side: int = 0, batch_size: int = 1) -> dict[str, torch.Tensor]:
    """Inputs of `generate`: random text, after an image of `picture_side` ViT patches per side (0 = no image)."""
    config, device = model.config, model.device
    words = torch.randint(0, 256, (batch_size, text_tokens), device=device)  # below every special id
    bos = torch.full((batch_size, 1), config.bos_token_id, device=device)
    eos = torch.full((batch_size, 1), _first(config.eos_token_id), device=device)
    spans, inputs = [bos, words, eos], {}
    if picture_side:
        placeholders = torch.full((batch_size, picture_side**2), config.image_token_id, device=device)
        start, end = (
            torch.full((batch_size, 1), token, device=device)
            for token in (config.vision_start_token_id, config.vision_end_token_id)
        )
        spans = [start, placeholders, end, *spans]
        inputs["pixel_values"] = torch.randn(
            batch_size * picture_side**2, config.vision_config.patch_dim, device=device
        )
        inputs["image_grid_hw"] = torch.tensor([[picture_side, picture_side]] * batch_size, device=device)
    return {"input_ids": torch.cat(spans, dim=1), **inputs}


def measure(call: Callable[[], object], device: str) -> tuple[float, float, object]:
    """Seconds, peak GB of GPU memory and result of a call, after one call to warm up."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else float("nan")
    return time.perf_counter() - start, peak, result


def kernels(device: str) -> list[str]:
    """The attention implementations that run on a device, SDPA first."""
    names = ["sdpa", "eager"]
    if device == "cuda":
        names.append("flex_attention")
        if importlib.util.find_spec("flash_attn"):
            names.append("flash_attention_2")
    return names


def check_kernels(model: Any, side: int, device: str) -> list[str]:
    """A table: logits after an image, and latents after one step, against SDPA."""
    inputs, lines = prompt(model, 32, side), []
    reference = None
    for name in kernels(device):
        model.set_attn_implementation(name)
        logits = model(**inputs, logits_to_keep=1).logits.float()
        latents = model.generate(
            input_ids=inputs["input_ids"][:, -34:],  # bos, the words, eos
            generation_mode="image",
            num_timesteps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            progress_bar=False,
        )[0]
        if reference is None:
            reference = (logits, latents)
        errors = [(a - b).abs().max().item() / b.abs().max().item() for a, b in zip((logits, latents), reference)]
        lines.append(f"| {name} | {errors[0]:.1e} | {errors[1]:.1e} |")
    model.set_attn_implementation("sdpa")
    return ["| kernel | logits, relative to SDPA | latents, relative to SDPA |", "|---|---|---|", *lines]


def time_everything(model: Any, side: int, steps: int, device: str) -> list[str]:
    """A table: seconds of answering and of drawing with every kernel, and their ratio to SDPA."""
    lines = ["| task | kernel | seconds | of SDPA | rate | peak |", "|---|---|---|---|---|---|"]
    base: dict[str, float] = {}
    question, words = prompt(model, 64, side), 64

    def answer() -> object:
        return model.generate(**question, max_new_tokens=words, min_new_tokens=words, do_sample=False)

    def draw() -> object:
        return model.generate(
            input_ids=prompt(model, 64)["input_ids"],
            generation_mode="image",
            num_timesteps=steps + 1,
            progress_bar=False,
        )

    for name in kernels(device):
        if name == "eager" and device == "cuda":
            continue  # the score matrix of a 1024 x 1024 image is too large
        model.set_attn_implementation(name)
        for task, call, rate in (
            (f"answer, {words} tokens", answer, lambda s: f"{words / s:.1f} tokens/s"),
            (f"draw, {steps} steps, guided", draw, lambda s: f"{steps / s:.2f} steps/s"),
        ):
            seconds, peak, _ = measure(call, device)
            base.setdefault(task, seconds)
            lines.append(
                f"| {task} | {name} | {seconds:.2f} | {seconds / base[task]:.2f} | {rate(seconds)} | {peak:.1f} GB |"
            )
    model.set_attn_implementation("sdpa")
    return lines


def check_batch(model: Any) -> str:
    """The largest difference between two prompts drawn in one batch and one by one."""
    prompts = [prompt(model, length)["input_ids"] for length in (16, 40)]
    longest = max(ids.shape[1] for ids in prompts)
    padded = torch.cat([torch.nn.functional.pad(ids, (longest - ids.shape[1], 0)) for ids in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(ids), (longest - ids.shape[1], 0)) for ids in prompts])
    options: dict[str, Any] = {
        "generation_mode": "image",
        "num_timesteps": 4,
        "output_type": "latent",
        "progress_bar": False,
    }
    options |= {"height": 256, "width": 256, "progress_bar": False}
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    batch = model.generate(input_ids=padded, attention_mask=mask, generator=generators, **options)
    single = [
        model.generate(input_ids=ids, generator=torch.Generator().manual_seed(seed), **options)[0]
        for seed, ids in enumerate(prompts)
    ]
    worst = max((a - b).abs().max().item() / b.abs().max().item() for a, b in zip(batch, single))
    return f"Two prompts drawn in one batch and one by one differ by {worst:.1e} (relative, dtype {model.dtype})."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = REPOSITORY / "benchmarks" / "results"
    parser.add_argument("--output", type=Path, default=results, help="folder of the table")
    parser.add_argument("--steps", type=int, help="steps of a drawing (49; with --tiny 8)")
    parser.add_argument("--tiny", action="store_true", help="the embedded tiny model instead of the 7B shape")
    arguments = parser.parse_args()
    steps = arguments.steps or (8 if arguments.tiny else 49)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.tiny:
        print("No GPU here: the 7B shape needs one. `--tiny` runs the script without.", file=sys.stderr)
        return 1
    card = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True
    ).stdout.strip()

    start = time.perf_counter()
    model = random_model(arguments.tiny, device)
    built = time.perf_counter() - start
    side = 16 if arguments.tiny else 70
    report = [
        f"# {'tiny-random' if arguments.tiny else 'BAGEL-7B-MoT shape, random weights'}",
        "",
        f"{card}, torch {torch.__version__}, {datetime.date.today()}, commit {commit}. Built in {built:.0f} s.",
        "",
        *check_kernels(model, side, device),
        "",
        check_batch(model),
        "",
        *time_everything(model, side, steps, device),
        "",
    ]
    text = "\n".join(report)
    print(text)
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = card.replace(" ", "-").lower() + ("-tiny" if arguments.tiny else "")
    (arguments.output / f"{name}.md").write_text(text)
    del model
    gc.collect()
    return 0


def _first(token_id: int | list[int]) -> int:
    return token_id[0] if isinstance(token_id, list) else token_id


if __name__ == "__main__":
    sys.exit(main())
