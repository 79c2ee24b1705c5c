# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Folders and the small files in them: which files a model ships, and how they are written whole or not at all."""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..image_processing_bagel import BagelImageProcessor
from ..packing_bagel import MODEL_FACTS
from ..processing_bagel import BagelProcessor


REPOSITORY = Path(__file__).resolve().parent.parent

# What `trust_remote_code=True` needs beside the weights.
RUNTIME_FILES = (
    "attention_bagel.py",
    "checkpoint_bagel.py",
    "configuration_bagel.py",
    "conversations_bagel.py",
    "decoder_bagel.py",
    "embeddings_bagel.py",
    "flow_bagel.py",
    "generation_bagel.py",
    "image_processing_bagel.py",
    "inputs_bagel.py",
    "layout_bagel.py",
    "lora_bagel.py",
    "modeling_bagel.py",
    "modeling_siglip_navit.py",
    "packing_bagel.py",
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


def special_tokens() -> dict[str, str]:
    """Config names of the special ids, and the tokens they belong to."""
    names = ("bos_token", "eos_token", "vision_start_token", "vision_end_token", "image_token", "latent_token")
    return {f"{name}_id": getattr(BagelProcessor, name) for name in names}


def new_image_processor(config: Any) -> Any:
    """The released settings, within what the position tables can address."""

    defaults = BagelImageProcessor()
    limits: dict[str, float] = {
        "size": config.vit_max_num_patch_per_side * config.vit_patch_size,
        "latent_size": config.max_latent_size * config.latent_downsample,
    }
    if config.interpolate_pos:  # larger pictures fit too
        limits = dict.fromkeys(limits, math.inf)
    sizes: dict[str, Any] = {
        name: {edge: min(n, limits[name]) for edge, n in getattr(defaults, name).items()} for name in limits
    }
    return BagelImageProcessor(**sizes, patch_size=config.vit_patch_size, latent_stride=config.latent_downsample)


def new_processor(config: Any, tokenizer: Any) -> Any:
    """The `BagelProcessor` for a new model: released prompts and transforms, pictures as large as `config` allows."""
    template = (REPOSITORY / CHAT_TEMPLATE).read_text(encoding="utf-8")
    return BagelProcessor(
        image_processor=new_image_processor(config),
        tokenizer=tokenizer,
        chat_template=template,
        return_position_ids=config.multimodal_positions,
        model_facts=model_facts(config),
    )


def model_facts(config: Any) -> dict[str, Any]:
    """What a processor stores of its model, for packs."""
    return {name: getattr(config, name) for name in MODEL_FACTS}


def refuse_taken(out_dir: Path) -> None:
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FileExistsError(f"{out_dir} exists and is not an empty directory: choose another name.")


@contextmanager
def new_folder(out_dir: Path, size: int) -> Iterator[Path]:
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


def read_json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{file} is damaged: {error}. Download it again.") from error
    if not isinstance(content, dict):
        raise OSError(f"{file} is damaged: it holds no JSON object. Download it again.")
    return content


def to_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def write_all(directory: Path, contents: Mapping[str, bytes]) -> list[str]:
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
