"""One vector per image and block from a frozen model, read once and kept on disk for every task.

A file's name is the fingerprint of all that its numbers depend on: weights and configuration of the model, content and
order of the images, what the transform does, blocks, and the versions of the libraries. Whatever of it changes, the
file is not found and the features are read anew; nothing is ever taken for something else.

Shape letters: n images, B blocks, D width.
"""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .configuration_regvit import __version__
from .extraction import weights_fingerprint
from .families import describe_model, final_norm, find_tower
from .features import EvaluationTransform, SkippedImage, prepare_images, read_tokens, report_skipped, resolve_layers
from .image_guard import BadImageError
from .images import ImageSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FrozenFeatures:
    """What tasks on whole images need, on the CPU and after the final norm.

    Args:
        vectors: (n, B, D) float32: CLS of every block read, or the mean patch of a model without CLS.
        mean_patch: (n, D), of the last block read.
        layers: The blocks, 1 to L.
        kind: What the vectors are: "CLS" or "mean patch".
        ids: Of the n images that could be read, in the order of the source.
        skipped: Those that could not.
        seconds: Wall time of reading them, also when they came from the cache.
        from_cache: Whether they did.
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
        """(n, D), the vectors of the last block read."""
        return self.vectors[:, -1]


def model_fingerprint(model: nn.Module) -> str:
    """32 hexadecimal digits that change with any weight of the vision tower or field of its configuration."""
    tower: Any = find_tower(model)[0]
    # timm keeps no configuration: the text of its modules holds sizes, norms and their epsilons.
    settings = tower.config.to_dict() if hasattr(tower, "config") else {"modules": repr(tower)}
    settings = {k: v for k, v in settings.items() if k not in ("_name_or_path", "transformers_version")}
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.blake2b((weights_fingerprint(model) + text).encode(), digest_size=16).hexdigest()


def image_digests(source: ImageSource) -> list[bytes]:
    """16 bytes for every image that change with its content.

    Content is what is stored, byte by byte: times and sizes of files would miss a changed one. Pictures that are drawn
    rather than stored are drawn for this.
    """
    digests = []
    for i in range(len(source)):
        try:
            content = source.read(i).tobytes() if source.encoded is None else source.encoded(i)
        except BadImageError as error:
            content = str(error).encode()
        digests.append(hashlib.blake2b(content, digest_size=16).digest())
    return digests


def data_fingerprint(source: ImageSource, digests: Sequence[bytes] | None = None) -> str:
    """32 hexadecimal digits that change with the name, the content or the order of any image.

    Args:
        source: Images.
        digests: Theirs, if they are known already.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, content in zip(source.ids, image_digests(source) if digests is None else digests):
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0" + content)
    return digest.hexdigest()


def read_features(
    model: nn.Module,
    source: ImageSource,
    *,
    transform: EvaluationTransform,
    layers: Sequence[int] = (-4, -3, -2, -1),
    batch_size: int = 32,
    cache_dir: str | Path | None = None,
    digests: Sequence[bytes] | None = None,
    label: str | None = None,
) -> FrozenFeatures:
    """Features of all images in their order, from the cache where they are there.

    Args:
        model: A model of a family in `families.FAMILIES`; untouched.
        source: Images.
        transform: What the model sees of them.
        layers: Blocks; those that a shallow model has not are left out.
        batch_size: Images of one forward pass.
        cache_dir: Folder for the files; None keeps none.
        digests: Of the images, if they are known already; see `image_digests`.
        label: Of the progress bar.

    Raises:
        ValueError: No image is of use.
    """
    description = describe_model(model)
    resolved = resolve_layers([layer for layer in layers if layer >= -description.num_layers], description.num_layers)
    path = None
    if cache_dir is not None:
        identity = {
            "model": model_fingerprint(model),
            "data": data_fingerprint(source, digests),
            "transform": transform.description,
            "layers": resolved,
            "device": next(model.parameters()).device.type,
            "versions": [__version__, torch.__version__, transformers.__version__],
        }
        key = hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()
        path = Path(cache_dir) / f"features-{key}.safetensors"
        if path.is_file() and (cached := _load(path)) is not None:
            return cached
    started = time.perf_counter()
    features = _read(model, source, transform, resolved, batch_size, label)
    features = replace(features, seconds=time.perf_counter() - started)
    if path is not None:
        _save(features, path)
    return features


def _read(
    model: nn.Module,
    source: ImageSource,
    transform: EvaluationTransform,
    layers: tuple[int, ...],
    batch_size: int,
    label: str | None,
) -> FrozenFeatures:
    from tqdm.auto import tqdm

    reader = VectorReader(model, layers)
    prepared = prepare_images(source, transform, batch_size=batch_size)
    ids: list[str] = []
    vectors, means = [], []
    with tqdm(total=len(source), desc=label, unit="image", disable=None) as bar:
        for names, pixel_values in prepared:
            one, mean = reader.read(pixel_values)
            ids += names
            vectors.append(one)
            means.append(mean)
            bar.update(len(names))
    report_skipped(len(ids), prepared.skipped, source.name)
    return FrozenFeatures(
        torch.cat(vectors), torch.cat(means), layers, reader.kind, tuple(ids), tuple(prepared.skipped), 0.0
    )


class VectorReader:
    """Pixels to the vectors of some blocks, one ordinary forward pass a batch.

    Of every block only what is kept is normed: CLS alone, and all patches of the last block for their mean.
    """

    def __init__(self, model: nn.Module, layers: tuple[int, ...]) -> None:
        description = describe_model(model)
        self.model, self.layers, self.norm = model, layers, final_norm(model)
        self.kind = "CLS" if description.has_cls else "mean patch"
        self.prefix, self.has_cls = description.num_prefix_tokens, description.has_cls

    def read(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(b, B, D) and (b, D), float32 on the CPU."""
        kept = read_tokens(self.model, pixel_values, layers=self.layers, reduce=self._reduce).values
        vectors = torch.stack([values[:, 0] for values in kept], dim=1)  # (b, B, D)
        return vectors, kept[-1][:, -1].clone()

    def _reduce(self, tokens: Tensor, layer: int) -> Tensor:
        """(b, T, D) to (b, 1 or 2, D): the vector, and of the last block the mean patch."""
        parts = [self.norm(tokens[:, :1])] if self.has_cls else []
        if not self.has_cls or layer == self.layers[-1]:
            parts.append(self.norm(tokens[:, self.prefix :]).mean(dim=1, keepdim=True))
        return torch.cat(parts, dim=1).float().cpu()


def _save(features: FrozenFeatures, path: Path) -> None:
    """One file, there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = {
        "layers": features.layers,
        "kind": features.kind,
        "ids": features.ids,
        "skipped": [[image.id, image.reason] for image in features.skipped],
        "seconds": features.seconds,
    }
    unfinished = path.with_name(f".{path.name}.partial")
    save_file(
        {"vectors": features.vectors, "mean_patch": features.mean_patch},
        unfinished,
        metadata={"hf_regvit": json.dumps(notes)},
    )
    unfinished.replace(path)


def _load(path: Path) -> FrozenFeatures | None:
    """What `_save` wrote; None, said aloud, if the file cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            notes = json.loads((file.metadata() or {})["hf_regvit"])
            vectors, mean_patch = file.get_tensor("vectors"), file.get_tensor("mean_patch")
    except (SafetensorError, KeyError, OSError) as error:
        logger.warning("The cached features '%s' cannot be read (%s); reading the images again.", path, error)
        return None
    skipped = tuple(SkippedImage(*pair) for pair in notes["skipped"])
    report_skipped(len(notes["ids"]), skipped, str(path))
    return FrozenFeatures(
        vectors, mean_patch, tuple(notes["layers"]), notes["kind"], tuple(notes["ids"]), skipped, notes["seconds"],
        from_cache=True,
    )  # fmt: skip
