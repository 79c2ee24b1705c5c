# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What a newcomer does: the code of README and docs, the demo, pipelines."""

import contextlib
import importlib
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import pipeline


REPO = Path(__file__).resolve().parent.parent
PAGES = sorted(str(page.relative_to(REPO)) for page in [REPO / "README.md", *(REPO / "docs").glob("*.md")])
OTHER_PAGES = ["CONTRIBUTING.md", "CHANGELOG.md"]
LAUNCHERS = {"accelerate": "launch", "torchrun": None}  # programs that start another, after a word of their own
PROGRAMS = ("pip", "git", "hf", "pre-commit", "cd", "pytest")  # of others: their options are not checked


def code_blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (REPO / page).read_text(encoding="utf-8"), flags=re.M | re.S)


def pages_with(language, pages=PAGES):
    return [page for page in pages if code_blocks(page, language)]


def commands(block):
    """The commands of a bash block, one list of words each, without comments, assignments before them and prompts."""
    lines = block.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [[*_without_assignments(line)] for line in words if line]


def _without_assignments(words):
    first = next(index for index, word in enumerate(words) if not re.fullmatch(r"[A-Z_]+=.*", word))
    return words[first:]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """An empty folder to run examples in, with the pictures and checkpoints that they name."""
    for name in ("assets", "checkpoints", "configs"):
        (tmp_path / name).symlink_to(REPO / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --------------------------------------------------------------------------------------------------------------------
# Python


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks_run_in_order(page, workspace):
    namespace = {"__name__": "__main__"}
    for number, block in enumerate(code_blocks(page, "python"), start=1):
        assert len(block.splitlines()) <= 16, f"block {number} of {page} is longer than an example should be"
        exec(compile(block, f"{page}, block {number}", "exec"), namespace)
    if page == "README.md":
        assert isinstance(namespace["image"], Image.Image)
        assert (workspace / "circle.png").exists()


# --------------------------------------------------------------------------------------------------------------------
# Bash: the commands exist and have the options that are named


@pytest.fixture(scope="module")
def help_of(tmp_path_factory):
    """`help_of(*words)` is what a program of this repository prints for --help; every program is asked once."""
    known, folder = {}, tmp_path_factory.mktemp("path")
    (folder / "bagel").symlink_to(REPO, target_is_directory=True)
    environment = os.environ | {"PYTHONPATH": str(folder)}

    def ask(*words):
        if words not in known:
            known[words] = in_this_process(words[2:]) if words[:2] == ("-m", "bagel") else in_a_new_one(words)
        return known[words]

    def in_this_process(words):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            assert importlib.import_module("bagel.__main__").main([*words, "--help"]) in (None, 0)
        return printed.getvalue()

    def in_a_new_one(words):
        command = [sys.executable, *words, "--help"]
        done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(words)} --help: {done.stderr}"
        return done.stdout

    return ask


def check_options(words, printed):
    for word in words:
        if word.startswith("-"):
            option = word.split("=")[0]
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", printed), f"{option} is no option here"
        if word.startswith(("configs/", "assets/", "checkpoints/", "benchmarks/", "constraints")):
            assert (REPO / word).exists(), f"{word} does not exist"


def check_command(words, help_of):
    program, *rest = words
    if program in LAUNCHERS:
        assert shutil.which(program, path=Path(sys.executable).parent)
        module = rest.index("-m")
        program, rest = "python", rest[module:]
    if program == ".venv/bin/python":
        program = "python"
    if program == "bagel":
        program, rest = "python", ["-m", "bagel", *rest]
    if program == "python" and rest[:2] == ["-m", "venv"]:
        return
    if program == "python" and rest[0] == "-m":
        entry = rest[:3] if rest[1] == "bagel" else rest[:2]
        check_options(rest[len(entry) :], help_of(*entry))
    elif program == "python":
        script, *options = rest
        assert (REPO / script).is_file(), f"{script} does not exist"
        takes_command = script == "convert_bagel.py" and options
        if options:
            check_options(options, help_of(script, *options[: 1 if takes_command else 0]))
    elif program == "make":
        makefile = (REPO / "Makefile").read_text()
        for target in rest:
            assert "=" in target or re.search(rf"^{target}:", makefile, flags=re.M), f"there is no `make {target}`"
    else:
        assert program in PROGRAMS, f"{program} is neither a program of this repository nor one of {PROGRAMS}"
        if program == "pip":
            files = [name for option, name in itertools.pairwise(rest) if option in ("-r", "-c")]
            assert all((REPO / name).is_file() for name in files), f"{files} must exist"
            extras = re.findall(r"\[([\w,]+)\]", " ".join(rest))
            pyproject = (REPO / "pyproject.toml").read_text()
            for extra in (name for names in extras for name in names.split(",")):
                assert re.search(rf"^{extra} = \[", pyproject, flags=re.M), f"there is no extra {extra!r}"


@pytest.mark.parametrize("page", pages_with("bash", [*PAGES, *OTHER_PAGES]))
def test_commands_exist_and_have_their_options(page, help_of):
    for block in code_blocks(page, "bash"):
        for words in commands(block):
            check_command(words, help_of)


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_settings_are_arguments_of_bagel_train(page, workspace):
    script = importlib.import_module("bagel.training.script")
    for block in code_blocks(page, "yaml"):
        (workspace / "settings.yaml").write_text(block, encoding="utf-8")
        script.parse(["--config", "settings.yaml", "--use_cpu", "true"])


# --------------------------------------------------------------------------------------------------------------------
# What pages say


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES])
def test_links_lead_somewhere(page):
    text = (REPO / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?://)([^)#\s]+)", text):
        assert ((REPO / page).parent / link).exists(), f"{page} links to {link}"


@pytest.mark.parametrize("page", ["README.md", "docs/README.md"])
def test_indexes_link_to_every_guide(page):
    text = (REPO / page).read_text(encoding="utf-8")
    for guide in PAGES:
        if guide.startswith("docs/") and guide != "docs/README.md":
            assert Path(guide).name in text, f"{page} does not link to {guide}"


def test_readme_is_short_and_its_front_matter_names_license_library_and_task():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    for line in ("license: apache-2.0", "library_name: transformers", "pipeline_tag: any-to-any", "base_model: "):
        assert line in text.split("---")[1]


def between(page, name):
    return re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end", (REPO / page).read_text(encoding="utf-8"), flags=re.S)[1]


def test_memory_table_is_what_the_script_computes(repo):
    printed = subprocess.run(
        [sys.executable, repo / "benchmarks" / "memory.py"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert between("docs/memory.md", "memory table") == printed


def test_both_tables_of_the_shapes_world_are_one():
    assert between("README.md", "shapes table") == between("docs/tiny-shapes.md", "shapes table")


def files_of_the_tree():
    """Paths that the tree of docs/architecture.md names; folders end in a slash there."""
    folder, paths = Path(), []
    for line in between("docs/architecture.md", "tree").splitlines():
        if match := re.match(r"(│   )?[├└]── ([\w.-]+)(/?)", line):
            inside, name, is_folder = match.groups()
            paths.append(folder / name if inside else Path(name))
            folder = Path(name) if is_folder else folder
    return paths


def test_files_of_the_tree_exist():
    paths = files_of_the_tree()
    assert len(paths) > 50
    missing = [str(path) for path in paths if not (REPO / path).exists()]
    assert not missing, f"the tree of docs/architecture.md names files that do not exist: {missing}"


def test_every_python_file_and_folder_is_in_the_tree():
    tracked = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    files = [Path(name) for name in tracked.stdout.splitlines() if not name.startswith(".")]
    wanted = {Path(file.parts[0]) for file in files if len(file.parts) > 1 or file.suffix == ".py"}
    packages = ("training", "conversion", "evaluation", "shapes", "benchmarks")
    wanted |= {file for file in files if file.parts[0] in packages and file.suffix == ".py" and file.stem != "__init__"}
    absent = sorted(map(str, wanted - set(files_of_the_tree())))
    assert not absent, f"the tree of docs/architecture.md does not name {absent}"


def test_rules_are_where_the_table_says():
    """Rows are | question | `file`: `name`, `name` |; every name is defined in its file."""
    rows = re.findall(r"^\| .+? \| (.+?) \|$", between("docs/architecture.md", "rules"), flags=re.M)[1:]
    assert len(rows) > 30
    wrong = []
    for row in rows:
        file, names = re.match(r"`([\w./]+)`(?:: (.+))?", row).groups()
        source = (REPO / file).read_text(encoding="utf-8") if (REPO / file).is_file() else ""
        if not source:
            wrong.append(file)
        for name in re.findall(r"`([\w.]+)`", names or ""):
            parts = [rf"^\s*(?:(?:def|class) {part}\b|{part}(?::[^=\n]+)? ?=)" for part in name.split(".")]
            if not all(re.search(part, source, flags=re.M) for part in parts):
                wrong.append(f"{file}: {name}")
    assert not wrong, f"docs/architecture.md says that these rules are there: {wrong}"


def test_settings_files_of_hosts_are_readable():
    """YAML for services that do not run here."""
    for name in (".pre-commit-config.yaml", ".github/workflows/ci.yml", "CITATION.cff"):
        assert isinstance(yaml.safe_load((REPO / name).read_text(encoding="utf-8")), dict)


def test_every_pin_is_exact():
    for line in (REPO / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r'[\w.-]+==[\w.]+(; python_version (<|>=) "3\.11")?', line), line


# --------------------------------------------------------------------------------------------------------------------
# The demo


def test_demo_saves_a_sheet(repo, tmp_path):
    done = subprocess.run(
        [sys.executable, repo / "demo.py", "--output", tmp_path, "--num-timesteps", "3"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    sheet = Image.open(tmp_path / "contact_sheet.png")
    assert sheet.size > (900, 900)
    assert "Drawing" in done.stderr, "the steps show a progress bar"
    assert "Look at" in done.stdout


# --------------------------------------------------------------------------------------------------------------------
# Pipelines


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
