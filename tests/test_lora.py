# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""LoRA on the experts: what is adapted, what learns, what is drawn; adapters that do not fit; 4-bit weights."""

import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    IMAGE,
    LATENT,
    VISION_END,
    VISION_START,
    fresh_tiny_model,
    padded_batch,
    tiny_config,
    training_pack,
)
from torch import nn
from transformers import AutoModel, QuantoConfig, Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_imports
from transformers.quantizers.quantizers_utils import should_convert_module

from bagel.checkpoint_bagel import decoder_only
from bagel.configuration_bagel import BagelConfig
from bagel.conversion import export
from bagel.lora_bagel import check_adapter, lora_targets
from bagel.modeling_bagel import BagelForUnifiedMultimodal


peft = pytest.importorskip("peft")

pytestmark = pytest.mark.core

BLOCKS = "language_model.model.layers."
KINDS = {"attention": r"\.self_attn\.", "mlp": r"\.mlp(_moe_gen)?\."}
# every kind of token, and a loss on each kind that has one
MIXED = [
    [("text", 3), ("vit", 2, 3), ("text", 4), ("vae", 2, 2), ("text", 3)],
    [("text", 4), ("vae", 2, 2), ("vit", 2, 2), ("text", 3), ("noise", 2, 3)],
]


def load(directory, **kwargs) -> BagelForUnifiedMultimodal:
    return BagelForUnifiedMultimodal.from_pretrained(directory, **kwargs).eval()


def lora(model, experts="both", **kwargs) -> "peft.LoraConfig":
    """A config whose fresh adapter already changes the output."""
    return peft.LoraConfig(
        **{"r": 4, "target_modules": model.lora_targets(experts), "init_lora_weights": False, **kwargs}
    )


def adapted(model, experts="both", seed=0, **kwargs):
    """The model wrapped by PEFT, with a random adapter that depends on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(model, lora(model, experts, **kwargs)).eval()


def linears(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith(BLOCKS)}


def state(model) -> dict[str, tuple]:
    """Everything that a failed load could have changed."""
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    return {name: (tensor.clone(), flags.get(name)) for name, tensor in model.state_dict().items()}


def assert_same_state(model, before: dict[str, tuple]) -> None:
    after = state(model)
    assert after.keys() == before.keys()
    for name, (tensor, flag) in before.items():
        assert torch.equal(after[name][0], tensor), name
        assert after[name][1] == flag, name


# ---- what is adapted


@pytest.mark.parametrize("layer_module", ["Qwen2MoTDecoderLayer", "Qwen2MoEDecoderLayer", "Qwen2DecoderLayer"])
@pytest.mark.parametrize("experts", ["both", "und", "gen"])
@pytest.mark.parametrize("parts", [("attention", "mlp"), ("attention",), ("mlp",)])
def test_targets_are_exactly_the_linear_layers_of_the_chosen_experts(layer_module, experts, parts):
    overrides = {"text_config": {"layer_module": layer_module}}
    if layer_module == "Qwen2DecoderLayer":
        overrides["stage"] = 1
    model = fresh_tiny_model(**overrides)
    assert model.config.text_config.layer_module == layer_module
    wanted = {
        name
        for name in linears(model)
        if any(re.search(KINDS[part], name) for part in parts)
        and (experts == "both" or ("_moe_gen" in name) == (experts == "gen"))
    }
    if not wanted:
        remedy = "stage=2" if layer_module == "Qwen2DecoderLayer" else "shares its attention"
        with pytest.raises(ValueError, match=f"gen.*match no layer.*{remedy}"):
            lora_targets(model, experts, parts)
        return
    pattern = lora_targets(model, experts, parts)
    assert pattern == lora_targets(model.config, experts, parts) == model.lora_targets(experts, parts)
    assert {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)} == wanted
    reached = adapted(model, target_modules=pattern)
    assert {n.split(".lora_")[0] for n, p in reached.base_model.model.named_parameters() if p.requires_grad} == wanted
    assert reached.lora_targets(experts, parts) == pattern, "also from inside a PeftModel"


def test_targets_of_the_7b_model_are_392_layers(repo):
    config = BagelConfig.from_pretrained(repo)
    with torch.device("meta"):
        names = linears(BagelForUnifiedMultimodal(config))
    counts = [sum(bool(re.fullmatch(lora_targets(config, e), name)) for name in names) for e in ("both", "und", "gen")]
    assert counts == [28 * 14, 28 * 7, 28 * 7]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"experts": "all"}, "experts='all' is unknown.*'both', 'und', 'gen'"),
        ({"parts": ("norms",)}, r"parts=\('norms',\).*attention"),
        ({"parts": ()}, r"parts=\(\)"),
    ],
)
def test_unknown_choices_of_targets_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        lora_targets(tiny_config(), **arguments)


def test_targets_of_another_model_are_refused():
    with pytest.raises(ValueError, match="takes a BAGEL model or its BagelConfig, not Linear"):
        lora_targets(nn.Linear(2, 2))


def test_targets_that_match_nothing_are_refused_and_leave_the_model_alone():
    model = fresh_tiny_model()
    before = state(model)
    with pytest.raises(ValueError, match=r"q_projection.*match no layer.*lora_targets\(\"both\"\)"):
        model.add_adapter(peft.LoraConfig(target_modules=["q_projection"]))
    assert_same_state(model, before)
    with pytest.raises(TypeError, match="PeftConfig"):
        model.add_adapter({"r": 8})
    with pytest.raises(ValueError, match="No adapter loaded"):
        model.disable_adapters()


# ---- what is written and drawn


@pytest.fixture(scope="module")
def prompts(processor, picture):
    def inputs(mode, *content):
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": "a red car"}]}]
        arguments = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "generation_mode": mode}
        return dict(processor.apply_chat_template(messages, **arguments))

    small = {"type": "image", "image": picture.resize((60, 60))}
    return {
        "text": inputs("text", small),
        "image": inputs("image"),
        "interleaved": inputs("interleaved"),
        "processor": processor,
    }


def say_and_draw(model, prompts) -> dict[str, torch.Tensor]:
    """Scores of a written text, the latents of a picture, and those of a picture that the model decided to draw."""
    drawing = {"num_timesteps": 3, "progress_bar": False, "output_type": "latent", "height": 64, "width": 64}
    written = model.generate(
        **prompts["text"], max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    (drawn,) = model.generate(
        **prompts["image"], generation_mode="image", generator=torch.Generator().manual_seed(0), **drawing
    )
    calls = []

    def draw_first(module, inputs, logits):
        calls.append(None)
        if len(calls) == 1:
            logits = logits.index_fill(-1, torch.tensor([model.config.vision_start_token_id]), 1e9)
        return logits

    hook = model.get_output_embeddings().register_forward_hook(draw_first)
    try:
        items = model.generate(
            **{name: x[:, :-1] if x.ndim == 2 else x for name, x in prompts["interleaved"].items()},  # without bos
            generation_mode="interleaved",
            generator=torch.Generator().manual_seed(0),
            max_new_tokens=2,
            max_images=1,
            processor=prompts["processor"],
            **drawing,
        )[0]
    finally:
        hook.remove()
    return {"text": torch.stack(written.logits), "image": drawn, "interleaved": items[0]}


@pytest.fixture(scope="module")
def base_says(model, prompts):
    return say_and_draw(model, prompts)


def assert_all(comparison, one, other):
    for name in one:
        assert comparison(one[name], other[name]), name


def differ(one, other) -> bool:
    return (one - other).abs().max() > 1e-2


def close(one, other) -> bool:
    return torch.allclose(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize(
    "kind",
    [{}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["llm2vae", "vae2llm", "time_embedder"]}],
    ids=["lora", "dora", "rslora", "modules_to_save"],
)
def test_adapter_changes_text_and_pictures_and_merges(task_type, kind, tiny_directory, prompts, base_says):
    wrapped = adapted(load(tiny_directory), task_type=task_type, **kind)
    says = say_and_draw(wrapped, prompts)
    assert_all(differ, says, base_says)
    with wrapped.disable_adapter():
        assert_all(torch.equal, say_and_draw(wrapped, prompts), base_says)
    merged = wrapped.merge_and_unload()
    assert type(merged) is BagelForUnifiedMultimodal
    assert_all(close, say_and_draw(merged, prompts), says)


@pytest.mark.parametrize("experts", ["und", "gen"])
def test_adapter_of_one_expert_changes_what_that_expert_does(experts, tiny_directory, prompts, base_says):
    wrapped = adapted(load(tiny_directory), experts)
    says = say_and_draw(wrapped, prompts)
    assert differ(says["image"], base_says["image"])
    assert torch.equal(says["text"], base_says["text"]) == (experts == "gen"), (
        "a prompt without latents has no gen tokens"
    )


def test_native_adapters_are_swapped_disabled_and_deleted(tiny_directory, prompts, base_says):
    singles = {}
    for seed, name in enumerate(("one", "two")):
        single = adapted(load(tiny_directory), seed=seed, modules_to_save=["llm2vae"])
        with torch.no_grad():
            single.llm2vae.modules_to_save["default"].weight.add_(seed + 1)
        singles[name] = single
    model = load(tiny_directory)
    names = set(model.state_dict())
    for name, single in singles.items():
        model.add_adapter(lora(model, modules_to_save=["llm2vae"]), name)
        values = {key.replace(".default.", f".{name}."): x for key, x in single.base_model.model.state_dict().items()}
        assert model.load_state_dict(values, strict=False).unexpected_keys == []
    expected = {name: say_and_draw(single, prompts) for name, single in singles.items()}
    assert_all(differ, expected["one"], expected["two"])
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        assert model.active_adapters() == [name]
        assert_all(torch.equal, say_and_draw(model, prompts), expected[name])
    model.disable_adapters()
    assert_all(torch.equal, say_and_draw(model, prompts), base_says)
    model.enable_adapters()
    assert_all(torch.equal, say_and_draw(model, prompts), expected["one"])
    model.delete_adapter("one")
    model.set_adapter("two")
    assert_all(torch.equal, say_and_draw(model, prompts), expected["two"])
    model.delete_adapter("two")
    assert_all(torch.equal, say_and_draw(model, prompts), base_says)
    assert set(model.state_dict()) == names, "nothing of PEFT is left that a saved model would hold"


def test_native_adapters_may_save_different_modules(prompts, tiny_directory, base_says):
    model = load(tiny_directory)
    model.add_adapter(lora(model), "plain")
    plain = say_and_draw(model, prompts)
    model.add_adapter(lora(model, modules_to_save=["llm2vae"]), "with head")
    with torch.no_grad():
        model.llm2vae.modules_to_save["with head"].weight.add_(1)
    with_head = say_and_draw(model, prompts)
    assert differ(with_head["image"], plain["image"])
    for name, says in (("plain", plain), ("with head", with_head), ("plain", plain)):
        model.set_adapter(name)
        assert_all(torch.equal, say_and_draw(model, prompts), says)
        model.disable_adapters()
        assert_all(torch.equal, say_and_draw(model, prompts), base_says)
        model.enable_adapters()
        assert_all(torch.equal, say_and_draw(model, prompts), says)
    model.delete_adapter("with head")
    assert type(model.llm2vae).__name__ == "VelocityHead"
    assert_all(torch.equal, say_and_draw(model, prompts), plain)
    with pytest.raises(ValueError, match="with head not found"):
        model.set_adapter("with head")


def test_stored_adapter_is_the_same_whichever_way_it_is_loaded(tiny_directory, prompts, tmp_path):
    wrapped = adapted(load(tiny_directory), modules_to_save=["llm2vae", "connector"], task_type="CAUSAL_LM")
    with torch.no_grad():
        wrapped.connector.modules_to_save["default"].fc1.weight.add_(0.1)
        wrapped.llm2vae.modules_to_save["default"].weight.add_(0.1)
    says = say_and_draw(wrapped, prompts)
    wrapped.save_pretrained(tmp_path / "by_peft")
    assert set(json.loads((tmp_path / "by_peft" / "adapter_config.json").read_text())) >= {"target_modules", "r"}

    native = load(tiny_directory)
    native.load_adapter(tmp_path / "by_peft", "mine")
    assert_all(close, say_and_draw(native, prompts), says)
    native.save_pretrained(tmp_path / "natively")
    stored = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("by_peft", "natively")]
    assert stored[0].keys() == stored[1].keys()

    ways = {
        "PeftModel": peft.PeftModel.from_pretrained(
            load(tiny_directory), check_adapter(load(tiny_directory), tmp_path / "natively")
        ).eval(),
        "the adapter's folder": AutoModel.from_pretrained(tmp_path / "natively", trust_remote_code=True).eval(),
    }
    for way, loaded in ways.items():
        for name, value in say_and_draw(loaded, prompts).items():
            assert close(value, says[name]), (way, name)


def test_adapter_weights_are_hot_swapped_in_place(tiny_directory, prompts, tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    wrapped = adapted(load(tiny_directory), seed=0)
    other = adapted(load(tiny_directory), seed=1)
    other.save_pretrained(tmp_path)
    hotswap_adapter(wrapped, tmp_path, adapter_name="default")
    says = say_and_draw(other, prompts)
    assert_all(torch.equal, say_and_draw(wrapped, prompts), says)
    native = load(tiny_directory)
    native.add_adapter(lora(native), "slot")
    native.load_adapter(tmp_path, "slot", hotswap=True)
    assert_all(close, say_and_draw(native, prompts), says)


def test_merged_model_is_saved_loaded_and_exported_like_any_other(tiny_directory, prompts, tmp_path):
    wrapped = adapted(load(tiny_directory))
    says = say_and_draw(wrapped, prompts)
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModel.from_pretrained(tmp_path / "merged", trust_remote_code=True).eval()
    assert_all(close, say_and_draw(loaded, prompts), says)
    export(tmp_path / "merged", tmp_path / "released")
    released, original = load_file(tmp_path / "released" / "ema.safetensors"), load(tiny_directory).state_dict()
    changed = {name for name, tensor in released.items() if not torch.equal(tensor, original[name])}
    assert changed == {f"{name}.weight" for name in linears(loaded)}
    assert all(torch.equal(tensor, merged.state_dict()[name]) for name, tensor in released.items())


# ---- what learns


@pytest.mark.parametrize("experts", ["both", "und", "gen"])
def test_gradients_of_a_pack_reach_exactly_the_chosen_experts(experts):
    model = fresh_tiny_model()
    expected = {name for name in linears(model) if experts == "both" or ("_moe_gen" in name) == (experts == "gen")}
    saved = ["llm2vae", "connector"]
    model = adapted(model, experts, modules_to_save=saved).base_model.model.train()
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {f"{name}.lora_{half}.default.weight" for name in expected for half in "AB"}
    copies = {
        n for n, _ in model.named_parameters() if re.match(rf"({'|'.join(saved)})\.modules_to_save\.default\.", n)
    }
    assert len(copies) == 6
    assert learning == adapters | copies
    model(**training_pack(MIXED)).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == learning
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("experts", ["both", "und", "gen"])
def test_gradients_of_a_padded_batch_reach_exactly_the_chosen_experts(experts):
    """Words are predicted, so latents only matter as keys and values: their last queries and MLP change nothing."""
    model = adapted(fresh_tiny_model(), experts).base_model.model.train()
    batch = padded_batch([[("text", 3), ("vit", 2, 2), ("vae", 2, 2), ("text", 4)], [("text", 2)]])
    pictures = torch.isin(batch["input_ids"], torch.tensor([VISION_START, VISION_END, IMAGE, LATENT]))
    labels = batch["input_ids"].masked_fill(pictures | (batch["attention_mask"] == 0), -100)
    model(**batch, labels=labels, use_cache=False).loss.backward()
    unheard = re.compile(r"\.layers\.1\.(self_attn\.[qo]_proj_moe_gen|mlp_moe_gen)")
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None:
            assert (parameter.grad.abs().max() == 0) == bool(unheard.search(name)), name


def test_fresh_adapter_is_neutral_and_learns_in_its_first_step():
    model = fresh_tiny_model()
    pack = training_pack(MIXED)
    before = model(**pack).loss
    model = peft.get_peft_model(model, lora(model, init_lora_weights=True)).train()
    assert torch.equal(model(**pack).loss, before)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        model(**pack).loss.backward()
        for name, parameter in model.named_parameters():
            if ".lora_" in name:  # B is zero at first, so nothing reaches A
                assert (parameter.grad.abs().max() > 0) == (step > 0 or ".lora_B." in name), (step, name)
        optimizer.step()


@pytest.mark.parametrize("vocabulary", ["pack", "batch"])
@pytest.mark.parametrize(
    "checkpointing", [{"use_reentrant": False}, {"use_reentrant": True}], ids=["plain", "reentrant"]
)
def test_gradient_checkpointing_changes_no_gradient(vocabulary, checkpointing):
    inputs = training_pack(MIXED)
    if vocabulary == "batch":
        inputs = padded_batch([[("text", 3), ("vit", 2, 2), ("vae", 2, 2), ("text", 4)], [("text", 2)]])
        inputs |= {"labels": inputs["input_ids"], "use_cache": False}
    gradients = []
    for enabled in (False, True):
        model = fresh_tiny_model()
        if enabled:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
            model.enable_input_require_grads()
        model = adapted(model).train()
        model(**inputs).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("experts", ["both", "und", "gen"])
def test_stock_trainer_changes_adapters_and_nothing_else(experts, tmp_path):
    model = adapted(fresh_tiny_model(), experts, modules_to_save=["connector"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    packs = [training_pack(MIXED, seed=seed) for seed in range(4)]
    arguments = TrainingArguments(
        remove_unused_columns=False,  # a pack's names are no parameters of forward
        output_dir=tmp_path,
        max_steps=3,
        per_device_train_batch_size=1,
        gradient_checkpointing=True,
        learning_rate=1e-2,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=packs, data_collator=lambda rows: rows[0]).train()
    after = model.state_dict()
    assert {name for name, tensor in after.items() if not torch.equal(tensor, before[name])} == learning
    again = peft.PeftModel.from_pretrained(fresh_tiny_model(), tmp_path / "checkpoint-3")
    assert {name: tensor.tolist() for name, tensor in again.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in after.items()
    }


# ---- adapters that do not fit


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Folders of adapters, by what they are made for."""
    folder = tmp_path_factory.mktemp("adapters")
    bases = {
        "itself": {},
        "wider": {"text_config": {"hidden_size": 48, "intermediate_size": 56}},
        "shorter": {"text_config": {"num_hidden_layers": 1}},
        "longer": {"text_config": {"num_hidden_layers": 3}},
        "stage 1": {"stage": 1},
    }
    for name, overrides in bases.items():
        adapted(fresh_tiny_model(**overrides)).save_pretrained(folder / name)
    adapted(fresh_tiny_model(), "gen").save_pretrained(folder / "gen only")
    adapted(fresh_tiny_model(), modules_to_save=["llm2vae"]).save_pretrained(folder / "with head")
    other_latents = fresh_tiny_model(latent_patch_size=1)
    adapted(other_latents, modules_to_save=["llm2vae"]).save_pretrained(folder / "other latents")
    ends = ["q_proj", "up_proj"]
    adapted(fresh_tiny_model(stage=1, visual_und=False), target_modules=ends).save_pretrained(
        folder / "stage 1 by ends"
    )
    return folder


MISFITS = {
    "wider": r"56 of 56 tensors have other shapes: .*lora_B\.weight is \(48, 4\), \(32, r\) is needed",
    "shorter": r"14 of the 28 layers.*no tensors in the adapter \(decoder layer 1\)",
    "longer": r"28 of 84 tensors are for layers that it does not have \(decoder layer 2\)",
    "other latents": r"llm2vae\.bias is \(4,\), \(16,\) is needed",
}


@pytest.mark.parametrize("name", MISFITS)
@pytest.mark.parametrize("others", [False, True], ids=["alone", "beside another"])
def test_adapter_of_another_base_is_refused_and_leaves_the_model_alone(name, others, stored):
    model = fresh_tiny_model()
    if others:
        model.load_adapter(stored / "itself", "good")
    before, text = state(model), torch.arange(8, 14)[None]
    said = model(text).logits
    with pytest.raises(ValueError, match=MISFITS[name]) as error:
        model.load_adapter(stored / name, "bad")
    assert f"{stored / name} does not fit this model" in str(error.value)
    assert len(str(error.value)) < 1000, "one paragraph, not a line per tensor"
    assert_same_state(model, before)
    assert torch.equal(model(text).logits, said)
    model.load_adapter(stored / "with head", "later")
    assert not torch.equal(model(text).logits, said) or others


def test_load_that_fails_halfway_leaves_the_model_alone(stored, tmp_path):
    """The file fits the model, but not its own config: PEFT finds out when its layers are in the model already."""
    (tmp_path / "adapter_model.safetensors").symlink_to(stored / "with head" / "adapter_model.safetensors")
    config = json.loads((stored / "with head" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 2}))
    model = fresh_tiny_model().train()
    before = state(model)
    with pytest.raises(RuntimeError):
        model.load_adapter(tmp_path)
    assert_same_state(model, before)
    assert model.training
    for name in ("good", "other"):
        model.load_adapter(stored / "itself", name)
    before = state(model)
    for active in ("good", "other"):
        model.set_adapter(active)
        before = state(model)
        with pytest.raises(RuntimeError):
            model.load_adapter(tmp_path, "bad")
        assert_same_state(model, before)
        assert model.active_adapters() == [active]
    with pytest.raises(ValueError, match="good already exists"):
        model.load_adapter(stored / "with head", "good")
    assert_same_state(model, before)


def test_load_that_leaves_tensors_out_is_refused(stored, monkeypatch):
    """As PEFT 0.19 does under transformers 5.17: it reports every tensor as unexpected, and goes on without them."""
    from transformers.integrations.peft import PeftAdapterMixin

    original = PeftAdapterMixin.load_adapter

    def lossy(self, *args, **kwargs):
        info = original(self, *args, **kwargs)
        info.unexpected_keys = {"base_model.model.a.lora_A.weight", "base_model.model.b_moe_gen.c.lora_A.weight"}
        return info

    def deaf(*args, **kwargs):
        return SimpleNamespace(unexpected_keys=["a.lora_A.weight", "b_moe_gen.c.lora_A.weight"])

    monkeypatch.setattr(PeftAdapterMixin, "load_adapter", lossy)
    monkeypatch.setattr(peft.utils.save_and_load, "set_peft_model_state_dict", deaf)
    for overrides, lost in (({}, 2), ({"stage": 1}, 1)):  # in stage 1 the generation expert may be absent
        model = fresh_tiny_model(**overrides)
        before = state(model)
        with pytest.raises(RuntimeError, match=f"{lost} tensors of the adapter were not loaded.*install peft"):
            model.load_adapter(stored / "itself")
        assert_same_state(model, before)


def test_peft_model_says_both_shapes_too(stored):
    with pytest.raises(ValueError, match=r"another base.*lora_A\.default\.weight is \(4, 48\), \(4, 32\) is needed"):
        peft.PeftModel.from_pretrained(fresh_tiny_model(), stored / "wider")
    model = fresh_tiny_model()
    before = state(model)
    with pytest.raises(ValueError, match="does not fit this model"):
        peft.PeftModel.from_pretrained(model, check_adapter(model, stored / "wider"))
    assert_same_state(model, before)


def test_adapter_of_stage_1_works_in_the_joint_model(stored):
    for name in ("stage 1", "stage 1 by ends"):
        model, small = fresh_tiny_model(), fresh_tiny_model(stage=1)
        values = {name: tensor for name, tensor in model.state_dict().items() if name in small.state_dict()}
        small.load_state_dict(values)
        small.load_adapter(stored / name)
        model.load_adapter(stored / name)
        text = torch.arange(8, 14)[None]
        assert torch.equal(model(text).logits, small(text).logits)
        assert not torch.equal(model(text).logits, fresh_tiny_model()(text).logits)


def test_joint_adapter_reads_in_stage_1_but_one_of_gen_alone_is_refused(stored):
    small = fresh_tiny_model(stage=1)
    small.load_adapter(stored / "with head")
    text = torch.arange(8, 14)[None]
    assert not torch.equal(small(text).logits, fresh_tiny_model(stage=1)(text).logits)
    with pytest.raises(ValueError, match=r"its 28 tensors are for parts that this model is built without.*stage=2"):
        fresh_tiny_model(stage=1).load_adapter(stored / "gen only")


def test_adapter_of_a_base_of_another_name_gets_a_warning(stored, monkeypatch):
    warnings = []
    monkeypatch.setattr("bagel.lora_bagel.logger.warning", warnings.append)
    model, config = fresh_tiny_model(), peft.PeftConfig.from_pretrained(str(stored / "itself"))
    tensors = load_file(stored / "itself" / "adapter_model.safetensors")
    for made_for, name, warned in [
        ("ByteDance-Seed/BAGEL-7B-MoT", "/models/bagel-7b-mot", 0),
        ("ByteDance-Seed/BAGEL-7B-MoT", "/models/my-finetune", 1),
        (None, "/models/my-finetune", 0),
    ]:
        warnings.clear()
        model.name_or_path, config.base_model_name_or_path = name, made_for
        model.load_adapter(
            adapter_name=f"{warned}{made_for}", peft_config=copy.deepcopy(config), adapter_state_dict=tensors
        )
        assert len(warnings) == warned
    model.name_or_path, config.base_model_name_or_path = "/models/my-finetune", "someone/else"
    model.load_adapter(adapter_name="last", peft_config=config, adapter_state_dict=tensors)
    assert "someone/else" in warnings[-1]
    assert "/models/my-finetune" in warnings[-1]


def test_folders_without_a_usable_adapter_are_refused_by_name(stored, tmp_path, tiny_directory):
    model = fresh_tiny_model()
    before = state(model)
    source = stored / "itself"
    data = (source / "adapter_model.safetensors").read_bytes()

    def folder(name, **files):
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file.replace("__", ".")).write_bytes(content)
        return tmp_path / name

    config = (source / "adapter_config.json").read_bytes()
    save_file({}, tmp_path / "nothing.safetensors")
    empty = (tmp_path / "nothing.safetensors").read_bytes()
    cases = [
        (folder("empty"), OSError, r"adapter_config.json and adapter_model.safetensors not found. It has nothing"),
        (folder("pickled", adapter_config__json=config, adapter_model__bin=b""), OSError, "pickle.*safetensors"),
        (folder("cut", adapter_config__json=config, adapter_model__safetensors=data[:-9]), OSError, "cut.*truncated"),
        (
            folder("hollow", adapter_config__json=config, adapter_model__safetensors=empty),
            ValueError,
            "no tensors at all",
        ),
        (tiny_directory, OSError, "holds a model, no adapter"),
        (source / "adapter_config.json", OSError, "holds no adapter"),
    ]
    for path, error, said in cases:
        with pytest.raises(error, match=said):
            model.load_adapter(path)
        assert_same_state(model, before)


def test_adapter_on_the_hub_is_checked_before_it_is_loaded(stored, tmp_path):
    commit = "a" * 40
    for name in ("wider", "itself"):
        repository = tmp_path / f"models--someone--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        (repository / "snapshots").mkdir()
        (repository / "snapshots" / commit).symlink_to(stored / name)
    model = fresh_tiny_model()
    before = state(model)
    with pytest.raises(ValueError, match="does not fit this model"):
        model.load_adapter("someone/wider", adapter_kwargs={"cache_dir": str(tmp_path)})
    assert_same_state(model, before)
    assert check_adapter(model, "someone/itself", cache_dir=str(tmp_path)).endswith(f"snapshots/{commit}")
    model.load_adapter("someone/itself", adapter_kwargs={"cache_dir": str(tmp_path)})
    assert model.active_adapters() == ["default"]


def test_everything_but_adapters_works_without_peft(repo, stored, monkeypatch):
    assert "peft" not in get_imports(repo / "lora_bagel.py"), "remote code may not ask for it"
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    model = fresh_tiny_model()
    assert model.lora_targets("gen") == lora_targets(model.config, "gen")
    with pytest.raises(ImportError, match="pip install peft"):
        model.check_adapter(stored / "itself")


# ---- quantised bases


def test_quantisation_takes_the_decoder_layers_alone():
    mine = QuantoConfig(weights="int8", modules_to_not_convert=[r"language_model\.model\.layers\.0\."])
    config = decoder_only(mine)
    assert mine.modules_to_not_convert == [r"language_model\.model\.layers\.0\."], "the caller's object stays"
    model = fresh_tiny_model(text_config={"num_hidden_layers": 3})
    for skips, kept in ((config.modules_to_not_convert, "layers.0."), (decoder_only(QuantoConfig()), None)):
        skips = getattr(skips, "modules_to_not_convert", skips)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                converted = name.startswith(BLOCKS) and not (kept and kept in name)
                assert should_convert_module(name, skips) == converted, name  # by module, as bitsandbytes asks
                assert should_convert_module(f"{name}.weight", skips) == converted, name  # by tensor, as torchao asks
    assert decoder_only({"quant_method": "quanto", "weights": "int8"}).modules_to_not_convert == list(
        decoder_only(QuantoConfig()).modules_to_not_convert
    )
    without_list = SimpleNamespace(bits=4)
    assert decoder_only(without_list) == without_list


@pytest.fixture
def four_bit():
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def four_bit_layers(model) -> set[str]:
    return {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}


@pytest.mark.parametrize("experts", ["both", "gen"])
def test_qlora_trains_both_experts_over_four_bit_weights(experts, four_bit, tiny_directory, prompts, tmp_path):
    model = load(tiny_directory, quantization_config=four_bit)
    expected = linears(model)
    assert four_bit_layers(model) == expected
    assert len(expected) == 3 * 14
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = adapted(model, experts).train()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    config = model.config
    pack = training_pack(MIXED, config=config)
    pack["packed_text_ids"] = pack["packed_text_ids"] + 1  # no placeholders among the text ids
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(model(**pack).loss)
        losses[-1].backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad == (".lora_" in name), name
            assert parameter.grad is None or parameter.grad.abs().max() > 0, name
        optimizer.step()
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name]), name

    model.save_pretrained(tmp_path)
    model.train(False)
    again = load(tiny_directory, quantization_config=four_bit)
    plain = say_and_draw(again, prompts)
    again.load_adapter(tmp_path)
    says = say_and_draw(again, prompts)
    assert differ(says["image"], plain["image"])
    assert_all(lambda one, other: torch.allclose(one, other, atol=2e-2, rtol=2e-2), say_and_draw(model, prompts), says)


def test_four_bit_model_is_saved_loaded_and_adapted(four_bit, tiny_directory, tmp_path):
    model = load(tiny_directory, quantization_config=four_bit)
    text = torch.arange(8, 14)[None]
    model.train()  # in evaluation, bitsandbytes repacks the weights for some CPUs, with rounding
    said = model(text).logits
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModel.from_pretrained(tmp_path / "model", trust_remote_code=True).train()
    assert four_bit_layers(loaded) == linears(model)
    assert torch.equal(loaded(text).logits, said)
    adapted(load(tiny_directory)).save_pretrained(tmp_path / "adapter")
    loaded.load_adapter(tmp_path / "adapter", is_trainable=True)
    assert not torch.equal(loaded.train()(text).logits, said)
    with pytest.raises(ValueError, match=r"lora_A\.weight is \(4, 64\)|does not fit"):
        adapted(fresh_tiny_model()).save_pretrained(tmp_path / "other")
        loaded.load_adapter(tmp_path / "other", "bad")


# ---- other methods of PEFT

TEXTS = {"input_ids": torch.tensor([[1, 50, 51, 2], [1, 60, 61, 2]]), "attention_mask": torch.ones(2, 4).long()}
DRAW = {"generation_mode": "image", "num_timesteps": 3, "progress_bar": False, "output_type": "latent"}


def of_every_layer(method, **options):
    return method(target_modules=lora_targets(tiny_config()), **options)


METHODS = {
    "DoRA": lambda: of_every_layer(peft.LoraConfig, r=4, use_dora=True),
    "IA3": lambda: of_every_layer(peft.IA3Config, feedforward_modules=r".*down_proj"),
    "LoHa": lambda: of_every_layer(peft.LoHaConfig, r=2),
    "LoKr": lambda: of_every_layer(peft.LoKrConfig, r=2),
    "OFT": lambda: of_every_layer(peft.OFTConfig, r=0, oft_block_size=4),
    "norms": lambda: peft.LNTuningConfig(target_modules=r".*layernorm.*"),
}
PROMPT_LEARNING = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def trained(config):
    """A `PeftModel` whose adapter is far from neutral."""
    torch.manual_seed(0)
    tuned = peft.get_peft_model(fresh_tiny_model(), config).eval()
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.rand_like(parameter))
    return tuned


@torch.no_grad()
def written_and_drawn(model) -> dict[str, torch.Tensor]:
    edit = padded_batch([[("vae", 2, 2), ("vit", 2, 3), ("text", 4)], [("text", 3)]], 0)
    noise = [torch.Generator().manual_seed(0) for _ in range(2)]
    drawn = model.eval().generate(**edit, **DRAW, generator=noise)
    written = model.generate(**TEXTS, max_new_tokens=3, do_sample=False)
    return {"logits": model(**edit).logits, "written": written, "drawn": torch.cat([x.flatten() for x in drawn])}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_layers_is_the_same_whichever_way_it_is_loaded(method, tmp_path):
    tuned = trained(METHODS[method]())
    tuned.save_pretrained(tmp_path)
    native = fresh_tiny_model()
    native.load_adapter(tmp_path)
    expected, plain = written_and_drawn(tuned), written_and_drawn(fresh_tiny_model())
    for loaded in (native, peft.PeftModel.from_pretrained(fresh_tiny_model(), tmp_path)):
        says = written_and_drawn(loaded)
        for name, value in expected.items():
            torch.testing.assert_close(says[name], value, rtol=1e-5, atol=1e-5, msg=name)
    assert not any(torch.allclose(expected[name], plain[name], atol=1e-3) for name in ("logits", "drawn"))


@pytest.mark.parametrize("method", PROMPT_LEARNING)
def test_prompt_learning_changes_texts_and_is_refused_while_drawing(method, tmp_path):
    tuned = trained(PROMPT_LEARNING[method]())
    tuned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(fresh_tiny_model(), tmp_path).eval()
    with torch.no_grad():
        expected = tuned(**TEXTS).logits
        torch.testing.assert_close(again(**TEXTS).logits, expected)
        assert not torch.allclose(fresh_tiny_model()(**TEXTS).logits[:, -1], expected[:, -1], atol=1e-3)
    with pytest.raises(ValueError, match=r"virtual tokens .* To draw, use"):
        tuned.generate(**TEXTS, **DRAW)
    assert tuned.generate(**TEXTS, max_new_tokens=2).shape[1] >= 5


def test_virtual_tokens_come_before_images_too():
    tuned = trained(PROMPT_LEARNING["prompt tuning"]())
    read = padded_batch([[("vit", 2, 3), ("text", 4)]], 0)
    embeds = tuned.get_input_embeddings()(read["input_ids"])
    whole = torch.cat([tuned.get_prompt(1), embeds], dim=1)
    mask = torch.ones(whole.shape[:2]).long()
    pixels = {name: read[name] for name in ("pixel_values", "image_grid_hw")}
    with torch.no_grad():
        expected = tuned.base_model(inputs_embeds=whole, attention_mask=mask, **pixels).logits
        torch.testing.assert_close(tuned(**read).logits, expected)


def test_each_row_of_a_batch_may_have_its_own_adapter():
    model = fresh_tiny_model()
    tuned = peft.get_peft_model(model, lora(model), adapter_name="one").eval()
    tuned.add_adapter("two", lora(model))
    alone = []
    with torch.no_grad():
        for row, name in enumerate(("one", "two")):
            tuned.set_adapter(name)
            alone.append(tuned(input_ids=TEXTS["input_ids"][row : row + 1]).logits)
        names = {"adapter_names": ["one", "two"]}
        together = tuned(input_ids=TEXTS["input_ids"], **names).logits
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="adapter_names"):
        tuned.generate(**TEXTS, **DRAW, **names)
