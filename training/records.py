# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Files in the output folder that say what went wrong: samples that were skipped, and a batch that was not finite."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


NONFINITE_FILE = "nonfinite_batch.json"
SKIPPED_FILE = "skipped.jsonl"


def append_skipped(directory: str | os.PathLike, step: int, rank: int, skipped: Iterable[Sequence[str]]) -> None:
    """Add skipped samples (name, reason) to `skipped.jsonl`, a line each."""
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, SKIPPED_FILE), "a", encoding="utf-8") as file:
        for name, reason in skipped:
            file.write(json.dumps({"step": step, "rank": rank, "id": name, "reason": reason}) + "\n")


def write_nonfinite(directory: str | os.PathLike, facts: Mapping[str, Any], outputs: Mapping[str, Any] | None) -> Path:
    """
    Write `nonfinite_batch.json`: `facts`, and for `ce` and `mse` how many tokens of `outputs` are not finite and which
    ten are the first.
    """
    facts = dict(facts)
    for name in ("ce", "mse"):
        errors = None if outputs is None else outputs.get(name)
        if errors is not None:
            bad = (~torch.isfinite(errors)).reshape(len(errors), -1).any(-1).nonzero()[:, 0].tolist()
            facts[name] = {"tokens": len(errors), "not_finite": len(bad), "first": bad[:10]}
    file = Path(directory) / NONFINITE_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(facts, indent=2), encoding="utf-8")
    return file
