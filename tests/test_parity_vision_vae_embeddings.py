# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The parts against the released ones: config, vision tower and connector, VAE, position and timestep features."""

import pytest
import torch
from parity_data import Case, ParitySet, assert_close, cases, drawn_noise, sets

from bagel.configuration_bagel import BagelConfig
from bagel.embeddings_bagel import _build_2d_sincos_pos_embed, _timestep_features, grid_position_ids
from bagel.flow_bagel import patchify_latents, unpatchify_latents


# --------------------------------------------------------------------------------------------------------------------
# Config


@pytest.mark.parametrize("parity", sets())
def test_the_config_resolves_to_what_the_released_code_built(parity: ParitySet):
    config, expected = parity.config(), parity.facts("set")["effective"]
    assert config.num_vit_layers == expected["vit_num_hidden_layers"]
    assert config.vit_rope == config.vision_config.rope == expected["vit_rope"]
    assert config.text_config.layer_module == expected["layer_module"]
    assert config.text_config.qk_norm == expected["qk_norm"]
    assert config.tie_word_embeddings == expected["tie_word_embeddings"]
    assert config.latent_downsample == expected["latent_downsample"]
    assert config.vae_config.z_channels == expected["latent_channel"]
    assert config.patch_latent_dim == expected["patch_latent_dim"]
    for name, value in parity.facts("set")["spec"]["llm"].items():
        stored = config.text_config.rope_parameters if name == "rope_theta" else config.text_config.to_dict()
        assert stored[name] == value


@pytest.mark.parametrize("parity", sets())
def test_the_three_config_files_say_the_same(parity: ParitySet):
    """`llm_config.json` and `vit_config.json` describe the model without `config.json`, whose names of them nest."""
    parts = {name: parity.facts(f"checkpoint/{name}") for name in ("llm_config", "vit_config")}
    whole = parity.config()
    split = BagelConfig(**parts, vae_config=whole.vae_config.to_dict(), visual_gen=True)
    assert split.text_config.to_dict() == whole.text_config.to_dict()
    assert split.vision_config.to_dict() == whole.vision_config.to_dict()


# --------------------------------------------------------------------------------------------------------------------
# Vision tower


@torch.no_grad()
@pytest.mark.parametrize("case", cases("vit"))
def test_vision_tower_and_connector_are_the_released_ones(case: Case):
    replay, model = case.replay(), case.parity.joint()
    patches, position_ids = replay["packed_pixel_values"], replay["packed_flattened_position_ids"]
    cu_seqlens = replay["cu_seqlens"].int()
    seen = model.vit_model(
        patches, position_ids, cu_seqlens, max_seqlen=case.facts["max_seqlen"], output_hidden_states=True
    )
    replay.close("out.embeddings", seen.hidden_states[0], "vit")
    assert len(seen.hidden_states) == model.config.num_vit_layers + 1
    for index, state in enumerate(seen.hidden_states[1:]):
        replay.close(f"out.layer_{index}_output", state, "vit")
    replay.close("out.last_hidden_state", seen.last_hidden_state, "vit")
    features = model.connector(seen.last_hidden_state)
    replay.close("out.connector", features, "vit")
    replay.close("out.pos_embed", model.vit_pos_embed(position_ids), "copy")
    replay.close("out.connector_plus_pos", features + model.vit_pos_embed(position_ids), "vit")
    replay.finish("vit_token_seqlens")


@torch.no_grad()
@pytest.mark.parametrize("case", cases("vit"))
def test_pictures_are_read_from_their_grids_alone(case: Case):
    """Positions and image borders follow from the grids; each picture is read as if it were alone."""
    replay, model = case.replay(), case.parity.joint()
    grids = case.facts["grids"]
    replay.equal("vit_token_seqlens", [rows * columns for rows, columns in grids])
    side, interpolate = case.facts["vit_max_num_patch_per_side"], model.config.interpolate_pos
    positions = torch.cat([grid_position_ids(*grid, side, interpolate) for grid in grids])
    replay.equal("packed_flattened_position_ids", positions)
    features = model.get_image_features(replay["packed_pixel_values"], torch.tensor(grids))
    replay.close("out.last_hidden_state", features.last_hidden_state, "vit")
    replay.close("out.connector_plus_pos", torch.cat(list(features.pooler_output)), "vit")
    for patches, grid, alone in zip(
        replay["packed_pixel_values"].split([rows * columns for rows, columns in grids]), grids, features.pooler_output
    ):
        (single,) = model.get_image_features(patches, torch.tensor([grid])).pooler_output
        assert_close(single, alone, "vit", f"the {grid} picture alone")


# --------------------------------------------------------------------------------------------------------------------
# VAE


def encode(model, images: torch.Tensor, sample_posterior: bool = False) -> torch.Tensor:
    """(pictures, 3, H, W) -> (pictures, z_channels, h, w), scaled and shifted."""
    patch, stride = model.config.latent_patch_size, model.config.latent_downsample
    grid = tuple(side // stride for side in images.shape[-2:])
    tokens = model.encode_images(list(images), sample_posterior)
    return torch.stack([unpatchify_latents(x, grid, patch) for x in tokens])


def decode(model, latents: torch.Tensor) -> torch.Tensor:
    """The inverse, without the clamp to [-1, 1]."""
    patch = model.config.latent_patch_size
    grid = tuple(side // patch for side in latents.shape[-2:])
    return torch.stack([model.decode_latents(patchify_latents(z, patch), grid) for z in latents])


@torch.no_grad()
@pytest.mark.parametrize("case", cases("vae"))
def test_vae_encodes_samples_and_decodes_as_released(case: Case):
    replay, model = case.replay(), case.parity.joint()
    assert {name: getattr(model.config.vae_config, name) for name in case.facts["params"]} == case.facts["params"]
    for number, (height, width) in enumerate(case.facts["sizes"]):
        images = replay[f"{number}.image"]
        assert images.shape[-2:] == (height, width)
        posterior = model.vae.encode(images).latent_dist
        replay.close(f"{number}.moments", posterior.parameters, "vae")
        replay.close(f"{number}.mean", posterior.mean, "vae")
        replay.close(f"{number}.logvar", posterior.logvar, "vae")
        latents = encode(model, images)
        replay.close(f"{number}.encode_mode", latents, "vae")
        if f"{number}.encode_sample" in replay:
            with drawn_noise(*(eps[None] for eps in replay[f"{number}.encode_sample_eps"])):
                replay.close(f"{number}.encode_sample", encode(model, images, sample_posterior=True), "vae")
        if f"{number}.decode" in replay:
            replay.close(f"{number}.decode", decode(model, replay[f"{number}.latent"]), "vae")
        replay.close(f"{number}.decode_of_encode_mode", decode(model, latents), "vae")
    replay.finish(r"pad\..+")


@torch.no_grad()
@pytest.mark.parametrize("case", cases("vae"))
def test_padding_a_picture_changes_its_latents_as_released(case: Case):
    """Hence every picture is encoded at its own size."""
    replay, model = case.replay(), case.parity.joint()
    small, padded = (encode(model, replay[f"pad.{name}_image"]) for name in ("small", "padded"))
    replay.close("pad.encode_small", small, "vae")
    replay.close("pad.encode_padded", padded, "vae")
    difference = (padded[..., : small.shape[-2], : small.shape[-1]] - small).abs().max()
    assert_close(difference, case.facts["pad_max_abs_difference"], "vae", "what padding changes")
    replay.finish(r"\d+\..+")


# --------------------------------------------------------------------------------------------------------------------
# Positions and timesteps


@torch.no_grad()
@pytest.mark.parametrize("case", cases("embeddings"))
def test_timestep_features_are_the_released_ones(case: Case):
    replay, embed = case.replay(), case.parity.joint().time_embedder
    t = replay["timesteps"]
    replay.close("timesteps", torch.tensor(case.facts["timesteps"]), "copy")
    for _, features in replay.matching(r"timestep_sinusoid(.*)"):
        assert_close(_timestep_features(t, features.shape[1]), features, "time", "timestep_sinusoid")
    replay.close("time_embedder", embed(t), "time")
    replay.close("time_embedder_int_zero", embed(torch.tensor([0])), "time")
    replay.finish(r"sincos_.+", r"pos_.+")


@pytest.mark.parametrize("case", cases("embeddings"))
def test_grid_tables_are_the_released_ones(case: Case):
    replay, model = case.replay(), case.parity.joint()
    for (dim, side), table in replay.matching(r"sincos_(\d+)_(\d+)"):
        assert [int(dim), int(side)] in case.facts["sincos_pairs"]
        assert_close(_build_2d_sincos_pos_embed(int(dim), int(side)), table, "copy", f"sincos_{dim}_{side}")
    stored = case.parity.tensors()
    for embedding in ("vit_pos_embed", "latent_pos_embed"):  # released training recomputes what inference loads
        assert_close(getattr(model, embedding).table(), stored[f"{embedding}.pos_embed"], "copy", embedding)
    replay.finish(r"time.*", r"pos_.+")


@pytest.mark.parametrize("case", cases("embeddings"))
def test_grid_position_ids_are_the_released_ones(case: Case):
    replay = case.replay()
    for grid in case.facts["position_id_cases"]:
        rows, columns = (grid[side] // grid["patch_size"] for side in ("img_h", "img_w"))
        for kind, interpolate in (("extrapolate", False), ("interpolate", True)):
            ids = grid_position_ids(rows, columns, grid["max_num_patches_per_side"], interpolate)
            replay.equal(f"pos_{kind}_{grid['index']}", ids)
    replay.finish(r"time.*", r"sincos_.+")


@pytest.mark.parametrize("case", cases("embeddings"))
def test_interpolation_misses_the_identity_for_the_released_sizes(case: Case):
    """Float32 bucket borders: a full grid is not always read off the table one by one."""
    released = case.facts["interpolate_not_identity_for_full_grid_sizes"]
    sides = range(1, max(released) + 1)
    ours = [n for n in sides if not torch.equal(grid_position_ids(n, n, n, True), torch.arange(n * n))]
    assert ours == released
