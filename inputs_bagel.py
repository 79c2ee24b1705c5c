# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What the decoder is given, in one object, whichever way it comes in; knows configs and tensors, no modules.

Two input formats exist: padded batches (what the processor makes) and training packs (the released data pipeline). Both
become `Inputs`: a layout, where the features of each token come from, and what is learned. A padded batch is read once:
`Prompt` holds where its images are, their grids and positions, and everything that needs to know asks it.

Axes: (batch, length); a training pack is a batch of one row. Flat indices count tokens over (batch * length).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypedDict

import torch
from torch import nn
from transformers.utils import TransformersKwargs

from .attention_bagel import PagedKwargs
from .configuration_bagel import BagelConfig
from .embeddings_bagel import latent_grid, latent_position_ids, vit_position_ids
from .flow_bagel import interpolate, patchify_latents, training_timesteps, velocity_target
from .layout_bagel import (
    BoolTensor,
    Grid,
    LongTensor,
    PackedLayout,
    Placeholders,
    as_index,
    axes_last,
    check_cover,
    count_positions,
    next_position,
    restarts,
    split_attention_mask,
)


# encode(images, sample_posterior, generators) -> clean latent tokens of each image: `BagelModel.encode_images`
Encoder = Callable[[Sequence[torch.Tensor], bool, Sequence[torch.Generator | None] | None], list[torch.Tensor]]


class PackKwargs(TypedDict, total=False):
    """
    A training pack: names and meaning of the released data pipeline, and two of ours (padded_images, noise). `labels`
    and `shift_labels` beside them are for `Trainer`, see [`~packing_bagel.with_labels`]: losses do not read them.

    sequence_length: tokens of the pack. packed_text_ids, packed_text_indexes: (text tokens,). sample_lens: tokens of
        each sample. packed_position_ids: (sequence_length,), with `mrope_section` (sequence_length, 3). split_lens,
        attn_modes: spans and their kind ("causal", "full", "noise"), or nested_attention_masks: one (n, n) mask per
        sample.
    packed_vit_tokens: (ViT tokens, patch_dim). packed_vit_token_indexes, packed_vit_position_ids: (ViT tokens,);
        position ids may be float coordinates (ViT tokens, 2), and so may those of latents, see
        [`~embeddings_bagel.grid_position_ids`]. vit_token_seqlens: (ViT images,).
    padded_latent: (VAE images, z_channels, h, w) encoded and scaled, or padded_images: (VAE images, 3, H, W) in [-1,
        1], encoded by the frozen VAE. patchified_vae_latent_shapes: (h, w) in tokens per image.
    packed_latent_position_ids, packed_vae_token_indexes: (latent tokens,). packed_timesteps: (latent tokens,) before
        the sigmoid, minus infinity = clean. noise: (latent tokens, patch_latent_dim), sampled if absent.
    ce_loss_indexes, packed_label_ids: (labels,) where cross-entropy is taken, and its targets. mse_loss_indexes:
        (learned latent tokens,). ce_loss_weights: (labels,), used in `loss` if the config says `ce_loss_reweighting`.
    """

    sequence_length: int
    packed_text_ids: LongTensor
    packed_text_indexes: LongTensor
    sample_lens: list[int]
    packed_position_ids: LongTensor
    nested_attention_masks: list[torch.Tensor]
    split_lens: list[int]
    attn_modes: list[str]
    packed_vit_tokens: torch.Tensor
    packed_vit_token_indexes: LongTensor
    packed_vit_position_ids: torch.Tensor
    vit_token_seqlens: torch.Tensor
    padded_latent: torch.Tensor
    patchified_vae_latent_shapes: list[Grid]
    packed_latent_position_ids: torch.Tensor
    packed_vae_token_indexes: LongTensor
    packed_timesteps: torch.Tensor
    mse_loss_indexes: torch.Tensor
    ce_loss_indexes: torch.Tensor
    packed_label_ids: LongTensor
    ce_loss_weights: torch.Tensor
    padded_images: torch.Tensor
    noise: torch.Tensor


class BagelKwargs(PackKwargs, PagedKwargs, TransformersKwargs, total=False):
    """
    Keyword arguments of `forward` beside its named ones: those of transformers, a training pack, and

    shift_labels: (batch, length) labels that are shifted already. sample_posterior: sample the VAE posterior of images
        that are read instead of taking its mode, with generator (one, or one per row). prompt: the [`Prompt`] of
        `input_ids`, if they have been read before.
    """

    shift_labels: LongTensor | None
    sample_posterior: bool
    generator: torch.Generator | list[torch.Generator] | None
    prompt: "Prompt | None"
    cache_position: LongTensor | None
    return_dict: bool | None


# --------------------------------------------------------------------------------------------------------------------
# Prompts: a padded batch, read once


class ImageTensors(NamedTuple):
    """The images of a padded batch, flat over its rows, and how the VAE's posterior is sampled."""

    pixel_values: torch.Tensor | None = None
    image_grid_hw: LongTensor | None = None
    latent_pixel_values: torch.Tensor | None = None
    latent_image_sizes: LongTensor | None = None
    sample_posterior: bool = False
    generator: torch.Generator | list[torch.Generator] | None = None

    @classmethod
    def among(cls, kwargs: Mapping[str, Any]) -> "ImageTensors":
        """Those among the inputs of a model."""
        given: dict[str, Any] = {name: kwargs.get(name) for name in IMAGE_INPUTS}
        return cls(**given)

    @property
    def sizes(self) -> tuple[LongTensor | None, LongTensor | None]:
        return self.image_grid_hw, self.latent_image_sizes

    @property
    def empty(self) -> bool:
        return self.pixel_values is None and self.latent_pixel_values is None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that are there, by their names in `forward`."""
        return {name: value for name in IMAGE_INPUTS if (value := getattr(self, name)) is not None}


class PaddedBatch(NamedTuple):
    """A padded batch as `forward` gets it; what is cached is `past_length` tokens long."""

    input_ids: LongTensor | None
    attention_mask: torch.Tensor | None
    position_ids: LongTensor | None
    past_length: int
    inputs_embeds: torch.Tensor | None
    images: ImageTensors
    prompt: "Prompt | None" = None
    paged: bool = False  # see `PagedKwargs`


IMAGE_INPUTS = ("pixel_values", "image_grid_hw", "latent_pixel_values", "latent_image_sizes")


@dataclass(frozen=True)
class Prompt:
    """
    A padded batch, read once: texts and images in order, one sample per row.

    Attributes:
        input_ids: (batch, length). valid: (batch, length), `False` for padding.
        placeholders: where images are. image_grids, latent_grids: of the ViT and the VAE images, in reading order.
        position_ids: (batch, length), or (batch, length, 3) with `mrope_section`.
    """

    input_ids: LongTensor
    valid: BoolTensor
    placeholders: Placeholders
    image_grids: tuple[Grid, ...]
    latent_grids: tuple[Grid, ...]
    position_ids: LongTensor

    @classmethod
    def read(
        cls,
        config: BagelConfig,
        input_ids: LongTensor,
        attention_mask: torch.Tensor | None = None,
        image_grid_hw: LongTensor | None = None,
        latent_image_sizes: LongTensor | None = None,
        past_length: int = 0,
    ) -> "Prompt":
        """
        Args:
            config: a `BagelConfig`: ids, table sides, `mrope_section`.
            input_ids: (batch, length). attention_mask: (batch, past_length + length), 0 = padding. image_grid_hw,
                latent_image_sizes: of the images, see `BagelForUnifiedMultimodal.forward`.

        Raises:
            ValueError: images that `input_ids` mark and the sizes describe differently, a size that does not fit.
        """
        placeholders = find_placeholders(config, input_ids)
        image_grids = () if image_grid_hw is None else tuple(map(tuple, image_grid_hw.tolist()))
        sizes = [] if latent_image_sizes is None else latent_image_sizes.tolist()
        latent_grids = tuple(latent_grid(config, *size) for size in sizes)
        placeholders.check(*([rows * columns for rows, columns in grids] for grids in (image_grids, latent_grids)))
        batch_size, length = input_ids.shape
        valid, _ = split_attention_mask(attention_mask, batch_size, length, past_length)
        valid = torch.ones_like(input_ids) if valid is None else valid.long()
        grids = placeholders.merge_grids(image_grids, latent_grids) if config.multimodal_positions else None
        position_ids = placeholders.positions(valid, grids)
        return cls(input_ids, valid.bool(), placeholders, image_grids, latent_grids, position_ids)

    @classmethod
    def of_text(cls, config: BagelConfig, input_ids: LongTensor, valid: BoolTensor) -> "Prompt":
        """Text alone, known to hold no image."""
        none = torch.zeros_like(valid)
        position_ids = count_positions(valid.long()) * valid
        if config.multimodal_positions:
            position_ids = position_ids[..., None].expand(*position_ids.shape, 3)
        return cls(input_ids, valid, Placeholders(none, none, none, none), (), (), position_ids)

    @property
    def has_images(self) -> bool:
        return bool(self.image_grids or self.latent_grids)

    @property
    def next_position(self) -> LongTensor:
        """(batch,) the rotary position of what follows."""
        return next_position(self.position_ids, self.valid)

    def last_index(self) -> LongTensor:
        """(batch,) index of the last token of each row, padding left out; -1 for a row of padding."""
        index = torch.arange(self.valid.shape[1], device=self.valid.device)
        return torch.where(self.valid, index, -1).amax(1)

    def last_text_start(self, bos_token_id: int) -> LongTensor:
        """(batch,) index where the last text begins; the row's length if an image comes last."""
        in_image, valid = self.placeholders.in_image, self.valid
        index = torch.arange(valid.shape[1], device=valid.device)[None].expand_as(valid)
        is_text = valid & ~in_image
        after_image = nn.functional.pad((in_image | ~valid)[:, :-1], (1, 0), value=True)
        begins = is_text & ((self.input_ids == bos_token_id) | after_image)
        ends_with_text = is_text.gather(1, self.last_index()[:, None])[:, 0]
        return torch.where(ends_with_text, torch.where(begins, index, 0).amax(1), valid.shape[1])

    def image_rows(self, column: BoolTensor) -> list[int]:
        """The row of each image whose placeholders `column` marks, in reading order."""
        return (column & ~nn.functional.pad(column[:, :-1], (1, 0))).nonzero()[:, 0].tolist()

    def without_last(self, token_id: int) -> "Prompt":
        """The same without a last token of this id, in the rows that end with it."""
        last = self.last_index()
        rows = torch.arange(len(last), device=last.device)
        drop = torch.zeros_like(self.valid).index_put((rows, last), self.input_ids[rows, last] == token_id)
        return replace(self, valid=self.valid & ~drop, position_ids=_masked(self.position_ids, ~drop))

    def texts(self) -> list[LongTensor]:
        """The text tokens of each row, images and padding left out."""
        return [ids[mask] for ids, mask in zip(self.input_ids, self.valid & ~self.placeholders.in_image)]

    def select(self, rows: Sequence[int], images: ImageTensors) -> tuple["Prompt", ImageTensors]:
        """Some rows, in this order, repeats allowed, and their images."""
        picked: dict[str, Any] = {"image_grids": (), "latent_grids": ()}
        for name, column in (("image", self.placeholders.image), ("latent", self.placeholders.latent)):
            owner = self.image_rows(column)
            numbers = [number for row in rows for number, owned_by in enumerate(owner) if owned_by == row]
            grids = getattr(self, f"{name}_grids")
            picked[f"{name}_grids"] = tuple(grids[number] for number in numbers)
            images = _select_images(images, name, grids, numbers)
        index = torch.tensor(list(rows), device=self.input_ids.device)
        columns = {name: getattr(self, name)[index] for name in ("input_ids", "valid", "position_ids")}
        found = Placeholders(*(column[index] for column in self.placeholders))
        return replace(self, placeholders=found, **columns, **picked), images

    def since(self, start: int, images: ImageTensors) -> tuple["Prompt", ImageTensors]:
        """
        What comes from column `start` on, and its images: the rest of a prompt whose beginning is cached.

        Raises:
            ValueError: the beginning ends within an image.
        """
        found = self.placeholders
        if bool((found.in_image & ~found.start)[:, start].any()):
            raise ValueError(f"The cache holds {start} tokens, which end within an image: cut prompts between images.")
        picked: dict[str, Any] = {}
        for name, column in (("image", found.image), ("latent", found.latent)):
            begins = (column & ~nn.functional.pad(column[:, :-1], (1, 0))).nonzero()[:, 1].tolist()
            numbers = [number for number, index in enumerate(begins) if index >= start]
            grids = getattr(self, f"{name}_grids")
            picked[f"{name}_grids"] = tuple(grids[number] for number in numbers)
            images = _select_images(images, name, grids, numbers)
        columns = {name: getattr(self, name)[:, start:] for name in ("input_ids", "valid", "position_ids")}
        return replace(self, placeholders=Placeholders(*(one[:, start:] for one in found)), **columns, **picked), images

    def without_padding(self) -> "Prompt":
        """A single row without its padding."""
        mask = self.valid[0]
        columns = {name: getattr(self, name)[:, mask] for name in ("input_ids", "valid", "position_ids")}
        return replace(self, placeholders=Placeholders(*(column[:, mask] for column in self.placeholders)), **columns)

    def append(self, other: "Prompt") -> "Prompt":
        """What follows in the same rows. Images may only follow in a single row, so that their order holds."""
        assert len(self.valid) == 1 or not other.has_images
        offset = self.next_position.view(-1, *(1,) * (other.position_ids.ndim - 1))
        return replace(
            self,
            input_ids=torch.cat([self.input_ids, other.input_ids], dim=1),
            valid=torch.cat([self.valid, other.valid], dim=1),
            placeholders=Placeholders(*(torch.cat(pair, dim=1) for pair in zip(self.placeholders, other.placeholders))),
            image_grids=self.image_grids + other.image_grids,
            latent_grids=self.latent_grids + other.latent_grids,
            position_ids=torch.cat([self.position_ids, other.position_ids + offset], dim=1),
        )

    def layout(
        self, attention_mask: torch.Tensor | None = None, position_ids: LongTensor | None = None, past_length=0
    ) -> PackedLayout:
        """An image is one bidirectional span, boundary tokens included."""
        if position_ids is None and past_length:
            raise ValueError(
                "Images on top of a cache need position_ids: a cached image takes one position for all of its tokens, "
                "so the next position does not follow from the cache length."
            )
        batch_size, length = self.input_ids.shape
        positions = self.position_ids if position_ids is None else position_ids
        text = PackedLayout.text(batch_size, length, attention_mask, positions, past_length, self.input_ids.device)
        valid, found = text.valid, self.placeholders
        return replace(
            text,
            span_ids=found.span_ids,
            bidirectional=found.in_image & valid,
            gen=found.latent & valid,
            causal=False,
        )


def find_placeholders(config: BagelConfig, input_ids: LongTensor) -> Placeholders:
    names = ("image_token_id", "latent_token_id", "vision_start_token_id", "vision_end_token_id")
    return Placeholders.find(input_ids, *(getattr(config, name) for name in names))


def _masked(position_ids: LongTensor, keep: BoolTensor) -> LongTensor:
    return position_ids * (keep if position_ids.ndim == 2 else keep[..., None])


def _select_images(images: ImageTensors, name: str, grids: Sequence[Grid], numbers: Sequence[int]) -> ImageTensors:
    content, sizes = ("pixel_values", "image_grid_hw") if name == "image" else IMAGE_INPUTS[2:]
    tensor = getattr(images, content)
    if tensor is None or not numbers:
        return images._replace(**{content: None, sizes: None})
    if name == "image":
        parts = tensor.split([rows * columns for rows, columns in grids])
        tensor = torch.cat([parts[number] for number in numbers])
    else:
        tensor = tensor[list(numbers)]
    return images._replace(**{content: tensor, sizes: getattr(images, sizes)[list(numbers)]})


def require_visual_gen(config: BagelConfig, what: str) -> None:
    if not config.visual_gen:
        raise ValueError(
            f"This model was built with visual_gen=False (stage 1): it cannot {what}. Load the joint model (stage=2) "
            "for that."
        )


# --------------------------------------------------------------------------------------------------------------------
# Token sources and targets


class VitTokens(NamedTuple):
    """
    ViT input: `patches` (n, patch_dim), `position_ids` (n,) or coordinates (n, 2), `lengths` patches per image, `index`
    (n,) flat indices.
    """

    patches: torch.Tensor
    position_ids: torch.Tensor
    lengths: list[int]
    index: LongTensor


class LatentTokens(NamedTuple):
    """
    Latents at time t: `x_t` (n, patch_latent_dim), `t` (n,), `position_ids` (n,) or coordinates (n, 2), `index` (n,)
    flat indices; `velocity` (n, patch_latent_dim), what should be predicted, if it is learned.
    """

    x_t: torch.Tensor
    t: torch.Tensor
    position_ids: torch.Tensor
    index: LongTensor
    velocity: torch.Tensor | None = None


class Targets(NamedTuple):
    """
    What a pack learns: `label_index`, `labels`, `label_weights` (labels,); `velocity_index`, `velocity` (learned latent
    tokens, patch_latent_dim). Absent kinds are `None`.
    """

    label_index: LongTensor | None = None
    labels: LongTensor | None = None
    label_weights: torch.Tensor | None = None
    velocity_index: LongTensor | None = None
    velocity: torch.Tensor | None = None


@dataclass(frozen=True)
class Inputs:
    """
    What the decoder is given.

    Attributes:
        layout: what every token is.
        text_ids: (batch, length) ids for the embedding table, 0 where no text is; or `text_embeds` (batch, length,
            hidden_size).
        vit, latents: tokens whose features come from images.
        targets: of a training pack.
        attention_mask: the caller's, for transformers' own mask creation.
    """

    layout: PackedLayout
    text_ids: LongTensor | None = None
    text_embeds: torch.Tensor | None = None
    vit: VitTokens | None = None
    latents: LatentTokens | None = None
    targets: Targets | None = None
    attention_mask: torch.Tensor | None = None

    @classmethod
    def from_padded(cls, config: BagelConfig, encode: Encoder, batch: PaddedBatch) -> "Inputs":
        """A padded batch. Images need `input_ids` or a `prompt` that says where they are."""
        input_ids, attention_mask, position_ids, past_length, inputs_embeds, images, prompt, paged = batch
        if position_ids is not None:
            check_axes(config, "position_ids", position_ids.shape[0] if position_ids.ndim == 3 else 1)
            position_ids = axes_last(position_ids)
        if prompt is not None and input_ids is not None and prompt.input_ids.shape[1] > input_ids.shape[1]:
            prompt, images = prompt.since(prompt.input_ids.shape[1] - input_ids.shape[1], images)
        text_ids = None
        if input_ids is not None and inputs_embeds is None:
            text_ids = word_ids(config, input_ids, images_follow=not images.empty)
        if images.empty:
            given = input_ids if inputs_embeds is None else inputs_embeds
            assert given is not None
            if text_ids is not None and given.shape[1] > 1 and not torch.compiler.is_compiling():
                _refuse_foreign_placeholders(config, given)
            alone = text_ids is not None and attention_mask is None and not past_length and not paged
            if alone and restarts(position_ids):
                return cls(PackedLayout.flattened(position_ids), text_ids)
            batch_size, length = given.shape[:2]
            layout = PackedLayout.text(batch_size, length, attention_mask, position_ids, past_length, given.device)
            return cls(layout, text_ids, inputs_embeds, attention_mask=attention_mask)
        _check_images(config, images)
        if prompt is None:
            assert input_ids is not None
            prompt = Prompt.read(config, input_ids, attention_mask, *images.sizes, past_length=past_length)
        if position_ids is not None and config.multimodal_positions and position_ids.ndim == 2:
            position_ids = position_ids[..., None].expand(*position_ids.shape, 3)
        layout = prompt.layout(attention_mask, position_ids, past_length)
        vit, latents = _read_images(config, encode, prompt, images)
        return cls(layout, text_ids, inputs_embeds, vit, latents, attention_mask=attention_mask)

    @classmethod
    def from_pack(
        cls, config: BagelConfig, encode: Encoder, pack: Mapping[str, Any], generator: torch.Generator | None
    ) -> "Inputs":
        """
        A training pack, see [`PackKwargs`].

        Raises:
            ValueError: tokens that are filled twice or not at all, counts that differ, parts that the model lacks.
        """
        length = int(pack["sequence_length"])
        names = ("packed_text_ids", "packed_text_indexes", "sample_lens", "packed_position_ids")
        if missing := [name for name in names if pack.get(name) is None]:
            raise ValueError(f"A pack with sequence_length={length} also needs {', '.join(missing)}.")
        words, word_index = pack["packed_text_ids"], pack["packed_text_indexes"]
        if len(words) != len(word_index):
            raise ValueError(f"{len(words)} packed_text_ids for {len(word_index)} packed_text_indexes.")
        indexes = {
            name: as_index(pack.get(name))
            for name in ("packed_text_indexes", "packed_vit_token_indexes", "packed_vae_token_indexes")
        }
        check_cover(length, indexes, words.device)
        layout = PackedLayout.from_packed(
            length,
            pack["sample_lens"],
            pack["packed_position_ids"],
            indexes["packed_vae_token_indexes"],
            *(pack.get(name) for name in ("split_lens", "attn_modes", "nested_attention_masks")),
        )
        has_images = any(indexes[name] is not None for name in ("packed_vit_token_indexes", "packed_vae_token_indexes"))
        check_axes(config, "packed_position_ids", 3 if layout.position_ids.ndim == 3 else 1, has_images)
        text_ids = words.new_zeros(length)
        text_ids[word_index] = words
        latents = _pack_latents(config, encode, pack, indexes["packed_vae_token_indexes"], generator)
        return cls(
            layout,
            text_ids[None],
            vit=_pack_patches(config, pack, indexes["packed_vit_token_indexes"]),
            latents=latents,
            targets=_pack_targets(pack, latents),
        )

    @classmethod
    def to_draw(
        cls,
        config: BagelConfig,
        layout: PackedLayout,
        x_t: torch.Tensor,
        t: torch.Tensor,
        position_ids: torch.Tensor,
    ) -> "Inputs":
        """
        Noisy blocks on a frozen context, one per row: vision_start, latents, vision_end.

        Args:
            layout: `PackedLayout.noisy_blocks`. x_t: (batch, latent tokens, patch_latent_dim), padded to the largest.
            t: scalar time, 1 = noise. position_ids: (batch, latent tokens), or coordinates (batch, latent tokens, 2).
        """
        index = layout.gen.flatten().nonzero()[:, 0]
        valid = layout.gen[:, 1 : 1 + x_t.shape[1]]  # latents follow vision_start
        text_ids = torch.full(layout.gen.shape, config.vision_end_token_id, device=x_t.device)
        text_ids[:, 0] = config.vision_start_token_id
        latents = LatentTokens(x_t[valid], t.expand(len(index)), position_ids[valid], index)
        return cls(layout, text_ids, latents=latents)


def word_ids(config: BagelConfig, input_ids: LongTensor, images_follow: bool = True) -> LongTensor:
    """
    Ids for the embedding table: a pad id that lies outside the vocabulary becomes 0, and so do placeholders whose
    features come from images. Placeholders without images are words like any other.
    """
    vocab_size, replaced = config.text_config.vocab_size, []
    for token_id in (config.image_token_id, config.latent_token_id):
        replaced += [token_id] if images_follow or token_id >= vocab_size else []
    if config.pad_token_id is not None and config.pad_token_id >= vocab_size:
        replaced.append(config.pad_token_id)
    for token_id in replaced:
        input_ids = input_ids.masked_fill(input_ids == token_id, 0)
    return input_ids


def check_axes(config: BagelConfig, name: str, axes: int, needs_three: bool = False) -> None:
    """Three positions per token are for models with `mrope_section`; a pack with images needs them there."""
    section = config.text_config.mrope_section
    if axes not in (1, 3) or (axes == 3 and section is None):
        raise ValueError(
            f"{name} holds {axes} positions per token; this model takes {'1' if section is None else '1 or 3'}. "
            "Three (time, height, width) are switched on by mrope_section in text_config.rope_parameters."
        )
    if axes == 1 and section is not None and needs_three:
        raise ValueError(
            f"{name} holds one position per token, but with mrope_section={section} images have three: packs come "
            "from a processor with return_position_ids=True."
        )


# ---- padded batches


def _refuse_foreign_placeholders(config: BagelConfig, input_ids: LongTensor) -> None:
    """Placeholders that are no words of this model need their images."""
    for token_id in (config.image_token_id, config.latent_token_id):
        if token_id >= config.text_config.vocab_size and bool((input_ids == token_id).any()):
            Prompt.read(config, input_ids)  # says which images are missing


def _check_images(config: BagelConfig, images: ImageTensors) -> None:
    if images.pixel_values is not None:
        if not config.visual_und:
            raise ValueError("This model was built with visual_und=False: it has no vision tower to read images with.")
        if images.image_grid_hw is None:
            raise ValueError("pixel_values need image_grid_hw: (ViT images, 2) rows and columns of patches.")
        check_patches(config, images.pixel_values, images.image_grid_hw)
    if images.latent_pixel_values is not None:
        require_visual_gen(config, "read images through the VAE")
        if images.latent_image_sizes is None:
            raise ValueError(
                "latent_pixel_values need latent_image_sizes: (VAE images, 2) heights and widths in pixels."
            )
        described, given = len(images.latent_image_sizes), len(images.latent_pixel_values)
        if described != given:
            raise ValueError(f"latent_image_sizes describes {described} images, latent_pixel_values holds {given}.")


def check_patches(config: BagelConfig, pixel_values: torch.Tensor, image_grid_hw: LongTensor) -> list[Grid]:
    """The grids, after a look at whether they describe these patches."""
    grids = [(int(rows), int(columns)) for rows, columns in image_grid_hw.tolist()]
    patch_dim, shape = config.vision_config.patch_dim, tuple(pixel_values.shape)
    described = sum(rows * columns for rows, columns in grids)
    if shape != (described, patch_dim):
        raise ValueError(
            f"image_grid_hw {grids} describes {described} patches of {patch_dim} values, but pixel_values has shape "
            f"{shape}."
        )
    return grids


def _read_images(
    config: BagelConfig, encode: Encoder, prompt: Prompt, images: ImageTensors
) -> tuple[VitTokens | None, LatentTokens | None]:
    vit = latents = None
    if images.pixel_values is not None:
        index = prompt.placeholders.image.flatten().nonzero()[:, 0]
        position_ids = vit_position_ids(config, prompt.image_grids).to(index.device)
        vit = VitTokens(images.pixel_values, position_ids, [r * c for r, c in prompt.image_grids], index)
    if images.latent_pixel_values is not None:
        index = prompt.placeholders.latent.flatten().nonzero()[:, 0]
        stride, generators = config.latent_downsample, None
        pixels = [
            image[:, : rows * stride, : columns * stride]
            for image, (rows, columns) in zip(images.latent_pixel_values, prompt.latent_grids)
        ]
        if images.generator is not None:
            owners = prompt.image_rows(prompt.placeholders.latent)
            given = images.generator
            generators = [given if isinstance(given, torch.Generator) else given[row] for row in owners]
        clean = torch.cat(encode(pixels, images.sample_posterior, generators)).to(index.device)
        position_ids = torch.cat([latent_position_ids(config, grid) for grid in prompt.latent_grids]).to(index.device)
        latents = LatentTokens(clean, torch.zeros(len(clean), device=index.device), position_ids, index)
    return vit, latents


# ---- packs


def _pack_patches(config: BagelConfig, pack: Mapping[str, Any], index: LongTensor | None) -> VitTokens | None:
    if index is None:
        return None
    if not config.visual_und:
        raise ValueError("The pack holds ViT tokens, but this model was built with visual_und=False.")
    patches, position_ids, lengths = (
        pack.get(name) for name in ("packed_vit_tokens", "packed_vit_position_ids", "vit_token_seqlens")
    )
    if patches is None or lengths is None or position_ids is None:
        raise ValueError(
            "packed_vit_token_indexes need packed_vit_tokens, packed_vit_position_ids and vit_token_seqlens."
        )
    lengths = [int(n) for n in lengths]
    if len({len(index), len(patches), len(position_ids), sum(lengths)}) != 1:
        raise ValueError(
            f"The pack has {len(index)} packed_vit_token_indexes, {len(patches)} packed_vit_tokens, "
            f"{len(position_ids)} packed_vit_position_ids and vit_token_seqlens {lengths}; all must count the same "
            "tokens."
        )
    return VitTokens(patches, position_ids, lengths, index)


def _pack_latents(
    config: BagelConfig,
    encode: Encoder,
    pack: Mapping[str, Any],
    index: LongTensor | None,
    generator: torch.Generator | None,
) -> LatentTokens | None:
    """Clean latents of the pack, brought to their timesteps."""
    if index is None:
        return None
    require_visual_gen(config, "train on latents")
    shapes = [(int(h), int(w)) for h, w in pack["patchified_vae_latent_shapes"]]
    patch = config.latent_patch_size
    if pack.get("padded_latent") is not None:
        crops = [x[:, : h * patch, : w * patch] for x, (h, w) in zip(pack["padded_latent"], shapes)]
        clean = torch.cat([patchify_latents(crop, patch) for crop in crops])
    elif pack.get("padded_images") is not None:
        stride = config.latent_downsample
        images = [x[:, : h * stride, : w * stride] for x, (h, w) in zip(pack["padded_images"], shapes)]
        clean = torch.cat(encode(images, True, [generator] * len(images)))
    else:
        raise ValueError("packed_vae_token_indexes need padded_latent, or padded_images for the model's own VAE.")
    clean, timesteps = clean.to(device=index.device, dtype=torch.float32), pack["packed_timesteps"]
    if len(clean) != len(index) or len(timesteps) != len(index):
        raise ValueError(
            f"The pack has {len(index)} packed_vae_token_indexes, latents of {len(clean)} tokens "
            f"(patchified_vae_latent_shapes {shapes}) and {len(timesteps)} packed_timesteps; all must count the same "
            "tokens."
        )
    noise = torch.randn_like(clean) if pack.get("noise") is None else pack["noise"].to(clean)
    t = training_timesteps(timesteps, config.timestep_shift)
    x_t = interpolate(clean, noise, t[:, None])
    return LatentTokens(x_t, t, pack["packed_latent_position_ids"], index, velocity_target(clean, noise))


def _pack_targets(pack: Mapping[str, Any], latents: LatentTokens | None) -> Targets:
    targets = Targets()
    if (index := as_index(pack.get("ce_loss_indexes"))) is not None:
        labels = pack.get("packed_label_ids")
        if labels is None or len(labels) != len(index):
            raise ValueError(
                f"{len(index)} ce_loss_indexes for {0 if labels is None else len(labels)} packed_label_ids."
            )
        targets = targets._replace(label_index=index, labels=labels, label_weights=pack.get("ce_loss_weights"))
    if latents is not None and (index := as_index(pack.get("mse_loss_indexes"))) is not None:
        assert latents.velocity is not None
        velocity = latents.velocity[latents.t > 0]
        if len(velocity) != len(index):
            raise ValueError(
                f"{len(index)} mse_loss_indexes, but {len(velocity)} latent tokens have a timestep above 0; both must "
                "name the same tokens, in the same order."
            )
        targets = targets._replace(velocity_index=index, velocity=velocity)
    return targets
