# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Position and timestep features of the model: rotary embeddings, position tables, timestep MLP. Knows no tokens.

Axes: a grid has rows (height) and columns (width). A patch reads a position table at an id, row * side of the table +
column, or, between the entries of the table, at a pair of coordinates (row, column), float32.

A rotary embedding rotates pairs of features counter-clockwise by an angle, (a, b) -> (a cos - b sin, b cos + a sin).
Two layouts say which two features of a head of D are a pair:

    halves     a a a a b b b b    feature j and feature j + D/2 (Llama, Qwen, BAGEL)
    adjacent   a b a b a b a b    feature 2i and feature 2i + 1
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, rotate_half

from .configuration_bagel import BagelConfig, BagelTextConfig


_SIN_COS_BASE = 10000.0


def _validate_even(value: int, name: str) -> None:
    if value % 2:
        raise ValueError(f"{name}={value} must be even: half of the features are sines, half are cosines.")


def _validate_positive(value: int, name: str) -> None:
    if value <= 0:
        raise ValueError(f"{name}={value} must be positive.")


# --------------------------------------------------------------------------------------------------------------------
# Rotary: frequencies, angles, rotation


def inverse_frequencies(
    rope_type: str, dim: int, theta: float, device: torch.device | None = None, **rope_parameters: Any
) -> torch.Tensor:
    """
    Radians per position of each rotary pair, by transformers' function for this `rope_type`.

    Args:
        rope_type (`str`): key of `ROPE_INIT_FUNCTIONS`.
        dim (`int`): features that are rotated; 0 gives no pair.
        theta (`float`): base of the frequencies.
        rope_parameters: what that type needs (`factor`, `original_max_position_embeddings`, ...).

    Returns:
        (dim / 2,) float32.
    """
    config: Any = _RopeConfig(dim, {"rope_type": rope_type, "rope_theta": theta, **rope_parameters})
    return ROPE_INIT_FUNCTIONS[rope_type](config, device)[0]


class _RopeConfig:
    """What transformers' rope functions read of a model config."""

    num_attention_heads = 1

    def __init__(self, dim: int, rope_parameters: dict[str, Any]):
        self.head_dim = self.hidden_size = dim
        self.rope_parameters = rope_parameters

    def standardize_rope_params(self) -> None:
        """Nothing to do: they are given in the standard form."""


def plain_frequencies(dim: int, theta: float = _SIN_COS_BASE, device: torch.device | None = None) -> torch.Tensor:
    """(dim / 2,) `theta ** (-2i / dim)` radians per position, float32 (RoFormer, arXiv 2104.09864)."""
    return inverse_frequencies("linear", dim, theta, device, factor=1.0)


def multimodal_axes(
    mrope_section: tuple[int, int, int], pairs: int, device: torch.device | None = None
) -> torch.Tensor:
    """(pairs,) the position that rotates each pair: 0 time, 1 height, 2 width; T H W T H W ... until one runs out."""
    pair = torch.arange(pairs, device=device)
    axis = pair % 3
    return torch.where(pair < 3 * torch.tensor(mrope_section, device=device)[axis], axis, 0)


def llama_vision_angles(
    rows: torch.Tensor, columns: torch.Tensor, head_dim: int, theta: float = _SIN_COS_BASE
) -> torch.Tensor:
    """
    Angles of patches in Llama 4's vision tower: columns first, both counted from 1.

    Args:
        rows, columns: of any one shape, counted from 0, also fractions.
        head_dim (`int`): features of a head, a multiple of 4.

    Returns:
        (..., head_dim / 2) float32.
    """
    return _angles_of_axes(columns + 1, rows + 1, head_dim, theta)


def qwen_vision_angles(
    rows: torch.Tensor, columns: torch.Tensor, head_dim: int, theta: float = _SIN_COS_BASE
) -> torch.Tensor:
    """As [`llama_vision_angles`] in Qwen3-Omni's vision tower (arXiv 2509.17765): rows first, both counted from 0."""
    return _angles_of_axes(rows, columns, head_dim, theta)


def _angles_of_axes(first: torch.Tensor, second: torch.Tensor, head_dim: int, theta: float) -> torch.Tensor:
    frequencies = plain_frequencies(head_dim // 2, theta, first.device)
    return torch.cat([axis[..., None].float() * frequencies for axis in (first, second)], dim=-1)


def cos_sin(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., D/2) angles of pairs -> cos and sin (..., D), for `rotate_halves` and `rotate_pairs` alike."""
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs of the last axis, halves in and out."""
    return x * cos + rotate_half(x) * sin


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs of the last axis, adjacent in and out."""
    return halves_to_pairs(rotate_halves(pairs_to_halves(x), cos, sin))


def pairs_to_halves(x: torch.Tensor) -> torch.Tensor:
    """a b a b -> a a b b."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def halves_to_pairs(x: torch.Tensor) -> torch.Tensor:
    """a a b b -> a b a b."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


# --------------------------------------------------------------------------------------------------------------------
# Sine and cosine features


def _geometric_frequencies(width: int, device: torch.device | None = None) -> torch.Tensor:
    """(width / 2,) radians per step along one axis of a sine/cosine table, float64."""
    return 1.0 / _SIN_COS_BASE ** (torch.arange(width // 2, dtype=torch.float64, device=device) / (width / 2.0))


def _encode_scalar_positions(positions: torch.Tensor, width: int) -> torch.Tensor:
    """(n,) coordinates -> (n, width) float64: sines, then cosines."""
    angles = torch.outer(positions.double(), _geometric_frequencies(width, positions.device))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _build_square_grid_positions(grid_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Column and row, (grid_size ** 2,) each, of the entries of a square table, row by row; on the CPU."""
    entries = torch.arange(grid_size**2, device="cpu")
    return entries % grid_size, entries // grid_size


def _build_2d_sincos_pos_embed(embed_dim: int, grid_size: int) -> torch.Tensor:
    """
    Sine/cosine features of a square grid, (grid_size ** 2, embed_dim) float32.

    Row `r * grid_size + c` of the table belongs to grid row r and column c. The first half of the features encodes the
    COLUMN, the second half the row (as released); computed in float64 on the CPU and rounded once.

    Raises:
        ValueError: `grid_size` is not positive, or `embed_dim` is no multiple of 4.
    """
    _validate_positive(grid_size, "grid_size")
    _validate_even(embed_dim // 2, "embed_dim / 2")
    _validate_even(embed_dim, "embed_dim")
    axes = _build_square_grid_positions(grid_size)
    return torch.cat([_encode_scalar_positions(axis, embed_dim // 2) for axis in axes], dim=1).to(torch.float32)


def _get_2d_sincos_pos_embed(embed_dim: int, grid_size: int) -> np.ndarray:
    """[`_build_2d_sincos_pos_embed`] as a NumPy array."""
    return _build_2d_sincos_pos_embed(embed_dim, grid_size).numpy()


def _timestep_features(timesteps: torch.Tensor, width: int, max_period: int = 10000) -> torch.Tensor:
    """
    (n,) timesteps -> (n, width) float32: cosines, then sines (the other way round than in the grid table), zero-padded
    when `width` is odd. Timesteps are in [0, 1] and are not scaled (as released).
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    frequencies = torch.exp(-math.log(max_period) * exponents)
    angles = timesteps[:, None].float() * frequencies[None]
    features = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return nn.functional.pad(features, (0, width % 2))


# --------------------------------------------------------------------------------------------------------------------
# Position tables


def grid_position_ids(rows: int, columns: int, table_side: int, interpolate: bool | str = False) -> torch.Tensor:
    """
    Which entries of a position table the patches of a grid read, row by row.

    Args:
        rows, columns (`int`): patches of the image.
        table_side (`int`): side of the position table, which has `table_side ** 2` entries.
        interpolate (`bool` or `str`):
            `False`: the table's upper left corner.
            `True`: spread the grid over the whole table in buckets (released `interpolate_pos`). Bucket borders are
            float32, as released: float64 gives other ids for many sizes, and a full grid is not the identity for every
            `table_side`.
            `"bilinear"`: spread it over the whole table, corners on corners, each side by itself (Qwen3-Omni): row r of
            `rows` is table row `r * (table_side - 1) / (rows - 1)`; a single row is the first.
            `"fit"`: as `False` for a grid that fits; a larger one is shrunk, both sides alike, until it does.

    Returns:
        (rows * columns,) int64 ids, or (rows * columns, 2) float32 coordinates for `"bilinear"` and `"fit"`.

    Raises:
        ValueError: `False`, and the grid does not fit into the table (the released code silently wraps into the next
            row).
    """
    if isinstance(interpolate, str):
        return _coordinates_in_table(rows, columns, table_side, shrink_only=interpolate == "fit")
    if interpolate:
        borders = torch.arange(1 / table_side, 1.0, 1 / table_side)
        row_ids, column_ids = (
            torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / n), borders, right=True) for n in (rows, columns)
        )
    else:
        if max(rows, columns) > table_side:
            raise ValueError(
                f"A grid of {rows}x{columns} patches does not fit the position table of {table_side}x{table_side}. "
                f"Resize the image to at most {table_side} patches per side or set interpolate_pos, for example to "
                '"fit".'
            )
        row_ids, column_ids = torch.arange(rows), torch.arange(columns)
    return (row_ids[:, None] * table_side + column_ids).flatten()


def _coordinates_in_table(rows: int, columns: int, table_side: int, shrink_only: bool) -> torch.Tensor:
    """(rows * columns, 2) float32: corners on corners, or with `shrink_only` one step for both sides, of at most 1."""
    steps = [(table_side - 1) / max(n - 1, 1) for n in (rows, columns)]
    if shrink_only:
        steps = [min(1.0, *steps)] * 2
    axes = [torch.arange(n, dtype=torch.float64) * step for n, step in zip((rows, columns), steps)]
    return torch.cartesian_prod(*axes).float()


def latent_grid(config: BagelConfig, height: int, width: int) -> tuple[int, int]:
    """
    Rows and columns of latent tokens of an image of this many pixels.

    Raises:
        ValueError: a side that is no multiple of `latent_downsample`, or more tokens than the latent table has.
    """
    stride, side = config.latent_downsample, config.max_latent_size
    for name, size in (("height", height), ("width", width)):
        if size <= 0 or size % stride:
            nearest = max(round(size / stride), 1) * stride
            raise ValueError(f"{name}={size} must be a positive multiple of {stride}; the nearest is {nearest}.")
        if size // stride > side and not config.interpolate_pos:
            raise ValueError(
                f"{name}={size} needs {size // stride} latent tokens per side, max_latent_size={side} allows "
                f'{side * stride} pixels. Use a smaller image, or set interpolate_pos="fit".'
            )
    return height // stride, width // stride


def latent_position_ids(config: BagelConfig, grid: tuple[int, int]) -> torch.Tensor:
    """Entries of the latent position table, see [`grid_position_ids`]."""
    return grid_position_ids(*grid, config.max_latent_size, config.interpolate_pos)


def vit_position_ids(config: BagelConfig, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Entries of the ViT position table for several images, one after the other."""
    side = config.vit_max_num_patch_per_side
    return torch.cat([grid_position_ids(*grid, side, config.interpolate_pos) for grid in grids])


def read_table(table: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
    """
    Read a square position table between its entries, bilinearly.

    Args:
        table: (side * side, features), row by row.
        coordinates: (n, 2) row and column, each in [0, side - 1].

    Returns:
        (n, features) float32.

    Raises:
        ValueError: coordinates of less than float32, where 60.25 would be 60.
    """
    if coordinates.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"Coordinates in a position table are {coordinates.dtype}, which cannot hold them; keep position ids in "
            "float32 when the other inputs of a model are cast."
        )
    side = math.isqrt(table.shape[0])
    low = coordinates.floor().clamp(0, side - 1)
    high = (low + 1).clamp(max=side - 1)
    share = coordinates - low  # of the higher neighbour
    read = torch.zeros((), device=table.device)
    for row, row_share in ((low, 1 - share), (high, share)):
        for column, column_share in ((low, 1 - share), (high, share)):
            index = (row[:, 0] * side + column[:, 1]).long()
            read = read + (row_share[:, 0] * column_share[:, 1])[:, None] * table[index]
    return read


class BagelGridPositionEmbedding(nn.Module):
    """
    Frozen 2-D sine/cosine table for ViT patches and latent patches.

    The table is a persistent buffer under the checkpoint's key, so it is saved and loaded but never trained. The
    released training recomputes it, the released inference loads it; both are this table, in the model's dtype.

    Args:
        max_num_patch_per_side (`int`): side of the grid.
        hidden_size (`int`): features, a multiple of 4.
    """

    pos_embed: torch.Tensor

    def __init__(self, max_num_patch_per_side: int, hidden_size: int):
        super().__init__()
        self.max_num_patch_per_side = max_num_patch_per_side
        self.hidden_size = hidden_size
        self.register_buffer("pos_embed", torch.empty(max_num_patch_per_side**2, hidden_size))
        if self.pos_embed.device.type != "meta":
            self._init_weights()

    def table(self) -> torch.Tensor:
        """(max_num_patch_per_side ** 2, hidden_size) float32, computed anew."""
        return _build_2d_sincos_pos_embed(self.hidden_size, self.max_num_patch_per_side)

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Fill the table; a loaded model does this through its own `_init_weights`."""
        self.pos_embed.copy_(self.table())

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """(n,) ids, or (n, 2) coordinates -> (n, hidden_size)."""
        if position_ids.is_floating_point():
            return read_table(self.pos_embed, position_ids)
        return self.pos_embed[position_ids]


class BagelTimestepEmbedding(nn.Module):
    """
    Scalar timesteps through sine/cosine features and a small MLP (the DiT timestep embedder).

    Args:
        hidden_size (`int`): output features.
        frequency_embedding_size (`int`, defaults to 256): sine/cosine features.
    """

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256):
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """(n,) timesteps in [0, 1], 0 = clean picture -> (n, hidden_size)."""
        weight = self.mlp[0].weight
        assert isinstance(weight, torch.Tensor)
        return self.mlp(_timestep_features(t, self.frequency_embedding_size).to(weight.dtype))


# --------------------------------------------------------------------------------------------------------------------
# Rotary modules


class RotaryEmbedding2D(nn.Module):
    """
    Rotary tables of a grid for the vision tower: the row rotates the first half of a head, the column the second, each
    in the layout of halves.

    Args:
        dim (`int`): features per axis, half of the head dimension.
        max_h, max_w (`int`): rows and columns of the grid.
        base (`float`): base of the frequencies.

    Raises:
        ValueError: an odd `dim`.
    """

    cos_h: torch.Tensor
    sin_h: torch.Tensor
    cos_w: torch.Tensor
    sin_w: torch.Tensor

    def __init__(self, dim: int, max_h: int, max_w: int, base: float = _SIN_COS_BASE):
        super().__init__()
        _validate_even(dim, "head_dim / 2")
        self.dim, self.max_h, self.max_w, self.base = dim, max_h, max_w, base
        for name in ("cos_h", "sin_h", "cos_w", "sin_w"):  # persistent: released files of such a tower have them
            self.register_buffer(name, torch.empty(max_h * max_w, dim))
        if self.cos_h.device.type != "meta":
            for name, table in self.tables().items():
                getattr(self, name).copy_(table)

    def tables(self) -> dict[str, torch.Tensor]:
        """The four buffers by name, each (max_h * max_w, dim) float32, computed anew."""
        rows = torch.arange(self.max_h, dtype=torch.float32).repeat_interleave(self.max_w)
        columns = torch.arange(self.max_w, dtype=torch.float32).repeat(self.max_h)
        return dict(zip(("cos_h", "sin_h", "cos_w", "sin_w"), self._cos_sin(rows, columns)))

    def _cos_sin(self, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(n,) float32 each -> cos_h, sin_h, cos_w, sin_w, each (n, dim)."""
        frequencies = plain_frequencies(self.dim, self.base, rows.device)
        return (*cos_sin(rows[:, None] * frequencies), *cos_sin(columns[:, None] * frequencies))

    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(n,) ids, or (n, 2) coordinates -> cos_h, sin_h, cos_w, sin_w, each (n, dim)."""
        if position_ids.is_floating_point():
            return self._cos_sin(*position_ids.unbind(-1))
        return tuple(table[position_ids] for table in (self.cos_h, self.sin_h, self.cos_w, self.sin_w))


class BagelTextRotaryEmbedding(Qwen2RotaryEmbedding):
    """
    Rotary tables of the decoder for every `rope_type` of `BagelTextConfig.rope_parameters`.

    Frequencies are transformers' (`ROPE_INIT_FUNCTIONS`); added here are a partial `"default"`, three positions per
    token (`mrope_section`: each pair is rotated by one of time, height and width, interleaved), and lengths per sample.
    `"dynamic"` and `"longrope"` depend on how long the input is; here that is the last position of each sample, not of
    the batch, the pack or an earlier forward, so batched, packed and single runs agree. Keys in a cache keep the
    rotation they got when they were read, as everywhere in transformers.

    transformers finds this class by the "RotaryEmbedding" in its name when it fills the tables of a loaded model.

    Args:
        config (`BagelTextConfig`): the decoder.
    """

    config: BagelTextConfig

    @staticmethod
    def compute_default_rope_parameters(
        config: PreTrainedConfig | None = None, device: torch.device | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, float]:
        """-> (rotary_dim / 2,) radians per position, and what cosines and sines are multiplied by."""
        assert config is not None
        return plain_frequencies(config.rotary_dim, config.rope_parameters["rope_theta"], device), 1.0

    @torch.no_grad()
    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, sample_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            x: gives dtype and device of the result.
            position_ids: (batch, length), or (batch, length, 3) time, height and width; the former is the same position
                on all three.
            sample_ids: (batch, length), -1 = padding; one sample per row if absent.

        Returns:
            cos and sin, each (batch, length, rotary_dim), for halves or adjacent pairs alike.
        """
        frequencies = self._frequencies(position_ids, sample_ids)
        if position_ids.ndim == 3:
            assert self.config.mrope_section is not None
            axes = multimodal_axes(self.config.mrope_section, frequencies.shape[-1], position_ids.device)
            positions = position_ids[..., axes]
        else:
            positions = position_ids[..., None]
        cos, sin = cos_sin(positions.float() * frequencies)
        return (cos * self.attention_scaling).to(x), (sin * self.attention_scaling).to(x)

    def _frequencies(self, position_ids: torch.Tensor, sample_ids: torch.Tensor | None) -> torch.Tensor:
        """(rotary_dim / 2,), or one row of them per token; float32."""
        device, rope = position_ids.device, self.config.rope_parameters or {}
        frequencies = self.inv_freq.to(device, torch.float32)
        if self.rope_type == "dynamic":  # `seq_len` may be a tensor: one length, and so one row, per token
            lengths = _sample_lengths(position_ids, sample_ids)
            return ROPE_INIT_FUNCTIONS["dynamic"](self.config, device, seq_len=lengths)[0]
        if self.rope_type == "longrope":
            known = int(rope["original_max_position_embeddings"] or 0)
            longer = ROPE_INIT_FUNCTIONS["longrope"](self.config, device, seq_len=known + 1)[0]
            return torch.where(_sample_lengths(position_ids, sample_ids) > known, longer, frequencies)
        return frequencies


def _sample_lengths(position_ids: torch.Tensor, sample_ids: torch.Tensor | None) -> torch.Tensor:
    """(batch, length, 1): last position + 1 of the sample that each token belongs to."""
    last = position_ids if position_ids.ndim == 2 else position_ids.amax(-1)
    if sample_ids is None or last.shape[1] == 1:
        return last.amax(1)[:, None, None] + 1
    sample_ids = sample_ids.clamp(min=0)
    longest = last.new_zeros(len(last), int(sample_ids.max()) + 1).scatter_reduce(1, sample_ids, last, "amax")
    return longest.gather(1, sample_ids)[..., None] + 1
