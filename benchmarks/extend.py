# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures larger than a model was trained on, with interpolated positions and without, as a sheet.

python benchmarks/extend.py [--model DIR] [--size PIXELS] [--factor 2] [--prompt TEXT ...] [--output FILE]

`--size` is the side of the pictures in training; by default that of the whole latent position table. A larger table
than that is cut to it first, so that "the table" is what was trained. Columns: the trained size; then the larger size
without interpolation (the table continued by its formula: positions that no training has seen), and with
interpolate_pos="fit" (positions between the trained ones; for square pictures "bilinear" is the same).
"""

import argparse
import math
import sys
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModel, AutoProcessor, logging

from bagel.embeddings_bagel import BagelGridPositionEmbedding


REPOSITORY = Path(__file__).resolve().parent.parent


PROMPTS = (
    "draw a large red circle at the left on a white ground",
    "draw a large blue star at the top right on a black ground",
    "draw a large green square at the top left and a large yellow triangle at the bottom right",
)


def set_table(model, side: int, interpolate_pos: bool | str) -> None:
    """
    Give the model a latent position table of another side: its own entries, and beyond them those of the formula.
    """
    old, known = model.latent_pos_embed, model.config.max_latent_size
    new = BagelGridPositionEmbedding(side, old.hidden_size).to(old.pos_embed)
    shared = min(side, known)
    corner = old.pos_embed.unflatten(0, (known, known))[:shared, :shared]
    new.pos_embed.unflatten(0, (side, side))[:shared, :shared] = corner
    model.latent_pos_embed, model.config.max_latent_size = new, side
    model.config.interpolate_pos = interpolate_pos


def draw(model, processor, prompt: str, side: int, seed: int, options: dict) -> Image.Image:
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": prompt}]}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        generation_mode="image",
    ).to(model.device)
    generator = torch.Generator().manual_seed(seed)
    options = {**options, "height": side, "width": side, "generator": generator}
    return model.generate(**inputs, generation_mode="image", **options)[0]


def sheet_of(prompts: list[str], columns: dict[str, list[Image.Image]], cell: int) -> Image.Image:
    """One row per prompt; pictures keep their relative sizes."""
    margin, head, left = 16, 56, 180
    scale = cell / max(picture.width for pictures in columns.values() for picture in pictures)
    widths = [max(round(pictures[0].width * scale), 170) for pictures in columns.values()]
    size = (left + sum(widths) + margin * (len(widths) + 1), head + len(prompts) * (cell + margin))
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for row, prompt in enumerate(prompts):
        corner = (margin, head + row * (cell + margin))
        pen.multiline_text(corner, textwrap.fill(prompt, 20), fill="black", font=font, spacing=5)
    x = left
    for width, (title, pictures) in zip(widths, columns.items()):
        pen.multiline_text((x, 8), title, fill="black", font=font, spacing=4)
        for row, picture in enumerate(pictures):
            shown = picture.resize([round(edge * scale) for edge in picture.size], Image.Resampling.NEAREST)
            sheet.paste(shown, (x, head + row * (cell + margin)))
        x += width + margin
    return sheet


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REPOSITORY / "checkpoints" / "tiny-shapes")
    parser.add_argument("--size", type=int, help="side of the pictures in training, in pixels")
    parser.add_argument("--factor", type=float, default=2.0)
    parser.add_argument("--prompt", nargs="+", default=list(PROMPTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-timesteps", type=int, default=50)
    parser.add_argument("--timestep-shift", type=float, default=3.0)
    parser.add_argument("--cfg-text-scale", type=float, default=4.0)
    parser.add_argument("--cell", type=int, default=256, help="pixels of the larger pictures on the sheet")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "outputs" / "extend.png")
    arguments = parser.parse_args()
    logging.set_verbosity_error()

    processor = AutoProcessor.from_pretrained(arguments.model, trust_remote_code=True)
    model = AutoModel.from_pretrained(arguments.model, trust_remote_code=True, dtype="auto").eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    stride = model.config.latent_downsample
    trained = (arguments.size or model.config.max_latent_size * stride) // stride
    if not 1 <= trained <= model.config.max_latent_size:
        parser.error(f"--size {arguments.size} is not within the table: {model.config.max_latent_size * stride} pixels")
    larger = math.ceil(trained * arguments.factor)
    names = ("num_timesteps", "timestep_shift", "cfg_text_scale")
    options = {name: getattr(arguments, name) for name in names}

    set_table(model, trained, False)  # of a larger table, only what was trained
    columns = {}
    for title, side, table, mode in (
        (f"{trained * stride} pixels,\nas trained", trained, trained, False),
        (f"{larger * stride} pixels,\nno interpolation", larger, larger, False),
        (f'{larger * stride} pixels,\ninterpolate_pos="fit"', larger, trained, "fit"),
    ):
        set_table(model, table, mode)
        columns[title] = [
            draw(model, processor, prompt, side * stride, arguments.seed + number, options)
            for number, prompt in enumerate(arguments.prompt)
        ]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    sheet_of(arguments.prompt, columns, arguments.cell).save(arguments.output)
    print(f"Look at {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
