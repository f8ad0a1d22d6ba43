"""Pretrain, evaluate and save a small RegViT in a few minutes on two CPU cores.

    make demo                        built-in images of scikit-image and scikit-learn, cut into tiles
    DATA=path/to/folder make demo    your own images (a folder, class folders, parquet)

Pretrains a small RegViT with four registers without labels, saves and reloads it as a user would, compares its
features with those of the untrained network and with simple ones, and writes `demo.html`, one page with the scores,
the attention of CLS and registers before and after, and the norms of the tokens. A finished run is reused, and an
interrupted run continues; `--fresh` starts over.
"""

import argparse
import json
import math
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
import yaml
from PIL import Image, ImageOps
from tqdm import tqdm

from hf_regvit import PretrainingArguments, RegViTModel, TokenReader, knn_classify, load_images, pretrain
from hf_regvit.data.builtin import builtin_images
from hf_regvit.diagnosis.diagnose import artifact_snapshot
from hf_regvit.figures.curves import curves_figure, read_metrics
from hf_regvit.figures.diagnosis_page import Panel, attention_panel, image_panel, map_panel
from hf_regvit.figures.maps import INK, STYLE, TokenMaps, color_image, pca_colors, read_token_maps, stretch
from hf_regvit.figures.pages import chart, data_url, render, write_page

HERE = Path(__file__).resolve().parent
MAX_IMAGES = 2000  # of a user's folder: enough for the few hundred steps of a demo, and ready in a minute or two
SHORT_SIDE = 256  # pixels, of the resized copies: four times the largest crop
NEIGHBOURS = 10
MAX_BANK, MAX_TEST = 1000, 720  # images whose features are compared
PATCHES = 32  # rows and columns of the maps of the page
SIMPLE = ("raw 16x16 pixels", "color mean and deviation")  # features without a network
# Curves of the page: title, and keys of the metrics file with their names in the legend.
CURVES = (
    ("loss (nats)", {"loss": "sum", "ibot_loss": "iBOT, hidden patches", "dino_local_loss": "DINO, local crops",
                     "dino_global_loss": "DINO, global crops"}),
    ("spread of CLS over images", {"feature_std": "1 = evenly spread, 0 = collapsed"}),
    ("registers", {"register_cosine": "cosine between registers", "cls_to_register_attention": "attention of CLS"}),
)  # fmt: skip

Features = dict[str, torch.Tensor]  # (n, D) by name


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
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of its own functions
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
    backbone, page = run / "backbone", run / "demo.html"
    with step("Loading the saved model"):
        model, processor = load_and_compare(backbone, train[0].image)
    weights, saved = backbone / "model.safetensors", run / "scores.json"
    compared = compared_images(train, held_out)
    if not page.exists() or page.stat().st_mtime < weights.stat().st_mtime:
        torch.manual_seed(arguments.seed)
        networks = {"untrained": RegViTModel(arguments.backbone_config()).eval(), "trained": model}
        with step("Features of the untrained and the trained network"):
            features = [features_of(part, networks, processor) for part in compared]
            scores = neighbor_scores(*features, *compared) if held_out else {}
        with step("Page"):
            facts = run_facts(arguments, model, seconds, data=data, num_images=len(train))
            values = page_values(run, shown_images(data, train), networks, processor)
            text = quote(facts, scores, values["norms"]["after"], *compared)
            nearest = nearest_images(*features, *compared, labeled=bool(scores))
            values |= {"facts": facts, "quote": text, "neighbors": nearest, "scores": score_rows(scores)}
            values["protocol"] = protocol(*compared) if scores else ""
            if scores:
                saved.write_text(json.dumps(scores, indent=2) + "\n")
            write_page(render("demo.html", folder=HERE, **values), page)
        print(f"\n{textwrap.fill(text, 100)}")
    scores = json.loads(saved.read_text()) if held_out else {}
    table = score_table(scores, *compared) if scores else ""
    extend_card(backbone / "README.md", table)
    print()
    print(
        table
        or "The kNN comparison was skipped: it needs labeled test images (class folders with two or more classes).\n"
    )
    print(f"Checkpoint   {backbone}      AutoModel.from_pretrained('{backbone}') after `import hf_regvit`")
    print(f"Page         {page.resolve().as_uri()}")


# --- Images


def prepare_images(data: str, run: Path) -> str:
    """Return the training data: a built-in set unchanged, or the folder of resized copies that decode fast.

    Decoding a 12-megapixel image takes a hundred times longer than augmenting it. Unreadable images are reported and
    skipped. If images were added or removed since the last call, the run starts over.
    """
    if data in ("photos", "digits"):
        return f"builtin:{data}"
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
    folder, listing = run / "images", run / "images" / ".sources.json"
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


def shown_images(data: str, train, limit: int = 4) -> list[tuple[str, Image.Image]]:
    """Return the images to draw, with their names; for the built-in tiles, whole images of scikit-image."""
    if data == "photos":
        images = builtin_images()
        return [(name, images[name]) for name in ("chelsea", "rocket", "coffee", "astronaut")[:limit]]
    return [(f"image {i + 1}", train[i].image) for i in spread(len(train), limit)]


def spread(count: int, wanted: int) -> list[int]:
    """Return evenly spaced indices."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).astype(int)).tolist()


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
    print(textwrap.indent(textwrap.fill(loss_text(arguments), 100), "  "), flush=True)
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


def compared_images(train, held_out):
    """Return the bank and the queries of the comparison; without labeled test images, four training images."""
    if held_out is None:
        queries = vivid(train, min(4, len(train) - 1))
        return drawn(train, MAX_BANK, without=queries), train.subset(queries)
    return drawn(train, MAX_BANK), drawn(held_out, MAX_TEST)


def vivid(source, wanted: int) -> list[int]:
    """Return the indices of the images with the strongest contrast among 24 at even distances."""
    contrast = {i: np.asarray(source[i].image.convert("L")).std() for i in spread(len(source), 24)}
    return sorted(sorted(contrast, key=lambda i: -contrast[i])[:wanted])


def drawn(source, limit: int, *, without: Sequence[int] = ()):
    order = np.random.default_rng(0).permutation(np.setdiff1d(np.arange(len(source)), without))
    return source.subset(np.sort(order[:limit]).tolist())


@torch.inference_mode()
def features_of(source, networks: dict[str, RegViTModel], processor) -> Features:
    """Return simple features of every image, and of each network CLS and the mean patch token, concatenated."""
    rows: dict[str, list[torch.Tensor]] = {}
    for start in tqdm(range(0, len(source), 64), desc="  features", unit="batch", leave=False):
        images = [source[i].image for i in range(start, min(start + 64, len(source)))]
        pixels = processor(images, return_tensors="pt").pixel_values
        found = dict(zip(SIMPLE, (raw_pixels(images), color_statistics(images))))
        for name, network in networks.items():
            output = network(pixels)
            found[name] = torch.cat([output.pooler_output, output.patch_tokens.mean(dim=1)], dim=-1)
        for name, values in found.items():
            rows.setdefault(name, []).append(values)
    return {name: torch.cat(values) for name, values in rows.items()}


def raw_pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    small = [np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC), dtype=np.float32) for image in images]
    return torch.from_numpy(np.stack(small)).flatten(1) / 255


def color_statistics(images: Sequence[Image.Image]) -> torch.Tensor:
    pixels = [np.asarray(image, dtype=np.float32).reshape(-1, 3) / 255 for image in images]
    return torch.from_numpy(np.stack([np.concatenate([p.mean(0), p.std(0)]) for p in pixels]))


def neighbor_scores(of_bank: Features, of_test: Features, bank, test) -> dict[str, dict[str, float]]:
    """Return the 10-NN accuracy for simple features, the untrained and the trained network."""
    return {name: accuracies(of_bank[name], of_test[name], bank.labels, test.labels) for name in of_bank}


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


def score_rows(scores: dict[str, dict[str, float]]) -> list[list[str]]:
    names = {"untrained": "RegViT, untrained", "trained": "RegViT, trained without labels"}
    return [
        [names.get(name, name), *(f"{score[kind]:.1%}" for kind in ("cosine", "euclidean"))]
        for name, score in scores.items()
    ]


def protocol(bank, test) -> str:
    counts = np.bincount(test.labels)
    return (
        f"{NEIGHBOURS}-NN accuracy on {len(test)} held-out images of {len(bank.label_names)} classes, with a "
        f"bank of {len(bank):,} training images. The largest class has {counts.max() / counts.sum():.1%}. Features of "
        "a network: CLS and mean patch token, without registers."
    )


def score_table(scores: dict[str, dict[str, float]], bank, test) -> str:
    lines = [
        protocol(bank, test),
        "",
        f"| {'features':<32} | cosine | Euclidean |",
        f"|{'-' * 34}|-------:|----------:|",
    ]
    lines += [f"| {name:<32} | {cosine:>6} | {euclidean:>9} |" for name, cosine, euclidean in score_rows(scores)]
    return "\n".join(lines) + "\n"


def extend_card(card: Path, table: str) -> None:
    """Append the table to the card that the training wrote, once."""
    text = card.read_text(encoding="utf-8")
    if table and table not in text:
        card.write_text(f"{text.rstrip()}\n\n## Nearest neighbors\n\n{table}", encoding="utf-8")


# --- Page


def run_facts(arguments, model: RegViTModel, seconds: float, *, data: str, num_images: int) -> dict[str, str]:
    """Return the facts of the run as text."""
    config = model.config
    minutes, rest = divmod(round(seconds), 60)
    kind = {"photos": "image tiles", "digits": "images of digits"}.get(data, "images")
    return {
        "time": f"{minutes} min {rest} s" if minutes else f"{rest} s",
        "threads": f"{torch.get_num_threads()} CPU thread{'s' if torch.get_num_threads() > 1 else ''}",
        "model": f"a Vision Transformer with {config.num_register_tokens} registers and "
        f"{model.num_parameters() / 1e6:.1f} million parameters",
        "shape": f"{config.num_hidden_layers} blocks, width {config.hidden_size}, patches of {config.patch_shape[0]} "
        f"pixels, crops of {arguments.global_crop_size} and {arguments.local_crop_size} pixels, seed {arguments.seed}",
        "images": f"{num_images:,} {kind} without labels",
        "classes": "source images" if data == "photos" else "classes",
        "steps": f"{arguments.max_steps:,} steps of {arguments.per_device_train_batch_size} images",
        "loss": loss_text(arguments),
        "run": arguments.output_dir,
        "demo": f"regvit {shlex.join(['demo', '--model', arguments.output_dir])}",
    }


def loss_text(arguments) -> str:
    """Explain the training loss."""
    start = (arguments.dino_loss_weight + arguments.ibot_loss_weight) * math.log(arguments.head_num_prototypes)
    return (
        f"The loss is a cross-entropy: the student predicts to which of {arguments.head_num_prototypes} prototypes "
        f"the teacher assigns another crop (DINO) and hidden patches (iBOT). It starts near {start:.1f}, the value of "
        "a network that finds all prototypes equally likely, falls quickly, and then changes little or rises. This is "
        "expected: the teacher is a moving average of the student and sets new, sharper targets all the time. So the "
        "loss does not say how good the features are, and a loss of 0 would mean that all images look the same to the "
        "network. The nearest neighbors show what was learned."
    )


def quote(facts: dict[str, str], scores: dict[str, dict[str, float]], found: dict, bank, test) -> str:
    """Return a paragraph that states the numbers of this run, and what they do not show."""
    best = {name: f"{max(score.values()):.1%}" for name, score in scores.items()}
    measured = (
        f" By the {NEIGHBOURS} nearest of {len(bank):,} training images, its frozen features classify "
        f"{best['trained']} of {len(test)} held-out images correctly ({len(bank.label_names)} {facts['classes']}); "
        f"the untrained network reaches {best['untrained']}, raw pixels {best[SIMPLE[0]]}, mean and deviation of the "
        f"colors {best[SIMPLE[1]]} (the better of two distances each)."
        if scores
        else ""
    )
    if found["bimodal"]:
        outliers = f"{found['outlier_share']:.2%} of its patches have outlying norms, as regvit diagnose defines them."
    else:
        outliers = (
            "It has no artifact tokens, as expected of a small model after minutes: no patch of the images shown has "
            f"more than {found['norm_max'] / found['norm_median']:.1f} times the median norm. In large models with "
            "long training, some patches have ten times that norm; regvit diagnose finds them, and regvit retrofit "
            "moves them into registers."
        )
    learned = f"In {facts['time']} on {facts['threads']}, {facts['model']} learned from {facts['images']}."
    return f"{learned}{measured} {outliers}"


def page_values(run: Path, images, networks: dict[str, RegViTModel], processor) -> dict:
    """Return maps, charts and norms of the untrained and the trained network for the same images."""
    import matplotlib

    side = PATCHES * networks["trained"].config.patch_shape[0]
    squares = [ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC) for _, image in images]
    own = type(processor)(**processor.to_dict() | {"do_resize": False, "do_center_crop": False})
    pixels = own(squares, return_tensors="pt").pixel_values
    readers = [TokenReader(network, own) for network in networks.values()]
    before, after = ([*read_token_maps(reader, pixels)] for reader in readers)
    norms = dict(zip(("before", "after"), (artifact_snapshot(reader, pixels) for reader in readers)))
    lines = read_metrics(run / "metrics.jsonl")
    curves = [panel for panel in CURVES if any(key in line for line in lines for key in panel[1])]
    with matplotlib.rc_context(STYLE | {"axes.edgecolor": INK}):
        charts = [chart(clear_legends(curves_figure(lines, [panel])), panel[0]) for panel in curves]
        histogram = chart(norm_figure(before, after, norms["after"]), "norms of the patches before and after training")
    return {
        "examples": [
            {"id": name, "image": image_panel(square),
             "rows": [token_panels(maps[i], when) for when, maps in (("before", before), ("after", after))]}
            for i, ((name, _), square) in enumerate(zip(images, squares))
        ],
        "norms": norms, "norm_rows": norm_rows(**norms), "histogram": histogram, "curves": charts,
        "patches": len(images) * PATCHES**2, "panels": len(after[0].attention) + 2,
    }  # fmt: skip


def token_panels(maps: TokenMaps, when: str) -> list[Panel]:
    """Return attention of CLS and of each register, PCA and norms of the patches, with a note under each."""
    names = ["CLS", *(f"register {i + 1}" for i in range(len(maps.registers)))]
    panels = [attention_panel(values, f"{name}, {when}") for name, values in zip(names, maps.attention, strict=True)]
    relative = maps.norms / maps.norms.median()
    low, high = relative.min().item(), relative.max().item()
    norm = map_panel(stretch(relative, low, high), "viridis", f"norm, {when}", f"{low:.1f} to {high:.1f} x median")
    colors = data_url(color_image(pca_colors(maps.patch_tokens)))
    return [*panels, Panel(f"PCA, {when}", "three components", colors, relative.shape), norm]


def norm_rows(before: dict, after: dict) -> list[list[str]]:
    """Return the numbers of a diagnosis for both networks; norms are relative to the median patch."""
    rows = (
        ("block", "layer", "{:.0f}"),
        ("largest patch norm / median", "norm_max", "{:.2f}"),
        ("norm of the cut-off / median", "cutoff", "{:.2f}"),
        ("register norm / median patch norm", "register_norm", "{:.2f}"),
        ("patches above the cut-off", "outlier_share", "{:.2%}"),
        ("cosine between registers", "register_cosine", "{:.2f}"),
        ("attention of CLS to registers", "attention_registers", "{:.1%}"),
        ("effective rank of the patches", "effective_rank", "{:.1f}"),
    )
    return [
        [
            name,
            *(form.format(found[key] / (found["norm_median"] if "norm" in name else 1)) for found in (before, after)),
        ]
        for name, key, form in rows
        if key in after
    ]


def norm_figure(before: Sequence[TokenMaps], after: Sequence[TokenMaps], found: dict):
    """Draw the norms of the patches in the last block, relative to their median, with the cut-off of the diagnosis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.6))
    axis = figure.add_axes((0.13, 0.17, 0.84, 0.7))
    edges, cutoff = np.geomspace(0.25, 32, 113), found["cutoff"] / found["norm_median"]
    for maps, style in (
        (before, {"color": INK, "lw": 1, "label": "untrained"}),
        (after, {"color": "#0072b2", "fill": True, "alpha": 0.7, "label": "trained"}),
    ):
        norms = torch.stack([each.norms for each in maps])
        counts = np.histogram((norms / norms.median()).clamp(edges[0], edges[-1]).numpy(), edges)[0]
        axis.stairs(counts / counts.sum(), edges, **style)
    if not found["bimodal"]:  # else the cut-off may be that of another block
        axis.axvline(cutoff, color="#d55e00", lw=1, ls="--", label="cut-off of the diagnosis")
    if "register_norm" in found:
        place = found["register_norm"] / found["norm_median"]
        axis.plot(place, 1.02, "v", color="#009e73", clip_on=False, label="registers", ls="none",
                  transform=axis.get_xaxis_transform())  # fmt: skip
    axis.set(xscale="log", xlim=(edges[0], edges[-1]), xlabel="norm / median norm of the patches")
    axis.set_xticks([0.25, 0.5, 1, 2, 4, 8, 16, 32], ["0.25", "0.5", "1", "2", "4", "8", "16", "32"])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    axis.legend(frameon=False, loc="upper right")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def clear_legends(figure):
    """Remove the white boxes of the legends, for pages in dark mode."""
    for axis in figure.axes:
        axis.grid(color=INK, alpha=0.12)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend():
            axis.get_legend().set_frame_on(False)
    return figure


def nearest_images(of_bank: Features, of_test: Features, bank, test, *, labeled: bool, count: int = 5) -> list[dict]:
    """Return four images, and the nearest training images of each by the features of both networks."""

    def shown(source, index: int) -> dict:
        record = source[index]
        name = source.label_names[record.label] if labeled else record.id
        return {"name": name, "image": data_url(ImageOps.fit(record.image, (96, 96)), "JPEG")}

    found = []
    for query in vivid(test, 4) if labeled else range(len(test)):
        rows = []
        for name in ("untrained", "trained"):
            similarity = F.cosine_similarity(of_bank[name], of_test[name][query : query + 1])
            nearest = similarity.topk(min(count, len(bank))).indices.tolist()
            rows.append({"name": name, "images": [shown(bank, index) for index in nearest]})
        found.append(shown(test, query) | {"rows": rows})
    return found


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
