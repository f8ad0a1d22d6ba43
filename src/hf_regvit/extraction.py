"""Features of many images: in memory with `extract_features`, or as files with `extract_to_folder`.

The folder holds shards `features-00000.safetensors`, ..., each with tokens, ids and reasons for skipped images, an
`extraction.json` that says what the numbers depend on, and, once every shard is there, an `index.json`. A shard is
written whole or not at all, and its content depends on neither the number of processes nor an interruption.

Shapes: n images, R registers, N patches in a grid of (rows, columns), D width.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from .families import describe_model, final_norm, find_tower
from .features import (
    EvaluationTransform,
    PreparedImages,
    SkippedImage,
    load_model,
    prepare_images,
    read_tokens,
    report_skipped,
    resolve_layers,
)

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class TokenFeatures:
    """Tokens of many images after one block, on the CPU.

    Args:
        cls: (n, D), or None for a model without CLS.
        registers: (n, R, D); R may be 0.
        patches: (n, N, D), row-major over the grid; (n, 0, D) if they were not kept.
        grid: (rows, columns).
        ids: n names of the images.
        skipped: Images that could not be used.
    """

    cls: torch.Tensor | None
    registers: torch.Tensor
    patches: torch.Tensor
    grid: tuple[int, int]
    ids: tuple[str, ...]
    skipped: tuple[SkippedImage, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; it is there whole or not at all."""
        path = Path(path)
        tensors = {"registers": self.registers, "patches": self.patches}
        if self.cls is not None:
            tensors["cls"] = self.cls
        skipped = [[image.id, image.reason] for image in self.skipped]
        notes = {"grid": list(self.grid), "ids": list(self.ids), "skipped": skipped}
        unfinished = path.with_name(f".{path.name}.partial")
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            unfinished,
            metadata={"hf_regvit": json.dumps(notes)},
        )
        _put_in_place(unfinished, path)

    @classmethod
    def load(cls, path: str | Path) -> "TokenFeatures":
        """Read a file that `save` wrote, or all shards of a folder that `extract_to_folder` wrote.

        Raises:
            FileNotFoundError: Neither is there, or the extraction has not come to its end.
            ValueError: The file is not of this kind.
        """
        path = Path(path)
        if path.is_dir():
            skipped = [SkippedImage(*pair) for shard in _read_index(path)["shards"] for pair in shard["skipped"]]
            return replace(_join(list(iterate_shards(path))), skipped=tuple(skipped))
        notes = _read_notes(path)
        tensors = load_file(path)
        rows, columns = notes["grid"]
        return cls(
            cls=tensors.get("cls"),
            registers=tensors["registers"],
            patches=tensors["patches"],
            grid=(rows, columns),
            ids=tuple(notes["ids"]),
            skipped=tuple(SkippedImage(*pair) for pair in notes["skipped"]),
        )


def _read_notes(path: Path) -> dict[str, Any]:
    """What a file says of its images, without reading their features."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})["hf_regvit"])
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"'{path}' holds no token features ({error}). Delete it and extract again.") from error


def _put_in_place(unfinished: Path, path: Path) -> None:
    """Give a finished file its name: after a crash there is the old file, the new one or none, but never half."""
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


def _join(parts: Sequence[TokenFeatures]) -> TokenFeatures:
    """Several parts as one."""
    skipped = tuple(image for part in parts for image in part.skipped)
    used = [part for part in parts if len(part)] or list(parts)
    _check_grids({part.grid for part in used})
    cls = [part.cls for part in used if part.cls is not None]
    return TokenFeatures(
        cls=torch.cat(cls) if cls else None,
        registers=torch.cat([part.registers for part in used]),
        patches=torch.cat([part.patches for part in used]),
        grid=used[0].grid,
        ids=tuple(name for part in used for name in part.ids),
        skipped=skipped,
    )


def _check_grids(grids: set[tuple[int, int]]) -> None:
    if len(grids) > 1:
        raise ValueError(
            f"The pictures have different grids of patches, {sorted(grids)[:4]}, and cannot be put into one tensor. "
            "Use a processor that makes pictures of one size (the default), or read_tokens batch by batch."
        )


@dataclass(frozen=True)
class ExtractionSettings:
    """What is read from every image and how it is written.

    Args:
        layer: Block whose output is kept; 1 to L, 0 the embedding, negative from the end.
        final_norm: Apply the model's final norm, as for its own last hidden state; False: the raw residual stream.
        patches: Keep patch tokens; CLS and registers always are.
        dtype: "float32", "float16" or "bfloat16".
        batch_size: Images of one forward pass. Other values change the last digits only.
        shard_size: Images of one file, bad ones included; as many a process holds in memory.
        image_size: Side of the picture, pixels; None: the processor's own.
        max_images: The first so many images; None: all.
    """

    layer: int = -1
    final_norm: bool = True
    patches: bool = True
    dtype: str = "float32"
    batch_size: int = 32
    shard_size: int = 256
    image_size: int | None = None
    max_images: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown, expected one of {', '.join(_DTYPES)}.")
        if self.shard_size < 1:
            raise ValueError(f"shard_size={self.shard_size}, expected at least 1.")


class _Reader:
    """Pixels to features with one model, block and type."""

    def __init__(self, model: nn.Module, settings: ExtractionSettings) -> None:
        self.model, self.settings = model, settings
        self.norm = final_norm(model) if settings.final_norm else nn.Identity()
        self.dtype = _DTYPES[settings.dtype]

    def read(self, images: PreparedImages, bar: Any) -> TokenFeatures:
        """Features of all images of a part, in their order; perhaps of none."""
        parts, reported = [], 0
        for ids, pixel_values in images.batches():
            parts.append(self._read_batch(ids, pixel_values))
            bar.update(len(ids) + len(images.skipped) - reported)
            reported = len(images.skipped)
        bar.update(len(images.skipped) - reported)
        return replace(_join(parts or [self._of_no_image()]), skipped=tuple(images.skipped))

    def _read_batch(self, ids: Sequence[str], pixel_values: torch.Tensor) -> TokenFeatures:
        reading = read_tokens(self.model, pixel_values, layers=(self.settings.layer,), reduce=self._keep)
        patches = reading.patches()
        return TokenFeatures(
            cls=reading.cls(),
            registers=reading.registers(),
            patches=patches if self.settings.patches else patches[:, :0],
            grid=reading.grid,
            ids=tuple(ids),
        )

    def _keep(self, tokens: torch.Tensor, layer: int) -> torch.Tensor:
        tokens = self.norm(tokens)
        if not tokens.isfinite().all():
            raise ValueError(
                f"The model gives NaN or infinity at layer {layer}. Check its weights; in float16 large activations "
                "overflow: use bfloat16 or float32."
            )
        kept = tokens.to(self.dtype)
        if not kept.isfinite().all():
            raise ValueError(
                f"Features up to {tokens.abs().max():.3g} do not fit {self.settings.dtype}. Use bfloat16 or float32."
            )
        return kept.cpu()

    def _of_no_image(self) -> TokenFeatures:
        description = describe_model(self.model)
        none = torch.zeros(0, description.num_register_tokens, description.hidden_size, dtype=self.dtype)
        return TokenFeatures(none[:, 0] if description.has_cls else None, none, none[:, :0], (0, 0), ())


def extract_features(
    model: nn.Module,
    images: Any,
    *,
    processor: Any = None,
    layer: int = -1,
    final_norm: bool = True,
    batch_size: int = 32,
    device: str | torch.device | None = None,
) -> TokenFeatures:
    """CLS, registers and patches of all images after one block, in memory; `extract_to_folder` is for larger sets.

    Args:
        model: A model of a family in `families.FAMILIES`; untouched.
        images: A folder, paths, Pillow images, an `ImageSource` or a `datasets` data set. Sizes may differ: the
            processor brings them to one.
        processor: See `EvaluationTransform.for_model`.
        layer: 1 to L, 0 for the embedding, negative from the end.
        final_norm: Apply the model's final norm, as for its own last hidden state; False: the raw residual stream.
        batch_size: Images of one forward pass.
        device: Where to compute; default where the model is.

    Raises:
        ValueError: Unknown family or layer, or no image of use.
    """
    settings = ExtractionSettings(layer=layer, final_norm=final_norm)
    prepared = prepare_images(images, EvaluationTransform.for_model(model, processor), batch_size=batch_size)
    with _placed(model, device), _progress(prepared.total, show=None) as bar:
        features = _Reader(model, settings).read(prepared, bar)
    report_skipped(len(features), features.skipped, prepared.name)
    return features


@contextmanager
def _placed(model: nn.Module, device: str | torch.device | None) -> Iterator[None]:
    """The model on a device for the time of the block, and back where it was after it."""
    home = next(model.parameters()).device
    try:
        if device is not None:
            model.to(device)
        yield
    finally:
        model.to(home)


def _progress(total: int | None, *, show: bool | None) -> Any:
    """A bar in images per second on stderr; `show=None`: only on a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, unit=" images", disable=None if show is None else not show, mininterval=0.5)


# --- To files ---


@dataclass(frozen=True)
class ExtractionReport:
    """What a call of `extract_to_folder` did. Images are counted over the whole folder once it is complete."""

    output_dir: str
    complete: bool
    num_images: int
    num_skipped: int
    num_shards: int
    num_shards_written: int
    images_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def extract_to_folder(
    model: nn.Module | str | Path,
    images: Any,
    output_dir: str | Path,
    *,
    processor: Any = None,
    settings: ExtractionSettings | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> ExtractionReport:
    """Features of any number of images as safetensors shards with an `index.json`; run again, it goes on.

    Shard i holds images i * shard_size to (i + 1) * shard_size - 1 of the source, whoever computes it. A process under
    `accelerate launch` or `torchrun` takes every n-th shard, so that several together write the very files that one
    would; a shard that is there already is not computed again. The index is written by whoever finds all shards done,
    so nobody waits for anybody. Memory: one shard and one batch. On CPUs use `torchrun` or `accelerate launch
    --multi_gpu`: `accelerate launch --cpu` starts a single process.

    Args:
        model: A model, or the name of one for `load_model`.
        images: As for `extract_features`. Every process passes through a whole stream, but opens its own images only.
        output_dir: New, or that of an earlier run with the same model, images and settings.
        processor: See `EvaluationTransform.for_model`.
        settings: See `ExtractionSettings`.
        device: Where to compute; default where the model is, or the process's own device.
        progress: Show a bar (first process only).

    Raises:
        ValueError: The folder holds features of something else, or no image is of use.
    """
    from accelerate import PartialState

    # Without `cpu` a group of processes on a machine without accelerator takes itself for one.
    state, settings = PartialState(cpu=not torch.accelerator.is_available()), settings or ExtractionSettings()
    if isinstance(model, str | Path):
        model, saved = load_model(model)
        processor, device = processor or saved, device or state.device
    elif state.num_processes > 1:
        device = device or state.device
    transform = EvaluationTransform.for_model(model, processor, image_size=settings.image_size)
    prepared = prepare_images(images, transform, batch_size=settings.batch_size, max_images=settings.max_images)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    identity = _identity(model, prepared, settings)
    _claim(folder, identity)

    start, num_used, num_written, num_shards = time.perf_counter(), 0, 0, 0
    total = _share(prepared.total, settings.shard_size, state.process_index, state.num_processes)
    show = progress and state.is_main_process
    with _placed(model, device), _progress(total, show=show) as bar:
        reader = _Reader(model, settings)
        for index, part in enumerate(prepared.parts(settings.shard_size)):
            num_shards += 1
            if index % state.num_processes != state.process_index:
                continue
            path = folder / _shard_name(index)
            if _is_done(path, part):
                bar.update(part.total)
                continue
            shard = reader.read(part, bar)
            shard.save(path)
            num_used, num_written = num_used + len(shard), num_written + 1
    seconds = time.perf_counter() - start
    written = _write_index(folder, num_shards, identity, prepared.name)
    return ExtractionReport(
        output_dir=str(output_dir),
        complete=written is not None,
        num_images=written["num_images"] if written else 0,
        num_skipped=written["num_skipped"] if written else 0,
        num_shards=num_shards,
        num_shards_written=num_written,
        images_per_second=round(num_used / seconds, 2),
    )


def _share(total: int | None, shard_size: int, process: int, num_processes: int) -> int | None:
    """How many of `total` images lie in the shards of one process."""
    if total is None:
        return None
    starts = range(process * shard_size, total, num_processes * shard_size)
    return sum(min(shard_size, total - start) for start in starts)


def _shard_name(index: int) -> str:
    return f"features-{index:05d}.safetensors"


def _is_done(path: Path, part: PreparedImages) -> bool:
    """Whether a shard of an earlier run is there, with these very images."""
    if not path.is_file():
        return False
    notes = _read_notes(path)
    if {*notes["ids"], *(name for name, _ in notes["skipped"])} != set(part.ids()):
        raise ValueError(f"'{path}' holds other images than the source now has in this place. Use an empty folder.")
    return True


def weights_fingerprint(model: nn.Module) -> str:
    """32 hexadecimal digits that change when any weight of the vision tower does, or its type."""
    digest = hashlib.blake2b(digest_size=16)
    for key, tensor in sorted(find_tower(model)[0].state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _identity(model: nn.Module, images: PreparedImages, settings: ExtractionSettings) -> dict[str, Any]:
    """All that the numbers depend on: two runs of one identity write the same files."""
    names = hashlib.blake2b(digest_size=16)
    for name in images.ids() if images.total is not None else ():
        names.update(name.encode("utf-8", "surrogateescape") + b"\0")
    chosen = {key: value for key, value in asdict(settings).items() if key not in ("batch_size", "image_size")}
    return {
        **chosen,
        "layer": resolve_layers((settings.layer,), describe_model(model).num_layers)[0],
        "family": find_tower(model)[1],
        "weights": weights_fingerprint(model),
        "images": None if images.total is None else names.hexdigest(),
        "transform": images.transform.description,
    }


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Write down what the folder is for, or check that it is for the same."""
    path = folder / "extraction.json"
    if not path.is_file():
        _write_json(path, identity)
        return
    known = json.loads(path.read_text(encoding="utf-8"))
    differing = [key for key in identity if known.get(key) != identity[key]]
    if differing:
        changes = ", ".join(f"{key}: {known.get(key)!r}, now {identity[key]!r}" for key in differing)
        raise ValueError(f"'{folder}' holds features of another extraction ({changes}). Use an empty folder.")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    # Several processes may write the same content, each in a file of its own, so that none renames another's half.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _put_in_place(unfinished, path)


def _write_index(folder: Path, num_shards: int, identity: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Write `index.json` and return it; None while other processes are still at work on their shards."""
    found = {path.name for path in folder.glob("features-*.safetensors")}
    expected = [_shard_name(index) for index in range(num_shards)]
    if extra := sorted(found.difference(expected)):
        raise ValueError(f"'{folder}' has more shards than the source fills, e.g. '{extra[0]}'. Use an empty folder.")
    if not found.issuperset(expected):
        return None
    shards = [{"file": file, **_read_notes(folder / file)} for file in expected]
    skipped = [SkippedImage(*pair) for shard in shards for pair in shard["skipped"]]
    num_images = sum(len(shard["ids"]) for shard in shards)
    report_skipped(num_images, skipped, name)
    grids = {tuple(shard.pop("grid")) for shard in shards if shard["ids"]}
    _check_grids(grids)
    index = {
        "num_images": num_images,
        "num_skipped": len(skipped),
        "grid": list(grids.pop()),
        **identity,
        "shards": shards,
    }
    _write_json(folder / "index.json", index)
    return index


def iterate_shards(folder: str | Path) -> Iterator[TokenFeatures]:
    """The shards of a finished extraction that hold any image, one by one, in the order of the source.

    Raises:
        FileNotFoundError: The folder has no `index.json`.
    """
    for shard in _read_index(Path(folder))["shards"]:
        if shard["ids"]:
            yield TokenFeatures.load(Path(folder, shard["file"]))


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / "index.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"'{folder}' has no index.json: nothing was extracted there, or not to the end. Run the extraction again; "
            "it goes on where it stopped."
        )
    return json.loads(path.read_text(encoding="utf-8"))
