# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What a BAGEL model is made of: three nested configs, their aliases and their validation; the names of the experts.

It imports no torch and reads no files. Two nested configs have two names each, because two kinds of files exist:
`text_config`/`vision_config` (transformers) and `llm_config`/`vit_config` (the released checkpoint). Both names are one
object.
"""

import copy
import math
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NoReturn, TypeGuard, TypeVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig


DECODER_LAYERS = ("Qwen2DecoderLayer", "Qwen2MoEDecoderLayer", "Qwen2MoTDecoderLayer")
STAGES = {1: 1, "1": 1, "stage1": 1, 2: 2, "2": 2, "stage2": 2}
AUTO_MODELS = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
AUTO_MAP = {
    "AutoConfig": "configuration_bagel.BagelConfig",
    **dict.fromkeys(AUTO_MODELS, "modeling_bagel.BagelForUnifiedMultimodal"),
    "AutoProcessor": "processing_bagel.BagelProcessor",
    "AutoImageProcessor": "image_processing_bagel.BagelImageProcessor",
}
SUB_CONFIG_ALIASES = {"llm_config": "text_config", "vit_config": "vision_config"}
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
POSITION_EMBEDDINGS = ("learned", "rope_2d", "llama_vision", "qwen_vision")
INTERPOLATIONS = (False, True, "bilinear", "fit")

# The experts, and what the names of their modules end in: `und` handles text and ViT tokens, `gen` VAE latents. Weights
# that both share have the names of `und`.
EXPERT_SUFFIXES = {"und": "", "gen": "_moe_gen"}
GEN_SUFFIX = EXPERT_SUFFIXES["gen"]


def gen_name(name: str) -> str:
    """The name of the generation expert's counterpart of a module, both without what they are nested in."""
    return f"{name}{GEN_SUFFIX}"


def und_name(name: str) -> str:
    """The name of the understanding expert's counterpart of a module or parameter, or `name` itself if it is one."""
    return name.replace(GEN_SUFFIX, "")


def is_gen_name(name: str) -> bool:
    """Whether a module or parameter belongs to the generation expert alone."""
    return GEN_SUFFIX in name


def expert_suffixes(layer_module: str, part: Literal["attention", "mlp"]) -> tuple[str, ...]:
    """The suffixes of the weight sets that a decoder layer of this kind has in one of its parts."""
    shared = layer_module == "Qwen2DecoderLayer" or (layer_module == "Qwen2MoEDecoderLayer" and part == "attention")
    return (EXPERT_SUFFIXES["und"],) if shared else tuple(EXPERT_SUFFIXES.values())


if TYPE_CHECKING:
    _Read = TypeVar("_Read")

    class _Resolved(Generic[_Read]):
        """A field as type checkers see it: `__post_init__` converts what was set to what is read."""

        def __get__(self, owner: Any, kind: Any = None) -> _Read: ...
        def __set__(self, owner: Any, value: _Read | dict[str, Any] | PreTrainedConfig | None) -> None: ...


@strict
class BagelTextConfig(Qwen2Config):
    r"""
    The decoder: a Qwen2 config plus the three choices BAGEL adds. Defaults are those of BAGEL-7B-MoT.

    Args:
        qk_norm (`bool`, defaults to `True`): RMS-normalise queries and keys per head, before the rotary embedding.
        layer_module (`str`, *optional*): `"Qwen2DecoderLayer"` (one expert), `"Qwen2MoEDecoderLayer"` (shared
            attention, one MLP per expert) or `"Qwen2MoTDecoderLayer"` (everything per expert, attention in common).
            `None` is resolved by [`BagelConfig`]: MoT with `visual_gen`, the plain layer without.
        freeze_und (`bool`, defaults to `False`): stop gradients at every output of the understanding expert
            (released behaviour: those parameters receive exactly zero).
        rope_parameters (`dict`, *optional*): how positions rotate queries and keys, under the names that transformers
            uses. `rope_type`: one of `ROPE_TYPES`, with what that type needs (`factor`, `low_freq_factor`,
            `original_max_position_embeddings` ...), see [`~transformers.modeling_rope_utils.RopeParameters`]. With any
            of them: `rope_theta` (default 1,000,000); `partial_rotary_factor` in (0, 1], the share of each head that is
            rotated (the first features; with `"proportional"` the fastest pairs of the whole head); `mrope_section`,
            pairs of (time, height, width), gives image tokens their row and column in the grid as positions,
            interleaved as in Qwen3-Omni; `interleave` pairs adjacent features instead of the halves of a head.

    Raises:
        ValueError: rope parameters that are unknown, missing or contradict each other (transformers only logs those).
    """

    model_type = "bagel_text"
    base_config_key = "text_config"
    default_theta = 1_000_000.0
    ignore_keys_at_rope_validation = {"mrope_section", "mrope_interleaved", "partial_rotary_factor", "interleave"}

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    max_position_embeddings: int = 32768
    qk_norm: bool = True
    layer_module: str | None = None
    freeze_und: bool = False
    if TYPE_CHECKING:
        rope_parameters: _Resolved[dict[str, Any]] = _Resolved()
        num_key_value_heads: _Resolved[int] = _Resolved()
        base_model_tp_plan: Any = None
        base_model_pp_plan: Any = None
    else:
        num_key_value_heads: int | None = 4

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_module is not None and self.layer_module not in DECODER_LAYERS:
            raise ValueError(
                f"layer_module={self.layer_module!r} is unknown; choose one of {', '.join(DECODER_LAYERS)}."
            )
        _refuse_remainder(self, "hidden_size", "num_attention_heads")
        self.rope_parameters = _rope_parameters(self.rope_parameters, kwargs, self.default_theta)
        head_dim = self.hidden_size // self.num_attention_heads
        _RopeCheck(self.rope_parameters, head_dim, self.max_position_embeddings).run()
        super().__post_init__(**_without_model_type(kwargs))
        _refuse_remainder(self, "num_attention_heads", "num_key_value_heads")

    @property
    def mrope_section(self) -> tuple[int, int, int] | None:
        """Rotary pairs of (time, height, width); `None` = every token has one position."""
        section = self.rope_parameters.get("mrope_section")
        return None if section is None else (section[0], section[1], section[2])

    @property
    def rotary_dim(self) -> int:
        """Features of a head that have an angle (0 for the slow pairs of `"proportional"`); the others are copied."""
        return _rotary_dim(self.rope_parameters, self.hidden_size // self.num_attention_heads)

    @property
    def max_extended_positions(self) -> int:
        """Longest input in positions: `max_position_embeddings`, or what `rope_parameters` extend it to."""
        rope, longest = self.rope_parameters, self.max_position_embeddings
        if rope["rope_type"] in ("default", "proportional"):
            return longest
        return max(longest, int(rope.get("original_max_position_embeddings", longest) * (rope.get("factor") or 1)))


@strict
class BagelVisionConfig(SiglipVisionConfig):
    r"""
    The vision tower: a SigLIP config for packed images of any grid. Defaults are those of BAGEL-7B-MoT.

    `num_hidden_layers` counts the layers of the SigLIP checkpoint (27 for the released model), as the released files
    do; how many of them are built follows from `BagelConfig.vit_select_layer`, see `BagelConfig.num_vit_layers`.

    Args:
        position_embedding (`str`, defaults to `"learned"`): how the tower knows row and column of a patch. `"learned"`:
            a table whose entries are added to the patches. The others rotate queries and keys instead: `"rope_2d"` (the
            row rotates half of a head, the column the other half), `"llama_vision"` (Llama 4: adjacent pairs, columns
            first, counted from 1), `"qwen_vision"` (Qwen3-Omni: halves, rows first). See also
            `BagelConfig.interpolate_pos` for pictures larger than the table.
        rope (`bool`, defaults to `False`): the older name of `position_embedding="rope_2d"`.
    """

    model_type = "bagel_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    if TYPE_CHECKING:
        image_size: int = 980
        patch_size: int = 14
    else:
        image_size: int | list[int] | tuple[int, int] = 980
        patch_size: int | list[int] | tuple[int, int] = 14
    position_embedding: str = "learned"
    rope: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**_without_model_type(kwargs))
        self.position_embedding = _position_embedding(self.position_embedding, self.rope)
        self.rope = self.position_embedding == "rope_2d"
        if not isinstance(self.patch_size, int) or not isinstance(self.image_size, int):
            raise ValueError(
                f"vision_config: patch_size={self.patch_size} and image_size={self.image_size} must be integers; "
                "the tower takes square patches and a square position table."
            )
        _refuse_remainder(self, "hidden_size", "num_attention_heads")
        self.check_rotary_heads()

    def check_rotary_heads(self) -> None:
        """Raise a `ValueError` if the tower is rotary and its head dimension no multiple of 4."""
        head_dim = self.hidden_size // self.num_attention_heads
        if self.position_embedding != "learned" and head_dim % 4:
            raise ValueError(
                f"vision_config: position_embedding={self.position_embedding!r} needs heads of a multiple of 4 "
                f"features (pairs for rows, as many for columns), but hidden_size={self.hidden_size} in "
                f"num_attention_heads={self.num_attention_heads} makes heads of {head_dim}."
            )

    @property
    def table_side(self) -> int:
        """Side of the learned table, in patches."""
        return self.image_size // self.patch_size

    @property
    def patch_dim(self) -> int:
        """Features of one flattened patch: rows * columns * channels."""
        return self.num_channels * self.patch_size**2


@strict
class BagelVAEConfig(PreTrainedConfig):
    r"""
    The image autoencoder, under the names of the released files. Defaults are the FLUX autoencoder that BAGEL uses.

    Args:
        z_channels (`int`): latent channels.
        downsample (`int`): pixels per latent, per side.
        resolution (`int`): the size it was trained at, in pixels; not used.
        in_channels, out_ch, ch (`int`): image channels in and out, width of the first block.
        ch_mult (`list[int]`): width multiplier of each resolution, from the largest picture down.
        num_res_blocks (`int`): residual blocks per resolution in the encoder (the decoder has one more).
        scale_factor, shift_factor (`float`): a latent is `scale_factor * (sample - shift_factor)`.
        norm_num_groups (`int`, defaults to 32): groups of the group norms; it must divide `ch`. By default as many of
            32 as divide it.
    """

    model_type = "bagel_vae"
    base_config_key = "vae_config"

    z_channels: int = 16
    downsample: int = 8
    resolution: int = 256
    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: list[int] | tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    scale_factor: float | int = 0.3611
    shift_factor: float | int = 0.1159
    norm_num_groups: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.ch_mult = list(self.ch_mult)
        if self.norm_num_groups is None:
            self.norm_num_groups = math.gcd(32, self.ch)
        if self.norm_num_groups < 1 or self.ch % self.norm_num_groups:
            raise ValueError(f"vae_config: norm_num_groups={self.norm_num_groups} does not divide ch={self.ch}.")
        super().__post_init__(**_without_model_type(kwargs))
        if self.downsample != 2 ** (len(self.ch_mult) - 1):
            raise ValueError(
                f"vae_config: {len(self.ch_mult)} resolutions (ch_mult={self.ch_mult}) shrink a picture "
                f"{2 ** (len(self.ch_mult) - 1)} times, but downsample={self.downsample}."
            )


@strict
class BagelConfig(PreTrainedConfig):
    r"""
    The whole model. `BagelConfig()` describes the understanding half of BAGEL-7B-MoT, `BagelConfig(stage=2)` all of it.

    Args:
        vision_config, text_config, vae_config: nested configs, as objects or dicts.
        llm_config, vit_config: the released names of `text_config` and `vision_config`.
        visual_und (`bool`, defaults to `True`): build vision tower and connector, to read images.
        visual_gen (`bool`, defaults to `False`): build VAE, latent and timestep embeddings and velocity head, to draw
            images.
        stage (`int` or `str`, *optional*): 1 = understanding only (no `*_moe_gen` parameters, no VAE), 2 = joint.
            `1`, `"1"` and `"stage1"` are the same. It sets `visual_gen` and, if needed, `layer_module`.
        llm_path, vit_path, vae_path (`str`): where the parts came from; not used.
        max_latent_size (`int`, defaults to 64): side of the latent position table, in latent patches.
        latent_patch_size (`int`, defaults to 2): latents per latent token, per side.
        vit_patch_size (`int`, defaults to 14): pixels per ViT patch, per side.
        vit_max_num_patch_per_side (`int`, defaults to 70): side of the ViT position tables, in patches.
        connector_act (`str`): activation of the connector MLP.
        interpolate_pos (`bool` or `str`): which entries of the position tables (ViT and latents) an image reads.
            `False`: the upper left corner; an image larger than a table is an error. `True`: released buckets over the
            whole table. `"bilinear"`: the whole table, read between its entries, corners on corners (Qwen3-Omni).
            `"fit"`: as `False` for an image that fits; the grid of a larger one is shrunk until it does and the table
            read bilinearly. Nothing changes for images that a released model can take.
        vit_select_layer (`int`, defaults to -2): which hidden state of the SigLIP tower is used; the layers above it
            are neither stored nor built. No other setting applies that offset.
        vit_rope (`bool`): same as `vision_config.position_embedding="rope_2d"`.
        text_cond_dropout_prob, vae_cond_dropout_prob, vit_cond_dropout_prob (`float`): training data dropout.
        timestep_shift (`float`, defaults to 1.0): shift of the TRAINING timesteps (`generate` has its own argument).
        ce_weight, mse_weight (`float`, default 1.0): weights of the two losses in `loss`.
        ce_loss_reweighting (`bool`, defaults to `False`): weigh every label by the pack's `ce_loss_weights`.
        bos_token_id, eos_token_id: start and end of a text span. vision_start_token_id, vision_end_token_id: start
            and end of an image span. image_token_id, latent_token_id: the placeholders of ViT and of VAE-latent tokens
            in `input_ids`; these two never reach the embedding table and may lie outside the vocabulary.
    """

    model_type = "bagel"
    sub_configs: ClassVar[dict[str, Any]] = {
        "text_config": BagelTextConfig,
        "vision_config": BagelVisionConfig,
        "vae_config": BagelVAEConfig,
    }
    keys_to_ignore_at_inference = ["past_key_values", "last_hidden_state", "ce", "mse"]

    if TYPE_CHECKING:
        vision_config: _Resolved[BagelVisionConfig] = _Resolved()
        text_config: _Resolved[BagelTextConfig] = _Resolved()
        vae_config: _Resolved[BagelVAEConfig] = _Resolved()
    else:
        vision_config: dict | PreTrainedConfig | None = None
        text_config: dict | PreTrainedConfig | None = None
        vae_config: dict | PreTrainedConfig | None = None
    visual_und: bool = True
    visual_gen: bool = False
    stage: int | str | None = None
    llm_path: str = ""
    vit_path: str = ""
    vae_path: str = ""
    max_latent_size: int = 64
    latent_patch_size: int = 2
    vit_patch_size: int = 14
    vit_max_num_patch_per_side: int = 70
    connector_act: str = "gelu_pytorch_tanh"
    interpolate_pos: bool | str = False
    vit_select_layer: int = -2
    vit_rope: bool = False
    text_cond_dropout_prob: float | int = 0.1
    vae_cond_dropout_prob: float | int = 0.3
    vit_cond_dropout_prob: float | int = 0.3
    timestep_shift: float | int = 1.0
    ce_weight: float | int = 1.0
    mse_weight: float | int = 1.0
    ce_loss_reweighting: bool = False
    pad_token_id: int | None = 151643
    bos_token_id: int | None = 151644
    eos_token_id: int | list[int] | None = 151645
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    image_token_id: int = 151655
    latent_token_id: int = 151654
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for alias, name in SUB_CONFIG_ALIASES.items():
            if (value := kwargs.pop(alias, None)) is not None:
                _refuse_two_values(alias, value, name, getattr(self, name))
                setattr(self, name, value)
        self.text_config = _coerce_text_config(self.text_config)
        self.vision_config = _coerce_vision_config({} if self.vision_config is None else self.vision_config)
        self.vae_config = _coerce(self.vae_config, BagelVAEConfig)
        _prepare_config_for_stage(self)
        self._resolve_vision()
        kwargs["auto_map"] = {**AUTO_MAP, **(kwargs.get("auto_map") or {})}  # one class, several auto classes
        super().__post_init__(**kwargs)

    def _resolve_vision(self) -> None:
        if self.vit_patch_size not in (14, self.vision_config.patch_size):
            raise ValueError(
                f"vit_patch_size={self.vit_patch_size} contradicts vision_config.patch_size="
                f"{self.vision_config.patch_size}; give one of them."
            )
        self.vit_patch_size = self.vision_config.patch_size
        vision = self.vision_config
        if self.vit_rope and not vision.rope:
            vision.position_embedding, vision.rope = _position_embedding(vision.position_embedding, True), True
            vision.check_rotary_heads()
        self.vit_rope = vision.rope
        if self.interpolate_pos not in INTERPOLATIONS:
            raise ValueError(f"interpolate_pos={self.interpolate_pos!r} is unknown; choose one of {INTERPOLATIONS}.")
        if vision.position_embedding != "learned" and vision.table_side != self.vit_max_num_patch_per_side:
            raise ValueError(
                f"A tower with position_embedding={vision.position_embedding!r} counts rows and columns in the "
                f"connector's position table, so vision_config.image_size // patch_size = {vision.table_side} and "
                f"vit_max_num_patch_per_side={self.vit_max_num_patch_per_side} must be equal."
            )
        if not 1 <= self.num_vit_layers <= self.vision_config.num_hidden_layers:
            raise ValueError(
                f"vit_select_layer={self.vit_select_layer} leaves {self.num_vit_layers} of "
                f"{self.vision_config.num_hidden_layers} vision layers."
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "BagelConfig":
        """As in transformers, but overrides are resolved and checked like values of the file."""
        config_dict = dict(config_dict)
        if config_dict.get("model_type") == BagelTextConfig.model_type:  # the language part, saved by itself
            config_dict = {"text_config": config_dict}
        _rename_aliases(config_dict)
        _rename_aliases(kwargs)
        if "visual_gen" in kwargs and "stage" not in kwargs:
            config_dict.pop("stage", None)
        vision = kwargs.get("vision_config")
        if isinstance(vision, dict) and {"position_embedding", "rope"} & vision.keys() and "vit_rope" not in kwargs:
            config_dict.pop("vit_rope", None)
        for name in [name for name in cls.__annotations__ if name in kwargs]:
            value = kwargs.pop(name)
            if isinstance(value, dict) and isinstance(config_dict.get(name), dict):
                value = _overridden(config_dict[name], value)
            config_dict[name] = value
        return super().from_dict(config_dict, **kwargs)

    @property
    def llm_config(self) -> BagelTextConfig:
        return self.text_config

    @property
    def vit_config(self) -> BagelVisionConfig:
        return self.vision_config

    @property
    def num_vit_layers(self) -> int:
        """Vision layers that exist: 27 counted, hidden state -2 used, so 26."""
        if self.vit_select_layer >= 0:
            return self.vit_select_layer
        return self.vision_config.num_hidden_layers + 1 + self.vit_select_layer

    @property
    def multimodal_positions(self) -> bool:
        """Tokens have three positions, time, height and width (`mrope_section`)."""
        return self.text_config.mrope_section is not None

    @property
    def latent_downsample(self) -> int:
        """Pixels per latent token, per side (16 for the released model)."""
        return self.vae_config.downsample * self.latent_patch_size

    @property
    def patch_latent_dim(self) -> int:
        """Features of a latent token: (row in patch, column in patch, channel)."""
        return self.latent_patch_size**2 * self.vae_config.z_channels


def _coerce(cfg: dict[str, Any] | PreTrainedConfig | None, config_class: type[PreTrainedConfig]) -> Any:
    """A config of this class from a dict, from a stock config (`Qwen2Config`, `SiglipVisionConfig`), or as a copy."""
    if cfg is None or isinstance(cfg, dict):
        return config_class(**copy.deepcopy(cfg or {}))
    if cfg.model_type != config_class.model_type:
        return config_class(**cfg.to_dict())
    return copy.deepcopy(cfg)  # the caller's object stays as it was


def _coerce_text_config(cfg: dict[str, Any] | Qwen2Config | None) -> BagelTextConfig:
    """A Qwen2 config with BAGEL's `qk_norm`, `layer_module` and `freeze_und`; `None` gives the defaults."""
    return _coerce(cfg, BagelTextConfig)


def _coerce_vision_config(cfg: dict[str, Any] | SiglipVisionConfig | None) -> BagelVisionConfig | None:
    """A SigLIP vision config with BAGEL's `rope` and `position_embedding`; `None` stays `None`."""
    return None if cfg is None else _coerce(cfg, BagelVisionConfig)


def _rename_aliases(values: dict[str, Any]) -> None:
    """Store `llm_config` and `vit_config` as `text_config` and `vision_config`, in place."""
    for alias, name in SUB_CONFIG_ALIASES.items():
        if (value := values.pop(alias, None)) is not None:
            _refuse_two_values(alias, value, name, values.get(name))
            values[name] = value


def _refuse_two_values(alias: str, value: Any, name: str, other: Any) -> None:
    if other is not None and other != value:
        raise ValueError(f"{alias} and {name} are two names of one config, but hold different values; give one.")


def _refuse_remainder(config: PreTrainedConfig, name: str, divisor: str) -> None:
    whole, parts = getattr(config, name), getattr(config, divisor)
    if whole % parts:
        raise ValueError(f"{config.base_config_key}: {name}={whole} is not a multiple of {divisor}={parts}.")


def _overridden(stored: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """
    A nested config with some keys changed. If a setting has two names, the changed one counts; new rope parameters keep
    the base that the weights were trained with.
    """
    merged = {**stored, **changes}
    for name, other in (("rope", "position_embedding"), ("position_embedding", "rope")):
        if name in changes and other not in changes:
            merged.pop(other, None)
    name = "rope_scaling" if "rope_scaling" in changes else "rope_parameters"
    theta = (stored.get("rope_parameters") or {}).get("rope_theta")
    if isinstance(changes.get(name), dict) and theta is not None:
        merged[name] = {"rope_theta": theta, **changes[name]}
    return merged


def _position_embedding(chosen: str, rope: bool) -> str:
    """The kind of a tower's position embedding, from the setting and the older `rope` flag."""
    if chosen not in POSITION_EMBEDDINGS:
        raise ValueError(
            f"vision_config: position_embedding={chosen!r} is unknown; choose one of {', '.join(POSITION_EMBEDDINGS)}."
        )
    if rope and chosen not in ("learned", "rope_2d"):
        raise ValueError(
            f'vision_config: rope=True (or vit_rope=True) means position_embedding="rope_2d", which contradicts '
            f"position_embedding={chosen!r}; set rope and vit_rope to False."
        )
    return "rope_2d" if rope else chosen


def _rope_parameters(given: dict | None, kwargs: dict[str, Any], default_theta: float) -> dict[str, Any]:
    """
    The rope parameters as one new dict. Older files have `rope_scaling` with `type` for `rope_type`, and `rope_theta`,
    `partial_rotary_factor` and `original_max_position_embeddings` next to it; those keys are removed from `kwargs`.
    """
    scaling = kwargs.pop("rope_scaling", None)
    for name, value in (("rope_parameters", given), ("rope_scaling", scaling)):
        if value and (not isinstance(value, dict) or any(isinstance(one, dict) for one in value.values())):
            raise ValueError(f"text_config: {name}={value!r} must be one dict that applies to all layers.")
    beside = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    outer = {name: value for name in beside if (value := kwargs.pop(name, None)) is not None}
    if scaling:
        if given and "rope_theta" in given:
            outer["rope_theta"] = given["rope_theta"]
        given = scaling
    rope = {key: value for key, value in (given or {}).items() if value is not None}
    old_name = rope.pop("type", None)
    rope.setdefault("rope_type", old_name or "default")
    if rope["rope_type"] not in ("yarn", "longrope", "llama3"):
        outer.pop("original_max_position_embeddings", None)
    return {"rope_theta": default_theta, **outer, **rope}


def _rotary_dim(rope: dict[str, Any], head_dim: int) -> int:
    return head_dim if rope["rope_type"] == "proportional" else int(head_dim * rope.get("partial_rotary_factor", 1.0))


class _RopeCheck:
    """Refuses rope parameters, as [`_rope_parameters`] returns them, that transformers would only log."""

    def __init__(self, rope: dict[str, Any], head_dim: int, max_position_embeddings: int):
        self.rope, self.rope_type, self.head_dim = rope, rope["rope_type"], head_dim
        self.max_position_embeddings = max_position_embeddings

    @property
    def pairs(self) -> int:
        """Pairs of features of a head that have an angle."""
        return _rotary_dim(self.rope, self.head_dim) // 2

    def run(self) -> None:
        """Raise a `ValueError` that names the parameter, its value and what it must be, if one is wrong."""
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(
                f"text_config.rope_parameters: rope_type={self.rope_type!r} is unknown; choose one of "
                f"{', '.join(ROPE_TYPES)}. Three positions per token are turned on by mrope_section, a partial "
                "embedding by partial_rotary_factor, adjacent pairs by interleave=True."
            )
        self.require("rope_theta", 1, "must be a number above 1, the base of the frequencies", above=True)
        if "partial_rotary_factor" in self.rope or self.head_dim % 2:
            self.check_partial()
        optional = self.rope_type in ("default", "proportional", "longrope")
        self.require("factor", 1, "must be a number of at least 1, how many times longer the context gets", optional)
        if self.rope_type in ("yarn", "longrope", "llama3"):
            needs = "must be a positive number of tokens, the context that the weights were trained with"
            self.require("original_max_position_embeddings", 1, needs)
        checks = {
            "dynamic": self.check_dynamic,
            "yarn": self.check_yarn,
            "llama3": self.check_llama3,
            "longrope": self.check_longrope,
        }
        if self.rope_type in checks:
            checks[self.rope_type]()
        self.check_pairs()

    def refuse(self, name: str, needs: str) -> NoReturn:
        found = f"{name}={self.rope[name]!r}" if name in self.rope else f"{name} is missing: it"
        raise ValueError(f"text_config.rope_parameters (rope_type={self.rope_type!r}): {found} {needs}.")

    def require(self, name: str, at_least: float, needs: str, optional: bool = False, above: bool = False) -> None:
        """A number of `at_least` so much, or `above` that."""
        value = self.rope.get(name)
        if value is None and optional:
            return
        if not _is_number(value) or not (value > at_least if above else value >= at_least):
            self.refuse(name, needs)

    def check_partial(self) -> None:
        factor = self.rope.get("partial_rotary_factor", 1.0)
        if not _is_number(factor) or not 0 < factor <= 1:
            self.refuse("partial_rotary_factor", "must be in (0, 1], the share of each head that is rotated")
        rotated = int(self.head_dim * factor)
        if rotated < 2 or self.head_dim % 2 or (rotated % 2 and self.rope_type != "proportional"):
            even = max(rotated - rotated % 2, 2)
            raise ValueError(
                f"text_config.rope_parameters: partial_rotary_factor={factor} of heads of {self.head_dim} features "
                f"(hidden_size / num_attention_heads) rotates {rotated}; features are rotated in pairs, so this must "
                f"be even and positive: {even} is {even}/{self.head_dim} of a head."
            )

    def check_dynamic(self) -> None:
        if self.pairs < 2:
            raise ValueError(
                f"text_config.rope_parameters: rope_type='dynamic' needs at least 2 pairs, the heads have {self.pairs}."
            )

    def check_yarn(self) -> None:
        for name in ("beta_fast", "beta_slow", "attention_factor"):
            self.require(name, 0, "must be a positive number", optional=True, above=True)
        slow = self.rope.get("beta_slow", 1)
        if self.rope.get("beta_fast", 32) <= slow:
            needs = f"must be above beta_slow={slow}: full rotations within the original length, fast pairs make more"
            self.refuse("beta_fast", needs)
        if not isinstance(self.rope.get("truncate", True), bool):
            self.refuse("truncate", "must be True or False")

    def check_llama3(self) -> None:
        self.require("low_freq_factor", 0, "must be a positive number", above=True)
        low = self.rope["low_freq_factor"]
        self.require("high_freq_factor", low, f"must be a number above low_freq_factor={low}", above=True)

    def check_longrope(self) -> None:
        for name in ("short_factor", "long_factor"):
            self.check_factor_per_pair(name)
        self.require("attention_factor", 0, "must be a positive number", optional=True, above=True)
        original = self.rope["original_max_position_embeddings"]
        if "factor" not in self.rope and self.max_position_embeddings < original:
            longest = f"max_position_embeddings={self.max_position_embeddings}"
            needs = f"is above {longest}: give the longer one there, or a factor"
            self.refuse("original_max_position_embeddings", needs)

    def check_factor_per_pair(self, name: str) -> None:
        values = self.rope.get(name)
        is_list = isinstance(values, list | tuple)
        if is_list and len(values) == self.pairs and all(_is_number(one) and one > 0 for one in values):
            return
        found = f", it has {len(values)}" if is_list else ""
        self.refuse(name, f"must be {self.pairs} positive numbers, one per pair of features that is rotated{found}")

    def check_pairs(self) -> None:
        """Which features are a pair, and which position rotates each."""
        if not isinstance(self.rope.get("interleave", False), bool):
            self.refuse("interleave", "must be True (adjacent features are a pair) or False (the halves of a head are)")
        if self.rope.get("mrope_interleaved") is False:
            needs = "is not supported: sections are interleaved here (T H W T H W ..., Qwen3-Omni)"
            self.refuse("mrope_interleaved", needs)
        section = self.rope.get("mrope_section")
        if section is None:
            return
        whole = isinstance(section, list | tuple) and all(type(one) is int and one >= 0 for one in section)
        if whole and len(section) == 3 and sum(section) == self.pairs:
            return
        total = f", {sum(section)} in all" if whole else ""
        self.refuse(
            "mrope_section",
            f"must be three numbers of pairs, (time, height, width), that sum to {self.pairs}, half of the "
            f"{2 * self.pairs} features of a head that are rotated{total}",
        )


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def _stage_to_int(stage: int | str) -> int:
    if isinstance(stage, bool) or stage not in STAGES:
        raise ValueError(f'stage={stage!r} is unknown; use 1 ("stage1", understanding) or 2 ("stage2", joint).')
    return STAGES[stage]


def _prepare_config_for_stage(config: BagelConfig) -> None:
    """Make the parts of a config follow its `stage`, also one that was set after the config was made."""
    config.stage = None if config.stage is None else _stage_to_int(config.stage)
    config.visual_gen = config.visual_gen if config.stage is None else config.stage == 2
    layer_module = config.text_config.layer_module
    if config.stage == 1:
        layer_module = "Qwen2DecoderLayer"
    elif layer_module is None or (config.stage == 2 and layer_module == "Qwen2DecoderLayer"):
        layer_module = "Qwen2MoTDecoderLayer" if config.visual_gen else "Qwen2DecoderLayer"
    config.text_config.layer_module = layer_module
    config.text_config.base_model_tp_plan = _tensor_parallel_plan(config.text_config)
    config.text_config.base_model_pp_plan = None  # Qwen2's passes other arguments than these blocks take
    config.tie_word_embeddings = config.tie_word_embeddings or config.text_config.tie_word_embeddings


def _tensor_parallel_plan(config: BagelTextConfig) -> dict[str, str]:
    """How transformers shards a decoder block over devices, both experts alike."""
    attention = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
    if config.qk_norm:
        attention |= {"q_norm": "replicated_with_grad_allreduce", "k_norm": "replicated_with_grad_allreduce"}
    mlp = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
    plan, layer_module = {}, config.layer_module or "Qwen2DecoderLayer"
    for suffix in expert_suffixes(layer_module, "attention"):
        plan |= {f"layers.*.self_attn.{name}{suffix}": how for name, how in attention.items()}
    for suffix in expert_suffixes(layer_module, "mlp"):
        plan |= {f"layers.*.mlp{suffix}.{name}": how for name, how in mlp.items()}
    return plan


def _without_model_type(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without the model type of a backbone (`qwen2`), which released nested configs have."""
    return {key: value for key, value in kwargs.items() if key != "model_type"}


BagelConfig.register_for_auto_class()

__all__ = ["AUTO_MAP", "BagelConfig", "BagelTextConfig", "BagelVAEConfig", "BagelVisionConfig"]
