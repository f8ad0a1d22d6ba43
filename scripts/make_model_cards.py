"""The cards in model_cards/: train, convert and fine-tune for real, measure, bundle, verify, keep the cards.

    python scripts/make_model_cards.py                      the backbone of `make demo`, from the embedded photographs
    python scripts/make_model_cards.py --shared ../shared   also a conversion and two retrofits of a ViT-Tiny

Every step is a command of `regvit`, printed before it runs; what an earlier call has finished is not done again.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_regvit.cli import main as regvit

ROOT = Path(__file__).resolve().parents[1]
VIT_TERMS = "no licence file at the source; presumably Apache-2.0 (augreg, arXiv 2106.10270)"
IMAGENET = "ImageNet-1k (and, presumably, ImageNet-21k before)"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, help="folder whose data/ has vit_tiny_patch16_224 and images")
    parser.add_argument("--work", type=Path, default=Path("runs/cards"), help="folder for runs, reports and bundles")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "model_cards", help="folder for the cards")
    parser.add_argument("--max_images", type=int, default=500, help="images of an evaluation, each part")
    parser.add_argument("--steps", type=int, default=100, help="steps of the retrofit, 16 images each")
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
    """Pretrained here: the demo."""
    run = work / "photos"
    if not (run / "scores.json").exists():
        subprocess.run([sys.executable, str(ROOT / "examples" / "demo.py"), "--output_dir", str(run)], check=True)
    diagnosis = once(work / "photos-diagnosis", "diagnose", "--model", run / "backbone", "--data", "photos",
                     "--split", "validation", "--max_images", "300")  # fmt: skip
    scores = once(work / "photos-evaluation", "evaluate", "--model", run / "backbone", "--data", "photos",
                  "--tasks", "knn", "linear", "few_shot")  # fmt: skip
    keep(
        work, cards, "regvit-photos-demo", run, diagnosis, scores, "--license", "apache-2.0",
        "--data_license", "the photographs inside scikit-image and scikit-learn; their documentation names the "
        "terms of each",
        "--description", "Made by `make demo`, which takes five minutes on two idle cores. It shows how the pieces "
        "fit together; it is not a model for other pictures. Its evaluation is on held-out tiles of the 21 "
        "photographs that it saw.",
    )  # fmt: skip


def converted(work: Path, data: Path, cards: Path, few: str) -> None:
    """A conversion: nothing is trained."""
    model = work / "vit-tiny"
    if not (model / "config.json").exists():
        run_regvit("convert", "--model", data / "vit_tiny_patch16_224", "--output_dir", model)
    diagnosis = once(work / "vit-tiny-diagnosis", "diagnose", "--model", model, "--data",
                     data / "imagenet_samples", "--max_images", "100")  # fmt: skip
    scores = once(work / "vit-tiny-evaluation", "evaluate", "--model", model, "--data", data / "caltech101",
                  "--tasks", "knn", "--max_images", few)  # fmt: skip
    keep(
        work, cards, "regvit-vit-tiny-converted", model, diagnosis, scores, "--origin", "converted",
        "--license", "other", "--license_name", "unknown-see-base-model",
        "--license_link", "https://arxiv.org/abs/2106.10270",
        "--base_model", "vit_tiny_patch16_224", "--base_model_license", VIT_TERMS,
        "--data", f"{IMAGENET}, with labels, by the authors of the base model.",
        "--data_license", "ImageNet: non-commercial research",
        "--description", "The ViT-Tiny of the base model as a RegViT without registers: the same numbers in another "
        "layout of tensors. The diagnosis below is the reason to add registers.",
    )  # fmt: skip


def test_time_registers(work: Path, data: Path, cards: Path, few: str) -> None:
    """The same model without its artifacts; nothing is trained. Searched on images that the diagnosis does not see."""
    model = work / "vit-tiny-test-time-registers"
    if not (model / "config.json").exists():
        run_regvit("retrofit", "--model", work / "vit-tiny", "--data", data / "caltech101", "--split", "train",
                   "--output_dir", model)  # fmt: skip
    diagnosis = once(work / "vit-tiny-test-time-registers-diagnosis", "diagnose", "--model", model, "--data",
                     data / "imagenet_samples", "--max_images", "100")  # fmt: skip
    scores = once(work / "vit-tiny-test-time-registers-evaluation", "evaluate", "--model", model, "--data",
                  data / "caltech101", "--tasks", "knn", "--max_images", few)  # fmt: skip
    keep(
        work, cards, "regvit-vit-tiny-test-time-registers", model, diagnosis, scores,
        "--license", "other", "--license_name", "unknown-see-base-model",
        "--license_link", "https://arxiv.org/abs/2106.10270",
        "--base_model", "vit_tiny_patch16_224", "--base_model_license", VIT_TERMS,
        "--data", f"{IMAGENET}, with labels, by the authors of the base model. The neurons were searched on 500 "
        "training images of caltech101.",
        "--data_license", "ImageNet: non-commercial research; caltech101: CC BY 4.0",
    )  # fmt: skip


def retrofitted(work: Path, data: Path, cards: Path, few: str, steps: int) -> None:
    """The same model with four registers added, fine-tuned for a short time."""
    run = work / "vit-tiny-registers"
    if not (run / "metrics.json").exists():
        run_regvit(
            "finetune", "--model", work / "vit-tiny", "--num_register_tokens", "4", "--data", data / "caltech101",
            "--output_dir", run, "--max_steps", steps, "--per_device_train_batch_size", "16",
            "--learning_rate", "1e-4", "--layer_decay", "0.75", "--eval_strategy", "no", "--save_strategy", "no",
            "--logging_steps", "10",
            "--use_cpu", "--disable_tqdm", "True", "--load_best_model_at_end", "False",
        )  # fmt: skip
    diagnosis = once(work / "vit-tiny-registers-diagnosis", "diagnose", "--model", run, "--data",
                     data / "imagenet_samples", "--max_images", "100")  # fmt: skip
    scores = once(work / "vit-tiny-registers-evaluation", "evaluate", "--model", run, "--data", data / "caltech101",
                  "--tasks", "knn", "--max_images", few)  # fmt: skip
    keep(
        work, cards, "regvit-vit-tiny-registers", run, diagnosis, scores, "--origin", "retrofitted",
        "--license", "other", "--license_name", "unknown-see-base-model",
        "--license_link", "https://arxiv.org/abs/2106.10270",
        "--base_model", "vit_tiny_patch16_224", "--base_model_license", VIT_TERMS,
        "--data_license", "caltech101: CC BY 4.0; before that ImageNet: non-commercial research",
        "--description", f"Four registers were added to a trained ViT-Tiny, which was then fine-tuned for {steps} "
        "steps of 16 images. So short a training shows how it is done, not how artifacts are removed: compare the "
        "diagnosis below with the one of the model without registers. The kNN is fitted on images of the fine-tuning.",
    )  # fmt: skip


def once(folder: Path, command: str, *arguments: object) -> Path:
    """A report, made unless it is there."""
    if not (folder / "report.json").exists():
        run_regvit(command, *arguments, "--output_dir", folder)
    return folder


def keep(work: Path, cards: Path, name: str, model: Path, diagnosis: Path, scores: Path, *words: str) -> None:
    """Bundle and verify, then copy card and figures: `NAME.md` and `NAME/`."""
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
    """One command, as one would type it."""
    words = [str(argument) for argument in arguments]
    print("regvit", shlex.join(words), flush=True)
    if regvit(words):
        raise SystemExit(f"regvit {words[0]} failed")


if __name__ == "__main__":
    raise SystemExit(main())
