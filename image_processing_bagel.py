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
import urllib.parse
import urllib.request
import zlib
from collections.abc import Mapping
from io import BytesIO
from typing import IO, Any, ClassVar, TypeAlias, TypedDict

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.utils import logging


logger = logging.get_logger(__name__)


ImageSource: TypeAlias = str | os.PathLike | bytes | IO[bytes] | Image.Image | np.ndarray | torch.Tensor

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


def load_image(
    source: ImageSource,
    max_input_pixels: int = MAX_INPUT_PIXELS,
    *,
    convert: bool = True,
    input_data_format: str | None = None,
) -> Image.Image:
    """Load a picture as an upright (EXIF orientation applied) RGB PIL image. Of an animation it is the first frame.

    Args:
        source: a path, a file or http(s) URL, a data URI, base64, the bytes of an image file, an open file, a PIL
            image, or an array or tensor: (H, W), (H, W, C) or (C, H, W) with C = 1, 3 or 4. White is 1 for float and
            bool, 65535 for uint16 (and 16-bit files), 255 for every other integer. Where both layouts fit, a tensor is
            read as (C, H, W) and an array as (H, W, C).
        max_input_pixels: a larger picture is refused once its header is read, before any pixel is decoded.
        convert: take pictures that are not RGB too.
        input_data_format: "channels_first" or "channels_last", the layout of an array or tensor.

    Raises:
        OSError: the file is missing, empty, truncated or no picture.
        ValueError: the picture has no pixels or too many, its values are out of range, it is not RGB and `convert` is
            False, or an array has another shape.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        source = _array_to_pil(source, input_data_format)
    name = _name(source)
    opened = None
    try:
        image = source if isinstance(source, Image.Image) else (opened := _open(source, name))  # reads the header only
        width, height = image.size
        if width * height == 0:
            raise ValueError(f"{name} has no pixels: its size is {width}x{height}")
        if width * height > max_input_pixels:
            raise _too_large(name, f"{width}x{height} = {width * height}", max_input_pixels)
        if not convert and image.mode != "RGB":
            raise ValueError(f"{name} is {image.mode}, not RGB: convert it, or leave do_convert_rgb out")
        return _decode(image, name)
    except Image.DecompressionBombError as error:  # its message starts with the number of pixels
        raise _too_large(name, "".join(re.findall(r"\d+", str(error))[:1]), max_input_pixels) from error
    finally:
        if opened is not None:
            opened.close()


def _decode(image: Image.Image, name: str) -> Image.Image:
    # Pillow gives pixels of 16 bits as mode I;16, and in some versions and formats as I, which has 32
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    try:
        upright = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, EOFError, struct.error, zlib.error) as error:
        raise OSError(f"{name} is truncated or damaged: {error}") from error
    if _is_animated(image):
        logger.warning_once("Of a picture with several frames (GIF, APNG, WebP, TIFF) only the first one is used.")
    if upright.mode in ("La", "RGBa"):  # premultiplied alpha
        upright = upright.convert(upright.mode.upper())
    elif upright.mode == "F" or upright.mode.startswith("I"):
        upright = _eight_bit_gray(upright, is_16_bit, name)
    return rgb_on_white(upright)


def _is_animated(image: Image.Image) -> bool:
    """Whether frames are left out; one that the caller went to himself, or a phone's second view (MPO), is not told."""
    try:
        return getattr(image, "is_animated", False) and image.format != "MPO" and image.tell() == 0
    except (OSError, EOFError, SyntaxError, ValueError, struct.error):  # the frames behind the first one are damaged
        return True


def _eight_bit_gray(image: Image.Image, is_16_bit: bool, name: str) -> Image.Image:
    values = np.asarray(image)
    if is_16_bit:
        values = values.astype(np.uint16)
    transparent = image.info.get("transparency")
    gray = _eight_bit(values, name)
    if isinstance(transparent, int):  # on white, as in `rgb_on_white`
        gray = np.where(values == transparent, np.uint8(255), gray)
    return Image.fromarray(gray)


def _eight_bit(values: np.ndarray, name: str) -> np.ndarray:
    """Values of pixels as uint8; `load_image` says which number is white.

    Raises:
        ValueError: one is negative, whiter than white or NaN, or they are no numbers.
    """
    kind = values.dtype.kind
    if kind not in "biuf":
        raise ValueError(f"a picture holds integers, floats or bool, not {values.dtype}: convert it first")
    if values.dtype == np.uint8:
        return values
    is_16_bit = values.dtype.newbyteorder("=") == np.uint16
    white = 1 if kind in "bf" else 65535 if is_16_bit else 255
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):  # also for NaN
        raise ValueError(
            f"{name} has values of {values.dtype}, which are in [0, {white}], but spans [{low}, {high}]: "
            "rescale or clamp it, or convert it to another number type"
        )
    if is_16_bit:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if kind == "f":
        return np.rint((values.astype(np.float32) if values.itemsize < 4 else values) * 255).astype(np.uint8)
    return values.astype(np.uint8) * np.uint8(255 // white)


def _open(source: str | os.PathLike | bytes | IO[bytes], name: str) -> Image.Image:
    file = _find(source, name)
    if (file.getbuffer().nbytes if isinstance(file, BytesIO) else os.path.getsize(file)) == 0:
        raise OSError(f"{name} is empty (0 bytes)")
    try:
        return Image.open(file)
    except Image.UnidentifiedImageError as error:
        raise OSError(f"{name} is not a picture Pillow can read, or is truncated within its header") from error


def _find(source: str | os.PathLike | bytes | IO[bytes], name: str) -> str | os.PathLike | BytesIO:
    """What `Image.open` takes: a path that exists, or bytes."""
    if isinstance(source, bytes | bytearray | memoryview):
        return BytesIO(source)
    if not isinstance(source, str | os.PathLike) and hasattr(source, "read"):
        if source.seekable():
            source.seek(0)
        return BytesIO(source.read())
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"a picture is a path, URL, base64, bytes, PIL image, array or tensor, not {type(source)}")
    if isinstance(source, str) and source.startswith("file:"):
        url = urllib.parse.urlsplit(source)
        source = url.netloc.removeprefix("localhost") + urllib.request.url2pathname(url.path)
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
    if not isinstance(source, str | os.PathLike):
        return "the picture"
    text = str(source)
    return text if len(text) <= 200 else f"{text[:50]}..."  # base64


def _too_large(name: str, pixels: str, max_input_pixels: int) -> ValueError:
    return ValueError(
        f"{name} has {pixels} pixels, more than max_input_pixels={max_input_pixels}: shrink it first, or raise "
        "max_input_pixels (and PIL.Image.MAX_IMAGE_PIXELS) if you trust it"
    )


def _array_to_pil(array: np.ndarray | torch.Tensor, input_data_format: str | None = None) -> Image.Image:
    if input_data_format not in (None, "channels_first", "channels_last"):
        raise ValueError(f"input_data_format is channels_first or channels_last, not {input_data_format!r}")
    channels_first_wins = isinstance(array, torch.Tensor)
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    shape, channels = array.shape, (1, 3, 4)
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3:
        fits_first, fits_last = array.shape[0] in channels, array.shape[-1] in channels
        if input_data_format is None and fits_first and (channels_first_wins or not fits_last):
            input_data_format = "channels_first"
        array = np.moveaxis(array, 0, -1) if input_data_format == "channels_first" else array  # (H, W, C)
    if array.ndim != 3 or array.shape[-1] not in channels:
        raise ValueError(f"a picture has shape (H, W), (H, W, C) or (C, H, W) with C = 1, 3 or 4, not {shape}")
    if array.size == 0:
        raise ValueError(f"the picture has no pixels: its shape is {shape}")
    array = _eight_bit(array, "the picture")
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array))


def flatten_images(images: Any) -> list:
    """Images as one flat list, in reading order: from one image, nested lists, or arrays of four and more axes."""
    if isinstance(images, list | tuple):
        return [image for item in images for image in flatten_images(item)]
    if isinstance(images, np.ndarray | torch.Tensor) and images.ndim >= 4:
        return flatten_images(list(images))
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
    mean: tuple[float, ...] | list[float] | None = (0.5, 0.5, 0.5),
    std: tuple[float, ...] | list[float] | None = (0.5, 0.5, 0.5),
    resample: int = Image.Resampling.BICUBIC,
    rescale_factor: float = 1 / 255,
) -> torch.Tensor:
    """An RGB picture as float32 (3, H, W) in [-1, 1], resized by Pillow to `size` = (width, height) if given.

    Without `mean` and `std`, in [0, 1]; `rescale_factor` times the pixels of 8 bits is what they are applied to.
    """
    if size is not None:
        image = image.resize(size, resample)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32)
    pixels = pixels / 255 if rescale_factor == 1 / 255 else pixels * rescale_factor  # not the same in the last bit
    if mean is None or std is None:
        return pixels
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


class BagelImageSettings(TypedDict, total=False):
    """What can be set per processor, and overridden per call."""

    size: dict[str, int]
    latent_size: dict[str, int]
    patch_size: int
    latent_stride: int
    max_pixels: int
    vae_resize_first: bool
    max_input_pixels: int
    image_mean: float | list[float] | tuple[float, ...]
    image_std: float | list[float] | tuple[float, ...]
    resample: int
    do_convert_rgb: bool
    do_resize: bool
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool


class BagelImageProcessorKwargs(BagelImageSettings, total=False):
    """The keywords of one call. From `do_center_crop` on, those of transformers that BAGEL refuses: `REFUSED`."""

    edited: bool | list[bool]
    read: bool | list[bool]
    return_tensors: str | None
    input_data_format: str | None
    do_center_crop: bool | None
    crop_size: Any
    do_pad: bool | None
    pad_size: Any
    default_to_square: bool | None
    data_format: str | None
    device: Any
    disable_grouping: bool | None
    image_seq_length: int | None
    min_pixels: int | None


SETTINGS = tuple(BagelImageSettings.__annotations__)
# Keywords that other image processors have, and what to do instead. None and False ask for nothing.
REFUSED = {
    "do_center_crop": "BAGEL sees whole pictures: crop them first",
    "crop_size": "BAGEL sees whole pictures: crop them first",
    "do_pad": "patches need no padding, and latent_pixel_values have it already: leave it out",
    "pad_size": "latent_pixel_values are padded to the largest of them: leave it out",
    "default_to_square": 'a size has two limits, size={"shortest_edge": ..., "longest_edge": ...}: leave it out',
    "data_format": "pixel_values are patches, and latent_pixel_values have channels first: leave it out",
    "device": "pictures are transformed on the CPU: move what comes out, inputs.to(device)",
    "disable_grouping": "pictures are transformed one by one: leave it out",
    "image_seq_length": "the tokens of a picture follow from its size: set size or max_pixels",
    "min_pixels": 'sides are limited, not areas: set size={"shortest_edge": ..., "longest_edge": ...}',
}
ALREADY_SO = {"data_format": "channels_first", "device": "cpu"}
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
        image_mean, image_std: per channel, or one number for all; for both views.
        resample: Pillow's filter.
        do_convert_rgb: take pictures that are not RGB too; by default True, as the four that follow.
        do_resize: without it, sides that patches and latents do not fill are refused.
        do_rescale, rescale_factor: multiply pixels by the factor, by default 1 / 255. Without it pixels stay in
            [0, 255], those of float arrays in [0, 1].
        do_normalize: subtract the mean and divide by the deviation.
    """

    # Stored with a processor only where they were given to it.
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True

    model_input_names: ClassVar[list[str]] = [
        "pixel_values",
        "image_grid_hw",
        "latent_pixel_values",
        "latent_image_sizes",
    ]
    valid_kwargs = BagelImageProcessorKwargs

    def __init__(
        self,
        size: dict[str, int] | None = None,
        latent_size: dict[str, int] | None = None,
        patch_size: int = 14,
        latent_stride: int = 16,
        max_pixels: int = MAX_PIXELS,
        vae_resize_first: bool = False,
        max_input_pixels: int = MAX_INPUT_PIXELS,
        image_mean: float | list[float] | tuple[float, ...] = (0.5, 0.5, 0.5),
        image_std: float | list[float] | tuple[float, ...] = (0.5, 0.5, 0.5),
        resample: int = Image.Resampling.BICUBIC,
        **kwargs,
    ) -> None:
        kwargs = without_refused(kwargs)
        if unknown := sorted(kwargs.keys() - SERVICE_KEYS - set(SETTINGS)):  # kept: other versions may save other keys
            logger.warning(f"BagelImageProcessor has no setting {', '.join(unknown)}; it has {', '.join(SETTINGS)}")
        super().__init__(**{name: value for name, value in kwargs.items() if value is not None or name in unknown})
        self.size = _edges("size", size or {"shortest_edge": 224, "longest_edge": 980})
        self.latent_size = _edges("latent_size", latent_size or {"shortest_edge": 512, "longest_edge": 1024})
        self.patch_size = patch_size
        self.latent_stride = latent_stride
        self.max_pixels = max_pixels
        self.vae_resize_first = vae_resize_first
        self.max_input_pixels = max_input_pixels
        self.image_mean = _per_channel("image_mean", image_mean)
        self.image_std = _per_channel("image_std", image_std)
        self.resample = int(resample)

    def latent_dimensions(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the VAE's view of a picture of this size; also the size an edit of it comes out in."""
        return self._resized(width, height, self.latent_size, self.latent_stride)

    def vit_dimensions(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the ViT's view of a picture of this size."""
        return self._resized(width, height, self.size, self.patch_size)

    def _resized(self, width: int, height: int, size: dict[str, int], stride: int) -> tuple[int, int]:
        if not self.do_resize:
            if width % stride or height % stride:
                raise ValueError(
                    f"do_resize=False takes sides divisible by {stride}, this picture is {width}x{height} (width x "
                    "height): resize it first, or leave do_resize out"
                )
            return width, height
        limits = {"max_size": size["longest_edge"], "min_size": size["shortest_edge"], "max_pixels": self.max_pixels}
        return resize_dimensions(width, height, stride=stride, **limits)

    def get_number_of_image_patches(
        self, height: int, width: int, images_kwargs: Mapping[str, Any] | None = None, edited: bool = False
    ) -> int:
        """How many ViT placeholders a picture of this size takes in a prompt, without the picture.

        Args:
            images_kwargs: settings of the processor, for this call.
            edited: the picture is seen by the VAE too.
        """
        processor = self.with_settings(images_kwargs or {})
        if edited or processor.vae_resize_first:
            width, height = processor.latent_dimensions(width, height)
        width, height = processor.vit_dimensions(width, height)
        return (height // processor.patch_size) * (width // processor.patch_size)

    def get_number_of_latent_patches(
        self, height: int, width: int, images_kwargs: Mapping[str, Any] | None = None
    ) -> int:
        """How many VAE placeholders an edited picture of this size takes in a prompt, without the picture."""
        processor = self.with_settings(images_kwargs or {})
        width, height = processor.latent_dimensions(width, height)
        return (height // processor.latent_stride) * (width // processor.latent_stride)

    def with_settings(self, overrides: Mapping[str, Any]) -> "BagelImageProcessor":
        """This processor with other settings; those that are None stay.

        Raises:
            TypeError: an unknown keyword.
            ValueError: one of `REFUSED`.
        """
        overrides = without_refused(overrides)
        if unknown := sorted(overrides.keys() - set(SETTINGS)):
            raise TypeError(f"unknown keywords {', '.join(unknown)}; an image call takes {', '.join(SETTINGS)}")
        overrides = {name: value for name, value in overrides.items() if value is not None}
        if not overrides:
            return self
        return type(self)(**({name: getattr(self, name) for name in SETTINGS} | overrides))

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
        input_data_format: str | None = None,
        **overrides,
    ) -> BatchFeature:
        """Load and transform images.

        Args:
            images: one image or (nested) lists of them; see `load_image` for what an image can be.
            edited: per image or for all, whether the VAE's view is made.
            read: per image or for all, whether the ViT's view is made.
            input_data_format: "channels_first" or "channels_last", the layout of arrays and tensors.
            overrides: any setting of the processor, for this call.

        Returns:
            `pixel_values` (patches of all read images, p*p*3) and `image_grid_hw` (read images, 2), rows and columns in
            patches; `latent_pixel_values` (edited images, 3, H, W), zero-padded at the bottom and right to the largest,
            and `latent_image_sizes` (edited images, 2), height and width in pixels. A pair without images is absent.
        """
        processor = self.with_settings(overrides)
        if processor is not self:
            return processor.preprocess(images, edited, read, return_tensors, input_data_format)

        images = flatten_images(images)
        if not images:
            raise ValueError("no images were given: pass at least one, or leave images out")
        patches, grids, latents, latent_sizes = [], [], [], []
        edited, read = _per_image("edited", edited, images), _per_image("read", read, images)
        for image, is_edited, is_read in zip(images, edited, read):
            if not (is_edited or is_read):
                raise ValueError("an image is neither read nor edited: set read or edited for it, or leave it out")
            factor = self._rescale_factor(image)
            image = load_image(
                image, self.max_input_pixels, convert=self.do_convert_rgb, input_data_format=input_data_format
            )
            if is_edited or self.vae_resize_first:
                image = image.resize(self.latent_dimensions(*image.size), self.resample)
            if is_edited:
                latents.append(self._to_tensor(image, factor))
                latent_sizes.append((image.height, image.width))
            if is_read:
                pixels = self._to_tensor(image, factor, self.vit_dimensions(*image.size))
                patches.append(patchify(pixels, self.patch_size))
                grids.append((pixels.shape[1] // self.patch_size, pixels.shape[2] // self.patch_size))

        data = {}
        if patches:
            data |= {"pixel_values": torch.cat(patches), "image_grid_hw": torch.tensor(grids)}
        if latents:
            data |= {"latent_pixel_values": _stack_padded(latents), "latent_image_sizes": torch.tensor(latent_sizes)}
        return BatchFeature(data, tensor_type=return_tensors)

    def _rescale_factor(self, source: Any) -> float:
        """What the pixels of 8 bits that a source becomes are multiplied by."""
        if self.do_rescale:
            return self.rescale_factor
        if isinstance(source, np.ndarray):
            is_float = source.dtype.kind == "f"
        else:
            is_float = isinstance(source, torch.Tensor) and source.is_floating_point()
        return 1 / 255 if is_float else 1.0  # the values that it came with

    def _to_tensor(self, image: Image.Image, factor: float, size: tuple[int, int] | None = None) -> torch.Tensor:
        mean, std = (self.image_mean, self.image_std) if self.do_normalize else (None, None)
        return image_to_tensor(image, size, mean=mean, std=std, resample=self.resample, rescale_factor=factor)


def without_refused(keywords: Mapping[str, Any], refused: Mapping[str, str] = REFUSED) -> dict[str, Any]:
    """The keywords without the refused ones.

    Raises:
        ValueError: one of them asks for something.
    """
    for name in refused.keys() & keywords.keys():
        value = getattr(keywords[name], "value", keywords[name])  # of an enum of transformers
        is_off = value is None or (isinstance(value, bool | int) and not value)
        if not (is_off or str(value) == ALREADY_SO.get(name)):
            raise ValueError(f"{name} cannot be set: {refused[name]}")
    return {name: value for name, value in keywords.items() if name not in refused}


def _edges(name: str, size: dict[str, int]) -> dict[str, int]:
    size = dict(size) if isinstance(size, Mapping) or hasattr(size, "keys") else size
    if not isinstance(size, dict) or size.keys() != {"shortest_edge", "longest_edge"}:
        raise ValueError(f'{name} needs exactly "shortest_edge" and "longest_edge" (pixels), got {size}')
    return size


def _per_channel(name: str, value: float | list[float] | tuple[float, ...]) -> list[float]:
    values = [float(one) for one in ([value] * 3 if isinstance(value, int | float) else value)]
    if len(values) != 3:
        raise ValueError(f"{name} is one number, or one per channel (red, green, blue), not {values}")
    return values


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
