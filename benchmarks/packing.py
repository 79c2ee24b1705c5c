# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""How full training packs are, and how fast they are planned and made, on a synthetic mixed set at released sizes.

python benchmarks/packing.py [--samples 4000] [--seed 0]

The set is what the released recipe mixes: text-to-image, editing (one or two steps), questions about one to three
pictures, and text alone. Fill is tokens / max_num_tokens, over every pack but the last of the epoch (it holds what is
left). The released rule is simulated on the same samples: rows as they come, a pack ends once it holds
expected_num_tokens, up to 50 samples that do not fit wait in a buffer.
"""

import argparse
import time
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from bagel.image_processing_bagel import BagelImageProcessor
from bagel.processing_bagel import BagelProcessor
from bagel.shapes.tokenizer import build_tiny_tokenizer
from bagel.training import DataSource, PackedDataset


REPOSITORY = Path(__file__).resolve().parent.parent


WEIGHTS = {"t2i": 1.0, "editing": 1.0, "vlm": 1.0, "text": 0.5}


def picture(rng: np.random.Generator) -> bytes:
    """A white picture of a random size; its file is small, its tokens are not."""
    side, ratio = rng.integers(320, 1600), rng.choice([0.5, 0.67, 0.75, 1.0, 1.33, 1.5, 2.0])
    size = (int(side), max(64, int(side * ratio)))
    file = BytesIO()
    Image.new("1", size, 1).save(file, "PNG")
    return file.getvalue()


def words(rng: np.random.Generator, mean: float) -> str:
    return " ".join(["word"] * max(1, int(rng.exponential(mean))))


def row(kind: str, rng: np.random.Generator) -> dict:
    """A conversation of a kind."""
    image = {"type": "image"}

    def text(mean: float) -> dict:
        return {"type": "text", "text": words(rng, mean)}

    if kind == "t2i":
        turns = [[text(40)], [image]]
    elif kind == "editing":
        turns = [[image, text(12)], [image]] + [[text(12)], [image]] * int(rng.integers(2))
    elif kind == "vlm":
        turns = [[image] * int(rng.integers(1, 4)) + [text(15)], [text(80)]]
        turns += [[text(15)], [text(60)]] * int(rng.integers(3))
    else:
        turns = [[text(60)], [text(300)]]
    messages = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(turns)]
    images = [picture(rng) for content in turns for item in content if item is image]
    return {"messages": messages, "images": images}


def released_rule(lengths: list[int], expected: int, maximum: int, waiting_limit: int = 50) -> tuple[float, int]:
    """What the released packer makes of samples of these lengths: fill, and how many samples it drops on the way."""
    packs, tokens, dropped, waiting, rows = [], 0, 0, [], iter(lengths)
    while True:
        from_waiting = tokens < 16384 and bool(waiting)
        length = waiting.pop(0) if from_waiting else next(rows, None)
        if length is None:
            return float(np.mean(packs)) / maximum, dropped
        if tokens + length > maximum:
            if len(waiting) < waiting_limit and not from_waiting:
                waiting.append(length)
                continue
            packs.append(tokens)
            tokens, dropped = 0, dropped + 1
            continue
        tokens += length
        if tokens >= expected:
            packs.append(tokens)
            tokens = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--max-num-tokens", type=int, default=36864)
    parser.add_argument("--look-ahead", type=int, default=64)
    parser.add_argument("--made", type=int, default=4, help="packs that are also decoded")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    tokenizer = build_tiny_tokenizer(["word word"])
    image_processor = BagelImageProcessor()
    processor = BagelProcessor(image_processor, tokenizer)
    rng = np.random.default_rng(arguments.seed)
    share = {kind: weight / sum(WEIGHTS.values()) for kind, weight in WEIGHTS.items()}
    sources = [
        DataSource(
            kind,
            [row(kind, rng) for _ in range(int(arguments.samples * share[kind]))],
            weight=weight,
            share_max_pixels=kind == "vlm",
        )
        for kind, weight in WEIGHTS.items()
    ]
    dataset = PackedDataset(
        sources,
        processor,
        max_num_tokens=arguments.max_num_tokens,
        look_ahead=arguments.look_ahead,
        seed=arguments.seed,
    )

    start = time.perf_counter()
    plan = dataset.plan()
    packs = list(plan)
    seconds = time.perf_counter() - start
    lengths = [pack.num_tokens for pack in packs]
    samples = sorted((sample for pack in packs for sample in pack.samples), key=lambda sample: sample.ordinal)
    budget = dataset.budget
    full = np.array(lengths[:-1]) / budget.max_num_tokens
    per_source = Counter(sources[sample.source].name for sample in samples)
    tokens_of = [sample.num_tokens for sample in samples]
    fill, dropped = released_rule(tokens_of, budget.expected_num_tokens, budget.max_num_tokens)
    print(f"samples            {len(samples)} packed, {plan.num_skipped} skipped ({dict(per_source)})")
    print(f"tokens per sample  median {int(np.median(tokens_of))}, 5 to 95 % {np.percentile(tokens_of, [5, 95])}")
    print(f"packs              {len(packs)} of at most {budget.max_num_tokens} tokens, look-ahead {budget.look_ahead}")
    print(f"fill               mean {full.mean():.2%}, worst {full.min():.2%}, below 97 %: {(full < 0.97).mean():.1%}")
    print(f"  with the last    {np.mean(lengths) / budget.max_num_tokens:.2%}")
    print(f"  released rule    {fill:.2%}, and {dropped} samples lost")
    print(f"planning           {1000 * seconds / len(samples):.2f} ms per sample, {len(packs) / seconds:.1f} packs/s")

    start, made = time.perf_counter(), []
    for pack in dataset:
        made.append(pack["sequence_length"])
        if len(made) == arguments.made:
            break
    seconds = time.perf_counter() - start
    print(
        f"making             {seconds / len(made):.2f} s per pack in one process, {sum(made) / seconds:,.0f} tokens/s"
    )


if __name__ == "__main__":
    main()
