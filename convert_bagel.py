# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Between the released layout and ours, without touching a weight; a script over `checkpoint_bagel`.

    python convert_bagel.py adopt DIR                 make a released folder loadable by transformers, in place
    python convert_bagel.py export MODEL_DIR OUT_DIR  write a (fine-tuned) model as a released folder
    python convert_bagel.py build OUT_DIR --text-model QWEN2 [--vision-model SIGLIP] [--vae VAE]
                                                      write an untrained BAGEL made of pretrained parts

The released layout: `ema.safetensors`, `ae.safetensors` (the VAE under its own names), `config.json` or
`llm_config.json` and `vit_config.json`, tokenizer files. `adopt` adds small files to it; `export` copies tensors byte
by byte. This file knows folders and what stands in their small files; what tensors are called and whether they fit is
known by `checkpoint_bagel`.
"""

import argparse
import importlib
import importlib.machinery
import importlib.util
import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from tqdm import tqdm


REPOSITORY = Path(__file__).resolve().parent


def import_sibling(name: str) -> ModuleType:
    """A module of this repo. They import each other relatively, so a script has to make their folder a package."""
    package = __package__ or "bagel_repository"
    if package not in sys.modules:
        spec = importlib.machinery.ModuleSpec(package, loader=None, is_package=True)
        spec.submodule_search_locations = [str(REPOSITORY)]
        sys.modules[package] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{package}.{name}")


checkpoint = import_sibling("checkpoint_bagel")
configuration = import_sibling("configuration_bagel")

# What `trust_remote_code=True` needs beside the weights.
RUNTIME_FILES = (
    "attention_bagel.py",
    "backbones_bagel.py",
    "checkpoint_bagel.py",
    "configuration_bagel.py",
    "embeddings_bagel.py",
    "flow_bagel.py",
    "generation_bagel.py",
    "image_processing_bagel.py",
    "layout_bagel.py",
    "lora_bagel.py",
    "modeling_bagel.py",
    "modeling_siglip_navit.py",
    "positions_bagel.py",
    "processing_bagel.py",
)
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
COPY_BYTES = 16 * 2**20

Tensors = Mapping[str, "checkpoint.StoredTensor"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("adopt", help="make a released folder loadable by transformers, in place")
    command.add_argument("directory", metavar="DIR")
    command = commands.add_parser("export", help="write a model as a released folder")
    command.add_argument("model_dir", metavar="MODEL_DIR")
    command.add_argument("out_dir", metavar="OUT_DIR")
    command = commands.add_parser("build", help="write an untrained BAGEL made of pretrained parts")
    command.add_argument("out_dir", metavar="OUT_DIR")
    command.add_argument("--text-model", required=True, help="a Qwen2 or Qwen2.5 model: folder, or name on the Hub")
    command.add_argument("--vision-model", help="a SigLIP model; without it the model reads no pictures")
    command.add_argument("--vae", help="an autoencoder (diffusers folder, ae.safetensors); without it, no drawing")
    command.add_argument("--dtype", default="auto", help="of all but the VAE; by default that of the text model")
    command.add_argument("--seed", type=int, default=0, help="of the new parts")
    command.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="a field of BagelConfig")
    options = parser.parse_args(arguments)
    try:
        if options.command == "adopt":
            print(_describe_adoption(options.directory, adopt(options.directory)))
        elif options.command == "build":
            parts = (options.text_model, options.vision_model, options.vae)
            fields = dict(map(_assignment, options.set))
            written = build(options.out_dir, *parts, dtype=options.dtype, seed=options.seed, **fields)
            print(f"Wrote {options.out_dir}: {', '.join(written)}")
        else:
            print(f"Wrote {options.out_dir}: {', '.join(export(options.model_dir, options.out_dir))}")
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


# --------------------------------------------------------------------------------------------------------------------
# Released -> ours


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
    original = _read_json(directory / "config.json") or {}
    token_ids = _special_ids(directory)

    draft, notes = _complete_config(_with_nested_configs(directory, original, model), model, vae)
    config = configuration.BagelConfig.from_dict({**draft, **token_ids})
    ids = {name: getattr(config, name) for name in (*_special_tokens(), "pad_token_id")}
    adopted = (original.get("auto_map") or {}).get("AutoModel") == configuration.AUTO_MAP["AutoModel"]
    auto_map = {**(original["auto_map"] if adopted else {}), **configuration.AUTO_MAP}
    weights = {**model, **vae} if config.visual_gen else model
    checkpoint.check_tensors(_model_class(), config, weights)
    _check_ids(ids, config.text_config.vocab_size, bool(token_ids), notes)

    contents = {
        **{name: (REPOSITORY / name).read_bytes() for name in RUNTIME_FILES},
        "config.json": _to_json({**draft, **ids, "auto_map": auto_map}),
        checkpoint.INDEX_NAME: _to_json(_index(weights)),
    }
    if token_ids:
        settings = {"generation_config.json": _to_json({name: ids[name] for name in GENERATION_IDS})}
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
    return Adoption(_write_all(directory, contents), notes, bool(token_ids))


GENERATION_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _model_class() -> type:
    return import_sibling("modeling_bagel").BagelForUnifiedMultimodal


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
        values = _read_json(directory / f"{name}.json")
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
        "vae_config": checkpoint.vae_facts(shapes),
    }
    for name, facts in nested_facts.items():
        draft[name] = _settle(draft.get(name) or {}, facts, f"{name}.", notes)
    draft = _settle(draft, _model_facts(shapes, draft["vae_config"].get("z_channels")), "", notes)
    draft["dtype"] = _common_dtype(model) or draft.get("dtype")
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
            "num_hidden_layers": checkpoint.count_members(shapes, r"language_model\.model\.layers\."),
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
            stored = checkpoint.count_members(shapes, r"vit_model\.vision_model\.encoder\.layers\.")
            facts["num_hidden_layers"] = stored - 1 - vit_select_layer
    return facts


def _layer_module(names: Iterable[str]) -> str:
    names = [name for name in names if re.search(checkpoint.PARTS[checkpoint.GEN_EXPERT], name)]
    if any(".self_attn." in name for name in names):
        return "Qwen2MoTDecoderLayer"
    return "Qwen2MoEDecoderLayer" if names else "Qwen2DecoderLayer"


def _common_dtype(tensors: Tensors) -> str | None:
    """The floating point type of most bytes."""
    sizes: Counter[str] = Counter()
    for _, info in tensors.values():
        if info.dtype in DTYPES:
            sizes[DTYPES[info.dtype]] += info.end - info.begin
    return sizes.most_common(1)[0][0] if sizes else None


def _special_tokens() -> dict[str, str]:
    """Config names of the special ids, and the tokens they belong to."""
    processor = import_sibling("processing_bagel").BagelProcessor
    names = ("bos_token", "eos_token", "vision_start_token", "vision_end_token", "image_token", "latent_token")
    return {f"{name}_id": getattr(processor, name) for name in names}


def _special_ids(directory: Path) -> dict[str, int]:
    """Special ids by the tokenizer's files; empty where there is no tokenizer."""
    vocabulary = _vocabulary(directory)
    if not vocabulary:
        return {}
    tokens = _special_tokens()
    if absent := [token for token in tokens.values() if token not in vocabulary]:
        raise ValueError(
            f"The tokenizer in {directory} has no {', '.join(absent)}: use the one released with BAGEL, or add them as "
            "special tokens."
        )
    ids = {name: vocabulary[token] for name, token in tokens.items()}
    return {**ids, "pad_token_id": vocabulary.get("<|endoftext|>", ids["eos_token_id"])}


def _vocabulary(directory: Path) -> dict[str, int]:
    """Ids of all tokens, from whichever tokenizer files there are; `tokenizer.json` has the last word."""
    tokenizer = _read_json(directory / "tokenizer.json")
    vocabulary = dict(_read_json(directory / "vocab.json") or {})
    if tokenizer is None and not vocabulary:
        return {}
    added = (_read_json(directory / "tokenizer_config.json") or {}).get("added_tokens_decoder", {})
    vocabulary |= {token["content"]: int(token_id) for token_id, token in added.items()}
    vocabulary |= _read_json(directory / "added_tokens.json") or {}
    if tokenizer is not None:
        stored = tokenizer.get("model", {}).get("vocab", {})
        vocabulary |= stored if isinstance(stored, dict) else {}
        vocabulary |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    return vocabulary


def _check_ids(ids: Mapping[str, int], vocab_size: int, from_tokenizer: bool, notes: list[str]) -> None:
    """Ids that are looked up in the embedding table must lie in it; places of pictures are not."""
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


def _image_processor(config: Any) -> Any:
    """The released settings, within what the position tables can address."""
    image_processor = import_sibling("image_processing_bagel").BagelImageProcessor
    defaults = image_processor()
    limits = {
        "size": config.vit_max_num_patch_per_side * config.vit_patch_size,
        "latent_size": config.max_latent_size * config.latent_downsample,
    }
    if config.interpolate_pos:  # larger pictures fit too
        limits = dict.fromkeys(limits, math.inf)
    sizes = {name: {edge: min(n, limits[name]) for edge, n in getattr(defaults, name).items()} for name in limits}
    return image_processor(**sizes, patch_size=config.vit_patch_size, latent_stride=config.latent_downsample)


def _processor_files(config: Any) -> dict[str, bytes]:
    """The processor that fits a config, without its tokenizer."""
    made = _image_processor(config)
    auto_maps = {name: {name: configuration.AUTO_MAP[name]} for name in ("AutoProcessor", "AutoImageProcessor")}
    whole = {
        "auto_map": auto_maps["AutoProcessor"],
        "image_processor": {"auto_map": auto_maps["AutoImageProcessor"], **json.loads(made.to_json_string())},
        "processor_class": "BagelProcessor",
    }
    if config.multimodal_positions:
        whole["return_position_ids"] = True
    return {"processor_config.json": _to_json(whole), CHAT_TEMPLATE: (REPOSITORY / CHAT_TEMPLATE).read_bytes()}


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


def _describe_adoption(directory: str, adoption: Adoption) -> str:
    lines = [f"{directory} is ready. Wrote: {', '.join(adoption.written) or 'nothing, it was ready before'}."]
    lines += [f"note: {note}" for note in adoption.notes]
    classes = "AutoModel, AutoProcessor" if adoption.has_processor else "AutoModel"
    lines += ["Next:", f"    from transformers import {classes}"]
    path = json.dumps(str(directory))
    lines.append(f"    model = AutoModel.from_pretrained({path}, trust_remote_code=True)")
    if adoption.has_processor:
        lines.append(f"    processor = AutoProcessor.from_pretrained({path}, trust_remote_code=True)")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------
# Ours -> released


def export(model_dir: str | os.PathLike, out_dir: str | os.PathLike) -> list[str]:
    """
    Write a model folder (one file, shards, or an adopted one) in the released layout.

    Tensors are copied byte by byte, in pieces, so a model larger than the memory is no problem. The result appears
    under its name when it is complete.

    Returns:
        The names of the files written.

    Raises:
        OSError: nothing to read, no room, or `out_dir` is not empty.
        ValueError: the tensors are not those that the folder's config describes.
    """
    model_dir, out_dir = Path(model_dir), Path(out_dir)
    if not model_dir.is_dir():
        raise NotADirectoryError(f"{model_dir} is not a directory.")
    _refuse_taken(out_dir)
    config = configuration.BagelConfig.from_pretrained(model_dir)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{model_dir} is quantised; the released layout is not. Export the model it was made from.")
    tensors = checkpoint.read_tensors(checkpoint.checkpoint_files(model_dir))
    checkpoint.check_tensors(_model_class(), config, tensors)

    files = _split_released(tensors, config.vae_config)
    small = _released_configs(config, _common_dtype(tensors))
    small |= {name: (model_dir / name).read_bytes() for name in TOKENIZER_FILES if (model_dir / name).is_file()}
    size = sum(info.end - info.begin for _, info in tensors.values())
    with (
        _new_folder(out_dir, size) as partial,
        tqdm(total=size, unit="B", unit_scale=True, desc="exporting") as progress,
    ):
        for name, content in files.items():
            _copy_tensors(partial / name, content, progress)
        for name, content in small.items():
            (partial / name).write_bytes(content)
    return [*files, *small]


class ReleasedTensor(NamedTuple):
    """A tensor to write: its shape there, and the bytes it has now."""

    shape: tuple[int, ...]
    stored: "checkpoint.StoredTensor"


def _split_released(tensors: Tensors, vae_config: Any) -> dict[str, dict[str, ReleasedTensor]]:
    """Which tensor goes into which file, under its released name and shape."""
    files: dict[str, dict[str, ReleasedTensor]] = {checkpoint.MODEL_FILE: {}, checkpoint.VAE_FILE: {}}
    for name, stored in tensors.items():
        module_name = checkpoint.to_module_name(name, vae_config)
        released = checkpoint.to_released_name(module_name, vae_config)
        shape = checkpoint.to_released_shape(module_name, stored.info.shape)
        is_vae = re.search(checkpoint.PARTS[checkpoint.VAE], released)
        files[checkpoint.VAE_FILE if is_vae else checkpoint.MODEL_FILE][released] = ReleasedTensor(shape, stored)
    return {name: content for name, content in files.items() if content}


def _copy_tensors(file: Path, tensors: Mapping[str, ReleasedTensor], progress: tqdm) -> None:
    """Write a safetensors file from pieces of others."""

    def widest_first(name: str) -> tuple[int, str]:  # keeps every tensor aligned
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
                        raise OSError(f"{source} became shorter while it was read.")
                    target.write(piece)
                    remaining -= len(piece)
                    progress.update(len(piece))


def _released_configs(config: Any, dtype: str | None) -> dict[str, bytes]:
    """`config.json`, `llm_config.json` and `vit_config.json` in the words of the released ones."""
    llm, vit = _released_llm_config(config, dtype), _released_vit_config(config.vision_config)
    vae_names = list(type(config.vae_config).__annotations__)
    top = ("latent_patch_size", "max_latent_size", "vit_max_num_patch_per_side", "connector_act", "interpolate_pos")
    ids = (*_special_tokens(), "pad_token_id")
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
    return {"config.json": _to_json(whole), "llm_config.json": _to_json(llm), "vit_config.json": _to_json(vit)}


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
    if text.layer_module == "Qwen2MoEDecoderLayer":  # the other two follow from visual_gen
        released["layer_module"] = text.layer_module
    if dtype is not None:
        released["torch_dtype"] = dtype
    return released


def _released_vit_config(vision: Any) -> dict[str, Any]:
    """The keys of the released file, and any other that is not at its default."""
    names = ("hidden_size", "image_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "patch_size")
    released = {"model_type": "siglip_vision_model", **{name: getattr(vision, name) for name in names}}
    defaults = type(vision)()
    others = ("attention_dropout", "hidden_act", "layer_norm_eps", "num_channels", "position_embedding", "rope")
    return released | {
        name: getattr(vision, name) for name in others if getattr(vision, name) != getattr(defaults, name)
    }


# --------------------------------------------------------------------------------------------------------------------
# Parts -> ours


def build(
    out_dir: str | os.PathLike,
    text_model: str,
    vision_model: str | None = None,
    vae: str | None = None,
    dtype: str = "auto",
    seed: int = 0,
    **fields,
) -> list[str]:
    """
    Write a BAGEL made of pretrained parts, with tokenizer and processor: a folder to start training from.

    Args:
        text_model: a Qwen2 model with its tokenizer. vision_model, vae, dtype, fields: see
        `BagelForUnifiedMultimodal.from_backbones`. seed: of the parts that are new.

    Returns:
        The names of the files written.

    Raises:
        OSError: a part cannot be found or read, or `out_dir` is not empty.
        ValueError: the parts do not make a model.
    """
    import torch
    from transformers import AutoTokenizer

    out_dir = Path(out_dir)
    _refuse_taken(out_dir)
    source = import_sibling("backbones_bagel").find_files(text_model, "text_model")
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(seed)
    model = _model_class().from_backbones(source, vision_model, vae, tokenizer=tokenizer, dtype=dtype, **fields)
    with _new_folder(out_dir, model.get_memory_footprint()) as partial:
        model.save_pretrained(partial)
        new_processor(model.config, tokenizer).save_pretrained(partial)
        written = sorted(file.name for file in partial.iterdir())
    return written


def new_processor(config: Any, tokenizer: Any) -> Any:
    """The `BagelProcessor` for a new model: released prompts and transforms, pictures as large as `config` allows."""
    template = (REPOSITORY / CHAT_TEMPLATE).read_text(encoding="utf-8")
    return import_sibling("processing_bagel").BagelProcessor(
        image_processor=_image_processor(config),
        tokenizer=tokenizer,
        chat_template=template,
        return_position_ids=config.multimodal_positions,
    )


def _assignment(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError as error:
        raise ValueError(f"--set {text}: NAME=JSON is needed, such as max_latent_size=32.") from error


# --------------------------------------------------------------------------------------------------------------------
# Small files


def _refuse_taken(out_dir: Path) -> None:
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FileExistsError(f"{out_dir} exists and is not an empty directory: choose another name.")


@contextmanager
def _new_folder(out_dir: Path, size: int) -> Iterator[Path]:
    """A folder to write `size` bytes into, which gets its name when it is complete; after an error it is gone."""
    partial = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    if size > shutil.disk_usage(partial.parent).free:
        raise OSError(f"{partial.parent} has no room for the {size} bytes of {out_dir.name}.")
    partial.mkdir()
    try:
        yield partial
        if out_dir.exists():
            out_dir.rmdir()
        partial.rename(out_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _read_json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{file} is damaged: {error}. Download it again.") from error
    if not isinstance(content, dict):
        raise OSError(f"{file} is damaged: it holds no JSON object. Download it again.")
    return content


def _to_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _write_all(directory: Path, contents: Mapping[str, bytes]) -> list[str]:
    """Write the files that are not there yet with this content; all of them or, after an error, none."""
    before = {name: (directory / name).read_bytes() if (directory / name).is_file() else None for name in contents}
    changed = [name for name, content in contents.items() if before[name] != content]
    staged = {name: directory / f".{name}.{os.getpid()}.partial" for name in changed}
    replaced = []
    try:
        for name, file in staged.items():
            file.write_bytes(contents[name])
        for name, file in staged.items():
            os.replace(file, directory / name)
            replaced.append(name)
    except BaseException:
        for name in replaced:
            if before[name] is None:
                (directory / name).unlink()
            else:
                (directory / name).write_bytes(before[name])
        raise
    finally:
        for file in staged.values():
            file.unlink(missing_ok=True)
    return sorted(changed)


if __name__ == "__main__":
    sys.exit(main())
