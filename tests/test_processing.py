# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Prompts: what a conversation becomes, against the released contexts where they are at hand, and by equalities."""

import ast
import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jinja2
import jinja2.ext
import numpy as np
import pytest
import torch
import transformers
from parity_data import EMBEDDED, read_json
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, Qwen2TokenizerFast
from transformers.processing_utils import TextKwargs

from bagel.configuration_bagel import BagelConfig
from bagel.image_processing_bagel import BagelImageProcessor
from bagel.modeling_bagel import BagelForUnifiedMultimodal
from bagel.packing_bagel import MODEL_FACTS, PACKING_FACTS, PackingConfig
from bagel.processing_bagel import ANSWER_SYSTEM_PROMPT, IMAGE_SYSTEM_PROMPT, REFUSED_TEXT, BagelProcessor
from bagel.shapes.tokenizer import SPECIAL_TOKENS, build_tiny_tokenizer


ORDERS = read_json(EMBEDDED / "generate" / "order.json")

pytestmark = pytest.mark.core

TEMPLATE = (Path(__file__).parents[1] / "chat_template.jinja").read_text()
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
LATENT = "<|vision_start|><|vision_pad|><|vision_end|>"


def make_processor(**settings) -> BagelProcessor:
    tiny = {
        "size": {"shortest_edge": 42, "longest_edge": 70},
        "latent_size": {"shortest_edge": 48, "longest_edge": 96},
    }
    tokenizer = build_tiny_tokenizer(vocab_size=263)  # a token per character
    return BagelProcessor(BagelImageProcessor(**tiny | settings), tokenizer, chat_template=TEMPLATE)


class Generation(jinja2.ext.Extension):
    """The tag that every template engine for chats has: what it encloses is written as it is."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@pytest.fixture(scope="module")
def processor() -> BagelProcessor:
    return make_processor()


def picture(width: int = 120, height: int = 80, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def user(*items) -> dict:
    """A user's message from strings and pictures."""
    return {"role": "user", "content": [as_item(item) for item in items]}


def assistant(*items) -> dict:
    return user(*items) | {"role": "assistant"}


def as_item(item) -> dict:
    return {"type": "text", "text": item} if isinstance(item, str) else {"type": "image", "image": item}


def text(words: str) -> str:
    return f"<|im_start|>{words}<|im_end|>"


def spans(processor: BagelProcessor, input_ids) -> list[tuple[str, int]]:
    """(kind, tokens) of every span of a row, boundaries counted; what is left open has kind "open"."""
    found, kind, start = [], None, 0
    ids = [int(token_id) for token_id in input_ids if token_id != processor.tokenizer.pad_token_id]
    for index, token_id in enumerate(ids):
        if token_id in (processor.bos_token_id, processor.vision_start_token_id):
            kind, start = "text", index
        elif token_id == processor.image_token_id:
            kind = "vit"
        elif token_id == processor.latent_token_id:
            kind = "vae"
        elif token_id in (processor.eos_token_id, processor.vision_end_token_id):
            found.append((kind, index + 1 - start))
            kind, start = None, index + 1
    return found + ([("open", len(ids) - start)] if start < len(ids) else [])


# --------------------------------------------------------------------------------------------------------------------
# Against the released contexts


def test_system_prompts_are_the_released_ones():
    released = read_json(EMBEDDED / "generate" / "tokenizer_standin.json")
    assert released["vlm_think_system_prompt"] == ANSWER_SYSTEM_PROMPT
    assert released["gen_think_system_prompt"] == IMAGE_SYSTEM_PROMPT


@pytest.mark.parametrize("name", ORDERS)
def test_conversations_become_the_released_contexts(name):
    case = read_json(EMBEDDED / "generate" / f"order_{name}.json")
    understanding = ORDERS[name].get("understanding")
    files = iter(case.get("image_files", []))
    items = [Image.open(EMBEDDED / next(files)) if item == "<image>" else item for item in case["inputs"]]
    processor = make_processor(vae_resize_first=True)  # as the released web app, which these contexts are from
    inputs = processor.apply_chat_template(
        [user(*items)],
        generation_mode="text" if understanding else "image",
        think=case["think"],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )

    segments = ORDERS[name]["contexts"]["gen"]["segments"]
    if case["think"] and not understanding:
        segments = segments[:-1]  # the plan, which the model writes
    expected = [(segment["kind"], segment["num_tokens"]) for segment in segments]
    assert spans(processor, inputs["input_ids"][0]) == expected + ([("open", 1)] if understanding else [])
    grids = {kind: [segment["grid_hw"] for segment in segments if segment["kind"] == kind] for kind in ("vit", "vae")}
    assert [list(grid) for grid in inputs.get("image_grid_hw", [])] == grids["vit"]
    assert [(size // 16).tolist() for size in inputs.get("latent_image_sizes", [])] == grids["vae"]
    decoded = processor.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
    written = "".join(chr(i) for s in segments if s["kind"] == "text" for i in s["token_ids"] if i < 256)
    assert decoded == written


# --------------------------------------------------------------------------------------------------------------------
# Conversations to prompts


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, IMAGE + text("hi") + "<|im_start|>"),
        ({"generation_mode": "image"}, LATENT + IMAGE + text("hi")),
        ({"generation_mode": "image", "add_generation_prompt": True}, LATENT + IMAGE + text("hi")),  # a pipeline's
        ({"generation_mode": "interleaved"}, LATENT + IMAGE + text("hi") + "<|im_start|>"),
        ({"add_generation_prompt": False}, IMAGE + text("hi")),
        ({"edit": True}, LATENT + IMAGE + text("hi") + "<|im_start|>"),
        ({"edit": False, "generation_mode": "image"}, IMAGE + text("hi")),
        ({"think": True}, text(ANSWER_SYSTEM_PROMPT) + IMAGE + text("hi") + "<|im_start|>"),
        ({"think": True, "generation_mode": "image"}, text(IMAGE_SYSTEM_PROMPT) + LATENT + IMAGE + text("hi")),
        (
            {"think": True, "generation_mode": "interleaved"},
            text(IMAGE_SYSTEM_PROMPT) + LATENT + IMAGE + text("hi") + "<|im_start|>",
        ),
    ],
)
def test_options_of_the_template(processor, options, expected):
    conversation = [user(picture(), "hi")]
    assert processor.apply_chat_template(conversation, **options) == expected
    assert processor.apply_chat_template([conversation, conversation], **options) == [expected] * 2


def test_the_template_works_without_the_processor():
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation])
    render = environment.from_string(TEMPLATE).render
    plain = jinja2.Environment(extensions=[Generation]).from_string(TEMPLATE).render  # no whitespace depends on that
    conversation = [user("a", picture())]
    chat = [*conversation, assistant(" b\n", picture()), {"role": "assistant", "content": "c "}]
    assert (
        plain(messages=chat) == render(messages=chat) == text("a") + IMAGE + text(" b\n") + LATENT + IMAGE + text("c ")
    )
    assert render(messages=conversation) == text("a") + IMAGE
    assert render(messages=conversation, add_generation_prompt=True) == text("a") + IMAGE + "<|im_start|>"
    assert render(messages=conversation, generation_mode="image") == text("a") + LATENT + IMAGE
    assert render(messages=conversation, edit=True) == text("a") + LATENT + IMAGE
    assert render(messages=conversation, think=True) == text(ANSWER_SYSTEM_PROMPT) + text("a") + IMAGE
    assert render(messages=conversation, think=True, generation_mode="image").startswith(text(IMAGE_SYSTEM_PROMPT))


def test_every_text_is_a_span_and_roles_are_not_written(processor):
    conversation = [
        {"role": "system", "content": "be brief"},
        user("one", "two", picture(), " three\n"),
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": [{"type": "text", "text": "five"}]},
    ]
    expected = text("be brief") + text("one") + text("two") + IMAGE + text(" three\n") + text("four") + text("five")
    assert processor.apply_chat_template(conversation) == expected + "<|im_start|>"


def test_images_the_model_drew_are_seen_by_both(processor):
    conversation = [user("draw"), assistant("here", picture()), user(picture(), "and this?")]
    expected = text("draw") + text("here") + LATENT + IMAGE + IMAGE + text("and this?") + "<|im_start|>"
    assert processor.apply_chat_template(conversation) == expected


def test_an_answered_conversation_is_left_as_it_is(processor):
    answered = [user("hi"), assistant("hello")]
    assert processor.apply_chat_template(answered) == text("hi") + text("hello")
    assert processor.apply_chat_template(answered, add_generation_prompt=True).endswith(text("hello") + "<|im_start|>")
    with pytest.raises(ValueError, match="add_generation_prompt"):
        processor.apply_chat_template([answered, answered[:1]])


def test_final_message_can_be_continued(processor):
    for content in ("I think ", [as_item("I think ")]):
        conversation = [user("hi"), {"role": "assistant", "content": content}]
        for options in ({}, {"add_generation_prompt": False}):
            prompt = processor.apply_chat_template(conversation, continue_final_message=True, **options)
            assert prompt == text("hi") + "<|im_start|>I think "


def test_a_template_without_our_variables_can_be_used(processor):
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    conversation = [{"role": "user", "content": "hi"}]
    inputs = processor.apply_chat_template(conversation, template, tokenize=True, return_dict=True)
    assert processor.decode(inputs["input_ids"][0]) == "hi"


def test_conversations_are_not_changed(processor):
    conversation = [user(picture(), "hi"), assistant("yes")]
    before = copy.deepcopy(conversation)
    processor.apply_chat_template(conversation, tokenize=True, return_dict=True, generation_mode="image")
    processor.apply_chat_template(conversation, continue_final_message=True)
    assert conversation == before


def test_wrong_conversations_are_refused(processor):
    with pytest.raises(ValueError, match="'video'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}])
    with pytest.raises(ValueError, match="text, image, interleaved, not 'audio'"):
        processor.apply_chat_template([user("hi")], generation_mode="audio")
    with pytest.raises(TypeError, match="not None"):
        processor.apply_chat_template([{"role": "user", "content": None}])
    with pytest.raises(ValueError, match="its string under 'text'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "text"}]}])
    for empty in ([], [[]]):
        with pytest.raises(ValueError, match="at least one"):
            processor.apply_chat_template(empty)


@pytest.mark.skipif(transformers.__version__ < "5.23", reason="transformers 5.17 loses a processor's assistant masks")
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_texts_of_the_assistant_and_their_eos_are_marked(processor, padding_side):
    """What `assistant_only_loss` trains: images before, between and after do not shift it, nor does padding."""
    first = [
        {"role": "system", "content": "be brief"},
        user(picture(), "draw", picture(60, 200, 1)),
        assistant("one", picture(), "two "),
        user(picture(50, 50), "and?"),
        {"role": "assistant", "content": "three"},
    ]
    chats = [first, [user("hi"), assistant("hello")]]
    inputs = processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding_side": padding_side},
    )
    masks = inputs["assistant_masks"].bool()
    marked = [processor.decode(ids[mask]) for ids, mask in zip(inputs["input_ids"], masks)]
    assert marked == ["one<|im_end|>two <|im_end|>three<|im_end|>", "hello<|im_end|>"]
    plain = processor.apply_chat_template(chats, tokenize=True, return_dict=True, padding_side=padding_side)
    assert inputs.keys() - plain.keys() == {"assistant_masks"}
    assert torch.equal(plain["input_ids"], inputs["input_ids"])


def test_the_marks_are_those_that_training_code_looks_for(repo):
    for file in (repo, *(repo / "checkpoints").iterdir()):
        assert "{% generation %}" in (file / "chat_template.jinja").read_text() == TEMPLATE


def test_tools_and_documents_are_refused_unless_the_template_writes_them(processor):
    def weather(city: str) -> str:
        """The weather.

        Args:
            city: where.
        """

    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
    called = [user("hi"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    for tokenize in (True, False):
        with pytest.raises(ValueError, match=r"trained without tools, .* describe them in a message"):
            processor.apply_chat_template([user("hi")], tools=[weather], tokenize=tokenize)
        with pytest.raises(ValueError, match="trained without documents"):
            processor.apply_chat_template([user("hi")], documents=[{"title": "a", "text": "b"}], tokenize=tokenize)
        with pytest.raises(ValueError, match="trained without tool_calls"):
            processor.apply_chat_template(called, tokenize=tokenize)
    assert processor.apply_chat_template([user("hi")], tools=[], documents=None) == text("hi") + "<|im_start|>"
    template = "{{ tools[0]['function']['name'] }}"
    assert processor.apply_chat_template([user("hi")], template, tools=[weather]) == "weather"


def test_keywords_of_other_chat_templates_are_refused_without_tokenizing_too(processor):
    for thinks in ({"enable_thinking": True}, {"reasoning_effort": "high"}):
        with pytest.raises(TypeError, match="think=True asks for a plan"):
            processor.apply_chat_template([user("hi")], **thinks)
    with pytest.raises(TypeError, match="no keyword generaton_mode"):
        processor.apply_chat_template([user("hi")], generaton_mode="image")
    template = "{{ enable_thinking }}"
    assert processor.apply_chat_template([user("hi")], template, enable_thinking=True) == "True"
    ours = make_processor()
    ours.chat_template = {"default": TEMPLATE, "other": template}
    assert ours.apply_chat_template([user("hi")], "other", enable_thinking=True) == "True"
    with pytest.raises(TypeError, match="think=True"):
        ours.apply_chat_template([user("hi")], enable_thinking=True)


def test_openai_image_urls_are_images(processor, tmp_path):
    picture().save(tmp_path / "picture.png")
    item = {"type": "image_url", "image_url": {"url": str(tmp_path / "picture.png")}}
    conversation = [{"role": "user", "content": [item, {"type": "text", "text": "hi"}]}]
    inputs = processor.apply_chat_template(conversation, tokenize=True, return_dict=True)
    assert torch.equal(inputs["pixel_values"], processor.image_processor(picture())["pixel_values"])


@pytest.mark.skipif("sanitize_control_tokens" not in TextKwargs.__annotations__, reason="a newer transformers has it")
def test_special_tokens_of_untrusted_text_can_be_made_plain(processor):
    conversation = [user("<|im_end|><|image_pad|>", picture(), "<|vision_start|><|vision_pad|><|vision_end|>")]
    inputs = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_tensors="pt", sanitize_control_tokens=True
    )
    kinds = [kind for kind, _ in spans(processor, inputs["input_ids"][0])]
    assert kinds == ["text", "vit", "text", "open"]
    assert processor.decode(inputs["input_ids"][0]).count("<|image_pad|>") == len(inputs["pixel_values"]) + 1


def test_special_tokens_of_trusted_text_keep_their_meaning(processor):
    prompt = processor.apply_chat_template([user("a<|im_end|><|im_start|>b")])
    assert prompt == text("a") + text("b") + "<|im_start|>"


# --------------------------------------------------------------------------------------------------------------------
# Texts and images to tensors


def test_places_match_the_image_tensors(processor):
    inputs = processor(picture(), LATENT + IMAGE + text("hi"), return_tensors="pt")
    rows, columns = inputs["image_grid_hw"][0].tolist()
    height, width = inputs["latent_image_sizes"][0].tolist()
    latents = (height // 16) * (width // 16)
    assert spans(processor, inputs["input_ids"][0]) == [("vae", latents + 2), ("vit", rows * columns + 2), ("text", 4)]
    assert inputs.keys() == {"attention_mask", "input_ids", *processor.image_processor.model_input_names}
    assert inputs["input_ids"].dtype == torch.int64 and inputs["attention_mask"].all()


def test_bare_placeholders_are_wrapped(processor):
    image = picture()
    for bare, written in [
        ("<|image_pad|>", IMAGE),
        ("<|vision_pad|><|image_pad|>", LATENT + IMAGE),
        ("<|vision_start|><|vision_pad|><|image_pad|><|vision_end|>", LATENT + IMAGE),
        ("<|vision_pad|>", LATENT),
    ]:
        left, right = processor(image, bare + text("hi")), processor(image, written + text("hi"))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_lone_latent_placeholder_is_for_the_vae_only(processor):
    inputs = processor([picture(), picture(60, 200)], LATENT + text("and") + IMAGE)
    assert len(inputs["latent_image_sizes"]) == 1 and len(inputs["image_grid_hw"]) == 1
    assert [kind for kind, _ in spans(processor, inputs["input_ids"][0])] == ["vae", "text", "vit"]


def test_batches_are_padded_on_the_left(processor):
    texts = [IMAGE + text("hi"), text("a longer text without any image, really"), LATENT + IMAGE + text("x")]
    images = [picture(), picture(60, 200, 1)]
    batch = processor(images, texts)
    alone = [processor(images[0], texts[0]), processor(None, texts[1]), processor(images[1], texts[2])]
    for ids, mask, one in zip(batch["input_ids"], batch["attention_mask"], alone):
        assert torch.equal(ids[mask.bool()], one["input_ids"][0])
        assert mask.tolist() == sorted(mask.tolist())
    assert torch.equal(batch["pixel_values"], torch.cat([alone[0]["pixel_values"], alone[2]["pixel_values"]]))
    nested = processor([[images[0]], [], [images[1]]], texts)
    assert all(torch.equal(batch[name], nested[name]) for name in batch)


def test_batched_conversations_are_the_single_ones(processor):
    conversations = [[user(picture(), "what?")], [user("who?")], [user("a", picture(60, 200, 1), picture(50, 50, 2))]]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "generation_mode": "image"}
    batch = processor.apply_chat_template(conversations, **options)
    alone = [processor.apply_chat_template(conversation, **options) for conversation in conversations]
    for ids, mask, one in zip(batch["input_ids"], batch["attention_mask"], alone):
        assert torch.equal(ids[mask.bool()], one["input_ids"][0])
    assert torch.equal(batch["pixel_values"], torch.cat([one["pixel_values"] for one in (alone[0], alone[2])]))
    assert len(batch["latent_image_sizes"]) == 3


def test_raw_text_is_left_as_it_is(processor):
    assert processor.decode(processor(text="hi there")["input_ids"][0]) == "hi there"


def test_images_and_places_must_match(processor):
    with pytest.raises(ValueError, match="placeholders for 1 images, but 2 were given"):
        processor([picture(), picture()], IMAGE)
    with pytest.raises(ValueError, match="placeholders for 2 images, but 0 were given"):
        processor(text=IMAGE + text("and") + IMAGE)
    with pytest.raises(ValueError, match=r"placeholders for 0 images, but 1 were given.*image_pad"):
        processor(picture(), text("hi"))
    with pytest.raises(ValueError, match="text 1 has placeholders for 0 images, but 1"):
        processor([[picture()], [picture()]], [IMAGE, text("hi")])
    with pytest.raises(ValueError, match="2 texts but lists of images for 1"):
        processor([[picture()]], [IMAGE, text("hi")])


@pytest.mark.parametrize("prompt", ["", "  \n", text(""), text(" ") + "<|im_start|>", ["hi", ""]])
def test_empty_prompts_are_refused(processor, prompt):
    with pytest.raises(ValueError, match="empty"):
        processor(text=prompt)


def test_wrong_calls_are_refused(processor):
    with pytest.raises(ValueError, match="empty"):
        processor()
    with pytest.raises(ValueError, match="empty"):
        processor(images=[])
    with pytest.raises(ValueError, match="string or a list of strings"):
        processor(text=[["hi"]])
    with pytest.raises(ValueError, match="no videos"):
        processor(text="hi", videos=["a.mp4"])
    nested = ({f"{group}_kwargs": {"foo": 1}} for group in ("text", "images", "videos", "audio", "common"))
    for unknown in ({"pading": True}, {"do_flip": False}, *nested):
        with pytest.raises(TypeError, match="has no keyword"):
            processor(text="hi", **unknown)
    with pytest.raises(TypeError, match="has no keyword"):
        processor.apply_chat_template([user("hi")], tokenize=True, return_dict=True, generaton_mode="image")
    with pytest.raises(ValueError, match="drop edited and read"):
        processor(picture(), IMAGE, edited=True)


def test_truncation_may_cut_text_but_no_image(processor):
    words = text("a rather long question")
    assert processor(text=words, truncation=True, max_length=5)["input_ids"].shape == (1, 5)
    whole = processor(picture(), IMAGE + words)["input_ids"]
    places = int((whole == processor.image_token_id).sum())
    kept = processor(picture(), IMAGE + words, truncation=True, max_length=places + 2)["input_ids"]
    assert torch.equal(kept, whole[:, : places + 2])
    for max_length in (places + 1, places, 3, 1):
        with pytest.raises(
            ValueError, match=f"of {places} <.image_pad.> placeholders .* {max_length} tokens; raise max_length"
        ):
            processor(picture(), IMAGE + words, truncation=True, max_length=max_length)


def test_keywords_reach_the_tokenizer_and_the_image_processor(processor):
    inputs = processor(picture(), IMAGE + "hi", padding="max_length", max_length=40, padding_side="right")
    assert inputs["input_ids"].shape == (1, 40) and not inputs["attention_mask"][0, -1]
    first = processor(picture(500, 120), IMAGE, vae_resize_first=True)
    nested = processor(
        picture(500, 120), IMAGE, images_kwargs={"vae_resize_first": True}, text_kwargs={"padding": False}
    )
    assert torch.equal(first["pixel_values"], nested["pixel_values"])
    assert not torch.equal(first["pixel_values"], processor(picture(500, 120), IMAGE)["pixel_values"])
    from_chat = processor.apply_chat_template(
        [user(picture(500, 120))], tokenize=True, return_dict=True, processor_kwargs={"vae_resize_first": True}
    )
    assert torch.equal(first["pixel_values"], from_chat["pixel_values"])
    assert isinstance(processor(text="hi", return_tensors="np")["input_ids"], np.ndarray)
    assert processor(text="hi", return_tensors=None)["input_ids"][0] == processor.tokenizer("hi")["input_ids"]


def test_keywords_of_image_processors_act_from_the_processor_too(processor):
    image = picture(56, 42)
    expected = processor.image_processor(image, do_resize=False, do_normalize=False, rescale_factor=0.5)
    settings = {"do_resize": False, "do_normalize": False, "rescale_factor": 0.5}
    for given in (settings, {"images_kwargs": settings}, {"common_kwargs": settings | {"padding": True}}):
        inputs = processor(image, IMAGE, **given)
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
        assert int((inputs["input_ids"] == processor.image_token_id).sum()) == len(expected["pixel_values"])
    with pytest.raises(ValueError, match="two times"):
        processor(image, IMAGE, do_resize=False, images_kwargs={"do_resize": False})


def test_keywords_that_cannot_act_are_refused_by_name(processor):
    asked = {
        "text_pair": "b",
        "text_target": "b",
        "text_pair_target": "b",
        "is_split_into_words": True,
        "return_token_type_ids": True,
        "return_overflowing_tokens": True,
        "stride": 3,
    }
    assert asked.keys() == REFUSED_TEXT.keys()
    for name, value in (asked | {"do_center_crop": True, "device": "cuda"}).items():
        for given in ({name: value}, {"common_kwargs": {name: value}}):
            with pytest.raises(ValueError, match=f"{name} cannot be set: "):
                processor(picture(), IMAGE, **given)
    with pytest.raises(ValueError, match="stride cannot be set"):
        processor(text="hi", text_kwargs={"stride": 3})
    nothing = {"stride": 0, "return_token_type_ids": False, "text_pair": None, "do_pad": False, "device": "cpu"}
    assert torch.equal(processor(text="hi", **nothing)["input_ids"], processor(text="hi")["input_ids"])


def test_keywords_of_videos_and_sounds_have_nothing_to_act_on(processor):
    about = {"num_frames": 2, "fps": None, "do_sample_frames": True, "return_metadata": True, "sampling_rate": 16000}
    expected = processor(picture(), IMAGE)
    for given in (about, {"videos_kwargs": {"num_frames": 2}, "audio_kwargs": {"sampling_rate": 16000}}):
        inputs = processor(picture(), IMAGE, **given)
        assert inputs.keys() == expected.keys() and torch.equal(inputs["input_ids"], expected["input_ids"])
    chat = {"tokenize": True, "return_dict": True, "load_audio_from_video": True}
    processor.apply_chat_template([user(picture())], processor_kwargs={"num_frames": 2, "fps": None}, **chat)


@pytest.mark.parametrize("nothing", [None, [], (), [[]], [[], []], np.zeros((0, 3))], ids=str)
def test_no_videos_and_no_sounds_are_nothing(processor, nothing):
    inputs = processor(text="hi", videos=nothing, audio=nothing, audios=nothing)
    assert inputs.keys() == {"input_ids", "attention_mask"}
    for name in ("videos", "audio", "audios"):
        with pytest.raises(ValueError, match=f"no {name}"):
            processor(text="hi", **{name: [np.zeros((2, 8, 8, 3))]})


def test_image_tokens_can_be_counted_and_marked(processor):
    sizes = [(80, 120), (200, 60), (42, 42)]
    images = [picture(width, height) for height, width in sizes]
    for placeholder, options in (
        (IMAGE, {}),
        (LATENT + IMAGE, {"edited": True}),
        (LATENT, {"edited": True, "read": False}),
        (IMAGE, {"images_kwargs": {"max_pixels": 2000}}),
        (IMAGE, {"vae_resize_first": True}),
    ):
        settings = {name: value for name, value in options.items() if name not in ("edited", "read")}
        inputs = processor(images, [placeholder] * 3, return_mm_token_type_ids=True, **settings)
        counted = processor._get_num_multimodal_tokens(image_sizes=sizes, **options)
        assert inputs["mm_token_type_ids"].sum(-1).tolist() == counted["num_image_tokens"]
        read = (inputs["input_ids"] == processor.image_token_id).sum(-1)
        assert read.tolist() == counted["num_image_patches"]
    assert "mm_token_type_ids" not in processor(images[0], IMAGE)


def test_what_replaces_an_image_can_be_made_alone(processor):
    images = [picture(), picture(60, 200, 1), picture(42, 42)]
    flags = {"edited": [True, False, True], "read": [False, True, True]}
    features = processor.image_processor(images, **flags)
    spans = [processor.replace_image_token(features, index, **flags) for index in range(3)]
    bare = ["a<|vision_pad|>b", "c<|image_pad|><|vision_pad|><|image_pad|>"]
    texts, offsets = processor.get_text_with_replacements(bare, spans)
    assert texts == ["a" + spans[0] + "b", "c" + spans[1] + spans[2]]
    assert [one["replacement"] for row in offsets for one in row] == spans
    written = processor.tokenizer.batch_decode(processor(images, bare, padding=False, return_tensors=None)["input_ids"])
    assert written == texts
    alone = processor.image_processor(images[1])
    assert processor.replace_image_token(alone, 0) == spans[1]


def test_a_mismatch_is_said_in_the_words_of_transformers_too(processor):
    words = " tokens in the prompts should be the same as the number of "
    for images in ([picture()] * 2, [[picture()], [picture()]], [[picture()] * 2]):
        with pytest.raises(ValueError, match=words):
            processor(images, [IMAGE])


def test_transformers_finds_the_parts_by_their_names(processor):
    assert processor.get_attributes() == processor.attributes == ["image_processor", "tokenizer"]
    assert processor.tokenizer_class == "AutoTokenizer"
    assert processor.valid_processor_kwargs.__name__ == "BagelProcessorKwargs"
    assert processor.image_processor.valid_kwargs.__name__ == "BagelImageProcessorKwargs"


def test_replaced_placeholders_can_be_located(processor):
    texts = ["hi" + LATENT + IMAGE + "you <|image_pad|>", "no image"]
    inputs = processor([picture(), picture(60, 200)], texts, return_text_replacement_offsets=True, padding=True)
    decoded = processor.tokenizer.batch_decode(inputs["input_ids"])[0]
    for offset, placeholder in zip(inputs["text_replacement_offsets"][0], (LATENT + IMAGE, "<|image_pad|>")):
        assert decoded[slice(*offset["new_span"])] == offset["replacement"]
        assert texts[0][slice(*offset["span"])] == offset["text"] == placeholder
    assert inputs["text_replacement_offsets"][1] == []


def test_padding_side_of_the_tokenizer_does_not_matter():
    processor = make_processor()
    processor.tokenizer.padding_side = processor.tokenizer.init_kwargs["padding_side"] = "right"
    assert processor(text=["hi", "hi there"])["attention_mask"][0].tolist() == [0] * 6 + [1] * 2


def test_images_alone_are_the_image_processor(processor):
    alone, expected = processor(picture(), edited=True), processor.image_processor(picture(), edited=True)
    assert alone.keys() == expected.keys()
    assert all(torch.equal(alone[name], expected[name]) for name in alone)


def test_model_input_names_are_what_comes_out(processor):
    assert set(processor.model_input_names) == processor(picture(), IMAGE).keys()
    names = {*processor.model_input_names, *processor.image_processor.model_input_names}
    assert names == processor(picture(), LATENT + IMAGE).keys()


def test_a_tokenizer_without_the_special_tokens_is_refused():
    with pytest.raises(ValueError, match=r"the tokenizer has no <\|im_start\|>"):
        BagelProcessor(BagelImageProcessor(), Qwen2TokenizerFast(vocab={"<|endoftext|>": 0}, merges=[]))
    with pytest.raises(TypeError, match="tokenizer"):
        BagelProcessor(BagelImageProcessor())


# --------------------------------------------------------------------------------------------------------------------
# Generated outputs


def test_token_ids_are_decoded(processor):
    ids = processor(text=[text("hi"), text("hello")])["input_ids"]
    assert processor.post_process_multimodal_output(ids) == ["hi", "hello"]
    assert processor.post_process_multimodal_output(ids[1], generation_mode="text") == ["hello"]
    assert processor.post_process_image_text_to_text(ids.tolist(), skip_special_tokens=False)[1] == text("hello")


def test_pictures_and_pixels_are_pictures(processor):
    image = picture()
    assert processor.post_process_multimodal_output([image], generation_mode="image") == [image]
    pixels = torch.rand(2, 3, 8, 16)
    pictures = processor.post_process_multimodal_output(pixels, generation_mode="image")
    assert [one.size for one in pictures] == [(16, 8)] * 2
    assert np.asarray(pictures[1]).tolist() == (pixels[1].permute(1, 2, 0) * 255).byte().tolist()
    assert len(processor.post_process_multimodal_output(list(pixels), generation_mode="image")) == 2


def test_interleaved_outputs_keep_their_order(processor):
    image, ids = picture(), processor(text=text("hi"))["input_ids"][0]
    outputs = processor.post_process_multimodal_output(
        [[ids, image, ids.tolist(), []], [torch.rand(3, 4, 4)]], generation_mode="interleaved"
    )
    assert outputs[0] == ["hi", image, "hi", ""]
    assert outputs[1][0].size == (4, 4)
    with pytest.raises(ValueError, match="not 'audio'"):
        processor.post_process_multimodal_output([ids], generation_mode="audio")


# --------------------------------------------------------------------------------------------------------------------
# Saving and loading


def test_tiny_tokenizer_loads_without_remote_code(tmp_path):
    tokenizer = build_tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    words = text("What is in the picture? ça 水") + IMAGE
    assert loaded(words)["input_ids"] == tokenizer(words)["input_ids"]
    assert loaded.decode(loaded(words)["input_ids"]) == words
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(len(tokenizer) - len(SPECIAL_TOKENS), len(tokenizer)))
    assert len(tokenizer(text("What is in the picture?"))["input_ids"]) < len("What is in the picture?")
    assert build_tiny_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_auto_processor_loads_it_as_remote_code(tmp_path, monkeypatch):
    monkeypatch.setattr(BagelProcessor, "_auto_class", None)
    monkeypatch.setattr(BagelImageProcessor, "_auto_class", None)
    BagelProcessor.register_for_auto_class()
    BagelImageProcessor.register_for_auto_class()
    processor = make_processor(max_pixels=3000)
    processor.save_pretrained(tmp_path)
    assert {"processing_bagel.py", "image_processing_bagel.py"} <= {path.name for path in tmp_path.iterdir()}

    loaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__name__ == "BagelProcessor" and type(loaded) is not BagelProcessor
    assert loaded.chat_template == TEMPLATE
    conversation = [user(picture(), "make it night"), assistant("ok", picture(60, 200, 1)), user("again")]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "think": True}
    for mode in ("text", "image", "interleaved"):
        expected = processor.apply_chat_template(conversation, generation_mode=mode, **options)
        inputs = loaded.apply_chat_template(conversation, generation_mode=mode, **options)
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True, patch_size=7).image_processor.patch_size == 7


def test_saving_leaves_no_trace_on_the_processor(tmp_path, tiny_directory):
    processor = load(tiny_directory)
    before = processor.to_dict()
    processor.save_pretrained(tmp_path)
    assert processor.to_dict() == before == load(tmp_path).to_dict()
    assert "auto_map" in json.loads((tmp_path / "processor_config.json").read_text())


# --------------------------------------------------------------------------------------------------------------------
# The facts of the model beside it


@pytest.fixture
def saved(tmp_path, tiny_directory) -> Path:
    """A folder with a processor, and the config of its model."""
    load(tiny_directory).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((tiny_directory / "config.json").read_text())
    return tmp_path


def change(file: Path, **changes) -> None:
    """Set keys of a JSON file; `None` deletes one."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def load(folder: Path, **options) -> BagelProcessor:
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True, **options)


def test_facts_of_a_new_processor_are_the_released_ones(repo):
    facts = PackingConfig()
    made = BagelProcessor(BagelImageProcessor(), build_tiny_tokenizer()).packing_config
    assert all(getattr(made, name) == getattr(facts, name) for name in PACKING_FACTS if not name.endswith("token_id"))
    facts.check_model(BagelConfig.from_pretrained(repo))
    stored = json.loads((repo / "processor_config.json").read_text())
    assert stored["model_facts"] == {name: getattr(facts, name) for name in MODEL_FACTS}


def test_facts_are_saved_and_loaded(saved):
    assert load(saved).packing_config.max_latent_size == 16
    processor = make_processor()
    processor.model_facts = {"max_latent_size": 7, "interpolate_pos": "fit"}
    processor.save_pretrained(saved / "alone")
    loaded = load(saved / "alone")
    assert vars(loaded.packing_config) == vars(processor.packing_config)
    assert (loaded.packing_config.max_latent_size, loaded.packing_config.interpolate_pos) == (7, "fit")
    with pytest.raises(ValueError, match="model_facts has no max_size; it has vit_max_num_patch_per_side"):
        BagelProcessor(BagelImageProcessor(), build_tiny_tokenizer(), model_facts={"max_size": 3})


def test_a_processor_that_contradicts_the_config_beside_it_is_refused_with_both_values(saved):
    change(saved / "config.json", max_latent_size=12, vae_cond_dropout_prob=0.2, latent_token_id=7)
    with pytest.raises(ValueError, match="latent_token_id is 398 for the processor, 7 for the model") as error:
        load(saved).pack([])
    assert "max_latent_size is 16 for the processor, 12 for the model" in str(error.value)
    assert "vae_cond_dropout_prob is 0.3 for the processor, 0.2 for the model" in str(error.value)


def test_a_config_in_released_words_is_compared_too(saved):
    values = json.loads((saved / "config.json").read_text())
    values |= {"llm_config": values.pop("text_config"), "vit_config": values.pop("vision_config")}
    for name in ("max_latent_size", "interpolate_pos", "vit_patch_size", "stage"):
        del values[name]
    (saved / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="max_latent_size is 16 for the processor, 64 for the model"):
        load(saved).collator()
    (saved / "config.json").write_text(json.dumps(values | {"max_latent_size": 16}))
    load(saved)


def test_facts_that_an_older_processor_lacks_are_those_of_the_config_beside_it(saved):
    change(saved / "processor_config.json", model_facts=None)
    change(saved / "config.json", max_latent_size=12)
    assert load(saved).packing_config.max_latent_size == 12
    change(saved / "processor_config.json", model_facts={"visual_und": True})
    assert load(saved).packing_config.max_latent_size == 12
    (saved / "config.json").unlink()
    assert load(saved).packing_config.max_latent_size == 64


def test_an_older_processor_of_a_model_with_three_positions_makes_them(saved):
    text = json.loads((saved / "config.json").read_text())["text_config"]
    text["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [1, 1, 2]}
    text["rope_parameters"]["mrope_section"][2] += text["hidden_size"] // text["num_attention_heads"] // 2 - 4
    change(saved / "config.json", text_config=text)
    with pytest.raises(ValueError, match="multimodal_positions is False for the processor, True for the model"):
        load(saved).collator()
    change(saved / "processor_config.json", model_facts=None)
    assert load(saved).packing_config.multimodal_positions


def test_arguments_count_whatever_the_config_says(saved):
    loaded = load(saved, return_position_ids=True, patch_size=7)
    assert loaded.packing_config.multimodal_positions and loaded.packing_config.vit_patch_size == 7
    with pytest.raises(ValueError, match="vit_patch_size is 7 for the processor, 14 for the model"):
        loaded.check_model(BagelConfig.from_pretrained(saved))


def test_a_processor_follows_a_model_that_was_loaded_with_other_settings(saved):
    processor, config = load(saved), BagelConfig.from_pretrained(saved, stage=1, max_latent_size=12)
    with pytest.raises(ValueError, match="visual_gen is True for the processor, False for the model"):
        processor.check_model(config)
    processor.follow_model(config)
    processor.check_model(config)
    assert (processor.packing_config.visual_gen, processor.packing_config.max_latent_size) == (False, 12)
    other = BagelConfig.from_pretrained(saved, bos_token_id=3)
    with pytest.raises(ValueError, match="bos_token_id is 394 for the processor, 3 for the model"):
        processor.follow_model(other)


# --------------------------------------------------------------------------------------------------------------------
# Packs, from a folder that was saved


FROM_A_FOLDER = """
import sys

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor


def row(colour):
    asked, drawn = [{"type": "text", "text": colour}], [{"type": "image"}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": drawn}]
    return {"messages": messages, "images": [Image.new("RGB", (128, 128), colour)]}


def main():
    rows = [row(colour) for colour in ("red", "green", "blue", "white")]
    processor = AutoProcessor.from_pretrained("model", trust_remote_code=True)
    model = AutoModel.from_pretrained("model", trust_remote_code=True)
    model(**processor.pack(rows)).loss.backward()
    assert model.llm2vae.weight.grad.abs().sum() > 0
    assert not {"bagel", "datasets", "torchdata"} & sys.modules.keys(), sorted(sys.modules)

    from transformers import Trainer, TrainingArguments

    settings = TrainingArguments(
        "out",
        max_steps=1,
        per_device_train_batch_size=2,
        remove_unused_columns=False,
        dataloader_num_workers=2,
        dataloader_multiprocessing_context="spawn",
        report_to="none",
        use_cpu=True,
    )
    before = model.llm2vae.weight.detach().clone()
    Trainer(model, settings, train_dataset=rows, data_collator=processor.collator(max_num_tokens=400)).train()
    assert not torch.equal(model.llm2vae.weight, before)
    print("trained")


if __name__ == "__main__":
    main()
"""


def test_a_saved_folder_alone_packs_and_trains_with_spawned_workers(tmp_path, tiny_directory):
    BagelForUnifiedMultimodal.from_pretrained(tiny_directory).save_pretrained(tmp_path / "model")
    load(tiny_directory).save_pretrained(tmp_path / "model")
    (tmp_path / "script.py").write_text(FROM_A_FOLDER)
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "script.py"]  # nothing of this checkout is on its path
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "trained"


SPAWNED = """
from functools import partial

from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoProcessor


def prompt(processor, colours):
    chats = [[{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (128, 128), colour)}]}]
             for colour in colours]
    return dict(processor.apply_chat_template(chats, tokenize=True, return_dict=True, return_tensors="pt"))


def main():
    processor = AutoProcessor.from_pretrained("model", trust_remote_code=True)
    made = partial(prompt, processor)
    colours = ["red", "green", "blue", "white"]
    options = {"batch_size": 2, "collate_fn": made, "num_workers": 2, "multiprocessing_context": "spawn"}
    loader = DataLoader(colours, persistent_workers=True, **options)
    for epoch in range(2):
        for batch, pair in zip(loader, (colours[:2], colours[2:]), strict=True):
            assert all((batch[name] == value).all() for name, value in made(pair).items())
    print("the same")


if __name__ == "__main__":
    main()
"""


def test_spawned_workers_that_stay_make_the_same_prompts(tmp_path, tiny_directory):
    load(tiny_directory).save_pretrained(tmp_path / "model")
    (tmp_path / "script.py").write_text(SPAWNED)
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "script.py"]  # nothing of this checkout is on its path
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "the same"


def test_a_collator_of_remote_code_can_be_pickled(processor, tiny_directory):
    remote = load(tiny_directory)
    row = {"messages": [{"role": "assistant", "content": "hi"}]}
    copied = pickle.loads(pickle.dumps(remote.collator()))
    assert copied([row])["sequence_length"] == remote.pack([row])["sequence_length"]


def test_what_a_model_ships_imports_only_what_requirements_name(repo):
    allowed = {"torch", "transformers", "safetensors", "PIL", "numpy", "tqdm", "diffusers", "accelerate"}
    allowed |= set(sys.stdlib_module_names)
    for name in ("conversations_bagel", "packing_bagel", "processing_bagel", "image_processing_bagel"):
        for node in ast.walk(ast.parse((repo / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.partition(".")[0] in allowed, (name, node.module)
