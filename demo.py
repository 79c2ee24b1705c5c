# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""See it work: draws a picture from text, answers a question about one, edits one, and saves a sheet of all three.

    bagel demo [--model DIR] [--image FILE] [--drawing TEXT] [--question TEXT] [--edit TEXT] [--output DIR]

A script over the public API only: everything here is what a user would type.
"""

import argparse
import sys
import textwrap
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from transformers import AutoModel, AutoProcessor, logging


REPOSITORY = Path(__file__).resolve().parent
EMBEDDED = REPOSITORY / "checkpoints" / "tiny-shapes"
# what the embedded model knows is shapes; without an image, the picture just drawn is asked about and edited
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


def ask(model, processor, image: Image.Image, question: str, max_new_tokens: int = 32) -> str:
    """The model's answer about a picture."""
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def draw(model, processor, prompt: str, image: Image.Image | None = None, seed: int = 0, **options) -> Image.Image:
    """A picture from a text, or an edited picture."""
    content = [{"type": "text", "text": prompt}]
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
    """One row per task: what was asked, what went in, what came out."""
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    parser.add_argument("--image", type=Path, help="to ask about and to edit; by default the picture just drawn")
    parser.add_argument("--drawing", help="what to draw")
    parser.add_argument("--question", help="what to ask about the picture")
    parser.add_argument("--edit", help="what to change in it")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--num-timesteps", type=int, default=50, help="knots of the sampler (49 steps by default)")
    arguments = parser.parse_args(arguments)
    logging.set_verbosity_error()
    defaults = SHAPES if arguments.model.resolve() == EMBEDDED else ANYTHING
    chosen = {name: getattr(arguments, name) or default for name, default in defaults.items()}
    steps = {"num_timesteps": arguments.num_timesteps}

    start = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"Loading {arguments.model} on {device}")
    processor = AutoProcessor.from_pretrained(arguments.model, trust_remote_code=True)
    model = AutoModel.from_pretrained(arguments.model, trust_remote_code=True, dtype="auto").to(device).eval()

    print(f"\nDrawing: {chosen['drawing']}")
    drawing = draw(model, processor, chosen["drawing"], **steps)
    image = drawing if chosen["image"] is None else Image.open(chosen["image"]).convert("RGB")
    print(f"\nAsking: {chosen['question']}")
    answer = ask(model, processor, image, chosen["question"])
    print(f"Answer: {answer!r}")
    print(f"\nEditing: {chosen['edit']}")
    edited = draw(model, processor, chosen["edit"], image, **steps)

    rows = [
        (f"Draw\n\n{chosen['drawing']}", None, drawing),
        (f"Ask\n\n{chosen['question']}", image, f"Answer\n\n{answer}"),
        (f"Edit\n\n{chosen['edit']}", image, edited),
    ]
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "contact_sheet.png"
    contact_sheet(rows, f"BAGEL: {arguments.model.name}").save(file)
    print(f"\nDone in {time.perf_counter() - start:.0f} s. Look at {file}")
    if arguments.model.resolve() == EMBEDDED:
        print(
            "The embedded model knows coloured shapes and nothing else; `python convert_bagel.py adopt DIR` makes the"
        )
        print("released 7B weights loadable, `python demo.py --model DIR` then shows them.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
