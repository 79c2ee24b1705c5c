# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A small picture world: scenes, their pictures, sentences about them, and a judge that reads scenes back from pixels.

A scene is a ground and one or two things, each with shape, colour, size and place (a cell of a 3x3 grid). It knows
nothing of models: rows for training are conversations in the usual column form.

Pictures are (64, 64) RGB. Some combinations of colour, shape and place are held out: no picture of `TrainingRows` shows
them, neither as a start nor as the result of an edit, so what a model does with them it has composed.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
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
FARTHEST = 70  # how far, in RGB, the judge still takes a colour for one of those above
JITTER = 1  # pixels that a thing may stand off the centre of its place, down and right
RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 0), "below": (-1, 0)}
NUMBERS = {1: "one", 2: "two"}
OPENING = "here it is"
# kinds of questions, and how often dialogues for training ask them; single questions are of all kinds alike
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
    """One object of a scene; `offset` (down, right) in pixels from the centre of its place is no part of equality."""

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
        """In the middle of its place. Sentences tell no offsets, so what is made from them has none."""
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
    """One place of every colour and shape: 30 of 270 triples, spread so that every pair of two is still shown often."""
    colour, shape, place = triple
    return PLACES.index(place) == (2 * list(COLOURS).index(colour) + 4 * SHAPES.index(shape)) % 9


def related(first: Thing, other: Thing) -> str | None:
    """How `first` stands to `other`, for things of one row or column."""
    rows, columns = (b - a for a, b in zip(first.cell, other.cell))
    if rows and columns:
        return None
    return next(name for name, (down, right) in RELATIONS.items() if rows * down + columns * right > 0)


# --------------------------------------------------------------------------------------------------------------------
# Pictures


def render(scene: Scene, colours: Mapping[str, Sequence[float]] = COLOURS) -> Image.Image:
    """The picture of a scene, with soft edges; `colours` are (red, green, blue) in 0..255."""
    pixels = np.empty((SIDE, SIDE, 3), np.float32)
    pixels[:] = GROUNDS[scene.ground]
    for thing in scene.things:
        row, column = (CENTRES[number] + off for number, off in zip(thing.cell, thing.offset))
        alpha = stamp(thing.shape, SIZES[thing.size])
        half = len(alpha) // 2
        window = pixels[row - half : row + half, column - half : column + half]
        window += alpha[:, :, None] * (np.float32(colours[thing.colour]) - window)
    return Image.fromarray(pixels.round().astype(np.uint8))


def strange_colours(draws: np.random.Generator, ground: str) -> dict[str, np.ndarray]:
    """For every colour another one, which the judge would not name and which stands out from the ground."""
    known = np.array([*COLOURS.values(), GROUNDS[ground]])
    made = {}
    for name in COLOURS:
        made[name] = draws.uniform(0, 255, 3)
        while np.linalg.norm(known - made[name], axis=1).min() <= FARTHEST:
            made[name] = draws.uniform(0, 255, 3)
    return made


@cache
def stamp(shape: str, size: int, fine: int = 8) -> np.ndarray:
    """Cover of each pixel by a shape, in [0, 1]: (20, 20), centred between the pixels in the middle."""
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
    """Something that stands out from the ground: `mask` (64, 64), and what it is, or "unknown"."""

    mask: np.ndarray
    thing: Thing


def judge(picture: Image.Image) -> Scene:
    """
    The scene that a picture shows, from its pixels alone.

    What stands out from the ground is cut into connected blobs. A blob's colour is the nearest of the palette, its
    place the nearest centre, its shape and size those of the stamp that covers it best. Whatever is not clearly
    one of them (cover below 0.8, more than 6 pixels off every centre, far from every colour) is "unknown" and matches
    nothing.

    Raises:
        ValueError: the picture has another size than the world's.
    """
    pixels = _pixels(picture)
    ground, _ = _nearest(_border(pixels), GROUNDS)
    return Scene(ground, tuple(blob.thing for blob in find_blobs(picture)))


def find_blobs(picture: Image.Image) -> list[Blob]:
    """The things of a picture with their pixels. Specks below 12 pixels count as one unknown thing from 24 on."""
    pixels = _pixels(picture)
    palette = np.float32([_border(pixels), *COLOURS.values()])
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
    distances = {name: float(np.linalg.norm(colour - np.float32(value))) for name, value in palette.items()}
    name = min(distances, key=distances.get)
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
    """Intersection over union with the stamp, at the best of the places around the centre of mass."""
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
    How well an edit kept the rest, in dB: peak signal-to-noise ratio to `start` over all pixels that lie more than
    `JITTER + margin` pixels outside the `changed` things (as they were, and as they should be).
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
        things: all that the picture should show. told: for each of them, the fields that the text says.
        relation: of the first thing to the other, if the text says one. ground: if the text says one.
    """

    text: str
    things: tuple[Thing, ...]
    told: tuple[tuple[str, ...], ...]
    relation: str | None = None
    ground: str | None = None

    def is_granted(self, seen: Scene, fields: Sequence[str] = ("shape", "colour", "place")) -> bool:
        """Right number of things, each right in what was told of `fields`, and the relation, if one was told."""
        if len(seen.things) != len(self.things):
            return False
        return any(self._matches(order, fields) for order in itertools.permutations(seen.things))

    def is_granted_fully(self, seen: Scene) -> bool:
        """Also in size and ground, where they were told."""
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
        start: the scene of the picture that is given. wish: of the picture to make. result: a scene that grants it.
    """

    kind: str
    prompt: str
    start: Scene | None = None
    wish: Wish | None = None
    result: Scene | None = None
    answer: str | None = None
    changed: tuple[Thing, ...] = ()

    def row(self, name: str | None = None) -> dict[str, Any]:
        """As a conversation."""
        return conversation([self], name)


def conversation(tasks: Sequence[Task], name: str | None = None) -> dict[str, Any]:
    """
    Tasks about one start, one after the other, as a row for training; the start is shown once. Who draws and tells
    begins with words, as interleaved generation does.
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
    """ "a small red circle at the top", or less of it."""
    words = _a(" ".join(getattr(thing, name) for name in ("size", "colour", "shape") if name in told))
    return f"{words} {_at(thing.place)}" if "place" in told else words


def describe(scene: Scene) -> str:
    """All of a scene in one sentence."""
    things = " and ".join(_name(thing) for thing in scene.things) or "nothing"
    return f"{things} on a {scene.ground} ground"


class Inventor:
    """
    Makes up scenes and tasks.

    Args:
        draws: all of its randomness.
        held_out: in every task one thing, the one it is about, is of a held-out combination. Otherwise none is.
    """

    def __init__(self, draws: np.random.Generator, held_out: bool = False):
        self.draws, self.held_out = draws, held_out

    def task(self, kind: str) -> Task:
        """A task of a kind: "draw", "ask", "edit" or "tell"."""
        return {"draw": self.draw, "ask": self.ask, "edit": self.edit, "tell": self.tell}[kind]()

    def scene(self, held_out: bool, fewest: int = 1) -> tuple[Scene, Thing, Thing | None]:
        """A scene, the thing that a task is about (held out or not), and the other one, if there is one."""
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
        """Two to five questions about one picture, more of those that ask for much of it."""
        scene, thing, other = self.scene(self.held_out)
        things = [(thing, other)] if other is None else [(thing, other), (other, thing)]
        return [self._question(scene, *self._pick(things), QUESTIONS) for _ in range(self.draws.integers(2, 6))]

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
        told = [("colour", "shape")]
        if self._chance(0.8):
            told[0] += ("size",)
        if self.held_out or self._chance(0.9):
            told[0] += ("place",)
        text, relation, things = _name(first, told[0]), None, (first,)
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
        drawn = Scene(scene.ground, tuple(thing.centred() for thing in scene.things))
        return Wish(text, things, tuple(told), relation, ground), drawn

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

    # ---- edits: `None` where the world has no such edit of this scene

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
        scene, drawn, _ = self.scene(self.held_out, fewest=2)
        thing = drawn.centred()
        told = ("colour", "shape", "place", *(("size",) if self._chance(0.8) else ()))
        text = self._pick(("add {}", "put {}")).format(_name(thing, told))
        return self._finish(text, scene.swap(drawn), scene.swap(drawn, thing), (thing,), (thing, told))

    def _swap(self, text: str, scene: Scene, old: Thing, new: Thing) -> Task | None:
        if is_held_out(new.triple) != self.held_out:
            return None
        return self._finish(text, scene, scene.swap(old, new), (old, new), ())

    def _finish(self, text: str, start: Scene, result: Scene, changed: tuple, told_of: tuple) -> Task:
        """The wish of an edit is the whole result, but for fields that the text leaves open."""
        everything = ("shape", "colour", "place", "size")
        told = tuple(told_of[1] if told_of and one is told_of[0] else everything for one in result.things)
        return Task("edit", text, start, Wish(text, result.things, told, None, result.ground), result, None, changed)

    # ---- chance

    def _thing(self, held_out: bool, other: Thing | None = None) -> Thing:
        """A thing whose combination is held out or not, of another shape and place than `other`."""
        while True:
            down, right = (int(off) for off in self.draws.integers(-JITTER, JITTER + 1, 2))
            thing = Thing(*map(self._pick, (SHAPES, COLOURS, PLACES, SIZES)), (down, right))
            free = other is None or (thing.shape != other.shape and thing.place != other.place)
            if free and is_held_out(thing.triple) == held_out:
                return thing

    def _pick(self, choices: Sequence[str] | dict[str, Any]) -> Any:
        choices = list(choices)
        return choices[self.draws.integers(len(choices))]

    def _chance(self, probability: float) -> bool:
        return bool(self.draws.random() < probability)


SHARES = {"draw": 0.4, "ask": 0.2, "edit": 0.35, "tell": 0.05}


class TrainingRows(Sequence):
    """
    Rows without held-out combinations, made when they are asked for: a list to whoever trains. Questions come several
    to a picture.

    Args:
        number: rows in one epoch. seed: other seeds give other rows. shares: of the kinds of tasks.
    """

    def __init__(self, number: int = 1_000_000, seed: int = 0, shares: dict[str, float] | None = None):
        self.number, self.seed, self.shares = number, seed, shares or SHARES

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.number:
            raise IndexError(f"Row {index} of {self.number}.")
        draws = np.random.default_rng([self.seed, index])
        kinds, shares = zip(*self.shares.items())
        kind = kinds[draws.choice(len(kinds), p=np.array(shares) / sum(shares))]
        inventor = Inventor(draws)
        tasks = inventor.dialogue() if kind == "ask" else [inventor.task(kind)]
        return conversation(tasks, f"{kind}-{index}")


def held_out_tasks(kind: str, number: int = 500, seed: int = 0) -> list[Task]:
    """Tasks about combinations that training never shows, the same for the same seed."""
    inventor = Inventor(np.random.default_rng([seed, 1, *kind.encode()]), held_out=True)
    return [inventor.task(kind) for _ in range(number)]


def all_sentences(number: int = 3000, seed: int = 0) -> list[str]:
    """A sample of what the world says, for training a tokenizer."""
    inventor = Inventor(np.random.default_rng([seed, 2]))
    tasks = [inventor.task(kind) for kind in SHARES for _ in range(number // len(SHARES))]
    return [text for task in tasks for text in (task.prompt, task.answer) if text]
