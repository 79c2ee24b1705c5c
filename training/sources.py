# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Where rows of training data come from: `DataSource`, and readers of the released formats and of conversations.

It knows files and formats; in which order rows are read is the subject of `mixture.py`, what a row means of
`conversations_bagel`.
"""

import glob
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..conversations_bagel import ConversationPlanner
from ..packing_bagel import PackingConfig


@dataclass(frozen=True)
class DataSource:
    """
    Where rows come from, and how they are read.

    Args:
        name: what logs and sample ids call it.
        rows: conversations, or what `convert` turns into them: a list, a `datasets.Dataset`, a streaming
            `datasets.IterableDataset` (not shuffled by `datasets`: its shuffle buffer cannot be resumed), or
            [`StreamedFiles`]. Images in `datasets` columns are not decoded before they are packed.
        convert: `f(row, rng)` that returns a conversation; `rng` is seeded with the row.
        weight: how often the mixture takes a row from here, relative to other sources.
        shuffle: a new order in every pass: of all rows, or for streams of the files and inside every `shuffle_window`.
        shuffle_window: how many rows a stream reads at once to shuffle them.
        decisions, share_max_pixels, image_settings, image_folder: see [`ConversationPlanner`].

    Raises:
        ValueError: `weight` is not positive, or `shuffle_window` is below 1.
    """

    name: str
    rows: Any
    convert: Callable[[dict, np.random.Generator], dict] | None = None
    weight: float = 1.0
    shuffle: bool = True
    shuffle_window: int = 256
    decisions: bool = True
    share_max_pixels: bool = False
    image_settings: Mapping[str, Any] | None = None
    image_folder: str | os.PathLike | None = None

    def __post_init__(self):
        if not self.weight > 0:
            raise ValueError(
                f"Source {self.name!r} has weight {self.weight}: weights are positive; leave it out instead."
            )
        if self.shuffle_window < 1:
            raise ValueError(f"Source {self.name!r} has shuffle_window={self.shuffle_window}; it must be at least 1.")

    def planner(self, processor: Any, config: PackingConfig) -> ConversationPlanner:
        """What turns conversations of this source into samples."""
        return ConversationPlanner(
            processor,
            config,
            decisions=self.decisions,
            share_max_pixels=self.share_max_pixels,
            image_settings=self.image_settings,
            image_folder=self.image_folder,
        )


@dataclass(frozen=True)
class StreamedFiles:
    """Files that `datasets` streams with one of its builders: "parquet", or "text" for rows {"text": line}."""

    builder: str
    files: tuple[str, ...]

    @classmethod
    def find(cls, builder: str, files: str | os.PathLike | Sequence, ending: str) -> "StreamedFiles":
        """
        Find files in a fixed order.

        Args:
            files: paths, folders (all files in them with the `ending`), patterns and URLs.

        Raises:
            FileNotFoundError: an entry matches no file.
        """
        found: list[str] = []
        for entry in [files] if isinstance(files, str | os.PathLike) else files:
            entry = os.fspath(entry)
            pattern = os.path.join(glob.escape(entry), f"*{ending}") if os.path.isdir(entry) else entry
            matches = [entry] if "://" in entry or os.path.isfile(entry) else sorted(glob.glob(pattern))
            if not matches:
                raise FileNotFoundError(f"No such data files: {pattern}")
            found += matches
        return cls(builder, tuple(found))

    def open(self, rng: np.random.Generator | None) -> Any:
        """A streaming dataset over the files, in random order if `rng` is given."""
        files = list(self.files)
        if rng is not None:
            files = [files[index] for index in rng.permutation(len(files))]
        return _datasets().load_dataset(self.builder, data_files={"train": files}, split="train", streaming=True)


def t2i_parquet(files: str | os.PathLike | Sequence, name: str = "t2i", **settings: Any) -> DataSource:
    """
    The released text-to-image format: `image` (bytes of an image file) and `captions` (a JSON object of captions). In
    every pass one caption is chosen at random.

    Args:
        files: parquet files, folders or patterns. settings: fields of [`DataSource`].
    """
    rows = StreamedFiles.find("parquet", files, ".parquet")
    settings.setdefault("convert", t2i_conversation)
    return DataSource(name, rows, **settings)


def editing_parquet(files: str | os.PathLike | Sequence, name: str = "editing", **settings: Any) -> DataSource:
    """
    The released editing format: `image_list` (bytes, each an edit of the one before) and `instruction_list` (for every
    edit, wordings of it). As released, every pass takes one edit, or two consecutive ones, at random.
    """
    rows = StreamedFiles.find("parquet", files, ".parquet")
    settings.setdefault("convert", editing_conversation)
    return DataSource(name, rows, **settings)


def vlm_jsonl(
    files: str | os.PathLike | Sequence, image_folder: str | os.PathLike, name: str = "vlm", **settings
) -> DataSource:
    """
    The released understanding format: one JSON object per line with `conversations` (turns "from" "human" and "gpt"
    with a "value", images marked `<image>` in human turns) and `image` (one path or several, under `image_folder`).
    As released, the images of a row share `max_pixels`, and turns "from" anyone else are left out.
    """
    rows = StreamedFiles.find("text", files, ".jsonl")
    defaults: dict[str, Any] = {"convert": vlm_conversation, "share_max_pixels": True, "image_folder": image_folder}
    return DataSource(name, rows, **defaults | settings)


def conversations(files: str | os.PathLike | Sequence, name: str = "conversations", **settings: Any) -> DataSource:
    """Conversations (`messages`, `images`), one per line of .jsonl files or per row of .parquet files."""
    first = files if isinstance(files, str | os.PathLike) else files[0]
    if str(first).endswith(".parquet"):
        return DataSource(name, StreamedFiles.find("parquet", files, ".parquet"), **settings)
    return DataSource(name, StreamedFiles.find("text", files, ".jsonl"), conversation_of_line, **settings)


# --------------------------------------------------------------------------------------------------------------------
# A row of each format as a conversation


def conversation_of_line(row: dict, rng: np.random.Generator) -> dict:
    """A line of a .jsonl file, {"text": line}."""
    return json.loads(row["text"])


def t2i_conversation(row: dict, rng: np.random.Generator) -> dict:
    """A released text-to-image row as a conversation."""
    captions = row["captions"]
    captions = json.loads(captions) if isinstance(captions, str | bytes) else captions
    captions = list(captions.values()) if isinstance(captions, Mapping) else list(captions)
    caption = captions[rng.integers(len(captions))] if captions else " "
    return _conversation(row, [row["image"]], [("user", caption), ("assistant", None)])


def editing_conversation(row: dict, rng: np.random.Generator) -> dict:
    """
    A released editing row as a conversation: an image and one or two edits of it, or two edits as one instruction.

    Raises:
        ValueError: there are fewer than two images, or too few instructions.
    """
    images, instructions = row["image_list"], row["instruction_list"]
    if len(images) < 2 or len(instructions) < len(images) - 1:
        raise ValueError(f"{len(images)} images with {len(instructions)} instructions hold no edit.")
    first = int(rng.integers(len(images) - 1))
    last = int(rng.integers(first + 1, min(first + 3, len(images))))
    at_once = last - first > 1 and rng.random() < 0.5
    if at_once and last == len(images) - 1:
        last -= 1  # as released

    def wording(edit: int) -> str:
        choices = instructions[edit - 1]
        return choices if isinstance(choices, str) else choices[rng.integers(len(choices))]

    spans: list[tuple[str, str | None]] = [("user", None)]
    if at_once:
        spans += [("user", " ".join(wording(edit) + "." for edit in range(first + 1, last + 1))), ("assistant", None)]
        return _conversation(row, [images[first], images[last]], spans)
    for edit in range(first + 1, last + 1):
        spans += [("user", wording(edit)), ("assistant", None)]
    return _conversation(row, images[first : last + 1], spans)


def vlm_conversation(row: dict, rng: np.random.Generator) -> dict:
    """
    A released understanding row, or {"text": its JSON line}, as a conversation.

    Raises:
        ValueError: the row has a video.
    """
    row = json.loads(row["text"]) if "conversations" not in row else row
    if "video" in row:
        raise ValueError("Video files are not read: store the frames and list them under 'image'.")
    images = row.get("image") or []
    spans = []
    for turn in row["conversations"]:
        if turn["from"] == "gpt":
            spans.append(("assistant", turn["value"]))
        elif turn["from"] == "human" and "<image>" in turn["value"]:
            texts = turn["value"].split("<image>")
            for index, text in enumerate(texts):
                spans += [("user", text.strip())] if text.strip() else []
                spans += [("user", None)] if index < len(texts) - 1 else []
        elif turn["from"] == "human":
            spans.append(("user", turn["value"]))
    return _conversation(row, [images] if isinstance(images, str | bytes) else images, spans)


def _conversation(row: Mapping[str, Any], images: Sequence, spans: list[tuple[str, str | None]]) -> dict:
    """A conversation of (role, text) spans; the text `None` stands for the next image."""
    messages = [
        {"role": role, "content": [{"type": "image"} if text is None else {"type": "text", "text": text}]}
        for role, text in spans
    ]
    return {"messages": messages, "images": list(images), "id": row.get("id")}


def _datasets():
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Streaming data files needs datasets: `pip install bagel-transformers[train]`.") from error
    return datasets
