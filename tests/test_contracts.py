# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What users of transformers take for granted of any model: arguments, names, caches, losses, saving."""

import inspect

import pytest
import torch
from tiny_models import attention_kernel, fresh_tiny_model, padded_batch, tiny_model
from transformers import AttentionInterface, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import find_labels

from bagel import decoder_bagel
from bagel.modeling_bagel import BagelForUnifiedMultimodal, BagelModel


pytestmark = pytest.mark.core

READ = [("vit", 2, 3), ("text", 4)]
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}


def reads(*conversations) -> dict[str, torch.Tensor]:
    return padded_batch(conversations or [READ, READ], 0)


# ---- positions and placeholders


def test_positions_that_were_never_trained_get_one_warning(monkeypatch):
    said = []
    monkeypatch.setattr(decoder_bagel.logger, "warning_once", said.append)
    model = tiny_model()
    limit = model.config.text_config.max_position_embeddings
    with torch.no_grad():
        logits = model(input_ids=torch.full((1, limit + 1), 50)).logits
    assert logits.isfinite().all()
    assert len(said) == 1 and f"position {limit}" in said[0] and "max_position_embeddings" in said[0]


def test_image_ids_without_pixels_are_words_like_any_other():
    """As in Qwen2.5-VL, whose forward looks for marks only where pixels come with them."""
    model, inputs = tiny_model(), reads()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        said = model(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(said, model(inputs_embeds=embeds, attention_mask=mask).logits)


def test_one_position_per_token_serves_all_three_axes():
    model, inputs = tiny_model(text_config=MROPE), reads()
    positions = torch.arange(inputs["input_ids"].shape[1])[None].expand_as(inputs["input_ids"])
    with torch.no_grad():
        flat = model(**inputs, position_ids=positions).logits
        assert torch.equal(flat, model(**inputs, position_ids=positions[None].expand(3, -1, -1)).logits)


# ---- names


def test_the_base_model_gives_hidden_states_and_no_logits():
    model, inputs = tiny_model(), reads()
    assert model.base_model is not model and type(model.base_model) is BagelModel
    with torch.no_grad():
        output = model.base_model(**inputs)
        assert torch.equal(output.last_hidden_state, model(**inputs).last_hidden_state)
    assert "logits" not in output


def test_the_base_model_shares_every_part_even_after_it_was_replaced():
    model = fresh_tiny_model()
    model.language_model.lm_head = torch.nn.Linear(32, 7)
    parts = dict(model.named_modules())
    assert all(parts[name] is part for name, part in model.base_model.named_modules() if name)


def test_a_forward_that_was_patched_does_not_reach_the_base_model():
    """TRL replaces the forward of a model by one that calls its base model."""
    model, inputs = fresh_tiny_model(), reads()
    model.forward = lambda **given: model.base_model(**given)
    assert model(**inputs).last_hidden_state.shape[:2] == inputs["input_ids"].shape


def test_a_loss_on_the_base_model_gives_every_parameter_a_gradient():
    model = fresh_tiny_model().train()
    hidden_states = model.base_model(**reads()).last_hidden_state
    model.get_output_embeddings()(hidden_states).sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("stage", [1, 2])
def test_every_block_that_must_not_be_split_is_in_the_model(stage):
    model = tiny_model(stage=stage)
    classes = {type(part).__name__ for part in model.modules()}
    assert "BagelDecoderLayer" in model._no_split_modules
    assert model._no_split_modules <= classes
    assert model.get_decoder()._no_split_modules == {"BagelDecoderLayer"}
    assert model.vit_model._no_split_modules == {"SiglipEncoderLayer"}


def test_there_is_no_pipeline_plan():
    assert not tiny_model().supports_pp_plan


def test_the_names_that_transformers_asks_for():
    model = tiny_model()
    assert model.get_encoder("image") is model.vit_model and model.get_encoder() is model
    assert model.get_decoder() is model.language_model.model
    assert find_labels(BagelForUnifiedMultimodal) == ["labels"]
    assert "noise" not in inspect.signature(BagelForUnifiedMultimodal.forward).parameters  # would be ViTMAE's
    with pytest.raises(ValueError, match="smell"):
        model.get_encoder("smell")


def test_the_auto_class_of_language_models_finds_it(tmp_path):
    fresh_tiny_model().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__name__ == "BagelForUnifiedMultimodal"


# ---- kernels


def test_texts_of_continuous_batching_equal_those_of_generate():
    model, prompts = tiny_model(), [[1, 50, 51], [1, 60, 61, 62, 63]]
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=2, pad_token_id=0)
    space = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)
    made = model.generate_batch(
        prompts, generation_config=settings, continuous_batching_config=space, progress_bar=False
    )
    for prompt, answer in zip(prompts, made.values()):
        expected = model.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :]
        assert answer.generated_tokens == expected.tolist()


def test_kernels_are_passed_the_arguments_of_transformers():
    model, seen = fresh_tiny_model(), []

    def kernel(module, query, key, value, mask, **options):
        seen.append(options)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **options)

    AttentionInterface.register("listening", kernel)
    lengths = {"cu_seq_lens_q": torch.tensor([0, 3]), "max_length_q": 3}
    with attention_kernel(model, "listening", "sdpa"), torch.no_grad():
        model(input_ids=torch.tensor([[1, 50, 2]]), **lengths)
    assert seen and all(lengths.items() <= options.items() for options in seen)
    with pytest.raises(ValueError, match="is_causal=False"):
        model(input_ids=torch.tensor([[1, 50, 2]]), is_causal=False)
