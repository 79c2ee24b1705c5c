# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Rows to training packs: `PackedDataset`, and the planner that decides which samples share a pack.

    rows of the mixture -> outlines (lengths known, images not decoded) -> packs of outlines -> packs of tensors

All random numbers of a sample (caption, dropout, timesteps) follow from the seed and the row itself. So a sample is the
same in whatever pack it is and whichever worker makes it.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from ..conversations_bagel import Outline
from ..packing_bagel import RandomizedSample, pack, randomize, with_labels
from .mixture import SAMPLE, Mixture, Row, seeded_rng
from .sources import DataSource


logger = logging.get_logger(__name__)


# --------------------------------------------------------------------------------------------------------------------
# Which samples share a pack


class Skipped(NamedTuple):
    """A sample that was left out, and why."""

    name: str
    reason: str


class UnusableSample(Exception):
    """A sample cannot be used: its name, and the error that says why."""

    def __init__(self, name: str, error: Exception):
        super().__init__(name, f"{type(error).__name__}: {error}")

    @property
    def record(self) -> Skipped:
        return Skipped(*self.args)


class Waiting(NamedTuple):
    """A sample that waits to be packed; `ordinal` and `source` are those of its [`Row`]."""

    ordinal: int
    source: int
    outline: Outline
    sample: RandomizedSample
    num_tokens: int


class PlannedPack(NamedTuple):
    """The samples of pack `number`, and those skipped since the pack before it."""

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
        max_num_tokens: the most tokens of a pack.
        expected_num_tokens: for a pack with fewer tokens, up to `look_ahead` more samples are read to find ones that
            fit. By default 8/9 of `max_num_tokens`, as released.
        max_num_tokens_per_sample: a longer sample is skipped; by default `max_num_tokens`.
        look_ahead: how many samples wait to be packed.

    Raises:
        ValueError: a number is not positive or above `max_num_tokens`.
    """

    max_num_tokens: int
    expected_num_tokens: Any = None  # int after __post_init__
    max_num_tokens_per_sample: Any = None
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
        """Raise `ValueError` for a sample that is too long."""
        if sample.num_tokens > self.max_num_tokens_per_sample:
            raise ValueError(
                f"it has {sample.num_tokens} tokens, more than max_num_tokens_per_sample="
                f"{self.max_num_tokens_per_sample}"
            )


class PackPlanner:
    """
    The packs of a rank in order, as outlines.

    A pack starts with the sample that was read first of all that wait, so none waits for more than `2 * look_ahead`
    packs. Then the longest waiting sample that fits is added, until none fits.

    The state holds no samples. It holds a state of the mixture from before the first waiting sample was read, and the
    ordinals of all that wait; resuming reads the rows from there again and keeps those.

    Args:
        mixture: the rows. outline: `f(row) -> Waiting`, which may raise [`UnusableSample`].

    Raises:
        ValueError: on iteration, if no sample of the first packs, or of a whole pass over a source, can be used.
    """

    def __init__(self, mixture: Mixture, outline: Callable[[Row], Waiting], budget: Budget):
        self.mixture, self.outline, self.budget = mixture, outline, budget
        self.number = 0
        self.waiting: list[Waiting] = []
        self.skipped: list[Skipped] = []
        self.num_skipped = 0
        self.usable: dict[int, tuple[int, int]] = {}  # source -> (number of its pass, usable samples in that pass)
        # States of the mixture between packs. The first is the last one from before the first waiting sample was read.
        self.history = deque([mixture.state_dict()])

    def __iter__(self) -> Iterator[PlannedPack]:
        return self

    def __next__(self) -> PlannedPack:
        self._remember()
        while len(self.waiting) < self.budget.look_ahead and self._read():
            pass
        if not self.waiting:
            if self.number == 0 and self.num_skipped:
                raise ValueError(f"None of {self.num_skipped} samples could be used. {_last_of(self.skipped)}")
            raise StopIteration
        planned = PlannedPack(self.number, self._compose(), self.skipped)
        self.number, self.skipped = self.number + 1, []
        return planned

    def _compose(self) -> list[Waiting]:
        """Take the samples of the next pack from those that wait."""
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
        """Read rows until one is a usable sample, which then waits; `False` if there are no more rows."""
        for row in self.mixture:
            self._check_source(row)
            if self._admit(row):
                self.usable[row.source] = (row.pass_number, self.usable[row.source][1] + 1)
                return True
        return False

    def _admit(self, row: Row) -> bool:
        """Outline a row and let it wait, or count it as skipped."""
        try:
            self.waiting.append(self.outline(row))
        except UnusableSample as unusable:
            self.num_skipped += 1
            self.skipped.append(unusable.record)
            return False
        return True

    def _check_source(self, row: Row) -> None:
        """Refuse a source of which a whole pass was skipped: an endless stream would read it forever."""
        number, count = self.usable.get(row.source, (row.pass_number, 0))
        if number != row.pass_number:
            if count == 0:
                name = self.mixture.sources[row.source].name
                raise ValueError(f"A whole pass over source {name!r} was skipped. {_last_of(self.skipped)}")
            number, count = row.pass_number, 0
        self.usable[row.source] = (number, count)

    # ---- state

    def _remember(self) -> None:
        """Add the mixture's state to the history, and drop those that are older than needed."""
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
    """`source:id`, with the row's own id or, if it has none, its key."""
    own = content.get("id") if isinstance(content, Mapping) else None
    return f"{source.name}:{'/'.join(map(str, row.key)) if own is None else own}"


def _last_of(skipped: list[Skipped]) -> str:
    return "The last ones: " + "; ".join(f"{name}: {reason}" for name, reason in skipped[-3:])


# --------------------------------------------------------------------------------------------------------------------
# The dataset


class PackedDataset(torch.utils.data.IterableDataset):
    """
    Training packs from a mixture of sources: a stream of keyword dicts for `BagelForUnifiedMultimodal.forward`.

    Load it with `batch_size=None` (or 1 and a [`PackCollator`]) and any number of workers, and with no other sharding.
    Packs and their order depend only on sources, seed, epoch, rank and world size. Each rank reads its own share of the
    rows. All workers of a rank read the same rows and compose the same packs (texts are tokenised, of images only the
    headers are read); worker `w` of `n` decodes and yields packs `w, w + n, ...`, which is the order in which a loader
    asks for them. (If decoding shows that all images of a pack are damaged, the pack is left out; with several workers
    this changes the order of the packs around it.)

    A sample that cannot be used (a broken image, nothing to learn, too long) is skipped, counted, and logged with its
    id and the reason. In a pass every other sample comes exactly once.

    `state_dict` and `load_state_dict` continue exactly after the last pack that was yielded. With
    `torchdata.stateful_dataloader.StatefulDataLoader` (and the same number of workers) this holds with prefetching too.

        data = PackedDataset([t2i_parquet("t2i/"), DataSource("mine", rows)], processor)
        for pack in StatefulDataLoader(data, batch_size=None, num_workers=4):
            model(**pack).loss.backward()

    Args:
        sources: a [`DataSource`] or several. processor: a `BagelProcessor`.
        expected_num_tokens, max_num_tokens, max_num_tokens_per_sample, look_ahead: see [`Budget`].
        seed (`int`): of order, mixture, dropout and timesteps.
        epochs (`int`, *optional*, defaults to 1): passes over each source in one iteration; `None` = endless.
        rank, world_size (`int`, *optional*): by default those of `torch.distributed`, or of the environment.
        report (`bool`): add `"report": {"sample_ids": [...], "skipped": [[id, reason], ...]}` to every pack. `forward`
            does not take it: pop it first.
        pack_options: keywords of [`packing_bagel.pack`], e.g. `{"pad_to": 36864}`.
        facts: fields of [`packing_bagel.PackingConfig`] that replace those of the processor, e.g.
            `text_cond_dropout_prob=0.0`.

    Raises:
        ValueError: sources have no or equal names, or an argument is out of its range.
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
        **facts: Any,
    ):
        self.sources = [sources] if isinstance(sources, DataSource) else list(sources)
        names = [source.name for source in self.sources]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"At least one source is needed, with names that differ; got {names}.")
        if seed < 0:
            raise ValueError(f"seed={seed} must not be negative.")
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs={epochs} must be at least 1, or None for an endless stream.")
        self.rank, self.world_size = _rank_and_world_size(rank, world_size)
        self.config = processor.packing_config.changed(**facts)
        self.planners = [source.planner(processor, self.config) for source in self.sources]
        self.seed, self.epochs, self.report = seed, epochs, report
        self.budget = Budget(max_num_tokens, expected_num_tokens, max_num_tokens_per_sample, look_ahead)
        self.pack_options = {"max_num_tokens": max_num_tokens, **(pack_options or {})}
        self._epoch = torch.tensor(0).share_memory_()  # shared with workers that persist over epochs
        self._packs: PackPlanner | None = None
        self._resume: dict | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_packs": None}  # an iteration is not copied to workers

    def set_epoch(self, epoch: int) -> None:
        """Number the next iteration: order, dropout and timesteps follow from it."""
        self._epoch.fill_(epoch)

    def plan(self) -> PackPlanner:
        """The packs as outlines, without decoding images; from the loaded state on if there is one."""
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
            if samples:  # otherwise the next pack reports what was skipped
                yield self._pack(samples, skipped)
                skipped = []

    def state_dict(self) -> dict:
        """The position after the last pack that was yielded: a few numbers, no samples."""
        stream = self._resume if self._packs is None or self._resume is not None else self._packs.state_dict()
        return {"epoch": int(self._epoch), "made_by": self._fingerprint(), "stream": stream}

    def load_state_dict(self, state: dict) -> None:
        """
        Continue from a state in the next iteration.

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
        """The settings that a state depends on."""
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
        """Convert and randomize a row with its own rng, without decoding its images."""
        source, planner = self.sources[row.source], self.planners[row.source]
        rng = seeded_rng(SAMPLE, self.seed, row.source, row.pass_number, *row.key)
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
        """The samples of a pack with decoded images, and those whose images are damaged."""
        assert self._packs is not None
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
        made = with_labels(pack(samples, self.config, **self.pack_options))
        if self.report:
            names = [sample.name for sample in samples]
            made["report"] = {"sample_ids": names, "skipped": [list(one) for one in skipped]}
        return made


def _rank_and_world_size(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """As given, otherwise those of `torch.distributed`, of the environment, or 0 of 1."""
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank={rank} and world_size={world_size}: pass both or none.")
    if rank is None and torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    elif rank is None or world_size is None:
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    assert world_size is not None
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is none of the {world_size} ranks 0 to {world_size - 1}.")
    return rank, world_size
