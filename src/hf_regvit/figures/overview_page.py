"""An HTML overview of norms, attention and PCA maps for a handful of images."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..models.families import describe_model
from .maps import fit_to_patches, overview_figure, read_token_maps, save_figure
from .pages import data_url, render

if TYPE_CHECKING:
    from ..models.modeling_regvit import RegViTModel


def overview_page(
    model: "RegViTModel",
    images: Mapping[str, Image.Image],
    *,
    image_processor: Any,
    out_dir: str | Path,
    title: str = "Attention, PCA and norms",
    short_side: int | None = None,
) -> Path:
    """Write an HTML page of whole images with their attention maps, PCA and norms.

    Args:
        model: `RegViTModel`; keeps its mode and attention implementation.
        images: Images by name, of any size and aspect ratio.
        image_processor: Image processor for the normalization only; images are resized to whole patches, not cropped.
        out_dir: Output folder for `index.html`, with all figures embedded, and one PNG file per image.
        title: Heading of the page.
        short_side: Length of the shorter side in pixels, rounded to patches; default 32 patches.

    Returns:
        Path of `index.html`.

    Raises:
        ValueError: No images.
    """
    if not images:
        raise ValueError("images is empty. Pass at least one image by name.")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    description = describe_model(model)
    entries = []
    for number, (name, image) in enumerate(images.items()):
        resized = fit_to_patches(image.convert("RGB"), patch=description.patch_size, short_side=short_side)
        pixels = image_processor(images=resized, do_resize=False, do_center_crop=False, return_tensors="pt")
        (maps,) = read_token_maps(model, pixels["pixel_values"])
        # The number distinguishes names that differ only in characters not allowed in file names.
        file = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)[:80]
        path = out_dir / f"{number:03d}_{file}.png"
        save_figure(overview_figure(resized, maps), path)
        rows, columns = maps.norms.shape
        caption = f"{resized.width} x {resized.height} px, {columns} x {rows} patches"
        if (similarity := maps.register_similarity()) is not None:
            caption += f", mean cosine between registers {similarity:.2f}"
        entries.append((name, caption, data_url(path.read_bytes())))
    page = out_dir / "index.html"
    page.write_text(render("overview.html", title=title, model=description, images=entries), encoding="utf-8")
    return page
