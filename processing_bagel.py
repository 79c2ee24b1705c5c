# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Conversations in, model inputs or training packs out, and generated ids or pictures back.

It knows the prompt format (spans of text, placeholders of images) and the facts of a model that packing needs. It knows
nothing of attention or experts: the model derives those from `input_ids` and the image tensors, and positions too,
unless they are wanted here.

A prompt, with one `t` per text token, `l` per placeholder of a VAE latent and `i` per placeholder of a ViT patch:

    <|im_start|>ttt<|im_end|>                                                                a text
    <|vision_start|>iiii<|vision_end|>                                                       an image that is read
    <|vision_start|>llllll<|vision_end|><|vision_start|>iiii<|vision_end|>                   an image that is edited
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorChatTemplateKwargs, ProcessorMixin
from transformers.utils import cached_file

from .configuration_bagel import BagelConfig
from .conversations_bagel import ConversationCollator, conversation_items
from .image_processing_bagel import REFUSED, SETTINGS, flatten_images, unit_tensor_to_pil, without_refused
from .layout_bagel import LongTensor, Placeholders
from .packing_bagel import MODEL_FACTS, PackingConfig, RandomSource


# What the checkpoint was trained with when it thinks before it answers or draws; `chat_template.jinja` repeats them.
ANSWER_SYSTEM_PROMPT = (
    "You should first think about the reasoning process in the mind and then provide the user with the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, i.e. "
    "<think> reasoning process here </think> answer here"
)
IMAGE_SYSTEM_PROMPT = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, i.e. "
    "<think> planning process here </think> image here"
)

GENERATION_MODES = ("text", "image", "interleaved")

# Keywords that other processors have for text, and what to do instead. None and False ask for nothing.
REFUSED_TEXT = {
    "text_pair": "a prompt is one text: write both into it",
    "text_target": "labels of a conversation come from collator()",
    "text_pair_target": "labels of a conversation come from collator()",
    "is_split_into_words": "a prompt is a string: join its words",
    "return_token_type_ids": "the model has no token types; return_mm_token_type_ids marks images",
    "return_overflowing_tokens": "a prompt is not cut into windows: raise max_length",
    "stride": "a prompt is not cut into windows: raise max_length",
}

# What `apply_chat_template` of transformers takes itself.
CHAT_KWARGS = {"processor_kwargs", "return_tensors", "sanitize_control_tokens"}
CHAT_KWARGS |= ProcessorChatTemplateKwargs.__annotations__.keys() - {"reasoning_effort"}

# transformers puts this before a special token of user text that `sanitize_control_tokens=True` makes plain text.
PLAIN_TEXT_MARK = "\U000f0000"


class BagelProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {  # pyright: ignore[reportGeneralTypeIssues]  # how transformers' ProcessingKwargs takes defaults
        "text_kwargs": {"padding": True, "padding_side": "left", "return_tensors": "pt"},
        "images_kwargs": {"return_tensors": "pt"},
    }


class BagelProcessor(ProcessorMixin):
    """Turns conversations, or texts with image placeholders, into what `BagelForUnifiedMultimodal` takes.

    Args:
        image_processor: a `BagelImageProcessor`.
        tokenizer: the released (Qwen2.5) tokenizer, or any that has its seven special tokens.
        chat_template: the contents of `chat_template.jinja`; `from_pretrained` finds it.
        return_position_ids: also return `position_ids` (3, texts, longest) time, height and width, for models with
            `mrope_section`. Such a model counts the same ones itself when it gets none; packs for it need them.
        model_facts: what packs need to know of the model beside that: `vit_max_num_patch_per_side`,
            `max_latent_size`, `interpolate_pos`, `visual_und`, `visual_gen` and the three `*_cond_dropout_prob` of its
            config. `from_pretrained` takes those that are not stored from `config.json`; what is known nowhere is as
            released.

    Raises:
        ValueError: the tokenizer lacks a special token, or `model_facts` holds something else.
    """

    valid_processor_kwargs = BagelProcessorKwargs
    attributes: ClassVar[list[str]] = ["image_processor", "tokenizer"]
    tokenizer_class = "AutoTokenizer"

    # A text span is delimited by these two whatever the tokenizer calls its own bos and eos.
    bos_token = "<|im_start|>"
    eos_token = "<|im_end|>"
    vision_start_token = "<|vision_start|>"
    vision_end_token = "<|vision_end|>"
    image_token = "<|image_pad|>"  # stands for a ViT token
    latent_token = "<|vision_pad|>"  # stands for a VAE-latent token

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        return_position_ids: bool = False,
        model_facts: Mapping[str, Any] | None = None,
        **kwargs,
    ) -> None:
        self.return_position_ids = return_position_ids
        self._disagreement = ""
        self.model_facts = dict(model_facts or {})
        if unknown := sorted(self.model_facts.keys() - set(MODEL_FACTS)):
            raise ValueError(f"model_facts has no {', '.join(unknown)}; it has {', '.join(MODEL_FACTS)}")
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.bos_token_id = _token_id(tokenizer, self.bos_token)
        self.eos_token_id = _token_id(tokenizer, self.eos_token)
        self.vision_start_token_id = _token_id(tokenizer, self.vision_start_token)
        self.vision_end_token_id = _token_id(tokenizer, self.vision_end_token)
        self.image_token_id = _token_id(tokenizer, self.image_token)
        self.latent_token_id = _token_id(tokenizer, self.latent_token)
        self.image_token_ids = [self.image_token_id, self.latent_token_id]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        **kwargs,
    ) -> "BagelProcessor":
        """As in transformers. Where `config.json` of the same folder disagrees with what is stored here, making packs
        is refused, with both values. Arguments given here count, whatever it says.
        """
        hub = {
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
            "revision": revision,
        }
        loaded = super().from_pretrained(pretrained_model_name_or_path, **hub, **kwargs)
        config = stored_model_config(pretrained_model_name_or_path, subfolder=kwargs.get("subfolder", ""), **hub)
        if config is not None:
            processor = loaded[0] if isinstance(loaded, tuple) else loaded
            facts = {name: getattr(config, name) for name in MODEL_FACTS}
            if not processor.model_facts and "return_position_ids" not in kwargs:  # saved before there were any
                processor.return_position_ids = processor.return_position_ids or config.multimodal_positions
            processor.model_facts = facts | processor.model_facts
            processor._disagreement = processor.packing_config.differences(config, unchecked=_facts_given(kwargs))
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> list[str]:
        """As in transformers; saving leaves no trace on the processor itself."""
        saved = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        vars(self).pop("auto_map", None)
        return saved

    @property
    def model_input_names(self) -> list[str]:
        """Of a prompt whose image is read. An image that is edited adds the `latent_*` of the image processor."""
        positions = ["position_ids"] if self.return_position_ids else []
        names = [name for name in self.image_processor.model_input_names if not name.startswith("latent")]
        return ["input_ids", "attention_mask", *positions, *names]

    # ----------------------------------------------------------------------------------------------------------------
    # Texts and images to tensors

    def __call__(self, images: Any = None, text: str | list[str] | None = None, **kwargs) -> BatchFeature:
        """Prepare texts whose images are marked by placeholders, and those images.

        In the text, `<|image_pad|>` stands for an image that is read, `<|vision_pad|><|image_pad|>` for one image that
        is edited (seen by the VAE, then by the ViT), a lone `<|vision_pad|>` for one that only the VAE sees. Each
        placeholder may be written with its `<|vision_start|>` and `<|vision_end|>`; they are added where they are not.

        The text is taken as it is: without `<|im_start|>` and `<|im_end|>` around each piece of text it is not a prompt
        the model was trained on. `apply_chat_template` writes them; use it unless you write prompts by hand.

        Args:
            images: one image, a flat list over all texts in reading order, or one list per text.
            text: a prompt or a batch of them. Without any, only the image tensors are returned.
            kwargs: of the tokenizer (`padding`, by default True and on the left, `max_length`, `truncation`,
                `return_tensors`, by default "pt", ...) and of the image processor (its settings), flat or in
                `text_kwargs`, `images_kwargs` and `common_kwargs`. Those that say how videos and sounds are read have
                nothing to act on, since there can be none.

        Returns:
            `input_ids` and `attention_mask` (texts, longest), and what `BagelImageProcessor.preprocess` returns; with
            `return_position_ids` also `position_ids` (3, texts, longest), with `return_mm_token_type_ids=True` also
            `mm_token_type_ids` (texts, longest), 1 at the placeholders of images.

        Raises:
            ValueError: the prompt is empty, images and placeholders do not match, truncation would cut an image, or a
                keyword cannot act.
            TypeError: an unknown keyword.
        """
        _check_nothing_else(kwargs)
        known = _known_kwargs(self.image_processor)
        kwargs = _checked_keywords(kwargs, known)
        # The side that a tokenizer was saved with must not override the one that generation needs.
        defaults = {name: value for name, value in self.tokenizer.init_kwargs.items() if name != "padding_side"}
        kwargs_class: Any = self.valid_processor_kwargs  # a class, declared as an instance in transformers
        merged = self._merge_kwargs(kwargs_class, defaults, **kwargs)
        text_kwargs, images_kwargs = (
            {name: value for name, value in merged[group].items() if name in known[group] - REFUSED_TEXT.keys()}
            for group in ("text_kwargs", "images_kwargs")
        )
        return_tensors = text_kwargs.pop("return_tensors", None)
        return_replacements = text_kwargs.pop("return_text_replacement_offsets", False)
        return_types = text_kwargs.pop("return_mm_token_type_ids", False)

        if text is None:
            if images is None or not flatten_images(images):
                raise ValueError("the prompt is empty: pass text, images or both")
            return self.image_processor(images, **images_kwargs)

        texts = _checked_texts(text)
        if {"edited", "read"} & images_kwargs.keys():
            raise ValueError("with text, its placeholders say which images are edited and read: drop edited and read")
        groups = [list(_IMAGE_GROUP.finditer(text)) for text in texts]
        images = _match_images(images, [len(matches) for matches in groups])
        edited = [bool(match["latent"]) for matches in groups for match in matches]
        read = [bool(match["read"] or match["both"]) for matches in groups for match in matches]
        features = {}
        if images:
            images_kwargs |= {"return_tensors": "pt", "edited": edited, "read": read}
            features = self.image_processor(images, **images_kwargs)

        spans = [self.replace_image_token(features, index, edited, read) for index in range(len(edited))]
        texts, offsets = self.get_text_with_replacements(texts, spans)
        text_kwargs |= {"add_special_tokens": False, "return_token_type_ids": False}
        encoded = self.tokenizer(texts, **text_kwargs)
        _check_images_are_whole(self, texts, encoded["input_ids"])
        data = {**encoded, **features}
        if self.return_position_ids:
            data["position_ids"] = _position_ids(self, encoded, features)
        if return_replacements:  # transformers asks for them to place assistant masks
            data["text_replacement_offsets"] = offsets
        if return_types:
            data["mm_token_type_ids"] = [[int(i in self.image_token_ids) for i in row] for row in encoded["input_ids"]]
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=self.skip_tensor_conversion)

    def replace_image_token(
        self,
        image_inputs: Mapping[str, Any],
        image_idx: int,
        edited: bool | Sequence[bool] = False,
        read: bool | Sequence[bool] = True,
        **kwargs,
    ) -> str:
        """What stands in the prompt for an image: its placeholders, one per token, between those of its boundary.

        Args:
            image_inputs: what the image processor returned for all images.
            image_idx: number of the image.
            edited, read: as the image processor was given them.
        """
        span = ""
        for token, sizes, side, flags in (
            (self.latent_token, "latent_image_sizes", self.image_processor.latent_stride, edited),
            (self.image_token, "image_grid_hw", 1, read),
        ):
            flags = [flags] * (image_idx + 1) if isinstance(flags, bool) else flags
            if flags[image_idx]:
                size = image_inputs[sizes][sum(flags[:image_idx])]  # of those that have this view
                span += self.vision_start_token + token * int((size // side).prod()) + self.vision_end_token
        return span

    def get_text_with_replacements(
        self, text: list[str], images_replacements: Sequence[str] = (), *others: Sequence[str]
    ) -> tuple[list[str], list[list[dict[str, Any]]]]:
        """Texts with `replace_image_token` of each image at its placeholders, and where these were and are."""
        spans = iter(images_replacements)
        rows = [_replaced(one, _IMAGE_GROUP.finditer(one) if images_replacements else (), spans) for one in text]
        return [one for one, _ in rows], [offsets for _, offsets in rows]

    def _get_num_multimodal_tokens(self, image_sizes: Sequence[tuple[int, int]] = (), **kwargs) -> MultiModalData:
        """How many placeholders images take, without the images: what inference servers plan by.

        Args:
            image_sizes: (height, width) of each.
            kwargs: as of a call without text: `edited`, `read` and settings of the image processor.
        """
        kwargs = _checked_keywords(kwargs, _known_kwargs(self.image_processor))
        kinds: Any = self.valid_processor_kwargs  # a class, which transformers declares as an instance
        options = self._merge_kwargs(kinds, **kwargs)["images_kwargs"]
        settings = {name: options[name] for name in SETTINGS if name in options}
        edited, read, sees = options.get("edited", False), options.get("read", True), self.image_processor
        patches = [sees.get_number_of_image_patches(*size, settings, edited) if read else 0 for size in image_sizes]
        latents = [sees.get_number_of_latent_patches(*size, settings) if edited else 0 for size in image_sizes]
        return MultiModalData(num_image_tokens=[*map(sum, zip(patches, latents))], num_image_patches=patches)

    # ----------------------------------------------------------------------------------------------------------------
    # Conversations to prompts

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        *,
        generation_mode: str = "text",
        think: bool = False,
        edit: bool | None = None,
        add_generation_prompt: bool | None = None,
        **kwargs,
    ) -> str | list[str] | BatchFeature:
        """Write a conversation, or a batch of them, as a prompt, and with `tokenize=True, return_dict=True` as inputs.

        A message's `content` is a string or a list of `{"type": "text", "text": ...}` and `{"type": "image", ...}` with
        the image under "image", "url", "path" or "base64". Each text becomes a span of its own; roles are not written,
        since the model knows none. Special tokens inside a text keep their meaning (pass `sanitize_control_tokens=True`
        for text you do not trust, where transformers has it).

        Args:
            generation_mode: what `generate` will be asked for. "text": images are read, and the prompt ends with the
                bos of the answer. "image": images are edited (seen by VAE and ViT) and nothing is appended.
                "interleaved": images are edited, and the prompt ends with bos. Images in assistant messages were drawn
                by the model and are seen by VAE and ViT in every mode.
            think: put the released system prompt first that asks for a plan before the answer or the picture.
            edit: whether images are edited (True) or only read (False), against what `generation_mode` says.
            add_generation_prompt: append bos. By default where the last message is not the assistant's; never in
                mode "image".
            kwargs: of transformers' `apply_chat_template`: `tokenize`, `return_dict`, `return_tensors`,
                `continue_final_message`, `return_assistant_tokens_mask` (texts of the assistant, each with its eos),
                `processor_kwargs` (keywords of `__call__`), ...

        Raises:
            ValueError: a conversation cannot be written, or tools or documents are given, which the template lacks.
            TypeError: an unknown keyword.
        """
        if generation_mode not in GENERATION_MODES:
            raise ValueError(f"generation_mode is one of {', '.join(GENERATION_MODES)}, not {generation_mode!r}")
        last_roles = {_last_role(chat) for chat in _conversations(conversation)}
        _check_template_takes(self, chat_template, conversation, kwargs)
        if generation_mode == "image":
            add_generation_prompt = False
        elif kwargs.get("continue_final_message"):
            add_generation_prompt = bool(add_generation_prompt)  # transformers refuses both
        elif add_generation_prompt is None:
            add_generation_prompt = "assistant" not in last_roles
            if not add_generation_prompt and len(last_roles) > 1:
                raise ValueError("only some conversations end with the assistant: pass add_generation_prompt")

        # Only what differs from the template's defaults, so that a template without these variables works too.
        variables = {"generation_mode": generation_mode, "think": think, "edit": edit}
        defaults = {"generation_mode": "text", "think": False, "edit": None}
        kwargs |= {name: value for name, value in variables.items() if value != defaults[name]}
        return super().apply_chat_template(
            conversation, chat_template, add_generation_prompt=add_generation_prompt, **kwargs
        )

    # ----------------------------------------------------------------------------------------------------------------
    # Conversations to training packs

    def pack(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        rng: RandomSource | None = None,
        max_num_tokens: int | None = None,
        **options,
    ) -> dict[str, Any]:
        """One training pack: `model(**processor.pack(rows)).loss.backward()`.

        Args:
            rows: conversations, `{"messages": [...], "images": [...]}`, see `conversations_bagel`. The assistant's
                texts are trained with cross-entropy, its images with flow matching; the rest is context.
            rng: where dropout and timesteps come from, e.g. `numpy.random.default_rng(0)`. By default they follow
                torch's global generator.
            max_num_tokens: the most tokens that the pack may have.
            options: of `ConversationCollator`: `decisions`, `share_max_pixels`, `image_settings`, `image_folder`,
                `pad_to`, `nested_masks`, and any field of `packing_config`, e.g. `text_cond_dropout_prob=0.0`.

        Raises:
            ValueError: a row cannot be used, or does not fit. `skip=True` leaves it out, as `collator` does.
            TypeError: an unknown keyword.
        """
        options = {"skip": False, "rng": rng, "max_num_tokens": max_num_tokens, **options}
        return ConversationCollator(self, **options)([rows] if isinstance(rows, Mapping) else rows)

    def collator(self, **options) -> ConversationCollator:
        """What `Trainer` takes as `data_collator`: a list of rows becomes a pack, rows that cannot be used are counted.

        Args:
            options: as in `pack`, and `report`; see `ConversationCollator`.
        """
        return ConversationCollator(self, **options)

    @property
    def packing_config(self) -> PackingConfig:
        """The facts of the model that packs are made by.

        Raises:
            ValueError: the `config.json` that this processor was loaded beside says something else.
        """
        if self._disagreement:
            raise ValueError(self._disagreement)
        return PackingConfig(
            bos_token_id=self.bos_token_id,
            eos_token_id=self.eos_token_id,
            vision_start_token_id=self.vision_start_token_id,
            vision_end_token_id=self.vision_end_token_id,
            image_token_id=self.image_token_id,
            latent_token_id=self.latent_token_id,
            vit_patch_size=self.image_processor.patch_size,
            latent_downsample=self.image_processor.latent_stride,
            multimodal_positions=self.return_position_ids,
            **self.model_facts,
        )

    def check_model(self, config: BagelConfig) -> None:
        """
        Raises:
            ValueError: the config of a model says something else than `packing_config`; both values are named.
        """
        self.packing_config.check_model(config)

    def follow_model(self, config: BagelConfig) -> None:
        """Take over what `model.config` says, where it was loaded with other settings than were stored.

        Raises:
            ValueError: token ids or patch sizes differ, which belong to tokenizer and image processor.
        """
        self._disagreement = ""
        self.packing_config.check_model(config, unchecked=(*MODEL_FACTS, "multimodal_positions"))
        self.return_position_ids = config.multimodal_positions
        self.model_facts = {name: getattr(config, name) for name in MODEL_FACTS}

    # ----------------------------------------------------------------------------------------------------------------
    # Generated outputs to texts and pictures

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **kwargs,
    ) -> list[str] | list[Image.Image] | list[list[str | Image.Image]]:
        """What `generate` returned, as people read it.

        Args:
            generated_outputs: mode None or "text": token ids (samples, tokens) or one sample's; "image": pictures, or
                pixel tensors (3, H, W) in [0, 1]; "interleaved": per sample a list of token ids and of those.
            kwargs: of the tokenizer's `decode`.

        Returns:
            Texts, pictures, or per sample a list of both.
        """
        if generation_mode in (None, "text"):
            return self.post_process_image_text_to_text(generated_outputs, skip_special_tokens, **kwargs)
        if generation_mode == "image":
            return [_to_picture(picture) for picture in flatten_images(generated_outputs)]
        if generation_mode == "interleaved":
            decode = {"skip_special_tokens": skip_special_tokens, **kwargs}
            return [[_readable(self.tokenizer, item, decode) for item in sample] for sample in generated_outputs]
        raise ValueError(f"generation_mode is one of {', '.join(GENERATION_MODES)}, not {generation_mode!r}")

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs
    ) -> list[str]:
        """Token ids (samples, tokens), or one sample's, as texts."""
        if hasattr(generated_outputs, "tolist"):
            generated_outputs = generated_outputs.tolist()
        if len(generated_outputs) and isinstance(generated_outputs[0], int):
            generated_outputs = [generated_outputs]
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)


def _image_group_pattern() -> re.Pattern:
    """One image of a prompt: the latent token with or without the image token right behind it, or the latter alone."""
    start, end = re.escape(BagelProcessor.vision_start_token), re.escape(BagelProcessor.vision_end_token)
    latent, image = (
        f"(?:{start})?(?<!{PLAIN_TEXT_MARK}){re.escape(token)}(?:{end})?"
        for token in (BagelProcessor.latent_token, BagelProcessor.image_token)
    )
    return re.compile(f"(?P<latent>{latent})(?P<both>{image})?|(?P<read>{image})")


_IMAGE_GROUP = _image_group_pattern()

_SAME_NUMBER = "The image tokens in the prompts should be the same as the number of images."  # as transformers says it


def _token_id(tokenizer: Any, token: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    if token_id is None or tokenizer.convert_ids_to_tokens(token_id) != token:
        raise ValueError(f"the tokenizer has no {token}: use the one released with BAGEL, or add it as a special token")
    return token_id


def _known_kwargs(image_processor: Any) -> dict[str, set[str]]:
    """Names of each group. Without a video or a sound, those that say how it is read have nothing to act on."""
    groups = ("text_kwargs", "videos_kwargs", "audio_kwargs")
    known = {group: set(ProcessingKwargs.__annotations__[group].__annotations__) for group in groups}
    known["videos_kwargs"] |= {"load_audio_from_video", "audio_from_video_indices"}
    return known | {"images_kwargs": set(image_processor.valid_kwargs.__annotations__)}


def _checked_keywords(kwargs: Mapping[str, Any], known: Mapping[str, set[str]]) -> dict[str, Any]:
    """The keywords, with those of `common_kwargs` in each group that has them and says nothing else.

    Raises:
        TypeError: an unknown keyword, flat or in a group.
        ValueError: one that cannot act, and asks for something.
    """
    flat = {name: value for name, value in kwargs.items() if name not in known and name != "common_kwargs"}
    groups = {name: kwargs.get(name) or {} for name in (*known, "common_kwargs")}
    everywhere = set().union(*known.values())
    unknown = {name for group, given in groups.items() for name in given.keys() - known.get(group, everywhere)}
    if unknown := sorted(unknown | flat.keys() - everywhere):
        usual = sorted((known["text_kwargs"] | known["images_kwargs"]) - REFUSED.keys() - REFUSED_TEXT.keys())
        raise TypeError(f"BagelProcessor has no keyword {', '.join(unknown)}; it has {', '.join(usual)}")
    for given in (flat, groups["common_kwargs"], groups["text_kwargs"], groups["images_kwargs"]):
        without_refused(given, REFUSED | REFUSED_TEXT)
    common = {name: value for name, value in groups["common_kwargs"].items() if name not in flat}
    for group in known if common else ():
        groups[group] = {name: common[name] for name in common.keys() & known[group]} | groups[group]
    return flat | {group: groups[group] for group in known if groups[group]}


def _check_nothing_else(kwargs: dict[str, Any]) -> None:
    """Take videos and sounds out of the keywords, if they are none: transformers passes None and empty lists."""
    for name in ("videos", "audio", "audios"):
        given = kwargs.pop(name, None)
        if any(item is not None and 0 not in getattr(item, "shape", ()) for item in flatten_images(given)):
            raise ValueError(f"BAGEL takes text and images, no {name}: pass frames of a video as images")


def _checked_texts(text: str | list[str]) -> list[str]:
    texts = [text] if isinstance(text, str) else list(text)
    if not texts or not all(isinstance(prompt, str) for prompt in texts):
        raise ValueError(f"text is a string or a list of strings, got {text!r}")
    for index, prompt in enumerate(texts):
        if not prompt.replace(BagelProcessor.bos_token, "").replace(BagelProcessor.eos_token, "").strip():
            raise ValueError(f"the prompt is empty (text {index} of {len(texts)}): it needs words or an image")
    return texts


def _match_images(images: Any, counts: list[int]) -> list:
    """All images in reading order, given how many each text has placeholders for."""
    images = [] if images is None else images
    if isinstance(images, list | tuple) and any(isinstance(item, list | tuple) for item in images):
        rows = [[] if row is None else flatten_images(row) for row in images]
        if len(rows) != len(counts):
            raise ValueError(
                f"{len(counts)} texts but lists of images for {len(rows)}: pass one list per text. {_SAME_NUMBER}"
            )
        for index, (row, count) in enumerate(zip(rows, counts)):
            if len(row) != count:
                raise _mismatch(f"text {index}", count, len(row))
        return flatten_images(rows)
    images = flatten_images(images)
    if len(images) != sum(counts):
        raise _mismatch("the text", sum(counts), len(images))
    return images


def _check_images_are_whole(processor: BagelProcessor, texts: list[str], input_ids: list[list[int]]) -> None:
    boundary = [processor.vision_start_token_id, processor.vision_end_token_id]
    for kind in ("latent", "image"):
        token, token_id = getattr(processor, f"{kind}_token"), getattr(processor, f"{kind}_token_id")
        for text, ids in zip(texts, input_ids):
            expected = len(re.findall(f"(?<!{PLAIN_TEXT_MARK}){re.escape(token)}", text))
            kept = [index for index, kept_id in enumerate(ids) if kept_id == token_id]
            ends = kept and ids[kept[0] - 1 : kept[0]] + ids[kept[-1] + 1 : kept[-1] + 2]
            if len(kept) != expected or (kept and ends != boundary):
                raise ValueError(
                    f"truncation cut an image: {len(kept)} of {expected} {token} placeholders are left in "
                    f"{len(ids)} tokens; raise max_length, drop truncation, or shrink the image"
                )


def _position_ids(processor: BagelProcessor, encoded: dict[str, Any], features: BatchFeature | dict) -> LongTensor:
    """(3, texts, longest) time, height and width; `layout_bagel.py` shows them."""
    lengths = {len(ids) for ids in encoded["input_ids"]}
    if len(lengths) > 1:
        raise ValueError(f"texts of {sorted(lengths)} tokens have no common position_ids: pass padding=True")
    input_ids = torch.tensor(encoded["input_ids"])
    valid = torch.tensor(encoded["attention_mask"]) if "attention_mask" in encoded else torch.ones_like(input_ids)
    names = ("image_token_id", "latent_token_id", "vision_start_token_id", "vision_end_token_id")
    marks = (getattr(processor, name) for name in names)
    placeholders = Placeholders.find(input_ids, *marks)
    read, edited = (features.get(name) for name in ("image_grid_hw", "latent_image_sizes"))
    grids = placeholders.merge_grids(
        [] if read is None else read.tolist(),
        [] if edited is None else (edited // processor.image_processor.latent_stride).tolist(),
    )
    return placeholders.positions(valid, grids).movedim(-1, 0)


def _replaced(text: str, matches: Iterable[re.Match], spans: Iterator[str]) -> tuple[str, list[dict[str, Any]]]:
    """The text with a span for each match, and where both are, in characters: in the form of transformers."""
    pieces, offsets, end, shift = [], [], 0, 0
    for match, span in zip(matches, spans):
        new_span = (match.start() + shift, match.start() + shift + len(span))
        fact = {"type": "image", "span": match.span(), "new_span": new_span}
        offsets.append(fact | {"text": match.group(), "replacement": span})
        pieces += [text[end : match.start()], span]
        end = match.end()
        shift = new_span[1] - end
    return "".join(pieces) + text[end:], offsets


def _mismatch(where: str, placeholders: int, images: int) -> ValueError:
    return ValueError(
        f"{where} has placeholders for {placeholders} images, but {images} were given: write "
        f"{BagelProcessor.image_token} where an image is read, "
        f"{BagelProcessor.latent_token}{BagelProcessor.image_token} where one is edited. {_SAME_NUMBER}"
    )


def _conversations(conversation: Any) -> list:
    if not isinstance(conversation, list | tuple) or not conversation:
        raise ValueError(f"a conversation is a list of messages, with at least one; got {conversation!r}")
    return list(conversation) if isinstance(conversation[0], list | tuple) else [conversation]


def _last_role(conversation: Sequence[Mapping[str, Any]]) -> str | None:
    """The role of the last message; a conversation that the template cannot write is refused."""
    for _ in conversation_items(conversation):
        pass
    return conversation[-1].get("role")


def _check_template_takes(processor: BagelProcessor, template: Any, messages: Any, kwargs: Mapping[str, Any]) -> None:
    if isinstance(processor.chat_template, dict):  # templates by name
        template = processor.chat_template.get(template or "default", template)
    template = template or processor.chat_template or ""
    called = any(message.get("tool_calls") for chat in _conversations(messages) for message in chat)
    for name, given in {**kwargs, "tool_calls": called}.items():
        if name in ("tools", "tool_calls", "documents") and given and name not in template:
            raise ValueError(
                f"BAGEL was trained without {name}, and its chat template does not write them: describe them in a "
                "message, or pass a chat_template that does"
            )
    if "generation_mode" in template:  # ours, else transformers finds the template's variables
        others = {name: value for name, value in kwargs.items() if name not in CHAT_KWARGS}
        if thinks := others.keys() & {"enable_thinking", "reasoning_effort"}:
            raise TypeError(f"BagelProcessor has no keyword {', '.join(sorted(thinks))}: think=True asks for a plan")
        _checked_keywords(others, _known_kwargs(processor.image_processor))


def stored_model_config(directory: str | os.PathLike, **hub) -> BagelConfig | None:
    """The config of the model in the folder of a processor, if any; `hub`: keywords of `cached_file`."""
    if os.path.isfile(directory):
        directory = os.path.dirname(directory) or "."
    file = cached_file(
        directory,
        "config.json",
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )
    values = json.loads(Path(file).read_text(encoding="utf-8")) if file is not None else {}
    return BagelConfig.from_dict(values) if values.get("model_type") == BagelConfig.model_type else None


def _facts_given(kwargs: Mapping[str, Any]) -> set[str]:
    """Names of the facts that arguments of `from_pretrained` decide."""
    decided_by = {
        "return_position_ids": "multimodal_positions",
        "patch_size": "vit_patch_size",
        "latent_stride": "latent_downsample",
    }
    return {fact for name, fact in decided_by.items() if name in kwargs} | set(kwargs.get("model_facts") or ())


def _readable(tokenizer: Any, item: Any, decode: dict[str, Any]) -> str | Image.Image:
    if isinstance(item, str):
        return item
    if isinstance(item, Image.Image) or (isinstance(item, torch.Tensor) and item.ndim == 3):
        return _to_picture(item)
    return tokenizer.decode(item, **decode)


def _to_picture(picture: Image.Image | torch.Tensor) -> Image.Image:
    return unit_tensor_to_pil(picture) if isinstance(picture, torch.Tensor) else picture


__all__ = ["BagelProcessor"]


BagelProcessor.register_for_auto_class()
