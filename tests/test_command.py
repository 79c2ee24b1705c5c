# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The command `bagel`: its help, its exit codes, and the ways to start it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bagel import __main__ as command


def run(folder: Path, *arguments: str, repo: Path) -> subprocess.CompletedProcess:
    """Run Python in a folder with this checkout importable as `bagel`, installed or not."""
    (folder / "path").mkdir(exist_ok=True)
    (folder / "path" / "bagel").symlink_to(repo)
    environment = os.environ | {"PYTHONPATH": str(folder / "path"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize("name", command.COMMANDS)
def test_help_of_every_command_has_an_example(name, capsys):
    if name == "train":
        pytest.importorskip("torchdata")
    with pytest.raises(SystemExit) as end:
        command.main([name, "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert f"usage: bagel {name} " in said
    assert re.search(rf"^examples?:\n +bagel {name} ", said, flags=re.M), said[-500:]


def test_help_lists_every_command_and_the_exit_codes(capsys):
    assert command.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(
        re.search(rf"^  {name} +{re.escape(entry.purpose)}$", said, re.M) for name, entry in command.COMMANDS.items()
    )
    assert "0 = done, 1 = failed" in said and "2 = wrong arguments" in said
    assert command.main([]) == 2
    assert capsys.readouterr().err.startswith("usage: bagel COMMAND")


@pytest.mark.parametrize(("name", "near"), [("trian", "'train'"), ("demos", "'demo'"), ("adapt", "'adopt'")])
def test_an_unknown_command_names_the_nearest_one(name, near, capsys):
    assert command.main([name]) == 2
    said = capsys.readouterr().err
    assert repr(name) in said and f"Did you mean {near}?" in said and said.count("\n") == 1


def test_wrong_arguments_exit_with_2(tmp_path, capsys):
    for arguments in (["eval", str(tmp_path / "nowhere")], ["adopt"], ["demo", "--image", str(tmp_path / "nowhere")]):
        with pytest.raises(SystemExit) as end:
            command.main(arguments)
        assert end.value.code == 2
        assert f"bagel {arguments[0]}: error: " in capsys.readouterr().err


def test_what_fails_exits_with_1_and_the_reason(tmp_path, capsys):
    assert command.main(["adopt", str(tmp_path / "nowhere")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("bagel adopt: error: ") and "nowhere" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: [1", "cannot be read"),
        ("- max_steps", "must hold `name: value` lines, not a list"),
        ("max_stepz: 3", "did you mean max_steps?"),
        ("max_steps: many", "invalid int value: 'many'"),
    ],
)
def test_a_wrong_settings_file_is_one_line_and_exit_code_2(tmp_path, capsys, text, message):
    pytest.importorskip("torchdata")
    file = tmp_path / "wrong.yaml"
    file.write_text(text, encoding="utf-8")
    assert command.main(["train", "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("bagel train: error: ") and message in said and said.count("\n") == 1


def test_training_without_its_model_exits_with_1_and_the_reason(tmp_path, capsys):
    pytest.importorskip("torchdata")
    missing = ["--model_name_or_path", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    sources = '[{"format": "conversations", "files": "x.jsonl"}]'
    assert command.main(["train", *missing, "--sources", sources, "--max_steps", "1"]) == 1
    said = capsys.readouterr().err
    assert "bagel train: error: " in said and "nowhere" in said


def test_the_package_runs_as_a_module(tmp_path, repo):
    done = run(tmp_path, "-m", "bagel", "--help", repo=repo)
    assert done.returncode == 0 and done.stdout.startswith("usage: bagel COMMAND"), done.stderr
    assert run(tmp_path / "path", "-m", "bagel", "trian", repo=repo).returncode == 2


def test_default_outputs_are_in_the_current_folder(tmp_path, repo):
    options = ("--number", "1", "--num-timesteps", "2")
    done = run(tmp_path, "-m", "bagel", "eval", *options, repo=repo)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "outputs" / "evaluation" / "evaluation.json").read_text())["results"]


ROWS = """
from PIL import Image

def rows():
    text, image = {"type": "text", "text": "red"}, {"type": "image"}
    messages = [{"role": "user", "content": [text]}, {"role": "assistant", "content": [image]}]
    return [{"id": index, "messages": messages, "images": [Image.new("RGB", (128, 128), "red")]} for index in range(8)]
"""


def test_torchrun_starts_training(tmp_path, repo):
    pytest.importorskip("torchdata")
    (tmp_path / "some_rows.py").write_text(ROWS, encoding="utf-8")
    settings = {
        "model_name_or_path": repo / "checkpoints" / "tiny-random",
        "sources": json.dumps([{"format": "python:some_rows:rows"}]),
        "max_num_tokens": 320,
        "max_steps": 2,
        "output_dir": "out",
        "report_to": "none",
    }
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = run(
        tmp_path, *launcher, "-m", "bagel", "train", "--use_cpu", "--disable_tqdm", "True", *arguments, repo=repo
    )
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and (tmp_path / "out" / "model.safetensors").exists()
