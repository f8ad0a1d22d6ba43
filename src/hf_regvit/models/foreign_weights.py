"""Read the weights of other projects and express them with the names and fields of RegViT."""

import argparse
import logging
import math
import pickle
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn

from .configuration_regvit import (
    CheckpointCorruptError,
    CheckpointError,
    ConfigError,
    RegViTConfig,
    check_finite,
    check_weight_files,
    corrupt_weights,
)
from .manifest import check_archive
from .processing import default_image_processor, known_processor, saved_processor
from .saving import read_object

logger = logging.getLogger(__name__)

# Fields that the shapes of a raw state dict do not determine. For families whose code fixes a value, it is filled in.
NOT_IN_SHAPES = {
    "num_attention_heads": "hidden_size / 64 in every released DINOv2",
    "interpolate_antialias": "True for DINOv2 with registers and timm, False for DINOv2 without registers and DINO",
    "interpolate_offset": "0.0 for DINOv2 with registers and timm, 0.1 for DINOv2 without registers and DINO",
    "layer_norm_eps": "1e-6 for DINOv2, DINO and timm",
}


# Errors that torch.load raises for text, such as the HTML page of a failed download, and for truncated files.
_UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, struct.error,
)  # fmt: skip
_UNUSABLE = (StrictDataclassError, LookupError, TypeError, AttributeError, ValueError)  # of a wrong configuration
_WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl", ".npz")


class ConversionError(ValueError):
    """Raised for a source that RegViT cannot express, or whose outputs differ after the conversion."""


@dataclass
class ForeignModel:
    """Checkpoint during conversion: tensors with upstream names, known config fields, and a model to compare with.

    `load` returns the model, or is None for bare tensors. `processor` is an image processor, the `pretrained_cfg` of a
    timm model, or None.
    """

    name: str
    tensors: dict[str, Tensor]
    fields: dict[str, Any] = field(default_factory=dict)
    load: Callable[[], nn.Module] | None = None
    processor: Any = None

    def image_processor(self, config: RegViTConfig) -> Any:
        """Return the image processor of the source for the converted model, or None if none is known."""
        return _timm_processor(config, self.processor) if isinstance(self.processor, dict) else self.processor


def _timm_processor(config: RegViTConfig, settings: dict[str, Any]) -> Any:
    """Create the image processor that corresponds to a timm model's `pretrained_cfg`.

    Source: timm `data/transforms_factory.py`, `transforms_imagenet_eval`: the crop is `crop_pct` of the resized side.
    """
    from PIL.Image import Resampling

    share = settings.get("crop_pct") or 0.875
    height, width = (math.floor(side / share) for side in config.image_shape)
    processor = default_image_processor(config.image_shape, resize=max(height, width))
    mode = settings.get("crop_mode") or "center"
    if mode == "squash":
        processor.size = {"height": height, "width": width}
    elif mode != "center":
        logger.warning("timm crop_mode '%s' has no counterpart in the image processor; images are cropped.", mode)
    name = str(settings.get("interpolation") or "bicubic").upper()
    if name in Resampling.__members__:
        processor.resample = Resampling[name]
    processor.image_mean = list(settings.get("mean", processor.image_mean))
    processor.image_std = list(settings.get("std", processor.image_std))
    return processor


def first_line(error: BaseException) -> str:
    """Return the first line of the text of an error, or the name of its class if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_source(source: str | Path) -> None:
    """Raise if `source` is neither a local path nor a valid Hub id, instead of the Hub's error on repository names.

    Raises:
        FileNotFoundError: `source` is neither a file nor a folder nor a Hub id.
    """
    path = Path(source)
    # Hub names contain dots too (`timm/vit_tiny_patch16_224.augreg_in21k`), so only weight suffixes indicate a file.
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)) and path.suffix not in _WEIGHT_SUFFIXES
    if not path.exists() and not is_hub_id:
        raise FileNotFoundError(
            f"'{source}' is neither a file nor a folder, nor a Hub id of the form 'owner/name'. Check the path."
        )


def local_path(source: str | Path) -> Path:
    """Return the local path; for a Hub id, download configurations and safetensors (but no code) first."""
    path = Path(source)
    if path.exists():
        return path
    check_source(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:  # offline, unknown repository, no access, or invalid name
        raise FileNotFoundError(
            f"'{source}' is neither a local folder nor a model that can be downloaded now: {first_line(error)}"
        ) from error


def read_weights(path: Path) -> dict[str, Any]:
    """Read a weights file; pickles are only read as plain tensors (`weights_only=True`), without exception."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            check_weight_files(path)
            tensors = load_file(path)
            check_finite(tensors, path)
            return tensors
        except SafetensorError as error:
            raise CheckpointCorruptError(
                f"'{path}' cannot be read as safetensors ({error}). Download the file again."
            ) from error
    check_archive(path)
    try:
        # DINO checkpoints contain their command line as a Namespace, which runs no code when it is unpickled.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise refused_pickle(path, error) from error
    if not isinstance(loaded, dict):
        raise CheckpointCorruptError(
            f"'{path}' holds a {type(loaded).__name__}, expected a dict of tensors. Save a state dict instead."
        )
    return loaded


def refused_pickle(source: str | Path, error: BaseException) -> CheckpointCorruptError:
    """Create the error for a pickle that is not a plain file of tensors, without torch's advice to unpickle anyway."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    reason = f"it needs {refused[1]}" if refused else type(error).__name__
    return CheckpointCorruptError(
        f"'{source}' is not a plain file of tensors ({reason}). hf_regvit never runs code from a checkpoint. If you "
        "trust the file, load it in a separate process and save its tensors as safetensors."
    )


def check_config(config: Mapping[str, Any], source: str | Path) -> None:
    """Check the fields of a configuration that decide which code runs.

    Raises:
        CheckpointError: The model classes are not a list of names, or the attention is a kernel of the Hub.
    """
    classes = config.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(
            f"The config.json of '{source}' has architectures={str(classes)[:80]}, expected a list of class names."
        )
    for name in ("attn_implementation", "_attn_implementation"):
        attention = config.get(name)
        if attention not in (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"):
            raise CheckpointError(
                f"The config.json of '{source}' has {name}={str(attention)[:80]!r}, which could load code from the "
                "Hub. Remove this field."
            )


def load_pretrained(model_class: Any, source: str | Path, **options: Any) -> Any:
    """Load a model with a class of transformers, so that every error of a damaged file names it.

    Raises:
        CheckpointError: The configuration or the weights cannot be used.
        OSError: There is no such model.
    """
    try:
        check_weight_files(source)
        for path in Path(source).glob("*.bin"):
            check_archive(path)
        return model_class.from_pretrained(source, **options)
    except SafetensorError as error:
        raise corrupt_weights(source, error) from error
    except pickle.UnpicklingError as error:
        raise refused_pickle(source, error) from error
    except (CheckpointError, ConfigError):
        raise
    except (*_UNUSABLE, RuntimeError) as error:
        raise CheckpointError(
            f"'{source}' cannot be loaded ({type(error).__name__}: {first_line(error)[:200]}). Check its config.json, "
            "or download the model again."
        ) from error


def find_backbone(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Find the backbone tensors in a state dict or training checkpoint, preferring those of the teacher."""
    for key in ("teacher", "state_dict", "model", "student"):
        if isinstance(checkpoint.get(key), dict):
            if key in ("teacher", "student"):
                logger.info("The checkpoint is a training state; using its %s.", key)
            return find_backbone(checkpoint[key])
    tensors = {key.removeprefix("module."): value for key, value in checkpoint.items() if isinstance(value, Tensor)}
    for prefix in ("teacher.", "student.", "backbone."):
        inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if inside:
            rest = {key: value for key, value in tensors.items() if not key.startswith(prefix)}
            heads = {key: value for key, value in rest.items() if key.startswith("linear_head.")}
            dropped = sorted({key.split(".")[0] for key in rest} - {"linear_head"})
            if dropped:
                logger.info("Using '%s*' and ignoring %s.", prefix, ", ".join(dropped))
            return find_backbone({**inside, **heads})
    if not tensors:
        raise ConversionError(
            f"The checkpoint contains no tensors; its entries are {sorted(map(str, checkpoint))[:8]}. Pass the state "
            "dict of the model."
        )
    return tensors


def read_folder(folder: Path) -> ForeignModel:
    """Read a folder of transformers or timm."""
    config_file = folder / "config.json"
    try:
        config = read_object(config_file)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"'{folder}' has no config.json. Pass the weights file itself, together with config overrides."
        ) from error
    except ValueError as error:
        raise ConversionError(str(error)) from error
    check_config(config, folder)
    if "model_type" not in config and "architecture" in config:
        origin = read_module(_timm_module(folder, config))
        origin.processor = saved_processor(folder) or config.get("pretrained_cfg")
        return origin
    if not isinstance(config.get("model_type"), str):
        raise ConversionError(
            f"'{config_file}' names neither a model_type (transformers) nor an architecture (timm). Pass the folder "
            "that save_pretrained wrote, or the weights file itself together with config overrides."
        )
    if config["model_type"] == "regvit":
        raise ConversionError(f"'{folder}' is already a RegViT. Load it with AutoModel.from_pretrained.")
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        tensors.update(read_weights(file))
    parts = _transformers_parts(config, tensors)
    return ForeignModel(str(folder), *parts, partial(_load_folder, folder, config), saved_processor(folder))


def _load_folder(folder: Path, config: dict[str, Any]) -> nn.Module:
    """Load the source model of a transformers folder, to compare its outputs."""
    from transformers import AutoModel, AutoModelForImageClassification

    has_labels = config.get("id2label") != {} and config.get("num_labels") != 0
    has_head = any("ImageClassification" in name for name in config.get("architectures") or [])
    auto_class = AutoModelForImageClassification if has_head and has_labels else AutoModel
    return load_pretrained(auto_class, folder, dtype=torch.float32).eval()


def _weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a transformers or timm folder: one file, or the shards named by its index."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.is_file():
            check_weight_files(folder)
            names = sorted(set(read_object(index)["weight_map"].values()))
            if missing := [name for name in names if not (folder / name).is_file()]:
                raise FileNotFoundError(
                    f"'{index}' names {', '.join(missing[:4])}, but the folder lacks them. Download the model again."
                )
            return [folder / name for name in names]
        if (folder / single).is_file():
            return [folder / single]
    found = sorted(path.name for path in folder.iterdir())[:8]
    raise FileNotFoundError(
        f"'{folder}' has no model.safetensors or pytorch_model.bin; it contains {found}. Pass the weights file itself."
    )


def import_timm(source: str | Path) -> Any:
    """Import timm for a model, or raise with the line that installs it."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"'{source}' is a timm model, and timm is not installed. Run: pip install timm") from error
    return timm


def _timm_module(folder: Path, config: dict[str, Any]) -> Any:
    arguments = config.get("model_args", {})
    model: Any = import_timm(folder).create_model(config["architecture"], pretrained=False, **arguments)
    model.reset_classifier(config.get("num_classes", 0))
    model.load_state_dict({name: t for file in _weight_files(folder) for name, t in read_weights(file).items()})
    return model.eval()


def read_module(module: Any) -> ForeignModel:
    """Read a module of transformers or timm."""
    name = type(module).__name__
    tensors = {key: value.detach() for key, value in module.state_dict().items()}
    if hasattr(module, "config") and hasattr(module.config, "model_type"):
        parts = _transformers_parts(module.config.to_dict(), tensors)
        return ForeignModel(name, *parts, lambda: module, known_processor(module))
    if hasattr(module, "num_prefix_tokens") and hasattr(module, "patch_embed"):
        processor = getattr(module, "image_processor", None) or dict(getattr(module, "pretrained_cfg", None) or {})
        return ForeignModel(name, tensors, _timm_fields(module), lambda: module, processor or None)
    raise ConversionError(f"{name} is neither a transformers nor a timm vision transformer. Pass its state_dict().")


# --- Configurations of the libraries ---


# Families of transformers that RegViT can express, with the input of their classifiers.
_POOLING = {"vit": "cls", "deit": "cls", "dinov2": "cls_mean_patch", "dinov2_with_registers": "cls_mean_patch"}


def _transformers_parts(
    config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors (without the model prefix) and the config fields of a transformers model."""
    model_type = config["model_type"]
    if model_type not in _POOLING:
        raise ConversionError(
            f"model_type '{model_type}' cannot be converted, expected one of {', '.join(_POOLING)}. "
            "RegViT cannot express rotary positions (DINOv3), models without CLS (SigLIP) or hierarchical models."
        )
    tensors = {re.sub(rf"^{model_type}\.", "", key): value for key, value in tensors.items()}
    names = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "mlp_ratio", "hidden_act",
        "layer_norm_eps", "initializer_range", "image_size", "patch_size", "num_channels", "qkv_bias",
        "use_swiglu_ffn", "drop_path_rate", "id2label", "label2id", "problem_type", "out_features", "out_indices",
        "apply_layernorm", "reshape_hidden_states",
    )  # fmt: skip
    from transformers import CONFIG_MAPPING

    # Fields missing from the file have the defaults of their family, not those of RegViT.
    try:
        full = CONFIG_MAPPING[model_type].from_dict(dict(config)).to_dict()
    except _UNUSABLE as error:
        raise ConversionError(f"The configuration is not valid for model_type '{model_type}': {error}") from error
    fields = {name: full[name] for name in names if full.get(name) not in (None, {})}  # without labels: our default
    with_registers = model_type == "dinov2_with_registers"
    fields["num_register_tokens"] = full["num_register_tokens"] if with_registers else 0
    fields["interpolate_antialias"], fields["interpolate_offset"] = with_registers, 0.0
    fields["pooling"] = _POOLING[model_type]
    if fields["pooling"] == "cls":
        fields["pooler_act"] = full["pooler_act"] if "pooler.dense.weight" in tensors else None
    else:
        fields["return_register_tokens"] = not full["reshape_hidden_states"]
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if full.get(name):
            logger.warning(
                "%s=%s has no counterpart in RegViT. Outputs are equal, but further training does not use it.",
                name,
                full[name],
            )
    return tensors, fields


def _timm_fields(module: Any) -> dict[str, Any]:
    """Return the config fields of a timm VisionTransformer; raise if RegViT lacks one of its features."""
    block = module.blocks[0]
    if type(block).__name__ != "Block":
        raise ConversionError(
            f"The timm model has blocks of type {type(block).__name__}, which RegViT cannot express. Only 'Block' can "
            "be converted."
        )
    mlp = type(block.mlp).__name__
    refusals = {
        "no class token": not module.has_class_token,
        "no position table": module.pos_embed is None,
        f"attention {type(block.attn).__name__}": type(block.attn).__name__ != "Attention",
        f"MLP {mlp}": mlp not in ("Mlp", "GluMlp"),
        f"a gate with {type(block.mlp.act).__name__}": mlp == "GluMlp"
        and (not isinstance(block.mlp.act, nn.SiLU) or block.mlp.gate_last),
        "a norm before the blocks (pre_norm)": not isinstance(module.norm_pre, nn.Identity),
        "normalized queries and keys (qk_norm)": not isinstance(block.attn.q_norm, nn.Identity),
        f"global_pool '{module.global_pool}'": module.global_pool not in ("token", "avg", ""),
        "a classifier on every token": module.global_pool == "" and module.num_classes > 0,
        "pooling over prefix tokens": getattr(module, "pool_include_prefix", False),
        "CLS pooling with fc_norm": module.global_pool != "avg" and not isinstance(module.fc_norm, nn.Identity),
    }
    if refused := [name for name, applies in refusals.items() if applies]:
        raise ConversionError(f"The timm model has {' and '.join(refused)}, which RegViT cannot express.")
    pooled = not isinstance(module.fc_norm, nn.Identity)
    patch = module.patch_embed.patch_size
    grid = module.patch_embed.grid_size
    gelu = {"GELU": "gelu", "SiLU": "silu", "ReLU": "relu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh"}
    return {
        "num_attention_heads": block.attn.num_heads,
        "layer_norm_eps": block.norm1.eps,
        "hidden_act": "gelu" if mlp != "Mlp" else gelu.get(type(block.mlp.act).__name__, type(block.mlp.act).__name__),
        "use_swiglu_ffn": mlp != "Mlp",
        "image_size": [grid[0] * patch[0], grid[1] * patch[1]]
        if grid[0] != grid[1] or patch[0] != patch[1]
        else grid[0] * patch[0],
        "no_embed_class": module.no_embed_class,
        "interpolate_antialias": True,
        "interpolate_offset": 0.0,
        "final_norm": "pooled" if pooled else "tokens",
        "pooling": "mean_patch" if module.global_pool == "avg" else "cls",
    }


# --- Names and shapes ---

# (pattern, replacement), applied to every name in this order; the first group is for official DINOv2 and timm.
_RULES = [
    (r"^blocks\.(?:\d+\.)?(\d+)\.", r"layers.\1."),  # `block_chunks` nests the blocks without renumbering them
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.(?:w12|weights_in)\.", ".mlp.gate_up_proj."),
    (r"\.mlp\.(?:w3|weights_out)\.", ".mlp.down_proj."),
    (r"^(?:norm|fc_norm)\.", "layernorm."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^(cls_token|mask_token)$", r"embeddings.\1"),
    (r"^(?:register_tokens|reg_token)$", "embeddings.register_tokens"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^(?:head|linear_head)\.", "classifier."),
    # transformers, both generations of names
    (r"^(?:encoder\.layer|layer)\.(\d+)\.", r"layers.\1."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attention.\1."),
    (r"\.attention\.(?:query|q_proj)\.", ".attention.q."),
    (r"\.attention\.(?:key|k_proj)\.", ".attention.k."),
    (r"\.attention\.(?:value|v_proj)\.", ".attention.v."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.mlp\.gate_proj\.", ".mlp.gate."),
    (r"\.mlp\.up_proj\.", ".mlp.up."),
]
# Projections that other models store in separate tensors, in the row order of RegViT.
_FUSED = {
    ".attention.qkv.": (".attention.q.", ".attention.k.", ".attention.v."),
    ".mlp.gate_up_proj.": (".mlp.gate.", ".mlp.up."),
}


def rename_tensors(origin: ForeignModel) -> dict[str, Tensor]:
    """Rename upstream tensors to RegViT names and fuse projections that are stored in several tensors."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in origin.tensors.items():
        for pattern, replacement in _RULES:
            name = re.sub(pattern, replacement, name)
        tensors[name] = tensor
    for whole, pieces in _FUSED.items():
        for first in [name for name in tensors if pieces[0] in name]:
            names = [first.replace(pieces[0], piece) for piece in pieces]
            if missing := [name for name in names if name not in tensors]:
                raise ConversionError(
                    f"'{origin.name}' has {first} but lacks {', '.join(missing)} (RegViT names). Pass all weights."
                )
            tensors[first.replace(pieces[0], whole)] = torch.cat([tensors.pop(name) for name in names])
    for name in [name for name in tensors if re.search(r"\.mlp\.fc1\.", name)]:
        # timm stores a SwiGLU in fc1, which then has twice as many rows as fc2 has columns.
        second = re.sub(r"fc1\.\w+$", "fc2.weight", name)
        if second in tensors and tensors[name].shape[0] == 2 * tensors[second].shape[1]:
            tensors[name.replace(".mlp.fc1.", ".mlp.gate_up_proj.")] = tensors.pop(name)
    for name in [name for name in tensors if ".mlp.fc2." in name]:
        if re.sub(r"fc2\.\w+$", "gate_up_proj.weight", name) in tensors:
            tensors[name.replace(".mlp.fc2.", ".mlp.down_proj.")] = tensors.pop(name)
    return tensors


def as_pair(name: str, value: Any) -> Any:
    """Return a size as (height, width), also if it is one number; return other fields unchanged."""
    if name not in ("patch_size", "image_size"):
        return value
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2:
        raise ConversionError(f"{name}={value} must be one number or a (height, width) pair, e.g. 224.")
    return pair


def pooling_of(classifier: Tensor, width: int, origin: ForeignModel) -> str:
    """Return the `pooling` of a classifier from the number of its inputs."""
    pooling = {width: "cls", 2 * width: "cls_mean_patch"}.get(classifier.shape[1])
    if pooling is None:
        raise ConversionError(
            f"The classifier of '{origin.name}' reads {classifier.shape[1]} features, expected {width} (CLS) or "
            f"{2 * width} (CLS and mean patch). Heads on several blocks cannot be expressed; pass only the backbone."
        )
    if "fc_norm.weight" not in origin.tensors and pooling == "cls" and origin.load is None:
        logger.warning(
            "Assuming that the classifier of '%s' reads CLS. Pass pooling='mean_patch' if it does not.", origin.name
        )
    return pooling
