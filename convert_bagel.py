# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A door to `bagel adopt`, `bagel export` and `bagel build` for a folder from the Hub, where nothing is installed.

python convert_bagel.py adopt DIR                 make a released folder loadable by transformers, in place
python convert_bagel.py export MODEL_DIR OUT_DIR  write a (fine-tuned) model as a released folder
python convert_bagel.py build OUT_DIR --text-model QWEN2 [--vision-model SIGLIP] [--vae VAE]
                                                  write an untrained BAGEL made of pretrained parts
"""

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def import_sibling(name: str) -> ModuleType:
    """A module of this folder, imported as a part of the package `bagel`, whether that is installed or not."""
    if "bagel" not in sys.modules:
        spec = importlib.machinery.ModuleSpec("bagel", loader=None, is_package=True)
        spec.submodule_search_locations = [str(Path(__file__).resolve().parent)]
        sys.modules["bagel"] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"bagel.{name}")


if __name__ == "__main__":
    sys.exit(import_sibling("conversion.commands").main())
