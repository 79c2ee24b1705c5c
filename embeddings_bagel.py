# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Position and timestep features: grid tables and ids, timestep MLP, rotary tables. Knows no tokens, no model.

Axes: a grid has rows (height) and columns (width). Where a patch is in a position table is an id, row * side of the
table + column, or, between its entries, a pair of coordinates (row, column), float32.
"""

import math

import numpy as np
import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from .positions_bagel import cos_sin, inverse_frequencies, multimodal_axes


_SIN_COS_BASE = 10000.0


def _validate_even(value: int, name: str) -> None:
    if value % 2:
        raise ValueError(f"{name}={value} must be even: half of the features are sines, half are cosines.")


def _validate_positive(value: int, name: str) -> None:
    if value <= 0:
        raise ValueError(f"{name}={value} must be positive.")


def _geometric_frequencies(width: int) -> np.ndarray:
    """Inverse periods of one axis, `width / 2` of them, float64."""
    return 1.0 / _SIN_COS_BASE ** (np.arange(width // 2, dtype=np.float64) / (width / 2.0))


def _encode_scalar_positions(positions: np.ndarray, width: int) -> np.ndarray:
    """(n,) coordinates -> (n, width): sines, then cosines."""
    angles = np.outer(positions, _geometric_frequencies(width))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def _build_2d_sincos_pos_embed(embed_dim: int, grid_size: int) -> torch.Tensor:
    """
    Sine/cosine features of a square grid, (grid_size ** 2, embed_dim) float32.

    Row `r * grid_size + c` of the table belongs to grid row r and column c. The first half of the features encodes the
    COLUMN, the second half the row (as released); computed in float64 on the CPU and rounded once.
    """
    _validate_positive(grid_size, "grid_size")
    _validate_even(embed_dim // 2, "embed_dim / 2")
    _validate_even(embed_dim, "embed_dim")
    rows, columns = np.divmod(np.arange(grid_size**2), grid_size)
    halves = [_encode_scalar_positions(axis, embed_dim // 2) for axis in (columns, rows)]
    return torch.from_numpy(np.concatenate(halves, axis=1)).to(torch.float32)


def _timestep_features(timesteps: torch.Tensor, width: int, max_period: float = _SIN_COS_BASE) -> torch.Tensor:
    """
    (n,) timesteps -> (n, width) float32: cosines, then sines (the other way round than the grid table), zero-padded
    when `width` is odd. Timesteps are in [0, 1] and are not scaled (as released).
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    frequencies = torch.exp(-np.log(max_period) * exponents)
    angles = timesteps[:, None].float() * frequencies[None]
    features = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return nn.functional.pad(features, (0, width % 2))


def grid_position_ids(rows: int, columns: int, table_side: int, interpolate: bool | str = False) -> torch.Tensor:
    """
    Where a (rows, columns) grid is in a table of `table_side ** 2` entries, row by row.

    Args:
        rows, columns (`int`): patches of the image.
        table_side (`int`): side of the position table.
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
        steps = [(table_side - 1) / max(n - 1, 1) for n in (rows, columns)]
        if interpolate == "fit":
            steps = [min(1.0, *steps)] * 2
        axes = [torch.arange(n, dtype=torch.float64) * step for n, step in zip((rows, columns), steps)]
        return torch.cartesian_prod(*axes).float()
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
    read = 0
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

    def __init__(self, max_num_patch_per_side: int, hidden_size: int):
        super().__init__()
        self.max_num_patch_per_side = max_num_patch_per_side
        self.hidden_size = hidden_size
        self.register_buffer("pos_embed", torch.empty(max_num_patch_per_side**2, hidden_size))
        if self.pos_embed.device.type != "meta":
            self.pos_embed.copy_(self.table())

    def table(self) -> torch.Tensor:
        return _build_2d_sincos_pos_embed(self.hidden_size, self.max_num_patch_per_side)

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
        return self.mlp(_timestep_features(t, self.frequency_embedding_size).to(self.mlp[0].weight.dtype))


class RotaryEmbedding2D(nn.Module):
    """
    Rotary tables of a grid for the vision tower: the first half of a head turns with the row, the second with the
    column, each in the half-split layout.

    Args:
        dim (`int`): features per axis, half of the head dimension.
        max_h, max_w (`int`): rows and columns of the grid.
        base (`float`): longest period / 2 pi.
    """

    def __init__(self, dim: int, max_h: int, max_w: int, base: float = 10000.0):
        super().__init__()
        _validate_even(dim, "head_dim / 2")
        self.dim, self.max_h, self.max_w, self.base = dim, max_h, max_w, base
        for name in ("cos_h", "sin_h", "cos_w", "sin_w"):  # persistent: released files of such a tower carry them
            self.register_buffer(name, torch.empty(max_h * max_w, dim))
        if self.cos_h.device.type != "meta":
            for name, table in self.tables().items():
                getattr(self, name).copy_(table)

    def tables(self) -> dict[str, torch.Tensor]:
        rows = torch.arange(self.max_h, dtype=torch.float32).repeat_interleave(self.max_w)
        columns = torch.arange(self.max_w, dtype=torch.float32).repeat(self.max_h)
        return dict(zip(("cos_h", "sin_h", "cos_w", "sin_w"), self._turns(rows, columns)))

    def _turns(self, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(n,) float32 each -> cos_h, sin_h, cos_w, sin_w, each (n, dim)."""
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device=rows.device) / self.dim
        inv_freq = 1.0 / self.base**exponents
        angles_h, angles_w = ((axis[:, None] * inv_freq).repeat(1, 2) for axis in (rows, columns))
        return angles_h.cos(), angles_h.sin(), angles_w.cos(), angles_w.sin()

    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(n,) ids, or (n, 2) coordinates -> cos_h, sin_h, cos_w, sin_w, each (n, dim)."""
        if position_ids.is_floating_point():
            return self._turns(*position_ids.unbind(-1))
        return tuple(table[position_ids] for table in (self.cos_h, self.sin_h, self.cos_w, self.sin_w))


class BagelTextRotaryEmbedding(Qwen2RotaryEmbedding):
    """
    Rotary tables of the decoder for every `rope_type` of `BagelTextConfig.rope_parameters`.

    Frequencies are transformers' (`ROPE_INIT_FUNCTIONS`); added here are a partial `"default"`, three positions per
    token (`mrope_section`: each pair turns with one of time, height and width, interleaved), and lengths that are a
    sample's own. `"dynamic"` and `"longrope"` depend on how long the input is; here that is the last position of each
    sample, not of the batch, the pack or an earlier forward, so batched, packed and single runs agree. Keys in a cache
    stay turned as they were when they were read, as everywhere in transformers.

    transformers finds this class by the "RotaryEmbedding" in its name when it fills the tables of a loaded model.

    Args:
        config (`BagelTextConfig`): the decoder.
    """

    @staticmethod
    def compute_default_rope_parameters(config, device: torch.device | None = None, **kwargs):
        """-> (rotary_dim / 2,) radians per position, and what cosines and sines are multiplied by."""
        theta = config.rope_parameters["rope_theta"]
        return inverse_frequencies("linear", config.rotary_dim, theta, device, factor=1.0), 1.0

    @torch.no_grad()
    def forward(
        self, x: torch.Tensor, position_ids: torch.LongTensor, sample_ids: torch.LongTensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            x: says dtype and device.
            position_ids: (batch, length), or (batch, length, 3) time, height and width; the former is the same position
                on all three.
            sample_ids: (batch, length), -1 = padding; one sample per row if absent.

        Returns:
            cos and sin, each (batch, length, rotary_dim), for halves or adjacent pairs alike.
        """
        frequencies = self._frequencies(position_ids, sample_ids)
        if position_ids.ndim == 3:
            axes = multimodal_axes(self.config.mrope_section, frequencies.shape[-1], position_ids.device)
            positions = position_ids[..., axes]
        else:
            positions = position_ids[..., None]
        cos, sin = cos_sin(positions.float() * frequencies)
        return (cos * self.attention_scaling).to(x), (sin * self.attention_scaling).to(x)

    def _frequencies(self, position_ids: torch.LongTensor, sample_ids: torch.LongTensor | None) -> torch.Tensor:
        """(rotary_dim / 2,), or one row of them per token; float32."""
        device = position_ids.device
        frequencies = self.inv_freq.to(device, torch.float32)
        if self.rope_type == "dynamic":
            lengths = _sample_lengths(
                position_ids, sample_ids
            )  # one frequency per token: a tensor goes through as such
            return ROPE_INIT_FUNCTIONS["dynamic"](self.config, device, seq_len=lengths)[0]
        if self.rope_type == "longrope":
            known = self.config.rope_parameters["original_max_position_embeddings"]
            longer = ROPE_INIT_FUNCTIONS["longrope"](self.config, device, seq_len=known + 1)[0]
            return torch.where(_sample_lengths(position_ids, sample_ids) > known, longer, frequencies)
        return frequencies


def _sample_lengths(position_ids: torch.LongTensor, sample_ids: torch.LongTensor | None) -> torch.LongTensor:
    """(batch, length, 1): positions of the sample that each token belongs to."""
    last = position_ids if position_ids.ndim == 2 else position_ids.amax(-1)
    if sample_ids is None or last.shape[1] == 1:
        return last.amax(1)[:, None, None] + 1
    sample_ids = sample_ids.clamp(min=0)
    longest = last.new_zeros(len(last), int(sample_ids.max()) + 1).scatter_reduce(1, sample_ids, last, "amax")
    return longest.gather(1, sample_ids)[..., None] + 1
