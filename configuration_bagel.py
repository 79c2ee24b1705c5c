# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What a BAGEL model is made of: three nested configs, their aliases and their validation; no torch, no files.

The nested configs answer to two names, because two kinds of files exist: `text_config`/`vision_config` (transformers)
and `llm_config`/`vit_config` (the released checkpoint). Both names are one object.
"""

import copy
import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig


DECODER_LAYERS = ("Qwen2DecoderLayer", "Qwen2MoEDecoderLayer", "Qwen2MoTDecoderLayer")
STAGES = {1: 1, "1": 1, "stage1": 1, 2: 2, "2": 2, "stage2": 2, None: None}
AUTO_MAP = {
    "AutoConfig": "configuration_bagel.BagelConfig",
    "AutoModel": "modeling_bagel.BagelForUnifiedMultimodal",
    "AutoModelForImageTextToText": "modeling_bagel.BagelForUnifiedMultimodal",
    "AutoModelForMultimodalLM": "modeling_bagel.BagelForUnifiedMultimodal",
    "AutoProcessor": "processing_bagel.BagelProcessor",
    "AutoImageProcessor": "image_processing_bagel.BagelImageProcessor",
}
SUB_CONFIG_ALIASES = {"llm_config": "text_config", "vit_config": "vision_config"}


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
    """

    model_type = "bagel_text"
    base_config_key = "text_config"
    default_theta = 1_000_000.0

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 32768
    qk_norm: bool = True
    layer_module: str | None = None
    freeze_und: bool = False

    def __post_init__(self, **kwargs):
        if self.layer_module is not None and self.layer_module not in DECODER_LAYERS:
            raise ValueError(
                f"layer_module={self.layer_module!r} is unknown; choose one of {', '.join(DECODER_LAYERS)}."
            )
        super().__post_init__(**_without_model_type(kwargs))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"text_config: hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"text_config: num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}."
            )


@strict
class BagelVisionConfig(SiglipVisionConfig):
    r"""
    The vision tower: a SigLIP config for packed images of any grid. Defaults are those of BAGEL-7B-MoT.

    `num_hidden_layers` counts the layers of the SigLIP checkpoint (27 for the released model), as the released files
    do; how many of them are built follows from `BagelConfig.vit_select_layer`, see `BagelConfig.num_vit_layers`.

    Args:
        rope (`bool`, defaults to `False`): 2-D rotary embedding in attention instead of the learned position table.
    """

    model_type = "bagel_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int | list[int] | tuple[int, int] = 980
    patch_size: int | list[int] | tuple[int, int] = 14
    rope: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**_without_model_type(kwargs))
        if not isinstance(self.patch_size, int) or not isinstance(self.image_size, int):
            raise ValueError(
                f"vision_config: patch_size={self.patch_size} and image_size={self.image_size} must be integers; "
                "the tower takes square patches and a square position table."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"vision_config: hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}."
            )

    @property
    def patch_dim(self) -> int:
        """Features of one flattened patch: rows * columns * channels."""
        return self.num_channels * self.patch_size**2


@strict
class BagelVAEConfig(PreTrainedConfig):
    r"""
    The image autoencoder, in the words of the released files. Defaults are the FLUX autoencoder that BAGEL uses.

    Args:
        z_channels (`int`): latent channels.
        downsample (`int`): pixels per latent, per side.
        resolution (`int`): the size it was trained at; it has no effect on the computation.
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

    def __post_init__(self, **kwargs):
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
        visual_und (`bool`, defaults to `True`): build vision tower and connector (reads pictures).
        visual_gen (`bool`, defaults to `False`): build VAE, latent and timestep embeddings, velocity head (draws).
        stage (`int` or `str`, *optional*): 1 = understanding only (no `*_moe_gen` parameters, no VAE), 2 = joint.
            `1`, `"1"` and `"stage1"` are the same. It decides `visual_gen` and, if needed, `layer_module`.
        llm_path, vit_path, vae_path (`str`): where the parts came from; not read here.
        max_latent_size (`int`, defaults to 64): side of the latent position table, in latent patches.
        latent_patch_size (`int`, defaults to 2): latents per latent token, per side.
        vit_patch_size (`int`, defaults to 14): pixels per ViT patch, per side.
        vit_max_num_patch_per_side (`int`, defaults to 70): side of the ViT position tables, in patches.
        connector_act (`str`): activation of the connector MLP.
        interpolate_pos (`bool`): spread an image over the whole ViT position table instead of its corner.
        vit_select_layer (`int`, defaults to -2): which hidden state of the SigLIP tower is used; the layers above it
            are neither stored nor built. This is the only place where that offset is applied.
        vit_rope (`bool`): same as `vision_config.rope`.
        text_cond_dropout_prob, vae_cond_dropout_prob, vit_cond_dropout_prob (`float`): training data dropout.
        timestep_shift (`float`, defaults to 1.0): shift of the TRAINING timesteps (drawing has its own argument).
        ce_weight, mse_weight (`float`, default 1.0): weights of the two losses in `loss`.
        ce_loss_reweighting (`bool`, defaults to `False`): weigh every label by the pack's `ce_loss_weights`.
        bos_token_id, eos_token_id: start and end of a text span. vision_start_token_id, vision_end_token_id: start
            and end of an image span. image_token_id, latent_token_id: a ViT place and a VAE-latent place in
            `input_ids`; these two never reach the embedding table and may lie outside the vocabulary.
    """

    model_type = "bagel"
    sub_configs = {
        "text_config": BagelTextConfig,
        "vision_config": BagelVisionConfig,
        "vae_config": BagelVAEConfig,
    }
    keys_to_ignore_at_inference = ["past_key_values", "last_hidden_state", "ce", "mse"]

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
    interpolate_pos: bool = False
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

    def __post_init__(self, **kwargs):
        for alias, name in SUB_CONFIG_ALIASES.items():
            if (value := kwargs.pop(alias, None)) is not None:
                _refuse_two_values(alias, value, name, getattr(self, name))
                setattr(self, name, value)
        for name, config_class in self.sub_configs.items():
            value = getattr(self, name)
            if value is None or isinstance(value, dict):
                value = config_class(**(value or {}))
            elif value.model_type != config_class.model_type:  # a stock Qwen2Config or SiglipVisionConfig
                value = config_class(**value.to_dict())
            setattr(self, name, copy.deepcopy(value))  # the caller's object stays as it was
        self._resolve_stage()
        self._resolve_vision()
        kwargs["auto_map"] = {**AUTO_MAP, **(kwargs.get("auto_map") or {})}  # one class, several auto classes
        super().__post_init__(**kwargs)

    def _resolve_stage(self):
        if isinstance(self.stage, bool) or self.stage not in STAGES:
            raise ValueError(
                f'stage={self.stage!r} is unknown; use 1 ("stage1", understanding) or 2 ("stage2", joint).'
            )
        self.stage = STAGES[self.stage]
        layer_module = self.text_config.layer_module
        if self.stage is not None:
            self.visual_gen = self.stage == 2
        if self.stage == 1:
            layer_module = "Qwen2DecoderLayer"
        elif layer_module is None or (self.stage == 2 and layer_module == "Qwen2DecoderLayer"):
            layer_module = "Qwen2MoTDecoderLayer" if self.visual_gen else "Qwen2DecoderLayer"
        self.text_config.layer_module = layer_module
        self.text_config.base_model_tp_plan = _tensor_parallel_plan(self.text_config)
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings

    def _resolve_vision(self):
        if self.vit_patch_size not in (14, self.vision_config.patch_size):
            raise ValueError(
                f"vit_patch_size={self.vit_patch_size} contradicts vision_config.patch_size="
                f"{self.vision_config.patch_size}; give one of them."
            )
        self.vit_patch_size = self.vision_config.patch_size
        self.vit_rope = self.vision_config.rope = self.vit_rope or self.vision_config.rope
        if not 1 <= self.num_vit_layers <= self.vision_config.num_hidden_layers:
            raise ValueError(
                f"vit_select_layer={self.vit_select_layer} leaves {self.num_vit_layers} of "
                f"{self.vision_config.num_hidden_layers} vision layers."
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Like the base method, but overrides pass through the same resolution as what the file says."""
        config_dict = dict(config_dict)
        if config_dict.get("model_type") == BagelTextConfig.model_type:  # the language part, saved by itself
            config_dict = {"text_config": config_dict}
        for values in (config_dict, kwargs):
            for alias, name in SUB_CONFIG_ALIASES.items():
                if (value := values.pop(alias, None)) is not None:
                    _refuse_two_values(alias, value, name, values.get(name))
                    values[name] = value
        if "visual_gen" in kwargs and "stage" not in kwargs:
            config_dict.pop("stage", None)
        for name in cls.__annotations__:
            if name in kwargs:
                value = kwargs.pop(name)
                if isinstance(value, dict) and isinstance(config_dict.get(name), dict):
                    value = {**config_dict[name], **value}
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
    def latent_downsample(self) -> int:
        """Pixels per latent token, per side (16 for the released model)."""
        return self.vae_config.downsample * self.latent_patch_size

    @property
    def patch_latent_dim(self) -> int:
        """Features of a latent token: (row in patch, column in patch, channel)."""
        return self.latent_patch_size**2 * self.vae_config.z_channels


def _refuse_two_values(alias: str, value: Any, name: str, other: Any) -> None:
    if other is not None and other != value:
        raise ValueError(
            f"{alias} and {name} are two names of one config, but hold different values; give one of them."
        )


def _tensor_parallel_plan(config: BagelTextConfig) -> dict[str, str]:
    """How transformers shards a decoder block over devices, both experts alike."""
    attention = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
    if config.qk_norm:
        attention |= {"q_norm": "replicated_with_grad_allreduce", "k_norm": "replicated_with_grad_allreduce"}
    mlp = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
    mot, moe = config.layer_module == "Qwen2MoTDecoderLayer", config.layer_module != "Qwen2DecoderLayer"
    return {
        **{
            f"layers.*.self_attn.{name}{sibling}": plan
            for sibling in (("", "_moe_gen") if mot else ("",))
            for name, plan in attention.items()
        },
        **{
            f"layers.*.mlp{sibling}.{name}": plan
            for sibling in (("", "_moe_gen") if moe else ("",))
            for name, plan in mlp.items()
        },
    }


def _without_model_type(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Released nested configs carry the model type of their backbone (`qwen2`), which is not ours to keep."""
    return {key: value for key, value in kwargs.items() if key != "model_type"}


BagelConfig.register_for_auto_class()

__all__ = ["AUTO_MAP", "BagelConfig", "BagelTextConfig", "BagelVAEConfig", "BagelVisionConfig"]
