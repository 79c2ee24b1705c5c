# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The flow between noise and picture as pure functions of tensors; knows no model, no tokens, no scheduler.

t = 1 is noise, t = 0 is the picture. The velocity points from picture to noise, v = dx/dt = noise - picture, so an
integration step towards the picture subtracts: x <- x - v * dt.

Axes of the guidance functions: (samples, latent tokens, features).
"""

from typing import Literal

import torch


RenormType = Literal["global", "channel", "text_channel"]
RENORM_TYPES = ("global", "channel", "text_channel")


def shift_timesteps(t: torch.Tensor, shift: float) -> torch.Tensor:
    """Move timesteps towards noise (`shift` > 1): s * t / (1 + (s - 1) * t)."""
    return shift * t / (1 + (shift - 1) * t)


def timestep_grid(num_timesteps: int, shift: float) -> torch.Tensor:
    """
    The knots of the released sampler, (num_timesteps,) float32 from 1 down to 0.

    `num_timesteps` counts KNOTS: the network runs `num_timesteps - 1` times (49 times for the released 50).
    """
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps={num_timesteps} gives no step; it counts the knots, so use at least 2.")
    return shift_timesteps(torch.linspace(1, 0, num_timesteps), shift)


def training_timesteps(packed_timesteps: torch.Tensor, shift: float) -> torch.Tensor:
    """Pre-sigmoid draws (minus infinity = clean) -> shifted timesteps in [0, 1]."""
    return shift_timesteps(torch.sigmoid(packed_timesteps), shift)


def interpolate(clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t on the straight path from `clean` (t = 0) to `noise` (t = 1)."""
    return (1 - t) * clean + t * noise


def velocity_target(clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return noise - clean


def guided_steps(t: torch.Tensor, interval: tuple[float, float]) -> list[bool]:
    """
    Which steps are guided: lo < t <= hi, compared in float32 as released (0.8 <= 0.8 holds; a knot that rounds to
    1.0000001 lies outside (0, 1]).
    """
    lo, hi = interval
    return ((t > lo) & (t <= hi)).tolist()


def guide(
    v_cond: torch.Tensor,
    v_text: torch.Tensor | None,
    v_image: torch.Tensor | None,
    text_scale: float,
    image_scale: float,
    renorm_type: RenormType = "global",
    renorm_min: float = 0.0,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Classifier-free guidance over text and over pictures, with the released renormalisation.

    Args:
        v_cond: velocity under the whole context, (samples, tokens, features).
        v_text: velocity without the last text; `None` = no guidance at all.
        v_image: velocity without pictures; `None` = no picture guidance.
        text_scale, image_scale (`float`): weights; 1 is neutral.
        renorm_type: the length of the guided velocity is brought back to at most that of `v_cond`:
            `"global"` over a whole sample, `"channel"` per token, `"text_channel"` per token and before picture
            guidance is added (which then is not renormalised).
        renorm_min (`float`): smallest factor.
        valid: (samples, tokens) bool, `False` for padding, which has no say in a sample's norm, whatever it holds.

    Returns:
        The guided velocity. Difference to the released code: `"global"` takes its norm per sample, not over the batch.
    """
    if v_text is None:
        return v_cond
    guided = v_text + text_scale * (v_cond - v_text)
    if renorm_type == "text_channel":
        guided = _renorm(guided, v_cond, (-1,), renorm_min)
    if v_image is not None:
        guided = v_image + image_scale * (guided - v_image)
    if renorm_type == "channel":
        guided = _renorm(guided, v_cond, (-1,), renorm_min)
    elif renorm_type == "global":
        guided = _renorm(guided, v_cond, (-2, -1), renorm_min, valid)
    return guided


def _renorm(
    v: torch.Tensor, reference: torch.Tensor, dims: tuple[int, ...], minimum: float, valid: torch.Tensor | None = None
) -> torch.Tensor:
    counted = [x if valid is None else x * valid[..., None] for x in (reference, v)]
    norm_reference, norm_v = (torch.linalg.vector_norm(x, dim=dims, keepdim=True) for x in counted)
    return v * (norm_reference / (norm_v + 1e-8)).clamp(min=minimum, max=1.0)


def patchify_latents(latents: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(channels, h * p, w * p) -> (h * w, p * p * channels): tokens row by row, features (row, column, channel)."""
    grid = latents.unflatten(2, (-1, patch_size)).unflatten(1, (-1, patch_size))  # (c, h, p, w, q)
    return grid.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)


def unpatchify_latents(tokens: torch.Tensor, grid: tuple[int, int], patch_size: int) -> torch.Tensor:
    """The inverse of [`patchify_latents`]; `grid` is (h, w) in tokens."""
    h, w = grid
    cells = tokens.unflatten(1, (patch_size, patch_size, -1)).unflatten(0, (h, w))  # (h, w, p, q, c)
    return cells.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)
