"""The results page of the demo, as HTML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..figures.maps import attention_limits, color_image, colored, distinct_registers, stretch
from ..figures.pages import data_url, render
from ..models.tokens import Query
from .exploration import Explorer, InputImage, Place, View

TEMPLATES = Path(__file__).parent / "templates"
_FINE = 4  # pixels per patch and side of a smooth map; the browser enlarges further


@dataclass(frozen=True)
class MapRequest:
    """Settings of one request for maps.

    Attributes:
        models: Names of the models, one or two.
        side: Length of the shorter side of the image in pixels.
        layer: Number of the block, 1 to L of the first model.
        head: Number of the attention head from 1; 0 is the mean over heads.
        place: Selected place.
    """

    models: tuple[str, ...]
    side: int
    layer: int
    head: int = 0
    place: Place = (0.5, 0.5)


@dataclass(frozen=True)
class _Panel:
    """Image, a layer of color and frames over it, and a note below; or the reason why there is none."""

    label: str = ""
    note: str = ""
    grid: tuple[int, int] = (1, 1)
    image: str = ""  # address of the layer
    pixels: bool = False  # one square per patch instead of smooth colors
    gray: bool = False  # input image in gray below the layer
    keys: bool = False  # accepts the arrow keys
    outliers: Sequence[Sequence[int]] = ()  # cells
    query: tuple[int, int] | None = None  # selected cell
    box: tuple[int, ...] | None = None  # corners in cells
    missing: str = ""


def read_views(explorer: Explorer, image: InputImage, request: MapRequest) -> dict[str, View]:
    """Return the view of each model. In the second model, the block is as far from the last one as in the first."""
    depth = explorer.readers[request.models[0]].description.num_layers
    views = {}
    for name in request.models:
        layer = max(explorer.readers[name].description.num_layers - (depth - request.layer), 1)
        views[name] = explorer.view(image, name, side=request.side, layer=layer)
    return views


def results_page(views: Mapping[str, View], request: MapRequest, *, address: str = "") -> str:
    """Return all maps of one image as HTML; two models are labeled A and B.

    Args:
        views: Views of one or two models by name.
        request: Settings of the maps.
        address: Query of the address that shows the same again.
    """
    shown = dict(zip("AB", views.values()))
    first = shown["A"]
    kinds = {
        "image": _image, "patch": _patch, "similar": _similar, "cls": _cls, "norms": _norms, "colors": _colors,
        "object": _object,
    }  # fmt: skip
    registers = {letter: _registers(view, request) for letter, view in shown.items()}
    return render(
        "demo_results.html",
        folder=TEMPLATES,
        models=[_summary(name, view) | {"letter": letter} for letter, (name, view) in zip("AB", views.items())],
        heads=f"head {request.head}" if request.head else "mean over the heads",
        image=data_url(first.image, "JPEG"),
        ratio=first.image.size,
        grid=first.grid,  # for the arrow keys, which move over the patches of the first model
        cell=first.cell(request.place),
        maps={kind: [(letter, draw(view, request)) for letter, view in shown.items()] for kind, draw in kinds.items()},
        registers=[
            [(letter, panels[i]) for letter, panels in registers.items() if i < len(panels)]
            for i in range(max(map(len, registers.values())))
        ],
        address=address,
    )


def _registers(view: View, request: MapRequest) -> list[_Panel]:
    """Return the attention of the registers; equal ones are one map."""
    count = view.description.num_register_tokens
    if not count:
        return []
    if view.attention is None:
        return [_attention(view, request, ("register", 0), "registers")]  # says why there is none
    found = distinct_registers(torch.stack([view.attention_from(("register", i)) for i in range(count)]))
    return [_attention(view, request, ("register", int(name.split()[1]) - 1), name) for name, _ in found]


def _summary(name: str, view: View) -> dict[str, Any]:
    """Return the numbers of the card that says how many artifacts one model has in the image."""
    description, outliers, norms = view.description, view.outliers, view.norms
    has_cls = description.has_cls
    count = int(outliers.sum())
    return {
        "name": name,
        "count": count,
        "total": outliers.numel(),
        "norm_ratio": (norms[outliers].median() / norms[~outliers].median()).item() if count else None,
        "cutoff": view.cutoff,
        "share": view.attention_from("cls")[outliers].sum().item() if view.attention is not None and has_cls else None,
        "num_registers": description.num_register_tokens,
        "layer": view.layer,
        "num_layers": description.num_layers,
        "size": f"{view.image.width} x {view.image.height} px = {view.grid[1]} x {view.grid[0]} patches",
    }


# --- Maps


def _image(view: View, request: MapRequest) -> _Panel:
    row, column = cell = view.cell(request.place)
    return _Panel(
        label=f"input image; the patch in column {column + 1}, row {row + 1} is selected",
        note=f"patch {column + 1}, {row + 1}",  # as (x, y)
        grid=view.grid,
        outliers=view.outliers.nonzero().tolist(),
        query=cell,
        keys=True,
    )


def _patch(view: View, request: MapRequest) -> _Panel:
    return _attention(view, request, ("patch", *view.cell(request.place)), "the selected patch")


def _cls(view: View, request: MapRequest) -> _Panel:
    if not view.description.has_cls:
        return _Panel(missing="This model has no CLS token.")
    return _attention(view, request, "cls", "CLS")


def _attention(view: View, request: MapRequest, query: Query, name: str) -> _Panel:
    if view.attention is None:
        return _Panel(missing="The attention of this model has a formula that is not known.")
    if request.head > view.description.num_heads:
        return _Panel(missing=f"This model has only {view.description.num_heads} heads.")
    map_ = view.attention_from(query, head=request.head - 1 if request.head else None)
    return _Panel(
        label=f"attention of {name}",
        # Each map has its own scale; the note tells a map with a peak from a flat one.
        note=f"{map_.sum():.1%} on patches, peak {map_.max() / map_.mean():.2g}x the mean",
        grid=view.grid,
        image=data_url(_overlay(stretch(map_, *attention_limits(map_)))),
        gray=True,
        query=view.cell(request.place) if query[0] == "patch" else None,
    )


def _similar(view: View, request: MapRequest) -> _Panel:
    cell = view.cell(request.place)
    map_ = view.similarity_to(cell)
    low = map_.min().item()
    return _Panel(
        label="similarity to the selected patch",
        note=f"cosine {low:.2f} to 1",
        grid=view.grid,
        image=data_url(_smooth(colored(stretch(map_, low, 1), "viridis"))),
        query=cell,
    )


def _norms(view: View, request: MapRequest) -> _Panel:
    low, high = view.norms.min().item(), view.norms.max().item()
    return _Panel(
        label="norms of the patches",
        note=f"L2 norm {low:.3g} to {high:.3g}",
        grid=view.grid,
        image=data_url(colored(stretch(view.norms, low, high), "viridis")),
        pixels=True,
        outliers=view.outliers.nonzero().tolist(),
    )


def _colors(view: View, request: MapRequest) -> _Panel:
    return _Panel(label="PCA of the patches", image=data_url(_smooth(color_image(view.colors))))


def _object(view: View, request: MapRequest) -> _Panel:
    """Darken everything outside of the object."""
    found = view.object
    note = f"{int(found.mask.sum())} of {found.mask.numel()} patches"
    return _Panel(
        label="object found by LOST",
        note="uncertain: patches hardly differ" if found.degenerate else note,
        grid=view.grid,
        image=data_url(color_image(torch.cat([torch.zeros(*view.grid, 3), 0.62 * (~found.mask)[..., None]], dim=-1))),
        pixels=True,
        box=found.cells,
    )


def _overlay(shade: Tensor) -> Image.Image:
    """Return attention as a colored image that is transparent where there is no attention."""
    fine = np.asarray(_smooth(Image.fromarray((shade.numpy() * 255).round().astype(np.uint8))), dtype=np.float32) / 255
    image = colored(torch.from_numpy(fine), "magma")
    image.putalpha(Image.fromarray((230 * np.sqrt(fine)).round().astype(np.uint8)))
    return image


def _smooth(image: Image.Image) -> Image.Image:
    return image.resize((image.width * _FINE, image.height * _FINE), Image.Resampling.BICUBIC)
