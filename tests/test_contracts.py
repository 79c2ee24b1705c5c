# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What users of transformers take for granted of any model: arguments, names, caches, losses, saving."""

import pytest
import torch
from tiny_models import padded_batch, tiny_model

from bagel import decoder_bagel


pytestmark = pytest.mark.core

READ = [("vit", 2, 3), ("text", 4)]
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}


def reads(*conversations) -> dict[str, torch.Tensor]:
    return padded_batch(conversations or [READ, READ], 0)


# ---- positions and placeholders


def test_positions_that_were_never_trained_get_one_warning(monkeypatch):
    said = []
    monkeypatch.setattr(decoder_bagel.logger, "warning_once", said.append)
    model = tiny_model()
    limit = model.config.text_config.max_position_embeddings
    with torch.no_grad():
        logits = model(input_ids=torch.full((1, limit + 1), 50)).logits
    assert logits.isfinite().all()
    assert len(said) == 1 and f"position {limit}" in said[0] and "max_position_embeddings" in said[0]


def test_image_ids_without_pixels_are_words_like_any_other():
    """As in Qwen2.5-VL, whose forward looks for marks only where pixels come with them."""
    model, inputs = tiny_model(), reads()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        said = model(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(said, model(inputs_embeds=embeds, attention_mask=mask).logits)


def test_one_position_per_token_serves_all_three_axes():
    model, inputs = tiny_model(text_config=MROPE), reads()
    positions = torch.arange(inputs["input_ids"].shape[1])[None].expand_as(inputs["input_ids"])
    with torch.no_grad():
        flat = model(**inputs, position_ids=positions).logits
        assert torch.equal(flat, model(**inputs, position_ids=positions[None].expand(3, -1, -1)).logits)
