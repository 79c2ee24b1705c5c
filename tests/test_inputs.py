# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Both input formats become one object, and a prompt is read once whatever is done with it."""

import inspect

import pytest
import torch
from tiny_models import attention_kernel, fresh_tiny_model, padded_batch, tiny_config, tiny_model, training_pack
from transformers import BatchFeature

from bagel import modeling_bagel
from bagel.decoder_bagel import BagelTextModel
from bagel.inputs_bagel import ImageTensors, Inputs, PackKwargs, Prompt
from bagel.modeling_bagel import BagelForUnifiedMultimodal, BagelModel


pytestmark = pytest.mark.core

FAST = {"num_timesteps": 3, "progress_bar": False, "output_type": "latent"}
EDIT = [("vae", 2, 2), ("vit", 2, 3), ("text", 4)]


@pytest.fixture
def scans(monkeypatch) -> list:
    """The shapes of the prompts that are read."""
    seen, read = [], Prompt.read.__func__

    def counted(cls, config, input_ids, *args, **kwargs):
        seen.append(tuple(input_ids.shape))
        return read(cls, config, input_ids, *args, **kwargs)

    monkeypatch.setattr(Prompt, "read", classmethod(counted))
    return seen


def edits(*conversations) -> dict[str, torch.Tensor]:
    return padded_batch(conversations or [EDIT, EDIT], 0)


# ---- one scan


def test_an_edit_with_both_guidances_and_a_plan_reads_its_prompt_once(scans):
    inputs = edits()
    tiny_model().generate(
        **inputs, generation_mode="image", think=True, max_new_tokens=3, cfg_text_scale=4.0, cfg_img_scale=2.0, **FAST
    )
    assert scans == [tuple(inputs["input_ids"].shape)]


def test_several_drawings_of_one_prompt_read_it_once(scans):
    tiny_model().generate(**edits(), generation_mode="image", num_return_sequences=2, cfg_img_scale=2.0, **FAST)
    assert len(scans) == 1


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 3}])
def test_an_answer_about_images_reads_its_prompt_once(scans, options):
    tiny_model().generate(**edits(), max_new_tokens=3, **options)
    assert len(scans) == 1


def test_a_forward_with_images_reads_its_prompt_once_and_text_alone_never(scans):
    with torch.no_grad():
        tiny_model()(**edits())
        assert len(scans) == 1
        tiny_model()(input_ids=torch.tensor([[1, 50, 51, 2]]))
    assert len(scans) == 1


def test_a_prompt_that_was_read_before_gives_the_same_logits():
    model, inputs = tiny_model(), edits()
    sizes = (inputs["image_grid_hw"], inputs["latent_image_sizes"])
    prompt = Prompt.read(model.config, inputs["input_ids"], inputs["attention_mask"], *sizes)
    with torch.no_grad():
        assert torch.equal(model(**inputs, prompt=prompt).logits, model(**inputs).logits)


# ---- prompts


def test_selected_rows_are_the_prompts_of_those_rows():
    config = tiny_config()
    batch = padded_batch([EDIT, [("text", 2)], [("vit", 1, 2), ("text", 3)]], 0)
    images = ImageTensors(**{name: batch[name] for name in ImageTensors._fields if name in batch})
    sizes = (images.image_grid_hw, images.latent_image_sizes)
    prompt = Prompt.read(config, batch["input_ids"], batch["attention_mask"], *sizes)
    rows = [2, 0, 2]
    chosen, its_images = prompt.select(rows, images)
    again = Prompt.read(
        config,
        batch["input_ids"][rows],
        batch["attention_mask"][rows],
        its_images.image_grid_hw,
        its_images.latent_image_sizes,
    )
    assert chosen.image_grids == again.image_grids == ((1, 2), (2, 3), (1, 2))
    assert torch.equal(chosen.position_ids, again.position_ids)
    assert all(torch.equal(one, other) for one, other in zip(chosen.placeholders, again.placeholders))


def test_what_is_appended_continues_positions_after_each_row():
    config = tiny_config()
    batch = padded_batch([EDIT, [("text", 2)]], 0)
    prompt = Prompt.read(
        config, *(batch[n] for n in ("input_ids", "attention_mask", "image_grid_hw", "latent_image_sizes"))
    )
    text = torch.tensor([[50, 51], [50, 51]])
    longer = prompt.append(Prompt.of_text(config, text, torch.ones_like(text, dtype=torch.bool)))
    assert torch.equal(longer.position_ids[:, -2:], prompt.next_position[:, None] + torch.tensor([[0, 1]]))
    assert longer.next_position.tolist() == (prompt.next_position + 2).tolist()


# ---- the face of forward


@pytest.mark.parametrize("model_class", [BagelForUnifiedMultimodal, BagelModel])
def test_forward_names_at_most_fourteen_arguments(model_class):
    parameters = inspect.signature(model_class.forward).parameters
    named = [name for name, one in parameters.items() if one.kind is not one.VAR_KEYWORD and name != "self"]
    assert len(named) <= 14 and len(parameters) == len(named) + 2


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("pixel_value", "pixel_values"),
        ("image_grid_thw", "image_grid_hw"),
        ("packed_text_id", "packed_text_ids"),
        ("output_attention", "output_attentions"),
    ],
)
def test_an_unknown_argument_is_refused_with_the_nearest_known_one(wrong, nearest):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{wrong}'. Did you mean {nearest}"):
        tiny_model()(input_ids=torch.tensor([[1, 50, 2]]), **{wrong: torch.ones(1)})


def test_arguments_that_transformers_passes_through_models_are_known():
    ids = torch.tensor([[1, 50, 51, 2]])
    with torch.no_grad():
        plain = tiny_model()(input_ids=ids).logits
        passed = tiny_model()(
            input_ids=ids,
            output_attentions=False,
            num_items_in_batch=None,
            cache_position=torch.arange(4),
            is_causal=True,
        )
    assert torch.equal(passed.logits, plain)


def test_a_pack_is_known_by_the_names_of_the_released_pipeline():
    pack = training_pack([[("text", 3), ("vit", 2, 2), ("vae", 1, 2), ("noise", 2, 2)]])
    assert pack.keys() <= PackKwargs.__optional_keys__
    inputs = Inputs.from_pack(tiny_config(), None, pack, None)
    assert inputs.layout.length == pack["sequence_length"]
    assert len(inputs.targets.labels) == len(pack["packed_label_ids"])
    assert len(inputs.targets.velocity) == len(pack["mse_loss_indexes"])


def test_inputs_of_a_pack_are_not_changed():
    pack = training_pack([[("text", 3), ("noise", 2, 2)]])
    before = {
        name: value.clone() if torch.is_tensor(value) else list(value) if isinstance(value, list) else value
        for name, value in pack.items()
    }
    tiny_model()(**pack)
    assert all(torch.equal(v, pack[n]) if torch.is_tensor(v) else v == pack[n] for n, v in before.items())


# ---- the base model


def test_the_base_model_loads_from_the_whole_one_and_computes_the_same(tmp_path):
    model = fresh_tiny_model().eval()
    model.save_pretrained(tmp_path)
    base = BagelModel.from_pretrained(tmp_path).eval()
    assert not hasattr(base.language_model, "lm_head") and not hasattr(base, "llm2vae")
    inputs = edits()
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        torch.testing.assert_close(base(**inputs).last_hidden_state, expected)
    names = {name for name, _ in model.named_parameters()}
    assert names - {name for name, _ in base.named_parameters()} == {
        "language_model.lm_head.weight",
        "llm2vae.weight",
        "llm2vae.bias",
    }


def test_a_saved_base_model_lacks_the_heads_and_the_error_names_them(tmp_path):
    BagelModel(tiny_config()).save_pretrained(tmp_path)
    assert isinstance(BagelModel.from_pretrained(tmp_path), BagelModel)
    with pytest.raises(ValueError, match="lm_head"):
        BagelForUnifiedMultimodal.from_pretrained(tmp_path)


def test_decoder_encoder_and_base_are_found_where_transformers_looks():
    model = tiny_model()
    assert isinstance(model.get_decoder(), BagelTextModel)
    assert model.get_encoder("image") is model.vit_model
    assert callable(model.base_model.forward)
    assert isinstance(model, BagelModel)
    assert BagelForUnifiedMultimodal.supports_config(model.config)
    assert not BagelForUnifiedMultimodal.supports_config(model.config.text_config)


def test_a_batch_feature_goes_in_as_it_is():
    with torch.no_grad():
        assert torch.equal(tiny_model()(**BatchFeature(edits())).logits, tiny_model()(**edits()).logits)


# ---- flattened batches


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_samples_of_a_flattened_batch_never_see_each_other(kernel):
    samples = [[1, 50, 51, 2], [1, 60, 2], [1, 2]]
    flat = torch.tensor([[token for sample in samples for token in sample]])
    positions = torch.tensor([[n for sample in samples for n in range(len(sample))]])
    model = tiny_model()
    with attention_kernel(model, kernel), torch.no_grad():
        together = model(input_ids=flat, position_ids=positions).logits[0]
        alone = torch.cat([model(input_ids=torch.tensor([sample])).logits[0] for sample in samples])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_sequence_lengths_without_restarting_positions_are_refused():
    with pytest.raises(ValueError, match=r"cu_seq_lens_q=\[0, 2, 4\] .* position_ids"):
        tiny_model()(input_ids=torch.tensor([[1, 2, 1, 2]]), cu_seq_lens_q=torch.tensor([0, 2, 4]))


# ---- names of the document that describes NeMo's model


def test_a_stage_that_is_set_after_the_config_was_made_is_followed():
    config = tiny_config()
    config.stage = "stage1"
    model = BagelForUnifiedMultimodal(config)
    assert not any("moe_gen" in name or name.startswith("vae.") for name in model.state_dict())
    assert model.config.stage == 1 and not model.config.visual_gen


def test_names_of_the_document_exist():
    for name in ("_convert_patch_embedding_for_packed_vit", "_prepare_config_for_stage", "_stage_to_int", "logger"):
        assert hasattr(modeling_bagel, name)
    assert [modeling_bagel._stage_to_int(stage) for stage in (1, "2", "stage1")] == [1, 2, 1]
    for name in ("from_pretrained", "get_input_embeddings", "get_output_embeddings", "initialize_weights"):
        assert callable(getattr(BagelForUnifiedMultimodal, name))
