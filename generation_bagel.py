# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Writing: text through transformers' own `generate`, pictures by integrating the velocity, both in turns.

A mixin without parameters: it prepares contexts and loops, the model computes. A picture is drawn under up to three
contexts: the whole conversation (`gen`), the conversation before its last text (`text`, for text guidance), and its
texts without pictures (`image`, for picture guidance). The first two are views of one cache.

Axes: (batch, latent tokens, patch_latent_dim) for pictures being drawn, padded to the largest of the batch.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation.logits_process import SuppressTokensLogitsProcessor
from transformers.masking_utils import create_causal_mask
from transformers.utils import ModelOutput, logging

from .attention_bagel import AttentionPlan, FrozenContext, plan_attention
from .flow_bagel import RENORM_TYPES, RenormType, guide, guided_steps, timestep_grid
from .image_processing_bagel import BagelImageProcessor, tensor_to_pil
from .layout_bagel import PackedLayout, picture_rows


logger = logging.get_logger(__name__)

GENERATION_MODES = ("text", "image", "interleaved")
OUTPUT_TYPES = ("pil", "pt", "latent")
PICTURE_INPUTS = ("pixel_values", "image_grid_hw", "latent_pixel_values", "latent_image_sizes")
DEFAULT_SIDE = 1024
MAX_PLAN_TOKENS = 1000


@dataclass(frozen=True)
class DrawingOptions:
    """
    How a picture is drawn; names and defaults of the released sampler.

    A model brings other defaults of `num_timesteps`, `timestep_shift`, `cfg_*` and `sample_posterior` along in its
    `generation_config.json`, as it does for writing; arguments of `generate` come before those.

    Args:
        num_timesteps (`int`): knots of the time grid; the network runs `num_timesteps - 1` steps.
        timestep_shift (`float`): moves the knots towards noise.
        cfg_text_scale, cfg_img_scale (`float`): guidance weights; text guidance of at most 1 switches both off.
        cfg_interval: guidance acts where `lo < t <= hi` (t = 1 is noise).
        cfg_renorm_min (`float`), cfg_renorm_type: see [`flow_bagel.guide`].
        height, width (`int`, or one per sample): pixels; by default those of the last edited picture, else 1024 (or
            the largest the latent table allows).
        latents: initial noise, per sample (latent tokens, patch_latent_dim).
        generator: a `torch.Generator` or one per sample; noise is drawn on the CPU.
        sample_posterior (`bool`): sample the VAE posterior of edited pictures (released) or take its mode.
        scheduler: any diffusers flow-match scheduler; Euler by default. One that accepts `sigmas` is given the
            released grid (its own shift, if it has one, comes on top).
        callback_on_step_end: `f(model, step, t, {"latents", "velocity"})`; may return a dict with new `latents`.
        output_type: `"pil"`, `"pt"` (3, height, width) in [0, 1], or `"latent"` (latent tokens, patch_latent_dim).
        progress_bar (`bool`): show the steps.
    """

    num_timesteps: int = 50
    timestep_shift: float = 3.0
    cfg_text_scale: float = 4.0
    cfg_img_scale: float = 1.5
    cfg_interval: tuple[float, float] = (0.4, 1.0)
    cfg_renorm_min: float = 0.0
    cfg_renorm_type: RenormType = "global"
    height: int | Sequence[int] | None = None
    width: int | Sequence[int] | None = None
    latents: torch.Tensor | Sequence[torch.Tensor] | None = None
    generator: torch.Generator | list[torch.Generator] | None = None
    sample_posterior: bool = True
    scheduler: Any = None
    callback_on_step_end: Callable | None = None
    output_type: str = "pil"
    progress_bar: bool = True

    def __post_init__(self):
        lo, hi = self.cfg_interval
        if not lo <= hi:
            raise ValueError(f"cfg_interval=({lo}, {hi}) is reversed; guidance acts where lo < t <= hi.")
        if self.num_timesteps < 2:
            raise ValueError(
                f"num_timesteps={self.num_timesteps} gives no step; it counts the knots, so use at least 2."
            )
        if self.timestep_shift <= 0:
            raise ValueError(f"timestep_shift={self.timestep_shift} must be positive; 1 leaves the grid even.")
        if self.cfg_renorm_type not in RENORM_TYPES:
            raise ValueError(f"cfg_renorm_type={self.cfg_renorm_type!r} is unknown; choose one of {RENORM_TYPES}.")
        if not 0 <= self.cfg_renorm_min <= 1:
            raise ValueError(f"cfg_renorm_min={self.cfg_renorm_min} must lie in [0, 1].")
        if self.output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={self.output_type!r} is unknown; choose one of {OUTPUT_TYPES}.")
        if self.cfg_img_scale > 1 >= self.cfg_text_scale:
            logger.warning_once(
                f"cfg_img_scale={self.cfg_img_scale} has no effect without cfg_text_scale > 1 (it is "
                f"{self.cfg_text_scale}), as in the released sampler."
            )


DRAWING_ARGUMENTS = tuple(field.name for field in fields(DrawingOptions))
STORED_ARGUMENTS = tuple(  # those that a generation config may hold
    name
    for name in DRAWING_ARGUMENTS
    if name.startswith("cfg_") or name in ("num_timesteps", "timestep_shift", "sample_posterior")
)


@dataclass
class BagelImageOutput(ModelOutput):
    """
    Pictures, with `return_dict_in_generate=True`.

    Args:
        images: one per sample, as `output_type` says.
        latents: final latents per sample, (latent tokens, patch_latent_dim).
        sequences: with `think=True`, the plan's token ids per sample (without bos and eos).
    """

    images: list | None = None
    latents: list[torch.Tensor] | None = None
    sequences: list[torch.LongTensor] | None = None


@dataclass
class BagelInterleavedOutput(ModelOutput):
    """`items`: per sample, texts (token ids, or `str` with a `processor`) and pictures, in order."""

    items: list[list] | None = None


class Conversation(NamedTuple):
    """
    Text and pictures that have been read into a cache, one sample per row.

    `input_ids`, `valid` (batch, length); `position_ids` (batch, length), or (batch, length, 3) with `mrope_section`;
    `cache` holds the keys and values of all of them; `next_position` (batch,) is the rotary position of what follows;
    `logits` (batch, vocab_size) after the last token.
    """

    input_ids: torch.LongTensor
    valid: torch.BoolTensor
    position_ids: torch.LongTensor
    cache: DynamicCache
    next_position: torch.LongTensor
    logits: torch.Tensor


class DrawingContext(NamedTuple):
    """One context to draw under: frozen keys and values, the block's layout on top of them, its attention plan."""

    cache: FrozenContext
    layout: PackedLayout
    plan: AttentionPlan


class DrawingContexts(NamedTuple):
    """The contexts of guidance; equal contexts are one object, so that their velocity is computed once."""

    gen: DrawingContext
    text: DrawingContext
    image: DrawingContext


class BagelGenerationMixin(GenerationMixin):
    """`generate` in three modes: `"text"`, `"image"` and `"interleaved"`."""

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, generation_mode: str = "text", **kwargs):
        r"""
        Write text, draw pictures, or both in turns.

        Args:
            inputs: `input_ids`, if they are not passed by name. All other model inputs are those of `forward`.
            generation_mode (`str`):
                `"text"`: all of [`~transformers.GenerationMixin.generate`]; the prompt ends with the answer's bos.
                `"image"`: one picture per prompt (and per `num_return_sequences`), see [`DrawingOptions`] for the
                arguments. Pictures in the prompt are edited if they came through the VAE. `think=True` writes a plan
                first, with the text arguments (`max_new_tokens`, `do_sample`, `streamer` ...) applying to it; the
                prompt must then hold the released system prompt (`apply_chat_template(..., think=True)`).
                `"interleaved"`: the model decides after each text whether it writes on, draws or ends, until
                `max_new_tokens` text tokens or `max_images` pictures. Takes the arguments of both other modes, and
                `processor`, with which pictures are read back (and texts decoded).
            return_dict_in_generate (`bool`): a [`ModelOutput`] instead of the plain result.

        Returns:
            Text mode: as transformers. Image mode: a list of pictures. Interleaved mode: per prompt, a list of texts
            (token ids, or `str` with a `processor`) and pictures.

        Raises:
            ValueError: unknown or contradicting arguments; the message names them.
        """
        if generation_mode not in GENERATION_MODES:
            raise ValueError(f"generation_mode={generation_mode!r} is unknown; choose one of {GENERATION_MODES}.")
        if inputs is not None:
            name = "input_ids" if not inputs.is_floating_point() else "inputs_embeds"
            if kwargs.get(name) is not None:
                raise ValueError(f"Pass the prompt once: as `inputs` or as `{name}`.")
            kwargs[name] = inputs
        if (ids := kwargs.get("input_ids")) is not None and ids.numel() == 0:
            raise ValueError("The prompt is empty: input_ids holds no token. Write at least one word.")
        if generation_mode == "text":
            drawing = [name for name in kwargs if name in DRAWING_ARGUMENTS and name not in _forward_arguments(self)]
            if drawing:
                raise ValueError(f'{", ".join(drawing)} only apply to generation_mode="image" or "interleaved".')
            kwargs.pop("think", None)  # a plan is part of the answer here; the system prompt asks for it
            return super().generate(**kwargs)
        self.require_visual_gen(f'generate with generation_mode="{generation_mode}"')
        if kwargs.get("input_ids") is None:
            raise ValueError(f'generation_mode="{generation_mode}" needs input_ids (the processor makes them).')
        self._check_positions(kwargs.pop("position_ids", None), kwargs)
        arguments = self._sort_arguments(kwargs, generation_mode)
        run = self._generate_images if generation_mode == "image" else self._generate_interleaved
        return run(**arguments)

    def _check_positions(self, position_ids: torch.LongTensor | None, prompt: dict[str, Any]) -> None:
        """Drawing counts positions itself; those of a processor are the same, and others are refused."""
        names = ("input_ids", "attention_mask", "image_grid_hw", "latent_image_sizes")
        if position_ids is not None and not torch.equal(
            position_ids, self.get_rope_index(*(prompt.get(name) for name in names))
        ):
            raise ValueError(
                "These position_ids are not those of input_ids and its pictures. Guidance reads parts of the prompt by "
                "themselves, so drawing counts positions itself: leave position_ids out."
            )

    def _sort_arguments(self, kwargs: dict[str, Any], generation_mode: str) -> dict[str, Any]:
        """Split keyword arguments into prompt, drawing, text and mode arguments; anything else is refused."""
        prompt_names = ("input_ids", "attention_mask", *PICTURE_INPUTS)
        text_names = set(GenerationConfig().to_dict()) | {
            *inspect.signature(GenerationMixin.generate).parameters,
            "tokenizer",
            "assistant_tokenizer",
        }
        mode_defaults = {
            "image": {"think": False, "max_think_token_n": None, "return_dict_in_generate": False},
            "interleaved": {"processor": None, "max_images": 4, "return_dict_in_generate": False},
        }[generation_mode]
        if generation_mode == "interleaved":
            kwargs.pop("think", None)  # the plan is a text like any other here
        known = {*prompt_names, *DRAWING_ARGUMENTS, *mode_defaults, *text_names} - {"inputs", "kwargs", "self"}
        unknown = [name for name, value in kwargs.items() if name not in known and value is not None]
        if unknown:
            raise ValueError(
                f'{", ".join(unknown)} are unknown to generate(generation_mode="{generation_mode}"); it takes '
                f"{', '.join((*DRAWING_ARGUMENTS, *mode_defaults))}, the inputs of the processor and text arguments."
            )

        def pick(names):
            return {name: value for name, value in kwargs.items() if name in names and value is not None}

        text = pick(text_names - set(prompt_names) - set(mode_defaults) - set(DRAWING_ARGUMENTS))
        drawing = pick(DRAWING_ARGUMENTS)
        for config in (kwargs.get("generation_config"), self.generation_config):
            stored = {name: getattr(config, name, None) for name in STORED_ARGUMENTS}
            drawing = {name: value for name, value in stored.items() if value is not None} | drawing
        return {
            "prompt": pick(prompt_names),
            "options": DrawingOptions(**drawing),
            "text_arguments": text,
            **{name: default if kwargs.get(name) is None else kwargs[name] for name, default in mode_defaults.items()},
        }

    # ---- pictures

    def _generate_images(
        self,
        prompt: dict[str, torch.Tensor],
        options: DrawingOptions,
        text_arguments: dict[str, Any],
        think: bool,
        max_think_token_n: int | None,
        return_dict_in_generate: bool,
    ):
        if prompt.get("pixel_values") is not None and prompt.get("latent_pixel_values") is None:
            logger.warning_once(
                "The pictures of this prompt are only read, so the drawing will not keep their details. To edit them, "
                'make the prompt with apply_chat_template(..., generation_mode="image"), or edit=True in a pipeline.'
            )
        copies = text_arguments.pop("num_return_sequences", 1) or 1
        input_ids, others = self._expand_inputs_for_generation(
            expand_size=copies, input_ids=prompt["input_ids"], **{k: v for k, v in prompt.items() if k != "input_ids"}
        )
        sizes = self._picture_sizes({"input_ids": input_ids, **others}, options)
        conversation = self._read({"input_ids": input_ids, **others}, options)
        before_plan, plans = conversation, None
        if think:
            if max_think_token_n is not None:  # released name: it counts the bos
                text_arguments.setdefault("max_new_tokens", max_think_token_n - 1)
            conversation, plans = self._write_plan(conversation, text_arguments)
        contexts = self._drawing_contexts(conversation, before_plan, sizes)
        latents = self._integrate(contexts, sizes, options)
        images = [self._finish_picture(x, size, options.output_type) for x, size in zip(latents, sizes)]
        if return_dict_in_generate:
            return BagelImageOutput(images=images, latents=latents, sequences=plans)
        return images

    def _picture_sizes(self, prompt: dict[str, torch.Tensor], options: DrawingOptions) -> list[tuple[int, int]]:
        """(height, width) per sample: asked for, else that of the last picture to edit, else the default."""
        places = self.image_places(prompt["input_ids"])
        batch_size = prompt["input_ids"].shape[0]
        side = min(DEFAULT_SIDE, self.config.max_latent_size * self.config.latent_downsample)
        sizes = [(side, side)] * batch_size
        if prompt.get("latent_image_sizes") is not None:
            for row, size in zip(picture_rows(places.latent), prompt["latent_image_sizes"].tolist()):
                sizes[row] = tuple(size)
        asked = []
        for name, index in (("height", 0), ("width", 1)):
            value = getattr(options, name)
            values = [value] * batch_size if value is None or isinstance(value, int) else list(value)
            if len(values) != batch_size:
                raise ValueError(f"{name} holds {len(values)} values for {batch_size} samples.")
            asked.append([int(v) if v is not None else size[index] for v, size in zip(values, sizes)])
        sizes = list(zip(*asked))
        for size in sizes:
            self.latent_grid(*size)
        return sizes

    def _read(self, prompt: dict[str, torch.Tensor], options: DrawingOptions) -> Conversation:
        """Prefill. A dangling bos (the generation prompt of a text answer) is left out: a picture comes instead."""
        input_ids = prompt["input_ids"]
        attention_mask = prompt.get("attention_mask")
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        last = torch.where(valid, torch.arange(valid.shape[1], device=valid.device), -1).amax(1)
        if bool((last < 0).any()):
            raise ValueError(f"Prompt {int((last < 0).nonzero()[0])} is empty: its attention_mask is all zero.")
        rows = torch.arange(len(last), device=valid.device)
        dangling = input_ids[rows, last] == self.config.bos_token_id
        valid = valid.index_put((rows[dangling], last[dangling]), torch.zeros_like(dangling[dangling]))
        if bool((~valid.any(1)).any()):
            raise ValueError(f"Prompt {int((~valid.any(1)).nonzero()[0])} is empty: it holds only a bos token.")
        pictures = {name: prompt[name] for name in PICTURE_INPUTS if prompt.get(name) is not None}
        return self._extend(
            None, input_ids, valid, **pictures, sample_posterior=options.sample_posterior, generator=options.generator
        )

    def _extend(
        self, conversation: Conversation | None, input_ids: torch.LongTensor, valid: torch.BoolTensor, **pictures
    ) -> Conversation:
        """Read more text or pictures; `valid` marks padding on either side."""
        positions = self._axes_last(
            self.get_rope_index(
                input_ids, valid, *(pictures.get(name) for name in ("image_grid_hw", "latent_image_sizes"))
            )
        )
        cache, attention_mask, following = DynamicCache(config=self.config.text_config), valid, 0
        if conversation is not None:
            cache, following = conversation.cache, conversation.next_position
            positions = positions + following.view(-1, *(1,) * (positions.ndim - 1))
            attention_mask = torch.cat([conversation.valid, valid], dim=1)
        last = torch.where(valid, torch.arange(valid.shape[1], device=valid.device), 0).amax(1)
        output = self(
            input_ids=input_ids,
            attention_mask=attention_mask.long(),
            position_ids=self._axes_first(positions),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.unique(last),
            **pictures,
        )
        rows = torch.arange(len(last), device=last.device)
        following = torch.maximum(_next_position(positions, valid), torch.as_tensor(following, device=last.device))
        if conversation is not None:
            input_ids = torch.cat([conversation.input_ids, input_ids], dim=1)
            positions = torch.cat([conversation.position_ids, positions], dim=1)
        return Conversation(
            input_ids,
            attention_mask,
            positions,
            output.past_key_values,
            following,
            output.logits[rows, torch.searchsorted(torch.unique(last), last)],
        )

    def _write_plan(
        self, conversation: Conversation, text_arguments: dict[str, Any]
    ) -> tuple[Conversation, list[torch.LongTensor]]:
        """Let the model write its plan, then read it as a text of its own: bos, plan, eos."""
        config = self.config
        bos = conversation.input_ids.new_full((len(conversation.input_ids), 1), config.bos_token_id)
        sequences = self._write(conversation, bos, text_arguments)
        plans = [self._cut(sequence, text_arguments) for sequence in sequences]
        eos = _first_id(config.eos_token_id)
        texts = [torch.cat([bos[0], plan, plan.new_tensor([eos])]) for plan in plans]
        input_ids = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=eos)
        lengths = torch.tensor([len(text) for text in texts], device=input_ids.device)
        valid = torch.arange(input_ids.shape[1], device=input_ids.device)[None] < lengths[:, None]
        return self._extend(conversation, input_ids, valid), plans

    def _write(
        self, conversation: Conversation, start: torch.LongTensor, text_arguments: dict[str, Any]
    ) -> torch.LongTensor:
        """New tokens (batch, n) after the conversation and `start`, by transformers' `generate`; changes no cache."""
        arguments = {key: value for key, value in text_arguments.items() if key not in ("return_dict_in_generate",)}
        if not {"max_new_tokens", "max_length", "generation_config"} & set(arguments):
            arguments["max_new_tokens"] = MAX_PLAN_TOKENS
        input_ids = torch.cat([conversation.input_ids, start], dim=1)
        valid = torch.cat([conversation.valid, torch.ones_like(start, dtype=torch.bool)], dim=1)
        here = conversation.next_position.view(-1, *(1,) * (conversation.position_ids.ndim - 1))
        here = here.expand(-1, 1, *conversation.position_ids.shape[2:])  # of `start`, one token
        sequences = super().generate(
            input_ids=input_ids,
            attention_mask=valid.long(),
            position_ids=self._axes_first(torch.cat([conversation.position_ids, here], dim=1)),
            past_key_values=copy.deepcopy(conversation.cache),
            **arguments,
        )
        return sequences[:, input_ids.shape[1] :]

    def _cut(self, tokens: torch.LongTensor, text_arguments: dict[str, Any]) -> torch.LongTensor:
        """Tokens before the first end-of-sequence token."""
        eos = text_arguments.get("eos_token_id") or self.generation_config.eos_token_id or self.config.eos_token_id
        ends = torch.isin(tokens, tokens.new_tensor(eos if isinstance(eos, list) else [eos])).nonzero()
        return tokens[: int(ends[0])] if len(ends) else tokens

    def _drawing_contexts(
        self, conversation: Conversation, before_plan: Conversation, sizes: list[tuple[int, int]]
    ) -> DrawingContexts:
        """
        The three contexts of the released sampler.

        `text` is the prompt before its last text (the whole prompt if a picture comes last), so it keeps system prompt,
        pictures and earlier texts, and never the plan. `image` is all texts of the prompt, renumbered, without plan.
        """
        grids = [self.latent_grid(*size) for size in sizes]
        valid, in_image = before_plan.valid, self.image_places(before_plan.input_ids).in_image
        gen = self._context(conversation.cache, conversation.valid, conversation.next_position, grids)

        index = torch.arange(valid.shape[1], device=valid.device)[None]
        last_text = self._last_text_start(before_plan)[:, None]
        keep = valid & (index < last_text)
        next_position = _next_position(before_plan.position_ids, keep)
        if torch.equal(_pad_to(keep, conversation.valid), conversation.valid):
            text = gen
        else:
            text = self._context(conversation.cache, _pad_to(keep, conversation.valid), next_position, grids)

        if bool((in_image & valid).any()):
            texts = [ids[mask] for ids, mask in zip(before_plan.input_ids, valid & ~in_image)]
            image = self._text_context(texts, grids)
        elif before_plan is conversation:
            image = gen
        else:
            keep = _pad_to(valid, conversation.valid)
            image = self._context(conversation.cache, keep, before_plan.next_position, grids)
        return DrawingContexts(gen, text, image)

    def _last_text_start(self, conversation: Conversation) -> torch.LongTensor:
        """(batch,) column where the last text begins; the row's length if a picture comes last."""
        valid, ids = conversation.valid, conversation.input_ids
        in_image = self.image_places(ids).in_image
        index = torch.arange(ids.shape[1], device=ids.device)[None].expand_as(ids)
        is_text = valid & ~in_image
        after_image = nn.functional.pad((in_image | ~valid)[:, :-1], (1, 0), value=True)
        begins = is_text & ((ids == self.config.bos_token_id) | after_image)
        last = torch.where(valid, index, -1).amax(1)
        ends_with_text = is_text.gather(1, last[:, None])[:, 0]
        return torch.where(ends_with_text, torch.where(begins, index, 0).amax(1), ids.shape[1])

    def _text_context(self, texts: list[torch.LongTensor], grids: list[tuple[int, int]]) -> DrawingContext:
        """Read texts alone, left-padded; rows without text have an empty context."""
        device = texts[0].device
        longest = max(len(text) for text in texts)
        if longest == 0:
            positions = torch.zeros(len(texts), dtype=torch.long, device=device)
            return self._context(None, torch.zeros(len(texts), 0, dtype=torch.bool, device=device), positions, grids)
        padding = self.config.pad_token_id or 0
        padding = padding if padding < self.config.text_config.vocab_size else 0
        input_ids = torch.full((len(texts), longest), padding, device=device)
        valid = torch.zeros_like(input_ids, dtype=torch.bool)
        for row, text in enumerate(texts):
            input_ids[row, longest - len(text) :] = text
            valid[row, longest - len(text) :] = True
        conversation = self._extend(None, input_ids, valid)
        return self._context(conversation.cache, valid, conversation.next_position, grids)

    def _context(
        self,
        cache: DynamicCache | None,
        keep: torch.BoolTensor,
        positions: torch.LongTensor,
        grids: list[tuple[int, int]],
    ) -> DrawingContext:
        """View the kept columns of a cache; columns that no row keeps are sliced off."""
        columns = keep.any(0).nonzero()[:, 0]
        layers, past_valid = [], None
        if len(columns):
            first, end = int(columns[0]), int(columns[-1]) + 1
            layers = [(layer.keys[:, :, first:end], layer.values[:, :, first:end]) for layer in cache.layers]
            past_valid = keep[:, first:end]
            past_valid = None if bool(past_valid.all()) else past_valid
        past_length = layers[0][0].shape[2] if layers else 0
        num_latents = [rows * columns for rows, columns in grids]
        block_grids = grids if self.config.multimodal_positions else None
        layout = PackedLayout.noisy_blocks(num_latents, positions, past_length, past_valid, block_grids)
        frozen = FrozenContext(layers)
        shape_only = torch.empty(layout.batch_size, layout.length, 0, dtype=self.dtype, device=positions.device)
        plan = plan_attention(self.config.text_config, layout, shape_only, None, frozen)
        return DrawingContext(frozen, layout, plan)

    def _integrate(
        self, contexts: DrawingContexts, sizes: list[tuple[int, int]], options: DrawingOptions
    ) -> list[torch.Tensor]:
        """From noise (t = 1) to pictures (t = 0); -> final latents per sample, float32."""
        grids = [self.latent_grid(*size) for size in sizes]
        device = contexts.gen.layout.position_ids.device
        x, position_ids = self._initial_noise(grids, options, device)
        valid = contexts.gen.layout.gen[:, 1 : 1 + x.shape[1]]
        scheduler, t_values = _prepare_scheduler(options, device)
        guided = guided_steps(t_values, options.cfg_interval)

        def velocity(context: DrawingContext, t: torch.Tensor) -> torch.Tensor:
            return self.predict_velocity(x, t, context.layout, position_ids, context.cache, context.plan)

        steps = logging.tqdm(
            enumerate(scheduler.timesteps),
            total=len(scheduler.timesteps),
            desc="Drawing",
            unit="step",
            disable=not options.progress_bar,
        )
        for step, timestep in steps:
            t = t_values[step]
            v_cond, v_text, v_image = velocity(contexts.gen, t), None, None
            if guided[step] and options.cfg_text_scale > 1:
                v_text = v_cond if contexts.text is contexts.gen else velocity(contexts.text, t)
                if options.cfg_img_scale > 1:
                    v_image = v_cond if contexts.image is contexts.gen else velocity(contexts.image, t)
            v = guide(
                v_cond,
                v_text,
                v_image,
                options.cfg_text_scale,
                options.cfg_img_scale,
                options.cfg_renorm_type,
                options.cfg_renorm_min,
                valid,
            )
            x = scheduler.step(v, timestep, x, return_dict=False)[0]
            if options.callback_on_step_end is not None:
                changed = options.callback_on_step_end(self, step, t, {"latents": x, "velocity": v}) or {}
                x = changed.get("latents", x)
        return [row[: rows * columns] for row, (rows, columns) in zip(x, grids)]

    def _initial_noise(
        self, grids: list[tuple[int, int]], options: DrawingOptions, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """-> x at t = 1 (batch, most latent tokens, patch_latent_dim) float32, and the latent position ids."""
        features = self.config.patch_latent_dim
        shapes = [(rows * columns, features) for rows, columns in grids]
        if options.latents is not None:
            noise = list(options.latents) if _is_batch(options.latents) else [options.latents]
            found = [tuple(sample.shape) for sample in noise]
            if found != shapes:
                raise ValueError(
                    f"latents have shapes {found}, expected {shapes}: (latent tokens, patch_latent_dim) per sample."
                )
        else:
            generators = options.generator
            if not isinstance(generators, list | tuple):
                generators = [generators] * len(shapes)
            if len(generators) != len(shapes):
                raise ValueError(
                    f"{len(generators)} generators for {len(shapes)} samples; pass one, or one per sample."
                )
            noise = [torch.randn(shape, generator=generator) for shape, generator in zip(shapes, generators)]
        pad = nn.utils.rnn.pad_sequence
        x = pad([sample.to(device=device, dtype=torch.float32) for sample in noise], batch_first=True)
        position_ids = pad([self.latent_position_ids(*grid) for grid in grids], batch_first=True)
        return x, position_ids.to(device)

    def _finish_picture(self, latents: torch.Tensor, size: tuple[int, int], output_type: str):
        if output_type == "latent":
            return latents
        pixels = self.decode_latents(latents, self.latent_grid(*size))
        if output_type == "pt":
            return (pixels * 0.5 + 0.5).clamp(0, 1)
        return tensor_to_pil(pixels)

    # ---- texts and pictures in turns

    def _generate_interleaved(
        self,
        prompt: dict[str, torch.Tensor],
        options: DrawingOptions,
        text_arguments: dict[str, Any],
        processor,
        max_images: int,
        return_dict_in_generate: bool,
    ):
        if (text_arguments.get("num_beams") or 1) > 1 or (text_arguments.get("num_return_sequences") or 1) > 1:
            raise ValueError("Interleaved generation writes one sequence per prompt; use sampling instead of beams.")
        batch_size = prompt["input_ids"].shape[0]
        rows = [self._row(prompt, row) for row in range(batch_size)]
        items = [
            self._converse(row, _row_options(options, number), text_arguments, processor, max_images)
            for number, row in enumerate(rows)
        ]
        return BagelInterleavedOutput(items=items) if return_dict_in_generate else items

    def _converse(
        self,
        prompt: dict[str, torch.Tensor],
        options: DrawingOptions,
        text_arguments: dict[str, Any],
        processor,
        max_images: int,
    ) -> list:
        """One sample: texts and pictures until the model ends, or runs out of tokens or pictures."""
        config = self.config
        image_processor = getattr(processor, "image_processor", None) or self._default_image_processor()
        text_arguments = dict(text_arguments)
        budget = text_arguments.pop("max_new_tokens", None) or self.generation_config.max_new_tokens or MAX_PLAN_TOKENS
        starts_with_text = int(prompt["input_ids"][0, -1]) == config.bos_token_id
        sizes = self._picture_sizes(prompt, options)
        conversation = self._read(prompt, options)
        decision = config.bos_token_id if starts_with_text else int(conversation.logits[0].argmax())
        items, drawn = [], 0
        while True:
            if decision == config.bos_token_id and budget > 0:
                bos = conversation.input_ids.new_tensor([[decision]])
                written = self._write(conversation, bos, {**text_arguments, "max_new_tokens": budget})[0]
                budget -= len(written)
                text = self._cut(written, text_arguments)
                items.append(processor.tokenizer.decode(text, skip_special_tokens=True) if processor else text)
                if len(text) == len(written):  # no end of text: out of tokens, or stopped by a criterion
                    return items
                text = torch.cat([bos[0], text, text.new_tensor([_first_id(config.eos_token_id)])])[None]
                conversation = self._extend(conversation, text, torch.ones_like(text, dtype=torch.bool))
            elif decision == config.vision_start_token_id and drawn < max_images:
                contexts = self._drawing_contexts(conversation, conversation, sizes)
                latents = self._integrate(contexts, sizes, options)[0]
                picture = self._finish_picture(latents, sizes[0], "pil")
                wanted = options.output_type
                items.append(picture if wanted == "pil" else self._finish_picture(latents, sizes[0], wanted))
                drawn += 1
                conversation = self._read_back(conversation, picture, image_processor, options)
            else:
                return items
            decision = int(conversation.logits[0].argmax())

    def _read_back(self, conversation: Conversation, picture, image_processor, options: DrawingOptions) -> Conversation:
        """A drawn picture becomes context: through the VAE (clean), then through the vision tower."""
        config = self.config
        device = conversation.input_ids.device
        read = self.config.visual_und
        inputs = image_processor([picture], edited=True, read=read, return_tensors="pt").to(device)
        rows, columns = self.latent_grid(*inputs["latent_image_sizes"][0].tolist())
        spans = [(config.latent_token_id, rows * columns)]
        if read:
            spans.append((config.image_token_id, int(inputs["image_grid_hw"][0].prod())))
        ids = [
            token
            for place, count in spans
            for token in (config.vision_start_token_id, *[place] * count, config.vision_end_token_id)
        ]
        input_ids = torch.tensor([ids], device=device)
        generator = options.generator[0] if isinstance(options.generator, list | tuple) else options.generator
        return self._extend(
            conversation,
            input_ids,
            torch.ones_like(input_ids, dtype=torch.bool),
            **{name: inputs[name] for name in PICTURE_INPUTS if name in inputs},
            sample_posterior=options.sample_posterior,
            generator=generator,
        )

    def _default_image_processor(self) -> BagelImageProcessor:
        """The released transforms, capped by this model's position tables if it does not interpolate them."""
        config = self.config
        read, drawn = 980, 1024
        if not config.interpolate_pos:
            read = config.vit_max_num_patch_per_side * config.vit_patch_size
            drawn = config.max_latent_size * config.latent_downsample
        return BagelImageProcessor(
            size={"shortest_edge": min(224, read), "longest_edge": min(980, read)},
            latent_size={"shortest_edge": min(512, drawn), "longest_edge": min(1024, drawn)},
            patch_size=config.vit_patch_size,
            latent_stride=config.latent_downsample,
        )

    def _row(self, prompt: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
        """One sample of a padded batch, without its padding, with its pictures."""
        mask = prompt.get("attention_mask")
        ids = prompt["input_ids"][row]
        single = {"input_ids": (ids if mask is None else ids[mask[row].bool()])[None]}
        return {**single, **self._pictures_of_rows(prompt["input_ids"], prompt, [row])}

    def _pictures_of_rows(
        self, input_ids: torch.LongTensor, tensors: dict[str, torch.Tensor], rows: list[int]
    ) -> dict[str, torch.Tensor]:
        """Pictures are flat over the batch; pick those of some rows, in that order, repeats allowed."""
        places, picked = self.image_places(input_ids), {}
        for place, content, sizes in (
            (places.image, "pixel_values", "image_grid_hw"),
            (places.latent, "latent_pixel_values", "latent_image_sizes"),
        ):
            if tensors.get(content) is None:
                continue
            owner = picture_rows(place)
            if len(owner) != len(tensors[sizes]):
                raise ValueError(
                    f"input_ids mark {len(owner)} pictures for {sizes}, which describes {len(tensors[sizes])}."
                )
            numbers = [number for row in rows for number, owned_by in enumerate(owner) if owned_by == row]
            if not numbers:
                continue
            if content == "pixel_values":
                images = tensors[content].split(tensors[sizes].prod(-1).tolist())
                picked[content] = torch.cat([images[number] for number in numbers])
            else:
                picked[content] = tensors[content][numbers]
            picked[sizes] = tensors[sizes][numbers]
        return picked

    # ---- transformers' hooks

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """Positions of the whole prompt, see `get_rope_index`."""
        input_ids = model_kwargs.get("input_ids")
        input_ids = inputs_tensor if input_ids is None or input_ids.shape[1] == 0 else input_ids
        if input_ids.is_floating_point():
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        mask = model_kwargs.get("attention_mask")
        cache = model_kwargs.get("past_key_values")
        past_length = 0 if cache is None else cache.get_seq_length()
        longer_mask = mask is not None and mask.shape[1] != input_ids.shape[1]
        if longer_mask or (mask is None and past_length):  # only the new tokens were passed: text on top of a cache
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        grids = (model_kwargs.get(name) for name in ("image_grid_hw", "latent_image_sizes"))
        return self.get_rope_index(input_ids, mask, *grids)

    def get_rope_index(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        image_grid_hw: torch.LongTensor | None = None,
        latent_image_sizes: torch.LongTensor | None = None,
    ) -> torch.LongTensor:
        """
        Rotary positions of a prompt, as `forward` takes them. Pass them on when a prompt continues on a cache.

        Args:
            input_ids, attention_mask: (batch, length). image_grid_hw, latent_image_sizes: of its pictures; only read
                with `mrope_section`.

        Returns:
            (batch, length): one per text token, one per picture with its boundaries; 0 for padding. With
            `mrope_section` (3, batch, length) time, height and width, see the tables in `layout_bagel.py`.

        Raises:
            ValueError: pictures that `input_ids` mark and the sizes describe differently.
        """
        valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        places = self.image_places(input_ids)
        positions = places.positions(valid, self._picture_grids(places, image_grid_hw, latent_image_sizes))
        return self._axes_first(positions)

    @staticmethod
    def _axes_first(positions: torch.LongTensor) -> torch.LongTensor:
        """(batch, length, 3) -> (3, batch, length), the public form; one position per token stays as it is."""
        return positions.movedim(-1, 0) if positions.ndim == 3 else positions

    @staticmethod
    def _axes_last(positions: torch.LongTensor) -> torch.LongTensor:
        """The inverse of `_axes_first`."""
        return positions.movedim(0, -1) if positions.ndim == 3 else positions

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, **kwargs):
        """Pictures go in with the prompt only; afterwards their keys and values are in the cache."""
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        cache = kwargs.get("past_key_values")
        decoding = not is_first_iteration and kwargs.get("use_cache", True) and cache is not None
        if decoding and (inputs["input_ids"].shape[1] == 1 or cache.get_seq_length() > 0):
            for name in (*PICTURE_INPUTS, "generator"):
                inputs.pop(name, None)
        else:  # an assistant's first call, or no cache at all
            inputs.update({name: kwargs[name] for name in PICTURE_INPUTS if kwargs.get(name) is not None})
        return inputs

    def create_masks_for_generate(self, config, inputs_embeds, attention_mask, past_key_values, **kwargs):
        """For static caches: a prompt's mask follows from its layout, in `forward`; later steps are plain text."""
        if kwargs.get("is_first_iteration", False) or inputs_embeds.shape[1] > 1:
            return attention_mask
        return create_causal_mask(config.get_text_config(), inputs_embeds, attention_mask, past_key_values)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Beams and several answers: pictures are repeated with the row that holds them."""
        if expand_size == 1 or input_ids is None:
            return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        rows = [row for row in range(input_ids.shape[0]) for _ in range(expand_size)]
        pictures = self._pictures_of_rows(input_ids, model_kwargs, rows)
        positions = model_kwargs.pop("position_ids", None)
        if positions is not None:  # transformers 5.17 knows one form only
            pictures["position_ids"] = positions.repeat_interleave(expand_size, dim=positions.ndim - 2)
        others = {name: value for name, value in model_kwargs.items() if name not in PICTURE_INPUTS}
        input_ids, others = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **others)
        return input_ids, {**others, **pictures}

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        """Places for pictures are no words: the model never writes them."""
        processors = super()._get_logits_processor(*args, **kwargs)
        vocab_size = self.config.text_config.vocab_size
        places = [id for id in (self.config.image_token_id, self.config.latent_token_id) if id < vocab_size]
        if places:
            processors.insert(0, SuppressTokensLogitsProcessor(places, device=self.device))
        return processors


def _prepare_scheduler(options: DrawingOptions, device: torch.device):
    """-> scheduler with its time steps set, and the network's t for each of them (float32, 1 = noise)."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    knots = timestep_grid(options.num_timesteps, options.timestep_shift)
    if options.scheduler is None:
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=knots[:-1].tolist(), device=device)
        return scheduler, knots[:-1].to(device)
    scheduler = copy.deepcopy(options.scheduler)  # a run leaves no state in the caller's object
    if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(sigmas=knots[:-1].tolist(), device=device)
    else:
        scheduler.set_timesteps(len(knots) - 1, device=device)
    return scheduler, scheduler.timesteps.float() / scheduler.config.num_train_timesteps


def _forward_arguments(model) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _is_batch(latents) -> bool:
    return not torch.is_tensor(latents) or latents.ndim == 3


def _first_id(token_id: int | list[int]) -> int:
    return token_id[0] if isinstance(token_id, list) else token_id


def _next_position(positions: torch.LongTensor, keep: torch.BoolTensor) -> torch.LongTensor:
    """(batch,) the position after the tokens that are kept; 0 after none."""
    last = positions if positions.ndim == 2 else positions.amax(-1)
    return torch.where(keep, last + 1, 0).amax(1)


def _pad_to(mask: torch.BoolTensor, other: torch.BoolTensor) -> torch.BoolTensor:
    """Append `False` columns up to the length of `other`."""
    return nn.functional.pad(mask, (0, other.shape[1] - mask.shape[1]))


def _row_options(options: DrawingOptions, row: int) -> DrawingOptions:
    """The options of one sample of a batch."""
    values = {name: getattr(options, name) for name in DRAWING_ARGUMENTS}
    for name in ("height", "width", "generator"):
        if isinstance(values[name], list | tuple):
            values[name] = values[name][row]
    if values["latents"] is not None:
        raise ValueError("latents cannot be given for interleaved generation; use generator for reproducible pictures.")
    return DrawingOptions(**values)
