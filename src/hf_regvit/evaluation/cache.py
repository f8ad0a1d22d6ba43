"""Cache of image features: one vector per image and block of a frozen model, computed once and shared by all tasks.

The file name is a fingerprint of everything the features depend on: weights and configuration of the model, content
and order of the images, transform, blocks, device type and library versions. If any of these changes, the file is not
found and the features are computed again, so outdated features are never used.

Shape letters: n images, B blocks, D width.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from ..data.decoding import BadImageError
from ..data.preparation import SkippedImage, prepare_images, report_skipped
from ..data.source import ImageSource
from ..models.configuration_regvit import __version__
from ..models.loading import model_fingerprint
from ..models.processing import EvaluationTransform
from ..models.saving import read_notes, write_tensors
from ..models.tokens import TokenReader

logger = logging.getLogger(__name__)

_LAST_BLOCKS = 4  # as many as the heads of the linear evaluation read


@dataclass(frozen=True, eq=False)
class FrozenFeatures:
    """Features for tasks on whole images, on the CPU and after the final norm.

    Args:
        vectors: (n, B, D) float32, CLS of every block that was read, or the mean patch for a model without CLS.
        mean_patch: (n, D) mean patch of the last block that was read.
        layers: Blocks that were read, 1 to L.
        kind: Kind of the vectors: "CLS" or "mean patch".
        ids: Ids of the n images that could be read, in the order of the source.
        skipped: Images that could not be read.
        seconds: Wall time of computing the features (of the original run, if they come from the cache).
        from_cache: True if the features come from the cache.
    """

    vectors: Tensor
    mean_patch: Tensor
    layers: tuple[int, ...]
    kind: str
    ids: tuple[str, ...]
    skipped: tuple[SkippedImage, ...]
    seconds: float
    from_cache: bool = False

    @property
    def last(self) -> Tensor:
        """Vectors (n, D) of the last block that was read."""
        return self.vectors[:, -1]

    def subset(self, rows: Sequence[int]) -> "FrozenFeatures":
        """Return the features of the images at these rows."""
        chosen = list(rows)
        ids = tuple(self.ids[row] for row in chosen)
        return replace(self, vectors=self.vectors[chosen], mean_patch=self.mean_patch[chosen], ids=ids)


def image_digests(source: ImageSource) -> list[bytes]:
    """Return a digest of 16 bytes for every image that changes with its content.

    The stored bytes are hashed, because modification times and sizes of files could miss a change. Images that are
    generated rather than stored are generated for this.
    """
    digests = []
    for i in range(len(source)):
        try:
            content = source.read(i).tobytes() if source.encoded is None else source.encoded(i)
        except BadImageError as error:
            content = str(error).encode()
        digests.append(hashlib.blake2b(content, digest_size=16).digest())
    return digests


def fingerprint(parts: Iterable[str | bytes], *, digest_size: int = 16) -> str:
    """Return the hash of names and digests in hexadecimal digits; it changes with each of them and with their order.

    Args:
        parts: Names and digests.
        digest_size: Number of bytes, each with two digits.
    """
    digest = hashlib.blake2b(digest_size=digest_size)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def read_features(
    reader: TokenReader,
    source: ImageSource,
    *,
    transform: EvaluationTransform,
    batch_size: int = 32,
    cache_dir: str | Path | None = None,
    digests: Sequence[bytes] | None = None,
    label: str | None = None,
) -> FrozenFeatures:
    """Read the features of the last four blocks of all images in order, from the cache if available.

    Args:
        reader: Reader of the model.
        source: Images.
        transform: Transform of the images.
        batch_size: Number of images per forward pass.
        cache_dir: Folder of the cache, or None to use no cache.
        digests: Digests of the images, if they are already known; see `image_digests`.
        label: Label of the progress bar.

    Raises:
        ValueError: No image could be used.
    """
    num_layers = reader.description.num_layers
    layers = tuple(range(max(1, num_layers - _LAST_BLOCKS + 1), num_layers + 1))
    path = None
    if cache_dir is not None:
        identity = {
            "model": model_fingerprint(reader.model),
            "data": fingerprint(chain.from_iterable(zip(source.ids, digests or image_digests(source)))),
            "transform": transform.description,
            "layers": layers,
            "device": reader.device.type,
            "versions": [__version__, torch.__version__, transformers.__version__],
        }
        path = Path(cache_dir) / f"features-{fingerprint([json.dumps(identity).encode()])}.safetensors"
        if path.is_file() and (cached := _load(path)) is not None:
            return cached
    started = time.perf_counter()
    prepared = prepare_images(source, transform, batch_size=batch_size)
    ids: list[str] = []
    read: list[tuple[Tensor, Tensor]] = []
    with tqdm(total=len(source), desc=label, unit="image", disable=None) as bar:
        for names, pixel_values in prepared:
            read.append(read_vectors(reader, pixel_values, layers))
            ids += names
            bar.update(len(names))
    report_skipped(len(ids), prepared.skipped, source.name)
    vectors, means = (torch.cat(parts) for parts in zip(*read))
    kind = "CLS" if reader.description.has_cls else "mean patch"
    seconds = time.perf_counter() - started
    features = FrozenFeatures(vectors, means, layers, kind, tuple(ids), tuple(prepared.skipped), seconds)
    if path is not None:
        _save(features, path)
    return features


def read_vectors(reader: TokenReader, pixel_values: Tensor, layers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the vectors (b, B, D) of some blocks and the mean patch (b, D) of the last one, float32 on the CPU.

    They are read in one ordinary forward pass. The final norm is applied only to the tokens that are kept: CLS, and
    the patches of the last block for their mean.
    """
    has_cls, prefix = reader.description.has_cls, reader.description.num_prefix_tokens

    def keep(tokens: Tensor, layer: int) -> Tensor:
        """Reduce (b, T, D) to (b, 1 or 2, D): the vector and, for the last block, the mean patch."""
        parts = [reader.final_norm(tokens[:, :1])] if has_cls else []
        if not has_cls or layer == layers[-1]:
            parts.append(reader.final_norm(tokens[:, prefix:]).mean(dim=1, keepdim=True))
        return torch.cat(parts, dim=1).float().cpu()

    kept = reader.read(pixel_values, layers=layers, reduce=keep).values
    return torch.stack([values[:, 0] for values in kept], dim=1), kept[-1][:, -1].clone()


def _save(features: FrozenFeatures, path: Path) -> None:
    notes = {
        "layers": features.layers,
        "kind": features.kind,
        "ids": features.ids,
        "skipped": [[image.id, image.reason] for image in features.skipped],
        "seconds": features.seconds,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {"vectors": features.vectors, "mean_patch": features.mean_patch}, notes)
    except OSError as error:  # the scores do not need the cache
        logger.warning("The features are not cached and will be computed again next time. %s", error)


def _load(path: Path) -> FrozenFeatures | None:
    """Load a file written by `_save`; warn and return None if it cannot be read."""
    try:
        notes, tensors = read_notes(path), load_file(path)
        vectors, mean_patch = tensors["vectors"], tensors["mean_patch"]
    except (SafetensorError, KeyError, OSError) as error:
        logger.warning("The cached features '%s' cannot be read (%s). Computing them again.", path, error)
        return None
    skipped = tuple(SkippedImage(*pair) for pair in notes["skipped"])
    report_skipped(len(notes["ids"]), skipped, str(path))
    return FrozenFeatures(
        vectors, mean_patch, tuple(notes["layers"]), notes["kind"], tuple(notes["ids"]), skipped, notes["seconds"],
        from_cache=True,
    )  # fmt: skip
