# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A BAGEL made of pretrained parts: a Qwen2 text model, a SigLIP tower, an autoencoder. Which tensor fills which:

    text model  -> language_model.*, and again under *_moe_gen: the generation expert starts as a copy (released)
    SigLIP      -> vit_model.*, without the layers above `vit_select_layer`, without its head
    autoencoder -> vae.*
    the rest (connector, vae2llm, llm2vae, time_embedder, tables) is new, as in a fresh model

Everything is decided from configs and file headers; then transformers' own loading reads one tensor after the other.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.tokenization_utils_base import AddedToken
from transformers.utils import logging

from ..checkpoint_bagel import (
    VAE_FILE,
    checkpoint_files,
    config_fields,
    expected_tensors,
    ids_outside,
    read_tensors,
    resolve_config,
    to_module_name,
    to_module_shape,
)
from ..configuration_bagel import SUB_CONFIG_ALIASES, BagelVAEConfig, und_name
from ..processing_bagel import BagelProcessor


logger = logging.get_logger(__name__)

DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
LOADING_KWARGS = ("attn_implementation", "device_map", "max_memory", "offload_folder")
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SPECIAL_TOKENS = {
    f"{name}_token_id": getattr(BagelProcessor, f"{name}_token")
    for name in ("bos", "eos", "vision_start", "vision_end", "image", "latent")
}

# Sizes of a part, which a config may not change, and settings, whose change gives a warning.
SIZES = {
    "text_config": (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ),
    "vision_config": (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_channels",
        "patch_size",
    ),
    "vae_config": ("z_channels", "downsample", "in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks"),
}
SETTINGS = {
    "text_config": ("hidden_act", "rms_norm_eps", "rope_parameters"),
    "vision_config": ("hidden_act", "layer_norm_eps"),
    "vae_config": ("scale_factor", "shift_factor"),
}

# Tensors of a part that BAGEL never uses: logged at level info, any other unused tensor at level warning.
LEFT_BEHIND = r"^(vision_model\.)?head\.|^text_model\.|^logit_(scale|bias)$|position_ids$|rotary_emb\.inv_freq$"


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when transformers' loading asks for it (`tensor[...]`), every time into its own memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    def __getitem__(self, _) -> torch.Tensor:
        return self.read().clone(memory_format=torch.contiguous_format)

    def then(self, shape: tuple[int, ...], function: Callable[[torch.Tensor], torch.Tensor]) -> "LazyTensor":
        return LazyTensor(tuple(shape), self.dtype, lambda: function(self.read()))


@dataclass(frozen=True)
class Backbone:
    """
    A pretrained part.

    Args:
        name: what messages call it.
        config: its values under the names of BAGEL's nested config.
        tensors: by the names they have in the part, without the prefix that depends on how it was saved.
        left: names of other tensors of the same checkpoint.
    """

    name: str
    config: dict[str, Any]
    tensors: dict[str, LazyTensor]
    left: tuple[str, ...] = ()


def from_backbones(
    model_class: Any,
    text_model: Any,
    vision_model: Any = None,
    vae: Any = None,
    config: PreTrainedConfig | str | Path | None = None,
    *,
    tokenizer: Any = None,
    dtype: str | torch.dtype = "auto",
    **kwargs,
) -> nn.Module:
    """
    A new model of pretrained parts, as the released one was begun. Both experts start as the text model (released
    `copy_init_moe`); connector, latent and timestep embeddings and the (zero) velocity head are new, initialised
    from torch's global rng. A part that is a folder is read tensor by tensor; a loaded one is copied.

    With `qk_norm` (the default, as released) queries and keys are normalised by norms that Qwen2 does not have and
    that start at one, so texts differ from the text model's until it is trained;
    `text_config={"qk_norm": False}` keeps the text model exactly.

    Args:
        model_class: the class to make, `BagelForUnifiedMultimodal`.
        text_model: `Qwen2ForCausalLM` (Qwen2, Qwen2.5), as a folder, a name on the Hub, or loaded.
        vision_model: `SiglipVisionModel` or `SiglipModel`, likewise; `None` builds a model that reads no images.
            The layers above `vit_select_layer` and the head are not used. Its position table is interpolated if
            `vit_max_num_patch_per_side` asks for another size.
        vae: `diffusers.AutoencoderKL`, likewise ("owner/name/subfolder" on the Hub), or the released
            `ae.safetensors`; `None` builds a model that draws no images (stage 1, no generation expert).
        config: a `BagelConfig`, or a folder with one; by default it follows the parts.
        tokenizer: the text model's. Special tokens of BAGEL that it lacks are added to it (save it with the model),
            the config gets its ids, and the vocabulary grows if it must. Qwen2.5 needs no change.
        dtype: of all but the VAE, which stays float32; "auto" is the text model's.
        kwargs: overrides of config fields (`stage`, `max_latent_size`, `tie_word_embeddings=False`, ...), and
            `device_map`, `max_memory`, `offload_folder`, `attn_implementation`.

    Raises:
        OSError: a part cannot be found or read.
        ValueError: a part is of another kind, or the parts do not make the model that the config describes.
        TypeError: an unknown argument.
    """
    known = {*config_fields(model_class.config_class), *LOADING_KWARGS}
    if unknown := sorted(kwargs.keys() - known):
        raise TypeError(
            f"from_backbones has no argument {', '.join(unknown)}: it takes the fields of BagelConfig and "
            f"{', '.join(LOADING_KWARGS)}."
        )
    overrides = {name: value for name, value in kwargs.items() if name not in LOADING_KWARGS}
    loading = {name: value for name, value in kwargs.items() if name in LOADING_KWARGS}
    parts = {"text_config": read_text_model(text_model)}
    if vision_model is not None:
        parts["vision_config"] = read_vision_model(vision_model)
    if vae is not None:
        parts["vae_config"] = read_vae(vae)
    if tokenizer is not None:
        overrides = {**add_special_tokens(tokenizer), **overrides}
    whole = _config_of_parts(model_class.config_class, parts, config, overrides)
    rows = max(whole.text_config.vocab_size, 0 if tokenizer is None else _rows_of(tokenizer))
    _check_config(whole, parts, rows)
    parts = {name: part for name, part in parts.items() if _is_wanted(name, whole)}

    whole.text_config.vocab_size = parts["text_config"].tensors["embed_tokens.weight"].shape[0]
    tensors = _tensors_of_parts(model_class, whole, parts)
    model, _ = model_class.from_pretrained(
        None,
        config=whole,
        state_dict=tensors,
        dtype=_dtype_of(parts["text_config"]) if dtype in (None, "auto") else dtype,
        output_loading_info=True,
        **loading,
    )
    if rows > whole.text_config.vocab_size:
        model.resize_token_embeddings(rows)
    return model


# --------------------------------------------------------------------------------------------------------------------
# Reading parts


def read_text_model(source: Any) -> Backbone:
    """A `Qwen2ForCausalLM` (or `Qwen2Model`): its folder, its name on the Hub, or the loaded model."""
    name, raw, tensors = _read_transformers(source, "text_model")
    if raw.get("model_type") != Qwen2Config.model_type:
        raise ValueError(
            f"{name} is a {raw.get('model_type')!r} model; BAGEL's decoder is a Qwen2 one (Qwen2, Qwen2.5: "
            "model_type 'qwen2')."
        )
    stock = Qwen2Config.from_dict(raw)
    if stock.sliding_window is not None:
        logger.warning(f"{name} attends in windows of {stock.sliding_window} tokens; BAGEL attends to everything.")
    left_out = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers", *_TEXT_IDS)
    config = {key: getattr(stock, key) for key in Qwen2Config.__annotations__ if key not in left_out}
    prefix = _prefix(tensors, "embed_tokens.weight", name)
    head = tensors.pop("lm_head.weight", None)
    inside, left = _without_prefix(tensors, prefix)
    if stock.tie_word_embeddings:
        inside["lm_head.weight"] = inside["embed_tokens.weight"]
    elif head is not None:
        inside["lm_head.weight"] = head
    config["vocab_size"] = inside["embed_tokens.weight"].shape[0]
    return Backbone(name, config, inside, left)


_TEXT_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def read_vision_model(source: Any) -> Backbone:
    """A `SiglipVisionModel` or `SiglipModel`: its folder, its name on the Hub, or the loaded model."""
    name, raw, tensors = _read_transformers(source, "vision_model")
    if raw.get("model_type") == "siglip":
        raw = raw.get("vision_config") or {}
    elif raw.get("model_type") != SiglipVisionConfig.model_type:
        raise ValueError(
            f"{name} is a {raw.get('model_type')!r} model; BAGEL's vision tower is a SigLIP one (model_type "
            f"'siglip' or '{SiglipVisionConfig.model_type}')."
        )
    stock = SiglipVisionConfig.from_dict(raw)
    config = {key: getattr(stock, key) for key in SiglipVisionConfig.__annotations__ if key != "vision_use_head"}
    prefix = _prefix(tensors, "embeddings.patch_embedding.weight", name)
    return Backbone(name, config, *_without_prefix(tensors, prefix))


def read_vae(source: Any) -> Backbone:
    """
    An autoencoder without quant convolutions: `diffusers.AutoencoderKL` (its folder, "owner/name/subfolder" on the Hub,
    or the loaded model), or the released `ae.safetensors` (the file or its folder), whose scale and shift are FLUX's.
    """
    if isinstance(source, nn.Module):
        name = f"vae ({type(source).__name__})"
        return Backbone(name, _config_of_diffusers(source.config, name), _tensors_of(source, name))
    path = find_files(source, "vae")
    if path.is_dir() and (path / VAE_FILE).is_file():
        path = path / VAE_FILE
    name = f"vae ({path})"
    if path.is_dir():
        tensors = _tensors_in(checkpoint_files(path, named=DIFFUSERS_FILE))
        return Backbone(name, _config_of_diffusers(_json(path / "config.json"), name), tensors)
    stored = _tensors_in([path])
    facts = vae_facts({key: tensor.shape for key, tensor in stored.items()})
    if not facts:
        raise ValueError(
            f"{name} holds no autoencoder under the names of {VAE_FILE} (encoder.conv_in, encoder.down.0, ...). For "
            "one that diffusers has saved, give its folder."
        )
    config = BagelVAEConfig(**facts)
    settings = {key: getattr(config, key) for key in ("scale_factor", "shift_factor")}
    tensors = {}
    for key, tensor in stored.items():
        module_name = to_module_name(key, config)
        shape = to_module_shape(module_name, tensor.shape)
        tensors[module_name.removeprefix("vae.")] = tensor.then(
            shape, lambda values, shape=shape: values.reshape(shape)
        )
    return Backbone(name, {**facts, **settings}, tensors)


def vae_facts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The values of `vae_config` that follow from a VAE's shapes by released name; empty for any other model."""
    first, last = shapes.get("encoder.conv_in.weight"), shapes.get("decoder.conv_out.weight")
    latent = shapes.get("decoder.conv_in.weight")
    levels = count_members(shapes, r"encoder\.down\.")
    widths = [shapes.get(f"encoder.down.{level}.block.0.conv1.weight") for level in range(levels)]
    if not (first and last and latent and levels and all(widths)):
        return {}
    return {
        "z_channels": latent[1],
        "downsample": 2 ** (levels - 1),
        "in_channels": first[1],
        "out_ch": last[0],
        "ch": first[0],
        "ch_mult": [width[0] // first[0] for width in widths if width],
        "num_res_blocks": count_members(shapes, r"encoder\.down\.0\.block\."),
    }


def count_members(names: Iterable[str], prefix: str) -> int:
    """How many modules a `ModuleList` has, from the names of their tensors; `prefix` is a pattern."""
    found = (re.match(rf"{prefix}(\d+)\.", name) for name in names)
    return len({match[1] for match in found if match})


def _config_of_diffusers(raw: Any, name: str) -> dict[str, Any]:
    """`AutoencoderKL`'s config under BAGEL's names; refuses settings that BAGEL's config does not have."""
    widths = list(raw.get("block_out_channels") or ()) if isinstance(raw, Mapping) else []
    if not widths:
        raise ValueError(f"{name} is no diffusers.AutoencoderKL: its config has no block_out_channels.")
    ch = widths[0]
    wanted = {
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": True,
        "act_fn": "silu",
        "norm_num_groups": math.gcd(32, ch),
        "latents_mean": None,
        "latents_std": None,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }
    defaults = {"use_quant_conv": True, "use_post_quant_conv": True, "norm_num_groups": 32}  # of AutoencoderKL
    found = {key: raw.get(key, defaults.get(key, value)) for key, value in wanted.items()}
    found = {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
    others = [f"{key}={found[key]} (needed: {value})" for key, value in wanted.items() if found[key] != value]
    others += [f"block_out_channels={widths}, no multiples of the first"] * any(width % ch for width in widths)
    if others:
        raise ValueError(f"{name} is another kind of autoencoder than FLUX's, which BAGEL uses: {', '.join(others)}.")
    return {
        "z_channels": raw["latent_channels"],
        "downsample": 2 ** (len(widths) - 1),
        "resolution": raw.get("sample_size", 32),
        "in_channels": raw.get("in_channels", 3),
        "out_ch": raw.get("out_channels", 3),
        "ch": ch,
        "ch_mult": [width // ch for width in widths],
        "num_res_blocks": raw.get("layers_per_block", 1),
        "scale_factor": raw.get("scaling_factor", 0.18215),
        "shift_factor": raw.get("shift_factor") or 0.0,
    }


def _read_transformers(source: Any, part: str) -> tuple[str, dict[str, Any], dict[str, LazyTensor]]:
    """-> its name in messages, its config as stored, its tensors."""
    if isinstance(source, nn.Module):
        assert isinstance(source.config, PreTrainedConfig)
        name, raw = f"{part} ({type(source).__name__})", source.config.to_dict()
        tensors = _tensors_of(source, name)
    else:
        folder = find_files(source, part)
        name, raw = f"{part} ({folder})", _json(folder / "config.json")
        tensors = _tensors_in(checkpoint_files(folder))
    if raw.get("quantization_config"):
        raise ValueError(f"{name} is quantised: start from the model it was made from.")
    return name, raw, tensors


def find_files(source: str | Path, part: str = "model") -> Path:
    """
    The folder or file on this machine that `source` names: a path, or "owner/name[/inside/the/repo]" on the Hub.

    Raises:
        OSError: it is neither.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    repository, inside = "/".join(str(source).split("/")[:2]), "/".join(str(source).split("/")[2:])
    patterns = [f"{inside}*{suffix}" for suffix in (".json", ".txt", ".safetensors")]
    if inside.endswith(".safetensors"):
        patterns = [inside]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns), inside)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(f"{part}: {source} is no file or folder here, and the Hub did not give it: {reason}") from error


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise OSError(f"{file.parent} has no {file.name}: is it the folder of a model?")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{file} is damaged: {error}.") from error


def _tensors_in(files: list[Path]) -> dict[str, LazyTensor]:
    tensors = {}
    for name, (file, info) in read_tensors(files).items():
        if info.dtype in FLOAT_DTYPES:
            dtype = FLOAT_DTYPES[info.dtype]
            tensors[name] = LazyTensor(info.shape, dtype, lambda file=file, name=name: _read_tensor(file, name))
        elif not re.search(LEFT_BEHIND, name):
            raise ValueError(f"{file}: {name} is stored as {info.dtype}; weights must be {', '.join(FLOAT_DTYPES)}.")
    return tensors


def _read_tensor(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as handle:
        return handle.get_tensor(name)


def _tensors_of(model: nn.Module, name: str) -> dict[str, LazyTensor]:
    state = {key: tensor for key, tensor in model.state_dict().items() if tensor.is_floating_point()}
    if absent := [key for key, tensor in state.items() if tensor.is_meta]:
        raise ValueError(f"{name} is not in memory: {absent[0]} and {len(absent) - 1} more are offloaded or unset.")
    return {
        key: LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor.detach())
        for key, tensor in state.items()
    }


def _prefix(names: Mapping[str, Any], anchor: str, name: str) -> str:
    """What the names of the part begin with in its checkpoint, found by a tensor that every such part has."""
    found = [key.removesuffix(anchor) for key in names if key.endswith(anchor)]
    if len(found) != 1:
        raise ValueError(f"{name} has {len(found)} tensors named {anchor}, 1 expected: is it another kind of model?")
    return found[0]


def _without_prefix(tensors: Mapping[str, LazyTensor], prefix: str) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    inside = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    return inside, tuple(key for key in tensors if not key.startswith(prefix))


# --------------------------------------------------------------------------------------------------------------------
# The config of the whole


def _config_of_parts(
    config_class: Any,
    parts: Mapping[str, Backbone],
    config: PreTrainedConfig | str | Path | None,
    overrides: dict[str, Any],
) -> PreTrainedConfig:
    """The caller's config, or one that follows the parts; with the overrides."""
    overrides = dict(overrides)
    for alias, name in SUB_CONFIG_ALIASES.items():
        if alias in overrides:
            overrides[name] = overrides.pop(alias)
    for name in config_class.sub_configs:
        if isinstance(overrides.get(name), PreTrainedConfig):
            overrides[name] = overrides[name].to_dict()
    if "tie_word_embeddings" in overrides:  # the decoder's own config is asked too
        tied = {"tie_word_embeddings": overrides["tie_word_embeddings"]}
        overrides["text_config"] = {**(overrides.get("text_config") or {}), **tied}
    if config is not None:
        return resolve_config(config_class, None, config, overrides, {})
    draft: dict[str, Any] = {name: dict(part.config) for name, part in parts.items()}
    draft |= {"visual_und": "vision_config" in parts, "visual_gen": "vae_config" in parts}
    if "vision_config" in parts:
        vision = {**draft["vision_config"], **(overrides.get("vision_config") or {})}
        side = overrides.get("vit_max_num_patch_per_side") or vision["image_size"] // vision["patch_size"]
        draft["vit_max_num_patch_per_side"] = side
        draft["vision_config"]["image_size"] = side * vision["patch_size"]
    following: PreTrainedConfig = config_class.from_dict(draft, **overrides)
    for name in _TEXT_IDS:
        setattr(following.text_config, name, getattr(following, name))
    return following


def _is_wanted(part: str, config: PreTrainedConfig) -> bool:
    return {"vision_config": config.visual_und, "vae_config": config.visual_gen}.get(part, True)


def _check_config(config: PreTrainedConfig, parts: Mapping[str, Backbone], rows: int) -> None:
    """Refuse a config that the parts cannot fill; warn of settings that differ from a part's."""
    for part, argument, flag in (("vision_config", "vision_model", "visual_und"), ("vae_config", "vae", "visual_gen")):
        if _is_wanted(part, config) and part not in parts:
            raise ValueError(
                f"{flag}=True needs pretrained weights: pass {argument}=, or {flag}=False to build without."
            )
        if part in parts and not _is_wanted(part, config):
            logger.warning(f"{parts[part].name} is not used: the config says {flag}=False (stage={config.stage}).")
    wanted = {part: backbone for part, backbone in parts.items() if _is_wanted(part, config)}
    problems = [problem for part, backbone in wanted.items() for problem in _other_sizes(config, part, backbone)]
    text = parts["text_config"]
    if (stored := text.config["vocab_size"]) > config.text_config.vocab_size:
        problems.append(
            f"text_config.vocab_size is {config.text_config.vocab_size}, but {text.name} has {stored} rows: the table "
            "does not shrink."
        )
    side, vision = config.vit_max_num_patch_per_side, config.vision_config
    if config.visual_und and not vision.rope and vision.image_size // vision.patch_size != side:
        problems.append(
            f"vision_config.image_size={vision.image_size} makes a position table of "
            f"{vision.image_size // vision.patch_size} patches per side, but vit_max_num_patch_per_side is {side}: "
            "they address the same table."
        )
    if outside := ids_outside(vars(config), rows):
        problems.append(
            f"{', '.join(f'{name}={value}' for name, value in outside.items())} lie outside the vocabulary of {rows}: "
            "pass the text model's tokenizer (tokenizer=...), whose special tokens are then found or added, or ids."
        )
    if problems:
        raise ValueError(" ".join(["The parts do not make the model that the config describes.", *problems]))


def _other_sizes(config: PreTrainedConfig, part: str, backbone: Backbone) -> list[str]:
    """A sentence for every size of a part that the config changes; settings that it changes are logged."""
    chosen = {key: getattr(getattr(config, part), key) for key in (*SIZES[part], *SETTINGS[part])}
    differing = {key: value for key, value in chosen.items() if value != backbone.config[key]}
    for key in (key for key in SETTINGS[part] if key in differing):
        logger.warning(
            f"{backbone.name} was trained with {key}={backbone.config[key]}; the config says {differing[key]}, "
            "which is used."
        )
    return [
        f"{part}.{key} is {differing[key]}, but {backbone.config[key]} in {backbone.name}."
        for key in SIZES[part]
        if key in differing
    ]


def _dtype_of(text: Backbone) -> torch.dtype:
    return text.tensors["embed_tokens.weight"].dtype


# --------------------------------------------------------------------------------------------------------------------
# The tensors of the whole


def _tensors_of_parts(model_class, config: PreTrainedConfig, parts: Mapping[str, Backbone]) -> dict[str, LazyTensor]:
    """
    Module names to what fills them; what is new is left to transformers, which initialises missing tensors.

    Raises:
        ValueError: a part lacks tensors, or has other shapes than the model of this config.
    """
    expected = expected_tensors(model_class, config)
    tied = {"language_model.lm_head.weight"} if config.tie_word_embeddings else set()
    finders = {
        "text_config": ("language_model.", _find_text),
        "vision_config": ("vit_model.vision_model.", _find_vision),
        "vae_config": ("vae.", lambda tensors, name, shape: (name, tensors.get(name))),
    }
    filled: dict[str, LazyTensor] = {}
    problems: list[str] = []
    for part, backbone in parts.items():
        prefix, find = finders[part]
        shapes = {
            name: shape for name, shape in expected.shapes.items() if name.startswith(prefix) and name not in tied
        }
        found = {name: find(backbone.tensors, name.removeprefix(prefix), shape) for name, shape in shapes.items()}
        problems += _unfit(backbone, shapes, found)
        fitting = {name: tensor for name, (_, tensor) in found.items() if tensor and tensor.shape == shapes[name]}
        filled |= fitting
        _say_unused(backbone, {found[name][0] for name in fitting}, config)
    if problems:
        shown = problems if len(problems) < 7 else [*problems[:5], f"{len(problems) - 5} more tensors do not fit."]
        raise ValueError(" ".join(["The parts do not make the model that the config describes.", *shown]))
    return filled


def _unfit(
    backbone: Backbone,
    shapes: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[str, LazyTensor | None]],
) -> list[str]:
    """A sentence for every tensor of another shape, and one for all that the part lacks."""
    problems = [
        f"{backbone.name}: {source} is {tensor.shape}, {shapes[name]} by the config."
        for name, (source, tensor) in found.items()
        if tensor is not None and tensor.shape != shapes[name]
    ]
    missing = [source for source, tensor in found.values() if tensor is None]
    missing = [name for name in missing if not name.startswith("rope.")]  # tables that every model computes
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        hint = ""
        if "lm_head.weight" in missing:
            hint = " A text model without a head: tie_word_embeddings=True uses its embeddings as one."
        problems.append(f"{backbone.name} has no {missing[0]}{more}.{hint}")
    return problems


def _find_text(tensors: Mapping[str, LazyTensor], name: str, shape: tuple[int, ...]) -> tuple[str, LazyTensor | None]:
    """The tensor of a decoder parameter: its own, or that of the understanding expert it starts as a copy of."""
    name = name.removeprefix("model.")
    if name in tensors:
        return name, tensors[name]
    name = und_name(name)
    if name not in tensors and re.search(r"\.[qk]_norm\.weight$", name):  # Qwen2 has none
        return name, LazyTensor(shape, torch.float32, lambda: torch.ones(shape))
    return name, tensors.get(name)


def _find_vision(tensors: Mapping[str, LazyTensor], name: str, shape: tuple[int, ...]) -> tuple[str, LazyTensor | None]:
    """The tensor of a parameter of the tower: the patch convolution as a linear layer, the table at its size here."""
    tensor = tensors.get(name)
    if name == "embeddings.patch_embedding.weight" and tensor is not None and len(tensor.shape) == 4:
        out, channels, rows, columns = tensor.shape
        flat = (out, rows * columns * channels)
        return name, tensor.then(flat, lambda weight: weight.permute(0, 2, 3, 1).flatten(1))
    if name == "embeddings.position_embedding.weight" and tensor is not None and tensor.shape[1:] == shape[1:]:
        stored, side = math.isqrt(tensor.shape[0]), math.isqrt(shape[0])
        if stored != side and stored**2 == tensor.shape[0]:
            logger.warning(
                f"The vision tower's position table of {stored}x{stored} patches is interpolated to {side}x{side}."
            )
            return name, tensor.then(shape, lambda table: resize_position_table(table, side))
    return name, tensor


def resize_position_table(table: torch.Tensor, side: int) -> torch.Tensor:
    """A learned square table (old side ** 2, features) -> (side ** 2, features), bicubic as SigLIP itself does."""
    old = math.isqrt(len(table))
    grid = table.float().T.unflatten(1, (old, old))[None]  # (1, features, old, old)
    grid = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False, antialias=side < old)
    return grid[0].flatten(1).T.to(table.dtype)


def _say_unused(backbone: Backbone, used: set[str], config: PreTrainedConfig) -> None:
    unused = [name for name in (*backbone.tensors, *backbone.left) if name not in used]
    if "lm_head.weight" in unused and backbone.tensors["lm_head.weight"] is backbone.tensors.get("embed_tokens.weight"):
        unused.remove("lm_head.weight")
    above = re.compile(r"^encoder\.layers\.(\d+)\.")
    usual = [
        name
        for name in unused
        if re.search(LEFT_BEHIND, name) or ((layer := above.match(name)) and int(layer[1]) >= config.num_vit_layers)
    ]
    others = [name for name in unused if name not in usual]
    if usual:
        logger.info(f"{backbone.name}: {_in_words(usual)} not used, as in the released model.")
    if others:
        logger.warning(f"{backbone.name}: {_in_words(others)} not used; a BAGEL of this config has no such tensors.")


def _in_words(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more tensors" if len(names) > 3 else shown


# --------------------------------------------------------------------------------------------------------------------
# The tokenizer


def add_special_tokens(tokenizer: Any) -> dict[str, int]:
    """
    Give a tokenizer, in place, the special tokens of BAGEL's prompts that it lacks; Qwen2.5's has all of them.

    Returns:
        Their ids under the names they have in `BagelConfig`, and `pad_token_id` (`<|im_end|>` where the tokenizer has
        no padding token; it then pads with that, too).
    """
    vocabulary = tokenizer.get_vocab()
    absent = [token for token in SPECIAL_TOKENS.values() if token not in vocabulary]
    if absent:
        logger.warning(f"Added to the tokenizer: {', '.join(absent)}. Save it with the model.")
        tokenizer.add_tokens(
            [AddedToken(token, special=True, normalized=False) for token in absent], special_tokens=True
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = SPECIAL_TOKENS["eos_token_id"]
    ids: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL_TOKENS.items()}
    pad_token_id = tokenizer.pad_token_id
    assert pad_token_id is not None
    return {**ids, "pad_token_id": pad_token_id}


def _rows_of(tokenizer: Any) -> int:
    """Rows that an embedding table needs for every id of a tokenizer."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


__all__ = ["SPECIAL_TOKENS", "add_special_tokens", "find_files", "from_backbones", "resize_position_table"]
