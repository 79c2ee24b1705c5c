# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Training packs against the released forward and backward pass: every output, loss and gradient that is stored."""

import pytest
import torch
from parity_data import Case, Replay, assert_close, cases

from bagel.flow_bagel import training_timesteps, unpatchify_latents
from bagel.layout_bagel import PackedLayout


TRAINING = cases("train_forward")
# What `forward` takes under the released names; `sample_lens` and the splits are lists in the facts.
INPUTS = (
    "packed_text_ids",
    "packed_text_indexes",
    "packed_position_ids",
    "packed_vit_tokens",
    "packed_vit_token_indexes",
    "packed_vit_position_ids",
    "vit_token_seqlens",
    "padded_latent",
    "patchified_vae_latent_shapes",
    "packed_latent_position_ids",
    "packed_vae_token_indexes",
    "packed_timesteps",
    "mse_loss_indexes",
    "ce_loss_indexes",
    "ce_loss_weights",
    "packed_label_ids",
    "noise",
)


def training_model(case: Case, attn_implementation: str = "sdpa"):
    facts = case.facts
    model = case.parity.model(
        attn_implementation,
        visual_und=facts["visual_und"],
        visual_gen=facts["visual_gen"],
        timestep_shift=facts["timestep_shift"],
        layer_module=case.parity.facts("set")["effective"]["layer_module"],
        freeze_und=facts["freeze_und"],
    )
    model.zero_grad(set_to_none=True)
    return model.train()


def pack_inputs(replay: Replay) -> dict:
    facts = replay.case.facts
    inputs = {name: replay[name] for name in INPUTS if name in replay}
    return inputs | {"sequence_length": facts["sequence_length"], "sample_lens": facts["sample_lens"]}


def stored_masks(replay: Replay) -> list[torch.Tensor]:
    return [mask for _, mask in replay.matching(r"attention_mask_(\d+)")]


def run(model, inputs: dict):
    """One forward; also the states after every decoder layer, before the final norm."""
    states, hooks = [], []
    for layer in model.language_model.model.layers:
        hook = layer.register_forward_hook(
            lambda layer, args, kwargs, output: states.append(kwargs["routing"].restore(output)[0].detach()),
            with_kwargs=True,
        )
        hooks.append(hook)
    try:
        return model(**inputs, output_hidden_states=True), states
    finally:
        for hook in hooks:
            hook.remove()


def replay_pack(case: Case, attn_implementation: str = "sdpa") -> Replay:
    """Forward and backward; everything under `out.` is compared."""
    facts, replay = case.facts, case.replay()
    model = training_model(case, attn_implementation)
    splits = {"split_lens": facts["split_lens"], "attn_modes": facts["attn_modes"]}
    output, states = run(model, pack_inputs(replay) | splits)

    replay.close("out.packed_sequence", output.hidden_states[0][0], "hidden")
    assert len(states) == len(output.hidden_states) - 1 == model.config.text_config.num_hidden_layers
    for index, state in enumerate(states):
        replay.close(f"out.layer_{index}_output", state, "hidden")
    for recorded, state in zip(output.hidden_states[1:-1], states):
        assert torch.equal(recorded[0], state)
    replay.close("out.last_hidden_state", output.last_hidden_state, "hidden")
    for name, error in (("ce", output.ce), ("mse", output.mse)):
        assert (error is None) == (f"{name}_mean" not in facts["losses"])
        if error is not None:
            replay.close(f"out.{name}", error, name)
    replay_losses(replay, output)

    output.loss.backward()
    replay_gradients(replay, model)
    return replay


def replay_losses(replay: Replay, output) -> None:
    """Ours is the plain mean; the released script's reductions follow from the unreduced errors."""
    losses, found = replay.case.facts["losses"], {"total_backward": output.loss}
    if output.ce is not None:
        weights = replay["ce_loss_weights"]
        found["ce_mean"] = output.ce.mean()
        found["ce_unweighted_official"] = output.ce.sum() / len(output.ce)
        found["ce_weighted_official"] = (output.ce * weights).sum() / weights.sum()
    if output.mse is not None:
        found["mse_mean"] = output.mse.mean()
        found["mse_official"] = output.mse.mean(-1).sum() / len(output.mse)
    assert found.keys() == losses.keys()
    for name, loss in found.items():
        assert_close(loss, losses[name], "loss", name)


def replay_gradients(replay: Replay, model) -> None:
    norms = replay.case.facts["grad_norms"]
    parameters = {name: p for name, p in model.named_parameters() if not name.startswith("vae.")}
    assert parameters.keys() <= norms.keys()
    for name, norm in norms.items():
        gradient = parameters[name].grad if name in parameters else None
        if norm is None:
            assert gradient is None, f"{name} has a gradient; the released model gives it none"
        else:
            assert gradient is not None, f"{name} has no gradient; the released model gives it one of norm {norm}"
            assert_close(gradient.norm(), norm, "grad_norm", f"the norm of the gradient of {name}")
    for (name,), gradient in replay.matching(r"out\.grad\.(.+)"):
        assert_close(parameters[name].grad, gradient, "gradient", f"the gradient of {name}")


@pytest.mark.parametrize("case", TRAINING)
def test_outputs_losses_and_gradients_are_the_released_ones(case):
    replay = replay_pack(case)
    replay.equal("sample_lens", case.facts["sample_lens"])
    replay.equal("split_lens", case.facts["split_lens"])
    replay.finish(r"attention_mask_\d+", "padded_images", "packed_timesteps_after_shift")


@pytest.mark.parametrize(
    "case", cases("train_forward", lambda facts: facts["visual_und"] and facts["visual_gen"], True)
)
def test_eager_attention_gives_the_same_numbers(case):
    replay_pack(case, "eager")


@pytest.mark.parametrize("case", TRAINING)
def test_nested_masks_say_the_same_as_splits(case):
    facts, replay = case.facts, case.replay()
    masks = stored_masks(replay)
    assert len(masks) == len(facts["sample_lens"])
    positions = replay["packed_position_ids"]
    splits = {"split_lens": facts["split_lens"], "attn_modes": facts["attn_modes"]}
    for spans in (splits, {"nested_attention_masks": masks}):
        layout = PackedLayout.from_packed(facts["sequence_length"], facts["sample_lens"], positions, **spans)
        assert torch.equal(layout.dense_mask()[0, 0], torch.block_diag(*masks).bool())
    with torch.no_grad():
        output = training_model(case)(**pack_inputs(replay), nested_attention_masks=masks)
    replay.close("out.last_hidden_state", output.last_hidden_state, "hidden")
    for name in ("ce", "mse"):
        if f"out.{name}" in replay:
            replay.close(f"out.{name}", getattr(output, name), name)


@pytest.mark.parametrize("case", cases("train_forward", lambda facts: facts["visual_gen"]))
def test_timesteps_are_shifted_as_released(case):
    replay = case.replay()
    shifted = training_timesteps(replay["packed_timesteps"], case.facts["timestep_shift"])
    assert_close(shifted, replay["packed_timesteps_after_shift"], "copy", "packed_timesteps_after_shift")


@pytest.mark.parametrize("case", cases("train_forward", lambda facts: facts["visual_gen"]))
def test_padded_pictures_encode_to_the_stored_latents(case):
    """The released training encodes the zero-padded batch; given those pictures, the VAE is the same."""
    replay = case.replay()
    model = training_model(case)
    images, (height, width) = replay["padded_images"], replay["padded_latent"].shape[-2:]
    patch = model.config.latent_patch_size
    tokens = model.encode_images(list(images), sample_posterior=False)
    latents = [unpatchify_latents(x, (height // patch, width // patch), patch) for x in tokens]
    replay.close("padded_latent", torch.stack(latents), "vae")
