"""Facts for a model card: its fields, and their values from the recipes, reports and environments of runs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

Json: TypeAlias = Mapping[str, Any]  # content of a JSON or YAML file
Facts: TypeAlias = dict[str, Any]  # some of the fields of `CardFacts`

ANY_FOLDER = "path/to/this/folder"  # the model id in a card whose repository is unknown


class Task(NamedTuple):
    """Task on the Hub, Auto class and description of a model class."""

    pipeline_tag: str
    auto_class: str
    description: str


_FEATURES = Task("image-feature-extraction", "AutoModel", "a backbone for image features")
TASKS = {
    "RegViTModel": _FEATURES,
    "RegViTBackbone": _FEATURES,
    "RegViTForImageClassification": Task(
        "image-classification", "AutoModelForImageClassification", "an image classifier"
    ),
    "RegViTForSemanticSegmentation": Task(
        "image-segmentation", "AutoModelForSemanticSegmentation", "a model for semantic segmentation"
    ),
    "RegViTForDepthEstimation": Task(
        "depth-estimation", "AutoModelForDepthEstimation", "a model for depth estimation"
    ),
}

ORIGINS = {
    "pretrained": "pretrained without labels with the DINOv2 losses (the weights are the moving average of the "
    "student)",
    "distilled": "distilled without labels from the features of frozen teachers (the weights are the moving average "
    "of the student)",
    "finetuned": "fine-tuned on labeled images",
    "converted": "converted from another implementation with the same outputs",
    "retrofitted": "made by adding registers to an existing model",
    "unknown": "of unknown origin",
}


@dataclass(frozen=True)
class CardScore:
    """Row of the evaluation table, as text."""

    name: str
    data: str
    result: str
    images: str = "-"


@dataclass(frozen=True)
class CardFigure:
    """Figure that a card shows."""

    path: str
    title: str


@dataclass(frozen=True)
class CardArtifacts:
    """Result of `regvit diagnose`."""

    verdict: str
    summary: str
    num_images: int
    preprocessing: str
    figures: tuple[CardFigure, ...] = ()
    has_outliers: bool = False


@dataclass(frozen=True)
class CardFacts:
    """Contents of a model card.

    Attributes:
        name: Name of the model.
        config: Fields of `config.json`.
        parameters: Number of parameters.
        origin: Origin of the weights, a key of `ORIGINS`.
        repo_id: Repository or folder that the snippet loads.
        license: Hub license id of the weights (`apache-2.0`, `other`, ...); None if not stated.
        license_name: Name of the license; the Hub requires it with `other`.
        license_link: URL of the license text; the Hub requires it with `other`.
        data: Description of the training images.
        data_license: License or terms of the training images.
        datasets: Hub ids of the training data sets.
        base_model: Hub id or name of the model that training or conversion started from.
        base_model_license: License or terms of the base model.
        description: Paragraph by the author.
        recipe: Training settings as (setting, value).
        recipe_file: True if `recipe.yaml` is in the folder of the card.
        curves: Path of the figure of the learning curves, relative to the card.
        pictures: Figures of the evaluation, such as a confusion matrix.
        alarms: Alarms of the run, each with `step` and `message`.
        scores: Rows of the evaluation table.
        evaluation_notes: Protocols and other notes on the numbers.
        results: The same numbers as the `results` of a `model-index`.
        artifacts: Result of the diagnosis.
        intended_use: Sentences to add to those of every model of this kind.
        limits: Sentences to add to those of every model of this kind.
        environment: Versions and hardware, as text.
        exported: Section on the exported files, in Markdown.
    """

    name: str
    config: Json
    parameters: int
    origin: str = "unknown"
    repo_id: str = ANY_FOLDER
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    data: str = ""
    data_license: str | None = None
    datasets: tuple[str, ...] = ()
    base_model: str | None = None
    base_model_license: str | None = None
    description: str = ""
    recipe: tuple[tuple[str, str], ...] = ()
    recipe_file: bool = False
    curves: str | None = None
    pictures: tuple[CardFigure, ...] = ()
    alarms: tuple[Json, ...] = ()
    scores: tuple[CardScore, ...] = ()
    evaluation_notes: tuple[str, ...] = ()
    results: tuple[Json, ...] = field(default=(), repr=False)
    artifacts: CardArtifacts | None = None
    intended_use: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    environment: str = ""
    exported: str = ""

    @property
    def model_class(self) -> str:
        """Name of the model class from which the checkpoint was saved."""
        return str((self.config.get("architectures") or ["RegViTModel"])[0])

    @property
    def task(self) -> Task:
        """Task of the model class."""
        return TASKS[self.model_class]


# ---- Facts of a run ----------------------------------------------------------------------------------------------

_PRIVATE = ("output_dir", "logging_dir", "hub_token", "push_to_hub_token", "resume_from_checkpoint", "run_name")
_PATH_FIELDS = ("data", "init_from", "teacher", "model_name_or_path", "train_dir", "validation_dir", "processor")
_UNFINISHED = ("The training of this model is not finished.",)


def is_hub_id(text: str) -> bool:
    """Return whether a text has the form of a Hub id, `owner/name` or `owner/name:config`, and is not a local path."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", text) is not None and not Path(text).exists()


def public_name(source: object) -> str:
    """Return the last part of a path, or a whole Hub id that is not a local folder. Local paths are private."""
    text = str(source)
    return text if is_hub_id(text) else Path(text).name or text


def public_recipe(recipe: Json) -> Json:
    """Return a resolved recipe without local folders, tokens and run names."""

    def public(name: str, value: object) -> object:
        if isinstance(value, list):
            return [public(name, item) for item in value]
        looks = isinstance(value, str) and (name in _PATH_FIELDS or Path(value).is_absolute() or value[:1] == "~")
        return public_name(value) if looks else value

    return {name: public(name, value) for name, value in recipe.items() if name not in _PRIVATE}


def _names(recipe: Json, *fields: str) -> str:
    found: object = next((recipe[name] for name in fields if recipe.get(name)), [])
    sources = found if isinstance(found, list) else [found]
    return ", ".join(f"`{public_name(source)}`" for source in sources) or "Images passed in Python"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _describe_environment(environment: Json) -> str:
    """Return the content of `environment.json` as part of a sentence."""
    if not environment:
        return ""
    packages = ", ".join(f"{name} {number}" for name, number in environment["packages"].items() if name != "hf_regvit")
    count = environment["processes"]
    where = f"{count} process{'' if count == 1 else 'es'} on {environment['device']}"
    return f"{where}, Python {environment['python']}, {packages}"


# Keyed by whether the report says that the test images were held out; None for older reports, which do not say.
_KNN_NOTE = "The scores are those of the last evaluation during training, on {}."
_KNN_IMAGES = {
    True: "held-out labeled images",
    False: "images that the model was trained on without their labels. They show progress during a run but "
    "overestimate the quality of the model",
    None: "labeled images",
}
# setting of a pretraining run: its value, from the fields of the recipe.
_PRETRAINING = {
    "crops": "2 of {global_crop_size} and {num_local_crops} of {local_crop_size} pixels",
    "batch": "{per_device_train_batch_size} images per process",
    "learning rate": "{learning_rate:g}",
    "seed": "{seed}",
}
_OBJECTIVE = {"prototypes": "{head_num_prototypes:,}", "targets": "{centering}"}


def pretraining_facts(recipe: Json, report: Json | None = None, environment: Json | None = None) -> Facts:
    """Collect the fields of `CardFacts` from the files of a pretraining run. An unfinished run has no report."""
    is_distilled = bool(recipe.get("teacher"))
    texts = _PRETRAINING | ({} if is_distilled else _OBJECTIVE)
    rows = [(name, text.format_map({"seed": 42, **recipe})) for name, text in texts.items()]
    if is_distilled:
        rows.append(("teachers", _names(recipe, "teacher")))
    data = _names(recipe, "data")
    facts: Facts = {
        "origin": "distilled" if is_distilled else "pretrained",
        "environment": _describe_environment(environment or {}),
    }
    if recipe.get("init_from"):
        facts["base_model"] = public_name(recipe["init_from"])
    if (mode := recipe.get("mode", "full")) != "full":
        rows.append(("trained parts", str(mode)))
    if report is None:
        return {**facts, "data": f"{data}, without labels.", "recipe": tuple(rows), "limits": _UNFINISHED}
    seen, epochs = report["images_seen"], report.get("epochs")
    passes = "" if epochs is None else f", {epochs:.1f} epochs"  # a stream has no epochs
    rows.append(("length", f"{report['steps']:,} steps, {_duration(report['seconds'])}"))
    if "loss" in report.get("final", {}):
        rows.append(("last loss", f"{report['final']['loss']:.3f}"))
    if seen < 1_000_000:
        facts["limits"] = (f"The training was short: the model saw {seen:,} images in total.",)
    test = (report.get("knn_images") or [{}])[0]
    counts = f"{test['fitted_on']:,} / {test['judged']:,}" if test else "-"
    knn = {key: value for key, value in (report.get("knn") or [{}])[-1].items() if key != "step"}
    return facts | {
        "data": f"{data}, without labels: {seen:,} images seen{passes}.",
        "recipe": tuple(rows),
        "alarms": tuple(report.get("alarms", ())),
        "scores": tuple(
            CardScore(name.removeprefix("eval_").replace("knn_", "k-NN, k = "), data, f"{100 * value:.1f} %", counts)
            for name, value in knn.items()
        ),
        "evaluation_notes": (_KNN_NOTE.format(_KNN_IMAGES[test.get("held_out")]),) if knn else (),
    }


# metric of a fine-tuning run: (name, Hub metric type, unit). Other metrics, such as class IoUs, go into a note.
_SCORES = {
    "accuracy": ("Top-1 accuracy", "accuracy", "%"),
    "top5_accuracy": ("Top-5 accuracy", "top_5_accuracy", "%"),
    "mean_class_accuracy": ("Mean class accuracy", "balanced_accuracy", "%"),
    "f1": ("Macro F1", "f1", "%"),
    "mean_iou": ("Mean IoU", "mean_iou", "%"),
    "overall_accuracy": ("Pixel accuracy", "overall_accuracy", "%"),
    "mean_accuracy": ("Mean class pixel accuracy", "mean_accuracy", "%"),
    "rmse": ("RMSE", "rmse", "m"),
    "abs_rel": ("Absolute relative error", "abs_rel", ""),
    "delta1": ("Pixels within a factor of 1.25", "delta1", "%"),
    "delta2": ("Pixels within a factor of 1.25²", "delta2", "%"),
    "delta3": ("Pixels within a factor of 1.25³", "delta3", "%"),
    "loss": ("Loss", "loss", ""),
}
# option of a fine-tuning run: (name, value that is not listed on the card).
_SETTINGS = {
    "mode": ("trained weights", None),
    "lora_r": ("LoRA rank", None),
    "num_register_tokens": ("requested registers", None),
    "image_size": ("image size in pixels", None),
    "per_device_train_batch_size": ("batch per process", None),
    "gradient_accumulation_steps": ("micro-batches per step", 1),
    "learning_rate": ("learning rate", None),
    "lr_scheduler_type": ("schedule", None),
    "layer_decay": ("layer decay", 1.0),
    "head_learning_rate_multiplier": ("learning rate multiplier of the head", 1.0),
    "weight_decay": ("weight decay", 0.0),
    "drop_path_rate": ("drop path", 0.0),
    "augmentation": ("augmentation", None),
    "repeated_augmentation": ("repeated augmentation", 1),
    "mixup_alpha": ("mixup", 0.0),
    "cutmix_alpha": ("CutMix", 0.0),
    "random_erasing": ("random erasing", 0.0),
    "label_smoothing_factor": ("label smoothing", 0.0),
    "loss": ("loss", "cross_entropy"),
    "class_weights": ("class weights", None),
    "early_stopping_patience": ("early stopping patience in evaluations", 0),
    "bf16": ("bfloat16", False),
    "seed": ("seed", None),
}


def finetuning_facts(recipe: Json, report: Json | None = None, environment: Json | None = None) -> Facts:
    """Collect the fields of `CardFacts` from the files of a fine-tuning run. An unfinished run has no report.

    Args:
        recipe: Content of `resolved_recipe.yaml`.
        report: Content of `metrics.json`.
        environment: Content of `environment.json`.
    """
    data = _names(recipe, "data", "train_dir")
    facts: Facts = {"origin": "finetuned", "environment": _describe_environment(environment or {})}
    if recipe.get("model_name_or_path"):
        facts["base_model"] = public_name(recipe["model_name_or_path"])
    rows = [
        (words, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for name, (words, silent) in _SETTINGS.items()
        if (value := recipe.get(name)) not in (None, silent) and (name != "lora_r" or recipe.get("mode") == "lora")
    ]
    if report is None:
        return {**facts, "data": f"{data}, with labels.", "recipe": tuple(rows), "limits": _UNFINISHED}
    images, described = report["images"], report.get("described", {})
    about = "".join(f" {key[:1].upper()}{key[1:]}: {words.rstrip('.')}." for key, words in described.items())
    facts["data"] = (
        f"{data}, with labels: {images['train']:,} training images, {images['validation']:,} validation "
        f"images; {images['seen']:,} images seen.{about}"
    )
    if report.get("changes"):
        rows.insert(0, ("start", " ".join(report["changes"])))
    time = f", {_duration(report['seconds'])} including evaluations" if "seconds" in report else ""
    rows.append(("length", f"{report['steps']:,} steps, {report['epochs']:.1f} epochs{time}"))
    if counts := report.get("parameters"):
        rows.append(("trained parameters", f"{counts['trained']:,} of {counts['all']:,}"))
    validation = next((public_name(recipe[name]) for name in ("validation_dir", "data") if recipe.get(name)), "images")
    return {**facts, "recipe": tuple(rows), **_finetuning_scores(recipe, report, validation)}


def _finetuning_scores(recipe: Json, report: Json, data: str) -> Facts:
    """Return scores, notes, `model-index` results and limits from the content of `metrics.json`."""
    measured, intervals, images = report["eval"], report.get("intervals", {}), report["images"]
    count, step = images["validation"], report["step_of_the_result"]
    chosen = bool(recipe.get("load_best_model_at_end"))
    # Metrics of custom tasks follow the metrics that have a name here.
    others = [name for name, value in measured.items() if _is_other_score(name) and isinstance(value, int | float)]
    shown = [*(name for name in _SCORES if name in measured), *others]
    if not shown:
        return {}
    scores, metrics = [], []
    for name in shown:
        words, kind, unit = _SCORES.get(name, (name.replace("_", " "), name, ""))
        value, interval = measured[name], intervals.get(name)
        both = f"{images['train']:,} / {count:,}"
        scores.append(CardScore(words, f"{data}, validation", _with_interval(value, interval, unit), both))
        args = {"num_images": count, "seed": report.get("seed"), "step": step, "chosen_on_these_images": chosen}
        if interval:
            args["confidence_interval"] = [round(bound, 4) for bound in interval]
        if name != "loss":  # depends on the loss function of the run, so models cannot be compared by it
            metrics.append({"type": kind, "name": words, "value": round(value, 4), "args": args})
    shares = {name[4:]: value for name, value in measured.items() if name.startswith("iou_")}
    each = ", ".join(f"{name} {100 * value:.1f} %" for name, value in shares.items())
    protocol, skipped = report.get("protocol"), measured.get("skipped_images", 0)
    notes = [
        (True, f"Results of step {step:,}." + " The step was selected on these images." * chosen),
        (protocol, f"{protocol}."),
        (each, f"IoU of each class: {each}."),
        (skipped, f"{skipped:.0f} validation images could not be read and were skipped."),
        (intervals, f"Brackets: 95 % confidence interval over the validation images ({report.get('interval_of')})."),
    ]
    limits = [
        (chosen, "The step of the result was selected on the validation images, so its numbers are slightly too high. "
        "There is no separate test split."),
        (count < 100, f"The model was evaluated on only {count} images."),
    ]  # fmt: skip
    task = str(report.get("task", "image-classification")).replace("semantic-segmentation", "image-segmentation")
    dataset = {"name": data, "type": re.sub(r"[^\w./-]+", "-", data), "split": "validation"}
    named = {"type": task, "name": task.replace("-", " ").capitalize()}
    return {
        "scores": tuple(scores),
        "evaluation_notes": tuple(note for holds, note in notes if holds),
        "results": ({"task": named, "dataset": dataset, "metrics": metrics},),
        "limits": tuple(limit for holds, limit in limits if holds),
    }


def _is_other_score(name: str) -> bool:
    """Return whether a number is a metric that is neither in `_SCORES`, nor a speed, nor part of another metric."""
    known = ("runtime", "samples_per_second", "steps_per_second", "epoch", "skipped_images", *_SCORES)
    return name not in known and not name.startswith("iou_") and not name.endswith(("_low", "_high"))


def _with_interval(value: float, interval: Sequence[float] | None, unit: str) -> str:
    """Format a value such as `45.0 % [44.2, 45.6]` or `0.377 m [0.343, 0.415]`."""
    scale, digits = (100, 1) if unit == "%" else (1, 3)
    bounds = f" [{', '.join(f'{scale * bound:.{digits}f}' for bound in interval)}]" if interval else ""
    return f"{scale * value:.{digits}f}{f' {unit}' if unit else ''}{bounds}"
