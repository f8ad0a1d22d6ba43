"""Cached readings of images in models, so that further questions about an image need no forward pass.

Shape letters: T = prefix + N tokens, N patches in a grid of (rows, columns), R registers, D width, L blocks. A place
in an image is independent of resolution and model.
"""

import hashlib
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ..data.builtin import builtin_images
from ..data.preparation import prepare_images
from ..diagnosis.outliers import Cutoff, find_cutoff
from ..evaluation.dense_features import FeatureSettings, read_views, settings_for
from ..evaluation.extraction import TokenFeatures
from ..evaluation.lost import LostResult, LostSettings, lost_box
from ..figures.maps import TokenMaps, pca_colors
from ..models.families import ModelDescription
from ..models.loading import open_model
from ..models.tokens import Query, Site, TokenReader, token_index

logger = logging.getLogger(__name__)

# Best or second best of 288 settings on both data sets for a ViT-Tiny with artifacts (scripts/lost_evidence.py).
LOST_SETTINGS = LostSettings(feature="k", center="row", l2norm=True)
MAX_PATCHES = 2304  # 48 x 48: the attention of 12 heads then takes 127 MB per block in float16
_STORED_SIDE = 1536  # pixels; no image is read at a higher resolution

Place = tuple[float, float]  # (x, y), each in [0, 1) from the top left


@dataclass(frozen=True, eq=False)
class InputImage:
    """Image that a user selected. `key` identifies its pixels, independent of its name."""

    name: str
    image: Image.Image
    key: str

    @classmethod
    def of(cls, image: Image.Image, name: str) -> "InputImage":
        """Create an `InputImage` from an RGB image, reduced to the largest size that can be read."""
        if max(image.size) > _STORED_SIDE:
            image = image.copy()
            image.thumbnail((_STORED_SIDE, _STORED_SIDE), Image.Resampling.LANCZOS)
        digest = hashlib.blake2b(image.tobytes(), digest_size=16, key=str(image.size).encode()).hexdigest()
        return cls(name, image, digest)


@dataclass(frozen=True, eq=False)
class View:
    """Readings of one image after one block of one model.

    Args:
        image: Whole image as the model received it, with sides rounded to patches.
        layer: Number of the block, 1 to L.
        description: Description of the model.
        grid: (rows, columns).
        tokens: (T, D) output of the block after the final norm of the model, float32, averaged over views.
        norms: (rows, columns) L2 norms of the patches in the raw output of the block.
        attention: (heads, T, T) attention weights of the block, float16; None if their formula is not known.
        keys: (N, D) keys of the patches.
        cutoff: Norm above which a patch is an artifact; None if the block has no distinct group of high norms.
    """

    image: Image.Image
    layer: int
    description: ModelDescription
    grid: tuple[int, int]
    tokens: Tensor
    norms: Tensor
    attention: Tensor | None
    keys: Tensor
    cutoff: float | None

    @property
    def first_patch(self) -> int:
        """Number of tokens before the patches."""
        return self.description.num_prefix_tokens

    @property
    def patches(self) -> Tensor:
        """Patch tokens after the final norm, (N, D)."""
        return self.tokens[self.first_patch :]

    @property
    def registers(self) -> Tensor:
        """Register tokens after the final norm, (R, D)."""
        return self.tokens[self.first_patch - self.description.num_register_tokens : self.first_patch]

    @property
    def outliers(self) -> Tensor:
        """Patches above the cut-off, (rows, columns) bool."""
        return self.norms > (math.inf if self.cutoff is None else self.cutoff)

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors in bytes."""
        return sum(t.nbytes for t in (self.tokens, self.norms, self.attention, self.keys) if t is not None)

    def cell(self, place: Place) -> tuple[int, int]:
        """Return the (row, column) of the patch at a place."""
        (x, y), (rows, columns) = place, self.grid
        return min(max(int(y * rows), 0), rows - 1), min(max(int(x * columns), 0), columns - 1)

    def attention_from(self, query: Query, *, head: int | None = None) -> Tensor:
        """Return the attention from one token to every patch; its sum is the share of attention on patches.

        Args:
            query: "cls", ("register", i) or ("patch", row, column), counted from 0.
            head: Index of the head from 0; None is the mean over heads.

        Returns:
            (rows, columns) float32.

        Raises:
            ValueError: The model computes attention in a way that is not known, or has no such token.
        """
        if self.attention is None:
            raise ValueError("The attention of this model cannot be read, because its formula is not known.")
        index = token_index(self.description, query, self.grid)
        rows = self.attention[:, index, self.first_patch :].float()  # (heads, N)
        return (rows.mean(0) if head is None else rows[head]).unflatten(0, self.grid)

    def similarity_to(self, cell: tuple[int, int]) -> Tensor:
        """Return the cosine of every patch token with the one at `cell`, (rows, columns) in [-1, 1]."""
        unit = torch.nn.functional.normalize(self.patches, dim=-1)
        return (unit @ unit[cell[0] * self.grid[1] + cell[1]]).unflatten(0, self.grid)

    @cached_property
    def colors(self) -> Tensor:
        """First three principal components of the patch tokens as colors, (rows, columns, 3) in [0, 1]."""
        return pca_colors(self.patches.unflatten(0, self.grid))

    @cached_property
    def object(self) -> LostResult:
        """Object that LOST finds with `LOST_SETTINGS` on the keys of this block."""
        return lost_box(self.keys, self.grid, LOST_SETTINGS)

    def maps(self) -> TokenMaps:
        """Return the maps that `figures` draws: attention of CLS (if any) and registers is averaged over heads."""
        queries: list[Query] = ["cls"] if self.description.has_cls else []
        queries += [("register", i) for i in range(self.description.num_register_tokens)]
        queries = [] if self.attention is None else queries
        rows = [self.attention_from(query) for query in queries]
        return TokenMaps(
            attention=torch.stack(rows) if rows else torch.empty(0, *self.grid),
            patch_tokens=self.patches.unflatten(0, self.grid),
            norms=self.norms,
            registers=self.registers,
        )

    def features(self, name: str) -> TokenFeatures:
        """Return the tokens in the format of `regvit extract`."""
        return TokenFeatures(
            cls=self.tokens[:1] if self.description.has_cls else None,
            registers=self.registers[None],
            patches=self.patches[None],
            grid=self.grid,
            ids=(name,),
        )


class Explorer:
    """Reader of images in models with a cache of limited size; the oldest readings are dropped first.

    Args:
        models: Models by the name to show: name to open, module or reader; see `open_model`.
        device: Device for models given by name; "auto" is the first of cuda, mps, xpu and cpu that exists.
        cache_bytes: Memory for the readings of all models, in bytes.
        max_patches: Maximum number of patches; larger images are read at a lower resolution.
        reference: Images that show which norms are usual in a model; default the built-in images.
        settings: `FeatureSettings` or a file of `regvit dense`: the block and shorter side to begin with, and the
            number of views over which patch tokens are averaged. Patches are not pooled.

    Raises:
        ValueError: No models, a model of an unknown family, one for which the settings were not chosen, or one whose
            image processor is not known.
    """

    def __init__(
        self,
        models: Mapping[str, TokenReader | nn.Module | str | Path],
        *,
        device: str = "auto",
        cache_bytes: int = 512 << 20,
        max_patches: int = MAX_PATCHES,
        reference: Sequence[Image.Image] | None = None,
        settings: FeatureSettings | str | Path | None = None,
    ) -> None:
        if not models:
            raise ValueError("models is empty. Pass at least one model by name.")
        self.readers = {name: open_model(model, device=device) for name, model in models.items()}
        self.settings = {name: settings_for(settings, reader) for name, reader in self.readers.items()}
        self.cache_bytes, self.max_patches = cache_bytes, max_patches
        self._kept: OrderedDict[tuple[str, str, int, int], View] = OrderedDict()
        self._busy = threading.Lock()  # two passes at once would be slower than in sequence, and need more memory
        self.num_passes = 0
        images = list(builtin_images().values()) if reference is None else list(reference)
        self.num_reference = len(images)
        self._cutoffs = {name: self._find_cutoffs(name, images) for name in self.readers}

    def default_side(self, name: str) -> int:
        """Return the initial length of the shorter side in pixels: 224, or the image size of the model if smaller."""
        if (chosen := self.settings[name].image_size) is not None:
            return chosen
        step = max(self.readers[name].description.patch_size)
        own = min(self.readers[name].description.image_size)
        return max(round(min(224, own) / step), 1) * step if self.readers[name].takes_other_sizes else own

    def short_side(self, image: Image.Image, name: str, side: int) -> int:
        """Return the length of the shorter side at which an image is read: whole patches, at most `max_patches`."""
        if not self.readers[name].takes_other_sizes:
            return self.default_side(name)
        patch = self.readers[name].description.patch_size
        step = max(patch)
        aspect = max(image.size) / min(image.size)
        most = math.floor(math.sqrt(self.max_patches / aspect)) * min(patch)
        return max(min(round(side / step) * step, most // step * step), step)

    def view(self, image: InputImage, name: str, *, side: int, layer: int = -1) -> View:
        """Return the view of an image after one block of one model; the model runs only if it is not cached.

        Args:
            image: Image to read, created with `InputImage.of`.
            name: Name of the model.
            side: Length of the shorter side in pixels, rounded to whole patches, and reduced if there are too many.
            layer: Number of the block, 1 to L, or negative from the end.

        Raises:
            ValueError: A block that does not exist, or a model that produces NaN or infinity.
        """
        description = self.readers[name].description
        layer = layer + description.num_layers + 1 if layer < 0 else layer
        if not 1 <= layer <= description.num_layers:
            raise ValueError(f"layer={layer} does not exist. '{name}' has blocks 1 to {description.num_layers}.")
        side = self.short_side(image.image, name, side)
        key = (image.key, name, side, layer)
        with self._busy:
            if key not in self._kept:
                for number, view in self._read(image.image, name, side, layer).items():
                    self._kept[*key[:3], number] = view
            self._kept.move_to_end(key)
            found = self._kept[key]
            while sum(view.num_bytes for view in self._kept.values()) > self.cache_bytes and len(self._kept) > 1:
                self._kept.popitem(last=False)
        return found

    def _read(self, image: Image.Image, name: str, side: int, layer: int) -> dict[int, View]:
        """Run one forward pass; return all blocks if their attention fits well into the cache, else only `layer`."""
        reader, description = self.readers[name], self.readers[name].description
        whole = reader.takes_other_sizes  # else the image is cropped as for every other use of the model
        transform = reader.transform_for(image_size=side, keep_aspect=True) if whole else reader.transform_for()
        pixels = transform(image)  # (3, H, W)
        rows, columns = (s // p for s, p in zip(pixels.shape[-2:], description.patch_size))
        first = description.num_prefix_tokens
        sites: list[Site] = ["residual", "k", "attention"] if reader.reads_attention else ["residual", "k"]
        of_one = 2 * description.num_heads * (first + rows * columns) ** 2 if reader.reads_attention else 0
        fits = of_one * description.num_layers <= self.cache_bytes // 4
        layers = tuple(range(1, description.num_layers + 1)) if fits else (layer,)
        self.num_passes += 1
        reading = reader.read_many(
            pixels[None],
            dict.fromkeys(sites, layers),
            reduce={
                "residual": lambda values, _: values[0].float(),
                "attention": lambda values, _: values[0].half().cpu(),
                "k": lambda values, _: values[0, first:].float().cpu(),
            },
        )
        averaged = None
        if (count := self.settings[name].views) > 1:
            averaged = read_views(reader, pixels[None], layers, views=count)
        shown, views = transform.picture(pixels), {}
        for number in layers:
            residual = reading["residual"].at(number)  # (T, D)
            if not torch.isfinite(residual).all():
                raise ValueError(f"'{name}' produces NaN or infinity in block {number}. Check its weights.")
            with torch.no_grad():
                tokens = reader.final_norm(residual).cpu() if averaged is None else averaged.at(number)[0]
            views[number] = View(
                image=shown,
                layer=number,
                description=description,
                grid=reading["residual"].grid,
                tokens=tokens,
                norms=residual[first:].norm(dim=-1).cpu().unflatten(0, reading["residual"].grid),
                attention=reading["attention"].at(number) if reader.reads_attention else None,
                keys=reading["k"].at(number),
                cutoff=self._cutoffs[name].get(number),
            )
        return views

    def _find_cutoffs(self, name: str, images: Sequence[Image.Image]) -> dict[int, float]:
        """Return the cut-off of each block with a distinct group of high norms, over several images."""
        reader, description = self.readers[name], self.readers[name].description
        logger.info("Measuring the usual norms of each block on %d reference images in %s.", len(images), name)
        layers = tuple(range(1, description.num_layers + 1))
        side = self.default_side(name) if reader.takes_other_sizes else None
        transform = reader.transform_for(image_size=side)
        norms: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        first = description.num_prefix_tokens

        def keep(values: Tensor, _: int) -> Tensor:
            return values[:, first:].float().norm(dim=-1).cpu()

        for _, pixels in prepare_images(list(images), transform, batch_size=4):
            for layer, values in zip(layers, reader.read(pixels, layers=layers, reduce=keep).values):
                norms[layer].append(values)
        found = {layer: _cutoff_of(values, name) for layer, values in norms.items()}
        return {layer: cutoff.cutoff for layer, cutoff in found.items() if cutoff.bimodal}


def _cutoff_of(norms: Sequence[Tensor], name: str) -> Cutoff:
    joined = torch.cat([values.flatten() for values in norms])
    if not torch.isfinite(joined).all():
        raise ValueError(f"'{name}' produces NaN or infinity. Check its weights.")
    return find_cutoff(joined.numpy())
