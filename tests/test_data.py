# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Rows to packs: what becomes of a conversation, the released formats, and that no sample is lost or repeated."""

import json
import pickle
import re
from collections import Counter
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity_data import cases
from PIL import Image
from torch.utils.data import DataLoader

from bagel.conversations_bagel import ConversationPlanner, picture_size
from bagel.image_processing_bagel import BagelImageProcessor
from bagel.packing_bagel import PackCollator, PackingConfig, SamplePlan, pack, pack_samples, randomize, with_labels
from bagel.processing_bagel import BagelProcessor
from bagel.shapes.tokenizer import build_tiny_tokenizer
from bagel.training.packed import Budget, PackedDataset
from bagel.training.sources import (
    DataSource,
    editing_conversation,
    editing_parquet,
    t2i_conversation,
    t2i_parquet,
    vlm_conversation,
    vlm_jsonl,
)


pytestmark = pytest.mark.core

TEMPLATE = (Path(__file__).parents[1] / "chat_template.jinja").read_text()
SIZES = {
    "size": {"shortest_edge": 28, "longest_edge": 70},
    "latent_size": {"shortest_edge": 32, "longest_edge": 96},
}
DROP_NOTHING = dict.fromkeys(("text_cond_dropout_prob", "vit_cond_dropout_prob", "vae_cond_dropout_prob"), 0.0)


def make_processor(**settings) -> BagelProcessor:
    tokenizer = build_tiny_tokenizer(vocab_size=263)  # a token per character
    facts = DROP_NOTHING | {"vit_max_num_patch_per_side": 5, "max_latent_size": 6}
    return BagelProcessor(BagelImageProcessor(**SIZES | settings), tokenizer, chat_template=TEMPLATE, model_facts=facts)


PROCESSOR = make_processor()
CONFIG = PROCESSOR.packing_config
BOS, EOS, SEE = CONFIG.bos_token_id, CONFIG.eos_token_id, CONFIG.vision_start_token_id


def picture(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def file_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def conversation(*spans, **columns) -> dict[str, Any]:
    """From "u: text" and "a: text"; a text of dots is an image."""
    messages, images = [], []
    for span in spans:
        role, text = span.split(": ")
        if is_image := text == "...":
            images.append(picture(seed=len(images)))
        item = {"type": "image"} if is_image else {"type": "text", "text": text}
        messages.append({"role": {"u": "user", "a": "assistant", "s": "system"}[role], "content": [item]})
    return {"messages": messages, "images": images, **columns}


def shown(row: dict[str, Any], config: PackingConfig = CONFIG, **options) -> list[str]:
    """The items of a plan: their kind; ! = learned, ? = can be dropped, > and what its last token should predict."""
    plan = ConversationPlanner(PROCESSOR, config, **options).outline(row).plan
    names = {BOS: "bos", EOS: "eos", SEE: "see", None: ""}
    return [
        item.type.removesuffix("_image")
        + ("!" if item.loss else "")
        + ("?" if item.enable_cfg else "")
        + (f">{names[item.special_token_label]}" if item.special_token_loss else "")
        for item in plan.items
    ]


# --------------------------------------------------------------------------------------------------------------------
# What becomes of a conversation


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (["u: ...", "a: a cat"], ["vit", "text!>eos"]),  # captioning
        (["u: ...", "u: what?", "a: a cat"], ["vit", "text", "text!>eos"]),  # a question
        (["u: ...", "u: what?", "a: a cat", "u: why?", "a: so"], ["vit", "text", "text!>eos", "text", "text!>eos"]),
        (["u: hi", "a: ho"], ["text", "text!>eos"]),  # text alone
        (["a: once upon"], ["text!>eos"]),
        (["u: a cat", "a: ..."], ["text?", "vae!"]),  # text to image
        (["u: ...", "u: blue", "a: ..."], ["vae?", "vit?", "text?", "vae!"]),  # an edit
        (
            ["u: ...", "u: blue", "a: ...", "u: red", "a: ..."],  # a picture edited twice
            ["vae?", "vit?", "text?", "vae!", "vae?", "vit?>eos", "text?", "vae!"],
        ),
        (
            ["u: go", "a: first", "a: ...", "a: then", "a: ..."],  # interleaved
            ["text", "text!>see", "vae!", "vae", "vit>bos", "text!>see", "vae!", "vae", "vit>eos"],
        ),
        (["u: go", "a: one", "a: two"], ["text", "text!>bos", "text!>eos"]),
        (["u: go", "a: ...", "a: ..."], ["text?", "vae!", "vae?", "vit?>see", "vae!", "vae", "vit>eos"]),
        (
            ["u: ...", "u: what?", "a: a cat", "u: draw it", "a: ..."],  # reading, then drawing
            ["vae", "vit", "text", "text!>eos", "text?", "vae!"],
        ),
        (["u: a cat", "a: ...", "u: what?", "a: a cat"], ["text?", "vae!", "vae", "vit>eos", "text", "text!>eos"]),
        (["s: be kind", "u: hi", "a: ho"], ["text", "text", "text!>eos"]),
    ],
)
def test_a_conversation_becomes_this_plan(row: list[str], expected: list[str]):
    assert shown(conversation(*row)) == expected


def test_without_decisions_nothing_but_texts_and_pictures_is_trained():
    spans = ["u: go", "a: first", "a: ...", "a: then", "a: ..."]
    assert shown(conversation(*spans), decisions=False) == ["text", "text!", "vae!", "vae", "vit", "text!", "vae!"]


def test_texts_without_tokens_are_left_out():
    assert shown(conversation("u: ", "u: ...", "a: a cat", "a: ")) == ["vit", "text!>eos"]


def test_content_may_be_a_string_and_images_may_stand_in_their_items():
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture(), "text": None}]},
        {"role": "user", "content": "what?"},
        {"role": "assistant", "content": "a cat"},
    ]
    assert shown({"messages": messages}) == ["vit", "text", "text!>eos"]


def clip(role: str, *deltas: int | None) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "image", "frame_delta": delta} for delta in deltas]}


def test_a_clip_is_one_split_of_vae_frames():
    text = {"role": "user", "content": "it turns"}
    row = {"messages": [text, clip("assistant", 2, 5, None)], "images": [picture(48, 48)] * 3}
    planner = ConversationPlanner(PROCESSOR, CONFIG)
    outline = planner.outline(row)
    made = pack([planner.load(outline, randomize(outline.plan, CONFIG, np.random.default_rng(0)))], CONFIG)
    frame = 2 + 3 * 3
    assert (made["split_lens"], made["attn_modes"]) == ([10, 3 * frame], ["causal", "full"])
    assert made["packed_position_ids"].tolist() == [*range(10)] + [10] * frame + [12] * frame + [17] * frame
    assert len(set(made["packed_timesteps"].tolist())) == 1


def test_a_clip_is_read_frame_by_frame_unless_something_is_drawn_after_it():
    text, answer = {"role": "user", "content": "what?"}, {"role": "assistant", "content": "a cat"}
    drawn = {"role": "assistant", "content": [{"type": "image"}]}
    frames = [picture()] * 3
    assert shown({"messages": [clip("user", 2, 5, None), text, answer], "images": frames}) == [
        *["vit"] * 3,
        "text",
        "text!>eos",
    ]
    assert shown({"messages": [clip("user", 2, 5, None), text, drawn], "images": [*frames, picture()]}) == [
        *["vae?"] * 3,
        "text?",
        "vae!",
    ]
    spoken = {"messages": [text, clip("assistant", 2, None), answer], "images": frames[:2]}
    assert shown(spoken) == ["text?", "vae!", "vae!", "vae", "vae>bos", "text!>eos"]


def test_a_model_without_tower_or_vae_gets_what_it_can_read():
    reads = replace(CONFIG, visual_gen=False)
    sees_latents = replace(CONFIG, visual_und=False)
    assert shown(conversation("u: ...", "a: a cat"), reads) == ["vit", "text!>eos"]
    assert shown(conversation("u: ...", "u: blue", "a: ..."), sees_latents) == ["vae?", "text?", "vae!"]
    with pytest.raises(ValueError, match="draws an image, but this model only reads"):
        shown(conversation("u: a cat", "a: ..."), reads)
    with pytest.raises(ValueError, match="reads an image, but this model has no vision tower"):
        shown(conversation("u: ...", "a: a cat"), sees_latents)


def made_of(row: dict[str, Any], **options) -> dict[str, Any]:
    planner = ConversationPlanner(PROCESSOR, CONFIG, **options)
    outline = planner.outline(row)
    return pack([planner.load(outline, randomize(outline.plan, CONFIG, np.random.default_rng(0)))], CONFIG)


@pytest.mark.parametrize(
    "spans",
    [
        ["u: ...", "u: blue", "a: ...", "u: red", "a: so", "a: ..."],
        ["u: go", "a: first", "a: ...", "a: then"],
        ["u: ...", "u: ...", "a: first", "a: ...", "u: on"],
    ],
)
def test_what_is_trained_sees_the_context_that_generation_builds(spans: list[str]):
    """Without its noisy blocks a pack is the prompt of the same conversation: ids, positions, patches and pixels."""
    row = conversation(*spans)
    if spans[-1].startswith("u"):  # a prompt may end with the user, a row may not
        spans, row = [*spans, "a: x"], conversation(*spans, "a: x")
    made = made_of(row)
    kept, start = [], 0
    for length, mode in zip(made["split_lens"], made["attn_modes"]):
        kept += [mode != "noise"] * length
        start += length
    kept = torch.tensor(kept)
    ids = torch.full((made["sequence_length"],), -1)
    ids[made["packed_text_indexes"]] = made["packed_text_ids"]
    ids[made["packed_vae_token_indexes"]] = PROCESSOR.latent_token_id
    ids[made["packed_vit_token_indexes"]] = PROCESSOR.image_token_id

    images = iter(row["images"])
    messages = [
        message | {"content": [item | ({"image": next(images)} if item["type"] == "image" else {})]}
        for message in row["messages"]
        for item in message["content"]
    ]
    inputs = PROCESSOR.apply_chat_template(
        messages, generation_mode="interleaved", tokenize=True, return_dict=True, add_generation_prompt=False
    )
    prompt = inputs["input_ids"][0]
    assert ids[kept].tolist() == prompt.tolist()
    assert torch.equal(made["packed_vit_tokens"], inputs["pixel_values"])
    clean = [
        i
        for i, t in enumerate(made["packed_timesteps"].split([h * w for h, w in made["patchified_vae_latent_shapes"]]))
        if t[0] < -9
    ]
    assert len(clean) == len(inputs["latent_pixel_values"])
    for number, pixels, (height, width) in zip(clean, inputs["latent_pixel_values"], inputs["latent_image_sizes"]):
        assert torch.equal(made["padded_images"][number][:, :height, :width], pixels[:, :height, :width])

    from bagel.layout_bagel import Placeholders

    special = (PROCESSOR.image_token_id, PROCESSOR.latent_token_id, SEE, CONFIG.vision_end_token_id)
    positions = Placeholders.find(prompt[None], *special).positions(torch.ones_like(prompt)[None])[0]
    assert made["packed_position_ids"][kept].tolist() == positions.tolist()


def test_decisions_stand_where_generation_asks_for_them():
    """At the eos of a text and at the vision_end of the ViT's copy of a picture."""
    made = made_of(conversation("u: go", "a: first", "a: ..."))
    text = dict(zip(made["packed_text_indexes"].tolist(), made["packed_text_ids"].tolist()))
    asked = [
        place
        for place, weight in zip(made["ce_loss_indexes"].tolist(), made["ce_loss_weights"].tolist())
        if weight == 1
    ]
    labels = dict(zip(made["ce_loss_indexes"].tolist(), made["packed_label_ids"].tolist()))
    assert [(text[place], labels[place]) for place in asked] == [(EOS, SEE), (CONFIG.vision_end_token_id, EOS)]
    assert asked[1] == made["sequence_length"] - 1 == made["packed_vit_token_indexes"][-1] + 1


# --------------------------------------------------------------------------------------------------------------------
# Sizes and pictures


@pytest.mark.parametrize(
    "spans",
    [["u: ...", "a: x"], ["u: ...", "u: b", "a: ..."], ["u: b", "a: ...", "a: x"], ["u: ...", "u: ...", "a: x"]],
)
@pytest.mark.parametrize("size", [(60, 40), (33, 200), (500, 41), (28, 28)])
@pytest.mark.parametrize("share", [False, True])
def test_lengths_from_headers_are_those_of_the_pixels(spans: list[str], size: tuple[int, int], share: bool):
    row = conversation(*spans)
    row["images"] = [file_of(picture(*size, seed=seed)) for seed in range(len(row["images"]))]
    settings = {"max_pixels": 2000} if share else {}
    config = replace(CONFIG, max_latent_size=40, vit_max_num_patch_per_side=40)
    planner = ConversationPlanner(PROCESSOR, config, share_max_pixels=share, image_settings=settings)
    outline = planner.outline(row)
    loaded = planner.load(outline, randomize(outline.plan, config, np.random.default_rng(0)))
    for one in loaded.items:
        if one.item.type == "vit_image":
            assert len(one.item.content) == one.item.num_tokens - 2
        elif one.item.type == "vae_image":
            assert tuple(one.item.content.shape[1:]) == tuple(16 * side for side in one.item.grid)


def test_images_of_a_row_can_share_the_pixel_limit():
    rows = [conversation(*["u: ..."] * number, "a: x") for number in (1, 2, 4)]
    for row in rows:
        row["images"] = [picture(70, 70)] * len(row["images"])
    lengths = []
    for share in (False, True):
        planner = ConversationPlanner(PROCESSOR, CONFIG, share_max_pixels=share, image_settings={"max_pixels": 4900})
        lengths.append([planner.outline(row).plan.items[0].num_tokens for row in rows])
    assert lengths[0] == [27, 27, 27]
    assert lengths[1][0] == 27 > lengths[1][1] > lengths[1][2]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_size_is_that_of_the_upright_picture(kind: str, orientation: int, tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(picture(60, 40), kind, exif=exif)
    (tmp_path / "file").write_bytes(data)
    expected = (60, 40) if orientation in (1, 3) else (40, 60)
    for source in (data, str(tmp_path / "file"), tmp_path / "file", Image.open(BytesIO(data))):
        assert picture_size(source, 10**6) == expected


def test_sizes_of_arrays_and_of_pictures_in_memory():
    assert picture_size(picture(60, 40), 10**6) == (60, 40)
    assert picture_size(np.zeros((40, 60, 3), np.uint8), 10**6) == (60, 40)
    assert picture_size(torch.zeros(3, 40, 60), 10**6) == (60, 40)
    with pytest.raises(ValueError, match="2400 pixels, more than max_input_pixels=2000"):
        picture_size(file_of(picture(60, 40)), 2000)


def test_a_turned_picture_behind_its_pixels_is_skipped_with_the_reason(caplog):
    """A PNG may say after its pixels that it is to be turned; only decoding finds out."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = file_of(picture(60, 40), exif=exif)
    start = data.index(b"eXIf") - 4
    length = 12 + int.from_bytes(data[start : start + 4], "big")
    chunk, rest = data[start : start + length], data[:start] + data[start + length :]
    end = rest.index(b"IEND") - 4
    late = rest[:end] + chunk + rest[end:]
    rows = [conversation("u: ...", "a: good"), conversation("u: ...", "a: turned", id="late") | {"images": [late]}]
    packs = list(dataset(rows, report=True))
    assert [entry[0] for made in packs for entry in made["report"]["skipped"]] == ["rows:late"]
    assert "stores its orientation behind its pixels" in packs[0]["report"]["skipped"][0][1]


# --------------------------------------------------------------------------------------------------------------------
# Packs of rows


def mixed_rows(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of many lengths, with an id each."""
    rng, rows = np.random.default_rng(seed), []
    for index in range(number):
        words = "x" * int(rng.integers(1, 60))
        kinds = [["u: hi", f"a: {words}"], ["u: ...", f"a: {words}"], [f"u: {words}", "a: ..."]]
        kinds.append(["u: ...", f"u: {words}", "a: ..."])
        row = conversation(*kinds[rng.integers(len(kinds))], id=f"{seed}-{index}")
        width, height = (int(side) for side in rng.integers(30, 90, 2))
        row["images"] = [file_of(picture(width, height)) for _ in row["images"]]
        rows.append(row)
    return rows


def dataset(rows, **options) -> PackedDataset:
    if not isinstance(rows, DataSource | list) or (isinstance(rows, list) and isinstance(rows[0], dict)):
        rows = DataSource("rows", rows)
    options = {"max_num_tokens": 300, "look_ahead": 8, "rank": 0, "world_size": 1, **options}
    return PackedDataset(rows, PROCESSOR, **options)


def ids(made: dict[str, Any]) -> list[str]:
    return made["report"]["sample_ids"]


def all_ids(packs) -> list[str]:
    return [name for made in packs for name in ids(made)]


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    if ours.keys() != theirs.keys():
        return False
    for name, value in ours.items():
        equal = torch.equal(value, theirs[name]) if torch.is_tensor(value) else list_of(value) == list_of(theirs[name])
        if not equal:
            return False
    return True


def list_of(value: Any) -> Any:
    """A loader turns tuples into lists."""
    return json.loads(json.dumps(value))


def test_every_sample_comes_once_within_the_budget():
    rows = mixed_rows(60)
    packs = list(dataset(rows, report=True))
    assert Counter(all_ids(packs)) == Counter(f"rows:{row['id']}" for row in rows)
    assert max(made["sequence_length"] for made in packs) <= 300
    assert sum(made["sequence_length"] for made in packs[:-1]) / (len(packs) - 1) > 0.97 * 300


def test_packs_are_what_forward_takes():
    made = next(iter(dataset(mixed_rows(10))))
    assert "report" not in made
    assert made["sequence_length"] == sum(made["sample_lens"]) == sum(made["split_lens"])
    padded = next(iter(dataset(mixed_rows(10), pack_options={"pad_to": 512})))
    assert sum(padded["split_lens"]) == 512


def test_a_model_trains_on_a_pack(model):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model.config._name_or_path, trust_remote_code=True)
    data = PackedDataset(DataSource("rows", mixed_rows(6)), processor, max_num_tokens=2000, rank=0, world_size=1)
    output = model(**next(iter(data)))
    assert torch.isfinite(output.loss) and output.mse is not None and output.ce is not None


def test_the_same_seed_gives_the_same_packs_and_another_seed_others():
    rows = mixed_rows(30)
    first, again, other = (list(dataset(rows, seed=seed, report=True)) for seed in (1, 1, 2))
    assert all(map(same, first, again)) and len(first) == len(again)
    assert [ids(made) for made in first] != [ids(made) for made in other]
    assert sorted(all_ids(first)) == sorted(all_ids(other))


def timesteps(packs) -> dict[str, list[float]]:
    """Of every sample, by its name: its length and its timesteps."""
    found = {}
    for made in packs:
        start, places = 0, made.get("packed_vae_token_indexes", torch.tensor([]))
        for name, length in zip(ids(made), made["sample_lens"]):
            inside = (places >= start) & (places < start + length)
            found[name] = [length, *(made["packed_timesteps"][inside].tolist() if inside.any() else [])]
            start += length
    return found


def test_every_epoch_has_its_own_order_and_timesteps():
    data = dataset(mixed_rows(30), report=True)
    first, again = list(data), list(data)
    data.set_epoch(1)
    second = list(data)
    assert all(map(same, first, again))
    assert all_ids(first) != all_ids(second)
    assert sorted(all_ids(first)) == sorted(all_ids(second))
    ours, theirs = timesteps(first), timesteps(second)
    learned = [name for name in ours if len(ours[name]) > 1]
    assert len(learned) > 5 and not any(ours[name] == theirs[name] for name in learned)


def test_epochs_of_several_passes_do_not_overlap():
    rows = [conversation("u: a cat", "a: ...", id=str(index)) for index in range(5)]
    data, seen = dataset(rows, report=True, epochs=2), []
    for epoch in range(2):
        data.set_epoch(epoch)
        for planned in data.plan():
            seen += [(sample.sample.name, sample.sample.items[-1].timestep) for sample in planned.samples]
    assert len(set(seen)) == len(seen) == 2 * 2 * 5


def test_samples_have_timesteps_of_their_own():
    drawn = [times[-1] for times in timesteps(dataset(mixed_rows(30), report=True)).values() if len(times) > 1]
    assert len(set(drawn)) == len(drawn) > 5


def test_what_a_sample_becomes_does_not_depend_on_its_pack():
    def became(**options) -> dict[str, list[float]]:
        return timesteps(dataset(mixed_rows(20), report=True, vit_cond_dropout_prob=0.5, **options))

    assert became() == became(max_num_tokens=150, look_ahead=3)
    one, two = (became(rank=rank, world_size=2) for rank in range(2))
    assert {**one, **two} == became()


def test_a_pickled_dataset_gives_the_same_packs():
    data = dataset(mixed_rows(10))
    next(iter(data))
    copied = pickle.loads(pickle.dumps(data))
    assert all(map(same, copied, data))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [None, 1])
def test_packs_and_their_order_do_not_depend_on_workers(workers: int, batch_size: int | None):
    rows = mixed_rows(40)
    rows[7]["images"], rows[7]["messages"] = [b"broken"], conversation("u: ...", "a: x")["messages"]
    expected = list(dataset(rows, report=True))
    options = {"batch_size": batch_size, "collate_fn": PackCollator(CONFIG) if batch_size else None}
    loaded = list(DataLoader(dataset(rows, report=True), num_workers=workers, **options))
    assert len(loaded) == len(expected) > 4
    assert all(map(same, loaded, expected))
    assert [len(made["report"]["skipped"]) for made in loaded].count(1) == 1


def test_ranks_share_the_rows():
    rows = mixed_rows(41)
    of_ranks = [Counter(all_ids(dataset(rows, report=True, rank=rank, world_size=3))) for rank in range(3)]
    assert sum(of_ranks, Counter()) == Counter(f"rows:{row['id']}" for row in rows)
    with pytest.raises(ValueError, match="rank=3 is none of the 3 ranks"):
        dataset(rows, rank=3, world_size=3)
    with pytest.raises(ValueError, match="pass both or none"):
        dataset(rows, rank=None, world_size=3)


def test_the_rank_is_read_from_the_environment(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    data = dataset(mixed_rows(4), rank=None, world_size=None)
    assert (data.rank, data.world_size) == (1, 4)


def test_sources_are_mixed_and_each_is_read_once():
    sources = [
        DataSource("many", mixed_rows(60, seed=1), weight=3.0),
        DataSource("few", mixed_rows(20, seed=2), weight=1.0),
    ]
    plan = dataset(sources, max_num_tokens=300).plan()
    order = [sample.source for planned in plan for sample in planned.samples]
    assert Counter(order) == {0: 60, 1: 20}


def test_epochs_repeat_every_source_and_an_endless_stream_keeps_its_weights():
    sources = [
        DataSource("many", mixed_rows(9, seed=1), weight=1.0),
        DataSource("few", mixed_rows(3, seed=2), weight=3.0),
    ]
    counted = Counter(all_ids(dataset(sources, report=True, epochs=3)))
    assert len(counted) == 12 and set(counted.values()) == {3}
    endless, order = dataset(sources, epochs=None).plan(), []
    while len(order) < 200:
        order += [sample.source for sample in next(endless).samples]
    assert 30 <= Counter(order[:200])[0] <= 70


def test_planning_decodes_nothing(monkeypatch):
    def refuse(*inputs, **options):
        raise AssertionError("decoded")

    monkeypatch.setattr(BagelImageProcessor, "preprocess", refuse)
    monkeypatch.setattr("bagel.conversations_bagel.load_image", refuse)
    assert sum(len(planned.samples) for planned in dataset(mixed_rows(20)).plan()) == 20


# --------------------------------------------------------------------------------------------------------------------
# Resuming


def resumed_matches(make, packs: list, stops: range) -> None:
    """From every stop on, a resumed dataset gives what the one that was never stopped gives."""
    for stop in stops:
        running = make()
        stream = iter(running)
        for _ in range(stop):
            next(stream)
        state = json.loads(json.dumps(running.state_dict()))
        fresh = make()
        fresh.load_state_dict(state)
        rest = list(fresh)
        assert len(rest) == len(packs) - stop
        assert all(map(same, rest, packs[stop:])), f"stopped after {stop}"


def test_a_resumed_run_sees_what_the_other_would_have_seen():
    rows = [mixed_rows(25, seed=seed) for seed in range(2)]
    rows[0][3]["images"] = [b"broken"] * max(1, len(rows[0][3]["images"]))

    def make() -> PackedDataset:
        sources = [DataSource("a", rows[0], weight=2.0), DataSource("b", rows[1], shuffle=False)]
        return dataset(sources, report=True, epochs=2, max_num_tokens=250)

    packs = list(make())
    resumed_matches(make, packs, range(len(packs) + 1))


def test_a_resumed_run_goes_on_in_its_epoch():
    data = dataset(mixed_rows(20), report=True)
    data.set_epoch(3)
    packs, stream = list(data), iter(data)
    next(stream)
    fresh = dataset(mixed_rows(20), report=True)
    fresh.load_state_dict(data.state_dict())
    assert all_ids(fresh) == all_ids(packs[1:])
    assert all_ids(fresh) == all_ids(packs)  # and then the epoch begins anew


def test_a_state_is_small_and_does_not_grow():
    running, sizes = dataset(mixed_rows(30), epochs=None), []
    stream = iter(running)
    for _ in range(40):
        next(stream)
        sizes.append(len(json.dumps(running.state_dict())))
    assert max(sizes) < 2000 and max(sizes[20:]) < 1.5 * max(sizes[:20])


def test_a_resumed_run_decodes_nothing_that_was_packed(monkeypatch):
    rows = mixed_rows(40)
    data = dataset(rows, report=True)
    stream = iter(data)
    before = [next(stream) for _ in range(3)]
    fresh = dataset(rows, report=True)
    fresh.load_state_dict(data.state_dict())
    counted = []
    original = BagelImageProcessor.preprocess
    monkeypatch.setattr(
        BagelImageProcessor, "preprocess", lambda self, *args: counted.append(1) or original(self, *args)
    )
    after = list(fresh)
    seen = Counter(all_ids(before + after))
    assert seen == Counter(f"rows:{row['id']}" for row in rows)
    num_images = {f"rows:{row['id']}": len(row["images"]) for row in rows}
    assert len(counted) == sum(num_images[name] for made in after for name in ids(made))


def test_a_state_of_another_stream_is_refused():
    rows = mixed_rows(10)
    state = dataset(rows, seed=1).state_dict()
    with pytest.raises(ValueError, match="another stream of packs: seed was 1, is 2"):
        dataset(rows, seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match="world_size was 1, is 2"):
        dataset(rows, seed=1, world_size=2).load_state_dict(state)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stateful_loader_resumes_exactly(workers: int):
    loaders = pytest.importorskip("torchdata.stateful_dataloader")
    rows = mixed_rows(30)

    def loader():
        return loaders.StatefulDataLoader(dataset(rows, report=True, epochs=2), batch_size=None, num_workers=workers)

    packs = list(dataset(rows, report=True, epochs=2))
    for stop in (0, 1, 4, len(packs) - 1):
        running = loader()
        stream = iter(running)
        for made in packs[:stop]:
            assert same(next(stream), made)
        state = pickle.loads(pickle.dumps(running.state_dict()))
        del stream
        fresh = loader()
        fresh.load_state_dict(state)
        rest = list(fresh)
        assert len(rest) == len(packs) - stop
        assert all(map(same, rest, packs[stop:])), f"stopped after {stop}"


def test_workers_that_live_on_follow_the_epoch():
    data = dataset(mixed_rows(12), report=True)
    loader = DataLoader(data, batch_size=None, num_workers=1, persistent_workers=True)
    first = [ids(made) for made in loader]
    data.set_epoch(1)
    second = [ids(made) for made in loader]
    expected = dataset(mixed_rows(12), report=True)
    assert first == [ids(made) for made in expected]
    expected.set_epoch(1)
    assert second == [ids(made) for made in expected] != first


# --------------------------------------------------------------------------------------------------------------------
# The released formats


def choices(*numbers: float) -> Any:
    """A generator that gives these numbers, as integers below a bound or as uniform numbers."""

    class Stored:
        left = list(numbers)

        def integers(self, low: int, high: int | None = None) -> int:
            number = self.left.pop(0)
            assert (0 if high is None else low) <= number < (low if high is None else high)
            return number

        def random(self) -> float:
            return self.left.pop(0)

    return Stored()


def spans_of(row: dict[str, Any]) -> list[str]:
    """As `conversation` writes them; images by their value."""
    images = iter(row["images"])
    return [
        f"{message['role'][0]}: {item['text'] if item['type'] == 'text' else next(images)}"
        for message in row["messages"]
        for item in message["content"]
    ]


def test_text_to_image_rows_draw_one_of_their_captions():
    row = {"image": "I", "captions": json.dumps({"short": "a cat", "long": "a small cat"})}
    assert spans_of(t2i_conversation(row, choices(1))) == ["u: a small cat", "a: I"]
    assert spans_of(t2i_conversation(row | {"captions": "{}"}, choices())) == ["u:  ", "a: I"]


def test_editing_rows_draw_where_to_start_and_whether_to_ask_at_once():
    row = {"image_list": ["A", "B", "C", "D"], "instruction_list": [["ab", "AB"], ["bc"], ["cd"]]}
    assert spans_of(editing_conversation(row, choices(0, 1, 1))) == ["u: A", "u: AB", "a: B"]
    steps = ["u: A", "u: ab", "a: B", "u: bc", "a: C"]
    assert spans_of(editing_conversation(row, choices(0, 2, 0.7, 0, 0))) == steps
    assert spans_of(editing_conversation(row, choices(0, 2, 0.3, 0, 0))) == ["u: A", "u: ab. bc.", "a: C"]
    # as released: at once, but not up to the last image
    assert spans_of(editing_conversation(row, choices(1, 3, 0.3, 0))) == ["u: B", "u: bc.", "a: C"]
    pair = {"image_list": ["A", "B"], "instruction_list": ["ab"]}
    assert spans_of(editing_conversation(pair, choices(0, 1))) == ["u: A", "u: ab", "a: B"]
    with pytest.raises(ValueError, match="1 images with 0 instructions hold no edit"):
        editing_conversation({"image_list": ["A"], "instruction_list": []}, choices())


def test_understanding_rows_have_images_where_their_marks_stand():
    row = {
        "conversations": [
            {"from": "human", "value": "<image>\nCompare <image> with it."},
            {"from": "gpt", "value": "Same."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes, <image> is a mark."},
        ],
        "image": ["I", "J"],
    }
    expected = ["u: I", "u: Compare", "u: J", "u: with it.", "a: Same.", "u: Sure?", "a: Yes, <image> is a mark."]
    assert spans_of(vlm_conversation(row, choices())) == expected
    assert spans_of(vlm_conversation({"text": json.dumps(row)}, choices())) == expected
    with pytest.raises(ValueError, match="Video files are not read"):
        vlm_conversation({"video": "x.mp4", "conversations": []}, choices())


def released_entries(plan: SamplePlan) -> list[dict[str, Any]]:
    """A plan as the released datasets write it."""
    entries = []
    for item in plan.items:
        label = item.special_token_label
        entry = {"type": item.type, "enable_cfg": int(item.enable_cfg), "loss": int(item.loss)}
        entry |= {"special_token_loss": int(item.special_token_loss), "special_token_label": label}
        entries.append(entry)
    return entries


PLANS = {
    "edit": conversation("u: ...", "u: blue", "a: ..."),
    "vlm_multi_turn": conversation("u: ...", "u: what?", "a: a cat", "u: why?", "a: so"),
    "t2i": conversation("u: a cat", "a: ..."),
    "t2i_shift": conversation("u: a cat", "a: ..."),
    "interleave": conversation("u: ...", "u: blue", "a: ...", "u: red", "a: ..."),
}


@pytest.mark.parametrize(
    "case",
    [case for folder in ("pack", "train_forward") for case in cases(folder, lambda facts: facts["case"] in PLANS)],
)
def test_plans_are_those_of_the_released_datasets(case):
    facts = case.facts
    plan = ConversationPlanner(PROCESSOR, CONFIG, decisions=False).outline(PLANS[facts["case"]]).plan
    assert released_entries(plan) == facts["samples"][0]["sequence_plan"]


@pytest.fixture
def released_files(tmp_path: Path) -> dict[str, Any]:
    """A few rows in each of the released formats, over several files and row groups."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    folders = {name: tmp_path / name for name in ("t2i", "editing", "images")}
    for folder in folders.values():
        folder.mkdir()
    for file in range(3):
        rows = [
            {"image": file_of(picture(seed=i)), "captions": json.dumps({"a": "c" * (5 * file + i + 1)})}
            for i in range(7)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folders["t2i"] / f"{file}.parquet", row_group_size=3)
        edits = [
            {
                "image_list": [file_of(picture(seed=i + step)) for step in range(3)],
                "instruction_list": [["e" * (i + 1)], ["f" * (file + 1), "g"]],
            }
            for i in range(4)
        ]
        pq.write_table(pa.Table.from_pylist(edits), folders["editing"] / f"{file}.parquet", row_group_size=2)
    lines = []
    for i in range(11):
        picture(seed=i).save(folders["images"] / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "v" * (i + 1)}]
        lines.append({"id": f"line{i}", "image": f"{i}.png" if i % 2 else [f"{i}.png"], "conversations": turns})
    lines.append({"id": "text", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]})
    lines.append({"id": "gone", "image": "gone.png", "conversations": lines[0]["conversations"]})
    text = "\n".join([*map(json.dumps, lines), "{broken"]) + "\n"
    (tmp_path / "vlm.jsonl").write_text(text, encoding="utf-8")
    return {
        "t2i": folders["t2i"],
        "editing": folders["editing"],
        "vlm": tmp_path / "vlm.jsonl",
        "images": folders["images"],
    }


def released_sources(files: dict[str, Any], **settings) -> list[DataSource]:
    return [
        t2i_parquet(files["t2i"], **settings),
        editing_parquet(str(files["editing"] / "*.parquet"), **settings),
        vlm_jsonl([files["vlm"]], files["images"], **settings),
    ]


@pytest.mark.parametrize("window", [1, 4, 256])
def test_released_files_are_streamed_once_each(released_files, window: int):
    data = dataset(released_sources(released_files, shuffle_window=window), report=True)
    packs = list(data)
    counted = Counter(name.split(":")[0] for made in packs for name in ids(made))
    assert counted == {"t2i": 21, "editing": 12, "vlm": 12}
    assert len({name for made in packs for name in ids(made)}) == 45
    skipped = dict(entry for made in packs for entry in made["report"]["skipped"])
    assert len(skipped) == 2
    assert "FileNotFoundError: no such picture file" in skipped["vlm:gone"]
    assert any("JSONDecodeError" in reason for reason in skipped.values())


def test_every_row_of_a_stream_comes_once_whatever_the_ranks(released_files):
    """Captions are told apart by their lengths: 21 different ones, over 3 files."""

    def lengths(rank: int, world_size: int) -> list[int]:
        source = t2i_parquet(released_files["t2i"], shuffle_window=4)
        plan = dataset(source, rank=rank, world_size=world_size).plan()
        return [sample.num_tokens for planned in plan for sample in planned.samples]

    everything = sorted(lengths(0, 1))
    for world_size in (2, 3, 4):
        of_ranks = [lengths(rank, world_size) for rank in range(world_size)]
        assert sorted(length for of_rank in of_ranks for length in of_rank) == everything
        assert max(map(len, of_ranks)) - min(map(len, of_ranks)) <= 1


@pytest.mark.parametrize("window", [1, 5, 256])
def test_a_streamed_run_resumes_exactly(released_files, window: int):
    def make() -> PackedDataset:
        return dataset(released_sources(released_files, shuffle_window=window), report=True, epochs=2, look_ahead=5)

    packs = list(make())
    resumed_matches(make, packs, range(0, len(packs) + 1, 3))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_stateful_loader_resumes_streams_exactly(released_files):
    loaders = pytest.importorskip("torchdata.stateful_dataloader")

    def make() -> PackedDataset:
        return dataset(released_sources(released_files, shuffle_window=5), report=True)

    packs, running = list(make()), loaders.StatefulDataLoader(make(), batch_size=None, num_workers=2)
    stream = iter(running)
    assert all(same(next(stream), made) for made in packs[:3])
    fresh = loaders.StatefulDataLoader(make(), batch_size=None, num_workers=2)
    fresh.load_state_dict(running.state_dict())
    rest = list(fresh)
    assert len(rest) == len(packs) - 3 and all(map(same, rest, packs[3:]))


def test_a_dataset_of_streams_can_be_pickled_while_it_runs(released_files):
    data = dataset(released_sources(released_files))
    next(iter(data))
    assert all(map(same, pickle.loads(pickle.dumps(data)), data))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stream_gives_the_same_packs_for_any_number_of_workers(released_files, workers: int):
    expected = list(dataset(released_sources(released_files), report=True))
    loader = DataLoader(dataset(released_sources(released_files), report=True), batch_size=None, num_workers=workers)
    loaded = list(loader)
    assert len(loaded) == len(expected)
    assert all(map(same, loaded, expected))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("as_images", [False, True])
def test_datasets_of_conversations_are_rows(streaming: bool, as_images: bool, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refuse(*inputs, **options):
        raise AssertionError("decoded before it is packed")

    monkeypatch.setattr(datasets.Image, "decode_example", refuse)
    rows = mixed_rows(13)
    columns = {name: [row[name] for row in rows] for name in ("messages", "images", "id")}
    images = datasets.Image() if as_images else datasets.Value("binary")
    item = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    features = datasets.Features(
        {
            "messages": [{"role": datasets.Value("string"), "content": [item]}],
            "images": [images],
            "id": datasets.Value("string"),
        }
    )
    messages = [
        [
            {
                "role": message["role"],
                "content": [{"type": i["type"], "text": i.get("text")} for i in message["content"]],
            }
            for message in row
        ]
        for row in columns["messages"]
    ]
    data = datasets.Dataset.from_dict(columns | {"messages": messages}, features=features)
    data = data.to_iterable_dataset(num_shards=3) if streaming else data

    def make() -> PackedDataset:
        return dataset(DataSource("rows", data, shuffle_window=4), report=True, epochs=2)

    packs = list(make())
    counted = Counter(all_ids(packs))
    assert counted == Counter({f"rows:{row['id']}": 2 for row in rows})
    resumed_matches(make, packs, range(len(packs)))
    shares = [all_ids(dataset(DataSource("rows", data), report=True, rank=rank, world_size=2)) for rank in range(2)]
    assert Counter(shares[0] + shares[1]) == Counter(f"rows:{row['id']}" for row in rows)


def test_a_generator_can_be_streamed():
    datasets = pytest.importorskip("datasets")

    def rows(shards: list[int]):
        for shard in shards:
            for index in range(5):
                content = [{"type": "text", "text": "y" * (index + 1)}]
                yield {"messages": [{"role": "assistant", "content": content}], "id": f"{shard}-{index}"}

    stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1, 2]})

    def make() -> PackedDataset:
        return dataset(DataSource("rows", stream, shuffle_window=4), report=True, max_num_tokens=20, look_ahead=3)

    packs = list(make())
    assert Counter(all_ids(packs)) == Counter(f"rows:{s}-{i}" for s in range(3) for i in range(5))
    resumed_matches(make, packs, range(len(packs)))


# --------------------------------------------------------------------------------------------------------------------
# Fill


def test_packs_of_a_mixed_set_are_97_percent_full():
    rows = mixed_rows(200)
    planned = list(dataset(rows, max_num_tokens=600, look_ahead=64).plan())
    fill = [one.num_tokens / 600 for one in planned[:-1]]
    assert np.mean(fill) >= 0.97
    assert min(fill) >= 0.9


def test_no_sample_waits_for_more_packs_than_twice_the_look_ahead():
    plan, waited = dataset(mixed_rows(200), max_num_tokens=400, look_ahead=6).plan(), Counter()
    for planned in plan:
        assert len(plan.waiting) < 2 * 6
        assert planned.samples[0].ordinal < min([sample.ordinal for sample in plan.waiting], default=1000)
        waited.update(sample.ordinal for sample in plan.waiting)
    assert max(waited.values()) <= 2 * 6


def test_a_short_pack_reads_on_for_a_sample_that_fits():
    """Fifty tokens fit beside a long sample; they come only after the look-ahead."""
    long, short = conversation("a: " + "x" * 198), conversation("a: " + "y" * 48)
    rows = [long] * 6 + [short] * 6
    planned = list(dataset(DataSource("rows", rows, shuffle=False), max_num_tokens=250, look_ahead=3).plan())
    assert planned[0].num_tokens == 200  # three further ones were not enough
    near = list(dataset(DataSource("rows", rows, shuffle=False), max_num_tokens=250, look_ahead=4).plan())
    assert near[0].num_tokens == 250


# --------------------------------------------------------------------------------------------------------------------
# The collator of conversations


def test_the_collator_packs_conversations():
    rows = mixed_rows(4)
    made = PROCESSOR.collator(rng=np.random.default_rng(0))(rows)
    assert len(made["sample_lens"]) == 4
    assert "report" not in made
    loader = DataLoader(rows, batch_size=2, collate_fn=PROCESSOR.collator())
    assert [len(batch["sample_lens"]) for batch in loader] == [2, 2]


def test_the_collator_skips_what_it_cannot_use_and_counts_it():
    rows = [*mixed_rows(1), {"messages": []}, conversation("a: " + "x" * 500, id="long")]
    collate = PROCESSOR.collator(max_num_tokens=400)
    assert len(collate(rows)["sample_lens"]) == 1
    assert collate.num_skipped == 2
    with pytest.raises(ValueError, match=r"None of 2 rows could be used.*row long: .*502 tokens do not fit"):
        collate(rows[1:])


def test_the_collator_reports_what_it_packed_and_left_out():
    rows = [conversation("a: x", id="good"), {"messages": [], "id": "bad"}]
    report = PROCESSOR.collator(report=True)(rows)["report"]
    assert report["sample_ids"] == ["row good"]
    assert [(name, reason.split(":")[0]) for name, reason in report["skipped"]] == [("row bad", "ValueError")]


def test_the_collator_keeps_the_token_budget():
    rows = [conversation("a: " + "x" * 98, id=str(number)) for number in range(5)]
    collate = PROCESSOR.collator(max_num_tokens=250)
    made = collate(rows)
    assert (made["sample_lens"], collate.num_skipped) == ([100, 100], 3)


def test_a_pickled_collator_gives_the_same_packs():
    rows, collate = mixed_rows(4), PROCESSOR.collator(rng=np.random.default_rng(5), vit_cond_dropout_prob=0.5)
    copied = pickle.loads(pickle.dumps(collate))
    assert same(copied(rows), collate(rows))


def test_a_processor_packs_what_planning_randomizing_and_packing_give():
    rows, facts = mixed_rows(6), {"text_cond_dropout_prob": 0.5, "vit_cond_dropout_prob": 0.5}
    config = replace(CONFIG, **facts)
    planner, keep_all = ConversationPlanner(PROCESSOR, config), np.random.default_rng(1)
    plans = []
    for row in rows:
        outline = planner.outline(row)
        loaded = planner.load(outline, randomize(outline.plan, CONFIG, keep_all))  # CONFIG drops nothing
        plans.append(SamplePlan(tuple(kept.item for kept in loaded.items)))
    expected = with_labels(pack_samples(plans, config, np.random.default_rng(7)))
    assert same(PROCESSOR.pack(rows, rng=np.random.default_rng(7), **facts), expected)
    without_dropout = with_labels(pack_samples(plans, CONFIG, np.random.default_rng(7)))
    assert same(PROCESSOR.pack(rows, rng=np.random.default_rng(7)), without_dropout)
    assert not same(without_dropout, expected)


def test_randomness_of_a_pack_follows_torch_unless_it_is_given():
    rows, packs = [conversation("u: a cat", "a: ...")], []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        packs.append(PROCESSOR.pack(rows))
    assert same(packs[0], packs[1]) and not same(packs[0], packs[2])


def test_a_pack_refuses_a_row_that_it_cannot_use_unless_told_to_skip():
    rows = [conversation("a: x"), {"messages": []}]
    with pytest.raises(ValueError, match=r"row 1 of the batch cannot be packed.*has no messages"):
        PROCESSOR.pack(rows)
    assert same(PROCESSOR.pack(rows, skip=True), PROCESSOR.pack(rows[:1]))
    assert same(PROCESSOR.pack(rows[0]), PROCESSOR.pack(rows[:1]))
    with pytest.raises(ValueError, match="its 3 tokens do not fit max_num_tokens=5 beside 3"):
        PROCESSOR.pack([rows[0], rows[0]], max_num_tokens=5)


def test_options_of_a_pack_reach_planning_and_packing():
    row = conversation("u: go", "a: first", "a: ...")
    assert sum(PROCESSOR.pack([row], pad_to=300)["split_lens"]) == 300
    assert len(PROCESSOR.pack([row], nested_masks=True)["nested_attention_masks"]) == 1
    assert PROCESSOR.pack([row], decisions=False)["sequence_length"] < PROCESSOR.pack([row])["sequence_length"]
    with pytest.raises(ValueError, match="max_latent_size=1 per side"):
        PROCESSOR.pack([row], max_latent_size=1)
    with pytest.raises(TypeError, match=r"no option max_latent_sise \(did you mean max_latent_size\?\)"):
        PROCESSOR.collator(max_latent_sise=3)
    with pytest.raises(TypeError, match="no option max_tokens"):
        dataset([row], max_tokens=3)


# --------------------------------------------------------------------------------------------------------------------
# Bad input


BAD_ROWS = {
    "missing file": (conversation("u: ...", "a: x") | {"images": ["/no/such/picture.png"]}, "no such picture file"),
    "broken picture": (conversation("u: ...", "a: x") | {"images": [b"nothing"]}, "not a picture"),
    "truncated picture": (
        conversation("u: ...", "a: x") | {"images": [file_of(picture(200, 200))[:5000]]},
        "truncated or damaged",
    ),
    "no assistant": (conversation("u: ...", "u: what?"), "nothing to learn: no message of the assistant"),
    "an assistant without words": (conversation("u: hi", "a: "), "nothing to learn"),
    "no messages": ({"messages": [], "images": []}, "has no messages"),
    "messages missing": ({"text": "hi"}, "has no messages"),
    "unknown content": (
        {"messages": [{"role": "assistant", "content": [{"type": "audio"}]}]},
        "Unknown content type 'audio'",
    ),
    "content is no list": ({"messages": [{"role": "assistant", "content": 7}]}, "is a string or a list of items"),
    "text missing": (
        {"messages": [{"role": "assistant", "content": [{"type": "text", "text": None}]}]},
        "its string under 'text'",
    ),
    "unknown role": ({"messages": [{"role": "bot", "content": "hi"}]}, "Unknown role 'bot'"),
    "too few images": (conversation("u: ...", "a: x") | {"images": []}, "more placeholders than its 0 images"),
    "too many images": (conversation("a: x") | {"images": [picture()]}, "1 images, but placeholders for only 0"),
    "a placeholder in a text": (conversation("a: see <|image_pad|>"), r"holds <\|image_pad\|>"),
    "an open clip": (
        {"messages": [clip("user", 2), {"role": "assistant", "content": "x"}], "images": [picture()]},
        "last frame must have no frame_delta",
    ),
    "an interrupted clip": (
        {
            "messages": [
                {"role": "assistant", "content": [{"type": "image", "frame_delta": 2}, {"type": "text", "text": "x"}]}
            ],
            "images": [picture()],
        },
        "last frame must have no frame_delta",
    ),
    "too long": (conversation("a: " + "x" * 400), "402 tokens, more than max_num_tokens_per_sample=300"),
    "too large": (
        conversation("u: b", "a: ...") | {"images": [picture(300, 40)]},
        "tokens, but the position table ends at max_latent_size=4",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_skipped_with_its_id_and_the_reason(name: str, monkeypatch):
    row, reason = BAD_ROWS[name]
    rows = [conversation("a: first"), dict(row, id="bad"), conversation("a: last")]
    messages = []
    monkeypatch.setattr("bagel.training.packed.logger.warning", messages.append)
    facts = {"max_latent_size": 4} if name == "too large" else {}
    packs = list(dataset(rows, report=True, **facts))
    assert sorted(all_ids(packs)) == ["rows:0", "rows:2"]
    ((skipped, why),) = [entry for made in packs for entry in made["report"]["skipped"]]
    assert skipped == "rows:bad"
    assert len(messages) == 1
    assert "skipped sample rows:bad: " in messages[0] and "(1 skipped so far)" in messages[0]
    assert re.search(reason, why), why


def test_a_pack_of_which_nothing_is_left_is_reported_with_the_next():
    """What is wrong with a truncated picture is found out when it is decoded, after its pack was planned."""
    whole, truncated = file_of(picture(70, 70)), file_of(picture(70, 70))[:4000]
    rows = [conversation("u: ...", "a: " + "x" * 40, id=str(n)) for n in range(5)]
    rows = [row | {"images": [truncated if row["id"] in "12" else whole]} for row in rows]
    packs = list(dataset(DataSource("rows", rows, shuffle=False), max_num_tokens=80, report=True))
    assert [ids(made) for made in packs] == [["rows:0"], ["rows:3"], ["rows:4"]]
    assert [[name for name, _ in made["report"]["skipped"]] for made in packs] == [[], ["rows:1", "rows:2"], []]


def test_a_sample_that_loses_all_its_items_is_skipped():
    """A text that is only a condition can be dropped; nothing is left of a sample that is nothing else."""
    plan = SamplePlan(
        tuple(ConversationPlanner(PROCESSOR, CONFIG).outline(conversation("u: cat", "a: ...")).plan.items[:1])
    )
    dropping = replace(CONFIG, text_cond_dropout_prob=1.0)
    with pytest.raises(ValueError, match="no tokens: all of its items were dropped"):
        randomize(plan, dropping, np.random.default_rng(0))


@pytest.mark.parametrize("epochs", [1, None])
def test_data_of_which_nothing_can_be_used_is_an_error_and_no_endless_loop(epochs: int | None):
    rows = [{"messages": [], "id": str(index)} for index in range(5)]
    with pytest.raises(ValueError, match=r"rows:.*has no messages"):
        list(dataset(rows, epochs=epochs))


def test_a_rank_without_rows_is_told():
    with pytest.raises(ValueError, match="rows: no rows for rank 3 of 4"):
        list(dataset(mixed_rows(2), rank=3, world_size=4))


@pytest.mark.parametrize("epochs", [1, None])
def test_a_source_without_rows_for_a_rank_is_left_out(epochs: int | None):
    sources = [DataSource("few", mixed_rows(2, seed=1)), DataSource("many", mixed_rows(40, seed=2))]

    def make() -> PackedDataset:
        return dataset(sources, report=True, rank=3, world_size=4, epochs=epochs, look_ahead=1)

    data = make()
    stream = iter(data)
    assert all(name.startswith("many:") for _ in range(2) for name in ids(next(stream)))
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(data.state_dict())))
    assert same(next(iter(resumed)), next(stream))


def test_sources_that_cannot_be_resumed_are_refused():
    with pytest.raises(TypeError, match="rows of type generator, which cannot be resumed"):
        list(dataset(DataSource("rows", (row for row in mixed_rows(2)))))


def test_missing_data_files_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"No such data files: .*nothing"):
        t2i_parquet(tmp_path / "nothing.parquet")
    with pytest.raises(FileNotFoundError, match=r"No such data files: .*\*\.parquet"):
        editing_parquet(tmp_path)


def test_settings_that_contradict_each_other_are_refused():
    rows = mixed_rows(2)
    with pytest.raises(ValueError, match="expected_num_tokens=500 must be positive and at most max_num_tokens=300"):
        dataset(rows, expected_num_tokens=500)
    with pytest.raises(ValueError, match="max_num_tokens_per_sample=0"):
        dataset(rows, max_num_tokens_per_sample=0)
    with pytest.raises(ValueError, match="look_ahead=0"):
        dataset(rows, look_ahead=0)
    with pytest.raises(ValueError, match="weight 0"):
        DataSource("rows", rows, weight=0)
    with pytest.raises(ValueError, match="shuffle_window=0"):
        DataSource("rows", rows, shuffle_window=0)
    with pytest.raises(ValueError, match=r"names that differ.*\['a', 'a'\]"):
        dataset([DataSource("a", rows), DataSource("a", rows)])
    with pytest.raises(ValueError, match="epochs=0"):
        dataset(rows, epochs=0)
    with pytest.raises(ValueError, match="seed=-1"):
        dataset(rows, seed=-1)
    assert Budget(900) == Budget(900, 800, 900, 64)


def test_a_processor_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"bos_token_id is .*, the packing config says 151644"):
        ConversationPlanner(PROCESSOR, PackingConfig())
    with pytest.raises(ValueError, match="patch_size is 7, the packing config says 14"):
        ConversationPlanner(make_processor(patch_size=7), CONFIG)
