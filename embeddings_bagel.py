# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Position and timestep features: grid tables, grid position ids, timestep MLP, 2-D rotary. Knows no tokens, no model.

Axes: a grid has rows (height) and columns (width); position id = row * side of the table + column.
"""

import numpy as np
import torch
from torch import nn


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


def grid_position_ids(rows: int, columns: int, table_side: int, interpolate: bool = False) -> torch.Tensor:
    """
    Position ids of a (rows, columns) grid in a table of `table_side ** 2` entries, row by row.

    Args:
        rows, columns (`int`): patches of the image.
        table_side (`int`): side of the position table.
        interpolate (`bool`): spread the grid over the whole table (released `interpolate_pos`) instead of taking its
            upper left corner. Bucket borders are float32, as released: float64 gives other ids for many sizes, and a
            full grid is not the identity for every `table_side`.

    Returns:
        (rows * columns,) int64.

    Raises:
        ValueError: the grid does not fit into the table (the released code silently wraps into the next row).
    """
    if interpolate:
        borders = torch.arange(1 / table_side, 1.0, 1 / table_side)
        row_ids, column_ids = (
            torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / n), borders, right=True) for n in (rows, columns)
        )
    else:
        if max(rows, columns) > table_side:
            raise ValueError(
                f"A grid of {rows}x{columns} patches does not fit the position table of {table_side}x{table_side}. "
                f"Resize the image to at most {table_side} patches per side or set interpolate_pos=True."
            )
        row_ids, column_ids = torch.arange(rows), torch.arange(columns)
    return (row_ids[:, None] * table_side + column_ids).flatten()


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

    def forward(self, position_ids: torch.LongTensor) -> torch.Tensor:
        """(n,) ids -> (n, hidden_size)."""
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
        inv_freq = 1.0 / self.base ** (torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim)
        rows = torch.arange(self.max_h, dtype=torch.float32).repeat_interleave(self.max_w)
        columns = torch.arange(self.max_w, dtype=torch.float32).repeat(self.max_h)
        angles_h, angles_w = ((axis[:, None] * inv_freq).repeat(1, 2) for axis in (rows, columns))
        return {"cos_h": angles_h.cos(), "sin_h": angles_h.sin(), "cos_w": angles_w.cos(), "sin_w": angles_w.sin()}

    def forward(self, position_ids: torch.LongTensor) -> tuple[torch.Tensor, ...]:
        """(n,) ids -> cos_h, sin_h, cos_w, sin_w, each (n, dim)."""
        return tuple(table[position_ids] for table in (self.cos_h, self.sin_h, self.cos_w, self.sin_w))
