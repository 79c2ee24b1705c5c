# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Makes `checkpoints/tiny-shapes`, a complete trained BAGEL small enough for git: what comes before and after training.

    python -m bagel.shapes.build start outputs/tiny-shapes/start     # trains VAE and vision tower
    torchrun --standalone --nproc_per_node 2 -m bagel train --config configs/tiny_shapes.yaml  # trains the model
    python -m bagel.shapes.build finish outputs/tiny-shapes/run/ema  # writes checkpoints/tiny-shapes

`make tiny-shapes` runs all three. The data is `world.py`.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import trange
from transformers import GenerationConfig

from ..configuration_bagel import BagelConfig, BagelVAEConfig
from ..conversion.folders import REPOSITORY
from ..flow_bagel import build_vae
from ..image_processing_bagel import BagelImageProcessor, patchify
from ..modeling_bagel import BagelForUnifiedMultimodal
from ..processing_bagel import BagelProcessor
from .tiny_random import write_checkpoint
from .tokenizer import build_tiny_tokenizer
from .world import COLOURS, PLACES, SHAPES, SIDE, SIZES, Inventor, Scene, all_sentences, render, strange_colours


CHECKPOINT = REPOSITORY / "checkpoints" / "tiny-shapes"
KINDS: list[tuple[str, str]] = list(itertools.product(SHAPES, SIZES))
NAMES = [1 + len(KINDS), 1 + len(COLOURS)]  # classes at each place: nothing or a kind; nothing or a colour
PATCH = 16  # pixels per token and side, of the vision tower and of the VAE alike
VOCABULARY = 448


# --------------------------------------------------------------------------------------------------------------------
# The autoencoder


def train_vae(
    steps: int, batch_size: int = 16, learning_rate: float = 2e-3, seed: int = 0
) -> tuple[Any, dict[str, Any]]:
    """
    An autoencoder for the world's pictures: 64x64 pixels to 8x8 latents of 4 channels.

    Pixels that differ from the ground count eight times. The KL term is strong enough that the standard deviation of a
    posterior is about a tenth of that of all latents: the decoder then tolerates errors of this size in drawn latents.

    Returns:
        The VAE and its settings for `vae_config`: its latents have mean 0 and standard deviation 1 under them.
    """
    settings: dict[str, Any] = {
        "z_channels": 4,
        "ch": 16,
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 1,
        "norm_num_groups": 4,
        "resolution": SIDE,
    }
    torch.manual_seed(seed)
    config = BagelVAEConfig(**settings)
    vae: Any = build_vae(config)
    vae = vae.to(memory_format=torch.channels_last)
    rng = np.random.default_rng(seed + 1)

    def loss() -> torch.Tensor:
        pixels = pictures(scenes(rng, batch_size)).to(memory_format=torch.channels_last)
        posterior = vae.encode(pixels).latent_dist
        restored = vae.decode(posterior.sample()).sample
        stands_out = (pixels - pixels[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.05
        error = (restored - pixels).abs() + 2 * (restored - pixels) ** 2
        return ((1 + 7 * stands_out) * error).mean() + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()

    _fit(list(vae.parameters()), loss, steps, learning_rate, weight_decay=1e-4, title="autoencoder")
    return vae, settings | _latent_scale(vae, rng)


def _fit(
    parameters: list[nn.Parameter],
    loss: Callable[[], torch.Tensor],
    steps: int,
    learning_rate: float,
    weight_decay: float,
    title: str,
) -> None:
    """AdamW with one cycle of the learning rate; every call of `loss` makes a new batch."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.05)
    progress = trange(steps, desc=title)
    for _ in progress:
        now = loss()
        optimizer.zero_grad()
        now.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        progress.set_postfix(loss=f"{now.item():.4f}")


def scenes(rng: np.random.Generator, number: int) -> list[Scene]:
    """Scenes without held-out combinations; 3 % of them are empty."""
    inventor = Inventor(rng)
    made = [inventor.scene(False)[0] for _ in range(number)]
    return [scene if rng.random() > 0.03 else Scene(scene.ground, ()) for scene in made]


def pictures(scenes: Sequence[Scene], rng: np.random.Generator | None = None) -> torch.Tensor:
    """Pixels (scenes, 3, 64, 64) in [-1, 1]; with `rng`, things have random colours that are none of `COLOURS`."""
    images = [render(scene, strange_colours(rng, scene.ground) if rng else COLOURS) for scene in scenes]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def _latent_scale(vae: Any, rng: np.random.Generator) -> dict[str, float]:
    latents = vae.encode(pictures(scenes(rng, 256))).latent_dist.sample()
    return {"scale_factor": 1 / latents.std().item(), "shift_factor": latents.mean().item()}


@torch.no_grad()
def vae_psnr(vae: Any, number: int = 256, seed: int = 7) -> tuple[float, float]:
    """Mean and worst PSNR in dB of restored pictures."""
    pixels = pictures(scenes(np.random.default_rng(seed), number))
    restored = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    errors = ((restored - pixels) ** 2).mean((1, 2, 3))
    decibels = [10 * math.log10(4 / error) for error in errors.tolist()]
    return sum(decibels) / number, min(decibels)


# --------------------------------------------------------------------------------------------------------------------
# The vision tower


class PlaceReader(nn.Module):
    """
    Two linear probes on the features of a picture's patches; each classifies the thing at every place.

    The first sees all patches at once and learns fast. The second sees, for each place, an attention-weighted mean of
    the patches, and shares one linear layer between places, which is closer to how the decoder uses the features. Alone
    it learns very slowly; the gradient of the first gives the tower useful features early.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        patches = (SIDE // PATCH) ** 2
        self.at_once = nn.Linear(patches * hidden_size, len(PLACES) * sum(NAMES))
        self.attention = nn.Parameter(torch.zeros(len(PLACES), patches))
        self.gathered = nn.Linear(hidden_size, sum(NAMES))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(pictures, patches, hidden_size) -> logits (pictures, places, sum(NAMES)), twice."""
        at_once = self.at_once(features.flatten(1)).unflatten(1, (len(PLACES), -1))
        return at_once, self.gathered((10 * self.attention).softmax(-1) @ features)


def train_tower(model: Any, steps: int, batch_size: int = 128, learning_rate: float = 2e-3, seed: int = 0) -> float:
    """
    Pretrain the vision tower to classify what is at every place, as BAGEL starts from a pretrained SigLIP.

    Trained by the decoder's losses alone, the tower learns colours and places early and shapes very late. Shapes are
    taught with pictures in random colours and colours with other pictures, so that the tower cannot learn which
    combinations of shape and colour training leaves out.

    Args:
        model: its `vit_model` is trained, in place.

    Returns:
        The share of things in new pictures whose shape, size and colour are classified correctly.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed + 3)
    reader = PlaceReader(model.config.vision_config.hidden_size)

    def loss() -> torch.Tensor:
        of_kinds, of_colours = scenes(rng, batch_size // 2), scenes(rng, batch_size // 2)
        features = _look(model, torch.cat([pictures(of_kinds, rng), pictures(of_colours)]))
        names = place_names([*of_kinds, *of_colours])
        losses: list[Any] = []
        for logits in reader(features):
            kinds, colours = logits.split(NAMES, dim=-1)
            losses.append(_naming_loss(kinds[: len(of_kinds)], names[: len(of_kinds), :, 0]))
            losses.append(_naming_loss(colours[len(of_kinds) :], names[len(of_kinds) :, :, 1]))
        total: Any = sum(losses)
        return total

    parameters = [*model.vit_model.parameters(), *reader.parameters()]
    _fit(parameters, loss, steps, learning_rate, weight_decay=0.01, title="vision tower")
    shown = scenes(rng, 1000)
    with torch.no_grad():
        _, gathered = reader(_look(model, pictures(shown)))
    named = torch.stack([logits.argmax(-1) for logits in gathered.split(NAMES, dim=-1)], dim=-1)
    names = place_names(shown)
    return (named == names).all(-1)[names.any(-1)].float().mean().item()


def _naming_loss(logits: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in which class 0, nothing, counts 0.3: most places are empty."""
    weight = torch.ones(logits.shape[-1])
    weight[0] = 0.3
    return nn.functional.cross_entropy(logits.flatten(0, 1), names.flatten(), weight)


def _look(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The tower's features of pictures, (pictures, patches, hidden_size)."""
    side = SIDE // PATCH
    patches = torch.cat([patchify(picture, PATCH) for picture in pixels])
    features = model.get_image_features(patches, torch.tensor([[side, side]] * len(pixels))).last_hidden_state
    return features.unflatten(0, (len(pixels), -1))


def place_names(scenes: Sequence[Scene]) -> torch.Tensor:
    """Classes (scenes, places, 2) of what is at each place: 1 + index in `KINDS` and in `COLOURS`, 0 for nothing."""
    names = torch.zeros(len(scenes), len(PLACES), 2, dtype=torch.long)
    for number, scene in enumerate(scenes):
        for thing in scene.things:
            name = 1 + KINDS.index((thing.shape, thing.size)), 1 + list(COLOURS).index(thing.colour)
            names[number, PLACES.index(thing.place)] = torch.tensor(name)
    return names


# --------------------------------------------------------------------------------------------------------------------
# Start and finish


def start(directory: Path, vae_steps: int, tower_steps: int, seed: int = 0) -> None:
    """Write an untrained decoder with a trained VAE and a trained vision tower, tokenizer and processor."""
    vae, settings = train_vae(vae_steps, seed=seed)
    mean, worst = vae_psnr(vae.eval())
    print(f"The autoencoder restores pictures at {mean:.1f} dB (worst {worst:.1f} dB).")
    tokenizer = build_tiny_tokenizer(all_sentences(), VOCABULARY)
    only_size = {"shortest_edge": SIDE, "longest_edge": SIDE}
    processor = BagelProcessor(
        image_processor=BagelImageProcessor(size=only_size, latent_size=only_size, patch_size=PATCH),
        tokenizer=tokenizer,
        chat_template=(REPOSITORY / "chat_template.jinja").read_text(),
    )
    names = ("bos", "eos", "vision_start", "vision_end", "image", "latent")
    config = BagelConfig(
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
    model = BagelForUnifiedMultimodal(config)
    model.vae.load_state_dict(vae.state_dict())
    right = train_tower(model, tower_steps, seed=seed)
    print(f"The vision tower classifies {right:.1%} of the things in new pictures correctly.")
    _set_generation(model)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def finish(trained: Path, directory: Path = CHECKPOINT) -> None:
    """Write the trained model in bfloat16 (the VAE stays float32)."""
    model = BagelForUnifiedMultimodal.from_pretrained(trained, dtype=torch.bfloat16)
    _set_generation(model)
    processor = BagelProcessor.from_pretrained(trained, trust_remote_code=True)
    write_checkpoint(model, processor, directory)


def _set_generation(model: Any) -> None:
    ids = {name: getattr(model.config, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model.generation_config = GenerationConfig(max_new_tokens=48, **ids)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    starting = commands.add_parser("start", help="train VAE and vision tower and write an untrained model around them")
    starting.add_argument("directory", type=Path)
    starting.add_argument("--vae-steps", type=int, default=8000)
    starting.add_argument("--tower-steps", type=int, default=4000)
    finishing = commands.add_parser("finish", help="write the checkpoint from a trained model")
    finishing.add_argument("trained", type=Path)
    finishing.add_argument("directory", type=Path, nargs="?", default=CHECKPOINT)
    arguments = parser.parse_args()
    if arguments.command == "start":
        start(arguments.directory, arguments.vae_steps, arguments.tower_steps)
    else:
        finish(arguments.trained, arguments.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
