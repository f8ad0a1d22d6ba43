"""Run a model that `regvit export` wrote, with NumPy, Pillow and one inference engine, without torch and hf_regvit.

`regvit export` copies this file to its folder as `run.py`. In that folder:

    python run.py image.jpg    prints the classes or the shapes of the outputs
    python run.py --check      compares the outputs of this machine with those of PyTorch

From Python: `from run import load_exported`, then `load_exported(".")("image.jpg")`. Images are resized and cropped as
`preprocessing` in `proof.json` says.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from openvino import InferRequest
    from PIL.Image import Image

Arrays = dict[str, np.ndarray]
Run = Callable[[np.ndarray], Arrays]

ENGINES = ("openvino", "onnxruntime", "torch")  # also the names of their modules and packages


class ExportError(ValueError):
    """An export that cannot be made, or an exported file that cannot be used; the message says what to do."""


class ExportedModel:
    """Exported model in an engine; a call returns its named outputs.

    Attributes:
        proof: Content of `proof.json`.
        file: Entry of the loaded file in the proof.
        engine: Name of the engine.
        size: Height and width of the images in pixels, or "any".
    """

    def __init__(self, folder: Path, proof: dict[str, Any], file: dict[str, Any], run: Run, *, resize: bool) -> None:
        self.folder, self.proof, self.file, self._run, self._resize = folder, proof, file, run, resize
        self.engine: str = file["engine"]
        self.size = proof["size"]

    def __repr__(self) -> str:
        return f"ExportedModel('{self.folder.name}/{self.file['file']}', {', '.join(self.proof['outputs'])})"

    def __call__(self, images: "np.ndarray | str | Path | Image | Sequence[str | Path | Image]") -> Arrays:
        """Run the model.

        Args:
            images: An array as `input` in the proof says: normalized pixels (batch, 3, height, width) as float32, or
                pixels (batch, height, width, 3) as uint8. Otherwise an image or a sequence of images, as paths or
                Pillow images.

        Raises:
            ExportError: The array has another type or a size without a proof, or an image cannot be read.
            ImportError: An image is given, or an array has to be resized, and Pillow is not installed.
        """
        if isinstance(images, np.ndarray):
            return self._run(self._checked(images))
        return self._run(self.pixels(images))

    def pixels(self, images: "str | Path | Image | Sequence[str | Path | Image]") -> np.ndarray:
        """Return the input of the model for an image or a sequence of images, as paths or Pillow images."""
        if isinstance(images, str | Path) or not isinstance(images, Sequence):
            images = [images]
        levels = np.stack([preprocess(image, self.proof["preprocessing"]) for image in images])  # (B, H, W, 3)
        return levels if self.proof["input"]["dtype"] == "uint8" else normalize(levels, self.proof["preprocessing"])

    def _checked(self, array: np.ndarray) -> np.ndarray:
        is_bytes = self.proof["input"]["dtype"] == "uint8"
        layout = "(batch, height, width, 3)" if is_bytes else "(batch, 3, height, width)"
        if array.ndim != 4 or array.shape[3 if is_bytes else 1] != 3:
            raise ExportError(f"The input has shape {array.shape}, expected {layout}.")
        if is_bytes != (array.dtype == np.uint8):
            kind = "pixels as uint8" if is_bytes else "normalized pixels as float32"
            raise ExportError(f"The input holds {array.dtype}, expected {kind}. Pass images, or call `pixels` first.")
        (height, width), patch = array.shape[1:3] if is_bytes else array.shape[2:4], self.proof["patch"]
        nearest = [max(1, round(side / p)) * p for side, p in zip((height, width), patch)]
        wanted = nearest if self.size == "any" else self.size
        if [height, width] != wanted and self._resize:
            array = np.stack([resized(image, wanted, channels_first=not is_bytes) for image in array])
        elif [height, width] != wanted and self.size == "any":
            raise ExportError(
                f"The image size of {height} x {width} pixels is not a multiple of the patch size of {patch[0]} x "
                f"{patch[1]}. Resize or crop the image to {nearest[0]} x {nearest[1]}, or load the file with "
                "resize=True."
            )
        elif [height, width] != wanted:
            raise ExportError(
                f"The image size of {height} x {width} pixels is not that of this file, {wanted[0]} x {wanted[1]}. "
                "Resize the images, load the file with resize=True, or export a file of that size."
            )
        return np.ascontiguousarray(array if is_bytes else array.astype(np.float32, copy=False))


def load_exported(
    folder: str | Path,
    *,
    engine: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    verify: bool = True,
    resize: bool = False,
) -> ExportedModel:
    """Load a model that `regvit export` wrote. Only NumPy, Pillow for images, and the engine are needed.

    Args:
        folder: Folder of the export.
        engine: "openvino", "onnxruntime" or "torch", whose files can run any code, so trust their author. Default:
            the first of openvino and onnxruntime that is installed and has a file.
        precision: "f32", "f16", "int8" or "int8-weights", as exported; all of them compute the rest in float32.
            "bf16" computes the f32 file of OpenVINO in bfloat16, see `bf16` in its entry of the proof. Default: f32,
            or the first precision in the folder.
        threads: Number of threads. Default: the processors that this process may use.
        verify: Whether to compare the checksum of the file with the proof.
        resize: Whether to resize arrays of another size instead of refusing them.

    Raises:
        ExportError: The folder has no such file, the file differs from the one that was proved, or the processor
            cannot compute in bfloat16.
        ImportError: The engine is not installed.
    """
    folder = Path(folder)
    proof = load_proof(folder)
    file = _choose(folder, proof["files"], engine, precision)
    if verify:
        for name, digest in file["sha256"].items():
            if not (folder / name).is_file() or sha256(folder / name) != digest:
                raise ExportError(
                    f"'{folder / name}' is not the file that was proved: it is missing or its checksum differs. "
                    "Download or export it again."
                )
    hint = "bf16" if precision == "bf16" else "f32"
    run = run_file(file["engine"], folder / file["file"], proof["input"]["name"], threads=threads, hint=hint)
    return ExportedModel(folder, proof, file, run, resize=resize)


def load_proof(folder: Path) -> dict[str, Any]:
    """Return the content of `proof.json`."""
    if not (folder / "proof.json").is_file():
        raise ExportError(f"'{folder}' has no proof.json. Pass a folder that `regvit export` wrote.")
    proof: dict[str, Any] = json.loads((folder / "proof.json").read_text(encoding="utf-8"))
    if proof.get("schema") != 1:
        raise ExportError(f"'{folder}/proof.json' has schema {proof.get('schema')}, expected 1. Export it again.")
    return proof


def _choose(folder: Path, files: list[dict[str, Any]], engine: str | None, precision: str | None) -> dict[str, Any]:
    """Return the entry of the file with this engine and precision."""
    found = {(one["engine"], one["precision"]): one for one in files}
    listed = ", ".join(f"{name} {kind}" for name, kind in found)
    # A file of torch is a pickle, which can run any code, so it is never loaded without being asked for.
    allowed = [engine] if engine else [name for name in ENGINES if name != "torch"]
    engines = [name for name in allowed if name in {one["engine"] for one in files}]
    if not engines:
        raise ExportError(f"'{folder}' has no file for engine={engine!r}. It has {listed}.")
    chosen = next((name for name in engines if is_installed(name)), None)
    if chosen is None:
        raise ImportError(f"The engine {engines[0]} is not installed. Run: pip install {engines[0]}")
    kinds = [kind for name, kind in found if name == chosen]
    kind = precision or ("f32" if "f32" in kinds else kinds[0])
    if kind == "bf16" and chosen == "openvino":
        kind = "f32"
    if kind not in kinds:
        raise ExportError(f"'{folder}' has no file with precision={kind!r} for {chosen}. It has {listed}.")
    return found[chosen, kind]


def run_file(engine: str, path: Path, entry: str, *, threads: int | None = None, hint: str = "f32") -> Run:
    """Return the function of a file from its input, called `entry`, to its outputs."""
    start = {"openvino": _openvino, "onnxruntime": _onnxruntime, "torch": _torch}[engine]
    return start(str(path), threads or available_threads(), hint, entry)


def is_installed(module: str) -> bool:
    """Return True for a module that can be imported; a folder such as `openvino` beside `run.py` is none."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def available_threads() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sha256(path: Path) -> str:
    """Return the checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- Engines -----------------------------------------------------------------------------------------------------


def _openvino(path: str, threads: int, hint: str, entry: str) -> Run:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # sends nothing to its makers
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    if (computed := compiled.get_property("INFERENCE_PRECISION_HINT").to_string()) != hint:
        raise ExportError(f"On this processor, OpenVINO computes in {computed}, not in {hint}. Use precision='f32'.")
    return partial(_infer, compiled.create_infer_request())


def _infer(request: "InferRequest", pixels: np.ndarray) -> Arrays:
    request.infer([pixels], share_inputs=True)
    return {output.any_name: request.get_tensor(output).data.copy() for output in request.model_outputs}


def _onnxruntime(path: str, threads: int, hint: str, entry: str) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads  # by default, the pool has a thread for every core of the machine
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda pixels: dict(zip(names, session.run(names, {entry: pixels})))


def _torch(path: str, threads: int, hint: str, entry: str) -> Run:
    import torch

    module = torch.export.load(path).module()

    def run(pixels: np.ndarray) -> Arrays:
        with torch.inference_mode():
            return {name: value.numpy() for name, value in module(**{entry: torch.tensor(pixels)}).items()}

    return run


# ---- Images ------------------------------------------------------------------------------------------------------


def require_pillow() -> None:
    """Raise ImportError if Pillow is not installed, which reads and resizes images."""
    if not is_installed("PIL"):
        raise ImportError("Images are read and resized with Pillow, which is not installed. Run: pip install pillow")


def preprocess(image: "str | Path | Image", settings: dict[str, Any]) -> np.ndarray:
    """Return an image, a path or a Pillow image, as pixels (height, width, 3) in uint8, resized and cropped."""
    require_pillow()
    from PIL import Image, ImageOps

    try:
        opened = Image.open(image) if isinstance(image, str | Path) else image
        opened = ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # Pillow raises a dozen types for a damaged file
        raise ExportError(f"{image!s} cannot be read as an image: {error}. Use another one.") from error
    if resize := settings["resize"]:
        width, height = opened.size
        if edge := resize.get("shortest_edge"):
            scale = edge / min(width, height)
            width, height = (edge if side == min(width, height) else int(scale * side) for side in (width, height))
        else:
            height, width = resize["height"], resize["width"]
        opened = opened.resize((width, height), Image.Resampling(resize["resample"]))
    pixels = np.asarray(opened)
    if crop := settings["crop"]:
        top, left = (max(0, (side - kept) // 2) for side, kept in zip(pixels.shape, crop))
        pixels = pixels[top : top + crop[0], left : left + crop[1]]
    return pixels


def normalize(levels: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """Return pixels (batch, height, width, 3) in uint8 as normalized pixels (batch, 3, height, width) in float32."""
    values = levels.astype(np.float32) * np.float32(settings["scale"])
    values = (values - np.float32(settings["mean"])) / np.float32(settings["std"])
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2))


def resized(image: np.ndarray, size: Sequence[int], *, channels_first: bool) -> np.ndarray:
    """Return an array of one image at another size, (height, width), with bicubic resampling."""
    require_pillow()
    from PIL import Image

    channels = image if channels_first else image.transpose(2, 0, 1)
    scaled = [np.asarray(Image.fromarray(c).resize((size[1], size[0]), Image.Resampling.BICUBIC)) for c in channels]
    return np.stack(scaled, axis=0 if channels_first else 2)


# ---- Check -------------------------------------------------------------------------------------------------------


def difference(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Return the largest error and the cosine of two arrays; NaN counts as infinite and as -1."""
    first, second = (np.asarray(one, dtype=np.float64).ravel() for one in (found, expected))
    if not np.isfinite(first).all():
        return float("inf"), -1.0
    lengths = np.linalg.norm(first) * np.linalg.norm(second)
    return float(np.abs(first - second).max(initial=0.0)), float(first @ second / lengths) if lengths else 1.0


def check_images(stored: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Return the images of `check.npz`, (2, h, w, 3), enlarged to (2, height, width, 3) by repeating pixels."""
    rows, columns = (np.arange(side) * own // side for side, own in zip(size, stored.shape[1:3]))
    return stored[:, rows][:, :, columns]


def check(folder: str | Path, *, engine: str | None = None) -> list[tuple[str, str, float, float, bool]]:
    """Compare the outputs of every file of an installed engine with those of PyTorch in `check.npz`.

    Returns:
        Name of the file, name of the output, largest error, cosine, and True if the bounds of `run_check` hold.
    """
    rows = []
    with np.load(Path(folder, "check.npz")) as stored:
        content = dict(stored)
    images, size = content.pop("images"), content.pop("size").tolist()
    proof = load_proof(Path(folder))
    for file in proof["files"]:
        if engine not in (None, file["engine"]) or not is_installed(file["engine"]):
            continue
        model = load_exported(folder, engine=file["engine"], precision=file["precision"])
        levels = check_images(images, size)
        outputs = model(levels if proof["input"]["dtype"] == "uint8" else normalize(levels, proof["preprocessing"]))
        for name, expected in content.items():
            found = outputs[name].ravel()
            error, cosine = difference(found[:: -(-found.size // expected.size)], expected)
            limit = file["run_check"].get("max_error")
            exact = limit is None or error <= limit * max(1.0, float(np.abs(expected).max(initial=0.0)))
            rows.append((file["file"], name, error, cosine, exact and cosine >= file["run_check"]["cosine"]))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line of `run.py`."""
    parser = argparse.ArgumentParser(description="Run or check the exported model of this folder.")
    parser.add_argument("images", nargs="*", help="Image files.")
    parser.add_argument("--check", action="store_true", help="Compare the outputs with those of PyTorch.")
    parser.add_argument("--engine", choices=ENGINES, help="Inference engine. Default: the first one installed.")
    parser.add_argument("--precision", help="Precision of the file, or bf16.")
    given, folder = parser.parse_args(arguments), Path(__file__).resolve().parent
    if not given.check and not given.images:
        parser.error("name an image, or add --check")
    try:
        return _print_check(folder, given.engine) if given.check else _print_outputs(folder, given)
    except (ExportError, ImportError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def _print_check(folder: Path, engine: str | None) -> int:
    rows = check(folder, engine=engine)
    for file, name, error, cosine, passed in rows:
        verdict = "ok" if passed else "FAILED"
        sys.stdout.write(f"{file}  {name}: largest error {error:.2g}, cosine {cosine:.6f}, {verdict}\n")
    if not rows:
        _choose(folder, load_proof(folder)["files"], engine, None)  # raises with the reason
    return 0 if rows and all(row[-1] for row in rows) else 1


def _print_outputs(folder: Path, given: argparse.Namespace) -> int:
    model = load_exported(folder, engine=given.engine, precision=given.precision)
    labels = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("id2label", {})
    for image in given.images:
        outputs = model(image)
        if "logits" in outputs and outputs["logits"].ndim == 2:
            scores = np.exp(outputs["logits"][0] - outputs["logits"][0].max())
            for index in np.argsort(-scores)[:5]:
                share = 100 * scores[index] / scores.sum()
                sys.stdout.write(f"{image}: {labels.get(str(index), index)} {share:.1f} %\n")
        else:
            shapes = ", ".join(f"{name} {value.shape}" for name, value in outputs.items())
            sys.stdout.write(f"{image}: {shapes}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
