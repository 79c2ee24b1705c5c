# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A released folder small enough to be made for a test: names, shapes and dtypes as released, random values."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY, randomize

from bagel.checkpoint_bagel import to_released_name, to_released_shape
from bagel.configuration_bagel import BagelConfig
from bagel.modeling_bagel import BagelForUnifiedMultimodal


VOCAB_SIZE = 272  # a tokenizer without merges needs 263

# `tiny_models.TINY` under the released names, without ids, which released configs do not have; patches as released.
RELEASED_CONFIG = {
    "architectures": ["BagelForConditionalGeneration"],
    "model_type": "bagel",
    "visual_gen": True,
    "visual_und": True,
    "llm_config": {
        **{name: value for name, value in TINY["text_config"].items() if not name.endswith("_token_id")},
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "sliding_window": 131072,
        "use_sliding_window": False,
        "vocab_size": VOCAB_SIZE,
    },
    "vit_config": {**TINY["vision_config"], "image_size": 56, "patch_size": 14, "model_type": "siglip_vision_model"},
    # Three levels of two widths: the decoder counts them from the other end, and not every block has a shortcut.
    "vae_config": {**TINY["vae_config"], "downsample": 4, "ch_mult": [1, 1, 2]},
    "latent_patch_size": 2,
    "max_latent_size": 4,
    "vit_max_num_patch_per_side": 4,
}


def tiny_config(**changes) -> BagelConfig:
    return BagelConfig.from_dict(RELEASED_CONFIG, **changes)


def tiny_model(config: BagelConfig | None = None, seed: int = 0) -> BagelForUnifiedMultimodal:
    """A model whose tensors all differ; position tables stay what they are."""
    model = BagelForUnifiedMultimodal(config or tiny_config()).eval()
    randomize(model, seed)
    return model


def write_released_folder(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """`ema.safetensors` in `dtype`, `ae.safetensors` in float32 as released, and the three config files."""
    model = tiny_model(seed=seed)
    files = {"ema.safetensors": {}, "ae.safetensors": {}}
    for name, tensor in model.state_dict().items():
        released = to_released_name(name, model.config.vae_config)
        is_vae = name.startswith("vae.")
        tensor = tensor.reshape(to_released_shape(name, tensor.shape)).to(torch.float32 if is_vae else dtype)
        files["ae.safetensors" if is_vae else "ema.safetensors"][released] = tensor.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    write_json(folder / "config.json", RELEASED_CONFIG)
    for name in ("llm_config", "vit_config"):
        write_json(folder / f"{name}.json", RELEASED_CONFIG[name])
    return folder


def copy_folder(source: Path, target: Path) -> Path:
    """A folder whose files may be replaced without changing the first one; weights are linked."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            (target / file.name).symlink_to(file.resolve())
        else:
            (target / file.name).write_bytes(file.read_bytes())
    return target


def change_tensors(file: Path, change) -> None:
    """Rewrite a safetensors file with `change(tensors) -> tensors`."""
    tensors = change(load_file(file))
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


def read_json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")
