# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What users get wrong: one clear sentence each that names what, where and the remedy, and nothing half-done."""

import re

import pytest
import torch

from bagel.embeddings_bagel import latent_position_ids
from bagel.modeling_bagel import BagelForUnifiedMultimodal


pytestmark = pytest.mark.core

FAST = {"generation_mode": "image", "num_timesteps": 3, "progress_bar": False}


@pytest.fixture(scope="module")
def edit(processor, picture):
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "make it night"}]
    return dict(
        processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            generation_mode="image",
        )
    )


@pytest.fixture(scope="module")
def reader(tiny_directory):
    return BagelForUnifiedMultimodal.from_pretrained(tiny_directory, stage=1).eval()


def without(inputs, *names):
    return {name: tensor for name, tensor in inputs.items() if name not in names}


def refused(call, *words):
    """The call raises a one-line ValueError that holds every word."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message.strip()
    for word in words:
        assert re.search(word, message), f"{word!r} is not in {message!r}"


# ---- images and their placeholders


def test_place_without_picture(model, edit):
    refused(lambda: model(**without(edit, "pixel_values", "image_grid_hw")), "mark 1 images", "image_token_id", "0")


def test_picture_without_place(model, edit):
    ids = edit["input_ids"].masked_fill(edit["input_ids"] == model.config.image_token_id, 65)
    refused(lambda: model(**{**edit, "input_ids": ids}), "mark 0 images", "describes 1")


def test_too_few_places(model, edit):
    ids, mask = edit["input_ids"], edit["attention_mask"]
    cut = int((ids[0] == model.config.image_token_id).nonzero()[0])
    shorter = {
        **edit,
        "input_ids": torch.cat([ids[:, :cut], ids[:, cut + 1 :]], dim=1),
        "attention_mask": mask[:, 1:],
    }
    count = int((ids == model.config.image_token_id).sum())
    refused(lambda: model(**shorter), f"has {count - 1} placeholders", f"says {count}")


def test_truncated_prompt_cuts_a_picture(model, edit):
    end = int((edit["input_ids"][0] == model.config.image_token_id).nonzero()[-1]) + 1
    cut = {**edit, "input_ids": edit["input_ids"][:, :end], "attention_mask": edit["attention_mask"][:, :end]}
    refused(lambda: model(**cut), "not enclosed", "row 0, column", "truncated")


def test_grid_and_patches_disagree(model, edit):
    grid = edit["image_grid_hw"] + 1
    refused(lambda: model(**{**edit, "image_grid_hw": grid}), "image_grid_hw", "pixel_values has shape")


def test_patches_without_grid(model, edit):
    refused(lambda: model(**without(edit, "image_grid_hw")), "need image_grid_hw")
    refused(lambda: model(**without(edit, "latent_image_sizes")), "need latent_image_sizes")


def test_grid_larger_than_the_vision_table(model, edit):
    side = model.config.vit_max_num_patch_per_side + 1
    ids = [model.config.vision_start_token_id, *[model.config.image_token_id] * side, model.config.vision_end_token_id]
    refused(
        lambda: model(
            input_ids=torch.tensor([ids]), pixel_values=torch.zeros(side, 588), image_grid_hw=torch.tensor([[1, side]])
        ),
        f"1x{side}",
        "Resize|interpolate_pos",
    )


def test_latent_grid_larger_than_max_latent_size(model, edit):
    refused(lambda: model.generate(**edit, **FAST, height=512, width=512), "max_latent_size=16", "256 pixels")


@pytest.mark.parametrize("size", [100, 0, -16])
def test_height_that_is_no_multiple_of_16(model, edit, size):
    refused(lambda: model.generate(**edit, **FAST, height=size), f"height={size}", "multiple of 16", "nearest is")


# ---- prompts


def test_empty_prompt(model, processor):
    empty = torch.zeros(1, 0, dtype=torch.long)
    refused(lambda: model.generate(input_ids=empty), "empty")
    refused(lambda: model.generate(input_ids=empty, **FAST), "empty")
    refused(lambda: model.generate(input_ids=torch.tensor([[model.config.bos_token_id]]), **FAST), "empty", "bos")
    for text in ("", "  ", "<|im_start|><|im_end|>"):
        refused(lambda text=text: processor(text=text), "empty")


def test_ids_as_floats_and_pixels_as_integers(model, edit):
    refused(lambda: model(**{**edit, "input_ids": edit["input_ids"].float()}), "input_ids", "float32", "integer")
    refused(lambda: model(**{**edit, "pixel_values": edit["pixel_values"].int()}), "pixel_values", "int32", "floating")


def test_inputs_on_different_devices(model, edit):
    mixed = {**edit, "pixel_values": edit["pixel_values"].to("meta")}
    refused(lambda: model(**mixed), "pixel_values on meta", "input_ids on cpu", "Move")


def test_attention_mask_of_another_length(model, edit):
    refused(lambda: model(**{**edit, "attention_mask": edit["attention_mask"][:, 1:]}), "attention_mask", "expected")


def test_ids_and_embeddings_together(model, edit):
    embeds = model.get_input_embeddings()(edit["input_ids"])
    refused(lambda: model(**edit, inputs_embeds=embeds), "exactly one of input_ids and inputs_embeds")
    refused(lambda: model(), "exactly one")


# ---- arguments of generate


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"cfg_interval": (1.0, 0.4)}, ["cfg_interval", "reversed"]),
        ({"cfg_renorm_type": "per_token"}, ["cfg_renorm_type", "per_token", "global"]),
        ({"cfg_renorm_min": 2.0}, ["cfg_renorm_min", "2.0"]),
        ({"num_timesteps": 1}, ["num_timesteps=1", "knots"]),
        ({"timestep_shift": 0.0}, ["timestep_shift", "positive"]),
        ({"output_type": "np"}, ["output_type", "np", "pil"]),
        ({"guidance_scale_image": 3.0}, ["guidance_scale_image", "unknown"]),
        ({"num_inference_steps": 3}, ["num_inference_steps", "num_timesteps"]),
        ({"latents": torch.zeros(3, 5)}, ["latents", r"\(3, 5\)", "expected"]),
        ({"generator": [torch.Generator()] * 3}, ["3 generators", "1 samples"]),
        ({"height": [64, 64]}, ["height", "2 values", "1 samples"]),
    ],
)
def test_wrong_drawing_arguments(model, edit, arguments, words):
    refused(lambda: model.generate(**{**edit, **FAST, **arguments}), *words)


def test_drawing_arguments_in_text_mode(model, edit):
    refused(lambda: model.generate(**edit, cfg_text_scale=3.0), "cfg_text_scale", "generation_mode")


def test_unknown_arguments_in_text_mode(model, edit):
    with pytest.raises(ValueError, match="temprature"):
        model.generate(**edit, temprature=3.0)


def test_unknown_generation_mode(model, edit):
    refused(lambda: model.generate(**edit, generation_mode="picture"), "picture", "text", "image", "interleaved")


def test_unknown_forward_argument(model, edit):
    with pytest.raises(TypeError, match="pixels"):
        model(**edit, pixels=1)


def test_beams_in_interleaved_mode(model, edit):
    refused(lambda: model.generate(**edit, generation_mode="interleaved", num_beams=2), "beams")


def test_image_guidance_without_text_guidance_warns_once(model, edit, caplog):
    from bagel import generation_bagel

    generation_bagel.logger.warning_once.cache_clear()
    with caplog.at_level("WARNING"):
        generation_bagel.logger.addHandler(caplog.handler)
        model.generate(**edit, **FAST, cfg_text_scale=1.0, cfg_img_scale=2.0)
        generation_bagel.logger.removeHandler(caplog.handler)
    assert "cfg_img_scale=2.0 has no effect" in caplog.text


# ---- a model that only reads


def test_reader_asked_to_draw(reader, edit):
    for mode in ("image", "interleaved"):
        refused(lambda mode=mode: reader.generate(**edit, generation_mode=mode), "visual_gen=False", "stage=2")


def test_reader_given_vae_pictures(reader, edit):
    refused(lambda: reader(**edit), "visual_gen=False", "VAE")


def test_model_without_vision_tower_given_pictures(tiny_directory, edit):
    blind = BagelForUnifiedMultimodal.from_pretrained(tiny_directory, visual_und=False).eval()
    refused(lambda: blind(**edit), "visual_und=False")


# ---- training packs


@pytest.fixture
def pack(model):
    """Two texts and a picture to learn, as released data pipelines make them."""
    config, ids = model.config, torch.arange(65, 75)
    tokens = 4
    return {
        "sequence_length": 10 + 2 + tokens,
        "packed_text_ids": torch.cat([ids, torch.tensor([config.vision_start_token_id, config.vision_end_token_id])]),
        "packed_text_indexes": torch.cat([torch.arange(10), torch.tensor([10, 15])]),
        "sample_lens": [4, 12],
        "split_lens": [4, 6, 6],
        "attn_modes": ["causal", "causal", "noise"],
        "packed_position_ids": torch.tensor([*range(4), *range(6), *[6] * 6]),
        "packed_vae_token_indexes": torch.arange(11, 15),
        "packed_latent_position_ids": latent_position_ids(model.config, (2, 2)),
        "padded_latent": torch.randn(1, 4, 4, 4),
        "patchified_vae_latent_shapes": [(2, 2)],
        "packed_timesteps": torch.zeros(tokens),
        "mse_loss_indexes": torch.arange(11, 15),
        "ce_loss_indexes": torch.arange(3),
        "packed_label_ids": torch.arange(66, 69),
    }


def test_good_pack_has_a_loss(model, pack):
    output = model(**pack)
    assert output.loss.isfinite()
    torch.testing.assert_close(output.loss, output.ce.mean() + output.mse.mean())
    assert output.mse.shape == (4, model.config.patch_latent_dim)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"packed_vae_token_indexes": torch.arange(10, 14)}, ["Token 10", "more than once"]),
        ({"packed_vae_token_indexes": torch.tensor([11, 12, 13, 13])}, ["Token 13", "more than once"]),
        ({"packed_text_indexes": torch.cat([torch.arange(10), torch.tensor([10, 16])])}, ["16", "sequence_length=16"]),
        ({"packed_text_indexes": torch.cat([torch.arange(10), torch.tensor([10, -1])])}, ["-1", "sequence_length"]),
        ({"sequence_length": 17, "sample_lens": [4, 13]}, ["Token 16", "not filled"]),
        ({"sample_lens": [4, 11]}, ["sample_lens", "15", "16"]),
        ({"split_lens": [4, 6, 5]}, ["split_lens sum to 15", "16"]),
        ({"attn_modes": ["causal", "causal"]}, ["3 split_lens", "2 attn_modes"]),
        ({"attn_modes": ["causal", "causal", "noisy"]}, ["noisy", "noise"]),
        ({"attn_modes": None}, ["split_lens", "nested_attention_masks"]),
        ({"packed_text_ids": torch.arange(65, 70)}, ["5 packed_text_ids", "12 packed_text_indexes"]),
        ({"packed_position_ids": torch.arange(9)}, ["packed_position_ids", r"\(9,\)", "16"]),
        ({"packed_timesteps": torch.zeros(3)}, ["3 packed_timesteps", "4 packed_vae_token_indexes"]),
        ({"padded_latent": None}, ["padded_latent", "padded_images"]),
        ({"packed_label_ids": torch.arange(2)}, ["3 ce_loss_indexes", "2 packed_label_ids"]),
        ({"mse_loss_indexes": torch.arange(11, 13)}, ["2 mse_loss_indexes", "4 latent tokens"]),
        ({"packed_text_ids": None}, ["packed_text_ids"]),
    ],
)
def test_packs_that_contradict_themselves(model, pack, changes, words):
    refused(lambda: model(**{**pack, **changes}), *words)


def test_latent_pack_for_a_reader(reader, pack):
    refused(lambda: reader(**pack), "visual_gen=False")


def test_failed_calls_leave_the_model_unchanged(model, edit):
    before = model(**edit).logits
    with pytest.raises(ValueError):
        model.generate(**edit, **FAST, height=100)
    assert torch.equal(model(**edit).logits, before)
