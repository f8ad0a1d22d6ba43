"""Open a model of any supported family: `open_model` for every source, `open_regvit` where a RegViT is needed."""

import copy
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .configuration_regvit import CheckpointError
from .conversion import convert
from .families import find_tower
from .foreign_weights import (
    checked_source,
    config_of,
    find_checkpoint,
    has_no_config,
    load_module,
    load_pretrained,
    read_config,
    refuse_quantized,
    saved_class,
)
from .manifest import check_weights
from .modeling_regvit import RegViTModel, RegViTPreTrainedModel
from .processing import ImageProcessor, known_processor, require_rgb
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


def _plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensors inside a quantized one, which has no memory of its own."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(tensor, name))
    else:
        yield tensor


def model_fingerprint(model: nn.Module) -> str:
    """Return 32 hexadecimal digits that change with any weight or configuration field of the vision tower."""
    tower = find_tower(model)[0]
    config = getattr(tower, "config", None)
    # timm models have no configuration; the text of their modules contains sizes, norms and epsilons.
    settings = {"modules": repr(tower)} if config is None else config.to_dict()
    settings = {k: v for k, v in settings.items() if k not in ("_name_or_path", "transformers_version")}
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.blake2b((weights_fingerprint(model) + text).encode(), digest_size=16).hexdigest()


TRAINING = "training"  # folder in the folder of a pretraining run, beside BACKBONE


def open_model(
    source: "TokenReader | nn.Module | str | Path",
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    processor: ImageProcessor | None = None,
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
        named = checked_source(source)
        model = convert(named) if has_no_config(named) else load_module(named, config_of(named))[0].eval()
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
    model: "TokenReader | nn.Module | str | Path", images: object, *, normalize: bool = False, batch_size: int = 32
) -> np.ndarray:
    """Return one vector per image, (n, D) float32, of a model given in any way; see `TokenReader.embed`."""
    return open_model(model).embed(images, normalize=normalize, batch_size=batch_size)


def choose_device(device: str | torch.device) -> torch.device:
    """Return a device; "auto" is the first of cuda, mps, xpu and cpu that exists."""
    if device != "auto":
        return torch.device(device)
    available = {"cuda": torch.cuda, "mps": torch.backends.mps, "xpu": torch.xpu}
    return torch.device(next((name for name, kind in available.items() if kind.is_available()), "cpu"))


def open_regvit(source: "TokenReader | nn.Module | str | Path") -> RegViTPreTrainedModel:
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
    named = checked_source(source)
    config = {} if has_no_config(named) else config_of(named)
    refuse_quantized(named, config)
    if config.get("model_type") != "regvit":
        return convert(named)
    model = load_module(named, config)[0]
    assert isinstance(model, RegViTPreTrainedModel)
    return model


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


def load_checkpoint(folder: Path) -> RegViTPreTrainedModel:
    """Load the RegViT of a folder with the class and the data type in which it was saved.

    Raises:
        CheckpointError: The model class is not a RegViT class, or the weights are quantized.
        CheckpointCorruptError: The checksum of the weights differs from the one in manifest.json.
    """
    config = read_config(folder)
    refuse_quantized(folder, config)
    model_class = saved_class(config)
    if config.get("architectures") and not issubclass(model_class, RegViTPreTrainedModel):
        raise CheckpointError(f"'{folder}' was saved from {config['architectures'][0]}, which is not a RegViT class.")
    check_weights(folder)
    return load_pretrained(model_class, folder).eval()


def open_backbone(source: str, **changes: Any) -> RegViTModel:
    """Open a model as the backbone of a pretraining run; heads and poolers are dropped, its image processor is kept.

    Args:
        source: Model as for `open_regvit`.
        changes: Fields of `RegViTConfig` to change. By default it gets a mask token.

    Raises:
        ValueError: The model normalizes only a pooled vector, or does not read 3 channels.
    """
    model = open_regvit(source)
    require_rgb(model)
    processor = known_processor(model)  # of a converted classifier, not of its backbone
    model = getattr(model, "regvit", model)
    if model.config.final_norm in ("pooled", "none"):
        raise ValueError(
            f"'{source}' has final_norm='{model.config.final_norm}', but the losses need a final norm of each token "
            "(final_norm='tokens'). Start from a model that pools CLS."
        )
    config = copy.deepcopy(model.config)
    changes = {"use_mask_token": True, **changes}
    changes |= {"discard_registers": False, "pooler_act": None, "attention_pooler": False}
    changes |= {"pooler_num_heads": None, "pooler_intermediate_size": None, "projection_dim": None}
    changes["final_norm"] = "tokens"  # the norm of CLS in CLIP models also serves the patches
    for name, value in changes.items():
        setattr(config, name, value)
    backbone = RegViTModel(config, add_pooling_layer=False)
    state = model.state_dict()
    state.setdefault("embeddings.mask_token", torch.zeros(1, config.hidden_size))
    backbone.load_state_dict({name: state[name] for name in backbone.state_dict()})  # no poolers
    backbone.image_processor = processor
    # A loaded model is in eval mode, and its parameters may be frozen.
    return backbone.train().requires_grad_(True)


@torch.no_grad()
def fit_positions(backbone: RegViTModel, image_size: int | tuple[int, int], *, option: str) -> list[str]:
    """Resample the stored positions in place to the grid of images of one size, and describe the change, if any.

    Args:
        backbone: Backbone of any image size.
        image_size: Side of square images in pixels, or height and width.
        option: Name of the option for the image size, for the error message.

    Raises:
        ValueError: If a side is not a multiple of the patch size.
    """
    config, embeddings = backbone.config, backbone.embeddings
    rows, columns = config.patch_shape
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height % rows or width % columns:
        sides = (
            [(height, math.lcm(rows, columns))] if isinstance(image_size, int) else [(height, rows), (width, columns)]
        )
        given = " x ".join(str(side) for side, _ in sides)
        nearest = " x ".join(str(max(1, round(side / patch)) * patch) for side, patch in sides)
        raise ValueError(
            f"{option} is {given}, but the patches of the model have {rows} x {columns} pixels. Set "
            f"{option} to a multiple of the patch size, such as {nearest}."
        )
    grid, before = (height // rows, width // columns), config.grid
    if grid == before:
        return []
    changes = []
    if embeddings.position_embeddings is not None:
        prefix = embeddings.position_embeddings[:, : config.num_position_prefix]
        table = torch.cat([prefix, embeddings.resample_positions(grid)], dim=1)
        embeddings.position_embeddings = nn.Parameter(table.contiguous())
        embeddings.train(embeddings.training)  # clears resampled tables that are cached from the old one
        changes.append(f"Its positions are resampled from {before[0]} x {before[1]} to {grid[0]} x {grid[1]} patches.")
    config.image_size = image_size if isinstance(image_size, int) else list(image_size)
    return changes
