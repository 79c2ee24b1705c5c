# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Measures a model of the shapes world: what it draws, answers and edits, judged from pixels.

    bagel eval [CHECKPOINT] [--number 500] [--output outputs/evaluation]

All prompts are about combinations of colour, shape and place that training never shows. Prints a table, writes
`evaluation.json` and a sheet of images. It uses the public API and `shapes/world.py`.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

from ..shapes.world import Task, held_out_tasks, judge, psnr_outside, render


REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLE = "bagel eval checkpoints/tiny-shapes --number 100 --output outputs/evaluation"
KEPT = 24.0  # dB: an edit keeps the rest if the PSNR outside what it changes is at least this
TARGETS = {"drawings": 0.95, "answers": 0.97, "edits": 0.92}


class Outcome(NamedTuple):
    """
    What a model made of a task.

    Args:
        made: an image, or an answer.
        right: whether it does what the task says; edits also have to keep the rest. fully: size and ground included.
        kept: of edits, the PSNR in dB outside what is changed.
    """

    task: Task
    made: Image.Image | str
    right: bool
    fully: bool
    kept: float | None = None


# --------------------------------------------------------------------------------------------------------------------
# Doing tasks


def prepare(processor: Any, tasks: Sequence[Task], mode: str) -> Any:
    """The prompts of a batch of tasks as model inputs."""
    rows = [task.row() for task in tasks]
    conversations = []
    for row in rows:
        images = iter(row["images"])
        content = [
            {"type": "image", "image": next(images)} if item["type"] == "image" else item
            for item in row["messages"][0]["content"]
        ]
        conversations.append([{"role": "user", "content": content}])
    return processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_tensors="pt", padding=True, generation_mode=mode
    )


def draw(model: Any, processor: Any, tasks: Sequence[Task], seed: int, **options) -> list[Outcome]:
    """Drawings or edits of a batch; task `n` starts from the noise of `seed + n`. `options`: of `generate`."""
    generators = [torch.Generator().manual_seed(seed + number) for number in range(len(tasks))]
    inputs = prepare(processor, tasks, "image").to(model.device)
    pictures = model.generate(**inputs, generation_mode="image", generator=generators, progress_bar=False, **options)
    return [_judged(task, picture) for task, picture in zip(tasks, pictures)]


def _judged(task: Task, picture: Image.Image) -> Outcome:
    assert task.wish is not None
    seen = judge(picture)
    right, fully = task.wish.is_granted(seen), task.wish.is_granted_fully(seen)
    if task.start is None:
        return Outcome(task, picture, right, fully)
    kept = psnr_outside(picture, render(task.start), task.changed)
    return Outcome(task, picture, right and kept >= KEPT, fully and kept >= KEPT, kept)


def answer(model: Any, processor: Any, tasks: Sequence[Task], seed: int) -> list[Outcome]:
    """Greedy answers of a batch; right if equal to the true answer, letter by letter. `seed` has no effect."""
    inputs = prepare(processor, tasks, "text").to(model.device)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=48)
    texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [Outcome(task, text, text == task.answer, text == task.answer) for task, text in zip(tasks, texts)]


def run(
    do: Callable[..., list[Outcome]], tasks: Sequence[Task], batch_size: int, label: str, **options
) -> list[Outcome]:
    """Do all tasks with `do` (`draw` or `answer`) in batches, with a progress bar."""
    outcomes = []
    with tqdm(total=len(tasks), desc=label) as progress:
        for first in range(0, len(tasks), batch_size):
            outcomes += do(tasks=tasks[first : first + batch_size], seed=first, **options)
            progress.update(min(batch_size, len(tasks) - first))
            progress.set_postfix(right=f"{share(outcomes):.1%}")
    return outcomes


def share(outcomes: Sequence[Outcome], field: str = "right") -> float:
    """The share of outcomes that are `right` (or another field)."""
    return sum(getattr(outcome, field) for outcome in outcomes) / max(len(outcomes), 1)


def evaluate(model: Any, processor: Any, number: int, batch_size: int = 50, **options) -> dict[str, list[Outcome]]:
    """
    Do `number` held-out tasks of every kind, drawings and edits also without guidance.

    Args:
        options: arguments of `generate` for drawings and edits.

    Returns:
        The outcomes by the name of the kind, as in the table.
    """
    common = {"model": model, "processor": processor}
    drawing, asking, editing = (held_out_tasks(kind, number) for kind in ("draw", "ask", "edit"))
    unguided = options | {"cfg_text_scale": 1.0, "cfg_img_scale": 1.0}
    return {
        "drawings": run(draw, drawing, batch_size, "drawings", **common, **options),
        "drawings, no guidance": run(draw, drawing, batch_size, "drawings, no guidance", **common, **unguided),
        "answers": run(answer, asking, batch_size, "answers", **common),
        "edits": run(draw, editing, batch_size, "edits", **common, **options),
        "edits, no guidance": run(draw, editing, batch_size, "edits, no guidance", **common, **unguided),
    }


# --------------------------------------------------------------------------------------------------------------------
# Reporting


def summary(results: dict[str, list[Outcome]]) -> dict[str, dict[str, float]]:
    """Shares of right outcomes and their targets by kind, and for edits how well the rest was kept."""
    numbers = {}
    for name, outcomes in results.items():
        numbers[name] = {"number": len(outcomes), "right": share(outcomes), "right_fully": share(outcomes, "fully")}
        if name in TARGETS:
            numbers[name]["target"] = TARGETS[name]
    edits: list[Any] = results["edits"]
    numbers["edits"]["as_wished"] = sum(edit.task.wish.is_granted(judge(edit.made)) for edit in edits) / len(edits)
    numbers["edits"]["rest_kept"] = sum(edit.kept >= KEPT for edit in edits) / len(edits)
    numbers["edits"]["median_psnr_outside"] = sorted(edit.kept for edit in edits)[len(edits) // 2]
    return numbers


def table(numbers: dict[str, dict[str, float]]) -> str:
    """The summary as text."""
    lines = [f"{'':<24}{'right':>8}{'target':>8}   and in size and ground"]
    for name, row in numbers.items():
        target = f"{row['target']:.0%}" if "target" in row else ""
        verdict = "" if "target" not in row else "  reached" if row["right"] >= row["target"] else "  MISSED"
        lines.append(f"{name:<24}{row['right']:>8.1%}{target:>8}{row['right_fully']:>10.1%}{verdict}")
    edits = numbers["edits"]
    lines.append(
        f"edits: {edits['as_wished']:.1%} as wished, {edits['rest_kept']:.1%} with the rest kept at {KEPT:.0f} dB or "
        f"more (median {edits['median_psnr_outside']:.1f} dB)"
    )
    return "\n".join(lines)


def sheet(results: dict[str, list[Outcome]], columns: int = 6, rows: int = 2) -> Image.Image:
    """The first drawings, edits (before and after) and answers; a red frame marks those that are wrong."""
    cell, gap, text = 128, 14, 46
    kinds = [name for name in ("drawings", "edits", "answers") if name in results]
    width, height = columns * (2 * cell + gap) + gap, len(kinds) * rows * (cell + text + gap) + gap
    image = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for number, name in enumerate(kinds):
        for index, outcome in enumerate(results[name][: rows * columns]):
            left = gap + index % columns * (2 * cell + gap)
            top = gap + (number * rows + index // columns) * (cell + text + gap)
            pictures = [render(outcome.task.start)] if outcome.task.start is not None else []
            pictures += [outcome.made] if isinstance(outcome.made, Image.Image) else []
            for column, picture in enumerate(pictures):
                corner = (left + column * cell, top)
                image.paste(picture.resize((cell - 4, cell - 4), Image.Resampling.NEAREST), corner)
                pen.rectangle((*corner, corner[0] + cell - 5, corner[1] + cell - 5), outline="grey")
            if not outcome.right:
                pen.rectangle(
                    (left - 3, top - 3, left + len(pictures) * cell - 2, top + cell - 2), outline="red", width=3
                )
            words = outcome.task.prompt if name != "answers" else f"{outcome.task.prompt}\n{outcome.made}"
            pen.multiline_text((left, top + cell), _wrapped(words, 2 * cell, font), fill="black", font=font)
    return image


def _wrapped(text: str, width: int, font: Any) -> str:
    lines = []
    for paragraph in text.split("\n"):
        lines.append("")
        for word in paragraph.split():
            longer = f"{lines[-1]} {word}".strip()
            lines = [*lines[:-1], longer] if font.getlength(longer) <= width else [*lines, word]
    return "\n".join(lines)


def parse(arguments: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog, description=__doc__, epilog=f"example:\n  {EXAMPLE}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    embedded = REPOSITORY / "checkpoints" / "tiny-shapes"
    parser.add_argument("checkpoint", type=Path, nargs="?", default=embedded, help="by default the embedded model")
    parser.add_argument("--number", type=int, default=500, help="tasks of each kind (500)")
    parser.add_argument("--batch-size", type=int, default=50, help="tasks at once (50)")
    parser.add_argument("--num-timesteps", type=int, default=50, help="knots of the sampler (50, that is 49 steps)")
    parser.add_argument("--cfg-text-scale", type=float, default=4.0, help="guidance towards the text (4.0)")
    parser.add_argument("--cfg-img-scale", type=float, default=1.5, help="guidance towards the edited image (1.5)")
    parser.add_argument("--output", type=Path, default=Path("outputs/evaluation"), help="folder of numbers and sheet")
    options = parser.parse_args(arguments)
    if not options.checkpoint.is_dir():
        parser.error(f"there is no {options.checkpoint}: `make tiny-shapes` trains it, or name another folder")
    return options


def main(arguments: list[str] | None = None, prog: str | None = "bagel eval") -> int:
    """Exit code 0: done. Raises `SystemExit`: 2 after wrong arguments, 0 after `--help`."""
    chosen = parse(arguments, prog)
    options = {name: getattr(chosen, name) for name in ("num_timesteps", "cfg_text_scale", "cfg_img_scale")}
    transformers.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(chosen.checkpoint, trust_remote_code=True)
    model = AutoModel.from_pretrained(chosen.checkpoint, trust_remote_code=True, dtype="float32").to(device).eval()
    began = time.perf_counter()
    results = evaluate(model, processor, chosen.number, chosen.batch_size, **options)
    numbers = summary(results)
    chosen.output.mkdir(parents=True, exist_ok=True)
    record = {
        "checkpoint": chosen.checkpoint.name,
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "seconds": round(time.perf_counter() - began),
        "options": options,
        "results": numbers,
    }
    (chosen.output / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    sheet(results).save(chosen.output / "sheet.png")
    print(table(numbers))
    print(f"{record['seconds']} s on {device}. Look at {chosen.output / 'sheet.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
