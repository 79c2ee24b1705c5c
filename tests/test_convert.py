# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Released folders: adopted in place without touching a weight, exported byte by byte, whole or not at all."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity_data import EMBEDDED
from safetensors.torch import load_file
from tiny_checkpoint import (
    RELEASED_CONFIG,
    VOCAB_SIZE,
    change_tensors,
    copy_folder,
    read_json,
    tiny_config,
    tiny_model,
    write_json,
    write_released_folder,
)
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from bagel.checkpoint_bagel import read_header
from bagel.configuration_bagel import AUTO_MAP, BagelConfig
from bagel.conversion import adopt, adopting, commands, export, exporting, folders
from bagel.conversion.folders import RUNTIME_FILES
from bagel.modeling_bagel import BagelForUnifiedMultimodal
from bagel.shapes.tokenizer import SPECIAL_TOKENS, build_tiny_tokenizer


PARITY = EMBEDDED / "checkpoint"
IDS = ("bos_token_id", "eos_token_id", "vision_start_token_id", "vision_end_token_id")

pytestmark = pytest.mark.core


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A released folder as downloaded; tests must not write into it."""
    return write_released_folder(tmp_path_factory.mktemp("convert") / "source")


@pytest.fixture
def folder(source, tmp_path) -> Path:
    return copy_folder(source, tmp_path / "BAGEL")


@pytest.fixture
def with_tokenizer(folder) -> Path:
    build_tiny_tokenizer(vocab_size=263).save_pretrained(folder)
    return folder


@pytest.fixture(params=["tiny", "tiny in bfloat16", "parity"])
def any_folder(request, tmp_path) -> Path:
    """Released folders of several kinds."""
    if request.param == "parity":
        return copy_folder(PARITY, tmp_path / "BAGEL")
    dtype = torch.bfloat16 if "bfloat16" in request.param else torch.float32
    return write_released_folder(tmp_path / "BAGEL", dtype)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def raw_tensors(file: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    content = file.read_bytes()
    return {name: (info.dtype, info.shape, content[info.begin : info.end]) for name, info in read_header(file).items()}


def assert_same_weights(folder: Path, other: Path) -> None:
    for name in ("ema.safetensors", "ae.safetensors"):
        assert raw_tensors(folder / name) == raw_tensors(other / name), name


def identity(file: Path) -> tuple[int, ...]:
    """What changes when a file is written or replaced, and not when it is read (as the time of last access does)."""
    status = os.stat(file)
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_mode


def refused(folder: Path, error: type[Exception]) -> str:
    """Adopting fails and changes nothing."""
    before = snapshot(folder) if folder.is_dir() else None
    with pytest.raises(error) as caught:
        adopt(folder)
    assert before is None or snapshot(folder) == before
    return str(caught.value)


# --------------------------------------------------------------------------------------------------------------------
# adopt


def test_adopted_folder_loads_through_the_auto_classes(any_folder):
    weights = {name: identity(any_folder / name) for name in ("ema.safetensors", "ae.safetensors")}
    adopt(any_folder)
    assert {name: identity(any_folder / name) for name in weights} == weights, "the weights were touched"
    config = AutoConfig.from_pretrained(any_folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(any_folder, trust_remote_code=True)
    assert type(model).__name__ == "BagelForUnifiedMultimodal" and type(model) is not BagelForUnifiedMultimodal
    assert model.dtype == config.dtype == load_file(any_folder / "ema.safetensors")["llm2vae.weight"].dtype
    here = BagelForUnifiedMultimodal.from_pretrained(any_folder).state_dict()
    assert all(torch.equal(tensor, here[name]) for name, tensor in model.state_dict().items())


def test_adopted_folder_takes_options_through_the_auto_classes(folder):
    adopt(folder)
    ids = dict(zip(IDS, range(250, 254)))
    model = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, stage=1, dtype=torch.bfloat16, device_map={"": "cpu"}, **ids
    )
    assert {name: getattr(model.config, name) for name in IDS} == ids
    assert model.dtype == torch.bfloat16 and not hasattr(model, "vae")


def test_autoencoder_keeps_its_dtype_beside_a_bfloat16_model(tmp_path):
    folder = write_released_folder(tmp_path / "BAGEL", torch.bfloat16)
    adopt(folder)
    model = BagelForUnifiedMultimodal.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and model.latent_pos_embed.pos_embed.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.vae.parameters()} == {torch.float32}


def test_adopted_folder_has_a_processor_when_it_has_a_tokenizer(with_tokenizer):
    adoption = adopt(with_tokenizer)
    assert adoption.has_processor and not adoption.notes
    processor = AutoProcessor.from_pretrained(with_tokenizer, trust_remote_code=True)
    assert type(processor).__name__ == "BagelProcessor"
    assert processor.image_processor.size == {"shortest_edge": 56, "longest_edge": 56}
    assert processor.image_processor.latent_size == {"shortest_edge": 32, "longest_edge": 32}
    assert processor.image_processor.latent_stride == 8
    prompt = processor.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=True, return_dict=True)
    config = AutoConfig.from_pretrained(with_tokenizer, trust_remote_code=True)
    assert prompt["input_ids"][0][0] == config.bos_token_id
    for name in (*IDS, "image_token_id", "latent_token_id"):
        assert getattr(processor, name) == getattr(config, name) == read_json(with_tokenizer / "config.json")[name]


def test_released_settings_of_the_image_processor_are_the_defaults():
    files = adopting._processor_files(BagelConfig(stage=2))
    settings = json.loads(files["processor_config.json"])["image_processor"]
    assert settings["size"] == {"shortest_edge": 224, "longest_edge": 980}
    assert settings["latent_size"] == {"shortest_edge": 512, "longest_edge": 1024}


def test_special_ids_come_from_whichever_tokenizer_files_there_are(with_tokenizer):
    tokenizer = build_tiny_tokenizer(vocab_size=263)
    adopt(with_tokenizer)
    expected = {name: read_json(with_tokenizer / "config.json")[name] for name in IDS}
    assert list(expected.values()) == tokenizer.convert_tokens_to_ids(
        ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    )
    generation = read_json(with_tokenizer / "generation_config.json")
    pad = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert generation == {
        "bos_token_id": expected["bos_token_id"],
        "eos_token_id": expected["eos_token_id"],
        "pad_token_id": pad,
    }

    (with_tokenizer / "tokenizer.json").unlink()
    vocabulary = tokenizer.get_vocab()
    special = {token: vocabulary.pop(token) for token in SPECIAL_TOKENS}
    write_json(with_tokenizer / "vocab.json", vocabulary)
    decoder = {str(token_id): {"content": token} for token, token_id in list(special.items())[:4]}
    write_json(with_tokenizer / "tokenizer_config.json", {"added_tokens_decoder": decoder})
    write_json(with_tokenizer / "added_tokens.json", dict(list(special.items())[4:]))
    adopt(with_tokenizer)
    assert {name: read_json(with_tokenizer / "config.json")[name] for name in IDS} == expected


def test_folder_without_a_tokenizer_is_adopted_as_a_model_only(folder):
    adoption = adopt(folder)
    assert not adoption.has_processor and any("tokenizer" in note for note in adoption.notes)
    assert any("vocabulary of 272" in note for note in adoption.notes)
    config = read_json(folder / "config.json")
    assert [config[name] for name in IDS] == [151644, 151645, 151652, 151653]
    assert not (folder / "processor_config.json").exists() and not (folder / "generation_config.json").exists()


def test_adopted_config_keeps_what_the_released_one_said(folder):
    write_json(folder / "config.json", {**RELEASED_CONFIG, "auto_map": {"AutoModel": "other.Model"}, "extra": [1]})
    before = (folder / "config.json").read_bytes()
    adopt(folder)
    config = read_json(folder / "config.json")
    assert (folder / "config.released.json").read_bytes() == before
    assert config["auto_map"] == AUTO_MAP and config["extra"] == [1]
    assert config["llm_config"] | RELEASED_CONFIG["llm_config"] == config["llm_config"]
    assert config["vit_config"] == RELEASED_CONFIG["vit_config"]
    assert config["architectures"] == RELEASED_CONFIG["architectures"]
    index = read_json(folder / "model.safetensors.index.json")
    ema, ae = (read_header(folder / name) for name in ("ema.safetensors", "ae.safetensors"))
    assert index["weight_map"] == dict.fromkeys(ema, "ema.safetensors") | dict.fromkeys(ae, "ae.safetensors")
    size = sum(info.end - info.begin for info in (*ema.values(), *ae.values()))
    assert index["metadata"]["total_size"] == size


def test_adopting_twice_is_adopting_once(with_tokenizer):
    write_json(with_tokenizer / "generation_config.json", {"something": "released"})
    first = adopt(with_tokenizer)
    assert "config.json" in first.written and "generation_config.released.json" in first.written
    before = snapshot(with_tokenizer)
    assert adopt(with_tokenizer).written == [] and snapshot(with_tokenizer) == before
    (with_tokenizer / "modeling_bagel.py").write_text("# an older version\n")
    assert adopt(with_tokenizer).written == ["modeling_bagel.py"] and snapshot(with_tokenizer) == before


def test_settings_changed_since_then_are_kept(with_tokenizer):
    adopt(with_tokenizer)
    for name in ("generation_config.json", "processor_config.json", "chat_template.jinja"):
        (with_tokenizer / name).write_text((with_tokenizer / name).read_text().replace("{", "{ ", 1))
    write_json(with_tokenizer / "config.json", {**read_json(with_tokenizer / "config.json"), "timestep_shift": 4.0})
    before = snapshot(with_tokenizer)
    adopt(with_tokenizer)
    after = snapshot(with_tokenizer)
    assert {name: data for name, data in after.items() if name != "config.json"} == {
        name: data for name, data in before.items() if name != "config.json"
    }
    assert read_json(with_tokenizer / "config.json")["timestep_shift"] == 4.0


def test_tokenizer_can_be_added_later(folder):
    adopt(folder)
    build_tiny_tokenizer(vocab_size=263).save_pretrained(folder)
    assert adopt(folder).has_processor
    AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def test_config_can_come_from_its_two_parts(folder):
    whole = adopt(folder) and BagelConfig.from_pretrained(folder)
    for name in ("config.json", "config.released.json"):
        (folder / name).unlink()
    adopt(folder)
    parts = BagelConfig.from_pretrained(folder)
    assert not (folder / "config.released.json").exists()
    assert parts.text_config == whole.text_config and parts.vision_config == whole.vision_config
    assert parts.vae_config == whole.vae_config and parts.max_latent_size == whole.max_latent_size
    BagelForUnifiedMultimodal.from_pretrained(folder)


def test_shapes_complete_the_config_and_correct_it(folder):
    config = {key: value for key, value in RELEASED_CONFIG.items() if key not in ("vae_config", "latent_patch_size")}
    config |= {"max_latent_size": 64, "vit_max_num_patch_per_side": 70, "visual_gen": False, "stage": 1}
    config["llm_config"] = {**config["llm_config"], "vocab_size": 151936}
    config["vit_config"] = {**config["vit_config"], "num_hidden_layers": 2}
    write_json(folder / "config.json", config)
    notes = "\n".join(adopt(folder).notes)
    for name in ("max_latent_size is 4", "vit_max_num_patch_per_side is 4", "visual_gen is True", "vocab_size is 272"):
        assert name in notes
    assert "vit_config.num_hidden_layers is 3" in notes and "it said 2" in notes
    loaded = BagelForUnifiedMultimodal.from_pretrained(folder).config
    expected = tiny_config()
    for name in RELEASED_CONFIG["vae_config"]:
        assert getattr(loaded.vae_config, name) == getattr(expected.vae_config, name)
    assert loaded.latent_patch_size == expected.latent_patch_size
    assert loaded.max_latent_size == 4 and loaded.visual_gen and loaded.num_vit_layers == expected.num_vit_layers


@pytest.mark.parametrize("layer_module", ["Qwen2DecoderLayer", "Qwen2MoEDecoderLayer"])
def test_kinds_of_experts_are_seen_in_the_weights(tmp_path, layer_module):
    config = tiny_config(llm_config={"layer_module": layer_module})
    tiny_model(config).save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "released")
    adopt(tmp_path / "released")
    loaded = BagelForUnifiedMultimodal.from_pretrained(tmp_path / "released")
    assert loaded.config.text_config.layer_module == layer_module and loaded.config.visual_gen


def test_understanding_checkpoint_needs_no_autoencoder(tmp_path):
    tiny_model(tiny_config(stage=1)).save_pretrained(tmp_path / "model")
    assert "ae.safetensors" not in export(tmp_path / "model", tmp_path / "released")
    adopt(tmp_path / "released")
    assert not BagelForUnifiedMultimodal.from_pretrained(tmp_path / "released").config.visual_gen


def test_checkpoint_without_vision_tower_is_adopted_without_it(folder):
    vision = ("vit_model", "connector", "vit_pos_embed")
    change_tensors(
        folder / "ema.safetensors",
        lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(vision)},
    )
    assert any("visual_und is False" in note for note in adopt(folder).notes)
    assert not BagelForUnifiedMultimodal.from_pretrained(folder).config.visual_und


# ---- what adopt refuses


def test_only_released_folders_are_adopted(folder, tmp_path):
    assert "not a directory" in refused(tmp_path / "nowhere", NotADirectoryError)
    assert "not a directory" in refused(folder / "config.json", NotADirectoryError)
    (folder / "ema.safetensors").unlink()
    message = refused(folder, OSError)
    assert "ema.safetensors" in message and str(folder) in message


def test_weights_that_would_be_loaded_instead_are_named(folder):
    (folder / "model.safetensors").touch()
    assert "model.safetensors too" in refused(folder, OSError)


@pytest.mark.parametrize("name", ["ema.safetensors", "ae.safetensors"])
def test_truncated_weights_are_not_adopted(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    (folder / name).write_bytes(content[:-1])
    message = refused(folder, OSError)
    assert name in message and f"{len(content) - 1} bytes found, {len(content)} expected" in message


def test_missing_autoencoder_is_named(folder):
    (folder / "ae.safetensors").unlink()
    assert "ae.safetensors" in refused(folder, OSError)


def test_missing_configs_are_named(folder):
    write_json(folder / "config.json", {"model_type": "bagel"})
    (folder / "llm_config.json").unlink()
    assert "llm_config.json" in refused(folder, OSError)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_damaged_small_files_are_named(with_tokenizer, name):
    (with_tokenizer / name).write_text("{")
    assert name in refused(with_tokenizer, OSError)


def test_weights_that_lack_tensors_are_not_adopted(folder):
    name = "language_model.model.layers.1.mlp_moe_gen.up_proj.weight"
    change_tensors(folder / "ema.safetensors", lambda tensors: {key: x for key, x in tensors.items() if key != name})
    assert name in refused(folder, ValueError)


def test_tokenizer_without_the_special_tokens_is_not_adopted(with_tokenizer):
    tokenizer = (with_tokenizer / "tokenizer.json").read_text()
    (with_tokenizer / "tokenizer.json").write_text(tokenizer.replace("<|vision_pad|>", "<|something|>"))
    message = refused(with_tokenizer, ValueError)
    assert "<|vision_pad|>" in message and "<|im_start|>" not in message


def test_tokenizer_of_another_model_is_not_adopted(folder):
    build_tiny_tokenizer(
        vocab_size=300, corpus=["all kinds of words that make merges, words and merges"]
    ).save_pretrained(folder)
    vocabulary = build_tiny_tokenizer(
        vocab_size=300, corpus=["all kinds of words that make merges, words and merges"]
    ).get_vocab()
    assert vocabulary["<|im_start|>"] >= VOCAB_SIZE
    message = refused(folder, ValueError)
    assert "bos_token_id" in message and f"vocabulary of {VOCAB_SIZE}" in message


@pytest.mark.parametrize("fails_at", [0, 3])
def test_failing_to_write_leaves_the_folder_as_it_was(folder, monkeypatch, fails_at):
    replace, calls = os.replace, []

    def failing_replace(*args):
        calls.append(args)
        if len(calls) > fails_at:
            raise OSError("no space left on device")
        replace(*args)

    monkeypatch.setattr(folders.os, "replace", failing_replace)
    assert "no space left" in refused(folder, OSError)


# --------------------------------------------------------------------------------------------------------------------
# The code that goes along


def test_runtime_files_are_the_modules_that_the_model_and_the_processor_import(repo):
    needed, pending = set(), {f"{reference.partition('.')[0]}.py" for reference in AUTO_MAP.values()}
    while pending:
        name = pending.pop()
        needed.add(name)
        for node in ast.walk(ast.parse((repo / name).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                pending |= {f"{node.module}.py"} - needed
    assert set(RUNTIME_FILES) == needed


def test_script_adopts_and_says_what_to_type_next(with_tokenizer, repo, tmp_path):
    command = [sys.executable, str(repo / "convert_bagel.py")]
    done = subprocess.run([*command, "adopt", str(with_tokenizer)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f'AutoModel.from_pretrained("{with_tokenizer}", trust_remote_code=True)' in done.stdout
    assert f'AutoProcessor.from_pretrained("{with_tokenizer}", trust_remote_code=True)' in done.stdout


def test_script_reports_errors_in_one_line(tmp_path, capsys):
    assert commands.main(["adopt", str(tmp_path / "nowhere")]) == 1
    assert commands.main(["export", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") and "nowhere" in line for line in lines)


# --------------------------------------------------------------------------------------------------------------------
# export


@pytest.mark.parametrize("shards", [False, True])
def test_model_that_was_loaded_and_saved_is_exported_byte_by_byte(any_folder, tmp_path, shards):
    adopt(any_folder)
    model = BagelForUnifiedMultimodal.from_pretrained(any_folder)
    model.save_pretrained(tmp_path / "saved", **({"max_shard_size": "200KB"} if shards else {}))
    written = export(tmp_path / "saved", tmp_path / "released")
    assert set(written) == {file.name for file in (tmp_path / "released").iterdir()}
    assert_same_weights(tmp_path / "released", any_folder)
    adopt(tmp_path / "released")
    again = BagelForUnifiedMultimodal.from_pretrained(tmp_path / "released")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    for part in ("text_config", "vision_config", "vae_config"):
        ours, theirs = (getattr(config, part).to_dict() for config in (model.config, again.config))
        transient = ("dtype", "transformers_version", "_name_or_path", "architectures")
        assert {k: v for k, v in ours.items() if k not in transient} == {
            k: v for k, v in theirs.items() if k not in transient
        }


def test_adopted_folder_is_exported_as_it_was(with_tokenizer, tmp_path):
    tokenizer = (with_tokenizer / "tokenizer.json").read_bytes()
    adopt(with_tokenizer)
    export(with_tokenizer, tmp_path / "parents" / "released")
    assert_same_weights(tmp_path / "parents" / "released", with_tokenizer)
    assert (tmp_path / "parents" / "released" / "tokenizer.json").read_bytes() == tokenizer
    load_file(tmp_path / "parents" / "released" / "ae.safetensors")  # readable by others


def test_exported_configs_are_in_the_released_words(folder, tmp_path):
    adopt(folder)
    BagelForUnifiedMultimodal.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    export(tmp_path / "saved", tmp_path / "released")
    whole, llm, vit = (
        read_json(tmp_path / "released" / f"{name}.json") for name in ("config", "llm_config", "vit_config")
    )
    assert vit == whole["vit_config"] == RELEASED_CONFIG["vit_config"] and llm == whole["llm_config"]
    given = {name: value for name, value in RELEASED_CONFIG["llm_config"].items() if name != "sliding_window"}
    assert llm | given == llm and llm["torch_dtype"] == "float32"
    assert "layer_module" not in llm and "rope_parameters" not in llm
    assert whole["vae_config"] | RELEASED_CONFIG["vae_config"] == whole["vae_config"]
    for name in ("architectures", "model_type", "visual_gen", "max_latent_size", "vit_max_num_patch_per_side"):
        assert whole[name] == RELEASED_CONFIG[name]


def test_exported_configs_say_what_the_parity_ones_say(tmp_path):
    folder = copy_folder(PARITY, tmp_path / "BAGEL")
    adopt(folder)
    export(folder, tmp_path / "released")
    dropped = {"sliding_window", "transformers_version"}
    for name in ("config", "llm_config", "vit_config"):
        ours, theirs = (read_json(where / f"{name}.json") for where in (tmp_path / "released", PARITY))
        for content in (ours, theirs):
            for nested in (content, content.get("llm_config", {})):
                for key in dropped & nested.keys():
                    del nested[key]
        assert theirs.get("vae_config", {}).items() <= ours.get("vae_config", {}).items(), name
        theirs.pop("vae_config", None)
        assert ours | theirs == ours, name


def test_only_the_tensors_that_were_trained_change(folder, tmp_path):
    adopt(folder)
    model = BagelForUnifiedMultimodal.from_pretrained(folder)
    with torch.no_grad():
        model.llm2vae.bias += 1
    model.save_pretrained(tmp_path / "saved")
    export(tmp_path / "saved", tmp_path / "released")
    before, after = (raw_tensors(where / "ema.safetensors") for where in (folder, tmp_path / "released"))
    assert before.keys() == after.keys() and [name for name in before if before[name] != after[name]] == [
        "llm2vae.bias"
    ]


def test_export_refuses_what_it_cannot_do(folder, tmp_path):
    adopt(folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for target in (tmp_path / "full", tmp_path / "full" / "file", folder):
        with pytest.raises(FileExistsError, match="not an empty directory"):
            export(folder, target)
    with pytest.raises(NotADirectoryError):
        export(tmp_path / "nowhere", tmp_path / "out")
    released = write_released_folder(tmp_path / "released")
    with pytest.raises(OSError, match="adopt"):
        export(released, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_model_that_lacks_tensors_is_not_exported(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    change_tensors(
        tmp_path / "model" / "model.safetensors",
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "connector.fc1.bias"},
    )
    with pytest.raises(ValueError, match=r"connector\.fc1\.bias"):
        export(tmp_path / "model", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_quantised_model_is_not_exported(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    config = read_json(tmp_path / "model" / "config.json")
    write_json(tmp_path / "model" / "config.json", {**config, "quantization_config": {"quant_method": "some"}})
    with pytest.raises(ValueError, match="quantised"):
        export(tmp_path / "model", tmp_path / "out")


def test_export_that_fails_leaves_nothing(folder, tmp_path, monkeypatch):
    adopt(folder)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(exporting, "_copy_tensors", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        export(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["BAGEL", "out"] and not any(
        (tmp_path / "out").iterdir()
    )


def test_export_checks_the_room_first(folder, tmp_path, monkeypatch):
    adopt(folder)
    usage = folders.shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="no room"):
        export(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["BAGEL"]
