# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Loading, resizing and patchifying pictures: by equalities, and against the released numbers where they are there."""

import base64
import hashlib
import json
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from parity_data import EMBEDDED, read_arrays, read_json
from PIL import Image
from transformers.image_utils import ChannelDimension
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # older top levels ask for torchvision

from bagel.image_processing_bagel import (
    REFUSED,
    BagelImageProcessor,
    image_to_tensor,
    load_image,
    patchify,
    resize_dimensions,
    rgb_on_white,
    tensor_to_pil,
    unit_tensor_to_pil,
)


PARITY = EMBEDDED / "image_transform"
META = read_json(PARITY / "meta.json")
SOURCES = [name for name in META["images"] if not name.startswith("i16")]  # Pillow converts I;16 as its version does

pytestmark = pytest.mark.core

TINY = {
    "size": {"shortest_edge": 42, "longest_edge": 70},
    "latent_size": {"shortest_edge": 48, "longest_edge": 96},
}


def limits(setting: str) -> dict[str, int]:
    released = META["settings"][setting]
    return {
        "max_size": released["max_image_size"],
        "min_size": released["min_image_size"],
        "stride": released["image_stride"],
        "max_pixels": released["max_pixels"],
    }


def picture(width: int = 120, height: int = 80, seed: int = 0, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def same(left: Image.Image, right: Image.Image) -> bool:
    return left.size == right.size and left.tobytes() == right.tobytes()


# --------------------------------------------------------------------------------------------------------------------
# Against the released numbers


@pytest.mark.parametrize("name", SOURCES)
def test_released_pictures_convert_to_the_released_rgb(name):
    expected = META["images"][name]
    source = Image.open(PARITY / "images" / f"{name}.png")
    for image in (rgb_on_white(source), load_image(str(PARITY / "images" / f"{name}.png"))):
        assert hashlib.sha256(np.asarray(image).tobytes()).hexdigest() == expected["rgb_sha256"]


@pytest.mark.parametrize("name", SOURCES)
def test_released_transforms_are_replayed_exactly(name):
    image = load_image(PARITY / "images" / f"{name}.png")
    tensors = read_arrays(PARITY / "tensors.safetensors")
    for setting, expected in META["images"][name]["results"].items():
        size = resize_dimensions(*image.size, **limits(setting))
        assert list(size) == expected["size_wh"], setting
        resized = image.resize(size, Image.Resampling.BICUBIC)
        assert hashlib.sha256(np.asarray(resized).tobytes()).hexdigest() == expected["resized_uint8_sha256"]

        pixels = image_to_tensor(image, size)
        if "full_tensor" in expected:
            torch.testing.assert_close(pixels, tensors[expected["full_tensor"]], atol=1e-6, rtol=0)
        else:
            samples = pixels.flatten()[expected["sample_flat_indexes"]]
            torch.testing.assert_close(samples, torch.tensor(expected["sample_values"]), atol=1e-6, rtol=0)
            assert pixels.double().mean().item() == pytest.approx(expected["mean"], abs=1e-6)
        if "patchify_tensor" in expected:
            patches = patchify(pixels, limits(setting)["stride"])
            torch.testing.assert_close(patches, tensors[expected["patchify_tensor"]], atol=1e-6, rtol=0)
        elif "patchify_shape" in expected:
            patches = patchify(pixels, limits(setting)["stride"])
            assert list(patches.shape) == expected["patchify_shape"]
            samples = patches.flatten()[expected["patchify_sample_flat_indexes"]]
            torch.testing.assert_close(samples, torch.tensor(expected["patchify_sample_values"]), atol=1e-6, rtol=0)


def test_released_sizes_are_replayed_exactly():
    for expected in META["images"].values():
        for count, size in expected["vlm_train_size_wh_by_img_num"].items():
            assert list(resize_dimensions(*expected["size"], **limits("vlm_train"), num_images=int(count))) == size
        vae = resize_dimensions(*expected["size"], **limits("vae"))
        assert list(resize_dimensions(*vae, **limits("vae"))) == expected["vae_then_vae_size_wh"]
        assert list(resize_dimensions(*vae, **limits("vit"))) == expected["vae_then_vit_size_wh"]


def test_released_size_table_is_replayed_exactly():
    assert len(META["size_table"]) == 51
    for row in META["size_table"]:
        width, height = row["w"], row["h"]
        for setting in META["settings"]:
            assert list(resize_dimensions(width, height, **limits(setting))) == row[setting], (row, setting)
        vae = resize_dimensions(width, height, **limits("vae"))
        assert list(resize_dimensions(*vae, **limits("vae"))) == row["vae_then_vae"]
        assert list(resize_dimensions(*vae, **limits("vit"))) == row["vae_then_vit"]
        assert list(resize_dimensions(width, height, **limits("vlm_train"), num_images=3)) == row["vlm_train_img_num3"]


def test_default_processor_makes_the_released_views():
    processor = BagelImageProcessor()
    for name in ("rgb_640x480", "rgb_5x7", "rgba_64x64"):
        expected = META["images"][name]
        path = str(PARITY / "images" / f"{name}.png")
        read = processor(path)
        width, height = expected["results"]["vit"]["size_wh"]
        assert read["image_grid_hw"].tolist() == [[height // 14, width // 14]]
        samples = read["pixel_values"].flatten()[expected["results"]["vit"]["patchify_sample_flat_indexes"]]
        torch.testing.assert_close(
            samples, torch.tensor(expected["results"]["vit"]["patchify_sample_values"]), atol=1e-6, rtol=0
        )
        edited = processor(path, edited=True)
        width, height = expected["vae_then_vit_size_wh"]
        assert edited["image_grid_hw"].tolist() == [[height // 14, width // 14]]
        assert edited["latent_image_sizes"].tolist() == [expected["results"]["vae"]["size_wh"][::-1]]
        samples = edited["latent_pixel_values"].flatten()[expected["results"]["vae"]["sample_flat_indexes"]]
        torch.testing.assert_close(
            samples, torch.tensor(expected["results"]["vae"]["sample_values"]), atol=1e-6, rtol=0
        )


# --------------------------------------------------------------------------------------------------------------------
# The transform


VAE_LIMITS = {"max_size": 1024, "min_size": 512, "stride": 16, "max_pixels": 1806336}
VIT_LIMITS = {"max_size": 980, "min_size": 224, "stride": 14, "max_pixels": 1806336}


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((640, 480), VAE_LIMITS, (688, 512)),
        ((640, 480), VIT_LIMITS, (644, 476)),
        ((37, 512), VAE_LIMITS, (80, 1024)),  # the short side ends below min_size
        ((1, 1), VIT_LIMITS, (224, 224)),
        ((1024, 1024), {**VIT_LIMITS, "max_pixels": 2007040, "num_images": 4}, (518, 518)),  # ratio of areas
    ],
)
def test_resize_keeps_the_released_oddities(size, limits, expected):
    assert resize_dimensions(*size, **limits) == expected


def test_resize_of_the_vae_leaves_its_own_sizes_alone():
    random = np.random.default_rng(0)
    for width, height in random.integers(1, 4000, (500, 2)).tolist():
        once = resize_dimensions(width, height, **VAE_LIMITS)
        assert resize_dimensions(*once, **VAE_LIMITS) == once


def test_alpha_is_white_except_for_la():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert rgb_on_white(clear).getpixel((0, 0)) == (255, 255, 255)
    gray = Image.new("LA", (2, 2), (7, 0))
    assert rgb_on_white(gray).getpixel((0, 0)) == (7, 7, 7)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([9, 8, 7] + [0] * 765)
    assert rgb_on_white(palette).getpixel((0, 0)) == (9, 8, 7)
    palette.info["transparency"] = 0
    assert rgb_on_white(palette).getpixel((0, 0)) == (255, 255, 255)


def test_tensor_and_picture_are_inverse():
    image = picture()
    pixels = image_to_tensor(image)
    assert pixels.shape == (3, 80, 120) and pixels.dtype == torch.float32
    assert pixels.min() >= -1 and pixels.max() <= 1
    # Truncation turns a value that float32 put just below an integer into the next lower one, as released.
    difference = np.asarray(image).astype(int) - np.asarray(tensor_to_pil(pixels)).astype(int)
    assert difference.min() >= 0 and difference.max() <= 1


def test_picture_values_are_truncated_and_clamped():
    pixels = torch.tensor([-2.0, -1.0, 0.0, 0.9999, 1.0, 3.0]).expand(3, 1, 6)
    assert np.asarray(tensor_to_pil(pixels))[0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]
    assert np.asarray(unit_tensor_to_pil(pixels.bfloat16()))[0, :, 0].tolist() == [0, 0, 0, 255, 255, 255]


def test_patches_are_row_by_row_with_the_channel_fastest():
    pixels = torch.arange(3 * 4 * 6).view(3, 4, 6).float()
    patches = patchify(pixels, 2)
    assert patches.shape == (2 * 3, 2 * 2 * 3)
    assert patches[0].tolist() == pixels[:, :2, :2].permute(1, 2, 0).flatten().tolist()
    assert patches[1].tolist() == pixels[:, :2, 2:4].permute(1, 2, 0).flatten().tolist()
    assert patches[3].tolist() == pixels[:, 2:, :2].permute(1, 2, 0).flatten().tolist()
    with pytest.raises(ValueError, match=r"4x6.*patch_size=4"):
        patchify(pixels, 4)


# --------------------------------------------------------------------------------------------------------------------
# Loading


def test_all_kinds_of_sources_give_the_same_picture(tmp_path, monkeypatch):
    image = picture()
    path = tmp_path / "picture.png"
    image.save(path)
    data = png(image)
    encoded = base64.b64encode(data).decode()
    monkeypatch.setattr("urllib.request.urlopen", lambda request, timeout: BytesIO(data))
    array = np.asarray(image)
    sources = {
        "path": str(path),
        "path object": path,
        "url": "https://example.com/picture.png",
        "data uri": f"data:image/png;base64,{encoded}",
        "base64": encoded,
        "base64 in lines": base64.encodebytes(data).decode(),
        "bytes": data,
        "picture": image,
        "array": array,
        "array of floats": array.astype(np.float64) / 255,
        "array, channels first": np.moveaxis(array, -1, 0),
        "tensor": torch.from_numpy(array.copy()).permute(2, 0, 1),
        "tensor of floats": torch.from_numpy(array.copy()).permute(2, 0, 1) / 255,
        "tensor, channels last": torch.from_numpy(array.copy()),
    }
    for kind, source in sources.items():
        loaded = load_image(source)
        assert loaded.mode == "RGB" and same(loaded, image), kind


def test_gray_and_alpha_arrays_are_pictures_too():
    gray = np.asarray(picture(mode="L"))
    assert same(load_image(gray), load_image(gray[..., None]))
    assert same(load_image(torch.from_numpy(gray.copy())), load_image(gray))
    rgba = np.asarray(picture(mode="RGBA"))
    assert same(load_image(rgba), rgb_on_white(Image.fromarray(rgba)))


def test_open_files_and_file_urls_are_pictures_too(tmp_path):
    image = picture()
    path = tmp_path / "a picture.png"
    image.save(path)
    file = BytesIO(path.read_bytes())
    file.read()
    with path.open("rb") as opened:
        for source in (file, opened, bytearray(path.read_bytes()), path.as_uri(), f"file://localhost{path}"):
            assert same(load_image(source), image)
    assert "%20" in path.as_uri()
    with pytest.raises(FileNotFoundError, match="no such picture file: file:///nowhere"):
        load_image("file:///nowhere/cat.png")


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    gray = np.arange(256, dtype=np.uint16).reshape(8, 32)
    wide, expected = gray * 257, load_image(gray.astype(np.uint8))
    for name in ("gray.png", "gray.tiff", "gray.pgm"):
        Image.fromarray(wide).save(tmp_path / name)
        assert same(load_image(tmp_path / name), expected), name
    swapped = Image.frombytes("I;16B", (32, 8), wide.astype(">u2").tobytes())
    for source in (wide, wide.astype(">u2"), torch.from_numpy(wide), wide[..., None], Image.fromarray(wide), swapped):
        assert same(load_image(source), expected)
    between = np.array([[128, 129, 65407, 65535]], dtype=np.uint16)
    assert np.asarray(load_image(between))[0, :, 0].tolist() == [0, 1, 255, 255]
    marked = Image.fromarray(wide)
    marked.info["transparency"] = 257 * 7
    assert load_image(marked).getpixel((7, 0)) == (255, 255, 255)


def test_numbers_of_any_type_are_pixels_if_they_are_in_range(tmp_path):
    pixels = np.asarray(picture())
    for dtype in (np.int8, np.int16, np.int32, np.int64, np.uint32, np.uint64):
        assert same(load_image((pixels // 2).astype(dtype)), load_image(pixels // 2)), dtype
    for dtype in (np.float16, np.float32, np.float64):
        assert same(load_image((pixels / 255).astype(dtype)), load_image(pixels)), dtype
    assert same(load_image(torch.from_numpy(pixels // 2).long()), load_image(pixels // 2))
    assert same(load_image(pixels > 127), load_image((pixels > 127).astype(np.uint8) * 255))
    Image.fromarray((pixels[..., 0] / 255).astype(np.float32)).save(tmp_path / "gray.tiff")
    assert same(load_image(tmp_path / "gray.tiff"), load_image(pixels[..., 0]))
    for size in ((1, 1, 3), (3, 3), (1, 7, 3), (4, 4, 4)):
        assert load_image(np.zeros(size, np.uint8)).size == size[1::-1]
    Image.fromarray(pixels[..., 0].astype(np.float32)).save(tmp_path / "white.tiff")
    with pytest.raises(ValueError, match=r"white\.tiff has values of float32, which are in \[0, 1\], but spans"):
        load_image(tmp_path / "white.tiff")
    with pytest.raises(ValueError, match="integers, floats or bool, not complex64"):
        load_image(pixels.astype(np.complex64))


def test_the_layout_of_an_array_can_be_told():
    array = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    assert load_image(array, input_data_format="channels_first").size == (3, 5)
    assert load_image(torch.from_numpy(array), input_data_format="channels_last").size == (5, 3)
    settings = {**TINY, "do_normalize": False}
    turned = BagelImageProcessor(**settings)(array, input_data_format="channels_first")
    expected = BagelImageProcessor(**settings)(np.moveaxis(array, 0, -1))
    assert torch.equal(turned["pixel_values"], expected["pixel_values"])
    with pytest.raises(ValueError, match="channels_first or channels_last, not 'last'"):
        load_image(array, input_data_format="last")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV"])
def test_pictures_of_every_mode_are_rgb_pictures(mode):
    colour = Image.new("RGB", (6, 4), (255, 255, 255))
    first = {"La": "LA", "PA": "P", "RGBa": "RGBA"}.get(mode, mode)
    loaded = load_image(
        colour.convert("L").convert(first).convert(mode) if first == "P" else colour.convert(first).convert(mode)
    )
    assert loaded.mode == "RGB" and loaded.getpixel((0, 0)) == (255, 255, 255)


def test_of_an_animation_the_first_frame_is_used_and_that_is_said_once(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("bagel.image_processing_bagel.logger.warning_once", said.append)
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "green", "blue")]
    for name, options in (("a.gif", {}), ("a.png", {}), ("a.webp", {"lossless": True}), ("a.tiff", {})):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert same(load_image(tmp_path / name), frames[0]), name
    assert len(said) == 4 and len(set(said)) == 1 and "only the first one" in said[0]
    opened = Image.open(tmp_path / "a.gif")
    opened.seek(2)
    assert same(load_image(opened), frames[2])  # the caller went there
    frames[0].save(tmp_path / "still.gif")
    load_image(tmp_path / "still.gif")
    assert len(said) == 4


def test_orientation_from_the_camera_is_applied(tmp_path):
    image = picture(40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    assert same(load_image(tmp_path / "turned.png"), image.transpose(Image.Transpose.ROTATE_270))


def test_missing_empty_foreign_and_truncated_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such picture file: nowhere/cat\.png"):
        load_image("nowhere/cat.png")
    with pytest.raises(FileNotFoundError, match="no such picture file: cats"):
        load_image("cats")  # valid base64
    (tmp_path / "empty.png").touch()
    with pytest.raises(OSError, match=r"empty\.png is empty"):
        load_image(str(tmp_path / "empty.png"))
    (tmp_path / "text.png").write_text("no picture at all")
    with pytest.raises(OSError, match=r"text\.png is not a picture"):
        load_image(str(tmp_path / "text.png"))
    whole = png(picture())
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=r"half\.png is truncated"):
        load_image(str(tmp_path / "half.png"))
    jpeg = BytesIO()
    picture().save(jpeg, "JPEG")
    (tmp_path / "half.jpg").write_bytes(jpeg.getvalue()[:-1000])
    with pytest.raises(OSError, match=r"half\.jpg is truncated"):
        load_image(str(tmp_path / "half.jpg"))
    with pytest.raises(OSError, match="is empty"):
        load_image("data:image/png;base64,")
    with pytest.raises(TypeError, match="not <class 'int'>"):
        load_image(3)


def png_header(width: int, height: int) -> bytes:
    """A PNG of any size without a single pixel in it."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return data + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(13000, 14000), (50000, 60000)])  # Pillow refuses the second by itself
def test_too_many_pixels_are_refused_before_decoding(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(*size))
    with pytest.raises(ValueError, match=rf"bomb\.png.*{size[0] * size[1]}.*max_input_pixels=178956970"):
        load_image(str(path))


def test_the_limit_on_pixels_is_a_setting():
    with pytest.raises(ValueError, match="120x80 = 9600 pixels, more than max_input_pixels=9599"):
        BagelImageProcessor(max_input_pixels=9599)(picture())
    assert BagelImageProcessor(max_input_pixels=9600)(picture())["image_grid_hw"].shape == (1, 2)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (Image.new("RGB", (0, 5)), "0x5"),
        (np.full((4, 4, 3), 255.0), r"spans \[255.0, 255.0\]"),
        (torch.full((3, 4, 4), float("nan")), "spans"),
        (np.full((4, 4, 3), 300), r"int64, which are in \[0, 255\], but spans \[300, 300\]"),
        (np.zeros((5, 5, 2), np.uint8), r"not \(5, 5, 2\)"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"not \(2, 3, 4, 4\)"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(array, message):
    with pytest.raises(ValueError, match=message):
        load_image(array)


# --------------------------------------------------------------------------------------------------------------------
# The processor


def test_a_read_image_has_no_latent_view():
    features = BagelImageProcessor(**TINY)(picture())
    assert features.keys() == {"pixel_values", "image_grid_hw"}
    rows, columns = features["image_grid_hw"][0].tolist()
    assert features["pixel_values"].shape == (rows * columns, 3 * 14 * 14)
    assert features["image_grid_hw"].dtype == torch.int64


def test_the_vit_reads_an_edited_image_as_the_vae_sees_it():
    image, processor = picture(500, 120), BagelImageProcessor(**TINY)
    edited = processor(image, edited=True)
    size = processor.latent_dimensions(*image.size)
    latent_view = image.resize(size, Image.Resampling.BICUBIC)
    assert edited["latent_image_sizes"].tolist() == [[size[1], size[0]]]
    assert torch.equal(edited["latent_pixel_values"][0], image_to_tensor(latent_view))
    assert torch.equal(edited["pixel_values"], processor(latent_view)["pixel_values"])
    assert not torch.equal(edited["pixel_values"], processor(image)["pixel_values"])


def test_vae_resize_first_reads_what_the_web_app_reads():
    image, processor = picture(500, 120), BagelImageProcessor(**TINY)
    first = processor(image, vae_resize_first=True)
    assert first.keys() == {"pixel_values", "image_grid_hw"}
    assert torch.equal(first["pixel_values"], processor(image, edited=True)["pixel_values"])
    assert processor.vae_resize_first is False  # an override is for one call


def test_images_keep_their_order_and_their_own_size():
    images, processor = [picture(120, 80), picture(60, 200, 1), picture(90, 90, 2)], BagelImageProcessor(**TINY)
    features = processor([images[:1], images[1:]], edited=[True, False, True], read=[True, True, False])
    assert features["latent_image_sizes"].tolist() == [[64, 96], [96, 96]]
    assert features["latent_pixel_values"].shape == (2, 3, 96, 96)
    assert not features["latent_pixel_values"][0, :, 64:].any()
    alone = [processor(images[0], edited=True), processor(images[1]), processor(images[2], edited=True, read=False)]
    assert torch.equal(features["latent_pixel_values"][0, :, :64], alone[0]["latent_pixel_values"][0])
    assert torch.equal(features["latent_pixel_values"][1], alone[2]["latent_pixel_values"][0])
    assert torch.equal(features["pixel_values"], torch.cat([one["pixel_values"] for one in alone[:2]]))
    assert "pixel_values" not in alone[2]
    batch = np.stack([np.asarray(picture(40, 40, seed)) for seed in range(3)])
    assert processor(batch)["image_grid_hw"].shape == (3, 2)


def test_place_counts_are_known_without_the_picture():
    processor = BagelImageProcessor()
    for size in ((640, 480), (37, 512), (2000, 1500)):
        features = processor(Image.new("RGB", size), edited=True)
        height, width = features["latent_image_sizes"][0].tolist()
        assert processor.get_number_of_latent_patches(size[1], size[0]) == height // 16 * (width // 16)
        assert processor.get_number_of_image_patches(size[1], size[0], edited=True) == len(features["pixel_values"])
        settings = {"max_pixels": 100_000}
        fewer = len(processor(Image.new("RGB", size), **settings)["pixel_values"])
        assert processor.get_number_of_image_patches(size[1], size[0], settings) == fewer
        read = processor(Image.new("RGB", size))
        assert processor.get_number_of_image_patches(size[1], size[0]) == len(read["pixel_values"])


def test_wrong_calls_are_refused():
    processor = BagelImageProcessor(**TINY)
    with pytest.raises(ValueError, match="no images"):
        processor([])
    with pytest.raises(ValueError, match="edited has 2 entries for 1 images"):
        processor(picture(), edited=[True, False])
    with pytest.raises(ValueError, match="neither read nor edited"):
        processor(picture(), read=False)
    with pytest.raises(TypeError, match="do_flip"):
        processor(picture(), do_flip=False)
    for size in ({"height": 224, "width": 224}, 224):
        with pytest.raises(ValueError, match='exactly "shortest_edge" and "longest_edge"'):
            BagelImageProcessor(size=size)
    with pytest.raises(ValueError, match="image_mean is one number, or one per channel"):
        processor(picture(), image_mean=[0.5] * 4)


def test_the_settings_that_every_image_processor_has_act():
    image, processor = picture(56, 42), BagelImageProcessor(**TINY, patch_size=14)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    raw = processor(image, do_resize=False, do_rescale=False, do_normalize=False)["pixel_values"]
    assert torch.equal(raw, patchify(pixels.float(), 14))
    scaled = processor(image, do_resize=False, do_normalize=False)["pixel_values"]
    assert torch.equal(scaled, raw / 255)
    assert torch.equal(processor(image, do_resize=False)["pixel_values"], (scaled - 0.5) / 0.5)
    twice = processor(image, do_resize=False, do_normalize=False, rescale_factor=2.0)["pixel_values"]
    assert torch.equal(twice, raw * 2)
    floats = processor(pixels / 255, do_resize=False, do_rescale=False, do_normalize=False)["pixel_values"]
    assert torch.equal(floats, scaled)
    one = processor(image, image_mean=0.1, image_std=2)["pixel_values"]
    assert torch.equal(one, processor(image, image_mean=[0.1] * 3, image_std=[2] * 3)["pixel_values"])
    with pytest.raises(ValueError, match="divisible by 14, this picture is 50x42"):
        processor(picture(50, 42), do_resize=False)
    with pytest.raises(ValueError, match="is RGBA, not RGB"):
        processor(picture(mode="RGBA"), do_convert_rgb=False)
    processor(image, do_convert_rgb=False)


def test_settings_that_were_given_are_saved(tmp_path):
    given = {
        "do_resize": False,
        "do_rescale": False,
        "rescale_factor": 2.0,
        "do_normalize": False,
        "do_convert_rgb": False,
    }
    BagelImageProcessor(**given).save_pretrained(tmp_path)
    loaded = BagelImageProcessor.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in given} == given
    assert BagelImageProcessor.from_pretrained(tmp_path, do_resize=True).do_resize
    assert BagelImageProcessor(do_resize=None).do_resize


def test_settings_that_bagel_has_no_use_for_are_refused_by_name(tmp_path):
    processor = BagelImageProcessor(**TINY)
    asked = {
        "do_center_crop": True,
        "crop_size": {"height": 3, "width": 3},
        "do_pad": True,
        "pad_size": {"height": 3, "width": 3},
        "default_to_square": True,
        "data_format": "channels_last",
        "device": "cuda",
        "disable_grouping": True,
        "image_seq_length": 3,
        "min_pixels": 3,
    }
    assert asked.keys() == REFUSED.keys()
    for name, value in asked.items():
        with pytest.raises(ValueError, match=f"{name} cannot be set: .*:"):
            processor(picture(), **{name: value})
        with pytest.raises(ValueError, match=f"{name} cannot be set"):
            BagelImageProcessor(**{name: value})
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="do_pad cannot be set"):
        BagelImageProcessor.from_pretrained(tmp_path, do_pad=True)
    nothing = dict.fromkeys(asked, None) | {"do_pad": False, "device": torch.device("cpu")}
    nothing |= {"data_format": ChannelDimension.FIRST}
    same_pixels = processor(picture(), **nothing)["pixel_values"]
    assert torch.equal(same_pixels, processor(picture())["pixel_values"])


def test_unknown_settings_are_said(monkeypatch):
    warnings = []
    monkeypatch.setattr("bagel.image_processing_bagel.logger.warning", warnings.append)
    BagelImageProcessor(latentsize=3, image_processor_type="BagelImageProcessor")
    assert len(warnings) == 1 and warnings[0].startswith("BagelImageProcessor has no setting latentsize; it has size,")


def test_images_are_fetched_with_their_nesting_and_alpha(tmp_path):
    Image.new("RGBA", (3, 3), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    fetched = BagelImageProcessor().fetch_images([[str(tmp_path / "clear.png")], []])
    assert fetched[0][0].getpixel((1, 1)) == (255, 255, 255) and fetched[1] == []


def test_numpy_can_be_asked_for():
    features = BagelImageProcessor(**TINY)(picture(), edited=True, return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in features.values())


def test_settings_survive_saving(tmp_path):
    settings = {**TINY, "vae_resize_first": True, "patch_size": 7, "latent_stride": 8, "max_pixels": 9000}
    settings |= {"max_input_pixels": 10**6, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.5, 0.4, 0.3], "resample": 2}
    processor = BagelImageProcessor(**settings)
    processor.save_pretrained(tmp_path)
    loaded = BagelImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert {name: getattr(loaded, name) for name in settings} == settings
    for name, value in processor(picture(), edited=True).items():
        assert torch.equal(value, loaded(picture(), edited=True)[name])
    assert BagelImageProcessor.from_pretrained(tmp_path, patch_size=14).patch_size == 14


def test_defaults_are_the_released_transforms(tmp_path):
    BagelImageProcessor().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved.pop("auto_map")["AutoImageProcessor"] == "image_processing_bagel.BagelImageProcessor"
    assert saved == {
        "image_processor_type": "BagelImageProcessor",
        "size": {"shortest_edge": 224, "longest_edge": 980},
        "latent_size": {"shortest_edge": 512, "longest_edge": 1024},
        "patch_size": 14,
        "latent_stride": 16,
        "max_pixels": 1806336,
        "vae_resize_first": False,
        "max_input_pixels": 178956970,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
    }


def test_auto_image_processor_loads_it_as_remote_code(tmp_path, monkeypatch):
    monkeypatch.setattr(BagelImageProcessor, "_auto_class", None)
    BagelImageProcessor.register_for_auto_class()
    BagelImageProcessor(**TINY).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__name__ == "BagelImageProcessor"
    expected = BagelImageProcessor(**TINY)(picture(), edited=True)
    for name, value in loaded(picture(), edited=True).items():
        assert torch.equal(value, expected[name])
