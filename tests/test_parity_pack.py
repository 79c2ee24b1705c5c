# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Packs of the released packer: who sees whom, where pictures stand, what patches are, and that the model takes them.

Replayed is what a pack says; making one from a conversation is the collator's business.
"""

from collections.abc import Iterator

import pytest
import torch
from parity_data import Case, assert_close, cases

from bagel.embeddings_bagel import grid_position_ids
from bagel.image_processing_bagel import patchify
from bagel.layout_bagel import PackedLayout


PACKS = cases("pack")


def flat(values: list) -> torch.LongTensor:
    """Ids, also if they come in one list per picture."""
    return torch.tensor([x for part in values for x in (part if isinstance(part, list) else [part])]).long()


def masks_of(facts: dict) -> list[torch.BoolTensor]:
    """One (n, n) mask per sample, True = sees."""
    masks = [torch.tensor([int(x) for x in mask]).bool() for mask in facts["attention_masks"]]
    return [mask.reshape(n, n) for mask, n in zip(masks, facts["sample_lens"])]


def splits_of(facts: dict) -> dict:
    return {"split_lens": facts["split_lens"], "attn_modes": facts["attn_modes"]}


def layout_of(facts: dict, sample_lens: list[int], **spans) -> PackedLayout:
    positions, gen = flat(facts["packed_position_ids"]), flat(facts["packed_vae_token_indexes"])
    return PackedLayout.from_packed(facts["sequence_length"], sample_lens, positions, gen, **spans)


def pictures_of(facts: dict) -> Iterator[torch.Tensor]:
    """All pictures that went into the packer, sample by sample, drawn by its rule."""
    for sample in facts["samples"]:
        for number, (channels, height, width) in enumerate(sample["image_shapes"], start=1):
            c, y, x = torch.meshgrid(*(torch.arange(n).double() for n in (channels, height, width)), indexing="ij")
            yield ((10000 * c + 100 * y + x) / 30000 + 0.001 * number).float()


def read_pictures(facts: dict) -> list[torch.Tensor]:
    """Those that the vision tower reads; conditions that were dropped are not among them."""
    pictures, patch_size, found = pictures_of(facts), facts["data_config"]["vit_patch_size"], []
    for check in facts["packed_vit_tokens_check"]:
        found.append(next(picture for picture in pictures if is_described(picture, check, patch_size)))
    return found


def is_described(picture: torch.Tensor, check: dict, patch_size: int) -> bool:
    if any(side % patch_size for side in picture.shape[1:]):
        return False
    patches = patchify(picture, patch_size)
    if list(patches.shape) != check["shape"]:
        return False
    return abs(patches.double().sum().item() - check["sum"]) <= 1e-6 * abs(check["sum"])


def patches_of(facts: dict) -> torch.Tensor:
    return torch.cat([patchify(picture, facts["data_config"]["vit_patch_size"]) for picture in read_pictures(facts)])


@pytest.mark.parametrize("case", PACKS)
def test_splits_masks_and_flex_padding_describe_one_layout(case: Case):
    facts, masks = case.facts, masks_of(case.facts)
    expected = torch.block_diag(*masks).bool()
    flex = facts["flex"]
    assert (flex["sequence_length"], sum(flex["sample_lens"])) == (facts["sequence_length"], flex["max_num_tokens"])
    layouts = {
        "splits": layout_of(facts, facts["sample_lens"], **splits_of(facts)),
        "masks": layout_of(facts, facts["sample_lens"], nested_attention_masks=masks),
        "flex": layout_of(facts, flex["sample_lens"], **splits_of(flex)),
    }
    index = torch.arange(facts["sequence_length"])
    for name, layout in layouts.items():
        assert torch.equal(layout.dense_mask()[0, 0], expected), name
        assert torch.equal(layout.mask_function()(0, 0, index[:, None], index[None]), expected), name
        assert layout.position_ids[0].tolist() == facts["packed_position_ids"], name
        assert layout.gen[0].nonzero()[:, 0].tolist() == facts["packed_vae_token_indexes"], name
        assert torch.bincount(layout.sample_ids[0]).tolist() == facts["sample_lens"], name


@pytest.mark.parametrize("case", PACKS)
def test_the_splits_of_single_samples_give_their_masks(case: Case):
    facts, start = case.facts, 0
    parts = zip(facts["split_lens_per_sample"], facts["attn_modes_per_sample"], masks_of(facts))
    for lens, modes, mask in parts:
        positions = flat(facts["packed_position_ids"])[start : start + len(mask)]
        layout = PackedLayout.from_packed(len(mask), [len(mask)], positions, split_lens=lens, attn_modes=modes)
        assert torch.equal(layout.dense_mask()[0, 0], mask)
        start += len(mask)


@pytest.mark.parametrize("case", PACKS)
def test_patches_and_their_positions_are_the_released_ones(case: Case):
    facts, settings = case.facts, case.facts["data_config"]
    pictures = read_pictures(facts)
    patch_size, interpolate = settings["vit_patch_size"], settings["interpolate_pos"]
    for picture, check in zip(pictures, facts["packed_vit_tokens_check"]):
        patches = patchify(picture, patch_size)
        head, tail = check["first_row_head"], check["last_row_tail"]
        assert_close(patches[0, : len(head)], head, "copy", "the first patch")
        assert_close(patches[-1, -len(tail) :], tail, "copy", "the last patch")
    grids = [tuple(side // patch_size for side in picture.shape[1:]) for picture in pictures]
    assert [rows * columns for rows, columns in grids] == facts["vit_token_seqlens"]
    ids = [grid_position_ids(*grid, settings["max_num_patch_per_side"], interpolate).tolist() for grid in grids]
    assert ids == facts["packed_vit_position_ids"]

    latent_grids = [
        tuple(side // settings["vae_image_downsample"] for side in s[1:]) for s in facts["vae_image_shapes"]
    ]
    assert [list(grid) for grid in latent_grids] == facts["vae_latent_shapes"]
    ids = [grid_position_ids(*grid, settings["max_latent_size"], interpolate).tolist() for grid in latent_grids]
    assert ids == facts["packed_latent_position_ids"]


def pack_of(case: Case, names: list[str]) -> dict:
    """The tensors that the released `to_tensor` makes (an empty list becomes a float tensor), by the names it gives."""
    facts = case.facts
    integers = (
        "packed_text_ids",
        "packed_text_indexes",
        "packed_position_ids",
        "packed_label_ids",
        "ce_loss_indexes",
        "packed_vit_token_indexes",
        "vit_token_seqlens",
        "packed_vit_position_ids",
        "packed_latent_position_ids",
        "packed_vae_token_indexes",
        "mse_loss_indexes",
    )
    pack = {name: flat(facts[name]) if facts[name] else torch.tensor([]) for name in integers}
    pack["ce_loss_weights"] = torch.tensor(facts["ce_loss_weights"])
    pack["packed_timesteps"] = torch.tensor([float(t) for t in facts["packed_timesteps"]])
    pack["patchified_vae_latent_shapes"] = facts["vae_latent_shapes"]
    if facts["packed_vit_tokens_check"]:
        pack["packed_vit_tokens"] = patches_of(facts)
    if facts["padded_images_shape"]:
        pack["padded_images"] = torch.zeros(facts["padded_images_shape"])
        for padded, (_, height, width) in zip(pack["padded_images"], facts["vae_image_shapes"]):
            padded[:, :height, :width] = torch.linspace(-1, 1, height * width).reshape(height, width)
    return {name: pack[name] for name in names if name in pack} | {"sequence_length": facts["sequence_length"]}


def fits(case: Case) -> bool:
    """The packer's settings are free; a model can only read packs within its tables."""
    facts, config = case.facts, case.parity.config()
    settings, limits = (
        facts["data_config"],
        (
            (flat(facts["packed_text_ids"]), config.text_config.vocab_size),
            (flat(facts["packed_vit_position_ids"]), config.vit_max_num_patch_per_side**2),
            (flat(facts["packed_latent_position_ids"]), config.max_latent_size**2),
        ),
    )
    same_patches = settings["vit_patch_size"] == config.vit_patch_size
    same_stride = settings["vae_image_downsample"] == config.latent_downsample
    return same_patches and same_stride and all(not len(ids) or ids.max() < limit for ids, limit in limits)


@torch.no_grad()
@pytest.mark.parametrize("case", PACKS)
def test_the_model_takes_the_pack_in_both_forms(case: Case):
    if not fits(case):
        pytest.skip("the checkpoint's tables are smaller than this pack")
    facts, model = case.facts, case.parity.joint()
    features = model.config.patch_latent_dim
    noise = torch.randn(len(facts["packed_vae_token_indexes"]), features, generator=torch.Generator().manual_seed(0))
    nested = pack_of(case, facts["to_tensor_keys"])
    nested |= {"sample_lens": facts["sample_lens"], "nested_attention_masks": masks_of(facts)}
    flex = pack_of(case, facts["to_tensor_flex_keys"])
    flex |= {"sample_lens": facts["flex"]["sample_lens"], **splits_of(facts["flex"])}
    outputs = []
    for pack, names in ((nested, "to_tensor_keys"), (flex, "to_tensor_flex_keys")):
        assert pack.keys() == set(facts[names])
        outputs.append(model(**pack, noise=noise, generator=torch.Generator().manual_seed(1)))
    for output in outputs:
        assert torch.isfinite(output.loss)
        assert (0 if output.ce is None else len(output.ce)) == len(facts["ce_loss_indexes"])
        assert (0 if output.mse is None else len(output.mse)) == len(facts["mse_loss_indexes"])
    assert_close(outputs[1].last_hidden_state, outputs[0].last_hidden_state, "hidden", "flex against nested")
    assert_close(outputs[1].loss, outputs[0].loss, "loss", "flex against nested")
