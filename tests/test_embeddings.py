# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables and features against their formulas, and what becomes of the tables when a model is loaded."""

import inspect
import math

import numpy as np
import pytest
import torch
from tiny_models import fresh_tiny_model, tiny_config, tiny_model

from bagel import embeddings_bagel
from bagel.embeddings_bagel import (
    BagelGridPositionEmbedding,
    BagelTimestepEmbedding,
    RotaryEmbedding2D,
    _build_2d_sincos_pos_embed,
    _build_square_grid_positions,
    _encode_scalar_positions,
    _geometric_frequencies,
    _get_2d_sincos_pos_embed,
    _timestep_features,
    cos_sin,
    grid_position_ids,
    inverse_frequencies,
    llama_vision_angles,
    plain_frequencies,
    qwen_vision_angles,
    rotate_halves,
    rotate_pairs,
)
from bagel.modeling_bagel import BagelForUnifiedMultimodal


pytestmark = pytest.mark.core


# ---- grid table


@pytest.mark.parametrize(("side", "width"), [(3, 8), (5, 4), (1, 12), (6, 32)])
def test_grid_table_is_its_formula(side, width):
    """First half the column, second half the row; within a half sines, then cosines."""
    table, quarter = BagelGridPositionEmbedding(side, width).pos_embed, width // 4
    expected = torch.empty(side * side, width, dtype=torch.float64)
    for row in range(side):
        for column in range(side):
            for half, coordinate in enumerate((column, row)):
                for k in range(quarter):
                    angle = coordinate / 10000 ** (k / quarter)
                    expected[row * side + column, half * 2 * quarter + k] = math.sin(angle)
                    expected[row * side + column, half * 2 * quarter + quarter + k] = math.cos(angle)
    assert table.dtype == torch.float32
    torch.testing.assert_close(table, expected.float(), atol=6e-8, rtol=0)


def test_grid_table_of_the_released_size_is_rounded_once():
    """float32 angles would be off by 1e-6 here."""
    table = BagelGridPositionEmbedding(70, 64).pos_embed
    columns = torch.arange(70, dtype=torch.float64)
    angles = columns[:, None] / 10000 ** (torch.arange(16, dtype=torch.float64) / 16)
    assert torch.equal(table[:70, :16], angles.sin().float())
    assert torch.equal(table[::70, 32:48], angles.sin().float())


def test_grid_table_is_read_by_position():
    embedding = BagelGridPositionEmbedding(4, 8)
    ids = torch.tensor([5, 0, 15, 5])
    assert torch.equal(embedding(ids), embedding.pos_embed[ids])


@pytest.mark.parametrize("width", [6, 7, 10])
def test_width_that_does_not_split_in_four_is_refused(width):
    with pytest.raises(ValueError, match="must be even"):
        BagelGridPositionEmbedding(4, width)


@pytest.mark.parametrize("side", [0])
def test_empty_grid_is_refused(side):
    with pytest.raises(ValueError, match="must be positive"):
        BagelGridPositionEmbedding(side, 8)


# ---- position ids


def test_grid_takes_the_upper_left_corner_of_the_table():
    assert grid_position_ids(2, 3, 10).tolist() == [0, 1, 2, 10, 11, 12]
    assert grid_position_ids(3, 3, 3).tolist() == list(range(9))
    assert grid_position_ids(1, 1, 70).tolist() == [0]


@pytest.mark.parametrize(("rows", "columns"), [(5, 2), (2, 5), (5, 5)])
def test_grid_larger_than_the_table_is_refused_with_both_sizes(rows, columns):
    with pytest.raises(ValueError, match=f"{rows}x{columns} .* 4x4"):
        grid_position_ids(rows, columns, 4)


def test_interpolated_grid_spreads_over_the_whole_table():
    assert grid_position_ids(2, 2, 4, interpolate=True).tolist() == [0, 2, 8, 10]
    assert grid_position_ids(1, 4, 2, interpolate=True).tolist() == [0, 0, 1, 1]
    assert grid_position_ids(8, 8, 2, interpolate=True).max() == 3  # larger than the table is fine here


@pytest.mark.parametrize("side", [16, 32, 64, 70])
def test_interpolated_full_grid_is_the_identity_for_the_released_sides(side):
    assert torch.equal(grid_position_ids(side, side, side, interpolate=True), torch.arange(side**2))


@pytest.mark.parametrize("side", [19, 23, 37, 71])
def test_interpolated_full_grid_is_not_the_identity_for_every_side(side):
    """The bucket borders are float32, as released; exact arithmetic would give the identity here too."""
    assert not torch.equal(grid_position_ids(side, side, side, interpolate=True), torch.arange(side**2))


# ---- timesteps


@pytest.mark.parametrize("width", [256, 8, 11, 1])
def test_timestep_features_are_their_formula(width):
    """Cosines first, no factor 1000, a zero for an odd width."""
    t, half = torch.tensor([0.0, 0.25, 1.0]), width // 2
    expected = torch.zeros(3, width)
    for row, value in enumerate(t.tolist()):
        for k in range(half):
            frequency = 10000 ** (-k / half)
            expected[row, k], expected[row, half + k] = math.cos(value * frequency), math.sin(value * frequency)
    torch.testing.assert_close(_timestep_features(t, width), expected, atol=3e-7, rtol=0)


def test_timestep_embedding_is_an_mlp_over_the_features():
    embedding, t = tiny_model().time_embedder, torch.tensor([0.0, 0.3, 1.0])
    first, last = embedding.mlp[0], embedding.mlp[2]
    hidden = _timestep_features(t, 256) @ first.weight.T + first.bias
    expected = (hidden / (1 + torch.exp(-hidden))) @ last.weight.T + last.bias
    torch.testing.assert_close(embedding(t), expected, atol=1e-5, rtol=1e-5)
    assert (embedding(t)[0] - embedding(t)[1]).abs().max() > 0.05  # times matter


def test_timestep_features_stay_float32_in_a_bfloat16_model():
    """Only the finished features are rounded: 1 - 1e-4 is not 1 yet."""
    embedding = BagelTimestepEmbedding(16, 64).to(torch.bfloat16)
    seen = {}
    embedding.mlp[0].register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0]))
    t = torch.tensor([0.333])
    assert embedding(t).dtype == torch.bfloat16
    assert torch.equal(seen["x"], _timestep_features(t, 64).bfloat16())
    assert not torch.equal(seen["x"], _timestep_features(t.bfloat16(), 64).bfloat16())


# ---- 2-D rotary


def test_rotary_tables_are_their_formula():
    side, dim = 5, 6
    rope = RotaryEmbedding2D(dim, side, side)
    ids = torch.tensor([0, 7, 24, 13])
    for number, entry in enumerate(ids.tolist()):
        for axis, coordinate in enumerate(divmod(entry, side)):
            cos, sin = rope(ids)[2 * axis][number], rope(ids)[2 * axis + 1][number]
            for k in range(dim):
                angle = coordinate / 10000 ** (2 * (k % (dim // 2)) / dim)
                assert cos[k].item() == pytest.approx(math.cos(angle), abs=1e-6)
                assert sin[k].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_rotary_of_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="must be even"):
        RotaryEmbedding2D(5, 4, 4)


# ---- rotation


@pytest.mark.parametrize(
    ("rotate", "pair"), [(rotate_halves, lambda i: (i, i + 4)), (rotate_pairs, lambda i: (2 * i, 2 * i + 1))]
)
def test_pairs_are_rotated_counter_clockwise(rotate, pair):
    x, angles = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 2, 12).view(3, 4)
    rotated = rotate(x, *cos_sin(angles))
    for row in range(3):
        for i in range(4):
            first, second = pair(i)
            expected = complex(x[row, first], x[row, second]) * complex(math.cos(angles[row, i]), angles[row, i].sin())
            assert complex(rotated[row, first], rotated[row, second]) == pytest.approx(expected, abs=1e-6)


def test_plain_frequencies_are_their_formula():
    expected = torch.tensor([1000.0 ** (-2 * i / 6) for i in range(3)])
    torch.testing.assert_close(plain_frequencies(6, 1000.0), expected)
    assert torch.equal(plain_frequencies(6, 1000.0) / 4, inverse_frequencies("linear", 6, 1000.0, factor=4.0))
    assert plain_frequencies(0).shape == (0,)


def test_angles_of_the_two_vision_towers_are_their_formulas():
    """Llama 4: columns first, from 1. Qwen3-Omni: rows first, from 0. Fractions of a patch are positions, too."""
    rows, columns = torch.tensor([0, 2, 5]), torch.tensor([1, 0, 3])
    frequencies = torch.tensor([1.0, 0.01])  # heads of 8: two pairs per axis
    llama = torch.cat([torch.outer(columns + 1.0, frequencies), torch.outer(rows + 1.0, frequencies)], dim=1)
    qwen = torch.cat([torch.outer(rows.float(), frequencies), torch.outer(columns.float(), frequencies)], dim=1)
    torch.testing.assert_close(llama_vision_angles(rows, columns, 8), llama)
    torch.testing.assert_close(qwen_vision_angles(rows, columns, 8), qwen)
    halfway = qwen_vision_angles(rows + 0.5, columns + 0.5, 8)
    torch.testing.assert_close(halfway, qwen + 0.5 * torch.cat([frequencies, frequencies]))


# ---- the documented names


NOTHING = inspect.Parameter.empty
DOCUMENTED = {
    "BagelGridPositionEmbedding": {"max_num_patch_per_side": NOTHING, "hidden_size": NOTHING},
    "BagelTimestepEmbedding": {"hidden_size": NOTHING, "frequency_embedding_size": 256},
    "_build_2d_sincos_pos_embed": {"embed_dim": NOTHING, "grid_size": NOTHING},
    "_build_square_grid_positions": {"grid_size": NOTHING},
    "_encode_scalar_positions": {"positions": NOTHING, "width": NOTHING},
    "_geometric_frequencies": {"width": NOTHING, "device": None},
    "_get_2d_sincos_pos_embed": {"embed_dim": NOTHING, "grid_size": NOTHING},
    "_timestep_features": {"timesteps": NOTHING, "width": NOTHING, "max_period": 10000},
    "_validate_even": {"value": NOTHING, "name": NOTHING},
    "_validate_positive": {"value": NOTHING, "name": NOTHING},
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_names_have_their_parameters_and_defaults(name):
    found = inspect.signature(getattr(embeddings_bagel, name)).parameters.values()
    assert {parameter.name: parameter.default for parameter in found} == DOCUMENTED[name]


def test_documented_data_and_methods_are_there():
    assert embeddings_bagel._SIN_COS_BASE == 10000.0
    assert list(inspect.signature(BagelGridPositionEmbedding.forward).parameters) == ["self", "position_ids"]
    assert list(inspect.signature(BagelTimestepEmbedding.forward).parameters) == ["self", "t"]
    embedding = BagelGridPositionEmbedding(3, 8)
    embedding.pos_embed.zero_()
    assert embedding._init_weights() is None
    assert torch.equal(embedding.pos_embed, embedding.table())


def test_grid_table_is_made_of_the_documented_functions():
    columns, rows = _build_square_grid_positions(3)
    assert rows.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert columns.tolist() == [0, 1, 2] * 3
    assert _geometric_frequencies(4).tolist() == pytest.approx([1.0, 0.01])
    assert _geometric_frequencies(4, torch.device("meta")).is_meta
    encoded = _encode_scalar_positions(torch.tensor([2.0]), 4)
    expected = [math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02)]
    assert encoded.tolist()[0] == pytest.approx(expected)
    table = _get_2d_sincos_pos_embed(8, 3)
    assert isinstance(table, np.ndarray)
    assert table.dtype == np.float32
    assert np.array_equal(table, _build_2d_sincos_pos_embed(8, 3).numpy())


# ---- tables in a model


TABLES = ("vit_pos_embed", "latent_pos_embed")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model one of whose tables is not the formula's, so that loading and recomputing differ."""
    folder, model = tmp_path_factory.mktemp("tables"), fresh_tiny_model(vit_rope=True)
    model.latent_pos_embed.pos_embed += 0.125
    model.save_pretrained(folder)
    return folder, model


def test_tables_are_frozen_buffers_that_are_saved():
    model = tiny_model()
    for name in TABLES:
        table = getattr(model, name).pos_embed
        assert f"{name}.pos_embed" in model.state_dict()
        assert f"{name}.pos_embed" not in dict(model.named_parameters())
        assert not table.requires_grad


def test_tables_built_on_the_meta_device_hold_nothing_yet():
    with torch.device("meta"):
        embedding, rope = BagelGridPositionEmbedding(4, 8), RotaryEmbedding2D(4, 3, 3)
    assert embedding.pos_embed.device.type == rope.cos_h.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_are_loaded_from_the_file_and_rounded_once(saved, dtype):
    folder, model = saved
    loaded = BagelForUnifiedMultimodal.from_pretrained(folder, dtype=dtype)
    assert loaded.dtype == dtype
    for name in TABLES:
        table = getattr(loaded, name).pos_embed
        assert not table.requires_grad
        assert torch.equal(table, getattr(model, name).pos_embed.to(dtype))
    rope = loaded.vit_model.vision_model.rope
    for name, table in rope.tables().items():
        assert torch.equal(getattr(rope, name), table.to(dtype))


def test_tables_of_another_size_than_in_the_file_are_computed(saved):
    """Loading builds on the meta device, so a table that the file cannot give is not there unless it is filled."""
    sizes = {"max_latent_size": 6, "vit_max_num_patch_per_side": 8, "vision_config": {"image_size": 32}}
    loaded = BagelForUnifiedMultimodal.from_pretrained(saved[0], ignore_mismatched_sizes=True, **sizes)
    for name, side in (("latent_pos_embed", 6), ("vit_pos_embed", 8)):
        embedding = getattr(loaded, name)
        assert embedding.pos_embed.shape == (side**2, 32)
        assert torch.equal(embedding.pos_embed, embedding.table())
    rope = loaded.vit_model.vision_model.rope
    assert rope.cos_h.shape == (64, 4)
    for name, table in rope.tables().items():
        assert torch.equal(getattr(rope, name), table)


def test_fresh_model_predicts_no_velocity():
    """As the released code starts training; the tiny models of the other tests are filled afterwards."""
    head = BagelForUnifiedMultimodal(tiny_config()).llm2vae
    assert head.weight.abs().max() == head.bias.abs().max() == 0


def test_nothing_of_a_loaded_model_stays_on_meta(saved):
    loaded = BagelForUnifiedMultimodal.from_pretrained(saved[0])
    left = [name for name, x in (*loaded.named_parameters(), *loaded.named_buffers()) if x.is_meta]
    assert left == []
    inv_freq = loaded.language_model.model.rotary_emb.inv_freq
    torch.testing.assert_close(inv_freq, 10000.0 ** -(torch.arange(0, 8, 2) / 8))
