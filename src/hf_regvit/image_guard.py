"""One guarded way to open a picture: size, depth, orientation, colour and damage are settled here and nowhere else."""

import logging
import os
import struct
import zlib
from dataclasses import dataclass, replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)

# Formats that Pillow decodes by itself: EPS would start Ghostscript, PDF and SVG are no pixel formats.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")


@dataclass(frozen=True)
class ImageLimits:
    """What an image must be to be used. All but truncation is judged from the header, before anything is decoded.

    Args:
        min_side: Smallest width and height, pixels.
        max_aspect: Largest ratio of the longer side to the shorter one: a resize of the shorter side makes a giant of
            a strip.
        max_pixels: Largest width x height. The default is the count above which Pillow warns, a quarter of a GiB as
            RGB; Pillow itself refuses twice as many.
        on_truncated: `"skip"` refuses a JPEG whose end is missing. `"salvage"` accepts it where at least 95 % of the
            rows were decoded from the file's own data, and cuts the others off.
        value_range: Values that become black and white in images of 32-bit floats or integers, which have no defined
            range; None refuses them.

    Raises:
        ValueError: A limit that cannot be meant.
    """

    min_side: int = 16
    max_aspect: float = 20.0
    max_pixels: int = 89_478_485
    on_truncated: Literal["skip", "salvage"] = "skip"
    value_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.min_side < 1:
            raise ValueError(f"min_side={self.min_side} must be at least 1 pixel.")
        if self.max_aspect < 1:
            raise ValueError(f"max_aspect={self.max_aspect} is longer side / shorter side, so at least 1.")
        pillow = 2 * (Image.MAX_IMAGE_PIXELS or self.max_pixels)
        if not 1 <= self.max_pixels <= pillow:
            raise ValueError(f"max_pixels={self.max_pixels} must lie between 1 and {pillow}, where Pillow refuses.")
        if self.on_truncated not in ("skip", "salvage"):
            raise ValueError(f"on_truncated={self.on_truncated!r} is unknown. Use 'skip' or 'salvage'.")
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"value_range={self.value_range} must be (black, white) with black < white.")


class BadImageError(ValueError):
    """One image cannot be used: `path` says which, `reason` why, `kind` the sort of fault, for counting.

    Kinds: missing, permission, empty, not an image, truncated, corrupt, too small, too elongated, too large, value
    range, archive, blocked.
    """

    def __init__(self, path: str, reason: str = "unreadable", kind: str = "corrupt") -> None:
        super().__init__(path, reason, kind)  # all, so that it survives the pickling between a worker and its parent
        self.path, self.reason, self.kind = path, reason, kind

    def __str__(self) -> str:
        return f"Cannot use image '{printable(self.path)}': {self.reason}."


def printable(name: str) -> str:
    """A name for messages: bytes that are no UTF-8 become escapes, which every terminal and log can take."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# What Pillow's decoders raise on broken files: PNG alone knows SyntaxError, struct.error, zlib.error, ValueError. The
# property test of `test_faults_data.py` looks for others.
_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error,
    zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def open_image(
    source: str | Path | bytes | Image.Image, *, name: str | None = None, limits: ImageLimits | None = None
) -> Image.Image:
    """Decode one image to 8-bit RGB, upright, the same way for training, evaluation and serving.

    EXIF orientation is applied; transparency is composited on white; 16-bit grey is scaled by its depth (65535 is
    white); CMYK, grey, palette and 1-bit images are converted; of an animation the first frame counts. ICC profiles
    are ignored: a wide-gamut photograph looks a little pale. A flipped bit inside JPEG data decodes without complaint
    everywhere and is not detected; PNG carries checksums, which are verified.

    Args:
        source: A path, the bytes of an encoded file, or a Pillow image (which stays as it is).
        name: What an error calls the image; default the path.
        limits: Sizes and kinds to accept; default `ImageLimits()`.

    Raises:
        BadImageError: Missing, empty, truncated, corrupt, not an image, outside of `limits`, or of a depth without a
            defined range (float, 32-bit integers).
    """
    limits = limits or ImageLimits()
    if isinstance(source, Image.Image):
        return _guarded(source, b"", name or "image in memory", limits)
    name = name or (f"{len(source)} bytes in memory" if isinstance(source, bytes) else str(source))
    # Read first: one open file at most, and the first bytes are at hand if Pillow does not know them.
    return _guarded(None, source if isinstance(source, bytes) else read_bytes(source, name), name, limits)


def open_map(data: bytes, *, name: str, limits: ImageLimits | None = None) -> Image.Image:
    """Decode a picture whose values are measurements or class numbers: neither converted nor turned.

    Args:
        data: The bytes of an encoded file.
        name: What an error calls it.
        limits: As for images; sizes only.

    Raises:
        BadImageError: Empty, truncated, corrupt, not an image, or outside of `limits`.
    """
    try:
        with Image.open(BytesIO(data), formats=_known_formats()) as picture:
            if picture.format == "PNG":
                _check_png(data, name)
            _check_size(picture.size, name, limits or ImageLimits())
            picture.load()
            return picture
    except Image.UnidentifiedImageError as error:
        raise BadImageError(name, *_describe_unknown(data)) from error
    except BadImageError:  # a ValueError, as some errors of decoders are
        raise
    except _DECODER_ERRORS as error:
        raise BadImageError(name, f"{type(error).__name__}: {error}".rstrip("."), "corrupt") from error


def read_bytes(path: str | Path, name: str) -> bytes:
    """The file's content; a file that cannot be read is a `BadImageError` with that name."""
    try:
        return Path(path).read_bytes()
    except PermissionError as error:
        raise BadImageError(name, f"{error.strerror}", "permission") from error
    except (OSError, ValueError) as error:  # a NUL inside a name is a ValueError
        raise BadImageError(name, f"{getattr(error, 'strerror', None) or error}", "missing") from error


def _guarded(opened: Image.Image | None, data: bytes, name: str, limits: ImageLimits) -> Image.Image:
    try:
        if opened is not None:
            return _upright_rgb(opened, name, limits)
        with Image.open(BytesIO(data), formats=_known_formats()) as image:
            if image.format == "PNG":
                _check_png(data, name)
            return _upright_rgb(image, name, limits)
    except Image.UnidentifiedImageError as error:
        raise BadImageError(name, *_describe_unknown(data)) from error
    except BadImageError as error:
        if error.kind != "truncated" or limits.on_truncated != "salvage":
            raise
        return _salvage(data, error, limits)
    except Image.DecompressionBombError as error:
        raise BadImageError(name, f"{error}".rstrip("."), "too large") from error
    except _DECODER_ERRORS as error:
        raise BadImageError(name, f"{type(error).__name__}: {error}".rstrip("."), "corrupt") from error


def _upright_rgb(image: Image.Image, name: str, limits: ImageLimits) -> Image.Image:
    _check_size(image.size, name, limits)
    try:
        image.load()
    except OSError as error:
        if "truncated" in str(error).lower():
            raise BadImageError(name, f"{error}".rstrip("."), "truncated") from error
        raise
    is_png = image.format == "PNG"  # the upright copy no longer knows
    turn = _TURNS.get(_orientation(image))
    rgb = _to_rgb(image if turn is None else image.transpose(turn), name, limits, is_png=is_png)
    rgb.info = {}  # with its EXIF block, the next reader would turn it once more
    return rgb


def _check_size(size: tuple[int, int], name: str, limits: ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise BadImageError(name, f"{width}x{height} pixels are more than {limits.max_pixels}", "too large")
    if min(size) < limits.min_side:
        raise BadImageError(name, f"{width}x{height} pixels, the shorter side under {limits.min_side}", "too small")
    if max(size) > limits.max_aspect * min(size):
        ratio = max(size) / min(size)
        raise BadImageError(name, f"{width}x{height} is {ratio:.0f}:1, over {limits.max_aspect:g}:1", "too elongated")


# How a stored picture is turned upright, by EXIF orientation. `ImageOps.exif_transpose` does the same and then writes
# the remaining EXIF block anew, which fails on blocks that cameras really write.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 where the block cannot be read, as browsers have it."""
    try:
        value = image.getexif().get(0x0112, 1)
    except _DECODER_ERRORS:
        return 1
    return value if isinstance(value, int) else 1


def _check_png(data: bytes, name: str) -> None:
    """Verify the checksum of every chunk up to IEND: Pillow skips those of the pixel data.

    Source: W3C PNG specification, section 5.3: length, type, data, CRC-32 of type and data.
    """
    start = 8
    while start + 12 <= len(data):
        length = int.from_bytes(data[start : start + 4], "big")
        end = start + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(memoryview(data)[start + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise BadImageError(name, f"the checksum of its chunk {data[start + 4 : start + 8]!r} is wrong", "corrupt")
        if data[start + 4 : start + 8] == b"IEND":
            return
        start = end + 4
    raise BadImageError(name, "the PNG file is truncated", "truncated")


_SALVAGED_ROWS = 0.95


def _salvage(data: bytes, error: BadImageError, limits: ImageLimits) -> Image.Image:
    """The rows of a truncated JPEG that its own data decodes to, if they are nearly all.

    The decoder fills what is missing without saying where it began to. So the file is ended twice, once at once and
    once after some arbitrary data: up to the row of blocks with the first difference, the pixels come from the file.

    Raises:
        BadImageError: No JPEG, a progressive one (all of its rows lack something), one to be turned, or too few rows.
    """
    if not data.startswith(b"\xff\xd8"):
        raise error
    with Image.open(BytesIO(data)) as image:
        if "progressive" in image.info or _orientation(image) != 1:
            raise error
        block = 8 * max(
            vertical for _, _, vertical, _ in cast(Any, image).layer
        )  # rows of pixels that are decoded together
    body = data.rstrip(b"\xff")  # half a marker
    strict = replace(limits, on_truncated="skip")
    one, other = (_guarded(None, body + filler + b"\xff\xd9", error.path, strict) for filler in (b"", b"\x55" * 64))
    differs = np.flatnonzero((np.asarray(one) != np.asarray(other)).any(axis=(1, 2)))
    # The last row before a block is interpolated with the block's colour: it may differ too, or be wrong in both.
    rows = max((int(differs[0]) + 1) // block * block - 1, 0) if len(differs) else one.height
    if rows < _SALVAGED_ROWS * one.height:
        reason = f"{error.reason}; {rows} of {one.height} rows are whole, fewer than {_SALVAGED_ROWS:.0%}"
        raise BadImageError(error.path, reason, "truncated") from error
    return one.crop((0, 0, one.width, rows))


@cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # not every build of Pillow reads AVIF


def _describe_unknown(data: bytes) -> tuple[str, str]:
    """Reason and kind for data that no allowed decoder recognises."""
    if not data:
        return "the file is empty", "empty"
    head = data[:256].lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
        return "it looks like HTML, XML or SVG (a failed download?), expected a pixel image", "not an image"
    convert = "which is not read here; convert it to JPEG or PNG"
    if data[4:8] == b"ftyp" and data[8:12] != b"avif":
        return f"it is HEIC or another container of '{data[8:12].decode('latin-1')}', {convert}", "not an image"
    if data.startswith((b"\xff\x0a", b"\x00\x00\x00\x0cJXL ")):
        return f"it is JPEG XL, {convert}", "not an image"
    if data.startswith((b"%!PS", b"%PDF")):
        return f"it is a PostScript or PDF page, {convert}", "not an image"
    known = data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n"))
    if known:
        return f"its header is damaged; the first bytes {data[:8]!r} are those of an image", "corrupt"
    formats = ", ".join(_known_formats())
    return f"no supported image format ({formats}); the first bytes are {data[:8]!r}", "not an image"


def _to_rgb(image: Image.Image, name: str, limits: ImageLimits, *, is_png: bool) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and is_png):
        say_once("16-bit grey images are scaled by their depth: 65535 becomes white.")
        values = np.asarray(image).astype(np.uint32)  # Pillow's own conversion clips at 255: a white picture
        if 0 < values.max() < 4096:  # 12 bits, as X-ray and other scientific cameras have, in a file of 16
            say_once(
                "A 16-bit grey image has no value above 4095, so it is nearly black here. If 4095 stands for white, "
                "multiply the values in the files by 16; `regvit data-check` counts such images."
            )
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return _scaled_to_range(image, name, limits)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _scaled_to_range(image: Image.Image, name: str, limits: ImageLimits) -> Image.Image:
    if limits.value_range is None:
        reason = f"mode {image.mode} has no defined range of values; save it with 8 or 16 bits, or set value_range"
        raise BadImageError(name, reason, "value range")
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise BadImageError(name, f"{bad} of {values.size} values are NaN or infinite", "value range")
    low, high = limits.value_range
    if values.min() < low or values.max() > high:
        reason = f"values from {values.min():g} to {values.max():g} leave value_range=({low:g}, {high:g})"
        raise BadImageError(name, reason, "value range")
    return Image.fromarray(np.rint((values - low) * (255 / (high - low))).astype(np.uint8)).convert("RGB")


@cache
def say_once(message: str) -> None:
    """A warning once per process: a folder may hold a million pictures of the same kind."""
    logger.warning(message)


@dataclass(frozen=True)
class ImageFacts:
    """What the header of an encoded image says, before anything is converted.

    `format` and `mode` in Pillow's words, `bits` per channel, stored `size` (width, height) in pixels, EXIF
    `orientation` 1 to 8; whether it has several frames, transparency, an ICC profile.
    """

    format: str
    mode: str
    bits: int
    size: tuple[int, int]
    orientation: int
    animated: bool
    transparent: bool
    icc_profile: bool


def image_facts(data: bytes, *, name: str) -> ImageFacts:
    """Read the header of one encoded image.

    Raises:
        BadImageError: No image, or a damaged header.
    """
    try:
        with Image.open(BytesIO(data), formats=_known_formats()) as image:
            bits = {"1": 1, "I": 32, "F": 32}.get(image.mode, 16 if image.mode.startswith("I;16") else 8)
            if image.format == "PNG":
                bits = data[24]  # of the header chunk; Pillow shows 16-bit colour as 8-bit
            return ImageFacts(
                format=image.format or "",
                mode=image.mode,
                bits=bits,
                size=image.size,
                orientation=_orientation(image),
                animated=image.format != "MPO" and getattr(image, "is_animated", False),
                transparent=image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info,
                icc_profile="icc_profile" in image.info,
            )
    except Image.UnidentifiedImageError as error:
        raise BadImageError(name, *_describe_unknown(data)) from error
    except _DECODER_ERRORS as error:
        raise BadImageError(name, f"{type(error).__name__}: {error}".rstrip("."), "corrupt") from error
