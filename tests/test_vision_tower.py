# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The packed vision tower: a pack is its images one at a time, on every kernel, under the released names."""

import inspect
import random

import pytest
import torch
from parity_data import RELEASED_MANIFEST, read_json
from tiny_models import randomize, tiny_config, tiny_model
from torch import nn
from transformers import PreTrainedModel
from transformers import SiglipVisionConfig as StockVisionConfig

from bagel import modeling_siglip_navit
from bagel.configuration_bagel import BagelConfig, BagelVisionConfig
from bagel.embeddings_bagel import grid_position_ids
from bagel.modeling_bagel import BagelForUnifiedMultimodal
from bagel.modeling_siglip_navit import SiglipVisionModel, convert_conv2d_to_linear


pytestmark = pytest.mark.core

SIDE = 6  # patches per side of the tiny position table


def tower(kernel: str = "eager", linear: bool = True, **changes) -> SiglipVisionModel:
    vision = tiny_config().vision_config.to_dict() | changes
    config = BagelVisionConfig(**vision, attn_implementation=kernel)
    model = SiglipVisionModel(config, num_hidden_layers=2).eval()
    randomize(model)
    if linear:
        convert_conv2d_to_linear(model)
    return model


def images(grids, patch_dim: int = 48, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random pictures of these grids, packed."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor([0] + [rows * columns for rows, columns in grids])
    return {
        "packed_pixel_values": torch.randn(int(counts.sum()), patch_dim, generator=generator),
        "packed_flattened_position_ids": torch.cat([grid_position_ids(*grid, SIDE) for grid in grids]),
        "cu_seqlens": counts.cumsum(0).to(torch.int32),
    }


def random_grids(seed: int) -> list[tuple[int, int]]:
    chance = random.Random(seed)
    return [(chance.randint(1, SIDE), chance.randint(1, SIDE)) for _ in range(chance.randint(2, 5))]


def one_at_a_time(model: SiglipVisionModel, pack: dict[str, torch.Tensor]) -> torch.Tensor:
    outputs = []
    for start, end in zip(pack["cu_seqlens"][:-1].tolist(), pack["cu_seqlens"][1:].tolist()):
        outputs.append(
            model(
                pack["packed_pixel_values"][start:end],
                pack["packed_flattened_position_ids"][start:end],
                torch.tensor([0, end - start], dtype=torch.int32),
            ).last_hidden_state
        )
    return torch.cat(outputs)


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("seed", range(3))
def test_pack_is_its_images_one_at_a_time(seed, kernel, rope):
    model, pack = tower(kernel, rope=rope), images(random_grids(seed), seed=seed)
    torch.testing.assert_close(model(**pack).last_hidden_state, one_at_a_time(model, pack), atol=1e-5, rtol=1e-5)


def test_image_does_not_depend_on_the_others():
    model, grids = tower(), [(2, 3), (4, 2)]
    pack = images(grids)
    before = model(**pack).last_hidden_state
    pack["packed_pixel_values"][:6] += 1
    after = model(**pack).last_hidden_state
    assert (after[:6] - before[:6]).abs().max() > 0.01
    assert torch.equal(after[6:], before[6:])


def test_patches_of_an_image_see_each_other_both_ways():
    model, pack = tower(), images([(2, 3)])
    before = model(**pack).last_hidden_state
    for changed in (0, 5):
        pixels = pack["packed_pixel_values"].clone()
        pixels[changed] += 1
        after = model(**(pack | {"packed_pixel_values": pixels})).last_hidden_state
        assert ((after - before).abs().amax(1) > 1e-4).all()


def test_max_seqlen_of_the_caller_changes_nothing():
    model, pack = tower(), images([(2, 3), (4, 2)])
    assert torch.equal(model(**pack, max_seqlen=8).last_hidden_state, model(**pack).last_hidden_state)


@pytest.mark.parametrize("rope", [False, True])
def test_sdpa_equals_eager_in_outputs_and_gradients(rope):
    pack, results = images([(3, 3), (1, 5), (6, 2)]), []
    for kernel in ("eager", "sdpa"):
        model = tower(kernel, rope=rope)
        output = model(**pack).last_hidden_state
        (output * torch.linspace(-1, 1, output.shape[1])).sum().backward()
        results.append([output, *(parameter.grad for parameter in model.parameters())])
    for eager, sdpa in zip(*results):
        torch.testing.assert_close(sdpa, eager, atol=1e-5, rtol=1e-4)


# ---- against direct formulas


def plain_tower(model: SiglipVisionModel, pixels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One image, written out head by head."""
    vision, config = model.vision_model, model.config
    heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    x = pixels @ vision.embeddings.patch_embedding.weight.T + vision.embeddings.patch_embedding.bias
    if not config.rope:
        x = x + vision.embeddings.position_embedding.weight[positions]
    for layer in vision.encoder.layers:
        attention, normed, outs = layer.self_attn, layer.layer_norm1(x), []
        q, k, v = (proj(normed) for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
        for head in range(heads):
            own = slice(head * head_dim, (head + 1) * head_dim)
            q_h, k_h = q[:, own], k[:, own]
            if config.rope:
                q_h, k_h = (rotate(part, positions) for part in (q_h, k_h))
            outs.append(((q_h @ k_h.T) / head_dim**0.5).softmax(-1) @ v[:, own])
        x = x + attention.out_proj(torch.cat(outs, dim=1))
        hidden = nn.functional.gelu(layer.mlp.fc1(layer.layer_norm2(x)), approximate="tanh")
        x = x + layer.mlp.fc2(hidden)
    return vision.post_layernorm(x)


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """2-D rotary by complex numbers: a quarter of the head pairs with the next, rows first, then columns."""
    quarter, out = x.shape[1] // 4, []
    for axis, coordinate in enumerate((positions // SIDE, positions % SIDE)):
        first, second = x[:, 2 * axis * quarter :][:, :quarter], x[:, (2 * axis + 1) * quarter :][:, :quarter]
        angle = coordinate[:, None] * 10000.0 ** (-torch.arange(quarter) / quarter)
        rotated = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
        out += [rotated.real, rotated.imag]
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("rope", [False, True])
def test_tower_is_its_formula(rope):
    model, pack = tower(rope=rope), images([(4, 5)])
    expected = plain_tower(model, pack["packed_pixel_values"], pack["packed_flattened_position_ids"])
    torch.testing.assert_close(model(**pack).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def test_rope_replaces_the_learned_table():
    names = dict(tower(rope=True).named_parameters())
    assert not any("position_embedding" in name for name in names)
    assert any("position_embedding" in name for name in dict(tower().named_parameters()))


def test_rotary_attention_knows_distances_only():
    """Scores of two patches depend on their offset: the same picture two rows lower gives the same features."""
    model, pixels = tower(rope=True), images([(2, 3)])["packed_pixel_values"]
    upper = grid_position_ids(2, 3, SIDE)
    outputs = [model(pixels, ids, torch.tensor([0, 6])).last_hidden_state for ids in (upper, upper + 2 * SIDE + 1)]
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
    assert (model(pixels, upper.flip(0), torch.tensor([0, 6])).last_hidden_state - outputs[0]).abs().max() > 1e-3


@pytest.mark.parametrize("linear", [False, True])
def test_patch_projection_is_the_convolution_on_the_picture(linear):
    model = tower(linear=False)
    conv = model.vision_model.embeddings.patch_embedding
    assert isinstance(conv, nn.Conv2d)
    picture = torch.randn(3, 12, 20)  # 3 x 5 patches of 4 x 4
    expected = conv(picture[None])[0].flatten(1).T
    if linear:
        convert_conv2d_to_linear(model)
        assert isinstance(model.vision_model.embeddings.patch_embedding, nn.Linear)
    patches = picture.unfold(1, 4, 4).unfold(2, 4, 4).permute(1, 2, 3, 4, 0).reshape(15, 48)  # (row, column, channel)
    ids = grid_position_ids(3, 5, SIDE)
    embeddings = model.vision_model.embeddings
    features = embeddings(patches, ids) - embeddings.position_embedding(ids)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


def test_converting_twice_changes_nothing_and_meta_leaves_weights_unset():
    model = tower()
    before = model.vision_model.embeddings.patch_embedding
    convert_conv2d_to_linear(model)
    assert model.vision_model.embeddings.patch_embedding is before
    other = tower(linear=False)
    convert_conv2d_to_linear(other, meta=True)
    assert other.vision_model.embeddings.patch_embedding.weight.is_meta


# ---- names


def test_released_names_and_shapes_are_those_of_the_model():
    with torch.device("meta"):
        model = BagelForUnifiedMultimodal(BagelConfig(stage=1, text_config={"num_hidden_layers": 1}))
    ours = {name: list(x.shape) for name, x in model.state_dict().items() if name.startswith("vit_model.")}
    released = read_json(RELEASED_MANIFEST)["ema.safetensors"]
    assert ours == {name: shape for name, shape in released.items() if name.startswith("vit_model.")}
    prefix = "vit_model.vision_model"
    short_list = {
        f"{prefix}.embeddings.patch_embedding.weight": [1152, 588],
        f"{prefix}.embeddings.patch_embedding.bias": [1152],
        f"{prefix}.embeddings.position_embedding.weight": [4900, 1152],
        f"{prefix}.encoder.layers.0.self_attn.k_proj.weight": [1152, 1152],
        f"{prefix}.encoder.layers.0.self_attn.out_proj.bias": [1152],
        f"{prefix}.encoder.layers.0.layer_norm1.weight": [1152],
        f"{prefix}.encoder.layers.12.mlp.fc1.weight": [4304, 1152],
        f"{prefix}.encoder.layers.25.mlp.fc2.bias": [1152],
        f"{prefix}.post_layernorm.weight": [1152],
    }
    assert {name: ours.get(name) for name in short_list} == short_list
    assert len(ours) == 3 + 26 * 16 + 2
    assert not any(".layers.26." in name for name in ours)


def test_documented_classes_are_there():
    bases = {
        "RotaryEmbedding2D": nn.Module,
        "SiglipAttention": nn.Module,
        "SiglipEncoder": nn.Module,
        "SiglipEncoderLayer": nn.Module,
        "SiglipFlashAttention2": modeling_siglip_navit.SiglipAttention,
        "SiglipMLP": nn.Module,
        "SiglipPreTrainedModel": PreTrainedModel,
        "SiglipVisionConfig": StockVisionConfig,
        "SiglipVisionEmbeddings": nn.Module,
        "SiglipVisionModel": modeling_siglip_navit.SiglipPreTrainedModel,
        "SiglipVisionTransformer": nn.Module,
    }
    for name, base in bases.items():
        assert issubclass(getattr(modeling_siglip_navit, name), base), name
    assert set(bases) | {"convert_conv2d_to_linear"} == set(modeling_siglip_navit.__all__)
    assert modeling_siglip_navit.SiglipVisionConfig(rope=True).rope is True
    on_module = inspect.signature(modeling_siglip_navit.SiglipVisionEmbeddings.convert_conv2d_to_linear).parameters
    assert list(on_module)[1:] == ["config", "meta"]
    assert list(inspect.signature(convert_conv2d_to_linear).parameters)[1:] == ["config", "meta"]
    assert on_module["meta"].default is False


def test_attention_holds_the_projections_and_their_names():
    attention = modeling_siglip_navit.SiglipAttention(tower().config)
    assert {name for name, _ in attention.named_children()} == {"q_proj", "k_proj", "v_proj", "out_proj"}


# ---- edges


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_no_image_gives_zero_gradients_for_every_parameter(kernel):
    model = tower(kernel)
    nothing = torch.empty(0, dtype=torch.long)
    output = model(torch.empty(0, 48), nothing, torch.zeros(1, dtype=torch.int32)).last_hidden_state
    assert output.shape == (0, 32)
    output.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() == 0, name


@pytest.mark.parametrize("cu_seqlens", [[0, 5], [0, 3, 7], [0]])
def test_cu_seqlens_that_do_not_count_the_patches_are_refused(cu_seqlens):
    pack = images([(2, 3)]) | {"cu_seqlens": torch.tensor(cu_seqlens)}
    counted = f"{cu_seqlens[-1]} patches in {len(cu_seqlens) - 1} images"
    with pytest.raises(ValueError, match=f"describes {counted}, packed_pixel_values holds 6"):
        tower()(**pack)


def test_hidden_states_and_attentions_come_when_asked_for():
    model, pack = tower(), images([(2, 3), (1, 4)])
    assert model(**pack).hidden_states is None
    assert model(**pack).attentions is None
    output = model(**pack, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3
    expected = model.vision_model.post_layernorm(output.hidden_states[-1])
    assert torch.equal(output.last_hidden_state, expected)
    for layer in output.attentions:
        assert [weights.shape for weights in layer] == [(1, 4, 6, 6), (1, 4, 4, 4)]
        for weights in layer:
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_features_of_the_whole_model_are_tower_connector_and_table():
    model, grids = tiny_model(), [(2, 3), (4, 1)]
    pack = images(grids)
    features = model.get_image_features(pack["packed_pixel_values"], torch.tensor(grids))
    seen = model.vit_model(**pack).last_hidden_state
    assert torch.equal(features.last_hidden_state, seen)
    expected = model.connector.fc2(nn.functional.gelu(model.connector.fc1(seen), approximate="tanh"))
    expected = expected + model.vit_pos_embed.pos_embed[pack["packed_flattened_position_ids"]]
    torch.testing.assert_close(torch.cat(features.pooler_output), expected)
    assert [len(image) for image in features.pooler_output] == [6, 4]
