"""Find the weights of a vision tower in modules, folders, files and state dicts of other projects."""

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
from torch.distributed.tensor import DTensor

from .configuration_regvit import (
    CheckpointCorruptError,
    CheckpointError,
    ConfigError,
    RegViTConfig,
    check_finite,
    check_weight_files,
    corrupt_weights,
)
from .families import FAMILIES, TIMM_CLASSES, unwrapped
from .manifest import check_archive
from .processing import default_image_processor, known_processor, saved_processor
from .saving import read_object
from .source_families import SOURCES, ConversionError, refusal, timm_fields, timm_rotation, transformers_fields

logger = logging.getLogger(__name__)

# Errors that torch.load raises for text, such as the HTML page of a failed download, and for truncated files.
_UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, struct.error,
)  # fmt: skip
_UNUSABLE = (StrictDataclassError, LookupError, TypeError, AttributeError, ValueError)  # of a wrong configuration
_WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl", ".npz")


# Models with two towers: the family of the vision tower, and the class that loads it alone.
_TWO_TOWERS = {
    "clip": ("clip_vision_model", "CLIPVisionModelWithProjection"),
    "metaclip_2": ("metaclip_2_vision_model", "MetaClip2VisionModelWithProjection"),
    "siglip": ("siglip_vision_model", "SiglipVisionModel"),
    "tipsv2": ("tipsv2_vision_model", "Tipsv2VisionModel"),
}


@dataclass
class ForeignModel:
    """Vision tower of another project during conversion.

    Args:
        name: Name for messages.
        tensors: All tensors of the source.
        names: Names of the tensors of the tower without its prefix, and their names in `tensors`.
        fields: Known fields of `RegViTConfig`.
        load: Function that returns the model to compare with; None for bare tensors.
        processor: Image processor, the `pretrained_cfg` of a timm model, or None.
        rotation: Two flags: the rotated channels are neighbors, and those of the columns come first.
        is_official: True for weights of DINO, DINOv2 and DINOv3, whose images have the statistics of ImageNet.
        projects: True if the last layer is a projection of CLIP rather than a classifier.
    """

    name: str
    tensors: dict[str, Tensor]
    names: dict[str, str]
    fields: dict[str, Any] = field(default_factory=dict)
    load: Callable[[], nn.Module] | None = None
    processor: Any = None
    rotation: tuple[bool, bool] = (False, False)
    is_official: bool = False
    projects: bool = False

    @property
    def own(self) -> dict[str, Tensor]:
        """Tensors of the tower by their names without its prefix."""
        return {name: self.tensors[full] for name, full in self.names.items()}

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


def read_state(name: str, checkpoint: dict[str, Any]) -> ForeignModel:
    """Read a state dict or a training checkpoint; what the shapes do not tell is left to the caller."""
    tensors = find_tensors(checkpoint)
    names = find_tower_names(tensors)
    fields: dict[str, Any] = {}
    own = {local: tensors[full] for local, full in names.items()}
    if "rope_embed.periods" in own:  # DINOv3
        fields |= _official_rotation(own["rope_embed.periods"], own["cls_token"].shape[-1])
        fields["key_bias"] = not any(local.endswith(".bias_mask") for local in names)
    is_eva = {"blocks.0.attn.q_bias", "blocks.0.attn.q_proj.weight"} & names.keys()
    if is_eva or {"attn_pool.q.weight", "cls_token"} <= names.keys():
        raise ConversionError(
            f"'{name}' has the names of an Eva of timm, whose rotary positions are not in its tensors. Pass the model "
            "of timm itself, its folder, or timm/NAME."
        )
    if "class_embedding" in names:  # OpenCLIP
        fields |= {"layer_norm_eps": 1e-5, "interpolate_antialias": True, "interpolate_offset": 0.0}
    if "pre_layrnorm.weight" in names:
        fields |= {"final_norm": "cls", "layer_norm_eps": 1e-5}
    is_official = bool({"register_tokens", "storage_tokens", "mask_token"} & names.keys()) and "pos_drop" not in names
    return ForeignModel(name, tensors, names, fields, is_official=is_official)


def _official_rotation(periods: Tensor, width: int) -> dict[str, Any]:
    """Return the fields of the rotary positions of an official DINOv3 checkpoint."""
    head_dim = 4 * len(periods)
    exact = 100.0 ** (torch.arange(len(periods)) / len(periods))
    fields: dict[str, Any] = {"rope_theta": 100.0, "num_attention_heads": width // head_dim, "layer_norm_eps": 1e-5}
    if not torch.allclose(periods.float(), exact, rtol=1e-6, atol=0):
        logger.warning("The periods of the rotary positions are rounded; they are kept as rope_periods.")
        fields["rope_periods"] = periods.float().tolist()
    return fields


def find_tensors(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a state dict or a training checkpoint, preferring those of the teacher."""
    for key in ("teacher", "model_ema", "ema", "state_dict", "model", "student", "module"):
        if isinstance(checkpoint.get(key), dict):
            if key in ("teacher", "student"):
                logger.info("The checkpoint is a training state; using its %s.", key)
            return find_tensors(checkpoint[key])
    tensors = {str(key): value for key, value in checkpoint.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ConversionError(
            f"The checkpoint contains no tensors; its entries are {sorted(map(str, checkpoint))[:8]}. Pass the state "
            "dict of the model."
        )
    _check_plain(tensors, "The checkpoint")
    return tensors


def _check_plain(tensors: dict[str, Any], what: str) -> None:
    """Raise for adapters, and for quantized and sharded weights."""
    if any(re.search(r"\.(lora_\w+|base_layer|modules_to_save)\.", name) for name in tensors):
        raise ConversionError(
            f"{what} has an adapter of PEFT that is not merged. Merge the adapter first: model.merge_and_unload()."
        )
    if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        raise ConversionError(f"{what} is sharded. Gather its full state dict first, and pass it.")
    is_float = [isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in tensors.values()]
    if not all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors.values()) or not any(is_float):
        raise ConversionError(f"{what} is quantized. Pass the model from which it was made.")


# The tensor that every tower has, in all spellings. What precedes it in a name is the prefix of the tower.
_ANCHOR = re.compile(
    r"(?:^|\.)(?:patch_embed\.proj|embeddings\.patch_embeddings(?:\.projection)?|embeddings\.patch_embedding|"
    r"conv1)\.weight$"
)
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_BESIDE = re.compile(r"(?:linear_head|classifier|visual_projection)\.")  # stored beside the tower


def find_tower_names(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return the names of the tensors of the vision tower without its prefix, and their full names."""
    plain = {_WRAPPERS.sub("", name): name for name in tensors}
    found = [(name, match) for name in plain if (match := _ANCHOR.search(name))]
    prefixes = [name[: match.start()] for name, match in found]
    # A teacher is better than a student, and the average of the weights better than the weights.
    prefixes.sort(key=lambda prefix: ("teacher" not in prefix, "ema" not in prefix, "momentum" in prefix, len(prefix)))
    prefix = f"{prefixes[0]}." if prefixes and prefixes[0] else ""
    inside = {name.removeprefix(prefix): full for name, full in plain.items() if name.startswith(prefix)}
    if prefix:
        parent = prefix[: prefix[:-1].rfind(".") + 1]
        rest = [name for name in plain if not name.startswith(prefix)]
        beside = {name.removeprefix(parent): plain[name] for name in rest if _BESIDE.match(name.removeprefix(parent))}
        if dropped := sorted({name.split(".")[0] for name in rest} - {name.split(".")[0] for name in beside}):
            logger.info("Using '%s*' and ignoring %s.", prefix, ", ".join(dropped))
        inside |= beside
    return inside


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
    kind = config.get("model_type")
    if kind in (None, "timm_wrapper") and "architecture" in config:
        origin = read_module(_timm_module(folder, config))
        origin.processor = saved_processor(folder) or config.get("pretrained_cfg")
        return origin
    if not isinstance(kind, str):
        raise ConversionError(
            f"'{config_file}' names neither a model_type (transformers) nor an architecture (timm). Pass the folder "
            "that save_pretrained wrote, or the weights file itself together with config overrides."
        )
    if kind == "regvit":
        raise ConversionError(f"'{folder}' is already a RegViT. Load it with AutoModel.from_pretrained.")
    if config.get("quantization_config"):
        raise ConversionError(f"The weights of '{folder}' are quantized. Pass the model from which they were made.")
    tower, class_name = {"model_type": kind, **config}, None
    if kind not in SOURCES and isinstance(config.get("vision_config"), dict):
        default, class_name = _TWO_TOWERS.get(kind, (None, ""))
        tower = {"model_type": default, **config["vision_config"]}
    if tower["model_type"] not in SOURCES:
        raise refusal(str(tower["model_type"] or kind))
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        tensors.update(read_weights(file))
    _check_plain(tensors, f"'{folder}'")
    names = find_tower_names(tensors)
    fields = transformers_fields(tower, {name: tensors[full] for name, full in names.items()})
    load = None if class_name == "" else partial(_load_folder, folder, config, class_name)
    return ForeignModel(str(folder), tensors, names, fields, load, saved_processor(folder))


def _load_folder(folder: Path, config: dict[str, Any], class_name: str | None) -> nn.Module:
    """Load the source model of a transformers folder, to compare its outputs."""
    import transformers
    from transformers import AutoModel, AutoModelForImageClassification

    if class_name:
        return load_pretrained(getattr(transformers, class_name), folder, dtype=torch.float32).eval()
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
    tensors = find_tensors({name: t for file in _weight_files(folder) for name, t in read_weights(file).items()})
    model.load_state_dict({name: tensors[full] for name, full in find_tower_names(tensors).items()})
    return model.eval()


def source_tower(module: nn.Module) -> tuple[Any, str] | None:
    """Return the outermost part of a module that has the configuration of a known family, and the family."""
    for part in module.modules():
        kind = getattr(vars(part).get("config"), "model_type", None)
        if kind in SOURCES:
            return part, kind
        if any(cls.__module__.startswith("timm.") and cls.__name__ in TIMM_CLASSES for cls in type(part).__mro__):
            return part, "timm"
    return None


def read_module(module: nn.Module) -> ForeignModel:
    """Read a module of transformers or timm; wrappers of `torch.compile` and data parallelism are removed."""
    module = unwrapped(module)
    name, config = type(module).__name__, getattr(module, "config", None)
    state: dict[str, Any] = module.state_dict()
    _check_plain(state, f"The model ({name})")
    found = source_tower(module)
    if found is None and (kind := getattr(config, "model_type", None)):
        raise refusal(kind)
    if found is None:
        raise ConversionError(
            f"{name} is neither a plain ViT of transformers nor a VisionTransformer or Eva of timm. Pass its "
            "state_dict() if its tensors have the names of one of them."
        )
    tower, kind = found
    tensors = {key: value.detach() for key, value in state.items()}
    names = find_tower_names(tensors)
    if kind != "timm":
        own = {local: tensors[full] for local, full in names.items()}
        fields = transformers_fields(tower.config.to_dict(), own)
        processor = known_processor(module) if kind in FAMILIES else getattr(module, "image_processor", None)
        return ForeignModel(name, tensors, names, fields, lambda: module, processor)
    settings = dict(getattr(tower, "pretrained_cfg", None) or {})
    processor = getattr(module, "image_processor", None) or settings
    is_clip = re.search(r"clip|pe_core", str(settings.get("architecture")))
    projects = bool(is_clip) and "head.bias" in names and not tensors[names["head.bias"]].any()
    origin = ForeignModel(name, tensors, names, timm_fields(tower), lambda: module, processor or None)
    origin.rotation, origin.projects = timm_rotation(tower), projects
    return origin
