# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Adapters: which layers they adapt, and whether a stored one fits a model. Names and shapes only; PEFT computes.

A decoder block has the linear layers of both experts:

    self_attn.q_proj  k_proj  v_proj  o_proj          mlp.gate_proj  up_proj  down_proj            und
    self_attn.q_proj_moe_gen  ...  o_proj_moe_gen     mlp_moe_gen.gate_proj  up_proj  down_proj    gen

PEFT matches a list of target modules with the ends of module names, which cannot separate the experts: "q_proj" does
not match `q_proj_moe_gen` but matches the vision tower, "gate_proj" matches both experts. [`lora_targets`] therefore
returns a regular expression of whole names; it works without PEFT installed, everything else here needs it.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import cached_file, logging

from .checkpoint_bagel import HUB_KWARGS, read_header, some, switched_off_parts
from .configuration_bagel import EXPERT_SUFFIXES, expert_suffixes, is_gen_name


if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel as _Model
else:
    _Model = object

logger = logging.get_logger(__name__)

Part: TypeAlias = Literal["attention", "mlp"]

EXPERTS = ("both", *EXPERT_SUFFIXES)
LAYER_PATTERNS: dict[Part, str] = {  # {} = the expert
    "attention": r"self_attn\.[qkvo]_proj{}",
    "mlp": r"mlp{}\.(gate|up|down)_proj",
}
PARTS = tuple(LAYER_PATTERNS)
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


def lora_targets(
    model_or_config: nn.Module | PreTrainedConfig,
    experts: Literal["both", "und", "gen"] = "both",
    parts: Part | Sequence[Part] = PARTS,
) -> str:
    """
    The `target_modules` of a `peft.LoraConfig` that adapts one expert of the decoder, or both.

    Args:
        model_or_config: a BAGEL model (also inside a `PeftModel`) or its config; it says which experts there are.
        experts: `"und"` handles text and ViT tokens, `"gen"` VAE latents. Layers that both share (the attention of
            `Qwen2MoEDecoderLayer`, everything of `Qwen2DecoderLayer`) belong to `"und"`, as their names do.
        parts: `"attention"` (q, k, v, o projections), `"mlp"` (gate, up, down projections), or both.

    Returns:
        A regular expression of whole module names: exactly the chosen linear layers of
        `language_model.model.layers.*`; never vision tower, VAE, heads or embeddings.

    Raises:
        ValueError: an unknown choice, or one that matches nothing, such as `"gen"` of a model without that expert.
    """
    parts = (parts,) if isinstance(parts, str) else tuple(parts)
    if experts not in EXPERTS:
        raise ValueError(f"experts={experts!r} is unknown; choose one of {EXPERTS}.")
    if not parts or not set(parts) <= set(PARTS):
        raise ValueError(f"parts={parts} must name at least one of {PARTS} and nothing else.")
    layer_module = _layer_module(model_or_config)
    chosen = EXPERT_SUFFIXES.values() if experts == "both" else (EXPERT_SUFFIXES[experts],)
    layers = [
        pattern.format(suffix)
        for suffix in chosen
        for part, pattern in LAYER_PATTERNS.items()
        if part in parts and suffix in expert_suffixes(layer_module, part)
    ]
    if not layers:
        raise ValueError(
            f"experts={experts!r}, parts={parts} match no layer: a decoder of {layer_module} "
            + (
                'has no generation expert. Use experts="und", or load the joint model (stage=2).'
                if layer_module == "Qwen2DecoderLayer"
                else 'shares its attention between the experts. Add "mlp" to parts, or use experts="und".'
            )
        )
    return rf"(.*\.)?language_model\.model\.layers\.\d+\.({'|'.join(layers)})"


def _layer_module(model_or_config: nn.Module | PreTrainedConfig) -> str:
    config = getattr(model_or_config, "config", model_or_config)
    layer_module = getattr(getattr(config, "text_config", config), "layer_module", None)
    if layer_module is None:
        raise ValueError(f"lora_targets takes a BAGEL model or its BagelConfig, not {type(model_or_config).__name__}.")
    return layer_module


# --------------------------------------------------------------------------------------------------------------------
# Comparing a stored adapter with a model


class Mismatch(NamedTuple):
    """A tensor of an adapter that does not fit: its name and shape, and the shape that the model needs."""

    tensor: str
    stored: tuple[int, ...]
    needed: tuple[int | str, ...]


def check_adapter(model: nn.Module, adapter: str | os.PathLike, **hub_kwargs) -> str:
    """
    Refuse an adapter that was made for another base, before anything is loaded; reads headers only.

    `model.load_adapter` calls this. `PeftModel.from_pretrained` cannot, and changes the model before it looks at the
    weights, so call it there yourself: `PeftModel.from_pretrained(model, check_adapter(model, path))`.

    Tensors of parts that the model is built without (`stage=1`: the generation expert) are ignored, like those of a
    checkpoint; an adapter of such a smaller model fits the joint model. A base of another name gives a warning.

    Args:
        model: the base, with or without adapters, quantised or not. adapter: a folder, or a name on the Hub.
        hub_kwargs: `subfolder`, `revision`, `cache_dir` ... as in `from_pretrained`.

    Returns:
        The folder of the adapter.

    Raises:
        OSError: no adapter there, pickled weights, or a truncated file.
        ValueError: tensors of other shapes, for layers the model does not have, or for fewer layers than it targets.
    """
    folder = _adapter_folder(adapter, **hub_kwargs)
    shapes = {name: info.shape for name, info in read_header(folder / ADAPTER_WEIGHTS).items()}
    check_adapter_tensors(model, _peft().PeftConfig.from_pretrained(str(folder)), shapes, str(folder))
    return str(folder)


def check_adapter_tensors(model: nn.Module, peft_config: Any, shapes: Mapping[str, Sequence[int]], source: str) -> None:
    """
    As [`check_adapter`], for an adapter that is already read.

    Args:
        model: the base. peft_config: the adapter's `PeftConfig`. shapes: of its tensors, by stored name.
        source: the adapter's name in messages.

    Raises:
        ValueError: as [`check_adapter`].
    """
    base = _layer_sizes(model)
    stored = {name.removeprefix(PEFT_PREFIX): tuple(shape) for name, shape in shapes.items()}
    switched_off = _switched_off(model)
    used = {name: shape for name, shape in stored.items() if not switched_off.search(name)}
    if not used:
        raise ValueError(
            f"{source} holds nothing for this model: "
            + (
                f"its {len(shapes)} tensors are for parts that this model is built without ({some(list(stored), 2)}). "
                "Load the joint model (stage=2)."
                if shapes
                else "it holds no tensors at all. Save it again."
            )
        )
    foreign, mismatched = _compare(used, base, _tensor_shapes(model), is_lora=_is_lora(peft_config))
    targeted = {name for name in base if _targets(peft_config, name)}
    unfilled = _unfilled(targeted, used) if _is_lora(peft_config) else []
    problems = []
    if mismatched:
        problems.append(f"{len(mismatched)} of {len(shapes)} tensors have other shapes: {_describe(mismatched)}.")
    if foreign:
        problems.append(
            f"{len(foreign)} of {len(shapes)} tensors are for layers that it does not have{_layers(foreign)}."
        )
    if unfilled:
        problems.append(
            f"{len(unfilled)} of the {len(targeted)} layers that {ADAPTER_CONFIG} targets in it have no tensors in the "
            f"adapter{_layers(unfilled)}."
        )
    made_for, name = getattr(peft_config, "base_model_name_or_path", None), getattr(model, "name_or_path", None)
    if problems:
        raise ValueError(
            " ".join(
                [
                    f"{source} does not fit this model{f' ({name})' if name else ''}.",
                    *problems,
                    f"It was made for {made_for or 'an unnamed base'}: load it on that, or train it anew on this one.",
                ]
            )
        )
    if made_for and name and Path(made_for).name.casefold() != Path(name).name.casefold():
        logger.warning(
            f"{source} was made for {made_for}; this model is {name}. The shapes fit, so it is loaded, but an adapter "
            "means little on weights that it was not trained with."
        )


def _adapter_folder(adapter: str | os.PathLike, subfolder: str | None = None, **hub_kwargs) -> Path:
    if not os.path.exists(adapter):  # on the Hub
        files = [
            cached_file(adapter, name, subfolder=subfolder or "", **hub_kwargs)
            for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
        ]
        assert files[-1] is not None  # a file that is not there is an error
        return Path(files[-1]).parent
    folder = Path(adapter, subfolder or "")
    present = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    absent = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if name not in present]
    if not absent:
        return folder
    if "adapter_model.bin" in present:
        raise OSError(
            f"{folder} holds its weights as a pickle (adapter_model.bin). It is refused, because reading a pickle runs "
            f"code from it. Convert it to safetensors (`safetensors.torch.save_file`) as {ADAPTER_WEIGHTS}."
        )
    if ADAPTER_CONFIG in absent and "config.json" in present:
        raise OSError(f"{folder} holds a model, no adapter: load it with AutoModel.from_pretrained.")
    raise OSError(
        f"{folder} holds no adapter: {' and '.join(absent)} not found. It has {some(present, 2) or 'nothing'}."
    )


_LORA_TENSOR = re.compile(r"(?P<layer>.+)\.lora_(embedding_)?(?P<kind>A|B|magnitude_vector)(\.weight|\.bias)?")


def _compare(
    stored: Mapping[str, tuple[int, ...]],
    base: Mapping[str, tuple[int, int]],
    own: Mapping[str, tuple[int, ...]],
    is_lora: bool,
) -> tuple[list[str], list[Mismatch]]:
    """-> tensors for layers that are not there, and those of other shapes."""
    foreign, mismatched = [], []
    for name, shape in stored.items():
        match = _LORA_TENSOR.fullmatch(name) if is_lora else None
        if match is not None:
            needed = _needed_shape(match["kind"], shape, base.get(match["layer"]))
        else:  # `modules_to_save` is stored under its own name
            needed = own.get(name, shape if not is_lora or ".token_adapter." in name else None)
        if needed is None:
            foreign.append(name)
        elif needed != shape:
            mismatched.append(Mismatch(name, shape, needed))
    return foreign, mismatched


def _needed_shape(kind: str, shape: tuple[int, ...], sizes: tuple[int, int] | None) -> tuple[int | str, ...] | None:
    """The shape that a layer of these (out, in) features needs of a LoRA tensor; `shape` itself if it fits."""
    if sizes is None:
        return None
    features_out, features_in = sizes
    if kind == "A":
        return shape if shape[-1] == features_in else ("r", features_in)
    return shape if shape[0] == features_out else (features_out, "r")[: len(shape)]


def _unfilled(targeted: set[str], stored: Mapping[str, tuple[int, ...]]) -> list[str]:
    """
    Targeted layers without tensors. An expert or tower without any tensor is allowed: the adapter is then of a model
    without that part and leaves it unchanged (PEFT adds layers that compute zero if the targets are a list of ends).
    """
    filled = {match["layer"] for name in stored if (match := _LORA_TENSOR.fullmatch(name))}
    parts: dict[tuple[str, bool], set[str]] = {}
    for name in targeted:
        parts.setdefault((name.split(".")[0], is_gen_name(name)), set()).add(name)
    return sorted(name for names in parts.values() if names & filled for name in names - filled)


def _switched_off(model: Any) -> re.Pattern:
    """Matches the tensors of parts that the model is built without."""
    assert isinstance(model.config, PreTrainedConfig)
    return re.compile("|".join(switched_off_parts(model.config)) or r"(?!)")


def _is_lora(peft_config: Any) -> bool:
    return getattr(peft_config.peft_type, "value", peft_config.peft_type) == "LORA"


def _targets(peft_config: Any, name: str) -> bool:
    if getattr(peft_config, "target_modules", None) is None:
        return False
    return bool(_peft().tuners.tuners_utils.check_target_module_exists(peft_config, name))


def _bare_name(name: str) -> str | None:
    """A module's or tensor's name without PEFT's wrappers; `None` for those that PEFT added."""
    parts = name.removeprefix(PEFT_PREFIX).split(".")
    if any(part.startswith("lora_") or part in ("modules_to_save", "token_adapter") for part in parts):
        return None
    return ".".join(part for part in parts if part not in ("base_layer", "original_module"))


def _layer_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(features out, features in) of linear and embedding layers, also quantised ones, by name without wrappers."""
    sizes = {}
    for name, module in model.named_modules():
        bare = _bare_name(name)
        if bare and hasattr(module, "in_features"):
            sizes[bare] = (module.out_features, module.in_features)
        elif bare and isinstance(module, nn.Embedding):
            sizes[bare] = (module.embedding_dim, module.num_embeddings)
    return sizes


def _tensor_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {bare: tuple(tensor.shape) for name, tensor in tensors if (bare := _bare_name(name))}


def _describe(mismatched: Sequence[Mismatch]) -> str:
    shown = "; ".join(f"{name} is {stored}, {_shape(needed)} is needed" for name, stored, needed in mismatched[:2])
    return shown + (f"; and {len(mismatched) - 2} more" if len(mismatched) > 2 else "")


def _shape(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def _layers(names: Sequence[str]) -> str:
    found = sorted({int(match[1]) for name in names if (match := re.search(r"\.layers\.(\d+)\.", name))})
    numbers = f"{found[0]} to {found[-1]}" if len(found) > 1 else "".join(map(str, found))
    return (f" (decoder layer {numbers})" if numbers else "") + f": {some(names, 2)}"


# --------------------------------------------------------------------------------------------------------------------
# Around transformers' own adapter methods


class BagelAdapterMixin(_Model):
    """
    transformers' adapter methods, all or nothing: after an error the model is what it was before.

    It comes before `PreTrainedModel` in the list of bases and has no parameters.
    """

    def lora_targets(
        self, experts: Literal["both", "und", "gen"] = "both", parts: Part | Sequence[Part] = PARTS
    ) -> str:
        """`target_modules` for a `peft.LoraConfig`; see [`lora_bagel.lora_targets`]."""
        return lora_targets(self, experts, parts)

    def check_adapter(self, adapter: str | os.PathLike, **hub_kwargs) -> str:
        """Refuse an adapter of another base; see [`lora_bagel.check_adapter`]."""
        return check_adapter(self, adapter, **hub_kwargs)

    def add_adapter(self, adapter_config, adapter_name: str | None = None) -> None:
        """
        As everywhere in transformers.

        Raises:
            ValueError: its target modules match nothing.
        """
        if getattr(adapter_config, "target_modules", None) and not any(
            _targets(adapter_config, name) for name in _layer_sizes(self)
        ):
            raise ValueError(
                f"target_modules={adapter_config.target_modules!r} match no layer of this model. Use "
                'target_modules=model.lora_targets("both"), or "und" or "gen" for one expert.'
            )
        with self._all_or_nothing():
            super().add_adapter(adapter_config, adapter_name)

    def load_adapter(
        self,
        peft_model_id: str | os.PathLike | None = None,
        adapter_name: str | None = None,
        peft_config: Any = None,
        adapter_state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs,
    ):
        """
        As everywhere in transformers; first checks that the adapter fits (see [`lora_bagel.check_adapter`]).

        Raises:
            OSError: no adapter there, pickled weights, or a truncated file. ValueError: it was made for another base.
            RuntimeError: the installed transformers and PEFT do not find tensors or shapes that are there.
        """
        load_config = kwargs.get("load_config")
        source = peft_model_id or getattr(load_config, "pretrained_model_name_or_path", None)
        if adapter_state_dict is not None and peft_config is not None:
            shapes = {name: tensor.shape for name, tensor in adapter_state_dict.items()}
            check_adapter_tensors(self, peft_config, shapes, "adapter_state_dict")
        elif source is not None:
            given = {**(getattr(load_config, "download_kwargs", None) or {}), **(kwargs.get("adapter_kwargs") or {})}
            given |= kwargs
            hub_kwargs = {name: given[name] for name in HUB_KWARGS if given.get(name) is not None}
            folder = check_adapter(self, source, **hub_kwargs)
        options: dict[str, Any] = {"peft_model_id": peft_model_id, "adapter_name": adapter_name}
        with self._all_or_nothing():
            info = super().load_adapter(
                **options, peft_config=peft_config, adapter_state_dict=adapter_state_dict, **kwargs
            )
            weights = Path(folder, ADAPTER_WEIGHTS) if adapter_state_dict is None else adapter_state_dict
            found = self._load_saved_modules(adapter_name or "default", weights)
            lost = self._lost(info.unexpected_keys - found)
            if lost:  # transformers does not know every name that PEFT stores, such as those of DoRA
                lost = self._lost(self._load_as_peft_does(adapter_name or "default", weights))
            if lost:
                raise RuntimeError(
                    f"{len(lost)} tensors of the adapter were not loaded: {some(lost, 2)}. They fit the model, so PEFT "
                    f"{_peft().__version__} names them differently from what transformers expects: install peft>=0.20."
                )
        return info

    def _lost(self, unexpected: Iterable[str]) -> list[str]:
        """Tensors that found no parameter, without those of parts that the model is built without."""
        switched_off = _switched_off(self)
        return sorted(name for name in unexpected if not switched_off.search(name))

    def _load_as_peft_does(self, adapter_name: str, stored: Mapping[str, torch.Tensor] | Path) -> set[str]:
        """Load an adapter again by PEFT's own names; -> names of the tensors that it did not take."""
        tensors = load_file(stored) if isinstance(stored, Path) else stored
        bare = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
        loaded = _peft().utils.save_and_load.set_peft_model_state_dict(self, bare, adapter_name)
        return set(loaded.unexpected_keys)

    def _load_saved_modules(self, adapter_name: str, stored: Mapping[str, torch.Tensor] | Path) -> set[str]:
        """The copies of `modules_to_save`, which transformers 5.17 does not find; -> names of the tensors taken."""
        wrapper = _peft().utils.other.AuxiliaryTrainingWrapper
        targets = {
            f"{name}.{source}": f"{name}.{target}"
            for name, module in _named_modules(self)
            if isinstance(module, wrapper)
            for source, target in module.adapter_state_dict_load_map(adapter_name).items()
        }
        if targets:
            stored = load_file(stored) if isinstance(stored, Path) else stored
            bare = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in stored.items()}
            self.load_state_dict({targets[name]: bare[name] for name in targets.keys() & bare.keys()}, strict=False)
        return set(targets)

    def set_adapter(self, adapter_name: list[str] | str) -> None:
        """As everywhere in transformers, also for adapters with different `modules_to_save`."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if not names or not set(names) <= self._adapters().keys():
            return super().set_adapter(adapter_name)  # raises
        _peft().functional.set_adapter(self, names)

    def enable_adapters(self) -> None:
        """As everywhere in transformers, and also switches `modules_to_save` on, which transformers does not."""
        super().enable_adapters()
        for _, module in _named_modules(self):
            if isinstance(module, _peft().utils.other.AuxiliaryTrainingWrapper):
                module.enable_adapters(True)

    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """As everywhere in transformers; also removes empty wrappers, so a model without adapters is saved plain."""
        super().delete_adapter(adapter_names)
        _unwrap(self)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """A context that restores adapters, their state and the trainable parameters after an error."""
        before = set(self._adapters())
        active = self.active_adapters() if before else []
        trainable, training = {id(p) for p in self.parameters() if p.requires_grad}, self.training
        try:
            yield
        except Exception:
            self._hf_peft_config_loaded = True  # what `delete_adapter` asks for
            if added := [name for name in self._adapters() if name not in before]:
                super().delete_adapter(added)
            _unwrap(self)
            if before:
                self.set_adapter(active)
            else:
                self._hf_peft_config_loaded = False
                self.__dict__.pop("peft_config", None)
            for parameter in self.parameters():
                parameter.requires_grad_(id(parameter) in trainable)
            self.train(training)
            raise

    def _adapters(self) -> Mapping[str, Any]:
        return getattr(self, "peft_config", None) or {}

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        """`PeftModel.from_pretrained` calls this: one error for all mismatched tensors instead of a line for each."""
        if any(".lora_" in name for name in state_dict):
            mismatched = [
                Mismatch(name, tuple(stored.shape), tuple(parameter.shape))
                for name, parameter in self.named_parameters()
                if ".lora_" in name
                and (stored := state_dict.get(prefix + name)) is not None
                and stored.shape != parameter.shape
            ]
            if mismatched:
                raise ValueError(
                    f"The adapter was made for another base. {len(mismatched)} tensors have other shapes: "
                    f"{_describe(mismatched)}. PEFT has already put its layers into this model: load the model again."
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def refuse_prompt_learning(model: nn.Module) -> None:
    """
    Drawing reads prompts by itself, without the virtual tokens that PEFT puts before them.

    Raises:
        ValueError: `model` is called by a `PeftModel` with prompt, prefix or p-tuning.
    """
    caller = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", None)  # `PeftModel.generate` sets it
    adapter = getattr(caller, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise ValueError(
            f"{type(adapter).__name__} puts virtual tokens before a text, and only texts are written "
            "under them. To draw, use an adapter of layers, such as LoRA."
        )


def _unwrap(model: nn.Module) -> None:
    """Replace wrappers without any adapter by the layers that they wrap."""
    peft = _peft()
    for name, module in list(_named_modules(model)):
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            inner = module.get_base_layer()
        elif isinstance(module, peft.utils.other.AuxiliaryTrainingWrapper):
            inner = module.original_module
        else:
            continue
        if not module._get_available_adapters():
            model.set_submodule(name, inner)


def _named_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """A model's modules; type checkers do not know the classes of PEFT, which is optional."""
    yield from model.named_modules()


def _peft() -> ModuleType:
    try:
        import peft.functional
    except ImportError as error:
        raise ImportError(
            "Adapters need PEFT: `pip install peft` (tested versions: requirements-train.txt)."
        ) from error
    return peft


__all__ = ["BagelAdapterMixin", "check_adapter", "check_adapter_tensors", "lora_targets", "refuse_prompt_learning"]
