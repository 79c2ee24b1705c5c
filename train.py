# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Trains BAGEL from the shell: settings from a YAML file, each of which the command line can override.

    python train.py --config configs/stage2.yaml --model_name_or_path path/to/BAGEL-7B-MoT --output_dir outputs/mine
    accelerate launch train.py --config configs/lora.yaml --learning_rate 1e-5

A file holds any of the arguments below by name. A script over `trainer_bagel` and `data_bagel`.
"""

import difflib
import importlib
import json
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, set_seed
from transformers.utils import logging

from convert_bagel import import_sibling


conversations, data = import_sibling("conversations_bagel"), import_sibling("data_bagel")
packing, training = import_sibling("packing_bagel"), import_sibling("trainer_bagel")
logger = logging.get_logger("bagel_repository.train")

SOURCE_FIELDS = {field.name for field in fields(data.DataSource)} - {"rows", "convert"}
RULES = ("text_cond_dropout_prob", "vit_cond_dropout_prob", "vae_cond_dropout_prob")


@dataclass
class ModelArguments:
    """Which model is trained."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Model folder or id."})
    stage: int | None = field(default=None, metadata={"help": "1 = understanding only, 2 = joint. Default: as stored."})
    dtype: str = field(default="float32", metadata={"help": "Of the weights: float32, bfloat16, auto."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flex_attention, ..."})
    timestep_shift: float | None = field(default=None, metadata={"help": "Shift of the training timesteps."})


@dataclass
class DataArguments:
    """What it is trained on, and how that is packed."""

    sources: str | None = field(
        default=None,
        metadata={
            "help": "List (JSON on the command line) of sources: format (t2i_parquet, editing_parquet, vlm_jsonl, "
            "conversations, python:module:function), files, name, weight, ..."
        },
    )
    eval_sources: str | None = field(default=None, metadata={"help": "The same, for evaluation."})
    expected_num_tokens: int | None = field(default=None, metadata={"help": "A shorter pack reads on."})
    max_num_tokens: int = field(default=36864, metadata={"help": "No pack is longer."})
    max_num_tokens_per_sample: int | None = field(default=None, metadata={"help": "A longer sample is skipped."})
    look_ahead: int = field(default=64, metadata={"help": "Samples that wait to be packed."})
    text_cond_dropout_prob: float | None = field(default=None, metadata={"help": "Default: the model's config."})
    vit_cond_dropout_prob: float | None = field(default=None, metadata={"help": "Default: the model's config."})
    vae_cond_dropout_prob: float | None = field(default=None, metadata={"help": "Default: the model's config."})

    def __post_init__(self):
        for name in ("sources", "eval_sources"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, json.loads(getattr(self, name)))


def main(arguments: list[str] | None = None) -> int:
    model_args, data_args, args = parse(sys.argv[1:] if arguments is None else arguments)
    set_seed(args.seed)
    model, processor = load(model_args)
    rules = packing.PackingRules.of(
        model.config, **{name: getattr(data_args, name) for name in RULES if getattr(data_args, name) is not None}
    )
    trainer = training.BagelTrainer(
        model,
        args,
        train_dataset=packed_dataset(data_args.sources, data_args, processor, rules, args, epochs=None),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(args))
    trainer.save_model()
    trainer.save_state()
    return 0


def parse(arguments: list[str]) -> tuple[Any, ...]:
    """
    A dataclass per group of arguments: the command line wins over the file, the file over the defaults.

    Raises:
        ValueError: the file holds unknown names.
    """
    parser = HfArgumentParser((ModelArguments, DataArguments, training.BagelTrainingArguments), description=__doc__)
    parser.add_argument("--config", help="YAML file with arguments")
    known = {action.dest for action in parser._actions}
    config = parser.parse_known_args(arguments)[0].config
    if config is not None:
        values = yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {}
        if unknown := sorted(set(values) - known):
            guesses = {name: difflib.get_close_matches(name, known, 1) for name in unknown}
            named = [f"{name} (did you mean {guess[0]}?)" if guess else name for name, guess in guesses.items()]
            raise ValueError(f"{config} holds unknown arguments: {', '.join(named)}.")
        parser.set_defaults(**values)
    *groups, _ = parser.parse_args_into_dataclasses(arguments)
    return tuple(groups)


def load(args: ModelArguments) -> tuple[Any, Any]:
    """Model and processor, of this repository's code."""
    if args.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing: the model to start from.")
    settings = {"stage": args.stage, "attn_implementation": args.attn_implementation}
    settings = {name: value for name, value in settings.items() if value is not None}
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    model_class = import_sibling("modeling_bagel").BagelForUnifiedMultimodal
    model = model_class.from_pretrained(args.model_name_or_path, dtype=dtype, **settings)
    if args.timestep_shift is not None:
        model.config.timestep_shift = args.timestep_shift
    processor = import_sibling("processing_bagel").BagelProcessor.from_pretrained(
        args.model_name_or_path, trust_remote_code=True
    )
    return model, processor


def packed_dataset(sources: list[dict] | None, args: DataArguments, processor, rules, training_args, epochs):
    if not sources:
        raise ValueError("sources is missing: a list of {format, files, ...} to train on.")
    return data.PackedDataset(
        [source(entry) for entry in sources],
        processor,
        rules,
        expected_num_tokens=args.expected_num_tokens,
        max_num_tokens=args.max_num_tokens,
        max_num_tokens_per_sample=args.max_num_tokens_per_sample,
        look_ahead=args.look_ahead,
        seed=training_args.data_seed if training_args.data_seed is not None else training_args.seed,
        epochs=epochs,
        rank=training_args.process_index,
        world_size=training_args.world_size,
        report=True,
    )


def source(entry: dict) -> Any:
    """
    A source from its entry: `format`, fields of `DataSource`, `files`; the rest of a `python:module:function` entry is
    passed to the function, which returns rows (something with a length and indexes).

    Raises:
        ValueError: an unknown format, or a name that this format has no use for.
    """
    entry = dict(entry)
    kind = entry.pop("format", None)
    settings = {name: entry.pop(name) for name in list(entry) if name in SOURCE_FIELDS}
    if kind is not None and kind.startswith("python:"):
        _, module, function = kind.split(":")
        rows = getattr(importlib.import_module(module), function)(**entry)
        return data.DataSource(**{"name": function, "rows": rows} | settings)
    files = entry.pop("files", entry.pop("path", None))
    if entry:
        raise ValueError(f"Source {settings.get('name', kind)!r}: unknown settings {', '.join(entry)}.")
    if kind == "conversations":
        return conversation_files(files, settings)
    readers = {
        "t2i_parquet": data.t2i_parquet,
        "editing_parquet": data.editing_parquet,
        "vlm_jsonl": data.vlm_jsonl,
    }
    if kind not in readers:
        raise ValueError(
            f"Unknown source format {kind!r}; there are {', '.join(readers)}, conversations and python:module:function."
        )
    return readers[kind](files, **settings)


def conversation_files(files: Any, settings: dict) -> Any:
    """Conversations (`messages`, `images`) as they are, one per JSON line or parquet row."""
    first = files if isinstance(files, str) else files[0]
    if first.endswith(".parquet"):
        return data.DataSource(
            **{"name": "conversations", "rows": data.StreamedFiles.find("parquet", files, ".parquet")} | settings
        )
    rows = data.StreamedFiles.find("text", files, ".jsonl")
    return data.DataSource(**{"name": "conversations", "rows": rows, "convert": json_line} | settings)


def json_line(row: dict, draws: Any) -> dict:
    return json.loads(row["text"])


def checkpoint_to_resume(args) -> str | bool | None:
    """`auto`: the last complete one if there is any. `true`: there must be one. Else a path."""
    wanted = args.resume_from_checkpoint
    if wanted == "auto":
        return training.last_complete_checkpoint(args.output_dir) is not None
    return True if str(wanted).lower() == "true" else wanted


if __name__ == "__main__":
    sys.exit(main())
