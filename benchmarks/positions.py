# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Draw what the position settings do: assets/positions.png of the README.

python benchmarks/positions.py [--output FILE]          (needs matplotlib)

Everything is read off the code that the model runs: frequencies off its rotary embedding at the size of BAGEL-7B-MoT,
positions off `layout_bagel.py`, entries of a table off `grid_position_ids`.
"""

import argparse
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import SubFigure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MultipleLocator

from bagel import configuration_bagel as configuration
from bagel import embeddings_bagel as embeddings
from bagel import layout_bagel as layout


REPOSITORY = Path(__file__).resolve().parent.parent


BLACK, ORANGE, BLUE, GREEN, RED, GREY = "#222222", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#DDDDDD"
TRAINED, FACTOR = 32768, 4.0
EXTENDED = {"factor": FACTOR, "original_max_position_embeddings": TRAINED}
LONGER = {
    "default": (BLACK, {}),
    "linear": (ORANGE, {"rope_type": "linear", "factor": FACTOR}),
    "dynamic, at 131,072": (GREEN, {"rope_type": "dynamic", "factor": FACTOR}),
    "yarn": (BLUE, {"rope_type": "yarn", **EXTENDED}),
    "llama3": (RED, {"rope_type": "llama3", **EXTENDED, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
}
HEADS = {
    "default": {},
    "interleave": {"interleave": True},
    "partial, 0.5": {"partial_rotary_factor": 0.5},
    "proportional, 0.5": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    "mrope 24, 20, 20": {"mrope_section": [24, 20, 20]},
}


def rotary(parameters: dict):
    """The decoder's rotary embedding of BAGEL-7B-MoT with other parameters."""
    config = configuration.BagelTextConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e6, **parameters})
    return embeddings.BagelTextRotaryEmbedding(config)


def draw_frequencies(axes: Axes) -> None:
    reach = torch.tensor([[int(TRAINED * FACTOR) - 1]])
    default = rotary({})._frequencies(reach, None).flatten()
    wavelength = 2 * math.pi / default
    for name, (color, parameters) in LONGER.items():
        slower = default / rotary(parameters)._frequencies(reach, None).flatten()
        axes.plot(wavelength, slower, color=color, label=name, linewidth=2, marker=".", markersize=4)
    axes.axvline(TRAINED, color=BLACK, linewidth=1, linestyle=":")
    axes.text(TRAINED * 0.85, 11.5, "32,768 trained", fontsize=8, ha="right")
    axes.set_xscale("log")
    axes.set_xlabel("tokens per full rotation, as trained")
    axes.set_ylabel("times slower")
    axes.legend(fontsize=8, loc="upper left")
    axes.set_title("Longer contexts, factor 4: which pairs slow down", fontsize=10, loc="left")


def features_of_a_head(parameters: dict) -> np.ndarray:
    """(128,) 0 = copied, 1 to 3 = rotated by time, height or width."""
    module = rotary(parameters)
    frequencies = module.inv_freq
    pairs = torch.where(frequencies > 0, 1, 0)
    if parameters.get("mrope_section"):
        pairs = embeddings.multimodal_axes(parameters["mrope_section"], len(frequencies)) + 1
    both = torch.stack([pairs, pairs])  # the features of a pair: halves, or side by side
    head = both.T.flatten() if parameters.get("interleave") else both.flatten()
    return torch.nn.functional.pad(head, (0, 128 - len(head))).numpy()


def draw_heads(axes: Axes) -> None:
    colors = [GREY, BLUE, ORANGE, GREEN]
    rows = np.stack([features_of_a_head(parameters) for parameters in HEADS.values()])
    axes.imshow(rows, aspect="auto", cmap=ListedColormap(colors), vmin=0, vmax=3, interpolation="nearest")
    axes.set_yticks(range(len(HEADS)), HEADS, fontsize=8)
    axes.set_yticks(np.arange(0.5, len(HEADS)), minor=True)
    axes.grid(axis="y", which="minor", color="white", linewidth=6)
    axes.tick_params(which="both", left=False)
    axes.set_xlabel("feature of a head (128)")
    for row, parameters in enumerate(HEADS.values()):  # the two features of one pair
        first, second = (8, 9) if parameters.get("interleave") else (8, 8 + rotary(parameters).inv_freq.numel())
        axes.plot([first, second], [row, row], color="white", marker="o", markersize=4, linewidth=1)
    names = ("copied", "rotated (by time)", "by height", "by width")
    axes.legend(handles=[Patch(color=c, label=n) for c, n in zip(colors, names)], fontsize=8, ncol=4, loc=(0, -0.36))
    axes.set_title("Heads: which position rotates which pair (white: one pair)", fontsize=10, loc="left")


def draw_conversation(axes: Axes) -> None:
    """Text, a picture of 4 x 7, text, a picture of 5 x 3, text: by height and width."""
    kinds, grids = [], [(4, 7), (5, 3)]
    for grid in grids:
        kinds += ["text"] * 3 + ["start"] + ["image"] * math.prod(grid) + ["end"]
    kinds += ["text"] * 3
    columns = [torch.tensor([[kind == name for kind in kinds]]) for name in ("image", "none", "start", "end")]
    placeholders = layout.Placeholders(*columns)
    time, height, width = placeholders.positions(torch.ones(1, len(kinds)).long(), placeholders.merge_grids(grids, []))[
        0
    ].T
    marks = {"text": ("o", BLACK, 30), "image": ("s", BLUE, 60), "start": ("D", RED, 25), "end": ("D", RED, 25)}
    for kind, (marker, color, size) in marks.items():
        chosen = torch.tensor([one == kind for one in kinds])
        label = {"start": "vision_start, vision_end", "end": None, "image": "ViT or latent tokens"}.get(kind, kind)
        axes.scatter(width[chosen], height[chosen], marker=marker, c=color, s=size, label=label)
    starts = [index for index, kind in enumerate(kinds) if kind == "start"]
    for start, (rows, columns_) in zip(starts, grids):
        left, top = float(width[start]) - 0.45, float(height[start]) - 0.45
        axes.add_patch(Rectangle((left, top), columns_ - 0.1, rows - 0.1, fill=False, color=BLUE))
        axes.text(left + columns_ + 0.1, top + 0.55, f"time {int(time[start])}", fontsize=8, color=BLUE)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MultipleLocator(5))
    axes.yaxis.set_major_locator(MultipleLocator(5))
    axes.set_aspect("equal")
    axes.set_xlabel("width")
    axes.set_ylabel("height")
    axes.legend(fontsize=8, loc="lower left")
    axes.set_title("mrope_section: text on the diagonal, pictures as grids", fontsize=10, loc="left")


def draw_tables(figure: SubFigure) -> None:
    """The entries that images of 5 x 8 and of 20 x 12 tokens read in a table of 8 x 8."""
    side, modes, grids = 8, (False, True, "bilinear", "fit"), ((5, 8), (20, 12))
    figure.suptitle("interpolate_pos: entries of a table of 8 x 8", fontsize=10, x=0.06, y=0.97, ha="left")
    figure.subplots_adjust(top=0.88, bottom=0.03, left=0.08, right=0.99, wspace=0.08, hspace=0.08)
    for number, axes in enumerate(figure.subplots(2, 4).flat):
        grid, mode = grids[number // 4], modes[number % 4]
        axes.set(xlim=(-0.7, side - 0.3), ylim=(side - 0.3, -0.7), xticks=[], yticks=[], aspect="equal")
        for entry in range(side**2):
            corner = (entry % side - 0.5, entry // side - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, facecolor="white", edgecolor=GREY))
        if number < 4:
            axes.set_title(repr(mode), fontsize=9)
        if number % 4 == 0:
            axes.set_ylabel(f"{grid[0]} x {grid[1]} tokens", fontsize=9)
        try:
            ids = embeddings.grid_position_ids(*grid, side, mode)
        except ValueError:
            axes.text(side / 2 - 0.5, side / 2 - 0.5, "ValueError", ha="center", va="center", color=RED)
            continue
        rows, columns = ids.unbind(-1) if ids.is_floating_point() else (ids // side, ids % side)
        axes.scatter(columns, rows, s=9, c=BLUE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "assets" / "positions.png")
    arguments = parser.parse_args()
    figure = plt.figure(figsize=(13, 8.4), layout="none")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1.15])
    for subfigure, draw, box in (
        (upper.subfigures(1, 2)[0], draw_frequencies, (0.09, 0.17, 0.88, 0.72)),
        (upper.subfigures(1, 2)[1], draw_heads, (0.2, 0.28, 0.78, 0.61)),
    ):
        draw(subfigure.add_axes(box))
    left, right = lower.subfigures(1, 2)
    draw_conversation(left.add_axes((0.09, 0.12, 0.88, 0.78)))
    draw_tables(right)
    figure.savefig(arguments.output, dpi=100)
    print(f"Look at {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
