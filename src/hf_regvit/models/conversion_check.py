"""Compare the outputs of a converted model with those of its source."""

import copy
import logging
from typing import Any

import torch
from torch import Tensor

from .configuration_regvit import RegViTConfig
from .families import find_tower
from .foreign_weights import ForeignModel, first_line
from .modeling_regvit import RegViTForImageClassification, RegViTModel
from .source_families import SOURCES, ConversionError
from .tokens import all_patches_in_order, forward_options

logger = logging.getLogger(__name__)

# Relative to the standard deviation of the outputs: the real ViT-Tiny has tokens of norm 500 next to others of 19.
VERIFY_TOLERANCE = 1e-4


@torch.no_grad()
def check_outputs(model: RegViTModel | RegViTForImageClassification, origin: ForeignModel) -> None:
    """Compare the outputs with the source model on random images, at its native size and at two others."""
    if origin.load is None:
        logger.warning(
            "'%s' has only tensors and no model to run: names and shapes were checked, but outputs were not compared.",
            origin.name,
        )
        return
    source: Any = origin.load()
    given, was_training = source, source.training
    source.eval()
    # Compare in float32 regardless of the dtype of the weights: bfloat16 rounding would hide small errors.
    if {parameter.dtype for parameter in source.parameters()} != {torch.float32}:
        source = copy.deepcopy(source).float()
    if model.dtype != torch.float32:
        model = copy.deepcopy(model).float()
    tower, family = find_tower(source)
    config, parameter = model.config, next(source.parameters())
    height, width = config.image_shape
    rows, columns = config.patch_shape
    sizes = [(height, width)]
    if family in SOURCES or getattr(tower, "dynamic_img_size", False):
        sizes += [(height + rows, width + 2 * columns), (max(height - rows, rows), max(width - columns, columns))]
    generator = torch.Generator().manual_seed(0)
    try:
        for size in sizes:
            pixels = torch.randn(2, config.num_channels, *size, generator=generator)
            pixels = pixels.to(parameter.device, parameter.dtype)
            try:
                expected = _run_source(source, pixels, origin, config)
            except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError) as error:
                if size == sizes[0]:
                    raise ConversionError(
                        f"'{origin.name}' itself cannot run at its own size of {height} x {width} pixels "
                        f"({first_line(error)}), so the outputs cannot be compared. Pass verify=False to convert it."
                    ) from error
                logger.info("'%s' itself cannot run at %d x %d pixels: %s", origin.name, *size, first_line(error))
                continue
            difference = _difference(model.to(parameter.device), pixels, expected)
            if not difference <= VERIFY_TOLERANCE:
                raise ConversionError(
                    f"The RegViT outputs differ from those of '{origin.name}' by {difference:.2e} of their standard "
                    f"deviation at {size[0]} x {size[1]} pixels, more than {VERIFY_TOLERANCE:.0e}. Check the config "
                    "overrides."
                )
            logger.info(
                "The outputs match those of '%s' at %d x %d pixels (difference %.1e).", origin.name, *size, difference
            )
    finally:
        given.train(was_training)


def _run_source(source: Any, pixels: Tensor, origin: ForeignModel, config: RegViTConfig) -> dict[str, Tensor]:
    """Return the outputs to compare, under the names of RegViT."""
    tower: Any
    tower, kind = find_tower(source)
    if kind not in SOURCES:  # timm
        features = tower.forward_features(pixels)
        outputs = {"last_hidden_state": features}
        if tower.num_classes:
            outputs["image_embeds" if origin.projects else "logits"] = tower.forward_head(features)
        elif tower.attn_pool is not None:
            outputs["pooler_output"] = tower.forward_head(features, pre_logits=True)
        return outputs
    # Run the head too, unless it is the identity or belongs to a model with a text tower.
    if source.config.model_type == kind and getattr(source.config, "num_labels", None) != 0:
        tower = source
    with all_patches_in_order(tower, kind):
        options = forward_options(kind, config.image_shape, config.patch_shape, pixels)
        output = tower(pixels, output_hidden_states=True, **options)
    family, names = SOURCES[kind], ["logits", "last_hidden_state", "image_embeds"]
    if config.pooler_act is not None or not family.has_pooler:
        names.append("pooler_output")
    outputs = {name: output[name] for name in names if output.get(name) is not None}
    outputs["hidden_states"] = output.hidden_states[-1]  # all that a backbone returns of the last block
    if hasattr(source, "visual_projection") and "image_embeds" not in outputs:
        outputs["image_embeds"] = source.visual_projection(output.pooler_output)
    return outputs


def _difference(
    model: RegViTModel | RegViTForImageClassification, pixels: Tensor, expected: dict[str, Tensor]
) -> float:
    """Return the largest difference of the outputs, relative to the standard deviation of each."""
    ours = dict(model(pixels, output_hidden_states=True))
    if isinstance(model, RegViTForImageClassification):
        ours = {**model.regvit(pixels), **ours}
    ours["hidden_states"] = ours["hidden_states"][-1]
    differences = []
    for name in expected.keys() & ours.keys():
        right = expected[name].float()
        differences.append((ours[name].float() - right).abs().max() / right.std().clamp(min=1e-6))
    return torch.stack(differences).max().item()  # NaN if any is NaN
