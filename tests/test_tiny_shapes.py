# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The embedded trained model does what it is asked, judged from pixels; `make eval` measures how often."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor

from bagel import demo
from bagel.evaluation.shapes import answer, draw, prepare, share
from bagel.shapes import build as build_tiny_shapes
from bagel.shapes.world import (
    COLOURS,
    OPENING,
    PLACES,
    Scene,
    Task,
    Thing,
    Wish,
    describe,
    held_out_tasks,
    is_held_out,
    judge,
    psnr_outside,
    render,
)


FAST = {"num_timesteps": 25}
CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "tiny-shapes"


@pytest.fixture(scope="module")
def directory():
    return CHECKPOINT


@pytest.fixture(scope="module")
def shapes(directory):
    return AutoModel.from_pretrained(directory, trust_remote_code=True, dtype="float32").eval()


@pytest.fixture(scope="module")
def shapes_processor(directory):
    return AutoProcessor.from_pretrained(directory, trust_remote_code=True)


def drawing(text: str, *things: Thing) -> Task:
    wish = Wish(
        text, things, tuple(("shape", "colour", "place") if thing.place else ("shape", "colour") for thing in things)
    )
    return Task("draw", text, wish=wish)


@pytest.mark.core
def test_draw_a_red_circle_yields_a_red_circle(shapes, shapes_processor):
    tasks = [
        drawing("draw a red circle", Thing("circle", "red", "")),
        drawing("draw a blue star at the top left", Thing("star", "blue", "top left")),
        drawing(
            "draw a green square at the left and a yellow triangle at the right",
            Thing("square", "green", "left"),
            Thing("triangle", "yellow", "right"),
        ),
    ]
    for outcome in draw(shapes, shapes_processor, tasks, seed=0):
        assert outcome.right, f"{outcome.task.prompt!r} became {judge(outcome.made)}"


def test_make_the_circle_blue_makes_it_blue_and_keeps_the_rest(shapes, shapes_processor):
    circle, star = Thing("circle", "red", "left"), Thing("star", "green", "bottom right")
    start = Scene("white", (circle, star))
    edited = demo.draw(shapes, shapes_processor, "make the circle blue", render(start), seed=0, progress_bar=False)
    assert judge(edited).triples == (("blue", "circle", "left"), star.triple)
    assert psnr_outside(edited, render(start), (circle,)) >= 24


@pytest.mark.parametrize(("kind", "at_least"), [("draw", 0.9), ("edit", 0.85)])
def test_most_pictures_of_combinations_never_seen_are_right(shapes, shapes_processor, kind, at_least):
    """A guard against regressions; the numbers that count are those of `make eval`."""
    outcomes = draw(shapes, shapes_processor, held_out_tasks(kind, 32, seed=5), seed=0, **FAST)
    assert share(outcomes) >= at_least


def test_most_answers_about_combinations_never_seen_are_exact(shapes, shapes_processor):
    assert share(answer(shapes, shapes_processor, held_out_tasks("ask", 48, seed=5), seed=0)) >= 0.9


def test_a_batch_draws_what_single_prompts_draw(shapes, shapes_processor):
    tasks = held_out_tasks("draw", 3, seed=6)
    together = draw(shapes, shapes_processor, tasks, seed=0, **FAST)
    for number, task in enumerate(tasks):
        alone = draw(shapes, shapes_processor, [task], seed=number, **FAST)[0]
        difference = [abs(a - b) for a, b in zip(alone.made.tobytes(), together[number].made.tobytes())]
        assert max(difference) <= 2


def test_it_decides_to_draw_and_then_says_what_it_drew(shapes, shapes_processor):
    task = Task("tell", "draw a red circle at the left and say what it shows")
    inputs = prepare(shapes_processor, [task], "interleaved")
    made = shapes.generate(
        **inputs,
        generation_mode="interleaved",
        processor=shapes_processor,
        generator=torch.Generator().manual_seed(0),
        max_new_tokens=40,
        do_sample=False,
        progress_bar=False,
    )[0]
    assert [type(item).__name__ for item in made] == ["str", "Image", "str"]
    assert judge(made[1]).triples == (("red", "circle", "left"),)
    assert made[::2] == [OPENING, describe(judge(made[1]))]


def test_the_vision_tower_is_taught_what_stands_where_and_nothing_else_changes(directory):
    model = AutoModel.from_pretrained(directory, trust_remote_code=True, dtype="float32")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    right = build_tiny_shapes.train_tower(model, steps=2, batch_size=4)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    tower = {name for name, _ in model.named_parameters() if name.startswith("vit_model.")}
    assert 0 <= right < 0.5 and changed == tower


def test_what_comes_before_training_shows_no_held_out_combination():
    shown = build_tiny_shapes.scenes(np.random.default_rng(0), 500)
    assert not any(is_held_out(triple) for scene in shown for triple in scene.triples)
    assert {len(scene.things) for scene in shown} == {0, 1, 2}


def test_places_are_named_by_what_stands_there():
    scene = Scene("white", (Thing("star", "green", "bottom right", "small"), Thing("circle", "red", "top")))
    names = build_tiny_shapes.place_names([Scene("black", ()), scene])
    kinds, colours = ["nothing", *build_tiny_shapes.KINDS], ["nothing", *COLOURS]
    seen = {
        (picture, PLACES[place], kinds[names[picture, place, 0]], colours[names[picture, place, 1]])
        for picture, place in names.any(-1).nonzero().tolist()
    }
    assert seen == {(1, "top", ("circle", "large"), "red"), (1, "bottom right", ("star", "small"), "green")}


def test_prompts_are_those_of_the_training_rows(shapes_processor):
    task = held_out_tasks("edit", 1)[0]
    inputs = prepare(shapes_processor, [task], "image")
    assert inputs["latent_pixel_values"].shape[-2:] == (64, 64)
    assert inputs["image_grid_hw"].tolist() == [[4, 4]]
    assert task.prompt in shapes_processor.decode(inputs["input_ids"][0])


def test_checkpoint_is_small_enough_for_git(directory):
    files = [file for file in directory.iterdir() if not file.is_symlink()]
    assert sum(file.stat().st_size for file in files) <= 20e6


def test_numbers_of_the_readme_are_those_that_were_measured(repo):
    record = json.loads((CHECKPOINT / "evaluation.json").read_text())
    stated = re.search(r"<!-- shapes table -->\n(.*?)\n<!-- end", (repo / "README.md").read_text(), flags=re.S)[1]
    for name, row in record["results"].items():
        line = next(line for line in stated.splitlines() if line.startswith(f"| {name} |"))
        assert f"| {row['right']:.1%} |" in line and row["number"] == 500
