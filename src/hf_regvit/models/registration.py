"""Registration of the RegViT classes with the Auto classes of transformers; done once, at import."""

from os import PathLike
from pathlib import Path
from typing import Any

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
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

from .configuration_regvit import RegViTConfig
from .modeling_regvit import (
    RegViTBackbone,
    RegViTForDepthEstimation,
    RegViTForImageClassification,
    RegViTForSemanticSegmentation,
    RegViTModel,
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


def _load_backbone(source: str | PathLike[str], *args: Any, **options: Any) -> PreTrainedModel:
    """Load a backbone: a local folder with a RegViT here, everything else as transformers does.

    `AutoBackbone` of transformers rejects every local folder, because it asks the Hub whether the name exists.
    """
    from .saving import read_object

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
