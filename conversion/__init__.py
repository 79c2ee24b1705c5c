# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Between checkpoint layouts, and new models from pretrained parts: `bagel adopt`, `bagel export`, `bagel build`."""

from .adopting import Adoption, adopt
from .backbones import from_backbones
from .building import build
from .exporting import export


__all__ = ["Adoption", "adopt", "build", "export", "from_backbones"]
