"""Convert a model to the programs of ONNX Runtime, OpenVINO and torch, and change the precision of their weights.

The exporters of transformers convert and NNCF quantizes; this module decides what they are asked for and how the
results are saved. Every other precision is derived from the saved float32 file.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..models.foreign_weights import quiet_transformers
from .exported import ExportError

if TYPE_CHECKING:
    import openvino

FILES = {"onnxruntime": "onnx/model.onnx", "openvino": "openvino/openvino_model.xml", "torch": "torch/model.pt2"}
SMOOTH_QUANT_ALPHA = 0.95  # default of NNCF 3.4; stated, because its authors consider another one (nncf pull 1945)
_ONE_FILE = 1_500_000_000  # bytes of weights; protobuf ends at 2 GB


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress of the converters off stdout, their warnings off stderr, and their telemetry off."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # both fall back to a stub
    names = ("torch.onnx", "onnxscript", "onnx_ir", "nncf", "torch.utils.cpp_extension")
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with redirect_stdout(StringIO()), quiet_transformers(logging.ERROR):
            yield
    finally:
        for logger, level in zip(loggers, before):
            logger.setLevel(level)


def file_name(engine: str, precision: str) -> str:
    """Return the file of an engine and a precision in the folder of an export."""
    path = Path(FILES[engine])
    suffix = "" if precision == "f32" else f"_{precision.replace('-', '_')}"
    return path.with_name(f"{path.stem}{suffix}{path.suffix}").as_posix()


def convert_to_file(
    network: Any, sample: dict[str, torch.Tensor], engine: str, path: Path, *, any_size: bool, opset: int
) -> None:
    """Trace a network with named outputs for any number of images, and save it in float32.

    Args:
        network: `NamedOutputs` that takes the tensor in `sample`.
        sample: Name and example of the input, at least two images.
        engine: Engine of the file.
        path: File to write.
        any_size: True if height and width are free, too.
        opset: Opset of an ONNX file.
    """
    from transformers.exporters import DynamoConfig, OnnxConfig, OpenVINOConfig
    from transformers.exporters.exporter_dynamo import DynamoExporter
    from transformers.exporters.exporter_onnx import OnnxExporter
    from transformers.exporters.exporter_openvino import OpenVINOExporter

    [(name, example)] = sample.items()
    sides = (1, 2) if example.dtype == torch.uint8 else (2, 3)
    free = (0, *sides) if any_size else (0,)
    shapes = {name: dict.fromkeys(free, torch.export.Dim.AUTO)}
    path.parent.mkdir(parents=True, exist_ok=True)
    if engine == "torch":
        program = DynamoExporter().export_program(network, sample, DynamoConfig(dynamic_shapes=shapes))[0]
        for module in program.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                node.meta.pop("stack_trace", None)  # it has the paths of source files on this machine
        buffer = BytesIO()  # torch ends the process if it cannot write to a disk
        torch.export.save(program, buffer)
        path.write_bytes(buffer.getbuffer())
    elif engine == "onnxruntime":
        config = OnnxConfig(dynamic_shapes=shapes, opset_version=opset)
        with network.for_onnxruntime():
            model = OnnxExporter().export_program(network, sample, config)[0]
        if (written := model.opset_imports[""]) != opset:
            raise ExportError(f"opset={opset} is not one that can be written; the converter chose {written}. Use it.")
        _save_onnx(model, path)
    else:
        model = OpenVINOExporter().export_program(network, sample, OpenVINOConfig(dynamic_shapes=shapes))[0]
        if not any_size:  # the program declares free sides, but has the shapes of the sample inside
            model.reshape([-1, *example.shape[1:]])
        _save_openvino(model, path)


def _save_openvino(model: "openvino.Model", path: Path, *, half: bool = False) -> None:
    import openvino

    try:
        openvino.save_model(model, str(path), compress_to_fp16=half)
    except RuntimeError:
        path.write_bytes(bytes(2**20))  # says that the disk is full, which OpenVINO does not, if that is the reason
        raise


def _save_onnx(model: Any, path: Path) -> None:
    import onnx_ir

    for graph in model.graphs():  # the converter notes the paths of source files on this machine
        for part in (*graph, *graph.inputs, *graph.outputs, *graph.initializers.values()):
            part.metadata_props.clear()
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    onnx_ir.save(model, str(path), external_data=f"{path.name}.data" if size > _ONE_FILE else None)


# ---- Precision ---------------------------------------------------------------------------------------------------


def halve_weights(engine: str, source: Path, path: Path) -> None:
    """Save a float32 file again with its weights in float16; the computation stays in float32."""
    if engine == "openvino":
        import openvino

        _save_openvino(openvino.Core().read_model(str(source)), path, half=True)
        return
    import onnx_ir

    model: Any = onnx_ir.load(str(source))
    for value in list(model.graph.initializers.values()):
        if value.const_value.dtype != onnx_ir.DataType.FLOAT or value.const_value.size < 1024:
            continue
        half = onnx_ir.tensor(value.const_value.numpy().astype(np.float16), name=f"{value.name}_f16")
        stored = onnx_ir.Value(
            name=half.name, shape=value.shape, type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT16), const_value=half
        )
        cast = onnx_ir.node("Cast", [stored], attributes={"to": onnx_ir.DataType.FLOAT})
        onnx_ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        model.graph.initializers.pop(value.name)
        model.graph.register_initializer(stored)
        model.graph.insert_before(model.graph[0], cast)
    _save_onnx(model, path)


def quantize(
    engine: str, source: Path, path: Path, samples: Sequence[dict[str, torch.Tensor]] | None, *, smooth: bool = True
) -> None:
    """Save a float32 file again in int8: weights and activations, or without `samples` the weights only.

    Args:
        engine: Engine of the file.
        source: Float32 file.
        path: File to write.
        samples: Inputs for the calibration, one image each.
        smooth: Use of SmoothQuant, which moves outliers of activations into weights; False is for comparisons.
    """
    import nncf
    from transformers.exporters.configs import ExportFormat
    from transformers.exporters.quantizers import (
        NNCFOnnxQuantizer,
        NNCFOpenVINOQuantizer,
        NNCFQuantizationConfig,
        NNCFWeightCompressionConfig,
    )

    nncf.set_log_level(logging.ERROR)
    if samples is None:
        # ONNX Runtime cannot read the scales that NNCF gives to the weights of a convolution.
        ignored = nncf.IgnoredScope(types=["Conv"]) if engine == "onnxruntime" else None
        config: NNCFWeightCompressionConfig | NNCFQuantizationConfig = NNCFWeightCompressionConfig(
            mode=nncf.CompressWeightsMode.INT8_ASYM, ignored_scope=ignored
        )
    else:
        alphas = nncf.AdvancedSmoothQuantParameters(matmul=SMOOTH_QUANT_ALPHA if smooth else -1, convolution=-1)
        config = NNCFQuantizationConfig(
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(samples),
            advanced_parameters=nncf.AdvancedQuantizationParameters(smooth_quant_alphas=alphas),
        )
    if engine == "openvino":
        import openvino

        model = openvino.Core().read_model(str(source))
        _save_openvino(NNCFOpenVINOQuantizer(config, samples).quantize(model, {}, ExportFormat.OPENVINO), path)
    else:
        import onnx_ir

        model = onnx_ir.load(str(source))
        _save_onnx(NNCFOnnxQuantizer(config, samples).quantize(model, {}, ExportFormat.ONNX), path)
