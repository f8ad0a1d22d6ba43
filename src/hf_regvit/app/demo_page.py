"""The results page of the demo, as HTML."""

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .exploration import Explorer, InputImage, View

_TEMPLATES = Path(__file__).parent / "templates"
_NO_COMPARISON = "none"
_MEAN = "mean over heads"
_SMOOTH = 4  # pixels per patch and side; the browser enlarges further

_TITLE = "What does a vision transformer look at?"
_LEAD = (
    "It cuts an image into patches, which exchange information through attention. Many large models use a few "
    "background patches to store information about the whole image. These patches become <b>artifacts</b>: their "
    "norm is very large, and they no longer describe what they show. <b>Registers</b> are extra tokens that store "
    "this information instead."
)
_HELP = """
- **Click any map** to select a patch. The white square moves there, and the maps under "One patch" show the
  selected patch. The dot under the mouse pointer marks the same place in all maps.
- **Orange frames** mark artifacts. The cut-off is not set by hand. It lies between two distinct groups of norms,
  measured on {reference} reference images for each block. If a block has no such groups, the maps have no frames.
- **Attention** maps are bright where a token attends, and each map has its own scale. The caption gives the share of
  the attention on patches (the rest goes to CLS and to the registers), and the peak, which is the largest attention
  to a patch divided by the mean over patches. A map with a peak near 1 is flat, however colorful it looks.
- **PCA** shows similar tokens in similar colors. Artifacts interrupt areas of uniform color.
- **Object** shows the object that LOST finds without labels. LOST starts from the patch that resembles the fewest
  others.
- **Block** selects how deep in the model the maps are read, and **head** selects one attention head.
- Everything is computed on the machine that runs this demo. Uploaded images are deleted after an hour at most, and
  nothing is sent elsewhere.
"""


@dataclass(frozen=True)
class Question:
    """Settings of one request. `place` is (x, y) in [0, 1) from the top left; `head` counts from 1, 0 is the mean."""

    models: tuple[str, ...]
    side: int
    layer: int
    head: int = 0
    place: tuple[float, float] = (0.5, 0.5)


# --- The page without Gradio: questions in, HTML and files out ---


def look(explorer: Explorer, picture: InputImage, question: Question) -> dict[str, View]:
    """Return the view of each model. In the second model, the block is as far from the last one as in the first."""
    depth = explorer.descriptions[question.models[0]].num_layers
    views = {}
    for name in question.models:
        layer = max(explorer.descriptions[name].num_layers - (depth - question.layer), 1)
        views[name] = explorer.view(picture, name, side=question.side, layer=layer)
    return views


def results_page(views: Mapping[str, View], question: Question) -> str:
    """Return all maps of one image as HTML; two models are labeled A and B."""
    shown = dict(zip("AB", views.values()))
    head = None if question.head == 0 else question.head - 1
    heads = "mean over the heads" if head is None else f"head {question.head}"
    patch = [
        _kind("Image", "Input of the model. Orange frames mark artifacts.", shown, partial(_picture, question)),
        _kind(
            "Attention of the patch",
            f"Bright where the patch attends; {heads}.",
            shown,
            partial(_patch, question, head),
        ),
        _kind("Similar patches", "Bright where tokens are similar to the patch.", shown, partial(_similar, question)),
    ]
    whole = [
        _kind("Attention of CLS", f"CLS summarizes the image; {heads}.", shown, partial(_query, head, "cls")),
        _kind("Norms", "L2 norms of the patches. Orange frames mark artifacts.", shown, _norms),
        _kind("PCA", "Similar tokens have similar colors.", shown, _colors),
        _kind("Object", "Found by LOST, without labels.", shown, _object),
    ]
    body = _section(
        "One patch", "Marked by the white square. Click any map to move it, or use the arrow keys on the image.", patch
    )
    body += _section("Whole image", "All patches at the selected block.", whole)
    counts = {letter: view.description.num_register_tokens for letter, view in shown.items()}
    if most := max(counts.values()):
        kinds = []
        for i in range(most):
            owners = {letter: view for letter, view in shown.items() if i < counts[letter]}
            kinds.append(
                _kind(f"Register {i + 1}", f"Bright where it attends; {heads}.", owners, partial(_query, head, i))
            )
        body += _section(
            "Registers", "Extra tokens that belong to no place in the image, and what they attend to.", kinds
        )
    cards = "".join(_card(name, view, letter) for (name, view), letter in zip(views.items(), "AB"))
    if len(shown) == 2:
        cards = f"<p class=verdict>{_verdict(*views.values())}</p>{cards}"
    first = next(iter(views.values()))
    image, (row, column) = first.image, first.cell(question.place)
    style = f"--picture:url(data:image/jpeg;base64,{_jpeg(image)});--ratio:{image.width}/{image.height}"
    # For the arrow keys, which move over the patches of the first model.
    grid = f"data-rows={first.grid[0]} data-columns={first.grid[1]} data-row={row} data-column={column}"
    return f'<div class="looks models-{len(views)}" style="{style}" {grid}><div class=cards>{cards}</div>{body}</div>'


def _section(title: str, text: str, kinds: Sequence[str]) -> str:
    columns = "three" if len(kinds) == 3 else "four"
    return f'<section><h2>{title}</h2><p>{text}</p><div class="kinds {columns}">{"".join(kinds)}</div></section>'


def _verdict(a: View, b: View) -> str:
    """Compare the artifacts of both models in one sentence."""
    in_a, in_b = int(a.outliers.sum()), int(b.outliers.sum())
    if in_a and in_b:
        return f"Both models have artifacts in this image: {in_a} in A, {in_b} in B."
    if not in_a and not in_b:
        return "Neither model has artifacts in this image."
    return f"{'A' if in_a else 'B'} has artifacts in this image ({max(in_a, in_b)}), {'B' if in_a else 'A'} has none."


def _card(name: str, view: View, letter: str) -> str:
    """Return the card that says how many artifacts one model has in the image."""
    d, outliers = view.description, view.outliers
    count, total = int(outliers.sum()), outliers.numel()
    if count:
        big, usual = view.norms[outliers].median().item(), view.norms[~outliers].median().item()
        are = "is an artifact" if count == 1 else "are artifacts"
        kind = "found"
        words = f"<b>{count} of {total} patches {are}</b>, with {big / usual:.0f} times the norm of the others."
    elif view.cutoff is None:
        kind, words = "clean", "<b>No distinct artifacts</b> were found in this model at this block."
    else:
        kind, words = "clean", "<b>No artifacts in this image</b>, but the model has artifacts in others."
    if d.has_cls:
        share = f"{view.attention_from('cls')[outliers].sum().item():.0%}"
        words += (
            f"<span class=share style=--share:{share}>Artifacts receive {share} of the attention of CLS.<i></i></span>"
        )
    registers = f"{d.num_register_tokens} registers" if d.num_register_tokens else "no registers"
    size = f"{view.image.width} x {view.image.height} px = {view.grid[1]} x {view.grid[0]} patches"
    return (
        f'<div class="card {kind}"><i class=letter>{letter}</i><div><h3>{html.escape(name)}</h3>'
        f"<p>{words}</p><small>{registers}, block {view.layer} of {d.num_layers}, {size}</small></div></div>"
    )


def _kind(title: str, text: str, shown: Mapping[str, View], draw: Callable[[View, str], str]) -> str:
    """Return one kind of map for every model, by letter."""
    maps = "".join(draw(view, letter) for letter, view in shown.items())
    return f"<article><h3>{title}</h3><p>{text}</p><div class=pair>{maps}</div></article>"


def _figure(
    view: View, letter: str, label: str, *, layers: str = "", note: str = "", gray: bool = False, keys: bool = False
) -> str:
    """Return the input image with `layers` (images, drawings) over it and a note below; `keys`: accepts arrow keys."""
    base = "base grey" if gray else "base"
    role = "role=application tabindex=0" if keys else "role=img"
    return (
        f'<figure><div class=map {role} aria-label="{html.escape(label)}"><div class="{base}"></div>{layers}'
        f"<i class=dot></i></div><figcaption><i class=letter>{letter}</i> {note}</figcaption></figure>"
    )


def _missing(letter: str, reason: str) -> str:
    caption = f"<figcaption><i class=letter>{letter}</i></figcaption>"
    return f'<figure><div class="map empty"><span>{reason}</span></div>{caption}</figure>'


def _picture(question: Question, view: View, letter: str) -> str:
    row, column = view.cell(question.place)
    note = f"patch {column + 1}, {row + 1}"  # as (x, y)
    label = f"input image; the patch in column {column + 1}, row {row + 1} is selected"
    marks = _frames(view, view.outliers) + _frames(view, _at(view, (row, column)), kind="query")
    if letter == "A":
        label += "; the arrow keys select another one"
    return _figure(view, letter, label, layers=marks, note=note, keys=letter == "A")


def _patch(question: Question, head: int | None, view: View, letter: str) -> str:
    cell = view.cell(question.place)
    return _attention(view, letter, "the selected patch", cell, head)


def _query(head: int | None, query: Any, view: View, letter: str) -> str:
    if query == "cls" and not view.description.has_cls:
        return _missing(letter, "This model has no CLS token.")
    return _attention(view, letter, "CLS" if query == "cls" else f"register {query + 1}", query, head)


def _attention(view: View, letter: str, name: str, query: Any, head: int | None) -> str:
    if head is not None and head >= view.description.num_heads:
        return _missing(letter, f"This model has only {view.description.num_heads} heads.")
    map_ = view.attention_from(query, head=head)
    # Clip, or a few patches with most of the attention would leave the rest of the map black.
    low, high = torch.quantile(map_.flatten(), torch.tensor([0.01, 0.995])).tolist()
    shade = ((map_ - low) / max(high - low, 1e-12)).clamp(0, 1)
    marks = _frames(view, _at(view, query), kind="query") if isinstance(query, tuple) else ""
    layers = _image(_overlay(shade)) + marks
    # Each map has its own scale; the note tells a map with a peak from a flat one.
    note = f"{map_.sum():.1%} on patches, peak {map_.max() / map_.mean():.2g} x mean"
    return _figure(view, letter, f"attention of {name}", layers=layers, note=note, gray=True)


def _similar(question: Question, view: View, letter: str) -> str:
    cell = view.cell(question.place)
    map_ = view.similarity_to(cell)
    low = map_.min().item()
    shade = (map_ - low) / max(1 - low, 1e-6)
    layers = _image(_smooth(_colored(shade, "viridis"))) + _frames(view, _at(view, cell), kind="query")
    return _figure(view, letter, "similarity to the selected patch", layers=layers, note=f"cosine {low:.2f} to 1")


def _norms(view: View, letter: str) -> str:
    norms = view.norms
    low, high = norms.min().item(), norms.max().item()
    shade = (norms - low) / max(high - low, 1e-12)
    layers = _image(_colored(shade, "viridis"), kind="pixels") + _frames(view, view.outliers)
    return _figure(view, letter, "norms of the patches", layers=layers, note=f"{low:.3g} to {high:.3g}")


def _colors(view: View, letter: str) -> str:
    return _figure(view, letter, "PCA of the patches", layers=_image(_smooth(_pixels(view.colors))))


def _object(view: View, letter: str) -> str:
    found = view.object
    rows, columns = view.grid
    x1, y1, x2, y2 = found.cells
    # Darken everything outside of the mask; the box is orange.
    dark = torch.zeros(rows, columns, 4)
    dark[..., 3] = 0.62 * (~found.mask).float()
    box = f'<rect x="{x1}" y="{y1}" width="{x2 - x1}" height="{y2 - y1}" class=box />'
    layers = _image(_pixels(dark), kind="pixels") + _drawing(view, box)
    note = f"{int(found.mask.sum())} of {rows * columns} patches"
    if found.degenerate:
        note = "uncertain: patches hardly differ"
    return _figure(view, letter, "object found by LOST", layers=layers, note=note)


# --- Pixels ---


def _at(view: View, cell: tuple[int, int]) -> Tensor:
    mask = torch.zeros(view.grid, dtype=torch.bool)
    mask[cell] = True
    return mask


def _frames(view: View, mask: Tensor, *, kind: str = "outlier") -> str:
    cells = mask.nonzero().tolist()
    kinds = ("under", kind) if kind == "query" else (kind,)  # white on black, visible on white areas too
    shapes = (f'<rect x="{c}" y="{r}" width="1" height="1" class={name} />' for r, c in cells for name in kinds)
    return _drawing(view, "".join(shapes))


def _drawing(view: View, shapes: str) -> str:
    rows, columns = view.grid
    box = f'viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" aria-hidden="true"'
    return f"<svg {box}>{shapes}</svg>" if shapes else ""


def _colored(shade: Tensor, colors: str) -> Image.Image:
    """Return (rows, columns) values in [0, 1] as a colored image with one pixel per value."""
    from matplotlib import colormaps

    return Image.fromarray((colormaps[colors](shade.numpy())[..., :3] * 255).round().astype(np.uint8))


def _overlay(shade: Tensor) -> Image.Image:
    """Return attention as a colored image that is transparent where there is no attention."""
    fine = Image.fromarray((shade.numpy() * 255).round().astype(np.uint8))
    fine = fine.resize((fine.width * _SMOOTH, fine.height * _SMOOTH), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.asarray(fine, dtype=np.float32) / 255)
    colored = _colored(values, "magma")
    colored.putalpha(Image.fromarray((230 * values.sqrt().numpy()).round().astype(np.uint8)))
    return colored


def _pixels(values: Tensor) -> Image.Image:
    """Return (rows, columns, 3 or 4) values in [0, 1] as an image with one pixel per cell."""
    return Image.fromarray((values * 255).round().byte().numpy())


def _smooth(image: Image.Image) -> Image.Image:
    return image.resize((image.width * _SMOOTH, image.height * _SMOOTH), Image.Resampling.BICUBIC)


def _image(image: Image.Image, *, kind: str = "smooth") -> str:
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return f'<img class={kind} alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _jpeg(image: Image.Image) -> str:
    buffer = BytesIO()
    image.save(buffer, format="JPEG", quality=90)
    return base64.b64encode(buffer.getvalue()).decode()
