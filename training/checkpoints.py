# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders that are complete or not there at all: written under another name, listed, then renamed.

A checkpoint is complete when every file that its manifest lists exists with the size listed. It knows folders and
files, not what a trainer writes into them.

    output_dir/.incomplete/checkpoint-500/     while it is being written
    output_dir/checkpoint-500/complete.json    the manifest: {file: bytes}, written last
"""

import json
import os
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging


logger = logging.get_logger(__name__)

MANIFEST = "complete.json"
STAGING = ".incomplete"


def publish(staged: Path, final: Path) -> None:
    """Write the manifest of a finished checkpoint and move it from the staging folder to its name."""
    sizes = {str(file.relative_to(staged)): file.stat().st_size for file in sorted(staged.rglob("*")) if file.is_file()}
    (staged / MANIFEST).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    if final.exists():  # of an earlier run
        final.rename(staged.parent / f"replaced-{final.name}")
    staged.rename(final)
    shutil.rmtree(staged.parent)


def why_incomplete(checkpoint: str | os.PathLike) -> str | None:
    """`None` for a complete checkpoint, otherwise the reason: what is missing or has another size."""
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"it has no readable {MANIFEST}, which is written last"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def last_complete_checkpoint(directory: str | os.PathLike) -> Path | None:
    """The complete checkpoint with the highest step; a warning names each later one that is not complete."""
    directory = Path(directory)
    steps = {}
    for folder in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if folder.is_dir() and number.isdigit():
            steps[int(number)] = folder
    for folder in (directory / STAGING).glob("*"):
        logger.warning(f"Ignoring {folder}: it was being written when training was stopped.")
    for step in sorted(steps, reverse=True):
        reason = why_incomplete(steps[step])
        if reason is None:
            return steps[step]
        logger.warning(f"Ignoring checkpoint {steps[step]}: {reason}.")
    return None


def resolve_checkpoint(wanted: str | bool | None, output_dir: str | os.PathLike) -> Path | None:
    """
    The complete checkpoint that `Trainer.train(resume_from_checkpoint=wanted)` means; `None` for a fresh start.

    Raises:
        ValueError: there is no complete checkpoint, or the one asked for is not complete.
    """
    if not wanted:
        return None
    if wanted is True:  # `Trainer` itself would take the last one without looking at its files
        last = last_complete_checkpoint(output_dir)
        if last is None:
            raise ValueError(f"There is no complete checkpoint in {output_dir} to resume from.")
        return last
    if (reason := why_incomplete(wanted)) is not None:
        raise ValueError(f"Checkpoint {wanted} is incomplete: {reason}.")
    return Path(wanted)
