# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What a training run measures of its packs: errors, tokens, time, FLOPs. It knows packs and modules, no trainer.

`ce` is the cross-entropy of text labels, `mse` the squared error of the velocity of noisy latent tokens.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..configuration_bagel import gen_name, is_gen_name


class Meter:
    """
    Sums over the packs since the last log: errors and their counts, tokens, packs; and the time they took.

    Args:
        sums: to continue with, (names,), from a checkpoint. Its `timed_` entries are dropped: they are divided by the
            seconds of this process, which did not compute them.
    """

    NAMES = ("ce", "labels", "mse", "latents", "tokens", "samples", "packs", "timed_tokens", "timed_flops")

    def __init__(self, sums: torch.Tensor | None = None):
        self._sums = torch.zeros(len(self.NAMES), dtype=torch.float64) if sums is None else sums.clone()
        self._sums[-2:] = 0  # timed_tokens, timed_flops
        self._started, self._paused = time.perf_counter(), 0.0

    def add(self, pack: Mapping[str, Any], outputs: Any, reweighting: bool = False) -> None:
        """Count a pack. With `reweighting`, ce and its labels are weighted as they are in the loss."""
        ce, mse, tokens = outputs.get("ce"), outputs.get("mse"), int(pack["sequence_length"])
        new = dict.fromkeys(self.NAMES, 0.0)
        if ce is not None:
            weights = pack.get("ce_loss_weights") if reweighting else None
            weights = torch.ones_like(ce) if weights is None else weights
            new |= {"ce": float((ce.detach() * weights).double().sum()), "labels": float(weights.double().sum())}
        if mse is not None:
            new |= {"mse": float(mse.detach().double().mean(-1).sum()), "latents": len(mse)}
        samples = len(pack["sample_lens"]) - (sum(map(int, pack["sample_lens"])) > tokens)  # less a padding sample
        new |= {"tokens": tokens, "samples": samples, "packs": 1, "timed_tokens": tokens}
        self._sums += torch.tensor([new[name] for name in self.NAMES], dtype=torch.float64)

    def add_flops(self, flops: float) -> None:
        """Add the FLOPs of a pack (see [`pack_flops`]), counted before it is computed."""
        self._sums[-1] += flops

    def pause(self, seconds: float) -> None:
        """Leave out time that was not spent training: evaluation, drawing, saving."""
        self._paused += seconds

    def seconds(self) -> float:
        """Seconds of training since the meter was made."""
        return max(time.perf_counter() - self._started - self._paused, 1e-9)

    def sums(self, device: torch.device) -> torch.Tensor:
        """The sums, (names,), to be added up over ranks."""
        return self._sums.to(device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)

    @classmethod
    def means(
        cls, sums: Sequence[float], capacity: int | None, seconds: float, peak: float | None = None
    ) -> dict[str, float]:
        """
        What is logged: means over all labels and latent tokens, not means of the packs' means.

        Args:
            sums: added up over all ranks, (names,).
            capacity: the most tokens that a pack may have, for `fill`.
            seconds: of training, for the rates.
            peak: FLOP/s of all devices together, for `mfu`.
        """
        named, means = dict(zip(cls.NAMES, sums)), {}
        if named["labels"]:
            means["ce"] = named["ce"] / named["labels"]
        if named["latents"]:
            means["mse"] = named["mse"] / named["latents"]
        if named["packs"]:
            means["tokens_per_second"] = named["timed_tokens"] / seconds
            if capacity:
                means["fill"] = named["tokens"] / named["packs"] / capacity
            if peak:
                means["mfu"] = named["timed_flops"] / seconds / peak
        return means


def matrices(model: torch.nn.Module) -> dict[str, int]:
    """
    How many weights the linear layers have, by the tokens that pass through them: "und" and "gen" tokens, "all" tokens,
    "vit" tokens, "latent" tokens before the decoder, and of the two heads "labels" and "velocities". Adapters count
    with the layers that they adapt.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    names = set(linears)
    sums: dict[str, int] = dict.fromkeys(("und", "gen", "all", "vit", "latent", "labels", "velocities"), 0)
    for name, module in linears.items():
        if is_in(name, "vae") or is_in(name, "original_module"):  # PEFT's unused copy of a module
            continue
        kind = "all"
        if is_in(name, "vit_model") or is_in(name, "connector"):
            kind = "vit"
        elif is_in(name, "lm_head"):
            kind = "labels"
        elif is_in(name, "llm2vae"):
            kind = "velocities"
        elif not is_in(name, "language_model"):
            kind = "latent"
        elif is_gen_name(name):
            kind = "gen"
        elif gen_siblings(name) & names:
            kind = "und"
        sums[kind] += module.in_features * module.out_features
    return sums


def pack_flops(pack: Mapping[str, Any], matrices: Mapping[str, int], config: Any) -> float:
    """
    Model FLOPs of a training step on a pack, counted as in the released training script: `6 * weights * tokens`, each
    weight with the tokens that pass through it, and `12 * layers * width * sum(length ** 2)` for attention. Frozen
    weights count like trained ones; the frozen VAE is not counted.
    """
    text, vision = config.text_config, config.vision_config
    tokens = int(pack["sequence_length"])
    gen, vit = count_entries(pack.get("packed_vae_token_indexes")), count_entries(pack.get("packed_vit_token_indexes"))
    counts = {"und": tokens - gen, "gen": gen, "all": tokens, "vit": vit, "latent": gen}
    counts |= {
        "labels": count_entries(pack.get("ce_loss_indexes")),
        "velocities": count_entries(pack.get("mse_loss_indexes")),
    }
    flops = 6.0 * sum(matrices[name] * count for name, count in counts.items())
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    padding = sum(map(int, pack["sample_lens"])) - tokens
    squares = sum(int(length) ** 2 for length in pack["sample_lens"]) - padding**2
    flops += 12.0 * text.num_hidden_layers * text.num_attention_heads * head_dim * squares
    if vit and pack.get("vit_token_seqlens") is not None:
        squares = sum(int(length) ** 2 for length in pack["vit_token_seqlens"])
        flops += 12.0 * config.num_vit_layers * vision.hidden_size * squares
    return flops


def count_targets(pack: Mapping[str, Any], reweighting: bool) -> torch.Tensor:
    """(2,): text labels of a pack (with `reweighting` the sum of their weights), and its noisy latent tokens."""
    weights = pack.get("ce_loss_weights") if reweighting else None
    labels = count_entries(pack.get("ce_loss_indexes")) if weights is None else weights.sum()
    return torch.tensor([float(labels), float(count_entries(pack.get("mse_loss_indexes")))])


def count_entries(index: torch.Tensor | None) -> int:
    """Entries of an index; released packs give some as a bool mask instead."""
    if index is None:
        return 0
    return int(index.sum()) if index.dtype == torch.bool else index.numel()


def is_in(name: str, part: str) -> bool:
    """Whether a module or parameter lies in a part of the model."""
    return part in name.split(".")


def gen_siblings(name: str) -> set[str]:
    """Names that the gen expert's counterpart of a parameter or module of the und expert could have."""
    parts = name.split(".")
    return {".".join([*parts[:i], gen_name(parts[i]), *parts[i + 1 :]]) for i in range(len(parts))}
