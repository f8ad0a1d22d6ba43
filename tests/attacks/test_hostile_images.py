"""Damaged and hostile images: each one is decoded within its limits or refused with a `BadImageError`."""

import os
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest

from builders import encoded, noise, png_chunk, write
from hf_regvit import check_data, load_images
from hf_regvit.data.decoding import BadImageError, ImageLimits, image_facts, open_image

pytestmark = pytest.mark.attacks
FORMATS = {
    "JPEG": {}, "progressive": {"kind": "JPEG", "progressive": True}, "PNG": {}, "GIF": {}, "WEBP": {}, "TIFF": {},
    "BMP": {}, "PPM": {}, "AVIF": {},
    "tiff_lzw": {"kind": "TIFF", "compression": "tiff_lzw"},
}  # fmt: skip


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Change a file in one of six ways: bytes, cut, hole, repeated part, moved part, numbers at their extremes."""
    data, way = bytearray(content), int(rng.integers(6))
    start, length = int(rng.integers(len(data))), int(rng.integers(1, 200))
    if way == 0:
        for place in rng.integers(len(data), size=int(rng.integers(1, 20))):
            data[place] = int(rng.integers(256))
    elif way == 1:
        del data[start:]
    elif way == 2:
        del data[start : start + length]
    elif way == 3:
        data[start:start] = data[start : start + length] * int(rng.integers(1, 50))
    elif way == 4:
        part = data[start : start + length]
        del data[start : start + length]
        place = int(rng.integers(len(data) + 1))
        data[place:place] = part
    else:  # in the header, where sizes and counts are
        place = int(rng.integers(min(len(data), 100)))
        data[place : place + 4] = b"\xff\xff\xff\xff" if rng.random() < 0.5 else b"\x00\x00\x00\x00"
    return bytes(data)


@pytest.mark.parametrize("name", FORMATS)
def test_thirty_mutations_of_each_format(name):
    """300 in all."""
    options = {"kind": name, **FORMATS[name]}
    rng = np.random.default_rng(list(name.encode()))
    whole = encoded(noise(1, (64, 48)), **options)
    for _ in range(30):
        content, started = mutated(whole, rng), time.process_time()
        with suppress(BadImageError):
            width, height = open_image(content).size
            assert min(width, height) >= 16
            assert width * height <= ImageLimits().max_pixels
        with suppress(BadImageError):
            image_facts(content, name=name)
        assert time.process_time() - started < 10


def many_scans() -> bytes:
    """Progressive JPEG whose last scan is repeated 1,200 times."""
    content = encoded(noise(0, (256, 256)), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2][:90] * 1200 + content[-2:]


def long_comment(*, first: bool) -> bytes:
    """GIF with a comment of 15 MiB before or after its image."""
    content = encoded(noise(0, (64, 64)), "GIF")
    start = 13 + (3 * 2 ** ((content[10] & 7) + 1) if content[10] & 0x80 else 0) if first else len(content) - 1
    return content[:start] + b"\x21\xfe" + (b"\xff" + b"a" * 255) * 61680 + b"\x00" + content[start:]


SLOW = {
    "a JPEG of 1,200 scans": (many_scans, "scans, more than 100"),
    "a GIF with a long comment": (lambda: long_comment(first=True), "comment of more than"),
    "a GIF with a long comment behind": (lambda: long_comment(first=False), "comment of more than"),
    "a PNG of 500,000 private chunks": (
        lambda: encoded(noise(), "PNG")[:33] + png_chunk(b"teSt", b"") * 500_000 + encoded(noise(), "PNG")[33:],
        "too many small chunks",
    ),
    "a PNG of 500,000 empty parts": (
        lambda: encoded(noise(), "PNG")[:-12] + png_chunk(b"IDAT", b"") * 500_000 + png_chunk(b"IEND", b""),
        "too many small chunks"
    ),
    "a PNG of 500,000 texts": (
        lambda: encoded(noise(), "PNG")[:33] + png_chunk(b"tEXt", b"a\0b") * 500_000 + encoded(noise(), "PNG")[33:],
        "too many small chunks",
    ),
    "a PNG whose text is a bomb": (
        lambda: encoded(noise(), "PNG")[:33]
        + png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000), 9)) + encoded(noise(), "PNG")[33:],
        "Decompressed data too large",
    ),
    "a PNG of 2^31 pixels": (
        lambda: encoded(noise(), "PNG")[:8] + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2**16, 2**15, 8, 2, 0, 0, 0))
        + encoded(noise(), "PNG")[33:],
        "pixels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SLOW)
def test_small_files_that_cost_minutes_are_refused_before_they_are_decoded(name):
    make, words = SLOW[name]
    content, started = make(), time.process_time()
    with pytest.raises(BadImageError, match=words):
        open_image(content)
    with ThreadPoolExecutor(1) as threads, pytest.raises(BadImageError, match=words):  # as in the demo
        threads.submit(open_image, content).result()
    with suppress(BadImageError):
        image_facts(content, name=name)
    assert time.process_time() - started < 5


def test_ordinary_files_stay_below_the_bounds():
    """Long metadata, many scans and many chunks as encoders write them."""
    pixels = noise(3, (900, 700))
    for kind, options in (
        ("JPEG", {"progressive": True, "comment": b"c" * 60_000}), ("GIF", {"comment": b"c" * 60_000}), ("PNG", {}),
        ("WEBP", {}), ("TIFF", {}),
    ):  # fmt: skip
        assert open_image(encoded(pixels, kind, **options)).size == (900, 700)


@pytest.mark.timeout(0)  # the timer of pytest would keep the one of the limit from being set
def test_the_last_resort_is_a_time_limit():
    content = encoded(noise(0, (3000, 2500)), "PNG")
    with pytest.raises(BadImageError, match=r"decoding it takes more than 0\.02 s"):
        open_image(content, limits=ImageLimits(max_seconds=0.02))
    assert open_image(content).size == (3000, 2500)  # the timer of the first call is gone


@pytest.mark.parametrize("name", ["data.tar", "data.parquet", "train/0.tar"])
def test_pipes_among_containers_are_left_out_by_name(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=rf"pipes or devices, not files, and are left out: '{name}'"):
        load_images(tmp_path)
    write(tmp_path / "fine.png", encoded(noise()))
    assert load_images(tmp_path).ids == ["fine.png"]


def test_pipes_devices_and_huge_files_among_images_are_refused(tmp_path):
    """A pipe would block forever, and a link to `/dev/zero` would fill the memory."""
    write(tmp_path / "fine.png", encoded(noise()))
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(3 << 30)
    source, refused = load_images(tmp_path), []
    for number, name in enumerate(source.ids):
        try:
            source[number]
        except BadImageError as error:
            refused.append((name, error.kind))
    kinds = {"device.png": "not an image", "huge.png": "too large", "pipe.png": "not an image"}
    assert dict(refused) == kinds
    assert check_data(tmp_path).verdict
