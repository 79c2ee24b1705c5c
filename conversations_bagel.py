# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Conversations to sequence plans and packs: what of a row is trained, what is context, which pictures it takes.

It knows the form of a row and the processor; it knows nothing of where rows come from. A row is a conversation:

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "make it blue"}]},
                  {"role": "assistant", "content": [{"type": "image"}]}],
     "images": [first, second]}

The assistant's texts are trained with cross-entropy, its images with flow matching, everything else is context.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from io import BytesIO
from typing import Any, NamedTuple

from PIL import Image
from transformers.utils import logging

from .image_processing_bagel import SETTINGS, flatten_images, load_image
from .packing_bagel import (
    PACKING_FACTS,
    PackingConfig,
    RandomizedSample,
    RandomSource,
    SamplePlan,
    SequenceItem,
    pack,
    randomize,
    rng_of_torch,
    with_labels,
)


logger = logging.get_logger(__name__)

ROLES = ("system", "user", "assistant")
CONTENT_TYPES = ("text", "image", "image_url")  # transformers turns the last into the second
IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")  # where an image may stand inside its item
PLANNING_OPTIONS = ("decisions", "share_max_pixels", "image_settings", "image_folder")
EXIF_ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)


class Element(NamedTuple):
    """
    A text, an image or a clip of a conversation.

    Attributes:
        kind: "text", "image" or "clip".
        trained: it is the assistant's.
        turn: number of the run of messages of one role.
        text_ids: of a text. images: numbers of its images in reading order. frame_deltas: of a clip, but the last.
    """

    kind: str
    trained: bool
    turn: int
    text_ids: tuple[int, ...] = ()
    images: tuple[int, ...] = ()
    frame_deltas: tuple[int | None, ...] = (None,)

    @property
    def is_generated(self) -> bool:
        """It is an image or a clip that the model learns to draw."""
        return self.trained and self.kind != "text"


class Picture(NamedTuple):
    """An image of a row, and which views of it are made: `edited` for the VAE, `read` for the ViT."""

    source: Any
    edited: bool
    read: bool

    def with_view(self, item_type: str) -> "Picture":
        return self._replace(edited=True) if item_type == "vae_image" else self._replace(read=True)


@dataclass(frozen=True)
class Outline:
    """
    A sample whose lengths are known and whose pictures are not decoded.

    Attributes:
        plan: the items, without contents. pictures: of the row. views: for each item the number of its picture.
    """

    plan: SamplePlan
    pictures: tuple[Picture, ...]
    views: tuple[int | None, ...]


class ConversationPlanner:
    """
    Turns conversations into sequence plans.

    What is trained: an assistant's text (labels: its ids, then eos), an assistant's image (a noisy block that nothing
    else sees). An assistant's image enters the context as clean VAE and ViT views if anything follows it. A user's
    image is read by the ViT, and by the VAE too if the conversation draws an image later. A run of images with a
    `frame_delta` each, but the last, is a clip: VAE frames that share a split if it is drawn or something is drawn
    later, else images that are read.

    A condition can be dropped (for guidance) if what is trained next after it is an image; texts that are trained are
    never dropped.

    Args:
        processor: a `BagelProcessor`; its tokenizer and image processor are used.
        config: the facts of the model that packing needs. By default those of the processor.
        decisions: at the end of each of the assistant's spans, train the first token of the next one as the label (bos
            or vision_start), and eos where its turn ends, so that `generation_mode="interleaved"` learns to decide.
            A last image is then read back too if its turn holds more than itself. `False` gives the plans of the
            released datasets.
        share_max_pixels: the images of one row share the image processor's `max_pixels`, as in the released VLM data.
        image_settings: settings of the image processor for this data, e.g. `{"size": {...}}`.
        image_folder: where relative image paths start.

    Raises:
        ValueError: processor (or `image_settings`) and `config` belong to different models.
    """

    def __init__(
        self,
        processor: Any,
        config: PackingConfig | None = None,
        *,
        decisions: bool = True,
        share_max_pixels: bool = False,
        image_settings: Mapping[str, Any] | None = None,
        image_folder: str | os.PathLike | None = None,
    ):
        self.tokenizer, self.decisions = processor.tokenizer, decisions
        self.config = processor.packing_config if config is None else config
        self.share_max_pixels, self.image_folder = share_max_pixels, image_folder
        current = {name: getattr(processor.image_processor, name) for name in SETTINGS}
        self._image_settings = current | dict(image_settings or {})
        self._image_processor_class = type(processor.image_processor)
        self._image_processors = {}
        strides = {"vit_patch_size": "patch_size", "latent_downsample": "latent_stride"}
        ours = {fact: self._image_settings[name] for fact, name in strides.items()}
        ours |= {name: getattr(processor, name) for name in PACKING_FACTS if name.endswith("token_id")}
        for name, value in ours.items():
            if value != getattr(self.config, name):
                raise ValueError(
                    f"The processor's {strides.get(name, name)} is {value}, the packing config says "
                    f"{getattr(self.config, name)}: take both from one checkpoint, processor.packing_config."
                )

    def outline(self, row: Mapping[str, Any], name: str = "a sample") -> Outline:
        """
        Everything but pixels. Reads the headers of the row's images.

        Raises:
            ValueError: nothing to learn, an unknown role or content type, images that do not match their placeholders.
            OSError: an image is missing or no picture.
        """
        elements, sources = self._elements(row, name)
        if not any(element.trained for element in elements):
            raise ValueError(f"{name} has nothing to learn: no message of the assistant holds a text or an image.")
        image_processor = self._image_processor(len(sources) if self.share_max_pixels else 1)
        sizes = [picture_size(source, image_processor.max_input_pixels) for source in sources]
        views = [view for number in range(len(elements)) for view in self._views(elements, number, name)]
        pictures = [Picture(source, False, False) for source in sources]
        for view in views:
            if view.image is not None:
                pictures[view.image] = pictures[view.image].with_view(view.type)
        items = []
        for view in views:
            grid = (0, 0)
            if view.image is not None:
                grid = self._grid(image_processor, view.type, sizes[view.image], pictures[view.image].edited)
            items.append(SequenceItem(view.type, view.text_ids, grid, **view.flags))
        return Outline(SamplePlan(tuple(items), name), tuple(pictures), tuple(view.image for view in views))

    def load(self, outline: Outline, sample: RandomizedSample) -> RandomizedSample:
        """
        Decode and resize the pictures that the kept items need.

        Raises:
            OSError: a picture is damaged.
            ValueError: a picture has another size than its header says.
        """
        image_processor = self._image_processor(len(outline.pictures) if self.share_max_pixels else 1)
        stride, loaded, contents = image_processor.latent_stride, {}, {}
        for one in sample.items:
            number = outline.views[one.index]
            if number is None:
                continue
            if number not in loaded:
                picture = outline.pictures[number]
                loaded[number] = image_processor.preprocess([picture.source], picture.edited, picture.read)
            if one.item.type == "vit_image":
                content, grid = loaded[number]["pixel_values"], loaded[number]["image_grid_hw"][0].tolist()
            else:
                content = loaded[number]["latent_pixel_values"][0]
                grid = [side // stride for side in content.shape[1:]]
            if tuple(grid) != one.item.grid:
                raise ValueError(
                    f"An image of {sample.name} has {grid[0]}x{grid[1]} tokens, by its header {one.item.grid[0]}x"
                    f"{one.item.grid[1]}: it stores its orientation behind its pixels. Save it again."
                )
            contents[one.index] = content
        return sample.with_contents(contents)

    # ---- reading a row

    def _elements(self, row: Mapping[str, Any], name: str) -> tuple[list[Element], list]:
        """The row in reading order, texts without tokens left out (as released), and its image sources."""
        given = row.get("images")
        column = [] if given is None else flatten_images(_encoded(given))
        waiting, sources, elements, frames = iter(column), [], [], []
        for item, trained, turn in _items_in_order(row, name):
            if frames and (item["type"] == "text" or turn != frames[0].turn):
                raise ValueError(f"A clip of {name} does not end: its last frame must have no frame_delta.")
            if item["type"] == "text":
                ids = self._tokens(item["text"], name)
                elements += [Element("text", trained, turn, ids)] if ids else []
                continue
            source = next((_encoded(item[key]) for key in IMAGE_KEYS if item.get(key) is not None), None)
            source = next(waiting, None) if source is None else source
            if source is None:
                raise ValueError(f"{name} has more placeholders than its {len(column)} images.")
            frames.append(Element("image", trained, turn, (), (len(sources),), (item.get("frame_delta"),)))
            sources.append(self._located(source))
            if item.get("frame_delta") is None:
                elements.append(_clip(frames))
                frames = []
        if frames:
            raise ValueError(f"A clip of {name} does not end: its last frame must have no frame_delta.")
        if left := sum(1 for _ in waiting):
            raise ValueError(
                f"{name} has {len(column)} images, but placeholders for only {len(column) - left} of them."
            )
        return elements, sources

    def _tokens(self, text: str, name: str) -> tuple[int, ...]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if placeholders := {self.config.image_token_id, self.config.latent_token_id} & {*ids}:
            tokens = " and ".join(self.tokenizer.convert_ids_to_tokens(sorted(placeholders)))
            raise ValueError(f"A text of {name} holds {tokens}; an image is an item of its own, of type 'image'.")
        return tuple(ids)

    def _located(self, source: Any) -> Any:
        is_path = isinstance(source, str | os.PathLike) and not str(source).startswith(("http://", "https://", "data:"))
        return os.path.join(self.image_folder, source) if is_path and self.image_folder is not None else source

    # ---- what becomes of an element

    def _views(self, elements: list[Element], number: int, name: str) -> list["View"]:
        """The items that one element becomes, in order."""
        element, later, config = elements[number], elements[number + 1 :], self.config
        next_trained = next((other for other in later if other.trained), None)
        condition = {"enable_cfg": next_trained is not None and next_trained.is_generated}
        decision = {}
        if element.trained and self.decisions:
            decision = {"special_token_label": self._next_token(element, later)}
        if element.kind == "text":
            flags = {"loss": True, **decision} if element.trained else condition
            return [View("text", None, element.text_ids, flags)]
        if element.is_generated:
            if not config.visual_gen:
                raise ValueError(f"{name} draws an image, but this model only reads (visual_gen=False, stage=1).")
            views = self._vae_views(element, {"loss": True})
            alone_in_turn = [other.turn for other in elements].count(element.turn) == 1
            if later or (self.decisions and not alone_in_turn):
                views += _last_with(self._context(element, condition, True), decision)
            return views
        draws_later = config.visual_gen and any(other.is_generated for other in later)
        views = self._context(element, condition, draws_later)
        if not views:
            raise ValueError(f"{name} reads an image, but this model has no vision tower (visual_und=False).")
        return views

    def _context(self, element: Element, flags: dict[str, Any], edited: bool) -> list["View"]:
        """A clean image or clip; a clip that something is drawn after is seen by the VAE alone, as released."""
        views = self._vae_views(element, flags) if edited else []
        if self.config.visual_und and not (edited and element.kind == "clip"):
            views += [View("vit_image", image, (), flags) for image in element.images]
        return views

    def _vae_views(self, element: Element, flags: dict[str, Any]) -> list["View"]:
        last = len(element.images) - 1
        return [
            View(
                "vae_image",
                image,
                (),
                flags | {"split_start": frame == 0, "split_end": frame == last, "frame_delta": delta},
            )
            for frame, (image, delta) in enumerate(zip(element.images, element.frame_deltas))
        ]

    def _next_token(self, element: Element, later: list[Element]) -> int:
        if not later or later[0].turn != element.turn:
            return self.config.eos_token_id
        return self.config.bos_token_id if later[0].kind == "text" else self.config.vision_start_token_id

    # ---- sizes

    def _image_processor(self, num_images: int) -> Any:
        """One whose `max_pixels` is the share of each of `num_images`."""
        if num_images not in self._image_processors:
            max_pixels = self._image_settings["max_pixels"] / max(num_images, 1)
            settings = self._image_settings | {"max_pixels": max_pixels}
            self._image_processors[num_images] = self._image_processor_class(**settings)
        return self._image_processors[num_images]

    def _grid(self, image_processor: Any, kind: str, size: tuple[int, int], edited: bool) -> tuple[int, int]:
        """(rows, columns) of a view of a picture of this size, as `image_processor.preprocess` makes it."""
        if edited or image_processor.vae_resize_first:
            size = image_processor.latent_dimensions(*size)
        stride = image_processor.latent_stride
        if kind == "vit_image":
            size, stride = image_processor.vit_dimensions(*size), image_processor.patch_size
        return size[1] // stride, size[0] // stride


class View(NamedTuple):
    """An item to be: its type, its image, its text, its other fields."""

    type: str
    image: int | None
    text_ids: tuple[int, ...]
    flags: dict[str, Any]


def _last_with(views: list[View], flags: dict[str, Any]) -> list[View]:
    return views[:-1] + [views[-1]._replace(flags=views[-1].flags | flags)]


def _clip(frames: list[Element]) -> Element:
    """Several frames as one element; a single image stays what it is."""
    if len(frames) == 1:
        return frames[0]
    images, deltas = (tuple(x for frame in frames for x in getattr(frame, name)) for name in ("images", "frame_deltas"))
    return frames[0]._replace(kind="clip", images=images, frame_deltas=deltas)


def _items_in_order(row: Mapping[str, Any], name: str) -> Iterator[tuple[Mapping[str, Any], bool, int]]:
    """(item, whether it is trained, turn) of a row's messages; a turn is a run of messages of one role."""
    turn, last_role = -1, None
    for message, items in conversation_items(row.get("messages"), name):
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"Unknown role {role!r} in {name}; a role is {', '.join(ROLES)}.")
        turn, last_role = turn + (role != last_role), role
        for item in items:
            yield item, role == "assistant", turn


def conversation_items(
    messages: Sequence[Mapping[str, Any]] | None, name: str = "the conversation"
) -> Iterator[tuple[Mapping[str, Any], list[Mapping[str, Any]]]]:
    """
    (message, its items) in order; a content that is a string is one text. `name` is what errors call the conversation.

    Raises:
        ValueError: there is no message, or an item has an unknown type or a text no string.
        TypeError: a content is neither a string nor a list.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"{name} has no messages: a conversation is a list of messages, with at least one.")
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, Sequence):
            raise TypeError(f"The content of a message of {name} is a string or a list of items, not {content!r}.")
        for item in content:
            kind = item.get("type") if isinstance(item, Mapping) else type(item).__name__
            if kind not in CONTENT_TYPES:
                raise ValueError(
                    f"Unknown content type {kind!r} in {name}; a message holds items of type 'text' or 'image'."
                )
            if kind == "text" and not isinstance(item.get("text"), str):
                raise ValueError(f"An item of type 'text' in {name} has its string under 'text', got {item!r}.")
        yield message, list(content)


def _encoded(image: Any) -> Any:
    """What `load_image` takes, from the forms that image columns have."""
    if isinstance(image, list | tuple):
        return [_encoded(one) for one in image]
    if isinstance(image, Mapping) and "url" in image:
        return image["url"]
    if isinstance(image, Mapping):  # as `datasets` stores it
        return image["path"] if image.get("bytes") is None else image["bytes"]
    return image


def picture_size(source: Any, max_input_pixels: int) -> tuple[int, int]:
    """
    (width, height) of a picture, upright, from its header where it has one.

    Raises: what `load_image` raises, for pictures that are missing, too large or none.
    """
    try:
        with _opened(source) as image:
            width, height = image.size
            # a PNG may tell it only behind its pixels, and decoding them is what the header is to spare
            known = image.format != "PNG" or "exif" in image.info
            turned = known and image.getexif().get(EXIF_ORIENTATION) in TURNED
            plain = image.format != "TIFF"  # which Pillow turns by itself, before or while it decodes
    except Exception:  # whatever is wrong with it, loading it says it better
        plain, turned, width, height = False, False, 0, 0
    if not (plain and 0 < width * height <= max_input_pixels):
        return load_image(source, max_input_pixels).size
    return (height, width) if turned else (width, height)


def _opened(source: Any) -> Any:
    """A context that gives the picture with its header read; a picture that is the caller's is left open."""
    if isinstance(source, Image.Image):
        return nullcontext(source)
    if isinstance(source, bytes):
        return Image.open(BytesIO(source))
    if isinstance(source, str | os.PathLike) and os.path.isfile(source):
        return Image.open(source)
    raise TypeError("no header to read")


# --------------------------------------------------------------------------------------------------------------------
# Rows to packs


class ConversationCollator:
    """
    `data_collator` for rows that are conversations: a list of rows becomes one pack. See `BagelProcessor.collator`.

    For small data and the stock `Trainer`: as many conversations as the batch size go into a pack, whatever their
    length. It can be pickled, so a loader's workers may be spawned. `PackedDataset` of the training package makes packs
    that are full and do not depend on the number of workers.

    Args:
        processor: a `BagelProcessor`.
        rng: where dropout and timesteps come from. By default they follow torch's global generator, so they follow the
            seed of a run, and in a loader with workers that of the worker.
        max_num_tokens: of a pack; a row that does not fit beside those before it is left out.
        skip: leave out rows that cannot be used, with a warning, and count them in `num_skipped`. `False`: raise.
        report: add `"report": {"sample_ids": [...], "skipped": [[id, reason], ...]}` to every pack. `forward` does not
            take it: pop it first.
        pad_to, nested_masks: see [`~packing_bagel.pack`].
        options: keywords of [`ConversationPlanner`] (`decisions`, `share_max_pixels`, `image_settings`,
            `image_folder`), and facts of [`~packing_bagel.PackingConfig`] that replace those of the processor, e.g.
            `text_cond_dropout_prob=0.0`.

    Raises:
        TypeError: an unknown keyword.
    """

    makes_packs = True  # how `BagelTrainer` knows it, also where it comes from another copy of this file

    def __init__(
        self,
        processor: Any,
        *,
        rng: RandomSource | None = None,
        max_num_tokens: int | None = None,
        skip: bool = True,
        report: bool = False,
        pad_to: int | None = None,
        nested_masks: bool = False,
        **options,
    ):
        planning = {name: options.pop(name) for name in PLANNING_OPTIONS if name in options}
        config = processor.packing_config.changed(**options)
        self.planner = ConversationPlanner(processor, config, **planning)
        self.rng, self.max_num_tokens, self.skip, self.report = rng, max_num_tokens, skip, report
        self.pack_options = {"pad_to": pad_to, "nested_masks": nested_masks}
        self.num_skipped = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """
        One pack, see [`~packing_bagel.pack`], with labels, see [`~packing_bagel.with_labels`].

        Raises:
            ValueError: none of the rows can be used; or, without `skip`, one cannot.
        """
        rng, samples, skipped = self.rng or rng_of_torch(), [], []
        for number, row in enumerate(rows):
            name = f"row {row['id']}" if row.get("id") is not None else f"row {number} of the batch"
            try:
                samples.append(self._sample(row, name, sum(sample.num_tokens for sample in samples), rng))
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                if not self.skip:
                    raise ValueError(f"{name} cannot be packed. {reason}") from error
                self.num_skipped += 1
                skipped.append([name, reason])
                logger.warning(f"skipped {name}: {reason} ({self.num_skipped} skipped so far)")
        if not samples:
            raise ValueError(f"None of {len(rows)} rows could be used. {'; '.join(map(': '.join, skipped))}")
        made = with_labels(pack(samples, self.planner.config, **self.pack_options))
        if self.report:
            made["report"] = {"sample_ids": [sample.name for sample in samples], "skipped": skipped}
        return made

    def _sample(self, row: Mapping[str, Any], name: str, length: int, rng: RandomSource) -> RandomizedSample:
        """The sample of a row, with its pictures, behind samples of `length` tokens."""
        outline = self.planner.outline(row, name)
        sample = randomize(outline.plan, self.planner.config, rng)
        if self.max_num_tokens is not None and length + sample.num_tokens > self.max_num_tokens:
            raise ValueError(
                f"its {sample.num_tokens} tokens do not fit max_num_tokens={self.max_num_tokens} beside {length}"
            )
        return self.planner.load(outline, sample)
