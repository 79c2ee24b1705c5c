# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What users of transformers take for granted of any model: arguments, names, caches, losses, saving."""

import inspect

import pytest
import torch
import transformers
from tiny_models import attention_kernel, fresh_tiny_model, padded_batch, tiny_model, training_pack
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    Qwen2Config,
    Trainer,
    TrainingArguments,
)
from transformers.cache_utils import Cache, DynamicCache, QuantizedLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import find_labels

from bagel import decoder_bagel
from bagel.inputs_bagel import find_placeholders
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


@pytest.mark.skipif(transformers.__version__ < "5.23", reason="transformers 5.17 batches otherwise and needs CUDA")
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


# ---- the stock Trainer


def stock_trainer(model, rows, collate, folder, **options):
    settings = {name: options.pop(name) for name in list(options) if name in TrainingArguments.__dataclass_fields__}
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        **settings,
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate, **options)


def conversations(processor, answers):
    """Rows that teach one answer each."""
    asked = {"role": "user", "content": [{"type": "text", "text": "what is it?"}]}
    said = ({"role": "assistant", "content": [{"type": "text", "text": answer}]} for answer in answers)
    return [{"messages": [asked, answer]} for answer in said]


def test_the_stock_trainer_evaluates_and_predicts_rows(tmp_path, model, processor):
    rows, seen = conversations(processor, ["a cat", "a red circle at the left", "a dog"]), []

    def measure(found):
        predicted, expected = found.predictions[:, :-1].argmax(-1), found.label_ids[:, 1:]
        seen.append((found.predictions.shape[:2], found.label_ids.shape))
        return {"right": float((predicted == expected)[expected != -100].mean())}

    collate = processor.collator()
    trainer = stock_trainer(model, rows, collate, tmp_path, per_device_eval_batch_size=1, compute_metrics=measure)
    metrics = trainer.evaluate()
    with torch.no_grad():
        losses = [model(**collate([row])).loss for row in rows]
    assert metrics["eval_loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert 0 <= metrics["eval_right"] <= 1
    assert seen[0][0] == seen[0][1] and seen[0][0][0] == len(rows)
    assert trainer.predict(rows).metrics["test_loss"] == pytest.approx(metrics["eval_loss"])


def test_logits_of_a_pack_predict_the_labels_after_them(model, processor):
    pack = processor.collator()(conversations(processor, ["a cat", "a red circle at the left"]))
    with torch.no_grad():
        output = model(**pack)
    shifted = pack["labels"][0, 1:]
    learned = shifted != -100
    assert int(learned.sum()) == len(pack["ce_loss_indexes"])
    errors = torch.nn.functional.cross_entropy(output.logits[0, :-1][learned], shifted[learned], reduction="none")
    torch.testing.assert_close(errors, output.ce)
    assert "logits" not in model(**pack)  # they would cost memory in training


def test_accumulated_packs_learn_what_one_pack_of_all_rows_does(tmp_path, tiny_directory, processor):
    rows = conversations(processor, ["a cat", "a red circle at the left of a blue square"])
    trained = []
    for size in (1, 2):
        model = BagelForUnifiedMultimodal.from_pretrained(tiny_directory)
        stock_trainer(
            model,
            rows,
            processor.collator(),
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=2 // size,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            save_strategy="no",
        ).train()
        trained.append(model.get_output_embeddings().weight.detach())
    torch.testing.assert_close(*trained, rtol=1e-5, atol=1e-7)


def test_a_pack_counts_as_much_as_it_has_learned_tokens():
    model = tiny_model()
    contents = ([("text", 3), ("noise", 2, 2)], [("text", 9)], [("noise", 1, 2)])
    packs = [training_pack([segments]) for segments in contents]
    learned = [sum(len(pack.get(name, ())) for name in ("ce_loss_indexes", "mse_loss_indexes")) for pack in packs]
    with torch.no_grad():
        for pack, count in zip(packs, learned):
            share = model(**pack, num_items_in_batch=torch.tensor(sum(learned))).loss
            torch.testing.assert_close(share, model(**pack).loss * count / sum(learned))


def test_a_padded_batch_is_evaluated_with_metrics(tmp_path, model, processor):
    texts = processor(text=["what is it? a cat", "a dog"], return_tensors="pt", padding=True)
    labels = texts["input_ids"].masked_fill(texts["attention_mask"] == 0, -100)
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, label in zip(texts["input_ids"], texts["attention_mask"], labels)
    ]
    shapes = []

    def measure(found):
        shapes.append((found.predictions.shape[:2], found.label_ids.shape))
        return {}

    metrics = stock_trainer(model, rows, None, tmp_path, compute_metrics=measure).evaluate()
    with torch.no_grad():
        expected = model(**texts, labels=labels).loss
    assert metrics["eval_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert shapes == [(tuple(labels.shape), tuple(labels.shape))]


# ---- caches

DIALOGUE = [("vit", 2, 3), ("text", 4), ("vae", 1, 2), ("vit", 1, 2), ("text", 3)]
OTHER_DIALOGUE = [("text", 10), ("vit", 2, 2), ("text", 3)]


def test_a_cache_is_read_also_with_use_cache_off():
    model, inputs, cache = tiny_model(), reads(READ), DynamicCache(config=tiny_model().config)
    start = inputs["input_ids"].shape[1] - 3
    ids, positions = inputs["input_ids"], torch.arange(1, 1 + 6)[None, -3:]
    pixels = {name: inputs[name] for name in ("pixel_values", "image_grid_hw")}
    with torch.no_grad():
        model(input_ids=ids[:, :start], past_key_values=cache, use_cache=True, **pixels)
        rest = model(input_ids=ids[:, start:], position_ids=positions, past_key_values=cache, use_cache=False).logits
        torch.testing.assert_close(rest, model(**inputs).logits[:, start:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("conversations", [[DIALOGUE], [DIALOGUE, OTHER_DIALOGUE]], ids=["one", "two"])
def test_writing_on_after_a_cache_takes_the_whole_conversation(conversations):
    """The processor gives all of it, images that are cached included."""
    model, whole = tiny_model(), padded_batch(conversations, 0, "left")
    answer, length = {"max_new_tokens": 4, "do_sample": False}, whole["input_ids"].shape[1]
    expected = model.generate(**whole, **answer)
    found = find_placeholders(model.config, whole["input_ids"])
    inside = (found.in_image & ~found.start).any(0)
    for cut in range(1, length):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(**whole, past_key_values=cache, use_cache=True)
        cache.crop(cut - length)
        if inside[cut]:
            with pytest.raises(ValueError, match="end within an image"):
                model.generate(**whole, past_key_values=cache, **answer)
        else:
            assert torch.equal(model.generate(**whole, past_key_values=cache, **answer), expected), cut


@pytest.mark.parametrize("name", ["static", "dynamic"])
def test_every_kind_of_cache_gives_the_same_answer(name):
    model, inputs = tiny_model(), padded_batch([DIALOGUE, OTHER_DIALOGUE], 0, "left")
    answer = {"max_new_tokens": 4, "do_sample": False}
    made = model.generate(**inputs, **answer, cache_implementation=name, disable_compile=True)
    assert torch.equal(made, model.generate(**inputs, **answer, use_cache=False))


def test_sliding_windows_are_refused_by_name():
    window = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}
    with pytest.raises(ValueError, match="use_sliding_window"):
        fresh_tiny_model(text_config=window)
    cache = DynamicCache(config=Qwen2Config(num_hidden_layers=2, **window))
    with pytest.raises(ValueError, match="DynamicCache keeps a sliding window"):
        tiny_model()(input_ids=torch.tensor([[1, 50, 2]]), past_key_values=cache)


def test_a_quantised_cache_gives_almost_the_same(monkeypatch):
    """With a quantiser that loses nothing: the cache is longer than what it keeps unquantised."""

    class Lossless(QuantizedLayer):
        def _quantize(self, tensor, axis):
            return tensor

        def _dequantize(self, tensor):
            return tensor

    model, inputs = tiny_model(), padded_batch([DIALOGUE], 0)
    cache = Cache(layers=[Lossless(residual_length=4) for _ in range(2)])
    answer = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **answer, past_key_values=cache), model.generate(**inputs, **answer))
