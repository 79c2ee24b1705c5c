# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""flex attention equals eager: the layout's rule as a function of indexes, compiled. Few shapes, each compiles anew."""

import shutil

import pytest
import torch
from tiny_models import attention_kernel, drawing_context, padded_batch, tiny_model, training_pack
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import DynamicCache

from bagel.attention_bagel import prepare_attention
from bagel.layout_bagel import PackedLayout


pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="compiling for a CPU needs a C++ compiler"
)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(autouse=True)
def static_shapes():
    """On a CPU, inductor's second look at a shape (as a dynamic one) is not reliable; a GPU needs none of this."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        yield
    torch._dynamo.reset()


@torch.no_grad()
def both(forward):
    """The result of eager and of flex; the vision tower, which has no mask, stays on SDPA."""
    results = []
    for name in ("eager", "flex_attention"):
        with attention_kernel(tiny_model(), name, vision="sdpa"):
            results.append(forward(tiny_model()))
    return results


def test_pack_equals_eager():
    samples = [
        [("text", 3), ("vit", 2, 3), ("noise", 2, 2), ("vae", 2, 2), ("text", 2)],
        [("vae", 1, 3), ("text", 4), ("noise", 2, 3), ("text", 1)],
    ]
    eager, flex = both(lambda model: model(**training_pack(samples)))
    for name in ("last_hidden_state", "ce", "mse"):
        torch.testing.assert_close(getattr(flex, name), getattr(eager, name), **CLOSE)


def test_padded_batch_with_pictures_and_what_follows_on_its_cache_equal_eager():
    rows = [[("text", 4), ("vit", 2, 3), ("text", 2)], [("vae", 2, 2), ("vit", 2, 1), ("text", 1)]]
    batch = padded_batch(rows)

    def forward(model):
        cache = DynamicCache(config=model.config.text_config)
        first = model(**batch, past_key_values=cache, use_cache=True)
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        past_valid = batch["attention_mask"].bool()
        layout = PackedLayout.noisy_blocks([4, 2], torch.tensor([7, 5]), past_valid.shape[1], past_valid)
        latents = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
        position_ids = torch.tensor([[0, 1, 8, 9], [0, 8, 0, 0]])
        velocity = model.predict_velocity(
            latents, torch.tensor(0.6), drawing_context(model, layers, layout, position_ids)
        )
        return first.logits[past_valid], velocity[0], velocity[1, :2]

    eager, flex = both(forward)
    for one, other in zip(eager, flex):
        torch.testing.assert_close(other, one, **CLOSE)


def test_plan_is_a_block_mask_of_the_rule():
    layout = PackedLayout.from_packed(
        9, [6, 3], torch.arange(9), split_lens=[2, 3, 1, 3], attn_modes=["causal", "noise", "causal", "full"]
    )
    with attention_kernel(tiny_model(), "flex_attention"):
        plan = prepare_attention(tiny_model().config.text_config, layout, torch.zeros(1, 9, 32))
    assert isinstance(plan.mask, BlockMask)
    dense = layout.dense_mask()[0, 0]
    seen = [[bool(plan.mask.mask_mod(0, 0, torch.tensor(q), torch.tensor(k))) for k in range(9)] for q in range(9)]
    assert seen == dense.tolist()
