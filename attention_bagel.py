# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Attention kernels: the only file that knows them, their mask formats and frozen caches. The rule is the layout's.

Eager is the definition. Eager and SDPA take a dense mask or none; a pack of many samples goes through them as padded
batches, a row per sample. Flex attention takes a block mask. flash-attn takes no mask: there every run of tokens is one
variable-length call over the keys that it may see. transformers imports flash-attn, and only when it is asked for.

Axes: (batch, heads, length, head_dim) in kernels, (batch, length, features) outside.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_causal_mask
from transformers.utils.generic import is_flash_attention_requested

from .layout_bagel import BoolTensor, LongTensor, PackedLayout


KERNEL_KWARGS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
PAGED_KERNEL_KWARGS = (*KERNEL_KWARGS, "cache", "read_index", "write_index", "block_table")


class PagedKwargs(TypedDict, total=False):
    """
    Continuous batching (`generate_batch`): what transformers' kernels are passed, see its `PagedAttentionArgs`. Many
    texts then lie in one row, and their keys and values in `cache`, which the kernel reads and writes.
    """

    cache: Any
    read_index: list[LongTensor]
    write_index: list[LongTensor]
    block_table: torch.Tensor | None
    logits_indices: LongTensor
    logits_processor_args: torch.Tensor


class VarlenPart(NamedTuple):
    """
    Runs of tokens that one flash-attn call computes.

    `q_index`, `k_index` pick tokens of the flattened (batch * length) axes; `cu_seq_lens_*` mark the runs among them.
    Causal runs are text (aligned to the last key), the others are images.
    """

    q_index: LongTensor
    k_index: LongTensor
    cu_seq_lens_q: torch.Tensor
    cu_seq_lens_k: torch.Tensor
    max_length_q: int
    max_length_k: int
    is_causal: bool


class SampleBatch(NamedTuple):
    """
    Samples of a pack that one dense call computes, a row each.

    `index` (samples, longest) picks tokens of the flattened (batch * length) axes, `real` marks those that are not
    padding, `mask` is (samples, 1, longest, longest).
    """

    index: LongTensor
    real: BoolTensor
    mask: torch.Tensor


class AttentionSpec(NamedTuple):
    """
    A layout as the arguments of one kernel; made once per forward, the same for every layer.

    `mask` as the kernel wants it, `is_causal` for kernels that run without a mask, `varlen` for flash-attn, `batches`
    for packs of many samples under eager and SDPA.
    """

    mask: object | None
    is_causal: bool
    varlen: tuple[VarlenPart, ...] | None = None
    batches: tuple[SampleBatch, ...] | None = None


class FrozenContext:
    """
    A cache that is read and never written: the context that an image is drawn under, step after step.

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


def kernel_kwargs(options: Mapping[str, Any], layout: PackedLayout) -> dict[str, Any]:
    """
    The arguments of `forward` that are for the attention kernel. A layout that is no plain text has its own.

    Raises:
        ValueError: bidirectional text is asked for.
    """
    if "cache" in options:
        return {name: options[name] for name in PAGED_KERNEL_KWARGS if name in options}
    if options.get("is_causal") is False:
        raise ValueError("is_causal=False: this decoder reads text causally; only images are bidirectional.")
    return {name: options[name] for name in KERNEL_KWARGS if name in options} if layout.causal else {}


def prepare_attention(
    config: PreTrainedConfig,
    layout: PackedLayout,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    output_attentions: bool = False,
) -> AttentionSpec:
    """
    A layout for the kernel that `config._attn_implementation` names.

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
        return AttentionSpec(mask, is_causal=True)
    key_length = layout.past_length + layout.length
    if past_key_values is not None and past_key_values.is_compileable:
        key_length = past_key_values.get_max_length()
    if is_flash_attention_requested(config):
        return AttentionSpec(None, is_causal=False, varlen=varlen_parts(layout, key_length))
    if layout.unmasked and (layout.past_valid is None or bool(layout.past_valid.all())) and bool(layout.valid.all()):
        return AttentionSpec(None, is_causal=False)  # no mask: the fastest kernel
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
        return AttentionSpec(mask, is_causal=False)
    eager = config._attn_implementation in (None, "eager")
    packed = layout.batch_size == 1 and past_key_values is None and not output_attentions
    if packed and (eager or config._attn_implementation == "sdpa"):
        batches = sample_batches(layout, hidden_states.dtype if eager else None)
        if batches is not None:
            return AttentionSpec(None, is_causal=False, batches=batches)
    mask = layout.dense_mask(key_length)
    return AttentionSpec(_added(mask, hidden_states.dtype) if eager else mask, is_causal=False)


def _added(mask: BoolTensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask as what eager attention adds to its scores."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def sample_batches(layout: PackedLayout, added_as: torch.dtype | None = None) -> tuple[SampleBatch, ...] | None:
    """
    A pack as padded batches of its samples, or `None` where that would not halve the (query, key) pairs.

    `added_as`: the type of masks that are added to scores; bool masks without it.
    """
    apart = layout.samples_apart()
    if 2 * sum(index.shape[0] * index.shape[1] ** 2 for index, _ in apart) > layout.length**2:
        return None
    masks = [samples.dense_mask() for _, samples in apart]
    masks = masks if added_as is None else [_added(mask, added_as) for mask in masks]
    return tuple(SampleBatch(index, samples.valid, mask) for (index, samples), mask in zip(apart, masks))


def varlen_parts(layout: PackedLayout, key_length: int | None = None) -> tuple[VarlenPart, ...]:
    """
    The rule as variable-length calls: a run of text, or an image, over what it may see.

    The keys of a run are the cached tokens, the earlier tokens of its sample that are not noisy, and the run itself.
    `key_length`: keys per row, more than past + new tokens in a static cache. Reads the columns
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
    def of_side(side: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        lengths = torch.tensor([len(part[side]) for part in parts])
        indexes = torch.tensor([index for part in parts for index in part[side]], device=device)
        cumulative = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device=device, dtype=torch.int32)
        return indexes, cumulative, int(lengths.max())

    (queries, cu_q, max_q), (keys, cu_k, max_k) = of_side(0), of_side(1)
    return VarlenPart(queries, keys, cu_q, cu_k, max_q, max_k, is_causal)


def attend(
    module: nn.Module,
    kernel: Callable,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention: AttentionSpec,
    **options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Run a kernel as the spec says.

    Args:
        module: the attention module, which kernels read settings from. kernel: of transformers' interface.
        query: (batch, heads, length, head_dim). key, value: (batch, kv heads, keys, head_dim), cached ones included.
        options: further arguments of the kernel (`scaling`, `dropout` ...).

    Returns:
        (batch, length, heads, head_dim), and the weights if the kernel gives them.
    """
    if attention.varlen is None and attention.batches is None:
        return kernel(module, query, key, value, attention.mask, is_causal=attention.is_causal, **options)
    batch, _, length, _ = query.shape
    flat_q, flat_k, flat_v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    output = flat_q.new_zeros(flat_q.shape)
    for part in attention.batches or ():
        q, k, v = (x[part.index].transpose(1, 2) for x in (flat_q, flat_k, flat_v))
        attended, _ = kernel(module, q, k, v, part.mask, is_causal=False, **options)
        output = output.index_copy(0, part.index[part.real], attended[part.real].to(output.dtype))
    for part in attention.varlen or ():
        q = flat_q[part.q_index][None].transpose(1, 2)
        k, v = (x[part.k_index][None].transpose(1, 2) for x in (flat_k, flat_v))
        runs = {name: getattr(part, name) for name in VARLEN_OPTIONS}
        attended, _ = kernel(module, q, k, v, None, **runs, **options)
        output = output.index_copy(0, part.q_index, attended[0].to(output.dtype))
    return output.unflatten(0, (batch, length)), None


VARLEN_OPTIONS = ("is_causal", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
