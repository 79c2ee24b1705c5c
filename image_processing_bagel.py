# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures in, tensors out: loading, the released resize rule, normalising, patchifying.

It knows nothing of tokens, prompts or the model.

Axes: H, W are pixels; rows, columns count patches; p is the patch side. Pixel tensors are (3, H, W), PIL sizes are
(width, height), and every size that leaves this file in a tensor is (height, width) or (rows, columns).
"""

import base64
import os
import re
import struct
import urllib.request
import zlib
from io import BytesIO
from typing import Any, ClassVar, TypeAlias, TypedDict

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.utils import logging


logger = logging.get_logger(__name__)


ImageSource: TypeAlias = str | os.PathLike | bytes | Image.Image | np.ndarray | torch.Tensor

MAX_INPUT_PIXELS = 178_956_970  # where Pillow itself refuses to decode
MAX_PIXELS = 14 * 14 * 9 * 1024  # of a resized picture, in both released transforms


# --------------------------------------------------------------------------------------------------------------------
# Loading


def rgb_on_white(image: Image.Image) -> Image.Image:
    """The released conversion to RGB.

    Alpha is composited on white for RGBA and for any picture whose file marks a colour or palette entry as transparent.
    Every other mode is converted as Pillow does it, so the alpha of LA is dropped: the checkpoint was trained that way.
    """
    if image.mode != "RGBA" and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, (255, 255, 255))
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def load_image(source: ImageSource, max_input_pixels: int = MAX_INPUT_PIXELS) -> Image.Image:
    """Load a picture as an upright (EXIF orientation applied) RGB PIL image.

    Args:
        source: a path, an http(s) URL, a data URI, base64, the bytes of an image file, a PIL image, or an array or
            tensor: (H, W), (H, W, C) or (C, H, W) with C = 1, 3 or 4, uint8 or float in [0, 1]. Where both layouts fit,
            a tensor is read as (C, H, W) and an array as (H, W, C).
        max_input_pixels: a larger picture is refused once its header is read, before any pixel is decoded.

    Raises:
        OSError: the file is missing, empty, truncated or no picture.
        ValueError: the picture has no pixels or too many, or an array has another shape, dtype or range.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        source = _array_to_pil(source)
    name = _name(source)
    opened = None
    try:
        image = source if isinstance(source, Image.Image) else (opened := _open(source, name))  # reads the header only
        width, height = image.size
        if width * height == 0:
            raise ValueError(f"{name} has no pixels: its size is {width}x{height}")
        if width * height > max_input_pixels:
            raise _too_large(name, f"{width}x{height} = {width * height}", max_input_pixels)
        return _decode(image, name)
    except Image.DecompressionBombError as error:  # its message starts with the number of pixels
        raise _too_large(name, "".join(re.findall(r"\d+", str(error))[:1]), max_input_pixels) from error
    finally:
        if opened is not None:
            opened.close()


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        return rgb_on_white(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, EOFError, struct.error, zlib.error) as error:
        raise OSError(f"{name} is truncated or damaged: {error}") from error


def _open(source: str | os.PathLike | bytes, name: str) -> Image.Image:
    file = _find(source, name)
    if (file.getbuffer().nbytes if isinstance(file, BytesIO) else os.path.getsize(file)) == 0:
        raise OSError(f"{name} is empty (0 bytes)")
    try:
        return Image.open(file)
    except Image.UnidentifiedImageError as error:
        raise OSError(f"{name} is not a picture Pillow can read, or is truncated within its header") from error


def _find(source: str | os.PathLike | bytes, name: str) -> str | os.PathLike | BytesIO:
    """What `Image.open` takes: a path that exists, or bytes."""
    if isinstance(source, bytes):
        return BytesIO(source)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"a picture is a path, URL, base64, bytes, PIL image, array or tensor, not {type(source)}")
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        return BytesIO(_download(source))
    if isinstance(source, str) and source.startswith("data:"):
        return BytesIO(_from_base64(source.partition(",")[2]))
    if os.path.exists(source):
        return source
    # File names can be valid base64 as well, but not of anything that starts like a picture.
    decoded = _from_base64(str(source))
    try:
        Image.open(BytesIO(decoded)).close()
    except Image.UnidentifiedImageError as error:
        raise FileNotFoundError(f"no such picture file: {name}") from error
    return BytesIO(decoded)


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        return b""  # the caller reports an empty or missing picture by its name


def _download(url: str) -> bytes:
    # Some picture hosts turn away clients that do not name themselves.
    request = urllib.request.Request(url, headers={"User-Agent": "bagel-transformers"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read()
    except OSError as error:
        raise OSError(f"cannot download {url}: {error}") from error


def _name(source: Any) -> str:
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or "the picture"
    if isinstance(source, bytes):
        return "the picture"
    text = str(source)
    return text if len(text) <= 200 else f"{text[:50]}..."  # base64


def _too_large(name: str, pixels: str, max_input_pixels: int) -> ValueError:
    return ValueError(
        f"{name} has {pixels} pixels, more than max_input_pixels={max_input_pixels}: shrink it first, or raise "
        "max_input_pixels (and PIL.Image.MAX_IMAGE_PIXELS) if you trust it"
    )


def _array_to_pil(array: np.ndarray | torch.Tensor) -> Image.Image:
    channels_first_wins = isinstance(array, torch.Tensor)
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    shape, channels = array.shape, (1, 3, 4)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim == 3 and array.shape[0] in channels and (channels_first_wins or array.shape[-1] not in channels):
        array = np.moveaxis(array, 0, -1)  # (H, W, C)
    if array.ndim != 3 or array.shape[-1] not in channels:
        raise ValueError(f"a picture has shape (H, W), (H, W, C) or (C, H, W) with C = 1, 3 or 4, not {shape}")
    if array.size == 0:
        raise ValueError(f"the picture has no pixels: its shape is {shape}")
    if np.issubdtype(array.dtype, np.floating):
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 1):  # also for NaN
            raise ValueError(f"a float picture is in [0, 1], this one spans [{low}, {high}]: rescale or clamp it")
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"a picture is uint8 or float in [0, 1], not {array.dtype}: convert it first")
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array))


def flatten_images(images: Any) -> list:
    """Images as one flat list, in reading order: from one image, nested lists, or a 4-D array or tensor."""
    if isinstance(images, list | tuple):
        return [image for item in images for image in flatten_images(item)]
    if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
        return list(images)
    return [images]


# --------------------------------------------------------------------------------------------------------------------
# The transform


def resize_dimensions(
    width: int,
    height: int,
    *,
    max_size: int,
    min_size: int,
    stride: int,
    max_pixels: int,
    num_images: int = 1,
) -> tuple[int, int]:
    """The released resize rule: sides divisible by `stride`, within limits where it can. Returns (width, height).

    Its oddities are kept, because they decide which sizes the checkpoint has seen: Python's round-half-to-even, applied
    to the scaled side and again to its multiple of `stride`; too many pixels are scaled by the ratio of the areas, not
    its square root (1024x1024 among four images becomes 518x518); and after the last clamp of the long side the short
    one may be below `min_size` (37x512 becomes 80x1024). The aspect ratio is only roughly kept.

    Args:
        max_size, min_size: of the long and of the short side.
        max_pixels: shared by `num_images` images (training with several images per conversation).
    """

    def scaled(scale: float) -> tuple[int, int]:
        across, down = (max(stride, round(round(side * scale) / stride) * stride) for side in (width, height))
        return across, down

    width, height = scaled(max(min(max_size / max(width, height), 1.0), min_size / min(width, height)))
    if width * height > max_pixels / num_images:
        width, height = scaled(max_pixels / num_images / (width * height))
    if max(width, height) > max_size:
        width, height = scaled(max_size / max(width, height))
    return width, height


def image_to_tensor(
    image: Image.Image,
    size: tuple[int, int] | None = None,
    *,
    mean: tuple[float, ...] | list[float] = (0.5, 0.5, 0.5),
    std: tuple[float, ...] | list[float] = (0.5, 0.5, 0.5),
    resample: int = Image.Resampling.BICUBIC,
) -> torch.Tensor:
    """An RGB picture as float32 (3, H, W) in [-1, 1], resized by Pillow to `size` = (width, height) if given."""
    if size is not None:
        image = image.resize(size, resample)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32) / 255
    return (pixels - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(std)[:, None, None]


def patchify(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(3, H, W) -> (rows * columns, p * p * 3): patches row by row; inside one, row by row with the channel fastest."""
    _, height, width = pixels.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"{height}x{width} (height x width) is not divisible by patch_size={patch_size}")
    patches = pixels.unflatten(2, (-1, patch_size)).unflatten(1, (-1, patch_size))  # (3, rows, p, columns, p)
    return patches.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)


def tensor_to_pil(pixels: torch.Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1], as the VAE decodes it, to a picture. As released, uint8 by truncation, not by rounding."""
    return unit_tensor_to_pil(pixels.float() * 0.5 + 0.5)


def unit_tensor_to_pil(pixels: torch.Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] to a picture; see `tensor_to_pil`."""
    pixels = pixels.detach().float().clamp(0, 1).permute(1, 2, 0) * 255
    return Image.fromarray(pixels.to(torch.uint8).cpu().numpy())


# --------------------------------------------------------------------------------------------------------------------
# The processor


class BagelImageProcessorKwargs(TypedDict, total=False):
    """What can be set per processor, and overridden per call."""

    size: dict[str, int]
    latent_size: dict[str, int]
    patch_size: int
    latent_stride: int
    max_pixels: int
    vae_resize_first: bool
    max_input_pixels: int
    image_mean: list[float] | tuple[float, ...]
    image_std: list[float] | tuple[float, ...]
    resample: int


class BagelImageCallKwargs(BagelImageProcessorKwargs, total=False):
    """The keywords of one call."""

    edited: bool | list[bool]
    read: bool | list[bool]
    return_tensors: str | None


SETTINGS = tuple(BagelImageProcessorKwargs.__annotations__)
# What transformers writes beside the settings of an image processor.
SERVICE_KEYS = {"auto_map", "feature_extractor_type", "image_processor_type", "processor_class"}


class BagelImageProcessor(BaseImageProcessor):
    """Makes both views of a picture that BAGEL has: ViT patches to read it, VAE pixels to edit it.

    An image that is only read goes through the ViT transform. An edited one goes through the VAE transform first, and
    what the ViT reads is that resized picture: the two views show the same thing, as in the released code.

    Args:
        size: `shortest_edge` and `longest_edge` of the ViT transform.
        latent_size: the same of the VAE transform.
        patch_size: side of a ViT patch; the ViT transform makes sides divisible by it.
        latent_stride: pixels per latent token and side; the VAE transform makes sides divisible by it.
        max_pixels: of a resized picture.
        vae_resize_first: put every image through the VAE's resize before the ViT's, as the released web app does. The
            released benchmarks do not.
        max_input_pixels: a larger picture is refused before it is decoded.
        image_mean, image_std: per channel; for both views.
        resample: Pillow's filter.
    """

    model_input_names: ClassVar[list[str]] = [
        "pixel_values",
        "image_grid_hw",
        "latent_pixel_values",
        "latent_image_sizes",
    ]
    valid_kwargs = BagelImageCallKwargs

    def __init__(
        self,
        size: dict[str, int] | None = None,
        latent_size: dict[str, int] | None = None,
        patch_size: int = 14,
        latent_stride: int = 16,
        max_pixels: int = MAX_PIXELS,
        vae_resize_first: bool = False,
        max_input_pixels: int = MAX_INPUT_PIXELS,
        image_mean: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5),
        image_std: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5),
        resample: int = Image.Resampling.BICUBIC,
        **kwargs,
    ) -> None:
        if unknown := sorted(kwargs.keys() - SERVICE_KEYS):  # kept, since other versions may save other keys
            logger.warning(f"BagelImageProcessor has no setting {', '.join(unknown)}; it has {', '.join(SETTINGS)}")
        super().__init__(**kwargs)
        self.size = _edges("size", size or {"shortest_edge": 224, "longest_edge": 980})
        self.latent_size = _edges("latent_size", latent_size or {"shortest_edge": 512, "longest_edge": 1024})
        self.patch_size = patch_size
        self.latent_stride = latent_stride
        self.max_pixels = max_pixels
        self.vae_resize_first = vae_resize_first
        self.max_input_pixels = max_input_pixels
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.resample = int(resample)

    def latent_dimensions(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the VAE's view of a picture of this size; also the size an edit of it comes out in."""
        return self._resized(width, height, self.latent_size, self.latent_stride)

    def vit_dimensions(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the ViT's view of a picture of this size."""
        return self._resized(width, height, self.size, self.patch_size)

    def _resized(self, width: int, height: int, size: dict[str, int], stride: int) -> tuple[int, int]:
        limits = {"max_size": size["longest_edge"], "min_size": size["shortest_edge"], "max_pixels": self.max_pixels}
        return resize_dimensions(width, height, stride=stride, **limits)

    def get_number_of_image_patches(self, height: int, width: int, edited: bool = False) -> int:
        """How many ViT placeholders a picture of this size takes in a prompt, without the picture."""
        if edited or self.vae_resize_first:
            width, height = self.latent_dimensions(width, height)
        width, height = self.vit_dimensions(width, height)
        return (height // self.patch_size) * (width // self.patch_size)

    def get_number_of_latent_patches(self, height: int, width: int) -> int:
        """How many VAE placeholders an edited picture of this size takes in a prompt, without the picture."""
        width, height = self.latent_dimensions(width, height)
        return (height // self.latent_stride) * (width // self.latent_stride)

    def fetch_images(self, images: Any) -> Any:
        """Load sources, keeping their nesting. Unlike the base class's, it keeps what alpha means: white."""
        if isinstance(images, list | tuple):
            return [self.fetch_images(image) for image in images]
        return load_image(images, self.max_input_pixels)

    def preprocess(
        self,
        images: Any,
        edited: bool | list[bool] = False,
        read: bool | list[bool] = True,
        return_tensors: str | None = "pt",
        **overrides,
    ) -> BatchFeature:
        """Load and transform images.

        Args:
            images: one image or (nested) lists of them; see `load_image` for what an image can be.
            edited: per image or for all, whether the VAE's view is made.
            read: per image or for all, whether the ViT's view is made.
            overrides: any setting of the processor, for this call.

        Returns:
            `pixel_values` (patches of all read images, p*p*3) and `image_grid_hw` (read images, 2), rows and columns in
            patches; `latent_pixel_values` (edited images, 3, H, W), zero-padded at the bottom and right to the largest,
            and `latent_image_sizes` (edited images, 2), height and width in pixels. A pair without images is absent.
        """
        if unknown := sorted(overrides.keys() - set(SETTINGS)):
            raise TypeError(f"unknown keywords {', '.join(unknown)}; an image call takes {', '.join(SETTINGS)}")
        if overrides := {name: value for name, value in overrides.items() if value is not None}:
            settings = {name: getattr(self, name) for name in SETTINGS} | overrides
            return type(self)(**settings).preprocess(images, edited, read, return_tensors)

        images = flatten_images(images)
        if not images:
            raise ValueError("no images were given: pass at least one, or leave images out")
        patches, grids, latents, latent_sizes = [], [], [], []
        edited, read = _per_image("edited", edited, images), _per_image("read", read, images)
        for image, is_edited, is_read in zip(images, edited, read):
            if not (is_edited or is_read):
                raise ValueError("an image is neither read nor edited: set read or edited for it, or leave it out")
            image = load_image(image, self.max_input_pixels)
            if is_edited or self.vae_resize_first:
                image = image.resize(self.latent_dimensions(*image.size), self.resample)
            if is_edited:
                latents.append(self._to_tensor(image))
                latent_sizes.append((image.height, image.width))
            if is_read:
                pixels = self._to_tensor(image, self.vit_dimensions(*image.size))
                patches.append(patchify(pixels, self.patch_size))
                grids.append((pixels.shape[1] // self.patch_size, pixels.shape[2] // self.patch_size))

        data = {}
        if patches:
            data |= {"pixel_values": torch.cat(patches), "image_grid_hw": torch.tensor(grids)}
        if latents:
            data |= {"latent_pixel_values": _stack_padded(latents), "latent_image_sizes": torch.tensor(latent_sizes)}
        return BatchFeature(data, tensor_type=return_tensors)

    def _to_tensor(self, image: Image.Image, size: tuple[int, int] | None = None) -> torch.Tensor:
        return image_to_tensor(image, size, mean=self.image_mean, std=self.image_std, resample=self.resample)


def _edges(name: str, size: dict[str, int]) -> dict[str, int]:
    size = dict(size)
    if size.keys() != {"shortest_edge", "longest_edge"}:
        raise ValueError(f'{name} needs exactly "shortest_edge" and "longest_edge" (pixels), got {size}')
    return size


def _per_image(name: str, flags: bool | list[bool], images: list) -> list[bool]:
    if isinstance(flags, bool):
        return [flags] * len(images)
    if len(flags) != len(images):
        raise ValueError(f"{name} has {len(flags)} entries for {len(images)} images: pass one per image, or one bool")
    return list(flags)


def _stack_padded(images: list[torch.Tensor]) -> torch.Tensor:
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    padded = images[0].new_zeros(len(images), 3, height, width)
    for row, image in zip(padded, images):
        row[:, : image.shape[1], : image.shape[2]] = image
    return padded


__all__ = ["BagelImageProcessor"]


BagelImageProcessor.register_for_auto_class()
