# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A new model folder from pretrained parts: a Qwen2 text model, a SigLIP vision tower, an autoencoder."""

import os
from pathlib import Path

import torch
from transformers import AutoTokenizer

from ..modeling_bagel import BagelForUnifiedMultimodal
from .backbones import find_files
from .folders import new_folder, new_processor, refuse_taken


def build(
    out_dir: str | os.PathLike,
    text_model: str,
    vision_model: str | None = None,
    vae: str | None = None,
    dtype: str = "auto",
    seed: int = 0,
    **fields,
) -> list[str]:
    """
    Write a BAGEL made of pretrained parts, with tokenizer and processor: a folder to start training from.

    Args:
        text_model: a Qwen2 model with its tokenizer.
        vision_model, vae, dtype, fields: see `BagelForUnifiedMultimodal.from_backbones`.
        seed: of the new weights.

    Returns:
        The names of the files written.

    Raises:
        OSError: a part cannot be found or read, or `out_dir` is not empty.
        ValueError: the parts do not make a model.
    """
    out_dir = Path(out_dir)
    refuse_taken(out_dir)
    source = find_files(text_model, "text_model")
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(seed)
    model = BagelForUnifiedMultimodal.from_backbones(
        source, vision_model, vae, tokenizer=tokenizer, dtype=dtype, **fields
    )
    with new_folder(out_dir, model.get_memory_footprint()) as partial:
        model.save_pretrained(partial)
        new_processor(model.config, tokenizer).save_pretrained(partial)
        written = sorted(file.name for file in partial.iterdir())
    return written
