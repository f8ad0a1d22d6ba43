"""hf_regvit: Vision Transformers with register tokens for Hugging Face transformers.

`import hf_regvit` registers the RegViT classes with the Auto classes of transformers, so that
`AutoModel.from_pretrained` needs no `trust_remote_code`.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

# `python -m hf_regvit` imports this file before it reads the options, and `--help` needs no model. The commands that
# need one import the registration themselves.
if sys.argv[:1] != ["-m"] or ("-m", "hf_regvit") not in zip(sys.orig_argv, sys.orig_argv[1:]):
    from .models import registration  # noqa: F401

# Type checkers and editors see these names here; at run time they are imported on first use, because importing
# Trainer, datasets and similar modules takes seconds.
if TYPE_CHECKING:
    from .data.check import check_data
    from .data.loading import load_images
    from .diagnosis.diagnose import diagnose
    from .diagnosis.in_place import repair_in_place
    from .diagnosis.position import remove_position
    from .diagnosis.register_neurons import (
        RegisterNeurons,
        RetrofitError,
        add_test_time_registers,
        find_register_neurons,
    )
    from .diagnosis.report import ArtifactReport
    from .diagnosis.retrofit import RetrofitResult, retrofit
    from .evaluation.dense_features import FeatureSettings, choose_features, patch_maps
    from .evaluation.extraction import TokenFeatures, extract_features
    from .evaluation.knn import knn_classify
    from .evaluation.lost import discover_objects
    from .evaluation.report import EvaluationReport, EvaluationTable
    from .evaluation.run import compare_backbones, evaluate_backbone
    from .finetuning.arguments import FinetuningArguments
    from .finetuning.run import finetune
    from .hub.export import ExportReport, export
    from .hub.exported import ExportedModel, ExportError, load_exported
    from .hub.publish import publish
    from .models.configuration_regvit import (
        CheckpointCorruptError,
        CheckpointError,
        ConfigError,
        RegViTConfig,
        __version__,
    )
    from .models.conversion import convert, convert_back
    from .models.loading import embed, open_model
    from .models.modeling_regvit import (
        ImageTooSmallError,
        RegViTBackbone,
        RegViTForDepthEstimation,
        RegViTForImageClassification,
        RegViTForSemanticSegmentation,
        RegViTModel,
        RegViTModelOutput,
    )
    from .models.processing import UnknownProcessorError
    from .models.source_families import ConversionError
    from .models.tokens import TokenReader, TokenReading, read_tokens
    from .pretraining.arguments import PretrainingArguments
    from .pretraining.run import pretrain

_ON_FIRST_USE = {
    "data.check": ("check_data",),
    "data.loading": ("load_images",),
    "diagnosis.diagnose": ("diagnose",),
    "diagnosis.in_place": ("repair_in_place",),
    "diagnosis.position": ("remove_position",),
    "diagnosis.register_neurons": (
        "RegisterNeurons", "RetrofitError", "add_test_time_registers", "find_register_neurons",
    ),
    "diagnosis.report": ("ArtifactReport",),
    "diagnosis.retrofit": ("RetrofitResult", "retrofit"),
    "evaluation.dense_features": ("FeatureSettings", "choose_features", "patch_maps"),
    "evaluation.extraction": ("TokenFeatures", "extract_features"),
    "evaluation.knn": ("knn_classify",),
    "evaluation.lost": ("discover_objects",),
    "evaluation.report": ("EvaluationReport", "EvaluationTable"),
    "evaluation.run": ("compare_backbones", "evaluate_backbone"),
    "finetuning.arguments": ("FinetuningArguments",),
    "finetuning.run": ("finetune",),
    "hub.export": ("ExportReport", "export"),
    "hub.exported": ("ExportError", "ExportedModel", "load_exported"),
    "hub.publish": ("publish",),
    "models.configuration_regvit": (
        "CheckpointCorruptError", "CheckpointError", "ConfigError", "RegViTConfig", "__version__",
    ),
    "models.conversion": ("convert", "convert_back"),
    "models.loading": ("embed", "open_model"),
    "models.modeling_regvit": (
        "ImageTooSmallError", "RegViTBackbone", "RegViTForDepthEstimation", "RegViTForImageClassification",
        "RegViTForSemanticSegmentation", "RegViTModel", "RegViTModelOutput",
    ),
    "models.processing": ("UnknownProcessorError",),
    "models.source_families": ("ConversionError",),
    "models.tokens": ("TokenReader", "TokenReading", "read_tokens"),
    "pretraining.arguments": ("PretrainingArguments",),
    "pretraining.run": ("pretrain",),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _ON_FIRST_USE.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'hf_regvit' has no attribute '{name}'")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "ArtifactReport",
    "CheckpointCorruptError",
    "CheckpointError",
    "ConfigError",
    "ConversionError",
    "EvaluationReport",
    "EvaluationTable",
    "ExportError",
    "ExportReport",
    "ExportedModel",
    "FeatureSettings",
    "FinetuningArguments",
    "ImageTooSmallError",
    "PretrainingArguments",
    "RegViTBackbone",
    "RegViTConfig",
    "RegViTForDepthEstimation",
    "RegViTForImageClassification",
    "RegViTForSemanticSegmentation",
    "RegViTModel",
    "RegViTModelOutput",
    "RegisterNeurons",
    "RetrofitError",
    "RetrofitResult",
    "TokenFeatures",
    "TokenReader",
    "TokenReading",
    "UnknownProcessorError",
    "__version__",
    "add_test_time_registers",
    "check_data",
    "choose_features",
    "compare_backbones",
    "convert",
    "convert_back",
    "diagnose",
    "discover_objects",
    "embed",
    "evaluate_backbone",
    "export",
    "extract_features",
    "find_register_neurons",
    "finetune",
    "knn_classify",
    "load_exported",
    "load_images",
    "open_model",
    "patch_maps",
    "pretrain",
    "publish",
    "read_tokens",
    "remove_position",
    "repair_in_place",
    "retrofit",
]
