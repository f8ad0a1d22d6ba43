"""Read tokens from any plain vision transformer of transformers or timm.

`read_tokens` returns the residual stream, attention weights, queries, keys, values, MLP activations or patch
embeddings of chosen blocks. The family table says where each family keeps its blocks, projections and norms.
Everything is read with hooks during one ordinary forward pass: the model's own code runs unchanged and keeps its
attention implementation.

Shapes: B images, R registers, N patches in a grid of (rows, columns), T = prefix + N tokens, D width, L blocks.
Token order is `[CLS | distillation | registers | patches]`; a model may lack some of them.
"""

import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import nn

from .families import (
    FAMILIES,
    Family,
    ModelDescription,
    describe_model,
    describe_tower,
    find_tower,
    has_part,
    unknown_family,
)
from .image_guard import BadImageError, open_image
from .images import ImageSource, ImageStream, default_image_processor, load_images, table_images

logger = logging.getLogger(__name__)

Site = Literal["residual", "attention", "q", "k", "v", "mlp", "patch_embedding"]
Layers = Sequence[int] | Literal["all"]
Reduction = Callable[[torch.Tensor, int], torch.Tensor]

_ATTENTION_SITES: tuple[Site, ...] = ("q", "k", "v", "attention")


# --- Reading ---


@dataclass(frozen=True, eq=False)
class TokenReading:
    """Values of one site at some blocks for a batch of images.

    Args:
        site: Site that was read.
        layers: Blocks in the requested order, 1 to L; 0 is the embedding before the first block.
        values: One tensor per block, or the result of `reduce`. residual, q, k, v: (B, T, D), heads concatenated.
            attention: (B, heads, T, T), each row a distribution over keys. mlp: (B, T, hidden), the input of the MLP's
            last linear layer. patch_embedding: (B, N, D), before positions are added.
        grid: (rows, columns) of the patches, which are row-major.
        has_cls: Whether the first token is CLS.
        num_register_tokens: Number R of registers.
        num_distillation_tokens: Number of tokens between CLS and registers (DeiT: 1).
    """

    site: Site
    layers: tuple[int, ...]
    values: tuple[torch.Tensor, ...]
    grid: tuple[int, int]
    has_cls: bool
    num_register_tokens: int
    num_distillation_tokens: int = 0

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the patches in `values`; 0 for patch embeddings."""
        if self.site == "patch_embedding":
            return 0
        return int(self.has_cls) + self.num_distillation_tokens + self.num_register_tokens

    def at(self, layer: int = -1) -> torch.Tensor:
        """Return the values of one block, numbered as in `layers`; -1 is the last entry.

        Raises:
            KeyError: The block was not read.
        """
        if layer == -1:
            return self.values[-1]
        if layer not in self.layers:
            raise KeyError(f"Block {layer} was not read, only {list(self.layers)}. Add it to `layers`.")
        return self.values[self.layers.index(layer)]

    def __getitem__(self, layer: int) -> torch.Tensor:
        return self.at(layer)

    def _tokens(self, layer: int, start: int, length: int | None) -> torch.Tensor:
        """Return a slice along the token axis (for attention, along the query axis)."""
        values = self.at(layer)
        axis = 2 if self.site == "attention" else 1
        return values.narrow(axis, start, values.shape[axis] - start if length is None else length)

    def cls(self, layer: int = -1) -> torch.Tensor | None:
        """Return CLS (B, D), or None without CLS; for attention, the CLS row (B, heads, T)."""
        if not self.has_cls or self.site == "patch_embedding":
            return None
        return self._tokens(layer, 0, 1).squeeze(2 if self.site == "attention" else 1)

    def registers(self, layer: int = -1) -> torch.Tensor:
        """Return the registers (B, R, D), where R may be 0; for attention, the register rows (B, heads, R, T)."""
        length = 0 if self.site == "patch_embedding" else self.num_register_tokens
        return self._tokens(layer, self.num_prefix_tokens - length, length)

    def patches(self, layer: int = -1) -> torch.Tensor:
        """Return the patches (B, N, D); for attention, the patch rows (B, heads, N, T)."""
        return self._tokens(layer, self.num_prefix_tokens, None)


def read_tokens(
    model: nn.Module,
    pixel_values: torch.Tensor,
    *,
    layers: Layers = (-1,),
    site: Site = "residual",
    reduce: Reduction | None = None,
) -> TokenReading:
    """Read one site of chosen blocks in one forward pass, without gradients and in eval mode.

    Args:
        model: Model of a family in `FAMILIES`, or a model that contains such a tower. It is not changed.
        pixel_values: (B, 3, H, W) normalized pixels; moved to the model's device and dtype.
        layers: Block numbers 1 to L, 0 for the embedding (residual only), negative numbers to count from the end, or
            "all". Only these blocks are kept.
        site: "residual": output of the block, before any final norm. "q", "k", "v": outputs of the projections,
            before rotation and norms. "attention": softmax weights. "mlp": input of the MLP's last linear layer, i.e.
            after the nonlinearity. "patch_embedding": output of the patch convolution; `layers` is not used.
        reduce: Function called as `reduce(values, layer)` during the forward pass. Its result is kept instead of the
            values; for example, the norms of all blocks then need no more memory than one block.

    Raises:
        ValueError: The family, block or site is unknown, or the model cannot read pixels of this shape.

    Example:
    ```python
    >>> reading = read_tokens(model, pixel_values, layers="all")
    >>> norms = [reading.patches(layer).norm(dim=-1) for layer in reading.layers]
    ```
    """
    return read_many(model, pixel_values, {site: layers}, reduce={} if reduce is None else {site: reduce})[site]


def read_many(
    model: nn.Module,
    pixel_values: torch.Tensor,
    sites: Mapping[Site, Layers],
    *,
    reduce: Mapping[Site, Reduction] | None = None,
) -> dict[Site, TokenReading]:
    """Read several sites in one forward pass, e.g. `{"residual": "all", "attention": (-1,)}`; see `read_tokens`."""
    tower, name = find_tower(model)
    family, description = FAMILIES[name], describe_tower(tower, name)
    pixel_values = _checked_pixels(tower, description, pixel_values)
    wanted = {site: resolve_layers(layers, description.num_layers, site) for site, layers in sites.items()}
    collector = _Collector(family, description, wanted, dict(reduce or {}))
    with torch.no_grad(), _evaluating(tower), _all_patches_in_order(tower, name), collector.attached(tower):
        tower(pixel_values, **_forward_options(name, description, pixel_values))
    return collector.readings()


def resolve_layers(layers: Layers, num_layers: int, site: Site = "residual") -> tuple[int, ...]:
    """Return block numbers counted from the start; raise for the first block that does not exist."""
    if site not in get_args(Site):
        raise ValueError(f"site={site!r} is unknown, expected one of {', '.join(get_args(Site))}.")
    if site == "patch_embedding":
        return (0,)
    first = 0 if site == "residual" else 1
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f"layers={layers!r} is unknown, expected 'all' or a sequence of block numbers.")
        return tuple(range(first, num_layers + 1))
    if isinstance(layers, int):
        raise TypeError(f"layers={layers} is a number, expected a sequence. Use layers=({layers},).")
    resolved = tuple(layer + num_layers + 1 if layer < 0 else layer for layer in layers)
    if not resolved:
        raise ValueError("layers is empty. Give at least one block, or 'all'.")
    for asked, layer in zip(layers, resolved):
        if not first <= layer <= num_layers:
            raise ValueError(
                f"Block {asked} does not exist at site '{site}'. The model has {num_layers} blocks, 1 to "
                f"{num_layers}{', and 0 for the embedding' if first == 0 else ''}; -1 is the last."
            )
    return resolved


def _checked_pixels(tower: nn.Module, description: ModelDescription, pixel_values: torch.Tensor) -> torch.Tensor:
    """Move the pixels to the model's device and dtype; raise if the model cannot read them."""
    if not isinstance(pixel_values, torch.Tensor):
        raise TypeError(
            f"pixel_values is a {type(pixel_values).__name__}, expected a tensor (batch, 3, height, width). Create "
            "one with prepare_images, which also resizes images of different sizes."
        )
    if pixel_values.ndim != 4 or not pixel_values.is_floating_point() or not len(pixel_values):
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)} and dtype {pixel_values.dtype}, expected normalized "
            "floating-point pixels (batch, 3, height, width). Create them with prepare_images."
        )
    size, patch = tuple(pixel_values.shape[-2:]), description.patch_size
    # The native size is always accepted: some models drop a border there (384 pixels in patches of 14).
    if size != description.image_size and (size[0] % patch[0] or size[1] % patch[1] or min(size) < max(patch)):
        nearest = " x ".join(str(max(1, round(side / step)) * step) for side, step in zip(size, patch))
        raise ValueError(
            f"The image size of {size[0]} x {size[1]} pixels is not a multiple of the patch size of {patch[0]} x "
            f"{patch[1]}. Resize or crop the images to {nearest}."
        )
    if size != description.image_size and not _takes_other_sizes(tower, description):
        raise ValueError(
            f"This {description.family} model only accepts images of {description.image_size[0]} x "
            f"{description.image_size[1]} pixels, not {size[0]} x {size[1]}. "
            f"{'Create it with dynamic_img_size=True, or resize' if description.is_timm else 'Resize'} the images."
        )
    like = next(tower.parameters())
    return pixel_values.to(like.device, like.dtype)


def _takes_other_sizes(tower: Any, description: ModelDescription) -> bool:
    if description.is_timm:
        return bool(getattr(tower, "dynamic_img_size", False))
    return getattr(tower.config, "is_native", True)  # AIMv2 has either a position table for one size or no table


def _forward_options(name: str, description: ModelDescription, pixel_values: torch.Tensor) -> dict[str, Any]:
    """Return the arguments with which the tower's forward pass keeps all patches of this image size in order."""
    size = tuple(pixel_values.shape[-2:])
    options: dict[str, Any] = {}
    if FAMILIES[name].resize_switch and size != description.image_size:
        options["interpolate_pos_encoding"] = True
    if name == "vit_mae":  # sorts the patches by this noise, which is random by default
        cells = (size[0] // description.patch_size[0]) * (size[1] // description.patch_size[1])
        noise = torch.arange(cells, device=pixel_values.device, dtype=torch.float32)
        options["noise"] = noise.expand(len(pixel_values), cells)
    return options


@contextmanager
def _evaluating(tower: nn.Module) -> Iterator[None]:
    """Switch to eval mode and restore the mode of each module afterwards; a model may be only partly in training."""
    training = [module for module in tower.modules() if module.training]
    if training:
        tower.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _all_patches_in_order(tower: Any, name: str) -> Iterator[None]:
    """Set MAE's `mask_ratio` to 0 while reading; otherwise it drops three quarters of the patches."""
    if name != "vit_mae":
        yield
        return
    mask_ratio = tower.config.mask_ratio
    tower.config.mask_ratio = 0.0
    try:
        yield
    finally:
        tower.config.mask_ratio = mask_ratio


class _Collector:
    """Hooks of one forward pass and the values they have collected."""

    def __init__(
        self,
        family: Family,
        description: ModelDescription,
        wanted: dict[Site, tuple[int, ...]],
        reduce: dict[Site, Reduction],
    ) -> None:
        self.family, self.description, self.wanted, self.reduce = family, description, wanted, reduce
        self.kept: dict[tuple[Site, int], torch.Tensor] = {}
        self.projected: dict[str, torch.Tensor] = {}  # of the current block
        self.grid: tuple[int, int] | None = None

    @contextmanager
    def attached(self, tower: nn.Module) -> Iterator[None]:
        """Register the hooks for the duration of the `with` block and always remove them afterwards.

        The hooks ignore other threads, because a server may run the same model in another thread at the same time.
        """
        family, thread = self.family, threading.get_ident()
        with ExitStack() as stack:

            def hook(module: nn.Module, function: Callable, *, before: bool = False) -> None:
                def see(*args: Any) -> None:
                    if threading.get_ident() == thread:
                        function(*args)

                register = module.register_forward_pre_hook if before else module.register_forward_hook
                stack.callback(register(see, with_kwargs=True).remove)

            hook(self._part(tower, family.patch_projection), self._see_patches)
            blocks: Any = tower.get_submodule(family.blocks)
            if 0 in self.wanted.get("residual", ()):
                hook(blocks[0], self._see_embedding, before=True)
            for layer, block in enumerate(blocks, start=1):
                if layer in self.wanted.get("residual", ()):
                    hook(block, self._see_block(layer))
                if layer in self.wanted.get("mlp", ()):
                    hook(self._part(block, *family.mlp_output), self._see_activations(layer), before=True)
                sites = [site for site in _ATTENTION_SITES if layer in self.wanted.get(site, ())]
                if sites:
                    attention = self._part(block, family.attention)
                    if not has_part(attention, "qkv"):
                        for site, paths in zip("qkv", family.projections):
                            hook(self._part(attention, *paths), self._see_projection(site))
                    elif getattr(attention, "q_bias", None) is None:
                        hook(attention.get_submodule("qkv"), self._see_projection("qkv"))
                    else:
                        hook(attention, self._see_input, before=True)
                    hook(attention, self._see_attention(layer, sites))
            yield

    def _part(self, module: nn.Module, *paths: str) -> nn.Module:
        for path in paths:
            if has_part(module, path):
                return module.get_submodule(path)
        raise ValueError(
            f"The module {type(module).__name__} of this {self.description.family} model has no "
            f"'{' or '.join(paths)}', so this site cannot be read. Read 'residual', or use the family's usual blocks."
        )

    def _keep(self, site: Site, layer: int, values: torch.Tensor) -> None:
        self.kept[site, layer] = self.reduce[site](values, layer) if site in self.reduce else values

    def _see_patches(self, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        self.grid = (output.shape[-2], output.shape[-1])
        if "patch_embedding" in self.wanted:
            self._keep("patch_embedding", 0, output.flatten(2).transpose(1, 2))  # (B, N, D)

    def _see_embedding(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._keep("residual", 0, args[0] if args else kwargs["hidden_states"])

    def _see_block(self, layer: int) -> Callable:
        def see(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            self._keep("residual", layer, output[0] if isinstance(output, tuple) else output)

        return see

    def _see_activations(self, layer: int) -> Callable:
        def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._keep("mlp", layer, args[0])

        return see

    def _see_projection(self, sites: str) -> Callable:
        def see(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
            self.projected.update(zip(sites, output.chunk(len(sites), dim=-1)))

        return see

    def _see_input(self, attention: Any, args: tuple, kwargs: dict) -> None:
        """Compute the projections of attentions that keep the biases of `qkv` separately (EVA in timm).

        They either do not call the layer or add the biases after it, so a hook on `qkv` would miss values.
        """
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        self.projected.update(zip("qkv", nn.functional.linear(args[0], attention.qkv.weight, bias).chunk(3, dim=-1)))

    def _see_attention(self, layer: int, sites: list[Site]) -> Callable:
        def see(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            for site in sites:
                if site == "attention":
                    self._keep(site, layer, self._attention_weights(module, kwargs))
                else:  # copy, because a view would keep the whole fused projection in memory
                    self._keep(site, layer, self.projected[site].contiguous())
            self.projected.clear()

        return see

    def _attention_weights(self, attention: nn.Module, kwargs: dict) -> torch.Tensor:
        """Compute attention weights (B, heads, T, T) like the eager implementations, with the softmax in float32.

        This way, the model itself can use a fused kernel, which returns no weights, and blocks that were not requested
        add no cost.
        """
        head_dim = self.projected["q"].shape[-1] // self.description.num_heads
        query, key = (self.projected[site].unflatten(-1, (-1, head_dim)).transpose(1, 2) for site in ("q", "k"))
        if self.family.qk_norms:
            query, key = (
                self._part(attention, path)(x) for path, x in zip(self.family.qk_norms, (query, key))
            )  # (B, heads, T, head_dim)
        angles = kwargs.get(self.family.rotary) if self.family.rotary else None
        if angles is not None:
            query, key = (_rotate_patches(x, angles, halves=_rotates_halves(attention)) for x in (query, key))
        # With fewer key heads than query heads, each key head serves a group of consecutive query heads.
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5  # (B, heads, T, T)
        return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)

    def readings(self) -> dict[Site, TokenReading]:
        """Return the collected values in the requested order."""
        missing = [
            (site, layer) for site in self.wanted for layer in self.wanted[site] if (site, layer) not in self.kept
        ]
        if missing or self.grid is None:
            raise ValueError(
                f"The forward pass of this {self.description.family} model did not call the modules of "
                f"{missing or 'the patch embedding'}, so nothing could be read. Use the family's usual blocks."
            )
        d = self.description
        return {
            site: TokenReading(
                site=site,
                layers=layers,
                values=tuple(self.kept[site, layer] for layer in layers),
                grid=self.grid,
                has_cls=d.has_cls,
                num_register_tokens=d.num_register_tokens,
                num_distillation_tokens=d.num_distillation_tokens,
            )
            for site, layers in self.wanted.items()
        }


def _rotates_halves(attention: nn.Module) -> bool:
    """Return True if rotary channels are paired by halves (DINOv3); timm attentions provide this information."""
    return bool(getattr(attention, "rotate_half", True))


def _rotate_patches(
    x: torch.Tensor, angles: torch.Tensor | tuple[torch.Tensor, torch.Tensor], *, halves: bool
) -> torch.Tensor:
    """Apply rotary positions to the patches; the tokens before them have no position.

    Args:
        x: (B, heads, T, head_dim) queries or keys.
        angles: Pair (cos, sin) of shape (N, head_dim) each, as in transformers, or one tensor (..., N, 2 * head_dim)
            with the sines first, as in timm.
        halves: Whether channel i is paired with channel i + head_dim / 2 (DINOv3) or with its neighbor (EVA-02).

    Source: arXiv 2104.09864.
    """
    cos, sin = reversed(angles.chunk(2, dim=-1)) if isinstance(angles, torch.Tensor) else angles
    prefix, patches = x.split((x.shape[-2] - sin.shape[-2], sin.shape[-2]), dim=-2)
    if halves:
        first, second = patches.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    else:
        turned = torch.stack((-patches[..., 1::2], patches[..., ::2]), dim=-1).flatten(-2)
    return torch.cat((prefix, (patches * cos + turned * sin).to(x.dtype)), dim=-2)


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
            apply: Callable = partial(_whole_picture, side=side, patch=description.patch_size, mean=mean, std=std)
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


def _whole_picture(
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


@dataclass(frozen=True)
class SkippedImage:
    """Id of an image that could not be used, and the reason."""

    id: str
    reason: str


@dataclass(frozen=True)
class _Pictures:
    """Ordered images that are opened one at a time; `total` is None for a stream."""

    name: str
    items: Callable[[], Iterator[tuple[str, Callable[[], Image.Image]]]]
    total: int | None


def _pictures(images: Any) -> _Pictures:
    """Wrap any supported kind of input in one interface."""
    if isinstance(images, str | Path):
        images = load_images(images, split=None)
    library = type(images).__module__.split(".")[0]
    if library == "datasets" and hasattr(images, "num_rows") and not isinstance(images, dict):
        images = table_images(images, "the dataset", image_column=None, label_column=None)
    if isinstance(images, ImageSource):
        source = images
        return _Pictures(
            source.name,
            lambda: ((source.ids[i], partial(_picture_of, source, i)) for i in range(len(source))),
            len(source),
        )
    if isinstance(images, ImageStream):
        return _Pictures(images.name, partial(_stream_items, images), None)
    if library == "datasets" and not isinstance(images, dict):
        return _Pictures("the stream", partial(_row_items, images), None)
    if isinstance(images, Sequence):
        wrong = next((image for image in images if not isinstance(image, str | Path | Image.Image)), None)
        if wrong is None:
            names = [f"image/{i}" if isinstance(x, Image.Image) else str(x) for i, x in enumerate(images)]
            listed = list(zip(names, images))
            return _Pictures("the list", lambda: ((n, partial(open_image, x, name=n)) for n, x in listed), len(images))
        images = wrong
    raise TypeError(
        f"images holds a {type(images).__name__}, expected a folder, a list of paths or Pillow images, an "
        "ImageSource or ImageStream, or one split of a `datasets` dataset. Pass pixel tensors to read_tokens instead."
    )


def _picture_of(source: ImageSource, index: int) -> Image.Image:
    return source[index].image


def _stream_items(stream: ImageStream) -> Iterator[tuple[str, Callable[[], Image.Image]]]:
    for shard in range(stream.num_shards):
        for record in stream.open_shard(shard):
            yield record.id, partial(open_image, record.data or b"", name=record.id)


def _row_items(stream: Any) -> Iterator[tuple[str, Callable[[], Image.Image]]]:
    from datasets import Image as ImageFeature

    features = stream.features or {}
    columns = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
    for column in columns:  # keep images encoded, so that a broken image does not stop the iteration
        stream = stream.cast_column(column, ImageFeature(decode=False))
    columns = columns or [name for name, feature in features.items() if "binary" in str(getattr(feature, "dtype", ""))]
    column = "image" if "image" in columns or not columns else columns[0]
    for i, row in enumerate(stream):
        if column not in row:
            raise ValueError(
                f"The stream has no image column; its columns are {', '.join(row)}. Rename one of them to 'image'."
            )
        cell = row[column]
        if isinstance(cell, dict):
            cell = cell["bytes"] if cell["bytes"] is not None else cell["path"]
        yield f"row/{i}", partial(open_image, b"" if cell is None else cell, name=f"row/{i}")


class PreparedImages:
    """Iterable of batches of normalized pixels, as (ids, (B, 3, H, W)).

    The order of the images is kept. A batch contains images of a single size, so a change of size starts a new batch.
    Images that cannot be used are left out and listed in `skipped`. Only one batch is in memory at a time.
    """

    def __init__(self, pictures: _Pictures, transform: EvaluationTransform, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is too small. Use at least 1.")
        self._pictures, self.transform, self.batch_size = pictures, transform, batch_size
        self.name, self.total = pictures.name, pictures.total  # total is None for a stream
        self.skipped: list[SkippedImage] = []

    def __iter__(self) -> Iterator[tuple[list[str], torch.Tensor]]:
        num_used = 0
        for ids, pixel_values in self.batches():
            num_used += len(ids)
            yield ids, pixel_values
        report_skipped(num_used, self.skipped, self.name)

    def ids(self) -> Iterator[str]:
        """Iterate over the ids of all images, usable or not, without opening them."""
        return (name for name, _ in self._pictures.items())

    def parts(self, size: int) -> Iterator["PreparedImages"]:
        """Split the images into portions of `size`, which are opened only when a portion is iterated."""
        items = self._pictures.items()
        while portion := list(islice(items, size)):
            pictures = _Pictures(self.name, partial(iter, portion), len(portion))
            yield PreparedImages(pictures, self.transform, self.batch_size)

    def batches(self) -> Iterator[tuple[list[str], torch.Tensor]]:
        """Iterate over the batches like `__iter__`, but without the final `report_skipped`."""
        self.skipped.clear()
        ids: list[str] = []
        pixels: list[torch.Tensor] = []
        for name, read in self._pictures.items():
            try:
                pixel_values = self.transform(read())
            except BadImageError as error:
                self.skipped.append(SkippedImage(name, error.reason))
                continue
            if pixels and (len(pixels) == self.batch_size or pixels[0].shape != pixel_values.shape):
                yield ids, torch.stack(pixels)
                ids, pixels = [], []
            ids.append(name)
            pixels.append(pixel_values)
        if pixels:
            yield ids, torch.stack(pixels)


def report_skipped(num_used: int, skipped: Sequence[SkippedImage], name: str) -> None:
    """Warn if some images were skipped, and raise if none could be used.

    Args:
        num_used: Number of images that could be used.
        skipped: Images that could not be used.
        name: Name of the image source in the message.

    Raises:
        ValueError: `num_used` is 0.
    """
    shown = "; ".join(f"'{image.id}': {image.reason}" for image in skipped[:3])
    if not num_used:
        raise ValueError(
            f"None of the {len(skipped)} images of {name} can be used ({shown or 'it is empty'}). Check the files."
        )
    if skipped:
        logger.warning("%d of %d images were skipped (%s).", len(skipped), num_used + len(skipped), shown)


def prepare_images(
    images: Any,
    transform: EvaluationTransform,
    *,
    batch_size: int = 32,
    max_images: int | None = None,
    seed: int | None = None,
) -> PreparedImages:
    """Prepare batches of pixels from images of any supported kind.

    Args:
        images: Folder, list of paths or Pillow images, `ImageSource`, `ImageStream`, or `datasets` dataset (also
            streaming).
        transform: Transform of the images, usually `EvaluationTransform.for_model(model)`.
        batch_size: Number of images per batch.
        max_images: Maximum number of images, or None for all.
        seed: Random seed to draw `max_images` images, keeping their order. With None, and for streams, the first
            images are used.

    Raises:
        TypeError: `images` is of another kind.
        ValueError: `batch_size` or `max_images` is below 1, or (at the end of the iteration) no image could be used.
    """
    pictures = _pictures(images)
    if max_images is not None:
        if max_images < 1:
            raise ValueError(f"max_images={max_images} is too small. Use at least 1, or None for all images.")
        pictures = _some(pictures, max_images, seed)
    return PreparedImages(pictures, transform, batch_size)


def _some(pictures: _Pictures, max_images: int, seed: int | None) -> _Pictures:
    if pictures.total is None or pictures.total <= max_images or seed is None:
        total = None if pictures.total is None else min(pictures.total, max_images)
        return _Pictures(pictures.name, lambda: islice(pictures.items(), max_images), total)
    drawn = set(np.random.default_rng(seed).permutation(pictures.total)[:max_images].tolist())
    return _Pictures(
        pictures.name, lambda: (item for i, item in enumerate(pictures.items()) if i in drawn), max_images
    )


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
