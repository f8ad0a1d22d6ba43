"""Image processors and the evaluation transform."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from .families import describe_model, find_tower

if TYPE_CHECKING:
    from transformers import BitImageProcessor

logger = logging.getLogger(__name__)


# --- Images in ---


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
        processor: Any = None,
        *,
        image_size: int | None = None,
        keep_aspect: bool = False,
    ) -> "EvaluationTransform":
        """Create the transform of a model's own preprocessing.

        Without `image_size` and `keep_aspect`, it does exactly what the image processor or the timm data config does;
        most of them squash or crop to a fixed square. Otherwise, only their mean and standard deviation are used.

        Args:
            model: Model of a family in `FAMILIES`.
            processor: Image processor, or a transform of this class, which `load_model` returns for timm models. By
                default, the processor saved with the model; if there is none, the shortest edge is resized, the center
                cropped and ImageNet statistics are used, with a warning.
            image_size: Side of a square center crop in pixels; the shortest edge is first resized to 256/224 of it.
            keep_aspect: Whether to use the whole image instead of a crop, with a shorter side of about `image_size`
                (default: the model's own size) and both sides rounded to whole patches. Image sizes then differ.
        """
        description = describe_model(model)
        if processor is None:
            processor = _timm_transform(model) if description.is_timm else _saved_processor(model)
        if isinstance(processor, EvaluationTransform):
            mean, std = processor.mean, processor.std
        elif not getattr(processor, "do_normalize", True):  # its statistics are unused and may be None
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        else:
            mean, std = tuple(processor.image_mean), tuple(processor.image_std)
        if keep_aspect:
            side = image_size or min(description.image_size)
            apply: Callable = partial(_whole_image, side=side, patch=description.patch_size, mean=mean, std=std)
            return cls(apply, mean, std, f"whole picture, shorter side {side}, mean {mean}, std {std}")
        if image_size is not None:
            processor = default_image_processor(image_size)
            processor.image_mean, processor.image_std = list(mean), list(std)
        if isinstance(processor, EvaluationTransform):
            return processor
        return cls(partial(_process, processor), mean, std, processor.to_json_string())


def _process(processor: Any, image: Image.Image) -> torch.Tensor:
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


def _timm_transform(model: nn.Module) -> EvaluationTransform:
    from timm.data import create_transform, resolve_data_config

    tower: Any = find_tower(model)[0]
    config = resolve_data_config(
        {"input_size": (3, *describe_model(tower).image_size)},
        pretrained_cfg=getattr(tower, "pretrained_cfg", None) or {},
    )
    return EvaluationTransform(
        create_transform(**config, is_training=False),
        tuple(config["mean"]),
        tuple(config["std"]),
        f"timm {sorted(config.items())}",
    )


def _saved_processor(model: nn.Module) -> Any:
    """Load the processor saved with a transformers model; if there is none, warn and return the default one."""
    from transformers import AutoImageProcessor

    source = getattr(getattr(model, "config", None), "name_or_path", "")
    if source:
        try:
            return AutoImageProcessor.from_pretrained(source)
        except (OSError, ValueError) as error:
            if (file := Path(source, "preprocessor_config.json")).is_file():
                raise ValueError(
                    f"No image processor can be created from '{file}' ({error}). Correct the file, or remove it to "
                    "use the default: resize the shortest edge, center crop, ImageNet statistics."
                ) from error
            logger.debug("No image processor in '%s': %s", source, error)
    logger.warning(
        "No image processor was given and none is saved with %s. Using the default: resize the shortest edge, center "
        "crop, ImageNet statistics. Pass processor=... if the model was trained with other preprocessing.",
        f"'{source}'" if source else "the model",
    )
    return default_image_processor(describe_model(model).image_size)


def dense_processor(processor: Any, size: tuple[int, int]) -> Any:
    """Return a processor that resizes whole images to one size and predictions back to the size of the image.

    Mean and standard deviation are taken from `processor`.
    """
    from PIL import Image
    from transformers import DPTImageProcessor

    return DPTImageProcessor(
        do_resize=True,
        size={"height": size[0], "width": size[1]},
        resample=Image.Resampling.BICUBIC,
        keep_aspect_ratio=False,
        do_pad=False,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(processor.image_mean),
        image_std=list(processor.image_std),
    )


def resized_processor(processor: Any, image_size: int) -> Any:
    """Return the processor for square images of another size; the margins of a center crop scale along."""
    fields = processor.to_dict()
    if fields.get("do_center_crop"):
        crop = min(fields["crop_size"]["height"], fields["crop_size"]["width"])
        shortest = fields["size"].get("shortest_edge") or min(fields["size"]["height"], fields["size"]["width"])
        fields["crop_size"] = {"height": image_size, "width": image_size}
        fields["size"] = {"shortest_edge": round(shortest * image_size / crop)}
    else:
        fields["size"] = {"height": image_size, "width": image_size}
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
