"""Open the models of other projects by name, and find the weights of their vision towers."""

import argparse
import logging
import math
import pickle
import re
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .configuration_regvit import (
    CheckpointCorruptError,
    CheckpointError,
    ConfigError,
    RegViTConfig,
    check_finite,
    check_weight_files,
    corrupt_weights,
)
from .families import FAMILIES, IN_PLACE, TIMM_CLASSES, find_tower, unknown_family, unwrapped
from .manifest import check_archive, check_weights
from .processing import ImageProcessor, default_image_processor, known_processor, saved_processor
from .saving import read_object
from .source_families import SOURCES, ConversionError, open_clip_fields, refusal, timm_fields, transformers_fields

logger = logging.getLogger(__name__)

# Errors that torch.load raises for text, such as the HTML page of a failed download, and for truncated files.
UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, struct.error,
)  # fmt: skip
# Errors of a wrong configuration; a width of 0 is an ArithmeticError.
_UNUSABLE = (StrictDataclassError, LookupError, TypeError, AttributeError, ValueError, ArithmeticError)
_WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl", ".npz")


BACKBONE = "backbone"  # folder in the folder of a pretraining run
# Models with two towers, of which only the vision tower is loaded.
_TOWER_CLASSES = {
    "clip": "CLIPVisionModel", "siglip": "SiglipVisionModel", "metaclip_2": "MetaClip2VisionModel",
    "tipsv2": "Tipsv2VisionModel", "aimv2": "Aimv2VisionModel",
}  # fmt: skip
_LOADED = {*FAMILIES, *SOURCES, *_TOWER_CLASSES, "timm_wrapper"}


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
    processor: ImageProcessor | dict[str, Any] | None = None
    rotation: tuple[bool, bool] = (False, False)
    is_official: bool = False
    projects: bool = False

    @property
    def own(self) -> dict[str, Tensor]:
        """Tensors of the tower by their names without its prefix."""
        return {name: self.tensors[full] for name, full in self.names.items()}

    def image_processor(self, config: RegViTConfig) -> ImageProcessor | None:
        """Return the image processor of the source for the converted model, or None if none is known."""
        if self.processor is None and self.is_official:
            return default_image_processor(config.image_shape)
        return _timm_processor(config, self.processor) if isinstance(self.processor, dict) else self.processor


def _timm_processor(config: RegViTConfig, settings: dict[str, Any]) -> BaseImageProcessor:
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
    except UNREADABLE as error:
        raise refused_pickle(path, error) from error
    if not isinstance(loaded, dict):
        raise CheckpointCorruptError(
            f"'{path}' holds a {type(loaded).__name__}, expected a dict of tensors. Save a state dict instead."
        )
    return loaded


_TRUSTED = "If you trust the file, load it in a separate process and save its tensors as safetensors."


def refused_pickle(source: str | Path, error: BaseException, *, advice: str = _TRUSTED) -> CheckpointCorruptError:
    """Create the error for a pickle that is not a plain file of tensors, without torch's advice to unpickle anyway."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    reason = f"it needs {refused[1]}" if refused else type(error).__name__
    return CheckpointCorruptError(
        f"'{source}' is not a plain file of tensors ({reason}). hf_regvit never runs code from a checkpoint. {advice}"
    )


def check_config(config: Mapping[str, Any], source: str | Path) -> None:
    """Check the fields of a configuration that decide which code runs.

    Raises:
        CheckpointError: The model classes are not a list of names, the quantization is not an object, or the attention
            is a kernel of the Hub.
    """
    classes = config.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(
            f"The config.json of '{source}' has architectures={str(classes)[:80]}, expected a list of class names."
        )
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping | None):
        raise CheckpointError(
            f"The config.json of '{source}' has quantization_config={str(quantization)[:80]!r}, expected an object. "
            "Correct the file, or download it again."
        )
    for name in ("attn_implementation", "_attn_implementation"):
        attention = config.get(name)
        if attention not in (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"):
            raise CheckpointError(
                f"The config.json of '{source}' has {name}={str(attention)[:80]!r}, which could load code from the "
                "Hub. Remove this field."
            )


def load_pretrained(model_class: type[Any], source: str | Path, **options: Any) -> Any:
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


def read_state(name: str, checkpoint: dict[str, Any], architecture: str | None = None, **options: Any) -> ForeignModel:
    """Read a state dict or a training checkpoint; what the shapes do not tell is left to the caller.

    Args:
        name: Name for messages.
        checkpoint: State dict or training checkpoint.
        architecture: Name of the model in timm, which tells everything.
        options: Arguments of `timm.create_model`.
    """
    tensors = find_tensors(checkpoint)
    names = find_tower_names(tensors)
    fields: dict[str, Any] = {}
    own = {local: tensors[full] for local, full in names.items()}
    if architecture is not None:
        origin = read_module(_load_into_timm(name, own, architecture, options))
        origin.name, origin.tensors, origin.names = name, tensors, names
        return origin
    if "rope_embed.periods" in own:  # DINOv3
        fields |= _official_rotation(own["rope_embed.periods"], own["cls_token"].shape[-1])
        fields["key_bias"] = not any(local.endswith(".bias_mask") for local in names)
    is_eva = {"blocks.0.attn.q_bias", "blocks.0.attn.q_proj.weight", "blocks.0.gamma_1"} & names.keys()
    has_positions = {"pos_embed", "rope_embed.periods"} & names.keys() or "patch_embed.proj.weight" not in names
    if is_eva or not has_positions or {"attn_pool.q.weight", "cls_token"} <= names.keys():
        raise ConversionError(
            f"'{name}' has the names of an Eva of timm, whose rotary positions are not in its tensors. Give the name "
            "of the model with architecture (--architecture), e.g. 'eva02_base_patch14_224'."
        )
    if "class_embedding" in names:  # OpenCLIP
        fields |= {"layer_norm_eps": 1e-5, "interpolate_antialias": True, "interpolate_offset": 0.0}
    if "pre_layrnorm.weight" in names:
        fields |= {"final_norm": "cls", "layer_norm_eps": 1e-5}
    is_official = bool({"register_tokens", "storage_tokens", "mask_token"} & names.keys())
    return ForeignModel(name, tensors, names, fields, is_official=is_official)


def _load_into_timm(name: str, tensors: dict[str, Tensor], architecture: str, options: dict[str, Any]) -> nn.Module:
    """Return the model of timm from which a state dict was saved."""
    known = architecture.removeprefix("timm/")
    options = {"num_classes": len(tensors.get("head.weight", ())), "dynamic_img_size": True, **options}
    try:
        if not re.fullmatch(r"[\w.]+", known):  # timm would open a repository or a folder
            raise RuntimeError(f"Unknown model ({architecture})")
        model = import_timm(name).create_model(known, **options)
        model.load_state_dict(tensors)
    except TypeError as error:  # not a vision transformer, so dynamic_img_size is not accepted
        raise refusal(architecture) from error
    except (RuntimeError, AssertionError) as error:
        raise ConversionError(
            f"'{name}' is not a state dict of the timm model architecture='{architecture}': "
            f"{' '.join(str(error).split())[:200]}. Give the name with which timm created the model."
        ) from error
    return model.eval()


OPEN_CLIP_CONFIG = "open_clip_config.json"


def has_no_config(source: str | Path) -> bool:
    """Return True for weights that only `convert` can open: a file, or a folder of OpenCLIP."""
    path = Path(source)
    return path.is_file() or ((path / OPEN_CLIP_CONFIG).is_file() and not (path / "config.json").is_file())


def read_open_clip(folder: Path) -> ForeignModel:
    """Read the vision tower of a folder of OpenCLIP: one of its own, or one of timm."""
    config, weights = read_object(folder / OPEN_CLIP_CONFIG), folder / "open_clip_model.safetensors"
    weights = weights if weights.is_file() else folder / "open_clip_pytorch_model.bin"
    try:
        model, settings = config["model_cfg"], {"resize_mode": "shortest", **config.get("preprocess_cfg", {})}
        vision, checkpoint = model["vision_cfg"], read_weights(weights)
        if architecture := vision.get("timm_model_name"):
            projection, pool = vision.get("timm_proj", "linear"), vision.get("timm_pool", "avg")
            if projection == "mlp":
                raise ConversionError(f"'{folder}' has timm_proj='mlp', which RegViT cannot express.")
            options = {"global_pool": pool} | ({"num_classes": 0} if projection else {})
            origin = read_state(str(folder), checkpoint, architecture, **options)
            if (beside := "visual.head.proj.weight") in origin.tensors:
                origin.names["visual_projection.weight"] = beside
        else:
            origin = read_state(str(folder), checkpoint)
            origin.fields |= open_clip_fields(model)
    except (FileNotFoundError, LookupError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ConversionError(
            f"'{folder}' is not a folder of OpenCLIP with valid {OPEN_CLIP_CONFIG} and {weights.name} ({error!r}). "
            "Download it again."
        ) from error
    mode = "center" if settings["resize_mode"] == "shortest" else settings["resize_mode"]
    defaults = {"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD, "crop_pct": 1.0, "crop_mode": mode}
    origin.processor = defaults | settings
    return origin


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
    plain = [tensor for tensor in tensors.values() if type(tensor) in (Tensor, nn.Parameter)]
    if len(plain) < len(tensors) or not any(tensor.is_floating_point() for tensor in plain):
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
    prefixes = [name[: match.start()] for name in plain if (match := _ANCHOR.search(name))]
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


def open_source(source: str | Path | nn.Module | dict[str, Any], architecture: str | None) -> ForeignModel:
    """Open the source of a conversion; `architecture` is the name of the model in timm of a raw state dict."""
    name = "state dict"
    if not isinstance(source, nn.Module | dict):
        source = local_path(source)
        if source.is_file():
            name, source = str(source), read_weights(source)
    if isinstance(source, dict):
        return read_state(name, source, architecture)
    if architecture is not None:
        raise TypeError(f"architecture='{architecture}' is for raw state dicts only. This source names its own.")
    if isinstance(source, nn.Module):
        return read_module(source)
    return read_open_clip(source) if has_no_config(source) else read_folder(find_checkpoint(source))


def read_folder(folder: Path) -> ForeignModel:
    """Read a folder of transformers or timm."""
    config = read_config(folder)
    kind = config.get("model_type")
    if not isinstance(kind, str) and "architecture" not in config:
        raise ConversionError(
            f"'{folder / 'config.json'}' names neither a model_type (transformers) nor an architecture (timm). Pass "
            "the folder that save_pretrained wrote, or the weights file itself together with config overrides."
        )
    refuse_quantized(folder, config)
    if kind and kind not in _LOADED and not isinstance(config.get("vision_config"), dict):
        raise refusal(kind)
    module, missing = load_module(str(folder), config, whole=True)
    origin = read_module(module.eval(), missing)
    origin.name = str(folder)
    origin.processor = saved_processor(folder) or origin.processor
    return origin


def refuse_quantized(source: str | Path, config: Mapping[str, Any]) -> None:
    """Raise a `CheckpointError` if the weights are quantized: they can be read, but not changed."""
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        raise CheckpointError(
            f"The weights of '{source}' are quantized ({method}). They can be read, e.g. by extract, evaluate and "
            "diagnose, but not trained, converted or published. Use the checkpoint from which they were made."
        )


def find_checkpoint(folder: str | Path) -> Path:
    """Return the checkpoint of a folder: the folder itself, or its `backbone/` if it is a pretraining run.

    Raises:
        FileNotFoundError: The folder does not exist or has no checkpoint.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"'{folder}' is not a folder. Pass a checkpoint or the folder of a run.")
    for candidate in (folder, folder / BACKBONE):
        if (candidate / "config.json").is_file():
            return candidate
    raise FileNotFoundError(
        f"'{folder}' has no config.json, and neither has a {BACKBONE}/ in it. Pass the folder that save_pretrained "
        "wrote, or the folder of a finished run."
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of the `config.json` of a folder.

    Raises:
        CheckpointError: The file is not a JSON object.
    """
    try:
        config = read_object(folder / "config.json")
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    check_config(config, folder)
    return config


def checked_source(source: str | Path) -> str:
    """Return the path of a file or checkpoint folder, or a Hub id; raise if the source is none of these."""
    check_source(source)
    return str(find_checkpoint(source) if Path(source).is_dir() and not has_no_config(source) else source)


def config_of(source: str) -> dict[str, Any]:
    """Return the configuration of a checkpoint folder or Hub id."""
    from transformers import PreTrainedConfig

    if Path(source).is_dir():
        return read_config(Path(source))
    if source.startswith("timm/"):
        return {"architecture": source}
    try:
        return PreTrainedConfig.get_config_dict(source)[0]
    except OSError as error:
        raise FileNotFoundError(
            f"'{source}' is neither a folder nor a model that can be loaded from the Hub: {error}"
        ) from error


def load_module(source: str, config: dict[str, Any], *, whole: bool = False) -> tuple[nn.Module, set[str]]:
    """Load the model of a folder or Hub id, and return the names of the parameters that its weights lack, too.

    Args:
        source: Folder or Hub id.
        config: Its configuration.
        whole: True to load the text tower too, and to keep the data type of the weights; False for float32.

    Raises:
        CheckpointError: The weights cannot be read, or a part of the vision tower is missing.
        ValueError: The family of the model is not known.
    """
    is_folder = Path(source).is_dir()
    if is_folder:
        check_weights(Path(source))
    if "architecture" in config and config.get("model_type") in (None, "timm_wrapper"):
        found = _load_timm(f"local-dir:{source}" if is_folder else f"hf-hub:{source}", source), set[str]()
    else:
        found = _load_transformers(source, config, whole)
    # The loaders check a folder before they read it; the files of a Hub id are known only after the download.
    if not is_folder and isinstance(file := try_to_load_from_cache(source, "config.json"), str):
        check_weight_files(Path(file).parent)
    return found


def _load_timm(name: str, source: str) -> nn.Module:
    try:
        check_weight_files(source)
        # Allow any image size; at the native size the outputs are unchanged.
        model = import_timm(source).create_model(name, pretrained=True, dynamic_img_size=True)
    except TypeError as error:  # not a vision transformer, so dynamic_img_size is not accepted
        raise unknown_family(source) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        kind = CheckpointError if Path(source).is_dir() else FileNotFoundError
        raise kind(f"'{source}' cannot be loaded by timm ({reason}). Check the name, or download it again.") from error
    check_finite(model.state_dict(), source)
    find_tower(model)
    return model


@contextmanager
def quiet_transformers(level: int = logging.ERROR) -> Iterator[None]:
    """Silence reports of transformers below a level, such as that on the weights of an unused text tower."""
    from transformers.utils import logging as library_logging

    before = library_logging.get_verbosity()
    library_logging.set_verbosity(level)
    try:
        yield
    finally:
        library_logging.set_verbosity(before)


def saved_class(config: dict[str, Any], *, whole: bool = False) -> type[Any]:
    """Return the class that a model was saved from: a backbone class would warn about a pooler that is not used."""
    import transformers

    from . import modeling_regvit

    kind = config.get("model_type")
    name = ("" if whole else _TOWER_CLASSES.get(str(kind))) or next(iter(config.get("architectures") or []), "")
    found = getattr(modeling_regvit if kind == "regvit" else transformers, name, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    return transformers.AutoModel


def _load_transformers(source: str, config: dict[str, Any], whole: bool) -> tuple[nn.Module, set[str]]:
    vision = config.get("vision_config")
    if not {str(config.get("model_type")), isinstance(vision, dict) and str(vision.get("model_type"))} & _LOADED:
        raise unknown_family(str(config.get("model_type")))
    with quiet_transformers():  # missing weights are checked below
        options: dict[str, Any] = {"dtype": "auto" if whole else torch.float32, "output_loading_info": True}
        model, info = load_pretrained(saved_class(config, whole=whole), source, **options)
    check_finite(model.state_dict(), source)
    tower, _ = find_tower(model)
    path = next(name for name, module in model.named_modules() if module is tower)
    heads = re.compile(r"mask_token|pooler\.|head\.|classifier\.")  # no features depend on them
    gaps = sorted(key for key in info["missing_keys"] if key.startswith(path) and not heads.search(key))
    if gaps:
        raise CheckpointError(
            f"The weights of '{source}' lack {', '.join(gaps[:5])}{' and more' if len(gaps) > 5 else ''}, so the "
            "features would be random. Check that config.json and the weights belong together."
        )
    return model, set(info["missing_keys"])


def import_timm(source: str | Path) -> ModuleType:
    """Import timm for a model, or raise with the line that installs it."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"'{source}' is a timm model, and timm is not installed. Run: pip install 'hf_regvit[timm]'"
        ) from error
    return timm


def read_module(module: nn.Module, missing: Collection[str] = ()) -> ForeignModel:
    """Read a module of transformers or timm; wrappers of `torch.compile` and data parallelism are removed.

    Args:
        module: Module that is a vision tower or has one.
        missing: Names of parameters that are random, because the weights of the model lack them.
    """
    module = unwrapped(module)
    name, config = type(module).__name__, getattr(module, "config", None)
    state: dict[str, Any] = module.state_dict()
    _check_plain(state, f"The model ({name})")
    try:
        tower: Any
        tower, kind = find_tower(module)
    except ValueError as error:
        raise refusal(getattr(config, "model_type", name)) from error
    if kind == "regvit":
        raise ConversionError("The model is already a RegViT. Load it with AutoModel.from_pretrained.")
    if any(IN_PLACE in vars(part) for part in tower.modules()):
        raise ConversionError("The model has test-time registers in place. Call undo() of the repair first.")
    is_timm = kind in TIMM_CLASSES.values()
    if kind not in SOURCES and not is_timm:
        raise refusal(kind)
    tensors = {key: value.detach() for key, value in state.items() if key not in missing}
    names = find_tower_names(tensors)
    if not is_timm:
        own = {local: tensors[full] for local, full in names.items()}
        fields = transformers_fields(tower.config.to_dict(), own)
        return ForeignModel(name, tensors, names, fields, lambda: module, known_processor(module))
    settings = dict(getattr(tower, "pretrained_cfg", None) or {})
    processor = getattr(module, "image_processor", None) or settings
    is_clip = re.search(r"clip|pe_core", str(settings.get("architecture")))
    projects = bool(is_clip) and "head.bias" in names and not tensors[names["head.bias"]].any()
    fields, rotation = timm_fields(tower)
    origin = ForeignModel(name, tensors, names, fields, lambda: module, processor or None, rotation)
    origin.projects = projects
    return origin
