# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The one rule: drawn by hand, rebuilt split by split, and read from every side it can be asked from."""

import random

import pytest
import torch
from tiny_models import (
    IMAGE,
    LATENT,
    VISION_END,
    VISION_START,
    layout_of,
    nested_masks,
    padded_batch,
    random_rows,
    tiny_config,
)
from torch.nn.attention.flex_attention import create_mask

from bagel.layout_bagel import PackedLayout, Placeholders, check_cover


pytestmark = pytest.mark.core


def pack(sample_lens, split_lens, modes, **kwargs) -> PackedLayout:
    length = sum(sample_lens)
    return PackedLayout.from_packed(
        length, sample_lens, torch.arange(length), split_lens=split_lens, attn_modes=modes, **kwargs
    )


def placeholders_of(input_ids) -> Placeholders:
    return Placeholders.find(torch.as_tensor(input_ids), IMAGE, LATENT, VISION_START, VISION_END)


def ids(row: str) -> list[int]:
    """`t` a word, `[` and `]` the boundary tokens, `i` a ViT place, `n` a VAE place, `.` padding."""
    return [{"t": 50, "[": VISION_START, "]": VISION_END, "i": IMAGE, "n": LATENT, ".": 0}[letter] for letter in row]


def padding(row: str) -> list[int]:
    return [int(letter != ".") for letter in row]


def draw(mask: torch.Tensor) -> list[str]:
    """Rows see columns."""
    return ["".join("x" if sees else "." for sees in row) for row in mask.tolist()]


def picture(text: str) -> list[str]:
    return [line.replace(" ", "") for line in text.strip().splitlines()]


def random_splits(chance: random.Random) -> tuple[list[int], list[int], list[str]]:
    sample_lens, split_lens, modes = [], [], []
    for _ in range(chance.randint(1, 4)):
        lens = [chance.randint(1, 6) for _ in range(chance.randint(1, 5))]
        split_lens += lens
        modes += [chance.choice(["causal", "full", "noise"]) for _ in lens]
        sample_lens.append(sum(lens))
    return sample_lens, split_lens, modes


# ---- masks, drawn


def test_question_about_a_picture_then_a_picture_to_draw():
    layout = pack([9], [1, 3, 2, 3], ["causal", "full", "causal", "noise"])
    assert draw(layout.dense_mask()[0, 0]) == picture(
        """
        x . . . . . . . .
        x x x x . . . . .
        x x x x . . . . .
        x x x x . . . . .
        x x x x x . . . .
        x x x x x x . . .
        x x x x x x x x x
        x x x x x x x x x
        x x x x x x x x x
        """
    )


def test_noisy_span_is_hidden_from_later_tokens():
    layout = pack([8], [1, 3, 2, 2], ["causal", "noise", "causal", "full"])
    assert draw(layout.dense_mask()[0, 0]) == picture(
        """
        x . . . . . . .
        x x x x . . . .
        x x x x . . . .
        x x x x . . . .
        x . . . x . . .
        x . . . x x . .
        x . . . x x x x
        x . . . x x x x
        """
    )


def test_noisy_copy_and_clean_copy_of_a_picture_do_not_see_each_other_both_ways():
    layout = pack([6], [2, 2, 2], ["noise", "full", "noise"])
    assert draw(layout.dense_mask()[0, 0]) == picture(
        """
        x x . . . .
        x x . . . .
        . . x x . .
        . . x x . .
        . . x x x x
        . . x x x x
        """
    )


def test_samples_of_a_pack_do_not_see_each_other():
    layout = pack([3, 4], [3, 1, 3], ["causal", "causal", "full"])
    assert draw(layout.dense_mask()[0, 0]) == picture(
        """
        x . . . . . .
        x x . . . . .
        x x x . . . .
        . . . x . . .
        . . . x x x x
        . . . x x x x
        . . . x x x x
        """
    )


def test_neighbouring_pictures_are_spans_of_their_own():
    layout = pack([4], [2, 2], ["full", "full"])
    assert draw(layout.dense_mask()[0, 0]) == picture(
        """
        x x . .
        x x . .
        x x x x
        x x x x
        """
    )


def test_padded_rows_see_their_own_tokens_and_padding_sees_only_padding():
    rows = ["..t[ii]", "t[n]t.."]
    layout = layout_of(tiny_config(), torch.as_tensor([ids(row) for row in rows]), torch.tensor([*map(padding, rows)]))
    mask = layout.dense_mask()
    assert draw(mask[0, 0]) == picture(
        """
        x . . . . . .
        x x . . . . .
        . . x . . . .
        . . x x x x x
        . . x x x x x
        . . x x x x x
        . . x x x x x
        """
    )
    assert draw(mask[1, 0]) == picture(
        """
        x . . . . . .
        x x x x . . .
        x x x x . . .
        x x x x . . .
        x x x x x . .
        . . . . . x .
        . . . . . x x
        """
    )
    assert bool(mask.any(-1).all())  # an empty row would make a kernel divide by zero


def test_block_that_is_drawn_sees_its_context_and_itself():
    past_valid = torch.tensor([[False, True, True], [True, True, True]])
    layout = PackedLayout.noisy_blocks([2, 1], torch.tensor([5, 7]), 3, past_valid)
    mask = layout.dense_mask()
    assert draw(mask[0, 0]) == ["." + 6 * "x"] * 4
    assert draw(mask[1, 0]) == ["xxxxxx."] * 3 + ["......x"]
    assert layout.gen.tolist() == [[False, True, True, False], [False, True, False, False]]
    assert layout.position_ids.tolist() == [[5] * 4, [7] * 4]
    assert layout.valid.tolist() == [[True] * 4, [True] * 3 + [False]]
    assert bool(layout.noisy[layout.valid].all())


def test_block_without_a_context_sees_itself():
    layout = PackedLayout.noisy_blocks([2], torch.tensor([0]), 0, None)
    assert draw(layout.dense_mask()[0, 0]) == ["xxxx"] * 4


def test_free_places_of_a_static_cache_are_seen_by_nobody():
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    layout = PackedLayout.text(1, 2, mask, past_length=3)
    assert draw(layout.dense_mask(7)[0, 0]) == ["." + "xxx" + "...", "." + "xxxx" + ".."]
    with pytest.raises(ValueError, match="3 cached and 2 new tokens do not fit 4 keys"):
        layout.dense_mask(4)


# ---- masks, against an independent builder


@pytest.mark.parametrize("block", range(5))
def test_every_view_of_random_packs_is_the_mask_built_split_by_split(block):
    """Dense mask, mask function, and spans read back from masks in both their forms; 500 packs in all."""
    chance = random.Random(block)
    for _ in range(100):
        sample_lens, split_lens, modes = random_splits(chance)
        masks, length = nested_masks(sample_lens, split_lens, modes), sum(sample_lens)
        expected = torch.block_diag(*masks).bool()
        layout = pack(sample_lens, split_lens, modes)
        assert torch.equal(layout.dense_mask()[0, 0], expected)
        assert torch.equal(create_mask(layout.mask_function(), 1, 1, length, length, device="cpu")[0, 0], expected)
        for form in (masks, [torch.zeros(mask.shape).masked_fill(~mask, float("-inf")) for mask in masks]):
            read = PackedLayout.from_packed(length, sample_lens, torch.arange(length), nested_attention_masks=form)
            assert torch.equal(read.dense_mask()[0, 0], expected)


def test_mask_function_takes_single_elements():
    sample_lens, split_lens, modes = random_splits(random.Random(3))
    layout = pack(sample_lens, split_lens, modes)
    sees, dense = layout.mask_function(), layout.dense_mask()[0, 0]
    for q in range(layout.length):
        for k in range(layout.length):
            assert bool(sees(0, 0, q, k)) == bool(dense[q, k])


@pytest.mark.parametrize("seed", range(5))
def test_packed_samples_are_the_separate_samples(seed):
    sample_lens, split_lens, modes = random_splits(random.Random(seed))
    whole, start = pack(sample_lens, split_lens, modes).dense_mask()[0, 0], 0
    for length in sample_lens:
        lens = []
        while sum(lens) < length:
            lens.append(split_lens.pop(0))
        alone = pack([length], lens, [modes.pop(0) for _ in lens]).dense_mask()[0, 0]
        assert torch.equal(whole[start : start + length, start : start + length], alone)
        start += length


@pytest.mark.parametrize("block", range(3))
def test_samples_apart_see_what_they_see_in_the_pack(block):
    chance = random.Random(block)
    for _ in range(50):
        sample_lens, split_lens, modes = random_splits(chance)
        layout = pack(sample_lens, split_lens, modes)
        whole, seen = layout.dense_mask()[0, 0], torch.zeros(layout.length, layout.length, dtype=torch.bool)
        for index, samples in layout.samples_apart():
            lengths = samples.valid.sum(1)
            assert index.shape == samples.sample_ids.shape and lengths.min() >= 0.75 * lengths.max()
            assert samples.dense_mask().any(-1).all(), "no row of a mask is empty"
            for places, mask, length in zip(index, samples.dense_mask()[:, 0], lengths):
                seen[places[:length, None], places[None, :length]] |= mask[:length, :length]
                assert not mask[:length, length:].any()
        assert torch.equal(seen, whole)


def test_samples_apart_leave_out_padding():
    layout = PackedLayout.text(2, 4, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))
    ((index, samples),) = layout.samples_apart()
    assert index.tolist() == [[4, 5, 6, 7], [1, 2, 3, 0]]
    assert samples.valid.tolist() == [[True] * 4, [True] * 3 + [False]]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("seed", range(10))
def test_cached_suffix_is_the_last_rows_of_the_full_mask(seed, padding_side):
    batch = padded_batch(random_rows(seed, 3), seed, padding_side)
    placeholders, mask = placeholders_of(batch["input_ids"]), batch["attention_mask"]
    whole = layout_of(tiny_config(), batch["input_ids"], mask)
    full, length = whole.dense_mask(), mask.shape[1]
    inside = placeholders.in_image & ~placeholders.start  # cutting here would cut a picture
    for past in (cut for cut in range(1, length) if not bool(inside[:, cut].any())):
        suffix = layout_of(
            tiny_config(),
            batch["input_ids"][:, past:],
            mask,
            whole.position_ids[:, past:],
            past_length=past,
        )
        assert torch.equal(suffix.dense_mask(), full[:, :, past:])
        assert torch.equal(suffix.gen, whole.gen[:, past:])
        static = suffix.dense_mask(length + 3)
        assert torch.equal(static[..., :length], full[:, :, past:])
        assert not static[..., length:].any()
        views = create_mask(suffix.mask_function(length + 3), 3, 1, length - past, length + 3, device="cpu")
        assert torch.equal(views, static)


@pytest.mark.parametrize("seed", range(10))
def test_padding_does_not_change_what_a_row_sees(seed):
    rows = random_rows(seed, 3)
    for side in ("left", "right"):
        batch = padded_batch(rows, seed, side)
        layout = layout_of(tiny_config(), torch.as_tensor(batch["input_ids"]), batch["attention_mask"])
        for number, row in enumerate(rows):
            ids_alone = padded_batch([row], seed)["input_ids"]
            alone, valid = layout_of(tiny_config(), torch.as_tensor(ids_alone)), batch["attention_mask"][number].bool()
            assert torch.equal(layout.dense_mask()[number, 0][valid][:, valid], alone.dense_mask()[0, 0])
            assert torch.equal(layout.position_ids[number][valid], alone.position_ids[0])
            assert torch.equal(layout.gen[number][valid], alone.gen[0])


def test_plain_text_is_causal_and_counts_without_padding():
    layout = PackedLayout.text(2, 4, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    assert layout.causal
    assert layout.position_ids.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert draw(layout.dense_mask()[1, 0]) == ["x...", "xx..", "xxx.", "xxxx"]
    after = PackedLayout.text(2, 1, torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]), past_length=4)
    assert after.position_ids.tolist() == [[2], [4]]
    assert PackedLayout.text(2, 3, past_length=4).position_ids.tolist() == [[4, 5, 6]] * 2


def test_attention_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 5\), expected \(2, 7\): 4 cached and 3 new"):
        PackedLayout.text(2, 3, torch.ones(2, 5), past_length=4)


# ---- input ids


def test_text_takes_one_position_each_and_a_picture_one_in_all():
    rows = ["tt[ii]t[nn]tt", "...[n][i]t[n]"]
    layout = layout_of(tiny_config(), torch.as_tensor([ids(row) for row in rows]), torch.tensor([*map(padding, rows)]))
    assert layout.position_ids.tolist() == [
        [0, 1, 2, 2, 2, 2, 3, 4, 4, 4, 4, 5, 6],
        [0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 3, 3, 3],
    ]
    assert layout.gen.int().tolist() == [
        [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0],
    ]
    assert not layout.noisy.any()
    assert draw(layout.bidirectional) == ["..xxxx.xxxx..", "...xxxxxx.xxx"]


def test_position_ids_of_the_caller_are_kept():
    position_ids = torch.tensor([[4, 5, 6, 6, 6]])
    layout = layout_of(tiny_config(), torch.as_tensor([ids("tt[i]")]), position_ids=position_ids)
    assert torch.equal(layout.position_ids, position_ids)


def test_pictures_on_a_cache_need_positions():
    with pytest.raises(ValueError, match="need position_ids"):
        layout_of(tiny_config(), torch.as_tensor([ids("[i]")]), past_length=3)


def test_boundary_tokens_that_enclose_nothing_are_text():
    placeholders = placeholders_of([ids("t[]t[i]t]")])
    assert draw(placeholders.in_image) == ["....xxx.."]
    layout = layout_of(tiny_config(), torch.tensor([ids("t[]t[i]t]")]))
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 4, 4, 5, 6]]


def test_places_and_pictures_that_agree_pass():
    placeholders_of([ids("t[ii]t[nnn]"), ids("[iiii]t[n].")]).check([2, 4], [3, 1])
    placeholders_of([ids("[]t")]).check([], [])


@pytest.mark.parametrize(
    ("row", "image_lengths", "latent_lengths", "message"),
    [
        ("t[ii]t", [], [], "mark 1 images with image_token_id, but image_grid_hw describes 0"),
        ("t[ii]t", [2, 2], [], "mark 1 images with image_token_id, but image_grid_hw describes 2"),
        ("ttt", [], [4], "mark 0 images with latent_token_id, but latent_image_sizes describes 1"),
        ("t[ii]t", [3], [], "Image 0 has 2 placeholders image_token_id .* image_grid_hw says 3"),
        ("[n]t[nn]", [], [1, 3], "Image 1 has 2 placeholders latent_token_id .* latent_image_sizes says 3"),
        ("tiit", [2], [], "row 0, column 1 are not enclosed"),
        ("t[ii", [2], [], "row 0, column 2 are not enclosed"),
        ("nn]t", [], [2], "row 0, column 0 are not enclosed"),
        ("[in]", [1], [1], "are not enclosed"),
    ],
)
def test_places_that_do_not_fit_the_pictures_are_refused(row, image_lengths, latent_lengths, message):
    with pytest.raises(ValueError, match=message):
        placeholders_of([ids(row)]).check(image_lengths, latent_lengths)


def test_error_names_the_row_of_the_batch():
    with pytest.raises(ValueError, match="row 1, column 2 are not enclosed"):
        placeholders_of([ids("[ii]t"), ids("ttii]")]).check([2, 2], [])


# ---- packs


def test_pack_columns_say_experts_and_positions():
    layout = pack([3, 4], [3, 4], ["causal", "noise"], gen_indexes=torch.tensor([4, 5]))
    assert layout.gen.tolist() == [[False, False, False, False, True, True, False]]
    assert layout.sample_ids.tolist() == [[0, 0, 0, 1, 1, 1, 1]]
    assert layout.position_ids.tolist() == [list(range(7))]


def test_padding_split_of_a_released_flex_pack_is_cut_off():
    positions = torch.tensor([0, 1, 2, 2, 2])
    padded = PackedLayout.from_packed(
        5, [2, 3, 11], positions, split_lens=[2, 3, 11], attn_modes=["causal", "noise", "causal"]
    )
    plain = PackedLayout.from_packed(5, [2, 3], positions, split_lens=[2, 3], attn_modes=["causal", "noise"])
    assert torch.equal(padded.dense_mask(), plain.dense_mask())
    for name in ("sample_ids", "span_ids", "bidirectional", "noisy", "gen", "position_ids"):
        assert torch.equal(getattr(padded, name), getattr(plain, name))


def test_pack_that_is_full_may_carry_an_empty_padding_split():
    layout = pack([2, 3, 0], [2, 3, 0], ["causal", "full", "causal"])
    assert torch.equal(layout.dense_mask(), pack([2, 3], [2, 3], ["causal", "full"]).dense_mask())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_lens": [3, 2]}, r"sum to 5, less than sequence_length=6"),
        ({"position_ids": torch.arange(5)}, r"shape \(5,\), expected \(6,\)"),
        ({"split_lens": [3, 2]}, "split_lens sum to 5, sample_lens to 6"),
        ({"attn_modes": ["causal"]}, "2 split_lens but 1 attn_modes"),
        ({"attn_modes": ["causal", "Full"]}, r"\['Full'\] are unknown"),
        ({"split_lens": None}, "Pass split_lens with attn_modes, or nested_attention_masks"),
        ({"attn_modes": None}, "Pass split_lens with attn_modes, or nested_attention_masks"),
    ],
)
def test_pack_that_contradicts_itself_is_refused(change, message):
    facts = {"sequence_length": 6, "sample_lens": [3, 3], "position_ids": torch.arange(6)}
    facts |= {"split_lens": [3, 3], "attn_modes": ["causal", "full"]}
    PackedLayout.from_packed(**facts)
    with pytest.raises(ValueError, match=message):
        PackedLayout.from_packed(**{**facts, **change})


@pytest.mark.parametrize(
    ("sample_lens", "split_lens"),
    [([5, 5], [5, 5]), ([3, 5], [4, 4])],
    ids=["half a sample is left over", "a split reaches over two samples"],
)
def test_samples_splits_and_pack_that_end_in_different_places_are_refused(sample_lens, split_lens):
    """Only whole trailing samples are padding; anything else would be cut or joined silently."""
    with pytest.raises(ValueError, match="sample_lens"):
        PackedLayout.from_packed(8, sample_lens, torch.arange(8), split_lens=split_lens, attn_modes=["causal", "full"])


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([torch.ones(3, 3).bool().tril()], "1 nested_attention_masks for 2 sample_lens"),
        ([torch.ones(3, 3).bool().tril(), torch.ones(2, 2).bool()], r"\[1\] has shape \(2, 2\), its sample has 3"),
    ],
)
def test_masks_that_do_not_fit_the_samples_are_refused(masks, message):
    with pytest.raises(ValueError, match=message):
        PackedLayout.from_packed(6, [3, 3], torch.arange(6), nested_attention_masks=masks)


def test_mask_that_the_rule_cannot_express_is_refused():
    window = torch.ones(5, 5).bool().tril().triu(-1)
    with pytest.raises(ValueError, match=r"\[0\] cannot be built from causal, full and noise splits"):
        PackedLayout.from_packed(5, [5], torch.arange(5), nested_attention_masks=[window])
    forward = torch.ones(3, 3).bool().tril()
    forward[0, 2] = True
    with pytest.raises(ValueError, match=r"\[0\] cannot be built .* token 0 sees token 2"):
        PackedLayout.from_packed(3, [3], torch.arange(3), nested_attention_masks=[forward])


def test_pack_filled_exactly_once_passes():
    check_cover(5, {"text": torch.tensor([4, 0, 2]), "vit": None, "vae": torch.tensor([1, 3])}, torch.device("cpu"))


@pytest.mark.parametrize(
    ("text", "vit", "message"),
    [
        ([0, 1, 2], [2, 3], r"Token 2 of the pack is filled more than once \(1 such tokens\)"),
        ([0, 0, 1], [2, 3], r"Token 0 of the pack is filled more than once"),
        ([0, 1], [3], r"Token 2 of the pack is not filled \(1 such tokens\)"),
        ([], [3], r"Token 0 of the pack is not filled \(3 such tokens\)"),
        ([0, 1, 2], [3, 4], "vit holds index 4, outside sequence_length=4"),
        ([-1, 0, 1, 2], [3], "text holds index -1, outside sequence_length=4"),
    ],
)
def test_pack_that_is_not_filled_exactly_once_is_refused(text, vit, message):
    indexes = {"text": torch.tensor(text, dtype=torch.long), "vit": torch.tensor(vit)}
    with pytest.raises(ValueError, match=message):
        check_cover(4, indexes, torch.device("cpu"))


def test_large_packs_come_apart_into_batches_of_rounded_sizes():
    chance = random.Random(0)
    sample_lens, split_lens, modes = [], [], []
    while sum(sample_lens) < 700:
        for column, some in zip((sample_lens, split_lens, modes), random_splits(chance)):
            column += some
    layout = pack(sample_lens, split_lens, modes)
    seen = torch.zeros(layout.length, layout.length, dtype=torch.bool)
    for index, samples in layout.samples_apart():
        assert index.shape == samples.sample_ids.shape and index.shape[0] % 4 == index.shape[1] % 16 == 0
        assert samples.dense_mask().any(-1).all(), "no row of a mask is empty"
        for places, mask, real in zip(index, samples.dense_mask()[:, 0], samples.valid):
            seen[places[real][:, None], places[real][None]] |= mask[real][:, real]
            assert not mask[real][:, ~real].any()
    assert torch.equal(seen, layout.dense_mask()[0, 0])
