"""An HTML overview of norms, attention and PCA maps for a handful of images."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from .maps import _png, fit_to_patches, overview_figure, read_token_maps

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
    entries = []
    for number, (name, image) in enumerate(images.items()):
        resized = fit_to_patches(image.convert("RGB"), patch=model.config.patch_shape, short_side=short_side)
        pixels = image_processor(images=resized, do_resize=False, do_center_crop=False, return_tensors="pt")
        (maps,) = read_token_maps(model, pixels["pixel_values"])
        png = _png(overview_figure(resized, maps))
        # The number distinguishes names that differ only in characters not allowed in file names.
        file = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)[:80]
        (out_dir / f"{number:03d}_{file}.png").write_bytes(png)
        rows, columns = maps.norms.shape
        caption = f"{resized.width} x {resized.height} px, {columns} x {rows} patches"
        if (similarity := maps.register_similarity()) is not None:
            caption += f", mean cosine between registers {similarity:.2f}"
        entries.append((name, caption, png))
    page = out_dir / "index.html"
    page.write_text(_page_text(title, model, entries), encoding="utf-8")
    return page


def _page_text(title: str, model: "RegViTModel", entries: Sequence[tuple[str, str, bytes]]) -> str:
    config = model.config
    pictures = "\n".join(
        f"<figure><figcaption><b>{html.escape(name)}</b> <span>{html.escape(size)}</span></figcaption>"
        f'<img alt="maps of {html.escape(name)}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>'
        for name, size, png in entries
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto; max-width: 90rem;
  padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; }}
p {{ max-width: 60rem; }}
figure {{ margin: 1.2rem 0; }}
figcaption span {{ color: #666; font-size: 0.85rem; }}
img {{ max-width: 100%; height: auto; display: block; }}
</style></head><body>
<h1>{html.escape(title)}</h1>
<p>Maps of a RegViT with {config.num_hidden_layers} blocks, width {config.hidden_size}, patches of
{config.patch_shape[0]} x {config.patch_shape[1]} px and {config.num_register_tokens} registers, on whole images.
<b>Attention</b>: last block, averaged over heads, from CLS and from each register to every patch. Each map has its own
scale, and the number below it is the share of attention on patches. Registers with a mean cosine near 1 are nearly
identical and attend to the same patches. <b>PCA</b>: first three principal components of the patch tokens of the image
as red, green and blue. <b>Norm</b>: L2 norm of the patch tokens before the final norm; isolated bright spots are
artifacts.</p>
{pictures}
</body></html>
"""
