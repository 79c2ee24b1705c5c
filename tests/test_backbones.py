# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A BAGEL made of a text model, a vision tower and an autoencoder; and what its vocabulary does afterwards."""

import json
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from tiny_models import TINY, padded_batch, training_pack
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.initialization import no_init_weights

from bagel import conversion, modeling_bagel
from bagel.checkpoint_bagel import to_released_name, to_released_shape
from bagel.configuration_bagel import BagelConfig
from bagel.conversion import backbones, commands, folders
from bagel.conversion.backbones import SPECIAL_TOKENS, add_special_tokens, find_files, resize_position_table
from bagel.flow_bagel import patchify_latents
from bagel.modeling_bagel import BagelForUnifiedMultimodal
from bagel.shapes.tokenizer import build_tiny_tokenizer


pytestmark = pytest.mark.core

# A text model's own values differ from the defaults, and its special tokens from BAGEL's.
TEXT = TINY["text_config"] | {"rope_theta": 5000.0, "rms_norm_eps": 1e-5, "bos_token_id": 50, "eos_token_id": 51}
del TEXT["pad_token_id"]
TOWER = TINY["vision_config"]
IDS = {name: value for name, value in TINY.items() if name.endswith("_token_id")}
SMALL = {"max_latent_size": TINY["max_latent_size"], **IDS}
EXACT = {"text_config": {"qk_norm": False}}


def seeded(make, seed=0):
    """A part in which nothing is neutral: no bias zero, no norm one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        part = make().eval()
        with torch.no_grad():
            for name, parameter in part.named_parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(1 + 0.1 * noise if "norm" in name and name.endswith("weight") else 0.2 * noise)
    return part


def text_model(seed=0, **changes):
    return seeded(lambda: Qwen2ForCausalLM(Qwen2Config(**{**TEXT, **changes})), seed)


def tower(**changes):
    return seeded(lambda: SiglipVisionModel(SiglipVisionConfig(**{**TOWER, **changes})))


def autoencoder(**changes):
    settings = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
    }
    return seeded(lambda: AutoencoderKL(**{**settings, **changes}))


@pytest.fixture(scope="module")
def loaded():
    """The parts in memory."""
    return SimpleNamespace(text=text_model(), vision=tower(), vae=autoencoder())


@pytest.fixture(scope="module")
def stored(loaded, tmp_path_factory):
    """The parts as folders."""
    root = tmp_path_factory.mktemp("parts")
    for name, part in vars(loaded).items():
        part.save_pretrained(root / name)
    return SimpleNamespace(**{name: root / name for name in vars(loaded)})


@pytest.fixture(params=["loaded", "stored"])
def parts(request):
    return request.getfixturevalue(request.param)


def build(parts, **changes):
    return BagelForUnifiedMultimodal.from_backbones(parts.text, parts.vision, parts.vae, **{**SMALL, **changes})


@contextmanager
def messages(level="WARNING", module=backbones):
    """What a module says meanwhile."""
    said, logger = [], module.logger
    handler = __import__("logging").Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    if hasattr(logger.warning_once, "cache_clear"):
        logger.warning_once.cache_clear()
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def copy_of(folder, target, change_config=None):
    shutil.copytree(folder, target)
    if change_config:
        content = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**content, **change_config}))
    return target


WORDS = torch.randint(7, 99, (2, 11), generator=torch.Generator().manual_seed(0))


# ---- the text model


def test_without_qk_norm_texts_are_those_of_the_text_model(parts, loaded):
    model = build(parts, **EXACT)
    mask = torch.ones_like(WORDS)
    mask[1, :4] = 0
    torch.testing.assert_close(model(input_ids=WORDS).logits, loaded.text(WORDS).logits)
    ours, theirs = model(input_ids=WORDS, attention_mask=mask).logits, loaded.text(WORDS, mask).logits
    torch.testing.assert_close(ours[mask == 1], theirs[mask == 1])
    assert model.config.text_config.rope_parameters["rope_theta"] == 5000.0
    assert model.config.text_config.rms_norm_eps == 1e-5


def test_with_qk_norm_heads_are_normalised_so_texts_differ_until_trained(parts, loaded):
    model = build(parts)
    norms = [p for name, p in model.named_parameters() if "q_norm" in name or "k_norm" in name]
    assert len(norms) == 2 * 4
    assert all(torch.equal(norm, torch.ones(8)) for norm in norms)
    assert (model(input_ids=WORDS).logits - loaded.text(WORDS).logits).abs().max() > 0.01
    parameters = dict(loaded.text.named_parameters())
    shared = {name.removeprefix("language_model.") for name, _ in model.named_parameters() if "moe_gen" not in name}
    assert all(
        torch.equal(model.language_model.get_parameter(name), parameters[name]) for name in shared & parameters.keys()
    )
    assert parameters.keys() <= shared


def test_generation_experts_are_copies_that_share_no_memory(parts, loaded):
    model = build(parts)
    parameters = dict(model.language_model.named_parameters())
    copies = [name for name in parameters if "_moe_gen" in name]
    assert len(copies) == len([name for name in parameters if "embed" not in name and "head" not in name]) / 2
    assert all(torch.equal(parameters[name], parameters[name.replace("_moe_gen", "")]) for name in copies)
    memory = [tensor.data_ptr() for part in (model, *vars(loaded).values()) for tensor in part.state_dict().values()]
    assert len(set(memory)) == len(memory)


def test_special_ids_of_the_text_config_are_those_of_the_whole(stored):
    config = build(stored).config
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    assert (config.text_config.bos_token_id, config.text_config.eos_token_id) == (1, 2)


@pytest.fixture(scope="module")
def tied():
    return text_model(seed=1, tie_word_embeddings=True)


@pytest.mark.parametrize("from_folder", [True, False])
def test_tied_embeddings_stay_tied_or_become_two(tied, loaded, tmp_path, from_folder):
    source = tied
    if from_folder:
        tied.save_pretrained(tmp_path)
        assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
        source = tmp_path
    expected = tied(WORDS).logits
    for untie in (False, True):
        changes = {"tie_word_embeddings": False} if untie else {}
        with messages() as said:
            model = BagelForUnifiedMultimodal.from_backbones(source, **SMALL, **EXACT, **changes)
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert (embeddings is head, embeddings.data_ptr() == head.data_ptr()) == (not untie, not untie)
        assert torch.equal(embeddings, head)
        torch.testing.assert_close(model(input_ids=WORDS).logits, expected)
        assert said == []


def test_tying_a_text_model_with_its_own_head_says_that_the_head_is_dropped(stored):
    with messages() as said:
        model = BagelForUnifiedMultimodal.from_backbones(stored.text, tie_word_embeddings=True, **SMALL)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert ["lm_head.weight not used" in message for message in said] == [True]


def test_sharded_and_bare_text_models_are_read(loaded, tmp_path):
    loaded.text.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    model = BagelForUnifiedMultimodal.from_backbones(tmp_path / "sharded", **SMALL, **EXACT)
    torch.testing.assert_close(model(input_ids=WORDS).logits, loaded.text(WORDS).logits)
    with pytest.raises(ValueError, match=r"no lm_head.weight. .*tie_word_embeddings=True uses its embeddings"):
        BagelForUnifiedMultimodal.from_backbones(loaded.text.model, **SMALL)
    model = BagelForUnifiedMultimodal.from_backbones(loaded.text.model, tie_word_embeddings=True, **SMALL, **EXACT)
    torch.testing.assert_close(model(input_ids=WORDS).last_hidden_state, loaded.text.model(WORDS).last_hidden_state)


def test_dtype_is_the_text_models_or_the_one_asked_for_and_the_vae_stays_float32(loaded, tmp_path):
    text_model().to(torch.bfloat16).save_pretrained(tmp_path)
    for source in (tmp_path, text_model().to(torch.bfloat16)):
        model = BagelForUnifiedMultimodal.from_backbones(source, loaded.vision, loaded.vae, **SMALL)
        assert {p.dtype for name, p in model.named_parameters() if not name.startswith("vae.")} == {torch.bfloat16}
        assert {p.dtype for p in model.vae.parameters()} == {torch.float32}
    model = BagelForUnifiedMultimodal.from_backbones(tmp_path, dtype="float32", **SMALL)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_folders_are_read_one_tensor_at_a_time(stored, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    reads = []
    read = backbones._read_tensor
    monkeypatch.setattr(backbones, "_read_tensor", lambda file, name: reads.append(name) or read(file, name))
    model = build(stored)
    assert reads.count("model.layers.0.mlp.up_proj.weight") == 2, "once per expert"
    assert reads.count("model.embed_tokens.weight") == 1
    assert not any("encoder.layers.2." in name or ".probe" in name for name in reads), "what is not used is not read"
    assert len(reads) < len(model.state_dict())


# ---- the vision tower


def patches_of(pixels, size=4):
    """(1, 3, H, W) -> (patches, size * size * 3), features (row, column, channel)."""
    grid = pixels[0].unflatten(1, (-1, size)).unflatten(3, (-1, size))  # (3, rows, size, columns, size)
    return grid.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)


def seen_by(model, pixels):
    rows, columns = (side // 4 for side in pixels.shape[2:])
    with torch.no_grad():
        features = model.get_image_features(
            patches_of(pixels), torch.tensor([[rows, columns]]), output_hidden_states=True
        )
    return features


def test_vision_features_are_siglips_hidden_states_at_the_selected_layer(parts, loaded):
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = loaded.vision(pixels, output_hidden_states=True).hidden_states
    for select, index in ((-2, 2), (-1, 3), (1, 1)):
        model = build(parts, vit_select_layer=select)
        features = seen_by(model, pixels)
        assert len(model.vit_model.vision_model.encoder.layers) == index
        torch.testing.assert_close(features.hidden_states[-1], states[index][0], atol=1e-5, rtol=1e-5)
        tower_parts = getattr(loaded.vision, "vision_model", loaded.vision)
        normed = tower_parts.post_layernorm(states[index][0])
        torch.testing.assert_close(features.last_hidden_state, normed, atol=1e-5, rtol=1e-5)


def test_the_vision_half_of_a_siglip_model_is_its_vision_model(stored, loaded, tmp_path):
    text = {"hidden_size": 32, "intermediate_size": 36, "num_hidden_layers": 1, "num_attention_heads": 4}
    both = seeded(lambda: SiglipModel(SiglipConfig(text_config=text, vision_config=TOWER)), seed=3)
    both.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "vision_model.embeddings.patch_embedding.weight" in names
    assert "text_model.embeddings.token_embedding.weight" in names
    for source in (both, tmp_path):
        with messages("INFO") as said:
            model = BagelForUnifiedMultimodal.from_backbones(stored.text, source, **SMALL)
        weight = both.vision_model.encoder.layers[1].mlp.fc1.weight
        assert torch.equal(model.vit_model.vision_model.encoder.layers[1].mlp.fc1.weight, weight)
        assert sum("not used, as in the released model" in message for message in said) == 1, "said once"
        assert not model.config.visual_gen
        assert not any("moe_gen" in name for name, _ in model.named_parameters())


def test_a_larger_position_table_is_interpolated_as_siglip_does_and_said(parts, loaded):
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with messages() as said:
        model = build(parts, vit_max_num_patch_per_side=8)
    assert "6x6 patches is interpolated to 8x8" in said[0]
    with torch.no_grad():
        states = loaded.vision(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    torch.testing.assert_close(seen_by(model, pixels).hidden_states[-1], states[2][0], atol=1e-5, rtol=1e-5)
    assert model.config.vision_config.image_size == 32
    same = build(parts, vision_config={"image_size": 32})
    assert same.config.vit_max_num_patch_per_side == 8


def test_an_interpolated_table_of_the_same_size_is_the_table():
    table = torch.randn(36, 5)
    torch.testing.assert_close(resize_position_table(table, 6), table)
    assert resize_position_table(table.bfloat16(), 3).dtype == torch.bfloat16


# ---- the autoencoder


def test_the_autoencoder_is_the_given_one(parts, loaded):
    model = build(parts)
    for name, tensor in loaded.vae.state_dict().items():
        assert torch.equal(model.vae.state_dict()[name], tensor), name
    picture = torch.rand(3, 16, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = model.encode_images([picture], sample_posterior=False)[0]
    with torch.no_grad():
        expected = (loaded.vae.encode(picture[None]).latent_dist.mode() - 0.25) * 0.5
        decoded = loaded.vae.decode(expected / 0.5 + 0.25).sample[0]
    assert torch.equal(latents, patchify_latents(expected[0], 2))
    torch.testing.assert_close(model.decode_latents(latents, (4, 2)), decoded)
    assert not any(p.requires_grad for p in model.vae.parameters())


def test_a_released_autoencoder_file_is_read_by_itself_or_in_its_folder(stored, loaded, tmp_path):
    config = BagelConfig(vae_config=TINY["vae_config"] | {"ch_mult": [1, 2]})
    names = {f"vae.{name}": tensor for name, tensor in loaded.vae.state_dict().items()}
    tensors = {
        to_released_name(name, config.vae_config): tensor.reshape(to_released_shape(name, tensor.shape)).contiguous()
        for name, tensor in names.items()
    }
    assert "encoder.down.0.block.0.conv1.weight" in tensors
    save_file(tensors, tmp_path / "ae.safetensors")
    for source in (tmp_path / "ae.safetensors", str(tmp_path)):
        model = BagelForUnifiedMultimodal.from_backbones(stored.text, stored.vision, source, **SMALL)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in names.items())
        vae = model.config.vae_config
        assert (vae.ch, vae.ch_mult, vae.scale_factor, vae.shift_factor) == (8, [1, 2], 0.3611, 0.1159)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_quant_conv": True}, "use_quant_conv=True"),
        ({"norm_num_groups": 4}, "norm_num_groups=4 .needed: 8"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention=False"),
    ],
)
def test_another_kind_of_autoencoder_is_refused(loaded, changes, named):
    with pytest.raises(ValueError, match=named):
        BagelForUnifiedMultimodal.from_backbones(loaded.text, loaded.vision, autoencoder(**changes), **SMALL)


# ---- the whole


def test_new_parts_are_those_of_a_fresh_model(parts):
    torch.manual_seed(0)
    model = build(parts)
    torch.manual_seed(0)
    again = build(parts)
    fresh = BagelForUnifiedMultimodal(model.config)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    for name in ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed", "llm2vae.weight", "llm2vae.bias"):
        assert torch.equal(model.state_dict()[name], fresh.state_dict()[name]), name
    assert model.state_dict()["llm2vae.weight"].abs().max() == 0
    for name in ("connector.fc1.weight", "vae2llm.weight", "time_embedder.mlp.0.weight"):
        assert model.state_dict()[name].std() == pytest.approx(0.02, rel=0.2), name
    assert torch.equal(model.language_model.model.rotary_emb.inv_freq, fresh.language_model.model.rotary_emb.inv_freq)


def test_one_step_of_training_moves_both_experts_and_lowers_the_loss(stored):
    torch.manual_seed(0)
    model = build(stored).train()
    pack = training_pack([[("text", 5), ("vit", 2, 3), ("text", 4), ("noise", 3, 2)], [("text", 6), ("noise", 2, 2)]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        output = model(**pack)
        output.loss.backward()
        losses.append(output.loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    layer = model.language_model.model.layers[0]
    assert not torch.equal(layer.mlp.up_proj.weight, layer.mlp_moe_gen.up_proj.weight), "the experts went their ways"


def test_saved_is_loaded_and_exported_is_adopted(stored, tmp_path):
    model = build(stored)
    batch = padded_batch([[("text", 4), ("vit", 2, 2), ("text", 3)], [("text", 2)]], config=model.config)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    torch.testing.assert_close(loaded(**batch).logits, expected)
    conversion.export(tmp_path / "saved", tmp_path / "released")
    conversion.adopt(tmp_path / "released")
    adopted = BagelForUnifiedMultimodal.from_pretrained(tmp_path / "released")
    torch.testing.assert_close(adopted(**batch).logits, expected)


def test_stage_1_leaves_the_autoencoder_and_says_so(stored):
    with messages() as said:
        model = build(stored, stage=1)
    assert any("vae" in message and "not used" in message for message in said)
    assert not any("moe_gen" in name or name.startswith("vae") for name, _ in model.named_parameters())


def test_a_text_model_alone_is_a_bagel_that_reads_text(stored):
    model = BagelForUnifiedMultimodal.from_backbones(stored.text, **SMALL)
    assert (model.config.visual_und, model.config.visual_gen) == (False, False)
    assert model.generate(WORDS, max_new_tokens=3, do_sample=False).shape[1] > WORDS.shape[1]


# ---- a config of the caller's


def config_of(**changes):
    values = {
        **SMALL,
        "stage": 2,
        "text_config": {**TEXT, "qk_norm": False},
        "vision_config": dict(TOWER),
        "vae_config": TINY["vae_config"] | {"ch_mult": [1, 2]},
        "vit_max_num_patch_per_side": 6,
    }
    for name, value in changes.items():
        values[name] = {**values[name], **value} if isinstance(values.get(name), dict) else value
    return BagelConfig(**values)


def test_a_config_of_the_callers_is_taken_as_it_is_and_other_settings_are_said(stored, tmp_path):
    config = config_of(timestep_shift=2.0)
    before = config.to_dict()
    config.save_pretrained(tmp_path)
    for given in (config, tmp_path):
        with messages() as said:
            model = BagelForUnifiedMultimodal.from_backbones(
                stored.text, stored.vision, stored.vae, given, max_latent_size=4
            )
        assert (model.config.timestep_shift, model.config.max_latent_size) == (2.0, 4)
        assert model.config.vae_config.scale_factor == 0.3611
        assert ["scaling" in m or "scale_factor=0.5; the config says 0.3611" in m for m in said] == [True, False]
    assert config.to_dict() == before


def test_nested_configs_may_be_objects_and_loading_arguments_are_passed_on(stored, loaded):
    text, vision = (
        config_of().text_config,
        config_of(vision_config={"image_size": 32}, vit_max_num_patch_per_side=8).vision_config,
    )
    model = build(stored, llm_config=text, vision_config=vision, attn_implementation="eager", device_map={"": "cpu"})
    assert model.config._attn_implementation == "eager"
    assert model.config.vit_max_num_patch_per_side == 8
    torch.testing.assert_close(model(input_ids=WORDS).logits, loaded.text(WORDS).logits)


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({"text_config": {"hidden_size": 64}}, "hidden_size is 64, but 32 in text_model"),
        ({"text_config": {"num_hidden_layers": 1}}, "num_hidden_layers is 1, but 2 in text_model"),
        ({"text_config": {"num_hidden_layers": 4}}, "num_hidden_layers is 4, but 2 in text_model"),
        ({"text_config": {"num_attention_heads": 8}}, "num_attention_heads is 8, but 4 in text_model"),
        ({"text_config": {"vocab_size": 64}}, "vocab_size is 64, but text_model .* has 99 rows"),
        ({"vision_config": {"num_hidden_layers": 2}}, "num_hidden_layers is 2, but 3 in vision_model"),
        ({"vision_config": {"intermediate_size": 48}}, "intermediate_size is 48, but 36 in vision_model"),
        ({"vae_config": {"ch": 16}}, "ch is 16, but 8 in vae"),
        ({"vit_max_num_patch_per_side": 9}, "6 patches per side, but vit_max_num_patch_per_side is 9"),
    ],
)
def test_a_config_that_the_parts_do_not_fill_is_refused_with_both_numbers(stored, changes, numbers):
    with pytest.raises(ValueError, match=numbers):
        BagelForUnifiedMultimodal.from_backbones(stored.text, stored.vision, stored.vae, config_of(**changes))


def test_a_larger_vocabulary_in_the_config_grows_the_table(stored, loaded):
    model = build(stored, text_config={"vocab_size": 128, "qk_norm": False})
    assert model.get_input_embeddings().weight.shape[0] == model.config.text_config.vocab_size == 128
    torch.testing.assert_close(model(input_ids=WORDS).logits[..., :99], loaded.text(WORDS).logits)


# ---- parts that are none


def test_parts_of_another_kind_are_refused_by_name(stored, loaded, tmp_path):
    make = BagelForUnifiedMultimodal.from_backbones
    with pytest.raises(ValueError, match="'siglip_vision_model' model; BAGEL's decoder is a Qwen2"):
        make(stored.vision)
    with pytest.raises(ValueError, match="'qwen2' model; BAGEL's vision tower is a SigLIP"):
        make(stored.text, stored.text)
    with pytest.raises(ValueError, match=r"no diffusers\.AutoencoderKL"):
        make(stored.text, stored.vision, loaded.text)
    llama = copy_of(stored.text, tmp_path / "llama", {"model_type": "llama"})
    with pytest.raises(ValueError, match="'llama' model"):
        make(llama)
    quantised = copy_of(stored.text, tmp_path / "quantised", {"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(ValueError, match="is quantised: start from the model it was made from"):
        make(quantised)
    save_file({"x": torch.zeros(2)}, tmp_path / "ae.safetensors")
    with pytest.raises(ValueError, match=r"holds no autoencoder under the names of ae\.safetensors"):
        make(stored.text, stored.vision, tmp_path / "ae.safetensors")


def test_damaged_parts_are_refused_by_name(stored, tmp_path):
    make = BagelForUnifiedMultimodal.from_backbones
    with pytest.raises(OSError, match=r"text_model: .*nowhere is no file or folder here"):
        make(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"has no config\.json"):
        make(tmp_path / "empty")
    pickled = copy_of(stored.text, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(OSError, match="pickles"):
        make(pickled)
    broken = copy_of(stored.text, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    missing = [tensors.pop(f"model.layers.1.mlp.{name}.weight") for name in ("up_proj", "down_proj")]
    assert len(missing) == 2
    tensors["model.extra.weight"] = torch.zeros(3)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with messages() as said, pytest.raises(ValueError, match=r"has no layers.1.mlp.up_proj.weight and 1 more"):
        make(broken, **SMALL)
    assert any("extra.weight not used" in message for message in said)
    with no_init_weights(), torch.device("meta"):
        unset = Qwen2ForCausalLM(Qwen2Config(**TEXT))
    with pytest.raises(ValueError, match="not in memory"):
        make(unset)


def test_arguments_that_contradict_each_other_are_refused(stored):
    make = BagelForUnifiedMultimodal.from_backbones
    with pytest.raises(TypeError, match="no argument max_latent_sise"):
        make(stored.text, max_latent_sise=8)
    with pytest.raises(ValueError, match=r"visual_gen=True needs pretrained weights: pass vae="):
        make(stored.text, stored.vision, stage=2, **SMALL)
    with pytest.raises(ValueError, match=r"visual_und=True needs pretrained weights: pass vision_model="):
        make(stored.text, None, stored.vae, visual_und=True, **SMALL)
    with pytest.raises(ValueError, match=r"bos_token_id=151644.*outside the vocabulary of 99.*tokenizer"):
        make(stored.text)


def test_a_name_on_the_hub_is_fetched_with_what_lies_inside(stored, monkeypatch, tmp_path):
    asked = []

    def fetch(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(backbones, "snapshot_download", fetch)
    assert find_files("owner/name") == tmp_path
    assert find_files("owner/name/vae") == tmp_path / "vae"
    assert find_files("owner/name/ae.safetensors") == tmp_path / "ae.safetensors"
    assert [repository for repository, _ in asked] == ["owner/name"] * 3
    assert asked[0][1] == ["*.json", "*.txt", "*.safetensors"]
    assert asked[1][1] == ["vae*.json", "vae*.txt", "vae*.safetensors"]
    assert asked[2][1] == ["ae.safetensors"]


# ---- the tokenizer


def plain_tokenizer():
    """One that knows nothing of BAGEL, nor of padding."""
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(95)} | {"<unk>": 95}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def test_a_tokenizer_without_special_tokens_gets_them_and_the_vocabulary_grows(stored, loaded):
    tokenizer = plain_tokenizer()
    assert len(tokenizer) == 96
    model = BagelForUnifiedMultimodal.from_backbones(
        stored.text, stored.vision, stored.vae, tokenizer=tokenizer, max_latent_size=8, **EXACT
    )
    assert len(tokenizer) == 102 == model.config.text_config.vocab_size
    for name, token in SPECIAL_TOKENS.items():
        assert tokenizer.convert_ids_to_tokens(getattr(model.config, name)) == token
    assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == model.config.eos_token_id
    assert tokenizer.decode([3, *range(96, 102)], skip_special_tokens=True).strip() == "w3"
    torch.testing.assert_close(model(input_ids=WORDS).logits[..., :99], loaded.text(WORDS).logits)
    folders.new_processor(model.config, tokenizer)  # refuses a tokenizer that lacks one


def test_a_tokenizer_of_the_released_kind_stays_as_it_is():
    tokenizer = build_tiny_tokenizer()
    before = tokenizer.get_vocab()
    ids = add_special_tokens(tokenizer)
    assert tokenizer.get_vocab() == before
    assert ids["latent_token_id"] == before["<|vision_pad|>"]
    assert ids["pad_token_id"] == before["<|endoftext|>"]


def test_ids_given_by_the_caller_come_before_the_tokenizers(stored):
    model = BagelForUnifiedMultimodal.from_backbones(stored.text, tokenizer=plain_tokenizer(), bos_token_id=7)
    assert model.config.bos_token_id == 7


# ---- the script


def test_the_script_writes_a_folder_to_start_training_from(stored, tmp_path, capsys, picture):
    text = copy_of(stored.text, tmp_path / "text")
    tokenizer = build_tiny_tokenizer(vocab_size=263)
    tokenizer.save_pretrained(text)
    command = ["build", str(tmp_path / "bagel"), "--text-model", str(text), "--vision-model", str(stored.vision)]
    command += ["--vae", str(stored.vae), "--set", "max_latent_size=8"]
    assert commands.main(command) == 0
    assert "model.safetensors" in capsys.readouterr().out
    model = AutoModel.from_pretrained(tmp_path / "bagel", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "bagel", trust_remote_code=True)
    assert model.get_input_embeddings().weight.shape[0] == 263
    assert (model.config.bos_token_id, model.config.latent_token_id) == (
        processor.bos_token_id,
        processor.latent_token_id,
    )
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "night"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        generation_mode="image",
    )
    drawn = model.generate(**inputs, generation_mode="image", num_timesteps=3, progress_bar=False)[0]
    assert max(drawn.size) <= 8 * model.config.latent_downsample
    assert commands.main(command) == 1
    assert "not an empty directory" in capsys.readouterr().err
    assert commands.main(["build", str(tmp_path / "x"), "--text-model", str(text), "--set", "stage:1"]) == 1
    assert "NAME=JSON" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


# ---- the vocabulary


@pytest.fixture(params=[False, True], ids=["own head", "tied"])
def grown(request, loaded, tied):
    """A model to resize, and its logits before."""
    model = BagelForUnifiedMultimodal.from_backbones(tied if request.param else loaded.text, **SMALL)
    return model, model(input_ids=WORDS).logits.detach()


@pytest.mark.parametrize(("rows", "shrink"), [(128, None), (99, False)], ids=["padded", "told to"])
def test_fewer_tokens_than_rows_keep_the_rows(grown, rows, shrink):
    model, _ = grown
    model.resize_token_embeddings(rows)
    before = model(input_ids=WORDS).logits.detach()
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with messages(module=modeling_bagel) as said:
        for _ in range(2):
            assert model.resize_token_embeddings(98, shrink=shrink).weight is table
    assert len(said) == 1
    assert f"keeps its {rows} rows, although 98" in said[0]
    assert model.get_output_embeddings().weight is head
    assert model.config.text_config.vocab_size == rows
    assert torch.equal(model(input_ids=WORDS).logits, before)
    model.config.bos_token_id = 151644
    assert model.resize_token_embeddings(98, shrink=shrink).weight is table, "nothing changes, so nothing is refused"


def test_more_tokens_than_rows_grow_table_and_head(grown):
    model, before = grown
    requires_grad = model.get_input_embeddings().weight.requires_grad
    assert model.resize_token_embeddings(120) is model.get_input_embeddings()
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embeddings.weight.shape == head.weight.shape == (120, 32)
    assert (embeddings.num_embeddings, head.out_features) == (120, 120)
    assert (embeddings.weight is head.weight) == model.config.tie_word_embeddings
    assert embeddings.weight.requires_grad == requires_grad
    assert model.config.text_config.vocab_size == model.language_model.config.vocab_size == 120
    assert model.config.bos_token_id == 1
    torch.testing.assert_close(model(input_ids=WORDS).logits[..., :99], before)
    labels = torch.full_like(WORDS, 119)
    assert model(input_ids=labels, labels=labels).loss.isfinite()
    assert model.generate(WORDS, max_new_tokens=2, do_sample=False).shape[1] > WORDS.shape[1]


def test_padding_to_a_multiple_is_honoured_also_where_rows_are_kept(grown):
    model, _ = grown
    assert model.resize_token_embeddings(99, pad_to_multiple_of=3).weight.shape[0] == 99
    model.resize_token_embeddings(128)
    assert model.resize_token_embeddings(10, pad_to_multiple_of=64).weight.shape[0] == 128
    assert model.resize_token_embeddings(129, pad_to_multiple_of=64).weight.shape[0] == 192
    assert model.get_output_embeddings().weight.shape[0] == model.config.text_config.vocab_size == 192
    assert model.resize_token_embeddings().weight.shape[0] == 192


def test_the_table_shrinks_when_asked_to_but_never_below_a_special_id(grown):
    model, _ = grown
    model.resize_token_embeddings(60, shrink=True)
    assert model.get_output_embeddings().weight.shape[0] == model.config.text_config.vocab_size == 60
    words = WORDS.clamp(max=59)
    assert model(input_ids=words).logits.shape[-1] == 60
    model.config.vision_end_token_id = 58
    with pytest.raises(ValueError, match="58 rows has no place for vision_end_token_id=58"):
        model.resize_token_embeddings(58, shrink=True)
    assert model.config.text_config.vocab_size == 60


def test_a_table_without_padding_is_cut_as_everywhere_in_transformers(grown):
    model, _ = grown
    model.resize_token_embeddings(109)
    model.resize_token_embeddings(84)
    assert model.get_output_embeddings().weight.shape[0] == model.config.text_config.vocab_size == 84


def test_a_resized_model_is_saved_loaded_exported_and_adopted(stored, tmp_path):
    model = build(stored)
    model.resize_token_embeddings(100, pad_to_multiple_of=8)
    expected = model(input_ids=WORDS).logits
    assert expected.shape[-1] == 104
    model.save_pretrained(tmp_path / "saved")
    conversion.export(tmp_path / "saved", tmp_path / "released")
    conversion.adopt(tmp_path / "released")
    for folder in ("saved", "released"):
        loaded = BagelForUnifiedMultimodal.from_pretrained(tmp_path / folder)
        assert loaded.config.text_config.vocab_size == 104
        assert torch.equal(loaded(input_ids=WORDS).logits, expected)
        loaded.resize_token_embeddings(99, shrink=False)
        assert loaded.config.text_config.vocab_size == 104


def test_adapters_with_new_rows_are_saved_and_loaded(stored, tmp_path):
    peft = pytest.importorskip("peft")

    def base():
        torch.manual_seed(0)
        model = build(stored)
        model.resize_token_embeddings(110)
        return model

    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(base(), config).eval()
    with torch.no_grad():
        adapted.get_input_embeddings().weight[105] += 1.0
    ids = torch.full((1, 4), 105)
    expected = adapted(input_ids=ids).logits
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(again(input_ids=ids).logits, expected)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)
    assert merged.get_input_embeddings().weight.shape[0] == 110


def test_a_trainer_checkpoint_of_a_resized_model_resumes_and_reloads(stored, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def train(steps, resume=None):
        torch.manual_seed(0)
        model = build(stored)
        model.resize_token_embeddings(110)
        rows = [{"input_ids": row, "labels": row} for row in (WORDS + 20).clamp(max=109)]
        arguments = transformers.TrainingArguments(
            output_dir=tmp_path,
            max_steps=steps,
            per_device_train_batch_size=2,
            save_steps=1,
            learning_rate=1e-2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return model.eval()

    trained = train(2)
    resumed = train(2, resume=str(tmp_path / "checkpoint-1"))
    assert torch.equal(resumed(input_ids=WORDS).logits, trained(input_ids=WORDS).logits)
    reloaded = AutoModel.from_pretrained(tmp_path / "checkpoint-2", trust_remote_code=True)
    torch.testing.assert_close(reloaded(input_ids=WORDS).logits, trained(input_ids=WORDS).logits)
    assert reloaded.config.text_config.vocab_size == 110
