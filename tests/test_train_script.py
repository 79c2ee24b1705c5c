# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""`bagel train`: its settings, its sources, its configs; and that a run which is killed ends like one which is not."""

import json
import os
import shutil
import signal
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel


pytest.importorskip("torchdata")
pytestmark = pytest.mark.core
REPO = Path(__file__).resolve().parents[1]
TINY = REPO / "checkpoints" / "tiny-random"
CONFIGS = sorted(file.name for file in (REPO / "configs").glob("*.yaml"))

from bagel.training import script as train  # noqa: E402


def rows(count: int = 12) -> list[dict]:
    """Conversations about pictures of one colour, as `python:test_train_script:rows` gives them."""
    made = []
    for index in range(count):
        name = ("red", "green", "blue")[index % 3]
        text, image = {"type": "text", "text": name * (1 + index % 4)}, {"type": "image"}
        spans = [[text], [image]] if index % 2 else [[image], [text]]
        messages = [{"role": role, "content": span} for role, span in zip(("user", "assistant"), spans)]
        made.append({"id": index, "messages": messages, "images": [Image.new("RGB", (128, 128), name)]})
    return made


ROWS = {"format": "python:test_train_script:rows", "name": "colours", "count": 12}
SETTINGS = {
    "model_name_or_path": str(TINY),
    "sources": [ROWS],
    "max_num_tokens": 320,
    "learning_rate": "1e-3",
    "max_steps": 2,
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}


def write_config(folder: Path, **changes) -> str:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(SETTINGS | changes), encoding="utf-8")
    return str(file)


def run(folder: Path, *arguments: str, **changes) -> list[dict]:
    """What a run logs."""
    output = folder / "out"
    assert train.main(["--config", write_config(folder, **changes), "--output_dir", str(output), *arguments]) == 0
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


# ---- settings


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    config = write_config(tmp_path, weight_decay=0.1, lora_r=7)
    model, data, lora, args = train.parse(["--config", config, "--learning_rate", "3e-4", "--max_steps=5"])
    assert (args.learning_rate, args.max_steps, args.weight_decay, lora.lora_r) == (3e-4, 5, 0.1, 7)
    assert model.model_name_or_path == str(TINY) and data.sources == [ROWS]
    assert args.adam_beta1 == 0.9 and data.look_ahead == 64  # defaults
    assert train.parse(["--config", config])[3].learning_rate == 1e-3  # yaml reads 1e-3 as a text


def test_sources_can_be_given_on_the_command_line(tmp_path):
    _, data, _, _ = train.parse(["--config", write_config(tmp_path), "--sources", json.dumps([ROWS, ROWS])])
    assert data.sources == [ROWS, ROWS]


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"learning_rat": 1.0}, [], r"learning_rat \(did you mean learning_rate\?\)"),
        ({}, ["--max_step", "3"], r"command line holds unknown arguments: max_step \(did you mean max_steps\?\)"),
        ({}, ["7"], "holds 7"),
        ({"model_name_or_path": None}, [], "model_name_or_path is missing"),
        ({"sources": None}, [], "sources is missing"),
        ({"sources": {"format": "t2i_parquet"}}, [], "sources must be a list"),
        ({"lora_experts": "vit"}, [], "none of und, gen and both"),
        ({"quantization": "4bit"}, [], "set lora_experts"),
        ({"quantization": "3bit"}, [], "there is 4bit"),
        ({"eval_strategy": "steps"}, [], "needs eval_sources"),
    ],
)
def test_wrong_settings_are_named(tmp_path, changes, arguments, message, capsys):
    with pytest.raises(ValueError, match=message):
        train.parse(["--config", write_config(tmp_path, **changes), *arguments])
    assert train.main(["--config", write_config(tmp_path, **changes), *arguments]) == 2
    assert capsys.readouterr().err.startswith("bagel train: error: ")


def test_checkpoints_of_another_run_are_not_mixed_with_new_ones(tmp_path, capsys):
    (tmp_path / "out" / "checkpoint-7").mkdir(parents=True)
    config = write_config(tmp_path)
    assert train.main(["--config", config, "--output_dir", str(tmp_path / "out")]) == 2
    assert "checkpoint-7" in capsys.readouterr().err


# ---- sources


def encoded(colour: str) -> bytes:
    file = BytesIO()
    Image.new("RGB", (64, 64), colour).save(file, "PNG")
    return file.getvalue()


def write_sources(folder: Path) -> list[dict]:
    """Files of every format, and their entries."""
    datasets = pytest.importorskip("datasets")
    (folder / "images").mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "images" / "red.png")
    t2i = {"image": [encoded("red"), encoded("blue")], "captions": ['{"a": "red"}', '{"a": "blue"}']}
    datasets.Dataset.from_dict(t2i).to_parquet(folder / "t2i.parquet")
    edit = {"image_list": [[encoded("red"), encoded("blue")]], "instruction_list": [[["make it blue"]]]}
    datasets.Dataset.from_dict(edit).to_parquet(folder / "edit.parquet")
    turns = [{"from": "human", "value": "<image>which colour?"}, {"from": "gpt", "value": "red"}]
    (folder / "vlm.jsonl").write_text(json.dumps({"image": "red.png", "conversations": turns}) + "\n")
    spans = [[{"type": "image"}, {"type": "text", "text": "colour?"}], [{"type": "text", "text": "red"}]]
    messages = [{"role": role, "content": span} for role, span in zip(("user", "assistant"), spans)]
    (folder / "talk.jsonl").write_text(json.dumps({"messages": messages, "images": ["red.png"]}) + "\n")
    named = [{"role": message["role"], "content": "which colour is fire?"} for message in messages]
    datasets.Dataset.from_dict({"messages": [named], "images": [[]]}).to_parquet(folder / "talk.parquet")
    images = str(folder / "images")
    return [
        {"name": "t2i", "format": "t2i_parquet", "files": str(folder / "t2i.parquet"), "weight": 2},
        {"name": "edit", "format": "editing_parquet", "files": [str(folder / "edit.parquet")]},
        {"name": "vlm", "format": "vlm_jsonl", "files": str(folder / "vlm.jsonl"), "image_folder": images},
        {"name": "talk", "format": "conversations", "path": str(folder / "talk.jsonl"), "image_folder": images},
        {"name": "more", "format": "conversations", "files": str(folder / "talk.parquet")},
        {**ROWS, "name": "mine", "count": 3},
    ]


def test_every_format_is_read(tmp_path):
    sources = write_sources(tmp_path)
    model, data, _, args = train.parse(["--config", write_config(tmp_path, sources=sources)])
    model, processor = train.load(model)
    packs = train.packed(data.sources, data, processor, model.config, args, epochs=1)
    reports = [pack["report"] for pack in packs]
    names = {name.split(":")[0] for report in reports for name in report["sample_ids"]}
    assert names == {entry["name"] for entry in sources} and not any(report["skipped"] for report in reports)
    assert [source.weight for source in packs.sources[:2]] == [2, 1.0]
    assert run(tmp_path, sources=sources)[0]["loss"] > 0


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"format": "t2i"}, "Unknown source format 't2i'"),
        ({"format": "python:rows"}, "python:module:function"),
        ({"format": "conversations", "files": "x.jsonl", "wieght": 2}, "unknown settings wieght"),
        ({"format": "t2i_parquet", "name": "mine"}, "'mine': its files are missing"),
    ],
)
def test_wrong_sources_are_named(entry, message):
    with pytest.raises(ValueError, match=message):
        train.source(entry)


def test_epochs_become_steps(tmp_path):
    history = run(tmp_path, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2, max_num_tokens=400)
    model, data, _, args = train.parse(["--config", write_config(tmp_path, max_num_tokens=400)])
    model, processor = train.load(model)
    packs = list(train.packed(data.sources, data, processor, model.config, args, epochs=1))
    assert sum("loss" in log for log in history) == len(packs) and len(packs) > 2


def test_evaluation_and_a_loss_curve(tmp_path):
    pytest.importorskip("matplotlib")
    held_out = [{**ROWS, "count": 4}]
    history = run(tmp_path, eval_sources=held_out, eval_strategy="steps", eval_steps=2, ema_decay=0.9)
    assert any("eval_ce" in log for log in history)
    assert Image.open(tmp_path / "out" / "loss_curve.png").size[0] > 800
    for folder in (tmp_path / "out", tmp_path / "out" / "ema"):
        assert AutoModel.from_pretrained(folder, trust_remote_code=True).config.ce_weight == 1.0


# ---- configs

SMALL = {"model_name_or_path": str(TINY), "sources": json.dumps([ROWS]), "max_steps": 2, "warmup_steps": 1}
SMALL |= {"expected_num_tokens": 280, "max_num_tokens": 320, "max_num_tokens_per_sample": 320, "logging_steps": 1}
SMALL |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "dataloader_num_workers": 0, "sample_steps": 2}
SMALL |= {"sample_options": '{"num_timesteps": 2, "height": 32, "width": 32}', "bf16": False}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_holds_known_settings(name):
    model, data, lora, args = train.parse(["--config", str(REPO / "configs" / name), "--use_cpu"])
    assert data.sources and args.max_steps > 0 and args.bf16
    assert args.gradient_checkpointing == (name != "tiny_shapes.yaml")
    assert (lora.lora_experts is not None) == ("lora" in name)
    assert (model.quantization == "4bit") == (name == "qlora.yaml")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_runs_downscaled(tmp_path, name):
    arguments = dict(SMALL)
    if "lora" in name:
        pytest.importorskip("peft")
        pytest.importorskip("bagel.lora_bagel")
    if name == "qlora.yaml":
        pytest.importorskip("bitsandbytes")
        arguments["optim"] = "adamw_torch"
    if name == "tiny_shapes.yaml":
        arguments["lr_scheduler_kwargs"] = '{"num_decay_steps": 1}'
    if name == "stage1.yaml":
        arguments["sources"] = json.dumps([{**ROWS, "format": "python:test_train_script:questions"}])
        del arguments["sample_steps"], arguments["sample_options"]
    arguments = [part for key, value in arguments.items() for part in (f"--{key}", str(value))]
    config = str(REPO / "configs" / name)
    assert train.main(["--config", config, "--output_dir", str(tmp_path), *arguments]) == 0
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [log["step"] for log in history if "loss" in log] == [1, 2]
    assert (tmp_path / "samples" / "step-2.png").exists() == (name != "stage1.yaml")


def questions(count: int) -> list[dict]:
    return rows(count)[::2]


# ---- killed runs

KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[1:2]
import conftest
import torch
from bagel.training import script as train

when, count, save = sys.argv[2], [0], torch.save

def dying_save(*arguments, **settings):  # called several times per checkpoint: it dies in the middle of the third
    count[0] += "optimizer.pt" in str(arguments[1])
    if when == "in a save" and count[0] == 3:
        with open(arguments[1], "wb") as file:
            file.write(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    save(*arguments, **settings)

torch.save = dying_save
trainer = train.BagelTrainer
step = trainer.training_step

def dying_step(self, *arguments, **settings):
    if when == "between saves" and self.state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments, **settings)

trainer.training_step = dying_step
train.main(sys.argv[3:])
"""
LONG = {"max_steps": 8, "logging_steps": 3, "save_steps": 2, "ema_decay": 0.9, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory) -> tuple[list[dict], Path]:
    folder = tmp_path_factory.mktemp("never killed")
    return run(folder, **LONG), folder / "out"


@pytest.mark.parametrize(("when", "last"), [("between saves", 4), ("in a save", 4)])
def test_a_killed_run_ends_like_one_that_was_not(tmp_path, never_killed, when, last):
    history, finished = never_killed
    output = tmp_path / "out"
    arguments = ["--config", write_config(tmp_path, **LONG), "--output_dir", str(output)]
    folders = [str(Path(__file__).parent)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", KILLED, *folders, when, *arguments]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == -signal.SIGKILL, process.stderr[-3000:]
    assert max(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")) == last
    assert (output / ".incomplete" / "checkpoint-6").exists() == (when == "in a save")

    resumed = run(tmp_path, "--resume_from_checkpoint", "auto", **LONG)
    compared = ("step", "loss", "ce", "mse", "grad_norm", "learning_rate", "fill", "epoch")
    curves = [[{key: log[key] for key in compared} for log in logs if "loss" in log] for logs in (history, resumed)]
    assert curves[0] == curves[1] and [log["step"] for log in curves[0]] == [3, 6]
    for file in ("model.safetensors", "ema/model.safetensors"):
        expected, found = load_file(finished / file), load_file(output / file)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not (output / ".incomplete").exists()


def test_a_run_with_workers_is_the_same_and_resumes_exactly(tmp_path, never_killed):
    """Workers fetch packs ahead: those that were not trained on must come again."""
    settings = LONG | {"dataloader_num_workers": 2}
    losses = [[log["loss"] for log in logs if "loss" in log] for logs in (never_killed[0], run(tmp_path, **settings))]
    for step in (6, 8):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{step}")
    resumed = run(tmp_path, "--resume_from_checkpoint", "true", **settings)
    losses.append([log["loss"] for log in resumed if "loss" in log])
    assert losses[0] == losses[1] == losses[2]


def test_adapters_are_trained_alone_and_resume_exactly(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("bagel.lora_bagel")
    settings = LONG | {"lora_experts": "gen", "lora_r": 4, "modules_to_save": ["llm2vae"], "max_steps": 4}
    history = run(tmp_path, **settings)
    weights = [load_file(tmp_path / "out" / "adapter_model.safetensors")]
    assert all("_moe_gen" in name or "llm2vae" in name for name in weights[0])
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    resumed = run(tmp_path, "--resume_from_checkpoint", "auto", **settings)
    weights.append(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert [log.get("loss") for log in history] == [log.get("loss") for log in resumed]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
