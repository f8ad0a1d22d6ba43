"""Pretrain, evaluate and save a small RegViT in a few minutes on two CPU cores.

    make demo                        built-in images of scikit-image and scikit-learn, cut into tiles
    DATA=path/to/folder make demo    your own images (a folder, class folders, parquet)

Pretrains a small RegViT with four registers without labels, compares its features with simple ones by k nearest
neighbors, saves and reloads it as a user would, and draws the attention maps of CLS and registers. A finished run is
reused, and an interrupted run continues; `--fresh` starts over.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
import yaml
from PIL import Image, ImageOps
from tqdm import tqdm

from hf_regvit import PretrainingArguments, RegViTModel, TokenReader, knn_classify, load_images, pretrain

HERE = Path(__file__).resolve().parent
MAX_IMAGES = 2000  # of a user's folder: enough for the few thousand steps of a demo, and ready in a minute or two
SHORT_SIDE = 256  # pixels, of the resized copies: four times the largest crop
NEIGHBOURS = 10


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="photos", help="'photos', 'digits', or a folder of images or parquet files")
    parser.add_argument(
        "--config", type=Path, default=HERE / "photos_cpu.yaml", help="recipe; default: photos_cpu.yaml"
    )
    parser.add_argument("--output_dir", type=Path, help="output folder; default: runs/demo-<data>")
    parser.add_argument("--fresh", action="store_true", help="delete an earlier run in this folder")
    options = parser.parse_args(argv)
    run = options.output_dir or Path("runs") / f"demo-{slug(options.data)}"
    try:
        demo(options.data, options.config, run, fresh=options.fresh)
    except KeyboardInterrupt:
        print(
            f"\nInterrupted. Run the same command to continue the run in {run}, or add --fresh to start over.",
            file=sys.stderr,
        )
        return 130
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def demo(data: str, recipe: Path, run: Path, *, fresh: bool = False) -> None:
    # Hide the progress bars for every file that is read or written. The bar of Trainer stays.
    transformers.logging.disable_progress_bar()
    if fresh:
        clear_run(run)
    with step("Images"):
        folder = prepare_images(data, run)
        train, held_out = open_parts(folder)
        print(
            f"  {len(train)} for training"
            + (f", {len(held_out)} held out" if held_out else ", no labeled test images")
        )
    arguments = read_recipe(recipe, folder, run, num_images=len(train))
    seconds = pretrain_or_reuse(arguments, run)
    backbone = run / "backbone"
    with step("Loading the saved model"):
        model, processor = load_and_compare(backbone, train[0].image)
    scores = neighbor_scores(train, held_out, arguments, model, processor, run / "scores.json")
    table = score_table(scores, train, held_out, seconds) if scores else ""
    write_card(backbone, model, data=data, seconds=seconds, table=table)
    figure = run / "attention.png"
    if not figure.exists() or figure.stat().st_mtime < (backbone / "model.safetensors").stat().st_mtime:
        with step("Figure"):
            draw_attention(model, processor, shown_images(data, train), figure)
    print()
    print(
        table
        or "The kNN comparison was skipped: it needs labeled test images (class folders with two or more classes).\n"
    )
    print(f"Checkpoint   {backbone}      AutoModel.from_pretrained('{backbone}') after `import hf_regvit`")
    print(f"Figure       {figure}")


# --- Images


def prepare_images(data: str, run: Path) -> str:
    """Return the training data: a built-in set unchanged, or the folder of resized copies that decode fast.

    Decoding a 12-megapixel image takes a hundred times longer than augmenting it. Unreadable images are reported and
    skipped. If images were added or removed since the last call, the run starts over.
    """
    if data in ("photos", "digits"):
        return data
    parts = {"train": load_images(data)}
    source = parts["train"]
    try:
        parts["validation"] = load_images(data, split="validation")
    except ValueError:  # there is no validation split
        if source.labels and len(source.label_names) > 1:
            order, labels = np.random.default_rng(0).permutation(len(source)), np.asarray(source.labels)
            of_classes = [order[labels[order] == label] for label in np.unique(labels)]
            held_out = np.sort(np.concatenate([part[: round(len(part) / 5)] for part in of_classes]))
            others = np.setdiff1d(order, held_out)
            parts = {"train": source.subset(others.tolist()), "validation": source.subset(held_out.tolist())}
    names = json.dumps({name: list(part.ids) for name, part in parts.items()})
    folder, listing = run / "images", run / "images" / "sources.json"
    if listing.exists() and listing.read_text() == names:
        return str(folder)
    if listing.exists():
        print("  The images have changed, so the run starts over.")
    clear_run(run)
    bad = [error for name, part in parts.items() for error in copy_images(part, folder / name)]
    for error in bad[:5]:
        print(f"  Skipped: {error}", file=sys.stderr)
    if len(bad) > 5:
        print(f"  Skipped: {len(bad) - 5} more unreadable images", file=sys.stderr)
    if not any((folder / "train").glob("*/*.jpg")):
        raise ValueError(f"None of the {len(source)} images in '{data}' can be read. Choose other --data.")
    for group in sorted((folder / "validation").glob("*")):
        if not (folder / "train" / group.name).exists():
            shutil.rmtree(group)  # no readable training image of this class was drawn
    listing.write_text(names)  # written last, because it marks the copy as complete
    return str(folder)


def copy_images(source, folder: Path) -> list[ValueError]:
    """Write resized copies into one subfolder per class, and return the errors of unreadable images."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(source))[:MAX_IMAGES])
    if len(source) > MAX_IMAGES:
        print(f"  {folder.name}: {MAX_IMAGES} of {len(source)} images, drawn at random")
    bad = []
    for index in tqdm(chosen.tolist(), desc=f"  preparing {folder.name}", unit="image", leave=False):
        try:
            record = source[index]
        except ValueError as error:  # the image cannot be used
            bad.append(error)
            continue
        # The class id keeps the order of the classes and separates names that differ only in special characters.
        group = "all" if record.label is None else f"{record.label:04d} {slug(source.label_names[record.label])}"
        path = folder / group / f"{index:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        shrink(record.image).save(path, quality=95)
    return bad


def shrink(image: Image.Image) -> Image.Image:
    scale = SHORT_SIDE / min(image.size)
    if scale >= 1:
        return image
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def open_parts(data: str):
    """Return the training images and the labeled test images, which are None if there are none."""
    train = load_images(data)
    try:
        held_out = load_images(data, split="validation")
    except ValueError:  # there is no validation split
        return train, None
    scorable = train.labels and held_out.labels and len(train.label_names) > 1 and len(train) >= NEIGHBOURS
    return train, (held_out if scorable else None)


def shown_images(data: str, train, limit: int = 6) -> list[Image.Image]:
    """Return the images to draw; for the built-in tiles, whole images of scikit-image."""
    if data == "photos":
        from skimage import data as samples

        names = ("astronaut", "chelsea", "coffee", "rocket", "camera", "coins")
        return [Image.fromarray(getattr(samples, name)()).convert("RGB") for name in names[:limit]]
    return [train[i].image for i in np.linspace(0, len(train) - 1, min(limit, len(train))).astype(int).tolist()]


# --- Training


def read_recipe(recipe: Path, data: str, run: Path, *, num_images: int):
    """Return the recipe's arguments for this data. A small folder gets smaller batches, but not more steps."""
    command = [sys.executable, "-m", "hf_regvit", "pretrain", "--dry_run", "--json", "--config", str(recipe)]
    command += ["--data", data, "--output_dir", str(run), "--save_total_limit", "1"]
    command += ["--knn_steps", "0"]  # the final table reports kNN once, on all images
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise ValueError(answer.stderr.strip().removeprefix("error: "))
    arguments = PretrainingArguments(**json.loads(answer.stdout))
    if num_images < 2:
        raise ValueError(f"'{data}' has {num_images} readable training image. Pretraining needs at least two images.")
    if num_images < arguments.per_device_train_batch_size:
        arguments.per_device_train_batch_size = num_images
        arguments.koleo_loss_weight = arguments.koleo_loss_weight if num_images >= 16 else 0.0
    return arguments


def pretrain_or_reuse(arguments, run: Path) -> float:
    """Train unless a run of the same recipe is finished, and return the training time in seconds."""
    recipe, report = run / "resolved_recipe.yaml", run / "report.json"
    if recipe.exists() and comparable(yaml.safe_load(recipe.read_text())) != comparable(arguments.resolved()):
        print("The earlier run used another recipe, so the run starts over.")
        clear_run(run, keep="images")
    if report.exists() and (run / "backbone" / "model.safetensors").exists():
        print(f"Pretraining   reusing the finished run in {run} (use --fresh to start over)")
        return json.loads(report.read_text())["seconds"]
    # "last" resumes from the newest intact checkpoint, or starts a new run if there is none.
    print("Pretraining   continuing" if list(run.glob("checkpoint-*")) else "Pretraining")
    arguments.resume_from_checkpoint = "last"
    pretrain(arguments)
    for folder in run.glob("checkpoint-*"):
        shutil.rmtree(folder)  # from here on only backbone/ and training/ are needed
    return json.loads(report.read_text())["seconds"]


def comparable(recipe: dict) -> dict:
    """Return a recipe without the options that may differ between two starts of the same run."""
    return {key: value for key, value in recipe.items() if key not in ("output_dir", "resume_from_checkpoint")}


def clear_run(run: Path, *, keep: str = "") -> None:
    """Delete the contents of a run folder, and refuse to delete other folders."""
    if not run.exists():
        return
    found = {path.name for path in run.iterdir()}
    if found and not found & {"images", "resolved_recipe.yaml"}:
        raise ValueError(f"'{run}' is not the folder of a demo run. Choose another --output_dir.")
    for path in run.iterdir():
        if path.name == keep:
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# --- Evaluation


def load_and_compare(folder: Path, image: Image.Image):
    """Load the folder with AutoModel and with the pipeline, and check that both return the same tokens."""
    from transformers import AutoImageProcessor, AutoModel, pipeline

    import hf_regvit  # noqa: F401 - registers the classes, so no trust_remote_code

    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    extractor = pipeline("image-feature-extraction", model=str(folder), image_processor=str(folder))
    with torch.no_grad():
        output = model(**processor(image, return_tensors="pt"))
    from_pipeline = torch.tensor(extractor(image))
    difference = (from_pipeline - output.last_hidden_state).abs().max().item()
    if not difference < 1e-5:
        raise ValueError(f"The tokens of AutoModel and of the pipeline differ by {difference:.2g} for {folder}.")
    _, registers, width = output.register_tokens.shape
    print(
        f"  AutoModel and pipeline('image-feature-extraction') agree to {difference:.0e}: CLS, {registers} registers, "
        f"{output.patch_tokens.shape[1]} patches of width {width}"
    )
    return model, processor


def neighbor_scores(train, held_out, arguments, model, processor, file: Path) -> dict[str, dict[str, float]] | None:
    """Return the 10-NN accuracy on test images for simple features, the untrained and the trained network."""
    if held_out is None:
        return None
    if file.exists():
        return json.loads(file.read_text())
    with step("Nearest neighbors"):
        images = [[source[i].image for i in range(len(source))] for source in (train, held_out)]
        torch.manual_seed(arguments.seed)
        untrained = RegViTModel(arguments.backbone_config()).eval()
        features = {
            "raw 16x16 pixels": [raw_pixels(part) for part in images],
            "color mean and deviation": [color_statistics(part) for part in images],
        }
        for name, network in (("untrained", untrained), ("trained", model)):
            features[name] = [network_features(network, processor, part) for part in images]
        scores = {name: accuracies(*pair, train.labels, held_out.labels) for name, pair in features.items()}
    file.write_text(json.dumps(scores, indent=2) + "\n")
    return scores


@torch.no_grad()
def network_features(network: RegViTModel, processor, images: Sequence[Image.Image]) -> torch.Tensor:
    """Return the CLS token and the mean patch token of every image, concatenated."""
    rows = []
    for start in range(0, len(images), 256):
        output = network(**processor(images[start : start + 256], return_tensors="pt"))
        rows.append(torch.cat([output.pooler_output, output.patch_tokens.mean(dim=1)], dim=-1))
    return torch.cat(rows)


def raw_pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    small = [np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC), dtype=np.float32) for image in images]
    return torch.from_numpy(np.stack(small)).flatten(1) / 255


def color_statistics(images: Sequence[Image.Image]) -> torch.Tensor:
    pixels = [np.asarray(image, dtype=np.float32).reshape(-1, 3) / 255 for image in images]
    return torch.from_numpy(np.stack([np.concatenate([p.mean(0), p.std(0)]) for p in pixels]))


def accuracies(train: torch.Tensor, test: torch.Tensor, train_labels, test_labels) -> dict[str, float]:
    """Return the accuracy with DINOv2's weighted vote by cosine and with the plain vote by Euclidean distance."""
    from sklearn.neighbors import KNeighborsClassifier

    k = min(NEIGHBOURS, len(train))
    plain = KNeighborsClassifier(k).fit(train.numpy(), train_labels)
    votes = knn_classify(train, torch.tensor(train_labels), test, k=(k,))[k]
    return {
        "cosine": (votes.argmax(dim=1) == torch.tensor(test_labels)).float().mean().item(),
        "euclidean": float(plain.score(test.numpy(), test_labels)),
    }


def score_table(scores: dict[str, dict[str, float]], train, held_out, seconds: float) -> str:
    counts = np.bincount(held_out.labels)
    names = {
        "untrained": "RegViT, untrained",
        "trained": f"RegViT, after {seconds / 60:.1f} minutes",
    }
    lines = [
        f"{NEIGHBOURS}-NN accuracy on {len(held_out)} held-out images of {len(train.label_names)} classes "
        f"(always predicting the largest class: {counts.max() / counts.sum():.1%}).",
        "Network features: CLS and mean patch token, without registers.",
        "",
        f"| {'features':<28} | cosine | Euclidean |",
        f"|{'-' * 30}|-------:|----------:|",
    ]
    lines += [
        f"| {names.get(name, name):<28} | {score['cosine']:6.1%} | {score['euclidean']:9.1%} |"
        for name, score in scores.items()
    ]
    return "\n".join(lines) + "\n"


# --- Figure, card and messages


def draw_attention(model: RegViTModel, processor, images: Sequence[Image.Image], path: Path) -> None:
    """Draw the center of each image beside the attention of CLS and registers to its patches, mean over heads."""
    from matplotlib.figure import Figure

    side = 32 * model.config.patch_shape[0]
    squares = [ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC) for image in images]
    own = type(processor)(**processor.to_dict() | {"do_resize": False, "do_center_crop": False})
    reader = TokenReader(model, own)
    queries = {"CLS": "cls"} | {f"register {i + 1}": ("register", i) for i in range(model.config.num_register_tokens)}
    maps = {name: reader.attention_maps(squares, query=query).mean(axis=1) for name, query in queries.items()}
    figure = Figure(figsize=(1.6 * (1 + len(maps)), 1.6 * len(squares)), layout="constrained")
    axes = figure.subplots(len(squares), 1 + len(maps), squeeze=False)
    for row, square in zip(axes, squares):
        row[0].imshow(square)
    for column, (name, of_images) in enumerate(maps.items(), 1):
        axes[0, column].set_title(name, fontsize=9)
        for axis, of_image in zip(axes[:, column], of_images):
            axis.imshow(of_image, cmap="magma")
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(path, dpi=150)


def write_card(folder: Path, model, *, data: str, seconds: float, table: str) -> None:
    config = model.config
    source = f"the built-in set `{data}`" if data in ("photos", "digits") else "images of the user"
    (folder / "README.md").write_text(
        f"""---
library_name: transformers
pipeline_tag: image-feature-extraction
tags:
- regvit
- register-tokens
- self-supervised
---

# RegViT with {config.num_register_tokens} registers, {config.num_hidden_layers} blocks, width {config.hidden_size}

Made by `make demo` of hf_regvit: pretrained without labels with the DINOv2 losses on {source}, {seconds / 60:.1f}
minutes on a CPU, patches of {config.patch_shape[0]} px, crops of {config.image_size} px. This model demonstrates the
workflow and is not a general-purpose model.

```python
import hf_regvit  # without the package, use trust_remote_code=True
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("path/to/this/folder")
processor = AutoImageProcessor.from_pretrained("path/to/this/folder")
output = model(**processor(Image.open("image.jpg").convert("RGB"), return_tensors="pt"))
output.pooler_output, output.patch_tokens, output.register_tokens
```

The tokens are `[CLS | registers | patches]`. `output.output_mask` is False for the registers, which have no position
in the image.

{table}
""",
        encoding="utf-8",
    )


@contextmanager
def step(name: str) -> Iterator[None]:
    print(name, flush=True)
    started = time.perf_counter()
    yield
    print(f"  {time.perf_counter() - started:.1f} s", flush=True)


def slug(text: str) -> str:
    """Return a folder name. Paths get a checksum, because their last part is rarely unique."""
    name = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in Path(text).name)[:40].strip("-")
    return name if name == text else f"{name}-{zlib.crc32(str(Path(text).absolute()).encode()):08x}"


if __name__ == "__main__":
    sys.exit(main())
