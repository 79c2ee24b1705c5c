# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Answers and pictures against the released inference: contexts, caches, logits, velocities, trajectories, pixels.

A released run is a list of segments (a text, or a picture through the VAE or the ViT) and what was generated after
them. Its prompts are rebuilt from the segments; everything else is the model's own work.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import NamedTuple

import pytest
import torch
from parity_data import (
    Case,
    ParitySet,
    Replay,
    assert_close,
    cases,
    drawn_noise,
    sets,
)
from tiny_models import layout_of

from bagel.embeddings_bagel import latent_grid, latent_position_ids, vit_position_ids
from bagel.flow_bagel import (
    Branches,
    DrawingOptions,
    guide,
    guided_steps,
    patchify_latents,
    timestep_grid,
    unpatchify_latents,
)
from bagel.generation_bagel import DrawingContext, Prefill, without_dangling_bos
from bagel.inputs_bagel import ImageTensors, find_placeholders
from bagel.inputs_bagel import Prompt as ModelPrompt
from bagel.layout_bagel import PackedLayout


def is_answer(facts: dict) -> bool:
    return "context_segments" in facts or "same_prefill_as" in facts


def is_drawing(facts: dict) -> bool:
    return "contexts" in facts and not facts.get("enable_taylorseer")


def is_batch(facts: dict) -> bool:
    return "image_sizes" in facts


def is_step_reuse(facts: dict) -> bool:
    return bool(facts.get("enable_taylorseer"))


def reads_pictures(facts: dict) -> bool:
    return any(segment["kind"] == "vit" for segment in facts.get("context_segments", []))


def edits_pictures(facts: dict) -> bool:
    return is_drawing(facts) and any(s["kind"] == "vae" for s in facts["contexts"]["gen"]["segments"])


def is_single(facts: dict) -> bool:
    return is_drawing(facts) and not is_batch(facts)


# --------------------------------------------------------------------------------------------------------------------
# Prompts


class Prompt(NamedTuple):
    """Model inputs of a case: rows left-padded to the longest; `segments` per row; picture tensors by name."""

    input_ids: torch.LongTensor
    valid: torch.BoolTensor
    segments: list[list[dict]]
    pictures: dict[str, torch.Tensor]

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return {"input_ids": self.input_ids, "attention_mask": self.valid.long(), **self.pictures}

    def layout(self, model) -> PackedLayout:
        return layout_of(model.config, self.input_ids, self.valid.long())


def rows_of(segments: list[dict]) -> list[list[dict]]:
    """Segments of a batch, sorted into its samples."""
    count = max(segment["batch_index"] for segment in segments) + 1
    return [[segment for segment in segments if segment["batch_index"] == row] for row in range(count)]


def ids_of(config, segment: dict) -> list[int]:
    if segment["kind"] == "text":
        return segment["token_ids"]
    place = config.latent_token_id if segment["kind"] == "vae" else config.image_token_id
    return [segment["start_token"], *[place] * segment["num_image_tokens"], segment["end_token"]]


def left_padded(rows: list[list[int]], padding: int) -> tuple[torch.LongTensor, torch.BoolTensor]:
    longest = max(len(row) for row in rows)
    input_ids = torch.tensor([[padding] * (longest - len(row)) + row for row in rows])
    valid = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows])
    return input_ids, valid


def read(model, inputs: dict[str, torch.Tensor], options: DrawingOptions) -> Prefill:
    """What `generate` reads before it draws."""
    prompt, images = model._read_prompt(inputs, options)
    return model._read(without_dangling_bos(model.config, prompt), images)


def prompt_of(case: Case, segments: list[dict], pictures: dict[str, torch.Tensor]) -> Prompt:
    config, rows = case.parity.config(), rows_of(segments)
    ids = [[token for segment in row for token in ids_of(config, segment)] for row in rows]
    return Prompt(*left_padded(ids, config.pad_token_id), rows, pictures)


def pictures_from_files(case: Case, edited: bool) -> dict[str, torch.Tensor]:
    """The inferencer puts every picture through the VAE's resize; the chat of the model itself (`prompt`) does not."""
    files = case.facts.get("image_files", [])
    if not files:
        return {}
    images = [case.parity.picture(file) for file in files]
    resize_first = "prompt" not in case.facts
    return dict(case.image_processor()(images, edited=edited, vae_resize_first=resize_first, return_tensors="pt"))


def prompt_case(case: Case) -> Case:
    """The case that holds the prompt: another end token shares it."""
    shared = case.facts.get("same_prefill_as")
    return Case(case.parity, f"generate/{shared}") if shared else case


def answer_prompt(case: Case) -> Prompt:
    case = prompt_case(case)
    return prompt_of(case, case.facts["context_segments"], pictures_from_files(case, edited=False))


def replay_inputs(case: Case, prompt: Prompt, draws: bool) -> None:
    """What inputs become: a system prompt for thinking, every text a span, every picture one or two."""
    facts, kinds = case.facts, []
    if facts.get("think"):
        system = "gen_think_system_prompt_ids" if draws else "vlm_think_system_prompt_ids"
        kinds.append(("text", case.parity.facts("generate/tokenizer_standin")[system]))
    texts = iter(facts["prompt_ids"])
    for item in facts.get("inputs", []):
        if item == "<image>":
            kinds += [("vae", None)] * draws + [("vit", None)]
        else:
            kinds.append(("text", next(texts)))
    segments = [(s["kind"], s["token_ids"][1:-1] if s["kind"] == "text" else None) for s in prompt.segments[0]]
    assert segments == kinds or "inputs" not in facts


def replay_prompt(prompt: Prompt, model) -> None:
    """Positions, grids and cache lengths are derived by us and listed in the segments."""
    layout, pad = prompt.layout(model), (~prompt.valid).sum(1).tolist()
    for row, segments in enumerate(prompt.segments):
        end = pad[row]
        for segment in segments:
            start, end = end, end + segment["num_tokens"]
            assert (start - pad[row], end - pad[row]) == (segment["kv_len_before"], segment["kv_len_after"])
            positions = layout.position_ids[row, start:end].tolist()
            text = segment["kind"] == "text"
            assert positions == (segment["position_ids"] if text else [segment["rope_position"]] * (end - start))
            assert layout.bidirectional[row, start:end].unique().tolist() == [segment["attention"] == "full"]
            assert int(layout.gen[row, start:end].sum()) == (segment["kind"] == "vae") * (end - start - 2)
    for kind, sizes, unit in (
        ("vit", "image_grid_hw", 1),
        ("vae", "latent_image_sizes", model.config.latent_downsample),
    ):
        pictures = [s for segments in prompt.segments for s in segments if s["kind"] == kind]
        grids = [[int(side) // unit for side in size] for size in prompt.pictures.get(sizes, [])]
        assert grids == [segment["grid_hw"] for segment in pictures]
        for grid, segment in zip(grids, pictures):
            ids = latent_position_ids(model.config, grid) if kind == "vae" else vit_position_ids(model.config, [grid])
            assert ids.tolist() == segment["image_token_position_ids"]


def packed(states: torch.Tensor, valid: torch.BoolTensor | None) -> torch.Tensor:
    """(rows, heads, length, head_dim) -> (valid tokens of all rows, heads, head_dim), as the released cache is."""
    states = states.transpose(1, 2)
    return states.flatten(0, 1) if valid is None else states[valid]


def replay_cache(replay: Replay, prefix: str, layers, valid: torch.BoolTensor | None) -> None:
    """`layers` as (keys, values) each; compared where stored."""
    for index, (keys, values) in enumerate(layers):
        replay.close(f"{prefix}.key.{index}", packed(keys, valid), "cache")
        replay.close(f"{prefix}.value.{index}", packed(values, valid), "cache")


def layers_of(cache, length: int | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.keys[:, :, :length], layer.values[:, :, :length]) for layer in cache.layers]


def packed_places(kv_lens: list[int], new_lens: list[int]) -> tuple[list[int], list[int]]:
    """Where a pack that holds, sample by sample, the cache and then the new tokens has each of them."""
    cached, new, start = [], [], 0
    for kv_len, new_len in zip(kv_lens, new_lens):
        cached += range(start, start + kv_len)
        new += range(start + kv_len, start + kv_len + new_len)
        start += kv_len + new_len
    return cached, new


def replay_prefill(replay: Replay, prefix: str, prompt: Prompt, model, number: int) -> None:
    """The inputs of the released call that read segment `number` of every row, from our layout of the whole prompt."""
    layout, pad = prompt.layout(model), (~prompt.valid).sum(1).tolist()
    segments = [row[number] for row in prompt.segments]
    spans = [
        (row, slice(pad[row] + segment["kv_len_before"], pad[row] + segment["kv_len_after"]))
        for row, segment in enumerate(segments)
    ]
    kv_lens, new_lens = [s["kv_len_before"] for s in segments], [s["num_tokens"] for s in segments]
    cached, new = packed_places(kv_lens, new_lens)
    ids, positions, gen = (
        torch.cat([x[span] for span in spans]) for x in (prompt.input_ids, layout.position_ids, layout.gen)
    )
    places = find_placeholders(model.config, ids[None])
    in_picture = (places.image | places.latent)[0]
    replay.equal(f"{prefix}.key_values_lens", kv_lens)
    replay.equal(f"{prefix}.packed_key_value_indexes", cached)
    replay.equal(f"{prefix}.packed_text_ids", ids[~in_picture])
    if segments[0]["kind"] == "text":
        replay.equal(f"{prefix}.packed_text_indexes", new)
        replay.equal(f"{prefix}.packed_text_position_ids", positions)
        replay.equal(f"{prefix}.text_token_lens", new_lens)
        return
    replay.equal(f"{prefix}.packed_indexes", new)
    replay.equal(f"{prefix}.packed_position_ids", positions)
    replay.equal(f"{prefix}.packed_seqlens", new_lens)
    replay.equal(f"{prefix}.packed_text_indexes", (~in_picture).nonzero())
    ids_in_picture = [x for segment in segments for x in segment["image_token_position_ids"]]
    if segments[0]["kind"] == "vae":
        assert torch.equal(gen, in_picture)
        replay.equal(f"{prefix}.packed_vae_token_indexes", gen.nonzero())
        replay.equal(f"{prefix}.packed_vae_position_ids", ids_in_picture)
        replay.equal(f"{prefix}.packed_timesteps", [0])  # clean
    else:
        assert not gen.any()
        replay.equal(f"{prefix}.packed_vit_token_indexes", in_picture.nonzero())
        replay.equal(f"{prefix}.packed_vit_position_ids", ids_in_picture)
        replay.equal(f"{prefix}.vit_token_seqlens", [segment["num_image_tokens"] for segment in segments])


# --------------------------------------------------------------------------------------------------------------------
# Answers


def write(model, prompt: Prompt, steps: int, **options):
    """Greedy text after the answer's bos, with logits."""
    bos = torch.full((len(prompt.input_ids), 1), model.config.bos_token_id)
    inputs = dict(prompt.inputs)
    inputs["input_ids"] = torch.cat([prompt.input_ids, bos], dim=1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(bos)], dim=1)
    return model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def assert_written(released: list[int], new: list[int], steps: int, end_token: int, bos: int) -> None:
    """
    The released list starts with bos and lacks the last prediction: the end token, or what came when `steps` ran out.
    """
    assert released == [bos, *new[:-1]]
    assert len(new) == steps or new[-1] == end_token


@torch.no_grad()
def replay_answer(case: Case, attn_implementation: str = "sdpa") -> None:
    model, prompt, replay = case.parity.joint(attn_implementation), answer_prompt(case), case.replay()
    facts, length = case.facts, prompt.input_ids.shape[1]
    replay_inputs(prompt_case(case), prompt, draws=False)
    replay_prompt(prompt, model)
    if "last_packed_vit_tokens" in replay:
        last = replay["last_packed_vit_tokens"]
        replay.close("last_packed_vit_tokens", prompt.pictures["pixel_values"][-len(last) :], "copy")

    prefill = read(model, prompt.inputs, DrawingOptions())
    replay_cache(replay, "prefill", layers_of(prefill.cache), prefill.prompt.valid)
    replay.equal("start.key_values_lens", [prefill.cache.get_seq_length()])
    replay.equal("start.packed_key_value_indexes", torch.arange(length))
    replay.equal("start.packed_query_position_ids", prefill.prompt.next_position)
    replay.equal("start.packed_start_tokens", [model.config.bos_token_id])

    steps = prompt_case(case).facts["max_length"]
    end_token = facts.get("end_token_id", model.config.eos_token_id)
    output = write(model, prompt, steps, eos_token_id=end_token)
    new = output.sequences[0, length + 1 :].tolist()
    assert_written(facts["tokens"], new, steps, end_token, model.config.bos_token_id)
    replay.equal("tokens", facts["tokens"])
    replay.close("logits", torch.cat(output.logits), "logits")
    replay_cache(replay, "prefill", layers_of(output.past_key_values, length), None)
    replay_cache(replay, "after", layers_of(output.past_key_values), None)
    replay.finish()


@pytest.mark.parametrize("case", cases("generate", is_answer))
def test_answers_are_the_released_ones(case: Case):
    replay_answer(case)


@contextmanager
def uncompiled() -> Iterator[None]:
    """flex attention compiles itself on first use; its plain form computes the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("attn_implementation", ["eager", "flex_attention"])
@pytest.mark.parametrize("case", cases("generate", reads_pictures, first=True))
def test_answers_are_the_same_with_other_kernels(case: Case, attn_implementation: str):
    with uncompiled():
        replay_answer(case, attn_implementation)


@torch.no_grad()
@pytest.mark.parametrize("case", cases("generate", lambda facts: "round0" in facts))
def test_texts_in_rounds_and_batches_are_the_released_ones(case: Case):
    """Two prompts of different lengths, two rounds on top of one cache, then both answers at once."""
    facts, model, replay = case.facts, case.parity.joint(), case.replay()
    prompt = prompt_of(case, facts["segments"], {})
    replay_prompt(prompt, model)
    prefill = None
    for number in range(len(prompt.segments[0])):
        texts = [row[number]["token_ids"] for row in prompt.segments]
        prompt_of_round = ModelPrompt.of_text(model.config, *left_padded(texts, model.config.pad_token_id))
        prefill = model._read(prompt_of_round, ImageTensors(), prefill)
        replay_cache(replay, f"round{number}", layers_of(prefill.cache), prefill.prompt.valid)
        replay_prefill(replay, f"round{number}", prompt, model, number)
        described = facts[f"round{number}"]
        assert prefill.prompt.valid.sum(1).tolist() == described["kv_lens"]
        assert prefill.prompt.next_position.tolist() == described["ropes"]
        assert [ids[1:-1] for ids in texts] == described["prompt_ids"]
    kv_lens = prefill.prompt.valid.sum(1)
    replay.equal("start.key_values_lens", kv_lens)
    replay.equal("start.packed_key_value_indexes", torch.arange(int(kv_lens.sum())))
    replay.equal("start.packed_query_position_ids", prefill.prompt.next_position)
    bos = torch.full((len(kv_lens), 1), model.config.bos_token_id)
    replay.equal("start.packed_start_tokens", bos)

    steps, eos = len(facts["tokens"][0]), model.config.eos_token_id
    rounds = Prompt(prefill.prompt.input_ids, prefill.prompt.valid, prompt.segments, {})
    written = {
        "rounds": write(model, rounds, steps, past_key_values=prefill.cache),
        "one prompt": write(model, prompt, steps),
    }
    for name, output in written.items():
        for row, released in enumerate(facts["tokens"]):
            new = output.sequences[row, -len(output.logits) :].tolist()
            stop = new.index(eos) + 1 if eos in new else steps  # the released loop goes on until sample 0 stops
            assert released[:stop] == [model.config.bos_token_id, *new][:stop], name
            logits = torch.stack([step[row] for step in output.logits[:stop]])
            assert_close(logits, replay["gen_logits"][:stop, row], "logits", f"logits of row {row}, {name}")
    replay.equal("gen_tokens", torch.tensor(facts["tokens"]).T)
    replay.finish()


# --------------------------------------------------------------------------------------------------------------------
# Pictures


class Drawing:
    """One released drawing run, of one picture or a batch, set up for our model."""

    def __init__(self, case: Case, attn_implementation: str = "sdpa"):
        self.case, self.facts = case, case.facts
        self.model = case.parity.joint(attn_implementation)
        self.replay = case.replay()

    @cached_property
    def prompt(self) -> Prompt:
        """Without the plan: the model writes it."""
        segments = self.facts["contexts"]["gen"]["segments"]
        segments = segments[:-1] if self.think else segments
        edited = any(segment["kind"] == "vae" for segment in segments)
        return prompt_of(self.case, segments, self._batch_pictures() or pictures_from_files(self.case, edited))

    def _batch_pictures(self) -> dict[str, torch.Tensor]:
        """The pictures of a batch are stored as the released prefill took them."""
        if not (is_batch(self.facts) and edits_pictures(self.facts)):
            return {}
        replay = self.prefill_case.replay()
        names = (r"vit\.packed_vit_tokens", r"vae\.padded_images")
        patches, images = ([x for _, x in replay.matching(rf"prefill(\d+)_{name}")] for name in names)
        assert len(patches) <= 1 and len(images) == 1, "each sample edits one picture"
        segments = self.facts["contexts"]["gen"]["segments"]
        grids = {kind: torch.tensor([s["grid_hw"] for s in segments if s["kind"] == kind]) for kind in ("vit", "vae")}
        sizes = grids["vae"] * self.model.config.latent_downsample
        pictures = {"latent_pixel_values": images[0], "latent_image_sizes": sizes}
        return pictures | ({"pixel_values": patches[0], "image_grid_hw": grids["vit"]} if patches else {})

    @property
    def prefill_case(self) -> Case:
        shared = self.facts.get("prefill_inputs")
        return Case(self.case.parity, f"generate/{shared.split()[-1]}") if shared else self.case

    @property
    def think(self) -> bool:
        return bool(self.facts.get("think"))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [tuple(size) for size in self.facts.get("image_sizes") or [self.facts["image_shape"]]]

    @property
    def grids(self) -> list[tuple[int, int]]:
        return [latent_grid(self.model.config, *size) for size in self.sizes]

    @property
    def lengths(self) -> list[int]:
        return [rows * columns for rows, columns in self.grids]

    @property
    def edits(self) -> bool:
        return "latent_pixel_values" in self.prompt.pictures

    @cached_property
    def noise(self) -> list[torch.Tensor]:
        name = "latent.packed_init_noises" if is_batch(self.facts) else "packed_init_noises"
        return list(self.replay[name].split(self.lengths))

    @property
    def samples_posterior(self) -> bool:
        return self.facts.get("vae_posterior") == "sample"

    @property
    def options(self) -> dict:
        names = (
            "num_timesteps",
            "timestep_shift",
            "cfg_text_scale",
            "cfg_img_scale",
            "cfg_renorm_type",
            "cfg_renorm_min",
        )
        options = {name: self.facts[name] for name in names}
        if not self.edits:  # an edit takes the size of the last picture
            options |= {"height": [h for h, _ in self.sizes], "width": [w for _, w in self.sizes]}
        return options | {
            "cfg_interval": tuple(self.facts["cfg_interval"]),
            "sample_posterior": self.samples_posterior,
            "latents": self.noise,
            "progress_bar": False,
        }

    @contextmanager
    def released_latents(self) -> Iterator[None]:
        """The VAE samples with the noise of the released run."""
        with ExitStack() as stack:
            if self.samples_posterior:
                stack.enter_context(drawn_noise(*(eps for _, eps in self.replay.matching(r"vae_eps_(\d+)"))))
            yield

    @cached_property
    def stored_latents(self) -> list[torch.Tensor]:
        """(channels, h, w) of every edited picture, in order."""
        if is_batch(self.facts):
            latents = [x for _, x in self.prefill_case.replay().matching(r"prefill(\d+)_vae\.padded_latent")]
            return [latent for batch in latents for latent in batch]
        return [latent[0] for _, latent in self.replay.matching(r"vae_latent_(\d+)")]

    def read(self) -> tuple[Prefill, Prefill, list | None]:
        """-> what was read, what had been read before the plan, the plan."""
        with self.released_latents():
            options = DrawingOptions(sample_posterior=self.samples_posterior)
            before = read(self.model, self.prompt.inputs, options)
        if not self.think:
            return before, before, None
        arguments = {"max_new_tokens": self.facts["max_think_token_n"] - 1, "do_sample": False}
        prefill, plans = self.model._write_plan(before, arguments)
        return prefill, before, plans

    def draw(self, **changes):
        """`generate`; -> its output, x after every step, guided velocity of every step, both packed."""
        latents, velocities = [], []

        def record(model, step, t, state):
            for into, name in ((latents, "latents"), (velocities, "velocity")):
                into.append(self.pack(state[name]))

        options = self.options | {"callback_on_step_end": record} | changes
        if self.think:
            options |= {"think": True, "max_think_token_n": self.facts["max_think_token_n"], "do_sample": False}
        with self.released_latents():
            output = self.model.generate(
                **self.prompt.inputs, generation_mode="image", return_dict_in_generate=True, **options
            )
        return output, torch.stack(latents), torch.stack(velocities)

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """(rows, most latent tokens, features) -> (all latent tokens, features)."""
        return torch.cat([row[:length] for row, length in zip(padded, self.lengths)])

    def unpack(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(tokens.split(self.lengths), batch_first=True)

    def position_ids(self) -> torch.LongTensor:
        ids = [latent_position_ids(self.model.config, grid) for grid in self.grids]
        return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)

    def row(self, number: int) -> "Drawing":
        """One sample of a batch as a run of its own; it compares nothing."""
        single = Drawing(self.case)
        pad = int((~self.prompt.valid[number]).sum())
        images = ImageTensors(**self.prompt.pictures)
        sizes = (images.image_grid_hw, images.latent_image_sizes)
        whole = ModelPrompt.read(self.model.config, self.prompt.input_ids, self.prompt.valid.long(), *sizes)
        pictures = whole.select([number], images)[1].tensors()
        single.prompt = Prompt(
            self.prompt.input_ids[number : number + 1, pad:],
            self.prompt.valid[number : number + 1, pad:],
            [self.prompt.segments[number]],
            pictures,
        )
        single.facts = self.facts | {"image_sizes": [self.sizes[number]]}
        single.noise = [self.noise[number]]
        if self.edits:
            single.stored_latents = [self.stored_latents[number]]
        return single


def names_and_contexts(contexts: Branches) -> list[tuple[str, DrawingContext]]:
    return list(zip(("gen", "cfg_text", "cfg_img"), contexts))


def context_valid(context: DrawingContext) -> torch.BoolTensor:
    layout = context.layout
    everything = torch.ones(layout.batch_size, layout.past_length, dtype=torch.bool)
    return everything if layout.past_valid is None else layout.past_valid


def replay_contexts(drawing: Drawing, contexts: Branches, described: dict) -> None:
    """Cache lengths, keys and values, and where the noisy picture stands under each context."""
    replay = drawing.replay
    new_lens = [length + 2 for length in drawing.lengths]
    for name, context in names_and_contexts(contexts):
        facts, layout, valid = described[name], context.layout, context_valid(context)
        kv_lens = valid.sum(1).tolist()
        assert kv_lens == facts["kv_lens"], name
        positions = [row[row_valid].unique().tolist() for row, row_valid in zip(layout.position_ids, layout.valid)]
        expected = facts.get("noisy_image_rope_positions") or facts["ropes"]
        assert positions == [[position] for position in expected], name
        replay_cache(replay, name, context.cache.layers, valid)

        cached, new = packed_places(kv_lens, new_lens)
        prefix = "latent." if name == "gen" else f"{name}.cfg_"
        replay.equal(f"{prefix}key_values_lens", kv_lens)
        replay.equal(f"{prefix}packed_key_value_indexes", cached)
        replay.equal(f"{prefix}packed_position_ids", layout.position_ids[layout.valid])
        replay.equal("latent.packed_indexes" if name == "gen" else f"{prefix}packed_query_indexes", new)
        gen = layout.gen[layout.valid]
        replay.equal("latent.packed_vae_token_indexes", gen.nonzero())
        replay.equal("latent.packed_text_indexes", (~gen).nonzero())
    config = drawing.model.config
    replay.equal("latent.packed_seqlens", new_lens)
    boundaries = [config.vision_start_token_id, config.vision_end_token_id] * len(new_lens)
    replay.equal("latent.packed_text_ids", boundaries)
    ids = torch.cat([latent_position_ids(config, grid) for grid in drawing.grids])
    replay.equal("latent.packed_vae_position_ids", ids)


def replay_latents(drawing: Drawing) -> None:
    """What the VAE makes of the pictures to edit."""
    replay, model, pictures = drawing.replay, drawing.model, drawing.prompt.pictures
    if not drawing.edits:
        return
    sizes = pictures["latent_image_sizes"].tolist()
    images = [image[:, :h, :w] for image, (h, w) in zip(pictures["latent_pixel_values"], sizes)]
    for (number,), image in replay.matching(r"vae_input_(\d+)"):
        assert_close(images[int(number)][None], image, "copy", f"vae_input_{number}")
    with drawing.released_latents():
        encoded = model.encode_images(images, drawing.samples_posterior)
    patch = model.config.latent_patch_size
    grids = [latent_grid(model.config, *size) for size in sizes]
    encoded = [unpatchify_latents(tokens, grid, patch) for tokens, grid in zip(encoded, grids)]
    stored = drawing.stored_latents
    assert len(stored) == len(encoded)
    for number, (latents, expected) in enumerate(zip(encoded, stored)):
        assert_close(latents, expected, "vae", f"latents of picture {number}")


def replay_plan(drawing: Drawing, plans: list[torch.LongTensor] | None) -> None:
    """Tokens exactly; the logits come with a text run over the same prompt."""
    if not drawing.think:
        assert plans is None
        return
    facts, model, steps = drawing.facts, drawing.model, drawing.facts["max_think_token_n"]
    assert [plan.tolist() for plan in plans] == [facts["think_tokens"][1:]]
    plan_segment = facts["contexts"]["gen"]["segments"][-1]
    assert plan_segment["token_ids"][1:-1] == plans[0].tolist()
    options = {"sample_posterior": drawing.samples_posterior} if drawing.edits else {}
    with drawing.released_latents():
        output = write(model, drawing.prompt, steps, **options)
    new = output.sequences[0, -len(output.logits) :].tolist()
    assert_written(facts["think_tokens"], new, steps, model.config.eos_token_id, model.config.bos_token_id)
    drawing.replay.close("think_logits", torch.cat(output.logits), "logits")


def released_scales(facts: dict) -> list[tuple[float, float]]:
    """(text, picture) weights of every step: neutral outside the interval, and pictures only together with text."""
    t = timestep_grid(facts["num_timesteps"], facts["timestep_shift"])[:-1]
    guided = guided_steps(t, tuple(facts["cfg_interval"]))
    return [(facts["cfg_text_scale"], facts["cfg_img_scale"]) if on else (1.0, 1.0) for on in guided]


def replay_velocities(drawing: Drawing, contexts: Branches, evaluated=lambda step: True) -> None:
    """At the released x_t: every branch that was evaluated, and the velocity that guidance makes of the branches."""
    replay, facts, model = drawing.replay, drawing.facts, drawing.model
    x_t = replay["x_t"]
    assert torch.equal(contexts.full.position_ids, drawing.position_ids())
    t = timestep_grid(facts["num_timesteps"], facts["timestep_shift"])[:-1]
    replay.close("timesteps", t, "copy")
    scales = released_scales(facts)
    if "effective_scales" in facts:
        assert scales == [tuple(pair) for pair in facts["effective_scales"]]
    stored = {}
    for name, context in zip(("v_cond", "v_cfg_text", "v_cfg_img"), contexts):
        if f"{name}.steps" not in replay:
            continue
        steps = replay[f"{name}.steps"].tolist()
        stored[name] = dict(zip(steps, replay[name]))
        for step in filter(evaluated, steps):
            x = drawing.unpack(x_t[step])
            v = model.predict_velocity(x, t[step], context)
            assert_close(drawing.pack(v), stored[name][step], "velocity", f"{name} at step {step}")
    assert list(stored["v_cond"]) == list(range(len(t)))

    guided = []
    for step, (text_scale, image_scale) in enumerate(scales):
        branches = [stored["v_cond"][step], None, None]
        if text_scale > 1:
            branches[1] = stored["v_cfg_text"][step]
            branches[2] = stored["v_cfg_img"][step] if image_scale > 1 else None
        branches = [None if v is None else v[None] for v in branches]  # the released norm is that of the whole pack
        guided += guide(*branches, text_scale, image_scale, facts["cfg_renorm_type"], facts["cfg_renorm_min"])
    replay.close("v_t", torch.stack(guided), "velocity")


def replay_trajectory(drawing: Drawing) -> None:
    """`generate` from the same noise: x and velocity of every step, final latents, decoded picture."""
    replay, model, patch = drawing.replay, drawing.model, drawing.model.config.latent_patch_size
    output, latents, velocities = drawing.draw()
    replay.close("x_t", torch.cat([torch.cat(drawing.noise)[None], latents]), "latents")
    replay.close("v_t", velocities, "velocity")
    if drawing.think:
        assert [plan.tolist() for plan in output.sequences] == [drawing.facts["think_tokens"][1:]]
    for number, (tokens, grid, image) in enumerate(zip(output.latents, drawing.grids, output.images)):
        suffix = f"_{number}" if is_batch(drawing.facts) else ""
        assert (image.height, image.width) == drawing.sizes[number]
        if is_batch(drawing.facts):
            replay.close(f"latent{suffix}", tokens, "latents")
        else:
            replay.close("final_latent_chw", unpatchify_latents(tokens, grid, patch)[None], "latents")
        replay.close(f"decoded_float{suffix}", model.decode_latents(tokens, grid)[None], "pixels")
        replay.close_picture(f"decoded_uint8{suffix}", image)


@torch.no_grad()
def replay_drawing(case: Case, attn_implementation: str = "sdpa") -> None:
    drawing = Drawing(case, attn_implementation)
    replay, prompt = drawing.replay, drawing.prompt
    replay_inputs(case, prompt, draws=True)
    replay_prompt(prompt, drawing.model)
    if "last_packed_vit_tokens" in replay:
        last = replay["last_packed_vit_tokens"]
        replay.close("last_packed_vit_tokens", prompt.pictures["pixel_values"][-len(last) :], "copy")
    replay_latents(drawing)
    prefill, before, plans = drawing.read()
    contexts = drawing.model._branches(prefill, before, drawing.sizes)
    replay_contexts(drawing, contexts, drawing.facts["contexts"])
    replay_plan(drawing, plans)
    replay_velocities(drawing, contexts)
    replay_trajectory(drawing)
    replay.finish()


@pytest.mark.parametrize("case", cases("generate", is_single))
def test_pictures_are_drawn_as_released(case: Case):
    replay_drawing(case)


BATCHES = cases("generate", is_batch)


@torch.no_grad()
def replay_batch(case: Case, attn_implementation: str = "sdpa") -> None:
    """
    With `global` renorm the released norm spans the batch and ours each sample, on purpose: there the contexts, every
    branch, the released formula on the whole pack and the decoded latents are compared, and the trajectory with single
    runs (next test).
    """
    drawing = Drawing(case, attn_implementation)
    replay, prompt, model = drawing.replay, drawing.prompt, drawing.model
    replay_prompt(prompt, model)
    for number, segment in enumerate(prompt.segments[0]):
        replay_prefill(replay, f"prefill{number}_{segment['kind']}", prompt, model, number)
    replay_latents(drawing)
    contexts = model._branches(*drawing.read()[:2], drawing.sizes)
    replay_contexts(drawing, contexts, drawing.facts["contexts"])
    replay_velocities(drawing, contexts)
    elsewhere = [r"prefill\d+_vit\.packed_vit_tokens", r"prefill\d+_vae\.padded_(images|latent)"]
    if drawing.facts["cfg_renorm_type"] == "global":
        elsewhere += [r"latent\.packed_init_noises"]
        for number, (grid, size) in enumerate(zip(drawing.grids, drawing.sizes)):
            tokens = replay[f"latent_{number}"]
            replay.close(f"decoded_float_{number}", model.decode_latents(tokens, grid)[None], "pixels")
            replay.close_picture(f"decoded_uint8_{number}", model._finish_image(tokens, size, "pil"))
    else:
        replay_trajectory(drawing)
    replay.finish(*elsewhere)


@pytest.mark.parametrize("case", BATCHES)
def test_batches_are_drawn_as_released(case: Case):
    replay_batch(case)


@torch.no_grad()
@pytest.mark.parametrize("case", BATCHES)
def test_a_batch_draws_what_single_runs_draw(case: Case):
    drawing = Drawing(case)
    together, trajectory, _ = drawing.draw(output_type="latent")
    for number, tokens in enumerate(together.latents):
        alone, steps, _ = drawing.row(number).draw(output_type="latent")
        assert_close(tokens, alone.latents[0], "latents", f"sample {number} alone")
        rows = torch.stack([x.split(drawing.lengths)[number] for x in trajectory])
        assert_close(rows, steps, "latents", f"the steps of sample {number} alone")
        name = f"latent_{number}"
        if drawing.facts["cfg_renorm_type"] == "global" and name in drawing.replay:
            released = drawing.facts["max_abs_latent_diff_vs_single_runs"][number]
            difference = (alone.latents[0] - drawing.replay[name]).abs().max()
            assert_close(difference, released, "latents", f"what the released batch norm does to sample {number}")


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("attn_implementation", ["eager", "flex_attention"])
@pytest.mark.parametrize(
    "case",
    cases("generate", lambda facts: is_single(facts) and edits_pictures(facts), first=True)
    + cases("generate", is_batch, first=True),
)
def test_pictures_are_the_same_with_other_kernels(case: Case, attn_implementation: str):
    with uncompiled():
        (replay_batch if is_batch(case.facts) else replay_drawing)(case, attn_implementation)


# --------------------------------------------------------------------------------------------------------------------
# Orders of texts and pictures


ORDERS = sets()


@torch.no_grad()
@pytest.mark.parametrize("parity", ORDERS)
def test_contexts_follow_from_the_order_of_texts_and_pictures(parity: ParitySet):
    """From the plain inputs, system prompts included, to cache lengths and positions of every context."""
    for name, order in parity.facts("generate/order").items():
        case = Case(parity, f"generate/order_{name}")
        facts, model, described = case.facts, parity.joint(), order["contexts"]
        draws = not order["understanding"]
        expected = described["gen"]["segments"][: -1 if draws and order["think"] else None]
        prompt = prompt_of(case, expected, pictures_from_files(case, edited=draws))
        replay_inputs(case, prompt, draws)
        replay_prompt(prompt, model)
        if draws:
            drawing = Drawing(case)
            contexts = model._branches(*drawing.read()[:2], [tuple(order["image_shape"])])
            replay_contexts(drawing, contexts, described)
        else:
            whole = read(model, prompt.inputs, DrawingOptions()).prompt
            assert whole.next_position.tolist() == described["gen"]["start_position"]
            assert whole.valid.sum(1).tolist() == described["gen"]["kv_lens"]
        assert order.get("tokens", order.get("think_tokens")) == facts.get("tokens", facts.get("think_tokens"))


# --------------------------------------------------------------------------------------------------------------------
# Step reuse


def is_full_evaluation(step: int) -> bool:
    """The released step reuse computes the first five velocities and then every third; it extrapolates the others."""
    return step < 5 or (step - 4) % 3 == 0


@torch.no_grad()
@pytest.mark.parametrize("case", cases("generate", is_step_reuse))
def test_step_reuse_has_the_same_contexts_full_steps_and_decoder(case: Case):
    """
    Reusing steps is not implemented here. Replayed is all that does not depend on it: contexts, the steps that were
    evaluated in full, guidance and Euler step everywhere, and the decoded picture.
    """
    drawing = Drawing(case)
    replay, model = drawing.replay, drawing.model
    replay_prompt(drawing.prompt, model)
    contexts = model._branches(*drawing.read()[:2], drawing.sizes)
    replay_contexts(drawing, contexts, drawing.facts["contexts"])
    replay_velocities(drawing, contexts, is_full_evaluation)
    assert_close(torch.cat(drawing.noise), replay["x_t"][0], "latents", "noise")
    knots = timestep_grid(drawing.facts["num_timesteps"], drawing.facts["timestep_shift"])
    steps = (knots[:-1] - knots[1:])[:, None, None]
    assert_close(replay["x_t"][:-1] - replay["v_t"] * steps, replay["x_t"][1:], "latents", "x_t")

    tokens, grid = replay["x_t"][-1], drawing.grids[0]
    latents = unpatchify_latents(tokens, grid, model.config.latent_patch_size)
    replay.close("final_latent_chw", latents[None], "latents")
    assert torch.equal(patchify_latents(latents, model.config.latent_patch_size), tokens)
    replay.close("decoded_float", model.decode_latents(tokens, grid)[None], "pixels")
    replay.close_picture("decoded_uint8", model._finish_image(tokens, drawing.sizes[0], "pil"))
    replay.finish()


@torch.no_grad()
@pytest.mark.parametrize("case", cases("generate", is_single, first=True))
def test_drawing_leaves_no_state_behind(case: Case):
    """The released step reuse leaves flags in the layers, after which reading a text raises."""
    drawing = Drawing(case)
    fresh, _, _ = drawing.read()
    first, _, _ = drawing.draw(output_type="latent")
    again, _, _ = drawing.read()
    second, _, _ = drawing.draw(output_type="latent")
    assert torch.equal(fresh.logits, again.logits)
    for (keys, values), (keys_again, values_again) in zip(layers_of(fresh.cache), layers_of(again.cache)):
        assert torch.equal(keys, keys_again) and torch.equal(values, values_again)
    assert torch.equal(first.latents[0], second.latents[0])


@pytest.mark.parametrize("parity", sets())
def test_every_stored_run_is_replayed(parity: ParitySet):
    """A kind of file that no test above takes would go unnoticed."""
    read_by_name = {"generate/order", "generate/tokenizer_standin", "generate/extra_taylorseer_state_leak"}
    kinds = (is_answer, is_drawing, is_step_reuse, lambda facts: "round0" in facts)
    for name in parity.names("generate"):
        assert name in read_by_name or sum(kind(parity.facts(name)) for kind in kinds) == 1, name
