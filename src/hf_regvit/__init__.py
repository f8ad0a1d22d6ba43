"""hf_regvit: Vision Transformers with register tokens for Hugging Face transformers.

`import hf_regvit` registers the RegViT classes with the Auto classes of transformers, so that
`AutoModel.from_pretrained` needs no `trust_remote_code`.
"""

from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForDepthEstimation,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    BitImageProcessor,
    BitImageProcessorPil,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

from .models.configuration_regvit import (
    CheckpointCorruptError,
    CheckpointError,
    ConfigError,
    RegViTConfig,
    __version__,
)
from .models.modeling_regvit import (
    ImageTooSmallError,
    RegViTBackbone,
    RegViTForDepthEstimation,
    RegViTForImageClassification,
    RegViTForSemanticSegmentation,
    RegViTModel,
    RegViTModelOutput,
)

if "regvit" in CONFIG_MAPPING_NAMES:  # exist_ok below would otherwise hide a model of that name in transformers
    raise ImportError("The installed transformers already has a model type 'regvit'. Upgrade hf_regvit.")

AutoConfig.register("regvit", RegViTConfig, exist_ok=True)
for auto_class, model_class in (
    (AutoModel, RegViTModel),
    (AutoBackbone, RegViTBackbone),
    (AutoModelForImageClassification, RegViTForImageClassification),
    (AutoModelForSemanticSegmentation, RegViTForSemanticSegmentation),
    (AutoModelForDepthEstimation, RegViTForDepthEstimation),
):
    auto_class.register(RegViTConfig, model_class, exist_ok=True)
    model_class.register_for_auto_class(auto_class.__name__)  # makes save_pretrained copy the two code files
RegViTConfig.register_for_auto_class()
_load_backbone_from_hub = AutoBackbone.from_pretrained


def _load_backbone(source: str | PathLike[str], *args: Any, **options: Any) -> Any:
    """Load a backbone: a local folder with a RegViT here, everything else as transformers does.

    `AutoBackbone` of transformers rejects every local folder, because it asks the Hub whether the name exists.
    """
    from .models.saving import read_object

    config = Path(source, "config.json")
    if config.is_file() and read_object(config).get("model_type") == "regvit":
        options.pop("use_timm_backbone", None)
        return RegViTBackbone.from_pretrained(source, *args, **options)
    return _load_backbone_from_hub(source, *args, **options)


AutoBackbone.from_pretrained = staticmethod(_load_backbone)  # type: ignore[method-assign, assignment]
# The segmentation pipeline supports only the classes of this table and of its own list.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES["regvit"] = RegViTForSemanticSegmentation.__name__
# Checkpoints name this processor themselves. The registration is for configurations saved without a processor.
AutoImageProcessor.register(
    RegViTConfig,
    image_processor_classes={"torchvision": BitImageProcessor, "pil": BitImageProcessorPil},
    exist_ok=True,
)

# Type checkers and editors see these names here; at run time they are imported on first use, because importing
# Trainer, datasets and similar modules takes seconds.
if TYPE_CHECKING:
    from .data.check import check_data
    from .data.loading import load_images
    from .diagnosis.diagnose import diagnose
    from .diagnosis.register_neurons import (
        RegisterNeurons,
        RetrofitError,
        add_test_time_registers,
        find_register_neurons,
    )
    from .diagnosis.report import ArtifactReport
    from .diagnosis.retrofit import RetrofitResult, retrofit
    from .evaluation.extraction import TokenFeatures, extract_features
    from .evaluation.knn import knn_classify
    from .evaluation.lost import discover_objects
    from .evaluation.report import EvaluationReport, EvaluationTable
    from .evaluation.run import compare_backbones, evaluate_backbone
    from .finetuning.arguments import FinetuningArguments
    from .finetuning.run import finetune
    from .hub.publish import publish
    from .models.conversion import convert
    from .models.foreign_weights import ConversionError
    from .models.loading import embed, open_model, patch_maps
    from .models.processing import UnknownProcessorError
    from .models.tokens import TokenReader, TokenReading, read_tokens
    from .pretraining.arguments import PretrainingArguments
    from .pretraining.run import pretrain

_ON_FIRST_USE = {
    "check_data": "data.check",
    "load_images": "data.loading",
    "diagnose": "diagnosis.diagnose",
    "RegisterNeurons": "diagnosis.register_neurons",
    "RetrofitError": "diagnosis.register_neurons",
    "add_test_time_registers": "diagnosis.register_neurons",
    "find_register_neurons": "diagnosis.register_neurons",
    "ArtifactReport": "diagnosis.report",
    "RetrofitResult": "diagnosis.retrofit",
    "retrofit": "diagnosis.retrofit",
    "TokenFeatures": "evaluation.extraction",
    "extract_features": "evaluation.extraction",
    "knn_classify": "evaluation.knn",
    "discover_objects": "evaluation.lost",
    "EvaluationReport": "evaluation.report",
    "EvaluationTable": "evaluation.report",
    "compare_backbones": "evaluation.run",
    "evaluate_backbone": "evaluation.run",
    "FinetuningArguments": "finetuning.arguments",
    "finetune": "finetuning.run",
    "publish": "hub.publish",
    "convert": "models.conversion",
    "ConversionError": "models.foreign_weights",
    "embed": "models.loading",
    "open_model": "models.loading",
    "patch_maps": "models.loading",
    "UnknownProcessorError": "models.processing",
    "TokenReader": "models.tokens",
    "TokenReading": "models.tokens",
    "read_tokens": "models.tokens",
    "PretrainingArguments": "pretraining.arguments",
    "pretrain": "pretraining.run",
}


def __getattr__(name: str) -> object:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module 'hf_regvit' has no attribute '{name}'")
    return getattr(import_module(f".{_ON_FIRST_USE[name]}", __name__), name)


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
    "compare_backbones",
    "convert",
    "diagnose",
    "discover_objects",
    "embed",
    "evaluate_backbone",
    "extract_features",
    "find_register_neurons",
    "finetune",
    "knn_classify",
    "load_images",
    "open_model",
    "patch_maps",
    "pretrain",
    "publish",
    "read_tokens",
    "retrofit",
]
