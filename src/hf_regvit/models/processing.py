"""Image processors and the evaluation transform."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor

from ..data.decoding import open_image
from .families import FAMILIES, describe_model, find_tower

if TYPE_CHECKING:
    from transformers import BitImageProcessor, DPTImageProcessor

logger = logging.getLogger(__name__)


_LONGEST_SIDE = 9459  # the square of it is `ImageLimits.max_pixels`


class UnknownProcessorError(ValueError):
    """Raised for a model whose image processor is not known; the message says how to give one."""


# --- Images in ---

_IMAGES = (
    "Pillow images, paths, arrays (height, width, 3 or 1), tensors (3 or 1, height, width), or records with an "
    "`image`; arrays and tensors hold uint8, or floats in [0, 1]"
)


def open_images(images: object) -> Iterator[Image.Image]:
    """Yield upright RGB images one at a time, from one image or a sequence of images.

    Args:
        images: Pillow images, paths, arrays (H, W, 3 or 1), tensors (3 or 1, H, W), or records with an `image` such as
            those of an `ImageSource`. Arrays and tensors hold uint8, or floats in [0, 1]; a batch with one more
            dimension is a sequence.

    Raises:
        TypeError: An entry is not an image.
        ValueError: There is no image, or an array has values outside [0, 1].
        BadImageError: An image cannot be decoded.
    """
    single = isinstance(images, str | Path | Image.Image) or hasattr(images, "image")
    if single or (isinstance(images, np.ndarray | torch.Tensor) and images.ndim in (2, 3)):
        images = [images]
    if isinstance(images, Mapping | bytes) or not hasattr(images, "__getitem__") or not hasattr(images, "__len__"):
        raise TypeError(f"images is a {type(images).__name__}, expected one image or a sequence of {_IMAGES}.")
    if not len(images):
        raise ValueError("images is empty. Give at least one image.")
    for index in range(len(images)):
        yield _open_one(images[index], index)


def _open_one(image: object, index: int) -> Image.Image:
    image = getattr(image, "image", image)
    if isinstance(image, str | Path):
        if Path(image).is_dir():
            raise TypeError(f"'{image}' is a folder, expected an image. Pass load_images('{image}') instead.")
        return open_image(image)
    if isinstance(image, np.ndarray | torch.Tensor):
        image = _from_values(image, index)
    if not isinstance(image, Image.Image):
        raise TypeError(f"Image {index} is a {type(image).__name__}, expected one of {_IMAGES}.")
    return open_image(image, name=f"image {index}")


def _from_values(values: np.ndarray | torch.Tensor, index: int) -> Image.Image:
    """Create an image from an array (H, W, 3 or 1) or a tensor (3 or 1, H, W)."""
    given = f"a {type(values).__name__} of shape {tuple(values.shape)} and dtype {values.dtype}"
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().movedim(0, -1)
        array = (values.float() if values.is_floating_point() else values).numpy()
    else:
        array = values
    is_float = array.dtype.kind == "f"
    if array.ndim != 3 or array.shape[2] not in (1, 3) or not (is_float or array.dtype == np.uint8):
        raise TypeError(f"Image {index} is {given}, expected one of {_IMAGES}.")
    if is_float and not (array.min() >= 0 and array.max() <= 1):
        raise ValueError(
            f"Image {index} has values from {array.min():g} to {array.max():g}, expected floats in [0, 1] or uint8. "
            "Pixels that are already normalized are read with reader.read(pixel_values)."
        )
    levels = np.rint(array * 255).astype(np.uint8) if is_float else array
    return Image.fromarray(levels.squeeze(2) if levels.shape[2] == 1 else levels)


@dataclass(frozen=True)
class EvaluationTransform:
    """Transform from an image to a model's input pixels (3, H, W), and back to a viewable image.

    Args:
        apply: Function from an RGB image to normalized pixels.
        mean: Mean of the normalization per channel, for pixels in [0, 1].
        std: Standard deviation of the normalization per channel, for pixels in [0, 1].
        description: Text that identifies the transform; it changes whenever the transform does.
    """

    apply: Callable[[Image.Image], torch.Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    description: str

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, 3):
                raise ValueError(
                    f"The image processor has a {name} of {len(values)} channels, {list(values)}, expected 3. Correct "
                    "its file, or pass processor=..."
                )

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return the normalized pixels (3, H, W), float32."""
        return self.apply(image)

    def picture(self, pixel_values: torch.Tensor) -> Image.Image:
        """Convert pixels (3, H, W) back to an image that shows the region the model saw."""
        mean, std = torch.tensor(self.mean)[:, None, None], torch.tensor(self.std)[:, None, None]
        levels = (pixel_values.float().cpu() * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
        return Image.fromarray(levels.permute(1, 2, 0).numpy())

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        processor: "ImageProcessor | None" = None,
        *,
        image_size: int | None = None,
        keep_aspect: bool = False,
    ) -> "EvaluationTransform":
        """Create the transform of a model's own preprocessing.

        Without `image_size` and `keep_aspect`, it does exactly what the image processor or the timm data config does;
        most of them squash or crop to a fixed square. Otherwise, only their mean and standard deviation are used.

        Args:
            model: Model of a family in `FAMILIES`.
            processor: Image processor, or a transform of this class, such as that of a timm model. Default: the
                model's own, see `known_processor`.
            image_size: Side of a square center crop in pixels; the shortest edge is first resized to 256/224 of it.
            keep_aspect: Whether to use the whole image instead of a crop, with a shorter side of about `image_size`
                (default: the model's own size) and both sides rounded to whole patches. Image sizes then differ.

        Raises:
            UnknownProcessorError: No processor is given and none is known.
            ValueError: The model does not read 3 channels.
        """
        require_rgb(model)
        description = describe_model(model)
        if processor is None and (processor := known_processor(model)) is None:
            raise unknown_processor(model)
        mean, std = statistics_of(processor)
        if keep_aspect:
            side = image_size or min(description.image_size)
            apply: Callable = partial(_whole_image, side=side, patch=description.patch_size, mean=mean, std=std)
            return cls(apply, mean, std, f"whole image, shorter side {side}, mean {mean}, std {std}")
        if image_size is not None:
            processor = default_image_processor(image_size)
            processor.image_mean, processor.image_std = list(mean), list(std)
        if isinstance(processor, EvaluationTransform):
            return processor
        return cls(partial(_process, processor), mean, std, processor.to_json_string())


ImageProcessor = BaseImageProcessor | EvaluationTransform  # of transformers, or the transform of a timm model


def statistics_of(processor: ImageProcessor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation per channel that a processor normalizes pixels in [0, 1] with."""
    if isinstance(processor, EvaluationTransform):
        return processor.mean, processor.std
    fields: Any = processor  # its base class does not declare them
    if not getattr(fields, "do_normalize", True):  # the statistics are unused and may be None
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return tuple(fields.image_mean), tuple(fields.image_std)


def require_rgb(model: nn.Module) -> None:
    """Raise unless the model reads 3 channels, because images are opened as RGB.

    Raises:
        ValueError: The model reads another number of channels.
    """
    tower, family = find_tower(model)
    projection: Any = tower.get_submodule(FAMILIES[family].patch_projection)
    if (channels := projection.weight.shape[1]) != 3:
        raise ValueError(
            f"{describe_model(model).name} reads {channels} channels, but images are opened as RGB, with 3 channels. "
            "Commands and functions that open images cannot use it. From Python, pass your own pixels (batch, "
            f"{channels}, height, width) to the model, to open_model(source).read or to read_tokens."
        )


def _process(processor: BaseImageProcessor, image: Image.Image) -> torch.Tensor:
    pixel_values = processor(images=image, return_tensors="pt")["pixel_values"]
    if pixel_values.ndim != 4 or len(pixel_values) != 1:
        raise ValueError(
            f"{type(processor).__name__} returns pixel_values of shape {tuple(pixel_values.shape)} for one image, "
            "expected (1, 3, height, width). Pass a processor that returns one output per image."
        )
    return pixel_values[0]


def _whole_image(
    image: Image.Image, *, side: int, patch: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    scale = side / min(image.size)
    height, width = (
        max(1, round(length * scale / step)) * step for length, step in zip((image.height, image.width), patch)
    )
    resized = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BICUBIC))).float() / 255
    return ((resized - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1).contiguous()  # (3, H, W)


def known_processor(model: nn.Module) -> ImageProcessor | None:
    """Return the image processor that belongs to a model, or None if none is known.

    This is its attribute `image_processor`; for timm, the transform of its `pretrained_cfg`; otherwise the processor
    that is saved beside the weights it was loaded from.

    Raises:
        ValueError: The saved processor cannot be read.
    """
    tower = find_tower(model)[0]
    for module in (model, tower):
        if (processor := getattr(module, "image_processor", None)) is not None:
            return processor
    if describe_model(tower).is_timm:
        settings = getattr(tower, "pretrained_cfg", None)
        return _timm_transform(tower, dict(settings)) if settings else None
    for module in (model, tower):
        if source := getattr(getattr(module, "config", None), "name_or_path", ""):
            return saved_processor(source)
    return None


def saved_processor(source: str | Path) -> BaseImageProcessor | None:
    """Return the image processor of a folder or Hub id, or None if there is none.

    Raises:
        ValueError: The folder has a processor file that cannot be read.
    """
    from transformers import AutoImageProcessor

    file = Path(source, "preprocessor_config.json")
    if Path(source).is_dir() and not file.is_file():
        return None
    try:
        processor = AutoImageProcessor.from_pretrained(source)
        _check_fields(processor.to_dict())
        return processor
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if file.is_file():
            raise ValueError(
                f"No image processor can be created from '{file}' ({error}). Correct the file, or remove it and pass "
                "processor=..."
            ) from error
        logger.debug("No image processor in '%s': %s", source, error)
        return None


def _check_fields(fields: Mapping[str, Any]) -> None:
    """Raise a ValueError for a field of an image processor with which no image, or only a huge one, can be made."""
    for name, value in fields.items():
        is_statistic = name in ("image_mean", "image_std")
        if (is_statistic and not fields.get("do_normalize", True)) or (value is None and not is_statistic):
            continue
        if name in ("size", "crop_size", "pad_size"):
            sides = [side for side in dict(value).values() if side is not None]
            fits = all(type(side) is int and 0 < side <= _LONGEST_SIDE for side in sides)
            fits = fits and bool(sides) and (name == "size" or {"height", "width"} <= {*value})
            wanted = f"whole sides from 1 to {_LONGEST_SIDE} pixels, e.g. {{'height': 224, 'width': 224}}"
        elif is_statistic:
            fits = isinstance(value, list | tuple) and bool(value) and all(_is_number(part) for part in value)
            fits = fits and (name == "image_mean" or min(value) > 0)
            wanted = "one number per channel, e.g. [0.5, 0.5, 0.5]"
        elif name == "rescale_factor":
            fits, wanted = _is_number(value) and value > 0, "a positive number, e.g. 0.00392156862745098 (1/255)"
        elif name == "resample":
            fits, wanted = value in list(Image.Resampling), "a filter of Pillow from 0 to 5, e.g. 3 (bicubic)"
        elif name.startswith("do_"):
            fits, wanted = isinstance(value, bool), "true or false"
        else:
            fits, wanted = name != "device", "no such field"
        if not fits:
            raise ValueError(f"{name} is {str(value)[:80]!r}, expected {wanted}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def unknown_processor(model: nn.Module) -> UnknownProcessorError:
    """Create the error for a model whose image processor is not known."""
    return UnknownProcessorError(
        f"No image processor was given and none is saved with {describe_model(model).name}, so the right size, mean "
        "and standard deviation are not known. Pass processor=..., e.g. "
        "open_model(source, processor=AutoImageProcessor.from_pretrained(...)), set model.image_processor, or save it "
        "beside the weights with save_pretrained(folder)."
    )


def _timm_transform(tower: nn.Module, settings: dict[str, Any]) -> EvaluationTransform:
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config({"input_size": (3, *describe_model(tower).image_size)}, pretrained_cfg=settings)
    return EvaluationTransform(
        create_transform(**config, is_training=False),
        tuple(config["mean"]),
        tuple(config["std"]),
        f"timm {sorted(config.items())}",
    )


def dense_processor(processor: ImageProcessor, size: tuple[int, int]) -> "DPTImageProcessor":
    """Return a processor that resizes whole images to one size and predictions back to the size of the image.

    Mean and standard deviation are taken from `processor`.
    """
    from transformers import DPTImageProcessor

    mean, std = statistics_of(processor)
    return DPTImageProcessor(
        do_resize=True,
        size={"height": size[0], "width": size[1]},
        resample=Image.Resampling.BICUBIC,
        keep_aspect_ratio=False,
        do_pad=False,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(mean),
        image_std=list(std),
    )


def resized_processor(processor: BaseImageProcessor, image_size: int | tuple[int, int]) -> BaseImageProcessor:
    """Return the processor for images of another size, square or not; the margins of a center crop scale along."""
    fields = processor.to_dict()
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if fields.get("do_center_crop"):
        crop = min(fields["crop_size"]["height"], fields["crop_size"]["width"])
        shortest = fields["size"].get("shortest_edge") or min(fields["size"]["height"], fields["size"]["width"])
        fields["crop_size"] = {"height": height, "width": width}
        fields["size"] = {"shortest_edge": round(shortest * max(height, width) / crop)}
    else:
        fields["size"] = {"height": height, "width": width}
    return type(processor)(**{name: value for name, value in fields.items() if name != "image_processor_type"})


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# --- Evaluation: the standard image processor that is saved with every checkpoint


def default_image_processor(image_size: int | tuple[int, int], *, resize: int | None = None) -> "BitImageProcessor":
    """Create the processor saved with checkpoints: shortest edge, center crop, bicubic, ImageNet statistics.

    It is a class of transformers, so loading it needs neither this package nor remote code. All values are set
    explicitly, because the defaults of the class are those of CLIP.

    Args:
        image_size: Side of the crop in pixels, or (height, width).
        resize: Shortest edge before the crop, pixels. Default: 256/224 of the (longer) crop side, as in DINOv2's
            evaluation protocol.
    """
    from transformers import BitImageProcessor

    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return BitImageProcessor(
        do_resize=True,
        size={"shortest_edge": round(max(height, width) * 256 / 224) if resize is None else resize},
        resample=Image.Resampling.BICUBIC,
        do_center_crop=True,
        crop_size={"height": height, "width": width},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
        do_convert_rgb=True,
    )
