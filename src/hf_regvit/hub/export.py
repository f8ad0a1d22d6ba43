"""Export a RegViT to files for ONNX Runtime, OpenVINO and torch, each proved before it gets its name."""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packaging.version import Version
from PIL import Image
from torch import Tensor, nn
from transformers.image_processing_utils import BaseImageProcessor

from ..data.builtin import builtin_images
from ..data.loading import Data, load_images
from ..data.preparation import prepare_images
from ..data.source import ImageSource
from ..models.configuration_regvit import RegViTConfig
from ..models.loading import open_regvit, weights_fingerprint
from ..models.modeling_regvit import RegViTForImageClassification, RegViTPreTrainedModel
from ..models.processing import EvaluationTransform, known_processor, require_rgb, resized_processor, unknown_processor
from ..models.saving import whole_folder, write_json
from ..models.tokens import TokenReader
from . import exported
from .export_network import NamedOutputs, network_for_task
from .export_page import write_page, write_static_files
from .export_programs import convert_to_file, file_name, halve_weights, quantize, quiet
from .export_proof import BOUNDS, Question, answers_of, compare, failures
from .exported import (
    ExportError,
    check_images,
    difference,
    is_installed,
    load_proof,
    preprocess,
    run_file,
    sha256,
)
from .scan import may_be_published

Size = int | str | Sequence[int]  # of images, as given by a user
FORMATS = {"onnx": "onnxruntime", "openvino": "openvino", "torch": "torch", "web": "onnxruntime"}
PRECISIONS = ("f32", "f16", "int8", "int8-weights")
INPUTS = ("float", "uint8")
_ONNX = ("onnx", "onnxscript", "onnxruntime")
_PACKAGES = {"onnx": _ONNX, "openvino": ("openvino",), "torch": (), "web": _ONNX}
_TRANSFORMERS = "5.24"  # the first release with complete exporters
_FEWEST_CALIBRATION, _FEWEST_HELD_OUT, _MOST_HELD_OUT = 32, 16, 100  # images
_CHECK_VALUES, _CHECK_SIDE = 20_000, 224  # of check.npz, which stays below 1 MB
_PAGE = """
`index.html` shows norms, attention and PCA of an image in the browser. Any static host can serve this folder, such as
`python -m http.server`.
"""
_MEAN_LEVELS, _LEVELS = 1.0, 16.0  # bounds of the difference between run.py and the image processor, gray levels


@dataclass(frozen=True)
class ExportReport:
    """Result of `export`: the folder, the entries of the files in `proof.json`, and the duration in seconds."""

    folder: str
    files: list[dict[str, Any]]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"output_dir": self.folder, "files": self.files, "seconds": self.seconds}

    def summary(self) -> dict[str, str]:
        """Return a line for each file."""
        return {file["file"]: describe_file(file) for file in self.files}


def describe_file(file: Mapping[str, Any]) -> str:
    """Return the size of a file and the worst numbers of its proof as a phrase."""
    numbers = file["outputs"].values()
    text = f"{sum(file['bytes'].values()) / 2**20:.1f} MiB, error {max(one['max_error'] for one in numbers):.1g}, "
    text += f"cosine {min(one['cosine_min'] for one in numbers):.5f}"
    text += f", same class {100 * file['agreement']:.1f} %" if "agreement" in file else ""
    measured = file.get("bf16", {}).get("outputs", {}).values()
    return text + (f"; in bfloat16 cosine {min(one['cosine_min'] for one in measured):.5f}" if measured else "")


@dataclass(frozen=True)
class _Request:
    """Checked wishes of an export."""

    network: NamedOutputs
    transform: EvaluationTransform
    preprocessing: dict[str, Any]
    size: tuple[int, int] | None  # None: any
    formats: tuple[str, ...]
    precisions: tuple[str, ...]
    accept: tuple[str, ...]
    opset: int
    processor: BaseImageProcessor
    web_runtime: str | Path | None

    @property
    def config(self) -> RegViTConfig:
        return self.network.model.config

    @property
    def sides(self) -> tuple[int, int]:
        return self.size or self.config.image_shape


def export(
    model: TokenReader | nn.Module | str | Path,
    folder: str | Path,
    *,
    format: str | Sequence[str] = ("onnx", "openvino"),
    size: Size | None = None,
    precision: str | Sequence[str] = "f32",
    data: Data | ImageSource | None = None,
    num_calibration: int = 300,
    input: str = "float",
    task: str | None = None,
    accept: str | Sequence[str] = (),
    opset: int = 20,
    web_runtime: str | Path | None = None,
    seed: int = 0,
) -> ExportReport:
    """Export a model to files that need neither torch nor this package, and prove every file.

    A file is for images of one size and any number of images. Its outputs are called `cls`, `registers`, `patches`,
    `logits`, `depth` or `feature_map_N`, where N is a block. Each file is run in a clean process and compared with
    PyTorch. If one misses its bounds, nothing is written. Padded images (`pixel_mask`) cannot be exported: resize and
    crop the images as the processor does, or export a file for each size.

    Args:
        model: RegViT of any class, or a model that `convert` accepts: a name, a module or a reader. It is not changed.
        folder: New or empty folder.
        format: "onnx", "openvino", "torch", "web", or several of them. A torch file is for float32 only. "web" is a
            page that shows norms, attention and PCA of an image in the browser; its ONNX file has the outputs `norms`
            and `attention`, too.
        size: Side of the images in pixels, (height, width) or "336x448"; "stored" for the size of the position table;
            "any" for files that take every size. Default: the size that the image processor produces.
        precision: "f32", "f16" (of the weights), "int8", "int8-weights" (weights only), or several of them.
        data: Images for the calibration of int8, which needs them, and for the proof; see `load_images`.
        num_calibration: Maximum number of images for the calibration.
        input: "float" for normalized pixels, or "uint8" for pixels that the file normalizes itself.
        task: "features" for the backbone of a model with a head, or "backbone" for feature maps. Default: the model.
        accept: Precisions to write even if they miss their bounds.
        opset: Opset of ONNX files.
        web_runtime: Folder of the unpacked npm package onnxruntime-web for a page. Default: npm downloads it.
        seed: Random seed for the choice of the images.

    Raises:
        ExportError: The model cannot be exported as requested, or a proof failed; the message says what to do.
        ImportError: A package of the extra `export` is missing.
        UnknownProcessorError: The image processor of the model is not known.
        NoSpaceError: The disk is full.
    """
    started, folder = time.perf_counter(), Path(folder)
    formats = _chosen("format", format, tuple(FORMATS))
    precisions = _chosen("precision", precision, PRECISIONS)
    accepted = _chosen("accept", accept, PRECISIONS) if accept else ()
    _chosen("input", input, INPUTS)
    _check_packages(formats, precisions)
    if "torch" in formats and "f32" not in precisions:
        raise ExportError(f"A torch file is for float32 only, but precision is {', '.join(precisions)}. Add f32.")
    if "int8" in precisions and data is None:
        raise ExportError("precision='int8' needs images for its calibration. Add data, or use 'int8-weights'.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"'{folder}' is not an empty folder. Choose a new folder for the export.")
    for_page = "web" in formats
    if for_page and (size == "any" or "f32" not in precisions):
        raise ExportError("A page runs the f32 file of one image size. Name a size, such as 224, and add f32.")
    formats = tuple(dict.fromkeys("onnx" if name == "web" else name for name in formats))
    network, transform, wanted, processor, settings = _prepare(model, size, input, task, for_page=for_page)
    request = _Request(
        network, transform, settings, wanted, formats, precisions, accepted, opset, processor, web_runtime
    )
    if wanted is None and "int8" in precisions:
        raise ExportError("int8 is calibrated for one image size, but size is 'any'. Name a size, such as 224.")
    calibration, held_out = _images_of_user(request, data, num_calibration, seed)
    needed = sum(p.nbytes for p in network.parameters()) * (len(formats) * len(precisions) + 1)
    with whole_folder(folder.parent, needed=needed) as parent:  # the finished folder is moved at once
        staged = parent / folder.name
        staged.mkdir()
        with tempfile.TemporaryDirectory(dir=parent) as work, quiet():
            files = _write_files(request, staged, Path(work), calibration, held_out)
        if folder.is_dir():
            folder.rmdir()
    return ExportReport(str(folder), files, round(time.perf_counter() - started, 1))


# ---- Request -----------------------------------------------------------------------------------------------------


def _chosen(option: str, given: str | Sequence[str], choices: tuple[str, ...]) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else tuple(dict.fromkeys(given))
    if unknown := [name for name in names if name not in choices]:
        raise ExportError(f"{option}={unknown[0]!r} is unknown. Choose from {', '.join(choices)}.")
    if not names:
        raise ExportError(f"{option} is empty. Choose from {', '.join(choices)}.")
    return tuple(sorted(names, key=choices.index))


def _check_packages(formats: Sequence[str], precisions: Sequence[str]) -> None:
    if Version(installed := version("transformers")) < Version(_TRANSFORMERS):
        raise ImportError(
            f"Exports need transformers >= {_TRANSFORMERS}, but {installed} is installed. Run: pip install "
            f"'transformers>={_TRANSFORMERS}'"
        )
    needed = [package for name in formats for package in _PACKAGES[name]]
    needed += ["nncf"] if any(name.startswith("int8") for name in precisions) else []
    if missing := [name for name in needed if not is_installed(name)]:
        raise ImportError(f"This export needs {', '.join(missing)}. Run: pip install 'hf_regvit[export]'")


def _prepare(
    model: TokenReader | nn.Module | str | Path, size: Size | None, input: str, task: str | None, *, for_page: bool
) -> tuple[NamedOutputs, EvaluationTransform, tuple[int, int] | None, BaseImageProcessor, dict[str, Any]]:
    """Open the model and return its network, transform, image size, processor and the numbers of its processor."""
    opened = open_regvit(model)
    require_rgb(opened)
    processor = model.processor if isinstance(model, TokenReader) else known_processor(opened)
    if processor is None:
        raise unknown_processor(opened)
    if isinstance(processor, EvaluationTransform):
        raise ExportError(f"The image processor is a {type(processor).__name__}, which cannot be saved. Convert it.")
    _, *own = EvaluationTransform.for_model(opened, processor)(Image.new("RGB", (320, 240))).shape
    config = opened.config
    wanted = _parse_size(size, (own[0], own[1]), config.image_shape)
    rows, columns = config.patch_shape
    if wanted is not None and (wanted[0] % rows or wanted[1] % columns or min(wanted) < 1):
        nearest = "x".join(str(max(1, round(side / p)) * p) for side, p in zip(wanted, config.patch_shape))
        raise ExportError(
            f"size={wanted[0]}x{wanted[1]} is not a multiple of the patch size of {rows} x {columns}. Use {nearest}."
        )
    if wanted and wanted != (own[0], own[1]):
        processor = resized_processor(processor, wanted)
    transform = EvaluationTransform.for_model(opened, processor)
    settings = _settings_of(processor, transform)
    _check_settings(settings, transform)
    statistics = settings if input == "uint8" else None
    network = NamedOutputs(network_for_task(opened, task), statistics, for_page=for_page)
    return network, transform, wanted, processor, settings


def _parse_size(size: Size | None, own: tuple[int, int], stored: tuple[int, int]) -> tuple[int, int] | None:
    if size is None or size == "stored" or size == "any":
        return {None: own, "stored": stored, "any": None}[size]
    sides = size.split("x") if isinstance(size, str) else [size] if isinstance(size, int) else size
    if len(sides) not in (1, 2) or not all(str(side).isdecimal() for side in sides):
        raise ExportError(f"size={size!r} is not an image size. Use 224, 336x448, stored or any.")
    return int(sides[0]), int(sides[-1])


def _settings_of(processor: BaseImageProcessor, transform: EvaluationTransform) -> dict[str, Any]:
    """Return the numbers of an image processor that `run.py` needs."""
    fields = processor.to_dict()
    size = {name: side for name, side in (fields.get("size") or {}).items() if side is not None}
    resize = {**size, "resample": int(fields.get("resample") or Image.Resampling.BICUBIC)}
    if fields.get("do_resize", True) and set(size) not in ({"shortest_edge"}, {"height", "width"}):
        raise ExportError(
            f"The processor {type(processor).__name__} resizes to {size}, which run.py cannot do. Save the model with "
            "a processor that resizes the shortest edge, or to one height and width."
        )
    crop = fields.get("crop_size") or {}
    return {
        "channels": "RGB", "resize": resize if fields.get("do_resize", True) else None,
        "crop": [crop["height"], crop["width"]] if fields.get("do_center_crop") else None,
        "scale": fields.get("rescale_factor", 1 / 255) if fields.get("do_rescale", True) else 1.0,
        "mean": list(transform.mean), "std": list(transform.std),
    }  # fmt: skip


def _check_settings(settings: dict[str, Any], transform: EvaluationTransform) -> None:
    """Compare the preprocessing of `run.py` with that of the processor on two images, and note the difference."""
    worst, total = 0.0, 0.0
    for image in list(builtin_images().values())[:2]:
        ours = preprocess(image, settings).astype(np.float64)
        std, mean = np.array(settings["std"]), np.array(settings["mean"])
        theirs = (transform(image).permute(1, 2, 0).double().numpy() * std + mean) / settings["scale"]
        if ours.shape != theirs.shape:
            raise ExportError(f"run.py makes images of {ours.shape}, but the processor of {theirs.shape}.")
        worst, total = max(worst, float(abs(ours - theirs).max())), max(total, float(abs(ours - theirs).mean()))
    if worst > _LEVELS or total > _MEAN_LEVELS:
        raise ExportError(
            f"The preprocessing of run.py differs from the image processor by {total:.2g} gray levels in the mean and "
            f"{worst:.2g} at most (bounds {_MEAN_LEVELS:g} and {_LEVELS:g}). Save the model with a processor that "
            "only resizes, crops and normalizes, such as BitImageProcessor."
        )
    settings["difference_to_processor"] = {"mean": round(total, 4), "max": round(worst, 4), "unit": "gray levels"}


# ---- Images ------------------------------------------------------------------------------------------------------


def _images_of_user(
    request: _Request, data: Data | ImageSource | None, num_calibration: int, seed: int
) -> tuple[dict[str, Any], list[Question]]:
    """Draw the images for calibration and proof, which are different ones.

    Returns:
        `samples`, the inputs for the calibration, and a description of them; and the questions with held-out images.
    """
    if data is None:
        return {}, []
    source = data if isinstance(data, ImageSource) else load_images(data, split=None)
    order = np.random.default_rng(seed).permutation(len(source)).tolist()
    held, count = min(_MOST_HELD_OUT, len(order)), 0
    if "int8" in request.precisions:
        held = max(_FEWEST_HELD_OUT, min(_MOST_HELD_OUT, len(order) // 4))
        count = min(num_calibration, len(order) - held)
        if count < _FEWEST_CALIBRATION:
            raise ExportError(
                f"int8 would be calibrated on {max(0, count)} images, expected at least {_FEWEST_CALIBRATION}: "
                f"num_calibration is {num_calibration}, and '{source.name}' has {len(order)} images, of which {held} "
                "are held out for the proof. Give more images, or use precision='int8-weights'."
            )
    network, labels = request.network, _labels(request, source)
    places = {source.ids[place]: place for place in order[:held]}
    rows = [row for batch in prepare_images(source.subset(order[:held]), request.transform) for row in zip(*batch)]
    questions: list[Question] = []
    while rows:
        size = (1, 2, 5)[min(len(questions), 2)]
        chosen, rows = rows[:size], rows[size:]
        own = None if labels is None else labels[[places[name] for name, _ in chosen]]
        questions.append(_question("held-out", network, torch.stack([pixels for _, pixels in chosen]), own))
    samples = []
    for _, pixels in prepare_images(source.subset(order[held : held + count]), request.transform) if count else ():
        samples += [{network.entry: one[None]} for one in network.from_normalized(pixels)]
    held = sum(len(question.pixels) for question in questions)
    name = Path(source.name).name
    return {"samples": samples, "data": name, "images": len(samples), "held_out": held, "seed": seed}, questions


def _labels(request: _Request, source: ImageSource) -> np.ndarray | None:
    """Return the class ids of a source in the order of the classifier, or None if the classes are others."""
    names, labels = source.label_names, source.labels
    is_classifier = isinstance(request.network.model, RegViTForImageClassification)
    if labels is None or names is None or not is_classifier or len(names) != request.config.num_labels:
        return None
    own = request.config.label2id or {}
    places = [own[name] for name in names] if set(names) == set(own) else range(len(names))
    return np.array(places)[np.asarray(labels)]


def _question(kind: str, network: NamedOutputs, images: Tensor, labels: np.ndarray | None = None) -> Question:
    return Question.ask(kind, network, network.from_normalized(images), labels)


def _standard_questions(request: _Request, check_levels: np.ndarray) -> list[Question]:
    """Return questions with random pixels and images for every size, and those of `check.npz`."""
    network, config = request.network, request.config
    levels = check_images(check_levels, request.sides)
    normalized = torch.from_numpy(exported.normalize(levels, request.preprocessing))
    questions = [_question("check", network, normalized)]
    images = [request.transform(image) for image in list(builtin_images().values())[2:8]]
    batches = [torch.stack(images[:1]), torch.stack(images[1:3]), torch.stack(images)[1:]]
    rows, columns = config.patch_shape
    if not (images[0].shape[1] % rows or images[0].shape[2] % columns):
        questions += [_question("images", network, batch) for batch in [*batches, batches[-1].flip(0)]]
    for number, size in enumerate(_sizes_of_proof(request)):
        for batch in (1, 2, 5) if request.size else (1, 3):
            questions.append(Question.ask("random", network, network.random(batch, size, seed=10 * number + batch)))
    return questions


def _sizes_of_proof(request: _Request) -> list[tuple[int, int]]:
    """Return the image sizes of the proof: that of the file, or five for files of any size."""
    if request.size:
        return [request.size]
    (rows, columns), (height, width) = request.config.grid, request.config.patch_shape
    small, large = max(1, min(rows, columns) // 2), max(rows, columns) + 2
    tall, wide = (rows + 2, max(1, columns - 1)), (max(1, rows - 1), columns + 3)
    grids = ((rows, columns), (small, small), (large, large), tall, wide)
    return [(r * height, c * width) for r, c in grids]


# ---- Files -------------------------------------------------------------------------------------------------------


def _write_files(
    request: _Request, staged: Path, work: Path, calibration: dict[str, Any], held_out: list[Question]
) -> list[dict[str, Any]]:
    """Write all files of an export to a folder, prove them, and return their entries."""
    config, network = request.config, request.network
    page = {"page": write_page(staged, request.web_runtime)} if network.for_page else {}
    write_json(staged / "config.json", {k: v for k, v in config.to_dict().items() if k != "_name_or_path"})
    request.processor.save_pretrained(staged)
    shutil.copyfile(exported.__file__, staged / "run.py")
    levels = _check_levels(request)
    questions = [*_standard_questions(request, levels), *held_out]
    for name, values in questions[0].expected.items():
        if not np.isfinite(values).all():
            raise ExportError(f"The output {name} of the model is not finite. Export a checkpoint with valid weights.")
    _write_check(staged / "check.npz", levels, request.sides, questions[0])
    proof = _describe(request, questions[0]) | page
    network.freeze(request.size)
    # For any size, neither side of the sample may equal the other one or the stored one, or they become constants.
    height, width = request.size or tuple((n + k) * p for n, k, p in zip(config.grid, (1, 2), config.patch_shape))
    sample = {network.entry: network.random(2, (height, width), seed=0)}
    samples = calibration.pop("samples", [])
    wrong = network.random(1, (height + (config.patch_shape[0] if request.size else 1), width), seed=0).numpy()
    for format in request.formats:
        engine = FORMATS[format]
        source = work / file_name(engine, "f32")
        convert_to_file(network, sample, engine, source, any_size=request.size is None, opset=request.opset)
        for precision in request.precisions if engine != "torch" else ("f32",):
            path = staged / file_name(engine, precision)
            path.parent.mkdir(exist_ok=True)
            if precision == "f32":
                for part in source.parent.iterdir():
                    shutil.copyfile(part, path.parent / part.name)
            elif precision == "f16":
                halve_weights(engine, source, path)
            else:
                quantize(engine, source, path, samples if precision == "int8" else None)
            entry = _entry(staged, engine, precision)
            entry |= {"calibration": calibration} if precision == "int8" else {}
            proof["files"].append(entry)
            write_json(staged / "proof.json", proof)
            missed = _prove(staged, entry, questions, wrong)
            if missed and precision == "int8":
                entry["block_costs"] = _block_costs(request, work, engine, sample, samples, held_out)
            if missed and precision not in request.accept:
                raise _refusal(entry, missed)
            write_json(staged / "proof.json", proof)
    (staged / "README.md").write_text(card_section(proof), encoding="utf-8")
    return proof["files"]


def _check_levels(request: _Request) -> np.ndarray:
    """Return two images of `check.npz`, thinned out to at most 224 pixels a side."""
    step, images = -(-max(request.sides) // _CHECK_SIDE), list(builtin_images().values())[:2]
    return np.stack([preprocess(image, request.preprocessing)[::step, ::step] for image in images])


def _write_check(path: Path, levels: np.ndarray, size: Sequence[int], question: Question) -> None:
    """Write the images of `check.npz` and evenly spaced values of the outputs of PyTorch."""
    outputs = {name: values.ravel()[:: -(-values.size // _CHECK_VALUES)] for name, values in question.expected.items()}
    np.savez(path, images=levels, size=np.array(size), **outputs)  # type: ignore[arg-type]


def _describe(request: _Request, question: Question) -> dict[str, Any]:
    """Return `proof.json` without files."""
    network, config = request.network, request.config
    sides = list(request.size) if request.size else ["height", "width"]
    shape, dtype = (["batch", *sides, 3], "uint8") if network.takes_bytes else (["batch", 3, *sides], "float32")
    with network.without_register_neurons():
        without = network.ask(torch.from_numpy(question.pixels))
    effect = max(difference(without[name].numpy(), values)[0] for name, values in question.expected.items())
    settings = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    source = {
        "class": type(network.model).__name__, "weights": weights_fingerprint(network.model),
        "config": hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest(),
        "registers": config.num_register_tokens, "register_neurons": len(config.register_neurons or ()),
        "effect_of_register_neurons": effect,
    }  # fmt: skip
    packages = ("hf_regvit", "torch", "transformers", "numpy", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf")
    return {
        "schema": 1, "source": source, "input": {"name": network.entry, "shape": shape, "dtype": dtype},
        "outputs": {name: ["batch", *values.shape[1:]] for name, values in question.expected.items()},
        "size": list(request.size) if request.size else "any", "patch": list(config.patch_shape),
        "preprocessing": request.preprocessing,
        "versions": {name: version(name) for name in packages if is_installed(name)},
        "date": datetime.now(UTC).date().isoformat(), "files": [],
    }  # fmt: skip


def _entry(staged: Path, engine: str, precision: str) -> dict[str, Any]:
    """Return the entry of a file without its proof."""
    path = staged / file_name(engine, precision)
    parts = [path, path.with_suffix(".bin"), path.with_name(f"{path.name}.data")]
    parts = [part for part in parts if part.is_file()]
    return {
        "file": path.relative_to(staged).as_posix(), "engine": engine,
        "engine_version": version(engine), "precision": precision,
        "sha256": {part.relative_to(staged).as_posix(): sha256(part) for part in parts},
        "bytes": {part.relative_to(staged).as_posix(): part.stat().st_size for part in parts},
        "bounds": BOUNDS[precision],
    }  # fmt: skip


def _prove(staged: Path, entry: dict[str, Any], questions: Sequence[Question], wrong: np.ndarray) -> list[str]:
    """Add the comparison with PyTorch to the entry of a file, and return the numbers that miss their bounds."""
    engine, precision = entry["engine"], entry["precision"]
    answers = answers_of(staged, engine, precision, questions, wrong_size=wrong)
    kinds = {"random", "check", "images", "held-out"}
    if precision.startswith("int8"):  # it is made for images like those of its calibration
        kinds = {"held-out"} if questions[-1].kind == "held-out" else {"check", "images"}
    found = compare(*zip(*[pair for pair in zip(questions, answers) if pair[0].kind in kinds]))
    missed = failures(precision, found)
    entry |= found | {"passed": not missed}
    entry["run_check"] = {"max_error": BOUNDS["f32"]["max_error"], "cosine": 0.99999}
    if (engine, precision) == ("openvino", "f32"):
        entry["bf16"] = _in_bf16(staged, questions)
    if precision != "f32":
        same = [difference(answers[0][name], values)[1] for name, values in questions[0].expected.items()]
        entry["run_check"] = {"cosine": min(0.9999, min(same) - 0.02)}
    return missed


def _in_bf16(staged: Path, questions: Sequence[Question]) -> dict[str, Any]:
    """Return the comparison of the f32 file of OpenVINO, computed in bfloat16, or the reason why there is none."""
    try:
        answers = answers_of(staged, "openvino", "bf16", questions, wrong_size=None)
    except ExportError:
        return {"not measured": "OpenVINO cannot compute in bfloat16 on this processor."}
    if not all(np.isfinite(values).all() for outputs in answers for values in outputs.values()):
        return {"not measured": "The outputs in bfloat16 are not finite."}
    found = compare(questions, answers)
    return {"bounds": BOUNDS["bf16"], **found, "passed": not failures("bf16", found)}


def _refusal(entry: Mapping[str, Any], missed: Sequence[str]) -> ExportError:
    advice = "Report this, with the versions of the packages: the file must equal the model."
    if entry["precision"].startswith("int8"):
        more = "Calibrate on more images like those of the use, or take" if entry["precision"] == "int8" else "Take"
        advice = f"{more} --precision f16; --accept {entry['precision']} writes the file all the same."
    if costs := entry.get("block_costs"):
        worst = ", ".join(f"{block} ({100 * cost:.1f} %)" for block, cost in list(costs.items())[:3])
        advice += f" The blocks that add the largest error to the tokens are {worst}."
    return ExportError(f"The proof of {entry['file']} failed: {'; '.join(missed)}. Nothing was written. {advice}")


def _block_costs(
    request: _Request,
    work: Path,
    engine: str,
    sample: dict[str, Tensor],
    samples: Sequence[dict[str, Tensor]],
    held_out: Sequence[Question],
) -> dict[str, float]:
    """Return the error that int8 adds in each block, relative to the tokens and averaged over held-out images.

    The network is converted again with the residual stream after each block as outputs.
    """
    network, files = request.network, [work / f"blocks{kind}{Path(file_name(engine, 'f32')).suffix}" for kind in "ab"]
    network.returns_blocks = True
    try:
        convert_to_file(network, sample, engine, files[0], any_size=False, opset=request.opset)
        quantize(engine, files[0], files[1], samples)
        answers = run_file(engine, files[1], network.entry)
        totals: dict[str, list[float]] = {}
        for question in held_out[:4]:
            found = answers(question.pixels)
            for name, tokens in network.ask(torch.from_numpy(question.pixels)).items():
                wrong = np.linalg.norm(found[name] - tokens.numpy(), axis=-1)
                totals.setdefault(name, []).append(float((wrong / tokens.norm(dim=-1).numpy()).mean()))
    finally:
        network.returns_blocks = False
    means = {name.removeprefix("block_"): float(np.mean(values)) for name, values in totals.items()}
    before = [0.0, *list(means.values())[:-1]]
    costs = {name: value - last for (name, value), last in zip(means.items(), before)}
    return dict(sorted(costs.items(), key=lambda item: -item[1]))


def add_exported(folder: Path, output: Path, model: RegViTPreTrainedModel) -> str:
    """Add the ONNX and OpenVINO files and the page of an export to a folder, and return their description for a card.

    Raises:
        ExportError: A file was changed, none may be published, or the outputs in `check.npz` are not the model's.
    """
    proof = load_proof(folder)
    proof["files"] = [file for file in proof["files"] if file["engine"] != "torch"]
    if not proof["files"]:
        raise ExportError(
            f"'{folder}' has only a file of torch, which can run any code when it is loaded and is never published. "
            "Export the model with --format onnx or openvino."
        )
    parts = {name: digest for file in proof["files"] for name, digest in file["sha256"].items()}
    if "page" in proof:
        write_static_files(output)
        parts |= proof["page"]["sha256"]
    for name, digest in parts.items():
        if not may_be_published(name) or not (folder / name).is_file():
            raise ExportError(f"'{folder}' has no file '{name}' of an export. Export the model again.")
        (output / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, output / name)
        if sha256(output / name) != digest:
            raise ExportError(f"'{folder / name}' is not the file that was proved. Export the model again.")
    shutil.copyfile(folder / "check.npz", output / "check.npz")
    shutil.copyfile(exported.__file__, output / "run.py")
    write_json(output / "proof.json", proof)
    with np.load(output / "check.npz") as stored:
        expected = dict(stored)
    levels = check_images(expected.pop("images"), expected.pop("size").tolist())
    pixels = torch.from_numpy(exported.normalize(levels, proof["preprocessing"]))
    task = {"RegViTModel": "features", "RegViTBackbone": "backbone"}.get(proof["source"]["class"])
    network = NamedOutputs(network_for_task(model, task), None, for_page="norms" in expected)
    outputs = {name: values.numpy().ravel() for name, values in network.ask(pixels).items()}
    if set(outputs) != set(expected) or any(
        not difference(outputs[name][:: -(-outputs[name].size // len(values))], values)[0] <= 1e-3
        for name, values in expected.items()
    ):
        raise ExportError(f"'{folder}' was exported from another model. Export this one, and name its folder.")
    return card_section(proof)


def card_section(proof: Mapping[str, Any]) -> str:
    """Return the description of an export in Markdown."""
    given, size = proof["input"], proof["size"]
    outputs = ", ".join(f"`{name}` {_shown(shape)}" for name, shape in proof["outputs"].items())
    rows = [
        f"| `{one['file']}` | {one['engine']} {one['engine_version']} | {one['precision']} | {describe_file(one)} |"
        for one in proof["files"]
    ]
    shown = size if size == "any" else " x ".join(map(str, size))
    return f"""## Exported files

Input `{given["name"]}` {_shown(given["shape"])} of {given["dtype"]}; the size of the images is {shown}.
Outputs: {outputs}.

| file | engine | precision | compared with PyTorch |
|---|---|---|---|
{chr(10).join(rows)}

`python run.py image.jpg` runs a file with NumPy, Pillow and its engine. `python run.py --check` compares the outputs
on your machine with those of PyTorch. `proof.json` has all numbers and the preprocessing.
{_PAGE if "page" in proof else ""}"""


def _shown(shape: Sequence[Any]) -> str:
    return f"({', '.join(map(str, shape))})"
