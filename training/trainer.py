# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""`transformers.Trainer` for training packs: the loss of the whole optimizer step, what is logged of it, checkpoints
that survive being killed, averaged weights.

It knows packs, not where they come from (`data.py`), and nothing of a command line (`script.py`).
"""

import contextlib
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, rotate_checkpoints
from transformers.utils import logging

from .data import PackedDataset
from .latent_cache import LatentCache
from .metering import Meter, count_entries, gen_siblings, is_in, matrices, pack_flops
from .pictures import contact_sheet, track_picture


logger = logging.get_logger(__name__)

MANIFEST = "complete.json"  # written last: the files of a checkpoint and their sizes
STAGING = ".incomplete"  # where a checkpoint is written before it gets its name
ADAPTER_FILE = "adapter_model.safetensors"
EMA_FOLDER, EMA_STATE = "ema", "ema_state.pt"
NONFINITE_FILE, SKIPPED_FILE = "nonfinite_batch.json", "skipped.jsonl"
SAMPLES_FOLDER = "samples"
LOSS_CURVE = "loss_curve.png"


@dataclass
class BagelTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with defaults for packs (a pack is a batch), and what BAGEL adds.

    The loss of a step is `ce_weight * mean(ce) + mse_weight * mean(mse)`: the means are taken over all text labels and
    all learned latent tokens of the optimizer step, whatever packs, accumulation steps and ranks they are spread over.
    """

    per_device_train_batch_size: int = field(default=1, metadata={"help": "Conversations per pack; 1 for ready packs."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Packs and conversations keep their columns."})
    use_cache: bool = field(default=True, metadata={"help": "As stored: packs never use a cache."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "A loss that is not finite stops training."})
    ce_weight: float | None = field(
        default=None, metadata={"help": "Weight of the text loss. Default: that of the model's config."}
    )
    mse_weight: float | None = field(
        default=None, metadata={"help": "Weight of the picture loss. Default: that of the model's config."}
    )
    ce_loss_reweighting: bool = field(
        default=False, metadata={"help": "Weigh every text label by the pack's ce_loss_weights."}
    )
    freeze_llm: bool = field(default=False, metadata={"help": "Freeze the language model, both experts of it."})
    freeze_vit: bool = field(default=False, metadata={"help": "Freeze the vision tower."})
    freeze_und: bool = field(
        default=False,
        metadata={
            "help": "No gradient through understanding tokens: freezes the understanding expert, its norms, the token "
            "embeddings, the vision tower and the connector. The text head still learns."
        },
    )
    freeze_connector: bool = field(default=False, metadata={"help": "Freeze the connector of the vision tower."})
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Average the trained weights with this decay (it ramps up: (1 + n) / (10 + n)); 0 = off."},
    )
    latent_cache_gb: float = field(
        default=0.0,
        metadata={
            "help": "GB of memory per process in which VAE encodings of training pictures are kept, so that later "
            "epochs need not encode them again; 0 = off. 1024 x 1024 pixels take 2 MB. For pictures that come "
            "unchanged, without random crops and the like."
        },
    )
    peak_flops_per_device: float | None = field(
        default=None, metadata={"help": "Peak FLOP/s of one device, to log the share of them that is used (mfu)."}
    )
    sample_prompts: str | None = field(
        default=None,
        metadata={
            "help": "List (JSON on the command line) of {text, image?}: pictures that are drawn during training, with "
            "the averaged weights if there are any, into samples/ and the tracker."
        },
    )
    sample_steps: int | None = field(
        default=None, metadata={"help": "Steps between such drawings. Default: at every evaluation."}
    )
    sample_options: dict | str | None = field(
        default=None,
        metadata={"help": "Arguments of generate for them (JSON on the command line), e.g. num_timesteps."},
    )

    def __post_init__(self):
        for name in ("sample_prompts", "sample_options"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, json.loads(getattr(self, name)))
        if not all(isinstance(prompt, Mapping) and prompt.get("text") for prompt in self.sample_prompts or []):
            raise ValueError(f"sample_prompts={self.sample_prompts}: every one is a dict with a text, maybe an image.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must be at least 0 (off) and below 1.")
        if self.latent_cache_gb < 0:
            raise ValueError(f"latent_cache_gb={self.latent_cache_gb} must be at least 0 (off).")
        super().__post_init__()


class BagelTrainer(Trainer):
    """
    Trains `BagelForUnifiedMultimodal` on a [`PackedDataset`], or on rows with `processor.collator()`.

    Args:
        model, args, train_dataset, eval_dataset, processing_class, ...: as in `transformers.Trainer`; `args` are
            [`BagelTrainingArguments`]. A `PackedDataset` must be endless (`epochs=None`); training ends at `max_steps`.

    Raises:
        ValueError: `processing_class` is the processor of another model, or `args` do not fit.
    """

    args: BagelTrainingArguments

    def __init__(self, model=None, args: BagelTrainingArguments | None = None, **kwargs):
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
        self.ema = None
        self.meter = Meter()
        self.num_skipped = 0
        self._ema_parameters: list[torch.nn.Parameter] = []
        self._report: dict[str, Any] = {}
        self._resume: Path | None = None
        self._staging = False
        self._loader = None
        self._matrices = matrices(self.model)
        if self.args.latent_cache_gb:
            bagel = next(m for m in self.model.modules() if hasattr(type(m), "latent_cache"))  # PEFT wraps it
            bagel.latent_cache = LatentCache(self.args.latent_cache_gb * 1e9)
        self.add_callback(_Hooks(self))
        if isinstance(self.train_dataset, PackedDataset):
            self.train_dataset.report = True
            self.args.ignore_data_skip = True  # the loader's state goes on where it was; nothing is to be skipped
        if self._collates_rows():
            self.data_collator.report = True

    def _collates_rows(self) -> bool:
        """`processor.collator()` makes the packs. Its class has a copy per folder that a processor was loaded from."""
        return getattr(self.data_collator, "makes_packs", False)

    # ---- data

    def get_train_dataloader(self):
        """Packs come from a loader of their own, which nothing shards and whose state is in the checkpoints."""
        dataset = self.train_dataset
        if not isinstance(dataset, PackedDataset):
            return super().get_train_dataloader()
        if dataset.epochs is not None or self.args.max_steps <= 0:
            raise ValueError(
                f"A PackedDataset(epochs={dataset.epochs}) with max_steps={self.args.max_steps}: ranks may have "
                "different numbers of packs, so training counts steps. Build it with epochs=None and set max_steps."
            )
        place, ours = (dataset.rank, dataset.world_size), (self.args.process_index, self.args.world_size)
        if place != ours:
            raise ValueError(
                f"The PackedDataset reads for rank {place[0]} of {place[1]}, this process is rank {ours[0]} of "
                f"{ours[1]}. Build it after the processes know each other, or pass rank and world_size."
            )
        self._loader = self._pack_loader(dataset, self.args.dataloader_num_workers)
        if self._resume is not None:
            self._loader.load_state_dict(self._rank_state()["loader"])
        return self._loader

    def get_eval_dataloader(self, eval_dataset=None):
        """Every evaluation reads the same packs."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        if not isinstance(dataset, PackedDataset):
            return super().get_eval_dataloader(eval_dataset)
        if dataset.epochs is None:
            raise ValueError("An endless PackedDataset cannot be evaluated on: build it with epochs=1.")
        return self._pack_loader(dataset, 0)

    def _pack_loader(self, dataset: PackedDataset, workers: int):
        try:
            from torchdata.stateful_dataloader import StatefulDataLoader
        except ImportError as error:
            raise ImportError("Training on packs needs torchdata: `pip install bagel-transformers[train]`.") from error
        args = self.args
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # its own call of torch
            return StatefulDataLoader(
                dataset,
                batch_size=None,
                num_workers=workers,
                pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
                prefetch_factor=args.dataloader_prefetch_factor if workers else None,
                multiprocessing_context=args.dataloader_multiprocessing_context if workers else None,
                generator=torch.Generator(),  # making an iterator takes a number: not from the generator of the noise
            )

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        """For packs (2,): text labels, or their weights, and learned latent tokens of the step, over all ranks."""
        if not batch_samples or "sequence_length" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        reweighting = self.args.ce_loss_reweighting
        counts = torch.zeros(2)
        for pack in batch_samples:
            labels = pack.get("ce_loss_weights") if reweighting else None
            counts[0] += count_entries(pack.get("ce_loss_indexes")) if labels is None else labels.sum()
            counts[1] += count_entries(pack.get("mse_loss_indexes"))
        counts = counts.to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        if not counts.any():
            names = [name for pack in batch_samples for name in pack.get("report", {}).get("sample_ids", ["unknown"])]
            raise ValueError(
                f"Step {self.state.global_step + 1} has nothing to learn: no text label and no noisy latent token in "
                f"{len(batch_samples)} packs (samples {', '.join(map(str, names))})."
            )
        return counts

    # ---- one step

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        self._report = inputs.pop("report", None) or {}
        self._keep_skipped(self._report.get("skipped", []))
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
        """Save what is known of the batch and raise: nothing is stepped, no checkpoint is written."""
        step, names = self.state.global_step + 1, self._report.get("sample_ids")
        facts = {"step": step, "rank": self.args.process_index, "what": what, "value": str(value), "sample_ids": names}
        for name in ("ce", "mse"):
            errors = None if outputs is None else outputs.get(name)
            if errors is not None:
                bad = (~torch.isfinite(errors)).reshape(len(errors), -1).any(-1).nonzero()[:, 0].tolist()
                facts[name] = {"tokens": len(errors), "not_finite": len(bad), "first": bad[:10]}
        file = Path(self.args.output_dir) / NONFINITE_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(facts, indent=2), encoding="utf-8")
        raise FloatingPointError(
            f"The {what} of step {step} is {value}{self._samples()}. Nothing was stepped and no checkpoint written, "
            f"see {file}. Resume from the last checkpoint with a lower learning rate, or without these samples."
        )

    def _samples(self) -> str:
        names = self._report.get("sample_ids")
        return "" if names is None else f" (samples {', '.join(map(str, names))})"

    def _keep_skipped(self, skipped: list) -> None:
        if not skipped:
            return
        self.num_skipped += len(skipped)
        os.makedirs(self.args.output_dir, exist_ok=True)
        with open(os.path.join(self.args.output_dir, SKIPPED_FILE), "a", encoding="utf-8") as file:
            for name, reason in skipped:
                line = {"step": self.state.global_step + 1, "rank": self.args.process_index, "id": name}
                file.write(json.dumps({**line, "reason": reason}) + "\n")

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> float:
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
        """Loss, ce and mse over all packs. Noise and timesteps are the same every time, and training's stay its own."""
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
        return EvalLoopOutput(None, None, metrics, int(dict(zip(Meter.NAMES, sums.tolist()))["samples"]))

    def draw_samples(self) -> Path | None:
        """Pictures for `sample_prompts` as one labelled sheet, `samples/step-N.png`; one process draws."""
        prompts = self.args.sample_prompts
        if not prompts or not self.is_world_process_zero():
            return None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            logger.warning_once("No sample pictures are drawn: one process alone does not have the weights.")
            return None
        model, training = self.model, self.model.training
        model.eval()
        rows = []
        with _own_randomness(self.args.seed), self.averaged_weights(), torch.no_grad():
            for number, prompt in enumerate(prompts):
                image = prompt.get("image")
                image = Image.open(image) if isinstance(image, str | os.PathLike) else image
                image = None if image is None else ImageOps.exif_transpose(image).convert("RGB")
                rows.append((prompt["text"], image, self._draw(prompt["text"], image, number)))
        model.train(training)
        sheet = contact_sheet(rows, f"step {self.state.global_step}")
        file = Path(self.args.output_dir) / SAMPLES_FOLDER / f"step-{self.state.global_step}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(file)
        track_picture(self.callback_handler.callbacks, sheet, self.state.global_step)
        return file

    def _draw(self, text: str, image: Image.Image | None, seed: int) -> Image.Image:
        content = [] if image is None else [{"type": "image", "image": image}]
        inputs = self.processing_class.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            generation_mode="image",
        ).to(self.args.device)
        options = {"progress_bar": False, **(self.args.sample_options or {})}
        generator = torch.Generator().manual_seed(self.args.seed + seed)
        return self.model.generate(**inputs, generation_mode="image", generator=generator, **options)[0]

    # ---- logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.is_in_train:
            logs = {**logs, **self._measured()}
        super().log(logs, start_time)

    def _measured(self) -> dict[str, float]:
        """What the steps since the last log were like, over all ranks."""
        sums = self.meter.sums(self.args.device)
        *sums, num_skipped = self._over_ranks(torch.cat([sums, sums.new_tensor([self.num_skipped])])).tolist()
        peak = self.args.peak_flops_per_device
        peak = None if peak is None else peak * self.args.world_size
        measured = Meter.means(sums, self._capacity(), self.meter.seconds(), peak)
        self.meter = Meter()
        return {**measured, "num_skipped": int(num_skipped)}

    def _over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        return self.accelerator.gather(sums[None]).sum(0) if self.args.world_size > 1 else sums

    def _capacity(self) -> int | None:
        """Tokens that a pack may have."""
        return self.train_dataset.budget.max_num_tokens if isinstance(self.train_dataset, PackedDataset) else None

    # ---- checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """
        As in `Trainer`. `resume_from_checkpoint=True` takes the last checkpoint in `output_dir` that is complete and
        says which are not; a path must be a complete one.

        Raises:
            ValueError: there is no complete checkpoint, or the one asked for is not.
        """
        self._resume = None
        if resume_from_checkpoint:
            if resume_from_checkpoint is True:  # transformers would take the last one, whatever is in it
                self._resume = last_complete_checkpoint(self.args.output_dir)
                if self._resume is None:
                    raise ValueError(f"There is no complete checkpoint in {self.args.output_dir} to resume from.")
            elif (reason := why_incomplete(resume_from_checkpoint)) is not None:
                raise ValueError(f"Checkpoint {resume_from_checkpoint} is incomplete: {reason}.")
            else:
                self._resume = Path(resume_from_checkpoint)
            logger.warning(f"Resuming from {self._resume}")
        # transformers would align the model's ids with those of a tokenizer that knows nothing of BAGEL's spans
        self._processor, self.processing_class = self.processing_class, None
        try:
            return super().train(None if self._resume is None else str(self._resume), **kwargs)
        finally:
            self.processing_class = self._processor
            if self._loader is not None:  # ends its workers now: left to the garbage collector, each takes 5 s
                self._loader._iterator = None

    def _get_output_dir(self, trial) -> str:
        directory = super()._get_output_dir(trial)
        return os.path.join(directory, STAGING) if self._staging else directory

    def _save_checkpoint(self, model, trial) -> None:
        """Write everything under another name, list it, and only then give the checkpoint its own."""
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
            if self.state.best_model_checkpoint != best:  # it was named while it was staged
                self.state.best_model_checkpoint = str(final)
                self.state.save_to_json(str(staged / "trainer_state.json"))
            self._publish(staged, final)
            rotate_checkpoints(
                output_dir=str(directory),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()
        self.meter.pause(time.perf_counter() - started)

    @staticmethod
    def _publish(staged: Path, final: Path) -> None:
        sizes = {
            str(file.relative_to(staged)): file.stat().st_size for file in sorted(staged.rglob("*")) if file.is_file()
        }
        (staged / MANIFEST).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
        if final.exists():  # of an earlier run
            final.rename(staged.parent / f"replaced-{final.name}")
        staged.rename(final)
        shutil.rmtree(staged.parent)

    def _state_of_rank(self) -> dict[str, Any]:
        return {
            "loader": None if self._loader is None else self._loader.state_dict(),
            "meter": self.meter.sums(torch.device("cpu")),
            "loss": self._tr_loss.cpu(),
            "last_logged": self._globalstep_last_logged,
            "num_skipped": self.num_skipped,
        }

    def _rank_state(self) -> dict[str, Any]:
        file = self._resume / f"rank_state_{self.args.process_index}.pt"
        if not file.is_file():
            raise ValueError(
                f"{self._resume} holds no state for rank {self.args.process_index}: resume with the number of "
                "processes it was saved with (save_only_model=True saves none at all)."
            )
        return torch.load(file, map_location="cpu", weights_only=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Adapters come from the checkpoint itself; transformers 5.17 would take the averaged ones in it instead."""
        model = self.model if model is None else model
        stored = os.path.isfile(os.path.join(resume_from_checkpoint, ADAPTER_FILE))
        if stored and len(getattr(model, "peft_config", {})) == 1:
            model.load_adapter(str(resume_from_checkpoint), next(iter(model.peft_config)), is_trainable=True)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model, and with averaged weights also those, in `ema/`: a model folder of its own."""
        super().save_model(output_dir, _internal_call)
        if self.ema is not None:
            directory = os.path.join(output_dir or self.args.output_dir, EMA_FOLDER)
            with self.averaged_weights():
                super().save_model(directory, _internal_call=True)
            if self.args.should_save and _internal_call:
                torch.save(self.ema.state_dict(), os.path.join(output_dir, EMA_STATE))

    def end(self) -> None:
        """
        Leaves the other processes: call it last, when nothing is to be trained, evaluated or saved any more.

        The threads of a gloo group end only with its last user. One that still holds tensors while Python shuts down
        aborts the process ("terminate called without an active exception") after all its work was done well, so the
        wrapper that uses the group is let go here. Source: pytorch pull request 179291.
        """
        self.model_wrapped = self.model
        self.accelerator.end_training()

    # ---- averaged weights

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model has its averaged weights inside (if there are any), and its own again afterwards."""
        if self.ema is None:
            yield
            return
        self.ema.store(self._ema_parameters)
        self.ema.copy_to(self._ema_parameters)
        try:
            yield
        finally:
            self.ema.restore(self._ema_parameters)

    def _start_ema(self) -> None:
        try:
            from diffusers.training_utils import EMAModel
        except ImportError as error:
            raise ImportError("ema_decay needs diffusers: `pip install diffusers`.") from error
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("ema_decay needs whole weights on every rank: not with FSDP or DeepSpeed.")
        self._ema_parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.ema = EMAModel(self._ema_parameters, decay=self.args.ema_decay, foreach=True)
        self.ema.to(dtype=torch.float32)  # small steps are lost in bfloat16
        if self._resume is not None:
            self.ema.load_state_dict(torch.load(self._resume / EMA_STATE, map_location="cpu", weights_only=True))
            self.ema.shadow_params = [x.to(p.device) for x, p in zip(self.ema.shadow_params, self._ema_parameters)]
            self.ema.decay = self.args.ema_decay

    # ---- what the callback below calls

    def _on_train_begin(self) -> None:
        self.processing_class = self._processor
        self.meter = Meter()
        if self.args.ema_decay:
            self._start_ema()
        if self._resume is None:
            self.num_skipped = 0
            set_seed(self.args.seed + self.args.process_index)  # ranks must not draw the same noise
            return
        state = self._rank_state()
        self.meter = Meter(state["meter"])
        self.num_skipped = state["num_skipped"]
        self._tr_loss = state["loss"].to(self.args.device)
        self._globalstep_last_logged = state["last_logged"]

    def _on_step_end(self) -> None:
        if self.ema is not None and not self.accelerator.optimizer_step_was_skipped:
            self.ema.step(self._ema_parameters)
        if self._loader is not None:  # an endless stream has no epochs: the share of all steps
            self.state.epoch = self.state.global_step / self.state.max_steps
        if self.args.sample_steps and self.state.global_step % self.args.sample_steps == 0:
            started = time.perf_counter()
            self.draw_samples()
            self.meter.pause(time.perf_counter() - started)

    def _on_evaluate(self) -> None:
        if not self.args.sample_steps:
            self.draw_samples()


class _Hooks(TrainerCallback):
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
    """Torch's generators start from `seed` inside and are what they were afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


# --------------------------------------------------------------------------------------------------------------------
# What is trained


def set_loss(config: Any, args: BagelTrainingArguments) -> None:
    """Write the loss settings into the model's config, from which `forward` takes them."""
    for name in ("ce_weight", "mse_weight"):
        if getattr(args, name) is not None:
            setattr(config, name, getattr(args, name))
    config.ce_loss_reweighting = args.ce_loss_reweighting


def freeze(model: torch.nn.Module, args: BagelTrainingArguments) -> None:
    """
    Switch gradients off as the released options of these names do; the VAE never has any.

    Raises:
        ValueError: nothing would be left to train.
    """
    names, tied = {name for name, _ in model.named_parameters()}, model.config.tie_word_embeddings
    if args.freeze_und:
        if not model.config.visual_gen:
            raise ValueError("freeze_und leaves nothing to train in a model that only reads (stage 1).")
        model.config.text_config.freeze_und = True
    for name, parameter in model.named_parameters():
        frozen = (
            is_in(name, "vae")
            or (args.freeze_llm and is_in(name, "language_model"))
            or (args.freeze_vit and is_in(name, "vit_model"))
            or (args.freeze_connector and is_in(name, "connector"))
            or (args.freeze_und and _gets_nothing_from_und(name, names, tied))
        )
        if frozen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("Nothing is left to train: every parameter is frozen. Drop a freeze_ option.")


def _gets_nothing_from_und(name: str, names: set[str], tied: bool) -> bool:
    """Whether a parameter works on understanding tokens only, whose gradient `freeze_und` stops."""
    if is_in(name, "vit_model") or is_in(name, "connector"):
        return True
    if is_in(name, "embed_tokens"):
        return not tied
    return bool(gen_siblings(name) & names)


# --------------------------------------------------------------------------------------------------------------------
# Complete and incomplete checkpoints


def why_incomplete(checkpoint: str | os.PathLike) -> str | None:
    """`None` for a checkpoint whose files all are what they were when it was finished."""
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"it has no readable {MANIFEST}, which is written last"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def last_complete_checkpoint(directory: str | os.PathLike) -> Path | None:
    """The complete checkpoint with the highest step; later ones that are not complete are named in warnings."""
    directory = Path(directory)
    steps = {}
    for folder in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if folder.is_dir() and number.isdigit():
            steps[int(number)] = folder
    for folder in (directory / STAGING).glob("*"):
        logger.warning(f"Ignoring {folder}: it was being written when training was stopped.")
    for step in sorted(steps, reverse=True):
        reason = why_incomplete(steps[step])
        if reason is None:
            return steps[step]
        logger.warning(f"Ignoring checkpoint {steps[step]}: {reason}.")
    return None
