# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Draws the two figures of docs/architecture.md: the way of a token and the way of an image.

python docs/figures.py [--output FOLDER]          (needs matplotlib; FOLDER is assets/ by default)

The mask in the first figure comes from `layout_bagel.visible`, the knots in the second from `flow_bagel.timestep_grid`.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from bagel.flow_bagel import timestep_grid
from bagel.layout_bagel import visible


ASSETS = Path(__file__).resolve().parent.parent / "assets"
INK, GREY, PAPER = "#222222", "#777777", "#FFFFFF"
UND, GEN, BOTH, PLAIN = "#FBE3B9", "#C9E2F3", "#DDEEDD", "#F3F3F3"
TITLE, SMALL, NOTE = 10.5, 8.2, 7.6


# --------------------------------------------------------------------------------------------------------------------
# Boxes and arrows; coordinates are inches from the lower left corner


def page(width: float, height: float) -> Axes:
    figure = plt.figure(figsize=(width, height), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return axes


def box(axes: Axes, corner: tuple[float, float], size: tuple[float, float], title: str, text: str = "", colour=PLAIN):
    """A box with a bold title, text below it, and its lower left corner at `corner`."""
    (x, y), (width, height) = corner, size
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=colour, edgecolor=INK, linewidth=1))
    middle, lines = x + width / 2, text.count("\n") + 1 if text else 0
    top = y + height / 2 + 0.085 * lines
    axes.text(middle, top, title, ha="center", va="center", fontsize=TITLE, weight="bold", color=INK)
    if text:
        axes.text(middle, top - 0.14, text, ha="center", va="top", fontsize=SMALL, color=INK, linespacing=1.35)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0, dashed: bool = False):
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=12,
            linewidth=1.2,
            color=INK,
            linestyle="--" if dashed else "-",
            shrinkA=0,
            shrinkB=0,
            connectionstyle=f"arc3,rad={bend}",
        )
    )


def note(axes: Axes, x: float, y: float, text: str, **options):
    axes.text(x, y, text, fontsize=NOTE, color=GREY, va="center", **{"ha": "center", **options})


def heading(axes: Axes, x: float, y: float, text: str):
    axes.text(x, y, text, fontsize=13, weight="bold", color=INK, va="center")


# --------------------------------------------------------------------------------------------------------------------
# The way of a token


def draw_token_way() -> None:
    axes = page(15, 8.6)
    heading(axes, 0.3, 8.25, "The way of a token: three ways in, one run")
    sources = (
        ("words, images", "a conversation", "processor", "chat template,\nresize, patchify", "padded batch"),
        (
            "rows",
            "conversations\nto learn from",
            "processor.pack",
            "or bagel train:\nplans, then packs",
            "training pack",
        ),
        ("noise", "and what the sampler\nhas made of it", "sampler", "one step between\ntwo knots", "noisy block"),
    )
    details = (
        "input_ids, attention_mask,\npixel_values, ...",
        "packed_text_ids,\nsample_lens, ...",
        "x_t, t, on a\nfrozen context",
    )
    files = ("processing_bagel", "packing_bagel", "flow_bagel")
    for row, (source, what, maker, how, made) in enumerate(sources):
        y = 7.0 - 1.1 * row
        box(axes, (0.3, y), (1.65, 0.85), source, what)
        box(axes, (2.35, y), (1.75, 0.85), maker, how)
        box(axes, (4.5, y), (2.0, 0.85), made, details[row])
        arrow(axes, (1.95, y + 0.42), (2.35, y + 0.42))
        arrow(axes, (4.1, y + 0.42), (4.5, y + 0.42))
        arrow(axes, (6.5, y + 0.42), (7.0, 6.32 + 0.3 * (1 - row)))
        note(axes, 3.22, y - 0.1, files[row])
    stages = (
        (7.0, 1.6, "Inputs", "layout,\ntoken sources,\ntargets", PLAIN, "inputs_bagel"),
        (9.0, 1.9, "embed", "token embeddings\nViT + connector\nlatents + time + entry", PLAIN, "modeling_bagel"),
        (11.3, 1.5, "decode", "blocks of two\nexperts and\none attention", BOTH, "decoder_bagel"),
    )
    for x, width, title, text, colour, file in stages:
        box(axes, (x, 5.75), (width, 1.15), title, text, colour)
        note(axes, x + width / 2, 5.63, file)
    arrow(axes, (8.6, 6.32), (9.0, 6.32))
    arrow(axes, (10.9, 6.32), (11.3, 6.32))
    for row, (title, text, colour) in enumerate(
        (("logits", "lm_head", UND), ("losses", "both, of a pack", BOTH), ("velocity", "llm2vae", GEN))
    ):
        y = 7.1 - 1.1 * row
        box(axes, (13.3, y), (1.4, 0.65), title, text, colour)
        arrow(axes, (12.8, 6.32 + 0.2 * (1 - row)), (13.3, y + 0.32))
    axes.plot([0.3, 14.7], [4.4, 4.4], color="#CCCCCC", linewidth=1)
    draw_rule(axes)
    draw_block(axes)


def draw_rule(axes: Axes) -> None:
    """The tokens of an example, their columns, and which sees which."""
    heading(axes, 0.3, 4.05, "What a token is: columns of the layout")
    tokens, span, gen = "tiiittnnn", [0, 1, 1, 1, 2, 2, 3, 3, 3], [0, 0, 0, 0, 0, 0, 0, 1, 0]
    positions = [0, 1, 1, 1, 2, 3, 4, 4, 4]
    index, spans = torch.arange(len(tokens)), torch.tensor(span)
    image, noisy = (torch.tensor([token in kinds for token in tokens]) for kinds in ("in", "n"))
    same_span = spans[:, None] == spans[None]
    seen = visible(index[:, None], index[None], torch.ones_like(same_span), same_span, image[None], noisy[None])
    side, left, top = 0.26, 4.0, 3.1
    rows = (
        ("token", tokens),
        ("span", span),
        ("position", positions),
        ("expert", ["gen" if g else "und" for g in gen]),
    )
    for number, (name, values) in enumerate(rows):
        y = 3.3 - 0.36 * number
        axes.text(0.3, y, name, fontsize=9, color=INK, va="center", weight="bold")
        for column, value in enumerate(values):
            colour = GEN if gen[column] else UND
            x = 1.15 + 0.29 * column
            axes.add_patch(Rectangle((x - 0.14, y - 0.15), 0.28, 0.3, facecolor=colour, edgecolor="white"))
            size = 9 if len(str(value)) == 1 else 6.2
            axes.text(x, y, str(value), fontsize=size, ha="center", va="center", color=INK)
    note(axes, 0.3, 1.75, "t text, i an image that is read, n an image that is drawn;", ha="left")
    note(axes, 0.3, 1.55, "its boundary tokens belong to the image and are und.", ha="left")
    box(
        axes,
        (0.3, 0.35),
        (3.35, 0.95),
        "The rule",
        "same sample and (earlier, or same bidirectional span)\nand (not noisy, or same span)",
    )
    for query in range(len(tokens)):
        for key in range(len(tokens)):
            colour = ListedColormap(["#F3F3F3", "#444444"])(int(seen[query, key]))
            corner = (left + side * key, top - side * (query + 1))
            axes.add_patch(Rectangle(corner, side, side, facecolor=colour, edgecolor="white", linewidth=1))
        axes.text(left - 0.1, top - side * (query + 0.5), tokens[query], ha="right", va="center", fontsize=9)
        axes.text(left + side * (query + 0.5), top + 0.1, tokens[query], ha="center", va="center", fontsize=9)
    note(axes, left + side * 4.5, top + 0.3, "rows see columns")
    note(axes, left + side * 4.5, 0.5, "layout_bagel: visible")


def draw_block(axes: Axes) -> None:
    """One decoder block: tokens sorted by expert, attention over all of them in their order."""
    heading(axes, 7.0, 4.05, "One block: two experts, one attention")
    left, width, high, low = 8.15, 1.45, 2.55, 1.1
    for y, name, colour in ((high, "und", UND), (low, "gen", GEN)):
        axes.text(7.1, y + 0.42, name, fontsize=12, weight="bold", color=INK, va="center")
        suffix = "" if name == "und" else "_moe_gen"
        box(axes, (left, y), (width, 0.85), "norm, q, k, v", f"q_proj{suffix}", colour)
        box(axes, (left + 3.2, y), (width, 0.85), "o, norm, MLP", f"mlp{suffix}", colour)
        arrow(axes, (left + width, y + 0.42), (left + width + 0.35, 2.25 + (0.3 if name == "und" else -0.3)))
        arrow(axes, (left + 2.85, 2.25 + (0.3 if name == "und" else -0.3)), (left + 3.2, y + 0.42))
        arrow(axes, (7.6, y + 0.42), (left, y + 0.42))
        arrow(axes, (left + 3.2 + width, y + 0.42), (left + 5.15, y + 0.42))
    box(axes, (left + width + 0.35, 1.55), (1.05, 1.4), "attention", "all tokens,\nin order,\nby the rule", BOTH)
    note(axes, 7.45, 0.72, "sorted by expert once per forward", ha="left")
    note(axes, left + width + 0.87, 1.42, "attention_bagel")
    note(axes, left + 5.15, 0.72, "order restored where attention\nneeds it, and at the end", ha="center")
    box(axes, (13.45, 1.55), (1.25, 1.4), "next block", "or final norm,\ntwo experts too", BOTH)
    note(
        axes,
        10.9,
        0.4,
        "text alone: one expert, no sorting        decoder_bagel: Routing, BagelAttention, BagelDecoderLayer",
    )


# --------------------------------------------------------------------------------------------------------------------
# The way of an image


def draw_image_way() -> None:
    axes = page(15, 8.6)
    heading(axes, 0.3, 8.25, "The way of an image: in, to be read or edited")
    box(axes, (0.3, 5.95), (1.3, 0.95), "pixels", "EXIF, RGB\non white")
    lanes = (
        (
            (6.65, GEN, "an image that is edited"),
            (2.3, "VAE transform", "512 to 1024 pixels,\nstride 16"),
            (4.5, "VAE encode", "a sample or the mode\nof the posterior"),
            (6.7, "latent tokens", "vae2llm + time 0\n+ table entry"),
        ),
        (
            (5.3, UND, "every image"),
            (2.3, "ViT transform", "224 to 980 pixels,\nstride 14"),
            (4.5, "vision tower", "SigLIP, patches of\nall images packed"),
            (6.7, "ViT tokens", "connector\n+ table entry"),
        ),
    )
    for (y, colour, which), *boxes in lanes:
        for x, title, text in boxes:
            box(axes, (x, y), (1.75, 0.95), title, text, colour if x > 4 else PLAIN)
        arrow(axes, (1.6, 6.42), (2.3, y + 0.47))
        arrow(axes, (4.05, y + 0.47), (4.5, y + 0.47))
        arrow(axes, (6.25, y + 0.47), (6.7, y + 0.47))
        arrow(axes, (8.45, y + 0.47), (9.0, 6.42 + (0.2 if colour == GEN else -0.2)))
        note(axes, 3.18, y + 1.06, which)
    box(axes, (9.0, 5.85), (1.9, 1.15), "placeholders", "in input_ids, between\nvision_start and\nvision_end")
    box(axes, (11.5, 5.85), (1.5, 1.15), "decode", "with the words\nof the prompt", BOTH)
    box(axes, (13.5, 5.85), (1.2, 1.15), "context", "cached keys\nand values")
    arrow(axes, (10.9, 6.42), (11.5, 6.42))
    arrow(axes, (13.0, 6.42), (13.5, 6.42))
    files = {
        3.18: "image_processing_bagel",
        5.38: "modeling_bagel, modeling_siglip_navit",
        9.95: "processing_bagel, inputs_bagel",
        12.25: "decoder_bagel",
        14.1: "generation_bagel",
    }
    for x, file in files.items():
        note(axes, x, 5.12, file)
    axes.plot([0.3, 14.7], [4.75, 4.75], color="#CCCCCC", linewidth=1)
    draw_sampling(axes)


def draw_sampling(axes: Axes) -> None:
    heading(axes, 0.3, 4.4, "Out, to be drawn: 50 knots, 49 steps from noise (t = 1) to the image (t = 0)")
    box(axes, (0.3, 2.3), (1.3, 0.95), "noise", "made on the CPU,\nt = 1")
    box(axes, (2.2, 2.3), (1.75, 0.95), "noisy block", "vision_start, x_t,\nvision_end", GEN)
    arrow(axes, (1.6, 2.77), (2.2, 2.77))
    branches = (
        (3.35, "full", "the whole context, with the plan"),
        (2.35, "without text", "the prompt before its last text"),
        (1.35, "without images", "the texts of the prompt"),
    )
    for y, title, text in branches:
        box(axes, (4.7, y), (2.45, 0.75), title, text, BOTH)
        arrow(axes, (3.95, 2.77), (4.7, y + 0.37))
        arrow(axes, (7.15, y + 0.37), (7.7, 2.77 + (y - 2.35) * 0.3))
    note(axes, 5.92, 1.15, "branches: same block, frozen contexts; one velocity each")
    box(axes, (7.7, 2.15), (1.6, 1.25), "guide", "cfg_text_scale,\ncfg_img_scale,\nrenormalisation")
    box(axes, (9.85, 2.15), (1.55, 1.25), "step", "x = x - v dt\n(Euler, or any\nscheduler)")
    arrow(axes, (9.3, 2.77), (9.85, 2.77))
    axes.plot([10.6, 10.6, 3.07], [2.15, 0.75, 0.75], color=INK, linewidth=1.2)
    arrow(axes, (3.07, 0.75), (3.07, 2.3))
    note(axes, 6.8, 0.62, "until the last knot")
    box(axes, (11.9, 2.3), (1.25, 0.95), "VAE decode", "latents, t = 0")
    arrow(axes, (11.4, 2.77), (11.9, 2.77))
    box(axes, (13.5, 2.3), (1.2, 0.95), "PNG", "8 bits, RGB")
    arrow(axes, (13.15, 2.77), (13.5, 2.77))
    arrow(axes, (14.1, 3.25), (14.1, 4.2), dashed=True)
    note(axes, 13.95, 3.75, "interleaved: read back\nthrough VAE and ViT", ha="right")
    draw_knots(axes)


def draw_knots(axes: Axes) -> None:
    """The time grid as ticks, guided steps thicker."""
    left, width, y = 11.2, 3.3, 1.25
    axes.plot([left, left + width], [y, y], color=GREY, linewidth=1)
    for t in timestep_grid(50, 3.0).tolist():
        guided = 0.4 < t <= 1
        x = left + (1 - t) * width
        axes.plot([x, x], [y - 0.12, y + 0.12], color=INK if guided else "#BBBBBB", linewidth=1.3 if guided else 0.9)
    note(axes, left, y - 0.28, "t = 1")
    note(axes, left + width, y - 0.28, "t = 0")
    note(axes, left + width / 2, y + 0.3, "knots, timestep_shift = 3: dark ones are guided (0.4 < t <= 1)")
    note(axes, 11.2, 0.55, "flow_bagel: timestep_grid, integrate, guide", ha="left")
    note(axes, 11.2, 0.35, "generation_bagel: the contexts of the branches", ha="left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ASSETS)
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    for draw, name in ((draw_token_way, "token_way.png"), (draw_image_way, "image_way.png")):
        draw()
        plt.savefig(folder / name, dpi=110)
        plt.close()
        print(f"Wrote {folder / name}")


if __name__ == "__main__":
    main()
