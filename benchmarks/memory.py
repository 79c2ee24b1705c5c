# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""How much memory the 7B model takes, computed from its config on the meta device; prints the table of the README.

python benchmarks/memory.py
"""

from pathlib import Path
from typing import Any

import torch

from bagel.configuration_bagel import BagelConfig
from bagel.modeling_bagel import BagelForUnifiedMultimodal


REPOSITORY = Path(__file__).resolve().parent.parent
GB = 1e9
BITS = {"bfloat16": 16, "8-bit": 8, "4-bit": 4}


def count_parameters(stage: int) -> dict[str, int]:
    """Parameters of the decoder's linear layers (which can be quantised), of the VAE (kept in float32), all others."""
    config = BagelConfig.from_pretrained(REPOSITORY, stage=stage)
    with torch.device("meta"):
        model = BagelForUnifiedMultimodal(config)
    linear = sum(
        module.weight.numel()
        for layer in model.language_model.model.layers
        for module in layer.modules()
        if isinstance(module, torch.nn.Linear)
    )
    vae = sum(tensor.numel() for name, tensor in model.state_dict().items() if name.startswith("vae."))
    total = sum(tensor.numel() for tensor in model.state_dict().values())
    return {"linear": linear, "vae": vae, "other": total - linear - vae}


def weight_bytes(counts: dict[str, int], bits: int) -> int:
    """Bytes with the decoder's linear layers at `bits`, the VAE in float32 and all others in bfloat16."""
    return counts["linear"] * bits // 8 + counts["vae"] * 4 + counts["other"] * 2


def cache_bytes_per_token() -> int:
    """Bytes of one token's keys and values in bfloat16."""
    config: Any = BagelConfig.from_pretrained(REPOSITORY).text_config
    head_dim = config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * 2 * config.num_key_value_heads * head_dim * 2


def table() -> str:
    """The README's table, in Markdown."""
    lines = [
        "| what is loaded | parameters | " + " | ".join(f"weights, {name}" for name in BITS) + " |",
        "|---|---|" + "---|" * len(BITS),
    ]
    for stage, name in ((1, "reads only (`stage=1`)"), (2, "reads, draws and edits")):
        counts = count_parameters(stage)
        sizes = " | ".join(f"{weight_bytes(counts, bits) / GB:.1f} GB" for bits in BITS.values())
        lines.append(f"| {name} | {sum(counts.values()) / 1e9:.2f} B | {sizes} |")
    per_token = cache_bytes_per_token()
    tokens = {
        "a question of 1,000 tokens": 1000,
        "a 980 x 980 picture that is read": 70 * 70 + 2,
        "a 1024 x 1024 picture that is edited": 64 * 64 + 2 + 70 * 70 + 2,
    }
    lines += ["", "| context | tokens | cache, bfloat16 |", "|---|---|---|"]
    lines += [f"| {name} | {count:,} | {count * per_token / GB:.2f} GB |" for name, count in tokens.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
