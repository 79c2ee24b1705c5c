# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The tiny model of the tests, in which nothing is neutral, and random inputs for it in both input formats.

Other tiny models derive from `TINY`: the released folders of `tiny_checkpoint.py`, the parts of `test_backbones.py`.

A conversation is written as a list of segments, in order:
    `("text", n)`: bos, n random words, eos.
    `("vit", rows, columns)`: a picture read by the vision tower, in patches.
    `("vae", rows, columns)`: a clean picture read through the VAE, in latent tokens.
    `("noise", rows, columns)`: a picture being learned, in latent tokens; training packs only.
"""

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache

import torch

from bagel.attention_bagel import FrozenContext, prepare_attention
from bagel.configuration_bagel import BagelConfig
from bagel.embeddings_bagel import grid_position_ids
from bagel.generation_bagel import DrawingContext
from bagel.inputs_bagel import Prompt, find_placeholders
from bagel.layout_bagel import PackedLayout
from bagel.modeling_bagel import BagelForUnifiedMultimodal


PAD, BOS, EOS, VISION_START, VISION_END, IMAGE, LATENT = range(7)
FIRST_WORD, VOCAB_SIZE = 7, 99
CLEAN = float("-inf")  # timestep before the sigmoid, as released packs write it

Segment = tuple
TINY = {
    "stage": 2,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "image_token_id": IMAGE,
    "latent_token_id": LATENT,
    "max_latent_size": 8,
    "vit_max_num_patch_per_side": 6,
    "text_config": {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    },
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 36,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 24,
        "patch_size": 4,
    },
    "vae_config": {"z_channels": 4, "downsample": 2, "ch": 8, "ch_mult": [1, 1], "num_res_blocks": 1},
}


def tiny_config(**overrides) -> BagelConfig:
    """The tiny config; dicts given for nested configs change only the keys they name."""
    values = {name: dict(value) if isinstance(value, dict) else value for name, value in TINY.items()}
    for name, value in overrides.items():
        values[name] = {**values[name], **value} if isinstance(values.get(name), dict) else value
    return BagelConfig(**values)


def tiny_model(seed: int = 0, **overrides) -> BagelForUnifiedMultimodal:
    """One shared model per arguments, in eval mode: do not change it (`fresh_tiny_model` gives one of your own)."""
    return _shared_model(seed, json.dumps(overrides, sort_keys=True))


@cache
def _shared_model(seed: int, overrides: str) -> BagelForUnifiedMultimodal:
    return fresh_tiny_model(seed, **json.loads(overrides))


def fresh_tiny_model(seed: int = 0, **overrides) -> BagelForUnifiedMultimodal:
    """A new model with seeded weights: no bias zero, no norm one, and a velocity head that says something."""
    with torch.random.fork_rng():
        model = BagelForUnifiedMultimodal(tiny_config(**overrides)).eval()
    randomize(model, seed)
    return model


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Fill every parameter; tables, which are buffers, stay what they are."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            is_norm_weight = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.1 * values if is_norm_weight else 0.1 * values)
        elif "embed" in name and "patch" not in name and "time" not in name:
            parameter.copy_(0.7 * values)
        else:
            parameter.copy_(values / parameter[0].numel() ** 0.5)


@contextmanager
def attention_kernel(model: BagelForUnifiedMultimodal, name: str, vision: str | None = None) -> Iterator[None]:
    """Run decoder and vision tower (or the latter on `vision`) on another kernel, also on one that is not installed."""
    before = {part: getattr(model.config, part)._attn_implementation for part in ("text_config", "vision_config")}
    before[""] = model.config._attn_implementation
    try:
        model.config._attn_implementation = {"": name, "text_config": name, "vision_config": vision or name}
        yield
    finally:
        model.config._attn_implementation = before


# ---- padded batches


@dataclass(frozen=True)
class Row:
    """One conversation of a padded batch; rows may be added: the second goes on where the first ends."""

    ids: list[int]
    patches: list[torch.Tensor]
    grids: list[tuple[int, int]]
    pictures: list[torch.Tensor]
    sizes: list[tuple[int, int]]

    def __add__(self, other: "Row") -> "Row":
        return Row(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Row)))


def random_row(segments: Sequence[Segment], generator: torch.Generator, config: BagelConfig | None = None) -> Row:
    """Random words and pixels for a list of segments."""
    config = config or tiny_config()
    row = Row([], [], [], [], [])
    for kind, *size in segments:
        if kind == "text":
            row.ids.extend([BOS, *_words(size[0], generator), EOS])
            continue
        count = size[0] * size[1]
        row.ids.extend([VISION_START, *[IMAGE if kind == "vit" else LATENT] * count, VISION_END])
        if kind == "vit":
            row.grids.append(tuple(size))
            row.patches.append(torch.randn(count, config.vision_config.patch_dim, generator=generator))
        else:
            height, width = (side * config.latent_downsample for side in size)
            row.sizes.append((height, width))
            row.pictures.append(torch.rand(3, height, width, generator=generator) * 2 - 1)
    return row


def pad_rows(rows: Sequence[Row], padding_side: str = "left") -> dict[str, torch.Tensor]:
    """Rows as the tensors that a processor makes."""
    length = max(len(row.ids) for row in rows)
    input_ids = torch.full((len(rows), length), PAD)
    attention_mask = torch.zeros_like(input_ids)
    for number, row in enumerate(rows):
        start = length - len(row.ids) if padding_side == "left" else 0
        input_ids[number, start : start + len(row.ids)] = torch.tensor(row.ids)
        attention_mask[number, start : start + len(row.ids)] = 1
    patches, grids, pictures, sizes = (
        [item for row in rows for item in getattr(row, name)] for name in ("patches", "grids", "pictures", "sizes")
    )
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if grids:
        batch |= {"pixel_values": torch.cat(patches), "image_grid_hw": torch.tensor(grids)}
    if sizes:
        batch |= {"latent_pixel_values": _pad_pictures(pictures), "latent_image_sizes": torch.tensor(sizes)}
    return batch


def padded_batch(
    rows: Sequence[Sequence[Segment]], seed: int = 0, padding_side: str = "left", config: BagelConfig | None = None
) -> dict[str, torch.Tensor]:
    """One conversation per row, in transformers' vocabulary, with random contents."""
    generator = torch.Generator().manual_seed(seed)
    return pad_rows([random_row(segments, generator, config) for segments in rows], padding_side)


def random_rows(seed: int, num_rows: int, kinds: Sequence[str] = ("text", "vit", "vae")) -> list[list[Segment]]:
    """Conversations that open and close with a text and hold pictures of the other kinds between."""
    chance = random.Random(seed)
    return [
        [_text(chance), *random_segments(chance, chance.randint(1, 3), kinds), _text(chance)] for _ in range(num_rows)
    ]


def random_segments(chance: random.Random, count: int, kinds: Sequence[str]) -> list[Segment]:
    """`count` segments of random kinds and sizes."""
    segments = []
    for _ in range(count):
        kind = chance.choice(list(kinds))
        segments.append(_text(chance) if kind == "text" else (kind, chance.randint(1, 4), chance.randint(1, 4)))
    return segments


def _text(chance: random.Random) -> Segment:
    return ("text", chance.randint(0, 6))


# ---- training packs


def training_pack(
    samples: Sequence[Sequence[Segment]], seed: int = 0, masks: bool = False, config: BagelConfig | None = None
) -> dict:
    """
    A pack in the released vocabulary, one sample per list of segments; a text's loss is on every other text.

    `masks` gives `nested_attention_masks` instead of `split_lens` and `attn_modes`.
    """
    generator = torch.Generator().manual_seed(seed)
    return join_packs([sample_pack(segments, generator, config) for segments in samples], masks)


def sample_pack(segments: Sequence[Segment], generator: torch.Generator, config: BagelConfig | None = None) -> dict:
    """One sample as a pack of its own; [`join_packs`] makes larger ones of these."""
    config = config or tiny_config()
    pack = {name: [] for name in (*_PLACES, *_TOKENS, *_LISTS)}
    here = position = texts = 0
    for kind, *size in segments:
        start, places = here, None
        if kind == "text":
            words = _words(size[0], generator)
            ids, index = [BOS, *words, EOS], range(here, here + size[0] + 2)
            pack["packed_position_ids"] += range(position, position + len(ids))
            position += len(ids)
            if texts % 2 == 0:  # predicted from bos to the last word
                pack["ce_loss_indexes"] += index[:-1]
                pack["packed_label_ids"] += ids[1:]
            texts += 1
            here += len(ids)
        else:
            count = size[0] * size[1]
            places = range(here + 1, here + 1 + count)
            ids, index = [VISION_START, VISION_END], [here, here + 1 + count]
            pack["packed_position_ids"] += [position] * (count + 2)
            position += kind != "noise"  # a picture being learned is not there for what follows
            here += count + 2
        pack["packed_text_ids"] += ids
        pack["packed_text_indexes"] += index
        pack["split_lens"].append(here - start)
        pack["attn_modes"].append({"text": "causal", "vit": "full", "vae": "full", "noise": "noise"}[kind])
        if kind == "vit":
            patches = torch.randn(count, config.vision_config.patch_dim, generator=generator)
            pack["packed_vit_tokens"].append(patches)
            pack["packed_vit_token_indexes"] += places
            pack["packed_vit_position_ids"].append(grid_position_ids(*size, config.vit_max_num_patch_per_side))
            pack["vit_token_seqlens"].append(count)
        elif kind in ("vae", "noise"):
            side = config.latent_patch_size
            shape = (config.vae_config.z_channels, size[0] * side, size[1] * side)
            pack["padded_latent"].append(torch.randn(shape, generator=generator))
            pack["patchified_vae_latent_shapes"].append(tuple(size))
            pack["packed_latent_position_ids"].append(grid_position_ids(*size, config.max_latent_size))
            pack["packed_vae_token_indexes"] += places
            t = float(torch.randn((), generator=generator)) if kind == "noise" else CLEAN
            pack["packed_timesteps"] += [t] * count
            pack["noise"].append(torch.randn(count, config.patch_latent_dim, generator=generator))
            pack["mse_loss_indexes"] += places if kind == "noise" else []
    pack["sample_lens"].append(here)
    return pack


_PLACES = (
    "packed_text_indexes",
    "packed_vit_token_indexes",
    "packed_vae_token_indexes",
    "mse_loss_indexes",
    "ce_loss_indexes",
)
_TOKENS = ("packed_text_ids", "packed_position_ids", "packed_label_ids", "packed_timesteps")
_LISTS = (
    "sample_lens",
    "split_lens",
    "attn_modes",
    "packed_vit_tokens",
    "packed_vit_position_ids",
    "vit_token_seqlens",
    "padded_latent",
    "patchified_vae_latent_shapes",
    "packed_latent_position_ids",
    "noise",
)


def join_packs(packs: Sequence[dict], masks: bool = False) -> dict:
    """Sample packs one after the other, as tensors; what no sample has is left out."""
    joined: dict = {name: [] for name in (*_PLACES, *_TOKENS, *_LISTS)}
    start = 0
    for pack in packs:
        for name in _PLACES:
            joined[name] += [start + place for place in pack[name]]
        for name in (*_TOKENS, *_LISTS):
            joined[name] += pack[name]
        start += sum(pack["sample_lens"])
    joined = {name: values for name, values in joined.items() if values}
    for name in (*_PLACES, *_TOKENS, "vit_token_seqlens"):
        if name in joined:
            joined[name] = torch.tensor(joined[name])
    for name in ("packed_vit_tokens", "packed_vit_position_ids", "packed_latent_position_ids", "noise"):
        if name in joined:
            joined[name] = torch.cat(joined[name])
    if "padded_latent" in joined:
        joined["padded_latent"] = _pad_pictures(joined["padded_latent"])
    joined["sequence_length"] = start
    if masks:
        lens, modes = joined.pop("split_lens"), joined.pop("attn_modes")
        joined["nested_attention_masks"] = nested_masks(joined["sample_lens"], lens, modes)
    return joined


def nested_masks(sample_lens: Sequence[int], split_lens: Sequence[int], modes: Sequence[str]) -> list[torch.Tensor]:
    """
    One bool mask per sample, True = sees, drawn split by split with nothing of the layout's rule:

    every split sees all splits of its sample before it; a causal split sees itself up to the diagonal, the others see
    themselves whole; a noise split is then wiped out of everybody else's sight.
    """
    splits, masks = list(zip(split_lens, modes)), []
    for length in sample_lens:
        mask, start, hidden = torch.zeros(length, length, dtype=torch.bool), 0, []
        while start < length:
            size, mode = splits.pop(0)
            end = start + size
            mask[start:end, :start] = True
            own = torch.ones(size, size, dtype=torch.bool)
            mask[start:end, start:end] = own.tril() if mode == "causal" else own
            hidden += [(start, end)] if mode == "noise" else []
            start = end
        for start, end in hidden:
            mask[:start, start:end] = mask[end:, start:end] = False
        masks.append(mask)
    return masks


def _words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(FIRST_WORD, VOCAB_SIZE, (count,), generator=generator).tolist()


def _pad_pictures(pictures: Sequence[torch.Tensor]) -> torch.Tensor:
    """(channels, h, w) of several sizes, zero-padded below and right."""
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (1, 2))
    return torch.stack([torch.nn.functional.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in pictures])


# ---- layouts and contexts by hand


def layout_of(
    config: BagelConfig,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.LongTensor | None = None,
    past_length: int = 0,
) -> PackedLayout:
    """The layout of a padded batch, from its ids alone: what `Prompt.layout` does for one whose images are known."""
    placeholders = find_placeholders(config, input_ids)
    valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :].long()
    prompt = Prompt(input_ids, valid.bool(), placeholders, (), (), placeholders.positions(valid))
    return prompt.layout(attention_mask, position_ids, past_length)


def drawing_context(model, layers, layout: PackedLayout, position_ids: torch.Tensor) -> DrawingContext:
    """A context to draw under, from cached keys and values and the layout of the noisy blocks."""
    frozen, decoder = FrozenContext(layers), model.get_decoder()
    shape_only = torch.empty(layout.batch_size, layout.length, 0, dtype=model.dtype)
    attention = prepare_attention(model.config.text_config, layout, shape_only, None, frozen)
    return DrawingContext(frozen, layout, attention, decoder.route(layout), position_ids)
