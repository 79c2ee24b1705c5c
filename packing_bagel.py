# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Sequence plans to training packs: which token stands where, at which position, with which label; reads no files.

A sample is a list of items: texts, and pictures as the vision tower (ViT) or the VAE sees them. An edit, packed (s, e =
vision_start, vision_end; b, t, E = bos, text, eos; l = VAE latent, i = ViT patch, n = noisy latent, learned):

    item        vae_image    vit_image    text       vae_image, loss
    token       s l l l e    s i i i e    b t t E    s n n n e
    split       0 0 0 0 0    1 1 1 1 1    2 2 2 2    3 3 3 3 3
    mode        full         full         causal     noise
    position    0 0 0 0 0    1 1 1 1 1    2 3 4 5    6 6 6 6 6
    timestep      -inf                                 random

With three positions per token a picture has those of its grid, see `layout_bagel.py`.

Two steps: `randomize` makes all random decisions of a sample (without pixels, so its length is known before a picture
is decoded), `pack` lays such samples out one after the other, as `BagelForUnifiedMultimodal.forward` takes them.
"""

import difflib
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import numpy as np
import torch

from .embeddings_bagel import grid_position_ids
from .image_processing_bagel import patchify
from .layout_bagel import BoolTensor, LongTensor, PackedLayout, around, grid_block_positions


ITEM_TYPES = ("text", "vit_image", "vae_image")
CLEAN = float("-inf")  # the timestep of a clean picture, before the sigmoid


class RandomSource(Protocol):
    """Where randomness comes from: a `numpy.random.Generator`, or anything that replays stored numbers."""

    def random(self) -> float: ...

    def standard_normal(self) -> float: ...


# --------------------------------------------------------------------------------------------------------------------
# Plans


@dataclass(frozen=True)
class SequenceItem:
    """
    One item of a plan: a text, or one view of a picture. Names and meaning are those of the released `sequence_plan`.

    Attributes:
        type: "text", "vit_image" or "vae_image".
        text_ids: of a text, without boundary tokens.
        grid: of a picture, (rows, columns) in tokens.
        content: of a picture: patches (rows * columns, p * p * 3) for the ViT, pixels (3, H, W) in [-1, 1] for the VAE.
            May be absent while only lengths matter.
        loss: a text is trained with cross-entropy, a vae_image is noisy and trained with flow matching.
        enable_cfg: the item may be dropped, so that guidance has an unconditional side.
        special_token_label: what the item's last token (eos, vision_end) should predict; `None` = nothing.
        split_start, split_end: the frames of a clip are vae_images that share one split, from the first to the last.
        frame_delta: positions to the next frame.

    Raises:
        ValueError: an unknown type, or a picture whose sides, content and grid contradict each other.
    """

    type: str
    text_ids: tuple[int, ...] = ()
    grid: tuple[int, int] = (0, 0)
    content: torch.Tensor | None = field(default=None, repr=False, compare=False)
    loss: bool = False
    enable_cfg: bool = False
    special_token_label: int | None = None
    split_start: bool = True
    split_end: bool = True
    frame_delta: int | None = None

    def __post_init__(self):
        if self.type not in ITEM_TYPES:
            raise ValueError(f"Unknown item type {self.type!r}; a plan holds {', '.join(ITEM_TYPES)}.")
        if self.type != "text" and math.prod(self.grid) == 0:
            raise ValueError(f"A {self.type} needs a grid of at least one token, got {self.grid}.")
        if self.type == "vit_image" and self.loss:
            raise ValueError("A vit_image cannot have a loss: only texts and vae_images are trained.")
        if self.type != "vae_image" and not (self.split_start and self.split_end and self.frame_delta is None):
            raise ValueError(
                f"Only vae_images are frames of a clip (split_start, split_end, frame_delta), not {self.type}."
            )

    @classmethod
    def vit_image(cls, pixels: torch.Tensor, patch_size: int, **flags) -> "SequenceItem":
        """From pixels (3, H, W), already resized: both sides divisible by `patch_size`."""
        patches = patchify(pixels, patch_size)
        grid = (pixels.shape[1] // patch_size, pixels.shape[2] // patch_size)
        return cls("vit_image", grid=grid, content=patches, **flags)

    @classmethod
    def vae_image(cls, pixels: torch.Tensor, stride: int, **flags) -> "SequenceItem":
        """From pixels (3, H, W), already resized: both sides divisible by `stride`, the pixels per latent token."""
        _, height, width = pixels.shape
        if height % stride or width % stride:
            raise ValueError(
                f"A vae_image of {height}x{width} pixels is not divisible by {stride}, the pixels per latent token and "
                "side. Resize it with the image processor first."
            )
        return cls("vae_image", grid=(height // stride, width // stride), content=pixels, **flags)

    @property
    def special_token_loss(self) -> bool:
        return self.special_token_label is not None

    @property
    def num_tokens(self) -> int:
        """Boundary tokens included."""
        return 2 + (len(self.text_ids) if self.type == "text" else math.prod(self.grid))

    @property
    def mode(self) -> str:
        """What the split it starts is: a clip being learned is "full" as released, so later tokens see its frames."""
        if self.type == "text":
            return "causal"
        return "noise" if self.loss and self.frame_delta is None else "full"

    def extent(self, multimodal: bool) -> int:
        """Positions that it takes: as many as tokens for a text, for a picture one, or those of its longer side."""
        if self.type == "text":
            return self.num_tokens
        return max(self.grid) if multimodal else 1

    def advance(self, multimodal: bool) -> int:
        """
        Positions to the next item: a learned picture takes none, its clean copy stands where it stood. What follows a
        clip with three positions per token stands behind the grid of its last frame.
        """
        if self.frame_delta is not None:
            return max(self.frame_delta, self.extent(multimodal) if multimodal and self.split_end else 0)
        return 0 if self.type == "vae_image" and self.loss else self.extent(multimodal)


@dataclass(frozen=True)
class SamplePlan:
    """One sample: `items` in order, and the `name` that errors and logs call it by."""

    items: tuple[SequenceItem, ...]
    name: str = "a sample"


@dataclass(frozen=True)
class PackingConfig:
    """
    The facts of a model that packing needs; `BagelProcessor.packing_config` holds those of a checkpoint.

    Args:
        bos_token_id, eos_token_id, vision_start_token_id, vision_end_token_id: boundary tokens.
        image_token_id, latent_token_id: placeholders, which no text may hold.
        vit_patch_size, latent_downsample: pixels per ViT token and per latent token, and side.
        vit_max_num_patch_per_side, max_latent_size: sides of the position tables.
        interpolate_pos: which entries of their position table pictures take, see
            [`~embeddings_bagel.grid_position_ids`].
        multimodal_positions: every token has three positions, time, height and width.
        text_cond_dropout_prob, vit_cond_dropout_prob, vae_cond_dropout_prob: of items with `enable_cfg`.
        visual_und, visual_gen: whether the model has a vision tower, and whether it draws.
    """

    bos_token_id: int = 151644
    eos_token_id: int = 151645
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    image_token_id: int = 151655
    latent_token_id: int = 151654
    vit_patch_size: int = 14
    latent_downsample: int = 16
    vit_max_num_patch_per_side: int = 70
    max_latent_size: int = 64
    interpolate_pos: bool | str = False
    multimodal_positions: bool = False
    text_cond_dropout_prob: float = 0.1
    vit_cond_dropout_prob: float = 0.3
    vae_cond_dropout_prob: float = 0.3
    visual_und: bool = True
    visual_gen: bool = True

    @classmethod
    def of_model(cls, config: Any) -> "PackingConfig":
        """Read off a `BagelConfig`. Of several eos ids the first ends a text."""
        facts = {name: getattr(config, name) for name in PACKING_FACTS}
        if isinstance(facts["eos_token_id"], list | tuple):
            facts["eos_token_id"] = facts["eos_token_id"][0]
        return cls(**facts)

    def changed(self, **facts) -> "PackingConfig":
        """
        The same with other `facts`.

        Raises:
            TypeError: one of them is none.
        """
        if unknown := sorted(facts.keys() - set(PACKING_FACTS)):
            guesses = [guess for name in unknown for guess in difflib.get_close_matches(name, PACKING_FACTS, 1)]
            hint = f" (did you mean {', '.join(guesses)}?)" if guesses else ""
            raise TypeError(f"Packs have no option {', '.join(unknown)}{hint}; facts are {', '.join(PACKING_FACTS)}.")
        return replace(self, **facts)

    def check_model(self, config: Any, unchecked: Container[str] = ()) -> None:
        """
        Raises:
            ValueError: a `BagelConfig` says something else; the message names every such fact with both values. Facts
                in `unchecked` may differ.
        """
        if message := self.differences(config, unchecked):
            raise ValueError(message)

    def differences(self, config: Any, unchecked: Container[str] = ()) -> str:
        """What `check_model` would say; empty if both agree."""
        differing = []
        for name in PACKING_FACTS:
            ours, theirs = getattr(self, name), getattr(config, name)
            several = isinstance(theirs, list | tuple)  # eos ids
            if name not in unchecked and not (ours in theirs if several else ours == theirs):
                differing.append(f"{name} is {ours} for the processor, {theirs} for the model")
        if not differing:
            return ""
        return (
            f"Processor and model disagree: {'; '.join(differing)}. Load both from one checkpoint. Where the model is "
            "the one that is right, processor.follow_model(model.config) takes its facts over; in a saved "
            "processor_config.json, delete model_facts and they are read from config.json."
        )

    def dropout(self, item_type: str) -> float:
        return {
            "text": self.text_cond_dropout_prob,
            "vit_image": self.vit_cond_dropout_prob,
            "vae_image": self.vae_cond_dropout_prob,
        }[item_type]

    def table_side(self, item_type: str) -> int:
        return self.vit_max_num_patch_per_side if item_type == "vit_image" else self.max_latent_size

    def released_plan(
        self,
        sequence_plan: Sequence[Mapping[str, Any]],
        text_ids_list: Sequence[Sequence[int]],
        image_tensor_list: Sequence[torch.Tensor],
        name: str = "a sample",
    ) -> SamplePlan:
        """
        A plan from what the released datasets yield. Their lists are read in order and left as they are.

        Raises:
            ValueError: an unknown item type, or fewer texts or pictures than the plan asks for.
        """
        texts, images = iter(text_ids_list), iter(image_tensor_list)
        items: list[SequenceItem] = []
        for entry in sequence_plan:
            flags = _flags(entry, name)
            ids, pixels = (next(texts, None), None) if entry["type"] == "text" else (None, next(images, None))
            if ids is not None:
                items.append(SequenceItem("text", text_ids=tuple(ids), **flags))
            elif pixels is None:
                raise ValueError(f"The plan of {name} has more {entry['type']} items than it has contents for.")
            elif entry["type"] == "vit_image":
                items.append(SequenceItem.vit_image(pixels, self.vit_patch_size, **flags))
            else:
                items.append(SequenceItem.vae_image(pixels, self.latent_downsample, **flags))
        return SamplePlan(tuple(items), name)


PACKING_FACTS = tuple(fact.name for fact in fields(PackingConfig))
MODEL_FACTS = (  # those that neither tokenizer nor image processor know
    "vit_max_num_patch_per_side",
    "max_latent_size",
    "interpolate_pos",
    "text_cond_dropout_prob",
    "vit_cond_dropout_prob",
    "vae_cond_dropout_prob",
    "visual_und",
    "visual_gen",
)


def _flags(entry: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The fields of a released plan entry, by our names."""
    if entry["type"] not in ITEM_TYPES:
        raise ValueError(f"Unknown item type {entry['type']!r} in {name}; a plan holds {', '.join(ITEM_TYPES)}.")
    label = entry.get("special_token_label") if entry.get("special_token_loss") else None
    if entry.get("special_token_loss") and label is None:
        raise ValueError(f"A {entry['type']} of {name} has special_token_loss=1 but no special_token_label.")
    return {
        "loss": bool(entry.get("loss")),
        "enable_cfg": entry.get("enable_cfg") == 1,
        "special_token_label": label,
        "split_start": entry.get("split_start", True),
        "split_end": entry.get("split_end", True),
        "frame_delta": entry.get("frame_delta"),
    }


# --------------------------------------------------------------------------------------------------------------------
# Randomizing: every random decision of a sample


@dataclass(frozen=True)
class RandomizedItem:
    """
    An item that is kept.

    Attributes:
        item: the item. index: its number in the plan.
        position: rotary position of its first token; a text counts on from there, a picture stays there (with three
            positions per token its grid begins there).
        split, mode: number within the sample of the split that it belongs to, and "causal", "full" or "noise".
        timestep: of a vae_image, before the sigmoid; minus infinity = clean.
    """

    item: SequenceItem
    index: int
    position: int
    split: int
    mode: str
    timestep: float = CLEAN


@dataclass(frozen=True)
class RandomizedSample:
    """The kept items of a sample."""

    items: tuple[RandomizedItem, ...]
    name: str = "a sample"

    @property
    def num_tokens(self) -> int:
        return sum(kept.item.num_tokens for kept in self.items)

    def with_contents(self, contents: Mapping[int, torch.Tensor]) -> "RandomizedSample":
        """The same sample with pictures; `contents` by index of the item in its plan."""
        items = [
            replace(kept, item=replace(kept.item, content=contents[kept.index])) if kept.index in contents else kept
            for kept in self.items
        ]
        return replace(self, items=tuple(items))


def randomize(plan: SamplePlan, config: PackingConfig, rng: RandomSource) -> RandomizedSample:
    """
    Decide which conditions are dropped and how noisy each learned picture is.

    As released: every item with `enable_cfg`, and no other, takes a uniform number from `rng`; a dropped picture still
    takes its positions, a dropped text does not; a learned picture takes a normal number, which the later frames of
    its clip share. Frames are dropped one by one; where the released packer then loses count of its splits
    (the first or the last frame of a clip is dropped), here the rest of the clip remains one split.

    Raises:
        ValueError: the sample has no tokens, a picture does not fit its position table, a clip does not end.
    """
    _check_clips(plan)
    kept, position, split, mode = [], 0, -1, ""
    of_split: float | None = None  # the timestep that the learned pictures of a split share
    for index, item in enumerate(plan.items):
        _check_fits_table(item, plan.name, config)
        if item.split_start:
            split, mode, of_split = split + 1, item.mode, None
        if item.enable_cfg and rng.random() < config.dropout(item.type):
            position += item.extent(config.multimodal_positions) if item.type != "text" else 0
            continue
        timestep = CLEAN
        if item.type == "vae_image" and item.loss:
            of_split = float(rng.standard_normal()) if of_split is None else of_split
            timestep = of_split
        kept.append(RandomizedItem(item, index, position, split, mode, timestep))
        position += item.advance(config.multimodal_positions)
    if not kept:
        reason = "its plan is empty" if not plan.items else "all of its items were dropped as conditions"
        raise ValueError(f"{plan.name} has no tokens: {reason}. A sample needs an item that is trained.")
    return RandomizedSample(tuple(kept), plan.name)


def _check_clips(plan: SamplePlan) -> None:
    inside = False
    for index, item in enumerate(plan.items):
        if inside == item.split_start:
            problem = "starts a split inside another" if inside else "continues a split that nothing started"
            raise ValueError(f"Item {index} of {plan.name} {problem}: check split_start and split_end of its frames.")
        inside = not item.split_end
    if inside:
        raise ValueError(f"The last split of {plan.name} does not end: its last frame needs split_end.")


def _check_fits_table(item: SequenceItem, name: str, config: PackingConfig) -> None:
    if item.type == "text" or config.interpolate_pos or max(item.grid) <= config.table_side(item.type):
        return
    table, size = {
        "vit_image": ("vit_max_num_patch_per_side", "size"),
        "vae_image": ("max_latent_size", "latent_size"),
    }[item.type]
    raise ValueError(
        f"A {item.type} of {name} has {item.grid[0]}x{item.grid[1]} tokens, but the position table ends at "
        f"{table}={config.table_side(item.type)} per side. Lower the image processor's {size}, or train with "
        'interpolate_pos="fit".'
    )


# --------------------------------------------------------------------------------------------------------------------
# Packing


@dataclass(frozen=True)
class PackedItem:
    """A kept item, and the index of its first token in the pack."""

    kept: RandomizedItem
    start: int

    @property
    def item(self) -> SequenceItem:
        return self.kept.item

    @property
    def content(self) -> torch.Tensor:
        """Patches or pixels of a picture; a plan without them can be counted, not packed."""
        assert self.item.content is not None
        return self.item.content

    @property
    def last(self) -> int:
        return self.start + self.item.num_tokens - 1

    @property
    def inner(self) -> range:
        """The indexes between the boundary tokens."""
        return range(self.start + 1, self.last)

    def text(self, config: PackingConfig) -> list[tuple[int, int]]:
        """(index, id) of the tokens that are text: all of a text, the boundary tokens of a picture."""
        if self.item.type != "text":
            return [(self.start, config.vision_start_token_id), (self.last, config.vision_end_token_id)]
        ids = (config.bos_token_id, *self.item.text_ids, config.eos_token_id)
        return list(zip(range(self.start, self.last + 1), ids))

    def labels(self, config: PackingConfig) -> list[tuple[int, int, float]]:
        """(index, label, weight) of what is trained with cross-entropy; a text weighs the root of its length."""
        labels = []
        if self.item.type == "text" and self.item.loss:
            targets = (*self.item.text_ids, config.eos_token_id)
            weight = 1 / math.sqrt(len(targets))
            labels = [(index, target, weight) for index, target in zip(range(self.start, self.last), targets)]
        if self.item.special_token_label is not None:
            labels.append((self.last, self.item.special_token_label, 1.0))
        return labels

    def positions(self, config: PackingConfig) -> LongTensor:
        """(tokens,), or (tokens, 3) if the config say so."""
        first, length, is_text = self.kept.position, self.item.num_tokens, self.item.type == "text"
        if config.multimodal_positions and not is_text:
            return first + grid_block_positions(*self.item.grid)
        positions = torch.arange(first, first + length) if is_text else torch.full((length,), first)
        return positions[:, None].expand(-1, 3) if config.multimodal_positions else positions


def pack(
    samples: Sequence[RandomizedSample],
    config: PackingConfig,
    *,
    max_num_tokens: int | None = None,
    pad_to: int | None = None,
    nested_masks: bool = False,
) -> dict[str, Any]:
    """
    Lay samples out one after the other.

    Args:
        max_num_tokens (`int`, *optional*): refuse a longer pack.
        pad_to (`int`, *optional*): add a split and a sample that fill the pack up to so many tokens, as the released
            flex packs have; they hold no tokens.
        nested_masks (`bool`): say who sees whom by `nested_attention_masks`, one (n, n) bool mask per sample, True =
            sees, instead of by `split_lens` and `attn_modes`. Meant for small packs: masks are quadratic.

    Returns:
        Keywords of `BagelForUnifiedMultimodal.forward`: an int, lists of ints, strings and pairs, int64 index tensors
        and float32 contents (and coordinates, where positions are interpolated). What a pack does not have is absent.

    Raises:
        ValueError: there is no sample, the pack is longer than `max_num_tokens` or `pad_to`, a picture has no content,
            or `pad_to` is combined with `nested_masks`.
    """
    if nested_masks and pad_to is not None:
        raise ValueError("pad_to adds a split, nested_masks leave splits out: use one of them.")
    if not samples:
        raise ValueError("A pack needs at least one sample.")
    lengths = [sample.num_tokens for sample in samples]
    for name, limit in (("max_num_tokens", max_num_tokens), ("pad_to", pad_to)):
        if limit is not None and sum(lengths) > limit:
            raise ValueError(
                f"The pack has {sum(lengths)} tokens, more than {name}={limit}; its samples have {lengths} "
                f"({', '.join(sample.name for sample in samples)}). Pack fewer, or skip the longest."
            )
    packed = _lay_out(samples)
    result = {
        "sequence_length": sum(lengths),
        "sample_lens": lengths,
        "packed_position_ids": torch.cat([one.positions(config) for one in packed]),
        **_texts(packed, config),
        **_vit_images([one for one in packed if one.item.type == "vit_image"], config),
        **_vae_images([one for one in packed if one.item.type == "vae_image"], config),
    }
    splits = [_splits(sample) for sample in samples]
    if nested_masks:
        positions = result["packed_position_ids"].split(lengths)
        return result | {"nested_attention_masks": [_mask(*one) for one in zip(positions, splits)]}
    result["split_lens"] = [length for sample in splits for length, _ in sample]
    result["attn_modes"] = [mode for sample in splits for _, mode in sample]
    if pad_to is not None:
        free = pad_to - sum(lengths)
        fill = {"sample_lens": [free], "split_lens": [free], "attn_modes": ["causal"]}
        result |= {name: result[name] + rest for name, rest in fill.items()}
    return result


def pack_samples(plans: Sequence[SamplePlan], config: PackingConfig, rng: RandomSource, **options) -> dict[str, Any]:
    """`randomize` for every plan in order, then `pack` with `options`."""
    return pack([randomize(plan, config, rng) for plan in plans], config, **options)


def _lay_out(samples: Sequence[RandomizedSample]) -> list[PackedItem]:
    packed, start = [], 0
    for sample in samples:
        for kept in sample.items:
            if kept.item.type != "text" and kept.item.content is None:
                raise ValueError(f"A {kept.item.type} of {sample.name} has no content: fill it in before packing.")
            packed.append(PackedItem(kept, start))
            start += kept.item.num_tokens
    return packed


def _texts(packed: list[PackedItem], config: PackingConfig) -> dict[str, torch.Tensor]:
    indexes, ids = zip(*(token for one in packed for token in one.text(config)))
    result = {"packed_text_ids": torch.tensor(ids), "packed_text_indexes": torch.tensor(indexes)}
    if labels := [label for one in packed for label in one.labels(config)]:
        indexes, targets, weights = zip(*labels)
        result |= {
            "ce_loss_indexes": torch.tensor(indexes),
            "packed_label_ids": torch.tensor(targets),
            "ce_loss_weights": torch.tensor(weights, dtype=torch.float32),
        }
    return result


def _vit_images(packed: list[PackedItem], config: PackingConfig) -> dict[str, torch.Tensor]:
    if not packed:
        return {}
    return {
        "packed_vit_tokens": torch.cat([one.content for one in packed]),
        "packed_vit_token_indexes": _inner_indexes(packed),
        "packed_vit_position_ids": _grid_positions(packed, config),
        "vit_token_seqlens": torch.tensor([math.prod(one.item.grid) for one in packed]),
    }


def _vae_images(packed: list[PackedItem], config: PackingConfig) -> dict[str, Any]:
    if not packed:
        return {}
    counts = torch.tensor([math.prod(one.item.grid) for one in packed])
    timesteps = torch.tensor([one.kept.timestep for one in packed], dtype=torch.float32)
    result = {
        "padded_images": _pad([one.content for one in packed]),
        "patchified_vae_latent_shapes": [one.item.grid for one in packed],
        "packed_latent_position_ids": _grid_positions(packed, config),
        "packed_vae_token_indexes": _inner_indexes(packed),
        "packed_timesteps": timesteps.repeat_interleave(counts),
    }
    if learned := [one for one in packed if one.item.loss]:
        result["mse_loss_indexes"] = _inner_indexes(learned)
    return result


def _inner_indexes(packed: list[PackedItem]) -> LongTensor:
    return torch.cat([torch.arange(one.inner.start, one.inner.stop) for one in packed])


def _grid_positions(packed: list[PackedItem], config: PackingConfig) -> torch.Tensor:
    sides = [config.table_side(one.item.type) for one in packed]
    return torch.cat(
        [grid_position_ids(*one.item.grid, side, config.interpolate_pos) for one, side in zip(packed, sides)]
    )


def _pad(images: list[torch.Tensor]) -> torch.Tensor:
    """Zero-padded at the bottom and right to the largest: (images, 3, H, W)."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    padded = images[0].new_zeros(len(images), 3, height, width)
    for row, image in zip(padded, images):
        row[:, : image.shape[1], : image.shape[2]] = image
    return padded


def _splits(sample: RandomizedSample) -> list[tuple[int, str]]:
    """(tokens, mode) of each split that is left."""
    tokens, modes = {}, {}
    for kept in sample.items:
        tokens[kept.split] = tokens.get(kept.split, 0) + kept.item.num_tokens
        modes[kept.split] = kept.mode
    return [(tokens[split], modes[split]) for split in tokens]


def _mask(positions: LongTensor, splits: list[tuple[int, str]]) -> BoolTensor:
    lens, modes = zip(*splits)
    layout = PackedLayout.from_packed(len(positions), [len(positions)], positions, split_lens=lens, attn_modes=modes)
    return layout.dense_mask()[0, 0]


# --------------------------------------------------------------------------------------------------------------------
# Collating


def with_labels(pack: dict[str, Any]) -> dict[str, Any]:
    """
    A pack with what the stock `Trainer` looks for where something is learned: `labels`, and `shift_labels`, to count.

    `labels` (1, n) hold the tokens that predict a text label and those after them, where the labels stand; -100
    elsewhere. The model's `logits` of a pack are at the same tokens, so that `logits[:, :-1]` predict `labels[:, 1:]`,
    as for any language model. `shift_labels` (1, learned tokens) are the text labels, and 0 per learned latent. A pack
    that learns nothing, or has labels, stays as it is.
    """
    none = torch.empty(0, dtype=torch.long)
    index, text = pack.get("ce_loss_indexes", none), pack.get("packed_label_ids", none)
    learned = torch.cat([text, torch.zeros_like(pack.get("mse_loss_indexes", none))])
    if not len(learned) or "labels" in pack:
        return pack
    tokens = around(index)
    labels = torch.full_like(tokens, -100)
    labels[torch.searchsorted(tokens, index + 1)] = text
    return {**pack, "labels": labels[None], "shift_labels": learned[None]}


class PackCollator:
    """
    `collate_fn` of a loader: a list of samples becomes one pack; a single finished pack stays what it is. Both get
    labels, see [`with_labels`].

    Args:
        config: the facts of the model that packing needs.
        rng: where dropout and timesteps come from. By default they follow torch's global generator, so they follow
            the seed of a run, and in a loader with workers that of the worker.
        options: keywords of `pack`.
    """

    def __init__(self, config: PackingConfig, rng: RandomSource | None = None, **options):
        self.config, self.rng, self.options = config, rng, options

    def __call__(self, samples: Sequence[SamplePlan | RandomizedSample | Mapping[str, Any]]) -> dict[str, Any]:
        packs = [sample for sample in samples if isinstance(sample, Mapping)]
        if packs:
            if len(samples) > 1:
                raise ValueError(f"{len(samples)} packs in one batch: a pack is a batch, so load with batch_size=1.")
            return with_labels(dict(packs[0]))
        rng = self.rng or rng_of_torch()
        ready = [
            one if isinstance(one, RandomizedSample) else randomize(one, self.config, rng)
            for one in samples
            if not isinstance(one, Mapping)  # packs, of which there are none here
        ]
        return with_labels(pack(ready, self.config, **self.options))


def rng_of_torch() -> np.random.Generator:
    """A generator whose seed is the next number of torch's global one."""
    return np.random.default_rng(int(torch.randint(2**62, ())))
