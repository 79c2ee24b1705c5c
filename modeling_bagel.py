# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""BAGEL: one decoder that reads text and images and writes both. The models, their inputs' encoders, heads and losses.

Training, reading, writing and drawing are one run: `Inputs` -> `embed` -> `decode` -> heads.

Axes: (batch, length, hidden_size); a training pack is a batch of one row. t = 1 is noise, t = 0 the image.
"""

import difflib
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple, logging
from typing_extensions import Unpack

from .attention_bagel import AttentionSpec, kernel_kwargs, prepare_attention
from .checkpoint_bagel import (
    check_checkpoint,
    ids_outside,
    overridden_ids,
    refuse_missing_weights,
    released_vae_names,
    switched_off_parts,
)
from .configuration_bagel import BagelConfig, _prepare_config_for_stage, _stage_to_int  # noqa: F401
from .decoder_bagel import BagelLanguageModel, BagelPreTrainedModel, BagelTextModel, VelocityHead, warn_of_positions
from .embeddings_bagel import BagelGridPositionEmbedding, BagelTimestepEmbedding, vit_position_ids
from .flow_bagel import BagelLatentMixin, build_vae
from .generation_bagel import BagelGenerationMixin, DrawingContext
from .inputs_bagel import (
    BagelKwargs,
    ImageTensors,
    Inputs,
    LatentTokens,
    PaddedBatch,
    Targets,
    VitTokens,
    check_patches,
)
from .layout_bagel import LongTensor, around, check_tensors
from .lora_bagel import BagelAdapterMixin, refuse_prompt_learning
from .modeling_siglip_navit import SiglipVisionModel


ROWS_ARE_PADDED_TO = 64  # a vocabulary table of a multiple of this many rows may hold padding


logger = logging.get_logger(__name__)


@dataclass
class BagelOutput(ModelOutput):
    """
    Outputs for both input formats; what does not apply is `None`.

    Args:
        loss: scalar. Padded batches: language-model loss of `labels`. Packs:
            `ce_weight * mean(ce) + mse_weight * mean(mse)`.
        logits: (batch, kept length, vocab_size). Packs: only with `labels` and without gradients, at the tokens that
            predict a text label and those after them, (1, tokens, vocab_size).
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


class BagelConnector(nn.Module):
    """Two-layer MLP from vision features to decoder features."""

    def __init__(self, in_features: int, out_features: int, hidden_act: str):
        super().__init__()
        self.activation_fn = ACT2FN[hidden_act]
        self.fc1 = nn.Linear(in_features, out_features)
        self.fc2 = nn.Linear(out_features, out_features)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class BagelModel(BagelLatentMixin, BagelPreTrainedModel):
    """
    Everything but the heads: decoder, vision tower, VAE, and what turns their features into the decoder's.

    Parameter names and shapes are those of the released `ema.safetensors`; the VAE is under `vae` with the names of
    `diffusers.AutoencoderKL`. It is built for `visual_gen` only, always frozen, and the one part that needs diffusers.
    """

    has_heads = False

    def __init__(self, config: BagelConfig):
        _prepare_config_for_stage(config)
        super().__init__(config)
        text = config.text_config
        self.language_model = BagelLanguageModel(text, has_head=self.has_heads)
        if config.visual_gen:
            self.time_embedder = BagelTimestepEmbedding(text.hidden_size)
            self.vae2llm = nn.Linear(config.patch_latent_dim, text.hidden_size)
            if self.has_heads:
                self.llm2vae = VelocityHead(text.hidden_size, config.patch_latent_dim)
            self.latent_pos_embed = BagelGridPositionEmbedding(config.max_latent_size, text.hidden_size)
            self.vae = build_vae(config.vae_config).float()  # stays float32 in a bfloat16 model, as it is released
        if config.visual_und:
            vision = config.vision_config
            self.vit_model = SiglipVisionModel(vision, config.num_vit_layers)
            _convert_patch_embedding_for_packed_vit(self, config)
            self.connector = BagelConnector(vision.hidden_size, text.hidden_size, config.connector_act)
            self.vit_pos_embed = BagelGridPositionEmbedding(config.vit_max_num_patch_per_side, text.hidden_size)
        self._keys_to_ignore_on_load_unexpected = switched_off_parts(config, self.has_heads)
        self.post_init()
        # its own blocks; diffusers names some that this autoencoder has not, and wrapping policies look for each
        parts = {"SiglipEncoderLayer": config.visual_und, "AutoencoderKL": config.visual_gen}
        self._no_split_modules = {"BagelDecoderLayer", *(name for name, present in parts.items() if present)}
        self.freeze_vae()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """
        As everywhere in transformers, and strict: tensors that are missing, misshapen or not of this model are an error
        that names them, before anything large is read; not with `output_loading_info` or a `state_dict`.

        Raises:
            OSError: the folder holds no safetensors weights (pickles are refused), or a truncated file.
            ValueError: tensors are missing, have another shape, or belong to another model.
        """
        want_info = kwargs.pop("output_loading_info", False)
        strict = not want_info and kwargs.get("state_dict") is None
        config, kwargs = check_checkpoint(cls, pretrained_model_name_or_path, config, kwargs, strict)
        with released_vae_names(cls.__name__, config.vae_config):
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *args, config=config, output_loading_info=True, **kwargs
            )
            model, info = loaded
        if strict:
            refuse_missing_weights(model, pretrained_model_name_or_path, info, kwargs)
        model.freeze_vae()
        if kwargs.get("generation_config") is None:  # the stored one knows nothing of overrides
            for name, value in overridden_ids(config, pretrained_model_name_or_path, kwargs).items():
                setattr(model.generation_config, name, value)
        return (model, info) if want_info else model

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

    @classmethod
    def supports_config(cls, config: PreTrainedConfig) -> bool:
        """Whether this class can be built from `config`."""
        return getattr(config, "model_type", None) == BagelConfig.model_type

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.model.embed_tokens = cast(nn.Embedding, value)

    def get_decoder(self) -> BagelTextModel:
        return self.language_model.model

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """
        The vision tower for "image"; otherwise the model itself, as in transformers.

        Raises:
            ValueError: an unknown modality.
        """
        if modality not in (None, "image", "video", "audio"):
            raise ValueError(f'modality={modality!r} is unknown; it is "image", "video", "audio" or None.')
        return self.vit_model if modality == "image" and self.config.visual_und else self

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grid_hw: LongTensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        What the decoder reads of images.

        Args:
            pixel_values: (patches, patch_dim) of all images. image_grid_hw: (images, 2) rows and columns of patches.
            kwargs: the other inputs of a batch, not used here.

        Returns:
            `last_hidden_state` (patches, vision hidden_size) of the tower; `pooler_output` per image (rows * columns,
            hidden_size) after connector and position table.
        """
        vision, grids = self.config.vision_config, check_patches(self.config, pixel_values, image_grid_hw)
        lengths = [rows * columns for rows, columns in grids]
        position_ids = vit_position_ids(self.config, grids).to(pixel_values.device)
        seen, features = self._read_patches(
            VitTokens(pixel_values, position_ids, lengths, position_ids),
            output_hidden_states=vision.output_hidden_states if output_hidden_states is None else output_hidden_states,
            output_attentions=vision.output_attentions if output_attentions is None else output_attentions,
        )
        return BaseModelOutputWithPooling(
            last_hidden_state=seen.last_hidden_state,
            pooler_output=cast(Any, features.split(lengths)),
            hidden_states=seen.hidden_states,
            attentions=seen.attentions,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_hw: LongTensor | None = None,
        latent_pixel_values: torch.Tensor | None = None,
        latent_image_sizes: LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[BagelKwargs],  # pyright: ignore[reportGeneralTypeIssues]  position_ids is in both
    ) -> BaseModelOutputWithPast:
        """Arguments as in [`BagelForUnifiedMultimodal.forward`]; `last_hidden_state` (batch, length, hidden_size)."""
        options = check_kwargs(kwargs)
        images = ImageTensors(pixel_values, image_grid_hw, latent_pixel_values, latent_image_sizes)
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        batch = PaddedBatch(input_ids, attention_mask, position_ids, past_length, inputs_embeds, images)
        inputs = self.prepare_inputs(batch, options)
        output = self.run(inputs, past_key_values, use_cache, options)
        if hasattr(self, "llm2vae") and torch.is_grad_enabled():  # the base of a whole model, see `base_model`
            hidden_states = cast(torch.Tensor, output.last_hidden_state)
            output.last_hidden_state = hidden_states + self.llm2vae(hidden_states[:0]).sum()  # type: ignore
        return output

    # ---- one run: inputs -> embed -> decode

    def prepare_inputs(self, batch: PaddedBatch, options: Mapping[str, Any]) -> Inputs:
        """
        Either input format as `Inputs`.

        Raises:
            ValueError: inputs that contradict each other; the message says which and by how much.
        """
        generator = options.get("generator")
        if "sequence_length" in options:
            return Inputs.from_pack(self.config, self.encode_images, options, generator)
        if (batch.input_ids is None) == (batch.inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds (or a training pack, sequence_length).")
        check_tensors(
            input_ids=batch.input_ids,
            inputs_embeds=batch.inputs_embeds,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            labels=options.get("labels"),
            pixel_values=batch.images.pixel_values,
            latent_pixel_values=batch.images.latent_pixel_values,
        )
        posterior = {"sample_posterior": bool(options.get("sample_posterior")), "generator": generator}
        paged, prompt = "cache" in options, options.get("prompt")
        batch = batch._replace(images=batch.images._replace(**posterior), prompt=prompt, paged=paged)
        if batch.inputs_embeds is not None and not batch.images.empty:
            batch = batch._replace(input_ids=self._ids_of(batch.inputs_embeds))
        inputs = Inputs.from_padded(self.config, self.encode_images, batch)
        if len(options.get("cu_seq_lens_q", ())) > 2 and inputs.layout.causal and not paged:
            raise ValueError(
                f"cu_seq_lens_q={options['cu_seq_lens_q'].tolist()} names several samples, position_ids only one: pass "
                "position_ids that start again from 0 with every sample (DataCollatorWithFlattening makes them)."
            )
        return inputs

    def run(
        self, inputs: Inputs, past_key_values: Cache | None, use_cache: bool | None, options: Mapping[str, Any]
    ) -> BaseModelOutputWithPast:
        """Embed and decode; with `use_cache` a cache is made if none is given. Packs never use one."""
        if use_cache is None:
            use_cache = self.config.text_config.use_cache
        if use_cache and past_key_values is None and inputs.targets is None:
            past_key_values = DynamicCache(config=self.config.text_config)
        if past_key_values is not None and any(past_key_values.is_sliding):
            raise ValueError(
                f"{type(past_key_values).__name__} keeps a sliding window of the context, and BAGEL attends to all of "
                "it: make the cache with config=model.config."
            )
        recording = {
            name: getattr(self.config, name) if options.get(name) is None else options[name]
            for name in ("output_attentions", "output_hidden_states")
        }
        if inputs.layout.length > 1 and not torch.compiler.is_compiling():
            warn_of_positions(self.config, inputs.layout)
        embeds = self.embed(inputs)
        if "cache" in options:
            attention = AttentionSpec(inputs.attention_mask, options["is_causal"])
        else:
            attention = prepare_attention(
                self.config.text_config,
                inputs.layout,
                embeds,
                inputs.attention_mask,
                past_key_values,
                recording["output_attentions"],
            )
        for_kernel = kernel_kwargs(options, inputs.layout)
        return self.language_model.model(embeds, inputs.layout, attention, past_key_values, **recording, **for_kernel)

    def embed(self, inputs: Inputs) -> torch.Tensor:
        """
        Features of every token, (batch, length, hidden_size).

        With gradients on, parts without input run on nothing: their parameters get zero gradients, so data-parallel
        ranks whose batches differ in kind still agree on what takes part.
        """
        embeds = inputs.text_embeds
        if embeds is None:
            embeds = self.get_input_embeddings()(inputs.text_ids)
        vit, latents = inputs.vit, inputs.latents
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            vit, latents = self._or_nothing(vit, latents, embeds.device)
        flat = embeds.flatten(0, 1)
        if vit is not None:
            _, features = self._read_patches(vit)
            flat = flat.index_copy(0, vit.index, features.to(flat))
        if latents is not None:
            features = self.vae2llm(latents.x_t.to(self.vae2llm.weight.dtype)) + self.time_embedder(latents.t)
            features = features + self.latent_pos_embed(latents.position_ids).to(features)
            flat = flat.index_copy(0, latents.index, features.to(flat))
        return flat.unflatten(0, embeds.shape[:2])

    def _or_nothing(
        self, vit: VitTokens | None, latents: LatentTokens | None, device: torch.device
    ) -> tuple[VitTokens | None, LatentTokens | None]:
        """Empty inputs for parts that have none."""
        nothing = torch.empty(0, dtype=torch.long, device=device)
        if vit is None and self.config.visual_und:
            patches = torch.empty(0, self.config.vision_config.patch_dim, device=device)
            vit = VitTokens(patches, nothing, [], nothing)
        if latents is None and self.config.visual_gen:
            x_t = torch.empty(0, self.config.patch_latent_dim, device=device)
            latents = LatentTokens(x_t, torch.empty(0, device=device), nothing, nothing)
        return vit, latents

    def _read_patches(self, vit: VitTokens, **recording) -> tuple[BaseModelOutput, torch.Tensor]:
        """
        -> what the tower says, and its features for the decoder (patches, hidden_size).

        Coordinates are those of the connector's table; the tower's own table may have another side.
        """
        lengths = torch.tensor(vit.lengths, device=vit.patches.device)
        cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        entries = vit.position_ids
        if entries.is_floating_point():
            sides = self.config.vision_config.table_side, self.config.vit_max_num_patch_per_side
            entries = entries * ((sides[0] - 1) / max(sides[1] - 1, 1))
        seen = self.vit_model(vit.patches.to(self.connector.fc1.weight.dtype), entries, cu_seqlens, **recording)
        features = self.connector(seen.last_hidden_state)
        return seen, features + self.vit_pos_embed(vit.position_ids).to(features)

    def _ids_of(self, inputs_embeds: torch.Tensor) -> LongTensor:
        """Find the marks of images again in embeddings that were made with this model's table; -1 elsewhere."""
        config, table = self.config, self.language_model.model.embed_tokens
        marks = ("image_token_id", "latent_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = torch.full(inputs_embeds.shape[:2], -1, device=inputs_embeds.device)
        for mark in (getattr(config, name) for name in marks):
            if mark < config.text_config.vocab_size:
                embed = table(torch.tensor(mark, device=table.weight.device)).to(inputs_embeds)
                ids[(inputs_embeds == embed).all(-1)] = mark
        return ids


class BagelForUnifiedMultimodal(BagelAdapterMixin, BagelModel, BagelGenerationMixin):
    """
    The whole model: reads text and images, writes text (`generate`) and draws images (`generation_mode="image"`).
    """

    output_modalities = ("text", "image")
    has_heads = True
    _tied_weights_keys = {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}
    accepts_loss_kwargs = True

    def __init__(self, config: BagelConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"

    @property
    def base_model(self) -> BagelModel:
        """
        The same modules without the heads: its `forward` returns hidden states and computes no logits.

        A new view every time, with this model's parts of that moment; with gradients on, the velocity head takes part
        with a zero gradient, as in this model's own losses.
        """
        base = BagelModel.__new__(BagelModel)
        own = {name: value for name, value in vars(self).items() if name not in ("forward", "_old_forward", "_hf_hook")}
        hooks = {name: value for name, value in vars(nn.Module()).items() if "hook" in name}  # those of the root
        base.__dict__.update(own | hooks)
        return base

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

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.lm_head = cast(nn.Linear, new_embeddings)

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

    @can_return_tuple
    def forward(
        self,
        input_ids: LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_hw: LongTensor | None = None,
        latent_pixel_values: torch.Tensor | None = None,
        latent_image_sizes: LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[BagelKwargs],  # pyright: ignore[reportGeneralTypeIssues]  position_ids is in both
    ) -> BagelOutput:
        r"""
        A padded batch (the arguments below), or a training pack (`sequence_length` and the others of
        [`~inputs_bagel.PackKwargs`]).

        Args:
            input_ids: (batch, length); images are marked by runs of `image_token_id` (ViT) and `latent_token_id`
                (VAE) between vision_start and vision_end. attention_mask: (batch, past + length), 0 = padding.
            position_ids: (batch, length), or with `mrope_section` (3, batch, length) time, height and width; counted
                from `input_ids` if absent, see [`~BagelGenerationMixin.get_rope_index`].
            inputs_embeds: (batch, length, hidden_size).
            labels: (batch, length), -100 = ignored; shifted here (`shift_labels`: shifted already).
            pixel_values: (ViT patches of the batch, patch_dim). image_grid_hw: (ViT images, 2) in patches.
            latent_pixel_values: (VAE images, 3, H, W) in [-1, 1], zero-padded to the largest. latent_image_sizes:
                (VAE images, 2) height and width in pixels; each image is encoded at its own size.
            kwargs: of [`~inputs_bagel.BagelKwargs`]. `num_items_in_batch`: labels to divide by, if not those of this
                batch. For a pack (2,), the labels (or the sum of their weights) and the learned latent tokens of the
                whole optimizer step; or their sum, as the stock `Trainer` counts it: the means of a pack then count as
                much as it has learned tokens.

        Returns:
            [`BagelOutput`].

        Raises:
            TypeError: an unknown argument. ValueError: inputs that contradict each other; the message says which and
                by how much.
        """
        options = check_kwargs(kwargs) | ({} if labels is None else {"labels": labels})
        images = ImageTensors(pixel_values, image_grid_hw, latent_pixel_values, latent_image_sizes)
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        batch = PaddedBatch(input_ids, attention_mask, position_ids, past_length, inputs_embeds, images)
        inputs = self.prepare_inputs(batch, options)
        output = self.run(inputs, past_key_values, use_cache, options)
        hidden_states = output.last_hidden_state
        assert hidden_states is not None
        if inputs.targets is not None:
            loss, ce, mse = self._learn(inputs.targets, hidden_states[0], options.get("num_items_in_batch"))
            return BagelOutput(
                loss=loss,
                logits=self._evaluated_logits(inputs.targets, hidden_states, labels),
                ce=ce,
                mse=mse,
                last_hidden_state=hidden_states[0],
                hidden_states=output.hidden_states,
                attentions=output.attentions,
            )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.language_model.lm_head(hidden_states[:, kept])
        return BagelOutput(
            loss=self._text_loss(logits, hidden_states, options),
            logits=logits,
            last_hidden_state=hidden_states,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def predict_velocity(self, x_t: torch.Tensor, t: torch.Tensor, context: DrawingContext) -> torch.Tensor:
        """
        One evaluation of the velocity field for images that are being drawn.

        Args:
            x_t: (batch, latent tokens, patch_latent_dim), padded to the largest image. t: scalar time, 1 = noise.
            context: what the images are drawn under, see `drawing_context`.

        Returns:
            Velocity, like `x_t`; zero at padding.

        Raises:
            ValueError: under an adapter of PEFT's prompt learning.
        """
        refuse_prompt_learning(self)
        inputs = Inputs.to_draw(self.config, context.layout, x_t, t, context.position_ids)
        decoder, embeds = self.language_model.model, self.embed(inputs)
        output = decoder(embeds, context.layout, context.attention, context.cache, context.routing)
        hidden_states, valid = output.last_hidden_state, context.layout.gen[:, 1 : 1 + x_t.shape[1]]
        velocity = self.llm2vae(hidden_states.flatten(0, 1)[context.layout.gen.flatten()])
        return x_t.new_zeros(x_t.shape).masked_scatter(valid[..., None], velocity.to(x_t.dtype))

    # ---- losses

    def _text_loss(self, logits: torch.Tensor, hidden_states: torch.Tensor, options: Mapping) -> torch.Tensor | None:
        """Of a padded batch with labels."""
        labels, shift_labels = options.get("labels"), options.get("shift_labels")
        if labels is None and shift_labels is None:
            return None
        loss = self.loss_function(
            logits=logits,
            labels=labels,
            vocab_size=self.config.text_config.vocab_size,
            num_items_in_batch=options.get("num_items_in_batch"),
            shift_labels=shift_labels,
        )
        return loss + self._no_velocity(hidden_states)

    def _learn(
        self, targets: Targets, hidden_states: torch.Tensor, num_items: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Loss of a pack, and its unreduced errors as in the released code: (labels,), (tokens, patch_latent_dim)."""
        ce = mse = None
        if targets.label_index is not None and targets.labels is not None:
            logits = self.language_model.lm_head(hidden_states[targets.label_index])
            ce = nn.functional.cross_entropy(logits.float(), targets.labels, reduction="none")
        if targets.velocity_index is not None:
            mse = (self.llm2vae(hidden_states[targets.velocity_index]).float() - targets.velocity) ** 2
        return self._pack_loss(targets, ce, mse, num_items, hidden_states), ce, mse

    def _pack_loss(
        self,
        targets: Targets,
        ce: torch.Tensor | None,
        mse: torch.Tensor | None,
        num_items: torch.Tensor | None,
        hidden_states: torch.Tensor,
    ) -> torch.Tensor | None:
        """The weighted means; with `num_items` this pack's share of those of the whole step."""
        share, counts = 1.0, (None, None)
        if num_items is not None:
            num_items = torch.as_tensor(num_items)
            if num_items.numel() not in (1, 2):
                raise ValueError(
                    f"num_items_in_batch={num_items} of a pack must be two counts, the text labels and the learned "
                    "latent tokens of the optimizer step, or their sum."
                )
            if num_items.numel() == 2:
                counts = num_items
            else:
                learned = sum(0 if errors is None else len(errors) for errors in (ce, mse))
                share = learned / num_items.to(hidden_states.device)
        num_labels, num_latents = counts
        losses = []
        if ce is not None:
            weights = targets.label_weights if self.config.ce_loss_reweighting else None
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
        return sum(losses[1:], losses[0]) * share if losses else None

    def _evaluated_logits(
        self, targets: Targets, hidden_states: torch.Tensor, labels: LongTensor | None
    ) -> torch.Tensor | None:
        """Of a pack, where `labels` of [`~packing_bagel.with_labels`] are; for metrics, so without gradients only."""
        if labels is None or torch.is_grad_enabled():
            return None
        index = targets.label_index
        if index is None:
            kept = hidden_states[:, :0]
        else:  # after the last token of a pack none is left, and its logits predict nothing
            kept = hidden_states[:, around(index).clamp(max=hidden_states.shape[1] - 1)]
        if kept.shape[1] != labels.shape[-1]:
            raise ValueError(f"labels of a pack hold {labels.shape[-1]} tokens, its ce_loss_indexes {kept.shape[1]}.")
        return self.language_model.lm_head(kept)

    def _no_velocity(self, hidden_states: torch.Tensor) -> torch.Tensor | float:
        """Zero, through the velocity head: a batch without latents still gives its parameters a (zero) gradient."""
        return self.llm2vae(hidden_states[:0]).sum() if self.config.visual_gen and torch.is_grad_enabled() else 0.0


def _convert_patch_embedding_for_packed_vit(model: BagelModel, config: BagelConfig) -> None:
    """Make SigLIP's patch embedding the linear layer that BAGEL checkpoints store."""
    model.vit_model.vision_model.embeddings.convert_conv2d_to_linear(config.vision_config)


def check_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """
    The arguments that are given (not `None`).

    Raises:
        TypeError: a name that `forward` does not have, with the nearest one that it has.
    """
    known = BagelKwargs.__optional_keys__
    for name in kwargs:
        if name not in known:
            named = inspect.signature(BagelForUnifiedMultimodal.forward).parameters
            nearest = difflib.get_close_matches(name, [*named, *known], 1)
            hint = f" Did you mean {nearest[0]}?" if nearest else ""
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}.{hint}")
    return {name: value for name, value in kwargs.items() if value is not None}


BagelForUnifiedMultimodal.register_for_auto_class("AutoModel")  # the others are in the config's auto_map

__all__ = [
    "BagelForUnifiedMultimodal",
    "BagelModel",
    "BagelOutput",
    "BagelPreTrainedModel",
    "BagelTextModel",
    "build_vae",
]
