# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Routing: every token runs through its own expert, whatever runs beside it."""

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from bagel.decoder_bagel import Routing
from bagel.layout_bagel import PackedLayout


pytestmark = pytest.mark.core


@pytest.fixture
def experts():
    torch.manual_seed(0)
    return nn.Linear(6, 5), nn.Linear(6, 5)


GEN_COLUMNS = {
    "mixed": [[0, 1, 1, 0], [1, 0, 0, 0]],
    "one of gen": [[0, 0, 0, 0], [0, 0, 1, 0]],
    "only und": [[0, 0, 0, 0], [0, 0, 0, 0]],
    "only gen": [[1, 1, 1, 1], [1, 1, 1, 1]],
}


@pytest.mark.parametrize("column", GEN_COLUMNS)
def test_routing_is_the_dispatch_of_every_token_by_itself(experts, column):
    und, gen = experts
    is_gen, hidden = torch.tensor(GEN_COLUMNS[column]).bool(), torch.randn(2, 4, 6)
    routing = Routing.of(is_gen)
    moved = routing.sort(hidden)
    assert torch.equal(routing.restore(moved), hidden)
    out = routing.restore(routing.run(moved, und, gen))
    for row in range(2):
        for place in range(4):
            expert = gen if is_gen[row, place] else und
            torch.testing.assert_close(out[row, place], expert(hidden[row, place]))
    shared = routing.restore(routing.run(moved, und, None))
    torch.testing.assert_close(shared, und(hidden))


def test_routing_puts_understanding_first_and_keeps_the_order():
    routing = Routing.of(torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]]).bool())
    assert routing.order.tolist() == [0, 3, 5, 6, 7, 1, 2, 4]
    assert routing.num_und == 5
    hidden = torch.arange(8.0).view(2, 4, 1)
    assert routing.sort(hidden).flatten().tolist() == [0, 3, 5, 6, 7, 1, 2, 4]


def test_large_packs_have_rounded_sizes_with_fillers_that_nothing_reads(experts):
    is_gen, hidden = torch.rand(1, 700) < 0.3, torch.randn(1, 700, 6, requires_grad=True)
    routing = Routing.of(is_gen)
    num_gen = len(routing.order) - routing.num_und
    assert routing.num_und % 64 == num_gen % 64 == 0 and len(routing.order) < 700 + 2 * 64
    assert routing.num_und >= int((~is_gen).sum()) and num_gen >= int(is_gen.sum())
    out = routing.restore(routing.run(routing.sort(hidden), *experts))
    expected = torch.where(is_gen[..., None], experts[1](hidden), experts[0](hidden))
    torch.testing.assert_close(out, expected)
    found, wanted = (
        torch.autograd.grad((x * x).sum(), [hidden, experts[0].weight, experts[1].weight]) for x in (out, expected)
    )
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other)


def test_text_alone_is_not_moved():
    hidden = torch.randn(2, 4, 6)
    for gen in (None, torch.zeros(2, 4).bool()):
        routing = Routing.of(gen)
        assert routing.sort(hidden) is hidden
        assert routing.restore(hidden) is hidden


def test_expert_without_tokens_gets_zero_gradients_not_none(experts):
    und, gen = experts
    Routing.of(None).run(torch.randn(1, 3, 6), und, gen).sum().backward()
    assert gen.weight.grad.abs().max() == gen.bias.grad.abs().max() == 0
    assert und.weight.grad.abs().min() > 0


def test_expert_without_tokens_is_not_run_without_gradients(experts):
    with torch.no_grad():
        assert not Routing.of(None).touch_gen
        Routing.of(None).run(torch.randn(1, 3, 6), experts[0], None)


@pytest.mark.parametrize("column", GEN_COLUMNS)
def test_frozen_understanding_gets_zero_gradients_and_generation_all_of_its_own(experts, column):
    und, gen = experts
    is_gen, hidden = torch.tensor(GEN_COLUMNS[column]).bool(), torch.randn(2, 4, 6)
    gradients = {}
    for freeze_und in (False, True):
        und.zero_grad(), gen.zero_grad()
        given = hidden.clone().requires_grad_()
        routing = Routing.of(is_gen)._replace(freeze_und=freeze_und)
        moved = routing.freeze_und_tokens(routing.sort(given))
        out = routing.restore(routing.run(moved, und, gen))
        (out * out).sum().backward()
        gradients[freeze_und] = [gen.weight.grad.clone(), gen.bias.grad.clone(), given.grad[is_gen]]
        if freeze_und:
            assert und.weight.grad is not None and und.weight.grad.abs().max() == 0
            assert und.bias.grad is not None and und.bias.grad.abs().max() == 0
            assert given.grad[~is_gen].abs().sum() == 0
        elif not bool(is_gen.all()):
            assert und.weight.grad.abs().max() > 0
    for free, frozen in zip(gradients[False], gradients[True]):
        assert torch.equal(free, frozen)


def test_frozen_understanding_computes_the_same(experts):
    hidden, is_gen = torch.randn(2, 4, 6), torch.tensor(GEN_COLUMNS["mixed"]).bool()
    free = Routing.of(is_gen)
    frozen = free._replace(freeze_und=True)
    moved = free.sort(hidden)
    assert torch.equal(free.run(moved, *experts), frozen.run(frozen.freeze_und_tokens(moved), *experts))


def test_the_text_model_routes_a_layout_and_plain_text_not_at_all():
    layout = PackedLayout.from_packed(
        4, [4], torch.arange(4), torch.tensor([1, 2]), split_lens=[4], attn_modes=["noise"]
    )
    decoder = tiny_model().get_decoder()
    assert decoder.route(layout).num_und == 2
    assert decoder.route(PackedLayout.text(1, 4)).order is None
