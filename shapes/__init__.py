# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The picture world of coloured shapes: scenes and their judge, and the builders of the embedded checkpoints."""
