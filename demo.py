# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""See it work: answers about a picture, draws one from text, edits one, and saves a sheet of all three.

    python demo.py [--model DIR] [--image FILE] [--output DIR]

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
QUESTION = "What is in the picture?"
DRAWING = "A red car in front of a blue house"
EDIT = "Make it night"


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
                sheet.paste(ImageOps.contain(item, (cell, cell)), (left, top))
            elif item is not None:
                text = "\n".join(textwrap.fill(line, 32) for line in item.splitlines())
                pen.multiline_text((left, top), text[:600], fill="black", font=small, spacing=6)
    return sheet


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REPOSITORY / "checkpoints" / "tiny-random")
    parser.add_argument("--image", type=Path, default=REPOSITORY / "assets" / "cat.jpg")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "outputs" / "demo")
    parser.add_argument("--num-timesteps", type=int, default=50, help="knots of the sampler (49 steps by default)")
    arguments = parser.parse_args()
    logging.set_verbosity_error()

    start = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"Loading {arguments.model} on {device}")
    processor = AutoProcessor.from_pretrained(arguments.model, trust_remote_code=True)
    model = AutoModel.from_pretrained(arguments.model, trust_remote_code=True, dtype="auto").to(device).eval()
    image = Image.open(arguments.image).convert("RGB")

    print(f"\nAsking: {QUESTION}")
    answer = ask(model, processor, image, QUESTION)
    print(f"Answer: {answer!r}")
    print(f"\nDrawing: {DRAWING}")
    drawing = draw(model, processor, DRAWING, num_timesteps=arguments.num_timesteps)
    print(f"\nEditing: {EDIT}")
    edited = draw(model, processor, EDIT, image, num_timesteps=arguments.num_timesteps)

    rows = [
        (f"Ask\n\n{QUESTION}", image, f"Answer\n\n{answer}"),
        (f"Draw\n\n{DRAWING}", None, drawing),
        (f"Edit\n\n{EDIT}", image, edited),
    ]
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "contact_sheet.png"
    contact_sheet(rows, f"BAGEL: {arguments.model.name}").save(file)
    print(f"\nDone in {time.perf_counter() - start:.0f} s. Look at {file}")
    if arguments.model.name == "tiny-random":
        print("The embedded checkpoint has random weights: its answers and pictures are noise. What you saw is the")
        print("whole path at work; `python convert_bagel.py adopt DIR` makes the released 7B weights loadable.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
