# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""See it work: draws an image from text, answers a question about it, edits it, and saves a sheet of all three.

    bagel demo [--model DIR] [--image FILE] [--drawing TEXT] [--question TEXT] [--edit TEXT] [--output DIR]
    python demo.py ...      the same in a folder from the Hub, where the package is not installed

It uses the public API only: its functions are examples to copy from.
"""

import argparse
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from transformers import AutoModel, AutoProcessor, logging


REPOSITORY = Path(__file__).resolve().parent
EMBEDDED = REPOSITORY / "checkpoints" / "tiny-shapes"
EXAMPLE = 'bagel demo --drawing "draw a small blue star at the top" --edit "make the star red" --output outputs/demo'
# The embedded model knows shapes only. `None`: it is asked about the image that it has just drawn, and edits that.
SHAPES = {
    "drawing": "draw a large red circle at the left and a small blue star at the right on a white ground",
    "question": "describe the picture.",
    "edit": "make the circle green",
    "image": None,
}
ANYTHING = {
    "drawing": "A red car in front of a blue house",
    "question": "What is in the picture?",
    "edit": "Make it night",
    "image": REPOSITORY / "assets" / "cat.jpg",
}


def ask(model: Any, processor: Any, image: Image.Image, question: str, max_new_tokens: int = 32) -> str:
    """The model's answer to a question about an image."""
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def draw(
    model: Any, processor: Any, prompt: str, image: Image.Image | None = None, seed: int = 0, **options: Any
) -> Image.Image:
    """Draw an image from a text, or edit one; `options` are arguments of `generate`."""
    content: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
    if image is not None:
        content.insert(0, {"type": "image", "image": image})
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        generation_mode="image",
    )
    generator = torch.Generator().manual_seed(seed)
    return model.generate(**inputs.to(model.device), generation_mode="image", generator=generator, **options)[0]


def contact_sheet(rows: list[tuple[str, Image.Image | None, Image.Image | str]], title: str) -> Image.Image:
    """One row per task: what was asked, the image given, the image or answer made."""
    cell, margin, head = 280, 24, 64
    width, height = 3 * cell + 4 * margin, head + len(rows) * (cell + margin) + margin
    sheet = Image.new("RGB", (width, height), "white")
    pen, large, small = ImageDraw.Draw(sheet), ImageFont.load_default(22), ImageFont.load_default(16)
    pen.text((margin, margin), title, fill="black", font=large)
    for number, row in enumerate(rows):
        top = head + margin + number * (cell + margin)
        for column, item in enumerate(row):
            left = margin + column * (cell + margin)
            if isinstance(item, Image.Image):
                small_picture = max(item.size) < cell
                resample = Image.Resampling.NEAREST if small_picture else Image.Resampling.BICUBIC
                picture = ImageOps.expand(ImageOps.contain(item, (cell - 2, cell - 2), resample), 1, "grey")
                sheet.paste(picture, (left, top))
            elif item is not None:
                text = "\n".join(textwrap.fill(line, 32) for line in item.splitlines())
                pen.multiline_text((left, top), text[:600], fill="black", font=small, spacing=6)
    return sheet


def parse(arguments: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog, description=__doc__, epilog=f"example:\n  {EXAMPLE}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="folder or id; by default the embedded model")
    parser.add_argument("--image", type=Path, help="to ask about and to edit; by default the image just drawn")
    parser.add_argument("--drawing", help="what to draw")
    parser.add_argument("--question", help="what to ask about the image")
    parser.add_argument("--edit", help="what to change in it")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder of the sheet")
    parser.add_argument("--num-timesteps", type=int, default=50, help="knots of the sampler (50, that is 49 steps)")
    options = parser.parse_args(arguments)
    if options.image is not None and not options.image.is_file():
        parser.error(f"there is no {options.image}")
    return options


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Exit code 0: done. Raises `SystemExit`: 2 after wrong arguments, 0 after `--help`."""
    options = parse(arguments, prog)
    logging.set_verbosity_error()
    defaults = SHAPES if options.model.resolve() == EMBEDDED else ANYTHING
    chosen: dict[str, Any] = {name: getattr(options, name) or default for name, default in defaults.items()}
    steps = {"num_timesteps": options.num_timesteps}

    start = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"Loading {options.model} on {device}")
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    model = AutoModel.from_pretrained(options.model, trust_remote_code=True, dtype="auto").to(device).eval()

    print(f"\nDrawing: {chosen['drawing']}")
    drawing = draw(model, processor, chosen["drawing"], **steps)
    image = drawing if chosen["image"] is None else Image.open(chosen["image"]).convert("RGB")
    print(f"\nAsking: {chosen['question']}")
    answer = ask(model, processor, image, chosen["question"])
    print(f"Answer: {answer!r}")
    print(f"\nEditing: {chosen['edit']}")
    edited = draw(model, processor, chosen["edit"], image, **steps)

    rows: list[tuple[str, Image.Image | None, Image.Image | str]] = [
        (f"Draw\n\n{chosen['drawing']}", None, drawing),
        (f"Ask\n\n{chosen['question']}", image, f"Answer\n\n{answer}"),
        (f"Edit\n\n{chosen['edit']}", image, edited),
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "contact_sheet.png"
    contact_sheet(rows, f"BAGEL: {options.model.name}").save(file)
    print(f"\nDone in {time.perf_counter() - start:.0f} s. Look at {file}")
    if options.model.resolve() == EMBEDDED:
        print(
            "The embedded model knows coloured shapes and nothing else. For the released weights: `bagel adopt DIR`,\n"
            "then `bagel demo --model DIR` (where the package is not installed: `python convert_bagel.py adopt DIR`,\n"
            "`python demo.py --model DIR`)."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
