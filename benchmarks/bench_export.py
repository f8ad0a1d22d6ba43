"""Compare the speed of exported files with PyTorch, transformers, timm and plain exports of those, in one run.

    python benchmarks/bench_export.py --output_dir runs/bench_export             # all cases (an hour or more)
    python benchmarks/bench_export.py --models small --sizes 224 --batches 1 --seconds 5 --output_dir runs/short

All systems compute the tokens of DINOv2 with registers with the same random weights. They run in turn, A B C A B C,
so that drifting machine speed affects them equally. Prints medians in milliseconds; the medians over the rounds of the
time of transformers in float32 divided by that of the system (above 1: faster); and the seconds and the peak memory
that a new process needs to load the system and run it once (memory under Linux only). int8 is calibrated on tiles of
the built-in images, which suffice for its speed; its accuracy is measured by int8_evidence.py. The plain exports
of the peers are for one image. `--threads` sets the threads of all systems. Files of an earlier run in the same
`--output_dir` are timed again instead of being exported.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench_inference import build, cpu_name, timm_peer, transformers_peer
from hf_regvit import RegViTConfig, RegViTModel, export, load_exported
from hf_regvit.hub.export_programs import quiet
from hf_regvit.hub.exported import available_threads, run_file
from hf_regvit.models.processing import default_image_processor
from hf_regvit.models.saving import whole_folder, write_json

Run = Callable[[np.ndarray], Any]

EAGER = tuple(f"{name} {dtype}" for dtype in ("f32", "bf16") for name in ("transformers", "regvit", "timm"))
OURS = ("openvino f32", "openvino bf16", "openvino int8", "onnxruntime f32", "onnxruntime int8")
PLAIN = tuple(f"{peer} by {engine}" for peer in ("transformers", "timm") for engine in ("onnxruntime", "openvino"))
REFERENCE = "transformers f32"


class Tokens(torch.nn.Module):
    """Peer that returns only its tokens, as one exports it by hand."""

    def __init__(self, peer: Any, method: str) -> None:
        super().__init__()
        self.peer, self.method = peer, method

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        output = getattr(self.peer, self.method)(pixel_values)
        return getattr(output, "last_hidden_state", output)


def reference_model(size: str) -> RegViTModel:
    """Return the RegViT whose weights all systems have."""
    torch.manual_seed(0)
    config = RegViTConfig.from_preset(size, layerscale_value=1.0, patch_size=14, image_size=518)
    return RegViTModel(config).eval()


def write_exports(folder: Path, size: str, pixels: int, systems: list[str]) -> None:
    """Write our export, and the plain exports of the peers, which are needed by the systems."""
    if ours := [system for system in systems if system in OURS]:
        model = reference_model(size)
        model.image_processor = default_image_processor(pixels)
        kinds = ["f32", *(["int8"] if any("int8" in system for system in ours) else [])]
        formats = sorted({"onnx" if system.startswith("onnx") else "openvino" for system in ours})
        report = export(
            model, folder / "ours", format=formats, size=pixels, precision=kinds, accept=["int8"],
            data="builtin:photos" if "int8" in kinds else None, num_calibration=32,
        )  # fmt: skip
        print(f"{size} {pixels}: our export took {report.seconds:.0f} s")
    for peer, make, method in (
        ("transformers", transformers_peer, "forward"),
        ("timm", timm_peer, "forward_features"),
    ):
        engines = [engine for engine in ("onnxruntime", "openvino") if f"{peer} by {engine}" in systems]
        if not engines:
            continue
        module = Tokens(make(reference_model(size), size, "dinov2"), method).eval()
        sample = torch.randn(1, 3, pixels, pixels)
        path = folder / f"{peer}.onnx"
        with quiet(), torch.no_grad():
            program = torch.onnx.export(module, (sample,), dynamo=True, input_names=["pixel_values"])
            program.save(path)
        if "openvino" in engines:
            import openvino

            openvino.save_model(openvino.convert_model(path), folder / f"{peer}.xml", compress_to_fp16=False)


def load(system: str, folder: Path, size: str, threads: int) -> Run:
    """Return a system as a function of normalized pixels."""
    name, _, kind = system.partition(" ")
    if system in EAGER:
        dtype = torch.float32 if kind == "f32" else torch.bfloat16
        model = build(name, size, dtype, "cpu", "dinov2")

        def run(pixels: np.ndarray) -> Any:
            with torch.inference_mode():
                return model(torch.from_numpy(pixels).to(dtype))

        return run
    if system in OURS:
        return load_exported(folder / "ours", engine=name, precision=kind, threads=threads)
    engine = kind.removeprefix("by ")
    path = folder / f"{name}.{'xml' if engine == 'openvino' else 'onnx'}"
    return run_file(engine, path, "pixel_values", threads=threads)


def measure_process(args: argparse.Namespace, system: str, folder: Path, size: str, pixels: int) -> dict[str, float]:
    """Return the seconds to load a system and the peak memory, of a new process."""
    words = [system, str(folder), size, str(pixels), str(args.threads)]
    done = subprocess.run(
        [sys.executable, __file__, "--child", *words], capture_output=True, text=True, check=True, env=os.environ
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def peak_kib() -> int:
    """Return the peak memory of this process under Linux; that of `resource` begins with the parent's."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def child(system: str, folder: str, size: str, pixels: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    before, start = peak_kib(), time.perf_counter()
    run = load(system, Path(folder), size, int(threads))
    loaded = time.perf_counter() - start
    run(np.zeros((1, 3, int(pixels), int(pixels)), np.float32))
    print(json.dumps({"load_seconds": round(loaded, 2), "peak_mib": round((peak_kib() - before) / 1024)}))


def time_case(
    args: argparse.Namespace, systems: list[str], folder: Path, size: str, pixels: int, batch: int
) -> dict[str, Any]:
    """Time all systems in turn on one case."""
    images = np.random.default_rng(0).normal(size=(batch, 3, pixels, pixels)).astype(np.float32)
    systems = [system for system in systems if batch == 1 or " by " not in system]
    runs = {system: load(system, folder, size, args.threads) for system in systems}
    for run in runs.values():
        run(images)
    times: dict[str, list[float]] = {system: [] for system in runs}
    end = time.perf_counter() + args.seconds * len(runs)
    while time.perf_counter() < end or len(times[REFERENCE]) < 3:
        for system, run in runs.items():
            start = time.perf_counter()
            run(images)
            times[system].append(time.perf_counter() - start)
    rows = {}
    for system, seconds in times.items():
        ratios = [base / own for base, own in zip(times[REFERENCE], seconds)]
        rows[system] = {
            "milliseconds": round(1000 * statistics.median(seconds), 2),
            "ratio": round(statistics.median(ratios), 3),
            "rounds": len(seconds),
        }
        print(f"{size:6} {pixels} batch {batch}  {system:30} {rows[system]['milliseconds']:9.1f} ms  "
              f"{rows[system]['ratio']:.2f}", flush=True)  # fmt: skip
    runs.clear()
    gc.collect()
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["small", "base"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 518])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument(
        "--systems", nargs="+", default=[*EAGER, *OURS, *PLAIN], help="systems besides transformers f32"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="time per system and case")
    parser.add_argument("--threads", type=int, default=available_threads())
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    systems = list(dict.fromkeys([REFERENCE, *args.systems]))
    packages = ("torch", "transformers", "timm", "onnx", "onnxruntime", "openvino", "nncf")
    result: dict[str, Any] = {
        "processor": cpu_name(), "threads": args.threads, "python": platform.python_version(),
        "versions": {name: version(name) for name in packages}, "cases": [],
    }  # fmt: skip
    print(f"{result['processor']}, {args.threads} threads, {result['versions']}")
    for size in args.models:
        for pixels in args.sizes:
            folder = args.output_dir / f"{size}_{pixels}"
            if not any(folder.glob("[!.]*")):
                with whole_folder(folder) as staged:
                    write_exports(staged, size, pixels, systems)
            processes = {system: measure_process(args, system, folder, size, pixels) for system in systems}
            for system, numbers in processes.items():
                print(f"{size:6} {pixels}  {system:30} load {numbers['load_seconds']} s, {numbers['peak_mib']} MiB")
            for batch in args.batches:
                rows = time_case(args, systems, folder, size, pixels, batch)
                result["cases"].append({"model": size, "size": pixels, "batch": batch, "systems": rows})
                result["cases"][-1]["processes"] = processes
                write_json(args.output_dir / "report.json", result)


if __name__ == "__main__":
    main()
