# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The position embeddings against MaxText's numbers, plain loops, each other, and what they do with bad arguments.

Reference numbers are pairs `NAME.json` (facts) and `NAME.safetensors` (arrays), one per class, in `tests/positions`;
`BAGEL_POSITIONS_DIR` names another such directory, which is replayed as well. Every size, argument and tolerance comes
from the set.
"""

import cmath
import math
import re
from pathlib import Path

import pytest
import torch
from parity_data import find_sets, read_arrays, read_json
from torch import nn
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

from bagel.embeddings_bagel import multimodal_axes
from bagel.positions_bagel import (
    Embed,
    Gemma4PartialRotaryEmbedding,
    LLaMARotaryEmbedding,
    LlamaVisionRotaryEmbedding,
    PartialRotaryEmbedding,
    PositionalEmbedding,
    Qwen3OmniMoeThinkerTextRotaryEmbedding,
    Qwen3OmniMoeVisionPosEmbedInterpolate,
    Qwen3OmniMoeVisionRotaryEmbedding,
    RotaryEmbedding,
    YarnRotaryEmbedding,
    attend_on_embedding,
    interpolate_table,
)


core = pytest.mark.core

EMBEDDED = Path(__file__).parent / "positions"
FLOAT32 = {"cast_as_fprop_dtype": False}
F32, BF16 = torch.float32, torch.bfloat16


def randn(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------------------------
# Reference numbers


def fact_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.json")) if path.name != "MANIFEST.json"]


def read_cases() -> list:
    """Test parameters: every case of every file of every set."""
    parameters = []
    for folder in find_sets(EMBEDDED, "BAGEL_POSITIONS_DIR", "*.json"):
        label, marks = ("embedded", [core]) if folder == EMBEDDED else ("other", [])
        for path in fact_files(folder):
            facts = read_json(path)
            for case in facts.get("cases", []):
                name = f"{label}-{facts['name']}-{case['case']}"
                parameters.append(pytest.param(facts["name"], path, case, id=name, marks=marks))
    return parameters


CASES = read_cases()


def arrays(path: Path, case: dict) -> dict[str, torch.Tensor]:
    prefix = f"{case['case']}."
    stored = read_arrays(path.with_suffix(".safetensors"))
    return {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}


def arguments(case: dict) -> dict:
    """Constructor arguments of a case; `config` carries what has no meaning here, dtypes are given by name."""
    given = {name: value for name, value in case["constructor"].items() if name != "config"}
    return {name: getattr(torch, value) if isinstance(value, str) else value for name, value in given.items()}


def replay_embed(case, t):
    module = Embed(**arguments(case))
    module.load_state_dict({"embedding": t["embedding"]})
    return {"output": module(t["inputs"]), "attend_output": module.attend(t["query"])}


def replay_attend_on_embedding(case, t):
    query = t["query"].to(getattr(torch, case["call"]["query_dtype_at_call"]))
    return {"output": attend_on_embedding(query, t["embedding_table"], getattr(torch, case["call"]["attend_dtype"]))}


def replay_rotary(kind):
    def replay(case, t):
        module = kind(**arguments(case))
        if "apply_rotary" in case["call"]:
            return {"output": module.apply_rotary(t["inputs"], t["cos"], t["sin"])}
        if "rotary_dim" in case:
            assert module.rotary_dim == case["rotary_dim"]
        return {"output": module(t["inputs"], t.get("position")), "timescale": module.timescale}

    return replay


def replay_yarn(case, t):
    module = YarnRotaryEmbedding(**arguments(case))
    rows = module.freqs_cis[t["freqs_rows"].long()]
    assert list(module.freqs_cis.shape) == case["freqs_cis_full_shape"]
    return {
        "output": module(t["inputs"], t.get("position")),
        "freqs_cis_real": rows.real,
        "freqs_cis_imag": rows.imag,
    }


def replay_positional(case, t):
    return {"output": PositionalEmbedding(**arguments(case))(case["call"]["seq_len"], t.get("position"))}


def replay_llama_vision(case, t):
    module = LlamaVisionRotaryEmbedding(**arguments(case))
    table = module.freqs_cis
    return {"output": module(t["inputs"]), "freqs_cis_real": table.real, "freqs_cis_imag": table.imag}


def replay_vision_rotary(case, t):
    module = Qwen3OmniMoeVisionRotaryEmbedding(**arguments(case))
    if "valid_grid" in t:
        return {"output": module(t["inputs"], *case["grid"], token_mask=t["token_mask"], valid_grid=t["valid_grid"])}
    size = case["call"]["compute_cos_sin"]
    cos, sin = module.compute_cos_sin(*size)
    output = module(t["inputs"], *size)
    assert torch.equal(module(t["inputs"][0], *size), output[0])
    return {"output": output, "cos": cos, "sin": sin, "row_col": module.patch_positions(*size)}


def replay_interpolate(case, t):
    module = Qwen3OmniMoeVisionPosEmbedInterpolate(**arguments(case))
    module.load_state_dict({"pos_embed": t["pos_embed"]})
    return {"output": module(*case["grid"], t.get("video_grid_thw"), t.get("attention_mask"))}


def replay_mrope(case, t):
    module = Qwen3OmniMoeThinkerTextRotaryEmbedding(**arguments(case))
    axes = multimodal_axes(module.mrope_section, module.rotary_dim // 2)
    assert "".join("THW"[axis] for axis in axes) == case["axis_of_frequency_slot"]
    forms = [module(t["inputs"], position) for name, position in t.items() if name.startswith("position")]
    assert all(torch.equal(form, forms[0]) for form in forms)
    return {"output": forms[0], "timescale": module.timescale}


def replay_deepseek(case, t):
    """No class of the documentation; made of one: adjacent pairs of the last features, heads before the sequence."""
    given = case["constructor"]
    width = int(given["head_dim"] * given.get("partial_rotary_factor", 1 / 8))
    module = LLaMARotaryEmbedding(1, given["rope_theta"], width, use_scale=False, **FLOAT32)
    sign = -1 if "reverse=True" in case["call"]["__call__"] else 1
    x = t["inputs"].transpose(1, 2)
    turned = module(x[..., -width:], sign * t["position"])
    return {"output": torch.cat([x[..., :-width], turned], dim=-1).transpose(1, 2)}


REPLAYS = {
    "Embed": replay_embed,
    "attend_on_embedding": replay_attend_on_embedding,
    "RotaryEmbedding": replay_rotary(RotaryEmbedding),
    "PartialRotaryEmbedding": replay_rotary(PartialRotaryEmbedding),
    "Gemma4PartialRotaryEmbedding": replay_rotary(Gemma4PartialRotaryEmbedding),
    "LLaMARotaryEmbedding": replay_rotary(LLaMARotaryEmbedding),
    "YarnRotaryEmbedding": replay_yarn,
    "PositionalEmbedding": replay_positional,
    "LlamaVisionRotaryEmbedding": replay_llama_vision,
    "Qwen3OmniMoeVisionRotaryEmbedding": replay_vision_rotary,
    "Qwen3OmniMoeVisionPosEmbedInterpolate": replay_interpolate,
    "Qwen3OmniMoeThinkerTextRotaryEmbedding": replay_mrope,
    "extra_DeepSeekV4RotaryEmbedding": replay_deepseek,
}


def is_outside_the_table(case: dict) -> bool:
    return "output_gather" in case["outputs"]


def assert_within(case: dict, name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Same shape and dtype; numbers within the absolute or relative tolerance of the case, integers equal."""
    assert actual.shape == expected.shape, f"{name} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    if not expected.is_floating_point():
        assert actual.tolist() == expected.tolist()
        return
    assert actual.dtype == expected.dtype
    atol, rtol = case["suggested_atol"].get(name, 0.0), case.get("suggested_rtol", {}).get(name, 0.0)
    assert atol or rtol, f"the set states no tolerance for {name}"
    torch.testing.assert_close(actual.detach(), expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize(("name", "path", "case"), [p for p in CASES if not is_outside_the_table(p.values[2])])
def test_every_reference_case_is_reproduced(name, path, case):
    t = arrays(path, case)
    actual = REPLAYS[name](case, t)
    assert actual.keys() == case["outputs"].keys()
    for output, value in actual.items():
        assert_within(case, output, value, t[output])


@pytest.mark.parametrize(("name", "path", "case"), [p for p in CASES if is_outside_the_table(p.values[2])])
def test_reference_ids_outside_the_table_are_refused_where_jax_reads_another_row(name, path, case):
    """JAX wraps and clamps, or gives zeros, depending on how it looks up; neither is documented."""
    t = arrays(path, case)
    module = Embed(case["constructor"]["num_embeddings"], case["constructor"]["num_features"])
    module.load_state_dict({"embedding": t["embedding"]})
    inside = (t["inputs"] >= 0) & (t["inputs"] < module.num_embeddings)
    assert 0 < inside.sum() < len(inside)
    for reference in ("output_gather", "output_iota"):
        assert_within(case, reference, module(t["inputs"][inside]), t[reference][inside])
    for index in t["inputs"][~inside]:
        with pytest.raises(IndexError):
            module(index[None])


# --------------------------------------------------------------------------------------------------------------------
# Formulas, written once more in plain loops


def by_hand(inputs: torch.Tensor, pairs: list[tuple[int, int]], angle) -> torch.Tensor:
    """Pair i of every head as a complex number, times exp(i angle(batch, place, i)); other features are copied."""
    out = inputs.double().clone()
    for batch, place in torch.cartesian_prod(*map(torch.arange, inputs.shape[:2])).tolist():
        for number, (first, second) in enumerate(pairs):
            turn = cmath.exp(1j * angle(batch, place, number))
            for head in range(inputs.shape[2]):
                turned = complex(*inputs[batch, place, head, [first, second]].tolist()) * turn
                out[batch, place, head, first], out[batch, place, head, second] = turned.real, turned.imag
    return out.float()


def halves(width: int) -> list[tuple[int, int]]:
    return [(j, j + width // 2) for j in range(width // 2)]


def adjacent(width: int) -> list[tuple[int, int]]:
    return [(j, j + 1) for j in range(0, width, 2)]


def close(actual, expected, atol=2e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


POSITION = torch.tensor([[0, 1, 7, 40, 12], [3, 3, 2, 90, 0]])


@core
def test_rotary_turns_halves_by_position_over_timescale():
    x = randn(2, 5, 3, 12)
    module = RotaryEmbedding(2, 5000, 12, rope_linear_scaling_factor=4.0, **FLOAT32)

    def timescale(pair):
        return 4 * 2 * 2500 ** (2 * pair / 12)

    close(module.timescale, torch.tensor([timescale(pair) for pair in range(6)]), atol=1e-2)
    close(module(x, POSITION), by_hand(x, halves(12), lambda b, s, i: POSITION[b, s].item() / timescale(i)))


@core
def test_positions_may_be_fractions_and_shared_by_the_batch():
    x, position = randn(3, 2, 1, 8), torch.tensor([[0.25, 7.75]])
    module = RotaryEmbedding(1, 100, 8, **FLOAT32)
    close(module(x, position), by_hand(x, halves(8), lambda b, s, i: position[0, s].item() / 100 ** (i / 4)))


@core
def test_linear_scaling_divides_positions():
    x = randn(2, 5, 1, 16)
    scaled = RotaryEmbedding(1, 10000, 16, rope_linear_scaling_factor=8.0, **FLOAT32)(x, POSITION)
    close(scaled, RotaryEmbedding(1, 10000, 16, **FLOAT32)(x, POSITION / 8))


@core
@pytest.mark.parametrize(("width", "factor", "turned"), [(16, 0.25, 4), (10, 0.65, 6), (8, 1.0, 8), (7, 0.6, 4)])
def test_partial_rotary_turns_the_first_features_as_a_small_head(width, factor, turned):
    x = randn(2, 5, 2, width)
    module = PartialRotaryEmbedding(1, 1000, width, partial_rotary_factor=factor, **FLOAT32)
    expected = by_hand(x, halves(turned), lambda b, s, i: POSITION[b, s].item() / 1000 ** (2 * i / turned))
    close(module(x, POSITION), expected)
    assert module.rotary_dim == turned
    assert torch.equal(module(x, POSITION)[..., turned:], x[..., turned:])


@core
@pytest.mark.parametrize(("width", "factor", "pairs"), [(16, 0.25, 2), (20, 0.35, 3), (12, 1.0, 6), (8, 0.0, 0)])
def test_proportional_rotary_turns_the_fastest_pairs_of_the_whole_head(width, factor, pairs):
    x = randn(2, 5, 2, width)
    module = Gemma4PartialRotaryEmbedding(1, 1000, width, partial_rotary_factor=factor, **FLOAT32)
    expected = by_hand(x, halves(width)[:pairs], lambda b, s, i: POSITION[b, s].item() / 1000 ** (2 * i / width))
    close(module(x, POSITION), expected)
    assert module.timescale.isinf().tolist() == [False] * pairs + [True] * (width // 2 - pairs)
    still = [j for j in range(width) if j % (width // 2) >= pairs]
    assert torch.equal(module(x, POSITION)[..., still], x[..., still])


def llama_frequency(frequency: float) -> float:
    wavelength = 2 * math.pi / frequency
    if wavelength < 8192 / 4:
        return frequency
    if wavelength > 8192:
        return frequency / 8
    smooth = (8192 / wavelength - 1) / 3
    return (1 - smooth) * frequency / 8 + smooth * frequency


@core
@pytest.mark.parametrize("smallest", [1, 3])
def test_llama_rotary_turns_adjacent_pairs_and_slows_down_the_long_waves(smallest):
    x, width = randn(2, 5, 2, 24), 24
    plain = [1 / (smallest * (500000 / smallest) ** (2 * i / width)) for i in range(width // 2)]
    scaled = [llama_frequency(frequency) for frequency in plain]
    assert {round(a / b, 3) for a, b in zip(plain, scaled)} >= {1.0, 8.0}
    assert any(1.001 < a / b < 7.999 for a, b in zip(plain, scaled))  # all three kinds of waves
    for use_scale, frequencies in ((True, scaled), (False, plain)):
        module = LLaMARotaryEmbedding(smallest, 500000, width, use_scale=use_scale, **FLOAT32)
        expected = by_hand(x, adjacent(width), lambda b, s, i, f=frequencies: POSITION[b, s].item() * f[i])
        close(module(x, POSITION), expected)
        torch.testing.assert_close(
            module.timescale, torch.tensor([1 / f for f in frequencies for _ in "xy"])[None, None, None]
        )


def yarn_frequencies(width, original, fast, slow, theta, factor, truncate) -> list[float]:
    def pair_of(turns):
        return width * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

    low, high = pair_of(fast), pair_of(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramps = [min(max((i - low) / (high - low), 0), 1) for i in range(width // 2)]
    return [theta ** (-2 * i / width) * ((1 - ramp) + ramp / factor) for i, ramp in enumerate(ramps)]


@core
@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("scaling", [True, False])
def test_yarn_blends_fast_and_slow_pairs_and_returns_halves(interleave, truncate, scaling):
    x, width = randn(2, 5, 2, 32), 32
    module = YarnRotaryEmbedding(
        width, 128, 256, 20, 2, 500.0, 6, interleave=interleave, truncate=truncate, attention_scaling=scaling, **FLOAT32
    )
    frequencies = yarn_frequencies(width, 256, 20, 2, 500.0, 6, truncate)
    order = [j for start in (0, 1) for j in range(start, width, 2)] if interleave else list(range(width))
    expected = by_hand(x[..., order], halves(width), lambda b, s, i: POSITION[b, s].item() * frequencies[i])
    close(module(x, POSITION), expected * (0.1 * math.log(6) + 1 if scaling else 1), atol=5e-5)
    angles = torch.outer(torch.arange(128.0), torch.tensor(frequencies))
    torch.testing.assert_close(module.freqs_cis, torch.polar(torch.ones(128, 16), angles), atol=5e-5, rtol=0)


@core
def test_yarn_pairwise_returns_what_halves_return_in_the_order_of_the_input():
    x = randn(2, 5, 2, 16)
    output = YarnRotaryEmbedding(16, **FLOAT32)(x, POSITION)
    pairwise = YarnRotaryEmbedding(16, pairwise=True, **FLOAT32)(x, POSITION)
    assert torch.equal(pairwise[..., 0::2], output[..., :8])
    assert torch.equal(pairwise[..., 1::2], output[..., 8:])


@core
def test_yarn_with_factor_one_is_plain_rotary():
    x = randn(2, 5, 2, 16)
    yarn = YarnRotaryEmbedding(16, rope_factor=1, interleave=False, attention_scaling=True, **FLOAT32)
    close(yarn(x, POSITION), RotaryEmbedding(1, 10000, 16, **FLOAT32)(x, POSITION))
    assert YarnRotaryEmbedding(16, rope_factor=0.5, attention_scaling=True).output_scale == 1.0


@core
def test_yarn_reads_positions_like_rows_of_its_table():
    """Fractions are cut off, positions past the end read the last row, negative ones count from the end."""
    x, module = randn(1, 4, 1, 8), YarnRotaryEmbedding(8, 10, **FLOAT32)
    rows = torch.tensor([[2, 9, 9, 7]])
    assert torch.equal(module(x, torch.tensor([[2.9, 9.0, 400.0, -3.0]])), module(x, rows))


@core
@pytest.mark.parametrize(("width", "count"), [(8, 4), (7, 3), (2, 1), (1, 0)])
def test_positional_embedding_is_sines_then_cosines_up_to_the_longest_wave(width, count):
    inverse = [500 ** (-i / max(count - 1, 1)) for i in range(count)]
    for position in (None, torch.tensor([4, 0, 11]), torch.tensor([[0.5, 2, 30], [1, 1, 1]])):
        output = PositionalEmbedding(width, 500)(3, position)
        used = torch.arange(3) if position is None else position
        angles = used[..., None].double() * torch.tensor(inverse, dtype=torch.float64)
        close(output, torch.cat([angles.sin(), angles.cos()], dim=-1).float(), atol=1e-5)
        assert output.shape == (*used.shape, 2 * count)


@core
def test_positional_embedding_does_not_read_the_length_beside_positions():
    module = PositionalEmbedding(6)
    assert torch.equal(module(99, torch.tensor([1, 5])), module(2, torch.tensor([1, 5])))


@core
@pytest.mark.parametrize(
    ("section", "axes"),
    [((2, 2, 2), "THWTHW"), ((4, 1, 1), "THWTTT"), ((3, 2, 1), "THWTHT"), ((1, 2, 3), "THWTHW"), ((6, 0, 0), "TTTTTT")],
)
def test_each_pair_of_a_multimodal_head_turns_with_its_own_axis(section, axes):
    x = randn(2, 5, 2, 12)
    position = torch.stack([POSITION, POSITION + 5, 3 * POSITION])
    module = Qwen3OmniMoeThinkerTextRotaryEmbedding(1, 300, 12, mrope_section=section, **FLOAT32)
    expected = by_hand(x, halves(12), lambda b, s, i: position["THW".index(axes[i]), b, s].item() / 300 ** (2 * i / 12))
    close(module(x, position), expected, atol=5e-5)


@core
def test_multimodal_rotary_scales_and_copies():
    x, position = randn(2, 5, 2, 16), torch.stack([POSITION, POSITION + 1, POSITION + 2])
    small = Qwen3OmniMoeThinkerTextRotaryEmbedding(1, 300, 8, mrope_section=(2, 1, 1), **FLOAT32)(x[..., :8], position)
    module = Qwen3OmniMoeThinkerTextRotaryEmbedding(
        1, 300, 16, mrope_section=(2, 1, 1), attention_scaling=1.5, partial_rotary_factor=0.5, **FLOAT32
    )
    close(module(x, position), torch.cat([1.5 * small, x[..., 8:]], dim=-1))


@core
def test_text_positions_are_three_equal_ones_and_that_is_plain_rotary():
    x = randn(2, 5, 2, 128)
    module = Qwen3OmniMoeThinkerTextRotaryEmbedding(1, 10000, 128, **FLOAT32)
    assert torch.equal(module(x, POSITION), module(x, POSITION.expand(3, 2, 5)))
    assert torch.equal(module(x, POSITION), RotaryEmbedding(1, 10000, 128, **FLOAT32)(x, POSITION))


@core
def test_three_positions_may_come_first_or_last_and_the_documented_form_wins():
    module = Qwen3OmniMoeThinkerTextRotaryEmbedding(1, 100, 8, mrope_section=(2, 1, 1), **FLOAT32)
    for batch, sequence in ((2, 4), (1, 3), (3, 5), (1, 4)):
        x, position = randn(batch, sequence, 2, 8), torch.randint(50, (3, batch, sequence))
        assert torch.equal(module(x, position), module(x, position.movedim(0, -1)))
    x, ambiguous = randn(3, 3, 2, 8), torch.randint(50, (3, 3, 3))
    as_documented = torch.stack([module(x[[b]], ambiguous[:, [b]])[0] for b in range(3)])
    assert torch.equal(module(x, ambiguous), as_documented)


@core
def test_llama_vision_turns_columns_then_rows_from_one_and_leaves_the_class_token():
    x = randn(2, 10, 2, 16)
    module = LlamaVisionRotaryEmbedding(50, 16, 32, 2, 100.0, **FLOAT32)

    def angle(b, patch, pair):
        if patch == 9:
            return 0.0
        coordinate = (patch % 3, patch // 3)[pair // 4] + 1
        return coordinate * 100.0 ** (-2 * (pair % 4) / 8)

    close(module(x), by_hand(x, adjacent(16), angle))
    assert torch.equal(module(x)[:, -1], x[:, -1])
    assert torch.equal(module(x, torch.full((2, 10), 5)), module(x))
    assert module.freqs_cis.shape == (10, 1, 8)


def block_order(height, width, merge) -> list[tuple[int, int]]:
    """(row, column) of patches in blocks of merge x merge."""
    return [
        (block_row * merge + row, block_column * merge + column)
        for block_row in range(height // merge)
        for block_column in range(width // merge)
        for row in range(merge)
        for column in range(merge)
    ]


@core
@pytest.mark.parametrize(("frames", "height", "width", "merge"), [(1, 4, 6, 2), (2, 3, 2, 1), (3, 3, 6, 3)])
def test_vision_rotary_turns_rows_then_columns_in_the_order_of_blocks(frames, height, width, merge):
    places = block_order(height, width, merge) * frames
    x = randn(2, len(places), 2, 12)
    module = Qwen3OmniMoeVisionRotaryEmbedding(24, 2, merge, 50.0, **FLOAT32)
    assert [tuple(place) for place in module.patch_positions(frames, height, width).tolist()] == places

    def angle(b, patch, pair):
        return places[patch][pair // 3] * 50.0 ** (-2 * (pair % 3) / 6)

    close(module(x, frames, height, width), by_hand(x, halves(12), angle))
    cos, sin = module.compute_cos_sin(frames, height, width)
    close(cos**2 + sin**2, torch.ones(len(places), 12))


@core
def test_vision_rotary_of_a_padded_batch_is_that_of_each_picture():
    module = Qwen3OmniMoeVisionRotaryEmbedding(16, 2, 2, **FLOAT32)
    x, grids = randn(3, 48, 2, 8), torch.tensor([[1, 4, 6], [2, 4, 2], [2, 4, 6]])
    counts = grids.prod(1)
    mask = torch.arange(48) < counts[:, None]
    masked = module(x, 2, 4, 6, token_mask=mask, valid_grid=grids)
    assert torch.equal(masked, module(x, 2, 4, 6, valid_grid=grids))
    for row, count in enumerate(counts.tolist()):
        close(masked[row, :count], module(x[row, :count], *grids[row].tolist()), atol=1e-6)
        assert torch.equal(masked[row, count:], x[row, count:])
    half = module(x, 2, 4, 6, token_mask=torch.arange(48).expand(3, -1) < 24)
    assert torch.equal(half[:, :24], module(x, 2, 4, 6)[:, :24])
    assert torch.equal(half[:, 24:], x[:, 24:])


@core
@pytest.mark.parametrize(
    ("side", "height", "width", "merge"), [(4, 6, 8, 2), (5, 3, 3, 1), (7, 9, 1, 1), (3, 4, 4, 4), (6, 6, 6, 2)]
)
def test_learned_grid_is_read_like_an_image_that_is_resized(side, height, width, merge):
    module = Qwen3OmniMoeVisionPosEmbedInterpolate(side**2, 8, merge, **FLOAT32)
    image = module.pos_embed.detach().T.unflatten(1, (side, side))[None]
    resized = nn.functional.interpolate(image, (height, width), mode="bilinear", align_corners=True)[0]
    expected = torch.stack([resized[:, row, column] for row, column in block_order(height, width, merge)])
    close(module(2, height, width), expected.repeat(2, 1), atol=5e-6)


@core
def test_learned_grid_at_its_own_size_is_the_table():
    module = Qwen3OmniMoeVisionPosEmbedInterpolate(25, 8, 1, **FLOAT32)
    close(module(1, 5, 5), module.pos_embed, atol=1e-6)
    close(interpolate_table(module.pos_embed, torch.tensor([[1, 5, 5], [1, 1, 1]]))[-1], module.pos_embed[0], atol=1e-6)


@core
def test_learned_grid_of_a_padded_batch_is_that_of_each_picture():
    module = Qwen3OmniMoeVisionPosEmbedInterpolate(16, 4, 2, **FLOAT32)
    grids = torch.tensor([[1, 4, 6], [2, 4, 2], [2, 4, 6]])
    mask = torch.arange(48) < grids.prod(1)[:, None]
    batch = module(2, 4, 6, video_grid_thw=grids)
    assert torch.equal(batch, module(2, 4, 6, video_grid_thw=grids, attention_mask=mask.int()))
    for row, grid in enumerate(grids.tolist()):
        close(batch[row, : math.prod(grid)], module(*grid), atol=1e-6)
        assert not batch[row, math.prod(grid) :].any()
    assert torch.equal(module(2, 4, 6, attention_mask=mask), module(2, 4, 6) * mask[..., None])


# ---- tokens


@core
@pytest.mark.parametrize("ids", [torch.tensor([4, 0]), torch.tensor([[[10, 3]]], dtype=torch.uint8), torch.tensor(7)])
def test_embed_looks_up_rows_for_ids_of_any_shape(ids):
    module = Embed(11, 6)
    assert module(ids).shape == (*ids.shape, 6)
    assert torch.equal(module(ids), module.embedding[ids.long()])


@core
def test_embed_truncates_float_ids_that_it_was_told_to_cast():
    module = Embed(4, 2, cast_input_dtype=torch.int32)
    assert torch.equal(module(torch.tensor([1.9, 0.2, -0.7])), module.embedding[[1, 0, 0]])


@core
@pytest.mark.parametrize(("dtype", "attend_dtype"), [(F32, None), (BF16, None), (BF16, F32), (F32, BF16)])
def test_embed_returns_the_dtypes_that_it_was_given(dtype, attend_dtype):
    module, ids = Embed(5, 6, dtype=dtype, attend_dtype=attend_dtype), torch.tensor([1, 2])
    assert torch.equal(module(ids), module.embedding[ids].to(dtype))
    assert module.attend(randn(2, 6)).dtype == (attend_dtype or dtype)


@core
def test_attend_rounds_the_table_and_not_the_query():
    table, query = randn(9, 64, seed=1), randn(3, 64, seed=2)
    rounded = query.double() @ table.bfloat16().double().T
    close(attend_on_embedding(query, table, F32), rounded.float(), atol=1e-5)
    assert (query @ table.T - rounded).abs().max() > 1e-2
    assert (query.bfloat16().double() @ table.bfloat16().double().T - rounded).abs().max() > 1e-2


@core
def test_tables_start_normal_with_their_width_as_fan_in_or_as_they_are_told():
    torch.manual_seed(0)
    assert Embed(1000, 64).embedding.std().item() == pytest.approx(1 / 8, rel=0.02)
    assert not Embed(3, 2, embedding_init=nn.init.zeros_).embedding.any()
    assert Qwen3OmniMoeVisionPosEmbedInterpolate(900, 64, 1).pos_embed.std().item() == pytest.approx(1 / 8, rel=0.02)


# --------------------------------------------------------------------------------------------------------------------
# Against each other and against transformers


MODULES = {
    "Embed": lambda: Embed(5, 4),
    "RotaryEmbedding": lambda **kw: RotaryEmbedding(1, 10000, 16, **kw),
    "PartialRotaryEmbedding": lambda **kw: PartialRotaryEmbedding(1, 10000, 16, partial_rotary_factor=0.5, **kw),
    "Gemma4PartialRotaryEmbedding": lambda **kw: Gemma4PartialRotaryEmbedding(1, 10000, 16, **kw),
    "LLaMARotaryEmbedding": lambda **kw: LLaMARotaryEmbedding(1, 500000, 16, **kw),
    "YarnRotaryEmbedding": lambda **kw: YarnRotaryEmbedding(16, **kw),
    "Qwen3OmniMoeThinkerTextRotaryEmbedding": lambda **kw: Qwen3OmniMoeThinkerTextRotaryEmbedding(
        1, 10000, 16, mrope_section=(4, 2, 2), **kw
    ),
    "LlamaVisionRotaryEmbedding": lambda **kw: LlamaVisionRotaryEmbedding(28, 14, 32, 2, **kw),
    "Qwen3OmniMoeVisionRotaryEmbedding": lambda **kw: Qwen3OmniMoeVisionRotaryEmbedding(32, 2, 1, **kw),
    "PositionalEmbedding": lambda **kw: PositionalEmbedding(8, **kw),
    "Qwen3OmniMoeVisionPosEmbedInterpolate": lambda **kw: Qwen3OmniMoeVisionPosEmbedInterpolate(9, 4, 1, **kw),
}
ALONG_A_SEQUENCE = [name for name in MODULES if "RotaryEmbedding" in name and "Vision" not in name]
WITHOUT_PARAMETERS = [name for name in MODULES if "RotaryEmbedding" in name or name == "PositionalEmbedding"]


def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Call any of them; `x` (2, 5, heads, 16) is 5 tokens, a row of 5 patches, or 2 x 2 patches and a class token."""
    if isinstance(module, Embed):
        return module(torch.tensor([1, 4], device=x.device))
    if isinstance(module, PositionalEmbedding):
        return module(5)
    if isinstance(module, Qwen3OmniMoeVisionPosEmbedInterpolate):
        return module(1, 2, 5)
    if isinstance(module, Qwen3OmniMoeVisionRotaryEmbedding):
        return module(x, 1, 1, 5)
    return module(x, POSITION.to(x.device))


@core
@pytest.mark.parametrize("name", ALONG_A_SEQUENCE)
def test_scores_depend_on_the_distance_alone(name):
    module, query, key = MODULES[name](**FLOAT32), randn(2, 5, 3, 16, seed=1), randn(2, 5, 3, 16, seed=2)

    def scores(shift):
        return torch.einsum("bqhd,bkhd->bhqk", module(query, POSITION + shift), module(key, POSITION + shift))

    close(scores(0), scores(37), atol=2e-4)
    assert (scores(0) - torch.einsum("bqhd,bkhd->bhqk", query, key)).abs().max() > 0.1
    close(module(query, POSITION).norm(dim=-1), query.norm(dim=-1))


@core
@pytest.mark.parametrize("name", ["LLaMARotaryEmbedding", "YarnRotaryEmbedding"])
def test_tokens_without_positions_are_counted(name):
    module, x = MODULES[name](**FLOAT32), randn(2, 5, 1, 16)
    assert torch.equal(module(x), module(x, torch.arange(5)[None]))


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"factor": 4.0, "attention_factor": 1.0, "original_max_position_embeddings": 4096}


@core
@pytest.mark.parametrize(
    ("rope_type", "parameters", "ours"),
    [
        ("default", {}, RotaryEmbedding(1, 10000, 8)),
        ("linear", {"factor": 4.0}, RotaryEmbedding(1, 10000, 8, rope_linear_scaling_factor=4.0)),
        ("proportional", {"partial_rotary_factor": 0.5}, Gemma4PartialRotaryEmbedding(1, 10000, 8, True, BF16, 0.5)),
        ("llama3", LLAMA3, LLaMARotaryEmbedding(1, 10000, 8)),
        ("yarn", YARN, YarnRotaryEmbedding(8, rope_factor=4)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tables_are_those_of_a_transformers_decoder_with_this_rope_type(rope_type, parameters, ours):
    config = Qwen2Config(
        hidden_size=32,
        num_attention_heads=4,
        max_position_embeddings=16384,
        rope_parameters={"rope_type": rope_type, "rope_theta": 10000.0, **parameters},
    )
    theirs = Qwen2RotaryEmbedding(config)(randn(2, 5, 32), POSITION)
    for mine, table in zip(ours.compute_cos_sin(POSITION), theirs):
        close(mine, table, atol=1e-6)


@core
def test_plain_rotary_is_that_of_a_transformers_decoder():
    query, config = randn(2, 5, 3, 16), Qwen2Config(hidden_size=32, num_attention_heads=2)
    config.rope_parameters["rope_theta"] = 10000.0
    tables = Qwen2RotaryEmbedding(config)(query, POSITION)
    turned, _ = apply_rotary_pos_emb(query, query, *tables, unsqueeze_dim=2)
    close(MODULES["RotaryEmbedding"](**FLOAT32)(query, POSITION), turned, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------------
# Dtypes, devices, files


@core
@pytest.mark.parametrize(
    ("name", "cast_float32", "plain_bfloat16"),
    [
        ("RotaryEmbedding", BF16, BF16),
        ("Gemma4PartialRotaryEmbedding", BF16, BF16),
        ("PartialRotaryEmbedding", F32, BF16),
        ("LLaMARotaryEmbedding", BF16, F32),
        ("YarnRotaryEmbedding", BF16, F32),
        ("Qwen3OmniMoeThinkerTextRotaryEmbedding", BF16, F32),
        ("LlamaVisionRotaryEmbedding", BF16, F32),
        ("Qwen3OmniMoeVisionRotaryEmbedding", F32, F32),
    ],
)
def test_results_have_the_dtypes_of_the_reference(name, cast_float32, plain_bfloat16):
    """float32 inputs with the default cast to bfloat16; bfloat16 inputs without a cast."""
    make, x = MODULES[name], randn(2, 5, 2, 16)
    assert run(make(), x).dtype == cast_float32
    assert run(make(), x.bfloat16()).dtype == BF16
    assert run(make(fprop_dtype=torch.float16), x).dtype == (torch.float16 if cast_float32 == BF16 else F32)
    assert run(make(**FLOAT32), x).dtype == F32
    assert run(make(**FLOAT32), x.bfloat16()).dtype == plain_bfloat16
    close(run(make(), x).float(), run(make(**FLOAT32), x), atol=4e-2)


@core
def test_the_copied_part_of_partial_rotary_is_not_rounded():
    x = randn(2, 5, 2, 16)
    output = MODULES["PartialRotaryEmbedding"]()(x, POSITION)
    assert torch.equal(output[..., 8:], x[..., 8:])
    assert torch.equal(output[..., :8], output[..., :8].bfloat16().float())


@core
def test_positional_embedding_is_cast_only_on_request_and_the_learned_grid_by_default():
    assert torch.equal(PositionalEmbedding(4, cast_as_fprop_dtype=True)(3), PositionalEmbedding(4)(3).bfloat16())
    assert PositionalEmbedding(4)(3).dtype == F32
    assert Qwen3OmniMoeVisionPosEmbedInterpolate(4, 4, 1)(1, 2, 2).dtype == BF16
    table = Qwen3OmniMoeVisionPosEmbedInterpolate(4, 4, 1, dtype=BF16, **FLOAT32)
    assert (table.pos_embed.dtype, table(1, 2, 2).dtype) == (BF16, F32)


@core
def test_vision_tables_are_cast_before_they_are_used():
    exact, _ = MODULES["Qwen3OmniMoeVisionRotaryEmbedding"](**FLOAT32).compute_cos_sin(1, 2, 2)
    cast, _ = MODULES["Qwen3OmniMoeVisionRotaryEmbedding"]().compute_cos_sin(1, 2, 2)
    assert torch.equal(cast, exact.bfloat16())


@core
@pytest.mark.parametrize("name", WITHOUT_PARAMETERS)
def test_modules_without_parameters_survive_the_meta_device_and_a_cast(name):
    """They store nothing, so there is nothing to lose."""
    x, module = randn(2, 5, 2, 16), MODULES[name](**FLOAT32)
    with torch.device("meta"):
        on_meta = MODULES[name](**FLOAT32)
    assert not on_meta.state_dict()
    assert not list(on_meta.buffers())
    assert torch.equal(run(on_meta, x), run(module, x))
    assert torch.equal(run(module.to(BF16), x), run(on_meta, x))


@core
@pytest.mark.parametrize("name", [name for name in MODULES if name != "PositionalEmbedding"])
def test_everything_happens_on_the_device_of_the_inputs(name):
    """The meta device refuses to compute with a tensor of another one."""
    assert run(MODULES[name]().to("meta"), randn(2, 5, 2, 16).to("meta")).is_meta


@core
@pytest.mark.parametrize(
    ("name", "key"), [("Embed", "embedding"), ("Qwen3OmniMoeVisionPosEmbedInterpolate", "pos_embed")]
)
def test_modules_with_a_parameter_are_the_same_after_loading(name, key, tmp_path):
    module, x = MODULES[name](), randn(2, 5, 2, 16)
    torch.save(module.state_dict(), tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt")
    assert list(loaded) == [key]
    with torch.device("meta"):
        on_meta = MODULES[name]()
    assert getattr(on_meta, key).is_meta
    for other in (MODULES[name](), on_meta.to_empty(device="cpu")):
        other.load_state_dict(loaded)
        assert torch.equal(run(other, x), run(module, x))
    on_meta.reset_parameters()
    assert not torch.equal(getattr(on_meta, key), loaded[key])


@core
@pytest.mark.parametrize("name", [*ALONG_A_SEQUENCE, "Embed", "PositionalEmbedding", "LlamaVisionRotaryEmbedding"])
def test_a_compiler_sees_one_graph(name):
    torch.compiler.reset()  # all names share the code below
    module, x = MODULES[name](), randn(2, 5, 2, 16)
    compiled = torch.compile(lambda x: run(module, x), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), run(module, x))


@core
def test_the_learned_grid_and_the_token_table_receive_gradients():
    grid, table = Qwen3OmniMoeVisionPosEmbedInterpolate(9, 4, 1), Embed(5, 4)
    grid(1, 5, 5).float().sum().backward()
    close(grid.pos_embed.grad.sum(0), torch.full((4,), 25.0), atol=1e-4)
    table.attend(table(torch.tensor([1, 1, 3]))).sum().backward()
    assert table.embedding.grad.abs().sum(1).gt(0).all()


# --------------------------------------------------------------------------------------------------------------------
# Bad arguments


def refused(call, *words) -> None:
    """The call raises a one-line ValueError that holds every word."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message.strip()
    for word in words:
        assert re.search(word, message), f"{word!r} is not in {message!r}"


X, IDS = randn(1, 3, 2, 8), torch.arange(3)[None]


def of_rotary(kind) -> dict[str, tuple]:
    """What all rotary classes with one position per token are asked: situation -> call, words of the refusal."""
    return {
        "embedding_dims=7 (odd)": (lambda: kind(1, 100, 7), "embedding_dims=7", "multiple of 2"),
        "rank-3 inputs": (lambda: kind(1, 100, 8)(X[0], IDS), r"\(3, 2, 8\)", "rank 3", "rank 4"),
        "embedding_dims=6 but inputs last dim 8": (lambda: kind(1, 100, 6)(X, IDS), "8", "6", "must match"),
        "embedding_dims default 0": (lambda: kind(1, 100)(X, IDS), "8", "0", "embedding_dims"),
        "1-D position": (lambda: kind(1, 100, 8)(X, IDS[0]), r"\(3,\)", r"\(1, 3\)"),
        "position length 2, sequence 3": (lambda: kind(1, 100, 8)(X, IDS[:, :2]), r"\(1, 2\)", r"\(1, 3\)"),
        "position omitted / None": (lambda: kind(1, 100, 8)(X), "missing", r"\(1, 3\)"),
    }


def of_partial(kind) -> dict[str, tuple]:
    return of_rotary(kind) | {
        "factor=0": (lambda: kind(1, 100, 8, False, partial_rotary_factor=0.0)(X, IDS),),
        "factor=1.5": (lambda: kind(1, 100, 8, partial_rotary_factor=1.5), "1.5", r"\[0, 1\]", "8", "12"),
        "factor=-0.5": (lambda: kind(1, 100, 8, partial_rotary_factor=-0.5), "-0.5", r"\[0, 1\]", "8", "-4"),
        "cast_as_fprop_dtype=True, float32 inputs (output dtype)": (lambda: kind(1, 100, 8)(X, IDS),),
        "rope_linear_scaling_factor keyword": (lambda: kind(1, 100, 8, rope_linear_scaling_factor=2.0),),
    }


def mrope(dims=8, section=(2, 1, 1), **kwargs) -> Qwen3OmniMoeThinkerTextRotaryEmbedding:
    return Qwen3OmniMoeThinkerTextRotaryEmbedding(1, 100, dims, False, mrope_section=section, **kwargs)


WIDE = randn(1, 3, 2, 12)
LLAMA_VISION = LlamaVisionRotaryEmbedding(28, 14, 16, 2, **FLOAT32)  # 2 x 2 patches, heads of 8
QWEN_VISION = Qwen3OmniMoeVisionRotaryEmbedding(16, 2, 2, **FLOAT32)  # heads of 8
GRID = Qwen3OmniMoeVisionPosEmbedInterpolate(16, 4, 2, **FLOAT32)

# One entry per situation in the sets; without words the call goes through, or has an argument that does not exist
SITUATIONS = {
    "Embed": {
        "float ids without cast_input_dtype": (lambda: Embed(5, 4)(torch.ones(2)), "integer", "float32", "cast_input"),
        "bool ids": (lambda: Embed(5, 4)(torch.ones(2).bool()), "integer", "bool"),
        "attend: query feature depth mismatch": (lambda: Embed(5, 4).attend(randn(2, 3)), "3", "4"),
        "uint8 ids": (lambda: Embed(5, 4)(torch.ones(2, dtype=torch.uint8)),),
    },
    "attend_on_embedding": {
        "query feature depth mismatch": (lambda: attend_on_embedding(randn(2, 3), randn(7, 4), F32), "3", "4"),
        "attend_dtype=bfloat16": (lambda: attend_on_embedding(randn(2, 4), randn(7, 4), BF16),),
    },
    "RotaryEmbedding": of_rotary(RotaryEmbedding),
    "PartialRotaryEmbedding": of_partial(PartialRotaryEmbedding)
    | {
        "embedding_dims default 0": (lambda: PartialRotaryEmbedding(1, 100, **FLOAT32)(X, IDS),),
        "embedding_dims=6 but inputs last dim 8": (
            lambda: PartialRotaryEmbedding(1, 100, 6, False, partial_rotary_factor=0.4)(X, IDS),
        ),
        "embedding_dims=8 but inputs last dim 6": (lambda: PartialRotaryEmbedding(1, 100, 8, False)(X[..., :6], IDS),),
        "dims=12 factor=0.25 (rotary_dim=3 odd)": (lambda: PartialRotaryEmbedding(1, 100, 12), "12", "0.25", "3", "2"),
    },
    "Gemma4PartialRotaryEmbedding": of_partial(Gemma4PartialRotaryEmbedding)
    | {
        "embedding_dims=8 but inputs last dim 6": (
            lambda: Gemma4PartialRotaryEmbedding(1, 100, 8)(X[..., :6], IDS),
            "6",
            "8",
        ),
        "dims=12 factor=0.25 (rotary_dim=3 odd)": (lambda: Gemma4PartialRotaryEmbedding(1, 100, 12, False)(WIDE, IDS),),
    },
    "LLaMARotaryEmbedding": of_rotary(LLaMARotaryEmbedding)
    | {"position omitted / None": (lambda: LLaMARotaryEmbedding(1, 100, 8, False)(X),)},
    "YarnRotaryEmbedding": {
        "embedding_dims=7 (odd)": (lambda: YarnRotaryEmbedding(7), "embedding_dims=7", "multiple of 2"),
        "rank-3 inputs": (lambda: YarnRotaryEmbedding(8)(X[0], IDS), r"\(3, 2, 8\)", "rank 3", "rank 4"),
        "embedding_dims=6 but inputs last dim 8": (lambda: YarnRotaryEmbedding(6)(X, IDS), "8", "6", "must match"),
        "1-D position": (lambda: YarnRotaryEmbedding(8)(X, IDS[0]), r"\(3,\)", r"\(1, 3\)"),
        "pairwise=True with interleave=False": (
            lambda: YarnRotaryEmbedding(8, pairwise=True, interleave=False),
            "pairwise=True requires interleave=True",
        ),
        "position >= max_position_embeddings (clamped, no error)": (
            lambda: YarnRotaryEmbedding(8, 4, **FLOAT32)(X, IDS + 10),
        ),
        "float positions (truncated to int32)": (lambda: YarnRotaryEmbedding(8, **FLOAT32)(X, IDS + 0.5),),
        "rope_theta=1 (log 0)": (lambda: YarnRotaryEmbedding(8, rope_theta=1), "rope_theta=1"),
    },
    "PositionalEmbedding": {
        "3-D position": (lambda: PositionalEmbedding(8)(5, torch.ones(2, 5, 1)), r"\(2, 5, 1\)", "rank 3", "rank 2"),
        "0-D position": (lambda: PositionalEmbedding(8)(5, torch.tensor(1)), r"\(\)", "rank 0", "rank 1"),
        "embedding_dims=7 (odd; output 6 columns)": (lambda: PositionalEmbedding(7)(3),),
        "embedding_dims=1": (lambda: PositionalEmbedding(1)(3),),
        "embedding_dims omitted": (lambda: PositionalEmbedding(),),
        "seq_len omitted": (lambda: PositionalEmbedding(8)(),),
    },
    "LlamaVisionRotaryEmbedding": {
        "rank-3 inputs": (lambda: LLAMA_VISION(randn(5, 2, 8)), r"\(5, 2, 8\)", "rank 3", "rank 4"),
        "sequence length != grid^2+1": (lambda: LLAMA_VISION(randn(1, 4, 2, 8)), "4 tokens", "5 in all"),
        "head_dim 6 (not a multiple of 4)": (lambda: LlamaVisionRotaryEmbedding(28, 14, 12, 2), "12", "6", "4"),
        "inputs head_dim differs": (lambda: LLAMA_VISION(randn(1, 5, 2, 12)), "12", "8"),
        "image_size not multiple of patch_size (floor)": (
            lambda: LlamaVisionRotaryEmbedding(33, 14, 16, 2, **FLOAT32)(randn(1, 5, 2, 8)),
        ),
        "patch_size > image_size (grid 0)": (lambda: LlamaVisionRotaryEmbedding(13, 14, 16, 2), "13", "14"),
    },
    "Qwen3OmniMoeVisionRotaryEmbedding": {
        "rank-2 inputs": (lambda: QWEN_VISION(randn(16, 8), 1, 4, 4), r"\(16, 8\)", r"\[batch, 16, heads, 8\]"),
        "sequence != T*H*W": (lambda: QWEN_VISION(randn(1, 20, 2, 8), 1, 4, 4), "20", "16"),
        "height 5 not multiple of merge 2: compute_cos_sin (drops rows)": (
            lambda: QWEN_VISION.compute_cos_sin(1, 5, 4),
            "1 x 5 x 4",
            "multiples of 2",
        ),
        "height 5 not multiple of merge 2: __call__": (
            lambda: QWEN_VISION(randn(1, 20, 2, 8), 1, 5, 4),
            "1 x 5 x 4",
            "multiples of 2",
        ),
        "head_dim 6 (not a multiple of 4)": (lambda: Qwen3OmniMoeVisionRotaryEmbedding(12, 2, 2), "12", "6", "4"),
    },
    "Qwen3OmniMoeVisionPosEmbedInterpolate": {
        "num_position_embeddings=17 (not square)": (
            lambda: Qwen3OmniMoeVisionPosEmbedInterpolate(17, 4, 2),
            "17",
            "16",
            "25",
        ),
        "height 5 not multiple of merge 2": (lambda: GRID(1, 5, 4), "1 x 5 x 4", "multiples of 2"),
        "plain image: output rank": (lambda: GRID(1, 4, 4),),
    },
    "Qwen3OmniMoeThinkerTextRotaryEmbedding": {
        "embedding_dims=7 (odd)": (lambda: mrope(7), "embedding_dims=7", "multiple of 2"),
        "default mrope_section with embedding_dims=8": (lambda: mrope(8, None), r"\(24, 20, 20\)", "4", "8"),
        "sum(mrope_section) != dims/2": (lambda: mrope(8, (2, 2, 2)), r"\(2, 2, 2\)", "4", "8"),
        "partial_rotary_factor=0": (lambda: mrope(partial_rotary_factor=0.0), "0.0", "8", r"\(0, 1\]"),
        "position [3,B,S] with B,S=1,3 (ambiguous)": (lambda: mrope()(X, torch.ones(3, 1, 3)),),
        "position [3,B,S] with B,S=1,5": (lambda: mrope()(randn(1, 5, 2, 8), torch.ones(3, 1, 5)),),
        "position [B,S,3] with B,S=1,5": (lambda: mrope()(randn(1, 5, 2, 8), torch.ones(1, 5, 3)),),
        "position [B,S,2]": (lambda: mrope()(X, torch.ones(1, 3, 2)), r"\(1, 3, 2\)", r"\(3, 1, 3\)"),
        "4-D position": (lambda: mrope()(X, torch.ones(3, 1, 3, 1)), r"\(3, 1, 3, 1\)", r"\(3, 1, 3\)"),
        "1-D position": (lambda: mrope()(X, torch.ones(3)), r"\(3,\)", r"\(1, 3\)"),
        "rank-3 inputs": (lambda: mrope()(X[0], IDS), r"\(3, 2, 8\)", "rank 3", "rank 4"),
        "inputs last dim 10": (lambda: mrope()(randn(1, 3, 2, 10), IDS), "10", "8"),
        "position omitted": (lambda: mrope()(X),),
    },
    "extra_DeepSeekV4RotaryEmbedding": {},
}
WITHOUT_MEANING = {"mesh omitted", "rngs omitted", "rngs=None (table never created)"}
# Where the documented version went on with something meaningless
STRICTER = {
    "rank-2 inputs",
    "height 5 not multiple of merge 2: compute_cos_sin (drops rows)",
    "num_position_embeddings=17 (not square)",
    "default mrope_section with embedding_dims=8",
    "sum(mrope_section) != dims/2",
}


def read_situations() -> list:
    parameters = []
    for path in fact_files(EMBEDDED):
        facts = read_json(path)
        for error in facts["errors"]:
            newer, documented = error["head"], error["documentation_era"]
            answers = [newer if documented == "same" else documented, newer]
            if error["situation"] not in WITHOUT_MEANING:
                name = f"{facts['name']}-{error['situation']}"
                parameters.append(pytest.param(facts["name"], error["situation"], answers, id=name))
    return parameters


@core
@pytest.mark.parametrize(("name", "situation", "answers"), read_situations())
def test_every_bad_argument_of_the_reference_is_answered(name, situation, answers):
    """Refused where MaxText refuses; what it accepts, in its documented or its newer form, has its shape and dtype."""
    call, *words = SITUATIONS[name][situation]
    accepted = [answer["result"] for answer in answers if answer["ok"]]
    if words:
        refused(call, *words)
        assert not answers[0]["ok"] or situation in STRICTER
    elif accepted:
        result = call()
        assert f"array {str(result.dtype).removeprefix('torch.')} {list(result.shape)}" == accepted[0]
    else:
        assert answers[0]["error"] == "TypeError"
        with pytest.raises(TypeError, match="argument"):
            call()


@core
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: RotaryEmbedding(0, 100, 8), ["min_timescale=0", "positive"]),
        (lambda: YarnRotaryEmbedding(8, rope_factor=0), ["rope_factor=0", "positive"]),
        (lambda: YarnRotaryEmbedding(8, beta_slow=0), ["beta_slow=0", "positive"]),
        (lambda: YarnRotaryEmbedding(8, original_max_position_embeddings=0), ["original_max_position_embeddings=0"]),
        (lambda: PartialRotaryEmbedding(1, 100, 16)(X[..., :2], IDS), ["16", "0.25", "4", "2"]),
        (lambda: mrope(8, (2, 2)), [r"\(2, 2\)", "three", "4"]),
        (lambda: mrope(8, (5, -2, 1)), [r"\(5, -2, 1\)", "4"]),
        (lambda: mrope(12, (2, 1, 1), partial_rotary_factor=0.25), ["12", "0.25", "3"]),
        (lambda: mrope(partial_rotary_factor=1.5), ["1.5", "8"]),
        (lambda: mrope()(X, torch.ones(3, 1, 4)), [r"\(3, 1, 4\)", "1 x 3", r"\(3, 1, 3\)"]),
        (lambda: QWEN_VISION(X, 1, 0, 4), [r"\(1, 3, 2, 8\)", "0"]),
        (lambda: QWEN_VISION.compute_cos_sin(0, 4, 4), ["0 x 4 x 4"]),
        (lambda: QWEN_VISION(randn(2, 16, 2, 8), 1, 4, 4, valid_grid=IDS), ["batch of 1|does not fill", "0 x 1 x 2"]),
        (lambda: QWEN_VISION(randn(2, 16, 2, 8), 1, 4, 4, valid_grid=IDS[0]), [r"\(3,\)", r"\(batch, 3\)"]),
        (lambda: QWEN_VISION(randn(2, 16, 2, 8), 1, 4, 4, valid_grid=torch.tensor([[1, 4, 4]])), ["of 1", r"\(2, 16,"]),
        (lambda: QWEN_VISION(randn(1, 16, 2, 8), 1, 4, 4, valid_grid=torch.tensor([[1, 4, 6]])), ["24", "16"]),
        (lambda: QWEN_VISION(randn(2, 16, 2, 8), 1, 4, 4, token_mask=torch.ones(2, 9)), [r"\(2, 9\)", "16"]),
        (lambda: QWEN_VISION(randn(2, 16, 2, 8), 1, 4, 4, token_mask=torch.ones(3, 16)), ["of 3", r"\(2, 16,"]),
        (lambda: GRID(1, 4, 4, attention_mask=torch.ones(16)), [r"\(16,\)", r"\(batch, 16\)"]),
        (lambda: GRID(1, 4, 4, torch.tensor([[1, 4, 4]]), torch.ones(2, 16)), [r"\(2, 16\)", r"\(1, 16\)"]),
        (lambda: GRID(1, 4, 4, video_grid_thw=torch.tensor([[2, 4, 4]])), ["32", "16"]),
        (lambda: interpolate_table(randn(5, 2), torch.tensor([[1, 2, 2]])), ["5", "4 and 9"]),
    ],
)
def test_other_bad_arguments_are_refused_with_numbers(call, words):
    refused(call, *words)
