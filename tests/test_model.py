# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The model as transformers sees it: 7B names, saving, dtypes, offload, checkpointing, resizing, losses."""

import json

import pytest
import torch
from parity_data import RELEASED_MANIFEST, read_json
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.modeling_outputs import BaseModelOutputWithPooling

from bagel.configuration_bagel import BagelConfig
from bagel.inputs_bagel import find_placeholders
from bagel.modeling_bagel import BagelForUnifiedMultimodal


pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def batch(processor, picture, other_picture):
    """Two rows of different length; each holds a picture that is read and one that came through the VAE."""
    conversations = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": picture}, {"type": "text", "text": "make it night, please"}],
            }
        ],
        [{"role": "user", "content": [{"type": "image", "image": other_picture}, {"type": "text", "text": "blue"}]}],
    ]
    return dict(
        processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, return_tensors="pt", generation_mode="image"
        )
    )


@pytest.fixture(scope="module")
def labels(batch):
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


@pytest.fixture(scope="module")
def manifest():
    return read_json(RELEASED_MANIFEST)


def meta_7b(repo, **overrides):
    with torch.device("meta"):
        return BagelForUnifiedMultimodal(BagelConfig.from_pretrained(repo, **overrides))


def test_7b_config_gives_exactly_the_released_tensors(repo, manifest):
    tensors = {name: list(tensor.shape) for name, tensor in meta_7b(repo).state_dict().items()}
    decoder = {name: shape for name, shape in tensors.items() if not name.startswith("vae.")}
    assert decoder == manifest["ema.safetensors"]
    assert len(decoder) == 1223
    assert sum(torch.Size(shape).numel() for shape in decoder.values()) == 14_607_260_128
    vae = [torch.Size(shape).numel() for name, shape in tensors.items() if name.startswith("vae.")]
    assert (len(vae), sum(vae)) == (244, 83_819_683)


def test_stage_1_of_the_7b_config_has_no_generation_parts(repo, manifest):
    tensors = set(meta_7b(repo, stage=1).state_dict())
    parts = ("_moe_gen", "time_embedder", "vae2llm", "llm2vae", "latent_pos_embed")
    assert tensors == {name for name in manifest["ema.safetensors"] if not any(part in name for part in parts)}


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM])
def test_every_auto_class_loads_the_model_from_a_folder(auto_class, tiny_directory, model):
    loaded = auto_class.from_pretrained(tiny_directory, trust_remote_code=True)
    assert type(loaded).__name__ == "BagelForUnifiedMultimodal"
    for (name, tensor), other in zip(model.state_dict().items(), loaded.state_dict().values()):
        assert torch.equal(tensor, other), name
    assert AutoConfig.from_pretrained(tiny_directory, trust_remote_code=True).model_type == "bagel"


def test_saved_model_loads_through_auto_classes_and_says_the_same(model, batch, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModelForMultimodalLM"]


def test_bfloat16_keeps_tables_and_draws(tiny_directory, batch):
    model = BagelForUnifiedMultimodal.from_pretrained(tiny_directory, dtype=torch.bfloat16).eval()
    assert model.language_model.lm_head.weight.dtype == torch.bfloat16
    exact = BagelForUnifiedMultimodal.from_pretrained(tiny_directory).eval()
    low, high = model(**batch).logits.float(), exact(**batch).logits
    valid = batch["attention_mask"].bool()
    assert (low - high)[valid].abs().max() < 0.15 * high[valid].abs().max()
    images = model.generate(**batch, generation_mode="image", num_timesteps=3, progress_bar=False, output_type="pt")
    assert all(image.isfinite().all() for image in images)


def test_offload_to_disk_changes_nothing(tiny_directory, model, batch, tmp_path):
    device_map = {name: "cpu" for name, _ in model.named_children()} | {"vit_model": "disk"}
    del device_map["language_model"]
    device_map |= {
        "language_model.lm_head": "cpu",
        "language_model.model.embed_tokens": "cpu",
        "language_model.model.norm": "cpu",
        "language_model.model.norm_moe_gen": "cpu",
        "language_model.model.rotary_emb": "cpu",
        "language_model.model.layers.0": "cpu",
        "language_model.model.layers.1": "disk",
        "language_model.model.layers.2": "disk",
    }
    offloaded = BagelForUnifiedMultimodal.from_pretrained(
        tiny_directory, device_map=device_map, offload_folder=tmp_path
    ).eval()
    assert any(parameter.device.type == "meta" for parameter in offloaded.parameters())
    torch.testing.assert_close(offloaded(**batch).logits, model(**batch).logits)
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    drawn = [
        m.generate(**batch, generation_mode="image", num_timesteps=3, progress_bar=False, generator=g, output_type="pt")
        for m, g in zip((model, offloaded), seeds)
    ]
    torch.testing.assert_close(drawn[0][0], drawn[1][0])


def test_attention_implementation_can_be_changed_later(tiny_directory, batch, monkeypatch):
    warnings = []
    monkeypatch.setattr("transformers.modeling_utils.logger.warning", lambda message, *_: warnings.append(message))
    model = BagelForUnifiedMultimodal.from_pretrained(tiny_directory, attn_implementation="eager").eval()
    eager = model(**batch, output_attentions=True)
    assert len(eager.attentions) == model.config.text_config.num_hidden_layers
    model.set_attn_implementation("sdpa")
    assert warnings == []
    assert model.config.text_config._attn_implementation == model.config.vision_config._attn_implementation == "sdpa"
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**batch).logits[valid], eager.logits[valid], atol=2e-5, rtol=0)


def test_attention_weights_follow_the_layout(tiny_directory, batch):
    model = BagelForUnifiedMultimodal.from_pretrained(tiny_directory, attn_implementation="eager").eval()
    weights = model(**batch, output_attentions=True).attentions[0][0].sum(0)
    places = find_placeholders(model.config, batch["input_ids"])
    first = int(places.start[0].nonzero()[0])
    last = int(places.end[0].nonzero()[0])
    assert (weights[first, first : last + 1] > 0).all(), "vision_start sees its whole picture"
    text = int((~places.in_image[0] & batch["attention_mask"][0].bool()).nonzero()[0])
    assert (weights[text, text + 1 :] == 0).all(), "text sees nothing after itself"


def test_hidden_states_come_in_the_order_of_the_input(model, batch):
    """With both experts at work the layers run on sorted tokens; nobody outside sees that."""
    output = model(**batch, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.text_config.num_hidden_layers + 1
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    text_ids = batch["input_ids"][0, -3:]
    assert torch.equal(output.hidden_states[0][0, -3:], model.get_input_embeddings()(text_ids))
    shortened = {**batch, "input_ids": batch["input_ids"].clone()}
    shortened["input_ids"][0, -2] = 65
    changed = model(**shortened, output_hidden_states=True)
    for one, other in zip(output.hidden_states, changed.hidden_states):
        torch.testing.assert_close(one[:, :-2], other[:, :-2])
        assert not torch.allclose(one[0, -2:], other[0, -2:])


def test_gradient_checkpointing_gives_the_same_gradients(tiny_directory, batch, labels):
    gradients = []
    for checkpointing in (False, True):
        model = BagelForUnifiedMultimodal.from_pretrained(tiny_directory).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch, labels=labels, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_every_trainable_parameter_takes_part_in_a_text_loss(tiny_directory, labels, batch):
    """Data-parallel training waits for every parameter, also when a batch has no picture to learn."""
    model = BagelForUnifiedMultimodal.from_pretrained(tiny_directory).train()
    text = {name: batch[name][1:, -4:] for name in ("input_ids", "attention_mask")}
    model(**text, labels=labels[1:, -4:]).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert not any(p.requires_grad for p in model.vae.parameters())
    untouched = ("moe_gen", "vit_model", "connector", "vae2llm", "llm2vae", "time_embedder")
    for name, parameter in model.named_parameters():
        if any(part in name for part in untouched) and parameter.requires_grad:
            assert parameter.grad.abs().max() == 0, name


def test_loss_is_the_shifted_cross_entropy_of_the_labels(model, batch, labels):
    output = model(**batch, labels=labels)
    logits, targets = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    # places lie in the vocabulary here, so they count like any label
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(logits, targets))


def test_logits_to_keep_keeps_the_last(model, batch):
    whole = model(**batch).logits
    assert torch.equal(model(**batch, logits_to_keep=3).logits, whole[:, -3:])
    assert torch.equal(model(**batch, logits_to_keep=torch.tensor([0, 5])).logits, whole[:, [0, 5]])


def test_embeddings_with_pictures_equal_ids_with_pictures(model, batch):
    embeds = model.get_input_embeddings()(batch["input_ids"])
    others = {name: tensor for name, tensor in batch.items() if name != "input_ids"}
    torch.testing.assert_close(model(inputs_embeds=embeds, **others).logits, model(**batch).logits)


def test_vocabulary_can_grow_and_be_cut(tiny_directory, batch):
    model = BagelForUnifiedMultimodal.from_pretrained(tiny_directory).eval()
    before, size = model(**batch).logits, model.config.text_config.vocab_size
    model.resize_token_embeddings(size + 10)
    assert model.config.text_config.vocab_size == size + 10
    torch.testing.assert_close(model(**batch).logits[..., :size], before)
    model.resize_token_embeddings(size, shrink=True)
    torch.testing.assert_close(model(**batch).logits, before)


def test_tied_embeddings_share_and_survive_saving(tmp_path, tiny_directory):
    config = BagelConfig.from_pretrained(tiny_directory, tie_word_embeddings=True)
    model = BagelForUnifiedMultimodal(config)
    assert model.language_model.lm_head.weight is model.language_model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = BagelForUnifiedMultimodal.from_pretrained(tmp_path)
    assert loaded.language_model.lm_head.weight is loaded.language_model.model.embed_tokens.weight


def test_image_features_are_per_picture(model, batch):
    features = model.get_image_features(batch["pixel_values"], batch["image_grid_hw"])
    assert isinstance(features, BaseModelOutputWithPooling)
    assert [len(f) for f in features.pooler_output] == batch["image_grid_hw"].prod(-1).tolist()
    places = find_placeholders(model.config, batch["input_ids"]).image
    embedded = model(**batch, output_hidden_states=True).hidden_states[0][places]
    torch.testing.assert_close(embedded, torch.cat(features.pooler_output))


def test_padding_of_vae_pictures_changes_nothing(model, batch):
    wider = {**batch, "latent_pixel_values": torch.nn.functional.pad(batch["latent_pixel_values"], (0, 32, 0, 48))}
    torch.testing.assert_close(model(**wider).logits, model(**batch).logits)


def test_reading_without_diffusers_needs_stage_1(tiny_directory, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    model = BagelForUnifiedMultimodal.from_pretrained(tiny_directory, stage=1)
    assert not any("moe_gen" in name or name.startswith("vae") for name, _ in model.named_parameters())
    with pytest.raises(ImportError, match="diffusers"):
        BagelForUnifiedMultimodal(BagelConfig.from_pretrained(tiny_directory))
