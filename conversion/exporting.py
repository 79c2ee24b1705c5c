# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""`bagel export`: from a model folder to the released layout. Tensors are copied byte by byte under released names."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from .. import checkpoint_bagel as checkpoint
from ..configuration_bagel import BagelConfig
from ..modeling_bagel import BagelForUnifiedMultimodal
from .adopting import Tensors, common_dtype
from .folders import TOKENIZER_FILES, new_folder, refuse_taken, special_tokens, to_json


COPY_BYTES = 16 * 2**20


def export(model_dir: str | os.PathLike, out_dir: str | os.PathLike) -> list[str]:
    """
    Write a model folder (one file, shards, or an adopted one) in the released layout.

    Tensors are copied in pieces of 16 MB, so the model may be larger than the memory. `out_dir` appears when it is
    complete.

    Returns:
        The names of the files written.

    Raises:
        OSError: there is no model, not enough disk space, or `out_dir` is not empty.
        ValueError: the model is quantised, or its tensors do not match its config.
    """
    model_dir, out_dir = Path(model_dir), Path(out_dir)
    if not model_dir.is_dir():
        raise NotADirectoryError(f"{model_dir} is not a directory.")
    refuse_taken(out_dir)
    config = BagelConfig.from_pretrained(model_dir)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{model_dir} is quantised; the released layout is not. Export the model it was made from.")
    tensors = checkpoint.read_tensors(checkpoint.checkpoint_files(model_dir))
    checkpoint.check_tensors(BagelForUnifiedMultimodal, config, tensors)

    files = _split_released(tensors, config.vae_config)
    small = _released_configs(config, common_dtype(tensors))
    small |= {name: (model_dir / name).read_bytes() for name in TOKENIZER_FILES if (model_dir / name).is_file()}
    size = sum(info.end - info.begin for _, info in tensors.values())
    with (
        new_folder(out_dir, size) as partial,
        tqdm(total=size, unit="B", unit_scale=True, desc="exporting") as progress,
    ):
        for name, content in files.items():
            _copy_tensors(partial / name, content, progress)
        for name, text in small.items():
            (partial / name).write_bytes(text)
    return [*files, *small]


class ReleasedTensor(NamedTuple):
    """A tensor to write: its released shape, and where its bytes are stored now."""

    shape: tuple[int, ...]
    stored: "checkpoint.StoredTensor"


def _split_released(tensors: Tensors, vae_config: Any) -> dict[str, dict[str, ReleasedTensor]]:
    """By file and released name: the tensors of the released layout."""
    files: dict[str, dict[str, ReleasedTensor]] = {checkpoint.MODEL_FILE: {}, checkpoint.VAE_FILE: {}}
    for name, stored in tensors.items():
        module_name = checkpoint.to_module_name(name, vae_config)
        released = checkpoint.to_released_name(module_name, vae_config)
        shape = checkpoint.to_released_shape(module_name, stored.info.shape)
        is_vae = re.search(checkpoint.PARTS[checkpoint.VAE], released)
        files[checkpoint.VAE_FILE if is_vae else checkpoint.MODEL_FILE][released] = ReleasedTensor(shape, stored)
    return {name: content for name, content in files.items() if content}


def _copy_tensors(file: Path, tensors: Mapping[str, ReleasedTensor], progress: tqdm) -> None:
    """Write a safetensors file with tensors from other files."""

    def widest_first(name: str) -> tuple[int, str]:  # so every tensor is aligned
        return -checkpoint.ELEMENT_BYTES.get(tensors[name].stored.info.dtype, 1), name

    names = sorted(tensors, key=widest_first)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        shape, (_, info) = tensors[name]
        begin, end = end, end + info.end - info.begin
        header[name] = {"dtype": info.dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "xb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            source, info = tensors[name].stored
            with open(source, "rb") as handle:
                handle.seek(info.begin)
                remaining = info.end - info.begin
                while remaining:
                    piece = handle.read(min(COPY_BYTES, remaining))
                    if not piece:
                        raise OSError(f"{source} is truncated: it ends before the tensor {name}.")
                    target.write(piece)
                    remaining -= len(piece)
                    progress.update(len(piece))


def _released_configs(config: Any, dtype: str | None) -> dict[str, bytes]:
    """`config.json`, `llm_config.json` and `vit_config.json` with released keys."""
    llm, vit = _released_llm_config(config, dtype), _released_vit_config(config.vision_config)
    vae_names = list(type(config.vae_config).__annotations__)
    top = ("latent_patch_size", "max_latent_size", "vit_max_num_patch_per_side", "connector_act", "interpolate_pos")
    ids = (*special_tokens(), "pad_token_id")
    whole = {
        "architectures": ["BagelForConditionalGeneration"],
        "model_type": "bagel",
        "visual_gen": config.visual_gen,
        "visual_und": config.visual_und,
        "llm_config": llm,
        "vit_config": vit,
        "vae_config": {name: getattr(config.vae_config, name) for name in vae_names},
        **{name: getattr(config, name) for name in (*top, "timestep_shift", *ids)},
    }
    return {"config.json": to_json(whole), "llm_config.json": to_json(llm), "vit_config.json": to_json(vit)}


def _released_llm_config(config: Any, dtype: str | None) -> dict[str, Any]:
    text = config.text_config
    names = (
        "attention_dropout",
        "bos_token_id",
        "eos_token_id",
        "hidden_act",
        "hidden_size",
        "initializer_range",
        "intermediate_size",
        "max_position_embeddings",
        "max_window_layers",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "qk_norm",
        "rms_norm_eps",
        "sliding_window",
        "use_cache",
        "use_sliding_window",
        "vocab_size",
    )
    values = {name: getattr(text, name) for name in names if getattr(text, name) is not None}
    rope = dict(text.rope_parameters)
    released = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **values,
        "rope_theta": rope.pop("rope_theta"),
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if rope != {"rope_type": "default"}:
        released["rope_scaling"] = rope
    if text.layer_module == "Qwen2MoEDecoderLayer":  # the other two layer modules follow from visual_gen
        released["layer_module"] = text.layer_module
    if dtype is not None:
        released["torch_dtype"] = dtype
    return released


def _released_vit_config(vision: Any) -> dict[str, Any]:
    """The keys of the released file, and further ones whose value is not the default."""
    names = ("hidden_size", "image_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "patch_size")
    released = {"model_type": "siglip_vision_model", **{name: getattr(vision, name) for name in names}}
    defaults = type(vision)()
    others = ("attention_dropout", "hidden_act", "layer_norm_eps", "num_channels", "position_embedding", "rope")
    return released | {
        name: getattr(vision, name) for name in others if getattr(vision, name) != getattr(defaults, name)
    }
