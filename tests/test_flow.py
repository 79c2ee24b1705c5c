# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The flow as mathematics: known values, an equation with a known answer, guidance against plain loops."""

import math
from itertools import pairwise

import pytest
import torch

from bagel.flow_bagel import (
    RENORM_TYPES,
    guide,
    guided_steps,
    interpolate,
    patchify_latents,
    shift_timesteps,
    timestep_grid,
    training_timesteps,
    unpatchify_latents,
    velocity_target,
)


pytestmark = pytest.mark.core


def randn(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- timesteps


@pytest.mark.parametrize(
    ("t", "shift", "expected"),
    [(0.5, 3.0, 0.75), (0.25, 3.0, 0.5), (0.5, 1.0, 0.5), (0.5, 0.5, 1 / 3), (0.9, 4.0, 36 / 37)],
)
def test_shift_has_known_values(t, shift, expected):
    assert shift_timesteps(torch.tensor(t), shift).item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("shift", [0.2, 1.0, 3.0])
def test_shift_keeps_both_ends_and_the_order(shift):
    t = shift_timesteps(torch.linspace(0, 1, 50), shift)
    assert (t[0].item(), t[-1].item()) == (0.0, pytest.approx(1.0, abs=2e-7))
    assert bool((t.diff() > 0).all())


def test_shifts_follow_one_another_by_multiplication():
    t = torch.rand(20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(shift_timesteps(shift_timesteps(t, 3.0), 2.0), shift_timesteps(t, 6.0))


def test_grid_has_known_values():
    assert timestep_grid(5, 1.0).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    torch.testing.assert_close(timestep_grid(5, 3.0), torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))
    assert timestep_grid(50, 3.0).shape == (50,)
    assert timestep_grid(50, 3.0).dtype == torch.float32


@pytest.mark.parametrize("num_timesteps", [1, 0])
def test_grid_without_a_step_is_refused(num_timesteps):
    with pytest.raises(ValueError, match=f"num_timesteps={num_timesteps} "):
        timestep_grid(num_timesteps, 3.0)


def test_training_timesteps_are_sigmoids_and_minus_infinity_is_clean():
    draws = torch.tensor([-math.inf, 0.0, math.log(3)])
    torch.testing.assert_close(training_timesteps(draws, 1.0), torch.tensor([0.0, 0.5, 0.75]))
    torch.testing.assert_close(training_timesteps(draws, 3.0), torch.tensor([0.0, 0.75, 0.9]))
    assert training_timesteps(draws, 3.0)[0].item() == 0.0


# ---- which steps are guided


@pytest.mark.parametrize(
    ("t", "interval", "guided"),
    [
        ([1.0, 0.8, 0.5, 0.4, 0.39], (0.4, 1.0), [True, True, True, False, False]),  # lo is outside, hi inside
        ([0.8], (0.0, 0.8), [True]),  # float32 0.8 > float64 0.8, and still inside
        ([0.4], (0.4, 1.0), [False]),  # the same at the other end
        ([1.0, 0.5, 0.0], (0.0, 1.0), [True, True, False]),
        ([1.0, 0.5], (1.0, 1.0), [False, False]),
    ],
)
def test_guided_interval_is_open_below_and_closed_above(t, interval, guided):
    assert guided_steps(torch.tensor(t), interval) == guided


def test_float32_is_what_makes_the_borders_exact():
    assert torch.tensor(0.8).item() > 0.8
    assert torch.tensor(0.4).item() > 0.4


def test_knot_that_rounds_above_one_is_not_guided():
    for shift in (0.2, 0.4):
        grid = timestep_grid(50, shift)
        assert grid[0].item() == 1.0000001192092896
        assert guided_steps(grid, (0.0, 1.0))[:2] == [False, True]
    assert guided_steps(timestep_grid(50, 3.0), (0.0, 1.0))[0]


# ---- direction and sign


def test_path_goes_from_picture_to_noise():
    clean, noise, t = randn(3, 4, seed=1), randn(3, 4, seed=2), torch.tensor([[0.0], [0.25], [1.0]])
    x_t = interpolate(clean, noise, t)
    assert torch.equal(x_t[0], clean[0])
    assert torch.equal(x_t[2], noise[2])
    torch.testing.assert_close(x_t[1], 0.75 * clean[1] + 0.25 * noise[1])


def test_velocity_is_the_slope_of_the_path():
    clean, noise = randn(5, seed=1).double(), randn(5, seed=2).double()
    x = [interpolate(clean, noise, torch.tensor(t, dtype=torch.float64)) for t in (0.3, 0.3 + 1e-6)]
    torch.testing.assert_close((x[1] - x[0]) / 1e-6, velocity_target(clean, noise), atol=1e-6, rtol=0)
    assert torch.equal(velocity_target(clean, noise), noise - clean)


def euler(velocity, x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """The sampler: from noise down the grid to the picture."""
    for t, dt in zip(grid[:-1], -grid.diff()):
        x = x - velocity(x, t) * dt
    return x


def gaussian_velocity(mean: float, std: float):
    """The best velocity for pictures drawn from a Gaussian: E[noise - clean | x_t = x], in closed form."""

    def velocity(x, t):
        variance = (1 - t) ** 2 * std**2 + t**2
        centred = x - (1 - t) * mean
        return t / variance * centred - (mean + (1 - t) * std**2 / variance * centred)

    return velocity


def test_closed_form_is_the_regression_of_the_velocity_target():
    """The equation below solves what training fits: checked by least squares on drawn pairs."""
    clean, noise = 2.0 + 0.5 * randn(400_000, seed=1).double(), randn(400_000, seed=2).double()
    for t in (0.2, 0.7):
        x = interpolate(clean, noise, torch.tensor(t, dtype=torch.float64))
        design = torch.stack([torch.ones_like(x), x], dim=1)
        fitted = torch.linalg.lstsq(design, velocity_target(clean, noise)[:, None]).solution
        at_zero, at_one = gaussian_velocity(2.0, 0.5)(torch.tensor([0.0, 1.0], dtype=torch.float64), t).tolist()
        assert [at_zero, at_one - at_zero] == pytest.approx(fitted.flatten().tolist(), abs=0.02)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_reaches_the_known_answer_at_first_order(shift):
    noise, mean, std = randn(64, seed=3).double(), 2.0, 0.5
    errors = []
    for steps in (50, 100, 200, 400):
        grid = timestep_grid(steps + 1, shift).double()
        picture = euler(gaussian_velocity(mean, std), noise, grid)
        errors.append((picture - (mean + std * noise)).abs().max().item())
    assert errors[-1] < 0.01
    ratios = [coarse / fine for coarse, fine in pairwise(errors)]
    assert all(1.8 < ratio < 2.2 for ratio in ratios), ratios


def test_euler_is_exact_on_a_straight_path():
    clean, noise = randn(6, seed=1).double(), randn(6, seed=2).double()
    picture = euler(lambda x, t: velocity_target(clean, noise), noise, timestep_grid(4, 3.0).double())
    torch.testing.assert_close(picture, clean, atol=1e-7, rtol=0)


# ---- guidance


def plain_guide(cond, text, image, text_scale, image_scale, renorm_type, renorm_min):
    """One sample (tokens, features) by loops over numbers."""

    def norm(numbers):
        return math.sqrt(sum(number * number for number in numbers))

    def factor(numbers, reference):
        return min(max(norm(reference) / (norm(numbers) + 1e-8), renorm_min), 1.0)

    cond = cond.tolist()
    out = [[u + text_scale * (c - u) for c, u in zip(*rows)] for rows in zip(cond, text.tolist())]
    if renorm_type == "text_channel":
        out = [[value * factor(row, reference) for value in row] for row, reference in zip(out, cond)]
    if image is not None:
        out = [[u + image_scale * (g - u) for g, u in zip(*rows)] for rows in zip(out, image.tolist())]
    if renorm_type == "channel":
        out = [[value * factor(row, reference) for value in row] for row, reference in zip(out, cond)]
    if renorm_type == "global":
        whole = factor([value for row in out for value in row], [value for row in cond for value in row])
        out = [[value * whole for value in row] for row in out]
    return torch.tensor(out)


@pytest.mark.parametrize("renorm_min", [0.0, 0.6])
@pytest.mark.parametrize("with_image", [True, False])
@pytest.mark.parametrize("renorm_type", RENORM_TYPES)
def test_guidance_is_the_plain_loop_per_sample(renorm_type, with_image, renorm_min):
    cond, text, image = (scale * randn(3, 5, 4, seed=seed) for seed, scale in ((1, 1.0), (2, 2.0), (3, 0.5)))
    image = image if with_image else None
    out = guide(cond, text, image, 4.0, 1.5, renorm_type, renorm_min)
    for sample in range(3):
        alone = None if image is None else image[sample]
        expected = plain_guide(cond[sample], text[sample], alone, 4.0, 1.5, renorm_type, renorm_min)
        torch.testing.assert_close(out[sample], expected, atol=1e-5, rtol=1e-5)


def test_renorms_differ():
    """The parametrised test above can tell them apart."""
    v = [randn(1, 5, 4, seed=seed) for seed in (1, 2, 3)]
    outs = [guide(*v, 4.0, 1.5, renorm_type) for renorm_type in RENORM_TYPES]
    for left, right in ((0, 1), (0, 2), (1, 2)):
        assert (outs[left] - outs[right]).abs().max() > 0.1


@pytest.mark.parametrize("renorm_type", RENORM_TYPES)
def test_neutral_scales_are_the_identity(renorm_type):
    cond, text, image = (randn(2, 5, 4, seed=seed) for seed in (1, 2, 3))
    torch.testing.assert_close(guide(cond, text, image, 1.0, 1.0, renorm_type), cond)
    torch.testing.assert_close(guide(cond, text, None, 1.0, 7.0, renorm_type), cond)
    assert guide(cond, None, image, 4.0, 2.0, renorm_type) is cond


@pytest.mark.parametrize("renorm_type", RENORM_TYPES)
def test_guidance_towards_the_same_velocity_changes_nothing(renorm_type):
    cond = randn(2, 5, 4)
    torch.testing.assert_close(guide(cond, cond, cond, 4.0, 2.0, renorm_type), cond)


def test_renorm_never_lengthens():
    cond, text = randn(4, 5, 4, seed=1), randn(4, 5, 4, seed=2)
    for renorm_type, dims in (("global", (1, 2)), ("channel", (2,))):
        for scale in (0.5, 4.0):  # half guidance is shorter than cond, and stays so
            out, raw = guide(cond, text, None, scale, 1.0, renorm_type), text + scale * (cond - text)
            norms = [torch.linalg.vector_norm(v, dim=dims) for v in (out, cond, raw)]
            assert bool((norms[0] <= torch.minimum(norms[1], norms[2]) * (1 + 1e-5)).all())


def test_renorm_min_one_switches_renormalisation_off():
    cond, text = randn(2, 5, 4, seed=1), randn(2, 5, 4, seed=2)
    for renorm_type in RENORM_TYPES:
        out = guide(cond, text, None, 4.0, 1.0, renorm_type, renorm_min=1.0)
        torch.testing.assert_close(out, text + 4.0 * (cond - text))


def test_zero_velocities_stay_finite():
    zero = torch.zeros(1, 3, 4)
    for renorm_type in RENORM_TYPES:
        assert torch.equal(guide(zero, zero, zero, 4.0, 1.5, renorm_type), zero)


@pytest.mark.parametrize("renorm_type", RENORM_TYPES)
def test_batched_guidance_is_one_by_one_whatever_the_padding_holds(renorm_type):
    lengths = [5, 2, 4]
    valid = torch.arange(5)[None] < torch.tensor(lengths)[:, None]
    v = [randn(3, 5, 4, seed=seed) for seed in (1, 2, 3)]
    outs = []
    for filler in (0.0, 1e3):
        padded = [x.masked_fill(~valid[..., None], filler) for x in v]
        outs.append(guide(*padded, 4.0, 1.5, renorm_type, 0.0, valid))
    for sample, length in enumerate(lengths):
        alone = guide(*(x[sample : sample + 1, :length] for x in v), 4.0, 1.5, renorm_type)[0]
        for out in outs:
            torch.testing.assert_close(out[sample, :length], alone)


# ---- latents and tokens


@pytest.mark.parametrize(("channels", "h", "w", "patch"), [(4, 3, 5, 2), (1, 1, 1, 1), (16, 2, 2, 2), (2, 4, 1, 3)])
def test_patchify_and_unpatchify_are_inverse(channels, h, w, patch):
    latents = randn(channels, h * patch, w * patch)
    tokens = patchify_latents(latents, patch)
    assert tokens.shape == (h * w, patch * patch * channels)
    assert torch.equal(unpatchify_latents(tokens, (h, w), patch), latents)


def test_token_order_is_rows_and_feature_order_is_row_column_channel():
    channels, h, w, patch = 3, 2, 4, 2
    latents = randn(channels, h * patch, w * patch)
    tokens = patchify_latents(latents, patch)
    for row in range(h):
        for column in range(w):
            for p in range(patch):
                for q in range(patch):
                    for channel in range(channels):
                        value = latents[channel, row * patch + p, column * patch + q]
                        assert tokens[row * w + column, (p * patch + q) * channels + channel] == value


def test_latents_that_are_no_whole_number_of_tokens_are_not_patchified():
    with pytest.raises(RuntimeError):
        patchify_latents(randn(4, 5, 4), 2)
