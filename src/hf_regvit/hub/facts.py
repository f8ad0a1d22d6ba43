"""Facts for a model card, collected from run folders, reports and recipes."""

import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..diagnosis.report import ArtifactReport
from ..diagnosis.retrofit import RetrofitReport
from ..evaluation.report import EvaluationReport, EvaluationTable
from ..models.loading import BundleError, _json_of, weights_fingerprint

logger = logging.getLogger(__name__)


def _run_facts(folder: Path, checkpoint: Path, output: Path) -> dict[str, Any]:
    """Copy recipe, report, environment and curves of a checkpoint's run, and return them as facts for the card."""
    candidates = (folder, checkpoint.parent if checkpoint.name == "backbone" else checkpoint)
    run = next((place for place in candidates if (place / "resolved_recipe.yaml").is_file()), None)
    if run is None:
        return _retrofit_facts(checkpoint, output)
    import yaml

    recipe = public_recipe(_recipe_of(run / "resolved_recipe.yaml"))
    (output / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    environment = _json_of(run / "environment.json") or {}
    if environment:
        _write_report(output, "environment.json", environment)
    fine_tuned = _json_of(run / "metrics.json")
    report = fine_tuned or _json_of(run / "report.json")
    try:
        facts = (finetuning_facts if fine_tuned else pretraining_facts)(recipe, report, environment)
    except KeyError as error:
        raise BundleError(
            f"The recipe, report or environment in '{run}' is incomplete: {error} is missing. Publish a folder that "
            "contains only the checkpoint, and describe it with --data, --origin and --description."
        ) from error
    if report:
        _write_report(output, "training.json", report)
    if (run / "metrics.jsonl").is_file():
        shutil.copyfile(run / "metrics.jsonl", output / "reports" / "metrics.jsonl")
    for name in ("curves.png", "confusion_matrix.png"):
        if (run / name).is_file():
            (output / "figures").mkdir(exist_ok=True)
            shutil.copyfile(run / name, output / "figures" / name)
    if (run / "curves.png").is_file():
        facts["curves"] = "figures/curves.png"
    if (run / "confusion_matrix.png").is_file():
        facts["pictures"] = (CardFigure("figures/confusion_matrix.png", "Confusion matrix"),)
    return {**facts, "recipe_file": True}


def _retrofit_facts(checkpoint: Path, output: Path) -> dict[str, Any]:
    """Return the facts from the report that `regvit retrofit` wrote into the checkpoint folder."""
    content = _json_of(checkpoint / "retrofit_report.json")
    if content is None:
        return {}
    _write_report(output, "retrofit.json", content)
    try:
        report = RetrofitReport(**content)
    except TypeError as error:
        raise BundleError(
            f"'{checkpoint}/retrofit_report.json' is not a report of `regvit retrofit`: {error}."
        ) from error
    return {"origin": "retrofitted", "base_model": report.model["name"], "description": report.card_text}


def _recipe_of(path: Path) -> dict[str, Any]:
    import yaml

    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BundleError(f"'{path}' is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise BundleError(f"'{path}' holds a {type(recipe).__name__}. Expected one 'option: value' per line.")
    return recipe


def _write_report(output: Path, name: str, content: Any) -> None:
    path = output / "reports" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _report_file(path: Path) -> Path:
    if (path / "comparison.json").is_file() and not (path / "report.json").is_file():
        single = ", ".join(f"'{report.parent}'" for report in sorted(path.glob("*/report.json")))
        raise BundleError(f"'{path}' compares several models. Pass the report of the model to publish: {single}.")
    path = path / "report.json" if path.is_dir() else path
    if not path.is_file():
        raise BundleError(
            f"There is no report at '{path}'. Pass the output of `regvit diagnose` or `regvit evaluate`."
        )
    return path


def _add_report(path: Path, output: Path, facts: dict[str, Any], *, model: Any, example_pictures: bool) -> None:
    """Copy the public part of a diagnosis or evaluation report, and add it to the facts for the card."""
    path = _report_file(path)
    content = _json_of(path)
    if not isinstance(content, dict):
        raise BundleError(f"'{path}' holds a {type(content).__name__}. Expected a report, which is a JSON object.")
    if "bimodal" in content:
        try:
            report = ArtifactReport.load(path)
        except (TypeError, ValueError, KeyError) as error:
            raise BundleError(f"'{path}' is not a report of this version of `regvit diagnose`: {error}.") from error
        if report.model.get("weights") not in (None, weights_fingerprint(model)):  # older reports lack this field
            logger.warning(
                "'%s' is a diagnosis of different weights (%s), but the card does not mention this. Diagnose this "
                "checkpoint, unless both are the same model in two formats.", path, report.model["name"]
            )  # fmt: skip
        facts["artifacts"] = _add_diagnosis(report, output, example_pictures=example_pictures)
        versions = {name: number for name, number in report.versions.items() if name != "hf_regvit"}
        facts.setdefault("environment", ", ".join(f"{name} {number}" for name, number in versions.items()))
    elif "reports" in content and "models" not in content:
        table = EvaluationTable.load(path)
        _write_report(output, "evaluation.json", [report.summary() for report in table.reports])
        own = _report_of(model, table)
        if own is None:
            names = ", ".join(report.model for report in table.reports)
            logger.warning(
                "'%s' is an evaluation of different weights (%s). The card lists its numbers under those names, but "
                "not in its model-index. Evaluate this checkpoint to add its own numbers.", path, names
            )  # fmt: skip
        for key, value in evaluation_facts(table, own).items():
            facts[key] = (*facts.get(key, ()), *value)
    else:
        raise BundleError(
            f"'{path}' is neither a report of `regvit diagnose` for one model nor of `regvit evaluate`. "
            f"Its fields: {', '.join(sorted(content)[:6]) or 'none'}."
        )


def _describe_preprocessing(text: str) -> str:
    """Return the processor settings that `diagnose` stores as JSON, as part of a sentence."""
    try:
        processor = json.loads(text)
    except json.JSONDecodeError:
        return text or "images preprocessed by the model's own processor"

    def size(value: Any) -> str:
        return " x ".join(map(str, value.values())) if isinstance(value, dict) else str(value)

    steps = [f"resized to {size(processor['size'])}"] if processor.get("do_resize") else []
    if processor.get("do_center_crop"):
        steps.append(f"cropped to {size(processor['crop_size'])}")
    steps.append(f"mean {processor.get('image_mean')}, standard deviation {processor.get('image_std')}")
    return ", ".join(steps)


def _report_of(model: Any, table: EvaluationTable) -> EvaluationReport | None:
    """Return the report on exactly these weights, or None.

    An older report does not identify the weights. It is accepted if it covers only one model.
    """
    if len(table.reports) == 1 and not table.reports[0].weights:
        return table.reports[0]
    weights = weights_fingerprint(model)
    return next((report for report in table.reports if report.weights == weights), None)


def evaluation_facts(table: EvaluationTable, own: EvaluationReport | None) -> dict[str, tuple[Any, ...]]:
    """Return the rows, notes and `model-index` results of an evaluation.

    Args:
        table: Evaluation of one or more models.
        own: Report of the model of the card. Only its results enter the index, and its rows omit the model name.
    """
    scores: list[CardScore] = []
    notes: dict[str, None] = {}  # an ordered set
    for score, report, _ in table.rows():
        name = score.name if report is own else f"{report.model}: {score.name}"
        images = f"{score.num_train:,} / {score.num_images:,}"
        scores.append(CardScore(name, score.data, score.show(score.value, score.interval), images))
        notes[f"{score.task}: {score.protocol}"] = None
    for report in table.reports:
        notes.update(dict.fromkeys(report.notes))
    notes["Brackets: 95 % confidence interval from 2,000 resamples of the test images."] = None
    results = [] if own is None else own.model_index("model")[0]["results"]
    return {"scores": tuple(scores), "evaluation_notes": tuple(notes), "results": tuple(results)}


ANY_FOLDER = "path/to/this/folder"  # the model id in a card whose repository is unknown

# model class: (task of the Hub, Auto class, description)
TASKS = {
    "RegViTModel": ("image-feature-extraction", "AutoModel", "a backbone for image features"),
    "RegViTBackbone": ("image-feature-extraction", "AutoModel", "a backbone for image features"),
    "RegViTForImageClassification": ("image-classification", "AutoModelForImageClassification", "an image classifier"),
    "RegViTForSemanticSegmentation": (
        "image-segmentation", "AutoModelForSemanticSegmentation", "a model for semantic segmentation"
    ),
    "RegViTForDepthEstimation": ("depth-estimation", "AutoModelForDepthEstimation", "a model for depth estimation"),
}  # fmt: skip

ORIGINS = {
    "pretrained": "pretrained without labels with the DINOv2 losses (the weights are the moving average of the "
    "student)",
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


def _add_diagnosis(report: ArtifactReport, output: Path, *, example_pictures: bool) -> CardArtifacts:
    from ..figures.maps import write_report_figures

    # Image names and images belong to the data set, so they are private by default.
    public = dataclasses.replace(report, skipped=[], examples=report.examples[:2] if example_pictures else [])
    _write_report(output, "artifacts.json", public.to_dict())
    titles = {
        "layer_norms": "Norms of the patch tokens by block",
        "positions": "Positions of the outliers",
        "example_00": "Attention and norm maps of an image",
        "example_01": "Attention and norm maps of a second image",
    }
    figures = []
    for path in write_report_figures(public, output / "figures"):
        figures.append(CardFigure(f"figures/{path.name}", titles[path.stem]))
    if not report.outliers["per_image"]:  # no outliers, so the map is empty
        (output / "figures" / "positions.png").unlink()
        figures = [figure for figure in figures if "positions" not in figure.path]
    return CardArtifacts(
        verdict=report.verdict,
        summary=report.summary(),
        num_images=report.num_images,
        preprocessing=_describe_preprocessing(str(report.settings.get("preprocessing", ""))),
        figures=tuple(figures),
        has_outliers=report.bimodal,
    )


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
        recipe_file: Whether `recipe.yaml` is in the folder of the card.
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
    """

    name: str
    config: Mapping[str, Any]
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
    alarms: tuple[Mapping[str, Any], ...] = ()
    scores: tuple[CardScore, ...] = ()
    evaluation_notes: tuple[str, ...] = ()
    results: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    artifacts: CardArtifacts | None = None
    intended_use: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    environment: str = ""

    @property
    def model_class(self) -> str:
        """Name of the model class from which the checkpoint was saved."""
        return str((self.config.get("architectures") or ["RegViTModel"])[0])

    @property
    def pipeline_tag(self) -> str:
        """Task of the model on the Hub."""
        return TASKS[self.model_class][0]


# ---- Facts of a run ----------------------------------------------------------------------------------------------

_PRIVATE = ("output_dir", "logging_dir", "hub_token", "push_to_hub_token", "resume_from_checkpoint", "run_name")
_PATH_FIELDS = ("data", "init_from", "model_name_or_path", "train_dir", "validation_dir", "processor")


def public_name(source: object) -> str:
    """Return the last part of a path, or a whole Hub id that is not a local folder. Local paths are private."""
    text = str(source)
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", text) is not None and not Path(text).exists()
    return text if is_id else Path(text).name or text


def public_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved recipe without local folders, tokens and run names."""

    def public(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [public(name, item) for item in value]
        looks = isinstance(value, str) and (name in _PATH_FIELDS or Path(value).is_absolute() or value[:1] == "~")
        return public_name(value) if looks else value

    return {name: public(name, value) for name, value in recipe.items() if name not in _PRIVATE}


def _names(recipe: Mapping[str, Any], *fields: str) -> str:
    found = next((recipe[name] for name in fields if recipe.get(name)), None)
    sources = found if isinstance(found, list) else [found] if found else []
    return ", ".join(f"`{public_name(source)}`" for source in sources) or "Images passed in Python"


def describe_environment(environment: Mapping[str, Any]) -> str:
    """Return the content of `environment.json` as part of a sentence."""
    if not environment:
        return ""
    packages = ", ".join(f"{name} {number}" for name, number in environment["packages"].items() if name != "hf_regvit")
    count = environment["processes"]
    where = f"{count} process{'' if count == 1 else 'es'} on {environment['device']}"
    return f"{where}, Python {environment['python']}, {packages}"


# Keyed by whether the report says that the test images were held out; None for older reports, which do not say.
_KNN_NOTES = {
    True: "The scores are those of the last evaluation during training, on held-out labeled images.",
    False: "The scores are those of the last evaluation during training, on images that the model was trained on "
    "without their labels. They show progress during a run but overestimate the quality of the model.",
    None: "The scores are those of the last evaluation during training, on labeled images.",
}


def pretraining_facts(
    recipe: Mapping[str, Any], report: Mapping[str, Any] | None = None, environment: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Collect the fields of `CardFacts` from the files of a pretraining run. An unfinished run has no report."""
    facts: dict[str, Any] = {
        "origin": "pretrained",
        "data": f"{_names(recipe, 'data')}, without labels.",
        "environment": describe_environment(environment or {}),
    }
    local, size = recipe["num_local_crops"], recipe["local_crop_size"]
    rows = [
        ("crops", f"2 of {recipe['global_crop_size']} and {local} of {size} pixels"),
        ("batch", f"{recipe['per_device_train_batch_size']} images per process"),
        ("learning rate", f"{recipe['learning_rate']:g}"),
        ("prototypes", f"{recipe['head_num_prototypes']:,}"),
        ("targets", str(recipe["centering"])),
        ("seed", str(recipe.get("seed", 42))),
    ]
    if recipe.get("init_from"):
        facts["base_model"] = public_name(recipe["init_from"])
    if report is None:
        facts["limits"] = ("The training of this model is not finished.",)
    else:
        seen, steps, epochs = report["images_seen"], report["steps"], report.get("epochs")
        passes = "" if epochs is None else f", {epochs:.1f} epochs"  # a stream has no epochs
        facts["data"] = f"{_names(recipe, 'data')}, without labels: {seen:,} images seen{passes}."
        minutes = report["seconds"] / 60
        time = f"{minutes:.1f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
        rows.append(("length", f"{steps:,} steps, {time}"))
        if "loss" in report.get("final", {}):
            rows.append(("last loss", f"{report['final']['loss']:.3f}"))
        if seen < 1_000_000:
            facts["limits"] = (f"The training was short: the model saw {seen:,} images in total.",)
        facts["alarms"] = tuple(report.get("alarms", ()))
        data = _names(recipe, "data")
        knn = {key: value for key, value in (report["knn"][-1] if report.get("knn") else {}).items() if key != "step"}
        judged = (report.get("knn_images") or [{}])[0]
        counts = f"{judged['fitted_on']:,} / {judged['judged']:,}" if judged else "-"
        facts["scores"] = tuple(
            CardScore(name.removeprefix("eval_").replace("knn_", "k-NN, k = "), data, f"{100 * value:.1f} %", counts)
            for name, value in knn.items()
        )
        if knn:
            facts["evaluation_notes"] = (_KNN_NOTES[judged.get("held_out")],)
    return {**facts, "recipe": tuple(rows)}


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
_FEW_IMAGES = 100


def finetuning_facts(
    recipe: Mapping[str, Any], report: Mapping[str, Any] | None = None, environment: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Collect the fields of `CardFacts` from the files of a fine-tuning run. An unfinished run has no report.

    Args:
        recipe: Content of `resolved_recipe.yaml`.
        report: Content of `metrics.json`.
        environment: Content of `environment.json`.
    """
    facts: dict[str, Any] = {"origin": "finetuned", "environment": describe_environment(environment or {})}
    data = _names(recipe, "data", "train_dir")
    facts["data"] = f"{data}, with labels."
    if recipe.get("model_name_or_path"):
        facts["base_model"] = public_name(recipe["model_name_or_path"])
    rows = []
    for name, (words, silent) in _SETTINGS.items():
        value = recipe.get(name)
        if value is None or value == silent or (name == "lora_r" and recipe.get("mode") != "lora"):
            continue
        rows.append((words, ", ".join(map(str, value)) if isinstance(value, list) else f"{value}"))
    if report is None:
        facts["limits"] = ("The training of this model is not finished.",)
        return {**facts, "recipe": tuple(rows)}
    images, described = report["images"], report.get("described", {})
    about = "".join(f" {key[:1].upper()}{key[1:]}: {words.rstrip('.')}." for key, words in described.items())
    facts["data"] = (
        f"{data}, with labels: {images['train']:,} training images, {images['validation']:,} validation "
        f"images; {images['seen']:,} images seen.{about}"
    )
    if report.get("changes"):
        rows.insert(0, ("start", " ".join(report["changes"])))
    length = f"{report['steps']:,} steps, {report['epochs']:.1f} epochs"
    if "seconds" in report:
        seconds = report["seconds"]
        length += f", {f'{seconds:.0f} s' if seconds < 120 else f'{seconds / 60:.1f} minutes'} including evaluations"
    rows.append(("length", length))
    if "parameters" in report:
        counts = report["parameters"]
        rows.append(("trained parameters", f"{counts['trained']:,} of {counts['all']:,}"))
    validation = next((public_name(recipe[name]) for name in ("validation_dir", "data") if recipe.get(name)), "images")
    return {**facts, "recipe": tuple(rows), **_finetuning_scores(recipe, report, str(validation))}


def _finetuning_scores(recipe: Mapping[str, Any], report: Mapping[str, Any], data: str) -> dict[str, Any]:
    """Return scores, notes, `model-index` results and limits from the content of `metrics.json`."""
    measured, intervals = report["eval"], report.get("intervals", {})
    count, chosen = report["images"]["validation"], bool(recipe.get("load_best_model_at_end"))
    # Metrics of custom tasks follow the metrics that have a name here.
    others = [name for name, value in measured.items() if _is_other_score(name) and isinstance(value, int | float)]
    shown = [*(name for name in _SCORES if name in measured), *others]
    if not shown:
        return {}
    scores, metrics = [], []
    for name in shown:
        words, kind, unit = _SCORES.get(name, (name.replace("_", " "), name, ""))
        value, interval = measured[name], intervals.get(name)
        both = f"{report['images']['train']:,} / {count:,}"
        scores.append(CardScore(words, f"{data}, validation", _with_interval(value, interval, unit), both))
        if name == "loss":  # depends on the loss function of the run, so models cannot be compared by it
            continue
        protocol = {"num_images": count, "seed": report.get("seed"), "step": report["step_of_the_result"]}
        protocol |= {"chosen_on_these_images": chosen}
        if interval:
            protocol["confidence_interval"] = [round(bound, 4) for bound in interval]
        metrics.append({"type": kind, "name": words, "value": round(value, 4), "args": protocol})
    notes = [f"Results of step {report['step_of_the_result']:,}." + " The step was selected on these images." * chosen]
    if report.get("protocol"):
        notes.append(f"{report['protocol']}.")
    if of_classes := {name: value for name, value in measured.items() if name.startswith("iou_")}:
        each = ", ".join(f"{name.removeprefix('iou_')} {100 * value:.1f} %" for name, value in of_classes.items())
        notes.append(f"IoU of each class: {each}.")
    if measured.get("skipped_images"):
        notes.append(f"{measured['skipped_images']:.0f} validation images could not be read and were skipped.")
    if intervals:
        notes.append(f"Brackets: 95 % confidence interval over the validation images ({report['interval_of']}).")
    limits = []
    if chosen:
        limits.append(
            "The step of the result was selected on the validation images, so its numbers are slightly too high. "
            "There is no separate test split."
        )
    if count < _FEW_IMAGES:
        limits.append(f"The model was evaluated on only {count} images.")
    task = {"image-classification": "image-classification", "semantic-segmentation": "image-segmentation"}.get(
        str(report.get("task", "image-classification")), str(report.get("task"))
    )
    result = {
        "task": {"type": task, "name": task.replace("-", " ").capitalize()},
        "dataset": {"name": data, "type": re.sub(r"[^\w./-]+", "-", data), "split": "validation"},
        "metrics": metrics,
    }
    return {
        "scores": tuple(scores),
        "evaluation_notes": tuple(notes),
        "results": (result,),
        "limits": tuple(limits),
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
