# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The command `bagel` (and `python -m bagel`): which command is which module's `main`."""

import importlib
import sys


COMMANDS = {
    # name: (module with a main(arguments) -> exit code, purpose, example)
    "demo": ("demo", "draw a picture, ask about it, edit it; saves a sheet", "bagel demo"),
    "adopt": ("conversion.commands", "make a released folder loadable, in place", "bagel adopt path/to/BAGEL-7B-MoT"),
    "export": ("conversion.commands", "write the released layout", "bagel export outputs/my-model outputs/released"),
    "build": ("conversion.commands", "a new model from parts", "bagel build my-bagel --text-model Qwen/Qwen2.5-0.5B"),
    "train": ("training.script", "train or fine-tune", "bagel train --config configs/lora.yaml"),
    "eval": ("evaluation.shapes", "measure a model of the shapes world", "bagel eval checkpoints/tiny-shapes"),
}


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: done. 1: it failed, with the reason on stderr. 2: wrong arguments."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"bagel: error: there is no command {name!r}.\n\n{usage()}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"{__package__}.{COMMANDS[name][0]}")
    if module.__name__.endswith("conversion.commands"):
        return module.main([name, *rest], prog="bagel")
    return module.main(rest)


def usage() -> str:
    rows = [f"  {name:8}{purpose:56}{example}" for name, (_, purpose, example) in COMMANDS.items()]
    return "\n".join(["usage: bagel COMMAND ...", "", *rows, "", "bagel COMMAND --help says what a command takes."])


if __name__ == "__main__":
    sys.exit(main())
