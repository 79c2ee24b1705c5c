# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Attention: the only file that knows kernels, their mask formats and cache writes. The rule comes from the layout.

Eager is the definition. Eager and SDPA take a dense mask or none (and a pack of many samples as padded batches, so that
samples cost nothing to each other), flex a block mask, flash-attn no mask at all: there every run of tokens becomes one
variable-length call over the keys it may see. flash-attn is imported by transformers, and only when it is asked for.

Axes: (batch, heads, length, head_dim) in kernels, (batch, length, features) outside.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, eager_attention_forward
from transformers.utils.generic import is_flash_attention_requested

from .embeddings_bagel import rotate_halves, rotate_pairs
from .layout_bagel import PackedLayout, Routing


class VarlenPart(NamedTuple):
    """
    Runs of tokens that one flash-attn call handles.

    `q_index`, `k_index` pick tokens of the flattened (batch * length) axes; `cu_seq_lens_*` mark the runs among them.
    Causal runs are text (aligned to the last key), the others are pictures.
    """

    q_index: torch.LongTensor
    k_index: torch.LongTensor
    cu_seq_lens_q: torch.IntTensor
    cu_seq_lens_k: torch.IntTensor
    max_length_q: int
    max_length_k: int
    is_causal: bool


class SampleBatch(NamedTuple):
    """
    Samples of a pack that one dense call handles, a row each.

    `index` (samples, longest) picks tokens of the flattened (batch * length) axes, `real` marks those that are not
    padding, `mask` is (samples, 1, longest, longest).
    """

    index: torch.LongTensor
    real: torch.BoolTensor
    mask: torch.Tensor


class AttentionPlan(NamedTuple):
    """
    The layout in the words of one kernel; made once per forward, the same for every layer.

    `mask` as the kernel wants it, `is_causal` for kernels that run without a mask, `varlen` for flash-attn, `batches`
    for packs of many samples under eager and SDPA, where samples then cost nothing to each other.
    """

    mask: object | None
    is_causal: bool
    varlen: tuple[VarlenPart, ...] | None = None
    batches: tuple[SampleBatch, ...] | None = None


class FrozenContext:
    """
    A cache that is read and never written: the context under which a picture is drawn, step after step.

    Args:
        layers: keys and values of every layer, (batch, kv heads, length, head_dim); empty = no context.
    """

    is_compileable = False

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]]):
        self.layers = layers

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs):
        """What the block sees: context, then itself. Nothing is kept."""
        if not self.layers:
            return keys, values
        past_keys, past_values = self.layers[layer_idx]
        past_keys, past_values = past_keys.to(keys.device), past_values.to(values.device)
        return torch.cat([past_keys, keys], dim=2), torch.cat([past_values, values], dim=2)


def plan_attention(
    config: PreTrainedConfig,
    layout: PackedLayout,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    past_key_values=None,
    output_attentions: bool = False,
) -> AttentionPlan:
    """
    Translate the layout for the kernel that `config._attn_implementation` names.

    Plain causal text goes through transformers' own mask creation, so that static caches, compiled decoding and every
    kernel's fast path work as for any other model; `attention_mask` (2-D, or a finished 4-D mask) is only read there.
    With `output_attentions`, a pack stays whole, so that weights are those of one call.
    """
    if layout.causal:
        mask = create_causal_mask(
            config=config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=None,  # a step other than 1 would be taken for a new packed sequence
        )
        return AttentionPlan(mask, is_causal=True)
    key_length = layout.past_length + layout.length
    if past_key_values is not None and past_key_values.is_compileable:
        key_length = past_key_values.get_max_length()
    if is_flash_attention_requested(config):
        return AttentionPlan(None, is_causal=False, varlen=plan_varlen(layout, key_length))
    if layout.isolated and (layout.past_valid is None or bool(layout.past_valid.all())) and bool(layout.valid.all()):
        return AttentionPlan(None, is_causal=False)  # everything sees everything: no mask, the fastest kernel
    if config._attn_implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        mask = create_block_mask(
            layout.mask_function(key_length),
            B=layout.batch_size,
            H=None,
            Q_LEN=layout.length,
            KV_LEN=key_length,
            device=hidden_states.device,
        )
        return AttentionPlan(mask, is_causal=False)
    eager = config._attn_implementation in (None, "eager")
    packed = layout.batch_size == 1 and past_key_values is None and not output_attentions
    if packed and (eager or config._attn_implementation == "sdpa"):
        batches = plan_batches(layout, hidden_states.dtype if eager else None)
        if batches is not None:
            return AttentionPlan(None, is_causal=False, batches=batches)
    mask = layout.dense_mask(key_length)
    return AttentionPlan(_added(mask, hidden_states.dtype) if eager else mask, is_causal=False)


def _added(mask: torch.BoolTensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask as what eager attention adds to its scores."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def plan_batches(layout: PackedLayout, added_as: torch.dtype | None = None) -> tuple[SampleBatch, ...] | None:
    """
    A pack as padded batches of its samples, or `None` where that would not halve the pairs of tokens to look at.

    `added_as`: the type of masks that are added to scores; bool masks without it.
    """
    apart = layout.samples_apart()
    if 2 * sum(index.shape[0] * index.shape[1] ** 2 for index, _ in apart) > layout.length**2:
        return None
    masks = [samples.dense_mask() for _, samples in apart]
    masks = masks if added_as is None else [_added(mask, added_as) for mask in masks]
    return tuple(SampleBatch(index, samples.valid, mask) for (index, samples), mask in zip(apart, masks))


def plan_varlen(layout: PackedLayout, key_length: int | None = None) -> tuple[VarlenPart, ...]:
    """
    The rule as variable-length calls: a run of text, or a picture, over what it may see.

    The keys of a run are the cached tokens, the earlier tokens of its sample that are not noisy, and the run itself.
    `key_length` is the number of key places per row, more than past + new tokens in a static cache. Reads the columns
    on the host, once per forward.
    """
    columns = torch.stack(
        [layout.sample_ids, layout.span_ids, layout.bidirectional.long(), layout.noisy.long()], dim=-1
    ).tolist()
    past_valid = None if layout.past_valid is None else layout.past_valid.tolist()
    key_length = key_length or layout.past_length + layout.length
    runs: dict[bool, list[tuple[list[int], list[int]]]] = {True: [], False: []}
    for row, tokens in enumerate(columns):
        past = [row * key_length + k for k in range(layout.past_length) if past_valid is None or past_valid[row][k]]
        seen: dict[int, list[int]] = {}
        start = 0
        while start < len(tokens):
            sample, _, bidirectional, noisy = tokens[start]
            end = start + 1
            while end < len(tokens) and _same_run(tokens[start], tokens[end]):
                end += 1
            if sample >= 0:
                own = [row * key_length + layout.past_length + k for k in range(start, end)]
                context = seen.setdefault(sample, list(past))
                queries = [row * layout.length + q for q in range(start, end)]
                runs[not bidirectional].append((queries, context + own))
                if not noisy:
                    context.extend(own)
            start = end
    device = layout.sample_ids.device
    return tuple(_varlen_part(parts, is_causal, device) for is_causal, parts in runs.items() if parts)


def _same_run(first: list[int], other: list[int]) -> bool:
    sample, span, bidirectional, noisy = first
    same_kind = other[0] == sample and other[2] == bidirectional and other[3] == noisy
    return same_kind and (not bidirectional or other[1] == span)


def _varlen_part(parts: list[tuple[list[int], list[int]]], is_causal: bool, device: torch.device) -> VarlenPart:
    indexes, cumulative, longest = [], [], []
    for side in (0, 1):
        lengths = torch.tensor([len(part[side]) for part in parts])
        indexes.append(torch.tensor([index for part in parts for index in part[side]], device=device))
        cumulative.append(nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device=device, dtype=torch.int32))
        longest.append(int(lengths.max()))
    return VarlenPart(*indexes, *cumulative, *longest, is_causal)


class BagelAttention(nn.Module):
    """
    Qwen2 attention with an optional second set of projections and norms for the generation expert.

    Every projection runs per expert; queries, keys and values of all tokens then meet in one attention.

    Args:
        config (`BagelTextConfig`): the decoder.
        layer_idx (`int`): place in the cache.
        has_gen (`bool`): own the `*_moe_gen` siblings (MoT layers).
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int, has_gen: bool):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        q_size, kv_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
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
        plan: AttentionPlan,
        past_key_values=None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, length, hidden_size) in `routing` order -> the same, and the weights if the kernel gives them."""
        query, key, value = (
            routing.run(hidden_states, *self._experts(name)).unflatten(-1, (-1, self.head_dim))
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if self.config.qk_norm:
            query = routing.run(query, *self._experts("q_norm"))
            key = routing.run(key, *self._experts("k_norm"))
        query, key, value = (routing.restore(x).transpose(1, 2) for x in (query, key, value))
        query, key = (self._turn(x, *position_embeddings) for x in (query, key))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = self._attend(query, key, value, plan)
        output = routing.sort(output.flatten(2))
        return routing.run(output, *self._experts("o_proj")), weights

    def _turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """(batch, heads, length, head_dim): the features that have an angle turn, the rest is copied."""
        turn = rotate_pairs if self.config.rope_parameters.get("interleave") else rotate_halves
        turned = turn(x[..., : cos.shape[-1]], cos[:, None], sin[:, None])
        return turned if turned.shape == x.shape else torch.cat([turned, x[..., cos.shape[-1] :]], dim=-1)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """-> (batch, length, heads, head_dim)."""
        kernel = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        options = {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        if plan.varlen is None and plan.batches is None:
            return kernel(self, query, key, value, plan.mask, is_causal=plan.is_causal, **options)
        batch, _, length, _ = query.shape
        flat_q, flat_k, flat_v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        output = flat_q.new_zeros(flat_q.shape)
        for part in plan.batches or ():
            q, k, v = (x[part.index].transpose(1, 2) for x in (flat_q, flat_k, flat_v))
            attended, _ = kernel(self, q, k, v, part.mask, is_causal=False, **options)
            output = output.index_copy(0, part.index[part.real], attended[part.real].to(output.dtype))
        for part in plan.varlen or ():
            q = flat_q[part.q_index][None].transpose(1, 2)
            k, v = (x[part.k_index][None].transpose(1, 2) for x in (flat_k, flat_v))
            attended, _ = kernel(
                self,
                q,
                k,
                v,
                None,
                is_causal=part.is_causal,
                cu_seq_lens_q=part.cu_seq_lens_q,
                cu_seq_lens_k=part.cu_seq_lens_k,
                max_length_q=part.max_length_q,
                max_length_k=part.max_length_k,
                **options,
            )
            output = output.index_copy(0, part.q_index, attended[0].to(output.dtype))
        return output.unflatten(0, (batch, length)), None
