"""Make the cards in model_cards/: train, convert and fine-tune models, measure, bundle and verify them.

    python scripts/dev/make_model_cards.py                      the backbone of `make demo`, on the built-in images
    python scripts/dev/make_model_cards.py --shared ../shared   also a conversion and two retrofits of a ViT-Tiny

Every step is a `regvit` command, which is printed before it runs. Steps that an earlier call finished are skipped.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_regvit_cli import main as regvit

ROOT = Path(__file__).resolve().parents[2]
VIT = (
    "--license", "other", "--license_name", "unknown-see-base-model",
    "--license_link", "https://arxiv.org/abs/2106.10270", "--base_model", "vit_tiny_patch16_224",
    "--base_model_license", "no license file at the source; presumably Apache-2.0 (augreg, arXiv 2106.10270)",
)  # fmt: skip
IMAGENET = "ImageNet-1k (and, presumably, ImageNet-21k before)"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, help="folder whose data/ contains vit_tiny_patch16_224 and images")
    parser.add_argument("--work", type=Path, default=Path("runs/cards"), help="folder for runs, reports and bundles")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "model_cards", help="folder for the cards")
    parser.add_argument("--max_images", type=int, default=500, help="number of images per split of an evaluation")
    parser.add_argument(
        "--steps", type=int, default=100, help="fine-tuning steps after adding registers, 16 images each"
    )
    options = parser.parse_args(argv)
    work, few = options.work, str(options.max_images)
    photos(work, options.output_dir)
    if options.shared:
        data = options.shared / "data"
        converted(work, data, options.output_dir, few)
        test_time_registers(work, data, options.output_dir, few)
        retrofitted(work, data, options.output_dir, few, options.steps)
    return 0


def photos(work: Path, cards: Path) -> None:
    """Make the card of the backbone that `make demo` pretrains."""
    run = work / "photos"
    if not (run / "scores.json").exists():
        subprocess.run([sys.executable, str(ROOT / "examples" / "demo.py"), "--output_dir", str(run)], check=True)
    diagnosis = once(work / "photos-diagnosis", "diagnose", "--model", run / "backbone", "--data", "photos",
                     "--split", "validation", "--max_images", "300")  # fmt: skip
    scores = once(work / "photos-evaluation", "evaluate", "--model", run / "backbone", "--data", "photos",
                  "--tasks", "knn", "linear", "few_shot")  # fmt: skip
    keep(
        work, cards, "regvit-photos-demo", run, diagnosis, scores, "--license", "apache-2.0",
        "--data_license", "the images that come with scikit-image and scikit-learn; their documentation states the "
        "terms of each image",
        "--description", "This model was created by `make demo`. It "
        "demonstrates the package and is not meant for other images. It is evaluated on held-out tiles of the 21 "
        "images on which it was trained.",
    )  # fmt: skip


def converted(work: Path, data: Path, cards: Path, few: str) -> None:
    """Make the card of a converted model, without training."""
    model = work / "vit-tiny"
    if not (model / "config.json").exists():
        run_regvit("convert", "--model", data / "vit_tiny_patch16_224", "--output_dir", model)
    keep(
        work, cards, "regvit-vit-tiny-converted", model, *measured(model, data, few), "--origin", "converted", *VIT,
        "--data", f"{IMAGENET}, with labels, by the authors of the base model.",
        "--data_license", "ImageNet: non-commercial research",
        "--description", "This is the ViT-Tiny of the base model as a RegViT without registers: the same weights in "
        "another layout of tensors. The diagnosis below shows why registers are useful.",
    )  # fmt: skip


def test_time_registers(work: Path, data: Path, cards: Path, few: str) -> None:
    """Make the card of the same model with test-time registers, selected on images that the diagnosis does not use."""
    model = work / "vit-tiny-test-time-registers"
    if not (model / "config.json").exists():
        run_regvit("retrofit", "--model", work / "vit-tiny", "--data", data / "caltech101", "--split", "train",
                   "--output_dir", model)  # fmt: skip
    keep(
        work, cards, "regvit-vit-tiny-test-time-registers", model, *measured(model, data, few), *VIT,
        "--data", f"{IMAGENET}, with labels, by the authors of the base model. The register neurons were selected on "
        "500 training images of caltech101.",
        "--data_license", "ImageNet: non-commercial research; caltech101: CC BY 4.0",
    )  # fmt: skip


def retrofitted(work: Path, data: Path, cards: Path, few: str, steps: int) -> None:
    """Make the card of the same model with four added registers, fine-tuned for a short time."""
    run = work / "vit-tiny-registers"
    if not (run / "metrics.json").exists():
        run_regvit(
            "finetune", "--model", work / "vit-tiny", "--num_register_tokens", "4", "--data", data / "caltech101",
            "--output_dir", run, "--max_steps", steps, "--per_device_train_batch_size", "16",
            "--learning_rate", "1e-4", "--layer_decay", "0.75", "--eval_strategy", "no", "--save_strategy", "no",
            "--logging_steps", "10",
            "--use_cpu", "--disable_tqdm", "True", "--load_best_model_at_end", "False",
        )  # fmt: skip
    keep(
        work, cards, "regvit-vit-tiny-registers", run, *measured(run, data, few), "--origin", "retrofitted", *VIT,
        "--data_license", "caltech101: CC BY 4.0; before that ImageNet: non-commercial research",
        "--description", f"Four registers were added to a trained ViT-Tiny, which was then fine-tuned for {steps} "
        "steps of 16 images. This training is too short to remove artifacts and only demonstrates the procedure; "
        "compare the diagnosis below with that of the model without registers. The kNN uses images of the fine-tuning "
        "as its bank.",
    )  # fmt: skip


def measured(model: Path, data: Path, few: str) -> tuple[Path, Path]:
    """Return the folders of the diagnosis and the evaluation of a ViT-Tiny, beside its own."""
    diagnosis = once(model.with_name(f"{model.name}-diagnosis"), "diagnose", "--model", model, "--data",
                     data / "imagenet_samples", "--max_images", "100")  # fmt: skip
    scores = once(model.with_name(f"{model.name}-evaluation"), "evaluate", "--model", model, "--data",
                  data / "caltech101", "--tasks", "knn", "--max_images", few)  # fmt: skip
    return diagnosis, scores


def once(folder: Path, command: str, *arguments: object) -> Path:
    """Return the folder of a report, and make the report if it does not exist."""
    if not (folder / "report.json").exists():
        run_regvit(command, *arguments, "--output_dir", folder)
    return folder


def keep(work: Path, cards: Path, name: str, model: Path, diagnosis: Path, scores: Path, *words: str) -> None:
    """Bundle and verify a model, then copy its card to `NAME.md` and its figures to `NAME/`."""
    bundle = work / "bundles" / name
    shutil.rmtree(bundle, ignore_errors=True)
    run_regvit("publish", "--model", model, "--output_dir", bundle, "--reports", diagnosis, scores, *words)
    text = (bundle / "README.md").read_text(encoding="utf-8").replace("](figures/", f"]({name}/")
    cards.mkdir(exist_ok=True)
    (cards / f"{name}.md").write_text(text, encoding="utf-8")
    shutil.rmtree(cards / name, ignore_errors=True)
    if (bundle / "figures").is_dir():
        shutil.copytree(bundle / "figures", cards / name)


def run_regvit(*arguments: object) -> None:
    """Print and run a `regvit` command."""
    words = [str(argument) for argument in arguments]
    print("regvit", shlex.join(words), flush=True)
    if regvit(words):
        raise SystemExit(f"regvit {words[0]} failed")


if __name__ == "__main__":
    raise SystemExit(main())
