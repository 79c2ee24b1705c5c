# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: their headers, the names of their tensors, and whether they fit a model; defines no modules.

Two layouts exist. The released one has `ema.safetensors`, whose names are those of the model's `state_dict`, and
`ae.safetensors`, the VAE under names of its own. The layout of `save_pretrained` has everything under `state_dict`
names. Both load, also mixed.

Everything here is decided from file headers, before a tensor is read. A "released name" is a name of `ae.safetensors`,
a "module name" one of the model's `state_dict`.
"""

import copy
import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import logging

from .configuration_bagel import GEN_SUFFIX, SUB_CONFIG_ALIASES, BagelVAEConfig


logger = logging.get_logger(__name__)

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MODEL_FILE = "ema.safetensors"
VAE_FILE = "ae.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

# The parts of a model, by the names of their tensors; `encoder.` and `decoder.` are the VAE under released names.
PARTS = {
    f"generation expert (*{GEN_SUFFIX})": rf"{GEN_SUFFIX}\.",
    "vision tower and connector": r"^(vit_model|connector|vit_pos_embed)\.",
    "latent embeddings and velocity head": r"^(time_embedder|vae2llm|llm2vae|latent_pos_embed)\.",
    "VAE": r"^(vae|encoder|decoder)\.",
    "language model": r"^language_model\.",
}
GEN_EXPERT, VISION, LATENTS, VAE, LANGUAGE = PARTS

# Special ids that are looked up in the embedding table; the placeholders of image tokens are not.
EMBEDDED_IDS = ("bos_token_id", "eos_token_id", "vision_start_token_id", "vision_end_token_id")

# What `BagelModel` does not have.
HEADS = r"^(language_model\.lm_head|llm2vae)\."

# Tables that older files store and that every model computes.
COMPUTED_TABLES = r"rotary_emb\.inv_freq$"

# Position tables of vision towers: the learned one is trained, the rotary ones follow from a formula.
LEARNED_TABLE = r"^vit_model\.vision_model\.embeddings\.position_embedding\."
ROTARY_TABLES = r"^vit_model\.vision_model\.rope\."

ELEMENT_BYTES = {f"{kind}{8 * size}": size for kind in "UIF" for size in (1, 2, 4, 8)}
ELEMENT_BYTES |= {"BOOL": 1, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format

# What quantisation leaves as it is stored: the modules at the inputs and outputs of the decoder (7 % of the released
# parameters), whose errors no later layer averages out.
UNQUANTISED = ("vae", "vit_model", "connector", "time_embedder", "vae2llm", "llm2vae", "language_model.lm_head")
SKIP_LISTS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")  # bitsandbytes, most others, HQQ


# --------------------------------------------------------------------------------------------------------------------
# Headers of single files


class TensorInfo(NamedTuple):
    """One tensor of a safetensors file: `dtype` as in the header ("BF16"); its bytes are file[begin:end]."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class StoredTensor(NamedTuple):
    """A tensor and the file it is stored in."""

    file: Path
    info: TensorInfo


def read_header(file: str | os.PathLike) -> dict[str, TensorInfo]:
    """
    Names, dtypes, shapes and offsets of the tensors in a safetensors file; reads the header only.

    Raises:
        OSError: the file is absent, truncated or no safetensors file.
    """
    found = os.path.getsize(file)
    with open(file, "rb") as handle:
        start, brace = handle.read(8), handle.read(1)
        header_bytes = int.from_bytes(start, "little")
        if start == b"version ":
            raise OSError(f"{file} is a Git LFS pointer of {found} bytes, not the weights: run `git lfs pull`.")
        if len(start) == 8 and not 2 <= header_bytes <= MAX_HEADER_BYTES:
            raise _damaged(file, found, f"its first 8 bytes announce a header of {header_bytes} bytes")
        if brace not in (b"", b"{"):
            raise _damaged(file, found, f"its header starts with {brace!r}")
        if found < 8 + header_bytes or len(start) < 8:
            raise _truncated(file, found, f"at least {8 + header_bytes}")
        header = brace + handle.read(header_bytes - 1)
    end = 8 + header_bytes
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {
            name: TensorInfo(entry["dtype"], tuple(entry["shape"]), *(end + offset for offset in entry["data_offsets"]))
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, found, "its header is no table of tensors") from error
    for name, info in sorted(tensors.items(), key=lambda item: item[1].begin):
        size = ELEMENT_BYTES.get(info.dtype)
        if info.begin != end or (size is not None and info.end - info.begin != size * math.prod(info.shape)):
            raise _damaged(file, found, f"the bytes of {name} do not fit its shape {info.shape}")
        end = info.end
    if found < end:
        raise _truncated(file, found, str(end))
    if found > end:
        raise _damaged(file, found, f"its header describes {end} bytes")
    return tensors


def _truncated(file: str | os.PathLike, found: int, expected: str) -> OSError:
    return OSError(f"{file} is truncated: {found} bytes found, {expected} expected. Download it again.")


def _damaged(file: str | os.PathLike, found: int, why: str) -> OSError:
    return OSError(f"{file} is damaged or no safetensors file: {found} bytes found, but {why}. Download it again.")


# --------------------------------------------------------------------------------------------------------------------
# Names and shapes of the VAE

# The 1x1 convolutions of the middle attention: (C, C, 1, 1) in released files, linear layers (C, C) in diffusers.
MID_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def vae_names(vae_config: "BagelVAEConfig | _VAEStructure") -> list[tuple[str, str]]:
    """
    (released name, module name) of every module of the VAE that has parameters.

    Both number the levels of the decoder, but in opposite order: released `up.0` is the last level, `up_blocks.0` of
    diffusers the first.
    """
    levels = len(vae_config.ch_mult)
    widths = [vae_config.ch * multiplier for multiplier in vae_config.ch_mult]
    pairs = []
    for half in ("encoder", "decoder"):
        ends = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
        pairs += [(f"{half}.{released}", f"vae.{half}.{ours}") for released, ours in ends.items()]
        for index in (0, 1):
            pairs += _resnet_names(f"{half}.mid.block_{index + 1}", f"vae.{half}.mid_block.resnets.{index}")
        for released, ours in {"norm": "group_norm", **MID_ATTENTION}.items():
            pairs.append((f"{half}.mid.attn_1.{released}", f"vae.{half}.mid_block.attentions.0.{ours}"))
    for level in range(levels):
        down = (f"encoder.down.{level}", f"vae.encoder.down_blocks.{level}")
        up = (f"decoder.up.{level}", f"vae.decoder.up_blocks.{levels - 1 - level}")
        for block in range(vae_config.num_res_blocks):
            widens = block == 0 and widths[level] != widths[max(level - 1, 0)]
            pairs += _resnet_names(f"{down[0]}.block.{block}", f"{down[1]}.resnets.{block}", widens)
        for block in range(vae_config.num_res_blocks + 1):
            narrows = block == 0 and widths[level] != widths[min(level + 1, levels - 1)]
            pairs += _resnet_names(f"{up[0]}.block.{block}", f"{up[1]}.resnets.{block}", narrows)
        if level < levels - 1:
            pairs.append((f"{down[0]}.downsample.conv", f"{down[1]}.downsamplers.0.conv"))
        if level > 0:
            pairs.append((f"{up[0]}.upsample.conv", f"{up[1]}.upsamplers.0.conv"))
    return pairs


def _resnet_names(released: str, ours: str, has_shortcut: bool = False) -> list[tuple[str, str]]:
    pairs = [(f"{released}.{name}", f"{ours}.{name}") for name in ("norm1", "conv1", "norm2", "conv2")]
    return pairs + [(f"{released}.nin_shortcut", f"{ours}.conv_shortcut")] * has_shortcut


class _VAEStructure(NamedTuple):
    """What the names depend on, as the key of a cache."""

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int


@lru_cache
def _translations(structure: _VAEStructure) -> tuple[dict[str, str], dict[str, str]]:
    """Released names to module names, and back."""
    pairs = vae_names(structure)
    return dict(pairs), {ours: released for released, ours in pairs}


def to_module_name(released: str, vae_config: BagelVAEConfig) -> str:
    """The module name of a tensor; a name that is not a released name of the VAE is returned unchanged."""
    return _rename(released, _translations(_structure(vae_config))[0])


def to_released_name(module_name: str, vae_config: BagelVAEConfig) -> str:
    """The inverse of [`to_module_name`]; names outside the VAE are returned unchanged."""
    return _rename(module_name, _translations(_structure(vae_config))[1])


def to_module_shape(module_name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape under a module name: a 1x1 convolution of the VAE's middle attention becomes a linear layer."""
    shape = tuple(shape)
    return shape[:2] if _is_mid_linear(module_name) and shape[2:] == (1, 1) else shape


def to_released_shape(module_name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The inverse of [`to_module_shape`], which takes the module name, too."""
    shape = tuple(shape)
    return (*shape, 1, 1) if _is_mid_linear(module_name) and len(shape) == 2 else shape


def _structure(vae_config: BagelVAEConfig) -> _VAEStructure:
    return _VAEStructure(vae_config.ch, tuple(vae_config.ch_mult), vae_config.num_res_blocks)


def _rename(name: str, modules: Mapping[str, str]) -> str:
    module, dot, parameter = name.rpartition(".")
    return modules.get(module, module) + dot + parameter


def _is_mid_linear(module_name: str) -> bool:
    return re.fullmatch(r"vae\.(en|de)coder\.mid_block\.attentions\.0\.to_\w+(\.0)?\.weight", module_name) is not None


class PointwiseConvToLinear(ConversionOps):
    """(C, C, 1, 1) -> (C, C); a linear weight is unchanged."""

    def convert(self, input_dict: dict, source_patterns: list, target_patterns: list, **kwargs: Any) -> dict:
        (weights,) = input_dict.values()
        return {target_patterns[0]: self.reshaped(weights[0] if isinstance(weights, list) else weights)}

    def reshaped(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.flatten(1) if weight.ndim == 4 else weight

    @property
    def reverse_op(self) -> ConversionOps:
        return LinearToPointwiseConv()


class LinearToPointwiseConv(PointwiseConvToLinear):
    """(C, C) -> (C, C, 1, 1), for `save_pretrained(save_original_format=True)`."""

    def reshaped(self, weight: torch.Tensor) -> torch.Tensor:
        return weight[..., None, None] if weight.ndim == 2 else weight

    @property
    def reverse_op(self) -> ConversionOps:
        return PointwiseConvToLinear()


@contextmanager
def released_vae_names(class_name: str, vae_config: BagelVAEConfig) -> Iterator[None]:
    """
    A context in which transformers loads released VAE names into a class, besides module names.

    Use it for one load only: the names depend on the config, but transformers' registry is global to the process.
    """
    transforms: list[WeightConverter | WeightRenaming] = []
    for released, ours in vae_names(vae_config):
        source, target = f"^{re.escape(released)}\\.", f"{ours}."
        if released.rpartition(".")[2] not in MID_ATTENTION:
            transforms.append(WeightRenaming(source, target))
            continue
        transforms.append(WeightRenaming(source + "bias", target + "bias"))
        transforms.append(WeightConverter(source + "weight", target + "weight", [PointwiseConvToLinear()]))
    register_checkpoint_conversion_mapping(class_name, transforms, overwrite=True)
    try:
        yield
    finally:
        register_checkpoint_conversion_mapping(class_name, [], overwrite=True)


# --------------------------------------------------------------------------------------------------------------------
# The files of a directory


def checkpoint_files(directory: str | os.PathLike, variant: str | None = None, named: str | None = None) -> list[Path]:
    """
    The safetensors files that a checkpoint in a directory consists of, found as transformers finds them.

    Args:
        variant: as in `from_pretrained`. named: a file or index to take instead of the usual names.

    Raises:
        OSError: there are none, there are only pickles, or an index names a file that is not there.
    """
    folder = Path(directory)
    dot = f".{variant}." if variant else "."
    single, index = (folder / dot.join(name.rsplit(".", 1)) for name in (WEIGHTS_NAME, INDEX_NAME))
    if named is not None:
        single = index = folder / named
    if single.is_file() and not single.name.endswith(".json"):
        return [single]
    if index.is_file():
        return _files_of_index(index)
    raise OSError(_nothing_to_load(folder, single.name, index.name))


def _files_of_index(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"{index} is no index of weights: it needs a JSON table `weight_map`.") from error
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        verb = "is" if len(absent) == 1 else "are"
        raise OSError(f"{index} names {some(absent)}, which {verb} not in {index.parent}: download again.")
    return [index.parent / name for name in names]


def _nothing_to_load(folder: Path, single: str, index: str) -> str:
    present = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if MODEL_FILE in present:
        return f"{folder} is in the released layout. Run `python convert_bagel.py adopt {folder}` once, then load it."
    if pickles := [name for name in present if name.endswith(PICKLES)]:
        return (
            f"{folder} holds its weights as pickles ({some(pickles)}). They are refused, because reading a pickle "
            f"runs code from the file. Convert them to safetensors (`safetensors.torch.save_file`) as {single}."
        )
    if "adapter_config.json" in present:
        return f"{folder} holds an adapter, no model: load it on its base model, `merge_and_unload()` and save that."
    others = [name for name in present if name.endswith(".safetensors")]
    return f"{folder} holds no weights: neither {single} nor {index}." + (f" It has {some(others)}." if others else "")


def read_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """All tensors of these files by stored name; of equal names the last file's counts, as in transformers."""
    return {name: StoredTensor(file, info) for file in files for name, info in read_header(file).items()}


# --------------------------------------------------------------------------------------------------------------------
# Comparing a checkpoint with a model


class ExpectedTensors(NamedTuple):
    """Shapes by module name, and the names that may be absent because they are tied to others."""

    shapes: dict[str, tuple[int, ...]]
    tied: set[str]


def expected_tensors(model_class: Any, config: PreTrainedConfig) -> ExpectedTensors:
    """The tensors of a model of this config, which is built on the meta device without initialising anything."""
    with torch.device("meta"), init.no_init_weights(), init.no_tie_weights():
        model = model_class(copy.deepcopy(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return ExpectedTensors(shapes, set(model.all_tied_weights_keys))


def ids_outside(ids: Mapping[str, Any], rows: int) -> dict[str, int | list[int]]:
    """The special ids among a config's values that lie outside an embedding table of so many rows."""
    found = {name: ids[name] for name in EMBEDDED_IDS if ids[name] is not None}
    return {name: value for name, value in found.items() if max(value if isinstance(value, list) else [value]) >= rows}


def switched_off_parts(config: PreTrainedConfig, has_heads: bool = True) -> list[str]:
    """Patterns of tensors that a checkpoint may hold although a model of this config is built without them."""
    parts = [] if has_heads else [HEADS]
    if config.text_config.layer_module == "Qwen2DecoderLayer":
        parts.append(PARTS[GEN_EXPERT])
    if not config.visual_und:
        parts.append(PARTS[VISION])
    if not config.visual_gen:
        parts += [PARTS[LATENTS], PARTS[VAE]]
    if (kind := config.vision_config.position_embedding) != "learned":
        parts += [LEARNED_TABLE] if kind == "rope_2d" else [LEARNED_TABLE, ROTARY_TABLES]
    return parts


def check_tensors(
    model_class: Any,
    config: PreTrainedConfig,
    tensors: Mapping[str, StoredTensor],
    ignore_mismatched_sizes: bool = False,
) -> None:
    """
    Compare the stored tensors with those of a model of this config.

    Raises:
        ValueError: tensors are missing, have other shapes, or belong to another model; one error for all of them.
    """
    expected = expected_tensors(model_class, config)
    stored = {to_module_name(name, config.vae_config): (name, tensor) for name, tensor in tensors.items()}
    missing = [name for name in expected.shapes if name not in stored and name not in expected.tied]
    missing = [name for name in missing if not re.search(ROTARY_TABLES, name)]
    foreign = _foreign([name for name in stored if name not in expected.shapes], config, model_class)
    mismatched = {}
    for name in expected.shapes.keys() & stored.keys():
        shape = to_module_shape(name, stored[name][1].info.shape)
        if shape != expected.shapes[name] and not ignore_mismatched_sizes:
            mismatched[name] = (*stored[name], expected.shapes[name])
    if not (missing or foreign or mismatched):
        return
    files = sorted({tensor.file for tensor in tensors.values()})
    where = f"{files[0].parent} ({some([file.name for file in files])})" if files else "The checkpoint, an empty file,"
    problems = _describe_mismatched(mismatched) + _describe_missing(missing, expected.shapes)
    problems += _describe_foreign([stored[name][0] for name in foreign], config)
    raise ValueError(" ".join([f"{where} does not hold the model that the config describes.", *problems]))


def _foreign(unexpected: Iterable[str], config: PreTrainedConfig, model_class: type[nn.Module]) -> list[str]:
    parts = switched_off_parts(config, getattr(model_class, "has_heads", True))
    tolerated = re.compile("|".join([COMPUTED_TABLES, *parts]))
    return sorted(name for name in unexpected if not tolerated.search(name))


def _describe_mismatched(mismatched: Mapping[str, tuple[str, StoredTensor, tuple[int, ...]]]) -> list[str]:
    problems: list[str] = []
    hints: set[str | None] = set()
    for name in sorted(mismatched):
        stored_name, (file, info), expected = mismatched[name]
        problems.append(f"{file}: {stored_name} is {info.shape} in the file, {expected} by the config.")
        hints.add(_shape_hint(name, info.shape, expected))
    if len(problems) > 6:
        problems = [*problems[:5], f"{len(problems) - 5} more tensors have other shapes."]
    known = sorted(hint for hint in hints if hint)
    if None in hints:
        known = ["Is it the config of another checkpoint? ignore_mismatched_sizes=True initialises such tensors anew."]
    return [*problems, *known]


def _shape_hint(name: str, stored: tuple[int, ...], expected: tuple[int, ...]) -> str | None:
    """The setting that would make a table fit, if one would."""
    if not stored or stored[1:] != expected[1:]:
        return None
    side, expected_side = math.isqrt(stored[0]), math.isqrt(expected[0])
    if name.endswith("position_embedding.weight"):
        return f"image_size of the vision config must be {side} patches; it is {expected_side}."
    if re.search(r"embed_tokens|lm_head", name):
        setting, found, configured, override = "vocab_size", stored[0], expected[0], 'text_config={{"vocab_size": {}}}'
    elif name.startswith("vit_pos_embed."):
        setting, found, configured = "vit_max_num_patch_per_side", side, expected_side
        override = "vit_max_num_patch_per_side={}"
    else:
        return None
    return (
        f"{setting} is {found} in the file and {configured} in the config: load with {override.format(found)}, or set "
        f"{setting} in config.json."
    )


def _describe_missing(missing: Sequence[str], expected: Iterable[str]) -> list[str]:
    if not missing:
        return []
    expected_parts, missing_parts = _by_part(expected), _by_part(missing)
    absent = {part for part, names in missing_parts.items() if len(names) == len(expected_parts[part])}
    parts = ", ".join(f"{len(names)} of the {part}" for part, names in missing_parts.items())
    total = sum(map(len, expected_parts.values()))
    text = f"{len(missing)} of {total} tensors are missing ({parts}): {some(missing)}."
    if LANGUAGE in absent:
        return [f"{text} Is it a checkpoint of another model?"]
    remedies = []
    if VISION in absent:
        copying = "copy these tensors from the base checkpoint"
        remedies.append(f"It was saved without its vision tower: {copying}, or load with visual_und=False.")
    if absent & {GEN_EXPERT, LATENTS}:
        remedies.append("It cannot draw images: load with stage=1 to read only.")
    elif VAE in absent:
        copying = f"Its autoencoder is in {VAE_FILE} of the base checkpoint: copy that"
        remedies.append(f"{copying}, or load with stage=1 to read only.")
    if missing_parts.keys() - absent:
        remedies.append("It is incomplete: download it again, or copy these tensors from the base checkpoint.")
    return [" ".join([text, *remedies])]


def _describe_foreign(foreign: Sequence[str], config: PreTrainedConfig) -> list[str]:
    if not foreign:
        return []
    text = f"{len(foreign)} tensors are of another model: {some(foreign)}."
    if all(re.search(r"^vit_model\..*\.layers\.\d+\.", name) for name in foreign):
        text += (
            f" The config builds {config.num_vit_layers} vision layers: its num_hidden_layers counts the layers of the "
            "SigLIP checkpoint, one more than are stored."
        )
    elif all(re.search(PARTS[VAE], name) for name in foreign):
        text += " vae_config describes another autoencoder."
    elif all(re.search(PARTS[GEN_EXPERT], name) for name in foreign):
        text += f" layer_module={config.text_config.layer_module!r} has fewer experts than the file."
    return [text]


def _by_part(names: Iterable[str]) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {}
    for name in names:
        part = next((part for part, pattern in PARTS.items() if re.search(pattern, name)), "rest")
        parts.setdefault(part, []).append(name)
    return parts


def some(names: Sequence[str], limit: int = 3) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


# --------------------------------------------------------------------------------------------------------------------
# Around `from_pretrained`

HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def check_checkpoint(
    model_class: Any,
    path: str | os.PathLike | None,
    config: PreTrainedConfig | str | os.PathLike | None,
    kwargs: Mapping[str, Any],
    strict: bool = True,
) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """
    The config to load with, and the arguments left for transformers; refuses a local checkpoint that does not fit.

    Checkpoints on the Hub, quantised ones and `state_dict`s are not opened here: see [`refuse_missing_weights`].

    Args:
        model_class: the class being loaded. path, config, kwargs: the arguments of its `from_pretrained`.
        strict: refuse what does not fit; otherwise the caller looks at transformers' loading info.

    Returns:
        The config (a copy) with all overrides in `kwargs` applied and `max_latent_size` as in the file; `kwargs`
        without those overrides.

    Raises:
        OSError: no safetensors weights, or a truncated file. ValueError: see [`check_tensors`].
    """
    kwargs = dict(kwargs)
    if kwargs.get("use_safetensors") is False:
        raise ValueError(
            "use_safetensors=False asks for pickled weights. They are refused, because reading a pickle runs code from "
            "the file: convert them to safetensors."
        )
    overrides = {name: kwargs.pop(name) for name in config_fields(model_class.config_class) if name in kwargs}
    if kwargs.get("quantization_config") is not None:
        kwargs["quantization_config"] = decoder_only(kwargs["quantization_config"])
    path = _base_of_adapter(path, kwargs)
    resolved = resolve_config(model_class.config_class, path, config, overrides, kwargs)
    if path is not None and not kwargs.get("gguf_file"):
        kwargs["use_safetensors"] = True  # transformers would fall back to pickles
    files = _files_to_check(path, resolved, kwargs)
    if files is not None:
        tensors = read_tensors(files)
        if not kwargs.get("ignore_mismatched_sizes"):
            resolved.max_latent_size = _stored_latent_side(resolved, tensors)
        if strict and kwargs.get("key_mapping") is None:
            check_tensors(model_class, resolved, tensors, kwargs.get("ignore_mismatched_sizes", False))
    return resolved, kwargs


def decoder_only(quantization_config: Any) -> Any:
    """
    A copy of a quantisation config that leaves everything but the decoder's layers as it is stored.

    transformers by itself spares only `lm_head`. A method's list of modules to skip is extended; a method without such
    a list is returned unchanged.
    """
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    quantization_config = copy.deepcopy(quantization_config)
    for name in SKIP_LISTS:
        if hasattr(quantization_config, name):
            skipped = getattr(quantization_config, name) or ()
            setattr(quantization_config, name, list(dict.fromkeys([*skipped, *UNQUANTISED])))
    return quantization_config


def config_fields(config_class: type[PreTrainedConfig]) -> list[str]:
    """What `from_pretrained` takes as an override of the config."""
    fields = [field.name for field in dataclasses.fields(config_class) if field.name != "dtype"]
    return [*fields, *SUB_CONFIG_ALIASES, "output_attentions"]


def _base_of_adapter(path: str | os.PathLike | None, kwargs: Mapping[str, Any]) -> str | os.PathLike | None:
    """The base model that an adapter names, if the folder holds only that adapter, as in transformers."""
    if path is None or not os.path.isdir(path):
        return path
    adapter = Path(path, kwargs.get("subfolder") or "", "adapter_config.json")
    if not adapter.is_file() or Path(path, "config.json").is_file():
        return path
    return json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]


def resolve_config(
    config_class: type[PreTrainedConfig],
    path: str | os.PathLike | None,
    config: PreTrainedConfig | str | os.PathLike | None,
    overrides: Mapping[str, Any],
    kwargs: Mapping[str, Any],
) -> PreTrainedConfig:
    """A new config: `config` (an object or folder), or that of `path`, with `overrides`; `kwargs` as for the Hub."""
    if config is None or isinstance(config, str | os.PathLike):
        source = path if config is None else config
        if source is None:
            raise ValueError("Loading from a state_dict needs config=.")
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        return config_class.from_pretrained(source, **hub_kwargs, **overrides)
    if not overrides:
        return copy.deepcopy(config)
    overridden = type(config).from_dict(config.to_dict(), **overrides)
    overridden._attn_implementation = config._attn_implementation  # not part of the dict
    return overridden


def _files_to_check(
    path: str | os.PathLike | None, config: PreTrainedConfig, kwargs: Mapping[str, Any]
) -> list[Path] | None:
    """The local files whose headers can be compared with the model; `None` = there are none."""
    if path is None or kwargs.get("state_dict") is not None or kwargs.get("gguf_file"):
        return None
    if getattr(config, "quantization_config", None) is not None:
        return None  # names and shapes are those of the quantisation method
    if os.path.isfile(path):
        if str(path).endswith(PICKLES):
            raise OSError(f"{path} is a pickle. Reading it runs code from it, so convert it to safetensors.")
        return [Path(path)]
    folder = Path(path, kwargs.get("subfolder") or "")
    if not os.path.isdir(path) or any(folder.glob("shard-?????-model-*.safetensors")):
        return None  # on the Hub, or tensors in slices, saved by a distributed run
    return checkpoint_files(folder, kwargs.get("variant"), getattr(config, "transformers_weights", None))


def _stored_latent_side(config: PreTrainedConfig, tensors: Mapping[str, StoredTensor]) -> int:
    """`max_latent_size` of the stored table; in released configs and files the two are known to disagree."""
    stored = tensors.get("latent_pos_embed.pos_embed")
    if stored is None or not config.visual_gen:
        return config.max_latent_size
    side = math.isqrt(stored.info.shape[0])
    if side == config.max_latent_size or side**2 != stored.info.shape[0]:
        return config.max_latent_size
    logger.warning(
        f"max_latent_size={config.max_latent_size} in the config, but latent_pos_embed.pos_embed in {stored.file} is "
        f"{stored.info.shape}, a table of side {side}. Using max_latent_size={side}."
    )
    return side


def overridden_ids(
    config: PreTrainedConfig, path: str | os.PathLike | None, kwargs: Mapping[str, Any]
) -> dict[str, int | list[int] | None]:
    """Special ids of generation in which `config` differs from the file at `path`."""
    if path is None or not os.path.isdir(path):
        return {}
    stored, _ = type(config).get_config_dict(path, **{name: kwargs[name] for name in HUB_KWARGS if name in kwargs})
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    before = {name: stored.get(name, getattr(type(config), name)) for name in names}
    return {name: getattr(config, name) for name in names if getattr(config, name) != before[name]}


def refuse_missing_weights(
    model: Any, path: str | os.PathLike | None, info: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> None:
    """
    Raise a `ValueError` that names the tensors which are missing, foreign, or on the meta device after loading.

    Args:
        model: as loaded from `path`. info: transformers' loading info. kwargs: the arguments it was loaded with.
    """
    config = model.config
    assert isinstance(config, PreTrainedConfig)
    of_adapter = getattr(model, "_hf_peft_config_loaded", False)  # `info` is then about the adapter, already checked
    missing = sorted(name for name in info["missing_keys"] if not re.search(ROTARY_TABLES, name))
    problems = [] if of_adapter else _describe_missing(missing, model.state_dict())
    as_stored = getattr(model, "hf_quantizer", None) is None and kwargs.get("key_mapping") is None
    if as_stored and not of_adapter and (foreign := _foreign(info["unexpected_keys"], config, type(model))):
        problems += _describe_foreign(foreign, config)
    if unfilled := _unfilled(model):
        problems.append(f"{len(unfilled)} tensors were given no memory while loading: {some(unfilled)}.")
    if problems:
        source = "The state_dict" if path is None else path
        raise ValueError(" ".join([f"{source} does not hold the model that the config describes.", *problems]))


def _unfilled(model: nn.Module) -> list[str]:
    """Tensors on the meta device that no offload hook loads when they are needed."""
    unfilled: list[str] = []
    offloaded: set[str] = set()
    for module_name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        hooks = getattr(hook, "hooks", [hook])
        if module_name.rpartition(".")[0] in offloaded or any(getattr(each, "offload", False) for each in hooks):
            offloaded.add(module_name)
            continue
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        unfilled += [f"{module_name}.{name}".lstrip(".") for name, tensor in tensors if tensor.is_meta]
    return unfilled
