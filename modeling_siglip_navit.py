# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The vision tower: SigLIP over packed patches of several images of any grid. Knows no text and no other tower.

Axes: (patches, features), images one after the other; `cu_seqlens` (images + 1,) says where each begins and where the
last one ends.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.output_capturing import capture_outputs

from .configuration_bagel import BagelVisionConfig as SiglipVisionConfig
from .embeddings_bagel import (
    RotaryEmbedding2D,
    cos_sin,
    llama_vision_angles,
    qwen_vision_angles,
    read_table,
    rotate_halves,
    rotate_pairs,
)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bidirectional attention within one image: the definition that every kernel is compared with."""
    weights = (query @ key.transpose(2, 3) * scaling).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class SiglipVisionEmbeddings(nn.Module):
    """
    Patch projection plus the learned position table (absent in a rotary tower).

    Built as the convolution that SigLIP checkpoints store. BAGEL checkpoints store the equal linear layer on flattened
    patches, features (row, column, channel): `convert_conv2d_to_linear` makes it, before or after loading.
    """

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        size = config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=size, stride=size)
        self.learned = config.position_embedding == "learned"
        if self.learned:
            self.position_embedding = nn.Embedding(config.table_side**2, config.hidden_size)

    def convert_conv2d_to_linear(self, config: SiglipVisionConfig | None = None, meta: bool = False) -> None:
        """Replace the convolution by the linear layer that computes the same; `meta` leaves its weights unset."""
        conv = self.patch_embedding
        if isinstance(conv, nn.Linear):
            return
        config = config or self.config
        device = "meta" if meta else conv.weight.device
        linear = nn.Linear(config.patch_dim, config.hidden_size, device=device, dtype=conv.weight.dtype)
        if device != "meta":
            with torch.no_grad():
                linear.weight.copy_(_flat_patch_weight(conv))
                linear.bias.copy_(conv.bias)
        self.patch_embedding = linear

    def forward(self, packed_pixel_values: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        projection = self.patch_embedding
        if isinstance(projection, nn.Conv2d):
            embeddings = nn.functional.linear(packed_pixel_values, _flat_patch_weight(projection), projection.bias)
        else:
            embeddings = projection(packed_pixel_values)
        if not self.learned:
            return embeddings
        if position_ids.is_floating_point():
            return embeddings + read_table(self.position_embedding.weight, position_ids).to(embeddings)
        return embeddings + self.position_embedding(position_ids)


def _flat_patch_weight(conv: nn.Conv2d) -> torch.Tensor:
    """(out, channels, p, q) -> (out, p * q * channels)."""
    return conv.weight.permute(0, 2, 3, 1).flatten(1)


class SiglipAttention(nn.Module):
    """The projections of an attention and their sizes; [`SiglipFlashAttention2`] runs them."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        self.num_key_value_groups = 1
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))


class SiglipFlashAttention2(SiglipAttention):
    """
    Bidirectional attention inside each image of a pack, on the kernel that `attn_implementation` names.

    The name is the released one; flash-attn is one of the kernels.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        lengths: list[int],
        max_seqlen: int,
        rotary: tuple[torch.Tensor, ...] | None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
        """(patches, hidden_size) -> the same, and the weights of each image if the kernel gives them."""
        query, key, value = (
            proj(hidden_states).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (patches, heads, head_dim)
        if rotary is not None:
            query, key = (_ROTATIONS[self.config.position_embedding](x, rotary) for x in (query, key))
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))  # (1, heads, patches, head_dim)
        if not lengths:  # no image: nothing to attend to, and zero gradients for the projections
            return self.out_proj((query + key + value)[0].transpose(0, 1).flatten(1)), ()
        implementation = self.config._attn_implementation
        kernel = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)  # pyright: ignore[reportArgumentType]  # takes None
        options: dict[str, Any] = {
            "dropout": self.attention_dropout if self.training else 0.0,
            "scaling": self.scaling,
            "is_causal": False,
        }
        if is_flash_attention_requested(self.config):
            options |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
            options |= {"max_length_q": max_seqlen, "max_length_k": max_seqlen}
            output, weights = kernel(self, query, key, value, None, **options)
            return self.out_proj(output[0].flatten(1)), (weights,)
        if len(set(lengths)) == 1:  # pictures of one size: a batch
            query, key, value = (x[0].unflatten(1, (-1, lengths[0])).transpose(0, 1) for x in (query, key, value))
            output, weights = kernel(self, query, key, value, None, **options)  # (images, patches, heads, head_dim)
            return self.out_proj(output.flatten(2).flatten(0, 1)), () if weights is None else tuple(weights[:, None])
        images = [x.split(lengths, dim=2) for x in (query, key, value)]
        attended = [kernel(self, q, k, v, None, **options) for q, k, v in zip(*images)]
        output = torch.cat([output for output, _ in attended], dim=1)[0]  # (patches, heads, head_dim)
        return self.out_proj(output.flatten(1)), tuple(weights for _, weights in attended)


class SiglipMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class SiglipEncoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each after a layer norm and added to its input."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.self_attn = SiglipFlashAttention2(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        lengths: list[int],
        max_seqlen: int,
        rotary: tuple[torch.Tensor, ...] | None,
    ) -> torch.Tensor:
        attended, _ = self.self_attn(self.layer_norm1(hidden_states), cu_seqlens, lengths, max_seqlen, rotary)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class SiglipEncoder(nn.Module):
    """The stack of layers; [`SiglipVisionTransformer`] runs it."""

    def __init__(self, config: SiglipVisionConfig, num_hidden_layers: int):
        super().__init__()
        self.layers = nn.ModuleList([SiglipEncoderLayer(config) for _ in range(num_hidden_layers)])


class SiglipVisionTransformer(nn.Module):
    """Patch embedding, encoder layers and final norm over a pack of images."""

    def __init__(self, config: SiglipVisionConfig, num_hidden_layers: int):
        super().__init__()
        self.config = config
        self.embeddings = SiglipVisionEmbeddings(config)
        self.rope = _rotary_tables(config)
        self.encoder = SiglipEncoder(config, num_hidden_layers)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def _rotary(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """Cosines and sines for ids or coordinates, one row per patch, as `_ROTATIONS` takes them; `None` = learned."""
        kind, side = self.config.position_embedding, self.config.table_side
        if kind == "learned":
            return None
        if self.rope is not None:
            return self.rope(position_ids)
        if position_ids.is_floating_point():
            rows, columns = position_ids.unbind(-1)
        else:
            rows, columns = position_ids // side, position_ids % side
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        return cos_sin(_ANGLES[kind](rows, columns, head_dim))

    def forward(
        self,
        packed_pixel_values: torch.Tensor,
        packed_flattened_position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int | None = None,
    ) -> BaseModelOutput:
        lengths = cu_seqlens.diff().tolist()
        if sum(lengths) != packed_pixel_values.shape[0]:
            raise ValueError(
                f"cu_seqlens describes {sum(lengths)} patches in {len(lengths)} images, packed_pixel_values holds "
                f"{packed_pixel_values.shape[0]}."
            )
        hidden_states = self.embeddings(packed_pixel_values, packed_flattened_position_ids)
        rotary = self._rotary(packed_flattened_position_ids)
        for layer in self.encoder.layers:
            hidden_states = layer(
                hidden_states,
                cu_seqlens=cu_seqlens.to(torch.int32),
                lengths=lengths,
                max_seqlen=max_seqlen or max(lengths, default=0),
                rotary=rotary,
            )
        return BaseModelOutput(last_hidden_state=self.post_layernorm(hidden_states))


class SiglipPreTrainedModel(PreTrainedModel):
    """What transformers is told about the tower, and how its weights are initialised."""

    config: SiglipVisionConfig
    config_class = SiglipVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "packed_pixel_values"
    input_modalities = ("image",)  # pyright: ignore[reportAssignmentType]  # a tuple, as in transformers' own models
    supports_gradient_checkpointing = True
    _no_split_modules = ["SiglipEncoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Also fills the rotary tables: models are built on the meta device, where constructors compute nothing."""
        super()._init_weights(module)
        if isinstance(module, RotaryEmbedding2D):
            for name, table in module.tables().items():
                init.copy_(getattr(module, name), table)


class SiglipVisionModel(SiglipPreTrainedModel):
    """
    The tower as BAGEL stores it, under `vit_model`.

    Args:
        config (`BagelVisionConfig`): the tower. Its layer count is that of the whole SigLIP checkpoint.
        num_hidden_layers (`int`, *optional*): how many layers to build; all of them by default. BAGEL passes
            `BagelConfig.num_vit_layers`.
    """

    _can_record_outputs = {"hidden_states": SiglipEncoderLayer, "attentions": SiglipFlashAttention2}

    def __init__(self, config: SiglipVisionConfig, num_hidden_layers: int | None = None):
        super().__init__(config)
        self.vision_model = SiglipVisionTransformer(config, num_hidden_layers or config.num_hidden_layers)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.embeddings.patch_embedding

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        packed_pixel_values: torch.Tensor,
        packed_flattened_position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutput:
        """
        Args:
            packed_pixel_values: (patches, patch * patch * 3), all images one after the other, rows of patches in order.
            packed_flattened_position_ids: (patches,) row * side of the table + column, or (patches, 2) float: row and
                column within the table, which is read between its entries.
            cu_seqlens: (images + 1,) where each image begins, and the end.
            max_seqlen: patches of the largest image.
            output_hidden_states, output_attentions: recorded by transformers' hooks; the config's by default.

        Returns:
            `BaseModelOutput` with `last_hidden_state` (patches, hidden_size) after the final norm; `attentions` hold,
            per layer, one (1, heads, n, n) tensor per image (eager attention only).

        Raises:
            ValueError: `cu_seqlens` counts other patches than there are.
        """
        return self.vision_model(packed_pixel_values, packed_flattened_position_ids, cu_seqlens, max_seqlen)


def convert_conv2d_to_linear(
    model: SiglipVisionModel, config: SiglipVisionConfig | None = None, meta: bool = False
) -> None:
    """Replace the convolutional patch embedding of a loaded SigLIP tower by the linear one of BAGEL, in place."""
    model.vision_model.embeddings.convert_conv2d_to_linear(config, meta)


def _rotate_2d(x: torch.Tensor, rotary: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """(patches, heads, head_dim): the row rotates the first half, the column the second."""
    cos_h, sin_h, cos_w, sin_w = (table[:, None].to(x.dtype) for table in rotary)
    by_row, by_column = x.chunk(2, dim=-1)
    return torch.cat([rotate_halves(by_row, cos_h, sin_h), rotate_halves(by_column, cos_w, sin_w)], dim=-1)


def _rotate_in_float32(rotate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Whole heads by one pair of tables, computed in float32 as Llama 4 and Qwen3-Omni do."""

    def rotated(x: torch.Tensor, rotary: tuple[torch.Tensor, ...]) -> torch.Tensor:
        cos, sin = (table[:, None] for table in rotary)
        return rotate(x.float(), cos, sin).to(x.dtype)

    return rotated


_ANGLES = {"llama_vision": llama_vision_angles, "qwen_vision": qwen_vision_angles}
_ROTATIONS = {
    "rope_2d": _rotate_2d,
    "llama_vision": _rotate_in_float32(rotate_pairs),
    "qwen_vision": _rotate_in_float32(rotate_halves),
}


def _rotary_tables(config: SiglipVisionConfig) -> RotaryEmbedding2D | None:
    """The tables that a tower of this kind stores; the angles of the other rotary kinds are computed as needed."""
    if config.position_embedding != "rope_2d":
        return None
    return RotaryEmbedding2D(
        config.hidden_size // config.num_attention_heads // 2, config.table_side, config.table_side
    )


__all__ = [
    "RotaryEmbedding2D",
    "SiglipAttention",
    "SiglipEncoder",
    "SiglipEncoderLayer",
    "SiglipFlashAttention2",
    "SiglipMLP",
    "SiglipPreTrainedModel",
    "SiglipVisionConfig",
    "SiglipVisionEmbeddings",
    "SiglipVisionModel",
    "SiglipVisionTransformer",
    "convert_conv2d_to_linear",
]
