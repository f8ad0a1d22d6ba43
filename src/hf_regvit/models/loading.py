"""Open a model of any supported family by name; load and compare checkpoints of this package."""

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .conversion import convert
from .families import FAMILIES, describe_model, find_tower, unknown_family
from .modeling_regvit import (
    CheckpointCorruptError,
    RegViTBackbone,
    RegViTForDepthEstimation,
    RegViTForImageClassification,
    RegViTForSemanticSegmentation,
    RegViTModel,
    RegViTPreTrainedModel,
)
from .processing import _saved_processor, _timm_transform


def weights_fingerprint(model: nn.Module) -> str:
    """Return 32 hexadecimal digits that change with any weight of the vision tower or its dtype."""
    digest = hashlib.blake2b(digest_size=16)
    for key, tensor in sorted(find_tower(model)[0].state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """Return 32 hexadecimal digits that change with any weight or configuration field of the vision tower."""
    tower: Any = find_tower(model)[0]
    # timm models have no configuration; the text of their modules contains sizes, norms and epsilons.
    settings = tower.config.to_dict() if hasattr(tower, "config") else {"modules": repr(tower)}
    settings = {k: v for k, v in settings.items() if k not in ("_name_or_path", "transformers_version")}
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.blake2b((weights_fingerprint(model) + text).encode(), digest_size=16).hexdigest()


def load_model(name_or_path: str | Path, *, device: str | torch.device | None = None) -> tuple[nn.Module, Any]:
    """Load a model in eval mode and float32 together with its image processor (for timm, its transform).

    Args:
        name_or_path: Folder or Hub id of a transformers model, folder of a timm model, or `timm/NAME`.
        device: Device of the model; the CPU by default.

    Raises:
        FileNotFoundError: The folder or model does not exist.
        ValueError: The family is not in the table, or weights are missing.
    """
    source = str(name_or_path)
    local = Path(source, "config.json")
    is_folder = Path(source).is_dir()
    if is_folder and not local.is_file():
        raise FileNotFoundError(f"'{source}' has no config.json. Pass the folder that save_pretrained wrote.")
    written = _read_config(local) if is_folder else {}
    if source.startswith("timm/") or "architecture" in written:
        model: nn.Module = _load_timm(source, is_folder=is_folder)
    else:
        model = _load_transformers(source)
    model = model.eval().to(device or "cpu")
    return model, _timm_transform(model) if describe_model(model).is_timm else _saved_processor(model)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON or not UTF-8
        raise ValueError(f"'{path}' is not valid JSON ({error}). Correct it, or save the model again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"'{path}' holds a {type(config).__name__}, expected an object. Save the model again.")
    return config


def short_names(models: Sequence[str | Path]) -> list[str]:
    """Return Hub ids unchanged, and folders with only as many trailing parts as needed to distinguish them.

    The names appear in published reports, which must not show full paths.
    """
    folders = [Path(model).resolve() for model in models if Path(model).is_dir()]
    kept = next(count for count in range(1, 99) if len({path.parts[-count:] for path in folders}) == len(set(folders)))
    return ["/".join(Path(model).resolve().parts[-kept:]) if Path(model).is_dir() else str(model) for model in models]


def _load_timm(source: str, *, is_folder: bool) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"'{source}' is a timm model, and timm is not installed. Run: pip install timm") from error
    name = f"local-dir:{source}" if is_folder else f"hf-hub:{source}"
    try:
        # Allow any image size; at the native size the outputs are unchanged.
        model = timm.create_model(name, pretrained=True, dynamic_img_size=True)
    except TypeError as error:  # not a vision transformer, so dynamic_img_size is not accepted
        raise unknown_family(source) from error
    find_tower(model)
    return model


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Silence the loading report on unused weights, such as a text tower; missing weights are checked separately."""
    from transformers.utils import logging as library_logging

    level = library_logging.get_verbosity()
    library_logging.set_verbosity_error()
    try:
        yield
    finally:
        library_logging.set_verbosity(level)


def _load_transformers(source: str) -> nn.Module:
    import transformers

    from . import modeling_regvit

    if not Path(source).exists() and re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", source) is None:
        raise FileNotFoundError(f"'{source}' does not exist. Expected a folder, a Hub id 'owner/name' or timm/NAME.")
    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except OSError as error:
        raise FileNotFoundError(
            f"'{source}' is neither a folder nor a model that can be loaded from the Hub: {error}"
        ) from error
    # For models with two towers, only the vision tower is loaded.
    towers = {
        "clip": "CLIPVisionModel",
        "siglip": "SiglipVisionModel",
        "metaclip_2": "MetaClip2VisionModel",
        "aimv2": "Aimv2VisionModel",
    }
    if config.model_type not in (*FAMILIES, *towers, "timm_wrapper"):
        raise unknown_family(config.model_type)
    # Use the class that was saved: a backbone class would warn about a missing pooler that is not used here.
    name = towers.get(config.model_type) or next(iter(config.architectures or []), "AutoModel")
    library: Any = modeling_regvit if config.model_type == "regvit" else transformers
    model_class: Any = getattr(library, name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        model_class = transformers.AutoModel
    with _quiet_loading():
        model, info = model_class.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    tower, family = find_tower(model)
    path = next(name for name, module in model.named_modules() if module is tower)
    needed = {f"{path}.{key}".lstrip(".") for key in tower.state_dict()}
    read = (FAMILIES[family].blocks.split(".")[0], "embeddings", FAMILIES[family].final_norm)
    gaps = sorted(
        key
        for key in needed.intersection(info["missing_keys"])
        if key.removeprefix(f"{path}.").startswith(read) and not key.endswith("mask_token")
    )
    if gaps:
        raise ValueError(
            f"The weights of '{source}' lack {', '.join(gaps[:5])}{' and more' if len(gaps) > 5 else ''}, so the "
            "features would be random. Check that config.json and the weights belong together."
        )
    return model


MODEL_CLASSES: dict[str, Any] = {
    model_class.__name__: model_class
    for model_class in (
        RegViTModel, RegViTBackbone, RegViTForImageClassification, RegViTForSemanticSegmentation,
        RegViTForDepthEstimation,
    )
}  # fmt: skip


class BundleError(ValueError):
    """A model that cannot be bundled, or an invalid bundle. The message says what to do."""


def checkpoint_folder(folder: str | Path) -> Path:
    """Return the checkpoint folder: the folder itself, or its `backbone/` if it is a pretraining run.

    Raises:
        BundleError: The folder contains no RegViT checkpoint.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BundleError(f"'{folder}' is not a folder. Pass a checkpoint or the folder of a run.")
    for candidate in (folder, folder / "backbone"):
        if (candidate / "config.json").is_file():
            kind = _config_of(candidate).get("model_type")
            if kind != "regvit":
                raise BundleError(
                    f"'{candidate}' contains a model of type '{kind}', not a RegViT. Run `regvit convert --model "
                    f"{candidate} --output_dir ...` first."
                )
            return candidate
    raise BundleError(f"'{folder}' has no config.json, and neither has a backbone/ in it. Pass a finished checkpoint.")


def _config_of(folder: Path) -> dict[str, Any]:
    config = _json_of(folder / "config.json")
    if not isinstance(config, dict):
        raise BundleError(f"'{folder}/config.json' holds a {type(config).__name__}. Expected a JSON object.")
    return config


def load_checkpoint(folder: Path) -> Any:
    """Load the model of a folder with the class from which it was saved.

    Raises:
        BundleError: The model class is not a RegViT class.
        CheckpointCorruptError: The checksum of the weights differs from the one in manifest.json.
    """
    config = _config_of(folder)
    name = (config.get("architectures") or ["RegViTModel"])[0]
    if name not in MODEL_CLASSES:
        raise BundleError(f"'{folder}' was saved from {name}. Supported classes: {', '.join(MODEL_CLASSES)}.")
    _compare_with_manifest(folder)
    return MODEL_CLASSES[name].from_pretrained(folder).eval()


def _compare_with_manifest(folder: Path) -> None:
    """Compare the weights with the checksums of manifest.json, because a flipped bit loads without an error."""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        sums = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # no manifest, or a file of that name from another program
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            continue  # loading reports a missing file
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != expected:
            raise CheckpointCorruptError(
                f"The sha256 of '{path}' differs from '{folder}/manifest.json'. Use an intact copy, or remove the "
                "manifest if you changed the weights on purpose."
            )


def _json_of(path: Path) -> Any:
    """Return the content of a JSON file, or None if the file does not exist."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"'{path}' is not valid JSON ({error}).") from error


def _open(source: str | Path | nn.Module) -> Any:
    """Load the source as a RegViT, converted if needed."""
    if isinstance(source, nn.Module):
        return source if isinstance(source, RegViTPreTrainedModel) else convert(source)
    config = Path(source, "config.json")
    if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("model_type") == "regvit":
        return load_model(source)[0]
    return convert(source)


BACKBONE, TRAINING = "backbone", "training"


def _open_backbone(source: str, **changes: Any) -> RegViTModel:
    """Load a RegViT, or convert any other model to one; heads and poolers are dropped."""
    from transformers import PreTrainedConfig

    from .conversion import convert
    from .foreign_weights import check_source

    check_source(source)
    fields: dict[str, Any] = {}
    if not Path(source).is_file():
        fields, _ = PreTrainedConfig.get_config_dict(source)
    if fields.get("model_type") == "regvit":
        model: Any = RegViTModel.from_pretrained(source, use_mask_token=True, discard_registers=False)
    else:
        model = convert(source)
        model = getattr(model, "regvit", model)
    config = copy.deepcopy(model.config)
    if config.final_norm != "tokens":
        raise ValueError(
            f"'{source}' has final_norm='{config.final_norm}', but the losses need a final norm of each token "
            "(final_norm='tokens'). Start from a model that pools CLS."
        )
    changes |= {"use_mask_token": True, "discard_registers": False, "pooler_act": None}
    for name, value in changes.items():
        setattr(config, name, value)
    backbone = RegViTModel(config, add_pooling_layer=False)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("pooler.")}
    missing, unexpected = backbone.load_state_dict(state, strict=False)
    if set(missing) - {"embeddings.mask_token"} or unexpected:
        raise ValueError(
            f"'{source}' has missing tensors {missing} and unexpected tensors {unexpected}; expected a plain backbone."
        )
    if missing:
        nn.init.zeros_(cast(Tensor, backbone.embeddings.mask_token))
    # A loaded model is in eval mode, and its parameters may be frozen.
    return backbone.train().requires_grad_(True)


@torch.no_grad()
def fit_positions(backbone: RegViTModel, image_size: int, *, option: str) -> list[str]:
    """Resample the stored positions in place to the grid of square images, and describe the change, if any.

    Args:
        backbone: Backbone of any image size.
        image_size: Side of the images in pixels.
        option: Name of the option for the image size, for the error message.

    Raises:
        ValueError: If the side is not a multiple of the patch size.
    """
    config, embeddings = backbone.config, backbone.embeddings
    rows, columns = config.patch_shape
    if image_size % rows or image_size % columns:
        raise ValueError(
            f"{option} is {image_size}, but the patches of the model to start from have {rows} x {columns} pixels. "
            f"Set {option} to a multiple of the patch size."
        )
    grid, before = (image_size // rows, image_size // columns), config.grid
    if grid == before:
        return []
    prefix = embeddings.position_embeddings[:, : embeddings.num_position_prefix]
    table = torch.cat([prefix, embeddings.resample_positions(grid)], dim=1)
    embeddings.position_embeddings = nn.Parameter(table.contiguous())
    config.image_size = image_size
    embeddings.train(embeddings.training)  # clears resampled tables that are cached from the old one
    return [f"Its positions are resampled from {before[0]} x {before[1]} to {grid[0]} x {grid[1]} patches."]
