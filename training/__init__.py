# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Training: streams of rows to packs, and a `Trainer` for them. Needs the extra `train`."""

from .arguments import BagelTrainingArguments
from .packed import PackedDataset
from .sources import DataSource, StreamedFiles, conversations, editing_parquet, t2i_parquet, vlm_jsonl
from .trainer import BagelTrainer


__all__ = [
    "BagelTrainer",
    "BagelTrainingArguments",
    "DataSource",
    "PackedDataset",
    "StreamedFiles",
    "conversations",
    "editing_parquet",
    "t2i_parquet",
    "vlm_jsonl",
]
