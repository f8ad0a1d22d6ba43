"""Builders of test data: images, class folders, tar and parquet files, made from numbers, never from the network."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def image(seed: int = 0, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """RGB image of `size` (width, height) whose coarse random pattern survives JPEG compression."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)


def encoded(content: Image.Image | int = 0, kind: str = "PNG", **options: Any) -> bytes:
    """Bytes of an image, or of `image(content)`, in a format of Pillow."""
    stream = io.BytesIO()
    (image(content) if isinstance(content, int) else content).save(stream, kind, **options)
    return stream.getvalue()


def write(path: Path, content: bytes | str | Image.Image | int = 0) -> Path:
    """Write bytes, text, an image or `image(content)` to a file, in folders that need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content if isinstance(content, bytes) else encoded(content))
    return path


def class_folder(root: Path, suffix: str = ".png", **classes: int) -> Path:
    """Folder with one sub-folder per class that holds the given number of images."""
    for place, (name, count) in enumerate(classes.items()):
        for number in range(count):
            write(root / name / f"{number}{suffix}", 1000 * place + number)
    return root


def tar_file(path: Path, members: dict[str, bytes]) -> Path:
    """Tar file with these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


def parquet_file(path: Path, **columns: Any) -> Path:
    """Parquet file with these columns, types as pyarrow infers them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path
