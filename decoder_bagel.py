# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The decoder: which expert computes which token, attention and blocks with two sets of weights, the text model.

It takes embeddings and a layout, never ids or images. Every norm, projection and MLP may have a sibling for the gen
expert; all tokens meet in one attention.

Axes: (batch, length, hidden_size); a training pack is a batch of one row. While tokens are sorted by expert:
(1, batch * length, hidden_size), und tokens first.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm, eager_attention_forward
from transformers.utils import is_torchvision_available, logging
from transformers.utils.output_capturing import capture_outputs

from .attention_bagel import AttentionSpec, attend
from .configuration_bagel import BagelConfig, BagelTextConfig
from .embeddings_bagel import BagelGridPositionEmbedding, BagelTextRotaryEmbedding, rotate_halves, rotate_pairs
from .layout_bagel import BoolTensor, LongTensor, PackedLayout, rounds_sizes


logger = logging.get_logger(__name__)

ROWS_STEP = 64  # what the number of tokens of an expert is rounded up to, see `layout_bagel.rounds_sizes`


# --------------------------------------------------------------------------------------------------------------------
# Routing


class _StopGradient(torch.autograd.Function):
    """The identity with a zero gradient: released `freeze_und` leaves gradients of zero, not absent ones."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.zeros_like(grad)


class Routing(NamedTuple):
    """
    Which tokens run through which expert.

    With tokens of both kinds they are sorted once per forward, und first, so that each expert works on one contiguous
    slice; attention restores their order. With und tokens alone nothing is moved. At rounded sizes some tokens are
    repeated in `order` as fillers, which `restore` leaves out.

    Attributes:
        order: flat token indices, und first; `None` = nothing is moved.
        inverse: (batch * length,) the way back.
        num_und: tokens of the und expert along dim 1; `None` = all.
        shape: (batch, length) before sorting.
        touch_gen: run the gen expert on its empty slice, so that its parameters take part in the backward pass (their
            gradients are zero; data-parallel training waits for every parameter).
        freeze_und: no gradient through the und expert.
    """

    order: LongTensor | None = None
    inverse: LongTensor | None = None
    num_und: int | None = None
    shape: tuple[int, int] | None = None
    touch_gen: bool = False
    freeze_und: bool = False

    @classmethod
    def of(cls, gen: BoolTensor | None, freeze_und: bool = False) -> "Routing":
        """`gen` is the layout's column, `None` when it is known to be empty."""
        if gen is None or (num_gen := int(gen.sum())) == 0:
            return cls(touch_gen=torch.is_grad_enabled(), freeze_und=freeze_und)
        order = torch.argsort(gen.flatten().to(torch.uint8), stable=True)
        inverse, num_und = torch.argsort(order), gen.numel() - num_gen
        if rounds_sizes(gen):
            und, gen_order = order.split([num_und, num_gen])
            fillers = -num_und % ROWS_STEP
            order = torch.cat([und, order[:1].expand(fillers), gen_order, order[-1:].expand(-num_gen % ROWS_STEP)])
            inverse, num_und = inverse + fillers * (inverse >= num_und), num_und + fillers
        return cls(order, inverse, num_und, (gen.shape[0], gen.shape[1]), freeze_und=freeze_und)

    def sort(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, length, ...) -> (1, tokens and fillers, ...) by expert."""
        return hidden if self.order is None else hidden.flatten(0, 1)[self.order.to(hidden.device)][None]

    def restore(self, hidden: torch.Tensor) -> torch.Tensor:
        """The inverse of `sort`."""
        if self.inverse is None or self.shape is None:
            return hidden
        return hidden[0][self.inverse.to(hidden.device)].unflatten(0, self.shape)

    def freeze(self, hidden_und: torch.Tensor) -> torch.Tensor:
        """Stop the gradient of und tokens, if `freeze_und`."""
        return _StopGradient.apply(hidden_und) if self.freeze_und else hidden_und

    def freeze_und_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same for the und slice of sorted hidden states."""
        if not self.freeze_und or self.order is None:
            return self.freeze(hidden)
        return torch.cat([self.freeze(hidden[:, : self.num_und]), hidden[:, self.num_und :]], dim=1)

    def run(self, hidden: torch.Tensor, und: nn.Module, gen: nn.Module | None) -> torch.Tensor:
        """Each expert on its slice. `gen=None` is a module that both kinds share."""
        if gen is None:
            return und(hidden)
        if self.order is None:
            out = self.freeze(und(hidden))
            return torch.cat([out, gen(hidden[:, :0])], dim=1) if self.touch_gen else out
        return torch.cat([self.freeze(und(hidden[:, : self.num_und])), gen(hidden[:, self.num_und :])], dim=1)


# --------------------------------------------------------------------------------------------------------------------
# Block


class BagelAttention(nn.Module):
    """
    Qwen2 attention with an optional second set of projections and norms for the gen expert.

    Every projection runs per expert; queries, keys and values of all tokens then meet in one attention.

    Args:
        config (`BagelTextConfig`): the decoder.
        layer_idx (`int`): layer of the cache.
        has_gen (`bool`): own the gen siblings (MoT layers).
    """

    def __init__(self, config: BagelTextConfig, layer_idx: int, has_gen: bool):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        num_key_value_heads = config.num_key_value_heads or config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        q_size, kv_size = config.num_attention_heads * self.head_dim, num_key_value_heads * self.head_dim
        for suffix in ("", "_moe_gen") if has_gen else ("",):
            setattr(self, f"q_proj{suffix}", nn.Linear(config.hidden_size, q_size, bias=True))
            setattr(self, f"k_proj{suffix}", nn.Linear(config.hidden_size, kv_size, bias=True))
            setattr(self, f"v_proj{suffix}", nn.Linear(config.hidden_size, kv_size, bias=True))
            setattr(self, f"o_proj{suffix}", nn.Linear(q_size, config.hidden_size, bias=False))
            if config.qk_norm:
                setattr(self, f"q_norm{suffix}", Qwen2RMSNorm(self.head_dim, eps=config.rms_norm_eps))
                setattr(self, f"k_norm{suffix}", Qwen2RMSNorm(self.head_dim, eps=config.rms_norm_eps))

    def _experts(self, name: str) -> tuple[nn.Module, nn.Module | None]:
        return getattr(self, name), getattr(self, f"{name}_moe_gen", None)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        routing: Routing,
        attention: AttentionSpec,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, length, hidden_size) sorted by expert -> the same, and the weights if the kernel gives them."""
        query, key, value = (
            routing.run(hidden_states, *self._experts(name)).unflatten(-1, (-1, self.head_dim))
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if self.config.qk_norm:
            query = routing.run(query, *self._experts("q_norm"))
            key = routing.run(key, *self._experts("k_norm"))
        query, key, value = (routing.restore(x).transpose(1, 2) for x in (query, key, value))
        query, key = (self._rotate(x, *position_embeddings) for x in (query, key))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        implementation = self.config._attn_implementation or "eager"
        kernel = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        options = {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling, **kwargs}
        output, weights = attend(self, kernel, query, key, value, attention, **options)
        output = routing.sort(output.flatten(2))
        return routing.run(output, *self._experts("o_proj")), weights

    def _rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """(batch, heads, length, head_dim): features that have an angle are rotated, the rest is copied."""
        rotate = rotate_pairs if self.config.rope_parameters.get("interleave") else rotate_halves
        rotated = rotate(x[..., : cos.shape[-1]], cos[:, None], sin[:, None])
        return rotated if rotated.shape == x.shape else torch.cat([rotated, x[..., cos.shape[-1] :]], dim=-1)


class BagelDecoderLayer(GradientCheckpointingLayer):
    """
    A Qwen2 block whose parts may have a sibling for the gen expert.

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
        attention: AttentionSpec,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        normed = routing.run(hidden_states, self.input_layernorm, self.input_layernorm_moe_gen)
        attended, _ = self.self_attn(normed, position_embeddings, routing, attention, past_key_values, **kwargs)
        hidden_states = hidden_states + attended
        normed = routing.run(hidden_states, self.post_attention_layernorm, self.post_attention_layernorm_moe_gen)
        return hidden_states + routing.run(normed, self.mlp, self.mlp_moe_gen)


def _gen_norm(config: BagelTextConfig, present: bool) -> nn.Module | None:
    return Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if present else None


# --------------------------------------------------------------------------------------------------------------------
# Models


class VelocityHead(nn.Linear):
    """Decoder features to velocity; zero in a fresh model, which then predicts no velocity (released)."""


class BagelPreTrainedModel(PreTrainedModel):
    config: BagelConfig
    config_class = BagelConfig
    # transformers' any-to-any pipeline refuses image models without torchvision; this one needs none
    input_modalities = ["image", "text"] if is_torchvision_available() else ["text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["BagelDecoderLayer"]  # a model adds those of its parts
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
    _can_record_outputs = {"hidden_states": BagelDecoderLayer, "attentions": BagelAttention}

    def __init__(self, config: BagelTextConfig):
        super().__init__(config)
        if "sliding_attention" in (config.layer_types or ()):
            raise ValueError("use_sliding_window=True: BAGEL attends to the whole context, images included.")
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([BagelDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm_moe_gen = _gen_norm(config, config.layer_module != "Qwen2DecoderLayer")
        self.rotary_emb = BagelTextRotaryEmbedding(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def route(self, layout: PackedLayout) -> Routing:
        """The routing of a layout; an image that is drawn makes it once for all steps."""
        return Routing.of(None if layout.causal else layout.gen, self.config.freeze_und)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        layout: PackedLayout,
        attention: AttentionSpec,
        past_key_values: Cache | None = None,
        routing: Routing | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        (batch, length, hidden_size) -> the same after the final norm, in the order of the layout.

        Args:
            attention: the layout for one kernel, see [`~attention_bagel.prepare_attention`].
            routing: of the layout, if it has been made before.
            kwargs: `output_hidden_states`, `output_attentions`; the others are for the kernel.
        """
        routing = routing or self.route(layout)
        output = self._run_blocks(
            routing.freeze_und_tokens(routing.sort(inputs_embeds)),
            position_embeddings=self.rotary_emb(inputs_embeds, layout.position_ids, layout.sample_ids),
            routing=routing,
            attention=attention,
            past_key_values=past_key_values,
            **kwargs,
        )
        assert output.last_hidden_state is not None
        output.last_hidden_state = routing.restore(output.last_hidden_state)
        if output.hidden_states is not None:  # with selected layers, the others are None
            states = (state if state is None else routing.restore(state) for state in output.hidden_states)
            output.hidden_states = tuple(states)
        return output

    @capture_outputs
    def _run_blocks(
        self,
        hidden_states: torch.Tensor,
        *,
        routing: Routing,
        past_key_values: Cache | None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **arguments,
    ) -> BaseModelOutputWithPast:
        """Blocks and final norm on sorted tokens; the flags are read by transformers' hooks."""
        for layer in self.layers:
            hidden_states = layer(hidden_states, routing=routing, past_key_values=past_key_values, **arguments)
        hidden_states = routing.run(hidden_states, self.norm, self.norm_moe_gen)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)


def warn_of_positions(config: BagelConfig, layout: PackedLayout) -> None:
    """Say once that a position is one that the decoder was never trained for."""
    text = config.text_config
    last, limit = int(layout.position_ids.max()), text.max_extended_positions
    if last < limit:
        return
    given = f"max_position_embeddings={text.max_position_embeddings}"
    extended = "" if limit == text.max_position_embeddings else f" and rope_parameters extend it to {limit}"
    takes = "those of its longer side" if config.multimodal_positions else "one position"
    logger.warning_once(
        f"The input reaches position {last}, but {given}{extended}: positions from there on were never trained. "
        f"Shorten the prompt (an image takes {takes}, a text token one each), or extend the context: see "
        "rope_parameters of BagelTextConfig."
    )


class BagelLanguageModel(BagelPreTrainedModel):
    """The released tree: `language_model.model` and, in a model that writes, `language_model.lm_head`; no forward."""

    config: BagelTextConfig
    config_class = BagelTextConfig
    base_model_prefix = "model"
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: BagelTextConfig, has_head: bool = True):
        super().__init__(config)
        self.model = BagelTextModel(config)
        if has_head:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens


__all__ = ["BagelLanguageModel", "BagelPreTrainedModel", "BagelTextModel", "Routing"]
