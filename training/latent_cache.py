# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What the VAE makes of pictures, kept in memory for training: the VAE is frozen, so a picture that comes again in a
later epoch need not be encoded again. Knows tensors, not the model.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch


PIXELS_OF_GROUP = 256 * 256
Posterior = tuple[torch.Tensor, torch.Tensor]  # mean and standard deviation, (z_channels, h, w)


class LatentCache:
    """
    Posteriors by the pixels of their pictures; noise is still drawn anew every time.

    New pictures are encoded in groups whose size depends on theirs alone, so what is kept does not depend on the
    pictures beside it. What came first stays: with a cache smaller than the data, epochs that read in the same order
    would find nothing in one that forgets the oldest.

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
        """Mean and standard deviation of every image (3, h, w); `encode` makes those that are not kept yet."""
        keys = [picture_key(image) for image in images]
        new = {key: image for key, image in zip(keys, images) if key not in self.kept}
        found = {key: self.kept[key] for key in keys if key in self.kept}
        for shape in dict.fromkeys(image.shape for image in new.values()):
            same = [key for key, image in new.items() if image.shape == shape]
            size = max(1, min(8, PIXELS_OF_GROUP // (shape[-2] * shape[-1])))
            for first in range(0, len(same), size):
                group = same[first : first + size]
                pixels = [new[key] for key in group]
                encoded = encode(pixels + [torch.zeros_like(pixels[0])] * (size - len(group)))
                for key, posterior in zip(group, encoded):
                    found[key] = torch.stack(posterior)
                    if self.num_bytes + found[key].nbytes <= self.max_bytes:
                        self.kept[key] = found[key].cpu()
                        self.num_bytes += found[key].nbytes
        return [tuple(found[key].to(image.device)) for key, image in zip(keys, images)]


def picture_key(image: torch.Tensor) -> bytes:
    """The same for the same pixels in the same shape and type."""
    digest = hashlib.blake2b(f"{image.dtype} {tuple(image.shape)}".encode(), digest_size=16)
    digest.update(image.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()
