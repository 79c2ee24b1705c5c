# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Writing and drawing through `generate`: equalities between ways that must agree, on the tiny checkpoint."""

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.cache_utils import DynamicCache


pytestmark = pytest.mark.core

FAST = {"num_timesteps": 4, "progress_bar": False}


def message(text: str, *images) -> list[dict]:
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def prepare(processor, conversations, mode="text", **kwargs):
    return processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_tensors="pt", generation_mode=mode, **kwargs
    )


def answer(model, processor, conversations, **kwargs):
    inputs = prepare(processor, conversations)
    output = model.generate(**inputs, do_sample=False, **kwargs)
    return output[:, inputs["input_ids"].shape[1] :]


def draw(model, processor, conversations, **kwargs):
    return model.generate(**prepare(processor, conversations, "image"), generation_mode="image", **{**FAST, **kwargs})


@pytest.fixture(scope="module")
def questions(picture, other_picture):
    return [
        message("What is this?", picture),
        message("hi"),
        message("Which of the two is larger, and why is that so?", other_picture, picture),
        message("Describe it in one word.", other_picture),
    ]


@pytest.fixture(scope="module")
def edits(picture, other_picture):
    return [
        message("make it night", picture),
        message("a red car"),
        message("add a hat to the dog, please", other_picture),
        message("put the first into the second", picture, other_picture),
    ]


# ---- text


@pytest.mark.parametrize("batch_size", [2, 3, 4])
def test_ragged_batch_writes_what_single_prompts_write(model, processor, questions, batch_size):
    batch = answer(model, processor, questions[:batch_size], max_new_tokens=8)
    for row, question in zip(batch, questions):
        assert row.tolist() == answer(model, processor, [question], max_new_tokens=8)[0].tolist()


def test_left_padding_does_not_change_logits(model, processor, questions):
    inputs = prepare(processor, questions)
    batch = model(**inputs, logits_to_keep=1).logits
    single = [model(**prepare(processor, [question]), logits_to_keep=1).logits[0] for question in questions]
    torch.testing.assert_close(batch, torch.stack(single), atol=2e-5, rtol=0)


def test_decoding_with_cache_writes_what_full_forwards_write(model, processor, questions):
    cached = answer(model, processor, questions, max_new_tokens=6, use_cache=True)
    assert cached.tolist() == answer(model, processor, questions, max_new_tokens=6, use_cache=False).tolist()


def test_prefill_in_pieces_equals_one_prefill(model, processor, questions):
    inputs = prepare(processor, questions[:1])
    ids, whole = inputs["input_ids"], model(**inputs).logits
    positions = model.get_rope_index(ids)
    cut = int((ids[0] == model.config.vision_end_token_id).nonzero()[0]) + 1
    cache = DynamicCache(config=model.config.text_config)
    pictures = {name: inputs[name] for name in ("pixel_values", "image_grid_hw")}
    first = model(input_ids=ids[:, :cut], position_ids=positions[:, :cut], past_key_values=cache, **pictures).logits
    second = model(input_ids=ids[:, cut:], position_ids=positions[:, cut:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, atol=2e-5, rtol=0)


def test_a_picture_on_top_of_a_cache_equals_one_prefill(model, processor, questions):
    inputs = prepare(processor, [message("x", *[item["image"] for item in questions[2][0]["content"][:2]])])
    ids, whole = inputs["input_ids"], model(**inputs).logits
    positions = model.get_rope_index(ids)
    cut = int((ids[0] == model.config.vision_end_token_id).nonzero()[0]) + 1
    patches = int(inputs["image_grid_hw"][0].prod())
    parts, cache = [], DynamicCache(config=model.config.text_config)
    for columns, pixels, grid in (
        (slice(0, cut), slice(0, patches), slice(0, 1)),
        (slice(cut, None), slice(patches, None), slice(1, 2)),
    ):
        parts.append(
            model(
                input_ids=ids[:, columns],
                position_ids=positions[:, columns],
                past_key_values=cache,
                pixel_values=inputs["pixel_values"][pixels],
                image_grid_hw=inputs["image_grid_hw"][grid],
            ).logits
        )
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=0)


def test_static_cache_writes_what_the_dynamic_cache_writes(model, processor, questions):
    dynamic = answer(model, processor, questions, max_new_tokens=6)
    static = answer(model, processor, questions, max_new_tokens=6, cache_implementation="static", disable_compile=True)
    assert static.tolist() == dynamic.tolist()


def test_beams_and_several_answers_keep_each_row_with_its_pictures(model, processor, questions):
    several = answer(model, processor, questions[:3], max_new_tokens=5, num_beams=3, num_return_sequences=2)
    for row, question in enumerate(questions[:3]):
        single = answer(model, processor, [question], max_new_tokens=5, num_beams=3, num_return_sequences=2)
        assert several[2 * row : 2 * row + 2].tolist() == single.tolist()


def test_sampling_is_reproducible_by_seed(model, processor, questions):
    inputs, runs = prepare(processor, questions), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model.generate(**inputs, do_sample=True, temperature=2.0, max_new_tokens=8).tolist())
    assert runs[0] == runs[1] != runs[2]


def test_each_row_stops_at_its_own_end(model, processor, questions):
    free = answer(model, processor, questions[:2], max_new_tokens=6)
    stop = int(free[0, 2])
    stopped = answer(model, processor, questions[:2], max_new_tokens=6, eos_token_id=stop)
    first = free[0].tolist().index(stop) + 1
    assert stopped[0, :first].tolist() == free[0, :first].tolist()
    assert set(stopped[0, first:].tolist()) <= {model.generation_config.pad_token_id}
    if stop not in free[1].tolist():
        assert stopped[1].tolist() == free[1].tolist()


def test_pad_id_outside_the_vocabulary_is_never_looked_up(tiny_directory, processor, questions):
    from bagel.modeling_bagel import BagelForUnifiedMultimodal

    model = BagelForUnifiedMultimodal.from_pretrained(tiny_directory, pad_token_id=151643).eval()
    assert model.generation_config.pad_token_id == 151643
    inputs = prepare(processor, questions[:2])
    usual = inputs["input_ids"]
    inputs["input_ids"] = usual.masked_fill(inputs["attention_mask"] == 0, 151643)
    free = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, usual.shape[1] :]
    stopped = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=int(free[0, 1]))
    assert 151643 in stopped[0].tolist()
    assert free.tolist() == answer(model, processor, questions[:2], max_new_tokens=6).tolist()


def test_tokens_stream_and_criteria_stop(model, processor, questions):
    class AfterThree(StoppingCriteria):
        def __init__(self, start):
            self.start = start

        def __call__(self, input_ids, scores, **kwargs):
            done = input_ids.shape[1] - self.start >= 3
            return torch.full((len(input_ids),), done, dtype=torch.bool, device=input_ids.device)

    inputs = prepare(processor, questions[:1])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    criteria = StoppingCriteriaList([AfterThree(inputs["input_ids"].shape[1])])
    output = model.generate(**inputs, streamer=streamer, stopping_criteria=criteria, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    assert len(new) == 3
    assert "".join(streamer) == processor.tokenizer.decode(new)


def test_places_for_pictures_are_never_written(model, processor, questions, monkeypatch):
    head = model.language_model.lm_head
    places = [model.config.image_token_id, model.config.latent_token_id]

    def prefer_places(hidden):
        logits = nn.functional.linear(hidden, head.weight)
        logits[..., places] = 1e4
        return logits

    monkeypatch.setattr(head, "forward", prefer_places)
    assert not set(places) & set(answer(model, processor, questions, max_new_tokens=5).flatten().tolist())


def test_compiled_decode_step_writes_the_same_without_graph_breaks(model, processor, questions):
    plain = answer(model, processor, questions[:2], max_new_tokens=6)
    torch.compiler.reset()
    inputs = prepare(processor, questions[:2])
    forward = model.forward
    try:
        model.forward = torch.compile(forward, fullgraph=True, backend="aot_eager", dynamic=False)
        cache_length = inputs["input_ids"].shape[1] + 8
        prefill = forward(**inputs, past_key_values=static_cache(model, 2, cache_length), logits_to_keep=1)
        tokens = [prefill.logits[:, -1].argmax(-1)]
        position = model.get_rope_index(inputs["input_ids"], inputs["attention_mask"])[:, -1:]
        mask = torch.zeros(2, cache_length, dtype=torch.long)
        mask[:, : inputs["input_ids"].shape[1]] = inputs["attention_mask"]
        for step in range(5):
            filled = inputs["input_ids"].shape[1] + step
            mask[:, filled] = 1
            position = position + 1
            output = model.forward(
                input_ids=tokens[-1][:, None],
                position_ids=position,
                attention_mask=mask.bool()[:, None, None],
                past_key_values=prefill.past_key_values,
            )
            tokens.append(output.logits[:, -1].argmax(-1))
    finally:
        model.forward = forward
        torch.compiler.reset()
    assert torch.stack(tokens, dim=1).tolist() == plain.tolist()


def static_cache(model, batch_size, length):
    from transformers.cache_utils import StaticCache

    return StaticCache(config=model.config.text_config, max_cache_len=length)


# ---- pictures


@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
def test_batch_draws_what_single_prompts_draw(model, processor, edits, renorm):
    options = {
        "cfg_interval": (0.0, 1.0),
        "cfg_renorm_type": renorm,
        "output_type": "latent",
        "sample_posterior": False,
    }
    seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
    batch = draw(model, processor, edits, generator=seeds, **options)
    for seed, (latents, edit) in enumerate(zip(batch, edits)):
        single = draw(model, processor, [edit], generator=torch.Generator().manual_seed(seed), **options)[0]
        torch.testing.assert_close(latents, single, atol=5e-5, rtol=0)


def test_seed_decides_picture_and_posterior_sample(model, processor, edits):
    def run(seed):
        return draw(model, processor, edits[:1], generator=torch.Generator().manual_seed(seed), output_type="latent")[0]

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))


def test_posterior_sample_differs_from_mode(model, processor, edits):
    noise = draw(model, processor, edits[:1], output_type="latent", return_dict_in_generate=True).latents[0]
    runs = [
        draw(
            model,
            processor,
            edits[:1],
            latents=noise,
            output_type="latent",
            sample_posterior=sampled,
            generator=torch.Generator().manual_seed(0),
        )[0]
        for sampled in (True, False)
    ]
    assert not torch.equal(*runs)


def test_given_latents_are_where_drawing_starts(model, processor, edits):
    seen = []
    noise = [torch.randn(n, model.config.patch_latent_dim) for n in (256, 64)]
    result = draw(
        model,
        processor,
        [edits[1], edits[1]],
        latents=noise,
        height=[256, 128],
        width=[256, 128],
        output_type="latent",
        callback_on_step_end=lambda model, step, t, tensors: seen.append((step, float(t), tensors["latents"].clone())),
    )
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert seen[0][1] == 1.0
    for row, (start, end) in enumerate(zip(noise, result)):
        assert end.shape == start.shape
        torch.testing.assert_close(seen[-1][2][row, : len(start)], end)
        assert (seen[0][2][row, : len(start)] - start).abs().max() < 5  # one step away from the noise, not new noise


def test_callback_can_replace_latents(model, processor, edits):
    zeros = draw(
        model,
        processor,
        edits[1:2],
        output_type="latent",
        callback_on_step_end=lambda model, step, t, tensors: {"latents": torch.zeros_like(tensors["latents"])},
    )[0]
    assert torch.equal(zeros, torch.zeros_like(zeros))


def test_output_types_are_the_same_picture(model, processor, edits):
    images = {
        kind: draw(model, processor, edits[:1], output_type=kind, generator=torch.Generator().manual_seed(0))[0]
        for kind in ("pil", "pt", "latent")
    }
    width, height = images["pil"].size
    assert images["pt"].shape == (3, height, width)
    assert images["latent"].shape == (height * width // 256, model.config.patch_latent_dim)
    truncated = (images["pt"] * 255).to(torch.uint8).permute(1, 2, 0).numpy()
    assert (
        abs(truncated.astype(int) - torch.tensor(list(images["pil"].tobytes())).view(height, width, 3).numpy()).max()
        <= 1
    )


def test_edit_has_the_size_of_the_last_picture_and_text_the_default(model, processor, edits):
    inputs = prepare(processor, [edits[3]], "image")
    height, width = inputs["latent_image_sizes"][-1].tolist()
    assert draw(model, processor, [edits[3]])[0].size == (width, height)
    side = model.config.max_latent_size * model.config.latent_downsample
    assert draw(model, processor, [edits[1]])[0].size == (side, side)
    assert draw(model, processor, [edits[3]], height=64, width=96)[0].size == (96, 64)


def test_several_pictures_per_prompt(model, processor, edits):
    images = draw(model, processor, edits[:2], num_return_sequences=2, generator=torch.Generator().manual_seed(0))
    assert len(images) == 4
    assert images[0].size == images[1].size != images[2].size
    assert images[0].tobytes() != images[1].tobytes()


def test_neutral_guidance_runs_the_network_once_per_step(model, processor, edits, monkeypatch):
    calls = []
    predict = model.predict_velocity
    monkeypatch.setattr(model, "predict_velocity", lambda *args: calls.append(1) or predict(*args))
    counts = []
    for options in (
        {"cfg_text_scale": 1.0},
        {"cfg_text_scale": 4.0, "cfg_img_scale": 1.0},
        {"cfg_text_scale": 4.0, "cfg_img_scale": 1.5},
        {"cfg_text_scale": 4.0, "cfg_img_scale": 1.5, "cfg_interval": (2.0, 3.0)},
    ):
        calls.clear()
        draw(model, processor, edits[:1], **{"cfg_interval": (0.0, 1.0), **options})
        counts.append(len(calls))
    assert counts == [3, 6, 9, 3]


def test_text_alone_needs_no_third_evaluation_for_picture_guidance(model, processor, edits, monkeypatch):
    calls = []
    predict = model.predict_velocity
    monkeypatch.setattr(model, "predict_velocity", lambda *args: calls.append(1) or predict(*args))
    draw(model, processor, edits[1:2], cfg_interval=(0.0, 1.0), cfg_img_scale=2.0)
    assert len(calls) == 2 * 3


def test_a_model_brings_its_own_defaults_for_drawing_along(model, processor, edits, questions, tmp_path):
    def run(model, **options):
        seen = []
        model.generate(
            **prepare(processor, edits[:1], "image"),
            generation_mode="image",
            progress_bar=False,
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=lambda model, step, t, tensors: seen.append((float(t), tensors["velocity"].tolist())),
            **options,
        )
        return seen

    settings = {"num_timesteps": 4, "timestep_shift": 1.0, "cfg_text_scale": 2.0, "cfg_interval": (0.0, 1.0)}
    model.save_pretrained(tmp_path)
    GenerationConfig(**settings, **model.generation_config.to_diff_dict()).save_pretrained(tmp_path)
    own = type(model).from_pretrained(tmp_path)
    expected = run(model, **settings)
    assert [t for t, _ in expected] == pytest.approx([1, 2 / 3, 1 / 3])
    assert run(own) == expected
    assert run(model, generation_config=GenerationConfig(**settings)) == expected
    other = {"num_timesteps": 3, "cfg_text_scale": 1.0}
    assert run(own, **other) == run(model, **settings | other) != expected
    assert answer(own, processor, questions[:1], max_new_tokens=6).tolist() == (
        answer(model, processor, questions[:1], max_new_tokens=6).tolist()
    )


def test_drawing_leaves_the_next_answer_unchanged(model, processor, questions, edits):
    before = answer(model, processor, questions[:1], max_new_tokens=6)
    draw(model, processor, edits[:2])
    assert answer(model, processor, questions[:1], max_new_tokens=6).tolist() == before.tolist()


def test_trailing_bos_of_a_text_prompt_makes_no_difference(model, processor, edits):
    inputs = prepare(processor, edits, "image")
    bos = torch.full((4, 1), model.config.bos_token_id)
    longer = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], bos], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(bos)], dim=1),
    }
    runs = [
        model.generate(
            **tensors,
            generation_mode="image",
            output_type="latent",
            sample_posterior=False,
            generator=torch.Generator().manual_seed(0),
            **FAST,
        )
        for tensors in (inputs, longer)
    ]
    for one, other in zip(*runs):
        torch.testing.assert_close(one, other, atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_other_schedulers_draw_and_keep_no_state(model, processor, edits, name):
    import diffusers

    scheduler = getattr(diffusers, name)()
    untouched = scheduler.timesteps.clone()
    runs = [
        draw(
            model,
            processor,
            edits[1:2],
            scheduler=scheduler,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )[0]
        for _ in range(2)
    ]
    assert torch.equal(*runs)
    assert torch.equal(scheduler.timesteps, untouched)
    if name.startswith("FlowMatchEuler"):
        default = draw(model, processor, edits[1:2], generator=torch.Generator().manual_seed(0), output_type="latent")[
            0
        ]
        torch.testing.assert_close(runs[0], default)


# ---- plans


def test_plan_is_what_the_model_writes_after_the_prompt(model, processor, edits):
    inputs = prepare(processor, edits[:2], "image", think=True)
    result = model.generate(
        **inputs, generation_mode="image", think=True, max_new_tokens=5, return_dict_in_generate=True, **FAST
    )
    bos = torch.full((2, 1), model.config.bos_token_id)
    written = model.generate(
        **{
            **inputs,
            "input_ids": torch.cat([inputs["input_ids"], bos], dim=1),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(bos)], dim=1),
        },
        sample_posterior=False,
        max_new_tokens=5,
    )[:, -5:]
    assert [len(plan) for plan in result.sequences] == [5, 5]
    assert result.sequences[1].tolist() == written[1].tolist()  # the first holds a sampled picture


def test_plan_changes_the_drawing_and_batches(model, processor, edits):
    def run(conversations, think):
        inputs = prepare(processor, conversations, "image", think=True)
        seeds = [torch.Generator().manual_seed(7) for _ in conversations]
        return model.generate(
            **inputs,
            generation_mode="image",
            think=think,
            max_new_tokens=4,
            generator=seeds,
            sample_posterior=False,
            output_type="latent",
            **FAST,
        )

    batch = run(edits, True)
    for latents, edit in zip(batch, edits):
        torch.testing.assert_close(latents, run([edit], True)[0], atol=5e-5, rtol=0)
    assert not torch.equal(batch[0], run(edits[:1], False)[0])


# ---- texts and pictures in turns


class ScriptedHead(nn.Module):
    """A language-model head that says what the script says, one entry per forward."""

    def __init__(self, script, vocab_size):
        super().__init__()
        self.script, self.vocab_size = list(script), vocab_size
        self.weight = torch.zeros(vocab_size, 1)

    def forward(self, hidden):
        logits = torch.zeros(*hidden.shape[:-1], self.vocab_size)
        logits[..., self.script.pop(0)] = 10.0
        return logits


@pytest.fixture
def scripted(model):
    head = model.language_model.lm_head

    def install(script):
        model.language_model.lm_head = ScriptedHead(script, model.config.text_config.vocab_size)

    yield install
    model.language_model.lm_head = head


UNHEARD = 0  # said while the texts are read alone, for picture guidance


def converse(model, inputs_of, conversation, **kwargs):
    inputs = prepare(inputs_of, conversation, "interleaved")
    return model.generate(**inputs, generation_mode="interleaved", **{**FAST, **kwargs})


def test_model_decides_between_texts_and_pictures(model, processor, edits, scripted):
    config = model.config
    bos, eos, start = config.bos_token_id, config.eos_token_id, config.vision_start_token_id
    #         read  a   b   end  draw  (context)  text  c   end  end of turn
    scripted([bos, 65, 66, eos, start, UNHEARD, bos, 67, eos, eos])
    items = converse(model, processor, edits[:1], max_new_tokens=20)[0]
    assert items[0].tolist() == [65, 66]
    assert isinstance(items[1], Image.Image)
    assert items[2].tolist() == [67]
    assert len(items) == 3


def test_interleaved_output_stops_at_tokens_and_at_pictures(model, processor, edits, scripted):
    config = model.config
    bos, eos, start = config.bos_token_id, config.eos_token_id, config.vision_start_token_id
    scripted([bos, 65, 66, 67])
    assert [item.tolist() for item in converse(model, processor, edits[1:2], max_new_tokens=3)[0]] == [[65, 66, 67]]
    scripted([bos, 65, eos, start, start, UNHEARD, start])
    items = converse(model, processor, edits[1:2], max_new_tokens=20, max_images=2, output_type="latent")[0]
    assert [type(item) for item in items] == [torch.Tensor] * 3
    assert items[1].shape == items[2].shape == (256, config.patch_latent_dim)


def test_a_drawn_picture_becomes_context(model, processor, edits, scripted):
    config = model.config
    bos, eos, start = config.bos_token_id, config.eos_token_id, config.vision_start_token_id
    lengths = []
    read_back = model._read_back

    def watch(conversation, *args):
        longer = read_back(conversation, *args)
        lengths.append(
            (conversation.cache.get_seq_length(), longer.prompt.input_ids.shape[1], longer.prompt.next_position.item())
        )
        return longer

    model._read_back = watch
    try:
        scripted([bos, 65, eos, start, eos])
        inputs = prepare(processor, edits[1:2], "interleaved")
        model.generate(**inputs, generation_mode="interleaved", processor=processor, max_new_tokens=9, **FAST)
    finally:
        del model._read_back
    text = inputs["input_ids"].shape[1] - 1 + 3  # prompt without its dangling bos, then bos, one word, eos
    vae, vit = 256 + 2, 18 * 18 + 2
    assert lengths[0][1] == 1 + text + vae + vit  # the dangling bos stays in the cache, masked out
    assert lengths[0][2] == text + 2  # a picture takes one position, read by VAE and ViT it takes two


def test_texts_are_decoded_with_a_processor_and_batches_go_row_by_row(model, processor, edits):
    both = converse(model, processor, edits[:2], max_new_tokens=4, processor=processor, sample_posterior=False)
    assert all(isinstance(items[0], str) for items in both)
    for items, edit in zip(both, edits):
        single = converse(model, processor, [edit], max_new_tokens=4, processor=processor, sample_posterior=False)[0]
        assert items[0] == single[0]
    assert processor.post_process_multimodal_output(both, generation_mode="interleaved") == both
