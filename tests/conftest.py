# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Makes this checkout importable as the package `bagel`, installed or not, and keeps every test offline."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")
REPO = Path(__file__).resolve().parent.parent


def _import_this_checkout():
    spec = importlib.util.spec_from_loader("bagel", loader=None, is_package=True)
    package = importlib.util.module_from_spec(spec)
    package.__path__ = [str(REPO)]
    sys.modules["bagel"] = package
    sys.path.insert(0, str(Path(__file__).parent))


_import_this_checkout()

import torch  # noqa: E402


torch.set_num_threads(1)  # tests run in parallel processes


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


@pytest.fixture(scope="session")
def tiny_directory() -> Path:
    """The embedded checkpoint."""
    return REPO / "checkpoints" / "tiny-random"


@pytest.fixture(scope="module")
def model(tiny_directory):
    from bagel.modeling_bagel import BagelForUnifiedMultimodal

    return BagelForUnifiedMultimodal.from_pretrained(tiny_directory).eval()


@pytest.fixture(scope="session")
def processor(tiny_directory):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(tiny_directory, trust_remote_code=True)


@pytest.fixture(scope="session")
def picture():
    from PIL import Image

    return Image.open(REPO / "assets" / "cat.jpg").convert("RGB")


@pytest.fixture(scope="session")
def other_picture():
    from PIL import Image

    return Image.open(REPO / "assets" / "coffee.jpg").convert("RGB").crop((0, 0, 200, 260))
