# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The config: its arguments, its two sets of names, and how stage, layers and overrides are resolved."""

import copy
import importlib
import inspect
import json

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from parity_data import EMBEDDED, read_json
from tiny_models import tiny_config
from transformers import Qwen2Config, SiglipVisionConfig

from bagel import configuration_bagel
from bagel.configuration_bagel import (
    AUTO_MAP,
    BagelConfig,
    BagelTextConfig,
    BagelVAEConfig,
    BagelVisionConfig,
    _coerce_text_config,
    _coerce_vision_config,
    expert_suffixes,
    gen_name,
    is_gen_name,
    und_name,
)


pytestmark = pytest.mark.core

PLAIN, MOE, MOT = "Qwen2DecoderLayer", "Qwen2MoEDecoderLayer", "Qwen2MoTDecoderLayer"

# name: (default, another value)
ARGUMENTS = {
    "visual_und": (True, False),
    "visual_gen": (False, True),
    "stage": (None, 2),
    "llm_path": ("", "somewhere/llm"),
    "vit_path": ("", "somewhere/vit"),
    "vae_path": ("", "somewhere/vae"),
    "max_latent_size": (64, 32),
    "latent_patch_size": (2, 1),
    "vit_max_num_patch_per_side": (70, 35),
    "connector_act": ("gelu_pytorch_tanh", "relu"),
    "interpolate_pos": (False, True),
    "vit_select_layer": (-2, -3),
    "vit_rope": (False, True),
    "text_cond_dropout_prob": (0.1, 0.2),
    "vae_cond_dropout_prob": (0.3, 0.2),
    "vit_cond_dropout_prob": (0.3, 0.2),
    "timestep_shift": (1.0, 4.0),
    "pad_token_id": (151643, 0),
    "bos_token_id": (151644, 1),
    "eos_token_id": (151645, 2),
    "vision_start_token_id": (151652, 3),
    "vision_end_token_id": (151653, 4),
    "image_token_id": (151655, 5),
    "latent_token_id": (151654, 6),
    "ce_weight": (1.0, 0.25),
    "mse_weight": (1.0, 0.5),
}

# As in the released files: nested names of the original code, old rope keys, a dtype under its old name, and here and
# there another value than the default.
RELEASED = copy.deepcopy(read_json(EMBEDDED / "checkpoint" / "config.json"))
RELEASED["llm_config"] |= {
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
RELEASED["vit_config"]["num_hidden_layers"] = 5
RELEASED["vae_config"] = {"z_channels": 4, "downsample": 8}


def write(folder, content) -> None:
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def released(tmp_path):
    write(tmp_path, RELEASED)
    return tmp_path


def facts(config) -> dict:
    """Everything a config says, without where it was read from."""
    return json.loads(json.dumps(config.to_dict(), default=str))


def differences(left: dict, right: dict) -> dict:
    return {key: (left.get(key), right.get(key)) for key in {*left, *right} if left.get(key) != right.get(key)}


# ---- arguments


@pytest.mark.parametrize("name", ARGUMENTS)
def test_argument_has_its_default_and_takes_another_value(name, tmp_path):
    default, other = ARGUMENTS[name]
    assert getattr(BagelConfig(), name) == default
    config = BagelConfig(**{name: other})
    assert getattr(config, name) == other
    config.save_pretrained(tmp_path)
    assert getattr(BagelConfig.from_pretrained(tmp_path), name) == other


def test_vit_patch_size_is_14_and_follows_the_vision_config():
    assert BagelConfig().vit_patch_size == BagelConfig().vision_config.patch_size == 14
    config = BagelConfig(vision_config={"patch_size": 16, "image_size": 64})
    assert config.vit_patch_size == 16
    assert BagelConfig(vit_patch_size=16, vision_config={"patch_size": 16, "image_size": 64}).vit_patch_size == 16


def test_vit_patch_size_that_contradicts_the_vision_config_is_refused():
    with pytest.raises(ValueError, match=r"vit_patch_size=16 .*vision_config\.patch_size=14"):
        BagelConfig(vit_patch_size=16)


def test_nested_configs_default_to_the_released_model():
    config = BagelConfig(stage=2)
    text, vision, vae = config.text_config, config.vision_config, config.vae_config
    assert (text.vocab_size, text.hidden_size, text.intermediate_size) == (152064, 3584, 18944)
    assert (text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads) == (28, 28, 4)
    assert (text.qk_norm, text.freeze_und, text.layer_module) == (True, False, MOT)
    assert (text.rms_norm_eps, text.rope_parameters["rope_theta"]) == (1e-6, 1_000_000.0)
    assert (vision.hidden_size, vision.intermediate_size, vision.num_attention_heads) == (1152, 4304, 16)
    assert (vision.num_hidden_layers, vision.image_size, vision.patch_size, vision.rope) == (27, 980, 14, False)
    assert (vision.patch_dim, vision.hidden_act, vision.layer_norm_eps) == (588, "gelu_pytorch_tanh", 1e-6)
    assert (vae.z_channels, vae.downsample, vae.ch, vae.ch_mult, vae.num_res_blocks) == (16, 8, 128, [1, 2, 4, 4], 2)
    assert (vae.scale_factor, vae.shift_factor, vae.in_channels, vae.out_ch) == (0.3611, 0.1159, 3, 3)
    assert (config.latent_downsample, config.patch_latent_dim, config.num_vit_layers) == (16, 64, 26)


# ---- two names for one config


@pytest.mark.parametrize("names", [("text_config", "vision_config"), ("llm_config", "vit_config")])
@pytest.mark.parametrize("as_object", [True, False])
def test_both_names_are_one_object(names, as_object):
    text, vision = {"hidden_size": 64, "num_attention_heads": 4}, {"num_hidden_layers": 9}
    if as_object:
        text, vision = BagelTextConfig(**text), BagelVisionConfig(**vision)
    config = BagelConfig(**dict(zip(names, (text, vision))))
    assert config.llm_config is config.text_config
    assert config.vit_config is config.vision_config
    assert config.get_text_config() is config.text_config
    assert (config.text_config.hidden_size, config.vision_config.num_hidden_layers) == (64, 9)
    assert isinstance(config.text_config, BagelTextConfig)
    assert isinstance(config.vision_config, BagelVisionConfig)
    assert isinstance(config.vae_config, BagelVAEConfig)


def test_plain_qwen2_and_siglip_configs_are_taken_over():
    text = Qwen2Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=99)
    vision = SiglipVisionConfig(hidden_size=48, num_attention_heads=4, num_hidden_layers=5, patch_size=14)
    config = BagelConfig(text_config=text, vision_config=vision, stage=2)
    assert (config.text_config.vocab_size, config.text_config.qk_norm, config.text_config.freeze_und) == (
        99,
        True,
        False,
    )
    assert config.text_config.layer_module == MOT
    assert (config.vision_config.hidden_size, config.vision_config.rope, config.num_vit_layers) == (48, False, 4)


@pytest.mark.parametrize("pair", [("text_config", "llm_config"), ("vision_config", "vit_config")])
def test_both_names_with_different_values_are_an_error(pair, tmp_path):
    values = dict(zip(pair, ({"num_hidden_layers": 5}, {"num_hidden_layers": 6})))
    with pytest.raises(ValueError, match=f"{pair[1]} and {pair[0]}"):
        BagelConfig(**values)
    with pytest.raises(ValueError, match=f"{pair[1]} and {pair[0]}"):
        BagelConfig.from_dict(values)
    write(tmp_path, {"model_type": "bagel", **values})
    with pytest.raises(ValueError, match=f"{pair[1]} and {pair[0]}"):
        BagelConfig.from_pretrained(tmp_path)


def test_both_names_with_equal_values_are_accepted():
    config = BagelConfig(text_config={"num_hidden_layers": 5}, llm_config={"num_hidden_layers": 5})
    assert config.text_config.num_hidden_layers == 5


def test_a_file_with_one_set_of_names_equals_a_file_with_the_other(released, tmp_path):
    other = {{"llm_config": "text_config", "vit_config": "vision_config"}.get(k, k): v for k, v in RELEASED.items()}
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", other)
    left, right = BagelConfig.from_pretrained(released), BagelConfig.from_pretrained(tmp_path / "other")
    assert differences(facts(left), facts(right)) == {}


# ---- files


def test_released_file_is_read_as_meant(released):
    config = BagelConfig.from_pretrained(released)
    text, vision = config.text_config, config.vision_config
    assert (config.visual_gen, config.stage, text.layer_module) == (True, None, MOT)
    assert (text.hidden_size, text.vocab_size, text.rms_norm_eps) == (64, 320, 1e-5)
    assert text.rope_parameters == {"rope_theta": 500000.0, "rope_type": "default"}
    assert text.sliding_window is None  # a cache would make sliding layers of any other value
    assert set(text.layer_types) == {"full_attention"}
    assert (vision.num_hidden_layers, config.num_vit_layers, vision.rope) == (5, 4, False)
    assert config.vae_config.ch_mult == [1, 2, 4, 4]
    assert (text.model_type, vision.model_type) == ("bagel_text", "bagel_vision")
    assert (config.bos_token_id, config.latent_token_id) == (151644, 151654)


def test_dtype_of_a_released_file_is_kept(tmp_path):
    write(tmp_path, {**RELEASED, "torch_dtype": "bfloat16"})
    config = BagelConfig.from_pretrained(tmp_path)
    assert str(config.dtype).endswith("bfloat16")
    assert str(config.text_config.dtype).endswith("bfloat16")


@pytest.mark.parametrize(
    "make",
    [
        lambda: BagelConfig(),
        lambda: BagelConfig(stage=1),
        lambda: BagelConfig(stage="stage2", max_latent_size=32, interpolate_pos=True, vit_rope=True),
        lambda: BagelConfig(visual_gen=True, visual_und=False, vit_select_layer=-3),
        lambda: BagelConfig.from_dict(RELEASED),
        lambda: tiny_config(tie_word_embeddings=True),
    ],
    ids=["default", "stage 1", "stage 2", "no stage", "released", "tiny"],
)
def test_saved_and_loaded_config_is_the_same(make, tmp_path):
    config = make()
    assert differences(facts(BagelConfig.from_dict(config.to_dict())), facts(config)) == {}
    config.save_pretrained(tmp_path / "once")
    once = BagelConfig.from_pretrained(tmp_path / "once")
    once.save_pretrained(tmp_path / "twice")
    twice = BagelConfig.from_pretrained(tmp_path / "twice")
    assert differences(facts(once), facts(config)) == {}
    assert (tmp_path / "once" / "config.json").read_text() == (tmp_path / "twice" / "config.json").read_text()
    assert twice.llm_config is twice.text_config


def test_layer_offset_is_applied_exactly_once_however_often_it_is_saved(released, tmp_path):
    config = BagelConfig.from_pretrained(released)
    for number in range(3):
        assert (config.vision_config.num_hidden_layers, config.num_vit_layers) == (5, 4)
        config.save_pretrained(tmp_path / str(number))
        config = BagelConfig.from_pretrained(tmp_path / str(number))
    saved = json.loads((tmp_path / "2" / "config.json").read_text())
    assert (saved["vision_config"]["num_hidden_layers"], saved["vit_select_layer"]) == (5, -2)


@pytest.mark.parametrize(("select", "layers"), [(-1, 5), (-2, 4), (-5, 1), (1, 1), (5, 5)])
def test_select_layer_says_which_hidden_state_is_used(select, layers):
    assert BagelConfig(vit_select_layer=select, vision_config={"num_hidden_layers": 5}).num_vit_layers == layers


@pytest.mark.parametrize("select", [0, -6, 6])
def test_select_layer_outside_the_tower_is_refused(select):
    with pytest.raises(ValueError, match=f"vit_select_layer={select} leaves"):
        BagelConfig(vit_select_layer=select, vision_config={"num_hidden_layers": 5})


def test_nothing_hidden_travels_with_a_config(released, tmp_path):
    """No flag such as "offset already applied": what is saved are the documented fields."""
    config = BagelConfig.from_pretrained(released)
    config.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    documented = {
        *BagelConfig.__annotations__,
        "architectures",
        "auto_map",
        "model_type",
        "transformers_version",
        "dtype",
    }
    assert set(saved) <= documented
    for name, config_class in BagelConfig.sub_configs.items():
        inherited = set(config_class.__mro__[1]().to_dict()) | {"_name_or_path", "output_attentions"}
        assert set(saved[name]) <= inherited | set(config_class.__annotations__), name
    origin = {"_name_or_path", "_commit_hash", "transformers_version", "architectures"}
    made, loaded = (set(vars(x)) - origin for x in (config, BagelConfig.from_pretrained(tmp_path / "saved")))
    assert made == loaded


def test_saved_file_names_every_auto_class(tmp_path):
    BagelConfig(stage=2).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    for name in ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoProcessor"):
        module, attribute = AUTO_MAP[name].split(".")
        assert hasattr(importlib.import_module(f"bagel.{module}"), attribute)


def test_auto_classes_of_the_user_are_kept():
    config = BagelConfig(auto_map={"AutoModelForCausalLM": "mine.Mine"})
    assert config.auto_map == {**AUTO_MAP, "AutoModelForCausalLM": "mine.Mine"}


@pytest.mark.parametrize(
    "written",
    [
        {"rope_theta": 500.0},
        {"rope_theta": 500.0, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 500.0}},
    ],
    ids=str,
)
def test_old_and_new_rope_keys_say_the_same(written, tmp_path):
    text = BagelTextConfig(**written)
    assert text.rope_parameters == {"rope_theta": 500.0, "rope_type": "default"}
    BagelConfig(llm_config=written).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert saved["rope_parameters"] == {"rope_theta": 500.0, "rope_type": "default"}
    assert BagelConfig.from_pretrained(tmp_path).text_config.rope_parameters["rope_theta"] == 500.0


def test_rope_scaling_of_an_old_file_is_kept():
    text = BagelTextConfig(rope_theta=500.0, rope_scaling={"type": "linear", "factor": 2.0})
    assert (text.rope_parameters["rope_type"], text.rope_parameters["factor"]) == ("linear", 2.0)
    assert text.rope_parameters["rope_theta"] == 500.0


# ---- stage and layers


@pytest.mark.parametrize(
    ("stage", "visual_gen", "explicit", "expected_gen", "expected_layer"),
    [
        (None, False, None, False, PLAIN),
        (None, False, PLAIN, False, PLAIN),
        (None, False, MOE, False, MOE),
        (None, False, MOT, False, MOT),
        (None, True, None, True, MOT),
        (None, True, PLAIN, True, PLAIN),
        (None, True, MOE, True, MOE),
        (None, True, MOT, True, MOT),
        *((1, gen, explicit, False, PLAIN) for gen in (False, True) for explicit in (None, PLAIN, MOE, MOT)),
        *((2, gen, None, True, MOT) for gen in (False, True)),
        *((2, gen, PLAIN, True, MOT) for gen in (False, True)),
        *((2, gen, MOE, True, MOE) for gen in (False, True)),
        *((2, gen, MOT, True, MOT) for gen in (False, True)),
    ],
)
def test_decoder_layer_follows_from_stage_and_visual_gen(
    stage, visual_gen, explicit, expected_gen, expected_layer, tmp_path
):
    config = BagelConfig(stage=stage, visual_gen=visual_gen, text_config={"layer_module": explicit})
    assert (config.visual_gen, config.text_config.layer_module) == (expected_gen, expected_layer)
    config.save_pretrained(tmp_path)
    loaded = BagelConfig.from_pretrained(tmp_path)
    assert (loaded.visual_gen, loaded.text_config.layer_module) == (expected_gen, expected_layer)


@pytest.mark.parametrize(("forms", "stage"), [((1, "1", "stage1"), 1), ((2, "2", "stage2"), 2)])
def test_forms_of_a_stage_are_the_same(forms, stage):
    configs = [BagelConfig(stage=form) for form in forms]
    assert [config.stage for config in configs] == [stage] * 3
    assert all(differences(facts(config), facts(configs[0])) == {} for config in configs)


@pytest.mark.parametrize("stage", [0, 3, "3", "joint", "stage3", "Stage 1", ""])
def test_unknown_stage_is_refused(stage):
    with pytest.raises(ValueError, match=f"stage={stage!r} is unknown; use 1"):
        BagelConfig(stage=stage)


@pytest.mark.parametrize("stage", [True, False, 1.0, [1]])
def test_stage_of_another_type_is_refused(stage):
    with pytest.raises(StrictDataclassFieldValidationError, match="stage"):
        BagelConfig(stage=stage)


@pytest.mark.parametrize("layer_module", ["Qwen3DecoderLayer", "qwen2mot", ""])
def test_unknown_layer_module_is_refused(layer_module):
    with pytest.raises(ValueError, match=f"layer_module={layer_module!r} is unknown.*{MOE}"):
        BagelConfig(text_config={"layer_module": layer_module})


@pytest.mark.parametrize(
    ("nested", "numbers"),
    [
        ({"text_config": {"hidden_size": 30, "num_attention_heads": 4, "num_key_value_heads": 2}}, ("30", "4")),
        ({"text_config": {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 3}}, ("4", "3")),
        ({"vision_config": {"hidden_size": 30, "num_attention_heads": 4}}, ("30", "4")),
        ({"vae_config": {"ch_mult": [1, 2], "downsample": 8}}, ("2", "8")),
    ],
    ids=["text heads", "key-value heads", "vision heads", "VAE levels"],
)
def test_sizes_that_do_not_divide_are_refused_with_both_numbers(nested, numbers):
    with pytest.raises(ValueError) as error:
        BagelConfig(**nested)
    assert all(number in str(error.value) for number in numbers)


# ---- overrides


def test_stage_override_makes_a_joint_file_a_reader(released):
    config = BagelConfig.from_pretrained(released, stage=1)
    assert (config.stage, config.visual_gen, config.text_config.layer_module) == (1, False, PLAIN)
    assert config.text_config.hidden_size == 64


def test_stage_override_makes_a_saved_reader_a_joint_model(tmp_path):
    BagelConfig(stage=1).save_pretrained(tmp_path)
    config = BagelConfig.from_pretrained(tmp_path, stage="stage2")
    assert (config.stage, config.visual_gen, config.text_config.layer_module) == (2, True, MOT)


def test_visual_gen_override_is_stronger_than_the_stage_of_the_file(tmp_path):
    BagelConfig(stage=2).save_pretrained(tmp_path)
    config = BagelConfig.from_pretrained(tmp_path, visual_gen=False)
    assert (config.stage, config.visual_gen) == (None, False)


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if name.endswith("_token_id")])
def test_special_id_can_be_overridden(released, name):
    assert getattr(BagelConfig.from_pretrained(released, **{name: 17}), name) == 17


@pytest.mark.parametrize("name", ["text_config", "llm_config"])
def test_partial_text_override_keeps_the_rest_of_the_file(released, name):
    config = BagelConfig.from_pretrained(released, **{name: {"attention_dropout": 0.25, "freeze_und": True}})
    assert (config.text_config.attention_dropout, config.text_config.freeze_und) == (0.25, True)
    assert (config.text_config.hidden_size, config.text_config.vocab_size) == (64, 320)
    assert config.text_config.rope_parameters["rope_theta"] == 500000.0
    assert config.text_config.layer_module == MOT


@pytest.mark.parametrize("name", ["vision_config", "vit_config"])
def test_partial_vision_override_keeps_the_rest_of_the_file(released, name):
    config = BagelConfig.from_pretrained(released, **{name: {"attention_dropout": 0.25}})
    assert config.vision_config.attention_dropout == 0.25
    assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers) == (48, 5)


def test_partial_vae_override_keeps_the_rest_of_the_file(released):
    config = BagelConfig.from_pretrained(released, vae_config={"scale_factor": 0.5})
    assert (config.vae_config.scale_factor, config.vae_config.z_channels) == (0.5, 4)


def test_config_object_as_override_replaces_the_file(released):
    text = BagelTextConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=2)
    config = BagelConfig.from_pretrained(released, text_config=text)
    assert (config.text_config.hidden_size, config.text_config.vocab_size) == (96, 152064)


def test_vit_rope_override_reaches_the_tower(released):
    config = BagelConfig.from_pretrained(released, vit_rope=True)
    assert config.vision_config.rope is config.vit_rope is True


def test_arguments_that_are_not_of_the_config_come_back_unused(released):
    config, unused = BagelConfig.from_pretrained(released, stage=1, made_up=3, return_unused_kwargs=True)
    assert (config.stage, unused) == (1, {"made_up": 3})


# ---- the caller's values


@pytest.mark.parametrize(
    "arguments",
    [{"stage": 1, "vit_rope": True}, {"stage": 2}, {"visual_gen": True}, {"tie_word_embeddings": True}],
    ids=str,
)
@pytest.mark.parametrize("layer_module", [None, MOT])
def test_objects_of_the_caller_are_not_changed(layer_module, arguments):
    text, vision, vae = BagelTextConfig(layer_module=layer_module), BagelVisionConfig(), BagelVAEConfig()
    before = [copy.deepcopy(vars(config)) for config in (text, vision, vae)]
    BagelConfig(text_config=text, vision_config=vision, vae_config=vae, **arguments)
    assert [vars(config) for config in (text, vision, vae)] == before


def test_dicts_of_the_caller_are_not_changed(released):
    values, before = copy.deepcopy(RELEASED), copy.deepcopy(RELEASED)
    BagelConfig.from_dict(values, stage=1, llm_config={"attention_dropout": 0.25})
    assert values == before
    BagelConfig(**values)
    assert values == before


def test_attention_implementation_reaches_the_nested_configs():
    config = BagelConfig(attn_implementation="eager")
    assert [config.text_config._attn_implementation, config.vision_config._attn_implementation] == ["eager"] * 2
    assert BagelConfig()._attn_implementation is None


# ---- the documented helpers


def test_documented_functions_take_what_is_documented():
    for name in ("_coerce_text_config", "_coerce_vision_config"):
        (parameter,) = inspect.signature(getattr(configuration_bagel, name)).parameters.values()
        assert (parameter.name, parameter.default) == ("cfg", inspect.Parameter.empty)


@pytest.mark.parametrize("given", [None, {}, {"hidden_size": 64, "num_attention_heads": 4}, "stock"])
def test_text_config_is_coerced_from_nothing_a_dict_or_a_stock_config(given):
    stock = Qwen2Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=4)
    config = _coerce_text_config(stock if given == "stock" else given)
    assert type(config) is BagelTextConfig
    assert config.hidden_size == (64 if given else 3584)
    assert (config.qk_norm, config.layer_module, config.freeze_und) == (True, None, False)
    assert hasattr(config, "pad_token_id")


def test_vision_config_is_coerced_and_nothing_stays_nothing():
    assert _coerce_vision_config(None) is None
    assert type(_coerce_vision_config({})) is BagelVisionConfig
    assert _coerce_vision_config(SiglipVisionConfig(hidden_size=64, num_attention_heads=4)).hidden_size == 64
    assert _coerce_vision_config({"rope": True}).position_embedding == "rope_2d"


@pytest.mark.parametrize("coerce", [_coerce_text_config, _coerce_vision_config])
def test_coerced_config_is_a_copy(coerce):
    given = coerce({})
    config = coerce(given)
    assert config is not given
    assert config.to_dict() == given.to_dict()


# ---- the names of the experts


def test_experts_are_told_apart_by_name():
    assert gen_name("q_proj") == "q_proj_moe_gen"
    assert und_name("layers.0.mlp_moe_gen.up_proj.weight") == "layers.0.mlp.up_proj.weight"
    assert und_name("layers.0.mlp.up_proj.weight") == "layers.0.mlp.up_proj.weight"
    assert [is_gen_name(name) for name in ("mlp_moe_gen.up_proj", "mlp.up_proj", "llm2vae")] == [True, False, False]


@pytest.mark.parametrize(("layer_module", "attention", "mlp"), [(PLAIN, 1, 1), (MOE, 1, 2), (MOT, 2, 2)])
def test_decoder_layer_says_which_parts_each_expert_has(layer_module, attention, mlp):
    assert expert_suffixes(layer_module, "attention") == ("", "_moe_gen")[:attention]
    assert expert_suffixes(layer_module, "mlp") == ("", "_moe_gen")[:mlp]
    plan = BagelConfig(visual_gen=True, text_config={"layer_module": layer_module}).text_config.base_model_tp_plan
    assert len(plan) == 6 * attention + 3 * mlp
    assert sum(map(is_gen_name, plan)) == 6 * (attention - 1) + 3 * (mlp - 1)
