"""Make the figures of the documentation from real weights and the images that ship with scikit-image.

    make demo
    python scripts/dev/docs_figures.py --model FOLDER_OF_VIT_TINY_WITH_IMAGENET_WEIGHTS

`--model` is a ViT without registers that has artifacts, `--registers` a RegViT. Every PNG is in full color and smaller
than 600 kB. The screenshot of the demo page needs Chromium and playwright; without them it is not updated.
"""

import argparse
import shutil
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image, ImageOps

from hf_regvit.app.exploration import Explorer, InputImage
from hf_regvit.data.builtin import builtin_images
from hf_regvit.diagnosis.diagnose import diagnose
from hf_regvit.diagnosis.register_neurons import add_test_time_registers, find_register_neurons
from hf_regvit.figures.maps import (
    attention_limits,
    before_after_figure,
    layer_norm_figure,
    lost_figure,
    overview_figure,
    read_token_maps,
    save_figure,
)
from hf_regvit.models.conversion import convert
from hf_regvit.models.loading import open_model
from hf_regvit.models.tokens import TokenReader

LARGEST = 600_000  # bytes
WIDEST = 1400  # pixels


def keep(path: Path) -> None:
    """Cut off the white border, and reduce the number of pixels if necessary; all colors stay."""
    image = Image.open(path).convert("RGB")
    image = ImageOps.expand(image.crop(ImageOps.invert(image).getbbox()), border=8, fill="white")
    for width in (min(image.width, WIDEST), 1100, 900, 700):
        smaller = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
        smaller.save(path, optimize=True)
        if path.stat().st_size < LARGEST:
            print(f"{path}: {smaller.width} x {smaller.height} pixels, {path.stat().st_size // 1000} kB")
            return
    raise ValueError(f"{path} has {path.stat().st_size} bytes at 700 pixels. Use a simpler figure.")


def stack(paths: list[Path], out: Path) -> None:
    """Stack figures vertically."""
    images = [Image.open(path).convert("RGB") for path in paths]
    page = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), "white")
    top = 0
    for image in images:
        page.paste(image, (0, top))
        top += image.height
    page.save(out)
    for path in paths:
        path.unlink()


def overviews(explorer: Explorer, name: str, names: list[str], out: Path, *, side: int) -> None:
    parts = []
    for photo in names:
        view = explorer.view(InputImage.of(builtin_images()[photo], photo), name, side=side)
        parts.append(out.with_name(f"part_{photo}.png"))
        save_figure(overview_figure(view.image, view.maps()), parts[-1])
    stack(parts, out)
    keep(out)


def register_figure(explorer: Explorer, names: list[str], *, side: int) -> Figure:
    """Draw the attention of CLS and of each register, one row per image, large enough for a page of text."""
    figure = Figure(figsize=(9, 2.3), dpi=150)
    grid = figure.subplots(len(names), 6, gridspec_kw={"wspace": 0.05, "hspace": 0.05})
    figure.subplots_adjust(0.005, 0.01, 0.995, 0.9)
    for row, name in zip(grid, names, strict=True):
        view = explorer.view(InputImage.of(builtin_images()[name], name), "registers", side=side)
        row[0].imshow(view.image)
        for axis, values in zip(row[1:], view.maps().attention, strict=True):
            low, high = attention_limits(values)
            extent = (0, view.image.width, view.image.height, 0)
            axis.imshow(values, cmap="magma", vmin=low, vmax=high, interpolation="bicubic", extent=extent)
        for axis in row:
            axis.axis("off")
    for axis, title in zip(grid[0], ["image", "CLS", *(f"register {i}" for i in range(1, 5))], strict=True):
        axis.set_title(title, fontsize=11)
    return figure


def before_after(folder: str, names: list[str], out: Path) -> None:
    """Draw a model before and after adding the two neurons and four test-time registers that `retrofit` selects."""
    source, original = convert(folder), open_model(folder)
    neurons = find_register_neurons(source, list(builtin_images().values()), processor=original.processor)
    made = add_test_time_registers(source, neurons.best(2), num_register_tokens=4)
    transform = original.transform_for(image_size=224)
    pixels = torch.stack([transform(builtin_images()[name]) for name in names])
    maps = [read_token_maps(model, pixels) for model in (source, made)]
    save_figure(before_after_figure([transform.picture(each) for each in pixels], *maps), out)
    keep(out)


def token_figure() -> Figure:
    """Draw the token sequence of a RegViT and the output of each kind of token."""
    figure = Figure(figsize=(8, 2.5))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 16), ylim=(0, 5))
    axis.axis("off")
    kinds = [("CLS", 1, "#222222"), ("registers", 4, "#ff7a1a"), ("patches", 8, "#0072b2")]
    notes = [
        "pooler_output:\nwhole image",
        "register_tokens:\nscratch space",
        "patch_tokens:\ndense features",
    ]
    left = 1.3
    for (name, count, color), note in zip(kinds, notes, strict=True):
        for i in range(count):
            axis.add_patch(FancyBboxPatch((left + i, 2.2), 0.72, 1.1, boxstyle="round,pad=0.06", fc=color, ec="none"))
        middle = left + count / 2 - 0.1
        axis.text(middle, 4.2, name, ha="center", fontsize=12, color=color, weight="bold")
        axis.text(middle, 0.9, note, ha="center", va="center", fontsize=10, color="#222222")
        left += count + 0.75
    return figure


def demo_screenshot(models: dict[str, TokenReader], out: Path, *, compare: str | None = None) -> None:
    """Take a screenshot of the demo page; for two models, of their maps of the whole image only."""
    from playwright.sync_api import sync_playwright

    from hf_regvit.app.demo import build_app, launch_options

    app = build_app(models, compare=compare)
    _, address, _ = app.launch(**launch_options(), prevent_thread_lock=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 960})
        page.goto(address)
        page.locator(".maps .card").first.wait_for(timeout=120_000)
        page.wait_for_timeout(1000)
        if compare is None:
            page.screenshot(path=out)
        else:
            others = page.locator(".maps section").filter(has_not=page.locator("h2", has_text="Whole image"))
            others.evaluate_all("sections => sections.forEach(section => section.remove())")
            page.locator(".maps").screenshot(path=out)
        browser.close()
    app.close()
    keep(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a ViT without registers, with artifacts")
    parser.add_argument("--registers", default="runs/demo-photos/backbone", help="a RegViT, e.g. from `make demo`")
    parser.add_argument("--out_dir", type=Path, default=Path("docs/figures"))
    parser.add_argument("--retrofitted", help="the first model after `regvit retrofit`")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    models = {Path(arguments.model).name: open_model(arguments.model), "registers": open_model(arguments.registers)}
    retrofitted = open_model(arguments.retrofitted) if arguments.retrofitted else None
    plain = next(iter(models))
    explorer = Explorer(models)

    overviews(explorer, plain, ["china", "chelsea", "flower"], arguments.out_dir / "artifacts.png", side=224)
    save_figure(register_figure(explorer, ["china", "flower"], side=192), arguments.out_dir / "registers.png")
    keep(arguments.out_dir / "registers.png")

    before_after(arguments.model, ["china", "chelsea", "flower"], arguments.out_dir / "test_time_registers.png")

    view = explorer.view(InputImage.of(builtin_images()["china"], "china"), plain, side=224)
    save_figure(lost_figure(view.image, view.object), arguments.out_dir / "lost.png")
    keep(arguments.out_dir / "lost.png")

    reader = models[plain]
    report = diagnose(reader.model, list(builtin_images().values()), processor=reader.processor, progress=False)
    save_figure(layer_norm_figure(report), arguments.out_dir / "norms_by_layer.png")
    keep(arguments.out_dir / "norms_by_layer.png")

    save_figure(token_figure(), arguments.out_dir / "tokens.png")
    keep(arguments.out_dir / "tokens.png")
    if shutil.which("chromium"):
        demo_screenshot({plain: models[plain]}, arguments.out_dir / "demo.png")
        if retrofitted:
            both = {plain: models[plain], "with_registers": retrofitted}
            demo_screenshot(both, arguments.out_dir / "demo_before_after.png", compare="with_registers")


if __name__ == "__main__":
    main()
