"""Extract features of many images: in memory with `extract_features`, or to files with `extract_to_folder`.

The folder contains shards `features-00000.safetensors`, ..., each with tokens, ids and reasons for skipped images; an
`extraction.json` with everything the features depend on; and, once all shards exist, an `index.json`. Shards are
written atomically, and their content depends neither on the number of processes nor on interruptions. Shards in
parquet are tables for other programs and have a folder to themselves, `parquet/`, which pandas reads as one table.

Shapes: n images, R registers, N patches in a grid of (rows, columns), D width.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from ..data.preparation import PreparedImages, SkippedImage, prepare_images, report_skipped
from ..models.configuration_regvit import check_weight_files, shard_of
from ..models.loading import open_model, weights_fingerprint
from ..models.results import Record, html_table
from ..models.saving import check_space, read_json, read_notes, read_object, whole_file, write_json, write_tensors
from ..models.tokens import TokenReader, resolve_layers
from .cache import fingerprint
from .dense_features import FeatureSettings, pooled_grid, read_views, settings_for

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class TokenFeatures:
    """Tokens of many images after one block, on the CPU.

    Args:
        cls: (n, D) CLS tokens, or None for a model without CLS.
        registers: (n, R, D) registers; R may be 0.
        patches: (n, N, D) patches, row-major over the grid; (n, 0, D) if they were not kept.
        grid: (rows, columns) of the patches.
        ids: Ids of the n images.
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

    def __repr__(self) -> str:
        return f"TokenFeatures({len(self)} images: {', '.join(f'{name} {shape}' for name, shape in self._shapes())})"

    def _repr_html_(self) -> str:
        return html_table([("tokens", "shape"), *self._shapes(), ("skipped images", len(self.skipped))])

    def _shapes(self) -> list[tuple[str, tuple[int, ...] | None]]:
        tokens = {"cls": self.cls, "registers": self.registers, "patches": self.patches}
        return [(name, None if values is None else tuple(values.shape)) for name, values in tokens.items()]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {"registers": self.registers, "patches": self.patches}
        if self.cls is not None:
            tensors["cls"] = self.cls
        skipped = [(image.id, image.reason) for image in self.skipped]
        write_tensors(path, tensors, {"grid": self.grid, "ids": self.ids, "skipped": skipped})

    @classmethod
    def load(cls, path: str | Path) -> "TokenFeatures":
        """Load a file written by `save`, or all shards of a folder written by `extract_to_folder`.

        Raises:
            FileNotFoundError: The path does not exist, or the extraction is not finished.
            ValueError: The file does not contain token features, or they are in parquet files.
        """
        path = Path(path)
        if path.is_dir():
            skipped = [SkippedImage(*pair) for shard in _read_index(path)["shards"] for pair in shard["skipped"]]
            return _join(list(iterate_shards(path)), skipped)
        try:
            check_weight_files(path)
            notes, tensors = _read_notes(path), load_file(path)
            rows, columns = notes["grid"]
            return cls(
                cls=tensors.get("cls"),
                registers=tensors["registers"],
                patches=tensors["patches"],
                grid=(rows, columns),
                ids=tuple(notes["ids"]),
                skipped=tuple(SkippedImage(*pair) for pair in notes["skipped"]),
            )
        except (SafetensorError, LookupError, TypeError) as error:
            raise ValueError(f"'{path}' contains no token features ({error}). Delete it and extract again.") from error


def _write_table(features: TokenFeatures, path: Path, *, patches: bool) -> None:
    """Write id, CLS, mean patch and, if asked for, the patches of every image as one parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def rows(values: torch.Tensor) -> pa.Array:  # (n, D) to n lists of D numbers
        return pa.FixedSizeListArray.from_arrays(pa.array(values.flatten().numpy()), values.shape[-1])

    tokens, count = features.patches, features.patches.shape[1]
    columns = {"id": pa.array(features.ids, pa.string())}
    if features.cls is not None:
        columns["cls"] = rows(features.cls)
    columns["pooled"] = rows(tokens.float().mean(dim=1).to(tokens.dtype))
    if patches:
        starts = pa.array(range(0, count * len(features) + 1, count or 1), pa.int32())
        columns["patches"] = pa.ListArray.from_arrays(starts, rows(tokens.flatten(0, 1)))
    skipped = [(image.id, image.reason) for image in features.skipped]
    notes = json.dumps({"grid": features.grid, "ids": features.ids, "skipped": skipped})
    table = pa.table(columns).replace_schema_metadata({"hf_regvit": notes})
    with whole_file(path) as unfinished, pq.ParquetWriter(unfinished, table.schema) as file:
        if len(features):  # `datasets` fails on a row group without rows
            file.write_table(table)


def _read_notes(path: Path) -> Record:
    """Read the metadata of a features file without reading the features."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return json.loads(pq.read_schema(path).metadata[b"hf_regvit"])
        return read_notes(path)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"'{path}' contains no token features ({error}). Delete it and extract again.") from error


def _join(parts: Sequence[TokenFeatures], skipped: Sequence[SkippedImage]) -> TokenFeatures:
    """Concatenate several parts."""
    _check_grids({part.grid for part in parts})
    cls = [part.cls for part in parts if part.cls is not None]
    return TokenFeatures(
        cls=torch.cat(cls) if cls else None,
        registers=torch.cat([part.registers for part in parts]),
        patches=torch.cat([part.patches for part in parts]),
        grid=parts[0].grid,
        ids=tuple(name for part in parts for name in part.ids),
        skipped=tuple(skipped),
    )


def _check_grids(grids: set[tuple[int, int]]) -> None:
    if len(grids) > 1:
        raise ValueError(
            f"The images have different grids of patches, {sorted(grids)[:4]}, and cannot be stored in one tensor. "
            "Use a processor that resizes to one size (the default), or call read_tokens for each batch."
        )


@dataclass(frozen=True)
class ExtractionSettings:
    """Settings of an extraction: the features to read from every image and how to write them.

    Args:
        layer: Block whose output is kept: 1 to L, 0 for the embedding, negative numbers to count from the end.
        final_norm: Whether to apply the model's final norm, as for its own last hidden state, or to keep the raw
            residual stream.
        patches: Whether to keep patch tokens. Default: in safetensors, but not in parquet.
        format: "safetensors", always with CLS and registers, or "parquet", always with CLS and the mean patch.
        dtype: Data type of the files: "float32", "float16" or, in safetensors, "bfloat16".
        batch_size: Number of images per forward pass. It affects only the last digits.
        shard_size: Number of images per file, including skipped ones; each process holds one shard in memory.
        image_size: Side of the input image in pixels, or None for the size of the processor.
        max_images: Maximum number of images, counted from the first, or None for all.
        dense: Settings that `regvit dense` has chosen, which set `layer` and `image_size`, or None.
    """

    layer: int = -1
    final_norm: bool = True
    patches: bool | None = None
    format: str = "safetensors"
    dtype: str = "float32"
    batch_size: int = 32
    shard_size: int = 256
    image_size: int | None = None
    max_images: int | None = None
    dense: FeatureSettings | None = None

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown, expected one of {', '.join(_DTYPES)}.")
        if self.format not in ("safetensors", "parquet"):
            raise ValueError(f"format={self.format!r} is unknown, expected safetensors or parquet.")
        if (self.format, self.dtype) == ("parquet", "bfloat16"):
            raise ValueError("dtype='bfloat16' does not exist in parquet files. Use float16 or float32.")
        if self.shard_size < 1:
            raise ValueError(f"shard_size={self.shard_size} is too small. Use at least 1.")

    @property
    def keeps_patches(self) -> bool:
        """Return True if the files hold patch tokens."""
        return self.format == "safetensors" if self.patches is None else self.patches

    def folder(self, output_dir: Path) -> Path:
        """Return the folder of the shards."""
        return output_dir if self.format == "safetensors" else output_dir / "parquet"


def _read(reader: TokenReader, images: PreparedImages, settings: ExtractionSettings, bar: tqdm) -> TokenFeatures:
    """Read the features of all images of a part in order; there may be none."""
    dense, dtype = settings.dense or FeatureSettings(), _DTYPES[settings.dtype]

    def keep(tokens: torch.Tensor, layer: int) -> torch.Tensor:
        if not tokens.isfinite().all():
            raise ValueError(
                f"The model gives NaN or infinity at block {layer}. Check its weights. If it runs in float16, large "
                "activations may overflow; use bfloat16 or float32."
            )
        kept = tokens.to(dtype)
        if not kept.isfinite().all():
            raise ValueError(
                f"Features up to {tokens.abs().max():.3g} do not fit into {settings.dtype}. Use bfloat16 or float32."
            )
        return kept

    parts, reported = [], 0
    for ids, pixel_values in images.batches():
        grid = pooled_grid(reader, pixel_values, dense.image_size, dense.pool_to_grid)
        reading = read_views(
            reader, pixel_values, (settings.layer,), views=dense.views, grid=grid, final_norm=settings.final_norm
        )
        reading = replace(reading, values=(keep(reading.at(), reading.layers[0]),))
        patches = reading.patches()
        if not settings.keeps_patches and settings.format == "safetensors":
            patches = patches[:, :0]
        parts.append(TokenFeatures(reading.cls(), reading.registers(), patches, reading.grid, tuple(ids)))
        bar.update(len(ids) + len(images.skipped) - reported)
        reported = len(images.skipped)
    bar.update(len(images.skipped) - reported)
    if not parts:
        d = reader.description
        none = torch.zeros(0, d.num_register_tokens, d.hidden_size, dtype=dtype)
        cls = torch.zeros(0, d.hidden_size, dtype=dtype) if d.has_cls else None
        parts.append(TokenFeatures(cls, none, none[:, :0], (0, 0), ()))
    return _join(parts, images.skipped)


def extract_features(
    model: TokenReader | nn.Module | str | Path,
    images: object,
    *,
    layer: int = -1,
    final_norm: bool = True,
    batch_size: int = 32,
    device: str | torch.device = "auto",
) -> TokenFeatures:
    """Extract CLS, registers and patches of all images after one block, in memory.

    Use `extract_to_folder` for datasets that do not fit into memory.

    Args:
        model: Name, module or reader; see `open_model`.
        images: Folder, list of paths or Pillow images, `ImageSource` or `datasets` dataset. Sizes may differ, because
            the processor resizes the images.
        layer: Block to read: 1 to L, 0 for the embedding, negative numbers to count from the end.
        final_norm: Whether to apply the model's final norm, as for its own last hidden state, or to return the raw
            residual stream.
        batch_size: Number of images per forward pass.
        device: Device to compute on; see `open_model`.

    Raises:
        ValueError: The family or block is unknown, or no image could be used.
    """
    reader = open_model(model, device=device)
    prepared = prepare_images(images, reader.transform, batch_size=batch_size)
    with tqdm(total=prepared.total, unit=" images", mininterval=0.5, disable=None) as bar:
        features = _read(reader, prepared, ExtractionSettings(layer=layer, final_norm=final_norm), bar)
    report_skipped(len(features), features.skipped, prepared.name)
    return features


# --- To files ---


@dataclass(frozen=True)
class ExtractionReport:
    """Result of `extract_to_folder`; images are counted over the whole folder once it is complete (0 before)."""

    output_dir: str
    complete: bool
    num_images: int
    num_skipped: int
    num_shards: int
    num_shards_written: int
    images_per_second: float

    def to_dict(self) -> Record:
        """Return plain values for JSON."""
        return asdict(self)


def extract_to_folder(
    model: TokenReader | nn.Module | str | Path,
    images: object,
    output_dir: str | Path,
    *,
    settings: ExtractionSettings | None = None,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> ExtractionReport:
    """Extract features of any number of images to safetensors shards with an `index.json`; a rerun resumes.

    Shard i contains images i * shard_size to (i + 1) * shard_size - 1 of the source. Under `accelerate launch` or
    `torchrun` with n processes, each process computes every n-th shard, so the files are the same as those of a single
    process. Existing shards are not computed again. The process that finds all shards complete writes the index, so no
    process waits for another. Memory use is one shard and one batch. On CPUs, use `torchrun` or `accelerate launch
    --multi_gpu`, because `accelerate launch --cpu` starts only one process.

    Args:
        model: Name, module or reader; see `open_model`.
        images: Images as for `extract_features`, or a stream. Every process iterates over the whole stream, but opens
            only its own images.
        output_dir: Output folder, either new or from an earlier run with the same model, images and settings.
        settings: Settings of the extraction; see `ExtractionSettings`.
        device: Device to compute on. "auto" is that of the process, or that of a module in a single process.
        progress: Whether to show a progress bar (first process only).

    Raises:
        NoSpaceError: The features do not fit on the disk.
        ValueError: The folder contains features of another extraction, or no image could be used.
    """
    from accelerate import PartialState

    # Without `cpu`, a group of processes on a machine without accelerator would count as a single process.
    state, settings = PartialState(cpu=not torch.accelerator.is_available()), settings or ExtractionSettings()
    if device == "auto" and (state.num_processes > 1 or isinstance(model, str | Path)):
        device = state.device
    reader = open_model(model, device=device)
    if settings.dense is not None:
        given = {"layer": None if settings.layer == -1 else settings.layer, "image_size": settings.image_size}
        dense = settings_for(settings.dense, reader, **given)
        settings = replace(settings, layer=dense.layer, image_size=dense.image_size, dense=dense)
    transform = reader.transform_for(image_size=settings.image_size)
    prepared = prepare_images(images, transform, batch_size=settings.batch_size, max_images=settings.max_images)
    folder, shards = Path(output_dir), settings.folder(Path(output_dir))
    shards.mkdir(parents=True, exist_ok=True)
    identity = _identity(reader, prepared, settings)
    if prepared.total is not None:
        present = sum(path.stat().st_size for path in shards.glob(f"features-*.{settings.format}"))
        check_space(folder, prepared.total * _bytes_per_image(reader, prepared, settings) - present)
    _claim(folder, identity)

    start, num_used, num_written, num_shards = time.perf_counter(), 0, 0, 0
    total = _share(prepared.total, settings.shard_size, state.process_index, state.num_processes)
    hidden = not (progress and state.is_main_process)
    with tqdm(total=total, unit=" images", mininterval=0.5, disable=hidden) as bar:
        for index, part in enumerate(prepared.parts(settings.shard_size)):
            num_shards += 1
            if index % state.num_processes != state.process_index:
                continue
            path = shards / f"features-{index:05d}.{settings.format}"
            if _is_done(path, part):
                bar.update(part.total)
                continue
            shard = _read(reader, part, settings, bar)
            if settings.format == "parquet":
                _write_table(shard, path, patches=settings.keeps_patches)
            else:
                shard.save(path)
            num_used, num_written = num_used + len(shard), num_written + 1
    seconds = time.perf_counter() - start
    written = _write_index(folder, num_shards, identity, prepared.name, shards)
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
    """Count the images in the shards of one process."""
    if total is None:
        return None
    starts = range(process * shard_size, total, num_processes * shard_size)
    return sum(min(shard_size, total - start) for start in starts)


def _bytes_per_image(reader: TokenReader, images: PreparedImages, settings: ExtractionSettings) -> int:
    """Return the size of the tokens of an image in the files."""
    pixels, description = images.transform(Image.new("RGB", (64, 64))), reader.description
    grid = [side // patch for side, patch in zip(pixels.shape[1:], description.patch_size)]
    num_tokens = description.num_prefix_tokens + (math.prod(grid) if settings.keeps_patches else 0)
    return num_tokens * description.hidden_size * _DTYPES[settings.dtype].itemsize


def _is_done(path: Path, part: PreparedImages) -> bool:
    """Return True if an earlier run wrote this shard; raise if it contains other images."""
    if not path.is_file():
        return False
    notes = _read_notes(path)
    if {*notes["ids"], *(name for name, _ in notes["skipped"])} != set(part.ids()):
        raise ValueError(f"'{path}' contains other images than this part of the source. Use an empty folder.")
    return True


def _identity(reader: TokenReader, images: PreparedImages, settings: ExtractionSettings) -> Record:
    """Collect everything the features depend on: two runs with the same identity write the same files."""
    chosen = {key: value for key, value in asdict(settings).items() if key not in ("batch_size", "image_size")}
    if settings.dense is None:
        del chosen["dense"]
    return {
        **chosen,
        "patches": settings.keeps_patches,
        "layer": resolve_layers((settings.layer,), reader.description.num_layers)[0],
        "family": reader.family_name,
        "weights": weights_fingerprint(reader.model),
        "images": None if images.total is None else fingerprint(images.ids()),
        "transform": images.transform.description,
    }


def _claim(folder: Path, identity: Record) -> None:
    """Write the identity of the extraction to the folder, or check that an existing one is the same."""
    path = folder / "extraction.json"
    if not path.is_file():
        write_json(path, identity)
        return
    known = {"format": "safetensors", **read_json(path)}  # earlier versions wrote nothing else
    differing = [key for key in identity if known.get(key) != identity[key]]
    if differing:
        changes = ", ".join(f"{key}: {known.get(key)!r}, now {identity[key]!r}" for key in differing)
        raise ValueError(f"'{folder}' contains features of another extraction ({changes}). Use an empty folder.")


def _write_index(folder: Path, num_shards: int, identity: Record, name: str, shard_folder: Path) -> Record | None:
    """Write `index.json` and return it, or return None while other processes are still writing shards."""
    suffix = identity["format"]
    found = {path.name for path in shard_folder.glob(f"features-*.{suffix}")}
    expected = [f"features-{index:05d}.{suffix}" for index in range(num_shards)]
    if extra := sorted(found.difference(expected)):
        raise ValueError(f"'{folder}' has more shards than the source needs, e.g. '{extra[0]}'. Use an empty folder.")
    if not found.issuperset(expected):
        return None
    shards = [{"file": file, **_read_notes(shard_folder / file)} for file in expected]
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
    write_json(folder / "index.json", index)
    return index


def iterate_shards(folder: str | Path) -> Iterator[TokenFeatures]:
    """Iterate over the non-empty safetensors shards of a finished extraction, in the order of the source.

    Raises:
        FileNotFoundError: The folder has no `index.json`.
        ValueError: The shards are parquet files.
    """
    index = _read_index(Path(folder))
    if index.get("format") == "parquet":
        raise ValueError(
            f"The features in '{folder}' are tables. Read them with pandas.read_parquet('{folder}/parquet')."
        )
    for shard in index["shards"]:
        if shard["ids"]:
            yield TokenFeatures.load(shard_of(Path(folder), shard["file"]))


def _read_index(folder: Path) -> Record:
    path = folder / "index.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"'{folder}' has no index.json, so there is no finished extraction. Run the extraction again; it resumes "
            "where it stopped."
        )
    index = read_object(path)
    shards = index.get("shards")
    if not isinstance(shards, list) or not all(
        isinstance(one, dict) and {"file", "ids"} <= one.keys() for one in shards
    ):
        raise ValueError(f"'{path}' is not the index of an extraction. Run the extraction again in an empty folder.")
    return index
