# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The sampler draws with any model that has a `predict_velocity`: here with flows whose answer is known."""

import pytest
import torch

from bagel.flow_bagel import Branches, DrawingOptions, initial_noise, integrate


pytestmark = pytest.mark.core


class StraightFlow:
    """Every context is a target; the exact velocity of the straight path from noise to it."""

    def __init__(self):
        self.calls = []

    def predict_velocity(self, x_t, t, context):
        self.calls.append(context)
        return (x_t - context.target) / t


class Target:
    def __init__(self, value: float):
        self.target = torch.full((1, 4, 2), value)


def options(**changes) -> DrawingOptions:
    settings = {"num_timesteps": 6, "cfg_text_scale": 1.0, "progress_bar": False, "cfg_interval": (0.0, 1.0)}
    return DrawingOptions(**settings | changes)


NOISE = torch.randn(1, 4, 2, generator=torch.Generator().manual_seed(0))
ZERO, ONE, TWO = Target(0.0), Target(1.0), Target(2.0)


@pytest.mark.parametrize("num_timesteps", [2, 7, 50])
def test_a_straight_flow_ends_at_its_target_whatever_the_number_of_steps(num_timesteps):
    model = StraightFlow()
    x = integrate(model, Branches(ONE, ONE, ONE), NOISE, options(num_timesteps=num_timesteps))
    torch.testing.assert_close(x, ONE.target)
    assert len(model.calls) == num_timesteps - 1  # knots, as released


def test_guidance_goes_beyond_the_full_context_away_from_the_others():
    """Without renormalisation the guided flow is straight too: to text + s (full - text)."""
    guided = options(cfg_text_scale=2.0, cfg_img_scale=1.0, cfg_renorm_min=1.0)
    torch.testing.assert_close(integrate(StraightFlow(), Branches(ONE, ZERO, ONE), NOISE, guided), TWO.target)
    both = options(cfg_text_scale=2.0, cfg_img_scale=2.0, cfg_renorm_min=1.0)
    x = integrate(StraightFlow(), Branches(ONE, ZERO, ONE), NOISE, both)
    torch.testing.assert_close(x, torch.full_like(x, 3.0))  # 1 + 2 (2 - 1)


def test_equal_contexts_are_evaluated_once_and_neutral_weights_not_at_all():
    model = StraightFlow()
    integrate(model, Branches(ONE, ONE, ONE), NOISE, options(cfg_text_scale=4.0, cfg_img_scale=2.0))
    assert len(model.calls) == 5
    model = StraightFlow()
    integrate(model, Branches(ONE, ZERO, TWO), NOISE, options(cfg_text_scale=4.0, cfg_img_scale=1.0))
    assert model.calls.count(TWO) == 0 and model.calls.count(ZERO) == 5
    model = StraightFlow()
    integrate(model, Branches(ONE, ZERO, TWO), NOISE, options(cfg_text_scale=1.0, cfg_img_scale=1.0))
    assert model.calls == [ONE] * 5


def test_a_callback_sees_every_step_and_may_change_the_latents():
    seen = []

    def callback(model, step, t, state):
        seen.append((step, float(t)))
        return {"latents": torch.zeros_like(state["latents"])} if step == 4 else None

    x = integrate(StraightFlow(), Branches(ONE, ONE, ONE), NOISE, options(callback_on_step_end=callback))
    assert torch.equal(x, torch.zeros_like(x))
    assert [step for step, _ in seen] == list(range(5)) and seen[0][1] == 1.0


def test_noise_follows_the_generators_and_is_padded_to_the_largest():
    def noise(*shapes, **changes):
        return initial_noise(shapes, options(**changes))

    both = noise((4, 2), (2, 2), generator=[torch.Generator().manual_seed(n) for n in (0, 1)])
    assert both.shape == (2, 4, 2) and not both[1, 2:].any()
    assert torch.equal(both[1, :2], noise((2, 2), generator=torch.Generator().manual_seed(1))[0])
    with pytest.raises(ValueError, match="2 generators for 1 samples"):
        noise((4, 2), generator=[torch.Generator(), torch.Generator()])
    with pytest.raises(ValueError, match=r"shapes \[\(3, 2\)\], expected \[\(4, 2\)\]"):
        noise((4, 2), latents=torch.zeros(3, 2))
