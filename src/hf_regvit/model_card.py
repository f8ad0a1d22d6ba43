"""Model cards: text written from the facts of a run, and a check that a card is complete.

The caller collects the facts: a run while it trains, or `hub.bundle` afterwards.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .configuration_regvit import __version__

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
ANY_FOLDER = "path/to/this/folder"  # the model id in a card whose repository is unknown
SECTIONS = (
    "How to load", "Training data", "Training", "Evaluation", "Artifact tokens", "Intended use", "Limits", "License",
    "How this was made",
)  # fmt: skip

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


def own_name(source: object) -> str:
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
        return own_name(value) if looks else value

    return {name: public(name, value) for name, value in recipe.items() if name not in _PRIVATE}


def _names(recipe: Mapping[str, Any], *fields: str) -> str:
    found = next((recipe[name] for name in fields if recipe.get(name)), None)
    sources = found if isinstance(found, list) else [found] if found else []
    return ", ".join(f"`{own_name(source)}`" for source in sources) or "Images passed in Python"


def environment_words(environment: Mapping[str, Any]) -> str:
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
        "environment": environment_words(environment or {}),
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
        facts["base_model"] = own_name(recipe["init_from"])
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
    facts: dict[str, Any] = {"origin": "finetuned", "environment": environment_words(environment or {})}
    data = _names(recipe, "data", "train_dir")
    facts["data"] = f"{data}, with labels."
    if recipe.get("model_name_or_path"):
        facts["base_model"] = own_name(recipe["model_name_or_path"])
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
    validation = next((own_name(recipe[name]) for name in ("validation_dir", "data") if recipe.get(name)), "images")
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


# ---- Writing -----------------------------------------------------------------------------------------------------


def render_card(facts: CardFacts) -> str:
    """Return the text of the card with its YAML header.

    Raises:
        ValueError: The origin or the model class is unknown.
    """
    import jinja2

    if facts.origin not in ORIGINS:
        raise ValueError(f"Unknown origin={facts.origin!r}. Choose from {', '.join(ORIGINS)}.")
    if facts.model_class not in TASKS:
        raise ValueError(f"Unknown model class {facts.model_class}. Model cards support {', '.join(TASKS)}.")
    # Names of data sets and classes are untrusted text, which must not break the Markdown of the card.
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters.update(cell=_cell, line=_line)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=facts.name,
        summary=_summary(facts),
        description=facts.description.strip(),
        model=_model_rows(facts),
        tokens=_tokens(facts),
        snippet=snippet(facts),
        data=_line(facts.data) or "Unknown. The files of the run do not name the training images.",
        recipe=facts.recipe,
        untrained="No training settings are available. This model is " + ORIGINS[facts.origin] + ".",
        has_recipe_file=facts.recipe_file,
        curves=facts.curves,
        alarms=facts.alarms,
        scores=facts.scores,
        evaluation_notes=facts.evaluation_notes,
        pictures=facts.pictures,
        artifacts=facts.artifacts,
        intended_use=_intended_use(facts),
        limits=_limits(facts),
        licences=_licences(facts),
        version=__version__,
        environment=facts.environment,
    )
    return f"---\n{_header(facts)}\n---\n\n{text}"


def write_card_file(folder: str | Path, **facts: Any) -> str:
    """Write `README.md` into the folder of a saved model and return its text.

    Args:
        folder: Folder of the saved model, whose `config.json` is read.
        facts: Other fields of `CardFacts`.

    Raises:
        TypeError: A field does not exist in `CardFacts`.
    """
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    text = render_card(CardFacts(**{**facts, "config": config}))
    (Path(folder) / "README.md").write_text(text, encoding="utf-8")
    return text


def _line(value: object) -> str:
    return " ".join(str(value).split()).replace("<", "&lt;")


def _cell(value: object) -> str:
    return _line(value).replace("|", "\\|") or "-"


def _header(facts: CardFacts) -> str:
    from huggingface_hub import ModelCardData

    # Only ids of the form "owner/name" are links on the Hub. Other names appear in the text only.
    base = facts.base_model if facts.base_model and re.fullmatch(r"[\w.-]+/[\w.-]+", facts.base_model) else None
    data = ModelCardData(
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        library_name="transformers",  # required by the Hub's widget and snippet; hf_regvit is a tag
        pipeline_tag=facts.pipeline_tag,
        base_model=base,
        datasets=list(facts.datasets) or None,
        tags=["regvit", "hf_regvit", "registers", "vision", "custom_code", facts.origin],
    )
    header: str = data.to_yaml()
    if facts.results:
        import yaml

        index = {"model-index": [{"name": facts.name, "results": [dict(result) for result in facts.results]}]}
        header += "\n" + yaml.safe_dump(index, sort_keys=False, allow_unicode=True, width=10_000)
    return header.strip()


def _summary(facts: CardFacts) -> str:
    registers = int(facts.config.get("num_register_tokens", 0))
    what = TASKS[facts.model_class][2]
    count = {0: "no register tokens", 1: "one register token"}.get(registers, f"{registers} register tokens")
    start = f" The base model is `{facts.base_model}`." if facts.base_model else ""
    return f"A Vision Transformer with {count}: {what}, {ORIGINS[facts.origin]}.{start}"


def _tokens(facts: CardFacts) -> str:
    """Return the text on the tokens in `last_hidden_state` and on registers."""
    paper = '"Vision Transformers Need Registers", arXiv 2309.16588'
    if not facts.config.get("num_register_tokens", 0):
        return f"The tokens are `[CLS | patches]`. This model has no registers ({paper}); `hf_regvit` can add them."
    what = (
        f"Registers ({paper}) give the\nmodel space for global information. They have no position in the image, and "
        "no head reads them."
    )
    if facts.config.get("discard_registers"):
        return (
            f"The blocks process `[CLS | registers | patches]`, and the model returns `[CLS | patches]`. {what}\n"
            "Only `output.register_tokens` contains them."
        )
    return f"The tokens are `[CLS | registers | patches]`. {what}\n`output.output_mask` is False for registers."


def _model_rows(facts: CardFacts) -> list[tuple[str, str]]:
    config = facts.config

    def pixels(value: Any) -> str:
        rows, columns = (value, value) if isinstance(value, int) else value
        return f"{rows} x {columns} pixels"

    rows = [
        ("class", f"`{facts.model_class}`"),
        ("parameters", f"{facts.parameters:,}"),
        ("blocks, width, heads", ", ".join(
            str(config[key]) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))),
        ("registers", str(config["num_register_tokens"])),
        ("patch size", pixels(config["patch_size"])),
        ("position embeddings", f"for {pixels(config['image_size'])}; resampled for other sizes"),
    ]  # fmt: skip
    labels = config.get("id2label") or {}
    if facts.model_class in ("RegViTForImageClassification", "RegViTForSemanticSegmentation"):
        names = [str(labels[key]) for key in sorted(labels, key=int)]
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        rows.append(("classes", f"{len(names)}: {shown}"))
    if facts.model_class == "RegViTForDepthEstimation":
        rows.append(("depth range", f"{config['min_depth']:g} to {config['max_depth']:g} m"))
    return rows


def snippet(facts: CardFacts) -> str:
    """Return Python code that loads the model and runs it on `image.jpg`. A test executes it."""
    task, auto_class, _ = TASKS[facts.model_class]
    calls = {
        "image-classification": 'pipe("image.jpg")  # labels and scores',
        "image-segmentation": 'pipe("image.jpg", subtask="semantic")  # a mask of the image for each class',
        "depth-estimation": 'pipe("image.jpg")["predicted_depth"]  # (H, W), meters, at the size of the image',
    }
    results = {
        "image-feature-extraction": "output.pooler_output  # (1, D), features of the whole image\n"
        "output.patch_tokens  # (1, N, D), patch features in row-major order, without registers\n"
        "output.register_tokens  # (1, R, D)",
        "image-classification": "best = output.logits[0].softmax(-1).topk(min(5, model.config.num_labels))\n"
        "print([(model.config.id2label[int(i)], round(float(p), 3)) for p, i in zip(best.values, best.indices)])",
        "image-segmentation": "classes = output.logits.argmax(1)  # (1, H, W), at the size of the processed image",
        "depth-estimation": "output.predicted_depth  # (1, H, W), meters, at the size of the processed image",
    }
    stock = (
        f"""

pipe = pipeline("{task}", model=name, trust_remote_code=True)  # does all of the above
{calls[task]}"""
        if task in calls
        else ""
    )
    imported = f"AutoImageProcessor, {auto_class}" + ", pipeline" * (task in calls)
    return f"""import torch
from PIL import Image
from transformers import {imported}

name = "{facts.repo_id}"
processor = AutoImageProcessor.from_pretrained(name)
model = {auto_class}.from_pretrained(name, trust_remote_code=True).eval()
inputs = processor(Image.open("image.jpg").convert("RGB"), return_tensors="pt")
with torch.inference_mode():
    output = model(**inputs)
{results[task]}{stock}"""


def _intended_use(facts: CardFacts) -> list[str]:
    general = {
        "image-feature-extraction": "Frozen image features for nearest neighbors, linear probes, retrieval and dense "
        "tasks, or a starting point for fine-tuning.",
        "image-classification": "Classification into the classes above of images like the training images.",
        "image-segmentation": "Segmentation into the classes above of images like the training images.",
        "depth-estimation": "Estimation of depth in meters for images and cameras like those of the training images.",
    }
    research = "Research on register and artifact tokens: hf_regvit reads norms, attention maps and registers."
    return [general[facts.pipeline_tag], research, *facts.intended_use]


def _limits(facts: CardFacts) -> list[str]:
    limits = list(facts.limits)
    if not facts.scores:
        limits.append("The quality of this model has not been measured.")
    if facts.artifacts and facts.artifacts.has_outliers:
        limits.append("A few patch tokens are artifacts (see above), which affect dense features and attention maps.")
    if not facts.data:
        limits.append("The training images and their biases are unknown.")
    limits.append(
        "The model has not been tested for bias, for robustness or for use on images of people. Do not use it to make "
        "decisions about people."
    )
    limits.append("The model may perform poorly on images that differ from its training images.")
    return limits


def _licences(facts: CardFacts) -> list[tuple[str, str]]:
    weights = facts.license or "not stated"
    if facts.license_name:
        weights += f" ({facts.license_name})"
    if facts.license_link:
        weights += f", {facts.license_link}"
    rows = [("these weights", weights), ("code (the two Python files)", "apache-2.0")]
    if facts.base_model:
        rows.append((f"weights of {facts.base_model}", facts.base_model_license or "not stated"))
    rows.append(("training images", facts.data_license or "not stated"))
    return rows


# ---- Checking ----------------------------------------------------------------------------------------------------


class CardError(ValueError):
    """A card that cannot be published. The message lists all problems."""


# "None" and "nan" in the place of a value, but not in a phrase such as "None of these images".
_UNFILLED = re.compile(
    r"\{\{|\{%|\}\}|%\}|\bTODO\b|\bFIXME\b|\[?[Mm]ore [Ii]nformation [Nn]eeded|\b(?:None|nan)\b(?=\W*$| *[|%,;\])])",
    flags=re.MULTILINE,
)
_CLASS_NAMES = re.compile(r"^(?:\| classes \||- IoU of each class:).*$", flags=re.MULTILINE)


def card_header(text: str) -> dict[str, Any]:
    """Return the YAML header of a card, or an empty dict if it has none."""
    import yaml

    found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", text, flags=re.DOTALL)
    content = yaml.safe_load(found[1]) if found else {}
    return content if isinstance(content, dict) else {}


def card_snippets(text: str) -> list[str]:
    """Return the Python code blocks of a card."""
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def check_card(
    text: str, *, folder: str | Path | None = None, required: Sequence[str] = ("license", "pipeline_tag")
) -> None:
    """Check that a card is complete.

    Args:
        text: Text of the card.
        folder: Folder with the figures of the card; None skips the check of the figures.
        required: Required fields of the header.

    Raises:
        CardError: Sections, header fields or figures are missing, or placeholders were not filled in.
    """
    wrong = []
    header = card_header(text)
    wrong += [f"the header has no '{name}'" for name in (*required, "library_name", "tags") if not header.get(name)]
    if (licence := header.get("license")) and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", str(licence)):
        wrong.append(
            f"license '{licence}' is not a Hub license id; use a lower-case id such as apache-2.0, or 'other' with "
            "license_name and license_link"
        )
    if licence == "other" and not (header.get("license_name") and header.get("license_link")):
        wrong.append("license is 'other', which requires license_name and license_link in the header")
    body = re.sub(r"^---\r?\n.*?\r?\n---\r?\n", "", text, count=1, flags=re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", body, flags=re.DOTALL | re.MULTILINE)
    parts = re.split(r"^## (.+)$", body, flags=re.MULTILINE)
    filled = {title.strip() for title, content in zip(parts[1::2], parts[2::2], strict=True) if content.strip()}
    wrong += [f"the section '{title}' is missing or empty" for title in SECTIONS if title not in filled]
    prose = _CLASS_NAMES.sub("", prose)  # a class may be called "None"
    wrong += [f"the placeholder '{found}' was not filled in" for found in sorted(set(_UNFILLED.findall(prose)))]
    if not card_snippets(body):
        wrong.append("there is no Python snippet that loads the model")
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", body)
    if folder is not None:
        wrong += [f"the figure '{name}' does not exist" for name in pictures if not (Path(folder) / name).is_file()]
    if wrong:
        raise CardError("The model card (README.md) cannot be published: " + "; ".join(wrong) + ".")
