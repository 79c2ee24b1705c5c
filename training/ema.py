# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Averaged weights: an exponential moving average (EMA) of the weights that are trained, kept by diffusers' `EMAModel`.

It knows parameters, not the trainer.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch


class AveragedWeights:
    """
    The average of a model's trained parameters, in float32 (bfloat16 would lose small steps).

    Args:
        model: its parameters with `requires_grad` are averaged.
        decay: of the average; it is reached gradually, `(1 + n) / (10 + n)` after `n` steps.

    Raises:
        ImportError: diffusers is not installed.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        try:
            from diffusers.training_utils import EMAModel
        except ImportError as error:
            raise ImportError("ema_decay needs diffusers: `pip install diffusers`.") from error
        self.decay = decay
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.average = EMAModel(self.parameters, decay=decay, foreach=True)
        self.average.to(dtype=torch.float32)

    def step(self) -> None:
        """Move the average towards the present weights: call it after every optimizer step."""
        self.average.step(self.parameters)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside the `with` block, and its own again afterwards."""
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        try:
            yield
        finally:
            self.average.restore(self.parameters)

    def save(self, file: Path) -> None:
        torch.save(self.average.state_dict(), file)

    def load(self, file: Path) -> None:
        """Go on from a saved average, with the decay of this run."""
        self.average.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        shadows = zip(self.average.shadow_params, self.parameters)
        self.average.shadow_params = [shadow.to(parameter.device) for shadow, parameter in shadows]
        self.average.decay = self.decay
