# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The commands `bagel adopt`, `bagel export` and `bagel build`: their arguments and what they print."""

import argparse
import json
import sys
from typing import Any

from .adopting import Adoption, adopt
from .building import build
from .exporting import export


EXAMPLES = {
    "adopt": "path/to/BAGEL-7B-MoT",
    "export": "outputs/my-model outputs/released-layout",
    "build": "my-bagel --text-model Qwen/Qwen2.5-0.5B-Instruct --vae path/to/BAGEL-7B-MoT/ae.safetensors",
}


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """
    Run one of the commands.

    Args:
        arguments: the command's name and its arguments; by default those of the process.
        prog: what usage and errors call the program; by default the name of the script.

    Returns:
        The exit code. 0: done. 1: it failed, with the reason on stderr.

    Raises:
        SystemExit: 2 after wrong arguments, 0 after `--help`.
    """
    options = _parser(prog).parse_args(arguments)
    try:
        print(_run(options))
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"{'' if prog is None else f'{prog} {options.command}: '}error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Convert between the released layout and this one.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, purpose: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=purpose,
            description=f"{purpose[0].upper()}{purpose[1:]}.",
            epilog=f"example:\n  {parser.prog} {name} {EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    command = add("adopt", "make a released folder loadable by transformers, in place")
    command.add_argument("directory", metavar="DIR", help="a folder in the released layout")
    command = add("export", "write a model as a released folder")
    command.add_argument("model_dir", metavar="MODEL_DIR", help="a model folder: saved, trained or adopted")
    command.add_argument("out_dir", metavar="OUT_DIR", help="new or empty")
    command = add("build", "write an untrained BAGEL made of pretrained parts")
    command.add_argument("out_dir", metavar="OUT_DIR", help="new or empty")
    command.add_argument("--text-model", required=True, help="a Qwen2 or Qwen2.5 model: folder, or name on the Hub")
    command.add_argument("--vision-model", help="a SigLIP model; without it the model reads no images")
    command.add_argument("--vae", help="an autoencoder (diffusers folder, ae.safetensors); without it, no drawing")
    command.add_argument("--dtype", default="auto", help="of all but the VAE; by default that of the text model")
    command.add_argument("--seed", type=int, default=0, help="of the new parts")
    command.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="a field of BagelConfig")
    return parser


def _run(options: argparse.Namespace) -> str:
    if options.command == "adopt":
        return _describe(options.directory, adopt(options.directory))
    if options.command == "export":
        return f"Wrote {options.out_dir}: {', '.join(export(options.model_dir, options.out_dir))}"
    parts = (options.text_model, options.vision_model, options.vae)
    fields = dict(map(_assignment, options.set))
    written = build(options.out_dir, *parts, dtype=options.dtype, seed=options.seed, **fields)
    return f"Wrote {options.out_dir}: {', '.join(written)}"


def _describe(directory: str, adoption: Adoption) -> str:
    lines = [f"{directory} is ready. Wrote: {', '.join(adoption.written) or 'nothing, it was ready before'}."]
    lines += [f"note: {note}" for note in adoption.notes]
    classes = "AutoModel, AutoProcessor" if adoption.has_processor else "AutoModel"
    lines += ["Next:", f"    from transformers import {classes}"]
    path = json.dumps(str(directory))
    lines.append(f"    model = AutoModel.from_pretrained({path}, trust_remote_code=True)")
    if adoption.has_processor:
        lines.append(f"    processor = AutoProcessor.from_pretrained({path}, trust_remote_code=True)")
    return "\n".join(lines)


def _assignment(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError as error:
        raise ValueError(f"--set {text}: NAME=JSON is needed, such as max_latent_size=32.") from error
