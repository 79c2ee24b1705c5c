# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""VAE posteriors of training images, kept in memory: the VAE is frozen, so an image that comes again in a later epoch
need not be encoded again. It knows tensors, not the model.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch


PIXELS_OF_GROUP = 256 * 256
Posterior = tuple[torch.Tensor, torch.Tensor]  # mean and standard deviation, (z_channels, h, w)


class LatentCache:
    """
    A bounded store of posteriors, found by the pixels of their images. Latents are still sampled anew from them.

    Images that are not stored are encoded in groups of one size, filled up with zeros, whose number follows from that
    size: so a posterior does not depend, through rounding, on which images are encoded together.

    Nothing stored is ever replaced. With a store smaller than the data set, epochs in the same order would never find
    an image again if the oldest were replaced.

    Args:
        max_bytes: of all stored posteriors; images beyond are encoded whenever they come.
    """

    def __init__(self, max_bytes: float):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.kept: dict[bytes, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.kept)

    def posteriors(
        self, images: Sequence[torch.Tensor], encode: Callable[[Sequence[torch.Tensor]], list[Posterior]]
    ) -> list[Posterior]:
        """Mean and standard deviation for every image (3, h, w); `encode` makes those that are not stored."""
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
        stored = [found[key].to(image.device) for key, image in zip(keys, images)]
        return [(mean, deviation) for mean, deviation in stored]


def picture_key(image: torch.Tensor) -> bytes:
    """A digest of pixels, shape and dtype."""
    digest = hashlib.blake2b(f"{image.dtype} {tuple(image.shape)}".encode(), digest_size=16)
    digest.update(image.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()
