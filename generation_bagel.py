# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Writing and drawing: text through transformers' own `generate`, images by integrating the velocity, both in turns.

A mixin without parameters: it reads prompts, makes the contexts of guidance and loops; the model computes. An image is
drawn under up to three contexts: everything, everything before the last text (text guidance), and the texts without
images (image guidance). The first two are views of one cache.

Axes: (batch, latent tokens, patch_latent_dim) for images that are drawn, padded to the largest of the batch.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation.logits_process import SuppressTokensLogitsProcessor
from transformers.masking_utils import create_causal_mask
from transformers.utils import ModelOutput, logging

from .attention_bagel import AttentionSpec, FrozenContext, prepare_attention
from .decoder_bagel import Routing
from .embeddings_bagel import latent_grid, latent_position_ids
from .flow_bagel import DRAWING_ARGUMENTS, STORED_ARGUMENTS, Branches, DrawingOptions, initial_noise, integrate
from .inputs_bagel import (
    IMAGE_INPUTS,
    Grid,
    ImageTensors,
    Prompt,
    find_placeholders,
    require_visual_gen,
)
from .layout_bagel import BoolTensor, LongTensor, PackedLayout, axes_first, next_position


logger = logging.get_logger(__name__)

GENERATE: Any = GenerationMixin.generate  # pyright: ignore[reportAttributeAccessIssue]  typed for subclasses only
GENERATION_MODES = ("text", "image", "interleaved")
DEFAULT_SIDE = 1024
MAX_PLAN_TOKENS = 1000


@dataclass
class BagelImageOutput(ModelOutput):
    """
    Images, with `return_dict_in_generate=True`.

    Args:
        images: one per sample, as `output_type` says.
        latents: final latents per sample, (latent tokens, patch_latent_dim).
        sequences: with `think=True`, the plan's token ids per sample (without bos and eos).
    """

    images: list | None = None
    latents: list[torch.Tensor] | None = None
    sequences: list[LongTensor] | None = None


@dataclass
class BagelInterleavedOutput(ModelOutput):
    """`items`: per sample, texts (token ids, or `str` with a `processor`) and images, in order."""

    items: list[list] | None = None


class Prefill(NamedTuple):
    """A prompt that has been read: the keys and values of all of it, and (batch, vocab_size) logits after its end."""

    prompt: Prompt
    cache: DynamicCache
    logits: torch.Tensor


class DrawingContext(NamedTuple):
    """
    One context to draw under: frozen keys and values; the layout of the noisy blocks on top of them, with its kernel
    arguments and routing, made once for all steps; the table entries of the latents (batch, latent tokens).
    """

    cache: FrozenContext
    layout: PackedLayout
    attention: AttentionSpec
    routing: Routing
    position_ids: torch.Tensor


if TYPE_CHECKING:  # what the mixins expect of the class that they are mixed into
    from transformers.modeling_utils import PreTrainedModel

    from .configuration_bagel import BagelConfig
    from .decoder_bagel import BagelTextModel

    class _Model(PreTrainedModel):
        config: BagelConfig
        generation_config: GenerationConfig

        def generate(self, *args, **kwargs) -> Any: ...

        def prepare_inputs_for_generation(self, *args, **kwargs) -> dict[str, Any]: ...

        def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs) -> LongTensor: ...

        def _expand_inputs_for_generation(self, *args, **kwargs) -> tuple[Any, dict[str, Any]]: ...

        def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList: ...

        def predict_velocity(self, x_t: torch.Tensor, t: torch.Tensor, context: Any) -> torch.Tensor: ...

        def decode_latents(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor: ...

        def get_decoder(self) -> BagelTextModel: ...
else:
    _Model = GenerationMixin


class BagelDrawingMixin(_Model):
    """Reads prompts and draws images under their contexts."""

    def _read_prompt(self, given: Mapping[str, Any], options: DrawingOptions) -> tuple[Prompt, ImageTensors]:
        """The one scan of `input_ids`, and the images beside them."""
        images = ImageTensors.among(given)
        prompt = Prompt.read(self.config, given["input_ids"], given.get("attention_mask"), *images.sizes)
        positions = given.get("position_ids")
        if positions is not None and not torch.equal(positions, axes_first(prompt.position_ids)):
            raise ValueError(
                "These position_ids are not those of input_ids and its images. Guidance reads parts of the prompt by "
                "themselves, so drawing counts positions itself: leave position_ids out."
            )
        if bool((prompt.last_index() < 0).any()):
            row = int((prompt.last_index() < 0).nonzero()[0])
            raise ValueError(f"Prompt {row} is empty: its attention_mask is all zero.")
        return prompt, images._replace(sample_posterior=options.sample_posterior, generator=options.generator)

    def _generate_images(
        self,
        prompt: Prompt,
        images: ImageTensors,
        options: DrawingOptions,
        text_arguments: dict[str, Any],
        think: bool,
        max_think_token_n: int | None,
        return_dict_in_generate: bool,
    ):
        if images.pixel_values is not None and images.latent_pixel_values is None:
            logger.warning_once(
                "The images of this prompt are only read, so the drawing will not keep their details. To edit them, "
                'make the prompt with apply_chat_template(..., generation_mode="image"), or edit=True in a pipeline.'
            )
        copies = text_arguments.pop("num_return_sequences", 1) or 1
        if copies > 1:
            rows = [row for row in range(len(prompt.valid)) for _ in range(copies)]
            prompt, images = prompt.select(rows, images)
        sizes = image_sizes(self.config, prompt, options)
        prefill = self._read(without_dangling_bos(self.config, prompt), images)
        before_plan, plans = prefill, None
        if think:
            if max_think_token_n is not None:  # released name: it counts the bos
                text_arguments.setdefault("max_new_tokens", max_think_token_n - 1)
            prefill, plans = self._write_plan(prefill, text_arguments)
        latents = self._draw(self._branches(prefill, before_plan, sizes), sizes, options)
        finished = [self._finish_image(x, size, options.output_type) for x, size in zip(latents, sizes)]
        if return_dict_in_generate:
            return BagelImageOutput(images=finished, latents=latents, sequences=plans)
        return finished

    def _read(self, prompt: Prompt, images: ImageTensors, past: Prefill | None = None) -> Prefill:
        """Prefill, after what has been read before."""
        whole, cache = prompt, DynamicCache(config=self.config.text_config)
        position_ids = prompt.position_ids
        if past is not None:
            whole, cache = past.prompt.append(prompt), past.cache
            position_ids = whole.position_ids[:, -prompt.input_ids.shape[1] :]
        last = prompt.last_index().clamp(min=0)
        kept = torch.unique(last)
        output = self(
            input_ids=prompt.input_ids,
            attention_mask=whole.valid.long(),
            position_ids=axes_first(position_ids),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=kept,
            prompt=prompt if prompt.has_images else None,
            sample_posterior=images.sample_posterior,
            generator=images.generator,
            **images.tensors(),
        )
        rows = torch.arange(len(last), device=last.device)
        return Prefill(whole, output.past_key_values, output.logits[rows, torch.searchsorted(kept, last)])

    def _read_text(self, texts: Sequence[LongTensor], padding_id: int, left: bool, past: Prefill | None = None):
        """Prefill of texts of different lengths."""
        input_ids, valid = pad_texts(texts, padding_id, left)
        return self._read(Prompt.of_text(self.config, input_ids, valid), ImageTensors(), past)

    def _write_plan(self, prefill: Prefill, text_arguments: dict[str, Any]) -> tuple[Prefill, list[LongTensor]]:
        """Let the model write its plan, then read it as a text of its own: bos, plan, eos."""
        bos, eos = self.config.bos_token_id, first_id(self.config.eos_token_id)
        plans = [self._cut(sequence, text_arguments) for sequence in self._write(prefill, text_arguments)]
        texts = [torch.cat([plan.new_tensor([bos]), plan, plan.new_tensor([eos])]) for plan in plans]
        return self._read_text(texts, eos, left=False, past=prefill), plans

    def _write(self, prefill: Prefill, text_arguments: dict[str, Any]) -> LongTensor:
        """New tokens (batch, n) of a text that starts here, by transformers' `generate`; changes no cache."""
        arguments = {key: value for key, value in text_arguments.items() if key != "return_dict_in_generate"}
        if not {"max_new_tokens", "max_length", "generation_config"} & set(arguments):
            arguments["max_new_tokens"] = MAX_PLAN_TOKENS
        bos = prefill.prompt.input_ids.new_full((len(prefill.prompt.valid), 1), first_id(self.config.bos_token_id))
        prompt = prefill.prompt.append(Prompt.of_text(self.config, bos, torch.ones_like(bos, dtype=torch.bool)))
        sequences = super().generate(
            input_ids=prompt.input_ids,
            attention_mask=prompt.valid.long(),
            position_ids=axes_first(prompt.position_ids),
            past_key_values=copy.deepcopy(prefill.cache),
            **arguments,
        )
        return sequences[:, prompt.input_ids.shape[1] :]

    def _cut(self, tokens: LongTensor, text_arguments: dict[str, Any]) -> LongTensor:
        """Tokens before the first end-of-sequence token."""
        eos = text_arguments.get("eos_token_id") or self.generation_config.eos_token_id or self.config.eos_token_id
        ends = torch.isin(tokens, tokens.new_tensor(eos if isinstance(eos, list) else [eos])).nonzero()
        return tokens[: int(ends[0])] if len(ends) else tokens

    def _branches(self, prefill: Prefill, before_plan: Prefill, sizes: list[tuple[int, int]]) -> Branches:
        """
        The contexts of the released sampler.

        `without_text` is the prompt before its last text (the whole prompt if an image comes last), so it keeps system
        prompt, images and earlier texts, and never the plan. `without_images` is all texts of the prompt, renumbered,
        without the plan.
        """
        grids = [latent_grid(self.config, *size) for size in sizes]
        whole, prompt = prefill.prompt, before_plan.prompt
        full = self._context(prefill.cache, whole.valid, whole.next_position, grids)

        index = torch.arange(prompt.valid.shape[1], device=prompt.valid.device)[None]
        keep = prompt.valid & (index < prompt.last_text_start(first_id(self.config.bos_token_id))[:, None])
        padded = pad_to(keep, whole.valid)
        without_text = full
        if not torch.equal(padded, whole.valid):
            without_text = self._context(prefill.cache, padded, next_position(prompt.position_ids, keep), grids)

        without_images = full
        if bool((prompt.placeholders.in_image & prompt.valid).any()):
            without_images = self._text_context(prompt.texts(), grids)
        elif before_plan is not prefill:
            without_images = self._context(
                prefill.cache, pad_to(prompt.valid, whole.valid), prompt.next_position, grids
            )
        return Branches(full, without_text, without_images)

    def _text_context(self, texts: list[LongTensor], grids: list[Grid]) -> DrawingContext:
        """Read texts alone; rows without text have an empty context."""
        if not any(len(text) for text in texts):
            start = torch.zeros(len(texts), dtype=torch.long, device=texts[0].device)
            return self._context(None, start.new_zeros(len(texts), 0).bool(), start, grids)
        padding_id = self.config.pad_token_id or 0
        padding_id = padding_id if padding_id < self.config.text_config.vocab_size else 0
        prefill = self._read_text(texts, padding_id, left=True)
        return self._context(prefill.cache, prefill.prompt.valid, prefill.prompt.next_position, grids)

    def _context(
        self, cache: DynamicCache | None, keep: BoolTensor, positions: LongTensor, grids: list[Grid]
    ) -> DrawingContext:
        """A view of the kept columns of a cache; columns that no row keeps are sliced off."""
        columns = keep.any(0).nonzero()[:, 0]
        layers, past_valid = [], None
        if cache is not None and len(columns):
            first, end = int(columns[0]), int(columns[-1]) + 1
            stored: list[Any] = cache.layers
            layers = [(layer.keys[:, :, first:end], layer.values[:, :, first:end]) for layer in stored]
            past_valid = keep[:, first:end]
            past_valid = None if bool(past_valid.all()) else past_valid
        past_length = layers[0][0].shape[2] if layers else 0
        num_latents = [rows * columns for rows, columns in grids]
        block_grids = grids if self.config.multimodal_positions else None
        layout = PackedLayout.noisy_blocks(num_latents, positions, past_length, past_valid, block_grids)
        frozen = FrozenContext(layers)
        shape_only = torch.empty(layout.batch_size, layout.length, 0, dtype=self.dtype, device=positions.device)
        attention = prepare_attention(self.config.text_config, layout, shape_only, None, frozen)
        entries = [latent_position_ids(self.config, grid) for grid in grids]
        padded = nn.utils.rnn.pad_sequence(entries, batch_first=True).to(positions.device)
        return DrawingContext(frozen, layout, attention, self.get_decoder().route(layout), padded)

    def _draw(self, branches: Branches, sizes: list[tuple[int, int]], options: DrawingOptions) -> list[torch.Tensor]:
        """-> final latents per sample, float32."""
        grids = [latent_grid(self.config, *size) for size in sizes]
        shapes = [(rows * columns, self.config.patch_latent_dim) for rows, columns in grids]
        x = initial_noise(shapes, options).to(branches.full.position_ids.device)
        valid = branches.full.layout.gen[:, 1 : 1 + x.shape[1]]
        x = integrate(self, branches, x, options, valid)
        return [row[:length] for row, (length, _) in zip(x, shapes)]

    def _finish_image(self, latents: torch.Tensor, size: tuple[int, int], output_type: str) -> Any:
        if output_type == "latent":
            return latents
        pixels = self.decode_latents(latents, latent_grid(self.config, *size)) * 0.5 + 0.5
        if output_type == "pt":
            return pixels.clamp(0, 1)
        values = (pixels.clamp(0, 1) * 255).to(torch.uint8)  # truncated, as released
        return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())


class BagelGenerationMixin(BagelDrawingMixin):
    """`generate` in three modes: `"text"`, `"image"` and `"interleaved"`."""

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, generation_mode: str = "text", **kwargs):
        r"""
        Write text, draw images, or both in turns.

        Args:
            inputs: `input_ids`, if they are not passed by name. All other model inputs are those of `forward`.
            generation_mode (`str`):
                `"text"`: all of [`~transformers.GenerationMixin.generate`]; the prompt ends with the answer's bos.
                `"image"`: one image per prompt (and per `num_return_sequences`), see [`DrawingOptions`] for the
                arguments. Images in the prompt are edited if they came through the VAE. `think=True` writes a plan
                first, with the text arguments (`max_new_tokens`, `do_sample`, `streamer` ...) applying to it; the
                prompt must then hold the released system prompt (`apply_chat_template(..., think=True)`).
                `"interleaved"`: the model decides after each text whether it writes on, draws or ends, until
                `max_new_tokens` text tokens or `max_images` images. Takes the arguments of both other modes, and
                `processor`, with which images are read back (and texts decoded).
            return_dict_in_generate (`bool`): a [`ModelOutput`] instead of the plain result.

        Returns:
            Text mode: as transformers. Image mode: a list of images. Interleaved mode: per prompt, a list of texts
            (token ids, or `str` with a `processor`) and images.

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
            drawing = [
                name for name in kwargs if name in DRAWING_ARGUMENTS and name not in ("sample_posterior", "generator")
            ]
            if drawing:
                raise ValueError(f'{", ".join(drawing)} only apply to generation_mode="image" or "interleaved".')
            kwargs.pop("think", None)  # a plan is part of the answer here; the system prompt asks for it
            return super().generate(**kwargs)
        require_visual_gen(self.config, f'generate with generation_mode="{generation_mode}"')
        if kwargs.get("input_ids") is None:
            raise ValueError(f'generation_mode="{generation_mode}" needs input_ids (the processor makes them).')
        arguments = self._sort_arguments(kwargs, generation_mode)
        prompt, images = self._read_prompt(arguments.pop("prompt"), arguments["options"])
        run = self._generate_images if generation_mode == "image" else self._generate_interleaved
        return run(prompt, images, **arguments)

    def _sort_arguments(self, kwargs: dict[str, Any], generation_mode: str) -> dict[str, Any]:
        """Split keyword arguments into prompt, drawing, text and mode arguments; anything else is refused."""
        prompt_names = ("input_ids", "attention_mask", "position_ids", *IMAGE_INPUTS)
        text_names = set(GenerationConfig().to_dict()) | {
            *inspect.signature(GENERATE).parameters,
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

    # ---- texts and images in turns

    def _generate_interleaved(
        self,
        prompt: Prompt,
        images: ImageTensors,
        options: DrawingOptions,
        text_arguments: dict[str, Any],
        processor,
        max_images: int,
        return_dict_in_generate: bool,
    ):
        if (text_arguments.get("num_beams") or 1) > 1 or (text_arguments.get("num_return_sequences") or 1) > 1:
            raise ValueError("Interleaved generation writes one sequence per prompt; use sampling instead of beams.")
        items = []
        for row in range(len(prompt.valid)):
            one, its_images = prompt.select([row], images)
            own = options.of_row(row)
            its_images = its_images._replace(generator=own.generator)
            items.append(self._alternate(one.without_padding(), its_images, own, text_arguments, processor, max_images))
        return BagelInterleavedOutput(items=items) if return_dict_in_generate else items

    def _alternate(
        self,
        prompt: Prompt,
        images: ImageTensors,
        options: DrawingOptions,
        text_arguments: dict[str, Any],
        processor,
        max_images: int,
    ) -> list:
        """One sample: texts and images until the model ends, or runs out of tokens or images."""
        config, text_arguments = self.config, dict(text_arguments)
        budget = text_arguments.pop("max_new_tokens", None) or self.generation_config.max_new_tokens or MAX_PLAN_TOKENS
        starts_with_text = int(prompt.input_ids[0, -1]) == config.bos_token_id
        sizes = image_sizes(config, prompt, options)
        prefill = self._read(without_dangling_bos(config, prompt), images)
        decision = config.bos_token_id if starts_with_text else int(prefill.logits[0].argmax())
        items, num_images = [], 0
        while True:
            if decision == config.bos_token_id and budget > 0:
                written = self._write(prefill, {**text_arguments, "max_new_tokens": budget})[0]
                budget -= len(written)
                text = self._cut(written, text_arguments)
                items.append(processor.tokenizer.decode(text, skip_special_tokens=True) if processor else text)
                if len(text) == len(written):  # no end of text: out of tokens, or stopped by a criterion
                    return items
                ends = text.new_tensor([decision]), text.new_tensor([first_id(config.eos_token_id)])
                prefill = self._read_text([torch.cat([ends[0], text, ends[1]])], 0, left=False, past=prefill)
            elif decision == config.vision_start_token_id and num_images < max_images:
                latents = self._draw(self._branches(prefill, prefill, sizes), sizes, options)[0]
                image, wanted = self._finish_image(latents, sizes[0], "pil"), options.output_type
                items.append(image if wanted == "pil" else self._finish_image(latents, sizes[0], wanted))
                num_images += 1
                prefill = self._read_back(prefill, image, processor, images)
            else:
                return items
            decision = int(prefill.logits[0].argmax())

    def _read_back(self, prefill: Prefill, image: Image.Image, processor, images: ImageTensors) -> Prefill:
        """A drawn image becomes context: through the VAE (clean), then through the vision tower."""
        config, device = self.config, prefill.prompt.input_ids.device
        image_processor = getattr(processor, "image_processor", None) or stored_image_processor(self)
        inputs = image_processor([image], edited=True, read=config.visual_und, return_tensors="pt").to(device)
        read = ImageTensors.among(inputs)._replace(sample_posterior=images.sample_posterior, generator=images.generator)
        rows, columns = latent_grid(config, *inputs["latent_image_sizes"][0].tolist())
        spans = [(config.latent_token_id, rows * columns)]
        if config.visual_und:
            spans.append((config.image_token_id, int(inputs["image_grid_hw"][0].prod())))
        ids = [
            token
            for placeholder, count in spans
            for token in (config.vision_start_token_id, *[placeholder] * count, config.vision_end_token_id)
        ]
        input_ids = torch.tensor([ids], device=device)
        prompt = Prompt.read(config, input_ids, None, *read.sizes)
        return self._read(prompt, read, past=prefill)

    # ---- transformers' hooks

    def _prompt_of(self, input_ids: LongTensor, model_kwargs: dict[str, Any]) -> Prompt:
        """The prompt of a text generation, read at the first use and kept among its arguments for the others."""
        if model_kwargs.get("prompt") is None:
            sizes = ImageTensors.among(model_kwargs).sizes
            model_kwargs["prompt"] = Prompt.read(self.config, input_ids, model_kwargs.get("attention_mask"), *sizes)
        return model_kwargs["prompt"]

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
        return axes_first(self._prompt_of(input_ids, model_kwargs).position_ids)

    def get_rope_index(
        self,
        input_ids: LongTensor,
        attention_mask: torch.Tensor | None = None,
        image_grid_hw: LongTensor | None = None,
        latent_image_sizes: LongTensor | None = None,
    ) -> LongTensor:
        """
        Rotary positions of a prompt, as `forward` takes them. Pass them on when a prompt continues on a cache.

        Args:
            input_ids, attention_mask: (batch, length). image_grid_hw, latent_image_sizes: of its images; only read
                with `mrope_section`.

        Returns:
            (batch, length): one per text token, one per image with its boundaries; 0 for padding. With
            `mrope_section` (3, batch, length) time, height and width, see the tables in `layout_bagel.py`.

        Raises:
            ValueError: images that `input_ids` mark and the sizes describe differently.
        """
        if self.config.multimodal_positions:
            prompt = Prompt.read(self.config, input_ids, attention_mask, image_grid_hw, latent_image_sizes)
            return axes_first(prompt.position_ids)
        valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        return find_placeholders(self.config, input_ids).positions(valid)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        is_first_iteration=False,
        sample_posterior=None,
        generator=None,
        prompt=None,
        **kwargs,
    ):
        """Images go in with the prompt only; afterwards their keys and values are in the cache."""
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        cache = kwargs.get("past_key_values")
        decoding = not is_first_iteration and kwargs.get("use_cache", True)
        if decoding and cache is not None and (inputs["input_ids"].shape[1] == 1 or cache.get_seq_length() > 0):
            for name in IMAGE_INPUTS:
                inputs.pop(name, None)
        else:  # an assistant's first call, or no cache at all
            inputs.update({name: kwargs[name] for name in IMAGE_INPUTS if kwargs.get(name) is not None})
            given = inputs["input_ids"]
            if prompt is not None and given is not None and given.shape[1] <= prompt.input_ids.shape[1]:
                inputs["prompt"] = prompt
            inputs |= {"sample_posterior": sample_posterior, "generator": generator}
        return inputs

    def create_masks_for_generate(self, config, inputs_embeds, attention_mask, past_key_values, **kwargs):
        """For static caches: a prompt's mask follows from its layout, in `forward`; later steps are plain text."""
        if kwargs.get("is_first_iteration", False) or inputs_embeds.shape[1] > 1:
            return attention_mask
        return create_causal_mask(config.get_text_config(), inputs_embeds, attention_mask, past_key_values)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Beams and several answers: images are repeated with the row that holds them."""
        images = ImageTensors.among(model_kwargs)
        if expand_size == 1 or input_ids is None:
            return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        rows = [row for row in range(input_ids.shape[0]) for _ in range(expand_size)]
        repeated = {}
        if not images.empty:
            prompt, images = self._prompt_of(input_ids, model_kwargs).select(rows, images)
            repeated = {"prompt": prompt, **images.tensors()}
        positions = model_kwargs.pop("position_ids", None)
        if positions is not None:  # transformers 5.17 knows one form only
            repeated["position_ids"] = positions.repeat_interleave(expand_size, dim=positions.ndim - 2)
        others = {name: value for name, value in model_kwargs.items() if name not in (*IMAGE_INPUTS, "prompt")}
        input_ids, others = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **others)
        return input_ids, {**others, **repeated}

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        """Placeholders of images are no words: the model never writes them."""
        processors = super()._get_logits_processor(*args, **kwargs)
        vocab_size = self.config.text_config.vocab_size
        placeholders = [id for id in (self.config.image_token_id, self.config.latent_token_id) if id < vocab_size]
        if placeholders:
            processors.insert(0, SuppressTokensLogitsProcessor(placeholders, device=str(self.device)))
        return processors


def image_sizes(config, prompt: Prompt, options: DrawingOptions) -> list[tuple[int, int]]:
    """(height, width) per sample: asked for, else that of the last image to edit, else the default."""
    batch_size, stride = len(prompt.valid), config.latent_downsample
    side = min(DEFAULT_SIDE, config.max_latent_size * stride)
    sizes = [(side, side)] * batch_size
    for row, (rows, columns) in zip(prompt.image_rows(prompt.placeholders.latent), prompt.latent_grids):
        sizes[row] = (rows * stride, columns * stride)
    asked = []
    for name, index in (("height", 0), ("width", 1)):
        value = getattr(options, name)
        values = [value] * batch_size if value is None or isinstance(value, int) else list(value)
        if len(values) != batch_size:
            raise ValueError(f"{name} holds {len(values)} values for {batch_size} samples.")
        asked.append([int(v) if v is not None else size[index] for v, size in zip(values, sizes)])
    sizes = list(zip(*asked))
    for size in sizes:
        latent_grid(config, *size)
    return sizes


def without_dangling_bos(config, prompt: Prompt) -> Prompt:
    """
    The prompt without a bos at its end, the start of a text answer.

    Raises:
        ValueError: nothing else is there.
    """
    prompt = prompt.without_last(config.bos_token_id)
    if bool((~prompt.valid.any(1)).any()):
        raise ValueError(f"Prompt {int((~prompt.valid.any(1)).nonzero()[0])} is empty: it holds only a bos token.")
    return prompt


def stored_image_processor(model) -> Any:
    """The image processor in the model's own folder."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(model.config._name_or_path, trust_remote_code=True).image_processor
    except (OSError, ValueError) as error:
        raise ValueError(
            "Drawn images are read back by a processor, and this model's folder has none: pass processor=..., the one "
            "that made the prompt."
        ) from error


def pad_texts(texts: Sequence[LongTensor], padding_id: int, left: bool) -> tuple[LongTensor, BoolTensor]:
    """Texts of different lengths as (batch, longest), and which of it is no padding."""
    side = "left" if left else "right"
    lengths = torch.tensor([len(text) for text in texts], device=texts[0].device)
    padded = nn.utils.rnn.pad_sequence(list(texts), batch_first=True, padding_value=padding_id, padding_side=side)
    index = torch.arange(padded.shape[1], device=padded.device)[None]
    return padded, index >= (padded.shape[1] - lengths)[:, None] if left else index < lengths[:, None]


def pad_to(mask: BoolTensor, other: BoolTensor) -> BoolTensor:
    """Append `False` columns up to the length of `other`."""
    return nn.functional.pad(mask, (0, other.shape[1] - mask.shape[1]))


def first_id(token_id: int | list[int] | None) -> int:
    assert token_id is not None
    return token_id[0] if isinstance(token_id, list) else token_id
