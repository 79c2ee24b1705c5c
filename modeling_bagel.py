# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""BAGEL: one decoder that reads text and pictures and writes both. Experts, block, model, losses.

Two input vocabularies (transformers' padded batches, the released training packs) become one `PackedLayout` on the
first lines of `forward`; below it there is one path for training, prefill, decoding and drawing.

Axes: (batch, length, hidden_size); a training pack is a batch of one row. `und` = understanding expert (text and ViT
tokens), `gen` = generation expert (VAE latents, parameter suffix `_moe_gen`). t = 1 is noise, t = 0 the picture.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm
from transformers.utils import ModelOutput, can_return_tuple, is_torchvision_available, logging

from .attention_bagel import AttentionPlan, BagelAttention, plan_attention
from .checkpoint_bagel import (
    check_checkpoint,
    ids_outside,
    overridden_ids,
    refuse_missing_weights,
    released_vae_names,
    switched_off_parts,
)
from .configuration_bagel import BagelConfig, BagelTextConfig, BagelVAEConfig
from .embeddings_bagel import (
    BagelGridPositionEmbedding,
    BagelTextRotaryEmbedding,
    BagelTimestepEmbedding,
    grid_position_ids,
)
from .flow_bagel import interpolate, patchify_latents, training_timesteps, unpatchify_latents, velocity_target
from .generation_bagel import BagelGenerationMixin
from .layout_bagel import ImagePlaces, PackedLayout, Routing, check_cover, picture_rows
from .lora_bagel import BagelAdapterMixin
from .modeling_siglip_navit import SiglipVisionModel


ROWS_ARE_PADDED_TO = 64  # a vocabulary table of a multiple of this many rows may hold padding
PIXELS_PER_ENCODING = 512 * 512  # what the VAE encodes at once; a larger picture goes alone


logger = logging.get_logger(__name__)


@dataclass
class BagelOutput(ModelOutput):
    """
    Outputs of both vocabularies; what does not apply is `None`.

    Args:
        loss: scalar. Padded batches: language-model loss of `labels`. Packs:
            `ce_weight * mean(ce) + mse_weight * mean(mse)`.
        logits: (batch, kept length, vocab_size); padded batches only.
        ce: (text labels,) cross-entropy per token; packs only.
        mse: (learned latent tokens, patch_latent_dim) squared velocity error per element; packs only.
        last_hidden_state: (batch, length, hidden_size) after the final norm; (length, hidden_size) for packs.
        past_key_values, hidden_states, attentions: as everywhere in transformers.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    ce: torch.Tensor | None = None
    mse: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class VitTokens(NamedTuple):
    """
    ViT input: `patches` (n, patch_dim), `position_ids` (n,) or coordinates (n, 2), `grids` per image, `index` (n,) flat
    places.
    """

    patches: torch.Tensor
    position_ids: torch.Tensor
    grids: list[tuple[int, int]]
    index: torch.LongTensor


class LatentTokens(NamedTuple):
    """
    Latents at time t: `x_t` (n, patch_latent_dim), `t` (n,), `position_ids` (n,) or coordinates (n, 2), `index` (n,)
    flat places.
    """

    x_t: torch.Tensor
    t: torch.Tensor
    position_ids: torch.Tensor
    index: torch.LongTensor


class PaddedPictures(NamedTuple):
    """The pictures of a padded batch; see `BagelForUnifiedMultimodal.forward` for the fields."""

    pixel_values: torch.Tensor | None = None
    image_grid_hw: torch.LongTensor | None = None
    latent_pixel_values: torch.Tensor | None = None
    latent_image_sizes: torch.LongTensor | None = None
    sample_posterior: bool = False
    generator: torch.Generator | list[torch.Generator] | None = None

    @property
    def empty(self) -> bool:
        return self.pixel_values is None and self.latent_pixel_values is None


@dataclass(frozen=True)
class PackedBatch:
    """A training pack in the released vocabulary; see `BagelForUnifiedMultimodal.forward` for the fields."""

    sequence_length: int
    packed_text_ids: torch.LongTensor
    packed_text_indexes: torch.LongTensor
    sample_lens: Sequence[int]
    packed_position_ids: torch.LongTensor
    nested_attention_masks: Sequence[torch.Tensor] | None
    split_lens: Sequence[int] | None
    attn_modes: Sequence[str] | None
    packed_vit_tokens: torch.Tensor | None
    packed_vit_token_indexes: torch.LongTensor | None
    packed_vit_position_ids: torch.LongTensor | None
    vit_token_seqlens: torch.Tensor | None
    padded_latent: torch.Tensor | Sequence[torch.Tensor] | None
    patchified_vae_latent_shapes: Sequence[tuple[int, int]] | None
    packed_latent_position_ids: torch.LongTensor | None
    packed_vae_token_indexes: torch.LongTensor | None
    packed_timesteps: torch.Tensor | None
    mse_loss_indexes: torch.Tensor | None
    ce_loss_indexes: torch.Tensor | None
    packed_label_ids: torch.LongTensor | None
    ce_loss_weights: torch.Tensor | None
    padded_images: torch.Tensor | Sequence[torch.Tensor] | None
    noise: torch.Tensor | None

    def layout(self) -> PackedLayout:
        """Check that every place is filled once, then read the columns."""
        missing = [
            name
            for name in ("packed_text_ids", "packed_text_indexes", "sample_lens", "packed_position_ids")
            if getattr(self, name) is None
        ]
        if missing:
            raise ValueError(f"A pack with sequence_length={self.sequence_length} also needs {', '.join(missing)}.")
        if len(self.packed_text_ids) != len(self.packed_text_indexes):
            raise ValueError(
                f"{len(self.packed_text_ids)} packed_text_ids for {len(self.packed_text_indexes)} packed_text_indexes."
            )
        names = ("packed_text_indexes", "packed_vit_token_indexes", "packed_vae_token_indexes")
        indexes = {name: _as_index(getattr(self, name)) for name in names}
        check_cover(self.sequence_length, indexes, self.packed_text_ids.device)
        return PackedLayout.from_packed(
            self.sequence_length,
            self.sample_lens,
            self.packed_position_ids,
            indexes["packed_vae_token_indexes"],
            self.split_lens,
            self.attn_modes,
            self.nested_attention_masks,
        )


class BagelConnector(nn.Module):
    """Two-layer MLP from vision features to decoder features."""

    def __init__(self, in_features: int, out_features: int, hidden_act: str):
        super().__init__()
        self.activation_fn = ACT2FN[hidden_act]
        self.fc1 = nn.Linear(in_features, out_features)
        self.fc2 = nn.Linear(out_features, out_features)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class VelocityHead(nn.Linear):
    """Decoder features to velocity; zero in a fresh model, which then predicts no velocity (released)."""


class BagelDecoderLayer(GradientCheckpointingLayer):
    """
    A Qwen2 block whose parts may have a sibling for the generation expert.

    `Qwen2DecoderLayer`: no siblings. `Qwen2MoEDecoderLayer`: MLP only. `Qwen2MoTDecoderLayer`: everything.
    """

    def __init__(self, config: BagelTextConfig, layer_idx: int):
        super().__init__()
        mot = config.layer_module == "Qwen2MoTDecoderLayer"
        moe = mot or config.layer_module == "Qwen2MoEDecoderLayer"
        self.self_attn = BagelAttention(config, layer_idx, has_gen=mot)
        self.mlp = Qwen2MLP(config)
        self.mlp_moe_gen = Qwen2MLP(config) if moe else None
        self.input_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.input_layernorm_moe_gen = _gen_norm(config, mot)
        self.post_attention_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm_moe_gen = _gen_norm(config, mot)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        routing: Routing,
        plan: AttentionPlan,
        past_key_values: Cache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        normed = routing.run(hidden_states, self.input_layernorm, self.input_layernorm_moe_gen)
        attended, weights = self.self_attn(normed, position_embeddings, routing, plan, past_key_values)
        hidden_states = hidden_states + attended
        normed = routing.run(hidden_states, self.post_attention_layernorm, self.post_attention_layernorm_moe_gen)
        return hidden_states + routing.run(normed, self.mlp, self.mlp_moe_gen), weights


class BagelPreTrainedModel(PreTrainedModel):
    config: BagelConfig
    config_class = BagelConfig
    base_model_prefix = "language_model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["BagelDecoderLayer", "SiglipEncoderLayer", "AutoencoderKL"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Also fills tables: models are built on the meta device, where constructors compute nothing."""
        if isinstance(module, VelocityHead):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
            return
        super()._init_weights(module)
        if isinstance(module, BagelGridPositionEmbedding):
            init.copy_(module.pos_embed, module.table())


class BagelTextModel(BagelPreTrainedModel):
    """Token embeddings, decoder blocks, final norm; takes embeddings and a layout, never ids."""

    config: BagelTextConfig
    config_class = BagelTextConfig

    def __init__(self, config: BagelTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([BagelDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm_moe_gen = _gen_norm(config, config.layer_module != "Qwen2DecoderLayer")
        self.rotary_emb = BagelTextRotaryEmbedding(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        layout: PackedLayout,
        plan: AttentionPlan,
        past_key_values: Cache | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> BaseModelOutputWithPast:
        """(batch, length, hidden_size) -> the same after the final norm, in the order of the layout."""
        routing = layout.routing._replace(freeze_und=self.config.freeze_und)
        position_embeddings = self.rotary_emb(inputs_embeds, layout.position_ids, layout.sample_ids)
        hidden_states = routing.freeze_und_tokens(routing.sort(inputs_embeds))
        all_states, all_weights = [], []
        for layer in self.layers:
            all_states.append(hidden_states)
            hidden_states, weights = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                routing=routing,
                plan=plan,
                past_key_values=past_key_values,
            )
            all_weights.append(weights)
        hidden_states = routing.restore(routing.run(hidden_states, self.norm, self.norm_moe_gen))
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            hidden_states=(inputs_embeds, *map(routing.restore, all_states[1:]), hidden_states)
            if output_hidden_states
            else None,
            attentions=tuple(all_weights) if output_attentions else None,
        )


class BagelLanguageModel(BagelPreTrainedModel):
    """The released tree: `language_model.model` and `language_model.lm_head`; a container without a forward."""

    config: BagelTextConfig
    config_class = BagelTextConfig
    base_model_prefix = "model"
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: BagelTextConfig):
        super().__init__(config)
        self.model = BagelTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens


class BagelForUnifiedMultimodal(BagelAdapterMixin, BagelPreTrainedModel, BagelGenerationMixin):
    """
    The whole model: reads text and pictures, writes text (`generate`) and pictures (`generation_mode="image"`).

    Parameter names and shapes are those of the released `ema.safetensors`; the VAE stands under `vae` with the names of
    `diffusers.AutoencoderKL`. It is built for `visual_gen` only, always frozen, and the one part that needs diffusers.
    """

    # transformers' any-to-any pipeline refuses image models without torchvision; this one needs none
    input_modalities = ("image", "text") if is_torchvision_available() else ("text",)
    output_modalities = ("text", "image")
    _tied_weights_keys = {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}
    accepts_loss_kwargs = True
    latent_cache = None  # a trainer may put a `LatentCache` here

    def __init__(self, config: BagelConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        text = config.text_config
        self.language_model = BagelLanguageModel(text)
        if config.visual_gen:
            self.time_embedder = BagelTimestepEmbedding(text.hidden_size)
            self.vae2llm = nn.Linear(config.patch_latent_dim, text.hidden_size)
            self.llm2vae = VelocityHead(text.hidden_size, config.patch_latent_dim)
            self.latent_pos_embed = BagelGridPositionEmbedding(config.max_latent_size, text.hidden_size)
            self.vae = build_vae(config.vae_config).float()  # stays float32 in a bfloat16 model, as it is released
        if config.visual_und:
            vision = config.vision_config
            self.vit_model = SiglipVisionModel(vision, config.num_vit_layers)
            self.vit_model.vision_model.embeddings.convert_conv2d_to_linear()
            self.connector = BagelConnector(vision.hidden_size, text.hidden_size, config.connector_act)
            self.vit_pos_embed = BagelGridPositionEmbedding(config.vit_max_num_patch_per_side, text.hidden_size)
        self._keys_to_ignore_on_load_unexpected = switched_off_parts(config)
        self.post_init()
        self.freeze_vae()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """
        As everywhere in transformers, and strict: tensors that are missing, misshapen or not of this model are an error
        that names them, before anything large is read. Whoever asks for `output_loading_info` or brings a `state_dict`
        judges for themselves.

        Raises:
            OSError: the folder holds no safetensors weights (pickles are refused), or a truncated file.
            ValueError: tensors are missing, have another shape, or belong to another model.
        """
        want_info = kwargs.pop("output_loading_info", False)
        strict = not want_info and kwargs.get("state_dict") is None
        config, kwargs = check_checkpoint(cls, pretrained_model_name_or_path, config, kwargs, strict)
        with released_vae_names(cls.__name__, config.vae_config):
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, config=config, output_loading_info=True, **kwargs
            )
        if strict:
            refuse_missing_weights(model, pretrained_model_name_or_path, info, kwargs)
        model.freeze_vae()
        if kwargs.get("generation_config") is None:  # the stored one knows nothing of overrides
            for name, value in overridden_ids(config, pretrained_model_name_or_path, kwargs).items():
                setattr(model.generation_config, name, value)
        return (model, info) if want_info else model

    @classmethod
    def from_backbones(cls, *parts, **options) -> "BagelForUnifiedMultimodal":
        """A new model of pretrained parts, see `bagel.conversion.from_backbones`, which has to be installed."""
        try:
            conversion = importlib.import_module("bagel.conversion")
        except ImportError as error:
            raise ImportError(
                "Building a model from parts is not shipped with models: `pip install bagel-transformers`, or install "
                "a checkout with `pip install -e .`."
            ) from error
        return conversion.from_backbones(cls, *parts, **options)

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs):
        """
        As everywhere in transformers. The VAE is written under its module names (`save_original_format=False`), so that
        a checkpoint of the stock `Trainer` resumes; `convert_bagel.py export` writes the released layout.
        """
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """As everywhere in transformers; sub-configs without a transformers model behind them follow silently."""
        absent = [self.config.vae_config] + ([] if self.config.visual_und else [self.config.vision_config])
        before = [config._attn_implementation for config in absent]
        if isinstance(attn_implementation, str):
            for config in absent:
                config._attn_implementation = attn_implementation
        try:
            super().set_attn_implementation(attn_implementation, *args, **kwargs)
        except Exception:
            for config, implementation in zip(absent, before):
                config._attn_implementation = implementation
            raise

    def freeze_vae(self) -> None:
        """The VAE is never trained; loading turns `requires_grad` back on, so this is called after it."""
        if self.config.visual_gen:
            self.vae.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.lm_head = new_embeddings

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
        shrink: bool | None = None,
    ) -> nn.Embedding:
        """
        As everywhere in transformers, but a padded table does not get smaller: the released one has 152,064 rows for a
        tokenizer of 151,6xx, so `resize_token_embeddings(len(tokenizer))`, the usual line, would cut a checkpoint that
        no longer fits the released config. There, fewer tokens than rows keep the rows.

        Args:
            new_num_tokens, pad_to_multiple_of, mean_resizing: as in transformers.
            shrink: cut the table (`True`) or never (`False`). By default only a table whose rows are no multiple of 64,
                and that therefore holds no padding, is cut.

        Raises:
            ValueError: the smaller table would lose special ids.
        """
        rows = self.config.text_config.vocab_size
        if new_num_tokens is not None and new_num_tokens < rows:
            keep = rows % ROWS_ARE_PADDED_TO == 0 if shrink is None else not shrink
            if keep:
                logger.warning_once(
                    f"The vocabulary keeps its {rows} rows, although {new_num_tokens} were asked for: more rows than "
                    "tokens are padding. resize_token_embeddings(..., shrink=True) cuts them."
                )
                new_num_tokens = rows
            elif lost := ids_outside(vars(self.config), new_num_tokens):
                without = ids_outside(vars(self.config), rows)  # never had a place, so nothing is lost
                ids = ", ".join(f"{name}={value}" for name, value in lost.items() if name not in without)
                if ids:
                    raise ValueError(f"A table of {new_num_tokens} rows has no place for {ids}: keep more rows.")
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    def get_decoder(self) -> nn.Module:
        return self.language_model.model

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grid_hw: torch.LongTensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        What the decoder reads of pictures.

        Args:
            pixel_values: (patches, patch_dim) of all images. image_grid_hw: (images, 2) rows and columns of patches.
            kwargs: the other inputs of a batch, not used here.

        Returns:
            `last_hidden_state` (patches, vision hidden_size) of the tower; `pooler_output` per image (rows * columns,
            hidden_size) after connector and position table.
        """
        vision = self.config.vision_config
        grids = self._vit_grids(PaddedPictures(pixel_values, image_grid_hw))
        seen, features = self._read_patches(
            pixel_values,
            self._vit_position_ids(grids, pixel_values.device),
            grids,
            output_hidden_states=vision.output_hidden_states if output_hidden_states is None else output_hidden_states,
            output_attentions=vision.output_attentions if output_attentions is None else output_attentions,
        )
        return BaseModelOutputWithPooling(
            last_hidden_state=seen.last_hidden_state,
            pooler_output=features.split([rows * columns for rows, columns in grids]),
            hidden_states=seen.hidden_states,
            attentions=seen.attentions,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        shift_labels: torch.LongTensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        # pictures of a padded batch
        pixel_values: torch.Tensor | None = None,
        image_grid_hw: torch.LongTensor | None = None,
        latent_pixel_values: torch.Tensor | None = None,
        latent_image_sizes: torch.LongTensor | None = None,
        sample_posterior: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        # a training pack
        sequence_length: int | None = None,
        packed_text_ids: torch.LongTensor | None = None,
        packed_text_indexes: torch.LongTensor | None = None,
        sample_lens: list[int] | None = None,
        packed_position_ids: torch.LongTensor | None = None,
        nested_attention_masks: list[torch.Tensor] | None = None,
        split_lens: list[int] | None = None,
        attn_modes: list[str] | None = None,
        packed_vit_tokens: torch.Tensor | None = None,
        packed_vit_token_indexes: torch.LongTensor | None = None,
        packed_vit_position_ids: torch.LongTensor | None = None,
        vit_token_seqlens: torch.Tensor | None = None,
        padded_latent: torch.Tensor | None = None,
        patchified_vae_latent_shapes: list[tuple[int, int]] | None = None,
        packed_latent_position_ids: torch.LongTensor | None = None,
        packed_vae_token_indexes: torch.LongTensor | None = None,
        packed_timesteps: torch.Tensor | None = None,
        mse_loss_indexes: torch.Tensor | None = None,
        ce_loss_indexes: torch.Tensor | None = None,
        packed_label_ids: torch.LongTensor | None = None,
        ce_loss_weights: torch.Tensor | None = None,
        padded_images: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
    ) -> BagelOutput:
        r"""
        Two vocabularies; `sequence_length` decides which.

        A padded batch (generation, evaluation, everything that expects a normal model):
            input_ids: (batch, length); pictures are marked by runs of `image_token_id` (ViT) and `latent_token_id`
                (VAE) between vision_start and vision_end. attention_mask: (batch, past + length), 0 = padding.
            position_ids: (batch, length), or with `mrope_section` (3, batch, length) time, height and width; counted
                from `input_ids` if absent, see [`~BagelGenerationMixin.get_rope_index`].
            inputs_embeds: (batch, length, hidden_size), text only.
            labels: (batch, length), -100 = ignored; shifted here (`shift_labels`: shifted already).
            num_items_in_batch: labels to divide by, if they are not those of this batch alone.
            pixel_values: (ViT patches of the batch, patch_dim). image_grid_hw: (ViT images, 2) in patches.
            latent_pixel_values: (VAE images, 3, H, W) in [-1, 1], zero-padded to the largest. latent_image_sizes:
                (VAE images, 2) height and width in pixels; each image is encoded at its own size.
            sample_posterior: sample the VAE posterior with `generator` (one, or one per row) instead of its mode.

        A training pack (names and meaning of the released data pipeline):
            sequence_length: tokens. packed_text_ids, packed_text_indexes: (text tokens,). sample_lens: tokens of each
                sample. packed_position_ids: (sequence_length,), with `mrope_section` (sequence_length, 3).
                split_lens, attn_modes: spans and their kind ("causal", "full", "noise"), or nested_attention_masks:
                one (n, n) mask per sample.
            packed_vit_tokens: (ViT tokens, patch_dim). packed_vit_token_indexes, packed_vit_position_ids:
                (ViT tokens,); position ids may be float coordinates (ViT tokens, 2), and so may those of latents, see
                [`~embeddings_bagel.grid_position_ids`]. vit_token_seqlens: (ViT images,).
            padded_latent: (VAE images, z_channels, h, w) encoded and scaled, or padded_images: (VAE images, 3, H, W)
                in [-1, 1], which the frozen VAE encodes. patchified_vae_latent_shapes: (h, w) in tokens per image.
            packed_latent_position_ids, packed_vae_token_indexes: (latent tokens,). packed_timesteps: (latent tokens,)
                before the sigmoid, minus infinity = clean. noise: (latent tokens, patch_latent_dim), drawn if absent.
            ce_loss_indexes, packed_label_ids: (labels,) where cross-entropy is taken, and its targets.
            mse_loss_indexes: (learned latent tokens,). ce_loss_weights: (labels,), used in `loss` if the config says
                `ce_loss_reweighting`; `ce` is per token and never weighted.
            num_items_in_batch: (2,) what the means in `loss` divide by, if not this pack's own counts: the labels (or
                the sum of their weights) and the learned latent tokens of the whole optimizer step.

        Returns:
            [`BagelOutput`].

        Raises:
            ValueError: inputs that contradict each other; the message says which and by how much.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        recording = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        if sequence_length is not None:
            pack = PackedBatch(
                sequence_length=int(sequence_length),
                packed_text_ids=packed_text_ids,
                packed_text_indexes=packed_text_indexes,
                sample_lens=sample_lens,
                packed_position_ids=packed_position_ids,
                nested_attention_masks=nested_attention_masks,
                split_lens=split_lens,
                attn_modes=attn_modes,
                packed_vit_tokens=packed_vit_tokens,
                packed_vit_token_indexes=packed_vit_token_indexes,
                packed_vit_position_ids=packed_vit_position_ids,
                vit_token_seqlens=vit_token_seqlens,
                padded_latent=padded_latent,
                patchified_vae_latent_shapes=patchified_vae_latent_shapes,
                packed_latent_position_ids=packed_latent_position_ids,
                packed_vae_token_indexes=packed_vae_token_indexes,
                packed_timesteps=packed_timesteps,
                mse_loss_indexes=mse_loss_indexes,
                ce_loss_indexes=ce_loss_indexes,
                packed_label_ids=packed_label_ids,
                ce_loss_weights=ce_loss_weights,
                padded_images=padded_images,
                noise=noise,
            )
            return self._forward_pack(pack, num_items_in_batch, generator, recording)

        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "Pass exactly one of input_ids and inputs_embeds (or a training pack with sequence_length)."
            )
        _check_tensors(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels,
            pixel_values=pixel_values,
            latent_pixel_values=latent_pixel_values,
        )
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        pictures = PaddedPictures(
            pixel_values, image_grid_hw, latent_pixel_values, latent_image_sizes, sample_posterior, generator
        )
        if position_ids is not None:
            axes = position_ids.shape[0] if position_ids.ndim == 3 else 1
            self._check_axes("position_ids", axes, not pictures.empty)
            position_ids = position_ids.movedim(0, -1) if position_ids.ndim == 3 else position_ids
        if pictures.empty:
            if inputs_embeds is None:
                if input_ids.shape[1] > 1 and not torch.compiler.is_compiling():
                    self.image_places(input_ids).check([], [])
                inputs_embeds = self.get_input_embeddings()(self._word_ids(input_ids))
            shape, device = inputs_embeds.shape[:2], inputs_embeds.device
            layout = PackedLayout.text(*shape, attention_mask, position_ids, past_length, device)
            inputs_embeds = self._embed(inputs_embeds, None, None)
        else:
            places = self.image_places(self._ids_of(inputs_embeds) if input_ids is None else input_ids)
            grids = self._picture_grids(places, image_grid_hw, latent_image_sizes) if position_ids is None else None
            layout = PackedLayout.from_input_ids(places, attention_mask, position_ids, past_length, grids)
            vit, latents = self._read_pictures(pictures, places)
            if inputs_embeds is None:
                inputs_embeds = self.get_input_embeddings()(self._word_ids(input_ids))
            inputs_embeds = self._embed(inputs_embeds, vit, latents)
        if use_cache is None:
            use_cache = self.config.text_config.use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config)
        output = self._decode(
            inputs_embeds, layout, attention_mask, past_key_values if use_cache else None, **recording
        )
        hidden_states = output.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.language_model.lm_head(hidden_states[:, kept])
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
            )
            loss = loss + self._no_velocity(hidden_states)
        return BagelOutput(
            loss=loss,
            logits=logits,
            last_hidden_state=hidden_states,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def predict_velocity(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        layout: PackedLayout,
        position_ids: torch.Tensor,
        past_key_values,
        plan: AttentionPlan | None = None,
    ) -> torch.Tensor:
        """
        One evaluation of the velocity field for pictures that are being drawn.

        Args:
            latents: (batch, latent tokens, patch_latent_dim) x_t, padded to the largest picture.
            t: scalar time, 1 = noise.
            layout: `PackedLayout.noisy_blocks`. position_ids: (batch, latent tokens) places in the latent table, or
                coordinates (batch, latent tokens, 2).
            past_key_values: the context, usually a `FrozenContext`.
            plan: the layout's attention plan, to make it once for all steps.

        Returns:
            Velocity, like `latents`; zero at padding.
        """
        index = layout.gen.flatten().nonzero()[:, 0]
        valid = layout.gen[:, 1 : 1 + latents.shape[1]]  # latents follow vision_start
        tokens = LatentTokens(latents[valid], t.expand(len(index)), position_ids[valid], index)
        ids = torch.full(layout.gen.shape, self.config.vision_end_token_id, device=latents.device)
        ids[:, 0] = self.config.vision_start_token_id
        inputs_embeds = self._embed(self.get_input_embeddings()(ids), None, tokens)
        plan = plan or plan_attention(self.config.text_config, layout, inputs_embeds)
        output = self.language_model.model(inputs_embeds, layout, plan, past_key_values)
        velocity = self.llm2vae(output.last_hidden_state.flatten(0, 1)[index])
        return latents.new_zeros(latents.shape).masked_scatter(valid[..., None], velocity.to(latents.dtype))

    # ---- pictures

    @torch.no_grad()
    def encode_images(
        self,
        images: Sequence[torch.Tensor],
        sample_posterior: bool = True,
        generators: Sequence[torch.Generator | None] | None = None,
    ) -> list[torch.Tensor]:
        """
        Pictures through the VAE, each at its own size.

        Args:
            images: (3, height, width) in [-1, 1], sides multiples of `latent_downsample`.
            sample_posterior: sample (released) or take the mode.
            generators: one per image; noise is drawn on the CPU.

        Returns:
            Per image (height / 16 * width / 16, patch_latent_dim) for the released model, scaled and shifted.
        """
        vae_config, tokens = self.config.vae_config, []
        cache = self.latent_cache
        posteriors = self._posteriors(images) if cache is None else cache.posteriors(images, self._posteriors)
        for number, (mean, std) in enumerate(posteriors):
            latents = mean
            if sample_posterior:
                generator = generators[number] if generators is not None else None
                eps = torch.randn((1, *mean.shape), generator=generator, dtype=torch.float32)[0]
                latents = mean + std * eps.to(device=mean.device, dtype=mean.dtype)
            latents = vae_config.scale_factor * (latents - vae_config.shift_factor)
            tokens.append(patchify_latents(latents, self.config.latent_patch_size))
        return tokens

    def _posteriors(self, images: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Mean and standard deviation per image, (z_channels, h, w). Small pictures of one size share a call."""
        same_size: dict[torch.Size, list[int]] = {}
        for number, image in enumerate(images):
            same_size.setdefault(image.shape, []).append(number)
        posteriors = [None] * len(images)
        for shape, numbers in same_size.items():
            together = max(1, PIXELS_PER_ENCODING // (shape[1] * shape[2]))
            for first in range(0, len(numbers), together):
                chunk = numbers[first : first + together]
                pixels = torch.stack([images[number] for number in chunk])
                pixels = pixels.to(device=self.vae.device, dtype=self.vae.dtype)
                with torch.autocast(self.vae.device.type, enabled=False):  # float32 in mixed precision too
                    seen = self.vae.encode(pixels).latent_dist
                for number, mean, std in zip(chunk, seen.mean, seen.std):
                    posteriors[number] = mean, std
        return posteriors

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(latent tokens, patch_latent_dim) and its (rows, columns) -> (3, height, width) in about [-1, 1], float32."""
        vae_config = self.config.vae_config
        z = unpatchify_latents(latents, grid, self.config.latent_patch_size)[None]
        z = z / vae_config.scale_factor + vae_config.shift_factor
        return self.vae.decode(z.to(device=self.vae.device, dtype=self.vae.dtype)).sample[0].float()

    def _read_pictures(
        self, pictures: PaddedPictures, places: ImagePlaces
    ) -> tuple[VitTokens | None, LatentTokens | None]:
        """Pictures of a padded batch, in the order of their places; what does not fit is refused here."""
        grids, sizes = self._vit_grids(pictures), self._latent_sizes(pictures)
        latent_grids = [self.latent_grid(*size) for size in sizes]
        places.check([rows * columns for rows, columns in grids], [rows * columns for rows, columns in latent_grids])
        vit = latents = None
        if grids:
            index = places.image.flatten().nonzero()[:, 0]
            vit = VitTokens(pictures.pixel_values, self._vit_position_ids(grids, index.device), grids, index)
        if sizes:
            index = places.latent.flatten().nonzero()[:, 0]
            images = [image[:, :height, :width] for image, (height, width) in zip(pictures.latent_pixel_values, sizes)]
            generators = None
            if pictures.generator is not None:
                generators = [
                    pictures.generator[row] if isinstance(pictures.generator, list | tuple) else pictures.generator
                    for row in picture_rows(places.latent)
                ]
            clean = torch.cat(self.encode_images(images, pictures.sample_posterior, generators)).to(index.device)
            position_ids = torch.cat([self.latent_position_ids(*grid) for grid in latent_grids]).to(index.device)
            latents = LatentTokens(clean, torch.zeros(len(clean), device=index.device), position_ids, index)
        return vit, latents

    def _vit_grids(self, pictures: PaddedPictures) -> list[tuple[int, int]]:
        if pictures.pixel_values is None:
            return []
        if not self.config.visual_und:
            raise ValueError(
                "This model was built with visual_und=False: it has no vision tower to read pictures with."
            )
        if pictures.image_grid_hw is None:
            raise ValueError("pixel_values need image_grid_hw: (ViT images, 2) rows and columns of patches.")
        grids = [(int(rows), int(columns)) for rows, columns in pictures.image_grid_hw.tolist()]
        patch_dim = self.config.vision_config.patch_dim
        described, shape = sum(rows * columns for rows, columns in grids), tuple(pictures.pixel_values.shape)
        if shape != (described, patch_dim):
            raise ValueError(
                f"image_grid_hw {grids} describes {described} patches of {patch_dim} values, but pixel_values has "
                f"shape {shape}."
            )
        return grids

    def _vit_position_ids(self, grids: list[tuple[int, int]], device: torch.device) -> torch.Tensor:
        side, interpolate_pos = self.config.vit_max_num_patch_per_side, self.config.interpolate_pos
        return torch.cat([grid_position_ids(*grid, side, interpolate_pos) for grid in grids]).to(device)

    def _latent_sizes(self, pictures: PaddedPictures) -> list[tuple[int, int]]:
        if pictures.latent_pixel_values is None:
            return []
        self.require_visual_gen("read pictures through the VAE")
        if pictures.latent_image_sizes is None:
            raise ValueError(
                "latent_pixel_values need latent_image_sizes: (VAE images, 2) heights and widths in pixels."
            )
        sizes = [(int(height), int(width)) for height, width in pictures.latent_image_sizes.tolist()]
        if len(sizes) != len(pictures.latent_pixel_values):
            raise ValueError(
                f"latent_image_sizes describes {len(sizes)} pictures, latent_pixel_values holds "
                f"{len(pictures.latent_pixel_values)}."
            )
        return sizes

    def latent_grid(self, height: int, width: int) -> tuple[int, int]:
        """
        (rows, columns) of latent tokens of a picture.

        Raises:
            ValueError: a side that is no multiple of `latent_downsample`, or more tokens than the latent table has.
        """
        stride, side = self.config.latent_downsample, self.config.max_latent_size
        for name, size in (("height", height), ("width", width)):
            if size <= 0 or size % stride:
                nearest = max(round(size / stride), 1) * stride
                raise ValueError(f"{name}={size} must be a positive multiple of {stride}; the nearest is {nearest}.")
            if size // stride > side and not self.config.interpolate_pos:
                raise ValueError(
                    f"{name}={size} needs {size // stride} latent tokens per side, max_latent_size={side} allows "
                    f'{side * stride} pixels. Use a smaller picture, or set interpolate_pos="fit".'
                )
        return height // stride, width // stride

    def latent_position_ids(self, rows: int, columns: int) -> torch.Tensor:
        return grid_position_ids(rows, columns, self.config.max_latent_size, self.config.interpolate_pos)

    def require_visual_gen(self, what: str) -> None:
        if not self.config.visual_gen:
            raise ValueError(
                f"This model was built with visual_gen=False (stage 1): it cannot {what}. Load the joint model "
                "(stage=2) for that."
            )

    # ---- tokens to features

    def _read_patches(
        self, patches: torch.Tensor, position_ids: torch.Tensor, grids: list[tuple[int, int]], **recording
    ) -> tuple[BaseModelOutput, torch.Tensor]:
        """
        -> what the tower says, and its features for the decoder (patches, hidden_size).

        Coordinates are those of the connector's table; the tower's own table may have another side.
        """
        lengths = torch.tensor([rows * columns for rows, columns in grids], device=patches.device)
        cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        weight = self.connector.fc1.weight
        places = position_ids
        if places.is_floating_point():
            sides = self.config.vision_config.table_side, self.config.vit_max_num_patch_per_side
            places = places * ((sides[0] - 1) / max(sides[1] - 1, 1))
        seen = self.vit_model(patches.to(weight.dtype), places, cu_seqlens, **recording)
        features = self.connector(seen.last_hidden_state)
        return seen, features + self.vit_pos_embed(position_ids).to(features)

    def _embed(self, text_embeds: torch.Tensor, vit: VitTokens | None, latents: LatentTokens | None) -> torch.Tensor:
        """
        Put pictures into their places, (batch, length, hidden_size) in and out.

        With gradients on, the parts without input run on nothing: their parameters get zero gradients, so data-parallel
        ranks whose batches differ in kind still agree on what takes part.
        """
        grad = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        device, flat = text_embeds.device, text_embeds.flatten(0, 1)
        nothing = torch.empty(0, dtype=torch.long, device=device)
        if vit is None and self.config.visual_und and grad:
            patches = torch.empty(0, self.config.vision_config.patch_dim, device=device)
            vit = VitTokens(patches, nothing, [], nothing)
        if latents is None and self.config.visual_gen and grad:
            x_t = torch.empty(0, self.config.patch_latent_dim, device=device)
            latents = LatentTokens(x_t, torch.empty(0, device=device), nothing, nothing)
        if vit is not None:
            _, features = self._read_patches(vit.patches, vit.position_ids, vit.grids)
            flat = flat.index_copy(0, vit.index, features.to(flat))
        if latents is not None:
            features = self.vae2llm(latents.x_t.to(self.vae2llm.weight.dtype)) + self.time_embedder(latents.t)
            features = features + self.latent_pos_embed(latents.position_ids).to(features)
            flat = flat.index_copy(0, latents.index, features.to(flat))
        return flat.unflatten(0, text_embeds.shape[:2])

    def _ids_of(self, inputs_embeds: torch.Tensor) -> torch.LongTensor:
        """Find the picture marks again in embeddings that were made with this model's table; -1 elsewhere."""
        config, table = self.config, self.get_input_embeddings()
        marks = (
            config.image_token_id,
            config.latent_token_id,
            config.vision_start_token_id,
            config.vision_end_token_id,
        )
        ids = torch.full(inputs_embeds.shape[:2], -1, device=inputs_embeds.device)
        for mark in marks:
            if mark < config.text_config.vocab_size:
                embed = table(torch.tensor(mark, device=table.weight.device)).to(inputs_embeds)
                ids[(inputs_embeds == embed).all(-1)] = mark
        return ids

    def _word_ids(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """Ids for the embedding table: places, and a pad id that lies outside the vocabulary, become 0."""
        config = self.config
        outside = (input_ids == config.image_token_id) | (input_ids == config.latent_token_id)
        if config.pad_token_id is not None and config.pad_token_id >= config.text_config.vocab_size:
            outside = outside | (input_ids == config.pad_token_id)
        return input_ids.masked_fill(outside, 0)

    def image_places(self, input_ids: torch.LongTensor) -> ImagePlaces:
        """Where pictures stand in `input_ids`."""
        config = self.config
        return ImagePlaces.of(
            input_ids,
            config.image_token_id,
            config.latent_token_id,
            config.vision_start_token_id,
            config.vision_end_token_id,
        )

    def _picture_grids(
        self,
        places: ImagePlaces,
        image_grid_hw: torch.LongTensor | None,
        latent_image_sizes: torch.LongTensor | None,
    ) -> torch.LongTensor | None:
        """(pictures, 2) rows and columns in reading order, where positions need them (`mrope_section`)."""
        if not self.config.multimodal_positions:
            return None
        vit = [] if image_grid_hw is None else image_grid_hw.tolist()
        latent = [] if latent_image_sizes is None else [self.latent_grid(*size) for size in latent_image_sizes.tolist()]
        return places.merge_grids(vit, latent)

    def _check_axes(self, name: str, axes: int, has_pictures: bool) -> None:
        """Three positions per token are for models with `mrope_section`, and pictures need them there."""
        section = self.config.text_config.mrope_section
        if axes not in (1, 3) or (axes == 3 and section is None):
            raise ValueError(
                f"{name} holds {axes} positions per token; this model takes {'1' if section is None else '1 or 3'}. "
                "Three (time, height, width) are turned on by mrope_section in text_config.rope_parameters."
            )
        if axes == 1 and section is not None and has_pictures:
            raise ValueError(
                f"{name} holds one position per token, but with mrope_section={section} pictures have three. Leave "
                "position_ids out, they are counted then; make packs with PackingRules.of(model.config)."
            )

    def _decode(
        self, inputs_embeds, layout: PackedLayout, attention_mask, past_key_values, **recording
    ) -> BaseModelOutputWithPast:
        if layout.length > 1 and not torch.compiler.is_compiling():
            text = self.config.text_config
            last, limit = int(layout.position_ids.max()), text.max_extended_positions
            if last >= limit:
                given = f"max_position_embeddings={text.max_position_embeddings}"
                extended = "" if limit == text.max_position_embeddings else f" and rope_parameters extend it to {limit}"
                takes = "those of its longer side" if self.config.multimodal_positions else "one position"
                raise ValueError(
                    f"The input reaches position {last}, but {given}{extended}: positions from there on were never "
                    f"trained. Shorten the prompt (a picture takes {takes}, a text token one each), or extend the "
                    "context: see rope_parameters of BagelTextConfig."
                )
        plan = plan_attention(
            self.config.text_config,
            layout,
            inputs_embeds,
            attention_mask,
            past_key_values,
            recording.get("output_attentions", False),
        )
        return self.language_model.model(inputs_embeds, layout, plan, past_key_values, **recording)

    # ---- training packs

    def _forward_pack(self, pack: PackedBatch, num_items, generator, recording: dict[str, bool]) -> BagelOutput:
        layout = pack.layout()
        pictures = (pack.packed_vit_token_indexes, pack.packed_vae_token_indexes)
        has_pictures = any(_as_index(index) is not None for index in pictures)
        self._check_axes("packed_position_ids", 3 if layout.position_ids.ndim == 3 else 1, has_pictures)
        text_ids = pack.packed_text_ids.new_zeros(pack.sequence_length)
        text_ids[pack.packed_text_indexes] = pack.packed_text_ids
        flow = self._noised_latents(pack, generator)
        text_embeds = self.get_input_embeddings()(text_ids[None])
        inputs_embeds = self._embed(text_embeds, self._packed_vit(pack), flow.tokens if flow else None)
        output = self._decode(inputs_embeds, layout, None, None, **recording)
        hidden_states = output.last_hidden_state[0]
        ce, mse = self._text_errors(pack, hidden_states), self._velocity_errors(pack, hidden_states, flow)
        return BagelOutput(
            loss=self._pack_loss(pack, ce, mse, num_items, hidden_states),
            ce=ce,
            mse=mse,
            last_hidden_state=hidden_states,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _pack_loss(self, pack: PackedBatch, ce, mse, num_items, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The weighted means. With `num_items` this pack's share of those of the whole step."""
        if num_items is not None and (not torch.is_tensor(num_items) or num_items.shape != (2,)):
            raise ValueError(
                f"num_items_in_batch={num_items} of a pack must be a tensor of two counts: the text labels and the "
                "learned latent tokens of the optimizer step."
            )
        num_labels, num_latents = (None, None) if num_items is None else num_items
        losses = []
        if ce is not None:
            weights = pack.ce_loss_weights if self.config.ce_loss_reweighting else None
            total, count = (ce.sum(), len(ce)) if weights is None else ((ce * weights).sum(), weights.sum())
            losses.append(self.config.ce_weight * total / (count if num_labels is None else num_labels))
        elif num_items is not None and torch.is_grad_enabled():
            # ranks of one step differ in kind: all must take part in the backward pass of the head
            losses.append(self.language_model.lm_head(hidden_states[:0]).sum())
        if mse is not None:
            per_token = mse.mean(-1)
            losses.append(self.config.mse_weight * per_token.sum() / (len(mse) if num_latents is None else num_latents))
        if losses and mse is None:
            losses.append(self._no_velocity(hidden_states))
        return sum(losses) if losses else None

    def _no_velocity(self, hidden_states: torch.Tensor) -> torch.Tensor | float:
        """Zero, through the velocity head: a batch without latents still gives its parameters a (zero) gradient."""
        return self.llm2vae(hidden_states[:0]).sum() if self.config.visual_gen and torch.is_grad_enabled() else 0.0

    def _packed_vit(self, pack: PackedBatch) -> VitTokens | None:
        index = _as_index(pack.packed_vit_token_indexes)
        if index is None:
            return None
        if not self.config.visual_und:
            raise ValueError("The pack holds ViT tokens, but this model was built with visual_und=False.")
        if pack.packed_vit_tokens is None or pack.vit_token_seqlens is None or pack.packed_vit_position_ids is None:
            raise ValueError(
                "packed_vit_token_indexes need packed_vit_tokens, packed_vit_position_ids and vit_token_seqlens."
            )
        lengths = [int(n) for n in pack.vit_token_seqlens]
        counts = {len(index), len(pack.packed_vit_tokens), len(pack.packed_vit_position_ids), sum(lengths)}
        if len(counts) != 1:
            raise ValueError(
                f"The pack has {len(index)} packed_vit_token_indexes, {len(pack.packed_vit_tokens)} packed_vit_tokens, "
                f"{len(pack.packed_vit_position_ids)} packed_vit_position_ids and vit_token_seqlens {lengths}; all "
                "must count the same tokens."
            )
        grids = [(1, length) for length in lengths]  # positions come with the pack; only the lengths matter
        return VitTokens(pack.packed_vit_tokens, pack.packed_vit_position_ids, grids, index)

    def _noised_latents(self, pack: PackedBatch, generator) -> "NoisedLatents | None":
        """Clean latents of the pack, brought to their timesteps."""
        index = _as_index(pack.packed_vae_token_indexes)
        if index is None:
            return None
        self.require_visual_gen("train on latents")
        shapes = [(int(h), int(w)) for h, w in pack.patchified_vae_latent_shapes]
        patch = self.config.latent_patch_size
        if pack.padded_latent is not None:
            crops = [x[:, : h * patch, : w * patch] for x, (h, w) in zip(pack.padded_latent, shapes)]
            clean = torch.cat([patchify_latents(crop, patch) for crop in crops])
        elif pack.padded_images is not None:
            stride = self.config.latent_downsample
            images = [x[:, : h * stride, : w * stride] for x, (h, w) in zip(pack.padded_images, shapes)]
            clean = torch.cat(self.encode_images(images, True, [generator] * len(images)))
        else:
            raise ValueError("packed_vae_token_indexes need padded_latent, or padded_images for the model's own VAE.")
        clean = clean.to(device=index.device, dtype=torch.float32)
        if len(clean) != len(index) or len(pack.packed_timesteps) != len(index):
            raise ValueError(
                f"The pack has {len(index)} packed_vae_token_indexes, latents of {len(clean)} tokens "
                f"(patchified_vae_latent_shapes {shapes}) and {len(pack.packed_timesteps)} packed_timesteps; all must "
                "count the same tokens."
            )
        noise = torch.randn_like(clean) if pack.noise is None else pack.noise.to(clean)
        t = training_timesteps(pack.packed_timesteps, self.config.timestep_shift)
        x_t = interpolate(clean, noise, t[:, None])
        tokens = LatentTokens(x_t, t, pack.packed_latent_position_ids, index)
        return NoisedLatents(tokens, velocity_target(clean, noise))

    def _text_errors(self, pack: PackedBatch, hidden_states: torch.Tensor) -> torch.Tensor | None:
        index = _as_index(pack.ce_loss_indexes)
        if index is None:
            return None
        if pack.packed_label_ids is None or len(pack.packed_label_ids) != len(index):
            labels = 0 if pack.packed_label_ids is None else len(pack.packed_label_ids)
            raise ValueError(f"{len(index)} ce_loss_indexes for {labels} packed_label_ids.")
        logits = self.language_model.lm_head(hidden_states[index])
        return nn.functional.cross_entropy(logits.float(), pack.packed_label_ids, reduction="none")

    def _velocity_errors(
        self, pack: PackedBatch, hidden_states: torch.Tensor, flow: "NoisedLatents | None"
    ) -> torch.Tensor | None:
        index = _as_index(pack.mse_loss_indexes)
        if index is None or flow is None:
            return None
        target = flow.velocity[flow.tokens.t > 0]
        if len(target) != len(index):
            raise ValueError(
                f"{len(index)} mse_loss_indexes, but {len(target)} latent tokens have a timestep above 0; both must "
                "name the same tokens, in the same order."
            )
        return (self.llm2vae(hidden_states[index]).float() - target) ** 2


class NoisedLatents(NamedTuple):
    """Latent tokens at their timesteps, and the velocity the model should predict there."""

    tokens: LatentTokens
    velocity: torch.Tensor


def build_vae(config: BagelVAEConfig) -> nn.Module:
    """`diffusers.AutoencoderKL` with the architecture of the released autoencoder."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError(
            "Drawing pictures needs diffusers (`pip install diffusers`). Without it, load with stage=1 to read only."
        ) from error
    levels = len(config.ch_mult)
    return AutoencoderKL(
        in_channels=config.in_channels,
        out_channels=config.out_ch,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.ch * multiplier for multiplier in config.ch_mult),
        layers_per_block=config.num_res_blocks,
        latent_channels=config.z_channels,
        norm_num_groups=config.norm_num_groups,
        sample_size=config.resolution,
        scaling_factor=config.scale_factor,
        shift_factor=config.shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _check_tensors(**tensors: torch.Tensor | None) -> None:
    """One device, ids as integers, features as floats: anything else is refused by name."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    devices = {name: tensor.device for name, tensor in given.items()}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"Inputs lie on different devices: {where}. Move them together: `inputs.to(model.device)`.")
    for name, tensor in given.items():
        floats = name in ("inputs_embeds", "pixel_values", "latent_pixel_values")
        if floats != tensor.is_floating_point() and not (name == "attention_mask" and tensor.ndim == 4):
            raise ValueError(
                f"{name} has dtype {tensor.dtype}; it must be {'a floating' if floats else 'an integer'} type."
            )


def _gen_norm(config: BagelTextConfig, present: bool) -> nn.Module | None:
    return Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if present else None


def _as_index(index: torch.Tensor | None) -> torch.LongTensor | None:
    """Released packs give indexes, bool masks or an empty float tensor; `None` = nothing there."""
    if index is None or index.numel() == 0:
        return None
    index = index.nonzero()[:, 0] if index.dtype == torch.bool else index.long()
    return index if index.numel() else None


BagelForUnifiedMultimodal.register_for_auto_class("AutoModel")  # the others are in the config's auto_map

__all__ = ["BagelForUnifiedMultimodal", "BagelOutput", "BagelPreTrainedModel", "BagelTextModel", "build_vae"]
