"""Safe image decoding: the one place that handles size limits, bit depth, orientation, color and damaged files."""

import logging
import os
import signal
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

logger = logging.getLogger(__name__)

# Formats that Pillow decodes by itself. EPS is left out because it would start Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")


@dataclass(frozen=True)
class ImageLimits:
    """Requirements that an image must meet. Sizes are checked in the header, before decoding.

    Args:
        min_side: Smallest width and height in pixels.
        max_aspect: Largest ratio of the longer side to the shorter one. Resizing the shorter side of a narrow strip
            would create a huge image.
        max_pixels: Largest width x height. The default is the number above which Pillow warns; an RGB image of this
            size takes a quarter of a GiB. Pillow itself refuses images of more than twice this number.
        on_truncated: `"skip"` rejects a JPEG whose end is missing. `"salvage"` accepts it if at least 95 % of the rows
            were decoded from the file's own data, and crops the other rows.
        value_range: Values (black, white) for images of 32-bit floats or integers, whose range is not defined by their
            format. None rejects such images.
        max_seconds: Longest time of decoding, as the last resort against slow files; 0 sets no limit.

    Raises:
        ValueError: A limit is out of range.
    """

    min_side: int = 16
    max_aspect: float = 20.0
    max_pixels: int = 89_478_485
    on_truncated: Literal["skip", "salvage"] = "skip"
    value_range: tuple[float, float] | None = None
    max_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.min_side < 1:
            raise ValueError(f"min_side={self.min_side} must be at least 1 pixel.")
        if self.max_aspect < 1:
            raise ValueError(f"max_aspect={self.max_aspect} (longer side / shorter side) must be at least 1.")
        pillow = 2 * (Image.MAX_IMAGE_PIXELS or self.max_pixels)
        if not 1 <= self.max_pixels <= pillow:
            raise ValueError(f"max_pixels={self.max_pixels} must be between 1 and {pillow}, the limit of Pillow.")
        if self.on_truncated not in ("skip", "salvage"):
            raise ValueError(f"Unknown on_truncated={self.on_truncated!r}. Use 'skip' or 'salvage'.")
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"value_range={self.value_range} must be (black, white) with black < white.")


class BadImageError(ValueError):
    """Raised for an image that cannot be used, with its `path`, the `reason`, and the `kind` of error for counting.

    Kinds: missing, permission, empty, not an image, truncated, corrupt, too small, too elongated, too large, value
    range, archive, blocked.
    """

    def __init__(self, path: str, reason: str = "unreadable", kind: str = "corrupt") -> None:
        super().__init__(path, reason, kind)  # all arguments, so that the error can be pickled by a worker process
        self.path, self.reason, self.kind = path, reason, kind

    def __str__(self) -> str:
        return f"Cannot use image '{printable(self.path)}': {self.reason}."


def printable(name: str) -> str:
    """Return a name for messages, with escapes for bytes that are not UTF-8, which some terminals would reject."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# Errors that Pillow's decoders raise on broken files: PNG alone raises SyntaxError, struct.error, zlib.error and
# ValueError. The property test in `test_faults_data.py` searches for others.
_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, RuntimeError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def open_image(
    source: str | Path | bytes | Image.Image, *, name: str | None = None, limits: ImageLimits | None = None
) -> Image.Image:
    """Decode one image to upright 8-bit RGB, in the same way for training, evaluation and inference.

    EXIF orientation is applied; transparency is composited on white; 16-bit gray is scaled by its depth (65535 is
    white); CMYK, gray, palette and 1-bit images are converted; the first frame of an animation is used. ICC profiles
    are ignored, so a wide-gamut image looks slightly pale. A flipped bit inside JPEG data decodes without an error in
    every decoder and is not detected; the checksums of PNG files are verified.

    Args:
        source: Path, bytes of an encoded file, or Pillow image (which is not changed).
        name: Name of the image in error messages. Default: the path.
        limits: Limits that the image must satisfy. Default: `ImageLimits()`.

    Raises:
        BadImageError: The image is missing, empty, truncated, corrupt, not an image, outside `limits`, or of a type
            without a defined value range (float, 32-bit integers).
    """
    limits = limits or ImageLimits()
    if isinstance(source, Image.Image):
        return _guarded(source, b"", name or "image in memory", limits)
    name = name or (f"{len(source)} bytes in memory" if isinstance(source, bytes) else str(source))
    # Reading the file first keeps at most one file open and gives the error message the first bytes.
    return _guarded(None, source if isinstance(source, bytes) else read_bytes(source, name), name, limits)


def open_map(data: bytes, *, name: str, limits: ImageLimits) -> Image.Image:
    """Decode an image whose values are measurements or class ids, without conversion or rotation.

    Args:
        data: Bytes of an encoded file.
        name: Name in error messages.
        limits: Limits on the size.

    Raises:
        BadImageError: The file is empty, truncated, corrupt, not an image, or outside `limits`.
    """
    with _bad_image(data, name, limits), Image.open(BytesIO(data), formats=known_formats()) as image:
        _check_size(image.size, name, limits)
        image.load()
        return image


_POINTER = b"version https://git-lfs"
_POINTER_ADVICE = "it is a git-lfs pointer and not the file itself; run `git lfs pull`"


def lfs_pointer(file: Path) -> str | None:
    """Return a description with advice if a file is only a git-lfs pointer; None otherwise."""
    with file.open("rb") as stream:
        return _POINTER_ADVICE if stream.read(len(_POINTER)) == _POINTER else None


_MOST_BYTES = 2**30  # the largest image that `ImageLimits` allows has 16 bits in 4 channels


def read_bytes(path: str | Path, name: str) -> bytes:
    """Return the content of a file.

    Raises:
        BadImageError: The file cannot be read; the error carries `name`.
    """
    try:
        status = Path(path).stat()
        if stat.S_ISREG(status.st_mode) and status.st_size > _MOST_BYTES:
            raise BadImageError(name, f"it has more than {_MOST_BYTES >> 20} MiB", "too large")
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise BadImageError(name, "it is a pipe or a device, not a file", "not an image")
        return Path(path).read_bytes()
    except BadImageError:  # is a ValueError
        raise
    except PermissionError as error:
        raise BadImageError(name, f"{error.strerror}", "permission") from error
    except (OSError, ValueError) as error:  # a NUL character in a path raises ValueError
        reason = f"{getattr(error, 'strerror', None) or error}"
        if isinstance(error, FileNotFoundError) and Path(path).is_symlink():
            reason = f"it is a link to '{Path(path).readlink()}', which does not exist"
        raise BadImageError(name, reason, "missing") from error


def _guarded(opened: Image.Image | None, data: bytes, name: str, limits: ImageLimits) -> Image.Image:
    try:
        with _bad_image(data, name, limits):
            if opened is not None:
                return _upright_rgb(opened, name, limits)
            with Image.open(BytesIO(data), formats=known_formats()) as image:
                return _upright_rgb(image, name, limits)
    except BadImageError as error:
        if error.kind != "truncated" or limits.on_truncated != "salvage":
            raise
        return _salvage(data, error, limits)


@contextmanager
def _bad_image(data: bytes, name: str, limits: ImageLimits) -> Iterator[None]:
    """Limit the time of decoding, and turn every error of Pillow's decoders into a `BadImageError`."""
    _check_cost(data, name)
    try:
        with _time_limit(name, limits.max_seconds):
            yield
    except Image.UnidentifiedImageError as error:
        raise BadImageError(name, *_describe_unknown(data)) from error
    except BadImageError:  # is a ValueError, which `_DECODER_ERRORS` includes
        raise
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
    turn, white, zero_is_white = _TURNS.get(_orientation(image)), *_gray_range(image)
    if image.mode == "RGBA" and image.format == "TIFF" and not _tags(image).get(_EXTRA_SAMPLES):
        say_once("A TIFF has 4 channels, but does not mark the fourth as transparency. Only the first three are used.")
        image = Image.merge("RGB", image.split()[:3])
    rgb = _to_rgb(image if turn is None else image.transpose(turn), name, limits, white, zero_is_white)
    rgb.info = {}  # with the EXIF block, the next reader would rotate the image again
    return rgb


def _check_size(size: tuple[int, int], name: str, limits: ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise BadImageError(name, f"it has {width}x{height} pixels, above max_pixels={limits.max_pixels}", "too large")
    if min(size) < limits.min_side:
        raise BadImageError(name, f"it has {width}x{height} pixels, below min_side={limits.min_side}", "too small")
    if max(size) > limits.max_aspect * min(size):
        ratio = max(size) / min(size)
        raise BadImageError(
            name,
            f"its sides {width}x{height} are {ratio:.0f}:1, above max_aspect={limits.max_aspect:g}",
            "too elongated",
        )


# Transpositions that make a stored image upright, by EXIF orientation. `ImageOps.exif_transpose` does the same and
# then rewrites the remaining EXIF block, which fails on some blocks that cameras write.
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
    """Return the EXIF orientation, 1 to 8; like browsers, return 1 if the EXIF block cannot be read."""
    try:
        value = image.getexif().get(0x0112, 1)
    except _DECODER_ERRORS:
        return 1
    return value if isinstance(value, int) else 1


def _check_png(data: bytes, name: str) -> None:
    """Verify the checksum of every chunk up to IEND; Pillow does not verify those of the pixel data.

    Source: W3C PNG specification, section 5.3: length, type, data, CRC-32 of type and data.
    """
    start, left = 8, 1000 + len(data) // 1024  # encoders write chunks of 8 KiB or more
    while start + 12 <= len(data):
        if not (left := left - 1):
            raise BadImageError(name, "it consists of too many small chunks", "too large")
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


_MOST_SCANS = 100  # encoders write about 10; each one costs as much as decoding the whole image
_MOST_COMMENT = 2**18  # bytes; Pillow copies the whole comment for each of its blocks


def _check_cost(data: bytes, name: str) -> None:
    """Refuse small files that would take minutes: a JPEG of many scans, a GIF with a long comment, many PNG chunks."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        if data[12:16] != b"IHDR":
            raise BadImageError(name, *_describe_unknown(data))
        _check_png(data, name)
    if data.startswith(b"\xff\xd8") and (scans := data.count(b"\xff\xda")) > _MOST_SCANS:
        raise BadImageError(name, f"it is a JPEG of {scans} scans, more than {_MOST_SCANS}", "too large")
    if data.startswith(b"GIF8") and _comment_bytes(data) > _MOST_COMMENT:
        raise BadImageError(name, f"it is a GIF with a comment of more than {_MOST_COMMENT} bytes", "too large")


def _comment_bytes(data: bytes) -> int:
    """Return the number of bytes in the comments of a GIF.

    Source: GIF89a specification: a block starts with 0x2C (image) or 0x21 (extension, 0xFE for a comment), and
    continues in sub-blocks of at most 255 bytes, up to an empty one.
    """
    total, at = 0, 13 + (3 * 2 ** ((data[10] & 7) + 1) if len(data) > 10 and data[10] & 0x80 else 0)
    while at + 10 < len(data) and data[at] in (0x21, 0x2C):
        is_comment = data[at : at + 2] == b"\x21\xfe"
        table = 3 * 2 ** ((data[at + 9] & 7) + 1) if data[at + 9] & 0x80 else 0
        at += 2 if data[at] == 0x21 else 11 + table
        while at < len(data) and data[at]:
            total += data[at] * is_comment
            at += data[at] + 1
        at += 1
    return total


@contextmanager
def _time_limit(name: str, seconds: float) -> Iterator[None]:
    """Stop decoding after some seconds, where a timer can: in the main thread of a process, and not on Windows."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not hasattr(signal, "setitimer") or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def stop(*_: object) -> None:
        raise BadImageError(name, f"decoding it takes more than {seconds:g} s", "too large")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


_SALVAGED_ROWS = 0.95


def _salvage(data: bytes, error: BadImageError, limits: ImageLimits) -> Image.Image:
    """Return the complete rows of a truncated JPEG, if at least 95 % of its rows are complete.

    The decoder fills in missing data without reporting where it starts. Therefore, the file is decoded twice, once
    as it is and once with arbitrary data appended. Where both results agree, the pixels come from the file; the
    image is cropped above the row of blocks in which they first differ.

    Raises:
        BadImageError: The file is not a JPEG, is progressive (data of all rows is missing), has an EXIF rotation, or
            has too few complete rows.
    """
    if not data.startswith(b"\xff\xd8"):
        raise error
    image = JpegImageFile(BytesIO(data))
    if "progressive" in image.info or _orientation(image) != 1:
        raise error
    block = 8 * max(vertical for _, _, vertical, _ in image.layer)  # pixel rows that are decoded together
    body = data.rstrip(b"\xff")  # removes an incomplete marker at the end
    strict = replace(limits, on_truncated="skip")
    one, other = (_guarded(None, body + filler + b"\xff\xd9", error.path, strict) for filler in (b"", b"\x55" * 64))
    differs = np.flatnonzero((np.asarray(one) != np.asarray(other)).any(axis=(1, 2)))
    # The last row above a missing block is interpolated with the color of that block, so it may be wrong even if both
    # versions agree.
    rows = max((int(differs[0]) + 1) // block * block - 1, 0) if len(differs) else one.height
    if rows < _SALVAGED_ROWS * one.height:
        reason = f"{error.reason}; {rows} of {one.height} rows are complete, fewer than {_SALVAGED_ROWS:.0%}"
        raise BadImageError(error.path, reason, "truncated") from error
    return one.crop((0, 0, one.width, rows))


@cache
def known_formats() -> tuple[str, ...]:
    """Return Pillow's names of the formats that are decoded, without those that this build of Pillow cannot read."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _describe_unknown(data: bytes) -> tuple[str, str]:
    """Return the reason and kind of error for data that no allowed decoder recognizes."""
    if not data:
        return "the file is empty", "empty"
    if data.startswith(_POINTER):
        return _POINTER_ADVICE, "not an image"
    if tiff := _describe_tiff(data):
        return tiff, "not an image"
    head = data[:256].lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
        return "it looks like HTML, XML or SVG (a failed download?), expected a pixel image", "not an image"
    convert = "which is not supported; convert it to JPEG or PNG"
    if data[4:8] == b"ftyp" and data[8:12] != b"avif":
        return f"it is HEIC or another '{data[8:12].decode('latin-1')}' container, {convert}", "not an image"
    if data.startswith((b"\xff\x0a", b"\x00\x00\x00\x0cJXL ")):
        return f"it is JPEG XL, {convert}", "not an image"
    if data.startswith((b"%!PS", b"%PDF")):
        return f"it is a PostScript or PDF page, {convert}", "not an image"
    known = data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n"))
    if known:
        return f"its header is damaged, although its first bytes {data[:8]!r} are those of an image", "corrupt"
    formats = ", ".join(known_formats())
    return f"it is not in a supported format ({formats}); its first bytes are {data[:8]!r}", "not an image"


# Tags of TIFF files. Source: TIFF 6.0 specification, section 8 and page 80.
_BITS, _PHOTOMETRIC, _CHANNELS, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 258, 262, 277, 338, 339
_NUMBERS = {1: "unsigned integers", 2: "signed integers", 3: "floating-point numbers"}


def _tags(image: Image.Image) -> Mapping[int, Any]:
    return getattr(image, "tag_v2", {})


def _gray_range(image: Image.Image) -> tuple[int, bool]:
    """Return the value of white in a gray image of more than 8 bits (0 for other images), and True if 0 is white."""
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # Pillow scales any PGM to 65535
        return 65535, False
    if not image.mode.startswith("I;16"):
        return 0, False
    return 2 ** _tags(image).get(_BITS, (16,))[0] - 1, _tags(image).get(_PHOTOMETRIC) == 0


def _describe_tiff(data: bytes) -> str | None:
    """Return the reason why a TIFF cannot be decoded; None if the data is not a TIFF or its header is damaged."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    if not data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return None
    try:
        tags = ImageFileDirectory_v2(data[: 16 if b"+" in data[:4] else 8])
        stream = BytesIO(data)
        stream.seek(tags.next)
        with warnings.catch_warnings(action="ignore"):
            tags.load(stream)
        bits, numbers = tags[_BITS][0], _NUMBERS.get(tags.get(_SAMPLE_FORMAT, (1,))[0], "other numbers")
        return (
            f"it is a TIFF of {tags.get(_CHANNELS, 1)} channels of {bits} bits ({numbers}, photometric interpretation "
            f"{tags.get(_PHOTOMETRIC)}), which is not supported; TIFF can be gray of 1 to 16 bits, or RGB of 8 or 16 "
            "bits, with or without transparency. Save three of its channels as RGB"
        )
    except _DECODER_ERRORS:
        return None


def _to_rgb(image: Image.Image, name: str, limits: ImageLimits, white: int, zero_is_white: bool) -> Image.Image:
    if white:
        say_once("16-bit gray images are scaled by their bit depth, so 65535 becomes white.")
        values = np.asarray(image).astype(np.uint32)  # Pillow itself would clip at 255, so images would become white
        values = white - values if zero_is_white else values
        if white == 65535 and 0 < values.max() < 4096:  # 12-bit values in 16 bits, as from X-ray and other cameras
            say_once(
                "A 16-bit gray image has no value above 4095, so it becomes nearly black. If 4095 means white, "
                "multiply the values in the files by 16. `regvit data-check` counts such images."
            )
        return Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return _scaled_to_range(image, name, limits)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _scaled_to_range(image: Image.Image, name: str, limits: ImageLimits) -> Image.Image:
    if limits.value_range is None:
        numbers = "32-bit floats" if image.mode == "F" else "signed or 32-bit integers"
        reason = (
            f"its mode {image.mode} ({numbers}) has no defined value range; save it with 8 or 16 bits, or set "
            "value_range"
        )
        raise BadImageError(name, reason, "value range")
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise BadImageError(name, f"{bad} of {values.size} values are NaN or infinite", "value range")
    low, high = limits.value_range
    if values.min() < low or values.max() > high:
        reason = f"its values from {values.min():g} to {values.max():g} exceed value_range=({low:g}, {high:g})"
        raise BadImageError(name, reason, "value range")
    return Image.fromarray(np.rint((values - low) * (255 / (high - low))).astype(np.uint8)).convert("RGB")


@cache
def say_once(message: str) -> None:
    """Log a warning once per process, because a folder may hold a million images of the same kind."""
    logger.warning(message)


@dataclass(frozen=True)
class ImageFacts:
    """Header of an encoded image, before any conversion.

    `format` and `mode` are Pillow's names, `bits` are per channel, `size` is the stored (width, height) in pixels, and
    `orientation` is the EXIF value 1 to 8. `animated` is True if there are several frames.
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
        BadImageError: The data is not an image, or its header is damaged.
    """
    with _bad_image(data, name, ImageLimits()), Image.open(BytesIO(data), formats=known_formats()) as image:
        bits = {"1": 1, "I": 32, "F": 32}.get(image.mode, 8)
        bits = _gray_range(image)[0].bit_length() or _tags(image).get(_BITS, (bits,))[0]
        if image.format == "PNG":
            bits = data[24]  # from the header chunk; Pillow reports 16-bit color as 8-bit
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
