# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""In which order rows are read: passes over sources, mixed by weight, shared between ranks, resumable at any row.

It knows rows as opaque objects. Every order follows from seeds, so a state is a few numbers.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .sources import DataSource, StreamedFiles


def seeded_rng(purpose: int, *seeds: int) -> np.random.Generator:
    """An rng for a purpose and a list of seeds; any other purpose or list gives an independent one."""
    # numpy pads short lists with zeros, so their length is a seed too, and purposes are not 0
    return np.random.default_rng([purpose, len(seeds), *seeds])


FILE_ORDER, ROW_ORDER, NEXT_SOURCE, SAMPLE = 1, 2, 3, 4


def open_pass(
    source: DataSource, number: int, seeds: Sequence[int], rank: int, world_size: int, state: dict | None = None
) -> "SequenceReader | StreamReader":
    """
    A reader of the rows of this rank in one pass over a source.

    Args:
        number: of the pass. seeds: of the source. state: where to continue, from the reader's `state_dict`.

    Raises:
        TypeError: the source's rows can be neither indexed nor resumed.
    """
    if isinstance(source.rows, StreamedFiles) or hasattr(source.rows, "load_state_dict"):
        return StreamReader(source, number, seeds, rank, world_size, state)
    if hasattr(source.rows, "__len__") and hasattr(source.rows, "__getitem__"):
        return SequenceReader(source, number, seeds, rank, world_size, state)
    raise TypeError(
        f"Source {source.name!r} has rows of type {type(source.rows).__name__}, which cannot be resumed: pass a list, "
        "a datasets.Dataset or a datasets.IterableDataset (IterableDataset.from_generator makes one)."
    )


class SequenceReader:
    """
    One pass over rows that are read by index. A row's key is its index, the same on every rank.

    Args:
        number: of the pass. seeds: of the source. state: where to continue, from `state_dict`.
    """

    def __init__(
        self,
        source: DataSource,
        number: int,
        seeds: Sequence[int],
        rank: int,
        world_size: int,
        state: dict | None = None,
    ):
        self.rows = source.rows
        if hasattr(self.rows, "with_format"):  # a datasets.Dataset, whose features would decode images
            self.rows = self.rows.with_format("arrow")
        order = np.arange(len(self.rows))
        if source.shuffle:
            order = seeded_rng(ROW_ORDER, *seeds, number).permutation(len(self.rows))
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
    One pass over a `datasets` stream.

    Each rank reads its own shards (files) if their number is a multiple of `world_size`; otherwise it reads all rows
    and keeps every `world_size`-th. Rows are read in windows and shuffled inside them. A state holds the start of a
    window and an index into it, so resuming reads the window again and continues inside it. A row's key is the rank and
    the row's number in the rank's stream.

    Args: as of [`SequenceReader`].
    """

    def __init__(
        self,
        source: DataSource,
        number: int,
        seeds: Sequence[int],
        rank: int,
        world_size: int,
        state: dict | None = None,
    ):
        from datasets.distributed import split_dataset_by_node

        self.seeds, self.rank = [*seeds, number, rank], rank
        self.window = source.shuffle_window if source.shuffle else 1
        files = isinstance(source.rows, StreamedFiles)
        order = seeded_rng(FILE_ORDER, *seeds, number) if source.shuffle else None
        dataset = source.rows.open(order) if files else source.rows
        if dataset.features is not None:
            dataset = dataset.decode(False)
        by_shard = dataset.num_shards % world_size == 0
        # Rows are counted here: some versions of `datasets` give rank 0 all of them.
        self.step, self.offset = (1, 0) if by_shard else (world_size, rank)
        self.dataset = split_dataset_by_node(dataset, *((rank, world_size) if by_shard else (0, 1)))
        if source.shuffle and not files:
            self.dataset.set_epoch(number)
        # the window: number of its first row, the next index in it, its rows, the state of the stream before it
        self.first, self.index, self.before = 0, 0, self.dataset.state_dict()
        self.rows: list[tuple[int, dict]] = []
        if state is not None:
            self.first, self.before = state["first"], state["before"]
            self.dataset.load_state_dict(self.before)
        if torch.utils.data.get_worker_info() is not None:
            import fsspec.asyn

            fsspec.asyn.reset_lock()  # a forked worker inherits a lock that its parent may hold
        # `iter` and not `__iter__`, which would share rows between the workers of a loader
        self.stream = self.dataset.iter(batch_size=1)
        if state is not None and state["place"] > 0:
            self._read_window()
            self.index = state["place"]

    def __next__(self) -> tuple[list[int], dict]:
        if self.index >= len(self.rows):
            self.first, self.before = self.first + len(self.rows), self.dataset.state_dict()
            self._read_window()
        if not self.rows:
            raise StopIteration
        offset, row = self.rows[self.index]
        self.index += 1
        return [self.rank, self.first + offset], row

    def _read_window(self) -> None:
        batches = zip(range(self.window * self.step), self.stream)
        kept = (batch for number, batch in batches if number % self.step == self.offset)
        rows = [{name: column[0] for name, column in batch.items()} for batch in kept]
        order = seeded_rng(ROW_ORDER, *self.seeds, self.first).permutation(len(rows))
        self.rows, self.index = [(int(index), rows[index]) for index in order], 0

    def state_dict(self) -> dict:
        return {"before": self.before, "first": self.first, "place": self.index}  # "place": as in existing checkpoints


class Row(NamedTuple):
    """
    A row as the mixture reads it.

    Args:
        ordinal: its number among all rows that the mixture read. source: index of its source.
        pass_number: of the pass over the source. key: identifies the row in that pass. content: as the source holds it.
    """

    ordinal: int
    source: int
    pass_number: int
    key: list[int]
    content: Any


class Mixture:
    """
    Rows of several sources. The next source is chosen at random, by weight, among those that have rows left. There are
    `epochs` passes over every source (`None` = endless), and in each pass each row comes once. A source that has no
    rows for this rank is left out.

    Args:
        first_pass: number of the first pass; other numbers give other orders.

    Raises:
        ValueError: on reading, if no source has a row for this rank.
    """

    def __init__(
        self, sources: Sequence[DataSource], seed: int, first_pass: int, epochs: int | None, rank: int, world_size: int
    ):
        self.sources, self.seed, self.rank, self.world_size = sources, seed, rank, world_size
        self.first_pass, self.end_pass = first_pass, None if epochs is None else first_pass + epochs
        self.ordinal = 0
        self.passes = [first_pass] * len(sources)
        self.readers: list[SequenceReader | StreamReader | None] = [None] * len(sources)
        self.counts = [0] * len(sources)  # rows read in the current pass
        self.empty = [False] * len(sources)

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        rng = seeded_rng(NEXT_SOURCE, self.seed, self.rank, self.ordinal)
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
        """Key and content of a source's next row; `None` where a pass ends."""
        reader = self.readers[index]
        if reader is None:
            reader = self.readers[index] = self._open(index)
        try:
            read = next(reader)
        except StopIteration:
            self.empty[index] = self.counts[index] == 0
            self.passes[index] += 1
            self.readers[index], self.counts[index] = None, 0
            return None
        self.counts[index] += 1
        return read

    def _open(self, index: int, state: dict | None = None) -> "SequenceReader | StreamReader":
        seeds = [self.seed, index]
        return open_pass(self.sources[index], self.passes[index], seeds, self.rank, self.world_size, state)

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
