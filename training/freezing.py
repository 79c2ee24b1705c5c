# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What is trained, and with which loss: the freeze options and the loss weights of a run, applied to a model."""

from typing import Any

from .arguments import BagelTrainingArguments
from .metering import gen_siblings, is_in


def set_loss(config: Any, args: BagelTrainingArguments) -> None:
    """Write the loss settings into the model's config, where `forward` reads them."""
    for name in ("ce_weight", "mse_weight"):
        if getattr(args, name) is not None:
            setattr(config, name, getattr(args, name))
    config.ce_loss_reweighting = args.ce_loss_reweighting


def freeze(model: Any, args: BagelTrainingArguments) -> None:
    """
    Switch gradients off as the released options of these names do. The VAE is always frozen.

    Raises:
        ValueError: nothing would be left to train.
    """
    names, tied = {name for name, _ in model.named_parameters()}, model.config.tie_word_embeddings
    if args.freeze_und:
        if not model.config.visual_gen:
            raise ValueError("freeze_und leaves nothing to train in a model that only reads (stage 1).")
        model.config.text_config.freeze_und = True
    for name, parameter in model.named_parameters():
        frozen = (
            is_in(name, "vae")
            or (args.freeze_llm and is_in(name, "language_model"))
            or (args.freeze_vit and is_in(name, "vit_model"))
            or (args.freeze_connector and is_in(name, "connector"))
            or (args.freeze_und and _serves_und_tokens_only(name, names, tied))
        )
        if frozen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("Nothing is left to train: every parameter is frozen. Drop a freeze_ option.")


def _serves_und_tokens_only(name: str, names: set[str], tied: bool) -> bool:
    """Whether `freeze_und`, which stops the gradient of und tokens, leaves a parameter without any gradient."""
    if is_in(name, "vit_model") or is_in(name, "connector"):
        return True
    if is_in(name, "embed_tokens"):
        return not tied  # tied embeddings are also the text head, which still learns
    return bool(gen_siblings(name) & names)
