"""Read tokens from any plain vision transformer of transformers or timm.

A `TokenReader` knows one model: its tower, its family and its image transform. It returns the residual stream,
attention weights, queries, keys, values, MLP activations or patch embeddings of chosen blocks. The family table says
where each family keeps its blocks, projections and norms. Everything is read with hooks during one ordinary forward
pass: the model's own code runs unchanged and keeps its attention implementation.

Shapes: B images, R registers, N patches in a grid of (rows, columns), T = prefix + N tokens, D width, L blocks.
Token order is `[CLS | distillation | registers | patches]`; a model may lack some of them.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from .families import (
    FAMILIES,
    IN_PLACE,
    Family,
    ModelDescription,
    describe_tower,
    final_norm,
    find_tower,
    has_part,
    is_softmax_attention,
    join_registers,
    unwrapped,
)
from .processing import EvaluationTransform, ImageProcessor, known_processor, open_images

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
        has_cls: True if the first token is CLS.
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

    def __repr__(self) -> str:
        blocks = f"block{'s' if len(self.layers) > 1 else ''} {', '.join(map(str, self.layers))}"
        count = f"{len(self.values[0])} images"
        return f"TokenReading({self.site} of {blocks}, {count}, {_kinds(self)} + {_by(self.grid)} patches)"

    def _tokens(self, layer: int, start: int, length: int | None) -> torch.Tensor:
        """Return a slice along the token axis (for attention, along the query axis)."""
        values = self.at(layer)
        axis = 2 if self.site == "attention" else 1
        return values.narrow(axis, start, values.shape[axis] - start if length is None else length)

    def summary(self, layer: int = -1) -> torch.Tensor:
        """Return CLS, or the mean patch of a model without CLS, (B, D)."""
        return self.at(layer)[:, 0] if self.has_cls else self.patches(layer).mean(dim=1)

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


def _kinds(layout: TokenReading | ModelDescription) -> str:
    return f"{'CLS' if layout.has_cls else 'no CLS'} + {layout.num_register_tokens} registers"


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


Query = Literal["cls"] | tuple[Literal["register"], int] | tuple[Literal["patch"], int, int]


def token_index(description: ModelDescription, query: Query, grid: tuple[int, int]) -> int:
    """Return the place of a token in the sequence of a model; raise ValueError if it has no such token."""
    d = description
    known = {"cls": (int(d.has_cls),), "register": (d.num_register_tokens,), "patch": grid}
    kind, *place = (query,) if isinstance(query, str) else query
    if kind == "cls" and not place:
        place = [0]
    inside = kind in known and len(place) == len(known[kind])
    if not inside or not all(0 <= at < size for at, size in zip(place, known[kind])):
        raise ValueError(
            f"The model has no token query={query!r}. It has {_kinds(d)} + {_by(grid)} patches; expected 'cls', "
            "('register', i) or ('patch', row, column), counted from 0."
        )
    first = {"cls": 0, "register": d.num_prefix_tokens - d.num_register_tokens, "patch": d.num_prefix_tokens}
    return first[kind] + (place[0] * grid[1] + place[1] if kind == "patch" else place[0])


class TokenReader:
    """Reader of one model, which finds its tower, family, norm and image transform once.

    Attributes:
        model: Model that was given, without wrappers of `torch.compile` or data parallelism. It is not changed.
        tower: Vision tower inside the model.
        family_name: Name of its family in `FAMILIES`.
        family: Record of its family.
        description: Sizes and token layout.
        final_norm: Norm of the last block's tokens, or the identity.
        processor: Image processor or, for timm, transform; None if none is known.
        transform: Transform from an image to pixels (3, H, W).
        device: Device of the model.

    Args:
        model: Model of a family in `FAMILIES`, or a model that contains such a tower.
        processor: Image processor. Default: the model's own, see `known_processor`.

    Raises:
        TypeError: `model` is not a torch module.
        ValueError: No part of the model belongs to a known family.

    Example:
    ```python
    >>> reader = open_model("facebook/dinov2-small")
    >>> features = reader.embed(["a.jpg", "b.jpg"])  # (2, 384)
    >>> norms = np.linalg.norm(reader.patch_maps("a.jpg"), axis=-1)  # (1, 16, 16)
    ```
    """

    def __init__(self, model: nn.Module, processor: ImageProcessor | None = None) -> None:
        self.model: nn.Module = unwrapped(model)
        self.tower, self.family_name = find_tower(self.model)
        self.family = FAMILIES[self.family_name]
        self.description = describe_tower(self.tower, self.family_name)
        self.final_norm = final_norm(self.tower)
        self._given = processor

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.tower.parameters()).device

    @property
    def takes_other_sizes(self) -> bool:
        """True if images may have another size than that of the position table."""
        if self.description.is_timm:
            return bool(getattr(self.tower, "dynamic_img_size", False))
        # AIMv2 has either a position table for one size or no table.
        return getattr(self.tower.config, "is_native", True)

    @cached_property
    def reads_attention(self) -> bool:
        """True if the attention weights of every block can be read."""
        blocks = map(unwrapped, self.tower.get_submodule(self.family.blocks).children())
        path = self.family.attention
        return all(has_part(b, path) and is_softmax_attention(unwrapped(b.get_submodule(path))) for b in blocks)

    @cached_property
    def processor(self) -> ImageProcessor | None:
        """Image processor or, for timm, transform; None if none is known."""
        return self._given if self._given is not None else known_processor(self.model)

    @cached_property
    def transform(self) -> EvaluationTransform:
        """Transform of the model's own preprocessing.

        Raises:
            UnknownProcessorError: No processor was given and none is known.
        """
        return self.transform_for()

    def transform_for(self, *, image_size: int | None = None, keep_aspect: bool = False) -> EvaluationTransform:
        """Return the transform for another image size or without a crop; see `EvaluationTransform.for_model`."""
        return EvaluationTransform.for_model(
            self.model, self.processor, image_size=image_size, keep_aspect=keep_aspect
        )

    def read(
        self,
        pixel_values: torch.Tensor,
        *,
        layers: Layers = (-1,),
        site: Site = "residual",
        reduce: Reduction | None = None,
    ) -> TokenReading:
        """Read one site of chosen blocks in one forward pass, without gradients and in eval mode.

        Args:
            pixel_values: (B, 3, H, W) normalized pixels; moved to the model's device and dtype.
            layers: Block numbers 1 to L, 0 for the embedding (residual only), negative numbers to count from the end,
                or "all". Only these blocks are kept.
            site: "residual": output of the block, before any final norm. "q", "k", "v": outputs of the projections,
                before rotation and norms. "attention": softmax weights. "mlp": input of the MLP's last linear layer,
                i.e. after the nonlinearity. "patch_embedding": output of the patch convolution; `layers` is not used.
            reduce: Function called as `reduce(values, layer)` during the forward pass. Its result is kept instead of
                the values; for example, the norms of all blocks then need no more memory than one block.

        Raises:
            ValueError: The block or site is unknown, or the model cannot read pixels of this shape.

        Example:
        ```python
        >>> reading = reader.read(pixel_values, layers="all")
        >>> norms = [reading.patches(layer).norm(dim=-1) for layer in reading.layers]
        ```
        """
        return self.read_many(pixel_values, {site: layers}, reduce={} if reduce is None else {site: reduce})[site]

    def read_many(
        self,
        pixel_values: torch.Tensor,
        sites: Mapping[Site, Layers],
        *,
        reduce: Mapping[Site, Reduction] | None = None,
    ) -> dict[Site, TokenReading]:
        """Read several sites in one forward pass, e.g. `{"residual": "all", "attention": (-1,)}`; see `read`."""
        tower, name, description = self.tower, self.family_name, self.description
        pixel_values = self._checked(pixel_values)
        wanted = {site: resolve_layers(layers, description.num_layers, site) for site, layers in sites.items()}
        collector = _Collector(self.family, description, wanted, dict(reduce or {}))
        with evaluating(tower), all_patches_in_order(tower, name), collector.attached(tower):
            tower(pixel_values, **forward_options(name, description.image_size, description.patch_size, pixel_values))
        return collector.readings()

    def _checked(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Move the pixels to the model's device and dtype; raise if the model cannot read them."""
        if not isinstance(pixel_values, torch.Tensor):
            raise TypeError(
                f"pixel_values is a {type(pixel_values).__name__}, expected a tensor (batch, 3, height, width). "
                "Create one with prepare_images, which also resizes images of different sizes."
            )
        if pixel_values.ndim != 4 or not pixel_values.is_floating_point() or not len(pixel_values):
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)} and dtype {pixel_values.dtype}, expected "
                "normalized floating-point pixels (batch, 3, height, width). Create them with prepare_images."
            )
        description = self.description
        size, patch = tuple(pixel_values.shape[-2:]), description.patch_size
        # The native size is always accepted: some models drop a border there (384 pixels in patches of 14).
        if size != description.image_size and (size[0] % patch[0] or size[1] % patch[1] or min(size) < max(patch)):
            nearest = " x ".join(str(max(1, round(side / step)) * step) for side, step in zip(size, patch))
            raise ValueError(
                f"The image size of {size[0]} x {size[1]} pixels is not a multiple of the patch size of {patch[0]} x "
                f"{patch[1]}. Resize or crop the images to {nearest}."
            )
        if size != description.image_size and not self.takes_other_sizes:
            raise ValueError(
                f"This {description.family} model only accepts images of {description.image_size[0]} x "
                f"{description.image_size[1]} pixels, not {size[0]} x {size[1]}. "
                f"{'Create it with dynamic_img_size=True, or resize' if description.is_timm else 'Resize'} the images."
            )
        like = next(self.tower.parameters())
        return pixel_values.to(like.device, like.dtype)

    def read_final(self, pixel_values: torch.Tensor) -> TokenReading:
        """Read the tokens of the last block after the final norm; see `read`."""
        return self.read(pixel_values, reduce=lambda tokens, layer: self.final_norm(tokens))

    def embed(self, images: object, *, normalize: bool = False, batch_size: int = 32) -> np.ndarray:
        """Return one vector per image, (n, D) float32: CLS after the final norm.

        For a model without CLS, it is the mean of the patches after the final norm. `extract_features` and the
        evaluation tasks use the same vector.

        Args:
            images: One image or a sequence of images; see `open_images`. Their sizes may differ.
            normalize: Whether to divide each vector by its L2 norm.
            batch_size: Number of images per forward pass.

        Raises:
            UnknownProcessorError: The image processor of the model is not known.
            BadImageError: An image cannot be used.
        """
        prefix = self.description.num_prefix_tokens

        def keep(tokens: torch.Tensor, layer: int) -> torch.Tensor:
            chosen = tokens[:, :1] if self.description.has_cls else tokens[:, prefix:]
            return self.final_norm(chosen).mean(dim=1)

        batches = self.batches(images, batch_size)
        vectors = torch.cat([finite_values(self.read(pixels, reduce=keep)) for pixels in batches])  # (n, D)
        return (nn.functional.normalize(vectors, dim=1) if normalize else vectors).numpy()

    def patch_maps(self, images: object, *, layer: int = -1, batch_size: int = 32) -> np.ndarray:
        """Return the patches of one block after the final norm, (n, rows, columns, D) float32.

        Args:
            images: One image or a sequence of images that have one size after the transform; see `open_images`.
            layer: Block to read: 1 to L, 0 for the embedding, negative numbers to count from the end.
            batch_size: Number of images per forward pass.

        Raises:
            UnknownProcessorError: The image processor of the model is not known.
            ValueError: The block does not exist, or the images have several sizes.
            BadImageError: An image cannot be used.
        """
        prefix, maps = self.description.num_prefix_tokens, []
        for pixels in self.batches(images, batch_size, one_size=True):
            reading = self.read(pixels, layers=(layer,), reduce=lambda tokens, _: self.final_norm(tokens[:, prefix:]))
            maps.append(finite_values(reading).unflatten(1, reading.grid))
        return torch.cat(maps).numpy()

    def attention_maps(
        self, images: object, *, query: Query = "cls", layer: int = -1, batch_size: int = 32
    ) -> np.ndarray:
        """Return the attention of one token to all patches, (n, heads, rows, columns) float32.

        The weights are those of the model: over all tokens, each head sums to 1, over the patches to less.

        Args:
            images: One image or a sequence of images that have one size after the transform; see `open_images`.
            query: Token that attends: "cls", ("register", i) or ("patch", row, column), counted from 0.
            layer: Block to read, 1 to L; negative numbers count from the end.
            batch_size: Number of images per forward pass.

        Raises:
            UnknownProcessorError: The image processor of the model is not known.
            ValueError: The block or the token does not exist, or the images have several sizes.
            BadImageError: An image cannot be used.
        """
        prefix, maps = self.description.num_prefix_tokens, []
        for pixels in self.batches(images, batch_size, one_size=True):
            rows, columns = (side // step for side, step in zip(pixels.shape[-2:], self.description.patch_size))
            token = token_index(self.description, query, (rows, columns))

            def keep(weights: torch.Tensor, layer: int, token: int = token) -> torch.Tensor:
                return weights[:, :, token, prefix:]

            reading = self.read(pixels, layers=(layer,), site="attention", reduce=keep)
            maps.append(finite_values(reading).unflatten(2, reading.grid))
        return torch.cat(maps).numpy()

    def batches(
        self, images: object, batch_size: int, *, one_size: bool = False, image_size: int | None = None
    ) -> Iterator[torch.Tensor]:
        """Yield pixels (b, 3, H, W) in the order of the images; a change of size starts a new batch."""
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is too small. Use at least 1.")
        transform = self.transform if image_size is None else self.transform_for(image_size=image_size)
        batch: list[torch.Tensor] = []
        for image in open_images(images):
            pixels = transform(image)
            if batch and pixels.shape != batch[0].shape and one_size:
                sizes = " and ".join(f"{side.shape[1]} x {side.shape[2]}" for side in (batch[0], pixels))
                raise ValueError(
                    f"The images have several sizes after the transform, {sizes} pixels, so their maps do not fit "
                    "into one array. Pass images of one size, or a processor that resizes or crops to one size."
                )
            if batch and (len(batch) == batch_size or pixels.shape != batch[0].shape):
                yield torch.stack(batch)
                batch = []
            batch.append(pixels)
        yield torch.stack(batch)

    def __repr__(self) -> str:
        d = self.description
        return (
            f"TokenReader({d.name}: {d.family}, {d.num_layers} blocks, width {d.hidden_size}, {_kinds(d)}, patches of "
            f"{_by(d.patch_size)} pixels, {self.device})"
        )


def finite_values(reading: TokenReading) -> torch.Tensor:
    """Return the values of the only block, float32 on the CPU."""
    values = reading.at().float().cpu()
    if not values.isfinite().all():
        raise ValueError(
            f"The model gives NaN or infinity at block {reading.layers[0]}. Check its weights. If it runs in float16, "
            "large activations may overflow; use bfloat16 or float32."
        )
    return values


def read_tokens(
    model: "TokenReader | nn.Module | str",
    pixel_values: torch.Tensor,
    *,
    layers: Layers = (-1,),
    site: Site = "residual",
    reduce: Reduction | None = None,
) -> TokenReading:
    """Read one site of chosen blocks in one forward pass; see `TokenReader.read`.

    Args:
        model: Reader, module or name; see `open_model`. To read more than one batch, open it once.
        pixel_values: (B, 3, H, W) normalized pixels.
        layers: Blocks to read.
        site: Values to read.
        reduce: Function whose result is kept instead of the values.
    """
    from .loading import open_model

    return open_model(model).read(pixel_values, layers=layers, site=site, reduce=reduce)


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


def forward_options(
    name: str, image_size: tuple[int, int], patch_size: tuple[int, int], pixel_values: torch.Tensor
) -> dict[str, Any]:
    """Return the arguments with which the tower's forward pass keeps all patches of this image size in order."""
    size = tuple(pixel_values.shape[-2:])
    options: dict[str, Any] = {}
    if FAMILIES[name].resize_switch and size != image_size:
        options["interpolate_pos_encoding"] = True
    if name == "vit_mae":  # sorts the patches by this noise, which is random by default
        cells = (size[0] // patch_size[0]) * (size[1] // patch_size[1])
        noise = torch.arange(cells, device=pixel_values.device, dtype=torch.float32)
        options["noise"] = noise.expand(len(pixel_values), cells)
    return options


@contextmanager
def evaluating(tower: nn.Module) -> Iterator[None]:
    """Compute without gradients, in eval mode and without compiled graphs, and restore the mode of each module."""
    training = [module for module in tower.modules() if module.training]
    if training:
        tower.eval()
    nothing_is_compiled = "torch._dynamo" not in sys.modules  # importing it takes a second
    # Compiled modules run without their graphs, which call no hooks.
    eager = nullcontext() if nothing_is_compiled else torch.compiler.set_stance("force_eager")
    try:
        with torch.no_grad(), eager:
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def all_patches_in_order(tower: nn.Module, name: str) -> Iterator[None]:
    """Set MAE's `mask_ratio` to 0 while reading; otherwise it drops three quarters of the patches."""
    if name != "vit_mae":
        yield
        return
    config: Any = tower.config
    mask_ratio, config.mask_ratio = config.mask_ratio, 0.0
    try:
        yield
    finally:
        config.mask_ratio = mask_ratio


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
                def see(*args: object) -> None:
                    if threading.get_ident() == thread:
                        function(*args)

                register = module.register_forward_pre_hook if before else module.register_forward_hook
                stack.callback(register(see, with_kwargs=True).remove)

            hook(self._part(tower, family.patch_projection), self._see_patches)
            blocks = [unwrapped(block) for block in tower.get_submodule(family.blocks).children()]
            if 0 in self.wanted.get("residual", ()):
                hook(blocks[0], self._see_embedding, before=True)
            for layer, block in enumerate(blocks, start=1):
                if layer in self.wanted.get("residual", ()):
                    hook(block, partial(self._see_block, layer))
                if layer in self.wanted.get("mlp", ()):
                    hook(self._part(block, *family.mlp_output), partial(self._see_activations, layer), before=True)
                sites = [site for site in _ATTENTION_SITES if layer in self.wanted.get(site, ())]
                if sites:
                    attention: Any = self._part(block, family.attention)
                    if "attention" in sites and not is_softmax_attention(attention):
                        raise ValueError(
                            f"The attention weights of {type(attention).__name__} in this {self.description.family} "
                            "model cannot be read, because its formula is not known. Read another site, such as "
                            "'residual', 'q', 'k' or 'v'."
                        )
                    if not has_part(attention, "qkv"):
                        for site, paths in zip("qkv", family.projections):
                            hook(self._part(attention, *paths), partial(self._see_projection, site))
                    elif getattr(attention, "q_bias", None) is None:
                        hook(attention.qkv, partial(self._see_projection, "qkv"))
                    else:
                        hook(attention, self._see_input, before=True)
                    hook(attention, partial(self._see_attention, layer, sites))
            yield

    def _part(self, module: nn.Module, *paths: str) -> nn.Module:
        for path in paths:
            if has_part(module, path):
                return unwrapped(module.get_submodule(path))
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
        tokens = args[0] if args else kwargs["hidden_states"]
        prefix, count, _ = vars(module).get(IN_PLACE, (0, 0, True))
        if count:  # registers in place are zero here
            registers = tokens.new_zeros(len(tokens), count, tokens.shape[-1])
            tokens = torch.cat([tokens[:, :prefix], registers, tokens[:, prefix:]], dim=1)
        self._keep("residual", 0, tokens)

    def _see_block(
        self, layer: int, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor | tuple
    ) -> None:
        tokens = output[0] if isinstance(output, tuple) else output
        self._keep("residual", layer, join_registers(tokens, vars(module).get(IN_PLACE, (0,))[0]))

    def _see_activations(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._keep("mlp", layer, args[0])

    def _see_projection(self, sites: str, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        self.projected.update(zip(sites, output.chunk(len(sites), dim=-1)))

    def _see_input(self, attention: Any, args: tuple, kwargs: dict) -> None:
        """Compute the projections of attentions that keep the biases of `qkv` separately (EVA in timm).

        They either do not call the layer or add the biases after it, so a hook on `qkv` would miss values.
        """
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        if attention.qkv_bias_separate:
            projected = attention.qkv(args[0]) + bias
        else:
            projected = nn.functional.linear(args[0], attention.qkv.weight, bias)
        self.projected.update(zip("qkv", projected.chunk(3, dim=-1)))

    def _see_attention(
        self, layer: int, sites: list[Site], module: nn.Module, args: tuple, kwargs: dict, output: object
    ) -> None:
        for site in sites:
            if site == "attention":
                self._keep(site, layer, self._attention_weights(module, kwargs))
            else:  # copy, because a view would keep the whole fused projection in memory
                self._keep(site, layer, self.projected[site].contiguous())
        self.projected.clear()

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
            if self.family.rotary == "rotary":  # RegViT passes (B, T, head_dim), the cosines of half a head first
                angles = tuple(half.repeat(1, 1, 2).unsqueeze(1) for half in angles.chunk(2, dim=-1))
            halves = bool(getattr(attention, "rotate_half", True))  # in timm; DINOv3 of transformers rotates halves
            query, key = (_rotate_patches(x, angles, halves=halves) for x in (query, key))
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


def _rotate_patches(
    x: torch.Tensor, angles: torch.Tensor | tuple[torch.Tensor, torch.Tensor], *, halves: bool
) -> torch.Tensor:
    """Apply rotary positions to the patches; the tokens before them have no position.

    Args:
        x: (B, heads, T, head_dim) queries or keys.
        angles: Pair (cos, sin) of shape (N, head_dim) each, as in transformers, or one tensor (..., N, 2 * head_dim)
            with the sines first, as in timm.
        halves: True if channel i is paired with channel i + head_dim / 2 (DINOv3) or with its neighbor (EVA-02).

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
