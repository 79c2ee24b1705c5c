# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The command `bagel` (and `python -m bagel`): finds the module that does a command, and hands it the arguments.

bagel COMMAND ...
torchrun --standalone --nproc_per_node 2 -m bagel train --config configs/lora.yaml
"""

import difflib
import importlib
import sys
from typing import NamedTuple


class Command(NamedTuple):
    """A command: the module of this package with its `main(arguments, prog) -> exit code`, and what it is for."""

    module: str
    purpose: str


COMMANDS = {
    "demo": Command("demo", "draw an image, ask about it and edit it; save a sheet of all three"),
    "adopt": Command("conversion.commands", "make a released folder loadable by transformers, in place"),
    "export": Command("conversion.commands", "write a model as a released folder"),
    "build": Command("conversion.commands", "write an untrained BAGEL made of pretrained parts"),
    "train": Command("training.script", "train or fine-tune a model"),
    "eval": Command("evaluation.shapes", "measure a model of the shapes world"),
}
EXIT_CODES = "exit codes: 0 = done, 1 = failed (the reason is on stderr), 2 = wrong arguments"


def main(arguments: list[str] | None = None) -> int:
    """
    Run a command.

    Args:
        arguments: the command's name and its arguments; by default those of the process.

    Returns:
        The exit code. 0: done. 1: it failed, with the reason on stderr. 2: wrong arguments. (Where argparse ends the
        process itself, it raises `SystemExit` with 0 after `--help` and 2 after wrong arguments.)
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        print(usage(), file=sys.stderr)
        return 2
    name, *rest = arguments
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1, cutoff=0.4)
        guess = f" Did you mean {near[0]!r}?" if near else ""
        print(f"bagel: error: there is no command {name!r}.{guess} See `bagel --help`.", file=sys.stderr)
        return 2
    module = importlib.import_module(f"{__package__}.{COMMANDS[name].module}")
    if COMMANDS[name].module == "conversion.commands":  # one parser with three subcommands
        return module.main(arguments, prog="bagel")
    return module.main(rest, prog=f"bagel {name}")


def usage() -> str:
    """What `bagel --help` prints."""
    rows = [f"  {name:8}{command.purpose}" for name, command in COMMANDS.items()]
    more = "`bagel COMMAND --help` lists the arguments of a command, with an example."
    return "\n".join(["usage: bagel COMMAND ...", "", *rows, "", more, EXIT_CODES])


if __name__ == "__main__":
    sys.exit(main())
