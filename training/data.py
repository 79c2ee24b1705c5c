# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Rows of data to training packs: the released formats, mixing, sharding over ranks, look-ahead packing, resuming.

It knows where rows come from and in which order; what a row means is the business of `conversations_bagel`.

    rows of the sources --mix--> outlines (lengths known, nothing decoded) --look ahead--> packs of outlines --> tensors

All randomness of a sample (caption, dropout, timesteps) follows from the seed and the row itself, so what a sample
becomes depends neither on its pack nor on who makes it.
"""

import glob
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.utils import logging

from ..conversations_bagel import ConversationPlanner, Outline
from ..packing_bagel import PackingConfig, RandomizedSample, pack, randomize


logger = logging.get_logger(__name__)


# --------------------------------------------------------------------------------------------------------------------
# Sources of rows


@dataclass(frozen=True)
class DataSource:
    """
    Where rows come from, and how they are read.

    Args:
        name: what logs and sample ids call it.
        rows: conversations, or what `convert` turns into them: a list, a `datasets.Dataset`, a streaming
            `datasets.IterableDataset` (without a shuffle of its own: its buffer could not be resumed), or what the
            readers below make. Images in `datasets` columns are not decoded before they are packed.
        convert: `f(row, rng)` that returns a conversation; `rng` is a seeded `numpy.random.Generator`.
        weight: how often the mixture takes a row here, relative to the others.
        shuffle: another order in every pass: of all rows, or for streams of the files and within `shuffle_window`.
        shuffle_window: rows that a stream reads at once to shuffle them.
        decisions, share_max_pixels, image_settings, image_folder: see [`ConversationPlanner`].
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
            raise ValueError(f"Source {self.name!r} has shuffle_window={self.shuffle_window}; it holds at least 1 row.")

    def planner(self, processor: Any, config: PackingConfig) -> ConversationPlanner:
        return ConversationPlanner(
            processor,
            config,
            decisions=self.decisions,
            share_max_pixels=self.share_max_pixels,
            image_settings=self.image_settings,
            image_folder=self.image_folder,
        )

    def read_pass(self, number: int, seeds: Sequence[int], rank: int, world_size: int, state: dict | None = None):
        """One pass over the rows of this rank, from `state` on."""
        if isinstance(self.rows, StreamedFiles) or hasattr(self.rows, "load_state_dict"):
            return StreamReader(self, number, seeds, rank, world_size, state)
        if hasattr(self.rows, "__len__") and hasattr(self.rows, "__getitem__"):
            return SequenceReader(self, number, seeds, rank, world_size, state)
        raise TypeError(
            f"Source {self.name!r} has rows of type {type(self.rows).__name__}, which cannot be resumed: pass a list, "
            "a datasets.Dataset or a datasets.IterableDataset (IterableDataset.from_generator makes one)."
        )


@dataclass(frozen=True)
class StreamedFiles:
    """Files that `datasets` streams: `builder` is "parquet" or "text"."""

    builder: str
    files: tuple[str, ...]

    @classmethod
    def find(cls, builder: str, files: str | os.PathLike | Sequence, ending: str) -> "StreamedFiles":
        """`files`: paths, folders (all files with the ending in them) and patterns, in a fixed order."""
        found = []
        for entry in [files] if isinstance(files, str | os.PathLike) else files:
            entry = os.fspath(entry)
            pattern = os.path.join(glob.escape(entry), f"*{ending}") if os.path.isdir(entry) else entry
            matches = [entry] if "://" in entry or os.path.isfile(entry) else sorted(glob.glob(pattern))
            if not matches:
                raise FileNotFoundError(f"No such data files: {pattern}")
            found += matches
        return cls(builder, tuple(found))

    def open(self, order: np.random.Generator | None) -> Any:
        """A streaming dataset over the files, shuffled by `order` if given."""
        files = list(self.files)
        if order is not None:
            files = [files[index] for index in order.permutation(len(files))]
        return _datasets().load_dataset(self.builder, data_files={"train": files}, split="train", streaming=True)


def t2i_parquet(files: str | os.PathLike | Sequence, name: str = "t2i", **settings) -> DataSource:
    """
    The released text-to-image format: `image` (bytes of an image file) and `captions` (a JSON object of captions, one
    of which is picked every time).

    Args:
        files: parquet files, folders or patterns. settings: fields of [`DataSource`].
    """
    rows = StreamedFiles.find("parquet", files, ".parquet")
    return DataSource(name, rows, **{"convert": t2i_conversation} | settings)


def editing_parquet(files: str | os.PathLike | Sequence, name: str = "editing", **settings) -> DataSource:
    """
    The released editing format: `image_list` (bytes, each an edit of the one before) and `instruction_list` (for every
    edit, wordings of it). As released, one to two edits in a row are picked from the list every time.
    """
    rows = StreamedFiles.find("parquet", files, ".parquet")
    return DataSource(name, rows, **{"convert": editing_conversation} | settings)


def vlm_jsonl(
    files: str | os.PathLike | Sequence, image_folder: str | os.PathLike, name: str = "vlm", **settings
) -> DataSource:
    """
    The released understanding format: one JSON object per line with `conversations` (turns "from" "human" and "gpt"
    with a "value", images marked `<image>` in human turns) and `image` (one path or several, under `image_folder`).
    As released, the images of a row share `max_pixels`, and turns from others than those two are left out.
    """
    rows = StreamedFiles.find("text", files, ".jsonl")
    defaults = {"convert": vlm_conversation, "share_max_pixels": True, "image_folder": image_folder}
    return DataSource(name, rows, **defaults | settings)


def t2i_conversation(row: dict, rng: np.random.Generator) -> dict:
    """A released text-to-image row as a conversation."""
    captions = row["captions"]
    captions = json.loads(captions) if isinstance(captions, str | bytes) else captions
    captions = list(captions.values()) if isinstance(captions, Mapping) else list(captions)
    caption = captions[rng.integers(len(captions))] if captions else " "
    return _conversation(row, [row["image"]], [("user", caption), ("assistant", None)])


def editing_conversation(row: dict, rng: np.random.Generator) -> dict:
    """A released editing row as a conversation: a start, one or two edits, or two edits asked for at once."""
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

    spans = [("user", None)]
    if at_once:
        spans += [("user", " ".join(wording(edit) + "." for edit in range(first + 1, last + 1))), ("assistant", None)]
        return _conversation(row, [images[first], images[last]], spans)
    for edit in range(first + 1, last + 1):
        spans += [("user", wording(edit)), ("assistant", None)]
    return _conversation(row, images[first : last + 1], spans)


def vlm_conversation(row: dict, rng: np.random.Generator) -> dict:
    """A released understanding row, or the JSON line it is stored as, as a conversation."""
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
    """From (role, text) spans, where `None` is an image."""
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


# --------------------------------------------------------------------------------------------------------------------
# Reading rows so that it can be resumed


def _rng(purpose: int, *seeds: int) -> np.random.Generator:
    """A generator of its own for every purpose and list of seeds (numpy pads lists with zeros, purposes are not 0)."""
    return np.random.default_rng([purpose, len(seeds), *seeds])


FILE_ORDER, ROW_ORDER, NEXT_SOURCE, SAMPLE = 1, 2, 3, 4


class SequenceReader:
    """
    One pass over rows that can be addressed. A row's key is its index, the same on every rank.

    Args:
        source: where the rows are. number: of the pass. seeds: of the source. state: where to go on.
    """

    def __init__(self, source: DataSource, number: int, seeds: Sequence[int], rank: int, world_size: int, state=None):
        self.rows = source.rows
        if hasattr(self.rows, "with_format"):  # a datasets.Dataset, whose features would decode images
            self.rows = self.rows.with_format("arrow")
        order = np.arange(len(self.rows))
        if source.shuffle:
            order = _rng(ROW_ORDER, *seeds, number).permutation(len(self.rows))
        self.order = order[rank::world_size]
        self.position = 0 if state is None else state["position"]

    def __next__(self) -> tuple[list[int], Any]:
        if self.position >= len(self.order):
            raise StopIteration
        index = int(self.order[self.position])
        self.position += 1
        row = self.rows[index]
        return [index], row.to_pylist()[0] if hasattr(row, "to_pylist") else row

    def state_dict(self) -> dict:
        return {"position": self.position}


class StreamReader:
    """
    One pass over a `datasets` stream. Ranks share its shards (files) if they divide evenly, else its rows: then each
    rank reads all and keeps every `world_size`-th. Rows are read by windows and shuffled inside them; a state points to
    the start of a window and a place in it, so nothing that a window holds is lost. A row's key is its rank and its
    number in the rank's stream.
    """

    def __init__(self, source: DataSource, number: int, seeds: Sequence[int], rank: int, world_size: int, state=None):
        from datasets.distributed import split_dataset_by_node

        self.seeds, self.rank = [*seeds, number, rank], rank
        self.window = source.shuffle_window if source.shuffle else 1
        files = isinstance(source.rows, StreamedFiles)
        order = _rng(FILE_ORDER, *seeds, number) if source.shuffle else None
        dataset = source.rows.open(order) if files else source.rows
        if dataset.features is not None:
            dataset = dataset.decode(False)
        by_shard = dataset.num_shards % world_size == 0
        # rows are counted here and not by `datasets`, of which some versions give rank 0 all of them
        self.step, self.offset = (1, 0) if by_shard else (world_size, rank)
        self.dataset = split_dataset_by_node(dataset, *((rank, world_size) if by_shard else (0, 1)))
        if source.shuffle and not files:
            self.dataset.set_epoch(number)
        self.first, self.place, self.rows, self.before = 0, 0, [], self.dataset.state_dict()
        if state is not None:
            self.first, self.before = state["first"], state["before"]
            self.dataset.load_state_dict(self.before)
        if torch.utils.data.get_worker_info() is not None:
            import fsspec.asyn

            fsspec.asyn.reset_lock()  # a forked worker must not wait for its parent's downloads
        # `iter` and not `__iter__`: in a loader's worker the latter leaves rows to the other workers
        self.stream = self.dataset.iter(batch_size=1)
        if state is not None and state["place"] > 0:
            self._read_window()
            self.place = state["place"]

    def __next__(self) -> tuple[list[int], dict]:
        if self.place >= len(self.rows):
            self.first, self.before = self.first + len(self.rows), self.dataset.state_dict()
            self._read_window()
        if not self.rows:
            raise StopIteration
        offset, row = self.rows[self.place]
        self.place += 1
        return [self.rank, self.first + offset], row

    def _read_window(self) -> None:
        batches = zip(range(self.window * self.step), self.stream)
        kept = (batch for number, batch in batches if number % self.step == self.offset)
        rows = [{name: column[0] for name, column in batch.items()} for batch in kept]
        order = _rng(ROW_ORDER, *self.seeds, self.first).permutation(len(rows))
        self.rows, self.place = [(int(index), rows[index]) for index in order], 0

    def state_dict(self) -> dict:
        return {"before": self.before, "first": self.first, "place": self.place}


class Row(NamedTuple):
    """A row as the mixture reads it: `ordinal` counts them all, `key` tells those of one pass over a source apart."""

    ordinal: int
    source: int
    pass_number: int
    key: list[int]
    content: Any


class Mixture:
    """
    Rows of several sources. Which source comes next is picked by weight among those that have rows left; every source
    is passed `epochs` times (`None` = without end), and in each pass each of its rows comes once. A source that has no
    rows for this rank is left out; without any rows at all the mixture is an error.
    """

    def __init__(
        self, sources: Sequence[DataSource], seed: int, first_pass: int, epochs: int | None, rank: int, world_size: int
    ):
        self.sources, self.seed, self.rank, self.world_size = sources, seed, rank, world_size
        self.first_pass, self.end_pass = first_pass, None if epochs is None else first_pass + epochs
        self.ordinal = 0
        self.passes = [first_pass] * len(sources)
        self.readers = [None] * len(sources)
        self.counts = [0] * len(sources)  # rows read in the present pass
        self.empty = [False] * len(sources)

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        rng = _rng(NEXT_SOURCE, self.seed, self.rank, self.ordinal)
        while True:
            weights = [0.0 if self._is_done(i) else source.weight for i, source in enumerate(self.sources)]
            if all(self.empty):
                names = ", ".join(source.name for source in self.sources)
                raise ValueError(f"{names}: no rows for rank {self.rank} of {self.world_size}.")
            if not any(weights):
                raise StopIteration
            borders = np.cumsum(weights)
            index = int(np.searchsorted(borders, rng.random() * borders[-1], side="right"))
            read = self._read(index)
            if read is not None:
                key, content = read
                self.ordinal += 1
                return Row(self.ordinal - 1, index, self.passes[index], key, content)

    def _is_done(self, index: int) -> bool:
        return self.empty[index] or (self.end_pass is not None and self.passes[index] >= self.end_pass)

    def _read(self, index: int) -> tuple[list[int], Any] | None:
        """The next row of a source; `None` where a pass ends."""
        if self.readers[index] is None:
            self.readers[index] = self._open(index)
        try:
            read = next(self.readers[index])
        except StopIteration:
            self.empty[index] = self.counts[index] == 0
            self.passes[index] += 1
            self.readers[index], self.counts[index] = None, 0
            return None
        self.counts[index] += 1
        return read

    def _open(self, index: int, state: dict | None = None):
        source, number = self.sources[index], self.passes[index]
        return source.read_pass(number, [self.seed, index], self.rank, self.world_size, state)

    def state_dict(self) -> dict:
        readers = [None if reader is None else reader.state_dict() for reader in self.readers]
        lists = {"passes": [*self.passes], "counts": [*self.counts], "empty": [*self.empty], "readers": readers}
        return {"ordinal": self.ordinal, **lists}

    def load_state_dict(self, state: dict) -> None:
        self.ordinal = state["ordinal"]
        self.passes, self.counts, self.empty = ([*state[name]] for name in ("passes", "counts", "empty"))
        self.readers = [
            None if reader is None else self._open(index, reader) for index, reader in enumerate(state["readers"])
        ]


# --------------------------------------------------------------------------------------------------------------------
# Packs of outlines


class Skipped(NamedTuple):
    """A sample that was left out, and why."""

    name: str
    reason: str


class UnusableSample(Exception):
    """Raised with the name of a sample and the reason why it is left out."""

    def __init__(self, name: str, error: Exception):
        super().__init__(name, f"{type(error).__name__}: {error}")

    @property
    def record(self) -> Skipped:
        return Skipped(*self.args)


class Waiting(NamedTuple):
    """A sample that is ready to be packed."""

    ordinal: int
    source: int
    outline: Outline
    sample: RandomizedSample
    num_tokens: int


class PlannedPack(NamedTuple):
    """What the pack with this `number` holds, and what was skipped since the one before."""

    number: int
    samples: list[Waiting]
    skipped: list[Skipped]

    @property
    def num_tokens(self) -> int:
        return sum(sample.num_tokens for sample in self.samples)


@dataclass(frozen=True)
class Budget:
    """
    How long packs are.

    Args:
        max_num_tokens: no pack has more.
        expected_num_tokens: a pack that has fewer reads on, up to `look_ahead` samples further, for one that fits. By
            default 8/9 of `max_num_tokens`, as released.
        max_num_tokens_per_sample: a longer sample is skipped; by default `max_num_tokens`.
        look_ahead: samples that wait to be packed.
    """

    max_num_tokens: int
    expected_num_tokens: int | None = None
    max_num_tokens_per_sample: int | None = None
    look_ahead: int = 64

    def __post_init__(self):
        defaults = {
            "expected_num_tokens": max(1, self.max_num_tokens * 8 // 9),
            "max_num_tokens_per_sample": self.max_num_tokens,
        }
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
            if not 0 < getattr(self, name) <= self.max_num_tokens:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be positive and at most max_num_tokens={self.max_num_tokens}: "
                    "a sample is never split."
                )
        if self.look_ahead < 1:
            raise ValueError(f"look_ahead={self.look_ahead} must be at least 1.")

    def check(self, sample: RandomizedSample) -> None:
        if sample.num_tokens > self.max_num_tokens_per_sample:
            raise ValueError(
                f"it has {sample.num_tokens} tokens, more than max_num_tokens_per_sample="
                f"{self.max_num_tokens_per_sample}"
            )


class PackPlanner:
    """
    The packs of a rank in order, as outlines.

    Each starts with the sample that has waited longest, so none waits for more packs than `2 * look_ahead`; then the
    longest that fits is added until none does. Its state holds no samples: it points to where the longest waiting one
    was read and names those that wait, and resuming reads on from there.

    Args:
        mixture: the rows. outline: `f(row) -> Waiting`, which may raise [`UnusableSample`]. budget: lengths.
    """

    def __init__(self, mixture: Mixture, outline: Callable[[Row], Waiting], budget: Budget):
        self.mixture, self.outline, self.budget = mixture, outline, budget
        self.number = 0
        self.waiting: list[Waiting] = []
        self.skipped: list[Skipped] = []
        self.num_skipped = 0
        self.usable = {}  # source -> (pass, samples of it that could be used)
        self.history = deque([mixture.state_dict()])  # states of the mixture from before the longest waiting sample

    def __iter__(self) -> Iterator[PlannedPack]:
        return self

    def __next__(self) -> PlannedPack:
        self._remember()
        while len(self.waiting) < self.budget.look_ahead and self._read():
            pass
        if not self.waiting:
            if self.number == 0 and self.num_skipped:
                raise ValueError(f"None of {self.num_skipped} samples could be used. {_some(self.skipped)}")
            raise StopIteration
        planned = PlannedPack(self.number, self._compose(), self.skipped)
        self.number, self.skipped = self.number + 1, []
        return planned

    def _compose(self) -> list[Waiting]:
        chosen = [self.waiting.pop(0)]
        room, allowed = self.budget.max_num_tokens - chosen[0].num_tokens, self.budget.look_ahead
        while True:
            fitting = [sample for sample in self.waiting if sample.num_tokens <= room]
            if fitting:
                best = max(fitting, key=lambda sample: (sample.num_tokens, -sample.ordinal))
                self.waiting.remove(best)
                chosen.append(best)
                room -= best.num_tokens
                continue
            enough = self.budget.max_num_tokens - room >= self.budget.expected_num_tokens
            if enough or allowed == 0 or not self._read():
                return chosen
            allowed -= 1

    def _read(self) -> bool:
        """Let one more sample wait; `False` if there is none."""
        for row in self.mixture:
            self._check_source(row)
            if self._admit(row):
                self.usable[row.source] = (row.pass_number, self.usable[row.source][1] + 1)
                return True
        return False

    def _admit(self, row: Row) -> bool:
        try:
            self.waiting.append(self.outline(row))
        except UnusableSample as unusable:
            self.num_skipped += 1
            self.skipped.append(unusable.record)
            return False
        return True

    def _check_source(self, row: Row) -> None:
        """A source whose whole pass was skipped would be read for ever."""
        number, count = self.usable.get(row.source, (row.pass_number, 0))
        if number != row.pass_number:
            if count == 0:
                name = self.mixture.sources[row.source].name
                raise ValueError(f"A whole pass over source {name!r} was skipped. {_some(self.skipped)}")
            number, count = row.pass_number, 0
        self.usable[row.source] = (number, count)

    # ---- state

    def _remember(self) -> None:
        """Keep one state of the mixture from before the longest waiting sample, and all later ones."""
        if self.history[-1]["ordinal"] != self.mixture.ordinal:
            self.history.append(self.mixture.state_dict())
        oldest = self.waiting[0].ordinal if self.waiting else self.mixture.ordinal
        while len(self.history) > 1 and self.history[1]["ordinal"] <= oldest:
            self.history.popleft()

    def state_dict(self) -> dict:
        self._remember()
        return {
            "number": self.number,
            "mixture": self.history[0],
            "read": self.mixture.ordinal,
            "waiting": [sample.ordinal for sample in self.waiting],
            "usable": [[source, *counts] for source, counts in self.usable.items()],
            "num_skipped": self.num_skipped,
        }

    def load_state_dict(self, state: dict) -> None:
        self.mixture.load_state_dict(state["mixture"])
        self.number, self.num_skipped = state["number"], state["num_skipped"]
        self.usable = {source: tuple(counts) for source, *counts in state["usable"]}
        self.history, self.waiting, self.skipped = deque([state["mixture"]]), [], []
        wanted = set(state["waiting"])
        while self.mixture.ordinal < state["read"]:
            row = next(self.mixture)
            if row.ordinal in wanted:
                self._admit(row)


def sample_name(source: DataSource, row: Row, content: Any) -> str:
    """`source:id` with the row's own id if it has one, else its key."""
    own = content.get("id") if isinstance(content, Mapping) else None
    return f"{source.name}:{'/'.join(map(str, row.key)) if own is None else own}"


def _some(skipped: list[Skipped]) -> str:
    return "The last ones: " + "; ".join(f"{name}: {reason}" for name, reason in skipped[-3:])


# --------------------------------------------------------------------------------------------------------------------
# The dataset


class PackedDataset(torch.utils.data.IterableDataset):
    """
    Training packs from a mixture of sources: a stream of keyword dicts for `BagelForUnifiedMultimodal.forward`.

    Load it with `batch_size=None` (or 1 and a [`PackCollator`]) and any number of workers, and let nothing else shard
    it. Its packs and their order are a function of sources, seed, epoch, rank and world size alone. Each rank reads its
    own share of the rows. Every worker of a rank reads the same rows and plans the same packs (texts are tokenised, of
    images only headers are read); worker `w` of `n` decodes and yields packs `w, w + n, ...`, which is the order a
    loader asks for them. (Where every image of a pack turns out to be damaged only while it is decoded, there is no
    pack to yield, and with several workers those around it change places.)

    A sample that cannot be used (a broken image, nothing to learn, too long) is skipped, logged with its id and reason
    and counted. No other sample is lost, none comes twice in a pass.

    `state_dict` and `load_state_dict` continue where the last yielded pack ended, exactly; with
    `torchdata.stateful_dataloader.StatefulDataLoader` (and the same number of workers) also under prefetching.

        data = PackedDataset([t2i_parquet("t2i/"), DataSource("mine", rows)], processor)
        for pack in StatefulDataLoader(data, batch_size=None, num_workers=4):
            model(**pack).loss.backward()

    Args:
        sources: a [`DataSource`] or several. processor: a `BagelProcessor`.
        expected_num_tokens, max_num_tokens, max_num_tokens_per_sample, look_ahead: see [`Budget`].
        seed (`int`): of order, mixture, dropout and timesteps.
        epochs (`int`, *optional*, defaults to 1): passes over each source in one iteration; `None` = without end.
        rank, world_size (`int`, *optional*): by default those of `torch.distributed`, or of the environment.
        report (`bool`): add `"report": {"sample_ids": [...], "skipped": [[id, reason], ...]}` to every pack. `forward`
            does not take it: pop it first.
        pack_options: keywords of [`packing_bagel.pack`], e.g. `{"pad_to": 36864}`.
        facts: fields of [`packing_bagel.PackingConfig`] that replace those of the processor, e.g.
            `text_cond_dropout_prob=0.0`.
    """

    def __init__(
        self,
        sources: DataSource | Sequence[DataSource],
        processor: Any,
        *,
        expected_num_tokens: int | None = None,
        max_num_tokens: int = 36864,
        max_num_tokens_per_sample: int | None = None,
        look_ahead: int = 64,
        seed: int = 0,
        epochs: int | None = 1,
        rank: int | None = None,
        world_size: int | None = None,
        report: bool = False,
        pack_options: Mapping[str, Any] | None = None,
        **facts,
    ):
        self.sources = [sources] if isinstance(sources, DataSource) else list(sources)
        names = [source.name for source in self.sources]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"Sources need names that differ, and there must be one at least; got {names}.")
        if seed < 0:
            raise ValueError(f"seed={seed} must not be negative.")
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs={epochs} must be at least 1, or None for an endless stream.")
        self.rank, self.world_size = _place_in_world(rank, world_size)
        self.config = processor.packing_config.changed(**facts)
        self.planners = [source.planner(processor, self.config) for source in self.sources]
        self.seed, self.epochs, self.report = seed, epochs, report
        self.budget = Budget(max_num_tokens, expected_num_tokens, max_num_tokens_per_sample, look_ahead)
        self.pack_options = {"max_num_tokens": max_num_tokens, **(pack_options or {})}
        self._epoch = torch.tensor(0).share_memory_()  # seen by workers that live on from epoch to epoch
        self._packs: PackPlanner | None = None
        self._resume: dict | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_packs": None}  # an iteration stays with its process

    def set_epoch(self, epoch: int) -> None:
        """Choose the passes that the next iteration makes: their order, dropout and timesteps differ."""
        self._epoch.fill_(epoch)

    def plan(self) -> PackPlanner:
        """The packs as outlines, from the loaded state on if there is one, with nothing decoded."""
        first_pass = int(self._epoch) * (self.epochs or 1)
        mixture = Mixture(self.sources, self.seed, first_pass, self.epochs, self.rank, self.world_size)
        packs = PackPlanner(mixture, self._outline, self.budget)
        if self._resume is not None:
            packs.load_state_dict(self._resume)
            self._resume = None
        return packs

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        number, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        self._packs, skipped = self.plan(), []
        for planned in self._packs:
            if planned.number % step != number:
                continue
            samples, broken = self._load(planned)
            skipped += [*planned.skipped, *broken]
            if samples:  # else what was skipped is reported with the next pack
                yield self._pack(samples, skipped)
                skipped = []

    def state_dict(self) -> dict:
        """Where the next pack begins. Small: numbers only, no samples."""
        stream = self._resume if self._packs is None or self._resume is not None else self._packs.state_dict()
        return {"epoch": int(self._epoch), "made_by": self._fingerprint(), "stream": stream}

    def load_state_dict(self, state: dict) -> None:
        """
        Go on from a state in the next iteration.

        Raises:
            ValueError: the state was made with other sources, settings, seed, rank or world size.
        """
        ours = self._fingerprint()
        if differing := [name for name in ours if state["made_by"].get(name) != ours[name]]:
            raise ValueError(
                "This state belongs to another stream of packs: "
                + ", ".join(f"{name} was {state['made_by'].get(name)}, is {ours[name]}" for name in differing)
                + ". Resume with the settings it was saved with."
            )
        self.set_epoch(state["epoch"])
        self._resume, self._packs = state["stream"], None

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "sources": [source.name for source in self.sources],
            "weights": [float(source.weight) for source in self.sources],
            "budget": [*vars(self.budget).values()],
            "seed": self.seed,
            "epochs": self.epochs,
            "rank": self.rank,
            "world_size": self.world_size,
        }

    def _outline(self, row: Row) -> Waiting:
        """Convert, plan and randomize a row, all from its own seeds."""
        source, planner = self.sources[row.source], self.planners[row.source]
        rng = _rng(SAMPLE, self.seed, row.source, row.pass_number, *row.key)
        name = sample_name(source, row, row.content)
        try:
            content = row.content if source.convert is None else source.convert(row.content, rng)
            name = sample_name(source, row, content)
            outline = planner.outline(content, name)
            sample = randomize(outline.plan, self.config, rng)
            self.budget.check(sample)
        except Exception as error:
            raise UnusableSample(name, error) from error
        return Waiting(row.ordinal, row.source, outline, sample, sample.num_tokens)

    def _load(self, planned: PlannedPack) -> tuple[list[RandomizedSample], list[Skipped]]:
        """The samples of a pack with their pictures, and those whose pictures are damaged."""
        samples, broken = [], []
        for waiting in planned.samples:
            try:
                samples.append(self.planners[waiting.source].load(waiting.outline, waiting.sample))
            except Exception as error:
                broken.append(UnusableSample(waiting.sample.name, error).record)
        self._packs.num_skipped += len(broken)
        for name, reason in [*planned.skipped, *broken]:
            logger.warning(f"skipped sample {name}: {reason} ({self._packs.num_skipped} skipped so far)")
        return samples, broken

    def _pack(self, samples: list[RandomizedSample], skipped: list[Skipped]) -> dict[str, Any]:
        made = pack(samples, self.config, **self.pack_options)
        if self.report:
            names = [sample.name for sample in samples]
            made["report"] = {"sample_ids": names, "skipped": [list(one) for one in skipped]}
        return made


def _place_in_world(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank={rank} and world_size={world_size}: pass both or none.")
    if rank is None and torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    elif rank is None:
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is none of the {world_size} ranks 0 to {world_size - 1}.")
    return rank, world_size
