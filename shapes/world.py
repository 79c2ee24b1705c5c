# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The shapes world: scenes, their pictures, sentences about them, and a judge that reads scenes back from pixels.

A scene is a ground (the background colour) and one or two things, each with shape, colour, size and place (a cell of a
3x3 grid). The file knows nothing of models: rows for training are conversations in the usual column form.

Pictures are (64, 64) RGB. Some combinations of colour, shape and place are held out: no picture of `TrainingRows` shows
them, neither before nor after an edit. A model that gets them right combines what it learned from other combinations.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image


SIDE = 64
SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (220, 30, 35),
    "orange": (245, 140, 20),
    "yellow": (250, 225, 40),
    "green": (30, 160, 60),
    "blue": (35, 80, 220),
    "purple": (150, 45, 190),
}
GROUNDS = {"white": (245, 245, 245), "black": (20, 20, 20), "grey": (128, 128, 128), "pink": (250, 190, 205)}
SIZES = {"small": 14, "large": 18}  # pixels across
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
CENTRES = (11, 32, 53)
FARTHEST = 70  # RGB distance up to which the judge takes a colour for the nearest of COLOURS
JITTER = 1  # the most pixels between a thing and the centre of its place, down and right
# relation -> (rows down, columns right) from the first thing to the other
RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 0), "below": (-1, 0)}
NUMBERS = {1: "one", 2: "two"}
OPENING = "here it is"  # the text before an image in an interleaved answer
# Kinds of questions, and the relative frequency of each in training dialogues; single questions take all kinds equally.
QUESTIONS = {
    "colour": 2,
    "what": 4,
    "where": 2,
    "count": 1,
    "size": 4,
    "ground": 1,
    "describe": 6,
    "nothing": 1,
    "relation": 6,
}


# --------------------------------------------------------------------------------------------------------------------
# Scenes


@dataclass(frozen=True)
class Thing:
    """One object of a scene; `==` ignores `offset`, the (down, right) pixels from the centre of its place."""

    shape: str
    colour: str
    place: str
    size: str = "large"
    offset: tuple[int, int] = field(default=(0, 0), compare=False)

    @property
    def triple(self) -> tuple[str, str, str]:
        return self.colour, self.shape, self.place

    @property
    def cell(self) -> tuple[int, int]:
        """(row, column) of its place."""
        return divmod(PLACES.index(self.place), 3)

    def centred(self) -> "Thing":
        """The same thing without offset: sentences state no offset, so pictures made from a sentence have none."""
        return replace(self, offset=(0, 0))


@dataclass(frozen=True)
class Scene:
    """A ground and its things, in reading order of their places."""

    ground: str
    things: tuple[Thing, ...]

    def __post_init__(self):
        ordered = sorted(self.things, key=lambda thing: PLACES.index(thing.place))
        object.__setattr__(self, "things", tuple(ordered))

    @property
    def triples(self) -> tuple[tuple[str, str, str], ...]:
        """(colour, shape, place) of every thing: what the judge is asked for."""
        return tuple(thing.triple for thing in self.things)

    def swap(self, old: Thing, *new: Thing) -> "Scene":
        """The scene with `old` taken out and `new` put in."""
        return replace(self, things=tuple(thing for thing in self.things if thing is not old) + new)


def is_held_out(triple: tuple[str, str, str]) -> bool:
    """
    Whether training never shows a (colour, shape, place).

    One place of every colour and shape is held out: 30 of 270 triples, spread so that training still shows every
    colour with every shape, every colour at every place and every shape at every place.
    """
    colour, shape, place = triple
    return PLACES.index(place) == (2 * list(COLOURS).index(colour) + 4 * SHAPES.index(shape)) % 9


def related(first: Thing, other: Thing) -> str | None:
    """The relation of `first` to `other` if they are in one row or column of the grid, otherwise `None`."""
    rows, columns = (b - a for a, b in zip(first.cell, other.cell))
    if rows and columns:
        return None
    return next(name for name, (down, right) in RELATIONS.items() if rows * down + columns * right > 0)


# --------------------------------------------------------------------------------------------------------------------
# Pictures


def render(scene: Scene, colours: Mapping[str, Any] = COLOURS) -> Image.Image:
    """The picture of a scene, with soft edges; `colours` are (red, green, blue) in 0..255."""
    pixels = np.empty((SIDE, SIDE, 3), np.float32)
    pixels[:] = GROUNDS[scene.ground]
    for thing in scene.things:
        row, column = (CENTRES[number] + off for number, off in zip(thing.cell, thing.offset))
        alpha = stamp(thing.shape, SIZES[thing.size])
        half = len(alpha) // 2
        window = pixels[row - half : row + half, column - half : column + half]
        window += alpha[:, :, None] * (np.asarray(colours[thing.colour], np.float32) - window)
    return Image.fromarray(pixels.round().astype(np.uint8))


def strange_colours(rng: np.random.Generator, ground: str) -> dict[str, np.ndarray]:
    """A replacement for every colour, (3,) in 0..255: farther than `FARTHEST` from all of `COLOURS` and the ground."""
    known = np.array([*COLOURS.values(), GROUNDS[ground]])
    made = {}
    for name in COLOURS:
        made[name] = rng.uniform(0, 255, 3)
        while np.linalg.norm(known - made[name], axis=1).min() <= FARTHEST:
            made[name] = rng.uniform(0, 255, 3)
    return made


@cache
def stamp(shape: str, size: int, fine: int = 8) -> np.ndarray:
    """
    The share of each pixel that a shape covers, (20, 20) in [0, 1]; the shape's centre is between the middle pixels.

    Args:
        size: pixels across. fine: subpixels per pixel and side.
    """
    side = 20
    steps = (np.arange(side * fine) + 0.5) / fine - side / 2
    y, x = np.meshgrid(steps, steps, indexing="ij")
    return INSIDE[shape](x, y, size / 2).reshape(side, fine, side, fine).mean((1, 3)).astype(np.float32)


def _polygon(corners: Sequence[tuple[float, float]], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    inside = np.zeros(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]]):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside


def _star(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    angles = [-math.pi / 2 + number * math.pi / 5 for number in range(10)]
    lengths = itertools.cycle([1.1 * radius, 0.42 * radius])
    return _polygon([(length * math.cos(a), length * math.sin(a)) for a, length in zip(angles, lengths)], x, y)


INSIDE = {
    "circle": lambda x, y, r: x**2 + y**2 <= r**2,
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) <= 0.9 * r,
    "triangle": lambda x, y, r: _polygon([(0, -r), (r, 0.8 * r), (-r, 0.8 * r)], x, y),
    "star": _star,
    "cross": lambda x, y, r: (np.maximum(abs(x), abs(y)) <= r) & (np.minimum(abs(x), abs(y)) <= 0.34 * r),
}


# --------------------------------------------------------------------------------------------------------------------
# The judge


class Blob(NamedTuple):
    """A connected region that differs from the ground: its `mask` (64, 64), and the thing it shows, or "unknown"."""

    mask: np.ndarray
    thing: Thing


def judge(picture: Image.Image) -> Scene:
    """
    The scene that a picture shows, from its pixels alone.

    Pixels that differ from the ground form connected blobs. A blob's colour is the nearest of `COLOURS`, its place the
    one with the nearest centre, its shape and size those of the stamp with the largest intersection over union. If that
    is below 0.8, the centre more than 6 pixels off, or the colour farther than `FARTHEST`, its shape is "unknown" and
    matches nothing.

    Raises:
        ValueError: the picture has another size than the world's.
    """
    pixels = _pixels(picture)
    ground, _ = _nearest(_border(pixels), GROUNDS)
    return Scene(ground, tuple(blob.thing for blob in find_blobs(picture)))


def find_blobs(picture: Image.Image) -> list[Blob]:
    """
    The things of a picture with their pixels. Regions below 12 pixels are ignored, unless they have 24 or more
    together: then they count as one unknown thing.
    """
    pixels = _pixels(picture)
    palette = np.array([_border(pixels), *COLOURS.values()], np.float32)
    labels = np.linalg.norm(pixels[:, :, None] - palette, axis=-1).argmin(-1)
    blobs, specks = [], np.zeros((SIDE, SIDE), bool)
    for mask in _components(labels > 0):
        if mask.sum() < 12:
            specks |= mask
        else:
            blobs.append(Blob(mask, _recognise(pixels, mask, palette[0])))
    if specks.sum() >= 24:
        blobs.append(Blob(specks, Thing("unknown", "unknown", PLACES[4], "unknown")))
    return blobs


def _pixels(picture: Image.Image) -> np.ndarray:
    if picture.size != (SIDE, SIDE):
        raise ValueError(f"The world's pictures have {SIDE}x{SIDE} pixels, this one {picture.width}x{picture.height}.")
    return np.asarray(picture.convert("RGB"), np.float32)


def _border(pixels: np.ndarray) -> np.ndarray:
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return np.median(edges, axis=0)


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> tuple[str, float]:
    distances = {name: float(np.linalg.norm(colour - np.asarray(value, np.float32))) for name, value in palette.items()}
    name = min(distances, key=lambda name: distances[name])
    return name, distances[name]


def _components(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Connected parts (4 neighbours) of a mask."""
    left = mask.copy()
    while left.any():
        part = np.zeros_like(mask)
        part[np.unravel_index(left.argmax(), mask.shape)] = True
        size = 0
        while part.sum() > size:
            size = part.sum()
            grown = part.copy()
            grown[1:] |= part[:-1]
            grown[:-1] |= part[1:]
            grown[:, 1:] |= part[:, :-1]
            grown[:, :-1] |= part[:, 1:]
            part = grown & mask
        left &= ~part
        yield part


def _recognise(pixels: np.ndarray, mask: np.ndarray, ground: np.ndarray) -> Thing:
    strength = np.linalg.norm(pixels - ground, axis=-1)
    core = mask & (strength >= np.median(strength[mask]))
    own = np.median(pixels[core], axis=0)
    colour, distance = _nearest(own, COLOURS)
    mask = mask & (np.linalg.norm(pixels - own, axis=-1) < strength)
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return Thing("unknown", "unknown", PLACES[4], "unknown")
    centre = (rows.mean() + 0.5, columns.mean() + 0.5)
    row, column = (min(range(3), key=lambda number: abs(CENTRES[number] - value)) for value in centre)
    off = max(abs(CENTRES[row] - centre[0]), abs(CENTRES[column] - centre[1]))
    cover, shape, size = max(
        (_best_cover(mask, shape, SIZES[size], centre), shape, size) for shape in SHAPES for size in SIZES
    )
    known = distance < FARTHEST and off <= 6 and cover >= 0.8
    return Thing(shape if known else "unknown", colour, PLACES[3 * row + column], size)


def _best_cover(mask: np.ndarray, shape: str, size: int, centre: tuple[float, float]) -> float:
    """Largest intersection over union of a blob and a stamp that is moved by at most 2 pixels each way."""
    alpha = stamp(shape, size) >= 0.5
    half, padded = len(alpha) // 2, np.pad(mask, 22)
    best = 0.0
    for down, right in itertools.product(range(-2, 3), repeat=2):
        top, left = round(centre[0]) + down + 22 - half, round(centre[1]) + right + 22 - half
        window = padded[top : top + 2 * half, left : left + 2 * half]
        common = (window & alpha).sum()
        best = max(best, common / (mask.sum() + alpha.sum() - common))
    return float(best)


def psnr_outside(result: Image.Image, start: Image.Image, changed: Sequence[Thing], margin: int = 2) -> float:
    """
    How well an edit kept the rest: the peak signal-to-noise ratio in dB between `result` and `start`, 99 if equal.

    Args:
        changed: things before and after the edit; they and `JITTER + margin` pixels around them are left out.
    """
    keep = np.ones((SIDE, SIDE), bool)
    for thing in changed:
        row, column = (CENTRES[number] for number in thing.cell)
        reach = SIZES[thing.size] // 2 + 1 + JITTER + margin
        keep[max(row - reach, 0) : row + reach, max(column - reach, 0) : column + reach] = False
    error = ((_pixels(result) - _pixels(start)) ** 2)[keep].mean()
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


# --------------------------------------------------------------------------------------------------------------------
# Sentences and tasks


class Wish(NamedTuple):
    """
    What a drawing prompt or an edit asks for.

    Args:
        text: the prompt.
        things: all that the picture should show. told: for each of them, the fields that the text states.
        relation: of the first thing to the other, if the text states it. ground: if the text states it.
    """

    text: str
    things: tuple[Thing, ...]
    told: tuple[tuple[str, ...], ...]
    relation: str | None = None
    ground: str | None = None

    def is_granted(self, seen: Scene, fields: Sequence[str] = ("shape", "colour", "place")) -> bool:
        """Whether a scene has the right number of things, each right in the `fields` stated, and a stated relation."""
        if len(seen.things) != len(self.things):
            return False
        return any(self._matches(order, fields) for order in itertools.permutations(seen.things))

    def is_granted_fully(self, seen: Scene) -> bool:
        """Whether size and ground are right as well, where they are stated."""
        return self.ground in (None, seen.ground) and self.is_granted(seen, ("shape", "colour", "place", "size"))

    def _matches(self, seen: Sequence[Thing], fields: Sequence[str]) -> bool:
        pairs = zip(self.things, self.told, seen)
        if any(
            getattr(ours, name) != getattr(one, name) for ours, told, one in pairs for name in told if name in fields
        ):
            return False
        return self.relation is None or related(*seen) == self.relation


class Task(NamedTuple):
    """
    One thing to do: "draw" (prompt -> picture), "ask" (picture, prompt -> `answer`), "edit" (picture, prompt ->
    picture) or "tell" (prompt -> opening, picture, `answer`).

    Args:
        start: the scene of the picture that is given. wish: what the picture to make must show.
        result: a scene that does. changed: things that an edit changes, before and after it.
    """

    kind: str
    prompt: str
    start: Scene | None = None
    wish: Wish | None = None
    result: Scene | None = None
    answer: str | None = None
    changed: tuple[Thing, ...] = ()

    def row(self, name: str | None = None) -> dict[str, Any]:
        """The task as a row for training, a conversation with the id `name`."""
        return conversation([self], name)


def conversation(tasks: Sequence[Task], name: str | None = None) -> dict[str, Any]:
    """
    Tasks about one start as the turns of one conversation, a row for training; the picture is given once.

    In a task that makes a picture and a text, the answer begins with the text `OPENING`, because interleaved
    generation begins with a text.
    """
    messages, images = [], []
    for number, task in enumerate(tasks):
        asked = [{"type": "text", "text": task.prompt}]
        if task.start is not None and number == 0:
            asked.insert(0, {"type": "image"})
            images.append(render(task.start))
        made = [{"type": "image"}] if task.result is not None else []
        made = [{"type": "text", "text": OPENING}, *made] if made and task.answer is not None else made
        images += [render(task.result)] if task.result is not None else []
        made += [{"type": "text", "text": task.answer}] if task.answer is not None else []
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": made}]
    return {"messages": messages, "images": images, "id": name}


def _a(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _at(place: str) -> str:
    return "in the center" if place == "center" else f"at the {place}"


def _name(thing: Thing, told: Sequence[str] = ("size", "colour", "shape", "place")) -> str:
    """ "a small red circle at the top", with the fields `told` only."""
    words = _a(" ".join(getattr(thing, name) for name in ("size", "colour", "shape") if name in told))
    return f"{words} {_at(thing.place)}" if "place" in told else words


def describe(scene: Scene) -> str:
    """A scene in one sentence, complete but for offsets."""
    things = " and ".join(_name(thing) for thing in scene.things) or "nothing"
    return f"{things} on a {scene.ground} ground"


class Inventor:
    """
    Makes random scenes and tasks.

    Args:
        rng: the only source of randomness.
        held_out: whether the thing that a task is about is a held-out combination; all other things never are.
    """

    def __init__(self, rng: np.random.Generator, held_out: bool = False):
        self.rng, self.held_out = rng, held_out

    def task(self, kind: str) -> Task:
        """A task of a kind: "draw", "ask", "edit" or "tell"."""
        return {"draw": self.draw, "ask": self.ask, "edit": self.edit, "tell": self.tell}[kind]()

    def scene(self, held_out: bool, fewest: int = 1) -> tuple[Scene, Thing, Thing | None]:
        """
        A scene, the thing that a task is about (held out or not), and the other thing, if there is one.

        Args:
            fewest: the least number of things, 1 or 2.
        """
        first = self._thing(held_out)
        things = [first]
        if fewest > 1 or self._chance(0.5):
            things.append(self._thing(False, first))
        return Scene(self._pick(GROUNDS), tuple(things)), first, things[1] if len(things) > 1 else None

    def draw(self) -> Task:
        wish, scene = self._wish()
        return Task("draw", wish.text, wish=wish, result=scene)

    def tell(self) -> Task:
        wish, scene = self._wish()
        return Task("tell", f"{wish.text} and say what it shows", wish=wish, result=scene, answer=describe(scene))

    def ask(self) -> Task:
        return self._question(*self.scene(self.held_out))

    def dialogue(self) -> list[Task]:
        """Two to five questions about one picture, chosen with the weights of `QUESTIONS`."""
        scene, thing, other = self.scene(self.held_out)
        pairs = [(thing, other)] if other is None else [(thing, other), (other, thing)]
        chosen = (self._pick(pairs) for _ in range(self.rng.integers(2, 6)))
        return [self._question(scene, first, second, QUESTIONS) for first, second in chosen]

    def _question(self, scene: Scene, thing: Thing, other: Thing | None, weights: dict[str, int] | None = None) -> Task:
        weights = weights or dict.fromkeys(QUESTIONS, 1) | {"relation": 2}
        if other is None or not related(thing, other):
            weights = {kind: weight for kind, weight in weights.items() if kind != "relation"}
        kind = self._pick([kind for kind, weight in weights.items() for _ in range(weight)])
        question, answer = getattr(self, f"_ask_{kind}")(scene, thing, other)
        return Task("ask", question, start=scene, answer=answer)

    def edit(self) -> Task:
        kind = self._pick(("recolour", "reshape", "remove", "add", "move"))
        while True:
            made = getattr(self, f"_edit_{kind}")()
            if made is not None:
                return made

    # ---- drawing prompts

    def _wish(self) -> tuple[Wish, Scene]:
        scene, first, other = self.scene(self.held_out)
        told: list[tuple[str, ...]] = [("colour", "shape")]
        if self._chance(0.8):
            told[0] += ("size",)
        if self.held_out or self._chance(0.9):
            told[0] += ("place",)
        text, relation = _name(first, told[0]), None
        things: tuple[Thing, ...] = (first,)
        if other is not None:
            things = (first, other)
            relation = related(first, other) if self._chance(0.6) else None
            told.append(("colour", "shape", *(("size",) if self._chance(0.8) else ())))
            if relation is None:
                told[1] += ("place",)
            text = f"{text}{f', {relation}' if relation else ' and'} {_name(other, told[1])}"
        ground = scene.ground if self._chance(0.8) else None
        text = f"{text} on a {ground} ground" if ground else text
        text = self._pick(("draw {}", "{}", "a picture of {}", "please draw {}")).format(text)
        result = Scene(scene.ground, tuple(thing.centred() for thing in scene.things))
        return Wish(text, things, tuple(told), relation, ground), result

    # ---- questions

    def _ask_colour(self, scene: Scene, thing: Thing, other: Thing | None) -> tuple[str, str]:
        return f"what colour is the {thing.shape}?", thing.colour

    def _ask_what(self, scene: Scene, thing: Thing, other: Thing | None) -> tuple[str, str]:
        return f"what is {_at(thing.place)}?", _name(thing, ("colour", "shape"))

    def _ask_nothing(self, scene: Scene, thing: Thing, other: Thing | None) -> tuple[str, str]:
        place = self._pick([place for place in PLACES if place not in [one.place for one in scene.things]])
        return f"what is {_at(place)}?", "nothing"

    def _ask_where(self, scene: Scene, thing: Thing, other: Thing | None) -> tuple[str, str]:
        return f"where is the {self._pick((thing.shape, f'{thing.colour} {thing.shape}'))}?", _at(thing.place)

    def _ask_count(self, scene: Scene, thing: Thing, other: Thing | None) -> tuple[str, str]:
        return "how many things are there?", NUMBERS[len(scene.things)]

    def _ask_size(self, scene: Scene, thing: Thing, other: Thing | None) -> tuple[str, str]:
        return f"is the {thing.shape} small or large?", thing.size

    def _ask_ground(self, scene: Scene, thing: Thing, other: Thing | None) -> tuple[str, str]:
        return "what colour is the ground?", scene.ground

    def _ask_describe(self, scene: Scene, thing: Thing, other: Thing | None) -> tuple[str, str]:
        return "describe the picture.", describe(scene)

    def _ask_relation(self, scene: Scene, thing: Thing, other: Thing) -> tuple[str, str]:
        first, second = (thing, other) if self._chance(0.5) else (other, thing)
        holds = related(first, second)
        asked = holds if self._chance(0.5) else self._pick([name for name in RELATIONS if name != holds])
        return f"is the {first.shape} {asked} the {second.shape}?", "yes" if asked == holds else "no"

    # ---- edits: `None` if the edit made would show a held-out combination where it must not, or the other way round

    def _edit_recolour(self) -> Task | None:
        scene, thing, _ = self.scene(False)
        colour = self._pick([colour for colour in COLOURS if colour != thing.colour])
        text = self._pick(("make the {} {}", "paint the {} {}", "change the colour of the {} to {}"))
        return self._swap(text.format(thing.shape, colour), scene, thing, replace(thing, colour=colour))

    def _edit_reshape(self) -> Task | None:
        scene, thing, _ = self.scene(False)
        shape = self._pick([shape for shape in SHAPES if shape not in [one.shape for one in scene.things]])
        text = self._pick(("turn the {} into {}", "replace the {} with {}"))
        return self._swap(text.format(thing.shape, _a(shape)), scene, thing, replace(thing, shape=shape))

    def _edit_move(self) -> Task | None:
        scene, thing, _ = self.scene(False)
        place = self._pick([place for place in PLACES if place not in [one.place for one in scene.things]])
        text = self._pick(("move the {} to the {}", "put the {} to the {}"))
        return self._swap(text.format(thing.shape, place), scene, thing, replace(thing, place=place).centred())

    def _edit_remove(self) -> Task | None:
        scene, thing, _ = self.scene(self.held_out, fewest=2)
        text = self._pick(("remove the {}", "take the {} away", "delete the {}"))
        return self._finish(text.format(thing.shape), scene, scene.swap(thing), (thing,), ())

    def _edit_add(self) -> Task | None:
        scene, shifted, _ = self.scene(self.held_out, fewest=2)
        thing = shifted.centred()
        told = ("colour", "shape", "place", *(("size",) if self._chance(0.8) else ()))
        text = self._pick(("add {}", "put {}")).format(_name(thing, told))
        return self._finish(text, scene.swap(shifted), scene.swap(shifted, thing), (thing,), (thing, told))

    def _swap(self, text: str, scene: Scene, old: Thing, new: Thing) -> Task | None:
        if is_held_out(new.triple) != self.held_out:
            return None
        return self._finish(text, scene, scene.swap(old, new), (old, new), ())

    def _finish(self, text: str, start: Scene, result: Scene, changed: tuple, told_of: tuple) -> Task:
        """The task of an edit. Its wish is the whole result; `told_of` (thing, fields) limits what counts of one."""
        everything = ("shape", "colour", "place", "size")
        told = tuple(told_of[1] if told_of and one is told_of[0] else everything for one in result.things)
        return Task("edit", text, start, Wish(text, result.things, told, None, result.ground), result, None, changed)

    # ---- random choices

    def _thing(self, held_out: bool, other: Thing | None = None) -> Thing:
        """A random thing whose combination is held out or not, with another shape and place than `other`."""
        while True:
            down, right = (int(off) for off in self.rng.integers(-JITTER, JITTER + 1, 2))
            shape, colour, place, size = map(self._pick, (SHAPES, COLOURS, PLACES, SIZES))
            thing = Thing(shape, colour, place, size, (down, right))
            free = other is None or (thing.shape != other.shape and thing.place != other.place)
            if free and is_held_out(thing.triple) == held_out:
                return thing

    def _pick(self, choices: Iterable[Any]) -> Any:
        listed = list(choices)
        return listed[self.rng.integers(len(listed))]

    def _chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)


SHARES = {"draw": 0.4, "ask": 0.2, "edit": 0.35, "tell": 0.05}


class TrainingRows(Sequence):
    """
    Rows for training, without held-out combinations: a sequence whose rows are made when they are read. A row of kind
    "ask" holds several questions about one picture.

    Args:
        number: rows in one epoch. seed: each row follows from it and the row's index.
        shares: the probability of each kind of task.
    """

    def __init__(self, number: int = 1_000_000, seed: int = 0, shares: dict[str, float] | None = None):
        self.number, self.seed, self.shares = number, seed, shares or SHARES

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: Any) -> Any:
        """Row `index`, a conversation."""
        if not 0 <= index < self.number:
            raise IndexError(f"Row {index} of {self.number}.")
        rng = np.random.default_rng([self.seed, index])
        kinds, shares = zip(*self.shares.items())
        kind = kinds[rng.choice(len(kinds), p=np.array(shares) / sum(shares))]
        inventor = Inventor(rng)
        tasks = inventor.dialogue() if kind == "ask" else [inventor.task(kind)]
        return conversation(tasks, f"{kind}-{index}")


def held_out_tasks(kind: str, number: int = 500, seed: int = 0) -> list[Task]:
    """`number` tasks of a kind about held-out combinations; the same seed gives the same tasks."""
    inventor = Inventor(np.random.default_rng([seed, 1, *kind.encode()]), held_out=True)
    return [inventor.task(kind) for _ in range(number)]


def all_sentences(number: int = 3000, seed: int = 0) -> list[str]:
    """About `number` prompts and their answers, to train a tokenizer on."""
    inventor = Inventor(np.random.default_rng([seed, 2]))
    tasks = [inventor.task(kind) for kind in SHARES for _ in range(number // len(SHARES))]
    return [text for task in tasks for text in (task.prompt, task.answer) if text]
