"""One picture in one model, read once and kept, so that every further question is answered without the model.

Shape letters: T = prefix + N tokens, N patches in a grid of (rows, columns), R registers, D width, L blocks. A place
in a picture is (x, y), each in [0, 1) from the top left, so that it means the same at any resolution and in any model.
"""

import hashlib
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from .extraction import TokenFeatures
from .families import ModelDescription, describe_model, final_norm
from .features import EvaluationTransform, prepare_images, read_many
from .figures import TokenMaps, pca_colors
from .images import photographs
from .lost import LostResult, LostSettings, lost_box
from .outliers import Cutoff, find_cutoff

logger = logging.getLogger(__name__)

# Of 288 settings on a ViT-Tiny with artifacts these were first or second on both data sets (scripts/lost_evidence.py).
LOST_SETTINGS = LostSettings(feature="k", center="row", l2norm=True)
MAX_PATCHES = 2304  # 48 x 48: attention of 12 heads is then 127 MB a block in float16
_STORED_SIDE = 1536  # pixels; nothing is read at more


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture that somebody chose. `key` tells different pixels apart, whatever their name."""

    name: str
    image: Image.Image
    key: str

    @classmethod
    def of(cls, image: Image.Image, name: str) -> "Picture":
        """An RGB picture, made smaller where no reading would use its pixels."""
        if max(image.size) > _STORED_SIDE:
            image = image.copy()
            image.thumbnail((_STORED_SIDE, _STORED_SIDE), Image.Resampling.LANCZOS)
        digest = hashlib.blake2b(image.tobytes(), digest_size=16, key=str(image.size).encode()).hexdigest()
        return cls(name, image, digest)


@dataclass(frozen=True, eq=False)
class View:
    """What one picture left behind in one block of one model.

    Args:
        image: The picture as the model saw it, whole, sides rounded to patches.
        layer: Block, 1 to L.
        description: Of the model.
        grid: (rows, columns).
        tokens: (T, D) output of the block after the model's final norm, float32.
        norms: (rows, columns) norms of the patches in the raw output of the block.
        attention: (heads, T, T) float16.
        keys: (N, D) keys of the patches.
        cutoff: Norm above which a patch is an artifact; None where the model has no distinct group of high norms.
    """

    image: Image.Image
    layer: int
    description: ModelDescription
    grid: tuple[int, int]
    tokens: Tensor
    norms: Tensor
    attention: Tensor
    keys: Tensor
    cutoff: float | None

    @property
    def first_patch(self) -> int:
        """Tokens before the patches."""
        return self.description.num_prefix_tokens

    @property
    def patches(self) -> Tensor:
        """(N, D) patch tokens after the final norm."""
        return self.tokens[self.first_patch :]

    @property
    def registers(self) -> Tensor:
        """(R, D) registers after the final norm."""
        return self.tokens[self.first_patch - self.description.num_register_tokens : self.first_patch]

    @property
    def outliers(self) -> Tensor:
        """(rows, columns) bool: patches above the cut-off."""
        return self.norms > (math.inf if self.cutoff is None else self.cutoff)

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors."""
        return sum(t.nbytes for t in (self.tokens, self.norms, self.attention, self.keys))

    def cell(self, place: tuple[float, float]) -> tuple[int, int]:
        """(row, column) of the patch at a place."""
        (x, y), (rows, columns) = place, self.grid
        return min(max(int(y * rows), 0), rows - 1), min(max(int(x * columns), 0), columns - 1)

    def attention_from(self, query: str | int | tuple[int, int], *, head: int | None = None) -> Tensor:
        """Attention from one token to every patch; the sum is the share that patches get of it.

        Args:
            query: "cls", the number of a register from 0, or the (row, column) of a patch.
            head: Number from 0; None is the mean over the heads.

        Returns:
            (rows, columns) float32.
        """
        row = self.attention_row(query, head=head)
        return row[self.first_patch :].unflatten(0, self.grid)

    def attention_row(self, query: str | int | tuple[int, int], *, head: int | None = None) -> Tensor:
        """As `attention_from`, to every token: (T,) float32."""
        if query == "cls":
            index = 0
        elif isinstance(query, int):
            index = self.first_patch - self.description.num_register_tokens + query
        elif isinstance(query, tuple):
            index = self.first_patch + query[0] * self.grid[1] + query[1]
        else:
            raise ValueError(f"query={query!r}: expected 'cls', a register's number or a (row, column).")
        rows = self.attention[:, index].float()  # (heads, T)
        return rows.mean(0) if head is None else rows[head]

    def similarity_to(self, cell: tuple[int, int]) -> Tensor:
        """(rows, columns) cosine of every patch token with the one at `cell`, in [-1, 1]."""
        unit = torch.nn.functional.normalize(self.patches, dim=-1)
        return (unit @ unit[cell[0] * self.grid[1] + cell[1]]).unflatten(0, self.grid)

    @cached_property
    def colors(self) -> Tensor:
        """(rows, columns, 3) in [0, 1]: the three main directions of the patch tokens."""
        return pca_colors(self.patches.unflatten(0, self.grid))

    @cached_property
    def object(self) -> LostResult:
        """The object that LOST finds, with `LOST_SETTINGS` on the keys of this block."""
        settings = LOST_SETTINGS
        return lost_box(self.keys, self.grid, center=settings.center, l2norm=settings.l2norm, k=settings.k)

    def maps(self) -> TokenMaps:
        """The same as `figures` draws it: attention of CLS (where there is one) and registers, mean over the heads."""
        queries: list[str | int] = ["cls"] if self.description.has_cls else []
        queries += range(self.description.num_register_tokens)
        rows = [self.attention_from(query) for query in queries]
        return TokenMaps(
            attention=torch.stack(rows) if rows else torch.empty(0, *self.grid),
            patch_tokens=self.patches.unflatten(0, self.grid),
            norms=self.norms,
            registers=self.registers,
        )

    def features(self, name: str) -> TokenFeatures:
        """The tokens as `regvit extract` would store them."""
        return TokenFeatures(
            cls=self.tokens[:1] if self.description.has_cls else None,
            registers=self.registers[None],
            patches=self.patches[None],
            grid=self.grid,
            ids=(name,),
        )


class Explorer:
    """Reads pictures in models and keeps what it read, up to a number of bytes; the oldest goes first.

    Args:
        models: Model and image processor by name, as `features.load_model` gives them.
        cache_bytes: Memory for readings of all models.
        max_patches: A picture of more patches is read at a lower resolution.
        reference: Pictures that tell which norms are usual in a model; default the embedded photographs.

    Raises:
        ValueError: No models, or one of no known family.
    """

    def __init__(
        self,
        models: Mapping[str, tuple[nn.Module, Any]],
        *,
        cache_bytes: int = 512 << 20,
        max_patches: int = MAX_PATCHES,
        reference: Sequence[Image.Image] | None = None,
    ) -> None:
        if not models:
            raise ValueError("models is empty; give at least one model and its processor by name.")
        self.models = dict(models)
        self.descriptions = {name: describe_model(model) for name, (model, _) in self.models.items()}
        self.cache_bytes, self.max_patches = cache_bytes, max_patches
        self._kept: OrderedDict[tuple[str, str, int, int], View] = OrderedDict()
        self._busy = threading.Lock()  # two passes at once would be slower than one after the other, and need more
        self.num_passes = 0
        pictures = list(photographs().values()) if reference is None else list(reference)
        self._cutoffs = {name: self._find_cutoffs(name, pictures) for name in self.models}

    def default_side(self, name: str) -> int:
        """Pixels of the shorter side to begin with: 224, or what the model was made for where that is less."""
        step = max(self.descriptions[name].patch_size)
        return max(round(min(224, *self.descriptions[name].image_size) / step), 1) * step

    def short_side(self, image: Image.Image, name: str, side: int) -> int:
        """Pixels of the shorter side at which a picture is read: whole patches, and not too many of them."""
        patch = self.descriptions[name].patch_size
        step = max(patch)
        aspect = max(image.size) / min(image.size)
        most = math.floor(math.sqrt(self.max_patches / aspect)) * min(patch)
        return max(min(round(side / step) * step, most // step * step), step)

    def view(self, picture: Picture, name: str, *, side: int, layer: int = -1) -> View:
        """One picture after one block of one model; the model runs only where this was not read before.

        Args:
            picture: From `Picture.of`.
            name: Of the model.
            side: Pixels of the shorter side, rounded to whole patches, lowered where the patches are too many.
            layer: Block, 1 to L, or negative from the end.

        Raises:
            ValueError: A layer that does not exist, or a model that gives NaN.
        """
        description = self.descriptions[name]
        layer = layer + description.num_layers + 1 if layer < 0 else layer
        if not 1 <= layer <= description.num_layers:
            raise ValueError(f"layer={layer} does not exist; '{name}' has blocks 1 to {description.num_layers}.")
        side = self.short_side(picture.image, name, side)
        key = (picture.key, name, side, layer)
        with self._busy:
            if key not in self._kept:
                for number, view in self._read(picture.image, name, side, layer).items():
                    self._kept[*key[:3], number] = view
                self._kept.move_to_end(key)
            self._kept.move_to_end(key)
            found = self._kept[key]
            while sum(view.num_bytes for view in self._kept.values()) > self.cache_bytes and len(self._kept) > 1:
                self._kept.popitem(last=False)
        return found

    def _transform(self, name: str, side: int, *, keep_aspect: bool) -> EvaluationTransform:
        model, processor = self.models[name]
        return EvaluationTransform.for_model(model, processor, image_size=side, keep_aspect=keep_aspect)

    def _read(self, image: Image.Image, name: str, side: int, layer: int) -> dict[int, View]:
        """One forward pass: all blocks where their attention fits well into the cache, else the one asked for."""
        model, description = self.models[name][0], self.descriptions[name]
        transform = self._transform(name, side, keep_aspect=True)
        pixels = transform(image)  # (3, H, W)
        rows, columns = (s // p for s, p in zip(pixels.shape[-2:], description.patch_size))
        first = description.num_prefix_tokens
        of_one = 2 * description.num_heads * (first + rows * columns) ** 2
        fits = of_one * description.num_layers <= self.cache_bytes // 4
        layers = tuple(range(1, description.num_layers + 1)) if fits else (layer,)
        self.num_passes += 1
        reading = read_many(
            model,
            pixels[None],
            {"residual": layers, "attention": layers, "k": layers},
            reduce={
                "residual": lambda values, _: values[0].float(),
                "attention": lambda values, _: values[0].half().cpu(),
                "k": lambda values, _: values[0, first:].float().cpu(),
            },
        )
        picture, norm = transform.picture(pixels), final_norm(model).eval()
        views = {}
        for number in layers:
            residual = reading["residual"].at(number)  # (T, D)
            if not torch.isfinite(residual).all():
                raise ValueError(f"'{name}' gives NaN or infinity in block {number}. Its weights are damaged.")
            with torch.no_grad():
                tokens = norm(residual).cpu()
            views[number] = View(
                image=picture,
                layer=number,
                description=description,
                grid=reading["residual"].grid,
                tokens=tokens,
                norms=residual[first:].norm(dim=-1).cpu().unflatten(0, reading["residual"].grid),
                attention=reading["attention"].at(number),
                keys=reading["k"].at(number),
                cutoff=self._cutoffs[name].get(number),
            )
        return views

    def _find_cutoffs(self, name: str, pictures: Sequence[Image.Image]) -> dict[int, float]:
        """Of every block with a distinct group of high norms: where it begins. One picture has too few patches."""
        model, description = self.models[name][0], self.descriptions[name]
        logger.info("Reading %d pictures in %s, to learn which norms are usual in it.", len(pictures), name)
        layers = tuple(range(1, description.num_layers + 1))
        transform = self._transform(name, self.default_side(name), keep_aspect=False)
        norms: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        first = description.num_prefix_tokens
        keep: Callable = lambda values, _: values[:, first:].float().norm(dim=-1).cpu()  # noqa: E731
        for _, pixels in prepare_images(list(pictures), transform, batch_size=4):
            reading = read_many(model, pixels, {"residual": layers}, reduce={"residual": keep})["residual"]
            for layer, values in zip(layers, reading.values):
                norms[layer].append(values)
        found = {layer: _cutoff_of(values, name) for layer, values in norms.items()}
        return {layer: cutoff.cutoff for layer, cutoff in found.items() if cutoff.bimodal}


def _cutoff_of(norms: Sequence[Tensor], name: str) -> Cutoff:
    joined = torch.cat([values.flatten() for values in norms])
    if not torch.isfinite(joined).all():
        raise ValueError(f"'{name}' gives NaN or infinity. Its weights are damaged.")
    return find_cutoff(joined.numpy())
