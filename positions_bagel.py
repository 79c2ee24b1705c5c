# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The position embeddings of MaxText's `layers.embeddings` as modules on plain tensors; knows no model and no config.

A catalogue beside the model: BAGEL itself runs on `embeddings_bagel.py`, on which these modules stand, and no model
ships this file.

Axes: `inputs` (batch, sequence, heads, head_dim), `position` (batch, sequence) or (1, sequence), any number type.
"halves" and "adjacent" are the two layouts of rotary pairs, see `embeddings_bagel.py`.

No module stores a table: frequencies and angles are float32 and computed where they are used, so nothing is lost when a
model is built on the meta device or moved to another dtype. Only `Embed` and `Qwen3OmniMoeVisionPosEmbedInterpolate`
have a parameter. `cast_as_fprop_dtype=True`, the default of most modules, returns `fprop_dtype` (bfloat16 by default).
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from .embeddings_bagel import (
    cos_sin,
    halves_to_pairs,
    inverse_frequencies,
    llama_vision_angles,
    multimodal_axes,
    pairs_to_halves,
    qwen_vision_angles,
    rotate_halves,
    rotate_pairs,
)


# --------------------------------------------------------------------------------------------------------------------
# Shared by several embeddings


def interpolate_table(table: torch.Tensor, grid_thw: torch.Tensor, spatial_merge_size: int = 1) -> torch.Tensor:
    """
    Read a square position table at grids of any size: bilinear, corners on corners.

    Grid row r of H reads table row r (side - 1) / (H - 1), columns likewise; a single row or column reads the first.

    Args:
        table: (side * side, features), row by row.
        grid_thw: (pictures, 3) frames, rows and columns.
        spatial_merge_size (`int`): 1 = patches row by row; m = blocks of m x m, row by row inside and outside.

    Returns:
        (sum of frames * rows * columns, features) float32; every frame of a picture reads the same.
    """
    side = _side_of(table.shape[0])
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid_thw.long(), side, mode="bilinear", align_corners=True, spatial_merge_size=spatial_merge_size
    )
    indices, weights = indices.to(table.device), weights.to(table.device)
    return nn.functional.embedding_bag(indices, table.float(), per_sample_weights=weights, mode="sum")


class _FpropModule(nn.Module):
    """Casts results to `fprop_dtype` if asked to."""

    def __init__(self, cast_as_fprop_dtype: bool, fprop_dtype: torch.dtype):
        super().__init__()
        self.cast_as_fprop_dtype = cast_as_fprop_dtype
        self.fprop_dtype = fprop_dtype

    def _cast(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.fprop_dtype) if self.cast_as_fprop_dtype else x


# --------------------------------------------------------------------------------------------------------------------
# Tokens


def attend_on_embedding(query: torch.Tensor, embedding_table: torch.Tensor, attend_dtype: torch.dtype) -> torch.Tensor:
    """
    Inner product of every query with every row of a token table: logits with tied weights, `query @ table.T`.

    The table is rounded to bfloat16 first, whatever the dtypes are, the query is not, and sums are float32; so this is
    not a float32 `lm_head` (MaxText `attend_on_embedding`).

    Args:
        query: (..., features). embedding_table: (num_embeddings, features).
        attend_dtype: dtype of the result.

    Returns:
        (..., num_embeddings).

    Raises:
        ValueError: query and table differ in their features.
    """
    if query.shape[-1] != embedding_table.shape[-1]:
        raise ValueError(
            f"The query has {query.shape[-1]} features, the rows of the embedding table have "
            f"{embedding_table.shape[-1]}; they must be equal."
        )
    rounded = embedding_table.to(torch.bfloat16).float()
    return nn.functional.linear(query.float(), rounded).to(attend_dtype)


class Embed(nn.Module):
    """
    Token ids to rows of a learned table, and back to logits with [`~Embed.attend`] (MaxText `Embed`).

    `embedding` (num_embeddings, num_features) is the one parameter. Ids outside the table are an error, as everywhere
    in torch, where JAX would quietly read the first or last row.

    Args:
        num_embeddings, num_features (`int`): rows and columns of the table.
        cast_input_dtype (`torch.dtype`, *optional*): cast ids first; floats are truncated towards zero.
        dtype (`torch.dtype`, defaults to float32): dtype of what is looked up.
        attend_dtype (`torch.dtype`, *optional*): dtype of the logits; `dtype` if not given.
        embedding_init (*optional*): fills the table in place, like the functions of `torch.nn.init`; by default
            normal with standard deviation `num_features ** -0.5`.
    """

    def __init__(
        self,
        num_embeddings: int,
        num_features: int,
        cast_input_dtype: torch.dtype | None = None,
        dtype: torch.dtype = torch.float32,
        attend_dtype: torch.dtype | None = None,
        embedding_init: Callable[[torch.Tensor], object] | None = None,
    ):
        super().__init__()
        self.num_embeddings, self.num_features = num_embeddings, num_features
        self.cast_input_dtype, self.dtype, self.attend_dtype = cast_input_dtype, dtype, attend_dtype
        self.embedding_init = embedding_init
        self.embedding = nn.Parameter(torch.empty(num_embeddings, num_features))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.embedding_init is not None:
            self.embedding_init(self.embedding)
        else:
            nn.init.normal_(self.embedding, std=self.num_features**-0.5)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """
        Integer ids of any shape -> (..., num_features).

        Raises:
            ValueError: ids that are no integers and are not cast to such.
        """
        ids = inputs if self.cast_input_dtype is None else inputs.to(self.cast_input_dtype)
        if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
            raise ValueError(
                f"Input type must be an integer or unsigned integer, got {ids.dtype}; pass integer ids or "
                "cast_input_dtype=torch.int32."
            )
        return nn.functional.embedding(ids.long(), self.embedding).to(self.dtype)

    def attend(self, query: torch.Tensor) -> torch.Tensor:
        """(..., num_features) -> (..., num_embeddings); see [`attend_on_embedding`]."""
        return attend_on_embedding(query, self.embedding, self.attend_dtype or self.dtype)


# --------------------------------------------------------------------------------------------------------------------
# Rotary, one position per token


class RotaryEmbedding(_FpropModule):
    """
    Rotary embedding of whole heads, halves in and out (RoFormer, arXiv 2104.09864; MaxText `RotaryEmbedding`).

    At position p, pair i is rotated by `p / T_i`, with
    `T_i = factor * min_timescale * (max_timescale / min_timescale) ** (2i/D)`.
    Sines and cosines are rounded to the dtype of `inputs`, which is also the dtype of the product.

    Args:
        min_timescale, max_timescale (`float`): T of the first pair, and where T would arrive at i = D/2 (`rope_theta`
            for `min_timescale=1`).
        embedding_dims (`int`, defaults to 0): D, the head dimension; there is no useful default.
        cast_as_fprop_dtype (`bool`, defaults to `True`), fprop_dtype (defaults to bfloat16): dtype of the result.
        rope_linear_scaling_factor (`float`, defaults to 1.0): divides positions, for contexts that much longer.

    Raises:
        ValueError: an odd `embedding_dims`.
    """

    def __init__(
        self,
        min_timescale: float,
        max_timescale: float,
        embedding_dims: int = 0,
        cast_as_fprop_dtype: bool = True,
        fprop_dtype: torch.dtype = torch.bfloat16,
        rope_linear_scaling_factor: float = 1.0,
    ):
        super().__init__(cast_as_fprop_dtype, fprop_dtype)
        _validate_even(embedding_dims, "embedding_dims")
        _validate_positive(min_timescale=min_timescale, max_timescale=max_timescale)
        self.min_timescale, self.max_timescale = min_timescale, max_timescale
        self.embedding_dims = self.rotary_dim = embedding_dims
        self.rope_linear_scaling_factor = rope_linear_scaling_factor

    def inverse_frequencies(self, device: torch.device | None = None) -> torch.Tensor:
        """1 / T_i of the pairs that are rotated, float32."""
        return inverse_frequencies(
            "linear",
            self.rotary_dim,
            self.max_timescale / self.min_timescale,
            device,
            factor=self.min_timescale * self.rope_linear_scaling_factor,
        )

    @property
    def timescale(self) -> torch.Tensor:
        """(D/2,) positions per radian, T_i."""
        return 1.0 / self.inverse_frequencies()

    def compute_cos_sin(self, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, sequence) -> cos and sin (batch, sequence, rotated features), float32, halves."""
        return cos_sin(position[..., None].float() * self.inverse_frequencies(position.device))

    def apply_rotary(self, inputs: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`inputs * cos + rotate_half(inputs) * sin` for any tables, with rotate_half (a, b) -> (-b, a) of halves."""
        return rotate_halves(inputs, cos, sin)

    def forward(self, inputs: torch.Tensor, position: torch.Tensor | None = None) -> torch.Tensor:
        """
        (batch, sequence, heads, D) -> the same shape, rotated.

        Raises:
            ValueError: `position` is missing, or a rank or shape is not the above.
        """
        _validate_inputs(inputs, self.embedding_dims)
        position = _validate_position(position, inputs)
        return self._rotate(inputs, position)

    def _rotate(self, inputs: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        cos, sin = (table[:, :, None].to(inputs.dtype) for table in self.compute_cos_sin(position))
        return self._cast(self.apply_rotary(inputs, cos, sin))


class PartialRotaryEmbedding(RotaryEmbedding):
    """
    The first `r = int(embedding_dims * partial_rotary_factor)` features are rotated as a head of r, the others copied
    (GPT-NeoX, Qwen3-Next; MaxText `PartialRotaryEmbedding`).

    T_i as in [`RotaryEmbedding`] with D = r, halves inside the first r. The copied features keep their dtype, so that
    float32 inputs give a float32 result of which only the rotated part is rounded to `fprop_dtype`. Any head of at
    least r features is accepted; `embedding_dims` only decides r.

    Args:
        min_timescale, max_timescale, embedding_dims, cast_as_fprop_dtype, fprop_dtype: see [`RotaryEmbedding`].
        partial_rotary_factor (`float`, defaults to 0.25): 0 rotates nothing, 1 everything.

    Raises:
        ValueError: an odd r, or a factor outside [0, 1].
    """

    def __init__(
        self,
        min_timescale: float,
        max_timescale: float,
        embedding_dims: int = 0,
        cast_as_fprop_dtype: bool = True,
        fprop_dtype: torch.dtype = torch.bfloat16,
        partial_rotary_factor: float = 0.25,
    ):
        rotary_dim = _partial_dim(embedding_dims, partial_rotary_factor)
        super().__init__(min_timescale, max_timescale, rotary_dim, cast_as_fprop_dtype, fprop_dtype)
        self.embedding_dims = embedding_dims
        self.partial_rotary_factor = partial_rotary_factor

    def forward(self, inputs: torch.Tensor, position: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, sequence, heads, at least r) -> the same shape; errors as in [`RotaryEmbedding`]."""
        _validate_inputs(inputs)
        if inputs.shape[-1] < self.rotary_dim:
            raise ValueError(
                f"embedding_dims={self.embedding_dims} with partial_rotary_factor={self.partial_rotary_factor} rotates "
                f"{self.rotary_dim} features, but inputs have only {inputs.shape[-1]}."
            )
        position = _validate_position(position, inputs)
        rotated, rest = inputs[..., : self.rotary_dim], inputs[..., self.rotary_dim :]
        return torch.cat([self._rotate(rotated, position), rest], dim=-1)


class Gemma4PartialRotaryEmbedding(RotaryEmbedding):
    """
    Rotates the `k = int(embedding_dims * partial_rotary_factor) // 2` fastest pairs of the whole head and copies the
    slower ones ("proportional"; Gemma 4, MaxText `Gemma4PartialRotaryEmbedding`).

    T_i as in [`RotaryEmbedding`] with D the whole head for i < k, infinity (angle 0) above. Halves of the whole head,
    so the features read [rotated k, copied D/2 - k, rotated k, copied D/2 - k].

    Args:
        min_timescale, max_timescale, embedding_dims, cast_as_fprop_dtype, fprop_dtype: see [`RotaryEmbedding`].
        partial_rotary_factor (`float`, defaults to 0.25): 0 rotates nothing, 1 everything.

    Raises:
        ValueError: an odd `embedding_dims`, or a factor outside [0, 1].
    """

    def __init__(
        self,
        min_timescale: float,
        max_timescale: float,
        embedding_dims: int = 0,
        cast_as_fprop_dtype: bool = True,
        fprop_dtype: torch.dtype = torch.bfloat16,
        partial_rotary_factor: float = 0.25,
    ):
        super().__init__(min_timescale, max_timescale, embedding_dims, cast_as_fprop_dtype, fprop_dtype)
        self.partial_rotary_factor = partial_rotary_factor
        self.rotary_dim = _partial_dim(embedding_dims, partial_rotary_factor, even=False)

    def inverse_frequencies(self, device: torch.device | None = None) -> torch.Tensor:
        return inverse_frequencies(
            "proportional",
            self.embedding_dims,
            self.max_timescale / self.min_timescale,
            device,
            factor=self.min_timescale,
            partial_rotary_factor=self.partial_rotary_factor,
        )


class LLaMARotaryEmbedding(RotaryEmbedding):
    """
    Rotary embedding of adjacent pairs, adjacent in and out, with the frequencies of Llama 3.1 (arXiv 2407.21783;
    MaxText `LLaMARotaryEmbedding`).

    With f = 1 / T_i, wavelength w = 2 pi / f and `use_scale`, short waves (w < 2048) keep f, long ones (w > 8192) get
    f / 8, and between them `(1 - s) f / 8 + s f` with `s = (8192 / w - 1) / 3`: a context of 8192 becomes 8 times as
    long. Those constants cannot be changed here. The product is float32 whatever `inputs` are.

    Args:
        min_timescale, max_timescale, embedding_dims, cast_as_fprop_dtype, fprop_dtype: see [`RotaryEmbedding`].
        use_scale (`bool`, defaults to `True`): apply the rule above.

    Raises:
        ValueError: an odd `embedding_dims`.
    """

    FACTOR, LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR, ORIGINAL_LENGTH = 8.0, 1.0, 4.0, 8192

    def __init__(
        self,
        min_timescale: float,
        max_timescale: float,
        embedding_dims: int = 0,
        cast_as_fprop_dtype: bool = True,
        fprop_dtype: torch.dtype = torch.bfloat16,
        use_scale: bool = True,
    ):
        super().__init__(min_timescale, max_timescale, embedding_dims, cast_as_fprop_dtype, fprop_dtype)
        self.use_scale = use_scale

    def inverse_frequencies(self, device: torch.device | None = None) -> torch.Tensor:
        if not self.use_scale:
            return super().inverse_frequencies(device)
        # transformers starts at T_0 = 1: measured in units of min_timescale, the original length is that much shorter
        in_units = inverse_frequencies(
            "llama3",
            self.embedding_dims,
            self.max_timescale / self.min_timescale,
            device,
            factor=self.FACTOR,
            low_freq_factor=self.LOW_FREQ_FACTOR,
            high_freq_factor=self.HIGH_FREQ_FACTOR,
            original_max_position_embeddings=self.ORIGINAL_LENGTH / self.min_timescale,
        )
        return in_units / self.min_timescale

    @property
    def timescale(self) -> torch.Tensor:
        """(1, 1, 1, D) positions per radian, each twice."""
        return super().timescale.repeat_interleave(2)[None, None, None]

    def forward(self, inputs: torch.Tensor, position: torch.Tensor | None = None) -> torch.Tensor:
        """As [`RotaryEmbedding`]; without `position` the tokens are counted from 0."""
        _validate_inputs(inputs, self.embedding_dims)
        position = _count(inputs) if position is None else position
        position = _validate_position(position, inputs)
        cos, sin = (table[:, :, None] for table in self.compute_cos_sin(position))
        return self._cast(rotate_pairs(inputs.float(), cos, sin))


class YarnRotaryEmbedding(_FpropModule):
    """
    Rotary embedding for `rope_factor` times longer contexts: fast pairs stay, slow pairs are slowed down, those between
    are blended (YaRN, arXiv 2309.00071; DeepSeek-V3; MaxText `YarnRotaryEmbedding`).

    Pair `d(n) = D ln(original / (2 pi n)) / (2 ln theta)` makes n full rotations within the original length. With low =
    d(beta_fast), high = d(beta_slow), rounded outwards by `truncate` and kept within [0, D - 1], and ramp_i rising from
    0 at low to 1 at high: `f_i = theta ** (-2i/D) * ((1 - ramp_i) + ramp_i / rope_factor)`.

    Input: adjacent pairs (`interleave`) or halves. Output: always halves, also for adjacent input, which leaves
    attention scores as they are when queries and keys agree. `pairwise` (newer than the documentation) returns adjacent
    pairs. The product is float32 whatever `inputs` are. Positions are rows of a table (MaxText): fractions are cut off,
    those past its end read its last row, negative ones count from its end.

    Args:
        embedding_dims (`int`): D, the head dimension.
        max_position_embeddings (`int`, defaults to 16384): rows of the table, the longest sequence.
        original_max_position_embeddings (`int`, defaults to 4096): the length that the base frequencies were made for.
        beta_fast, beta_slow (`float`, default 32 and 1): full rotations within the original length between which
            frequencies are blended.
        rope_theta (`float`, defaults to 10000.0), rope_factor (`float`, defaults to 40).
        cast_as_fprop_dtype (`bool`, defaults to `True`), fprop_dtype (defaults to bfloat16): dtype of the result.
        interleave, truncate (`bool`, default `True`): see above.
        attention_scaling (`bool`, defaults to `False`): multiply the result by `0.1 ln(rope_factor) + 1`, if
            `rope_factor > 1`; not a factor itself.
        pairwise (`bool`, defaults to `False`): adjacent output; needs `interleave`.

    Raises:
        ValueError: an odd `embedding_dims`, `pairwise` without `interleave`, `rope_theta=1`, a length or beta that is
            not positive.
    """

    def __init__(
        self,
        embedding_dims: int,
        max_position_embeddings: int = 16384,
        original_max_position_embeddings: int = 4096,
        beta_fast: float = 32,
        beta_slow: float = 1,
        rope_theta: float = 10000.0,
        rope_factor: float = 40,
        cast_as_fprop_dtype: bool = True,
        fprop_dtype: torch.dtype = torch.bfloat16,
        interleave: bool = True,
        truncate: bool = True,
        attention_scaling: bool = False,
        pairwise: bool = False,
    ):
        super().__init__(cast_as_fprop_dtype, fprop_dtype)
        _validate_even(embedding_dims, "embedding_dims")
        if pairwise and not interleave:
            raise ValueError("pairwise=True requires interleave=True: adjacent pairs come out only if they went in.")
        if rope_theta <= 0 or rope_theta == 1:
            raise ValueError(f"rope_theta={rope_theta} must be positive and not 1: all pairs would get one angle.")
        _validate_positive(
            max_position_embeddings=max_position_embeddings,
            original_max_position_embeddings=original_max_position_embeddings,
            beta_fast=beta_fast,
            beta_slow=beta_slow,
            rope_factor=rope_factor,
        )
        self.embedding_dims = embedding_dims
        self.max_position_embeddings = max_position_embeddings
        self.original_max_position_embeddings = original_max_position_embeddings
        self.beta_fast, self.beta_slow = beta_fast, beta_slow
        self.rope_theta, self.rope_factor = rope_theta, rope_factor
        self.rope_interleave, self.rope_pairwise = interleave, pairwise
        self.rope_truncate, self.rope_attention_scaling = truncate, attention_scaling

    def inverse_frequencies(self, device: torch.device | None = None) -> torch.Tensor:
        """(D/2,) f_i, float32."""
        return inverse_frequencies(
            "yarn",
            self.embedding_dims,
            self.rope_theta,
            device,
            factor=self.rope_factor,
            original_max_position_embeddings=self.original_max_position_embeddings,
            beta_fast=self.beta_fast,
            beta_slow=self.beta_slow,
            truncate=self.rope_truncate,
        )

    @property
    def freqs_cis(self) -> torch.Tensor:
        """(max_position_embeddings, D/2) complex: `exp(i p f)`."""
        angles = torch.outer(torch.arange(self.max_position_embeddings).float(), self.inverse_frequencies())
        return torch.complex(angles.cos(), angles.sin())

    @property
    def output_scale(self) -> float:
        """What the result is multiplied by."""
        stretched = self.rope_attention_scaling and self.rope_factor > 1
        return 0.1 * math.log(self.rope_factor) + 1.0 if stretched else 1.0

    def compute_cos_sin(self, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, sequence) -> cos and sin (batch, sequence, D), float32, halves, not scaled."""
        rows = position.long()
        rows = torch.where(rows < 0, rows + self.max_position_embeddings, rows)
        rows = rows.clamp(0, self.max_position_embeddings - 1)
        return cos_sin(rows[..., None].float() * self.inverse_frequencies(position.device))

    def forward(self, inputs: torch.Tensor, position: torch.Tensor | None = None) -> torch.Tensor:
        """
        (batch, sequence, heads, D) -> the same shape, rotated; without `position` the tokens are counted from 0.

        Raises:
            ValueError: a rank or shape is not the above.
        """
        _validate_inputs(inputs, self.embedding_dims)
        position = _count(inputs) if position is None else position
        position = _validate_position(position, inputs)
        cos, sin = (table[:, :, None] for table in self.compute_cos_sin(position))
        x = pairs_to_halves(inputs.float()) if self.rope_interleave else inputs.float()
        x = rotate_halves(x, cos, sin) * self.output_scale
        return self._cast(halves_to_pairs(x) if self.rope_pairwise else x)


class PositionalEmbedding(_FpropModule):
    """
    Sines, then cosines of a position (Transformer, arXiv 1706.03762; MaxText `PositionalEmbedding`).

    `[sin(p inv_0) .. sin(p inv_n-1) | cos(p inv_0) .. cos(p inv_n-1)]` with n = embedding_dims // 2 and
    `inv_i = max_wavelength ** (-i / max(n - 1, 1))`: the last wavelength over 2 pi is `max_wavelength` itself. An odd
    `embedding_dims` gives one feature less.

    Args:
        embedding_dims (`int`): features.
        max_wavelength (`int`, defaults to 10000): slowest position per radian.
        cast_as_fprop_dtype (`bool`, defaults to `False`), fprop_dtype (defaults to bfloat16): dtype of the result,
            otherwise float32.
    """

    def __init__(
        self,
        embedding_dims: int,
        max_wavelength: float = 10000,
        cast_as_fprop_dtype: bool = False,
        fprop_dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(cast_as_fprop_dtype, fprop_dtype)
        self.embedding_dims = embedding_dims
        self.max_wavelength = max_wavelength

    def forward(self, seq_len: int, position: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            seq_len (`int`): positions 0 to seq_len - 1, on torch's default device; not read beside `position`.
            position (*optional*): (sequence,) for the whole batch, or (batch, sequence).

        Returns:
            (sequence, embedding_dims) or (batch, sequence, embedding_dims).

        Raises:
            ValueError: a `position` of another rank.
        """
        position = torch.arange(seq_len) if position is None else position
        if position.ndim not in (1, 2):
            raise ValueError(
                f"position has shape {tuple(position.shape)}, of rank {position.ndim}; pass rank 1, (sequence,), or "
                "rank 2, (batch, sequence)."
            )
        pairs = self.embedding_dims // 2
        rate = math.log(self.max_wavelength) / max(pairs - 1, 1)
        inverse = torch.exp(-rate * torch.arange(pairs, dtype=torch.float32, device=position.device))
        angles = position[..., None].float() * inverse
        return self._cast(torch.cat([angles.sin(), angles.cos()], dim=-1))


# --------------------------------------------------------------------------------------------------------------------
# Rotary, several positions per token


class Qwen3OmniMoeThinkerTextRotaryEmbedding(RotaryEmbedding):
    """
    Rotary embedding for text and pictures: each pair is rotated by one of three positions, time, height or
    width, interleaved (MRoPE; Qwen3-Omni, arXiv 2509.17765; MaxText `Qwen3OmniMoeThinkerTextRotaryEmbedding`).

    Pair j of D/2 belongs to height if `j % 3 == 1` and `j < 3 * mrope_section[1]`, to width if `j % 3 == 2` and
    `j < 3 * mrope_section[2]`, otherwise to time: THWTHW..., the slowest pairs T. Its angle is
    `position[axis] / T_j`, T_j as in [`RotaryEmbedding`]; halves. Text has three equal positions, which makes this a
    [`RotaryEmbedding`]. The product is float32 whatever `inputs` are.

    Three positions per token come as (3, batch, sequence), as documented; (batch, sequence, 3), which newer versions
    take, is understood where the shape of `inputs` allows only that.

    Args:
        min_timescale, max_timescale, embedding_dims, cast_as_fprop_dtype, fprop_dtype: see [`RotaryEmbedding`].
        mrope_section (*optional*, defaults to (24, 20, 20)): pairs of time, height and width, D/2 in all.
        attention_scaling (`float`, defaults to 1.0): multiplies cos and sin.
        partial_rotary_factor (`float`, defaults to 1.0; newer than the documentation): rotate the first
            `r = int(embedding_dims * factor)` features as a head of r and copy the others.

    Raises:
        ValueError: an odd or empty r, a factor outside (0, 1], or sections that are not three or do not sum to r / 2
            (newer than the documentation, where the first number was not even read).
    """

    DEFAULT_SECTION = (24, 20, 20)

    def __init__(
        self,
        min_timescale: float,
        max_timescale: float,
        embedding_dims: int = 0,
        cast_as_fprop_dtype: bool = True,
        fprop_dtype: torch.dtype = torch.bfloat16,
        mrope_section: tuple[int, int, int] | None = None,
        attention_scaling: float = 1.0,
        partial_rotary_factor: float = 1.0,
    ):
        rotary_dim = _partial_dim(embedding_dims, partial_rotary_factor)
        if rotary_dim == 0:
            raise ValueError(
                f"embedding_dims={embedding_dims} with partial_rotary_factor={partial_rotary_factor} leaves no feature "
                "to rotate; pass the head dimension and a factor in (0, 1]."
            )
        super().__init__(min_timescale, max_timescale, rotary_dim, cast_as_fprop_dtype, fprop_dtype)
        self.embedding_dims = embedding_dims
        self.partial_rotary_factor = partial_rotary_factor
        self.attention_scaling = attention_scaling
        self.mrope_section = self.DEFAULT_SECTION if mrope_section is None else (*mrope_section,)
        if len(self.mrope_section) != 3 or min(self.mrope_section) < 0 or 2 * sum(self.mrope_section) != rotary_dim:
            raise ValueError(
                f"mrope_section={self.mrope_section} must be three numbers of pairs (time, height, width) that sum to "
                f"{rotary_dim // 2}, half of the {rotary_dim} features that are rotated; pass such a mrope_section."
            )

    def compute_cos_sin(self, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, sequence) or (batch, sequence, 3) -> cos and sin (batch, sequence, r), float32, halves, scaled."""
        axes = multimodal_axes(self.mrope_section, self.rotary_dim // 2, position.device)
        position = position[..., axes] if position.ndim == 3 else position[..., None]
        cos, sin = cos_sin(position.float() * self.inverse_frequencies(position.device))
        return cos * self.attention_scaling, sin * self.attention_scaling

    def forward(self, inputs: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """
        Args:
            inputs: (batch, sequence, heads, D).
            position: (batch, sequence) for text, or three positions per token, see above.

        Raises:
            ValueError: a rank or shape is not the above.
        """
        _validate_inputs(inputs, self.embedding_dims)
        cos, sin = (table[:, :, None] for table in self.compute_cos_sin(_three_positions(position, inputs)))
        rotated, rest = inputs.float().split([self.rotary_dim, self.embedding_dims - self.rotary_dim], dim=-1)
        return self._cast(torch.cat([self.apply_rotary(rotated, cos, sin), rest], dim=-1))


class LlamaVisionRotaryEmbedding(_FpropModule):
    """
    Rotary embedding of a square grid of patches and a class token, adjacent pairs in and out (Llama 4 vision; MaxText
    `LlamaVisionRotaryEmbedding`).

    With g = image_size // patch_size, h the head dimension and `r_m = rope_theta ** (-4m / h)`, m < h / 4, the pairs of
    the patch in row y, column x have angles `[(x + 1) r | (y + 1) r]`: columns first, counted from 1. Patches go row by
    row; the class token comes last and is not rotated. The product is float32 whatever `inputs` are.

    Args:
        image_size, patch_size (`int`): pixels per side.
        hidden_size, num_attention_heads (`int`): their quotient is h, a multiple of 4.
        rope_theta (`float`, defaults to 10000.0): base of the frequencies.
        cast_as_fprop_dtype (`bool`, defaults to `True`), fprop_dtype (defaults to bfloat16): dtype of the result.

    Raises:
        ValueError: a head dimension that is no multiple of 4, or a patch larger than the image.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        hidden_size: int,
        num_attention_heads: int,
        rope_theta: float = 10000.0,
        cast_as_fprop_dtype: bool = True,
        fprop_dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(cast_as_fprop_dtype, fprop_dtype)
        if image_size < patch_size:
            raise ValueError(f"image_size={image_size} holds no patch of patch_size={patch_size}.")
        self.image_size, self.patch_size = image_size, patch_size
        self.hidden_size, self.num_attention_heads = hidden_size, num_attention_heads
        self.rope_theta = rope_theta
        self.head_dim = _vision_head_dim(hidden_size, num_attention_heads)
        self.grid_size = image_size // patch_size

    def angles(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Rows and columns of any one shape, from 0 -> (..., h/2) float32."""
        return llama_vision_angles(rows, columns, self.head_dim, self.rope_theta)

    def _grid_angles(self, device: torch.device | None = None) -> torch.Tensor:
        """(g * g + 1, h/2)."""
        patch = torch.arange(self.grid_size**2, device=device)
        return nn.functional.pad(self.angles(patch // self.grid_size, patch % self.grid_size), (0, 0, 0, 1))

    @property
    def freqs_cis(self) -> torch.Tensor:
        """(g * g + 1, 1, h/2) complex: `exp(i angle)`."""
        angles = self._grid_angles()[:, None]
        return torch.complex(angles.cos(), angles.sin())

    def forward(self, inputs: torch.Tensor, position: torch.Tensor | None = None) -> torch.Tensor:
        """
        (pictures, g * g + 1, heads, h) -> the same shape, rotated. `position` has no effect (MaxText): the
        index of a patch gives its row and column.

        Raises:
            ValueError: a rank or shape is not the above.
        """
        _validate_inputs(inputs, self.head_dim, "[batch_size_times_tiles, num_patches_incl_cls, num_heads, head_dim]")
        tokens = self.grid_size**2 + 1
        if inputs.shape[1] != tokens:
            raise ValueError(
                f"inputs have {inputs.shape[1]} tokens; image_size={self.image_size} in patches of {self.patch_size} "
                f"is {tokens - 1} and a class token, {tokens} in all."
            )
        cos, sin = (table[:, None] for table in cos_sin(self._grid_angles(inputs.device)))
        return self._cast(rotate_pairs(inputs.float(), cos, sin))


class Qwen3OmniMoeVisionRotaryEmbedding(_FpropModule):
    """
    Rotary embedding of the patches of a picture or video by row and column, halves (Qwen3-Omni, arXiv 2509.17765;
    MaxText `Qwen3OmniMoeVisionRotaryEmbedding`).

    With h the head dimension and `f_m = rope_theta ** (-4m / h)`, m < h / 4, the h/2 pairs of the patch in row y,
    column x (counted from 0) have angles `[y f | x f]`. Patches come in blocks of merge x merge, row by row inside and
    outside; frames follow one another and all get the same. Sines and cosines, not the result, are cast to
    `fprop_dtype`: the result has the wider dtype of them and `inputs`.

    Args:
        hidden_size, num_attention_heads (`int`): their quotient is h, a multiple of 4.
        spatial_merge_size (`int`): side of a block, in patches; 1 = patches row by row.
        rope_theta (`float`, defaults to 10000.0): base of the frequencies.
        cast_as_fprop_dtype (`bool`, defaults to `True`), fprop_dtype (defaults to bfloat16): dtype of the tables.

    Raises:
        ValueError: a head dimension that is no multiple of 4.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        spatial_merge_size: int,
        rope_theta: float = 10000.0,
        cast_as_fprop_dtype: bool = True,
        fprop_dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(cast_as_fprop_dtype, fprop_dtype)
        self.hidden_size, self.num_attention_heads = hidden_size, num_attention_heads
        self.spatial_merge_size = spatial_merge_size
        self.rope_theta = rope_theta
        self.head_dim = _vision_head_dim(hidden_size, num_attention_heads)

    def angles(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Rows and columns of any one shape, from 0 -> (..., h/2) float32."""
        return qwen_vision_angles(rows, columns, self.head_dim, self.rope_theta)

    def patch_positions(self, num_frames: int, height: int, width: int) -> torch.Tensor:
        """
        (num_frames * height * width, 2) row and column of each patch, in the order of the patches.

        Raises:
            ValueError: rows or columns that do not fill whole blocks.
        """
        size = (num_frames, height, width)
        return get_vision_position_ids(_grids([size], size, self.spatial_merge_size), self.spatial_merge_size)

    def compute_cos_sin(self, num_frames: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Tables of a grid of patches, on the CPU.

        Args:
            num_frames, height, width (`int`): frames, rows and columns.

        Returns:
            cos and sin, each (num_frames * height * width, h).

        Raises:
            ValueError: rows or columns that do not fill whole blocks.
        """
        return self._tables(self.patch_positions(num_frames, height, width))

    def _tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., 2) rows and columns -> cos and sin (..., h)."""
        cos, sin = cos_sin(self.angles(*positions.unbind(-1)))
        return self._cast(cos), self._cast(sin)

    def forward(
        self,
        inputs: torch.Tensor,
        num_frames: int,
        height: int,
        width: int,
        token_mask: torch.Tensor | None = None,
        valid_grid: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            inputs: (batch, num_frames * height * width, heads, h), or without the batch axis.
            num_frames, height, width (`int`): frames, rows and columns.
            valid_grid (*optional*, newer than the documentation): (batch, 3) the grids of a padded batch; each row
                holds its grid first, then padding, which is not rotated.
            token_mask (*optional*, newer than the documentation): (batch, tokens), `False` = not rotated.

        Returns:
            The shape of `inputs`, rotated.

        Raises:
            ValueError: a rank or shape is not the above, or a grid does not fill whole blocks.
        """
        size, tokens = (num_frames, height, width), num_frames * height * width
        if inputs.ndim not in (3, 4) or inputs.shape[-3] != tokens or inputs.shape[-1] != self.head_dim:
            raise ValueError(
                f"inputs have shape {tuple(inputs.shape)}; {num_frames} frames of {height} x {width} patches need "
                f"[batch, {tokens}, heads, {self.head_dim}], or that without batch."
            )
        if valid_grid is None:
            positions = self.patch_positions(*size)
        else:  # padding has row 0 and column 0, which rotate by nothing
            grids = _grids(valid_grid, size, self.spatial_merge_size)
            _validate_batch("valid_grid", len(grids), inputs)
            positions = get_vision_position_ids(grids, self.spatial_merge_size)
            positions = _pad_rows(positions.split(grids.prod(1).tolist()), tokens)
        cos, sin = (table.to(inputs.device)[..., None, :] for table in self._tables(positions))
        rotated = rotate_halves(inputs, cos, sin)
        if token_mask is None:
            return rotated
        _validate_mask("token_mask", token_mask, tokens)
        _validate_batch("token_mask", len(token_mask), inputs)
        return torch.where(token_mask.bool()[..., None, None], rotated, inputs)


# --------------------------------------------------------------------------------------------------------------------
# A learned grid


class Qwen3OmniMoeVisionPosEmbedInterpolate(_FpropModule):
    """
    A learned square table of positions, read bilinearly at a grid of any size (Qwen3-Omni, arXiv 2509.17765; MaxText
    `Qwen3OmniMoeVisionPosEmbedInterpolate`).

    Corners fall on corners, see [`interpolate_table`]. Patches come in blocks of merge x merge, row by row inside and
    outside, frames one after the other. `pos_embed` (num_position_embeddings, hidden_size) is the one parameter.

    Args:
        num_position_embeddings (`int`): entries of the table, a square number.
        hidden_size (`int`): features.
        spatial_merge_size (`int`): side of a block, in patches; 1 = patches row by row.
        dtype (`torch.dtype`, defaults to float32): of the parameter.
        cast_as_fprop_dtype (`bool`, defaults to `True`), fprop_dtype (defaults to bfloat16): dtype of the result,
            otherwise float32.

    Raises:
        ValueError: `num_position_embeddings` is no square number.
    """

    def __init__(
        self,
        num_position_embeddings: int,
        hidden_size: int,
        spatial_merge_size: int,
        dtype: torch.dtype = torch.float32,
        cast_as_fprop_dtype: bool = True,
        fprop_dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(cast_as_fprop_dtype, fprop_dtype)
        _side_of(num_position_embeddings)
        self.num_position_embeddings, self.hidden_size = num_position_embeddings, hidden_size
        self.spatial_merge_size = spatial_merge_size
        self.dtype = dtype
        self.pos_embed = nn.Parameter(torch.empty(num_position_embeddings, hidden_size, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation `hidden_size ** -0.5`."""
        nn.init.normal_(self.pos_embed, std=self.hidden_size**-0.5)

    def forward(
        self,
        num_frames: int,
        height: int,
        width: int,
        video_grid_thw: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            num_frames, height, width (`int`): frames, rows and columns of patches.
            video_grid_thw (*optional*, newer than the documentation): (batch, 3) the grids of a padded batch; each row
                of the result holds its grid first, then zeros.
            attention_mask (*optional*, newer than the documentation): (batch, num_frames * height * width), 0 = zeros.

        Returns:
            (num_frames * height * width, hidden_size); with one of the last two arguments a batch axis before it.

        Raises:
            ValueError: a shape is not the above, or a grid does not fill whole blocks.
        """
        size, tokens = (num_frames, height, width), num_frames * height * width
        grids = _grids([size] if video_grid_thw is None else video_grid_thw, size, self.spatial_merge_size)
        read = interpolate_table(self.pos_embed, grids, self.spatial_merge_size)
        if video_grid_thw is not None or attention_mask is not None:
            read = _pad_rows(read.split(grids.prod(1).tolist()), tokens)  # (batch, tokens, hidden_size)
        if attention_mask is not None:
            _validate_mask("attention_mask", attention_mask, tokens, None if video_grid_thw is None else len(grids))
            read = read * attention_mask.bool()[..., None]
        return self._cast(read)


# --------------------------------------------------------------------------------------------------------------------
# Shapes


def _count(inputs: torch.Tensor) -> torch.Tensor:
    """(1, sequence) positions 0, 1, 2, ..."""
    return torch.arange(inputs.shape[1], device=inputs.device)[None]


def _three_positions(position: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Any of the three forms -> (batch or 1, sequence) or (batch or 1, sequence, 3)."""
    batch, sequence = inputs.shape[:2]
    shape, rows = tuple(position.shape), ((batch, sequence), (1, sequence))
    if len(shape) == 3 and shape[0] == 3 and shape[1:] in rows:
        return position.movedim(0, -1)
    if shape in rows or (len(shape) == 3 and shape[2] == 3 and shape[:2] in rows):
        return position
    raise ValueError(
        f"position has shape {shape}; inputs of {batch} x {sequence} tokens need ({batch}, {sequence}) or three "
        f"positions per token, (3, {batch}, {sequence})."
    )


def _pad_rows(rows: tuple[torch.Tensor, ...], length: int) -> torch.Tensor:
    """(n_i, ...) each -> (rows, length, ...), zeros after each."""
    return torch.stack([nn.functional.pad(row, (0, 0) * (row.ndim - 1) + (0, length - len(row))) for row in rows])


def _grids(grids: torch.Tensor | list, largest: tuple[int, int, int], merge: int) -> torch.Tensor:
    """Check grids (pictures, 3): whole blocks, no more patches than the largest; -> int64 on the CPU."""
    grids = torch.as_tensor(grids, device="cpu").long()
    if grids.ndim != 2 or grids.shape[1] != 3:
        raise ValueError(f"Grids have shape {tuple(grids.shape)}; (batch, 3) is needed: frames, rows, columns.")
    for frames, rows, columns in grids.tolist():
        if min(frames, rows, columns) < 1 or rows % merge or columns % merge:
            raise ValueError(
                f"A grid of {frames} x {rows} x {columns} (frames, rows, columns) does not fill whole blocks of "
                f"{merge} x {merge} patches; rows and columns must be positive multiples of {merge}."
            )
        if frames * rows * columns > math.prod(largest):
            raise ValueError(
                f"A grid of {frames} x {rows} x {columns} has {frames * rows * columns} patches, more than the "
                f"{math.prod(largest)} of num_frames, height, width = {largest}."
            )
    return grids


def _side_of(entries: int) -> int:
    side = math.isqrt(entries)
    if side * side != entries:
        raise ValueError(
            f"A position table of {entries} entries is not square; {side**2} and {(side + 1) ** 2} are the nearest."
        )
    return side


def _partial_dim(embedding_dims: int, factor: float, even: bool = True) -> int:
    """How many features are rotated."""
    if not 0 <= factor <= 1:
        raise ValueError(
            f"partial_rotary_factor={factor} must be in [0, 1]: of embedding_dims={embedding_dims} features "
            f"{int(embedding_dims * factor)} cannot be rotated."
        )
    rotary_dim = int(embedding_dims * factor)
    if even and rotary_dim % 2:
        raise ValueError(
            f"embedding_dims={embedding_dims} with partial_rotary_factor={factor} rotates {rotary_dim} features, which "
            f"must be a multiple of 2: {rotary_dim - 1} or {rotary_dim + 1}."
        )
    return rotary_dim


def _vision_head_dim(hidden_size: int, num_attention_heads: int) -> int:
    head_dim = hidden_size // num_attention_heads
    if head_dim <= 0 or head_dim % 4:
        raise ValueError(
            f"hidden_size={hidden_size} in num_attention_heads={num_attention_heads} is a head of {head_dim} features, "
            "which must be a positive multiple of 4: pairs for rows and as many for columns."
        )
    return head_dim


def _validate_even(value: int, name: str) -> None:
    if value % 2:
        raise ValueError(
            f"{name}={value} must be a multiple of 2, features are rotated in pairs: {value - 1} or {value + 1}."
        )


def _validate_positive(**values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name}={value} must be positive.")


def _validate_inputs(
    inputs: torch.Tensor, features: int | None = None, axes: str = "[batch, sequence, heads, head_dim]"
) -> None:
    if inputs.ndim != 4:
        raise ValueError(
            f"inputs have shape {tuple(inputs.shape)}, of rank {inputs.ndim}; pass a rank 4 tensor {axes}."
        )
    if features is not None and inputs.shape[3] != features:
        raise ValueError(
            f"inputs have heads of {inputs.shape[3]} features, the embedding was made for {features}; they must match "
            "(embedding_dims, or hidden_size / num_attention_heads)."
        )


def _validate_position(position: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
    """The position itself, if there is one and it fits the inputs."""
    batch, sequence = inputs.shape[:2]
    if position is None:
        raise ValueError(f"position is missing; pass ({batch}, {sequence}) or (1, {sequence}).")
    if tuple(position.shape) not in ((batch, sequence), (1, sequence)):
        raise ValueError(
            f"position has shape {tuple(position.shape)}; inputs of {batch} x {sequence} tokens need "
            f"({batch}, {sequence}) or (1, {sequence})."
        )
    return position


def _validate_batch(name: str, batch: int, inputs: torch.Tensor) -> None:
    if inputs.ndim != 4 or inputs.shape[0] != batch:
        raise ValueError(
            f"{name} describes a batch of {batch}, but inputs have shape {tuple(inputs.shape)}; pass "
            "[batch, tokens, heads, head_dim]."
        )


def _validate_mask(name: str, mask: torch.Tensor, tokens: int, batch: int | None = None) -> None:
    if mask.ndim != 2 or mask.shape[1] != tokens or batch not in (None, mask.shape[0]):
        raise ValueError(f"{name} has shape {tuple(mask.shape)}; ({batch or 'batch'}, {tokens}) is needed.")


__all__ = [
    "Embed",
    "Gemma4PartialRotaryEmbedding",
    "LLaMARotaryEmbedding",
    "LlamaVisionRotaryEmbedding",
    "PartialRotaryEmbedding",
    "PositionalEmbedding",
    "Qwen3OmniMoeThinkerTextRotaryEmbedding",
    "Qwen3OmniMoeVisionPosEmbedInterpolate",
    "Qwen3OmniMoeVisionRotaryEmbedding",
    "RotaryEmbedding",
    "YarnRotaryEmbedding",
    "attend_on_embedding",
    "interpolate_table",
]
