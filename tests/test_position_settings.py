# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Position embeddings chosen in the config: every one trains, writes, draws, saves, and refuses what it cannot do."""

import copy
import importlib.util
import json
import re
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import (
    BOS,
    CLEAN,
    IMAGE,
    LATENT,
    VISION_END,
    VISION_START,
    Row,
    attention_kernel,
    fresh_tiny_model,
    pad_rows,
    random_row,
    tiny_config,
    tiny_model,
)
from transformers import AutoProcessor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from bagel import decoder_bagel
from bagel.configuration_bagel import BagelConfig, BagelTextConfig, BagelVisionConfig
from bagel.conversion import adopt, export
from bagel.embeddings_bagel import (
    BagelGridPositionEmbedding,
    BagelTextRotaryEmbedding,
    grid_position_ids,
    latent_position_ids,
    read_table,
    rotate_halves,
    rotate_pairs,
)
from bagel.flow_bagel import DrawingOptions, patchify_latents, unpatchify_latents
from bagel.generation_bagel import without_dangling_bos
from bagel.layout_bagel import PackedLayout, Placeholders
from bagel.modeling_bagel import BagelForUnifiedMultimodal
from bagel.modeling_siglip_navit import SiglipVisionModel
from bagel.packing_bagel import PackingConfig, SamplePlan, SequenceItem, pack_samples
from bagel.positions_bagel import (
    Gemma4PartialRotaryEmbedding,
    LlamaVisionRotaryEmbedding,
    PartialRotaryEmbedding,
    Qwen3OmniMoeThinkerTextRotaryEmbedding,
    Qwen3OmniMoeVisionPosEmbedInterpolate,
    Qwen3OmniMoeVisionRotaryEmbedding,
)


pytestmark = pytest.mark.core

KNOWN = 16  # positions that the tiny decoder was "trained" with; the rows below are longer
LONG = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5]


def text(rope_type="default", **parameters) -> dict:
    """A decoder with heads of 16 features, 8 pairs."""
    longer = rope_type in ("default", "proportional")  # those do not extend the context by themselves
    return {
        "text_config": {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4 * KNOWN if longer else KNOWN,
            "rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters},
        }
    }


EXTENDED = {"factor": 4.0, "original_max_position_embeddings": KNOWN}
MROPE = {"mrope_section": [4, 2, 2]}
TEXT_SETTINGS = {
    "linear": text("linear", factor=4.0),
    "dynamic": text("dynamic", factor=4.0),
    "yarn": text("yarn", **EXTENDED),
    "yarn of adjacent pairs": text("yarn", **EXTENDED, truncate=False, attention_factor=1.0, interleave=True),
    "longrope": text("longrope", **EXTENDED, short_factor=[1.0] * 8, long_factor=LONG),
    "llama3": text("llama3", **EXTENDED, low_freq_factor=1.0, high_freq_factor=4.0),
    "partial": text(partial_rotary_factor=0.5),
    "proportional": text("proportional", partial_rotary_factor=0.25),
    "adjacent pairs": text(interleave=True),
    "mrope": text(**MROPE),
    "mrope, yarn, partial": text("yarn", **EXTENDED, mrope_section=[2, 1, 1], partial_rotary_factor=0.5),
}
PICTURE_SETTINGS = {
    "rope_2d": {"vision_config": {"position_embedding": "rope_2d"}},
    "llama_vision": {"vision_config": {"position_embedding": "llama_vision"}},
    "qwen_vision": {"vision_config": {"position_embedding": "qwen_vision"}, "interpolate_pos": "fit"},
    "buckets": {"interpolate_pos": True},
    "bilinear": {"interpolate_pos": "bilinear"},
    "fit": {"interpolate_pos": "fit"},
    "bilinear, tower of another side": {"vision_config": {"image_size": 12}, "interpolate_pos": "bilinear"},
    "mrope, qwen_vision, fit": {
        **text(**MROPE),
        "vision_config": {"position_embedding": "qwen_vision"},
        "interpolate_pos": "fit",
    },
}
SETTINGS = {**TEXT_SETTINGS, **PICTURE_SETTINGS}
every_setting = pytest.mark.parametrize("name", SETTINGS)


def conversations(setting: dict) -> list[list[tuple]]:
    """Longer than KNOWN and shorter; with pictures beyond both tables where that is allowed."""
    large = bool(setting.get("interpolate_pos"))
    return [
        [("text", 9), ("vit", 8, 7) if large else ("vit", 3, 5), ("text", 11)],
        [("vae", 10, 9) if large else ("vae", 3, 2), ("vit", 2, 5), ("text", 4)],
        [("text", 6)],
    ]


def rows_of(setting: dict, seed: int = 0) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    config = tiny_config(**setting)
    return [random_row(segments, generator, config) for segments in conversations(setting)]


def plan_of(segments: Sequence[tuple], row: Row, learned: tuple[int, int] | None = None) -> SamplePlan:
    """The same conversation as a plan, its texts trained; `learned` adds a picture to draw."""
    ids, patches, pictures, items = list(row.ids), list(row.patches), list(row.pictures), []
    for kind, *size in segments:
        count = size[0] + 2 if kind == "text" else size[0] * size[1] + 2
        inner, ids = tuple(ids[1 : count - 1]), ids[count:]
        if kind == "text":
            items.append(SequenceItem("text", text_ids=inner, loss=True))
        elif kind == "vit":
            items.append(SequenceItem("vit_image", grid=tuple(size), content=patches.pop(0)))
        else:
            items.append(SequenceItem("vae_image", grid=tuple(size), content=pictures.pop(0)))
    if learned:
        stride = tiny_config().latent_downsample
        pixels = torch.zeros(3, learned[0] * stride, learned[1] * stride)
        items.append(SequenceItem("vae_image", grid=learned, content=pixels, loss=True))
    return SamplePlan(tuple(items))


def pack_of(model, setting: dict, learned: tuple[int, int] | None = None) -> dict:
    """All conversations as one pack, pictures encoded without chance."""
    plans = [plan_of(*both, learned) for both in zip(conversations(setting), rows_of(setting))]
    pack = pack_samples(plans, PackingConfig.of_model(model.config), np.random.default_rng(0))
    grids = pack["patchified_vae_latent_shapes"]
    stride, patch = model.config.latent_downsample, model.config.latent_patch_size
    images = [x[:, : h * stride, : w * stride] for x, (h, w) in zip(pack.pop("padded_images"), grids)]
    latents = model.encode_images(images, sample_posterior=False)
    maps = [unpatchify_latents(tokens, grid, patch) for tokens, grid in zip(latents, grids)]
    height, width = (max(z.shape[axis] for z in maps) for axis in (1, 2))
    pad = torch.nn.functional.pad
    padded = [pad(z, (0, width - z.shape[2], 0, height - z.shape[1])) for z in maps]
    noise = torch.randn(sum(len(x) for x in latents), latents[0].shape[1], generator=torch.Generator().manual_seed(1))
    return {**pack, "padded_latent": torch.stack(padded), "noise": noise}


def pack_latents(model, pack: dict) -> torch.Tensor:
    """(3, tokens, patch_latent_dim) of the pictures to draw, the last of each conversation."""
    patch, shapes = model.config.latent_patch_size, pack["patchified_vae_latent_shapes"]
    tokens = [
        patchify_latents(z[:, : h * patch, : w * patch], patch) for z, (h, w) in zip(pack["padded_latent"], shapes)
    ]
    learned = pack["packed_timesteps"].split([len(one) for one in tokens])
    return torch.stack([one for one, times in zip(tokens, learned) if times[0] > CLEAN])


def close(found, expected, atol=2e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


# ---- every setting works


@every_setting
def test_one_training_step_lowers_the_loss(name):
    model = fresh_tiny_model(**SETTINGS[name]).train()
    pack = pack_of(model, SETTINGS[name], learned=(10, 9) if SETTINGS[name].get("interpolate_pos") else (4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = model(**pack).loss
    before.backward()
    missing = [key for key, one in model.named_parameters() if one.requires_grad and one.grad is None]
    assert missing == []
    optimizer.step()
    assert model(**pack).loss < before


@every_setting
def test_pack_equals_padded_batch(name):
    model, rows = tiny_model(**SETTINGS[name]), rows_of(SETTINGS[name])
    with torch.no_grad():
        packed = model(**pack_of(model, SETTINGS[name])).last_hidden_state
        padded = {side: model(**pad_rows(rows, side)).last_hidden_state for side in ("left", "right")}
    start = 0
    for number, row in enumerate(rows):
        length = len(row.ids)
        own = packed[start : start + length]
        close(padded["left"][number, -length:], own)
        close(padded["right"][number, :length], own)
        start += length


@every_setting
def test_eager_equals_sdpa(name):
    model, batch = tiny_model(**SETTINGS[name]), pad_rows(rows_of(SETTINGS[name]))
    logits = []
    for kernel in ("eager", "sdpa"):
        with attention_kernel(model, kernel), torch.no_grad():
            logits.append(model(**batch).logits[batch["attention_mask"].bool()])
    close(*logits)


@every_setting
def test_saved_model_loads_the_same(name, tmp_path):
    model, batch = tiny_model(**SETTINGS[name]), pad_rows(rows_of(SETTINGS[name]))
    model.save_pretrained(tmp_path)
    loaded = BagelForUnifiedMultimodal.from_pretrained(tmp_path)
    for part in ("text_config", "vision_config"):
        facts = [json.loads(getattr(one.config, part).to_json_string(use_diff=False)) for one in (model, loaded)]
        for setting in ("rope_parameters", "position_embedding", "rope", "max_position_embeddings"):
            assert facts[0].get(setting) == facts[1].get(setting)
    assert loaded.config.interpolate_pos == model.config.interpolate_pos
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@every_setting
def test_batch_writes_and_draws_what_single_prompts_do(name):
    setting, model = SETTINGS[name], tiny_model(**SETTINGS[name])
    rows = [Row([*row.ids, BOS], *list(vars(row).values())[1:]) for row in rows_of(setting)]
    side = 10 if setting.get("interpolate_pos") else 6
    size = {"height": 4 * side, "width": 4 * (side - 1), "num_timesteps": 4, "progress_bar": False}
    noise = torch.randn(3, side * (side - 1), model.config.patch_latent_dim, generator=torch.Generator().manual_seed(0))
    drawing = {**size, "generation_mode": "image", "output_type": "latent", "sample_posterior": False}
    writing = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    batch = pad_rows(rows)
    answers = model.generate(**batch, **writing)[:, batch["input_ids"].shape[1] :]
    pictures = model.generate(**batch, **drawing, latents=noise)
    for number, row in enumerate(rows):
        single = pad_rows([row])
        answer = model.generate(**single, **writing)[0, len(row.ids) :]
        assert answers[number].tolist() == answer.tolist()
        close(pictures[number], model.generate(**single, **drawing, latents=noise[number])[0], atol=2e-4)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "dynamic"])  # it rotates a cache otherwise
def test_velocity_of_a_picture_being_drawn_is_that_of_a_training_pack(name):
    setting, model = SETTINGS[name], tiny_model(**SETTINGS[name])
    grid = (10, 9) if setting.get("interpolate_pos") else (4, 3)
    pack = pack_of(model, setting, learned=grid)
    learned = pack["mse_loss_indexes"].view(3, -1)
    noise = pack["noise"][pack["packed_timesteps"] > CLEAN].view(3, -1, model.config.patch_latent_dim)
    times = torch.sigmoid(pack["packed_timesteps"][pack["packed_timesteps"] > CLEAN].view(3, -1)[:, 0])
    side, seen = model.config.latent_downsample, DrawingOptions(sample_posterior=False)
    with torch.no_grad():
        hidden = model(**pack).last_hidden_state
        clean = pack_latents(model, pack)
        for number, row in enumerate(rows_of(setting)):
            prompt, images = model._read_prompt(pad_rows([row]), seen)
            read = model._read(without_dangling_bos(model.config, prompt), images)
            context = model._branches(read, read, [(grid[0] * side, grid[1] * side)]).full
            t = times[number]
            x_t = (1 - t) * clean[number] + t * noise[number]
            assert torch.equal(context.position_ids, latent_position_ids(model.config, grid)[None])
            drawn = model.predict_velocity(x_t[None], t, context)
            close(drawn[0], model.llm2vae(hidden[learned[number]]), atol=1e-4)


@pytest.mark.parametrize("name", TEXT_SETTINGS)
def test_decoding_with_a_cache_equals_full_forwards(name):
    """But for `"dynamic"`, whose cached keys keep the frequencies of the length that they were read at."""
    model, row = tiny_model(**SETTINGS[name]), rows_of(SETTINGS[name])[0]
    prompt = pad_rows([Row([*row.ids, BOS], row.patches, row.grids, [], [])])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    full = model.generate(**prompt, **options, use_cache=False)
    static = model.generate(**prompt, **options, cache_implementation="static", disable_compile=True)
    cached = model.generate(**prompt, **options)
    assert cached.tolist() == static.tolist()
    if name != "dynamic":
        assert cached.tolist() == full.tolist()


# ---- text: the numbers


def rotary(setting: dict) -> tuple[BagelTextConfig, BagelTextRotaryEmbedding]:
    config = tiny_config(**setting).text_config
    return config, BagelTextRotaryEmbedding(config)


POSITIONS = torch.arange(64)[None]
ONE = torch.zeros(1)


def test_default_tables_are_qwen2s_bit_for_bit():
    config = tiny_config().text_config
    for ours, theirs in zip(
        BagelTextRotaryEmbedding(config)(ONE, POSITIONS), Qwen2RotaryEmbedding(config)(ONE, POSITIONS)
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["linear", "dynamic", "yarn", "yarn of adjacent pairs", "longrope", "llama3"])
@pytest.mark.parametrize("length", [KNOWN - 3, 3 * KNOWN])
def test_tables_are_those_of_transformers(name, length):
    config, ours = rotary(SETTINGS[name])
    theirs = LlamaRotaryEmbedding(config)
    for found, expected in zip(ours(ONE, POSITIONS[:, :length]), theirs(ONE, POSITIONS[:, :length])):
        close(found, expected, atol=1e-5)


def test_long_inputs_leave_nothing_behind():
    for name in ("dynamic", "longrope"):
        _, module = rotary(SETTINGS[name])
        short = module(ONE, POSITIONS[:, :9])[0]
        assert not torch.allclose(module(ONE, POSITIONS)[0][:, :9], short, atol=1e-4)
        assert torch.equal(module(ONE, POSITIONS[:, :9])[0], short)


def rotated_by_model(setting: dict, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """(batch, length, heads, 16) as the attention of a model rotates them."""
    model = tiny_model(**setting)
    attention = model.language_model.model.layers[0].self_attn
    cos, sin = model.language_model.model.rotary_emb(x, position_ids)
    return attention._rotate(x.transpose(1, 2), cos, sin).transpose(1, 2)


def heads(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 20, 2, 16, generator=torch.Generator().manual_seed(seed))


def test_partial_and_proportional_rotate_as_in_the_document():
    x, positions = heads(), torch.arange(20)[None]
    for kind, name in ((PartialRotaryEmbedding, "partial"), (Gemma4PartialRotaryEmbedding, "proportional")):
        factor = SETTINGS[name]["text_config"]["rope_parameters"]["partial_rotary_factor"]
        theirs = kind(1.0, 10000.0, 16, cast_as_fprop_dtype=False, partial_rotary_factor=factor)
        ours = rotated_by_model(SETTINGS[name], x, positions)
        close(ours, theirs(x, positions))
        assert not torch.equal(ours, x)
    assert torch.equal(rotated_by_model(SETTINGS["partial"], x, positions)[..., 8:], x[..., 8:])


def test_three_positions_rotate_as_in_the_document():
    x = heads()
    positions = torch.randint(0, 50, (1, 20, 3), generator=torch.Generator().manual_seed(1))
    theirs = Qwen3OmniMoeThinkerTextRotaryEmbedding(
        1.0, 10000.0, 16, cast_as_fprop_dtype=False, mrope_section=(4, 2, 2)
    )
    close(rotated_by_model(SETTINGS["mrope"], x, positions), theirs(x, positions.movedim(-1, 0)))
    equal = torch.arange(20)[None]
    assert torch.equal(
        rotated_by_model(text(**MROPE), x, equal),
        rotated_by_model(text(**MROPE), x, equal[..., None].expand(-1, -1, 3)),
    )


def test_pairs_are_halves_or_adjacent():
    x, positions = heads(), torch.arange(20)[None]
    cos, sin = (table[:, :, None] for table in rotary(text())[1](x, positions))
    assert torch.equal(rotated_by_model(text(), x, positions), rotate_halves(x, cos, sin))
    assert torch.equal(rotated_by_model(text(interleave=True), x, positions), rotate_pairs(x, cos, sin))


def test_context_reaches_as_far_as_it_is_extended(monkeypatch):
    said = []
    monkeypatch.setattr(decoder_bagel.logger, "warning_once", said.append)
    batch = pad_rows([random_row([("text", 40)], torch.Generator().manual_seed(0))])
    for name in ("linear", "dynamic", "yarn", "longrope", "llama3"):
        config = tiny_config(**SETTINGS[name]).text_config
        assert (config.max_position_embeddings, config.max_extended_positions) == (KNOWN, 4 * KNOWN)
        tiny_model(**SETTINGS[name])(**batch)
    assert said == []
    plain = text()
    plain["text_config"]["max_position_embeddings"] = KNOWN
    tiny_model(**plain)(**batch)
    assert re.search(r"position 41, but max_position_embeddings=16: .* rope_parameters", said.pop())
    tiny_model(**SETTINGS["yarn"])(**pad_rows([random_row([("text", 70)], torch.Generator())]))
    assert "max_position_embeddings=16 and rope_parameters extend it to 64" in said.pop()


# ---- text: three positions per token


def placeholders_of(ids: list[list[int]]) -> Placeholders:
    return Placeholders.find(torch.tensor(ids), IMAGE, LATENT, VISION_START, VISION_END)


MARKS = {"s": VISION_START, "e": VISION_END, "i": IMAGE, "l": LATENT, "t": 50, ".": 0}


def table_of(tokens: str, images: list, latents: list) -> str:
    ids = [MARKS[token] for token in tokens]
    placeholders = placeholders_of([ids])
    valid = torch.tensor([[int(token != ".") for token in tokens]])
    positions = placeholders.positions(valid, placeholders.merge_grids(images, latents))[0]
    return "\n".join("".join(f"{p:>3}" for p in axis) for axis in positions.T.tolist())


def drawing(text: str) -> str:
    return "\n".join("".join(f"{number:>3}" for number in line.split()) for line in text.strip().splitlines())


def test_a_picture_has_the_positions_of_its_grid():
    # the table at the top of layout_bagel.py: 2 rows, 3 columns
    assert table_of("tsiiiiiiet", [(2, 3)], []) == drawing("""
        0  1  1  1  1  1  1  1  3  4
        0  1  1  1  1  2  2  2  3  4
        0  1  1  2  3  1  2  3  3  4
    """)


def test_an_edited_picture_is_two_grids_one_behind_the_other_and_padding_counts_nothing():
    assert table_of("..sllesiiiiett", [(4, 1)], [(1, 2)]) == drawing("""
        0  0  0  0  0  1  2  2  2  2  2  5  6  7
        0  0  0  0  0  1  2  2  3  4  5  5  6  7
        0  0  0  0  1  1  2  2  2  2  2  5  6  7
    """)


def test_pictures_of_a_batch_are_counted_row_by_row():
    rows = [[50, VISION_START, LATENT, LATENT, VISION_END, 51], [VISION_START, IMAGE, IMAGE, VISION_END, 51, 52]]
    placeholders = placeholders_of(rows)
    grids = placeholders.merge_grids([(2, 1)], [(1, 2)])
    assert grids.tolist() == [[1, 2], [2, 1]]
    both = placeholders.positions(torch.ones(2, 6).long(), grids)
    for number, (row, images, latents) in enumerate(zip(rows, ([], [(2, 1)]), ([(1, 2)], []))):
        alone = placeholders_of([row])
        assert torch.equal(
            both[number], alone.positions(torch.ones(1, 6).long(), alone.merge_grids(images, latents))[0]
        )


def test_a_picture_being_drawn_has_the_same_grid():
    layout = PackedLayout.noisy_blocks([6, 2], torch.tensor([5, 0]), 0, None, [(2, 3), (1, 2)])
    assert layout.position_ids[0].T.tolist() == [
        [5, 5, 5, 5, 5, 5, 5, 7],
        [5, 5, 5, 5, 6, 6, 6, 7],
        [5, 5, 6, 7, 5, 6, 7, 7],
    ]
    assert layout.position_ids[1, :4].T.tolist() == [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 1, 1]]


def test_model_counts_three_positions_and_goes_on_behind_pictures():
    model, row = tiny_model(**text(**MROPE)), rows_of(text(**MROPE))[1]  # VAE 3 x 2, ViT 2 x 5, text
    batch = pad_rows([row])
    sizes = {name: batch[name] for name in ("image_grid_hw", "latent_image_sizes")}
    positions = model.get_rope_index(batch["input_ids"], batch["attention_mask"], **sizes)
    assert positions.shape == (3, 1, len(row.ids))
    starts = (batch["input_ids"][0] == VISION_START).nonzero()[:, 0].tolist()
    assert positions[:, 0, starts].T.tolist() == [[0, 0, 0], [3, 3, 3]]
    assert positions[:, 0, -6].tolist() == [8, 8, 8]  # bos, behind 5 columns
    with torch.no_grad():
        assert torch.equal(model(**batch, position_ids=positions).logits, model(**batch).logits)


def test_packs_have_three_positions_that_follow_the_same_rule():
    setting = text(**MROPE)
    model = tiny_model(**setting)
    pack = pack_of(model, setting, learned=(2, 3))
    lengths, positions = pack["sample_lens"], pack["packed_position_ids"]
    assert positions.shape == (sum(lengths), 3)
    for row, own in zip(rows_of(setting), positions.split(lengths)):
        batch = pad_rows([row])
        sizes = (batch.get(name) for name in ("image_grid_hw", "latent_image_sizes"))
        counted = model.get_rope_index(batch["input_ids"], None, *sizes)[:, 0].T
        assert torch.equal(own[: len(row.ids)], counted)
        learned = own[len(row.ids) :] - (counted.max() + 1)  # it stands behind all of the conversation
        assert learned.T.tolist() == [[0] * 7 + [2], [0, 0, 0, 0, 1, 1, 1, 2], [0, 0, 1, 2, 0, 1, 2, 2]]


def test_learned_dropped_and_moving_pictures_advance_by_their_grid():
    rules = replace(PackingConfig.of_model(tiny_config(**text(**MROPE))), vit_cond_dropout_prob=1.0)
    image = {"grid": (2, 3), "content": torch.zeros(3, 8, 12)}
    frames = [
        SequenceItem("vae_image", **image, frame_delta=1, split_end=False),
        SequenceItem("vae_image", **image, frame_delta=1, split_start=False),
    ]
    items = [
        SequenceItem("vit_image", grid=(1, 4), content=torch.zeros(4, 48), enable_cfg=True),  # dropped: 0 to 3
        SequenceItem("vae_image", **image, loss=True),  # learned at 4, takes nothing
        SequenceItem("vae_image", **image),  # its clean copy: 4 to 6
        *frames,  # at 7 and 8, the second reaches 10
        SequenceItem("text", text_ids=(7,)),
    ]
    pack = pack_samples([SamplePlan(tuple(items))], rules, np.random.default_rng(0))
    first = [0, 8, 16, 24, 32]
    assert pack["packed_position_ids"][first].tolist() == [[n] * 3 for n in (4, 4, 7, 8, 11)]
    alone = pack_samples([SamplePlan(tuple(items))], PackingConfig(vit_cond_dropout_prob=1.0), np.random.default_rng(0))
    assert alone["packed_position_ids"][first].tolist() == [1, 1, 2, 3, 4]


def test_grid_positions_tell_a_transposed_picture_apart():
    """The same patches as 2 x 6 and as 6 x 2: with one position per picture the decoder sees only their features."""
    changes = {}
    for name, setting in {"shared": {}, "grid": text(**MROPE)}.items():
        model = tiny_model(**setting)
        flat = {"pixel_values": torch.zeros(12, 48), "image_grid_hw": torch.tensor([[2, 6]])}
        batch = {"input_ids": torch.tensor([[VISION_START, *[IMAGE] * 12, VISION_END, BOS]]), **flat}
        table = model.vit_pos_embed.pos_embed.clone()
        try:
            model.vit_pos_embed.pos_embed.zero_()
            with torch.no_grad():
                features = model.connector(torch.zeros(12, 32))
                model._read_patches = lambda *args, features=features, **kwargs: (None, features)
                wide = model(**batch).logits[0, -1]
                tall = model(**{**batch, "image_grid_hw": torch.tensor([[6, 2]])}).logits[0, -1]
        finally:
            del model._read_patches
            model.vit_pos_embed.pos_embed.copy_(table)
        changes[name] = float((wide - tall).abs().max())
    assert changes["shared"] == 0
    assert changes["grid"] > 1e-3


def test_wrong_numbers_of_positions_are_refused():
    mrope, plain = tiny_model(**text(**MROPE)), tiny_model()
    batch = pad_rows(rows_of(text(**MROPE))[:1])
    length = batch["input_ids"].shape[1]
    with pytest.raises(ValueError, match=r"3 positions per token; this model takes 1.*mrope_section"):
        plain(**batch, position_ids=torch.zeros(3, 1, length, dtype=torch.long))
    with pytest.raises(ValueError, match="4 positions per token"):
        mrope(**batch, position_ids=torch.zeros(4, 1, length, dtype=torch.long))
    pack = pack_of(mrope, text(**MROPE))
    with pytest.raises(ValueError, match=r"packed_position_ids holds one position.*return_position_ids"):
        mrope(**{**pack, "packed_position_ids": pack["packed_position_ids"][:, 0]})
    with pytest.raises(ValueError, match="packed_position_ids holds 3 positions"):
        plain(**pack)
    with pytest.raises(ValueError, match=r"input_ids mark 1 images .* image_grid_hw describes 0"):
        mrope.get_rope_index(batch["input_ids"])


# ---- text: writing and drawing with three positions


@pytest.fixture(scope="module")
def grid_model(tiny_directory):
    """The embedded checkpoint with (time, height, width) positions."""
    changed = {"rope_parameters": {"mrope_section": [4, 2, 2]}}
    return BagelForUnifiedMultimodal.from_pretrained(tiny_directory, text_config=changed).eval()


@pytest.fixture
def prompts(processor, picture, other_picture):
    """A question about two pictures and one about none, or an edit and a drawing."""

    def make(mode: str = "text", which: slice = slice(None), maker=processor):
        pictures = [{"type": "image", "image": picture}, {"type": "image", "image": other_picture}]
        contents = [[*pictures, {"type": "text", "text": "Which is older?"}], [{"type": "text", "text": "A red car"}]]
        chats = [[{"role": "user", "content": content}] for content in contents[which]]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return maker.apply_chat_template(chats, **options, generation_mode=mode)

    return make


FAST = {"num_timesteps": 4, "progress_bar": False, "output_type": "latent", "height": 64, "width": 96}


def test_beams_of_a_batch_keep_their_three_positions(grid_model, prompts):
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    inputs = prompts()
    several = grid_model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    for row in range(2):
        single = prompts(which=slice(row, row + 1))
        found = grid_model.generate(**single, **options)[:, single["input_ids"].shape[1] :]
        assert several[2 * row : 2 * row + 2].tolist() == found.tolist()


def test_edits_with_a_plan_batch(grid_model, prompts):
    def draw(inputs, latents):
        options = {**FAST, "latents": latents, "generation_mode": "image", "sample_posterior": False}
        return grid_model.generate(**inputs, **options, think=True, max_new_tokens=4, cfg_img_scale=2.0)

    noise = torch.randn(2, 4 * 6, grid_model.config.patch_latent_dim, generator=torch.Generator().manual_seed(0))
    both = draw(prompts("image"), noise)
    for row in range(2):
        close(both[row], draw(prompts("image", slice(row, row + 1)), noise[row])[0], atol=2e-4)


def test_interleaved_output_goes_on_behind_the_drawn_grid(grid_model, prompts, processor, monkeypatch):
    config, seen = grid_model.config, []
    read_back = grid_model._read_back

    def watch(conversation, *args):
        longer = read_back(conversation, *args)
        before, after = conversation.prompt, longer.prompt
        seen.append((before.next_position.item(), after.next_position.item()))
        assert torch.equal(after.position_ids[0, -1], (after.next_position - 1).expand(3))
        return longer

    monkeypatch.setattr(grid_model, "_read_back", watch)
    read, start = grid_model._read, config.vision_start_token_id

    def force(*args, **kwargs):
        prefill = read(*args, **kwargs)
        prefill.logits[:, start] = 1e9
        return prefill

    monkeypatch.setattr(grid_model, "_read", force)
    inputs = prompts("interleaved", slice(1, 2))
    options = {**FAST, "generation_mode": "interleaved", "processor": processor, "max_images": 1, "max_new_tokens": 3}
    inputs = {
        name: value[:, :-1] if name in ("input_ids", "attention_mask") else value for name, value in inputs.items()
    }
    items = grid_model.generate(**inputs, **options)[0]
    assert [tuple(item.shape) for item in items] == [(24, config.patch_latent_dim)]
    (before, after), image = seen[0], processor.image_processor
    read = image([np.zeros((64, 96, 3), dtype=np.uint8)], edited=True, read=True, return_tensors="pt")
    vae = int((read["latent_image_sizes"][0] // config.latent_downsample).max())
    assert after == before + vae + int(read["image_grid_hw"][0].max())


@pytest.fixture(scope="module")
def grid_processor(tiny_directory):
    return AutoProcessor.from_pretrained(tiny_directory, trust_remote_code=True, return_position_ids=True)


def test_processor_makes_the_ids_that_the_model_counts(grid_model, grid_processor, prompts, tmp_path):
    inputs = prompts(maker=grid_processor)
    positions = inputs["position_ids"]
    assert positions.shape == (3, *inputs["input_ids"].shape)
    others = {name: value for name, value in inputs.items() if name != "position_ids"}
    assert torch.equal(
        positions, grid_model.get_rope_index(others["input_ids"], others["attention_mask"], others["image_grid_hw"])
    )
    options = {"max_new_tokens": 4, "do_sample": False, "num_return_sequences": 2, "num_beams": 2}
    assert torch.equal(grid_model.generate(**inputs, **options), grid_model.generate(**others, **options))
    grid_processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert again.return_position_ids
    assert torch.equal(prompts(maker=again)["position_ids"], positions)
    assert "position_ids" in again.model_input_names


def test_drawing_takes_the_processors_ids_and_no_others(grid_model, grid_processor, prompts):
    inputs = prompts("image", maker=grid_processor)
    options = {**FAST, "generation_mode": "image", "sample_posterior": False}
    noise = {"latents": torch.zeros(2, 24, grid_model.config.patch_latent_dim)}
    with_ids = grid_model.generate(**inputs, **options, **noise)
    counted = {name: value for name, value in inputs.items() if name != "position_ids"}
    for found, expected in zip(with_ids, grid_model.generate(**counted, **options, **noise)):
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="leave position_ids out"):
        grid_model.generate(**{**inputs, "position_ids": inputs["position_ids"] + 1}, **options)


def test_new_rope_parameters_keep_the_base_of_the_weights(tmp_path):
    tiny_config().save_pretrained(tmp_path)  # base 10,000, the default is 1,000,000

    def changed(**text_config):
        return BagelConfig.from_pretrained(tmp_path, text_config=text_config).text_config.rope_parameters

    yarn = {"factor": 2.0, "original_max_position_embeddings": 512}
    for name, kind in (("rope_parameters", "rope_type"), ("rope_scaling", "type")):
        assert changed(**{name: {kind: "yarn", **yarn}}) == {"rope_type": "yarn", "rope_theta": 10000.0, **yarn}
    assert changed(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0})["rope_theta"] == 77


# ---- pictures: tower and tables


def tower(kind: str, **changes) -> SiglipVisionModel:
    config = BagelVisionConfig(**{**tiny_config().vision_config.to_dict(), "position_embedding": kind, **changes})
    return SiglipVisionModel(config)


@contextmanager
def mock_kernel(model, kernel):
    ALL_ATTENTION_FUNCTIONS["mock"] = kernel
    before = model.config._attn_implementation
    model.config._attn_implementation = "mock"
    try:
        yield
    finally:
        model.config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS["mock"]


@pytest.mark.parametrize("kind", ["llama_vision", "qwen_vision"])
def test_rotary_tower_rotates_as_in_the_document(kind):
    model, x = tower(kind), torch.randn(1, 36, 4, 8, generator=torch.Generator().manual_seed(0))
    if kind == "llama_vision":
        theirs = LlamaVisionRotaryEmbedding(24, 4, 32, 4, cast_as_fprop_dtype=False)
        expected = theirs(torch.cat([x, x[:, :1]], dim=1))[:, :36]
    else:
        expected = Qwen3OmniMoeVisionRotaryEmbedding(32, 4, 1, cast_as_fprop_dtype=False)(x, 1, 6, 6)
    tables = model.vision_model._rotary(grid_position_ids(6, 6, 6))
    attention = model.vision_model.encoder.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj):  # the heads that attention rotates
        projection.forward = lambda hidden: x[0].flatten(1)
    rotated = []

    def kernel(module, query, key, value, mask, **options):
        rotated.extend([query, key])
        return value.transpose(1, 2), None

    with mock_kernel(model, kernel):
        attention(torch.zeros(36, 32), torch.tensor([0, 36]), [36], 36, tables)
    for found in rotated:
        close(found[0].transpose(0, 1), expected[0], atol=1e-6)


@pytest.mark.parametrize("kind", ["rope_2d", "llama_vision", "qwen_vision"])
def test_rotary_tower_has_no_table_and_sees_where_patches_are(kind):
    model = tower(kind)
    assert not any("position" in name for name, _ in model.named_parameters())
    pixels, ends = torch.randn(6, 48, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 6])
    with torch.no_grad():
        wide, tall = (model(pixels, grid_position_ids(*grid, 6), ends)[0] for grid in ((2, 3), (3, 2)))
        between = model(pixels, grid_position_ids(2, 3, 6, "fit"), ends)[0]
    assert not torch.allclose(wide, tall, atol=1e-3)
    close(between, wide, atol=1e-5)  # whole coordinates are ids


@pytest.mark.parametrize("grid", [(6, 6), (3, 9), (12, 5), (1, 4), (17, 1)])
def test_bilinear_table_is_that_of_the_document(grid):
    theirs = Qwen3OmniMoeVisionPosEmbedInterpolate(36, 8, 1, cast_as_fprop_dtype=False)
    close(read_table(theirs.pos_embed, grid_position_ids(*grid, 6, "bilinear")), theirs(1, *grid), atol=1e-6)


def test_fit_changes_nothing_that_fits_and_shrinks_the_rest_evenly():
    table = BagelGridPositionEmbedding(6, 8)
    for grid in ((6, 6), (1, 1), (4, 6)):
        assert torch.equal(table(grid_position_ids(*grid, 6, "fit")), table(grid_position_ids(*grid, 6)))
    rows, columns = grid_position_ids(11, 5, 6, "fit").unflatten(0, (11, 5)).unbind(-1)
    assert rows[:, 0].tolist() == [n / 2 for n in range(11)]
    assert columns[0].tolist() == [0, 0.5, 1, 1.5, 2]  # half as far apart, as the rows are
    halfway = table(torch.tensor([[0.0, 0.5], [0.5, 0.0], [0.5, 0.5]]))
    corners = table(torch.tensor([0, 1, 6, 7]))
    close(halfway, torch.stack([corners[[0, 1]].mean(0), corners[[0, 2]].mean(0), corners.mean(0)]), atol=1e-6)


def test_coordinates_that_lost_their_fractions_are_refused():
    table = BagelGridPositionEmbedding(6, 8)
    with pytest.raises(ValueError, match=r"torch\.bfloat16.*float32"):
        table(grid_position_ids(9, 9, 6, "bilinear").bfloat16())


def test_a_full_picture_is_read_the_same_in_every_mode_but_buckets():
    batch = pad_rows([random_row([("vit", 6, 6), ("vae", 8, 8), ("text", 3)], torch.Generator().manual_seed(0))])
    with torch.no_grad():
        plain, *others = (tiny_model(interpolate_pos=mode)(**batch).logits for mode in (False, "bilinear", "fit"))
    for other in others:
        close(other, plain)


def test_tower_of_another_side_reads_its_own_table():
    model = tiny_model(vision_config={"image_size": 12}, interpolate_pos="bilinear")  # 3 x 3 beside 6 x 6
    seen = []
    hook = model.vit_model.vision_model.embeddings.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    with hook, torch.no_grad():
        model.get_image_features(torch.zeros(20, 48), torch.tensor([[4, 5]]))
    close(seen[0], grid_position_ids(4, 5, 3, "bilinear"), atol=1e-6)


@pytest.mark.parametrize("mode", [True, "bilinear", "fit"])
def test_pictures_beyond_the_tables_are_an_error_only_without_interpolation(mode):
    model, plain = tiny_model(interpolate_pos=mode), tiny_model()
    draw = {"input_ids": torch.tensor([[BOS, 9, 2]]), "generation_mode": "image", "num_timesteps": 3}
    size = {"height": 40, "width": 36, "progress_bar": False}
    assert model.generate(**draw, **size)[0].size == (36, 40)
    with pytest.raises(ValueError, match=r'max_latent_size=8 allows 32 pixels.*interpolate_pos="fit"'):
        plain.generate(**draw, **size)
    features = {"pixel_values": torch.zeros(70, 48), "image_grid_hw": torch.tensor([[7, 10]])}
    assert len(model.get_image_features(**features).pooler_output[0]) == 70
    with pytest.raises(ValueError, match=r'7x10 patches does not fit .* "fit"'):
        plain.get_image_features(**features)
    item = SequenceItem("vit_image", grid=(7, 10), content=features["pixel_values"])
    plan = SamplePlan((item, SequenceItem("text", text_ids=(9,), loss=True)))
    pack_samples([plan], PackingConfig.of_model(model.config), np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"7x10 tokens.*fit"):
        pack_samples([plan], PackingConfig.of_model(plain.config), np.random.default_rng(0))


def test_trained_tables_of_the_tower_get_gradients_between_their_entries():
    model = fresh_tiny_model(interpolate_pos="bilinear")
    model.get_image_features(torch.randn(80, 48), torch.tensor([[8, 10]])).pooler_output[0].sum().backward()
    grad = model.vit_model.vision_model.embeddings.position_embedding.weight.grad
    assert bool((grad.abs().sum(1) > 0).all())


def test_benchmark_continues_a_table_by_its_formula(repo):
    spec = importlib.util.spec_from_file_location("extend", repo / "benchmarks" / "extend.py")
    extend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extend)
    model = fresh_tiny_model()
    whole = model.latent_pos_embed.pos_embed.clone()
    extend.set_table(model, 5, False)
    assert model.config.max_latent_size == 5
    extend.set_table(model, 8, "fit")
    assert torch.equal(model.latent_pos_embed.pos_embed, whole)
    model.latent_pos_embed.pos_embed += 1  # a table of one's own
    extend.set_table(model, 9, False)
    table = model.latent_pos_embed.pos_embed.unflatten(0, (9, 9))
    assert torch.equal(table[:8, :8].flatten(0, 1), whole + 1)
    assert torch.equal(table[8], model.latent_pos_embed.table().unflatten(0, (9, 9))[8])


@pytest.mark.parametrize("stored", ["learned", "rope_2d"])
@pytest.mark.parametrize("kind", ["rope_2d", "llama_vision", "qwen_vision"])
def test_a_tower_of_another_kind_loads_from_what_is_there(stored, kind, tmp_path):
    model = fresh_tiny_model(vision_config={"position_embedding": stored})
    model.save_pretrained(tmp_path)
    loaded = BagelForUnifiedMultimodal.from_pretrained(tmp_path, vision_config={"position_embedding": kind})
    tensors = loaded.state_dict()
    assert all(torch.equal(one, tensors[name]) for name, one in model.state_dict().items() if name in tensors)
    fresh = tiny_model(vision_config={"position_embedding": kind}).state_dict()
    assert fresh.keys() == tensors.keys()
    for name in fresh.keys() - model.state_dict().keys():  # follows from a formula
        assert torch.equal(fresh[name], tensors[name])


def test_a_learned_table_that_no_file_gives_is_an_error(tmp_path):
    fresh_tiny_model(vision_config={"position_embedding": "qwen_vision"}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing.*position_embedding\.weight"):
        BagelForUnifiedMultimodal.from_pretrained(tmp_path, vision_config={"position_embedding": "learned"})


# ---- what is refused, and how


SIX = [1.0] * 6
REFUSED_ROPE = {
    "unknown type": ({"rope_type": "ntk"}, "rope_type='ntk' is unknown; choose one of default, linear"),
    "mrope as a type": ({"type": "mrope", "mrope_section": [4, 2, 2]}, "turned on by mrope_section"),
    "linear without factor": ({"rope_type": "linear"}, "factor is missing"),
    "shrinking": ({"rope_type": "linear", "factor": 0.5}, r"factor=0\.5 must be a number of at least 1"),
    "dynamic, shrinking": ({"rope_type": "dynamic", "factor": 0}, "factor=0 must be"),
    "factor of another kind": ({"rope_type": "linear", "factor": "4"}, "factor='4' must be"),
    "factor that is no number": ({"rope_type": "linear", "factor": float("nan")}, "factor=nan must be"),
    "yarn without length": ({"rope_type": "yarn", "factor": 4}, "original_max_position_embeddings is missing"),
    "llama3 without length": (
        {"rope_type": "llama3", "factor": 4, "low_freq_factor": 1, "high_freq_factor": 4},
        "original_max_position_embeddings is missing",
    ),
    "longrope without length": ({"rope_type": "longrope", "factor": 4}, "original_max_position_embeddings is missing"),
    "yarn, factor below 1": ({"rope_type": "yarn", **EXTENDED, "factor": 0.9}, "factor=0.9 must be"),
    "yarn, length 0": ({"rope_type": "yarn", **EXTENDED, "original_max_position_embeddings": 0}, "=0 must be a pos"),
    "yarn, betas": ({"rope_type": "yarn", **EXTENDED, "beta_fast": 1, "beta_slow": 32}, "beta_fast=1 must be above"),
    "yarn, betas alike": ({"rope_type": "yarn", **EXTENDED, "beta_slow": 32}, "beta_fast is missing: it must be above"),
    "yarn, attention": ({"rope_type": "yarn", **EXTENDED, "attention_factor": -1.0}, "attention_factor=-1.0 must"),
    "yarn, truncate": ({"rope_type": "yarn", **EXTENDED, "truncate": "no"}, "truncate='no' must be True or False"),
    "llama3, bands": (
        {"rope_type": "llama3", **EXTENDED, "low_freq_factor": 4, "high_freq_factor": 4},
        "high_freq_factor=4 must be a number above low_freq_factor=4",
    ),
    "llama3, no band": ({"rope_type": "llama3", **EXTENDED}, "low_freq_factor is missing"),
    "longrope, short list": (
        {"rope_type": "longrope", **EXTENDED, "short_factor": SIX, "long_factor": LONG},
        "short_factor=.* must be 8 positive numbers, one per pair .* it has 6",
    ),
    "longrope, no list": ({"rope_type": "longrope", **EXTENDED, "short_factor": LONG}, "long_factor is missing"),
    "longrope, no room": (
        {"rope_type": "longrope", "original_max_position_embeddings": 512, "short_factor": LONG, "long_factor": LONG},
        "above max_position_embeddings=64",
    ),
    "partial, nothing": ({"partial_rotary_factor": 0}, r"partial_rotary_factor=0 must be in \(0, 1\]"),
    "partial, too much": ({"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5 must be"),
    "partial, odd": ({"partial_rotary_factor": 0.2}, "rotates 3; features are rotated in pairs.*: 2 is 2/16"),
    "proportional, nothing": ({"rope_type": "proportional", "partial_rotary_factor": 0.1}, "rotates 1"),
    "two sections": ({"mrope_section": [4, 4]}, "must be three numbers of pairs"),
    "sections that do not fill": ({"mrope_section": [4, 2, 1]}, "sum to 8, half of the 16 features .* 7 in all"),
    "sections beyond a partial head": ({**MROPE, "partial_rotary_factor": 0.5}, "sum to 4, half of the 8 features"),
    "sections below zero": ({"mrope_section": [10, -1, -1]}, "must be three numbers"),
    "chunked sections": ({**MROPE, "mrope_interleaved": False}, "mrope_interleaved=False is not supported"),
    "no base": ({"rope_theta": 1.0}, "rope_theta=1.0 must be a number above 1"),
    "pairs of another kind": ({"interleave": "adjacent"}, "interleave='adjacent' must be True"),
    "one set per layer type": ({"full_attention": {"rope_type": "default"}}, "one dict that applies to all layers"),
}


@pytest.mark.parametrize("name", REFUSED_ROPE)
@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
def test_wrong_rope_parameters_are_refused_when_the_config_is_made(name, place):
    parameters, message = REFUSED_ROPE[name]
    config = {**text()["text_config"]}
    del config["rope_parameters"]
    given = copy.deepcopy(parameters)
    with pytest.raises(ValueError, match=message):
        tiny_config(text_config={**config, "rope_parameters": None, place: parameters})
    assert parameters == given


def test_dynamic_needs_two_pairs():
    heads_of_two = {"num_attention_heads": 16, "num_key_value_heads": 16}
    with pytest.raises(ValueError, match="at least 2 pairs, the heads have 1"):
        tiny_config(text_config={**heads_of_two, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}})


def test_rope_parameters_that_are_no_dict_are_refused():
    with pytest.raises(ValueError, match=r"rope_scaling=.* must be one dict"):
        BagelTextConfig(rope_scaling=[4, 2, 2])


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"vision_config": {"position_embedding": "alibi"}}, "'alibi' is unknown; choose one of learned, rope_2d"),
        ({"vision_config": {"position_embedding": "qwen_vision", "rope": True}}, "rope=True .* contradicts"),
        ({"vision_config": {"position_embedding": "llama_vision"}, "vit_rope": True}, "vit_rope=True.* contradicts"),
        ({"vision_config": {"position_embedding": "qwen_vision", "num_attention_heads": 16}}, "heads of 2"),
        ({"vision_config": {"num_attention_heads": 16}, "vit_rope": True}, "multiple of 4 features"),
        ({"vision_config": {"position_embedding": "qwen_vision", "image_size": 48}}, "= 12 and vit_max.*=6 must be"),
        ({"interpolate_pos": "nearest"}, r"interpolate_pos='nearest' is unknown; choose one of \(False, True"),
    ],
)
def test_wrong_picture_settings_are_refused_when_the_config_is_made(setting, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**setting)


def test_old_names_mean_what_they_meant():
    for setting in ({"vit_rope": True}, {"vision_config": {"rope": True}}):
        config = tiny_config(**setting)
        assert config.vit_rope is config.vision_config.rope is True
        assert config.vision_config.position_embedding == "rope_2d"
    config = BagelTextConfig(
        rope_theta=5e5,
        max_position_embeddings=8192,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64},
        original_max_position_embeddings=4096,
    )
    assert config.rope_parameters == {
        "rope_type": "longrope",
        "rope_theta": 5e5,
        "short_factor": [1.0] * 64,
        "long_factor": [2.0] * 64,
        "original_max_position_embeddings": 4096,
    }
    assert BagelTextConfig(partial_rotary_factor=0.5).rotary_dim == 64


def test_an_override_of_the_tower_wins_over_what_the_file_says(tmp_path):
    tiny_config(vit_rope=True).save_pretrained(tmp_path)
    assert BagelConfig.from_pretrained(tmp_path).vision_config.position_embedding == "rope_2d"
    for kind in ("learned", "qwen_vision"):
        changed = BagelConfig.from_pretrained(tmp_path, vision_config={"position_embedding": kind})
        assert changed.vision_config.position_embedding == kind
        assert changed.vit_rope is False


def test_settings_survive_the_released_layout(tmp_path):
    changes = {**SETTINGS["mrope, qwen_vision, fit"], "vae_config": {"ch_mult": [1, 1]}}
    model = fresh_tiny_model(**changes)
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "released")
    adopt(tmp_path / "released")
    loaded = BagelForUnifiedMultimodal.from_pretrained(tmp_path / "released").config
    assert loaded.text_config.rope_parameters == model.config.text_config.rope_parameters
    assert loaded.vision_config.position_embedding == "qwen_vision"
    assert loaded.interpolate_pos == "fit"
