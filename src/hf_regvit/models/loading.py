"""Open a model of any supported family: `open_model` for every source, `open_regvit` where a RegViT is needed."""

import copy
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

from .configuration_regvit import CheckpointError, check_finite, check_weight_files
from .conversion import convert
from .families import FAMILIES, find_tower, unknown_family
from .foreign_weights import check_config, check_source, first_line, import_timm, load_pretrained
from .manifest import check_weights
from .modeling_regvit import RegViTModel, RegViTPreTrainedModel
from .processing import require_rgb
from .saving import read_object
from .tokens import TokenReader

logger = logging.getLogger(__name__)


def weights_fingerprint(model: nn.Module) -> str:
    """Return 32 hexadecimal digits that change with any weight of the vision tower or its dtype."""
    digest = hashlib.blake2b(digest_size=16)
    for key, tensor in sorted(find_tower(model)[0].state_dict().items()):
        digest.update(key.encode())
        for part in _plain_tensors(tensor):
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain_tensors(tensor: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors inside a quantized one, which has no memory of its own."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(tensor, name))
    else:
        yield tensor


def _refuse_quantized(source: str | Path, config: Mapping[str, Any]) -> None:
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        raise CheckpointError(
            f"The weights of '{source}' are quantized ({method}). They can be read, e.g. by extract, evaluate and "
            "diagnose, but not trained, converted or published. Use the checkpoint from which they were made."
        )


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
        source: Model as for `open_model`. A RegViT module is returned as it is.

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
    source = _checked(source)
    config = {} if Path(source).is_file() else _config_of(source)
    _refuse_quantized(source, config)
    return _load(source) if config.get("model_type") == "regvit" else convert(source)


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
    try:
        config = read_object(folder / "config.json")
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    check_config(config, folder)
    return config


def _checked(source: str | Path) -> str:
    """Return the path of a file or checkpoint folder, or a Hub id; raise if the source is none of these."""
    check_source(source)
    return str(find_checkpoint(source) if Path(source).is_dir() else source)


def _config_of(source: str) -> dict[str, Any]:
    """Return the configuration of a checkpoint folder or Hub id."""
    from transformers import PreTrainedConfig

    if Path(source).is_dir():
        return read_config(Path(source))
    try:
        return PreTrainedConfig.get_config_dict(source)[0]
    except OSError as error:
        raise FileNotFoundError(
            f"'{source}' is neither a folder nor a model that can be loaded from the Hub: {error}"
        ) from error


def _load(source: str | Path) -> nn.Module:
    """Load the model that a name stands for."""
    source = _checked(source)
    if Path(source).is_file():
        return convert(source)
    if source.startswith("timm/") and not Path(source).is_dir():
        return _load_timm(f"hf-hub:{source}", source)
    config = _config_of(source)
    check_weights(Path(source))
    if "architecture" in config:
        return _load_timm(f"local-dir:{source}" if Path(source).is_dir() else f"hf-hub:{source}", source)
    return _load_transformers(source, config)


def short_names(models: Sequence[str | Path]) -> list[str]:
    """Return Hub ids unchanged, and folders with only as many trailing parts as needed to distinguish them.

    The names appear in published reports, which must not show full paths.
    """
    folders = [Path(model).resolve() for model in models if Path(model).is_dir()]
    kept = next(count for count in range(1, 99) if len({path.parts[-count:] for path in folders}) == len(set(folders)))
    return ["/".join(Path(model).resolve().parts[-kept:]) if Path(model).is_dir() else str(model) for model in models]


def distinct_names(models: Sequence["TokenReader | nn.Module | str | Path"]) -> list[str]:
    """Return a short name of each model; a number tells models of the same name apart.

    Raises:
        ValueError: A model is given twice.
    """
    keys = [str(model) if isinstance(model, str | Path) else model for model in models]
    if len(set(keys)) < len(keys):
        raise ValueError(f"models={[str(key)[:60] for key in keys]} names a model twice. Name each once.")
    short = iter(short_names([key for key in keys if isinstance(key, str)]))
    names = [next(short) if isinstance(key, str) else open_model(key).description.name for key in keys]
    counts = [names[:i].count(name) for i, name in enumerate(names)]
    return [f"{name}-{count + 1}" if count else name for name, count in zip(names, counts)]


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


def _saved_class(config: dict[str, Any]) -> Any:
    """Return the class that a model was saved from: a backbone class would warn about a pooler that is not used."""
    import transformers

    from . import modeling_regvit

    kind = config.get("model_type")
    name = _TWO_TOWERS.get(str(kind)) or next(iter(config.get("architectures") or []), "")
    found: Any = getattr(modeling_regvit if kind == "regvit" else transformers, name, None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else transformers.AutoModel


def _load_transformers(source: str, config: dict[str, Any]) -> nn.Module:
    if config.get("model_type") not in (*FAMILIES, *_TWO_TOWERS, "timm_wrapper"):
        raise unknown_family(str(config.get("model_type")))
    with quiet_transformers():  # missing weights are checked below
        options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
        model, info = load_pretrained(_saved_class(config), source, **options)
    check_finite(model.state_dict(), source)
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
    """Load the RegViT of a folder with the class and the data type in which it was saved.

    Raises:
        CheckpointError: The model class is not a RegViT class, or the weights are quantized.
        CheckpointCorruptError: The checksum of the weights differs from the one in manifest.json.
    """
    config = read_config(folder)
    _refuse_quantized(folder, config)
    saved_class = _saved_class(config)
    if config.get("architectures") and not issubclass(saved_class, RegViTPreTrainedModel):
        raise CheckpointError(f"'{folder}' was saved from {config['architectures'][0]}, which is not a RegViT class.")
    check_weights(folder)
    return load_pretrained(saved_class, folder).eval()


def open_backbone(source: str, **changes: Any) -> RegViTModel:
    """Open a model as the backbone of a pretraining run; heads and poolers are dropped.

    Args:
        source: Model as for `open_regvit`.
        changes: Fields of `RegViTConfig` to change.

    Raises:
        ValueError: The model normalizes only a pooled vector, or does not read 3 channels.
    """
    model = open_regvit(source)
    require_rgb(model)
    model = getattr(model, "regvit", model)
    if model.config.final_norm != "tokens":
        raise ValueError(
            f"'{source}' has final_norm='{model.config.final_norm}', but the losses need a final norm of each token "
            "(final_norm='tokens'). Start from a model that pools CLS."
        )
    config = copy.deepcopy(model.config)
    changes |= {"use_mask_token": True, "discard_registers": False, "pooler_act": None}
    for name, value in changes.items():
        setattr(config, name, value)
    backbone = RegViTModel(config, add_pooling_layer=False)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("pooler.")}
    state.setdefault("embeddings.mask_token", torch.zeros(1, config.hidden_size))
    backbone.load_state_dict(state)
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
    if embeddings.position_embeddings is None:
        config.image_size = image_size
        return []
    prefix = embeddings.position_embeddings[:, : config.num_position_prefix]
    table = torch.cat([prefix, embeddings.resample_positions(grid)], dim=1)
    embeddings.position_embeddings = nn.Parameter(table.contiguous())
    config.image_size = image_size
    embeddings.train(embeddings.training)  # clears resampled tables that are cached from the old one
    return [f"Its positions are resampled from {before[0]} x {before[1]} to {grid[0]} x {grid[1]} patches."]
