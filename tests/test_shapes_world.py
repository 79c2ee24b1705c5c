# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The shapes world: its judge reads back every picture it can draw, and training rows never show held-out triples."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from bagel.shapes.world import (
    COLOURS,
    FARTHEST,
    GROUNDS,
    JITTER,
    PLACES,
    SHAPES,
    SHARES,
    SIZES,
    Inventor,
    Scene,
    Thing,
    TrainingRows,
    all_sentences,
    describe,
    held_out_tasks,
    is_held_out,
    judge,
    psnr_outside,
    related,
    render,
    strange_colours,
)


pytestmark = pytest.mark.core


@pytest.mark.parametrize("ground", GROUNDS)
def test_judge_reads_every_thing_in_every_colour_and_size(ground):
    places = itertools.cycle(PLACES)
    for shape, colour, size in itertools.product(SHAPES, COLOURS, SIZES):
        scene = Scene(ground, (Thing(shape, colour, next(places), size),))
        assert judge(render(scene)) == scene


def test_judge_reads_two_things_that_stand_as_close_as_can_be():
    for first, other in itertools.permutations(SHAPES, 2):
        near = (
            Thing(first, "red", "left", "large", (0, JITTER)),
            Thing(other, "orange", "center", "large", (0, -JITTER)),
        )
        scene = Scene("grey", near)
        assert judge(render(scene)) == scene


def test_judge_reads_all_pictures_of_tasks():
    inventor = Inventor(np.random.default_rng(0))
    for kind in SHARES:
        for task in [inventor.task(kind) for _ in range(40)] + held_out_tasks(kind, 40):
            for scene in (task.start, task.result):
                assert scene is None or judge(render(scene)) == scene


@pytest.mark.parametrize("ground", GROUNDS)
def test_strange_colours_are_far_from_all_that_have_names_and_from_the_ground(ground):
    rng = np.random.default_rng(0)
    for _ in range(20):
        colours = strange_colours(rng, ground)
        named = np.array([*COLOURS.values(), GROUNDS[ground]])
        assert list(colours) == list(COLOURS)
        assert all(np.linalg.norm(named - colour, axis=1).min() > FARTHEST for colour in colours.values())


@pytest.mark.parametrize("ground", GROUNDS)
def test_things_in_strange_colours_are_where_they_were(ground):
    scene = Scene(ground, (Thing("star", "red", "left"), Thing("cross", "blue", "bottom right", "small")))
    plain = np.asarray(render(scene))
    strange = np.asarray(render(scene, {"red": (0, 0, 255), "blue": (0, 0, 0)}))
    empty = np.asarray(render(Scene(ground, ())))
    assert ((plain != empty).any(-1) == (strange != empty).any(-1)).mean() > 0.99


def test_judge_reads_pictures_that_are_a_little_soft_and_noisy():
    rng, inventor = np.random.default_rng(0), Inventor(np.random.default_rng(1))
    scenes = [inventor.scene(False)[0] for _ in range(60)]
    right = 0
    for scene in scenes:
        pixels = np.asarray(render(scene).filter(ImageFilter.GaussianBlur(0.4)), float)
        noisy = Image.fromarray(np.clip(pixels + rng.normal(0, 5, pixels.shape), 0, 255).astype(np.uint8))
        right += judge(noisy).triples == scene.triples
    assert right >= 58


@pytest.mark.parametrize(
    "change", [{"colour": "blue"}, {"shape": "square"}, {"place": "right"}], ids=["colour", "shape", "place"]
)
def test_judge_tells_what_is_wrong(change):
    thing = Thing("circle", "red", "top")
    seen = judge(render(Scene("white", (replace(thing, **change),))))
    assert seen.triples == (replace(thing, **change).triple,) != (thing.triple,)


def test_something_that_is_no_shape_is_unknown():
    pixels = np.array(render(Scene("white", ())))
    pixels[20:23, 5:60] = COLOURS["red"]
    assert [thing.shape for thing in judge(Image.fromarray(pixels)).things] == ["unknown"]


def test_many_specks_are_something_unknown():
    pixels = np.array(render(Scene("black", ())))
    assert not judge(Image.fromarray(pixels)).things
    pixels[8:56:8, 8:56:8] = COLOURS["green"]
    assert [thing.shape for thing in judge(Image.fromarray(pixels)).things] == ["unknown"]


def test_thing_between_two_places_is_unknown():
    right = np.asarray(render(Scene("white", (Thing("square", "red", "center"),))))
    assert judge(Image.fromarray(np.roll(right, 4, 1))).things[0].shape == "square"
    assert judge(Image.fromarray(np.roll(right, 9, 1))).things[0].shape == "unknown"


def test_picture_of_another_size_is_refused():
    with pytest.raises(ValueError, match="64x64 pixels, this one 32x64"):
        judge(Image.new("RGB", (32, 64)))


def test_training_rows_never_show_what_is_held_out():
    for index in range(400):
        for image in TrainingRows(400, seed=3)[index]["images"]:
            assert not any(map(is_held_out, judge(image).triples)), index


def test_every_pair_of_what_a_triple_is_made_of_is_shown_in_training():
    shown = [triple for triple in itertools.product(COLOURS, SHAPES, PLACES) if not is_held_out(triple)]
    assert len(shown) == 240
    for first, second in itertools.combinations(range(3), 2):
        pairs = {(triple[first], triple[second]) for triple in shown}
        everything = {(t[first], t[second]) for t in itertools.product(COLOURS, SHAPES, PLACES)}
        assert pairs == everything


@pytest.mark.parametrize("kind", SHARES)
def test_every_held_out_task_is_about_a_held_out_triple(kind):
    tasks = held_out_tasks(kind, 60)
    assert tasks == held_out_tasks(kind, 60) and tasks != held_out_tasks(kind, 60, seed=1)
    for task in tasks:
        triples = [triple for scene in (task.start, task.result) if scene for triple in scene.triples]
        assert any(map(is_held_out, triples)), task


@pytest.mark.parametrize("kind", ["draw", "edit", "tell"])
def test_wish_is_granted_by_its_own_picture_and_by_no_other(kind):
    tasks = held_out_tasks(kind, 40)
    for task in tasks:
        assert task.wish.is_granted_fully(judge(render(task.result)))
        thing = task.result.things[0]
        colour = next(colour for colour in COLOURS if colour not in {one.colour for one in task.result.things})
        assert not task.wish.is_granted(task.result.swap(thing, replace(thing, colour=colour)))
        assert not task.wish.is_granted(task.result.swap(thing))


def test_relation_belongs_to_a_wish():
    left, right = Thing("circle", "red", "left"), Thing("square", "blue", "right")
    assert related(left, right) == "left of" and related(right, left) == "right of"
    assert related(Thing("star", "red", "top"), right) is None
    tasks = [task for task in held_out_tasks("draw", 200) if task.wish.relation == "left of"]
    for task in tasks:
        mirrored = [replace(thing, place=_mirrored(thing.place)) for thing in task.result.things]
        assert not task.wish._replace(told=(("shape",), ("shape",))).is_granted(Scene("white", tuple(mirrored)))
    assert tasks


def _mirrored(place: str) -> str:
    row, column = divmod(PLACES.index(place), 3)
    return PLACES[3 * row + 2 - column]


def test_edit_changes_nothing_but_what_it_says():
    for task in held_out_tasks("edit", 60):
        assert psnr_outside(render(task.result), render(task.start), task.changed) == 99.0
        assert render(task.result) != render(task.start)
    spoiled = Image.eval(render(task.result), lambda value: value // 2)
    assert psnr_outside(spoiled, render(task.start), task.changed) < 24


def test_what_is_made_from_words_is_in_the_middle_of_its_place_and_what_is_shown_is_not():
    def offsets(scene):
        return {thing.offset for thing in scene.things}

    inventor = Inventor(np.random.default_rng(3))
    made, shown, moved, kept = set(), set(), set(), True
    for _ in range(200):
        made |= offsets(inventor.draw().result) | offsets(inventor.tell().result)
        shown |= offsets(inventor.ask().start)
        edit = inventor.edit()
        for thing in edit.result.things:
            before = [one for one in edit.start.things if one.place == thing.place]
            if before:
                kept &= thing.offset == before[0].offset
            else:
                moved.add(thing.offset)
    steps = range(-JITTER, JITTER + 1)
    assert made == moved == {(0, 0)}
    assert shown == set(itertools.product(steps, steps))
    assert kept


def test_rows_are_conversations_that_follow_from_seed_and_index():
    rows = TrainingRows(50, seed=1)
    assert len(rows) == 50 and rows[7] == rows[7] != rows[8]
    assert rows[7] != TrainingRows(50, seed=2)[7]
    for row in rows:
        places = sum(item["type"] == "image" for message in row["messages"] for item in message["content"])
        assert places == len(row["images"]) and row["messages"][-1]["role"] == "assistant"
    with pytest.raises(IndexError):
        rows[50]


def test_questions_have_true_answers():
    scene = Scene("pink", (Thing("circle", "red", "top left", "small"), Thing("star", "blue", "bottom left")))
    assert describe(scene) == (
        "a small red circle at the top left and a large blue star at the bottom left on a pink ground"
    )
    for task in held_out_tasks("ask", 200):
        if task.prompt == "how many things are there?":
            assert task.answer == {1: "one", 2: "two"}[len(task.start.things)]
        if task.prompt.startswith("what is ") and task.answer == "nothing":
            assert not any(f"the {thing.place}?" in task.prompt for thing in task.start.things)
        if task.prompt == "describe the picture.":
            assert task.answer == describe(judge(render(task.start)))
    assert len(all_sentences(100)) > 100
