"""Measure what artifacts do to int8: a real classifier with and without test-time registers, in several kinds of int8.

    python benchmarks/int8_evidence.py --model ../shared/data/vit_tiny_patch16_224 \
        --calibration ../shared/data/caltech101 --samples ../shared/data/imagenet_samples --output_dir runs/int8

Every kind is made from the same float32 ONNX file and run by ONNX Runtime, but `openvino` by OpenVINO: NNCF's preset
for transformers with SmoothQuant (what `regvit export` writes), the same without SmoothQuant, min-max per tensor and
dynamic int8 of ONNX Runtime, and int8 weights. Prints top-1 with its change against float32 (95 % interval of the
paired difference from 2,000 resamples), the share of equal classes, and cosines of the patches: mean, 1st percentile
and minimum over all patches of all images, and the mean over images of their worst patch.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_regvit import load_images, open_model
from hf_regvit.diagnosis.retrofit import retrofit
from hf_regvit.evaluation.intervals import paired_difference
from hf_regvit.hub.export_network import NamedOutputs
from hf_regvit.hub.export_programs import convert_to_file, quantize, quiet
from hf_regvit.hub.export_proof import cosines
from hf_regvit.hub.exported import run_file
from hf_regvit.models.conversion import convert
from hf_regvit.models.saving import write_json

KINDS = ("nncf", "openvino", "nncf without SmoothQuant", "min-max per tensor", "dynamic", "int8 weights")


def make(kind: str, network: NamedOutputs, folder: Path, samples: list[dict[str, torch.Tensor]]) -> Any:
    """Return the function of a file of this kind."""
    engine = "openvino" if kind == "openvino" else "onnxruntime"
    suffix = ".xml" if engine == "openvino" else ".onnx"
    source, path = folder / f"float32{suffix}", folder / f"{kind.replace(' ', '_')}{suffix}"
    if not source.is_file():
        sample = {"pixel_values": torch.cat([entry["pixel_values"] for entry in samples[:2]])}
        with quiet():
            convert_to_file(network, sample, engine, source, any_size=False, opset=20)
    if kind == "float32":
        return run_file(engine, source, "pixel_values")
    with quiet():
        if kind in ("min-max per tensor", "dynamic"):
            onnxruntime_int8(kind, source, path, samples)
        else:
            used = None if kind == "int8 weights" else samples
            quantize(engine, source, path, used, smooth=kind != "nncf without SmoothQuant")
    return run_file(engine, path, "pixel_values")


def onnxruntime_int8(kind: str, source: Path, path: Path, samples: list[dict[str, torch.Tensor]]) -> None:
    """Quantize with the tools of ONNX Runtime, which `regvit export` does not offer."""
    from onnxruntime import quantization

    if kind == "dynamic":
        quantization.quantize_dynamic(source, path, per_channel=True)
        return

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([{name: tensor.numpy() for name, tensor in entry.items()} for entry in samples[:32]])

        def get_next(self) -> Any:
            return next(self.left, None)

    quantization.quantize_static(source, path, Reader(), calibrate_method=quantization.CalibrationMethod.MinMax)


def measure(run: Any, pixels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the classes (n,) and the patches (n, N, D) of all images."""
    classes, patches = [], []
    for batch in pixels.split(10):
        outputs = run(batch.numpy())
        classes.append(outputs["logits"].argmax(1))
        patches.append(outputs["patches"])
    return np.concatenate(classes), np.concatenate(patches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True, help="images for calibration and for the choice of neurons")
    parser.add_argument("--samples", required=True, help="labeled images for the measurement")
    parser.add_argument("--num_calibration", type=int, default=300)
    parser.add_argument("--num_search", type=int, default=500, help="images for the choice of register neurons")
    parser.add_argument("--num_samples", type=int, default=500)
    parser.add_argument("--registers", nargs="+", type=int, default=[0, 4])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    model = convert(args.model, verify=False).eval()
    reader = open_model(model)
    source = load_images(args.calibration, split="train")
    order = np.random.default_rng(0).permutation(len(source))[: args.num_calibration]
    calibration = [reader.transform(source[int(i)].image) for i in order]
    samples = [{"pixel_values": image[None]} for image in calibration]
    tested = load_images(args.samples, split=None)
    tested = tested.subset(range(min(args.num_samples, len(tested))))
    pixels = torch.stack([reader.transform(record.image) for record in tested])
    labels = np.asarray(tested.labels)
    rows = []
    for registers in args.registers:
        changed = model
        if registers:
            changed = retrofit(model, source, num_register_tokens=registers, max_images=args.num_search).model
        folder = args.output_dir / f"registers_{registers}"
        folder.mkdir(parents=True, exist_ok=True)
        network = NamedOutputs(changed, None)
        network.freeze(tuple(pixels.shape[-2:]))
        reference, patches = measure(make("float32", network, folder, samples), pixels)
        before = (reference == labels).astype(float)[:, None]
        for kind in ("float32", *args.kinds):
            started = time.perf_counter()
            run = make(kind, network, folder, samples)
            made = time.perf_counter() - started
            classes, tokens = measure(run, pixels)
            after = (classes == labels).astype(float)[:, None]
            change, (low, high) = paired_difference(before, after, seed=0)
            values = cosines("patches", tokens, patches).reshape(tokens.shape[:2])
            row = {
                "registers": registers, "kind": kind, "top1": 100 * float(after.mean()), "change": 100 * change,
                "interval": [100 * low, 100 * high], "agreement": 100 * float((classes == reference).mean()),
                "patch_cosine": float(values.mean()), "patch_p1": float(np.quantile(values, 0.01)),
                "patch_min": float(values.min()), "worst_patch": float(values.min(axis=1).mean()),
                "seconds": round(made, 1),
            }  # fmt: skip
            rows.append(row)
            interval = f"{row['change']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
            numbers = [f"{row[name]:.3f}" for name in ("patch_cosine", "patch_p1", "patch_min", "worst_patch")]
            cells = [str(registers), kind, f"{row['top1']:.1f}", interval, f"{row['agreement']:.1f}", *numbers]
            print(f"| {' | '.join(cells)} |", flush=True)
            write_json(
                args.output_dir / "report.json", {"rows": rows, "images": len(labels), "calibration": len(samples)}
            )


if __name__ == "__main__":
    main()
