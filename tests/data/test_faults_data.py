"""Faults of images and data sets, rows F01 to F41 of the fault table; the row is in the name of the test.

Rows about a running training use `MultiCropDataset` and `BadImages` directly; the whole run is in
`tests/integration/test_data_sources.py`. F22 and F23 belong to the model: `test_faults_model.py`.
"""

import ast
import io
import json
import logging
import multiprocessing
import os
import struct
import tarfile
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from datasets import Value
from PIL import Image, PngImagePlugin

import hf_regvit
from builders import encoded as encode
from builders import image_table, json_lines
from builders import plain_images as make_folder
from builders import tar_file as make_tar
from hf_regvit.data import bad_images as bad_images_module
from hf_regvit.data import builtin
from hf_regvit.data import decoding as image_guard
from hf_regvit.data import loading as loading_module
from hf_regvit.data.augmentation import MultiCrop
from hf_regvit.data.decoding import BadImageError, ImageLimits, open_image
from hf_regvit.data.loading import load_images
from hf_regvit.data.parts import LabelError, open_parts
from hf_regvit.models import processing as processing_module
from hf_regvit.pretraining import crops as crops_module
from hf_regvit.training import samplers

SOURCE_CODE = Path(hf_regvit.__file__).parent


def same_pixels(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and bool((np.asarray(one) == np.asarray(other)).all())


def crops_of(source, bad_images=None, **attributes) -> crops_module.MultiCropDataset:
    multi_crop = MultiCrop(global_size=16, local_size=8, num_local_crops=1, patch_size=8)
    dataset = crops_module.MultiCropDataset(source, multi_crop, seed=1, bad_images=bad_images)
    vars(dataset).update(attributes)
    return dataset


# --- Images


def test_truncated_F01_jpeg_cut_in_half_names_its_path(photo, tmp_path):
    content = encode(photo, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(BadImageError, match="truncated") as caught:
        open_image(tmp_path / "cut.jpg")
    assert caught.value.path == str(tmp_path / "cut.jpg")
    assert caught.value.kind == "truncated"


def test_truncated_F01_is_skipped_and_recorded_in_training(photo, tmp_path):
    make_folder(tmp_path, [f"{i}.png" for i in range(5)])
    content = encode(photo, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    source = load_images(tmp_path)
    dataset = crops_of(
        source, bad_images_module.BadImages(tmp_path / "run" / "bad_images.jsonl", num_images=len(source))
    )
    item = dataset[(3, source.ids.index("cut.jpg"))]
    assert item["global_crops"].shape == (2, 3, 16, 16)
    (record,) = json_lines(tmp_path / "run" / "bad_images.jsonl")
    assert record["path"] == str(tmp_path / "cut.jpg")
    assert (record["kind"], record["epoch"]) == ("truncated", 3)
    assert "truncated" in record["reason"]
    with pytest.raises(BadImageError, match=r"cut\.jpg"):
        crops_of(source)[(3, source.ids.index("cut.jpg"))]


@pytest.mark.parametrize("missing", [1, 2, 5, 10])
def test_truncated_F02_last_bytes_missing_is_skipped_by_default(photo, missing):
    content = encode(photo, "JPEG", quality=95)[:-missing]
    # An image without its end marker (2 bytes) counts as truncated, although all pixels are there.
    with pytest.raises(BadImageError, match="truncated"):
        open_image(content)


@pytest.mark.parametrize("missing", [2, 5, 10, 60])
@pytest.mark.parametrize("name", ["chelsea", "hubble", "rocket", "coffee"])  # 300 to 872 rows
def test_truncated_F02_salvage_keeps_only_rows_of_the_file_itself(missing, name):
    whole = builtin.builtin_images()[name]
    content = encode(whole, "JPEG", quality=90)
    salvaged = open_image(content[:-missing], limits=ImageLimits(on_truncated="salvage"))
    expected = np.asarray(open_image(content))
    assert salvaged.width == whole.width
    assert 0.95 * whole.height <= salvaged.height <= whole.height
    assert (np.asarray(salvaged) == expected[: salvaged.height]).all()


def test_truncated_F02_salvage_refuses_progressive_files():
    """A later scan over all rows is missing, so no row is complete."""
    content = encode(builtin.builtin_images()["chelsea"], "JPEG", progressive=True)[:-10]
    with pytest.raises(BadImageError, match="truncated"):
        open_image(content, limits=ImageLimits(on_truncated="salvage"))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_F02_salvage_refuses_what_lacks_more_than_a_twentieth(share):
    content = encode(builtin.builtin_images()["chelsea"], "JPEG", quality=90)
    with pytest.raises(BadImageError, match=r"truncated|cannot identify") as caught:
        open_image(content[: int(share * len(content))], limits=ImageLimits(on_truncated="salvage"))
    assert caught.value.kind == "truncated"


def test_truncated_F03_flipped_bits_in_jpeg_data_decode_and_nobody_can_tell(photo):
    content = bytearray(encode(photo, "JPEG", quality=95))
    start = content.rindex(b"\xff\xda") + 200
    whole = np.asarray(open_image(bytes(content)))
    changed = 0
    for position in range(start, start + 200, 10):
        damaged = bytearray(content)
        damaged[position] ^= 0x04
        if damaged[position] == 0xFF or content[position] == 0xFF:
            continue
        changed += (np.asarray(open_image(bytes(damaged))) != whole).any()
    assert changed > 5
    assert "is not detected" in " ".join(open_image.__doc__.split())


def flip_one_bit_after_another(content: bytes) -> None:
    """Exit status 0 if every damaged copy is detected, 1 if not, and another one if a decoder crashes."""
    for position in range(8, len(content), 97):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        try:
            open_image(bytes(damaged))
        except BadImageError:
            continue
        os._exit(1)
    os._exit(0)


def test_F04_flipped_bits_in_a_png_leave_the_process_alive(photo):
    """Run in a separate process, because one decoder crashed. The checksums of PNG detect every flip."""
    process = multiprocessing.get_context("fork").Process(
        target=flip_one_bit_after_another, args=(encode(photo, "PNG"),)
    )
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 0


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_either_loads_or_is_a_bad_image(photo, seed):
    """Any damage to a file has one of these two outcomes and no other."""
    rng = np.random.default_rng(seed)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    originals = [
        encode(photo, "JPEG", exif=exif), encode(photo, "JPEG", progressive=True), encode(photo, "PNG", exif=exif),
        encode(photo.convert("P"), "PNG", transparency=3), encode(photo, "GIF"), encode(photo, "WEBP"),
        encode(photo, "TIFF", compression="tiff_lzw"), encode(photo, "BMP"),
    ]  # fmt: skip
    loaded = refused = 0
    for _ in range(150):
        content = bytearray(originals[rng.integers(len(originals))])
        if rng.random() < 0.3:
            content = content[: rng.integers(len(content))]
        # Half of the damage is in the header, where it has the most different effects.
        for _ in range(rng.integers(1, 6)):
            if content:
                reach = min(len(content), 400) if rng.random() < 0.5 else len(content)
                content[rng.integers(reach)] = rng.integers(256)
        limits = ImageLimits(on_truncated="salvage" if rng.random() < 0.2 else "skip")
        try:
            image = open_image(bytes(content), limits=limits)
        except BadImageError:
            refused += 1
        else:
            loaded += 1
            assert image.mode == "RGB"
            assert min(image.size) >= 16
    assert loaded > 10
    assert refused > 40


@pytest.mark.parametrize(
    ("content", "reason", "kind"),
    [
        (b"", "empty", "empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", r"HTML.*failed download\?", "not an image"),
        (b"hello, world", "hello", "not an image"),
        (b"\x89PNG\r\n\x1a\nnothing else", "header is damaged", "corrupt"),
    ],
)
def test_F05_empty_html_or_text_named_jpg(content, reason, kind, tmp_path):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(BadImageError, match=rf"x\.jpg.*{reason}") as caught:
        open_image(tmp_path / "x.jpg")
    assert caught.value.kind == kind


def test_F06_cmyk_jpeg():
    """Golden colors: pure inks, computed by hand, R = 255 (1 - C)(1 - K)."""
    inks = {(0, 0, 0, 0): 255, (255, 0, 0, 0): (0, 255, 255), (0, 0, 0, 255): 0, (0, 255, 255, 0): (255, 0, 0)}
    for ink, expected in inks.items():
        image = open_image(encode(Image.new("CMYK", (32, 32), ink), "JPEG", quality=100))
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image, dtype=int) - np.array(expected)).max() <= 2, ink


def test_F06_cmyk_photograph(photo):
    image = open_image(encode(photo.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(photo)).mean() < 4


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_F07_sixteen_bit_grey_is_scaled_by_its_depth(format, caplog):
    image_guard.say_once.cache_clear()
    ramp = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    with caplog.at_level(logging.WARNING, logger="hf_regvit"):
        for _ in range(3):
            image = np.asarray(open_image(encode(Image.fromarray(ramp), format)))
    assert (image == np.rint(ramp / 257)[:, :, None]).all()
    assert sum("16-bit" in message for message in caplog.messages) == 1


@pytest.mark.parametrize(("white", "told"), [(4095, 1), (4096, 0), (65535, 0)])
def test_F07_twelve_bits_in_sixteen_are_told_once(white, told, caplog):
    """X-ray and other cameras write such files; scaled by the bit depth of the file, they are black."""
    image_guard.say_once.cache_clear()
    ramp = np.linspace(0, white, 32 * 32).astype(np.uint16).reshape(32, 32)
    with caplog.at_level(logging.WARNING, logger="hf_regvit"):
        for _ in range(3):
            open_image(encode(Image.fromarray(ramp), "PNG"))
    assert sum("no value above 4095" in message for message in caplog.messages) == told


VALUES = np.linspace(0, 1, 20 * 30, dtype=np.float32).reshape(20, 30)


def test_float_images_F08_float_has_no_defined_range():
    with pytest.raises(BadImageError, match=r"its mode F.*set value_range") as caught:
        open_image(encode(Image.fromarray(VALUES), "TIFF"))
    assert caught.value.kind == "value range"


def test_float_images_F08_with_a_range_it_is_scaled():
    image = open_image(encode(Image.fromarray(VALUES), "TIFF"), limits=ImageLimits(value_range=(0, 1)))
    assert (np.asarray(image)[:, :, 1] == np.rint(255 * VALUES.astype(np.float64))).all()
    with pytest.raises(BadImageError, match=r"0 to 1 exceed value_range=\(0, 0.5\)"):
        open_image(encode(Image.fromarray(VALUES), "TIFF"), limits=ImageLimits(value_range=(0, 0.5)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_float_images_F21_nan_or_infinite_pixels_are_rejected(value):
    values = VALUES.copy()
    values[3, 4] = value
    with pytest.raises(BadImageError, match="1 of 600 values are NaN or infinite"):
        open_image(encode(Image.fromarray(values), "TIFF"), limits=ImageLimits(value_range=(0, 1)))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_F09_transparency_becomes_white(mode):
    hidden = Image.new("RGBA", (16, 16), (200, 10, 10, 0)).convert(mode)
    assert (np.asarray(open_image(encode(hidden, "PNG"))) == 255).all()
    half = Image.new("RGBA", (16, 16), (0, 0, 0, 128)).convert(mode)
    assert abs(int(np.asarray(open_image(encode(half, "PNG")))[0, 0, 0]) - 127) <= 1


def test_F09_training_sees_what_serving_sees(photo, tmp_path):
    """The training path and the image processor on a file opened as for inference both give white."""
    rgba = photo.convert("RGBA")
    rgba.putalpha(Image.new("L", rgba.size, 0))
    rgba.save(tmp_path / "a.png")
    processor = processing_module.default_image_processor(32)
    served = processor(open_image(tmp_path / "a.png"), return_tensors="pt")["pixel_values"]
    assert torch.equal(served, processor(Image.new("RGB", photo.size, "white"), return_tensors="pt")["pixel_values"])
    assert np.asarray(load_images(tmp_path)[0].image).min() == 255


def test_F10_palette_with_transparency():
    image = Image.new("P", (16, 16), 0)
    image.putpalette([255, 0, 0, 0, 255, 0] + [0] * 762)
    image.paste(1, (0, 0, 8, 16))
    pixels = np.asarray(open_image(encode(image, "PNG", transparency=0)))
    assert pixels[0, 0].tolist() == [0, 255, 0]
    assert pixels[0, 12].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_F11_other_modes(photo, mode):
    image = open_image(encode(photo.convert(mode), "PNG"))
    assert image.mode == "RGB"
    assert (np.asarray(image) == np.asarray(photo.convert(mode).convert("RGB"))).all()


def test_F11_grey_with_alpha(photo):
    gray = photo.convert("LA")
    assert (np.asarray(open_image(encode(gray, "PNG"))) == np.asarray(photo.convert("L").convert("RGB"))).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_F12_exif_orientation(photo, orientation, format):
    upright = np.asarray(photo, dtype=int)
    stored = np.ascontiguousarray(
        {
            1: upright,
            2: upright[:, ::-1],
            3: upright[::-1, ::-1],
            4: upright[::-1],
            5: upright.transpose(1, 0, 2),
            6: upright.transpose(1, 0, 2)[::-1],
            7: upright.transpose(1, 0, 2)[::-1, ::-1],
            8: upright.transpose(1, 0, 2)[:, ::-1],
        }[orientation]
    ).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(format, {})
    decoded = np.asarray(open_image(encode(Image.fromarray(stored), format, exif=exif, **options)), dtype=int)
    assert decoded.shape == upright.shape
    assert np.abs(decoded - upright).max() <= (4 if format == "JPEG" else 0)


def test_F12_equals_the_eye_of_pillow(photo):
    """The same rotations as `ImageOps.exif_transpose`."""
    from PIL import ImageOps

    for orientation in range(0, 11):
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encode(photo, "PNG", exif=exif)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        assert same_pixels(open_image(content), expected)
        assert same_pixels(open_image(open_image(content)), expected)  # not rotated twice


def test_F12_unreadable_exif_is_no_reason_to_lose_a_image(photo):
    content = encode(photo, "JPEG", exif=b"Exif\0\0MM\0\x2a\0\0\0\xff")
    assert open_image(content).size == photo.size


def test_size_F13_tiny():
    with pytest.raises(BadImageError, match="it has 1x1 pixels, below min_side=16") as caught:
        open_image(encode(Image.new("RGB", (1, 1)), "PNG"))
    assert caught.value.kind == "too small"
    assert open_image(encode(Image.new("RGB", (16, 30)), "PNG")).size == (16, 30)
    assert open_image(encode(Image.new("RGB", (1, 1)), "PNG"), limits=ImageLimits(min_side=1)).size == (1, 1)


def test_size_F13_pillow_images_pass_the_same_guard():
    with pytest.raises(BadImageError, match=r"image in memory.*8x9"):
        open_image(Image.new("RGB", (8, 9)))


@pytest.mark.parametrize("size", [(20, 401), (401, 20)])
def test_size_F14_extreme_aspect(size):
    with pytest.raises(BadImageError, match="are 20:1, above max_aspect=20") as caught:
        open_image(encode(Image.new("RGB", size), "PNG"))
    assert caught.value.kind == "too elongated"
    open_image(encode(Image.new("RGB", (20, 400)), "PNG"))


def test_size_F15_more_than_max_pixels(photo):
    with pytest.raises(BadImageError, match="it has 120x80 pixels, above max_pixels=9599") as caught:
        open_image(encode(photo, "PNG"), limits=ImageLimits(max_pixels=9599))
    assert caught.value.kind == "too large"
    assert open_image(encode(photo, "PNG"), limits=ImageLimits(max_pixels=9600)).size == (120, 80)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # Pillow's own, before our refusal
@pytest.mark.parametrize("claimed", [10_000, 13_500, 20_000])
def test_size_F16_bomb_is_refused_before_decoding(claimed, monkeypatch):
    content = bytearray(encode(Image.new("L", (10, 10)), "PNG"))
    content[16:24] = claimed.to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("was decoded"))
    with pytest.raises(BadImageError, match=r"pixels|bomb") as caught:
        open_image(bytes(content), name="bomb.png")
    assert caught.value.kind == "too large"


def test_size_limits_that_cannot_be_meant():
    for options in (
        {"min_side": 0}, {"max_aspect": 0.5}, {"max_pixels": 10**10}, {"on_truncated": "guess"},
        {"value_range": (1.0, 1.0)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            ImageLimits(**options)


def test_F17_png_text_bomb(photo):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("comment", "a" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    content = encode(photo, "PNG", pnginfo=info)
    assert len(content) < 100_000  # a bomb is small
    with pytest.raises(BadImageError, match="Decompressed data too large"):
        open_image(content)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_F18_animation_gives_its_first_frame(format):
    frames = [Image.new("RGB", (18, 18), color) for color in ("red", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    content = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    pixels = np.asarray(open_image(content))
    assert pixels.shape == (18, 18, 3)
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert image_guard.image_facts(content, name="x").animated


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "PostScript.*convert it to JPEG or PNG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC.*convert it"),
        (b"\xff\x0a\xfa\x7f", "JPEG XL.*convert it"),
        (b"8BPS\0\x01", r"it is not in a supported format \(JPEG, PNG"),
    ],
)
def test_F19_formats_outside_of_the_list(content, reason):
    with pytest.raises(BadImageError, match=reason):
        open_image(content, name="x.jpg")


def test_F19_avif_where_pillow_reads_it(photo):
    if "AVIF" not in image_guard.known_formats():
        pytest.skip("this build of Pillow has no AVIF")
    assert open_image(encode(photo, "AVIF", quality=95)).size == photo.size


def test_F19_images_of_other_formats_are_not_left_out_in_silence(tmp_path, caplog):
    make_folder(tmp_path, ["a.png"])
    (tmp_path / "b.heic").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    with caplog.at_level(logging.WARNING, logger="hf_regvit"):
        assert len(load_images(tmp_path)) == 1
    assert "Files of other types are left out: 1 .heic" in caplog.text


def test_F20_icc_profile_is_ignored_and_said_so(photo):
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert same_pixels(open_image(encode(photo, "PNG", icc_profile=profile)), photo)
    assert image_guard.image_facts(encode(photo, "PNG", icc_profile=profile), name="x").icc_profile
    assert "ICC profiles are ignored" in " ".join(open_image.__doc__.split())


def test_F24_other_numbers_of_channels_name_the_file(tmp_path):
    """Five channels of 16 bits, as microscopes write them, which no Pillow mode supports."""
    tags = {
        256: (4, 32), 257: (4, 32), 258: (3, 16), 259: (3, 1), 262: (3, 1), 273: (4, 200), 277: (3, 5),
        278: (4, 32), 279: (4, 32 * 32 * 10),
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, (kind, value) in tags.items())
    header = b"II*\0\x08\0\0\0" + len(tags).to_bytes(2, "little") + entries + b"\0" * 4
    (tmp_path / "cells.tif").write_bytes(header.ljust(200, b"\0") + b"\0" * (32 * 32 * 10))
    with pytest.raises(BadImageError, match=r"cells\.tif"):
        load_images(tmp_path)[0]


# --- Data sets


def test_F25_empty_folder_lists_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"Looked for .*\.jpg.*\.parquet and \.tar; found nothing"):
        load_images(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"found 1 other files \('notes'\)"):
        load_images(tmp_path)


def test_F26_missing_path_names_the_nearest_parent(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"nearest existing folder is '{tmp_path}'"):
        load_images(tmp_path / "no" / "such" / "folder")
    with pytest.raises(FileNotFoundError, match=r"No file matches the pattern .*\*\.tar"):
        load_images(tmp_path / "*.tar")


def test_F27_a_single_class_keeps_its_name(tmp_path):
    """Valid for pretraining; the probe or the fine-tuning checks if one class is enough."""
    source = load_images(make_folder(tmp_path, ["cat/a.png", "cat/b.png"]))
    assert (source.label_names, source.labels) == (("cat",), [0, 0])


def test_F28_class_only_in_validation(tmp_path):
    make_folder(tmp_path, ["train/cat/a.png", "train/yak/a.png", "val/yak/b.png", "val/emu/c.png"])
    heldout = load_images(tmp_path, split="validation")
    assert (heldout.labels, heldout.label_names) == ([2, 1], ("cat", "yak", "emu"))  # the ids of training stay
    assert heldout.notes == (f"'{tmp_path}': 1 classes have no training images: 'emu'.",)
    with pytest.raises(LabelError, match="'emu'"):
        open_parts(tmp_path)


def test_F28_joined_sources_with_other_classes_have_no_labels(tmp_path):
    """Class 0 of one source must not become class 0 of another."""
    make_folder(tmp_path, ["one/cat/a.png", "one/dog/b.png", "two/emu/c.png", "two/dog/d.png"])
    joined = load_images([tmp_path / "one", tmp_path / "two"])
    assert len(joined) == 4
    assert joined.labels is None
    assert joined.label_names is None
    make_folder(tmp_path, ["three/cat/a.png", "three/dog/b.png"])
    assert load_images([tmp_path / "one", tmp_path / "three"]).labels == [0, 1, 0, 1]


def test_F30_equal_names_in_different_folders_keep_their_ids(tmp_path):
    make_folder(tmp_path, ["a/x.png", "b/x.png"])
    assert load_images(tmp_path).ids == ["a/x.png", "b/x.png"]
    assert len(set(load_images([tmp_path / "a", tmp_path / "b"]).ids)) == 2


def test_F32_name_that_is_no_utf8(tmp_path, caplog):
    make_folder(tmp_path / "set", ["a.png"])
    try:
        (tmp_path / "set" / "a.png").rename(tmp_path / "set" / os.fsdecode(b"\xff.png"))
    except OSError:
        pytest.skip("this file system allows UTF-8 names only")
    source = load_images(tmp_path / "set")
    assert source[0].image.size == (20, 16)
    (tmp_path / "set" / source.ids[0]).write_bytes(b"")
    bad = bad_images_module.BadImages(tmp_path / "bad_images.jsonl", max_bad_share=1.0, num_images=1)
    with pytest.raises(bad_images_module.TooManyBadImagesError):
        crops_of(source, bad)[(0, 0)]
    assert r"\xff.png" in caplog.text.encode().decode()  # printable in a terminal
    (record,) = json_lines(tmp_path / "bad_images.jsonl")
    assert os.fsencode(record["path"]).endswith(b"/\xff.png")


def test_F33_names_and_link_loops(tmp_path):
    long = "x" * 251 + ".png"
    make_folder(tmp_path, ["kätzchen und hunde/ein bild (1).png", long])
    (tmp_path / "kätzchen und hunde" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    source = load_images(tmp_path)
    assert source.ids == ["kätzchen und hunde/ein bild (1).png", "self.png", long]
    assert source[0].image.size == source[2].image.size == (20, 16)
    with pytest.raises(BadImageError, match=r"self\.png.*symbolic links"):
        source[1]


FORTY = [f"{i:03d}.png" for i in range(40)]


def while_training_run(tmp_path, source, **options):
    bad = bad_images_module.BadImages(tmp_path / "bad_images.jsonl", num_images=len(source), **options)
    dataset = crops_of(source, bad, cache_bytes=0)
    return [dataset[key] for key in samplers.EpochSampler(len(source), seed=0)]


def test_while_training_F34_file_deleted_during_training(tmp_path):
    folder = make_folder(tmp_path / "set", FORTY)
    source = load_images(folder)
    (folder / "007.png").unlink()
    items = while_training_run(tmp_path, source)
    assert len(items) == 40
    (record,) = json_lines(tmp_path / "bad_images.jsonl")
    assert (record["kind"], record["path"]) == ("missing", str(folder / "007.png"))
    # All other items are unchanged, and the replaced one has crops of another image with its own parameters.
    place = next(item for item in items if item["sample_id"] == 7)
    others = {item["sample_id"]: item["global_crops"] for item in items if item["sample_id"] != 7}
    assert not any(torch.equal(place["global_crops"], crops) for crops in others.values())
    (folder / "007.png").write_bytes((folder / "008.png").read_bytes())
    whole = while_training_run(tmp_path, load_images(folder))
    for item in whole:
        if item["sample_id"] != 7:
            assert torch.equal(item["global_crops"], others[item["sample_id"]])


def test_while_training_F34_file_changed_during_training(tmp_path):
    folder = make_folder(tmp_path / "set", FORTY)
    source = load_images(folder)
    (folder / "007.png").write_bytes((folder / "007.png").read_bytes()[:60])
    while_training_run(tmp_path, source)
    assert [record["kind"] for record in json_lines(tmp_path / "bad_images.jsonl")] == ["truncated"]


def test_while_training_F35_permission_denied(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "set", FORTY)
    # The tests may run as root, whom permissions do not stop, so the error is simulated.
    reading = Path.read_bytes

    def read_bytes(path):
        if path.name == "003.png":
            raise PermissionError(13, "Permission denied", str(path))
        return reading(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    while_training_run(tmp_path, load_images(folder))
    (record,) = json_lines(tmp_path / "bad_images.jsonl")
    assert (record["kind"], record["reason"]) == ("permission", "Permission denied")


def test_while_training_F35_folder_that_cannot_be_listed(tmp_path, monkeypatch, caplog):
    folder = make_folder(tmp_path / "set", FORTY)
    make_folder(folder, ["secret/x.png"])
    listing = os.scandir

    def scandir(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    source = load_images(folder)
    assert len(source) == 40
    assert "secret" in caplog.text
    while_training_run(tmp_path, source)
    (record,) = json_lines(tmp_path / "bad_images.jsonl")
    assert record["path"].endswith("secret")


def test_while_training_F36_too_many_bad_images_stop_with_a_summary(tmp_path):
    folder = make_folder(tmp_path / "set", FORTY)
    for name in ("001.png", "002.png", "003.png"):
        (folder / name).write_bytes(b"")
    (folder / "004.png").write_bytes(b"<html>")
    source = load_images(folder)
    with pytest.raises(bad_images_module.TooManyBadImagesError) as caught:
        while_training_run(tmp_path, source, max_bad_share=0.05)  # 2 of 40
    message = str(caught.value)
    assert "more than max_bad_share=0.05" in message
    assert "3 of the " in message
    assert "empty" in message
    assert str(tmp_path / "bad_images.jsonl") in message
    assert "regvit data-check" in message
    items = while_training_run(tmp_path, source, max_bad_share=0.1)
    assert len(items) == 40
    assert len(json_lines(tmp_path / "bad_images.jsonl")) == 4  # earlier ones are recorded once


def test_while_training_F36_share_zero_is_strict_and_one_never_stops(tmp_path):
    folder = make_folder(tmp_path / "set", FORTY)
    (folder / "001.png").write_bytes(b"")
    with pytest.raises(bad_images_module.TooManyBadImagesError, match="1 of the"):
        while_training_run(tmp_path, load_images(folder), max_bad_share=0.0)
    for i in range(30):
        (folder / f"{i:03d}.png").write_bytes(b"")
    assert len(while_training_run(tmp_path, load_images(folder), max_bad_share=1.0)) == 40
    with pytest.raises(ValueError, match=r"max_bad_share=1\.5"):
        bad_images_module.BadImages(max_bad_share=1.5)


@pytest.mark.slow  # torch waits five seconds for each worker of an abandoned loader
def test_while_training_F36_worker_processes_report_too(tmp_path):
    folder = make_folder(tmp_path / "set", FORTY)
    for name in ("001.png", "002.png"):
        (folder / name).write_bytes(b"")
    source = load_images(folder)
    bad = bad_images_module.BadImages(tmp_path / "bad_images.jsonl", num_images=40, max_bad_share=0.05)
    loader = torch.utils.data.DataLoader(
        crops_of(source, bad), batch_size=4, sampler=samplers.EpochSampler(40, seed=0), num_workers=2,
        collate_fn=crops_module.DinoCollator((2, 2), seed=0),
    )  # fmt: skip
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        assert len([batch["masks"] for batch in loader]) == 10
    records = json_lines(tmp_path / "bad_images.jsonl")
    assert sorted(record["path"] for record in records) == [str(folder / name) for name in ("001.png", "002.png")]
    (folder / "003.png").write_bytes(b"")
    with pytest.raises(bad_images_module.TooManyBadImagesError, match=r"^3 of the \d+ images"):
        list(loader)


@pytest.mark.slow
def test_while_training_F36_replacements_do_not_depend_on_workers_or_position(tmp_path):
    folder = make_folder(tmp_path / "set", FORTY)
    for name in ("001.png", "002.png"):
        (folder / name).write_bytes(b"")
    source = load_images(folder)

    def batches(num_workers, skip=0):
        dataset = crops_of(source, bad_images_module.BadImages(num_images=40, max_bad_share=0.1))
        keys = list(samplers.EpochSampler(40, seed=0))[skip:]
        collator = crops_module.DinoCollator((2, 2), seed=0)
        return list(
            torch.utils.data.DataLoader(
                dataset, batch_size=4, sampler=keys, num_workers=num_workers, collate_fn=collator
            )
        )

    alone = batches(0)
    for one, other in zip(alone, batches(2), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    for one, other in zip(alone[5:], batches(0, skip=20), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_while_training_F36_distinct_images_count_once():
    bad = bad_images_module.BadImages(num_images=1000, max_bad_share=0.002)
    error = BadImageError("a.jpg", "empty", "empty")
    for epoch in range(50):
        bad.bad(error, epoch=epoch, index=3)
    bad.bad(BadImageError("b.jpg"), epoch=0, index=4)
    with pytest.raises(bad_images_module.TooManyBadImagesError, match="3 of the 3 images"):
        bad.bad(BadImageError("c.jpg"), epoch=0, index=5)


def test_tables_F37_wrong_columns(tmp_path, photo):
    image_table(tmp_path / "a.parquet", types={"n": Value("int64")}, image=[encode(photo, "PNG")], n=[0])
    with pytest.raises(ValueError, match=r"'pixels' does not hold images.*Columns: image, n; with images: image"):
        load_images(tmp_path, image_column="pixels")
    with pytest.raises(
        ValueError, match=r"label column 'breed' has type None, expected integers or ClassLabel. Such columns: n"
    ):
        load_images(tmp_path, label_column="breed")
    with pytest.raises(ValueError, match=r"'pixels' does not hold images"):
        loading_module.stream_images(tmp_path, image_column="pixels")


def test_tables_F37_empty_cell(tmp_path, photo):
    image_table(tmp_path / "a.parquet", image=[None, encode(photo, "PNG")])
    with pytest.raises(BadImageError, match=r"row 0.*empty"):
        load_images(tmp_path)[0]
    bad = bad_images_module.BadImages(num_images=2)
    assert crops_of(load_images(tmp_path), bad)[(0, 0)]["sample_id"] == 0


def test_tables_F37_cut_parquet_file_is_named(tmp_path, photo):
    image_table(tmp_path / "a.parquet", types={"n": Value("int64")}, image=[encode(photo, "PNG")], n=[0])
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cannot be read as parquet \(a\.parquet\)"):
        load_images(tmp_path)


@pytest.fixture
def shards(tmp_path, photo):
    content = encode(photo, "JPEG")
    for shard in range(2):
        members = {}
        for i in range(3):
            members |= {f"{3 * shard + i:06d}.jpg": content, f"{3 * shard + i:06d}.cls": b"%d" % i}
        make_tar(tmp_path / f"train-{shard}.tar", members)
    return tmp_path


def test_tar_whole_shards(shards, photo):
    source = load_images(shards)
    assert source.ids == [f"train-{i // 3}.tar#{i:06d}.jpg" for i in range(6)]
    assert source.labels == [0, 1, 2] * 2
    assert source.label_names == ("0", "1", "2")
    assert source[4].image == open_image(encode(photo, "JPEG"))
    assert source.problems == ()
    assert len(load_images(shards / "train-1.tar")) == 3
    assert load_images(str(shards / "train-*.tar")).ids == source.ids


@pytest.mark.parametrize("cut", ["data", "header", "end"])
def test_tar_F38_truncated_shard_keeps_what_is_whole(shards, cut, tmp_path, caplog):
    path = shards / "train-0.tar"
    with tarfile.open(path) as archive:
        last_image = archive.getmember("000002.jpg")
    size = {"data": last_image.offset_data + 100, "header": last_image.offset + 100, "end": 0}[cut]
    if cut == "end":  # all members are there, but not the end marker
        with tarfile.open(path) as archive:
            last = archive.getmembers()[-1]
        size = last.offset_data + 512
    path.write_bytes(path.read_bytes()[:size])
    source = load_images(shards)
    assert len(source) == (6 if cut == "end" else 5)
    assert source.problems
    assert all(problem.kind == "archive" for problem in source.problems)
    assert "train-0.tar" in caplog.text
    assert source[len(source) - 1].image.mode == "RGB"
    crops_of(source, bad_images_module.BadImages(tmp_path / "bad_images.jsonl", num_images=len(source)))
    assert json_lines(tmp_path / "bad_images.jsonl")[0]["kind"] == "archive"


def test_tar_F38_damaged_header_in_the_middle_is_no_end(shards):
    path = shards / "train-0.tar"
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        content[archive.getmember("000001.jpg").offset + 150] ^= 0x01  # its checksum
    path.write_bytes(bytes(content))
    source = load_images(shards)
    assert len(source) == 1 + 3
    assert "damaged header after 1 images" in source.problems[0].reason


def test_tar_F38_shard_that_shrinks_later(shards):
    source = load_images(shards)
    (shards / "train-1.tar").write_bytes((shards / "train-1.tar").read_bytes()[:3000])
    with pytest.raises(BadImageError, match="archive ends inside") as caught:
        source[5]
    assert caught.value.kind == "archive"


def test_tar_F40_members_that_lead_out_are_blocked(tmp_path, photo):
    content = encode(photo, "JPEG")
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "evil.tar", "w") as archive:
        for name in ("../outside.jpg", "/absolute.jpg", "a/../../b.jpg", "fine.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"link{kind.decode()}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    source = load_images(tmp_path / "set")
    assert source.ids == ["evil.tar#fine.jpg"]
    assert [problem.kind for problem in source.problems] == ["blocked"] * 6
    assert source[0].image.size == photo.size
    assert sorted(tmp_path.rglob("*")) == before  # nothing is unpacked, anywhere
    assert not Path("/absolute.jpg").exists()


def test_tar_F40_other_archives_are_not_opened(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"file of type '\.zip'"):
        load_images(tmp_path / "images.zip")
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(ValueError, match="is compressed"):
        load_images(tmp_path / "a.tar.gz")


def test_F39_data_set_smaller_than_one_global_batch():
    from hf_regvit.pretraining.arguments import PretrainingArguments
    from hf_regvit.pretraining.run import pretrain

    args = PretrainingArguments(
        output_dir="unused", data="digits", global_crop_size=32, local_crop_size=16, patch_size=8, hidden_size=32,
        num_hidden_layers=1, num_attention_heads=2, head_num_prototypes=64, per_device_train_batch_size=1000,
        gradient_accumulation_steps=3, use_cpu=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"1438 training images.*3000") as caught:
        pretrain(args)
    message = str(caught.value)
    for way_out in ("per_device_train_batch_size", "gradient_accumulation_steps", "--data"):
        assert way_out in message


def test_F41_remote_code_is_never_requested(tmp_path, monkeypatch):
    import datasets

    error = RuntimeError("Dataset scripts are no longer supported, but found pets.py")
    load_dataset = Mock(side_effect=error)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"'some-one/pets' cannot be used: Dataset scripts are no longer"):
        load_images("some-one/pets")
    with pytest.raises(ValueError, match="cannot be used: Dataset scripts"):
        loading_module.stream_images("some-one/pets")
    assert load_dataset.call_count == 2
    assert not any("trust_remote_code" in call.kwargs for call in load_dataset.call_args_list)
    calls = [
        keyword.arg
        for path in SOURCE_CODE.rglob("*.py")
        if path.stem != "clean_process"  # the program of the clean process loads as a user without the package would
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
    ]
    assert "limits" in calls
    assert "trust_remote_code" not in calls
    # A script next to the images of a folder is not run either.
    make_folder(tmp_path / "pets", ["a.png"])
    (tmp_path / "pets" / "pets.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert len(load_images(tmp_path / "pets")) == 1
    assert not (tmp_path / "ran").exists()


def test_a_record_of_bad_images_that_was_cut_off_does_not_end_the_next_run(tmp_path):
    """The machine lost power in the middle of a line; the next run appends to the same file."""
    path = tmp_path / "bad_images.jsonl"
    path.write_bytes(b'{"path": "a.jpg", "kind": "corrupt", "reason": "x", "epoch": 0}\n{"path": "b.j')
    bad = bad_images_module.BadImages(path, num_images=1000)
    for name in ("c.jpg", "d.jpg"):
        bad.bad(BadImageError(name, "truncated", "truncated"), epoch=0, index=ord(name[0]))
    known = [json.loads(line)["path"] for line in path.read_bytes().splitlines() if line.endswith(b"}")]
    assert known == ["a.jpg", "c.jpg", "d.jpg"]


def test_a_full_disk_costs_the_record_not_the_run(tmp_path, monkeypatch, caplog):
    bad = bad_images_module.BadImages(tmp_path / "bad_images.jsonl", num_images=1000)
    error = OSError(28, "No space left on device")
    monkeypatch.setattr(os, "write", Mock(side_effect=error))
    bad.bad(BadImageError("c.jpg", "truncated", "truncated"), epoch=0, index=3)
    assert "No space left on device" in caplog.text
