"""Open a model of any supported family: `open_model` for every source, `open_regvit` where a RegViT is needed."""

import copy
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from .conversion import convert
from .families import FAMILIES, find_tower, unknown_family
from .foreign_weights import check_source
from .modeling_regvit import (
    CheckpointCorruptError,
    CheckpointError,
    RegViTBackbone,
    RegViTForDepthEstimation,
    RegViTForImageClassification,
    RegViTForSemanticSegmentation,
    RegViTModel,
    RegViTPreTrainedModel,
)
from .processing import default_image_processor, unknown_processor
from .saving import read_json
from .tokens import TokenReader

logger = logging.getLogger(__name__)


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


# Models with two towers, of which only the vision tower is loaded.
_TWO_TOWERS = {
    "clip": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "metaclip_2": "MetaClip2VisionModel",
    "aimv2": "Aimv2VisionModel",
}
BACKBONE, TRAINING = "backbone", "training"  # folders in the folder of a pretraining run


def open_model(
    source: "TokenReader | nn.Module | str | Path",
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    processor: Any = None,
) -> TokenReader:
    """Open a model and return its reader.

    Args:
        source: Folder of a transformers or timm model, run folder (its `backbone/` is opened), bundle, weights file
            that `convert` can read, Hub id, `timm/NAME`, module, or reader. Models opened by name are in eval mode.
        device: Device of the model. "auto" is the first of cuda, mps, xpu and cpu that exists for a name; a module
            stays where it is unless another device is given, which moves it.
        dtype: Data type of the weights. Default: float32 for a name, unchanged for a module.
        processor: Image processor. Default: the model's own, see `known_processor`.

    Raises:
        FileNotFoundError: The source does not exist, or a folder has no checkpoint.
        CheckpointError: A file of the checkpoint cannot be read, weights are missing, or a checksum differs.
        ValueError: The family is not in the table, or the file of the image processor cannot be read.
        TypeError: `source` is of another type.

    Example:
    ```python
    >>> open_model("facebook/dinov2-small").embed(images).shape
    (2, 384)
    ```
    """
    if isinstance(source, TokenReader):
        reader = source if processor is None else TokenReader(source.model, processor)
    elif isinstance(source, nn.Module):
        reader = TokenReader(source, processor)
    elif isinstance(source, str | Path):
        model = _load(source).eval()
        device = choose_device(device)
        logger.info("'%s' runs on %s.", source, device)
        reader = TokenReader(model, processor)
        _ = reader.processor  # a damaged file is an error now, not at the first image
        dtype = dtype or torch.float32
    else:
        raise TypeError(
            f"source is a {type(source).__name__}, expected a folder, a Hub id, timm/NAME, a weights file, a module "
            "or a TokenReader. State dicts are read by convert."
        )
    reader.model.to(None if device == "auto" else device, dtype)
    return reader


def embed(
    model: "TokenReader | nn.Module | str | Path", images: Any, *, normalize: bool = False, batch_size: int = 32
) -> np.ndarray:
    """Return one vector per image, (n, D) float32, of a model given in any way; see `TokenReader.embed`."""
    return open_model(model).embed(images, normalize=normalize, batch_size=batch_size)


def patch_maps(
    model: "TokenReader | nn.Module | str | Path", images: Any, *, layer: int = -1, batch_size: int = 32
) -> np.ndarray:
    """Return the patches of one block, (n, rows, columns, D) float32; see `TokenReader.patch_maps`."""
    return open_model(model).patch_maps(images, layer=layer, batch_size=batch_size)


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """Return a device; "auto" is the first of cuda, mps, xpu and cpu that exists."""
    if device != "auto":
        return torch.device(device)
    available = {"cuda": torch.cuda, "mps": torch.backends.mps, "xpu": torch.xpu}
    return torch.device(next((name for name, kind in available.items() if kind.is_available()), "cpu"))


def open_regvit(source: "TokenReader | nn.Module | str | Path") -> Any:
    """Open a model as a RegViT on the CPU: with the class it was saved from, or converted.

    Args:
        source: As for `open_model`. A RegViT module is returned as it is.

    Returns:
        RegViT of any class. Its image processor is `known_processor(model)`.

    Raises:
        FileNotFoundError: The source does not exist, or a folder has no checkpoint.
        CheckpointError: A file of the checkpoint cannot be read, or does not fit.
        ConversionError: The source cannot be expressed as a RegViT.
    """
    if isinstance(source, TokenReader):
        source = source.model
    if isinstance(source, nn.Module):
        return source if isinstance(source, RegViTPreTrainedModel) else convert(source)
    if (folder := _folder_of(source)) is not None:
        source, kind = folder, read_config(folder).get("model_type")
    else:
        check_source(source)
        kind = None if Path(source).is_file() else _hub_config(str(source)).get("model_type")
    return _load_regvit(source) if kind == "regvit" else convert(source)


def load_model(name_or_path: str | Path, *, device: str | torch.device | None = None) -> tuple[nn.Module, Any]:
    """Load a model in eval mode and float32 together with its image processor, or the default one with a warning."""
    reader = open_model(name_or_path, device=device or "cpu")
    if reader.processor is None:
        logger.warning(
            "%s Using the default: shortest edge, center crop, ImageNet statistics.", unknown_processor(reader.model)
        )
    return reader.model, reader.processor or default_image_processor(reader.description.image_size)


# --- Sources ---


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
    path = folder / "config.json"
    try:
        config = read_json(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"'{path}' holds a {type(config).__name__}, expected an object. Save the model again.")
    return config


def _folder_of(source: str | Path) -> Path | None:
    """Return the checkpoint of a local folder; None for a Hub id or a file."""
    return find_checkpoint(source) if Path(source).is_dir() else None


def _hub_config(source: str) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    return PreTrainedConfig.get_config_dict(source)[0]


def _load(source: str | Path) -> nn.Module:
    """Load the model that a name stands for."""
    if Path(source).is_file():
        return convert(source)
    folder, written = _folder_of(source), {}
    if folder is not None:
        written = read_config(folder)
        _compare_with_manifest(folder)
    if "architecture" in written or (folder is None and str(source).startswith("timm/")):
        return _load_timm(str(folder or source), is_folder=folder is not None)
    if folder is not None and written.get("model_type") not in (*FAMILIES, *_TWO_TOWERS, "timm_wrapper"):
        raise unknown_family(str(written.get("model_type")))
    return _load_transformers(str(folder or source))


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
def quiet_transformers(level: int = logging.ERROR) -> Iterator[None]:
    """Silence reports of transformers below a level, such as that on the weights of an unused text tower."""
    from transformers.utils import logging as library_logging

    before = library_logging.get_verbosity()
    library_logging.set_verbosity(level)
    try:
        yield
    finally:
        library_logging.set_verbosity(before)


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
    if config.model_type not in (*FAMILIES, *_TWO_TOWERS, "timm_wrapper"):
        raise unknown_family(config.model_type)
    # Use the class that was saved: a backbone class would warn about a missing pooler that is not used here.
    name = _TWO_TOWERS.get(config.model_type) or next(iter(config.architectures or []), "AutoModel")
    library: Any = modeling_regvit if config.model_type == "regvit" else transformers
    model_class: Any = getattr(library, name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        model_class = transformers.AutoModel
    with quiet_transformers():  # missing weights are checked below
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
        raise CheckpointError(
            f"The weights of '{source}' lack {', '.join(gaps[:5])}{' and more' if len(gaps) > 5 else ''}, so the "
            "features would be random. Check that config.json and the weights belong together."
        )
    return model


# --- RegViT ---

MODEL_CLASSES: dict[str, Any] = {
    model_class.__name__: model_class
    for model_class in (
        RegViTModel, RegViTBackbone, RegViTForImageClassification, RegViTForSemanticSegmentation,
        RegViTForDepthEstimation,
    )
}  # fmt: skip

BundleError = CheckpointError  # the name under which the hub room knows it


def _load_regvit(source: str | Path) -> Any:
    config = read_config(Path(source)) if Path(source).is_dir() else _hub_config(str(source))
    saved = next(iter(config.get("architectures") or []), "RegViTModel")
    return MODEL_CLASSES.get(saved, RegViTModel).from_pretrained(source, dtype=torch.float32)


def checkpoint_folder(folder: str | Path) -> Path:
    """Return the RegViT checkpoint of a folder; see `find_checkpoint`.

    Raises:
        CheckpointError: The folder contains no RegViT checkpoint.
    """
    try:
        found = find_checkpoint(folder)
    except FileNotFoundError as error:
        raise CheckpointError(str(error)) from error
    kind = read_config(found).get("model_type")
    if kind != "regvit":
        raise CheckpointError(
            f"'{found}' contains a model of type '{kind}', not a RegViT. Run `regvit convert --model {found} "
            "--output_dir ...` first."
        )
    return found


def load_checkpoint(folder: Path) -> Any:
    """Load the RegViT of a folder with the class from which it was saved.

    Raises:
        CheckpointError: The model class is not a RegViT class.
        CheckpointCorruptError: The checksum of the weights differs from the one in manifest.json.
    """
    name = (read_config(folder).get("architectures") or ["RegViTModel"])[0]
    if name not in MODEL_CLASSES:
        raise CheckpointError(f"'{folder}' was saved from {name}. Supported classes: {', '.join(MODEL_CLASSES)}.")
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


_open = open_regvit


def _open_backbone(source: str, **changes: Any) -> RegViTModel:
    """Load a RegViT, or convert any other model to one; heads and poolers are dropped."""
    model: Any = open_regvit(source)
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
