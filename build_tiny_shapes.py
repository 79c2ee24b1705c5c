# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Before and after the training of `checkpoints/tiny-shapes`, a complete BAGEL that really works, small enough for git.

    python build_tiny_shapes.py start outputs/tiny-shapes/start     # trains the VAE, puts an untrained model around it
    torchrun --standalone --nproc_per_node 2 train.py --config configs/tiny_shapes.yaml  # trains the model
    python build_tiny_shapes.py finish outputs/tiny-shapes/run/ema  # writes checkpoints/tiny-shapes

`make tiny-shapes` runs all three. The world it lives in is `shapes_world.py`.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import trange
from transformers import GenerationConfig

from build_tiny_checkpoint import write_checkpoint
from convert_bagel import REPOSITORY, import_sibling
from shapes_world import SIDE, Inventor, Scene, all_sentences, render
from tokenization_tiny import build_tiny_tokenizer


CHECKPOINT = REPOSITORY / "checkpoints" / "tiny-shapes"
PATCH = 16  # pixels per token and side, of the vision tower and of the VAE alike
VOCABULARY = 448


# --------------------------------------------------------------------------------------------------------------------
# The autoencoder


def train_vae(steps: int, batch_size: int = 16, learning_rate: float = 2e-3, seed: int = 0) -> tuple[nn.Module, dict]:
    """
    An autoencoder for the world's pictures: 64x64 pixels to 8x8 latents of 4 channels.

    Pixels that differ from the ground count eight times. The KL term is strong enough that a sample of the posterior
    strays by about a tenth of a latent's deviation: errors of the model that draws, up to that size, do no harm.

    Returns:
        The VAE and its settings for `vae_config`: its latents have mean 0 and standard deviation 1 under them.
    """
    settings = {
        "z_channels": 4,
        "ch": 16,
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 1,
        "norm_num_groups": 4,
        "resolution": SIDE,
    }
    torch.manual_seed(seed)
    config = import_sibling("configuration_bagel").BagelVAEConfig(**settings)
    vae = import_sibling("modeling_bagel").build_vae(config).to(memory_format=torch.channels_last)
    draws = np.random.default_rng(seed + 1)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.05)
    progress = trange(steps, desc="autoencoder")
    for _ in progress:
        pixels = pictures(draws, batch_size).to(memory_format=torch.channels_last)
        posterior = vae.encode(pixels).latent_dist
        restored = vae.decode(posterior.sample()).sample
        stands_out = (pixels - pixels[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.05
        error = (restored - pixels).abs() + 2 * (restored - pixels) ** 2
        loss = ((1 + 7 * stands_out) * error).mean() + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        progress.set_postfix(loss=f"{loss.item():.4f}")
    return vae, settings | _latent_scale(vae, draws)


def pictures(draws: np.random.Generator, number: int) -> torch.Tensor:
    """Pictures without held-out combinations, (number, 3, 64, 64) in [-1, 1]; a few show only a ground."""
    inventor, images = Inventor(draws), []
    for _ in range(number):
        scene = inventor.scene(False)[0]
        scene = scene if draws.random() > 0.03 else Scene(scene.ground, ())
        images.append(np.asarray(render(scene)))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def _latent_scale(vae: nn.Module, draws: np.random.Generator) -> dict[str, float]:
    latents = vae.encode(pictures(draws, 256)).latent_dist.sample()
    return {"scale_factor": 1 / latents.std().item(), "shift_factor": latents.mean().item()}


@torch.no_grad()
def vae_psnr(vae: nn.Module, number: int = 256, seed: int = 7) -> tuple[float, float]:
    """Mean and worst PSNR in dB of restored pictures."""
    pixels = pictures(np.random.default_rng(seed), number)
    restored = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    errors = ((restored - pixels) ** 2).mean((1, 2, 3))
    decibels = [10 * math.log10(4 / error) for error in errors.tolist()]
    return sum(decibels) / number, min(decibels)


# --------------------------------------------------------------------------------------------------------------------
# Start and finish


def start(directory: Path, steps: int, seed: int = 0) -> None:
    """An untrained model around a trained VAE, with tokenizer and processor."""
    vae, settings = train_vae(steps, seed=seed)
    mean, worst = vae_psnr(vae.eval())
    print(f"The autoencoder restores pictures at {mean:.1f} dB (worst {worst:.1f} dB).")
    configuration, modeling = import_sibling("configuration_bagel"), import_sibling("modeling_bagel")
    processing, images = import_sibling("processing_bagel"), import_sibling("image_processing_bagel")
    tokenizer = build_tiny_tokenizer(all_sentences(), VOCABULARY)
    only_size = {"shortest_edge": SIDE, "longest_edge": SIDE}
    processor = processing.BagelProcessor(
        image_processor=images.BagelImageProcessor(size=only_size, latent_size=only_size, patch_size=PATCH),
        tokenizer=tokenizer,
        chat_template=(REPOSITORY / "chat_template.jinja").read_text(),
    )
    names = ("bos", "eos", "vision_start", "vision_end", "image", "latent")
    config = configuration.BagelConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
        },
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        vae_config=settings,
        stage=2,
        max_latent_size=SIDE // PATCH,
        vit_max_num_patch_per_side=SIDE // PATCH,
        vit_patch_size=PATCH,
        pad_token_id=tokenizer.pad_token_id,
        **{f"{name}_token_id": getattr(processor, f"{name}_token_id") for name in names},
    )
    torch.manual_seed(seed)
    model = modeling.BagelForUnifiedMultimodal(config)
    model.vae.load_state_dict(vae.state_dict())
    _set_generation(model)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def finish(trained: Path, directory: Path = CHECKPOINT) -> None:
    """The trained model in bfloat16 (the VAE stays float32)."""
    modeling, processing = import_sibling("modeling_bagel"), import_sibling("processing_bagel")
    model = modeling.BagelForUnifiedMultimodal.from_pretrained(trained, dtype=torch.bfloat16)
    _set_generation(model)
    processor = processing.BagelProcessor.from_pretrained(trained, trust_remote_code=True)
    write_checkpoint(model, processor, directory)


def _set_generation(model: nn.Module) -> None:
    ids = {name: getattr(model.config, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model.generation_config = GenerationConfig(max_new_tokens=48, **ids)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    starting = commands.add_parser("start", help="train the VAE and write an untrained model around it")
    starting.add_argument("directory", type=Path)
    starting.add_argument("--vae-steps", type=int, default=8000)
    finishing = commands.add_parser("finish", help="write the checkpoint from a trained model")
    finishing.add_argument("trained", type=Path)
    finishing.add_argument("directory", type=Path, nargs="?", default=CHECKPOINT)
    arguments = parser.parse_args()
    if arguments.command == "start":
        start(arguments.directory, arguments.vae_steps)
    else:
        finish(arguments.trained, arguments.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
