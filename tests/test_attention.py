# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Every kernel computes what eager computes, and eager computes the rule.

flash-attn needs a GPU, so it is stood in for by a function that does exactly what its variable-length call does, and is
as strict about its arguments. What is tested is everything that this repository hands to it.
"""

import ast
import random
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import (
    CLEAN,
    LATENT,
    VISION_END,
    VISION_START,
    attention_kernel,
    drawing_context,
    layout_of,
    pad_rows,
    padded_batch,
    random_row,
    random_rows,
    random_segments,
    tiny_config,
    tiny_model,
    training_pack,
)
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from bagel.attention_bagel import AttentionSpec, FrozenContext, prepare_attention, varlen_parts
from bagel.decoder_bagel import BagelAttention, Routing
from bagel.embeddings_bagel import grid_position_ids, latent_position_ids
from bagel.flow_bagel import unpatchify_latents
from bagel.inputs_bagel import find_placeholders
from bagel.layout_bagel import PackedLayout


pytestmark = pytest.mark.core

KINDS = ("text", "vit", "vae", "noise")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def random_samples(seed: int, kinds=KINDS) -> list[list[tuple]]:
    chance = random.Random(seed)
    return [random_segments(chance, chance.randint(2, 4), kinds) for _ in range(3)]


# ---- flash-attn, stood in for


def flash_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    cu_seq_lens_q=None,
    cu_seq_lens_k=None,
    max_length_q=None,
    max_length_k=None,
):
    """(batch, heads, length, head_dim) in, (batch, length, heads, head_dim) out, as transformers' wrapper."""
    if 0 in query.shape:
        raise ValueError("Tensor query has shape with a zero dimension.")  # transformers' own check
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if cu_seq_lens_q is None:
        runs = _runs_of_rows(query, key, attention_mask)
    else:
        assert attention_mask is None and len(query) == len(key) == 1
        runs = _runs_of_pack(query, key, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    output = torch.zeros_like(query)
    for row, q_places, k_places in runs:
        q, k, v = query[row, :, q_places], key[row, :, k_places], value[row, :, k_places]
        scores = q @ k.transpose(1, 2) * scaling
        if is_causal:  # aligned to the last key
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(scores.shape[2] - scores.shape[1] + 1)
            scores = scores.masked_fill(hidden, float("-inf"))
        attended = torch.zeros_like(output[row]).index_copy(1, q_places, scores.softmax(-1) @ v)
        output = output.index_add(0, torch.tensor([row]), attended[None])
    return output.transpose(1, 2), None


def _runs_of_rows(query, key, mask):
    """A 2-D mask (batch, keys) marks padding; queries are the last of the keys."""
    for row in range(len(query)):
        valid = torch.ones(key.shape[2], dtype=torch.bool) if mask is None else mask[row].bool()
        k_places = valid.nonzero()[:, 0]
        q_places = valid[-query.shape[2] :].nonzero()[:, 0]
        yield row, q_places, k_places


def _runs_of_pack(query, key, cu_q, cu_k, max_q, max_k):
    for cu, longest, total in ((cu_q, max_q, query.shape[2]), (cu_k, max_k, key.shape[2])):
        assert cu.dtype == torch.int32 and cu[0] == 0 and int(cu[-1]) == total
        assert type(longest) is int and longest == int(cu.diff().max())
    assert len(cu_q) == len(cu_k)
    for run in range(len(cu_q) - 1):
        yield 0, torch.arange(cu_q[run], cu_q[run + 1]), torch.arange(cu_k[run], cu_k[run + 1])


@pytest.fixture
def flash(monkeypatch, tmp_path):
    """The stand-in under flash-attn's name, and an installed flash-attn that must not be touched."""
    for name in ("flash_attn", "flash_attn_interface", "flash_attn_3"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError('flash-attn was imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", flash_attention)
    yield "flash_attention_2"
    assert not [name for name in sys.modules if name.split(".")[0].startswith("flash_attn")]


@pytest.fixture(params=["sdpa", "flash_attention_2"])
def kernel(request):
    if request.param == "flash_attention_2":
        request.getfixturevalue("flash")
    return request.param


# ---- eager is the rule


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("has_gen", [True, False])
def test_eager_attention_is_its_formula_token_by_token(has_gen, qk_norm):
    """Projections and norms by expert, rotary, the dense mask, one softmax over all tokens."""
    model = tiny_model(text_config={"qk_norm": qk_norm, "layer_module": "Qwen2MoTDecoderLayer" if has_gen else None})
    attention = model.language_model.model.layers[1].self_attn if has_gen else _plain_attention(qk_norm)
    config = attention.config
    places = torch.tensor([4, 5])
    layout = PackedLayout.from_packed(
        9,
        [7, 2],
        torch.tensor([0, 1, 2, 3, 3, 3, 3, 0, 1]),
        places,
        [3, 4, 2],
        ["causal", "noise", "causal"],
    )
    hidden = torch.randn(1, 9, 32)
    position_embeddings = Qwen2RotaryEmbedding(config)(hidden, layout.position_ids)
    with attention_kernel(model, "eager"):
        spec, routing = prepare_attention(config, layout, hidden), Routing.of(layout.gen)
        config._attn_implementation = "eager"
        output, weights = attention(routing.sort(hidden), position_embeddings, routing, spec)
        output = routing.restore(output)

    def by_expert(name, token, x):
        return getattr(attention, f"{name}_moe_gen" if has_gen and token in places else name)(x)

    def turned(x, position):  # (heads, 8)
        angle = position * 10000.0 ** -(torch.arange(4) / 4)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)

    q, k, v = [], [], []
    for token in range(9):
        position = layout.position_ids[0, token]
        for name, out in (("q", q), ("k", k), ("v", v)):
            x = by_expert(f"{name}_proj", token, hidden[0, token]).view(-1, 8)
            if name != "v" and qk_norm:
                x = by_expert(f"{name}_norm", token, x)
            out.append(x if name == "v" else turned(x, position))
    for token in range(9):
        heads = []
        for head in range(4):
            seen = [other for other in range(9) if layout.dense_mask()[0, 0, token, other]]
            scores = torch.stack([q[token][head] @ k[other][head // 2] / 8**0.5 for other in seen])
            heads.append(scores.softmax(0) @ torch.stack([v[other][head // 2] for other in seen]))
            torch.testing.assert_close(weights[0, head, token, seen], scores.softmax(0), **CLOSE)
        torch.testing.assert_close(output[0, token], by_expert("o_proj", token, torch.cat(heads)), **CLOSE)


def _plain_attention(qk_norm: bool) -> BagelAttention:
    config = tiny_config(text_config={"qk_norm": qk_norm}, attn_implementation="eager").text_config
    torch.manual_seed(0)
    return BagelAttention(config, 0, has_gen=False)


# ---- packs


def pack_results(model, pack, kernel):
    """Losses, hidden states, and the gradient of every parameter; "whole" is eager attention under one mask."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    whole = kernel == "whole"
    with attention_kernel(model, "eager" if whole else kernel):
        output = model(**pack, output_attentions=whole)
        gradients = torch.autograd.grad(output.loss, parameters, allow_unused=True)
    return output, gradients


def assert_same_pack_results(left, right):
    for name in ("loss", "ce", "mse", "last_hidden_state"):
        torch.testing.assert_close(getattr(left[0], name), getattr(right[0], name), **CLOSE)
    for one, other in zip(left[1], right[1]):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_pack_equals_eager_with_gradients(kernel, seed):
    samples = [[("text", 3), ("vit", 2, 2), ("noise", 2, 3), ("text", 1)], *random_samples(seed)]
    pack = training_pack(samples, seed)
    model = tiny_model()
    assert_same_pack_results(pack_results(model, pack, kernel), pack_results(model, pack, "whole"))


@pytest.mark.parametrize("kernel_name", ["eager", "sdpa"])
def test_pack_of_many_samples_runs_sample_by_sample_and_equals_the_whole(kernel_name):
    pack = training_pack([sample for seed in range(4) for sample in random_samples(seed)], 0)
    layout = layout_of_pack(pack)
    assert plan_for(kernel_name, layout).batches and not plan_for(kernel_name, layout, output_attentions=True).batches
    model = tiny_model()
    assert_same_pack_results(pack_results(model, pack, kernel_name), pack_results(model, pack, "whole"))


def layout_of_pack(pack):
    splits = {"split_lens": pack.get("split_lens"), "attn_modes": pack.get("attn_modes")}
    return PackedLayout.from_packed(pack["sequence_length"], pack["sample_lens"], pack["packed_position_ids"], **splits)


@pytest.mark.parametrize("kinds", [("text",), ("text", "vit"), ("text", "vae", "noise")], ids=" ".join)
def test_pack_of_some_kinds_only_equals_eager_with_gradients(kernel, kinds):
    """The towers without input still run, on nothing."""
    pack = training_pack([[("text", 4)], *random_samples(1, kinds)], 1)
    model = tiny_model()
    assert_same_pack_results(pack_results(model, pack, kernel), pack_results(model, pack, "whole"))


@pytest.mark.parametrize("layer_module", ["Qwen2DecoderLayer", "Qwen2MoEDecoderLayer"])
def test_other_decoder_layers_equal_eager(kernel, layer_module):
    model = tiny_model(stage=None, visual_gen=True, text_config={"layer_module": layer_module})
    pack = training_pack(random_samples(2), 2)
    assert_same_pack_results(pack_results(model, pack, kernel), pack_results(model, pack, "whole"))


def test_masks_and_splits_of_a_pack_are_the_same_to_the_model():
    samples = random_samples(5)
    for name in ("eager", "sdpa"):
        with attention_kernel(tiny_model(), name), torch.no_grad():
            by_splits, by_masks = (tiny_model()(**training_pack(samples, 5, masks)) for masks in (False, True))
        torch.testing.assert_close(by_splits.last_hidden_state, by_masks.last_hidden_state, **CLOSE)


# ---- padded batches, with and without a cache


@torch.no_grad()
def run(model, kernel, batch, **kwargs):
    with attention_kernel(model, kernel):
        return model(**batch, **kwargs)


def assert_same_valid(left, right, batch):
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(left.logits[valid], right.logits[valid], **CLOSE)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("seed", range(3))
def test_padded_batch_with_pictures_equals_eager(kernel, seed, padding_side):
    model, batch = tiny_model(), padded_batch(random_rows(seed, 3), seed, padding_side)
    assert_same_valid(run(model, kernel, batch), run(model, "eager", batch), batch)


def test_padded_batch_with_pictures_equals_eager_in_gradients(kernel):
    model, batch = tiny_model(), padded_batch(random_rows(1, 3), 1)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] <= LATENT, -100)
    parameters, gradients = [p for p in model.parameters() if p.requires_grad], []
    for name in (kernel, "eager"):
        with attention_kernel(model, name):
            gradients.append(torch.autograd.grad(model(**batch, labels=labels).loss, parameters, allow_unused=True))
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_plain_text_equals_eager_with_and_without_a_cache(kernel, padded):
    model, rows = tiny_model(), [[("text", 7)], [("text", 3 if padded else 7)]]
    batch = padded_batch(rows)
    assert_same_valid(run(model, kernel, batch), run(model, "eager", batch), batch)
    outputs = {}
    for name in (kernel, "eager"):
        cache, steps = DynamicCache(config=model.config.text_config), []
        for start, end in ((0, 5), (5, 8), (8, 9)):  # prefill, more text at once, one token
            part = {"input_ids": batch["input_ids"][:, start:end], "attention_mask": batch["attention_mask"][:, :end]}
            steps.append(run(model, name, part, past_key_values=cache, use_cache=True).logits)
        outputs[name] = torch.cat(steps, dim=1)
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(outputs[kernel][valid], outputs["eager"][valid], **CLOSE)
    torch.testing.assert_close(outputs[kernel][valid], run(model, "eager", batch).logits[valid], **CLOSE)


HEADS = [
    [("text", 4), ("vae", 2, 3), ("vit", 3, 2), ("text", 2)],
    [("vit", 2, 1), ("vae", 1, 2)],
    [("text", 6)],
]
TAILS = [
    [("vit", 2, 2), ("text", 3)],
    [("text", 5), ("vae", 3, 1), ("vit", 1, 3), ("text", 1)],
    [("vae", 2, 2)],
]
CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=64),
}


def rows_of(conversations, seed):
    generator = torch.Generator().manual_seed(seed)
    return [random_row(segments, generator) for segments in conversations]


def positions_of(model, batch):
    return model.get_rope_index(batch["input_ids"], batch["attention_mask"])


@pytest.mark.parametrize("cache_name", CACHES)
@pytest.mark.parametrize("kernel_name", ["eager", "sdpa", "flash_attention_2"])
def test_pictures_on_a_cache_equal_one_pass(kernel_name, cache_name, flash):
    """Both parts are padded on the left, so the cache holds padding before and in the middle."""
    model, heads, tails = tiny_model(), rows_of(HEADS, 1), rows_of(TAILS, 2)
    wholes = [head + tail for head, tail in zip(heads, tails)]
    head, tail, whole = pad_rows(heads), pad_rows(tails), pad_rows(wholes)
    expected = run(model, "eager", whole)
    cache = CACHES[cache_name](model.config.text_config)
    first = run(model, kernel_name, head, past_key_values=cache, use_cache=True)
    tail_valid, positions = tail["attention_mask"].bool(), torch.zeros_like(tail["input_ids"])
    for row, valid in enumerate(tail_valid):
        positions[row, valid] = positions_of(model, whole)[row, -int(valid.sum()) :]
    both = torch.cat([head["attention_mask"], tail["attention_mask"]], dim=1)
    tail |= {"attention_mask": both, "position_ids": positions}
    second = run(model, kernel_name, tail, past_key_values=cache, use_cache=True)
    for row, (before, after) in enumerate(zip(heads, tails)):
        logits = torch.cat([first.logits[row, -len(before.ids) :], second.logits[row, -len(after.ids) :]])
        torch.testing.assert_close(logits, expected.logits[row, -len(logits) :], **CLOSE)


@pytest.mark.parametrize("kernel_name", ["eager", "sdpa", "flash_attention_2"])
def test_pictures_in_a_static_cache_equal_no_cache(kernel_name, flash):
    """The kernels see more key places than there are tokens."""
    model, batch = tiny_model(), padded_batch(random_rows(4, 3), 4)
    cache = StaticCache(config=model.config.text_config, max_cache_len=80)
    cached = run(model, kernel_name, batch, past_key_values=cache, use_cache=True)
    assert_same_valid(cached, run(model, "eager", batch, use_cache=False), batch)


# ---- drawing


class Drawing:
    """Pictures in the middle of being drawn, one per row, each of its own size."""

    def __init__(self, model, contexts, grids, seed=0):
        self.model, self.rows = model, rows_of(contexts, seed)
        generator = torch.Generator().manual_seed(seed)
        self.num_latents = [rows * columns for rows, columns in grids]
        self.latents = torch.randn(len(grids), max(self.num_latents), 16, generator=generator)
        ids = [latent_position_ids(model.config, grid) for grid in grids]
        self.position_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        self.t = torch.tensor(0.6)

    @torch.no_grad()
    def velocities(self, kernel):
        """One step under the cached contexts; per row, without padding."""
        model, layers, past_valid = self.model, [], None
        positions = torch.zeros(len(self.rows), dtype=torch.long)
        with attention_kernel(model, kernel):
            if any(row.ids for row in self.rows):
                batch = pad_rows(self.rows)
                past_valid = batch["attention_mask"].bool()
                positions = torch.where(past_valid, positions_of(model, batch) + 1, 0).amax(1)
                layers = [(layer.keys, layer.values) for layer in model(**batch, use_cache=True).past_key_values.layers]
            past_length = 0 if past_valid is None else past_valid.shape[1]
            layout = PackedLayout.noisy_blocks(self.num_latents, positions, past_length, past_valid)
            context = drawing_context(model, layers, layout, self.position_ids)
            out = model.predict_velocity(self.latents, self.t, context)
        return [velocity[:count] for velocity, count in zip(out, self.num_latents)]

    @torch.no_grad()
    def velocity_in_a_pack(self, number):
        """The same picture as the noisy span of a training pack that holds its context too."""
        model, row, count = self.model, self.rows[number], self.num_latents[number]
        batch = pad_rows([row])
        context, start = positions_of(model, batch)[0], len(row.ids)
        length = start + count + 2
        mask = torch.ones(length, length, dtype=torch.bool)
        mask[:start] = False
        before = layout_of(model.config, batch["input_ids"])
        mask[:start, :start] = before.dense_mask()[0, 0]
        places = find_placeholders(model.config, batch["input_ids"])
        ids = torch.cat([batch["input_ids"][0], torch.tensor([VISION_START, *[LATENT] * count, VISION_END])])
        is_text = torch.cat([~(places.image | places.latent)[0], torch.tensor([True, *[False] * count, True])])
        noisy = torch.arange(start + 1, start + 1 + count)
        side = model.config.latent_patch_size
        grids = [(height // 4, width // 4) for height, width in row.sizes]
        clean = [
            unpatchify_latents(tokens, grid, side)
            for tokens, grid in zip(model.encode_images(row.pictures, sample_posterior=False), grids)
        ]
        clean_count = sum(rows * columns for rows, columns in grids)
        clean_ids = [latent_position_ids(model.config, grid) for grid in grids]
        output = model(
            sequence_length=length,
            sample_lens=[length],
            packed_text_ids=ids[is_text],
            packed_text_indexes=is_text.nonzero()[:, 0],
            packed_position_ids=torch.cat([context, (context[-1] + 1).expand(count + 2)]),
            nested_attention_masks=[mask],
            packed_vit_tokens=torch.cat(row.patches),
            packed_vit_token_indexes=places.image[0].nonzero()[:, 0],
            packed_vit_position_ids=torch.cat([grid_position_ids(*grid, 6) for grid in row.grids]),
            vit_token_seqlens=torch.tensor([rows * columns for rows, columns in row.grids]),
            padded_latent=[*clean, torch.zeros(4, side, count * side)],
            patchified_vae_latent_shapes=[*grids, (1, count)],
            packed_latent_position_ids=torch.cat([*clean_ids, self.position_ids[number, :count]]),
            packed_vae_token_indexes=torch.cat([places.latent[0].nonzero()[:, 0], noisy]),
            packed_timesteps=torch.cat([torch.full((clean_count,), CLEAN), self.t.logit().expand(count)]),
            noise=torch.cat([torch.zeros(clean_count, 16), self.latents[number, :count] / self.t]),
        )
        return model.llm2vae(output.last_hidden_state[noisy])


CONTEXTS = {
    "pictures": ([HEADS[0], TAILS[1]], [(2, 3), (1, 4)]),
    "text": ([[("text", 5)], [("text", 1)]], [(2, 2), (3, 1)]),
    "one row": ([HEADS[0]], [(2, 3)]),
    "nothing": ([[], []], [(2, 3), (1, 2)]),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_drawing_equals_eager(kernel, context):
    drawing = Drawing(tiny_model(), *CONTEXTS[context])
    for one, other in zip(drawing.velocities(kernel), drawing.velocities("eager")):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("kernel_name", ["eager", "sdpa", "flash_attention_2"])
def test_picture_drawn_under_a_cache_is_the_noisy_span_of_a_pack(kernel_name, flash):
    model = tiny_model()
    drawing = Drawing(model, *CONTEXTS["pictures"])
    for number, velocity in enumerate(drawing.velocities(kernel_name)):
        with attention_kernel(model, "eager"):
            torch.testing.assert_close(velocity, drawing.velocity_in_a_pack(number), **CLOSE)


def test_drawings_of_a_batch_are_those_one_by_one():
    contexts, grids = CONTEXTS["pictures"]
    together = Drawing(tiny_model(), contexts, grids)
    for number, velocity in enumerate(together.velocities("sdpa")):
        alone = Drawing(tiny_model(), contexts, grids)
        alone.rows, alone.num_latents = alone.rows[number : number + 1], alone.num_latents[number : number + 1]
        alone.latents = alone.latents[number : number + 1, : alone.num_latents[0]]
        alone.position_ids = alone.position_ids[number : number + 1, : alone.num_latents[0]]
        torch.testing.assert_close(alone.velocities("sdpa")[0], velocity, **CLOSE)


def test_frozen_context_keeps_nothing():
    layers = [(torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8)) for _ in range(2)]
    before = [(keys.clone(), values.clone()) for keys, values in layers]
    context = FrozenContext(layers)
    for number, (keys, values) in enumerate(before):
        new_keys, new_values = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4, 8)
        for _ in range(2):  # the second time gives the same: nothing was added
            all_keys, all_values = context.update(new_keys, new_values, number)
            assert torch.equal(all_keys, torch.cat([keys, new_keys], dim=2))
            assert torch.equal(all_values, torch.cat([values, new_values], dim=2))
    for (keys, values), (old_keys, old_values) in zip(context.layers, before):
        assert torch.equal(keys, old_keys) and torch.equal(values, old_values)


def test_empty_frozen_context_is_only_the_block():
    keys, values = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    out = FrozenContext([]).update(keys, values, 1)
    assert out[0] is keys and out[1] is values


# ---- plans


def expand(parts, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The bool matrix (flat queries, flat keys) that variable-length calls compute, and how often each query is."""
    sees, done = torch.zeros(rows, columns, dtype=torch.bool), torch.zeros(rows, dtype=torch.long)
    for part in parts:
        lengths_q, lengths_k = part.cu_seq_lens_q.diff().tolist(), part.cu_seq_lens_k.diff().tolist()
        assert (max(lengths_q), max(lengths_k)) == (part.max_length_q, part.max_length_k)
        assert part.cu_seq_lens_q.dtype == part.cu_seq_lens_k.dtype == torch.int32
        for q, k in zip(part.q_index.split(lengths_q), part.k_index.split(lengths_k)):
            block = torch.ones(len(q), len(k), dtype=torch.bool)
            sees[q[:, None], k[None]] = block.tril(len(k) - len(q)) if part.is_causal else block
            done[q] += 1
    return sees, done


def assert_plan_is_the_mask(layout: PackedLayout) -> None:
    sees, done = expand(
        varlen_parts(layout), layout.valid.numel(), layout.batch_size * (layout.past_length + layout.length)
    )
    mask, valid = layout.dense_mask()[:, 0], layout.valid
    assert torch.equal(sees[valid.flatten()], torch.block_diag(*mask).bool()[valid.flatten()])
    assert torch.equal(done, valid.flatten().long())  # every token once, padding never


@pytest.mark.parametrize("block", range(4))
def test_varlen_plan_of_random_packs_is_the_dense_mask(block):
    for seed in range(25 * block, 25 * (block + 1)):
        pack = training_pack(random_samples(seed), seed)
        assert_plan_is_the_mask(
            PackedLayout.from_packed(
                pack["sequence_length"],
                pack["sample_lens"],
                pack["packed_position_ids"],
                split_lens=pack["split_lens"],
                attn_modes=pack["attn_modes"],
            )
        )


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("seed", range(10))
def test_varlen_plan_of_padded_batches_and_their_suffixes_is_the_dense_mask(seed, padding_side):
    model, batch = tiny_model(), padded_batch(random_rows(seed, 3), seed, padding_side)
    ids, mask, positions = batch["input_ids"], batch["attention_mask"], positions_of(model, batch)
    assert_plan_is_the_mask(layout_of(model.config, ids, mask))
    places = find_placeholders(model.config, ids)
    inside = (places.in_image & ~places.start).any(0)
    for past in (~inside).nonzero()[1:, 0].tolist():
        assert_plan_is_the_mask(layout_of(model.config, ids[:, past:], mask, positions[:, past:], past))


def test_varlen_plan_of_drawn_blocks_is_the_dense_mask():
    past_valid = torch.tensor([[False, True, True, True], [True, True, True, False]])
    assert_plan_is_the_mask(PackedLayout.noisy_blocks([3, 5], torch.tensor([4, 2]), 4, past_valid))
    assert_plan_is_the_mask(PackedLayout.noisy_blocks([3, 5], torch.tensor([4, 2]), 4, None))
    assert_plan_is_the_mask(PackedLayout.noisy_blocks([3, 5], torch.tensor([0, 0]), 0, None))


def test_varlen_plan_is_two_calls_however_many_runs():
    """Text runs of all samples in one causal call, pictures of all samples in another."""
    pack = training_pack([[("text", 2), ("vit", 1, 2), ("text", 1)], [("vae", 1, 1), ("noise", 1, 2)]])
    layout = PackedLayout.from_packed(
        pack["sequence_length"],
        pack["sample_lens"],
        pack["packed_position_ids"],
        split_lens=pack["split_lens"],
        attn_modes=pack["attn_modes"],
    )
    causal, pictures = varlen_parts(layout)
    assert (causal.is_causal, pictures.is_causal) == (True, False)
    assert causal.cu_seq_lens_q.tolist() == [0, 4, 7]
    assert causal.cu_seq_lens_k.tolist() == [0, 4, 15]
    assert pictures.cu_seq_lens_q.tolist() == [0, 4, 7, 11]
    assert pictures.cu_seq_lens_k.tolist() == [0, 8, 11, 18]


def plan_for(kernel, layout, **kwargs):
    config = tiny_config(attn_implementation=kernel).text_config
    return prepare_attention(config, layout, torch.zeros(*layout.sample_ids.shape, 32), **kwargs)


def test_each_kernel_gets_the_mask_in_its_own_format():
    layout = PackedLayout.from_packed(5, [5], torch.arange(5), split_lens=[2, 3], attn_modes=["causal", "noise"])
    dense = layout.dense_mask()
    assert torch.equal(plan_for("sdpa", layout).mask, dense)
    eager = plan_for("eager", layout).mask
    assert torch.equal(eager == 0, dense)
    assert eager[~dense].unique().tolist() == [torch.finfo(torch.float32).min]
    for kernel in ("sdpa", "eager"):
        assert plan_for(kernel, layout).varlen is None
        assert not plan_for(kernel, layout).is_causal


def test_block_whose_context_is_not_padded_runs_without_a_mask():
    for past_valid in (None, torch.ones(2, 3, dtype=torch.bool)):
        plan = plan_for("sdpa", PackedLayout.noisy_blocks([2, 2], torch.tensor([1, 1]), 3, past_valid))
        assert plan == AttentionSpec(None, is_causal=False)
    for num_latents, past_valid in (([2, 1], None), ([2, 2], torch.tensor([[False, True, True], [True] * 3]))):
        layout = PackedLayout.noisy_blocks(num_latents, torch.tensor([1, 1]), 3, past_valid)
        assert torch.equal(plan_for("sdpa", layout).mask, layout.dense_mask())


def test_plain_text_keeps_the_fast_path_of_its_kernel(flash):
    assert plan_for("sdpa", PackedLayout.text(2, 6)) == AttentionSpec(None, is_causal=True)
    assert plan_for("flash_attention_2", PackedLayout.text(2, 6)) == AttentionSpec(None, is_causal=True)
    padded = torch.tensor([[0, 1, 1], [1, 1, 1]])
    plan = plan_for("flash_attention_2", PackedLayout.text(2, 3, padded), attention_mask=padded)
    assert torch.equal(plan.mask.long(), padded)


@pytest.mark.parametrize("kernel_name", ["eager", "sdpa", "flash_attention_2"])
def test_positions_that_jump_do_not_cut_a_text(kernel_name, flash):
    """transformers takes a step other than 1 for a new packed sequence; here it is a picture that came before."""
    batch = {
        "input_ids": padded_batch([[("text", 7)]])["input_ids"],
        "position_ids": torch.tensor([[*range(4), *range(9, 14)]]),
    }
    layout = PackedLayout.text(1, 9, position_ids=batch["position_ids"])
    assert torch.equal(plan_for("eager", layout).mask == 0, layout.dense_mask())
    outputs = []
    for first in (20, 21):
        batch["input_ids"][0, 1] = first
        outputs.append(run(tiny_model(), kernel_name, batch).logits)
    assert ((outputs[0] - outputs[1])[0, 1:].abs().amax(-1) > 1e-4).all()


def test_flash_attention_is_planned_without_a_mask(flash):
    layout = PackedLayout.from_packed(5, [5], torch.arange(5), split_lens=[2, 3], attn_modes=["causal", "full"])
    plan = plan_for(flash, layout)
    assert plan.mask is None
    assert len(plan.varlen) == 2


def test_no_file_imports_flash_attn():
    for file in Path(__file__).parents[1].glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith("flash_attn")], file.name
