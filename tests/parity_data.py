# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Reference numbers of the released BAGEL: where they lie, how exact they are, and models of their checkpoints.

A set is a directory: `set.json`, `checkpoint/` in the released layout, and cases as pairs `NAME.json` (facts) and
`NAME.safetensors` (arrays). `tests/parity` is one; `BAGEL_PARITY_DIR` names another, which is replayed as well. Every
size, id and count comes from the set. A file may be stored gzipped, as `FILE.gz`.
"""

import gzip
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file

from bagel.checkpoint_bagel import to_module_name, to_module_shape
from bagel.configuration_bagel import BagelConfig
from bagel.image_processing_bagel import BagelImageProcessor
from bagel.modeling_bagel import BagelForUnifiedMultimodal


TESTS = Path(__file__).parent
EMBEDDED = TESTS / "parity"
RELEASED_MANIFEST = TESTS / "released_manifest.json"  # names and shapes of the released 7B tensors, per file

# Largest absolute difference per kind of number, float32 on a CPU. They are about ten times what the released code
# differs from itself by (another number of threads, float64), and far below what any known mistake makes.
TOLERANCES = {
    "copy": 1e-6,  # what is only moved or resized: pictures, patches, timesteps
    "time": 2e-6,
    "vit": 2e-5,
    "vae": 3e-5,
    "hidden": 3e-5,
    "ce": 3e-5,
    "mse": 1e-4,
    "gradient": 1e-5,
    "grad_norm": 1e-4,
    "loss": 2e-5,
    "cache": 5e-5,
    "logits": 5e-5,
    "velocity": 1e-4,
    "latents": 1e-4,
    "pixels": 3e-5,
}
RELATIVE = {"grad_norm": 1e-5}


def read_bytes(path: Path) -> bytes:
    """The content of a file that is stored as it is or gzipped."""
    if path.is_file():
        return path.read_bytes()
    return gzip.decompress(path.with_name(f"{path.name}.gz").read_bytes())


@cache
def read_json(path: Path) -> Any:
    return json.loads(read_bytes(path))


def read_arrays(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file."""
    return load(read_bytes(path))


def find_sets(embedded: Path = EMBEDDED, variable: str = "BAGEL_PARITY_DIR", pattern: str = "set.json") -> list[Path]:
    """The directories that are replayed: the embedded one, and the one that the environment variable names."""
    if not (named := os.environ.get(variable)):
        return [embedded]
    other = Path(named).resolve()
    if not any(other.glob(pattern)):
        raise FileNotFoundError(f"{variable}={named} is no set of reference numbers: it has no {pattern}")
    return [other, embedded]


@dataclass(frozen=True)
class ParitySet:
    """One directory of reference numbers."""

    path: Path

    @property
    def label(self) -> str:
        return "embedded" if self.path == EMBEDDED else self.facts("set")["name"]

    @property
    def marks(self) -> list:
        return [pytest.mark.core] if self.path == EMBEDDED else []

    @property
    def token_ids(self) -> dict[str, int]:
        """The special ids under the names of the config; a picture's places need no id of the vocabulary."""
        special = self.facts("set")["spec"]["special"]
        return {
            "bos_token_id": special["bos_token_id"],
            "eos_token_id": special["eos_token_id"],
            "pad_token_id": special["eos_token_id"],
            "vision_start_token_id": special["start_of_image"],
            "vision_end_token_id": special["end_of_image"],
        }

    def facts(self, name: str) -> dict[str, Any]:
        return read_json(self.path / f"{name}.json")

    def names(self, folder: str) -> list[str]:
        return [f"{folder}/{path.stem}" for path in sorted((self.path / folder).glob("*.json"))]

    def picture(self, file: str) -> Image.Image:
        with Image.open(self.path / file) as image:
            return image.copy()

    def config(self, attn_implementation: str = "sdpa", **changes) -> BagelConfig:
        """The released config with the set's special ids; `changes` win over the file."""
        released = self.facts("checkpoint/config")
        return BagelConfig.from_dict(released, **self.token_ids, **changes, attn_implementation=attn_implementation)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The checkpoint under module names."""
        tensors = load_file(self.path / "checkpoint" / "ema.safetensors")
        vae_config = self.config().vae_config
        for released, tensor in load_file(self.path / "checkpoint" / "ae.safetensors").items():
            name = to_module_name(released, vae_config)
            tensors[name] = tensor.reshape(to_module_shape(name, tensor.shape))
        return tensors

    def model(self, attn_implementation: str = "sdpa", **changes) -> BagelForUnifiedMultimodal:
        """
        A model of the checkpoint, made once per process; a test that changes it must change it back.

        With parts switched off their tensors are left out.
        """
        return _model(self, attn_implementation, tuple(sorted(changes.items())))

    def joint(self, attn_implementation: str = "sdpa") -> BagelForUnifiedMultimodal:
        """The model that reads and draws, for inference."""
        return self.model(attn_implementation).eval()


@cache
def _model(parity: ParitySet, attn_implementation: str, changes: tuple) -> BagelForUnifiedMultimodal:
    text = {name: value for name, value in changes if name in ("layer_module", "freeze_und")}
    rest = {name: value for name, value in changes if name not in text}
    model = BagelForUnifiedMultimodal(parity.config(attn_implementation, llm_config=text, **rest))
    own, tensors = model.state_dict(), parity.tensors()
    missing = own.keys() - tensors.keys() - set(model.all_tied_weights_keys)
    assert not missing, f"the checkpoint lacks {missing}"
    if model.config.visual_und and model.config.visual_gen:
        assert tensors.keys() <= own.keys(), f"the model has no place for {sorted(tensors.keys() - own.keys())}"
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if name in own}, strict=False)
    return model


# --------------------------------------------------------------------------------------------------------------------
# Cases


@dataclass(frozen=True)
class Case:
    """One pair of files, or the facts alone."""

    parity: ParitySet
    name: str

    @property
    def facts(self) -> dict[str, Any]:
        return self.parity.facts(self.name)

    def replay(self) -> "Replay":
        return Replay(self)

    def image_processor(self) -> BagelImageProcessor:
        """With the sizes of this case."""
        vae, vit = self.facts["tiny_vae_transform"], self.facts["tiny_vit_transform"]
        return BagelImageProcessor(
            size={"shortest_edge": vit["min_image_size"], "longest_edge": vit["max_image_size"]},
            latent_size={"shortest_edge": vae["min_image_size"], "longest_edge": vae["max_image_size"]},
            patch_size=vit["image_stride"],
            latent_stride=vae["image_stride"],
        )


def sets(needs: Callable[[ParitySet], bool] = lambda parity: True) -> list:
    """Test parameters: every set."""
    found = [ParitySet(path) for path in find_sets()]
    return [pytest.param(parity, id=parity.label, marks=parity.marks) for parity in found if needs(parity)]


def cases(folder: str, wanted: Callable[[dict[str, Any]], bool] = lambda facts: True, first: bool = False) -> list:
    """Test parameters: every case of a folder whose facts are wanted, or the first of each set."""
    parameters = []
    for path in find_sets():
        parity = ParitySet(path)
        found = [Case(parity, name) for name in parity.names(folder) if wanted(parity.facts(name))]
        for case in found[:1] if first else found:
            label = f"{parity.label}-{case.name.rpartition('/')[2]}"
            parameters.append(pytest.param(case, id=label, marks=parity.marks))
    return parameters


class Replay:
    """
    The arrays of one case, compared and counted: `finish` fails if one was never looked at.

    Cases of one kind do not all hold the same arrays, so comparing with an absent one does nothing. What a set holds
    is counted in `test_reference_numbers.py`.
    """

    def __init__(self, case: Case):
        self.case = case
        self._arrays = read_arrays(case.parity.path / f"{case.name}.safetensors")
        self._used = set()

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __getitem__(self, name: str) -> torch.Tensor:
        self._used.add(name)
        return self._arrays[name]

    def matching(self, pattern: str) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
        """Arrays whose whole name matches, with the groups of the match, in the order of the first number."""
        found = [match for name in self._arrays if (match := re.fullmatch(pattern, name))]
        for match in sorted(found, key=lambda match: [int(g) if g.isdigit() else 0 for g in match.groups()]):
            yield match.groups(), self[match.group()]

    def close(self, name: str, actual: torch.Tensor, kind: str) -> None:
        if name in self:
            assert_close(actual, self[name], kind, name)

    def close_picture(self, name: str, image: Image.Image) -> None:
        """uint8 by truncation: a value on a border may fall one lower or higher, few do."""
        if name in self:
            difference = np.abs(np.asarray(image).astype(int) - self[name].numpy().astype(int))
            assert difference.max() <= 1, f"{name} differs by {difference.max()} of 255"
            changed = (difference > 0).mean()
            assert changed <= 0.005, f"{changed:.2%} of {name} differ"

    def equal(self, name: str, actual: torch.Tensor | list) -> None:
        """The same integers."""
        if name in self:
            expected = self[name]
            actual = torch.as_tensor(actual).reshape(-1).to(expected.dtype)
            assert actual.tolist() == expected.reshape(-1).tolist(), f"{name} differs"

    def finish(self, *elsewhere: str) -> None:
        """`elsewhere`: patterns of arrays that another test replays."""
        unused = [name for name in self._arrays if name not in self._used]
        unused = [name for name in unused if not any(re.fullmatch(pattern, name) for pattern in elsewhere)]
        assert not unused, f"{self.case.name} holds arrays that are not replayed: {unused}"


def assert_close(actual, expected, kind: str, name: str) -> None:
    """Within the tolerance of its kind, same shape, everything finite."""
    actual, expected = (torch.as_tensor(x).detach().float() for x in (actual, expected))
    assert actual.shape == expected.shape, f"{name} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    if not actual.numel():
        return
    worst = (actual - expected).abs().max().item()
    allowed = TOLERANCES[kind] + RELATIVE.get(kind, 0) * expected.abs().max().item()
    assert worst <= allowed, f"{name} differs by {worst:.2e}, allowed is {allowed:.2e} ({kind})"


# --------------------------------------------------------------------------------------------------------------------
# Stand-in for the random numbers of the released run


@contextmanager
def drawn_noise(*draws: torch.Tensor) -> Iterator[None]:
    """`torch.randn` gives these, in order, and nothing more."""
    left = list(draws)

    def randn(*shape, **kwargs):
        drawn = left.pop(0)
        assert tuple(drawn.shape) == tuple(shape[0] if len(shape) == 1 else shape)
        return drawn

    with mock.patch.object(torch, "randn", randn):
        yield
    assert not left, f"{len(left)} draws were not used"
