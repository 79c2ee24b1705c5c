# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The embedded reference numbers are complete: what is replayed cannot become less without a change in this file."""

import hashlib
from collections import Counter
from pathlib import Path

import pytest
from parity_data import EMBEDDED, RELEASED_MANIFEST, cases, read_arrays, read_bytes, read_json


pytestmark = pytest.mark.core

POSITIONS = Path(__file__).parent / "positions"
NOT_LISTED = {"MANIFEST.json", "NOTES.md", ".gitattributes"}
DTYPES = {"F32": "float32", "I64": "int64", "I32": "int32", "BOOL": "bool", "U8": "uint8"}

# (folder, files, arrays, cases that tests are parametrized with)
PARITY_CONTENTS = [
    ("checkpoint", 5, 315, 0),
    ("embeddings", 2, 25, 1),
    ("generate", 93, 803, 47),
    ("image_transform", 23, 65, 0),
    ("pack", 9, 0, 9),
    ("train_forward", 14, 249, 7),
    ("vae", 2, 24, 1),
    ("vit", 2, 11, 1),
]
POSITION_FILES, POSITION_ARRAYS, POSITION_CASES = 26, 359, 88
RELEASED_TENSORS = {"ema.safetensors": 1223, "ae.safetensors": 244}


def manifest(folder: Path) -> dict[str, dict]:
    """Per file of a set: bytes, sha256 and, if it holds arrays, dtype and shape of each."""
    return read_json(folder / "MANIFEST.json")


def count(folder: Path) -> tuple[Counter, Counter]:
    """-> files and arrays per folder of a set."""
    files, arrays = Counter(), Counter()
    for name, entry in manifest(folder).items():
        part = name.rpartition("/")[0].partition("/")[0]
        files[part] += 1
        arrays[part] += len(entry.get("tensors", {}))
    return files, arrays


def test_no_released_number_is_missing():
    files, arrays = count(EMBEDDED)
    assert files == {"": 1} | {folder: number for folder, number, _, _ in PARITY_CONTENTS}
    assert +arrays == +Counter({folder: number for folder, _, number, _ in PARITY_CONTENTS})
    assert (files.total(), arrays.total()) == (151, 1492)


@pytest.mark.parametrize(("folder", "number"), [(folder, number) for folder, _, _, number in PARITY_CONTENTS if number])
def test_every_released_case_is_found(folder, number):
    assert sum(parameter.values[0].parity.path == EMBEDDED for parameter in cases(folder)) == number


def test_no_position_number_is_missing():
    files, arrays = count(POSITIONS)
    assert (files.total(), arrays.total()) == (POSITION_FILES, POSITION_ARRAYS)
    facts = [read_json(POSITIONS / name) for name in manifest(POSITIONS) if name.endswith(".json")]
    assert sum(len(content.get("cases", [])) for content in facts) == POSITION_CASES


def test_every_released_tensor_is_listed():
    assert {file: len(tensors) for file, tensors in read_json(RELEASED_MANIFEST).items()} == RELEASED_TENSORS


@pytest.mark.parametrize("folder", [EMBEDDED, POSITIONS], ids=["parity", "positions"])
def test_files_are_those_of_the_manifest(folder):
    stored = {path.relative_to(folder).as_posix().removesuffix(".gz") for path in folder.rglob("*") if path.is_file()}
    assert stored - NOT_LISTED == manifest(folder).keys()
    for name, entry in manifest(folder).items():
        content = read_bytes(folder / name)
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"]), name


@pytest.mark.parametrize("folder", [EMBEDDED, POSITIONS], ids=["parity", "positions"])
def test_arrays_are_those_of_the_manifest(folder):
    for name, entry in manifest(folder).items():
        if "tensors" in entry:
            expected = {array: (f"torch.{DTYPES[dtype]}", shape) for array, (dtype, shape) in entry["tensors"].items()}
            found = {array: (str(x.dtype), list(x.shape)) for array, x in read_arrays(folder / name).items()}
            assert found == expected, name
