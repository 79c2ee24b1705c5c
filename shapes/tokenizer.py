# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A small tokenizer of the released kind (Qwen2, byte-level BPE, the same special tokens), trained on a few texts."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast  # type: ignore[attr-defined]


# In the order of the released ids.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
)

CORPUS = (
    "What is in the picture? A small red car in front of a blue house.",
    "Make the car night blue and add a hat to the dog.",
    "a photo of two fish in the sea, the sun behind them",
    "You should first think about the planning process in the mind and then generate the image.",
    "<think> the user wants the picture of a lamp </think> the image shows a lamp on a table",
)


def build_tiny_tokenizer(corpus: list[str] | None = None, vocab_size: int = 512) -> Qwen2TokenizerFast:
    """Train a tokenizer that saves and loads through `AutoTokenizer` like the released one.

    Args:
        corpus: texts to learn merges from; by default a few sentences.
        vocab_size: the most ids, including the 256 bytes and the 7 special tokens (the last ids). With 263 there are
            no merges, and an ASCII text has one token per character.

    Raises:
        ValueError: `vocab_size` is below 263.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} is below {smallest}: all bytes and the special tokens")
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(CORPUS if corpus is None else corpus, trainer)
    model = json.loads(trained.to_str())["model"]

    specials = {token: len(model["vocab"]) + index for index, token in enumerate(SPECIAL_TOKENS)}
    return Qwen2TokenizerFast(
        vocab=model["vocab"] | specials,
        merges=[tuple(merge) for merge in model["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|im_end|>", "<|endoftext|>")],
    )
