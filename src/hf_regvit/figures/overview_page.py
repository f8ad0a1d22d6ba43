"""An HTML overview of norms, attention and PCA maps for a handful of images."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from torch import nn

from ..models.loading import open_model
from ..models.tokens import TokenReader
from .maps import overview_figure, read_token_maps, save_figure
from .pages import data_url, render


def overview_page(
    model: TokenReader | nn.Module | str | Path,
    images: Mapping[str, Image.Image],
    *,
    out_dir: str | Path,
    title: str = "Attention, PCA and norms",
    short_side: int | None = None,
) -> Path:
    """Write an HTML page of whole images with their attention maps, PCA and norms.

    Args:
        model: Name, module or reader; see `open_model`. A module keeps its mode and attention implementation. Only the
            statistics of its image processor are used: images are resized to whole patches, not cropped.
        images: Images by name, of any size and aspect ratio.
        out_dir: Output folder for `index.html`, with all figures embedded, and one PNG file per image.
        title: Heading of the page.
        short_side: Length of the shorter side in pixels, rounded to patches; default 32 patches.

    Returns:
        Path of `index.html`.

    Raises:
        ValueError: No images, or a model whose image processor is not known.
    """
    if not images:
        raise ValueError("images is empty. Pass at least one image by name.")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    reader = open_model(model)
    side = 32 * max(reader.description.patch_size) if short_side is None else short_side
    transform = reader.transform_for(image_size=side, keep_aspect=True)
    entries = []
    for number, (name, image) in enumerate(images.items()):
        pixels = transform(image.convert("RGB"))
        resized = transform.picture(pixels)
        (maps,) = read_token_maps(reader, pixels[None])
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
    page.write_text(render("overview.html", title=title, model=reader.description, images=entries), encoding="utf-8")
    return page
