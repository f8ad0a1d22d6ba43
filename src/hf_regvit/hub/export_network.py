"""Prepare a model for a trace: a copy with named outputs, whose positions are those of one image size."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..models.configuration_regvit import RegViTConfig
from ..models.loading import fit_positions
from ..models.modeling_regvit import (
    RegViTBackbone,
    RegViTForDepthEstimation,
    RegViTForImageClassification,
    RegViTModel,
    RegViTPreTrainedModel,
)
from .exported import ExportError


class NamedOutputs(nn.Module):
    """Copy of a RegViT of any class, in float32 on the CPU and in eval mode, with named output tensors.

    Args:
        model: RegViT, which is not changed.
        statistics: `scale`, `mean` and `std` of the pixels, for an input `pixels` (B, H, W, 3) of uint8. None: the
            input is `pixel_values`, normalized pixels (B, 3, H, W).
        for_page: True for two more outputs: `norms` (B, N) of the patches before the final norm, and `attention`
            (B, T, N) of CLS and registers to the patches in the last block, the mean over heads.

    Raises:
        ExportError: The model has no weights, or it has none of the outputs that `for_page` needs.
    """

    def __init__(
        self, model: RegViTPreTrainedModel, statistics: Mapping[str, Any] | None, *, for_page: bool = False
    ) -> None:
        super().__init__()
        if model.device.type == "meta":
            raise ExportError("The model is on the meta device, where it has no weights. Load its weights first.")
        if for_page and not isinstance(model, RegViTModel | RegViTForImageClassification):
            raise ExportError(f"The page shows tokens, but a {type(model).__name__} has none. Add --task features.")
        if for_page and not model.config.num_prefix_tokens:
            raise ExportError("The page shows the attention of CLS and registers, but the model has neither.")
        self.for_page = for_page
        self.model: Any = copy.deepcopy(model).requires_grad_(False).cpu().float()
        self.model.set_attn_implementation("eager" if for_page else "sdpa")
        self.returns_blocks = False  # True: the residual stream after each block, to find where an error begins
        self.entry = "pixel_values" if statistics is None else "pixels"
        if statistics is not None:
            self.mean, self.std = (nn.Buffer(torch.tensor(statistics[k])[:, None, None]) for k in ("mean", "std"))
            self.scale: float = statistics["scale"]
        self.eval()

    @property
    def takes_bytes(self) -> bool:
        """True if the input is uint8."""
        return self.entry == "pixels"

    def forward(self, pixel_values: Tensor | None = None, pixels: Tensor | None = None) -> dict[str, Tensor]:
        """Return the outputs by name."""
        given: Any = pixel_values if pixels is None else pixels
        if self.takes_bytes:
            given = (given.permute(0, 3, 1, 2).float() * self.scale - self.mean) / self.std  # (B, 3, H, W)
        model = self.model
        if self.returns_blocks:
            streams = model.base_model(given, output_hidden_states=True).hidden_states[1:]
            return {f"block_{block}": tokens for block, tokens in enumerate(streams, 1)}
        if isinstance(model, RegViTModel | RegViTForImageClassification):
            more = {"output_attentions": True, "output_hidden_states": True} if self.for_page else {}
            output = model.base_model(given, **more)
            if isinstance(model, RegViTModel):
                return _tokens(output, model.config)
            return {"logits": model.classifier(model.pool(output)), **_tokens(output, model.config)}
        output = model(given)
        if isinstance(model, RegViTBackbone):
            blocks = [block for block, stage in enumerate(model.stage_names) if stage in model.out_features]
            return {f"feature_map_{block}": maps for block, maps in zip(blocks, output.feature_maps)}
        if isinstance(model, RegViTForDepthEstimation):
            return {"depth": output.predicted_depth}
        return {"logits": output.logits}

    def ask(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the outputs for an input."""
        with torch.inference_mode():
            return self(**{self.entry: pixels})

    def from_normalized(self, images: Tensor) -> Tensor:
        """Return normalized images (B, 3, H, W) as input."""
        if not self.takes_bytes:
            return images
        levels = ((images * self.std + self.mean) / self.scale).round().clamp(0, 255)
        return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def random(self, batch: int, size: Sequence[int], seed: int) -> Tensor:
        """Return random input: standard normal values, or uniform bytes."""
        generator = torch.Generator().manual_seed(seed)
        if self.takes_bytes:
            return torch.randint(0, 256, (batch, *size, 3), generator=generator, dtype=torch.uint8)
        return torch.randn(batch, 3, *size, generator=generator)

    @contextmanager
    def without_register_neurons(self) -> Iterator[None]:
        """Switch test-time registers off for a while."""
        mlps = [layer.mlp for layer in self.model.base_model.layers]
        kept = [mlp.register_neurons for mlp in mlps]
        try:
            for mlp in mlps:
                mlp.register_neurons = []
            yield
        finally:
            for mlp, neurons in zip(mlps, kept):
                mlp.register_neurons = neurons

    @contextmanager
    def for_onnxruntime(self) -> Iterator[None]:
        """Compute for a while in the steps that ONNX Runtime runs fastest.

        It adds a bias within the matrix product only if the product has two axes, and the converter's form of an
        attention in one step would copy the keys.
        """
        attention = self.model.config._attn_implementation
        linears = [module for module in self.model.modules() if type(module) is nn.Linear and module.bias is not None]
        self.model.set_attn_implementation("eager")
        try:
            for module in linears:
                module.forward = partial(_linear_of_rows, module)  # type: ignore[method-assign]
            yield
        finally:
            self.model.set_attn_implementation(attention)
            for module in linears:
                del module.forward

    def freeze(self, size: tuple[int, int] | None) -> None:
        """Store the positions of one image size, so that the trace resamples none; None keeps every size possible."""
        backbone = self.model.base_model
        if size is not None:
            fit_positions(backbone, size, option="size")
            backbone.requires_grad_(False)
            return
        if backbone.config.interpolate_offset:
            raise ExportError(
                f"The model has interpolate_offset={backbone.config.interpolate_offset}: it scales its positions by a "
                "factor, which cannot be part of a file for any size. Export a file for each size, such as --size "
                f"{backbone.config.image_shape[0]}."
            )
        embeddings = backbone.embeddings
        if embeddings.position_embeddings is not None:
            embeddings.patch_positions = MethodType(
                lambda self, grid: self.resample_positions(_AnyGrid(grid)), embeddings
            )


class _AnyGrid(tuple):
    """Grid that equals no other, so that a trace has no branch for the stored grid."""

    __slots__ = ()
    __hash__ = tuple.__hash__

    def __eq__(self, other: object) -> bool:
        return False


def _linear_of_rows(module: nn.Linear, inputs: Tensor) -> Tensor:
    rows = torch.addmm(module.bias, inputs.flatten(0, -2), module.weight.T)
    return rows.unflatten(0, inputs.shape[:-1])


def _tokens(output: Any, config: RegViTConfig) -> dict[str, Tensor]:
    """Return the tokens of a backbone by name; what is empty, or equal to another output, is left out."""
    outputs = {}
    if config.use_cls_token:
        outputs["cls"] = output.last_hidden_state[:, 0]
    if config.num_register_tokens and not config.discard_registers:
        outputs["registers"] = output.register_tokens
    outputs["patches"] = output.patch_tokens
    if not config.use_cls_token or config.final_norm != "tokens" or config.pooler_act or config.attention_pooler:
        outputs["pooled"] = output.pooler_output
    if output.image_embeds is not None:
        outputs["image_embeds"] = output.image_embeds
    if output.attentions:
        prefix = config.num_prefix_tokens
        outputs["norms"] = output.hidden_states[-1][:, prefix:].norm(dim=-1)
        outputs["attention"] = output.attentions[-1].mean(1)[:, :prefix, prefix:]
    return outputs


def network_for_task(model: RegViTPreTrainedModel, task: str | None) -> RegViTPreTrainedModel:
    """Return the model, its backbone ("features"), or a backbone with feature maps ("backbone")."""
    if task is None:
        return model
    backbone = getattr(model, "regvit", model)
    if task == "features":
        return backbone
    if task != "backbone":
        raise ExportError(
            f"task={task!r} is unknown. Use 'features' or 'backbone', or leave it out to export the model as it is, a "
            f"{type(model).__name__}."
        )
    if isinstance(model, RegViTBackbone):
        return model
    with_maps = RegViTBackbone(copy.deepcopy(model.config))
    state = backbone.state_dict()
    with_maps.regvit.load_state_dict({name: state[name] for name in with_maps.regvit.state_dict()})
    return with_maps
