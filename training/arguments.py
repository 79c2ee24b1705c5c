# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""`BagelTrainingArguments`: the settings of a training run beside model and data. It knows no model and no data."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments


@dataclass
class BagelTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with defaults for packs (a pack is a batch), and what BAGEL adds.

    The loss of a step is `ce_weight * mean(ce) + mse_weight * mean(mse)`: the means are taken over all text labels and
    all noisy latent tokens of the optimizer step, however they are spread over packs, accumulation steps and ranks.

    Raises:
        ValueError: a value is out of its range.
    """

    per_device_train_batch_size: int = field(
        default=1, metadata={"help": "Conversations per pack with `processor.collator()`; 1 for ready packs."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Packs and conversations keep their columns."})
    use_cache: bool = field(default=True, metadata={"help": "Saved with the model's config; training uses no cache."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "False: a loss that is not finite stops training."}
    )
    ce_weight: float | None = field(
        default=None, metadata={"help": "Weight of the text loss. Default: that of the model's config."}
    )
    mse_weight: float | None = field(
        default=None, metadata={"help": "Weight of the image loss. Default: that of the model's config."}
    )
    ce_loss_reweighting: bool = field(
        default=False, metadata={"help": "Weight every text label by the pack's ce_loss_weights."}
    )
    freeze_llm: bool = field(default=False, metadata={"help": "Freeze the language model, both experts of it."})
    freeze_vit: bool = field(default=False, metadata={"help": "Freeze the vision tower."})
    freeze_und: bool = field(
        default=False,
        metadata={
            "help": "No gradient through und tokens: freezes the und expert, its norms, the token embeddings, the "
            "vision tower and the connector. The text head still learns."
        },
    )
    freeze_connector: bool = field(default=False, metadata={"help": "Freeze the connector of the vision tower."})
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Keep an exponential moving average of the trained weights with this decay, which is reached "
            "gradually: (1 + n) / (10 + n) after n steps; 0 = off."
        },
    )
    latent_cache_gb: float = field(
        default=0.0,
        metadata={
            "help": "GB of memory per process in which VAE encodings of training images are kept, so that later epochs "
            "need not encode them again; 0 = off. 1024 x 1024 pixels take 2 MB. Useful only for images that have the "
            "same pixels in every epoch (no random crops or flips)."
        },
    )
    peak_flops_per_device: float | None = field(
        default=None, metadata={"help": "Peak FLOP/s of one device, to log the share of them that is used (mfu)."}
    )
    sample_prompts: str | None = field(
        default=None,
        metadata={
            "help": "List (JSON on the command line) of {text, image?}: images that are drawn during training, with "
            "the averaged weights if there are any, into samples/ and the tracker."
        },
    )
    sample_steps: int | None = field(
        default=None, metadata={"help": "Training steps between such drawings. Default: at every evaluation."}
    )
    sample_options: dict | str | None = field(
        default=None,
        metadata={"help": "Arguments of generate for them (JSON on the command line), e.g. num_timesteps."},
    )

    def __post_init__(self) -> None:
        for name in ("sample_prompts", "sample_options"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, json.loads(getattr(self, name)))
        prompts: Any = self.sample_prompts or []
        if not all(isinstance(prompt, Mapping) and prompt.get("text") for prompt in prompts):
            raise ValueError(f"sample_prompts={prompts}: each must be a dict with a text and, optionally, an image.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must be at least 0 (off) and below 1.")
        if self.latent_cache_gb < 0:
            raise ValueError(f"latent_cache_gb={self.latent_cache_gb} must be at least 0 (off).")
        super().__post_init__()
