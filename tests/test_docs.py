# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What a newcomer does: the README's code, the demo, pipelines."""

import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import pipeline


def code_blocks(repo, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (repo / "README.md").read_text(), flags=re.M | re.S)


def test_every_python_block_of_the_readme_runs(repo, tmp_path, monkeypatch, capsys):
    for name in ("assets", "checkpoints"):
        (tmp_path / name).symlink_to(repo / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(repo)
    blocks = code_blocks(repo, "python")
    assert len(blocks) >= 7
    namespace = {}
    for block in blocks:
        assert len(block.splitlines()) <= 10, "examples of the README fit into ten lines"
        exec(compile(block, "README.md", "exec"), namespace)
    assert isinstance(namespace["image"], Image.Image)
    assert (tmp_path / "circle.png").exists()


def test_memory_table_of_the_readme_is_what_the_script_computes(repo):
    printed = subprocess.run(
        [sys.executable, repo / "benchmarks" / "memory.py"], capture_output=True, text=True, check=True
    ).stdout.strip()
    stated = re.search(r"<!-- memory table -->\n(.*?)\n<!-- end", (repo / "README.md").read_text(), flags=re.S)[1]
    assert stated == printed


def test_readme_front_matter_names_license_library_and_task(repo):
    front = (repo / "README.md").read_text().split("---")[1]
    for line in ("license: apache-2.0", "library_name: transformers", "pipeline_tag: any-to-any", "base_model: "):
        assert line in front


def test_demo_saves_a_sheet(repo, tmp_path):
    done = subprocess.run(
        [sys.executable, repo / "demo.py", "--output", tmp_path, "--num-timesteps", "3"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    sheet = Image.open(tmp_path / "contact_sheet.png")
    assert sheet.size > (900, 900)
    assert "Drawing" in done.stderr, "the steps show a progress bar"
    assert "Look at" in done.stdout


@pytest.fixture(scope="module")
def any_to_any(tiny_directory):
    return pipeline("any-to-any", model=str(tiny_directory), trust_remote_code=True)


@pytest.fixture
def messages(repo):
    image = str(repo / "assets" / "cat.jpg")
    return [{"role": "user", "content": [{"type": "image", "path": image}, {"type": "text", "text": "Make it night"}]}]


FAST = {"num_timesteps": 3, "progress_bar": False}


@pytest.mark.core
def test_any_to_any_pipeline_answers(any_to_any, messages, model, processor):
    said = any_to_any(text=messages, max_new_tokens=5, return_full_text=False)[0]["generated_text"]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert said == processor.decode(tokens, skip_special_tokens=True)


@pytest.mark.core
def test_any_to_any_pipeline_draws_and_edits(any_to_any, messages, model, processor):
    text = [{"role": "user", "content": [{"type": "text", "text": "a red car"}]}]
    drawn = any_to_any(text=text, generation_mode="image", generate_kwargs=dict(FAST))[0]["generated_image"]
    assert drawn.size == (256, 256)
    seeded = {**FAST, "generator": torch.Generator().manual_seed(0)}
    edited = any_to_any(text=messages, generation_mode="image", edit=True, generate_kwargs=seeded)
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", generation_mode="image"
    )
    seeded = {**FAST, "generator": torch.Generator().manual_seed(0)}
    direct = model.generate(**inputs, generation_mode="image", **seeded)[0]
    assert edited[0]["generated_image"].tobytes() == direct.tobytes()


@pytest.mark.core
def test_image_text_to_text_pipeline_answers(tiny_directory, messages):
    pipe = pipeline("image-text-to-text", model=str(tiny_directory), trust_remote_code=True)
    answer = pipe(text=messages, max_new_tokens=5)[0]["generated_text"]
    assert answer[-1]["role"] == "assistant"
    assert answer[-1]["content"]
