# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What the VAE makes of pictures, kept in memory for training: the VAE is frozen, so a picture that comes again in a
later epoch need not be encoded again. Knows tensors, not the model.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch


Posterior = tuple[torch.Tensor, torch.Tensor]  # mean and standard deviation, (z_channels, h, w)


class LatentCache:
    """
    Posteriors by the pixels of their pictures; noise is still drawn anew every time.

    A picture that is new is encoded alone, so what is kept does not depend on the pictures beside it. What came first
    stays: with a cache smaller than the data, epochs that read in the same order would find nothing in one that forgets
    the oldest.

    Args:
        max_bytes: of the posteriors; further pictures are encoded whenever they come.
    """

    def __init__(self, max_bytes: float):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.kept: dict[bytes, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.kept)

    def posteriors(
        self, images: Sequence[torch.Tensor], encode: Callable[[Sequence[torch.Tensor]], list[Posterior]]
    ) -> list[Posterior]:
        """Mean and standard deviation of every image; `encode` makes those that are not kept yet, one by one."""
        found = []
        for image in images:
            key = picture_key(image)
            if key not in self.kept:
                mean, std = encode([image])[0]
                size = 2 * mean.numel() * mean.element_size()
                if self.num_bytes + size > self.max_bytes:
                    found.append((mean, std))
                    continue
                self.kept[key] = torch.stack([mean, std]).cpu()
                self.num_bytes += size
            mean, std = self.kept[key].to(image.device)
            found.append((mean, std))
        return found


def picture_key(image: torch.Tensor) -> bytes:
    """The same for the same pixels in the same shape and type."""
    digest = hashlib.blake2b(f"{image.dtype} {tuple(image.shape)}".encode(), digest_size=16)
    digest.update(image.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()
