# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The trainer: its loss is that of one big batch, its checkpoints are whole or absent, its logs say what happened."""

import gc
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import fresh_tiny_model, join_packs, pad_rows, random_row, sample_pack, tiny_config, training_pack
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments

from bagel.modeling_bagel import BagelForUnifiedMultimodal
from bagel.training import trainer as trainer_module
from bagel.training.arguments import BagelTrainingArguments
from bagel.training.checkpoints import last_complete_checkpoint, why_incomplete
from bagel.training.latent_cache import LatentCache, picture_key
from bagel.training.metering import Meter, matrices, pack_flops
from bagel.training.packed import PackedDataset
from bagel.training.pictures import contact_sheet, plot_losses, track_picture
from bagel.training.sources import DataSource
from bagel.training.trainer import BagelTrainer


pytest.importorskip("torchdata")
pytestmark = pytest.mark.core

PACKS = [  # of one step: different lengths, one without a picture that is learned, one without labels
    [[("text", 4), ("noise", 2, 3)], [("text", 2), ("vit", 2, 2), ("text", 5)]],
    [[("text", 6), ("text", 1), ("text", 3)]],
    [[("vae", 2, 2), ("noise", 3, 3)]],
    [[("text", 1), ("vae", 1, 2), ("noise", 2, 2), ("text", 7)]],
]
PLAIN = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


def sample_packs() -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    return [sample_pack(segments, generator) for samples in PACKS for segments in samples]


def packs() -> list[dict]:
    """`PACKS`, with weights for the labels and what a packed dataset reports."""
    singles, made = sample_packs(), []
    for samples in PACKS:
        made.append(join_packs([singles.pop(0) for _ in samples]))
        made[-1]["ce_loss_weights"] = torch.arange(1.0, 1 + len(made[-1].get("ce_loss_indexes", [])))
        made[-1]["report"] = {"sample_ids": [f"sample {len(made)}"], "skipped": []}
    return made


def one_big_pack() -> dict:
    big = join_packs(sample_packs())
    big["ce_loss_weights"] = torch.cat([pack["ce_loss_weights"] for pack in packs()])
    return big


def arguments(folder: Path, **settings) -> BagelTrainingArguments:
    defaults = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    return BagelTrainingArguments(output_dir=str(folder), **defaults | settings)


def only(rows: list) -> dict:
    """A collator for packs that are ready."""
    return dict(rows[0])


def trainer_of_packs(folder: Path, dataset: list[dict], model=None, **settings) -> BagelTrainer:
    model = model or fresh_tiny_model()
    return BagelTrainer(model, arguments(folder, **settings), train_dataset=dataset, data_collator=only)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def step_of(before: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What plain gradient descent with a rate of 1 subtracted."""
    return {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}


def gradients_of(model: torch.nn.Module, **batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=tolerance, rtol=tolerance, msg=name)


# ---- the loss


@pytest.mark.parametrize("settings", [{}, {"ce_loss_reweighting": True}, {"gradient_checkpointing": True}])
def test_accumulated_packs_give_the_loss_and_gradients_of_one_big_pack(tmp_path, settings):
    loss_weights = {"ce_weight": 0.25, "mse_weight": 2.0}
    model = fresh_tiny_model()
    before = weights(model)
    trainer = trainer_of_packs(
        tmp_path, packs(), model, max_steps=1, gradient_accumulation_steps=4, **PLAIN, **loss_weights, **settings
    )
    trainer.train()
    big = fresh_tiny_model(**loss_weights, ce_loss_reweighting=settings.get("ce_loss_reweighting", False))
    loss, gradients = gradients_of(big, **one_big_pack())
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert_same(step_of(before, model), gradients)
    output = big(**one_big_pack())
    logged, label_weights = trainer.state.log_history[0], one_big_pack()["ce_loss_weights"]
    ce = (output.ce * label_weights).sum() / label_weights.sum() if settings == {"ce_loss_reweighting": True} else None
    assert logged["ce"] == pytest.approx(float(output.ce.mean() if ce is None else ce), rel=1e-5)
    assert logged["mse"] == pytest.approx(float(output.mse.mean()), rel=1e-5)


def test_the_mean_of_the_losses_of_packs_is_another_number():
    """So that the tests around could fail."""
    model, singles = fresh_tiny_model(), packs()
    for pack in singles:
        del pack["report"]
    with torch.no_grad():
        mean = sum(float(model(**pack).loss) for pack in singles) / len(singles)
        assert abs(mean - float(model(**one_big_pack()).loss)) > 0.05


def test_stock_trainer_weighs_every_label_of_padded_batches_alike(tmp_path):
    generator = torch.Generator().manual_seed(1)
    rows = [
        random_row(segments, generator)
        for segments in ([("text", 9)], [("vit", 2, 2), ("text", 2)], [("text", 3), ("vae", 1, 2), ("text", 5)])
    ]

    def batch(some: list) -> dict:
        made = pad_rows(some, "right")
        made["labels"] = made["input_ids"].masked_fill((made["attention_mask"] == 0) | (made["input_ids"] < 3), -100)
        return made

    model = fresh_tiny_model()
    before = weights(model)
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        max_steps=1,
        gradient_accumulation_steps=3,
        per_device_train_batch_size=1,
        remove_unused_columns=False,
        **PLAIN,
    )
    Trainer(model, settings, train_dataset=rows, data_collator=batch).train()
    _, gradients = gradients_of(fresh_tiny_model(), **batch(rows))
    assert_same(step_of(before, model), gradients)


TWO_RANKS = """
import sys
import conftest, test_trainer, torch, transformers
from pathlib import Path
folder, settings = Path(sys.argv[1]), eval(sys.argv[2])
trainer = test_trainer.trainer_of_packs(
    folder, test_trainer.packs(), max_steps=1, gradient_accumulation_steps=2, **test_trainer.PLAIN, **settings)
trainer._get_train_sampler = torch.utils.data.SequentialSampler  # the last pack of rank 0 is the one without labels
trainer.train()
if trainer.is_world_process_zero():
    torch.save({"weights": test_trainer.weights(trainer.model), "log": trainer.state.log_history[0]}, folder / "out.pt")
if transformers.__version__ < "5.23":
    test_trainer.end_and_look(trainer)
    sys.exit()  # it cannot load an optimizer on several CPU ranks
trainer = test_trainer.trainer_of_rows(folder / "a", ema_decay=0.9, max_steps=4, save_steps=2, save_strategy="steps")
trainer.train()
again = test_trainer.trainer_of_rows(folder / "a", ema_decay=0.9, max_steps=4, save_strategy="no")
again.train(str(folder / "a" / "checkpoint-2"))
for one, other in zip(trainer.model.parameters(), again.model.parameters()):
    assert torch.equal(one, other)
assert trainer.state.log_history[-2]["loss"] == again.state.log_history[-2]["loss"]
states = [torch.load(folder / "a" / "checkpoint-2" / f"rng_state_{rank}.pth", weights_only=False) for rank in (0, 1)]
assert not torch.equal(states[0]["cpu"], states[1]["cpu"]), "the ranks draw the same noise"
test_trainer.end_and_look(trainer, again)
"""


def group_threads() -> int:
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)


def end_and_look(*trainers: BagelTrainer) -> None:
    """A thread of the group that is left when Python shuts down may abort a process that did everything right."""
    assert torch.distributed.is_initialized()
    assert group_threads() > 0 or not Path("/proc/self/task").exists()
    gc.disable()  # what is freed is freed by `end`, not by chance
    for trainer in trainers:
        trainer.end()
    assert not torch.distributed.is_initialized() and group_threads() == 0


def run_ranks(code: str, *arguments: str, ranks: int = 2) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    environment |= {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:  # a rank that fails leaves the other waiting
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n\n".join(output[-3000:] for output in outputs)


@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}])
def test_two_ranks_give_the_loss_and_gradients_of_one_big_pack_and_resume_exactly(tmp_path, settings):
    run_ranks(TWO_RANKS, str(tmp_path), repr(settings))
    found = torch.load(tmp_path / "out.pt", weights_only=False)
    model = fresh_tiny_model()
    before = weights(model)
    loss, gradients = gradients_of(model, **one_big_pack())
    assert found["log"]["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert found["log"]["ce"] == pytest.approx(float(model(**one_big_pack()).ce.mean()), rel=1e-5)
    assert_same({name: before[name] - value for name, value in found["weights"].items()}, gradients)


# ---- packed datasets and rows


class Rows:
    """Pictures of one colour, to be drawn or named; the last two cannot be used."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count + 2

    def __getitem__(self, index: int) -> dict:
        name, colour = [("red", (255, 0, 0)), ("green", (0, 255, 0)), ("blue", (0, 0, 255))][index % 3]
        picture = Image.new("RGB", (128, 128), colour)
        text = {"type": "text", "text": name * (1 + index % 4)}
        spans = [[text], [{"type": "image"}]] if index % 2 else [[{"type": "image"}], [text]]
        if index >= self.count:
            spans = spans[:1]  # no assistant
        messages = [{"role": role, "content": span} for role, span in zip(("user", "assistant"), spans)]
        return {"id": index, "messages": messages, "images": [picture] if "image" in str(messages) else []}


def tiny_checkpoint() -> Path:
    return Path(__file__).parents[1] / "checkpoints" / "tiny-random"


def trainer_of_rows(folder: Path, eval_rows: int = 0, **settings) -> BagelTrainer:
    processor = AutoProcessor.from_pretrained(tiny_checkpoint(), trust_remote_code=True)
    model = BagelForUnifiedMultimodal.from_pretrained(tiny_checkpoint())
    budget = {"max_num_tokens": 320}
    args = arguments(folder, **{"max_steps": 2, "learning_rate": 1e-3} | settings)
    place = {"rank": args.process_index, "world_size": args.world_size}
    data = PackedDataset(DataSource("rows", Rows(20)), processor, epochs=None, **budget, **place)
    held_out = PackedDataset(DataSource("held out", Rows(eval_rows)), processor, **budget) if eval_rows else None
    return BagelTrainer(model, args, train_dataset=data, eval_dataset=held_out, processing_class=processor)


def test_packs_train_and_say_how(tmp_path):
    trainer = trainer_of_rows(tmp_path, max_steps=8, logging_steps=4, peak_flops_per_device=1e12)
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[1]
    assert last["loss"] < first["loss"]
    assert last["loss"] == pytest.approx(last["ce"] + last["mse"], rel=0.2)  # means of steps, and of all tokens
    assert 0.5 < last["fill"] <= 1 and last["tokens_per_second"] > 0 and 0 < last["mfu"] < 1
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines} == {"rows:20", "rows:21"} and last["num_skipped"] == len(lines)
    assert "ValueError" in lines[0]["reason"] and lines[0]["rank"] == 0
    assert trainer.state.total_flos > 0 and trainer.state.epoch == 1.0


def test_pictures_that_come_again_are_encoded_once_when_latents_are_kept(tmp_path, monkeypatch):
    settings = {"max_steps": 8, "logging_steps": 1}
    plain = trainer_of_rows(tmp_path / "plain", **settings)
    kept = trainer_of_rows(tmp_path / "kept", latent_cache_gb=1e-3, **settings)
    encoded = {id(model): 0 for model in (plain.model, kept.model)}
    posteriors = BagelForUnifiedMultimodal._posteriors

    def count(model, images):
        encoded[id(model)] += sum(bool(image.any()) for image in images)  # groups are filled up with zeros
        return posteriors(model, images)

    monkeypatch.setattr(BagelForUnifiedMultimodal, "_posteriors", count)
    for trainer in (plain, kept):
        trainer.train()
    losses = [[line["mse"] for line in trainer.state.log_history if "mse" in line] for trainer in (plain, kept)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)  # the noise is the same, and drawn anew every time
    cache = kept.model.latent_cache
    assert encoded[id(kept.model)] == len(cache) < encoded[id(plain.model)]
    assert cache.num_bytes == sum(both.nbytes for both in cache.kept.values())


def test_latents_are_kept_under_adapters_too(tmp_path):
    peft = pytest.importorskip("peft")
    plain = trainer_of_rows(tmp_path)
    bagel, settings = plain.model, {"max_steps": 1, "latent_cache_gb": 1e-3}
    model = peft.get_peft_model(bagel, peft.LoraConfig(r=2, target_modules=bagel.lora_targets("gen")))
    BagelTrainer(model, arguments(tmp_path, **settings), train_dataset=plain.train_dataset).train()
    assert len(bagel.latent_cache) > 0


def test_what_a_latent_cache_keeps_does_not_depend_on_the_pictures_beside_it():
    model = BagelForUnifiedMultimodal.from_pretrained(tiny_checkpoint())
    images = [torch.rand(3, 32, 32) * 2 - 1 for _ in range(11)]
    kept = []
    for some in (images, images[:1], images[3:5] + images[:1]):
        model.latent_cache = LatentCache(1e6)
        model.encode_images(some)
        kept.append(model.latent_cache.kept[picture_key(images[0])])
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])


def test_a_full_latent_cache_keeps_what_it_has_and_encodes_the_rest():
    model = BagelForUnifiedMultimodal.from_pretrained(tiny_checkpoint())
    stride = model.config.latent_downsample
    images = [torch.rand(3, size, size) * 2 - 1 for size in (stride, 2 * stride, stride, 2 * stride)]
    alone = model.encode_images(images, sample_posterior=False)
    model.latent_cache = LatentCache(max_bytes=3 * alone[0].nbytes * 2)
    for _ in range(2):
        for found, expected in zip(model.encode_images(images, sample_posterior=False), alone):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert set(model.latent_cache.kept) == {picture_key(images[0]), picture_key(images[2])}
    assert picture_key(images[0]) != picture_key(images[0].reshape(3, 1, -1)) != picture_key(images[0] + 1e-3)


def test_rows_with_a_collator_train_too(tmp_path):
    trainer = trainer_of_rows(tmp_path)
    collator = trainer.processing_class.collator()
    args = arguments(tmp_path, max_steps=2, per_device_train_batch_size=3, save_strategy="steps", save_steps=2)
    rows = [Rows(20)[index] for index in range(21)]
    trainer = BagelTrainer(trainer.model, args, train_dataset=rows, eval_dataset=rows[:4], data_collator=collator)
    trainer.train()
    assert trainer.state.log_history[0]["ce"] > 0
    assert trainer._report["sample_ids"][0].startswith("row ")
    assert trainer.evaluate()["eval_loss"] > 0
    assert why_incomplete(tmp_path / "checkpoint-2") is None
    trainer.args.max_steps = 3
    trainer.train(True)
    assert trainer.state.global_step == 3 and trainer._resume == tmp_path / "checkpoint-2"


def test_a_processor_of_another_model_is_refused_with_both_values(tmp_path):
    trainer = trainer_of_rows(tmp_path)
    trainer.model.config.max_latent_size = 8
    with pytest.raises(ValueError, match="max_latent_size is 16 for the processor, 8 for the model"):
        BagelTrainer(trainer.model, trainer.args, processing_class=trainer.processing_class)
    trainer.processing_class.follow_model(trainer.model.config)
    BagelTrainer(trainer.model, trainer.args, processing_class=trainer.processing_class)


def test_a_finite_dataset_and_one_of_another_rank_are_refused(tmp_path):
    trainer = trainer_of_rows(tmp_path)
    trainer.train_dataset.epochs = 2
    with pytest.raises(ValueError, match="epochs=None"):
        trainer.train()
    trainer.train_dataset.epochs = None
    trainer.train_dataset.world_size = 3
    with pytest.raises(ValueError, match="rank 0 of 3"):
        trainer.train()


@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"bf16": True}])
def test_checkpointed_and_bfloat16_steps_are_close_to_plain_ones(tmp_path, settings):
    plain, other = trainer_of_rows(tmp_path / "plain"), trainer_of_rows(tmp_path / "other", **settings)
    plain.train()
    other.train()
    tolerance = 2e-2 if "bf16" in settings else 1e-5
    for one, same in zip(plain.state.log_history[:2], other.state.log_history[:2]):
        assert same["loss"] == pytest.approx(one["loss"], rel=tolerance)


# ---- what is trained


@pytest.mark.parametrize(
    ("options", "trained", "frozen"),
    [
        ({}, ["language_model", "vit_model", "connector", "llm2vae", "time_embedder"], ["vae."]),
        ({"freeze_llm": True}, ["vit_model", "connector", "llm2vae"], ["language_model", "vae."]),
        ({"freeze_vit": True}, ["language_model", "connector"], ["vit_model", "vae."]),
        ({"freeze_connector": True}, ["language_model", "vit_model"], ["connector", "vae."]),
    ],
)
def test_freeze_options_stop_their_parts(tmp_path, options, trained, frozen):
    model = trainer_of_packs(tmp_path, packs(), **options).model
    for name, parameter in model.named_parameters():
        if any(name.startswith(part) for part in trained + frozen):
            assert parameter.requires_grad == any(name.startswith(part) for part in trained), name


def test_freeze_und_trains_the_generation_expert_and_the_text_head_only(tmp_path):
    model = fresh_tiny_model()
    before = weights(model)
    trainer = trainer_of_packs(tmp_path, packs(), model, freeze_und=True, max_steps=1, weight_decay=0.1, **PLAIN)
    trainer.train()
    moved = {name for name, step in step_of(before, model).items() if step.abs().max() > 0}
    expected = {name for name, p in model.named_parameters() if "_moe_gen" in name and p.requires_grad}
    assert expected <= moved
    parts = {"vae2llm", "llm2vae", "time_embedder", "lm_head"}
    assert {name for name in moved - expected if not parts & set(name.split("."))} == set()
    assert model.config.text_config.freeze_und


def test_freezing_everything_is_refused(tmp_path):
    with pytest.raises(ValueError, match="stage 1"):
        trainer_of_packs(tmp_path, packs(), fresh_tiny_model(stage=1), freeze_und=True)
    model = fresh_tiny_model()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="Nothing is left to train"):
        trainer_of_packs(tmp_path, packs(), model)


# ---- averaged weights


def test_averaged_weights_follow_the_trained_ones_and_are_a_model_of_their_own(tmp_path):
    trainer = trainer_of_rows(tmp_path, ema_decay=0.5, max_steps=3, save_strategy="steps", save_steps=3)
    seen = [weights(trainer.model)]
    step_end = trainer._on_step_end

    def remember():
        step_end()
        seen.append(weights(trainer.model))

    trainer._on_step_end = remember
    trainer.train()
    name = "language_model.model.norm.weight"
    average = seen[0][name]
    for number, trained in enumerate(
        seen[1:]
    ):  # the library's decay after n steps: min(decay, (1 + n) / (10 + n)), 0 first
        decay = 0.0 if number == 0 else min(0.5, (1 + number) / (10 + number))
        average = decay * average + (1 - decay) * trained[name]
    checkpoint = tmp_path / "checkpoint-3"
    averaged = AutoModel.from_pretrained(checkpoint / "ema", trust_remote_code=True)
    torch.testing.assert_close(averaged.get_parameter(name), average)
    assert not torch.equal(average, seen[-1][name])
    assert AutoProcessor.from_pretrained(checkpoint / "ema", trust_remote_code=True).tokenizer is not None
    saved = AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
    assert all(torch.equal(saved.get_parameter(key), value) for key, value in seen[-1].items())
    assert AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True).tokenizer is not None
    stored = BagelForUnifiedMultimodal.from_pretrained(tiny_checkpoint())
    for ids in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(saved.config, ids) == getattr(stored.config, ids)
        assert getattr(saved.generation_config, ids) == getattr(stored.generation_config, ids)


# ---- what stops a run


def test_a_loss_that_is_not_finite_stops_training_before_anything_is_stepped(tmp_path):
    dataset = packs()[:1] * 3
    bad = dict(packs()[3])
    bad["padded_latent"] = bad["padded_latent"] * math.nan
    trainer = trainer_of_packs(
        tmp_path, [*dataset, bad], max_steps=9, save_strategy="steps", save_steps=1, save_only_model=True, **PLAIN
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler([*dataset, bad])
    with pytest.raises(FloatingPointError, match=r"loss of step 4 is nan.*sample 4"):
        trainer.train()
    facts = json.loads((tmp_path / "nonfinite_batch.json").read_text())
    assert facts["step"] == 4 and facts["sample_ids"] == ["sample 4"] and facts["mse"]["not_finite"] > 0
    assert not (tmp_path / "checkpoint-4").exists()
    saved = BagelForUnifiedMultimodal.from_pretrained(tmp_path / "checkpoint-3")
    assert all(torch.equal(saved.get_parameter(name), value) for name, value in weights(trainer.model).items())


def test_a_gradient_that_is_not_finite_stops_training_too(tmp_path):
    model = fresh_tiny_model()
    before = weights(model)
    model.llm2vae.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match="gradient norm of step 1"):
        trainer_of_packs(tmp_path, packs(), model, max_steps=1).train()
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())


def test_a_pack_with_nothing_to_learn_is_named(tmp_path):
    pack = join_packs([sample_pack([("vae", 2, 2)], torch.Generator().manual_seed(0))])
    pack["report"] = {"sample_ids": ["nothing:1"], "skipped": []}
    with pytest.raises(ValueError, match="nothing:1"):
        trainer_of_packs(tmp_path, [pack], max_steps=1).train()


# ---- checkpoints


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer_of_rows(folder, ema_decay=0.9, max_steps=4, save_strategy="steps", save_steps=2).train()
    return folder


def copy_run(run: Path, folder: Path) -> Path:
    import shutil

    return Path(shutil.copytree(run, folder / "run"))


@pytest.mark.parametrize(
    "file",
    [
        "model.safetensors",
        "ema/model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "rank_state_0.pt",
        "trainer_state.json",
        "config.json",
        "complete.json",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_checkpoint_that_is_not_whole_is_passed_over_and_named(saved_run, tmp_path, file, damage, caplog):
    run = copy_run(saved_run, tmp_path)
    assert last_complete_checkpoint(run).name == "checkpoint-4"
    broken = run / "checkpoint-4" / file
    if damage == "missing":
        broken.unlink()
    else:
        broken.write_bytes(broken.read_bytes()[:-1])
    assert last_complete_checkpoint(run).name == "checkpoint-2"
    assert file in why_incomplete(run / "checkpoint-4")


def test_resuming_names_what_it_takes_and_what_it_does_not(saved_run, tmp_path):
    run = copy_run(saved_run, tmp_path)
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    trainer = trainer_of_rows(run, ema_decay=0.9, max_steps=4)
    with pytest.raises(ValueError, match=r"checkpoint-4 is incomplete: optimizer.pt is missing"):
        trainer.train(str(run / "checkpoint-4"))
    trainer.train(True)
    assert [log["step"] for log in trainer.state.log_history[-3:-1]] == [3, 4]
    with pytest.raises(ValueError, match="no complete checkpoint"):
        trainer_of_rows(tmp_path / "empty").train(True)


def test_resuming_a_finished_run_steps_no_further(saved_run, tmp_path):
    run = copy_run(saved_run, tmp_path)
    trainer = trainer_of_rows(run, ema_decay=0.9, max_steps=4)
    trainer.train(True)
    assert trainer.state.global_step == 4
    saved = BagelForUnifiedMultimodal.from_pretrained(run / "checkpoint-4")
    assert all(torch.equal(saved.get_parameter(name), value) for name, value in weights(trainer.model).items())


def test_old_checkpoints_go_and_nothing_half_written_stays(tmp_path):
    trainer = trainer_of_rows(tmp_path, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=2)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == ["checkpoint-2", "checkpoint-3"]
    assert not (tmp_path / ".incomplete").exists()


def test_the_best_checkpoint_is_known_by_its_final_name(tmp_path):
    trainer = trainer_of_rows(
        tmp_path,
        eval_rows=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path and best.is_dir()
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)


# ---- evaluation and pictures


def test_evaluation_says_the_same_twice_and_does_not_touch_training(tmp_path):
    trainer = trainer_of_rows(tmp_path, eval_rows=8)
    state = torch.random.get_rng_state()
    first, second = trainer.evaluate(), trainer.evaluate()
    assert torch.equal(state, torch.random.get_rng_state())
    for name in ("eval_loss", "eval_ce", "eval_mse"):
        assert first[name] == second[name] > 0
    assert first["eval_loss"] == pytest.approx(first["eval_ce"] + first["eval_mse"])


def test_pictures_are_drawn_with_the_averaged_weights_on_a_sheet(tmp_path, repo, monkeypatch):
    prompts = [{"text": "draw red"}, {"text": "make it blue", "image": str(repo / "assets" / "cat.jpg")}]
    options = {"num_timesteps": 3, "height": 32, "width": 32}
    settings = {"sample_prompts": prompts, "sample_options": json.dumps(options), "sample_steps": 2, "ema_decay": 0.9}
    trainer = trainer_of_rows(tmp_path, **settings)
    draw, drawn_with = trainer_module.draw_prompt, []

    def spy(*args, **options):
        drawn_with.append(trainer.model.llm2vae.weight.detach().clone())
        return draw(*args, **options)

    monkeypatch.setattr(trainer_module, "draw_prompt", spy)
    trainer.train()
    assert Image.open(tmp_path / "samples" / "step-2.png").size[0] > 1000
    assert len(drawn_with) == 2 and not torch.equal(drawn_with[0], trainer.model.llm2vae.weight)
    with trainer.averaged_weights():
        assert torch.equal(drawn_with[0], trainer.model.llm2vae.weight)
    again = trainer_of_rows(tmp_path / "without")
    again.train()
    assert [log["loss"] for log in again.state.log_history[:2]] == [
        log["loss"] for log in trainer.state.log_history[:2]
    ]


def test_pictures_reach_the_trackers():
    class Writer:
        def add_image(self, *args, **kwargs):
            self.got = args, kwargs

    class Board:
        tb_writer = Writer()

    class Wandb:
        run, logged = object(), None
        Image = staticmethod(lambda picture: picture)

        def log(self, values):
            self.logged = values

    class Weights:
        _wandb = Wandb()

    sheet = contact_sheet([("a prompt", None, Image.new("RGB", (8, 8), "red"))], "step 1")
    track_picture([Board(), Weights(), object()], sheet, 7)
    (name, pixels, step), options = Board.tb_writer.got
    assert (name, step, options) == ("samples", 7, {"dataformats": "HWC"})
    assert pixels.shape == (sheet.height, sheet.width, 3)
    assert Weights._wandb.logged == {"samples": sheet, "train/global_step": 7}


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="needs BagelTrainingArguments"):
        BagelTrainer(fresh_tiny_model(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="sample_prompts"):
        arguments(tmp_path, sample_prompts='["draw red"]')
    with pytest.raises(ValueError, match=r"ema_decay=1.5"):
        arguments(tmp_path, ema_decay=1.5)
    with pytest.raises(ValueError, match="latent_cache_gb=-1"):
        arguments(tmp_path, latent_cache_gb=-1)


def test_the_loss_curve_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    history = [{"step": 1, "loss": 2.0, "ce": 1.0, "mse": 1.0}, {"step": 2, "eval_loss": 1.0}, {"step": 2, "loss": 1.5}]
    assert plot_losses(history, tmp_path / "curve.png") and Image.open(tmp_path / "curve.png").size[0] > 800
    assert not plot_losses([{"step": 1, "train_runtime": 1.0}], tmp_path / "nothing.png")


# ---- numbers


@pytest.mark.parametrize(
    "segments",
    [
        [("text", 5), ("text", 9)],
        [("text", 4), ("vit", 3, 2), ("text", 6)],
        [("text", 4), ("vae", 2, 2), ("noise", 3, 2)],
    ],
)
def test_flops_are_three_times_those_of_the_forward_pass(segments):
    model = fresh_tiny_model()
    model.set_attn_implementation("eager")
    pack = training_pack([segments])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**pack)
    counted = counter.get_total_flops()
    assert pack_flops(pack, matrices(model), model.config) == pytest.approx(
        3 * counted, rel=1e-3
    )  # some versions multiply for rotary tables


def test_padding_is_neither_counted_as_tokens_nor_as_a_sample():
    pack = training_pack([[("text", 5)], [("text", 9)]])
    padded = {**pack, "sample_lens": [*pack["sample_lens"], 100]}
    model, meter = fresh_tiny_model(), Meter()
    sizes = matrices(model)
    assert pack_flops(padded, sizes, model.config) == pack_flops(pack, sizes, model.config)
    meter.add(padded, {"ce": torch.ones(3), "mse": None})
    sums = dict(zip(Meter.NAMES, meter.sums(torch.device("cpu")).tolist()))
    assert (sums["samples"], sums["tokens"], sums["labels"]) == (2, pack["sequence_length"], 3)


def test_weights_of_labels_are_counted_in_the_config_too():
    assert tiny_config().ce_loss_reweighting is False
    weighted, pack = fresh_tiny_model(ce_loss_reweighting=True), training_pack([[("text", 5)]])
    pack["ce_loss_weights"] = torch.arange(1.0, 1 + len(pack["ce_loss_indexes"]))
    output = weighted(**pack)
    expected = (output.ce * pack["ce_loss_weights"]).sum() / pack["ce_loss_weights"].sum()
    torch.testing.assert_close(output.loss, expected)
    with pytest.raises(ValueError, match="two counts"):
        weighted(**pack, num_items_in_batch=torch.tensor([1, 2, 3]))
