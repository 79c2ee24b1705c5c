# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Sequence plans to packs: equal to the released packer where its numbers are at hand, by equalities elsewhere."""

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from parity_data import Case, cases
from tiny_models import BOS, EOS, IMAGE, LATENT, TINY, VISION_END, VISION_START, tiny_config, tiny_model

from bagel.layout_bagel import PackedLayout
from bagel.packing_bagel import (
    CLEAN,
    PackCollator,
    PackingConfig,
    SamplePlan,
    SequenceItem,
    pack,
    pack_samples,
    randomize,
)


PACKS = cases("pack")
TRAINED = cases("train_forward")
DROP_NOTHING = dict.fromkeys(("text_cond_dropout_prob", "vit_cond_dropout_prob", "vae_cond_dropout_prob"), 0.0)


class Replay:
    """Stored random numbers, in order."""

    def __init__(self, uniform: list[float], normal: list[float]):
        self.uniform, self.normal = list(uniform), list(normal)

    def random(self) -> float:
        return self.uniform.pop(0)

    def standard_normal(self) -> float:
        return self.normal.pop(0)

    @property
    def empty(self) -> bool:
        return not self.uniform and not self.normal


NO_NUMBERS = Replay([], [])


def released_config(facts: dict[str, Any]) -> PackingConfig:
    settings, special = facts["data_config"], facts["special_tokens"]
    return PackingConfig(
        bos_token_id=special["bos_token_id"],
        eos_token_id=special["eos_token_id"],
        vision_start_token_id=special["start_of_image"],
        vision_end_token_id=special["end_of_image"],
        vit_patch_size=settings["vit_patch_size"],
        latent_downsample=settings["vae_image_downsample"],
        vit_max_num_patch_per_side=settings["max_num_patch_per_side"],
        max_latent_size=settings["max_latent_size"],
        interpolate_pos=settings["interpolate_pos"],
        text_cond_dropout_prob=settings["text_cond_dropout_prob"],
        vit_cond_dropout_prob=settings["vit_cond_dropout_prob"],
        vae_cond_dropout_prob=settings["vae_cond_dropout_prob"],
    )


def released_pictures(sample: dict[str, Any]) -> list[torch.Tensor]:
    """Drawn by the `image_rule` of the pack files."""
    pictures = []
    for number, shape in enumerate(sample["image_shapes"], start=1):
        c, y, x = torch.meshgrid(*(torch.arange(n).double() for n in shape), indexing="ij")
        pictures.append(((10000 * c + 100 * y + x) / 30000 + 0.001 * number).float())
    return pictures


def replayed(facts: dict[str, Any], **options) -> dict[str, Any]:
    """The pack of a file, made with the random numbers of the released packer, which must be used up."""
    packing = released_config(facts)
    plans = [
        packing.released_plan(sample["sequence_plan"], sample["text_ids_list"], released_pictures(sample))
        for sample in facts["samples"]
    ]
    rng = Replay(facts["random_random_draws"], facts["np_random_randn_draws"])
    made = pack_samples(plans, packing, rng, **options)
    assert rng.empty
    return made


def flat(values: list) -> list:
    return [x for part in values for x in (part if isinstance(part, list) else [part])]


def float32(values: list) -> list[float]:
    return torch.tensor([float(value) for value in values], dtype=torch.float32).tolist()


@pytest.mark.parametrize("case", PACKS)
def test_every_list_of_a_released_pack_is_reproduced(case: Case):
    facts, made = case.facts, replayed(case.facts)
    for name in ("sequence_length", "sample_lens", "split_lens", "attn_modes"):
        assert made[name] == facts[name], name
    for name in (
        "packed_position_ids",
        "packed_text_ids",
        "packed_text_indexes",
        "packed_label_ids",
        "ce_loss_indexes",
        "packed_vit_token_indexes",
        "vit_token_seqlens",
        "packed_vit_position_ids",
        "packed_latent_position_ids",
        "packed_vae_token_indexes",
        "mse_loss_indexes",
    ):
        assert (made[name].tolist() if name in made else []) == flat(facts[name]), name
        assert name not in made or made[name].dtype == torch.int64, name
    for name in ("ce_loss_weights", "packed_timesteps"):
        assert (made[name].tolist() if name in made else []) == float32(facts[name]), name
    assert [list(shape) for shape in made.get("patchified_vae_latent_shapes", [])] == facts["vae_latent_shapes"]


@pytest.mark.parametrize("case", PACKS)
def test_pictures_of_a_released_pack_are_reproduced(case: Case):
    facts, made = case.facts, replayed(case.facts)
    padded = made.get("padded_images")
    assert (None if padded is None else list(padded.shape)) == facts["padded_images_shape"]
    for image, (_, height, width) in zip([] if padded is None else padded, facts["vae_image_shapes"]):
        assert not image[:, height:].any() and not image[:, :, width:].any()
        assert image[:, :height, :width].abs().min() > 0  # by the rule the pictures are drawn by
    lengths = facts["vit_token_seqlens"]
    found = made["packed_vit_tokens"].split(lengths) if lengths else []
    for patches, check in zip(found, facts["packed_vit_tokens_check"]):
        assert list(patches.shape) == check["shape"]
        assert patches.double().sum().item() == pytest.approx(check["sum"], rel=1e-6)
        head, tail = check["first_row_head"], check["last_row_tail"]
        assert patches[0, : len(head)].tolist() == pytest.approx(head, abs=1e-7)
        assert patches[-1, -len(tail) :].tolist() == pytest.approx(tail, abs=1e-7)


@pytest.mark.parametrize("case", PACKS)
def test_nested_masks_are_the_released_ones(case: Case):
    facts, made = case.facts, replayed(case.facts, nested_masks=True)
    masks = ["".join(str(int(sees)) for sees in mask.flatten().tolist()) for mask in made["nested_attention_masks"]]
    assert masks == facts["attention_masks"]
    assert set(made) == set(facts["to_tensor_keys"])


@pytest.mark.parametrize("case", PACKS)
def test_padding_gives_the_released_flex_pack(case: Case):
    facts = case.facts
    made = replayed(facts, pad_to=facts["flex"]["max_num_tokens"])
    for name in ("sequence_length", "sample_lens", "split_lens", "attn_modes"):
        assert made[name] == facts["flex"][name], name
    assert set(made) == set(facts["to_tensor_flex_keys"])


@pytest.mark.parametrize("case", PACKS)
def test_splits_of_single_samples_are_the_released_ones(case: Case):
    facts, packing = case.facts, released_config(case.facts)
    rng = Replay(facts["random_random_draws"], facts["np_random_randn_draws"])
    for sample, lens, modes in zip(
        facts["samples"], facts["split_lens_per_sample"], facts["attn_modes_per_sample"], strict=True
    ):
        plan = packing.released_plan(sample["sequence_plan"], sample["text_ids_list"], released_pictures(sample))
        made = pack_samples([plan], packing, rng)
        assert (made["split_lens"], made["attn_modes"], made["sample_lens"]) == (lens, modes, [sum(lens)])


@pytest.mark.parametrize("case", TRAINED)
def test_plans_of_the_released_training_forwards_give_their_inputs(case: Case):
    facts, arrays, config = case.facts, case.replay(), case.parity.config()
    special = facts["special_tokens"]
    packing = replace(
        PackingConfig.of_model(config),
        bos_token_id=special["bos_token_id"],
        eos_token_id=special["eos_token_id"],
        vision_start_token_id=special["start_of_image"],
        vision_end_token_id=special["end_of_image"],
        text_cond_dropout_prob=0.0,
        vit_cond_dropout_prob=0.0,
        vae_cond_dropout_prob=0.0,
    )
    plans = [
        packing.released_plan(
            sample["sequence_plan"], sample["text_ids_list"], [torch.zeros(shape) for shape in sample["image_shapes"]]
        )
        for sample in facts["samples"]
    ]
    droppable = [item for plan in plans for item in plan.items if item.enable_cfg]

    def made_with(**options) -> dict[str, Any]:
        rng = Replay([0.5] * len(droppable), facts["timestep_draws"])
        made = pack_samples(plans, packing, rng, **options)
        assert rng.empty
        return made

    made = made_with()
    for name in ("sequence_length", "sample_lens", "split_lens", "attn_modes"):
        assert made[name] == facts[name], name
    for name in ("padded_images", "packed_vit_tokens"):  # their contents are what the plan holds
        if name in arrays:
            assert made[name].shape == arrays[name].shape, name
    stored = {name for (name,), _ in arrays.matching(r"((?:packed|ce_loss|mse_loss|vit_token)_\w+)")}
    stored -= {"packed_timesteps_after_shift", "packed_vit_tokens"}
    assert stored | {"packed_vit_tokens", "padded_images"} >= {name for name in made if torch.is_tensor(made[name])}
    for name in stored:
        assert torch.equal(made[name], arrays[name].to(made[name].dtype)), name
    for number, mask in enumerate(made_with(nested_masks=True)["nested_attention_masks"]):
        arrays.equal(f"attention_mask_{number}", mask)


# --------------------------------------------------------------------------------------------------------------------
# Equalities and pictures


CONFIG = PackingConfig(
    bos_token_id=BOS,
    eos_token_id=EOS,
    vision_start_token_id=VISION_START,
    vision_end_token_id=VISION_END,
    vit_patch_size=TINY["vision_config"]["patch_size"],
    latent_downsample=tiny_config().latent_downsample,
    vit_max_num_patch_per_side=TINY["vit_max_num_patch_per_side"],
    max_latent_size=TINY["max_latent_size"],
)


def text(*ids: int, **flags) -> SequenceItem:
    return SequenceItem("text", ids, **flags)


def vit(rows: int, columns: int, **flags) -> SequenceItem:
    return SequenceItem.vit_image(pixels(4 * rows, 4 * columns), 4, **flags)


def vae(rows: int, columns: int, **flags) -> SequenceItem:
    return SequenceItem.vae_image(pixels(4 * rows, 4 * columns), 4, **flags)


def pixels(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * height + width)
    return torch.rand(3, height, width, generator=generator) * 2 - 1


def random_numbers(*uniform: float) -> Replay:
    return Replay(list(uniform), [0.5, -0.25, 1.5])


def drawing(made: dict[str, Any]) -> str:
    """Who sees whom, as rows of x and points."""
    layout = PackedLayout.from_packed(
        made["sequence_length"],
        made["sample_lens"],
        made["packed_position_ids"],
        split_lens=made["split_lens"],
        attn_modes=made["attn_modes"],
    )
    return "\n".join("".join("x" if sees else "." for sees in row) for row in layout.dense_mask()[0, 0].tolist())


@pytest.mark.core
def test_a_picture_is_one_block_at_one_position_and_its_noisy_copy_is_hidden():
    made = pack_samples([SamplePlan((text(7), vae(1, 1, loss=True), vae(1, 1), text(8)))], CONFIG, random_numbers())
    assert made["packed_position_ids"].tolist() == [0, 1, 2, 3, 3, 3, 3, 3, 3, 4, 5, 6]
    assert drawing(made) == "\n".join(
        [
            "x...........",
            "xx..........",
            "xxx.........",
            "xxxxxx......",
            "xxxxxx......",
            "xxxxxx......",
            "xxx...xxx...",
            "xxx...xxx...",
            "xxx...xxx...",
            "xxx...xxxx..",
            "xxx...xxxxx.",
            "xxx...xxxxxx",
        ]
    )


@pytest.mark.core
def test_labels_are_the_next_ids_then_eos_then_the_first_token_of_the_next_span():
    plan = SamplePlan((text(7, 8, loss=True, special_token_label=VISION_START), vae(1, 1, loss=True)))
    made = pack_samples([plan], CONFIG, random_numbers())
    assert made["packed_text_ids"].tolist() == [BOS, 7, 8, EOS, VISION_START, VISION_END]
    assert made["ce_loss_indexes"].tolist() == [0, 1, 2, 3]
    assert made["packed_label_ids"].tolist() == [7, 8, EOS, VISION_START]
    assert made["ce_loss_weights"].tolist() == float32([1 / math.sqrt(3)] * 3 + [1.0])


@pytest.mark.core
def test_a_dropped_picture_keeps_its_position_and_a_dropped_text_does_not():
    plan = SamplePlan((vit(1, 1, enable_cfg=True), text(7, enable_cfg=True), vae(1, 1, loss=True)))
    kept = pack_samples([plan], CONFIG, random_numbers(0.9, 0.9))
    without_picture = pack_samples([plan], CONFIG, random_numbers(0.0, 0.9))
    without_text = pack_samples([plan], CONFIG, random_numbers(0.9, 0.0))
    without_both = pack_samples([plan], CONFIG, random_numbers(0.0, 0.0))
    assert kept["packed_position_ids"].tolist() == [0, 0, 0, 1, 2, 3, 4, 4, 4]
    assert without_picture["packed_position_ids"].tolist() == [1, 2, 3, 4, 4, 4]
    assert without_text["packed_position_ids"].tolist() == [0, 0, 0, 1, 1, 1]
    assert without_both["packed_position_ids"].tolist() == [1, 1, 1]


@pytest.mark.core
def test_frames_share_a_split_and_a_timestep_and_step_by_their_distance():
    frames = (
        vae(1, 1, loss=True, split_end=False, frame_delta=2),
        vae(1, 1, loss=True, split_start=False, split_end=False, frame_delta=5),
        vae(1, 1, loss=True, split_start=False),
    )
    made = pack_samples([SamplePlan((*frames, vae(1, 1, loss=True)))], CONFIG, random_numbers())
    assert made["packed_position_ids"].tolist() == [0] * 3 + [2] * 3 + [7] * 6
    assert (made["split_lens"], made["attn_modes"]) == ([9, 3], ["full", "noise"])
    assert made["packed_timesteps"].tolist() == [0.5, 0.5, 0.5, -0.25]


@pytest.mark.core
@pytest.mark.parametrize("dropped", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2)])
def test_a_clip_that_loses_frames_stays_one_split(dropped: tuple[int, ...]):
    frames = (
        vae(1, 1, enable_cfg=True, split_end=False, frame_delta=4),
        vae(1, 2, enable_cfg=True, split_start=False, split_end=False, frame_delta=4),
        vae(1, 3, enable_cfg=True, split_start=False),
    )
    uniform = [0.0 if frame in dropped else 0.9 for frame in range(3)]
    made = pack_samples([SamplePlan((*frames, text(7)))], CONFIG, random_numbers(*uniform))
    left = [frame for frame in range(3) if frame not in dropped]
    clip = [sum(3 + frame for frame in left)] if left else []
    assert made["split_lens"] == [*clip, 3]
    assert made["attn_modes"] == ["full"] * len(clip) + ["causal"]
    assert sum(made["split_lens"]) == made["sequence_length"]


@pytest.mark.core
def test_random_numbers_are_taken_only_for_what_can_be_dropped_and_what_is_learned():
    plan = SamplePlan((text(7), vit(1, 1), vae(1, 1), vae(1, 1, loss=True), text(8, loss=True)))
    stored = Replay([], [0.25])
    made = pack_samples([plan], CONFIG, stored)
    assert stored.empty
    assert made["packed_timesteps"].tolist() == [CLEAN, 0.25]


@pytest.mark.core
def test_lists_of_the_caller_stay_what_they_are():
    sample = {
        "sequence_plan": [
            {"type": "text", "enable_cfg": 0, "loss": 0, "special_token_loss": 0, "special_token_label": None},
            {"type": "vae_image", "enable_cfg": 0, "loss": 1, "special_token_loss": 0, "special_token_label": None},
        ],
        "text_ids_list": [[7, 8]],
        "image_tensor_list": [pixels(4, 8)],
    }
    before = copy.deepcopy(sample)
    plan = CONFIG.released_plan(**sample)
    first, second = (pack_samples([plan, plan], CONFIG, random_numbers()) for _ in range(2))
    assert sample.keys() == before.keys()
    assert sample["sequence_plan"] == before["sequence_plan"]
    assert sample["text_ids_list"] == before["text_ids_list"]
    assert torch.equal(sample["image_tensor_list"][0], before["image_tensor_list"][0])
    assert torch.equal(first["packed_position_ids"], second["packed_position_ids"])
    assert torch.equal(first["padded_images"], second["padded_images"])


@pytest.mark.core
def test_what_a_pack_does_not_have_is_absent():
    made = pack_samples([SamplePlan((text(7),))], CONFIG, NO_NUMBERS)
    assert set(made) == {
        "sequence_length",
        "sample_lens",
        "packed_position_ids",
        "packed_text_ids",
        "packed_text_indexes",
        "split_lens",
        "attn_modes",
    }
    made = pack_samples([SamplePlan((vae(1, 1), text(7)))], CONFIG, NO_NUMBERS)
    assert "mse_loss_indexes" not in made and "ce_loss_indexes" not in made and "packed_vit_tokens" not in made


@pytest.mark.core
def test_facts_are_those_of_the_config_of_a_model():
    config = tiny_model().config
    packing = PackingConfig.of_model(config)
    assert (packing.bos_token_id, packing.max_latent_size) == (config.bos_token_id, config.max_latent_size)
    assert (packing.latent_downsample, packing.vit_patch_size) == (config.latent_downsample, config.vit_patch_size)
    assert packing.vit_cond_dropout_prob == config.vit_cond_dropout_prob
    packing.check_model(config)


@pytest.mark.core
def test_every_fact_that_differs_from_a_model_is_named_with_both_values():
    config = tiny_config()
    packing = replace(PackingConfig.of_model(config), max_latent_size=9, vit_cond_dropout_prob=0.5)
    with pytest.raises(
        ValueError,
        match="max_latent_size is 9 for the processor, 8 for the model; vit_cond_dropout_prob is 0.5 for the "
        r"processor, 0.3 for the model\. .*follow_model",
    ):
        packing.check_model(config)
    packing.check_model(config, unchecked={"max_latent_size", "vit_cond_dropout_prob"})


@pytest.mark.core
def test_a_model_with_several_eos_ids_agrees_with_each():
    for ids in ([EOS, 5], [5, EOS]):
        replace(CONFIG, image_token_id=IMAGE, latent_token_id=LATENT).check_model(tiny_config(eos_token_id=ids))


# --------------------------------------------------------------------------------------------------------------------
# With a model


def samples_of(config) -> tuple[PackingConfig, list[SamplePlan]]:
    """An edit, a question about a picture, plain text and a drawing in the middle of an answer."""
    packing = replace(PackingConfig.of_model(config), **DROP_NOTHING)
    patch, stride = packing.vit_patch_size, packing.latent_downsample

    def read(rows: int, columns: int) -> SequenceItem:
        return SequenceItem.vit_image(pixels(patch * rows, patch * columns), patch)

    def seen(rows: int, columns: int, **flags) -> SequenceItem:
        return SequenceItem.vae_image(pixels(stride * rows, stride * columns), stride, **flags)

    return packing, [
        SamplePlan((seen(2, 3), read(2, 2), text(11, 12, 13), seen(2, 3, loss=True))),
        SamplePlan((read(3, 2), text(21, 22), text(23, 24, 25, loss=True))),
        SamplePlan((text(31, 32, loss=True, special_token_label=packing.eos_token_id),)),
        SamplePlan(
            (
                text(41),
                text(42, loss=True, special_token_label=packing.vision_start_token_id),
                seen(1, 2, loss=True),
                seen(1, 2),
                read(1, 1),
                text(43, 44, loss=True),
            )
        ),
    ]


def with_latents(made: dict[str, Any], config) -> dict[str, Any]:
    """Latents and noise that depend on the picture alone, in place of the VAE's own samples."""
    made, patch, z = dict(made), config.latent_patch_size, config.vae_config.z_channels
    shapes = made.get("patchified_vae_latent_shapes", [])
    if not shapes:
        return made
    del made["padded_images"]

    def normal(rows: int, columns: int, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=torch.Generator().manual_seed(10 * rows + columns))

    made["padded_latent"] = [normal(h, w, z, h * patch, w * patch) for h, w in shapes]
    made["noise"] = torch.cat([normal(w, h, h * w, config.patch_latent_dim) for h, w in shapes])
    return made


@pytest.mark.core
@torch.no_grad()
def test_the_loss_of_a_pack_is_that_of_its_samples_one_by_one():
    model = tiny_model().eval()
    packing, plans = samples_of(model.config)
    normal = np.random.default_rng(0)
    samples = [randomize(plan, packing, normal) for plan in plans]
    together = model(**with_latents(pack(samples, packing), model.config))
    alone = [model(**with_latents(pack([one], packing), model.config)) for one in samples]
    ce = torch.cat([output.ce for output in alone if output.ce is not None])
    mse = torch.cat([output.mse for output in alone if output.mse is not None])
    torch.testing.assert_close(together.ce, ce, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.mse, mse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        together.last_hidden_state, torch.cat([output.last_hidden_state for output in alone]), atol=1e-5, rtol=1e-5
    )


@pytest.mark.core
@torch.no_grad()
def test_a_model_takes_splits_masks_and_padding_alike():
    model = tiny_model().eval()
    packing, plans = samples_of(model.config)
    packs = [
        pack_samples(plans, packing, np.random.default_rng(0), **options)
        for options in ({}, {"nested_masks": True}, {"pad_to": 200})
    ]
    states = [model(**with_latents(made, model.config)).last_hidden_state for made in packs]
    torch.testing.assert_close(states[1], states[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(states[2], states[0], atol=1e-5, rtol=1e-5)


@pytest.mark.core
def test_a_model_encodes_the_pictures_of_a_pack_itself():
    model = tiny_model()
    packing, plans = samples_of(model.config)
    output = model(**pack_samples(plans, packing, np.random.default_rng(0)))
    assert torch.isfinite(output.loss) and output.ce is not None and output.mse is not None


# --------------------------------------------------------------------------------------------------------------------
# The collator


@pytest.mark.core
def test_the_collator_packs_samples_and_lets_a_finished_pack_pass():
    plans = [SamplePlan((text(7, loss=True),)), SamplePlan((text(8, 9, loss=True),))]
    collate = PackCollator(CONFIG)
    made = collate(plans)
    assert made["sample_lens"] == [3, 4]
    assert collate([made]) == made
    with pytest.raises(ValueError, match=r"2 packs in one batch.*batch_size=1"):
        collate([made, made])


@pytest.mark.core
def test_the_collator_follows_the_seed_of_torch():
    plan, collate = SamplePlan((vae(1, 1, loss=True),)), PackCollator(CONFIG)

    def timestep(seed: int) -> float:
        torch.manual_seed(seed)
        return collate([plan])["packed_timesteps"].item()

    assert timestep(0) == timestep(0) != timestep(1)


# --------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.core
def test_a_sample_without_tokens_is_refused_by_name():
    with pytest.raises(ValueError, match="row 7 has no tokens: its plan is empty"):
        randomize(SamplePlan((), "row 7"), CONFIG, NO_NUMBERS)
    with pytest.raises(ValueError, match="row 8 has no tokens: all of its items were dropped"):
        randomize(SamplePlan((text(7, enable_cfg=True),), "row 8"), CONFIG, random_numbers(0.0))
    with pytest.raises(ValueError, match="at least one sample"):
        pack([], CONFIG)


@pytest.mark.core
def test_an_unknown_item_type_is_refused():
    with pytest.raises(ValueError, match="Unknown item type 'audio'"):
        SequenceItem("audio")
    with pytest.raises(ValueError, match="Unknown item type 'video' in row 3"):
        CONFIG.released_plan([{"type": "video"}], [], [], "row 3")


@pytest.mark.core
@pytest.mark.parametrize(
    ("item", "message"),
    [
        (lambda: vit(7, 2), "vit_image of row 1 has 7x2 tokens.*vit_max_num_patch_per_side=6 per side"),
        (lambda: vae(2, 9), "vae_image of row 1 has 2x9 tokens.*max_latent_size=8 per side"),
    ],
)
def test_a_picture_larger_than_its_position_table_is_refused(item, message: str):
    with pytest.raises(ValueError, match=message):
        randomize(SamplePlan((item(),), "row 1"), CONFIG, random_numbers())
    interpolating = replace(CONFIG, interpolate_pos=True)
    assert pack_samples([SamplePlan((item(),))], interpolating, random_numbers())["sequence_length"] > 0


@pytest.mark.core
def test_a_pack_over_its_budget_is_refused_with_its_samples():
    plans = [SamplePlan((text(7),), "short"), SamplePlan((text(7, 8, 9),), "long")]
    assert pack_samples(plans, CONFIG, NO_NUMBERS, max_num_tokens=8)["sequence_length"] == 8
    with pytest.raises(
        ValueError, match=r"8 tokens, more than max_num_tokens=7; its samples have \[3, 5\] \(short, long"
    ):
        pack_samples(plans, CONFIG, NO_NUMBERS, max_num_tokens=7)
    with pytest.raises(ValueError, match="more than pad_to=7"):
        pack_samples(plans, CONFIG, NO_NUMBERS, pad_to=7)
    with pytest.raises(ValueError, match="use one of them"):
        pack_samples(plans, CONFIG, NO_NUMBERS, pad_to=9, nested_masks=True)


@pytest.mark.core
@pytest.mark.parametrize(
    ("items", "message"),
    [
        (lambda: (vae(1, 1, split_end=False),), "does not end"),
        (lambda: (vae(1, 1, split_start=False),), "Item 0 .* continues a split that nothing started"),
        (lambda: (vae(1, 1, split_end=False), text(7)), "Item 1 .* starts a split inside another"),
    ],
)
def test_a_clip_without_start_or_end_is_refused(items, message: str):
    with pytest.raises(ValueError, match=message):
        randomize(SamplePlan(items()), CONFIG, random_numbers())


@pytest.mark.core
def test_items_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match="needs a grid"):
        SequenceItem("vit_image")
    with pytest.raises(ValueError, match="cannot have a loss"):
        vit(1, 1, loss=True)
    with pytest.raises(ValueError, match="Only vae_images are frames"):
        text(7, frame_delta=2)
    with pytest.raises(ValueError, match="30x32 pixels is not divisible by 4"):
        SequenceItem.vae_image(torch.zeros(3, 30, 32), 4)
    with pytest.raises(ValueError, match="has no content"):
        pack_samples([SamplePlan((SequenceItem("vit_image", grid=(1, 1)),))], CONFIG, NO_NUMBERS)


@pytest.mark.core
def test_a_released_plan_without_its_contents_is_refused():
    entry = {"type": "text", "enable_cfg": 0, "loss": 1, "special_token_loss": 1, "special_token_label": None}
    with pytest.raises(ValueError, match="special_token_loss=1 but no special_token_label"):
        CONFIG.released_plan([entry], [[7]], [])
    with pytest.raises(ValueError, match="more text items than it has contents"):
        CONFIG.released_plan([entry | {"special_token_label": EOS}], [], [])
