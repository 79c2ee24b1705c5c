# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""`bagel train`: trains BAGEL with settings from a YAML file, any of which the command line can override.

    bagel train --config configs/lora.yaml --model_name_or_path path/to/BAGEL-7B-MoT --output_dir outputs/mine
    torchrun --standalone --nproc_per_node 8 -m bagel train --config configs/stage2.yaml
    accelerate launch -m bagel train --config configs/stage2.yaml --learning_rate 1e-5

`bagel train --help` lists the arguments; a file may hold any of them by name.
"""

import argparse
import difflib
import importlib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, set_seed
from transformers.utils import logging

from ..lora_bagel import lora_targets
from ..modeling_bagel import BagelForUnifiedMultimodal
from ..processing_bagel import BagelProcessor
from .arguments import BagelTrainingArguments
from .checkpoints import last_complete_checkpoint
from .packed import PackedDataset
from .pictures import LOSS_CURVE, plot_losses
from .sources import DataSource, conversations, editing_parquet, t2i_parquet, vlm_jsonl
from .trainer import BagelTrainer


logger = logging.get_logger(__name__)

EXAMPLE = (__doc__ or "\n\n").split("\n\n")[1]
# On CPUs oneDNN compiles a kernel for every new size of a matrix, and packs have many sizes. By default it keeps 1,024
# kernels, so most are dropped before their size comes again. The variable is read at the first use of a kernel.
ONEDNN_KERNELS = "20000"
DROPOUTS = ("text_cond_dropout_prob", "vit_cond_dropout_prob", "vae_cond_dropout_prob")
READERS: dict[str, Callable[..., DataSource]] = {
    "t2i_parquet": t2i_parquet,
    "editing_parquet": editing_parquet,
    "vlm_jsonl": vlm_jsonl,
    "conversations": conversations,
}
SOURCE_FIELDS = {field.name for field in fields(DataSource)} - {"rows", "convert"}


@dataclass
class ModelArguments:
    """Which model is trained, and how it is loaded."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The model to start from: folder or id."})
    stage: int | None = field(default=None, metadata={"help": "1 = understanding only, 2 = joint. Default: as stored."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Of the weights: float32 (with --bf16 for the computation), bfloat16, or auto (as stored)."},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flex_attention, ..."})
    quantization: str | None = field(
        default=None, metadata={"help": "4bit: the decoder's layers in NF4 (needs bitsandbytes), for LoRA only."}
    )
    timestep_shift: float | None = field(
        default=None, metadata={"help": "Shift of the training timesteps. Default: the model's config."}
    )


@dataclass
class DataArguments:
    """What it is trained on, and how that is packed."""

    sources: str | None = field(
        default=None,
        metadata={
            "help": "List (JSON on the command line) of sources: format (t2i_parquet, editing_parquet, vlm_jsonl, "
            "conversations, python:module:function), files, name, weight, image_folder and other fields of DataSource; "
            "the rest of a python: entry goes to the function."
        },
    )
    eval_sources: str | None = field(
        default=None, metadata={"help": "A list like sources, read once per evaluation and without condition dropout."}
    )
    expected_num_tokens: int | None = field(
        default=None,
        metadata={
            "help": "A pack with fewer tokens waits for further samples that fit, at most look_ahead of them. Default: "
            "8/9 of max_num_tokens."
        },
    )
    max_num_tokens: int = field(default=36864, metadata={"help": "The most tokens of a pack."})
    max_num_tokens_per_sample: int | None = field(
        default=None, metadata={"help": "A longer sample is skipped. Default: max_num_tokens."}
    )
    look_ahead: int = field(default=64, metadata={"help": "How many samples wait to be packed."})
    text_cond_dropout_prob: float | None = field(
        default=None, metadata={"help": "How often a text of the context is dropped. Default: the model's config."}
    )
    vit_cond_dropout_prob: float | None = field(
        default=None, metadata={"help": "How often ViT tokens of an image are dropped. Default: the model's config."}
    )
    vae_cond_dropout_prob: float | None = field(
        default=None, metadata={"help": "How often VAE tokens of an image are dropped. Default: the model's config."}
    )

    def __post_init__(self):
        for name in ("sources", "eval_sources"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, json.loads(getattr(self, name)))


@dataclass
class LoraArguments:
    """LoRA adapters; all weights are trained unless `lora_experts` is given."""

    lora_experts: str | None = field(
        default=None, metadata={"help": "Which experts get adapters: und, gen or both. Default: no adapters."}
    )
    lora_r: int = field(default=32, metadata={"help": "Rank."})
    lora_alpha: float = field(default=64, metadata={"help": "Scale: alpha / r multiplies the output of an adapter."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full beside the adapters, e.g. llm2vae vae2llm."}
    )


def main(arguments: list[str] | None = None, prog: str = "bagel train") -> int:
    """
    Train, and save model, training state and loss curve in the output folder.

    Returns:
        The exit code. 0: done. 1: model or data cannot be used. 2: wrong arguments. stderr has the reason.

    Raises:
        SystemExit: 0, after `--help`.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", ONEDNN_KERNELS)
    try:
        model_args, data_args, lora_args, args = parse(sys.argv[1:] if arguments is None else arguments)
        checkpoint = checkpoint_to_resume(args)
    except ValueError as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    try:
        trainer = prepare(model_args, data_args, lora_args, args)
    except (OSError, ValueError, ImportError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 1
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        plot_losses(trainer.state.log_history, Path(args.output_dir) / LOSS_CURVE)
    trainer.end()
    return 0


def prepare(
    model_args: ModelArguments, data_args: DataArguments, lora_args: LoraArguments, args: BagelTrainingArguments
) -> BagelTrainer:
    """
    The trainer with model and data, ready to train.

    Raises:
        OSError, ValueError, ImportError: model or data cannot be read, do not fit, or need a package.
    """
    set_seed(args.seed)
    model, processor = load(model_args)
    if lora_args.lora_experts is not None:
        model = with_adapters(model, lora_args, args, model_args.quantization)
    sources: Any = data_args.sources  # lists, see `_check_together`
    eval_sources: Any = data_args.eval_sources
    common = (data_args, processor, model.config, args)
    if args.max_steps <= 0:  # every process plans the packs of rank 0, so that all agree on the number
        args.max_steps = steps_of_epochs(packed(sources, *common, epochs=1, rank=0), args)
    train_data, eval_data = packed(sources, *common), None
    if eval_sources:
        eval_data = packed(eval_sources, *common, epochs=1, dropout=False)
    return BagelTrainer(model, args, train_dataset=train_data, eval_dataset=eval_data, processing_class=processor)


# --------------------------------------------------------------------------------------------------------------------
# Settings


def parse(arguments: list[str]) -> tuple[ModelArguments, DataArguments, LoraArguments, Any]:
    """
    A dataclass per group of arguments: the command line wins over the file, the file over the defaults.

    Raises:
        ValueError: the file or the command line holds unknown names, or values that do not go together.
    """
    groups: Any = (ModelArguments, DataArguments, LoraArguments, BagelTrainingArguments)
    parser = _Parser(
        groups,
        prog="bagel train",
        description="Train BAGEL with settings from a YAML file and the command line, which wins over the file.",
        epilog=f"examples:\n{EXAMPLE}",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file with arguments")
    known = {action.dest for action in parser._actions} - {"help", "config"}
    config = parser.parse_known_args(arguments)[0].config
    if config is not None:
        values = _read_yaml(config)
        _refuse_unknown(config, list(values), known)
        parser.set_defaults(**values)
    parsed: list[Any]
    *parsed, _, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    _refuse_unknown("The command line", [name.lstrip("-") for name in unknown if name.startswith("--")], known)
    if unknown:
        raise ValueError(f"The command line holds {' '.join(unknown)}, which belongs to no argument.")
    model_args, data_args, lora_args, args = parsed
    _check_together(model_args, data_args, lora_args, args)
    return model_args, data_args, lora_args, args


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the lines of the examples as they are."""


class _Parser(HfArgumentParser):
    """Wrong arguments are a `ValueError`: one line instead of the usage of all 150 arguments."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold `name: value` lines, not a {type(values).__name__}.")
    return values


def _refuse_unknown(where: str, names: list[str], known: set[str]) -> None:
    unknown = [name.split("=")[0] for name in names if name.split("=")[0] not in known]
    if unknown:
        guesses = {name: difflib.get_close_matches(str(name), known, 1) for name in unknown}
        named = [f"{name} (did you mean {guess[0]}?)" if guess else str(name) for name, guess in guesses.items()]
        raise ValueError(f"{where} holds unknown arguments: {', '.join(named)}. See `bagel train --help`.")


def _check_together(model_args: ModelArguments, data_args: DataArguments, lora_args: LoraArguments, args: Any) -> None:
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing: the model folder to start from.")
    if not data_args.sources:
        raise ValueError("sources is missing: a list of {format, files, ...} to train on.")
    for name in ("sources", "eval_sources"):
        value = getattr(data_args, name)
        if value and not (isinstance(value, list) and all(isinstance(entry, dict) for entry in value)):
            raise ValueError(f"{name} must be a list of {{format, files, ...}}, got {value!r}.")
    if lora_args.lora_experts not in (None, "und", "gen", "both"):
        raise ValueError(f"lora_experts={lora_args.lora_experts!r} is none of und, gen and both.")
    if model_args.quantization not in (None, "4bit"):
        raise ValueError(f"quantization={model_args.quantization!r} is unknown; there is 4bit.")
    if model_args.quantization is not None and lora_args.lora_experts is None:
        raise ValueError("Quantized weights are not trained: set lora_experts to und, gen or both.")
    if args.eval_strategy != "no" and not data_args.eval_sources:
        raise ValueError(f"eval_strategy={args.eval_strategy} needs eval_sources.")


def checkpoint_to_resume(args: Any) -> str | bool | None:
    """
    What `--resume_from_checkpoint` means. `auto`: the last complete checkpoint, or a fresh start if there is none.
    `true`: the last complete one, which must exist. Otherwise a path.

    Raises:
        ValueError: a fresh start would mix its checkpoints with those of an earlier run.
    """
    wanted = args.resume_from_checkpoint
    if wanted == "auto":
        found = last_complete_checkpoint(args.output_dir)
        return None if found is None else str(found)
    if wanted is None and (there := sorted(path.name for path in Path(args.output_dir).glob("checkpoint-*"))):
        raise ValueError(
            f"{args.output_dir} holds {', '.join(there)}. Go on with `--resume_from_checkpoint auto`, or choose "
            "another output_dir."
        )
    return True if str(wanted).lower() == "true" else wanted


# --------------------------------------------------------------------------------------------------------------------
# Model


def load(args: ModelArguments) -> tuple[Any, Any]:
    """Model and processor, with the code of this package (not with the code in the model's folder)."""
    settings: dict[str, Any] = {"stage": args.stage, "attn_implementation": args.attn_implementation}
    settings = {name: value for name, value in settings.items() if value is not None}
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    if args.quantization is not None:
        from transformers import BitsAndBytesConfig

        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = BagelForUnifiedMultimodal.from_pretrained(args.model_name_or_path, dtype=dtype, **settings)
    assert isinstance(model, BagelForUnifiedMultimodal)
    if args.timestep_shift is not None:
        model.config.timestep_shift = args.timestep_shift
    processor = BagelProcessor.from_pretrained(str(args.model_name_or_path), trust_remote_code=True)
    processor.follow_model(model.config)  # `stage` decides what the model can see and draw
    return model, processor


def with_adapters(model: Any, args: LoraArguments, training_args: Any, quantization: str | None) -> Any:
    """The model with LoRA adapters on the chosen experts; only they and `modules_to_save` are trained."""
    try:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    except ImportError as error:
        raise ImportError('Adapters need peft: `pip install "bagel-transformers[train]"`.') from error
    if quantization is not None:
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=training_args.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    alpha: Any = args.lora_alpha  # PEFT takes fractions too
    experts: Any = args.lora_experts  # one of its three values, see `_check_together`
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=alpha,
        lora_dropout=args.lora_dropout,
        target_modules=lora_targets(model, experts),
        modules_to_save=args.modules_to_save,
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    return model


# --------------------------------------------------------------------------------------------------------------------
# Data


def packed(
    sources: list[dict],
    args: DataArguments,
    processor: Any,
    config: Any,
    training_args: Any,
    epochs: int | None = None,
    dropout: bool = True,
    rank: int | None = None,
) -> Any:
    """
    Packs of the sources.

    Args:
        epochs: passes over each source; `None` = endless.
        dropout: `False` drops no condition.
        rank: whose packs; by default this process's.

    Raises:
        ValueError: the processor is that of another model, or a source is wrong.
    """
    processor.check_model(config)
    dropouts: dict[str, Any] = {name: getattr(args, name) if dropout else 0.0 for name in DROPOUTS}
    return PackedDataset(
        [source(entry) for entry in sources],
        processor,
        expected_num_tokens=args.expected_num_tokens,
        max_num_tokens=args.max_num_tokens,
        max_num_tokens_per_sample=args.max_num_tokens_per_sample,
        look_ahead=args.look_ahead,
        seed=training_args.seed if training_args.data_seed is None else training_args.data_seed,
        epochs=epochs,
        rank=training_args.process_index if rank is None else rank,
        world_size=training_args.world_size,
        report=True,
        **{name: value for name, value in dropouts.items() if value is not None},
    )


def source(entry: dict) -> Any:
    """
    A `DataSource` from an entry of `sources`.

    Raises:
        ValueError: an unknown format, missing files, or settings that this format does not have.
    """
    rest = dict(entry)
    kind = str(rest.pop("format", None))
    settings = {name: rest.pop(name) for name in entry if name in SOURCE_FIELDS}
    if kind.startswith("python:"):
        module, _, function = kind.removeprefix("python:").partition(":")
        if not function:
            raise ValueError(f"Source format {kind!r} must be python:module:function.")
        rows = getattr(importlib.import_module(module), function)(**rest)
        return DataSource(**{"name": function, "rows": rows} | settings)
    if kind not in READERS:
        raise ValueError(f"Unknown source format {kind!r}; there are {', '.join(READERS)}, python:module:function.")
    files = rest.pop("files", rest.pop("path", None))
    if files is None or rest:
        wrong = f"unknown settings {', '.join(rest)}" if rest else "its files are missing"
        raise ValueError(f"Source {settings.get('name', kind)!r}: {wrong}.")
    return READERS[kind](files, **settings)


def steps_of_epochs(one_pass: Any, args: Any) -> int:
    """Optimizer steps that `num_train_epochs` passes take: one pass is planned, without decoding images, to count."""
    packs = sum(1 for _ in one_pass.plan())
    steps = math.ceil(args.num_train_epochs * packs / args.gradient_accumulation_steps)
    logger.warning(f"{packs} packs per pass and process: {args.num_train_epochs:g} epochs take {steps} steps.")
    return steps


if __name__ == "__main__":
    sys.exit(main())
