# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""`BagelTrainer`: `transformers.Trainer` for training packs.

What it adds: the loss is that of the whole optimizer step, what the packs were like is logged, checkpoints survive a
killed process and resume exactly, weights can be averaged, images are drawn while it trains. It knows packs, not where
they come from, and nothing of a command line (`script.py`).
"""

import contextlib
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput, rotate_checkpoints
from transformers.utils import logging

from .arguments import BagelTrainingArguments
from .checkpoints import STAGING, publish, resolve_checkpoint
from .ema import AveragedWeights
from .freezing import freeze, set_loss
from .latent_cache import LatentCache
from .metering import Meter, count_targets, matrices, pack_flops
from .packed import PackedDataset
from .pictures import contact_sheet, draw_prompt, track_picture
from .records import append_skipped, write_nonfinite


logger = logging.get_logger(__name__)

ADAPTER_FILE = "adapter_model.safetensors"
EMA_FOLDER, EMA_STATE = "ema", "ema_state.pt"
SAMPLES_FOLDER = "samples"


class BagelTrainer(Trainer):
    """
    Trains `BagelForUnifiedMultimodal` on a [`PackedDataset`], or on rows with `processor.collator()`.

    Args:
        model, args, train_dataset, eval_dataset, processing_class, ...: as in `transformers.Trainer`; `args` are
            [`BagelTrainingArguments`]. A `PackedDataset` must be endless (`epochs=None`); training ends at `max_steps`.

    Raises:
        ValueError: `args` are not [`BagelTrainingArguments`], `processing_class` is the processor of another model,
            there are several GPUs in one process, or nothing to train.
    """

    args: BagelTrainingArguments
    model: Any  # `Trainer` allows None or any module
    processing_class: Any
    data_collator: Any

    def __init__(self, model: Any = None, args: BagelTrainingArguments | None = None, **kwargs: Any):
        args = BagelTrainingArguments() if args is None else args
        if not isinstance(args, BagelTrainingArguments):
            raise ValueError(f"args are {type(args).__name__}; BagelTrainer needs BagelTrainingArguments.")
        super().__init__(model, args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process: a pack cannot be split. Start one process per GPU "
                "(`accelerate launch`), or choose one with CUDA_VISIBLE_DEVICES."
            )
        if hasattr(self.processing_class, "check_model"):
            self.processing_class.check_model(self.model.config)
        set_loss(self.model.config, self.args)
        freeze(self.model, self.args)
        self.ema: AveragedWeights | None = None
        self.meter = Meter()
        self.num_skipped = 0
        self._report: dict[str, Any] = {}
        self._resume: Path | None = None
        self._staging = False
        self._loader = None
        self._matrices = matrices(self.model)
        if self.args.latent_cache_gb:
            # with adapters, `self.model` is PEFT's wrapper
            bagel = next(m for m in self.model.modules() if hasattr(type(m), "latent_cache"))
            bagel.latent_cache = LatentCache(self.args.latent_cache_gb * 1e9)
        self.add_callback(_Hooks(self))
        if isinstance(self.train_dataset, PackedDataset):
            self.train_dataset.report = True
            self.args.ignore_data_skip = True  # resuming restores the loader's state instead of skipping packs
        if self._collates_rows():
            self.data_collator.report = True

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _collates_rows(self) -> bool:
        """
        Whether `processor.collator()` makes the packs. It is told by an attribute: remote code gives every model folder
        a class of its own, so `isinstance` would not find it.
        """
        return getattr(self.data_collator, "makes_packs", False)

    # ---- data

    def get_train_dataloader(self):
        """For a `PackedDataset` a `StatefulDataLoader`: accelerate does not shard it, checkpoints hold its state."""
        dataset = self.train_dataset
        if not isinstance(dataset, PackedDataset):
            return super().get_train_dataloader()
        if dataset.epochs is not None or self.args.max_steps <= 0:
            raise ValueError(
                f"A PackedDataset(epochs={dataset.epochs}) with max_steps={self.args.max_steps}: ranks may have "
                "different numbers of packs, so training counts steps. Build it with epochs=None and set max_steps."
            )
        rank, world_size = self.args.process_index, self.args.world_size
        if (dataset.rank, dataset.world_size) != (rank, world_size):
            raise ValueError(
                f"The PackedDataset reads for rank {dataset.rank} of {dataset.world_size}, this process is rank {rank} "
                f"of {world_size}. Build it after torch.distributed is initialized, or pass rank and world_size."
            )
        self._loader = pack_loader(dataset, self.args, self.args.dataloader_num_workers)
        if self._resume is not None:
            self._loader.load_state_dict(self._load_state_of_rank()["loader"])
        return self._loader

    def get_eval_dataloader(self, eval_dataset=None):
        """For a `PackedDataset` a loader in this process; every evaluation reads the same packs."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            assert isinstance(self.eval_dataset, dict)
            dataset = self.eval_dataset[dataset]
        if not isinstance(dataset, PackedDataset):
            return super().get_eval_dataloader(eval_dataset)
        if dataset.epochs is None:
            raise ValueError("An endless PackedDataset cannot be evaluated on: build it with epochs=1.")
        return pack_loader(dataset, self.args, 0)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        """For packs (2,): what [`count_targets`] gives, over all packs of the step and all ranks."""
        if not batch_samples or "sequence_length" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        targets = [count_targets(pack, self.args.ce_loss_reweighting) for pack in batch_samples]
        counts = torch.stack(targets).sum(0).to(device)
        if self.args.average_tokens_across_devices:
            counts = self._over_ranks(counts)
        if not counts.any():
            names = [name for pack in batch_samples for name in pack.get("report", {}).get("sample_ids", ["unknown"])]
            raise ValueError(
                f"Step {self.state.global_step + 1} has nothing to learn: no text label and no noisy latent token in "
                f"{len(batch_samples)} packs (samples {', '.join(map(str, names))})."
            )
        return counts

    # ---- one step

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self._report = inputs.pop("report", None) or {}
        if skipped := self._report.get("skipped", []):
            self.num_skipped += len(skipped)
            append_skipped(self._folder, self.state.global_step + 1, self.args.process_index, skipped)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not torch.isfinite(loss):
            self._stop_at_nonfinite("loss", float(loss), outputs)
        if "sequence_length" in inputs:
            self.meter.add(inputs, outputs, self.args.ce_loss_reweighting)
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaled = getattr(self.accelerator, "scaler", None) is not None  # float16 skips such steps by itself
        if norm is not None and not scaled and not math.isfinite(float(norm)):
            self._stop_at_nonfinite("gradient norm", float(norm), None)
        return norm

    def _stop_at_nonfinite(self, what: str, value: float, outputs: Any) -> None:
        """Record the batch and raise: no optimizer step is made and no checkpoint written."""
        step, names = self.state.global_step + 1, self._report.get("sample_ids")
        facts = {"step": step, "rank": self.args.process_index, "what": what, "value": str(value), "sample_ids": names}
        file = write_nonfinite(self._folder, facts, outputs)
        samples = "" if names is None else f" (samples {', '.join(map(str, names))})"
        raise FloatingPointError(
            f"The {what} of step {step} is {value}{samples}. No optimizer step was made and no checkpoint "
            f"written; details are in {file}. Resume from the last checkpoint with a lower learning rate, or without "
            "these samples."
        )

    def floating_point_ops(self, inputs: dict[str, Any]) -> Any:
        """Of a pack, see [`pack_flops`]; also what `mfu` is computed from."""
        if "sequence_length" not in inputs:
            return super().floating_point_ops(inputs)
        flops = pack_flops(inputs, self._matrices, self.model.config)
        self.meter.add_flops(flops)
        return flops

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # resumed at the end: the loop would make one step more
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # ---- evaluation

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        started = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        self.meter.pause(time.perf_counter() - started)
        return metrics

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Loss, ce and mse over all packs, with equal noise and timesteps every time; training's rng stays as it is."""
        if not isinstance(getattr(dataloader, "dataset", None), PackedDataset) and not self._collates_rows():
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        meter, training = Meter(), self.model.training
        self.model.eval()
        with _own_randomness(self.args.seed), torch.no_grad():
            for pack in dataloader:
                pack.pop("report", None)
                pack = self._prepare_inputs(pack)
                with self.compute_loss_context_manager():
                    meter.add(pack, self.model(**pack), self.args.ce_loss_reweighting)
        self.model.train(training)
        sums = self._over_ranks(meter.sums(self.args.device))
        means, config = Meter.means(sums.tolist(), None, 1.0), self.model.config
        metrics = {f"{metric_key_prefix}_{name}": means[name] for name in ("ce", "mse") if name in means}
        weights = {"ce": config.ce_weight, "mse": config.mse_weight}
        metrics[f"{metric_key_prefix}_loss"] = sum(weights[name] * means[name] for name in weights if name in means)
        nothing: Any = None  # predictions and labels
        return EvalLoopOutput(nothing, nothing, metrics, int(dict(zip(Meter.NAMES, sums.tolist()))["samples"]))

    def draw_samples(self) -> Path | None:
        """Draw `sample_prompts` into one labelled sheet, `samples/step-N.png`, on the first process only."""
        prompts: Any = self.args.sample_prompts
        if not prompts or not self.is_world_process_zero():
            return None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            logger.warning_once("No sample images are drawn: with FSDP or DeepSpeed no process has all weights.")
            return None
        model, training = self.model, self.model.training
        model.eval()
        options: Any = self.args.sample_options or {}
        seed = self.args.seed
        with _own_randomness(seed), self.averaged_weights(), torch.no_grad():
            rows = [
                draw_prompt(model, self.processing_class, prompt, seed + number, **options)
                for number, prompt in enumerate(prompts)
            ]
        model.train(training)
        sheet = contact_sheet(rows, f"step {self.state.global_step}")
        file = self._folder / SAMPLES_FOLDER / f"step-{self.state.global_step}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(file)
        track_picture(self.callback_handler.callbacks, sheet, self.state.global_step)
        return file

    # ---- logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.is_in_train:
            logs = {**logs, **self._measured()}
        super().log(logs, start_time)

    def _measured(self) -> dict[str, float]:
        """What the steps since the last log were like, over all ranks."""
        own = self.meter.sums(self.args.device)
        *sums, num_skipped = self._over_ranks(torch.cat([own, own.new_tensor([self.num_skipped])])).tolist()
        peak = self.args.peak_flops_per_device
        peak = None if peak is None else peak * self.args.world_size
        measured = Meter.means(sums, self._capacity(), self.meter.seconds(), peak)
        self.meter = Meter()
        return {**measured, "num_skipped": int(num_skipped)}

    def _over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        return _sum_over_ranks(self.accelerator, sums) if self.args.world_size > 1 else sums

    def _capacity(self) -> int | None:
        """Tokens that a pack may have."""
        return self.train_dataset.budget.max_num_tokens if isinstance(self.train_dataset, PackedDataset) else None

    # ---- checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        As in `Trainer`. `resume_from_checkpoint=True` takes the last complete checkpoint in `output_dir` and warns of
        later incomplete ones; a path must name a complete one.

        Raises:
            ValueError: there is no complete checkpoint, or the one asked for is not complete.
            FloatingPointError: loss or gradient norm became infinite or NaN.
        """
        self._resume = resolve_checkpoint(resume_from_checkpoint, self._folder)
        if self._resume is not None:
            logger.warning(f"Resuming from {self._resume}")
        # without a processing class: `Trainer` would overwrite the model's bos and eos ids with the tokenizer's
        self._processor, self.processing_class = self.processing_class, None
        try:
            return super().train(None if self._resume is None else str(self._resume), *args, **kwargs)
        finally:
            self.processing_class = self._processor
            if self._loader is not None:  # ends the workers now; the garbage collector would wait 5 s for each
                self._loader._iterator = None

    def _get_output_dir(self, trial) -> str:
        directory = super()._get_output_dir(trial)
        return os.path.join(directory, STAGING) if self._staging else directory

    def _save_checkpoint(self, model, trial) -> None:
        """Write the checkpoint in the staging folder, then the state of every rank, then publish it."""
        started = time.perf_counter()
        directory = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged, final = directory / STAGING / name, directory / name
        if self.args.should_save and staged.parent.exists():
            shutil.rmtree(staged.parent)
        self.accelerator.wait_for_everyone()
        self._staging, best = True, self.state.best_model_checkpoint
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        if not self.args.save_only_model:
            torch.save(self._state_of_rank(), staged / f"rank_state_{self.args.process_index}.pt")
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.state.best_model_checkpoint != best:  # `Trainer` set the staged path
                self.state.best_model_checkpoint = str(final)
                self.state.save_to_json(str(staged / "trainer_state.json"))
            publish(staged, final)
            rotate_checkpoints(
                output_dir=str(directory),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()
        self.meter.pause(time.perf_counter() - started)

    def _state_of_rank(self) -> dict[str, Any]:
        """What this process needs, besides `Trainer`'s own files, to resume exactly."""
        return {
            "loader": None if self._loader is None else self._loader.state_dict(),
            "meter": self.meter.sums(torch.device("cpu")),
            "loss": self._tr_loss.cpu(),
            "last_logged": self._globalstep_last_logged,
            "num_skipped": self.num_skipped,
        }

    def _load_state_of_rank(self) -> dict[str, Any]:
        assert self._resume is not None
        file = self._resume / f"rank_state_{self.args.process_index}.pt"
        if not file.is_file():
            raise ValueError(
                f"{self._resume} holds no state for rank {self.args.process_index}: resume with the number of "
                "processes it was saved with (save_only_model=True saves none at all)."
            )
        return torch.load(file, map_location="cpu", weights_only=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load adapters from the checkpoint's own folder; transformers 5.17 would take those in its `ema/` instead."""
        model = cast(Any, self.model) if model is None else model  # to type checkers a module has no adapters
        stored = os.path.isfile(os.path.join(resume_from_checkpoint, ADAPTER_FILE))
        if stored and len(getattr(model, "peft_config", {})) == 1:
            model.load_adapter(str(resume_from_checkpoint), next(iter(model.peft_config)), is_trainable=True)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and a copy with averaged weights (if there are any) as a model folder of its own, `ema/`."""
        super().save_model(output_dir, _internal_call)
        if self.ema is not None:
            folder = self._folder if output_dir is None else Path(output_dir)
            with self.averaged_weights():
                super().save_model(str(folder / EMA_FOLDER), _internal_call=True)
            if self.args.should_save and _internal_call:
                self.ema.save(folder / EMA_STATE)

    def end(self) -> None:
        """
        Destroy the process group. Call it last, when nothing is to be trained, evaluated or saved any more.

        A gloo group keeps its threads as long as any object refers to it. If threads are left when Python shuts down,
        the process may abort ("terminate called without an active exception") although training succeeded. The wrapped
        model refers to the group, so it is dropped first. Source: pytorch pull request 179291.
        """
        self.model_wrapped = self.model
        self.accelerator.end_training()

    # ---- averaged weights

    def averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """The model has its averaged weights (if there are any) inside the `with` block."""
        return contextlib.nullcontext() if self.ema is None else self.ema.applied()

    def _start_ema(self, decay: float) -> AveragedWeights:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("ema_decay needs whole weights on every rank: not with FSDP or DeepSpeed.")
        ema = AveragedWeights(self.model, decay)
        if self._resume is not None:
            ema.load(self._resume / EMA_STATE)
        return ema

    # ---- called by _Hooks

    def _on_train_begin(self) -> None:
        self.processing_class = self._processor
        self.meter = Meter()
        if self.args.ema_decay:
            self.ema = self._start_ema(self.args.ema_decay)
        if self._resume is None:
            self.num_skipped = 0
            set_seed(self.args.seed + self.args.process_index)  # noise differs between ranks
            return
        state = self._load_state_of_rank()
        self.meter = Meter(state["meter"])
        self.num_skipped = state["num_skipped"]
        self._tr_loss = state["loss"].to(self.args.device)
        self._globalstep_last_logged = state["last_logged"]

    def _on_step_end(self) -> None:
        if self.ema is not None and not self.accelerator.optimizer_step_was_skipped:
            self.ema.step()
        if self._loader is not None:  # an endless stream has no epochs: log the share of all steps
            self.state.epoch = self.state.global_step / self.state.max_steps
        if self.args.sample_steps and self.state.global_step % self.args.sample_steps == 0:
            started = time.perf_counter()
            self.draw_samples()
            self.meter.pause(time.perf_counter() - started)

    def _on_evaluate(self) -> None:
        if not self.args.sample_steps:
            self.draw_samples()


def _sum_over_ranks(accelerator: Any, sums: torch.Tensor) -> torch.Tensor:
    return accelerator.gather(sums[None]).sum(0)


class _Hooks(TrainerCallback):
    """Calls the trainer at points of the loop that `Trainer` has no method for."""

    def __init__(self, trainer: BagelTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._on_train_begin()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._on_step_end()

    def on_evaluate(self, args, state, control, **kwargs):
        self.trainer._on_evaluate()


@contextlib.contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Inside, torch's global generators start from `seed`; afterwards they have their former state."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def pack_loader(dataset: PackedDataset, args: TrainingArguments, workers: int) -> Any:
    """A `StatefulDataLoader` of ready packs, with the loader options of `args` and this number of workers."""
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError as error:
        raise ImportError("Training on packs needs torchdata: `pip install bagel-transformers[train]`.") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata calls it
        return StatefulDataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            prefetch_factor=args.dataloader_prefetch_factor if workers else None,
            multiprocessing_context=args.dataloader_multiprocessing_context if workers else None,
            generator=torch.Generator(),  # an iterator takes a random number: not from the rng of the noise
        )
