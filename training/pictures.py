# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of a training run: what it draws for sample prompts, as a sheet, and its loss curves; and the trackers."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from transformers import TrainerCallback
from transformers.utils import logging


logger = logging.get_logger(__name__)

LOSS_CURVE = "loss_curve.png"


def draw_prompt(
    model: Any, processor: Any, prompt: Mapping[str, Any], seed: int, **options: Any
) -> tuple[str, Image.Image | None, Image.Image]:
    """
    What a model draws for a sample prompt, as a row of `contact_sheet`.

    Args:
        prompt: `text`, and optionally the `image` to edit (a file or a PIL image).
        seed: of the initial noise. options: arguments of `generate`.

    Returns:
        The text, the image that was edited or `None`, the image that was drawn.
    """
    text, image = prompt["text"], prompt.get("image")
    image = Image.open(image) if isinstance(image, str | os.PathLike) else image
    image = None if image is None else ImageOps.exif_transpose(image).convert("RGB")
    content = [] if image is None else [{"type": "image", "image": image}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        generation_mode="image",
    ).to(model.device)
    generator = torch.Generator().manual_seed(seed)
    options = {"progress_bar": False, **options}
    return text, image, model.generate(**inputs, generation_mode="image", generator=generator, **options)[0]


def contact_sheet(rows: Sequence[tuple[str, Image.Image | None, Image.Image]], title: str) -> Image.Image:
    """A sheet with four cells a row: the image that was edited, if any, the one that was drawn, the prompt below."""
    cell, gap, text_height, columns = 256, 16, 56, min(4, max(1, len(rows)))
    with_inputs = any(image is not None for _, image, _ in rows)
    width = (2 * cell + gap if with_inputs else cell) + gap
    height = cell + text_height + gap
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * width + gap, lines * height + text_height + gap), "white")
    pen, large, small = ImageDraw.Draw(sheet), ImageFont.load_default(22), ImageFont.load_default(14)
    pen.text((gap, gap), title, fill="black", font=large)
    for number, (text, before, after) in enumerate(rows):
        left, top = gap + number % columns * width, text_height + gap + number // columns * height
        for column, image in enumerate(one for one in (before, after) if one is not None):
            sheet.paste(ImageOps.contain(image, (cell, cell)), (left + column * (cell + gap), top))
        wrapped = textwrap.wrap(text, (width - gap) // 8, max_lines=3, placeholder=" ...")
        pen.multiline_text((left, top + cell + 4), "\n".join(wrapped), fill="black", font=small)
    return sheet


def track_picture(callbacks: Sequence[TrainerCallback], picture: Image.Image, step: int) -> None:
    """Log a picture with the callbacks of TensorBoard and Weights & Biases, where they are in use."""
    for callback in callbacks:
        if (writer := getattr(callback, "tb_writer", None)) is not None:
            pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            writer.add_image("samples", pixels.view(picture.height, picture.width, 3), step, dataformats="HWC")
        if (wandb := getattr(callback, "_wandb", None)) is not None and getattr(wandb, "run", None) is not None:
            wandb.log({"samples": wandb.Image(picture), "train/global_step": step})


def plot_losses(history: Sequence[Mapping[str, float]], file: str | os.PathLike) -> bool:
    """
    Save a plot of loss, ce and mse over steps, of training and of evaluations.

    Returns:
        `False` if nothing was saved: matplotlib is not installed, or `history` holds no losses.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for log in history:
        for name in ("loss", "ce", "mse", "eval_loss", "eval_ce", "eval_mse"):
            if name in log:
                curves.setdefault(name, []).append((log["step"], log[name]))
    if not curves:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("No loss curve: `pip install matplotlib`.")
        return False
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, 3), ("loss", "ce", "mse")):
        for curve, style in ((name, "-"), (f"eval_{name}", "o--")):
            if curve in curves:
                axes.plot(*zip(*curves[curve]), style, label=curve, markersize=3, linewidth=1)
        axes.set(xlabel="step", title=name)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(loc="upper right")
    figure.savefig(file, dpi=110)
    return True
