"""hf_regvit: Vision Transformers with register tokens for Hugging Face transformers.

`import hf_regvit` registers the RegViT classes with the Auto classes of transformers, so that
`AutoModel.from_pretrained` needs no `trust_remote_code`.
"""

from importlib import import_module

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

from .models.configuration_regvit import ConfigError, RegViTConfig, __version__
from .models.modeling_regvit import (
    CheckpointCorruptError,
    CheckpointError,
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
# The segmentation pipeline supports only the classes of this table and of its own list.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES["regvit"] = RegViTForSemanticSegmentation.__name__
# Checkpoints name this processor themselves. The registration is for configurations saved without a processor.
AutoImageProcessor.register(
    RegViTConfig,
    image_processor_classes={"torchvision": BitImageProcessor, "pil": BitImageProcessorPil},
    exist_ok=True,
)

# Importing Trainer, datasets and similar modules takes seconds, so these names are imported on first use.
_ON_FIRST_USE = {
    "ArtifactReport": "diagnosis.report",
    "diagnose": "diagnosis.diagnose",
    "discover_objects": "evaluation.lost",
    "EvaluationReport": "evaluation.report",
    "compare_backbones": "evaluation.run",
    "evaluate_backbone": "evaluation.run",
    "RegisterNeurons": "diagnosis.register_neurons",
    "RetrofitError": "diagnosis.register_neurons",
    "add_test_time_registers": "diagnosis.register_neurons",
    "find_register_neurons": "diagnosis.register_neurons",
    "ConversionError": "models.foreign_weights",
    "convert": "models.conversion",
    "FinetuningArguments": "finetuning.arguments",
    "PretrainingArguments": "pretraining.arguments",
    "finetune": "finetuning.run",
    "pretrain": "pretraining.run",
    "load_images": "data.loading",
    "read_tokens": "models.tokens",
    "TokenFeatures": "evaluation.extraction",
    "extract_features": "evaluation.extraction",
    "knn_classify": "evaluation.knn",
}


def __getattr__(name: str) -> object:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module 'hf_regvit' has no attribute '{name}'")
    return getattr(import_module(f".{_ON_FIRST_USE[name]}", __name__), name)


__all__ = [
    "ArtifactReport",
    "CheckpointCorruptError",
    "CheckpointError",
    "ConfigError",
    "ConversionError",
    "EvaluationReport",
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
    "TokenFeatures",
    "__version__",
    "add_test_time_registers",
    "compare_backbones",
    "convert",
    "diagnose",
    "discover_objects",
    "evaluate_backbone",
    "extract_features",
    "find_register_neurons",
    "finetune",
    "knn_classify",
    "load_images",
    "pretrain",
    "read_tokens",
]
