# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The attention rule: which token sees which, at which position, as columns per token; knows ids and columns only.

Axes: (batch, length). A packed training sequence is a batch of one row that holds many samples; a padded batch holds
one sample per row. Both are the same seven columns.

A text, an image that is read, a text, then an image that is drawn (t text, i ViT, n noisy latents; boundary tokens are
included):

    token        t  i  i  i  t  t  n  n  n
    span         0  1  1  1  2  2  3  3  3
    position     0  1  1  1  2  3  4  4  4      sees (rows see columns)
                                                t  x . . . . . . . .
                                                i  x x x x . . . . .
                                                i  x x x x . . . . .
                                                i  x x x x . . . . .
                                                t  x x x x x . . . .
                                                t  x x x x x x . . .
                                                n  x x x x x x x x x
                                                n  x x x x x x x x x
                                                n  x x x x x x x x x

With three positions per token (`mrope_section`) a text token has three equal ones, and an image token adds its row and
column in the grid. vision_start has the first position of the image, vision_end its last (the longer side of the grid),
and the next token follows that. An image of 2 rows and 3 columns (s, e = vision_start, vision_end):

    token        t  s  i  i  i  i  i  i  e  t
    time         0  1  1  1  1  1  1  1  3  4
    height       0  1  1  1  1  2  2  2  3  4
    width        0  1  1  2  3  1  2  3  3  4
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple, TypeAlias, TypeGuard

import torch
from torch import nn


# On CPUs, oneDNN compiles a kernel for every new matrix size (milliseconds each), and every pack has new sizes. There,
# sizes of large packs are rounded up with filler tokens that no other token reads.
ROWS_STEP, LENGTH_STEP, SAMPLES_STEP = 64, 16, 4
ROUNDED_FROM = 512  # tokens
# PyTorch's type checkers know one class of tensors; these names say the dtype.
LongTensor: TypeAlias = torch.Tensor
BoolTensor: TypeAlias = torch.Tensor

Grid = tuple[int, int]  # rows and columns of an image, in tokens

PADDING = -1  # sample id of padding: it sees only padding, so no row of a mask is ever empty
UNUSED = -2  # sample id of cache entries that nothing has been written to


def visible(q_index, k_index, same_sample, same_span, bidirectional_k, noisy_k):
    """
    The rule itself, for broadcast tensors and for single elements alike.

    A token sees its own sample: everything before it, all of its own span if that span is bidirectional, but a noisy
    span only from inside.
    """
    return same_sample & ((k_index <= q_index) | (same_span & bidirectional_k)) & (~noisy_k | same_span)


class Columns:
    """Read-only view of the columns that the rule needs, for keys: what the cache holds, then the new tokens."""

    def __init__(self, layout: "PackedLayout", key_length: int):
        past, free = layout.past_length, key_length - layout.past_length - layout.length
        if free < 0:
            raise ValueError(
                f"{layout.past_length} cached and {layout.length} new tokens do not fit {key_length} keys."
            )

        def extend(column: torch.Tensor, before, after) -> torch.Tensor:
            before = before if torch.is_tensor(before) else column.new_full((column.shape[0], past), before)
            return torch.cat([before, column, column.new_full((column.shape[0], free), after)], dim=1)

        cached = 0
        if layout.past_valid is not None:
            cached = torch.where(layout.past_valid, 0, PADDING)
        self.sample_ids = extend(layout.sample_ids, cached, UNUSED)
        self.span_ids = extend(layout.span_ids, PADDING, UNUSED)
        self.bidirectional = extend(layout.bidirectional, False, False)
        self.noisy = extend(layout.noisy, False, False)


@dataclass(frozen=True)
class PackedLayout:
    """
    What every token of a forward is, as columns of shape (batch, length).

    Attributes:
        sample_ids: sample of each token, -1 for padding. Rows with a cache hold one sample, number 0.
        span_ids: span of each token, unique within the forward.
        bidirectional: the token's span is seen whole from inside.
        noisy: the token's span is hidden from everything outside it.
        gen: the token belongs to the generation expert (VAE latents); all others to the understanding expert.
        position_ids: rotary position, or (batch, length, 3) time, height and width.
        past_length: tokens in the cache before these.
        past_valid: (batch, past_length) bool, `False` for padding in the cache; `None` = all valid.
        causal: the caller knows that this is plain causal text, one sample per row, without gen tokens.
        unmasked: the caller knows that every valid query sees every valid key (the block of an image that is drawn).
    """

    sample_ids: LongTensor
    span_ids: LongTensor
    bidirectional: BoolTensor
    noisy: BoolTensor
    gen: BoolTensor
    position_ids: LongTensor
    past_length: int = 0
    past_valid: BoolTensor | None = None
    causal: bool = False
    unmasked: bool = False

    @property
    def batch_size(self) -> int:
        return self.sample_ids.shape[0]

    @property
    def length(self) -> int:
        return self.sample_ids.shape[1]

    @property
    def valid(self) -> BoolTensor:
        """(batch, length), `False` for padding."""
        return self.sample_ids >= 0

    def dense_mask(self, key_length: int | None = None) -> BoolTensor:
        """(batch, 1, length, keys) bool, True = sees. `key_length` may exceed past + new tokens (static caches)."""
        key = Columns(self, key_length or self.past_length + self.length)
        device = self.sample_ids.device
        q_index = torch.arange(self.past_length, self.past_length + self.length, device=device)[:, None]
        k_index = torch.arange(key.sample_ids.shape[1], device=device)[None, :]
        return visible(
            q_index,
            k_index,
            self.sample_ids[:, :, None] == key.sample_ids[:, None, :],
            self.span_ids[:, :, None] == key.span_ids[:, None, :],
            key.bidirectional[:, None, :],
            key.noisy[:, None, :],
        )[:, None]

    def mask_function(self, key_length: int | None = None) -> Callable:
        """The same rule as `f(batch, head, q, k)` on indexes, for flex attention; `q` counts the new tokens."""
        key = Columns(self, key_length or self.past_length + self.length)
        past = self.past_length

        def sees(batch, head, q, k):
            return visible(
                q + past,
                k,
                self.sample_ids[batch, q] == key.sample_ids[batch, k],
                self.span_ids[batch, q] == key.span_ids[batch, k],
                key.bidirectional[batch, k],
                key.noisy[batch, k],
            )

        return sees

    def samples_apart(self, slack: float = 0.75) -> list[tuple[LongTensor, "PackedLayout"]]:
        """
        A pack of many samples as a few padded batches with a row per sample, for kernels that know no packs.

        Samples whose lengths differ little share a batch: none is shorter than `slack` of the longest. Padding does not
        count as a sample. Reads the sample lengths on the host. On CPUs, batches of large packs have rounded sizes.

        Returns:
            Per batch: `index` (samples, longest) of its tokens over (batch * length), 0 in padding; and its layout,
            without cached tokens.
        """
        rounded = rounds_sizes(self.sample_ids)
        row = torch.arange(self.batch_size, device=self.sample_ids.device)[:, None]
        names = torch.where(self.valid, self.sample_ids + row * self.length, PADDING).flatten()
        names, counts = names.unique_consecutive(return_counts=True)
        starts = (counts.cumsum(0) - counts)[names != PADDING]
        counts = counts[names != PADDING]
        batches, order = [], counts.argsort(descending=True, stable=True).tolist()
        lengths = counts.tolist()
        while order:
            longest = lengths[order[0]]
            rows = [one for one in order if lengths[one] >= slack * longest]
            order = order[len(rows) :]
            longest += -longest % LENGTH_STEP if rounded else 0
            steps = torch.arange(longest, device=starts.device)[None]
            index, real = starts[rows][:, None] + steps, steps < counts[rows][:, None]
            if rounded:
                index, real = (nn.functional.pad(x, (0, 0, 0, -len(rows) % SAMPLES_STEP)) for x in (index, real))
            index = torch.where(real, index, 0)
            columns = {
                name: getattr(self, name).flatten(0, 1)[index]
                for name in ("span_ids", "bidirectional", "noisy", "gen", "position_ids")
            }
            batches.append((index, PackedLayout(sample_ids=torch.where(real, 0, PADDING), **columns)))
        return batches

    @classmethod
    def text(
        cls,
        batch_size: int,
        length: int,
        attention_mask: torch.Tensor | None = None,
        position_ids: LongTensor | None = None,
        past_length: int = 0,
        device: torch.device | None = None,
    ) -> "PackedLayout":
        """
        Plain text: causal, one sample per row.

        `attention_mask` is (batch, past + length), 0 = padding; a finished 4-D mask says nothing about padding and is
        not read here. Without `position_ids`, tokens are counted, padding left out.
        """
        valid, past_valid = split_attention_mask(attention_mask, batch_size, length, past_length)
        zeros = torch.zeros(batch_size, length, dtype=torch.long, device=device)
        off = zeros.bool()
        if position_ids is None and valid is not None and attention_mask is not None:
            position_ids = count_positions(attention_mask.long())[:, -length:]
        elif position_ids is None:
            position_ids = torch.arange(length, device=device)[None] + past_length
        return cls(
            sample_ids=zeros if valid is None else torch.where(valid, 0, PADDING),
            span_ids=zeros,
            bidirectional=off,
            noisy=off,
            gen=off,
            position_ids=position_ids.expand(batch_size, *position_ids.shape[1:]),
            past_length=past_length,
            past_valid=past_valid,
            causal=True,
        )

    @classmethod
    def flattened(cls, position_ids: LongTensor) -> "PackedLayout":
        """A row of several texts, whose positions start again from 0 with each: a flattened batch of transformers."""
        text = cls.text(1, position_ids.shape[1], None, position_ids, 0, position_ids.device)
        return replace(text, sample_ids=(position_ids == 0).long().cumsum(1) - 1, causal=False)

    @classmethod
    def from_packed(
        cls,
        sequence_length: int,
        sample_lens: Sequence[int],
        position_ids: LongTensor,
        gen_indexes: LongTensor | None = None,
        split_lens: Sequence[int] | None = None,
        attn_modes: Sequence[str] | None = None,
        nested_attention_masks: Sequence[torch.Tensor] | None = None,
    ) -> "PackedLayout":
        """
        A training pack in the released format, as one row; `position_ids` may be (sequence_length, 3).

        Splits are `"causal"` (text), `"full"` (clean image) or `"noise"` (image being learned). Without them the
        spans are read off `nested_attention_masks` (per sample, bool True = sees, or float 0 = sees). A trailing split
        that only fills the pack up (as the released flex packs have) is cut off.

        Raises:
            ValueError: lengths that contradict each other, unknown modes, a mask that the rule cannot express.
        """
        device = position_ids.device
        sample_lens = [int(n) for n in sample_lens]
        if sum(sample_lens) < sequence_length:
            raise ValueError(
                f"sample_lens {sample_lens} sum to {sum(sample_lens)}, less than sequence_length={sequence_length}."
            )
        sample_ends = set(accumulate(sample_lens))
        if sequence_length and sequence_length not in sample_ends:
            raise ValueError(
                f"No sample of sample_lens {sample_lens} ends at sequence_length={sequence_length}; only whole samples "
                "after it (padding of a pack) are cut off."
            )
        if position_ids.shape not in ((sequence_length,), (sequence_length, 3)):
            raise ValueError(
                f"packed_position_ids has shape {tuple(position_ids.shape)}, expected ({sequence_length},) as "
                f"sequence_length={sequence_length} (or, with mrope_section, ({sequence_length}, 3))."
            )
        if split_lens is not None and attn_modes is not None:
            lens, modes = _check_splits(split_lens, attn_modes, sum(sample_lens))
            if not sample_ends <= set(accumulate(lens)):
                raise ValueError(f"A split of split_lens {lens} reaches over two samples of sample_lens {sample_lens}.")
            lens_tensor = torch.tensor(lens, device=device)
            span_ids = torch.arange(len(lens), device=device).repeat_interleave(lens_tensor)
            bidirectional, noisy = (
                torch.tensor([mode in kinds for mode in modes], device=device).repeat_interleave(lens_tensor)
                for kinds in (("full", "noise"), ("noise",))
            )
        elif nested_attention_masks is not None:
            span_ids, bidirectional, noisy = _columns_of_masks(nested_attention_masks, sample_lens, device)
        else:
            raise ValueError(
                "Pass split_lens with attn_modes, or nested_attention_masks: one of them says who sees whom."
            )
        sample_ids = torch.arange(len(sample_lens), device=device).repeat_interleave(
            torch.tensor(sample_lens, device=device)
        )
        gen = torch.zeros(sequence_length, dtype=torch.bool, device=device)
        if gen_indexes is not None:
            gen[gen_indexes] = True
        columns = (sample_ids, span_ids, bidirectional, noisy)
        return cls(
            *(column[None, :sequence_length] for column in columns), gen=gen[None], position_ids=position_ids[None]
        )

    @classmethod
    def noisy_blocks(
        cls,
        num_latents: Sequence[int],
        positions: LongTensor,
        past_length: int,
        past_valid: BoolTensor | None,
        grids: Sequence[tuple[int, int]] | None = None,
    ) -> "PackedLayout":
        """
        One image per row that is being drawn: vision_start, its latents, vision_end, then padding.

        Args:
            num_latents: latent tokens of each row.
            positions: (batch,) the rotary position of each block.
            past_length, past_valid: the context it is drawn under.
            grids: rows and columns of each block, for tokens with three positions.
        """
        device = positions.device
        ends = torch.tensor(num_latents, device=device)[:, None] + 1  # index of vision_end
        index = torch.arange(max(num_latents) + 2, device=device)[None]
        valid = index <= ends
        position_ids = positions[:, None].expand_as(valid)
        if grids is not None:
            blocks = [grid_block_positions(*grid) for grid in grids]
            position_ids = position_ids[..., None] + nn.utils.rnn.pad_sequence(blocks, batch_first=True).to(device)
        return cls(
            sample_ids=torch.where(valid, 0, PADDING),
            span_ids=torch.zeros_like(valid, dtype=torch.long),
            bidirectional=valid,
            noisy=valid,
            gen=(index >= 1) & (index < ends),
            position_ids=position_ids,
            past_length=past_length,
            past_valid=past_valid,
            unmasked=True,
        )


class Placeholders(NamedTuple):
    """Bool columns (batch, length): ViT placeholders, latent placeholders, and the boundary tokens of their images."""

    image: BoolTensor
    latent: BoolTensor
    start: BoolTensor
    end: BoolTensor

    @classmethod
    def find(
        cls, input_ids: LongTensor, image_token_id: int, latent_token_id: int, start_id: int, end_id: int
    ) -> "Placeholders":
        """Boundary ids that enclose no placeholder (a model may write them) stay text."""
        image, latent = input_ids == image_token_id, input_ids == latent_token_id
        either = image | latent
        start = (input_ids == start_id) & nn.functional.pad(either[:, 1:], (0, 1))
        end = (input_ids == end_id) & nn.functional.pad(either[:, :-1], (1, 0))
        return cls(image, latent, start, end)

    @property
    def in_image(self) -> BoolTensor:
        return self.image | self.latent | self.start | self.end

    @property
    def span_ids(self) -> LongTensor:
        """A text run and an image each are a span; image k has an odd number."""
        return self.start.long().cumsum(1) * 2 - self.in_image.long()

    def merge_grids(self, image_grids: Sequence[Grid], latent_grids: Sequence[Grid]) -> LongTensor:
        """Grids of ViT and VAE images, each in their own order, as one (images, 2) in reading order."""
        first = self.start.flatten().nonzero()[:, 0] + 1
        is_latent = self.latent.flatten()[first]
        merged = first.new_empty(len(first), 2)
        for which, grids in ((~is_latent, image_grids), (is_latent, latent_grids)):
            merged[which] = first.new_tensor(list(grids)).view(-1, 2)
        return merged

    def positions(self, valid: LongTensor, grids: LongTensor | None = None) -> LongTensor:
        """
        Rotary positions, counted from 0; 0 for padding.

        Args:
            valid: (batch, length), 0 = padding.
            grids: (images, 2) rows and columns of all images in reading order, for tokens with three positions.

        Returns:
            (batch, length), one position per text token and one per image; with `grids` (batch, length, 3), see the
            second table at the top of `layout_bagel.py`.
        """
        opens = (~self.in_image | self.start).long()
        if grids is None:
            return count_positions(valid * opens) * valid
        image = (self.start.flatten().cumsum(0) - 1).clamp(min=0).view_as(opens)  # number of the last one opened
        rows, columns = nn.functional.pad(grids, (0, 0, 0, 1), value=1)[image].unbind(-1)
        time = count_positions(valid * torch.where(self.end, torch.maximum(rows, columns) - 1, opens))
        index = torch.arange(opens.shape[1], device=opens.device)
        inner = index - 1 - torch.where(self.start, index, 0).cummax(1).values  # of a placeholder in its image
        inner = torch.where(self.image | self.latent, inner, 0)
        return torch.stack([time, time + inner // columns, time + inner % columns], dim=-1) * valid[..., None]

    def check(self, image_lengths: Sequence[int], latent_lengths: Sequence[int]) -> None:
        """
        Compare the placeholders, in reading order over the batch, with the images that come with them.

        Raises:
            ValueError: placeholders without boundaries, more or fewer runs than images, a run of another length.
        """
        for name, column, lengths, tensor in (
            ("image_token_id", self.image, image_lengths, "image_grid_hw"),
            ("latent_token_id", self.latent, latent_lengths, "latent_image_sizes"),
        ):
            if lengths or bool(column.any()):
                self._check_runs(name, column, lengths, tensor)

    def _check_runs(self, name: str, column: BoolTensor, lengths: Sequence[int], tensor: str) -> None:
        before, after = nn.functional.pad(column[:, :-1], (1, 0)), nn.functional.pad(column[:, 1:], (0, 1))
        first, last = (column & ~before).nonzero(), (column & ~after).nonzero()
        if len(first) != len(lengths):
            raise ValueError(
                f"input_ids mark {len(first)} images with {name}, but {tensor} describes {len(lengths)}. "
                "Pass one image per mark (the processor writes the marks from its `images`)."
            )
        runs = (last[:, 1] - first[:, 1] + 1).tolist()
        for number, (run, expected) in enumerate(zip(runs, lengths)):
            if run != expected:
                raise ValueError(
                    f"Image {number} has {run} placeholders {name} in input_ids, but {tensor} says {expected}."
                )
        opened = nn.functional.pad(self.start[:, :-1], (1, 0))[first[:, 0], first[:, 1]]
        closed = nn.functional.pad(self.end[:, 1:], (0, 1))[last[:, 0], last[:, 1]]
        if not bool((opened & closed).all()):
            row, column_index = first[~(opened & closed)][0].tolist()
            raise ValueError(
                f"The placeholders {name} from row {row}, column {column_index} are not enclosed by "
                "vision_start_token_id and vision_end_token_id (was the prompt truncated?)."
            )


def rounds_sizes(column: torch.Tensor) -> bool:
    """Whether this many tokens are computed at rounded sizes (CPUs, large packs)."""
    return column.device.type == "cpu" and column.numel() >= ROUNDED_FROM


def grid_block_positions(rows: int, columns: int) -> LongTensor:
    """Time, height and width of an image with its boundary tokens, from 0: (rows * columns + 2, 3)."""
    grid = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), torch.arange(rows), torch.arange(columns))
    return torch.cat([torch.zeros(1, 3, dtype=torch.long), grid, torch.full((1, 3), max(rows, columns) - 1)])


def check_cover(sequence_length: int, indexes: dict[str, LongTensor | None], device: torch.device) -> None:
    """
    Every token of a pack is filled exactly once.

    Raises:
        ValueError: an index outside the pack, a token filled twice, a token left empty.
    """
    filled = torch.zeros(sequence_length, dtype=torch.long, device=device)
    for name, index in indexes.items():
        if index is None or index.numel() == 0:
            continue
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= sequence_length:
            raise ValueError(
                f"{name} holds index {low if low < 0 else high}, outside sequence_length={sequence_length}."
            )
        filled += torch.bincount(index, minlength=sequence_length)
    for wrong, word in ((filled > 1, "filled more than once"), (filled == 0, "not filled")):
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            raise ValueError(
                f"Token {first} of the pack is {word} ({int(wrong.sum())} such tokens); {', '.join(indexes)} must "
                f"together hold every index below sequence_length={sequence_length} exactly once."
            )


def check_tensors(**tensors: torch.Tensor | None) -> None:
    """One device, ids as integers, features as floats: anything else is refused by name."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    devices = {name: tensor.device for name, tensor in given.items()}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"Inputs lie on different devices: {where}. Move them together: `inputs.to(model.device)`.")
    for name, tensor in given.items():
        floats = name in ("inputs_embeds", "pixel_values", "latent_pixel_values")
        if floats != tensor.is_floating_point() and name != "attention_mask":
            raise ValueError(
                f"{name} has dtype {tensor.dtype}; it must be {'a floating' if floats else 'an integer'} type."
            )


def as_index(index: torch.Tensor | None) -> LongTensor | None:
    """Released packs give indexes, bool masks or an empty float tensor; `None` = nothing there."""
    if index is None or index.numel() == 0:
        return None
    index = index.nonzero()[:, 0] if index.dtype == torch.bool else index.long()
    return index if index.numel() else None


def around(index: LongTensor) -> LongTensor:
    """Some tokens of a pack and those after them, in order: token k predicts what stands at k + 1 there."""
    return torch.cat([index, index + 1]).unique()


def count_positions(advance: LongTensor) -> LongTensor:
    """Positions from steps: the first step is position 0; so is everything before it."""
    return (advance.cumsum(1) - 1).clamp(min=0)


def next_position(position_ids: LongTensor, keep: BoolTensor) -> LongTensor:
    """(batch,) the position after the tokens that are kept; 0 after none."""
    last = position_ids if position_ids.ndim == 2 else position_ids.amax(-1)
    return torch.where(keep, last + 1, 0).amax(1)


def axes_first(position_ids: LongTensor) -> LongTensor:
    """(batch, length, 3) -> (3, batch, length), the public form; one position per token stays as it is."""
    return position_ids.movedim(-1, 0) if position_ids.ndim == 3 else position_ids


def axes_last(position_ids: LongTensor) -> LongTensor:
    """The inverse of [`axes_first`]."""
    return position_ids.movedim(0, -1) if position_ids.ndim == 3 else position_ids


def restarts(position_ids: LongTensor | None) -> TypeGuard[LongTensor]:
    """Whether a single row of positions starts again from 0."""
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[0] != 1:
        return False
    return not torch.compiler.is_compiling() and bool((position_ids[:, 1:] == 0).any())


def split_attention_mask(
    attention_mask: torch.Tensor | None, batch_size: int, length: int, past_length: int
) -> tuple[BoolTensor | None, BoolTensor | None]:
    if attention_mask is None or attention_mask.ndim != 2:
        return None, None
    known = isinstance(past_length, int)  # a static cache may count on the device
    if attention_mask.shape[0] != batch_size or (known and attention_mask.shape[1] != past_length + length):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected ({batch_size}, {past_length + length}): "
            f"{past_length} cached and {length} new tokens."
        )
    mask = attention_mask.bool()
    return mask[:, -length:], mask[:, :-length] if mask.shape[1] > length else None


def _check_splits(split_lens: Sequence[int], attn_modes: Sequence[str], total: int) -> tuple[list[int], list[str]]:
    lens, modes = [int(n) for n in split_lens], list(attn_modes)
    if len(lens) != len(modes):
        raise ValueError(f"{len(lens)} split_lens but {len(modes)} attn_modes; each split has one mode.")
    if sum(lens) != total:
        raise ValueError(f"split_lens sum to {sum(lens)}, sample_lens to {total}; both describe the same tokens.")
    unknown = set(modes) - {"causal", "full", "noise"}
    if unknown:
        raise ValueError(f"attn_modes {sorted(unknown)} are unknown; a split is 'causal', 'full' or 'noise'.")
    return lens, modes


def _columns_of_masks(
    masks: Sequence[torch.Tensor], sample_lens: list[int], device: torch.device
) -> tuple[LongTensor, BoolTensor, BoolTensor]:
    """Read spans off dense masks, and check that the rule gives the masks back."""
    if len(masks) != len(sample_lens):
        raise ValueError(f"{len(masks)} nested_attention_masks for {len(sample_lens)} sample_lens.")
    spans, both_ways, hidden, next_span = [], [], [], 0
    for number, (mask, length) in enumerate(zip(masks, sample_lens)):
        if mask.shape != (length, length):
            raise ValueError(
                f"nested_attention_masks[{number}] has shape {tuple(mask.shape)}, its sample has {length} tokens."
            )
        sees = mask.to(device) if mask.dtype == torch.bool else mask.to(device) == 0
        joined = nn.functional.pad(sees.diagonal(1), (1, 0))  # token k is seen by the one before it: same span
        span = (~joined).long().cumsum(0) - 1
        bidirectional = joined | nn.functional.pad(joined[1:], (0, 1))
        index = torch.arange(length, device=device)
        later = index[:, None] > index[None]
        same_span = span[:, None] == span[None]
        noisy = (later & ~same_span & ~sees).any(0)
        rule = visible(index[:, None], index[None], torch.ones_like(sees), same_span, bidirectional[None], noisy[None])
        if not torch.equal(rule, sees):
            q, k = (rule != sees).nonzero()[0].tolist()
            raise ValueError(
                f"nested_attention_masks[{number}] cannot be built from causal, full and noise splits: token {q} "
                f"{'sees' if sees[q, k] else 'does not see'} token {k}. Pass split_lens and attn_modes."
            )
        spans.append(span + next_span)
        next_span += int(span[-1]) + 1 if length else 0
        both_ways.append(bidirectional)
        hidden.append(noisy)
    return torch.cat(spans), torch.cat(both_ways), torch.cat(hidden)
