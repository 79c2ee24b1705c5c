# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""From the released layout to ours, in place: adds the small files that transformers needs, and touches no weight.

The released layout: `ema.safetensors`, `ae.safetensors` (the VAE under its own names), `config.json` or
`llm_config.json` and `vit_config.json`, tokenizer files.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .. import checkpoint_bagel as checkpoint
from .. import configuration_bagel as configuration
from ..modeling_bagel import BagelForUnifiedMultimodal
from .backbones import count_members, vae_facts
from .folders import (
    CHAT_TEMPLATE,
    REPOSITORY,
    RUNTIME_FILES,
    model_facts,
    new_image_processor,
    read_json,
    special_tokens,
    to_json,
    write_all,
)


DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
GENERATION_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

Tensors = Mapping[str, checkpoint.StoredTensor]


class Adoption(NamedTuple):
    """What `adopt` did: files it wrote, what a user should know, whether a processor can be loaded."""

    written: list[str]
    notes: list[str]
    has_processor: bool


def adopt(directory: str | os.PathLike) -> Adoption:
    """
    Add to a released folder what `AutoModel.from_pretrained(directory, trust_remote_code=True)` needs.

    The weights are neither read nor copied. Everything is worked out and checked first, from their headers; then the
    small files are written, all or none. A `config.json` that was there is kept as `config.released.json`, and likewise
    any other file that is replaced. Without tokenizer files only the model is adopted.

    Raises:
        OSError: no folder, weights or configs, or a damaged file.
        ValueError: the weights are no BAGEL, or the tokenizer lacks its special tokens.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is not a directory.")
    model, vae = _released_tensors(directory)
    original = read_json(directory / "config.json") or {}
    token_ids = _special_ids(directory)

    draft, notes = _complete_config(_with_nested_configs(directory, original, model), model, vae)
    config = configuration.BagelConfig.from_dict({**draft, **token_ids})
    ids = {name: getattr(config, name) for name in (*special_tokens(), "pad_token_id")}
    adopted = (original.get("auto_map") or {}).get("AutoModel") == configuration.AUTO_MAP["AutoModel"]
    auto_map = {**(original["auto_map"] if adopted else {}), **configuration.AUTO_MAP}
    weights = {**model, **vae} if config.visual_gen else model
    checkpoint.check_tensors(BagelForUnifiedMultimodal, config, weights)
    _check_ids(ids, config.text_config.vocab_size, bool(token_ids), notes)

    contents = {
        **{name: (REPOSITORY / name).read_bytes() for name in RUNTIME_FILES},
        "config.json": to_json({**draft, **ids, "auto_map": auto_map}),
        checkpoint.INDEX_NAME: to_json(_index(weights)),
    }
    if token_ids:
        settings = {"generation_config.json": to_json({name: ids[name] for name in GENERATION_IDS})}
        settings |= _processor_files(config)
        # whoever has changed settings since the folder was adopted keeps them
        contents |= {name: data for name, data in settings.items() if not (adopted and (directory / name).is_file())}
    else:
        notes.append(
            "There are no tokenizer files, so only the model was adopted. Add them (tokenizer.json and "
            "tokenizer_config.json of the released repo) and run this again for a processor."
        )
    if not adopted:
        contents |= _kept_originals(directory, contents)
    return Adoption(write_all(directory, contents), notes, bool(token_ids))


def _released_tensors(directory: Path) -> tuple[Tensors, Tensors]:
    """Headers of `ema.safetensors` and `ae.safetensors`; the second may be absent if nothing needs it."""
    model_file, vae_file = directory / checkpoint.MODEL_FILE, directory / checkpoint.VAE_FILE
    if not model_file.is_file():
        raise FileNotFoundError(
            f"{directory} has no {checkpoint.MODEL_FILE}: `adopt` takes a folder in the released layout, as downloaded."
        )
    if (directory / checkpoint.WEIGHTS_NAME).is_file():
        raise FileExistsError(
            f"{directory} has a {checkpoint.WEIGHTS_NAME} too, which transformers would load instead of "
            f"{checkpoint.MODEL_FILE}: move one of them elsewhere."
        )
    model = checkpoint.read_tensors([model_file])
    vae = checkpoint.read_tensors([vae_file]) if vae_file.is_file() else {}
    if _has(model, checkpoint.LATENTS) and not vae:
        raise FileNotFoundError(
            f"{model_file} draws pictures, but {checkpoint.VAE_FILE}, its autoencoder, is not in {directory}: copy it "
            "there from the base checkpoint."
        )
    return model, vae


def _has(tensors: Iterable[str], part: str) -> bool:
    return any(re.search(checkpoint.PARTS[part], name) for name in tensors)


def _with_nested_configs(directory: Path, original: Mapping[str, Any], model: Tensors) -> dict[str, Any]:
    """`config.json`; where it lacks the nested configs, they come from their own files."""
    draft = dict(original)
    needed = {"llm_config": True, "vit_config": _has(model, checkpoint.VISION)}
    for name, alias in configuration.SUB_CONFIG_ALIASES.items():
        if name in draft or alias in draft:
            continue
        values = read_json(directory / f"{name}.json")
        if values is None and needed[name]:
            raise FileNotFoundError(f"{directory} describes no {name}: neither config.json nor {name}.json has it.")
        draft[name] = values or {}
    return draft


def _complete_config(draft: dict[str, Any], model: Tensors, vae: Tensors) -> tuple[dict[str, Any], list[str]]:
    """The config with what the tensors say put in; where it said something else before, a note."""
    notes: list[str] = []
    draft = {name: value for name, value in draft.items() if name != "stage"}  # the tensors say what there is
    shapes = {name: tensor.info.shape for name, tensor in {**model, **vae}.items()}
    llm, vit = (alias if alias in draft else name for name, alias in configuration.SUB_CONFIG_ALIASES.items())
    nested_facts = {
        llm: _text_facts(shapes),
        vit: _vision_facts(shapes, draft.get("vit_select_layer", -2)),
        "vae_config": vae_facts(shapes),
    }
    for name, facts in nested_facts.items():
        draft[name] = _settle(draft.get(name) or {}, facts, f"{name}.", notes)
    draft = _settle(draft, _model_facts(shapes, draft["vae_config"].get("z_channels")), "", notes)
    draft["dtype"] = common_dtype(model) or draft.get("dtype")
    layer_module = _layer_module(model)
    follows = "Qwen2MoTDecoderLayer" if draft["visual_gen"] else "Qwen2DecoderLayer"
    if layer_module != follows or "layer_module" in draft[llm]:
        draft[llm]["layer_module"] = layer_module
    return draft, notes


def _settle(config: Mapping[str, Any], facts: Mapping[str, Any], prefix: str, notes: list[str]) -> dict[str, Any]:
    for name, value in facts.items():
        if name in config and config[name] != value:
            notes.append(f"config.json: {prefix}{name} is {value}, as the weights have it; it said {config[name]}.")
    return {**config, **facts}


def _model_facts(shapes: Mapping[str, tuple], z_channels: int | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "visual_und": _has(shapes, checkpoint.VISION),
        "visual_gen": _has(shapes, checkpoint.GEN_EXPERT) or _has(shapes, checkpoint.LATENTS),
    }
    tables = {"max_latent_size": "latent_pos_embed", "vit_max_num_patch_per_side": "vit_pos_embed"}
    for name, module in tables.items():
        if table := shapes.get(f"{module}.pos_embed"):
            facts[name] = math.isqrt(table[0])
    if z_channels and (projection := shapes.get("vae2llm.weight")):
        facts["latent_patch_size"] = math.isqrt(projection[1] // z_channels)
    return facts


def _text_facts(shapes: Mapping[str, tuple]) -> dict[str, Any]:
    layer = "language_model.model.layers.0."
    facts: dict[str, Any] = {}
    if embeddings := shapes.get("language_model.model.embed_tokens.weight"):
        facts |= {"vocab_size": embeddings[0], "hidden_size": embeddings[1]}
    if gate := shapes.get(f"{layer}mlp.gate_proj.weight"):
        facts |= {
            "intermediate_size": gate[0],
            "num_hidden_layers": count_members(shapes, r"language_model\.model\.layers\."),
        }
        facts["qk_norm"] = f"{layer}self_attn.q_norm.weight" in shapes
    if norm := shapes.get(f"{layer}self_attn.q_norm.weight"):
        for name, projection in (("num_attention_heads", "q_proj"), ("num_key_value_heads", "k_proj")):
            if weight := shapes.get(f"{layer}self_attn.{projection}.weight"):
                facts[name] = weight[0] // norm[0]
    return facts


def _vision_facts(shapes: Mapping[str, tuple], vit_select_layer: int) -> dict[str, Any]:
    tower = "vit_model.vision_model."
    facts: dict[str, Any] = {}
    if patches := shapes.get(f"{tower}embeddings.patch_embedding.weight"):
        facts |= {"hidden_size": patches[0], "patch_size": math.isqrt(patches[1] // 3)}
        if positions := shapes.get(f"{tower}embeddings.position_embedding.weight"):
            facts["image_size"] = math.isqrt(positions[0]) * facts["patch_size"]
    if hidden := shapes.get(f"{tower}encoder.layers.0.mlp.fc1.weight"):
        facts["intermediate_size"] = hidden[0]
        if vit_select_layer < 0:  # the config counts the layers of the SigLIP checkpoint, also those that are not used
            stored = count_members(shapes, r"vit_model\.vision_model\.encoder\.layers\.")
            facts["num_hidden_layers"] = stored - 1 - vit_select_layer
    return facts


def _layer_module(names: Iterable[str]) -> str:
    names = [name for name in names if re.search(checkpoint.PARTS[checkpoint.GEN_EXPERT], name)]
    if any(".self_attn." in name for name in names):
        return "Qwen2MoTDecoderLayer"
    return "Qwen2MoEDecoderLayer" if names else "Qwen2DecoderLayer"


def common_dtype(tensors: Tensors) -> str | None:
    """The floating point type of most bytes."""
    sizes: Counter[str] = Counter()
    for _, info in tensors.values():
        if info.dtype in DTYPES:
            sizes[DTYPES[info.dtype]] += info.end - info.begin
    return sizes.most_common(1)[0][0] if sizes else None


def _special_ids(directory: Path) -> dict[str, int]:
    """Special ids by the tokenizer's files; empty where there is no tokenizer."""
    vocabulary = _vocabulary(directory)
    if not vocabulary:
        return {}
    tokens = special_tokens()
    if absent := [token for token in tokens.values() if token not in vocabulary]:
        raise ValueError(
            f"The tokenizer in {directory} has no {', '.join(absent)}: use the one released with BAGEL, or add them as "
            "special tokens."
        )
    ids = {name: vocabulary[token] for name, token in tokens.items()}
    return {**ids, "pad_token_id": vocabulary.get("<|endoftext|>", ids["eos_token_id"])}


def _vocabulary(directory: Path) -> dict[str, int]:
    """Ids of all tokens, from whichever tokenizer files there are; `tokenizer.json` has the last word."""
    tokenizer = read_json(directory / "tokenizer.json")
    vocabulary = dict(read_json(directory / "vocab.json") or {})
    if tokenizer is None and not vocabulary:
        return {}
    added = (read_json(directory / "tokenizer_config.json") or {}).get("added_tokens_decoder", {})
    vocabulary |= {token["content"]: int(token_id) for token_id, token in added.items()}
    vocabulary |= read_json(directory / "added_tokens.json") or {}
    if tokenizer is not None:
        stored = tokenizer.get("model", {}).get("vocab", {})
        vocabulary |= stored if isinstance(stored, dict) else {}
        vocabulary |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    return vocabulary


def _check_ids(ids: Mapping[str, int], vocab_size: int, from_tokenizer: bool, notes: list[str]) -> None:
    """Ids that are looked up in the embedding table must lie in it; placeholders of images are not."""
    outside = checkpoint.ids_outside(ids, vocab_size)
    if outside and from_tokenizer:
        raise ValueError(
            f"The tokenizer is of another model: its {', '.join(f'{name}={value}' for name, value in outside.items())} "
            f"lie outside the vocabulary of {vocab_size} in {checkpoint.MODEL_FILE}."
        )
    if outside:
        notes.append(
            f"The special ids are those of the released tokenizer, outside this vocabulary of {vocab_size}: give "
            "from_pretrained your own (bos_token_id=..., eos_token_id=..., ...)."
        )


def _processor_files(config: Any) -> dict[str, bytes]:
    """The processor that fits a config, without its tokenizer."""
    made = new_image_processor(config)
    auto_maps = {name: {name: configuration.AUTO_MAP[name]} for name in ("AutoProcessor", "AutoImageProcessor")}
    whole = {
        "auto_map": auto_maps["AutoProcessor"],
        "image_processor": {"auto_map": auto_maps["AutoImageProcessor"], **json.loads(made.to_json_string())},
        "model_facts": model_facts(config),
        "processor_class": "BagelProcessor",
    }
    if config.multimodal_positions:
        whole["return_position_ids"] = True
    return {"processor_config.json": to_json(whole), CHAT_TEMPLATE: (REPOSITORY / CHAT_TEMPLATE).read_bytes()}


def _index(tensors: Tensors) -> dict[str, Any]:
    total = sum(info.end - info.begin for _, info in tensors.values())
    weight_map = {name: file.name for name, (file, _) in sorted(tensors.items())}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _kept_originals(directory: Path, contents: Mapping[str, bytes]) -> dict[str, bytes]:
    """Files that are about to be replaced, under the names they are kept by."""
    kept = {}
    for name, content in contents.items():
        stem, suffix = os.path.splitext(name)
        backup = f"{stem}.released{suffix}"
        if (directory / name).is_file() and not (directory / backup).exists():
            before = (directory / name).read_bytes()
            if before != content:
                kept[backup] = before
    return kept
