# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Makes `checkpoints/tiny-random`: a complete BAGEL with random weights, small enough for git, for demo and tests.

    python -m bagel.shapes.tiny_random [DIRECTORY]

Weights are random, so answers and drawings are noise; tokenizer, processor, VAE and both experts are complete.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ..configuration_bagel import BagelConfig
from ..conversion.folders import REPOSITORY, RUNTIME_FILES
from ..image_processing_bagel import BagelImageProcessor
from ..modeling_bagel import BagelForUnifiedMultimodal
from ..processing_bagel import BagelProcessor
from .tokenizer import build_tiny_tokenizer


GENERATION_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def build(directory: Path, seed: int = 0) -> None:
    """Write model, tokenizer and processor to `directory`."""
    tokenizer = build_tiny_tokenizer()
    processor = BagelProcessor(
        image_processor=BagelImageProcessor(
            size={"shortest_edge": 112, "longest_edge": 280}, latent_size={"shortest_edge": 128, "longest_edge": 256}
        ),
        tokenizer=tokenizer,
        chat_template=(REPOSITORY / "chat_template.jinja").read_text(),
    )
    names = ("bos", "eos", "vision_start", "vision_end", "image", "latent")
    ids = {f"{name}_token_id": getattr(processor, f"{name}_token_id") for name in names}
    config = BagelConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
        },
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 280,
        },
        vae_config={"z_channels": 4, "ch": 8, "ch_mult": [1, 2, 2, 2], "num_res_blocks": 1},
        stage=2,
        max_latent_size=16,
        vit_max_num_patch_per_side=20,
        pad_token_id=tokenizer.pad_token_id,
        **ids,
    )
    torch.manual_seed(seed)
    model = BagelForUnifiedMultimodal(config)
    with torch.no_grad():
        model.llm2vae.weight.normal_(std=0.1)  # zero in a new model: the velocity would be 0 and the noise the result
    model.generation_config = GenerationConfig(**{name: getattr(config, name) for name in GENERATION_IDS})
    write_checkpoint(model, processor, directory)


def write_checkpoint(model: Any, processor: Any, directory: Path) -> None:
    """Write model and processor to a new folder, complete or not at all; inside this repository code is linked."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        model.save_pretrained(scratch)
        processor.save_pretrained(scratch)
        if directory.resolve().is_relative_to(REPOSITORY):
            for name in RUNTIME_FILES:
                file = Path(scratch) / name
                file.unlink(missing_ok=True)
                file.symlink_to(os.path.relpath(REPOSITORY / name, directory))
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(scratch, directory, symlinks=True)
    size = sum(file.stat().st_size for file in directory.iterdir() if not file.is_symlink())
    print(f"Wrote {directory}: {size / 1e6:.1f} MB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, default=REPOSITORY / "checkpoints" / "tiny-random")
    arguments = parser.parse_args()
    build(arguments.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
