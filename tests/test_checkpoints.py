# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Loading: released and own folders give exactly the stored tensors, and a folder that does not fit says why."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from parity_data import EMBEDDED, RELEASED_MANIFEST, read_bytes
from safetensors.torch import load_file, save_file
from tiny_checkpoint import (
    VOCAB_SIZE,
    change_tensors,
    copy_folder,
    read_json,
    tiny_config,
    tiny_model,
    write_json,
    write_released_folder,
)

from bagel.checkpoint_bagel import (
    check_checkpoint,
    checkpoint_files,
    expected_tensors,
    read_header,
    refuse_missing_weights,
    switched_off_parts,
    to_module_name,
    to_module_shape,
    to_released_name,
    to_released_shape,
    vae_names,
)
from bagel.configuration_bagel import BagelConfig, BagelVAEConfig
from bagel.conversion import adopt
from bagel.modeling_bagel import BagelForUnifiedMultimodal, build_vae


MANIFEST = json.loads(read_bytes(RELEASED_MANIFEST))
PARITY = EMBEDDED / "checkpoint"

pytestmark = pytest.mark.core


@pytest.fixture(scope="session")
def released(tmp_path_factory) -> Path:
    """An adopted folder; tests must not write into it."""
    folder = write_released_folder(tmp_path_factory.mktemp("checkpoints") / "released")
    adopt(folder)
    return folder


@pytest.fixture(scope="session")
def own(tmp_path_factory) -> Path:
    """What `save_pretrained` writes; tests must not write into it."""
    folder = tmp_path_factory.mktemp("checkpoints") / "own"
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(own, tmp_path) -> Path:
    """A folder of our own layout, to be damaged."""
    return copy_folder(own, tmp_path / "model")


def load(path: Path, **kwargs) -> BagelForUnifiedMultimodal:
    return BagelForUnifiedMultimodal.from_pretrained(path, **kwargs)


def refusal(path: Path, error: type[Exception] = ValueError, **kwargs) -> str:
    with pytest.raises(error) as caught:
        load(path, **kwargs)
    return str(caught.value)


def stored_tensors(path: Path, config: BagelConfig) -> dict[str, torch.Tensor]:
    """Everything in the folder's files, under module names and shapes."""
    tensors = {}
    for file in path.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            module_name = to_module_name(name, config.vae_config)
            tensors[module_name] = tensor.reshape(to_module_shape(module_name, tensor.shape))
    return tensors


def assert_holds_what_is_stored(model: BagelForUnifiedMultimodal, path: Path, skip=()) -> None:
    stored = stored_tensors(path, model.config)
    for name, tensor in model.state_dict().items():
        if name not in skip:
            assert torch.equal(tensor, stored[name].to(tensor.dtype)), name


# --------------------------------------------------------------------------------------------------------------------
# Names of the VAE


@pytest.mark.parametrize("num_res_blocks", [1, 2])
@pytest.mark.parametrize("ch_mult", [[1], [1, 2], [1, 1, 2], [1, 2, 4, 4], [1, 2, 1]])
def test_vae_names_are_those_of_the_modules_that_diffusers_builds(ch_mult, num_res_blocks):
    config = BagelVAEConfig(ch=8, ch_mult=ch_mult, num_res_blocks=num_res_blocks, downsample=2 ** (len(ch_mult) - 1))
    with torch.device("meta"):
        parameters = build_vae(config).state_dict()
    released, ours = zip(*vae_names(config))
    assert len(set(released)) == len(set(ours)) == len(ours)
    assert set(ours) == {"vae." + name.rpartition(".")[0] for name in parameters}


def test_vae_names_count_the_decoder_from_the_other_end():
    config = BagelVAEConfig()
    pairs = {
        "encoder.down.1.block.0.nin_shortcut.weight": "vae.encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
        "encoder.down.2.downsample.conv.bias": "vae.encoder.down_blocks.2.downsamplers.0.conv.bias",
        "encoder.mid.attn_1.q.weight": "vae.encoder.mid_block.attentions.0.to_q.weight",
        "decoder.mid.block_2.norm1.weight": "vae.decoder.mid_block.resnets.1.norm1.weight",
        "decoder.up.3.block.2.conv1.weight": "vae.decoder.up_blocks.0.resnets.2.conv1.weight",
        "decoder.up.1.upsample.conv.weight": "vae.decoder.up_blocks.2.upsamplers.0.conv.weight",
        "decoder.norm_out.weight": "vae.decoder.conv_norm_out.weight",
    }
    for name, module_name in pairs.items():
        assert to_module_name(name, config) == module_name
        assert to_released_name(module_name, config) == name
    assert to_module_name("vae2llm.weight", config) == to_released_name("vae2llm.weight", config) == "vae2llm.weight"


def test_only_the_middle_attention_changes_its_shape():
    linear, conv = "vae.encoder.mid_block.attentions.0.to_out.0.weight", "vae.encoder.conv_out.weight"
    assert to_module_shape(linear, (8, 8, 1, 1)) == (8, 8) and to_released_shape(linear, (8, 8)) == (8, 8, 1, 1)
    assert to_module_shape(linear, (8, 8)) == (8, 8)
    assert to_module_shape(conv, (8, 8, 1, 1)) == to_released_shape(conv, (8, 8, 1, 1)) == (8, 8, 1, 1)


def test_default_model_has_every_released_tensor_and_no_other():
    config = BagelConfig(stage=2)
    model, vae = ({name: tuple(shape) for name, shape in tensors.items()} for tensors in MANIFEST.values())
    expected = dict(model)
    for name, shape in vae.items():
        module_name = to_module_name(name, config.vae_config)
        expected[module_name] = to_module_shape(module_name, shape)
        assert to_released_name(module_name, config.vae_config) == name
        assert to_released_shape(module_name, expected[module_name]) == shape
    assert expected_tensors(BagelForUnifiedMultimodal, config).shapes == expected


# --------------------------------------------------------------------------------------------------------------------
# Headers


def test_header_says_where_each_tensor_lies(tmp_path):
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.arange(4, dtype=torch.bfloat16),
        "c": torch.tensor(True),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    assert {name: (info.dtype, info.shape) for name, info in header.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (4,)),
        "c": ("BOOL", ()),
    }
    for name, info in header.items():
        raw = tensors[name].flatten().contiguous().view(torch.uint8).numpy().tobytes()
        assert content[info.begin : info.end] == raw


def with_header(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

DAMAGED = {
    "empty": (b"", "0 bytes found, at least 8 expected"),
    "cut within the header": (with_header({"a": ENTRY}, bytes(8))[:20], "20 bytes found, at least 69 expected"),
    "cut within the data": (with_header({"a": ENTRY}, bytes(5)), "74 bytes found, 77 expected"),
    "too long": (with_header({"a": ENTRY}, bytes(9)), "78 bytes found, but its header describes 77"),
    "zip archive": (b"PK\x03\x04" + bytes(100), "its header starts with"),
    "noise": (b"\xff" * 100, "announce a header"),
    "header of something else": (with_header(b"{not json"), "no table of tensors"),
    "header without offsets": (with_header({"a": {"dtype": "F32"}}), "no table of tensors"),
    "shape of another size": (with_header({"a": {**ENTRY, "shape": [3]}}, bytes(8)), "bytes of a do not fit"),
    "hole": (with_header({"a": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)), "bytes of a do not fit"),
    "pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
}


@pytest.mark.parametrize("content, expected", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_file_is_an_error_of_one_line_with_its_size(tmp_path, content, expected):
    file = tmp_path / "broken.safetensors"
    file.write_bytes(content)
    with pytest.raises(OSError) as caught:
        read_header(file)
    message = str(caught.value)
    assert str(file) in message and expected in message and f"{len(content)} bytes" in message and "\n" not in message


def test_truncated_shard_is_refused_before_anything_is_loaded(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(content[:-100])
    message = refusal(folder, OSError)
    assert f"{len(content) - 100} bytes found, {len(content)} expected" in message and "model.safetensors" in message


# --------------------------------------------------------------------------------------------------------------------
# Loading


LAYOUTS = ["released", "own", "parity"]


@pytest.fixture(params=LAYOUTS)
def complete(request, tmp_path) -> Path:
    """A complete checkpoint in each layout."""
    if request.param != "parity":
        return request.getfixturevalue(request.param)
    folder = copy_folder(PARITY, tmp_path / "parity")
    adopt(folder)
    return folder


def test_loaded_tensors_are_the_stored_ones(complete):
    model, info = load(complete, output_loading_info=True)
    assert_holds_what_is_stored(model, complete)
    assert len(model.state_dict()) == len(stored_tensors(complete, model.config))
    assert not any(info.values())
    assert not any(parameter.requires_grad for parameter in model.vae.parameters())


@pytest.mark.parametrize(
    "kwargs",
    [{"stage": 1}, {"stage": "stage1"}, {"visual_und": False}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}],
)
def test_parts_dtypes_and_devices_can_be_chosen(complete, kwargs):
    model = load(complete, **kwargs)
    assert_holds_what_is_stored(model, complete)
    names = "".join(model.state_dict())
    assert ("_moe_gen" in names) is ("vae." in names) is ("stage" not in kwargs)
    assert ("vit_model" in names) is ("visual_und" not in kwargs)
    assert model.dtype == kwargs.get("dtype", torch.float32)


def test_parts_can_stay_on_the_disk(complete, tmp_path):
    modules = {name.partition(".")[0]: "cpu" for name in load(complete).state_dict()}
    del modules["language_model"]
    device_map = {
        **modules,
        "vae": "disk",
        "language_model.lm_head": "cpu",
        "language_model.model": "cpu",
    }
    inner = ("embed_tokens", "norm", "norm_moe_gen", "rotary_emb")
    del device_map["language_model.model"]
    device_map |= {f"language_model.model.{name}": "cpu" for name in inner}
    layers = load(complete).config.text_config.num_hidden_layers
    device_map |= {f"language_model.model.layers.{index}": "disk" for index in range(layers)}
    model = load(complete, device_map=device_map, offload_folder=tmp_path / "offload")
    stored = stored_tensors(complete, model.config)
    offloaded = {name for name, tensor in model.state_dict().items() if tensor.is_meta}
    assert {name.split(".")[0] for name in offloaded} == {"vae", "language_model"}
    assert_holds_what_is_stored(model, complete, skip=offloaded)
    mid = "vae.encoder.mid_block.attentions.0.to_q"
    hook = model.get_submodule(mid)._hf_hook
    assert torch.equal(hook.weights_map["weight"], stored[f"{mid}.weight"])
    with torch.no_grad():
        x = torch.rand(1, 3, 32, 32)
        assert torch.equal(model.vae.encode(x).latent_dist.mode(), load(complete).vae.encode(x).latent_dist.mode())


def test_own_layout_loads_from_shards_a_subfolder_and_a_variant(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(checkpoint_files(tmp_path / "shards")) > 2
    model.save_pretrained(tmp_path / "parent" / "sub")
    model.save_pretrained(tmp_path / "variant", variant="fp32")
    assert checkpoint_files(tmp_path / "variant", "fp32")[0].name == "model.fp32.safetensors"
    model.save_pretrained(tmp_path / "shards_of_variant", variant="fp32", max_shard_size="100KB")
    loaded = [
        load(tmp_path / "shards"),
        load(tmp_path / "parent", subfolder="sub"),
        load(tmp_path / "variant", variant="fp32"),
        load(tmp_path / "shards_of_variant", variant="fp32"),
    ]
    for other in loaded:
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_original_format_of_save_pretrained_has_the_released_names(released, tmp_path):
    model = load(released)
    model.save_pretrained(tmp_path / "original", save_original_format=True)
    stored = load_file(tmp_path / "original" / "model.safetensors")
    ae = load_file(released / "ae.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in ae.items())
    assert_holds_what_is_stored(load(tmp_path / "original"), released)


def test_tied_head_may_be_absent(tmp_path):
    model = tiny_model(tiny_config(tie_word_embeddings=True))
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert "language_model.lm_head.weight" not in read_header(tmp_path / "model.safetensors")
    loaded = load(tmp_path)
    assert loaded.language_model.lm_head.weight is loaded.language_model.model.embed_tokens.weight
    assert torch.equal(loaded.language_model.lm_head.weight, model.language_model.lm_head.weight)


def test_tables_that_models_compute_may_be_stored(folder):
    extra = {"language_model.model.rotary_emb.inv_freq": torch.ones(4)}
    change_tensors(folder / "model.safetensors", lambda tensors: {**tensors, **extra})
    load(folder)


# --------------------------------------------------------------------------------------------------------------------
# The config of a load


def test_overrides_reach_the_config_from_every_side(own):
    ids = {"bos_token_id": 200, "eos_token_id": 201}
    for config in (None, own, str(own), BagelConfig.from_pretrained(own)):
        model = load(own, config=config, stage=1, timestep_shift=3.0, llm_config={"attention_dropout": 0.25}, **ids)
        config = model.config
        assert (config.bos_token_id, config.eos_token_id, config.timestep_shift) == (200, 201, 3.0)
        assert config.text_config.attention_dropout == 0.25 and config.text_config.hidden_size == 32
        assert not config.visual_gen and config.text_config.layer_module == "Qwen2DecoderLayer"


def test_callers_config_and_arguments_stay_as_they_are(own):
    config = BagelConfig.from_pretrained(own, attn_implementation="eager")
    before, kwargs = config.to_dict(), {"timestep_shift": 2.0, "dtype": "auto"}
    checked, left = check_checkpoint(BagelForUnifiedMultimodal, own, config, kwargs)
    assert kwargs == {"timestep_shift": 2.0, "dtype": "auto"} and left == {"dtype": "auto", "use_safetensors": True}
    assert config.to_dict() == before and checked.timestep_shift == 2.0 and checked._attn_implementation == "eager"
    unchanged, _ = check_checkpoint(BagelForUnifiedMultimodal, own, config, {})
    assert unchanged is not config and unchanged.to_dict() == before


def test_general_config_attributes_can_be_overridden_too(own):
    model = load(own, output_hidden_states=True, attn_implementation="eager")
    assert model.config.output_hidden_states and model.config.text_config._attn_implementation == "eager"


def test_latent_table_of_the_file_decides_max_latent_size(folder, caplog):
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "max_latent_size": 7})
    model = load(folder)
    assert model.config.max_latent_size == 4 and model.latent_pos_embed.max_num_patch_per_side == 4
    assert_holds_what_is_stored(model, folder)
    warnings = [record.getMessage() for record in caplog.records if "max_latent_size" in record.getMessage()]
    assert len(warnings) == 1
    assert "max_latent_size=7" in warnings[0] and "(16, 32)" in warnings[0] and "max_latent_size=4" in warnings[0]


def test_quantised_checkpoints_state_dicts_and_hub_ids_are_not_opened(own):
    config = BagelConfig.from_pretrained(own)
    config.quantization_config = {"quant_method": "some"}
    _, kwargs = check_checkpoint(BagelForUnifiedMultimodal, "/nowhere", config, {})
    assert kwargs == {"use_safetensors": True}
    config = BagelConfig.from_pretrained(own)
    check_checkpoint(BagelForUnifiedMultimodal, "some/model-on-the-hub", config, {})
    check_checkpoint(BagelForUnifiedMultimodal, None, config, {"state_dict": {}})


# --------------------------------------------------------------------------------------------------------------------
# Folders without usable files


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickles_are_refused_with_the_reason(folder, name):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / name)
    message = refusal(folder, OSError)
    assert name in message and "runs code" in message and "safetensors" in message


def test_use_safetensors_false_is_refused(own):
    assert "pickle" in refusal(own, use_safetensors=False)
    assert "pickle" in refusal("some/model-on-the-hub", use_safetensors=False)


def test_single_pickle_file_is_refused(own, tmp_path):
    torch.save({}, tmp_path / "model.bin")
    assert "pickle" in refusal(tmp_path / "model.bin", OSError, config=BagelConfig.from_pretrained(own))


def test_released_layout_names_the_command_that_adopts_it(tmp_path):
    message = refusal(write_released_folder(tmp_path), OSError)
    assert f"python convert_bagel.py adopt {tmp_path}" in message and "\n" not in message


def test_folder_without_weights_says_what_it_looked_for(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    message = refusal(folder, OSError)
    assert (
        "model.safetensors" in message
        and "model.safetensors.index.json" in message
        and "weights.safetensors" in message
    )
    assert "model.fp16.safetensors" in refusal(folder, OSError, variant="fp16")


def test_index_that_names_an_absent_file_is_an_error_with_its_name(released, tmp_path):
    folder = copy_folder(released, tmp_path / "model")
    (folder / "ae.safetensors").unlink()
    message = refusal(folder, OSError)
    assert "ae.safetensors" in message and "model.safetensors.index.json" in message


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_damaged_index_is_an_error_with_its_name(released, tmp_path, content):
    folder = copy_folder(released, tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refusal(folder, OSError)


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints that do not fit


def drop(pattern: str):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not re.search(pattern, name)}


def test_checkpoint_without_vision_tower_says_so_and_how_to_load_it(folder):
    vision = r"^(vit_model|connector|vit_pos_embed)"
    count = sum(bool(re.search(vision, name)) for name in read_header(folder / "model.safetensors"))
    change_tensors(folder / "model.safetensors", drop(vision))
    message = refusal(folder)
    assert f"{count} of the vision tower and connector" in message and "visual_und=False" in message
    assert "vit_model." in message and "model.safetensors" in message and str(folder) in message
    load(folder, visual_und=False)


def test_understanding_checkpoint_says_stage_1(folder):
    change_tensors(folder / "model.safetensors", drop(r"_moe_gen|^vae\.|^vae2llm|^llm2vae|^time_emb|^latent_pos"))
    message = refusal(folder)
    assert "generation expert (*_moe_gen)" in message and "VAE" in message and "stage=1" in message
    load(folder, stage=1)


def test_checkpoint_without_vae_says_so(folder):
    change_tensors(folder / "model.safetensors", drop(r"^vae\."))
    message = refusal(folder)
    assert "of the VAE" in message and "ae.safetensors" in message and "stage=1" in message


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.1.mlp.up_proj.weight",
        "language_model.model.layers.0.self_attn.q_proj_moe_gen.bias",
        "vit_model.vision_model.post_layernorm.bias",
        "latent_pos_embed.pos_embed",
        "vit_pos_embed.pos_embed",
        "vae.decoder.conv_in.weight",
    ],
)
def test_any_missing_tensor_is_named(folder, name):
    change_tensors(folder / "model.safetensors", lambda tensors: {key: x for key, x in tensors.items() if key != name})
    message = refusal(folder)
    assert name in message and "1 of " in message and "incomplete" in message


def test_empty_file_lacks_everything(folder):
    (folder / "model.safetensors").unlink()
    save_file({}, folder / "model.safetensors")
    assert "of the language model" in refusal(folder)


def resize_vocabulary(rows: int):
    def change(tensors):
        for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
            tensors[name] = torch.randn(rows, tensors[name].shape[1])
        return tensors

    return change


def test_padded_vocabulary_says_both_sizes_and_the_override_that_loads_it(folder):
    change_tensors(folder / "model.safetensors", resize_vocabulary(288))
    message = refusal(folder)
    assert str(folder / "model.safetensors") in message and "language_model.model.embed_tokens.weight" in message
    assert "(288, 32)" in message and f"({VOCAB_SIZE}, 32)" in message
    assert 'text_config={"vocab_size": 288}' in message and message.count("vocab_size is") == 1
    model = load(folder, text_config={"vocab_size": 288})
    assert model.config.text_config.vocab_size == 288
    assert_holds_what_is_stored(model, folder)


def test_vision_table_of_another_side_says_both_sides_and_the_override_that_loads_it(folder):
    other = torch.randn(36, 32)
    change_tensors(folder / "model.safetensors", lambda tensors: {**tensors, "vit_pos_embed.pos_embed": other})
    message = refusal(folder)
    assert "(36, 32)" in message and "(16, 32)" in message and "vit_max_num_patch_per_side=6" in message
    assert torch.equal(load(folder, vit_max_num_patch_per_side=6).vit_pos_embed.pos_embed, other)


def test_released_shapes_are_compared_as_they_load(released, tmp_path):
    folder = copy_folder(released, tmp_path / "model")
    name = "encoder.mid.attn_1.k.weight"
    change_tensors(folder / "ae.safetensors", lambda tensors: {**tensors, name: torch.zeros(16, 16, 3, 3)})
    message = refusal(folder)
    assert "ae.safetensors" in message and name in message and "(16, 16, 3, 3)" in message and "(16, 16)" in message


def test_mismatched_sizes_can_be_ignored(folder):
    change_tensors(folder / "model.safetensors", resize_vocabulary(288))
    model = load(folder, ignore_mismatched_sizes=True)
    assert model.get_input_embeddings().weight.shape == (VOCAB_SIZE, 32)
    assert torch.isfinite(model.get_input_embeddings().weight).all()


def test_larger_latent_table_can_be_asked_for(own):
    model = load(own, max_latent_size=6, ignore_mismatched_sizes=True)
    assert torch.equal(model.latent_pos_embed.pos_embed, model.latent_pos_embed.table())


def test_checkpoint_of_another_model_is_refused(folder):
    rename = lambda tensors: {f"model.{name}": tensor for name, tensor in tensors.items()}  # noqa: E731
    change_tensors(folder / "model.safetensors", rename)
    message = refusal(folder)
    assert "of another model" in message and "model.connector.fc1.bias" in message and "are missing" in message


def test_everything_that_does_not_fit_is_in_one_error(folder):
    def change(tensors):
        tensors["stranger.weight"] = torch.zeros(1)
        tensors["llm2vae.bias"] = torch.zeros(5)
        del tensors["connector.fc1.bias"]
        return tensors

    change_tensors(folder / "model.safetensors", change)
    message = refusal(folder)
    assert all(name in message for name in ("stranger.weight", "llm2vae.bias", "connector.fc1.bias"))


def test_parts_that_the_config_keeps_may_not_have_strangers(folder):
    extra = {"vit_model.vision_model.head.weight": torch.zeros(1)}
    change_tensors(folder / "model.safetensors", lambda tensors: {**tensors, **extra})
    assert "vit_model.vision_model.head.weight" in refusal(folder)
    load(folder, visual_und=False)


def test_vision_config_that_counts_one_layer_too_few_is_explained(folder):
    config = read_json(folder / "config.json")
    config["vision_config"]["num_hidden_layers"] -= 1
    write_json(folder / "config.json", config)
    message = refusal(folder)
    assert "layers.1." in message and "num_hidden_layers counts the layers" in message


def test_key_mapping_skips_the_comparison(folder):
    rename = lambda tensors: {f"wrapped.{name}": tensor for name, tensor in tensors.items()}  # noqa: E731
    change_tensors(folder / "model.safetensors", rename)
    model = load(folder, key_mapping={r"^wrapped\.": ""})
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, stored[f"wrapped.{name}"]) for name, tensor in model.state_dict().items())


def test_switched_off_parts_follow_the_config():
    assert switched_off_parts(tiny_config()) == []
    off = re.compile("|".join(switched_off_parts(tiny_config(stage=1))))
    assert all(map(off.search, ["encoder.conv_in.bias", "vae.x.y", "vae2llm.bias", "model.norm_moe_gen.weight"]))
    assert not any(map(off.search, ["vit_model.x", "language_model.lm_head.weight", "connector.fc1.bias"]))
    assert re.search("|".join(switched_off_parts(tiny_config(visual_und=False))), "vit_pos_embed.pos_embed")


# --------------------------------------------------------------------------------------------------------------------
# After loading


def test_whoever_brings_a_state_dict_or_asks_for_loading_info_judges_what_is_missing(own, tmp_path):
    state_dict = load_file(own / "model.safetensors")
    config = BagelConfig.from_pretrained(own)
    model = BagelForUnifiedMultimodal.from_pretrained(None, config=config, state_dict=dict(state_dict))
    assert all(torch.equal(tensor, state_dict[name]) for name, tensor in model.state_dict().items())
    del state_dict["connector.fc1.bias"]
    model = BagelForUnifiedMultimodal.from_pretrained(None, config=config, state_dict=state_dict)
    assert model.connector.fc1.bias.device.type == "cpu"
    shutil.copytree(own, tmp_path / "own")
    save_file(state_dict, tmp_path / "own" / "model.safetensors", metadata={"format": "pt"})
    _, info = BagelForUnifiedMultimodal.from_pretrained(tmp_path / "own", output_loading_info=True)
    assert set(info["missing_keys"]) == {"connector.fc1.bias"}
    with pytest.raises(ValueError, match=r"connector\.fc1\.bias"):
        BagelForUnifiedMultimodal.from_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match="needs config="):
        BagelForUnifiedMultimodal.from_pretrained(None, state_dict=state_dict)


def test_what_the_preflight_did_not_see_is_refused_after_loading():
    model = tiny_model()
    info = {"missing_keys": set(), "unexpected_keys": set()}
    refuse_missing_weights(model, "some/model", info, {})
    with pytest.raises(ValueError, match=r"some/model.*connector\.fc1\.bias"):
        refuse_missing_weights(model, "some/model", {**info, "missing_keys": {"connector.fc1.bias"}}, {})
    with pytest.raises(ValueError, match=r"another model: stranger\.weight"):
        refuse_missing_weights(model, "some/model", {**info, "unexpected_keys": {"stranger.weight"}}, {})
    model.connector.to("meta")
    with pytest.raises(ValueError, match=r"4 tensors were given no memory while loading: connector\.fc1\.weight"):
        refuse_missing_weights(model, "some/model", info, {})


def test_loading_does_not_warn_about_parts_that_are_switched_off(own, monkeypatch):
    reports = []
    logger = "transformers.modeling_utils.logger.warning"
    monkeypatch.setattr(logger, lambda message, *args, **kwargs: reports.append(message))
    load(own, stage=1)
    load(own, visual_und=False)
    assert reports == []


def test_adapter_folder_loads_its_base_model(own, tmp_path):
    peft = pytest.importorskip("peft")
    target = r"language_model\.model\.layers\.\d+\.self_attn\.q_proj"
    config = peft.LoraConfig(r=2, target_modules=target, init_lora_weights=False)
    adapted = peft.get_peft_model(load(own), config)
    adapted.peft_config["default"].base_model_name_or_path = str(own)
    adapted.save_pretrained(tmp_path / "adapter")
    model = load(tmp_path / "adapter")
    state = model.state_dict()
    trained = {name: tensor for name, tensor in adapted.state_dict().items() if "lora_A" in name}
    assert trained and all(
        torch.equal(state[name.removeprefix("base_model.model.")], tensor) for name, tensor in trained.items()
    )
    with pytest.raises(OSError, match="adapter"):
        checkpoint_files(tmp_path / "adapter")
