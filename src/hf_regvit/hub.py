"""Publish a checkpoint: bundle its public files, verify in a clean process that they load, and upload them.

`bundle` collects weights, code, processor, card, figures, reports and recipe from a list of allowed files. `verify`
loads the bundle where hf_regvit cannot be imported and compares it with the original. `publish` does both and uploads
the bundle.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .artifacts import ArtifactReport
from .checkpoints import verify_checkpoint, write_manifest
from .evaluation_report import EvaluationReport, EvaluationTable
from .extraction import weights_fingerprint
from .model_card import (
    ANY_FOLDER,
    TASKS,
    CardArtifacts,
    CardFacts,
    CardFigure,
    CardScore,
    check_card,
    finetuning_facts,
    pretraining_facts,
    public_recipe,
    write_card_file,
)
from .modeling_regvit import (
    CheckpointCorruptError,
    RegViTBackbone,
    RegViTForDepthEstimation,
    RegViTForImageClassification,
    RegViTForSemanticSegmentation,
    RegViTModel,
)
from .retrofit import RetrofitReport
from .upload import CARD, CODE_FILES, RetryPolicy, Sent, may_be_published, scan, send_folder

logger = logging.getLogger(__name__)

MODEL_CLASSES: dict[str, Any] = {
    model_class.__name__: model_class
    for model_class in (
        RegViTModel, RegViTBackbone, RegViTForImageClassification, RegViTForSemanticSegmentation,
        RegViTForDepthEstimation,
    )
}  # fmt: skip
STRANGER = Path(__file__).parent / "templates" / "stranger.py"
TOLERANCE = 1e-5  # both absolute and relative
SHARD_SIZE = "5GB"

# Fields that a processor must store itself, because the defaults of its class belong to another model.
_STATISTICS = (
    "image_mean",
    "image_std",
    "rescale_factor",
    "resample",
    "do_resize",
    "do_rescale",
    "do_normalize",
    "size",
)
_FORBIDDEN_FIELDS = ("use_cache", "_name_or_path", "_commit_hash", "hub_token")


class BundleError(ValueError):
    """A model that cannot be bundled, or an invalid bundle. The message says what to do."""


@dataclass(frozen=True)
class Bundle:
    """A folder that can be published.

    Attributes:
        folder: Path of the folder.
        files: Size in bytes and sha256 of every file, as in `manifest.json`.
        model_class: Name of the model class.
        parameters: Number of parameters.
    """

    folder: Path
    files: dict[str, dict[str, Any]]
    model_class: str
    parameters: int

    @property
    def names(self) -> list[str]:
        """Names of all files, with the manifest last."""
        return [*self.files, "manifest.json"]


# ---- Bundle ------------------------------------------------------------------------------------------------------


def bundle(
    model_folder: str | Path,
    output_dir: str | Path,
    *,
    reports: Sequence[str | Path] = (),
    card: Mapping[str, Any] | None = None,
    example_pictures: bool = False,
    max_shard_size: str = SHARD_SIZE,
) -> Bundle:
    """Collect the public files of a checkpoint in a new folder.

    The weights are saved again as safetensors, the code files are those of this package, the configuration names all
    Auto classes, and the processor stores all of its settings. From the folder of a run, its recipe, report,
    environment and curves are added without local paths. All files are searched for secrets and absolute paths.

    Args:
        model_folder: RegViT checkpoint, or the folder of a run of `regvit pretrain` or `regvit finetune`.
        output_dir: New or empty folder.
        reports: Reports of `regvit diagnose` and `regvit evaluate`: JSON files, or the folders that contain them.
        card: Fields of `model_card.CardFacts` that the files do not contain, such as `license`.
        example_pictures: Whether to include the example figures of a diagnosis, which show images of the data set.
        max_shard_size: Maximum size of a weights file; larger weights are split.

    Raises:
        BundleError: The checkpoint is not a RegViT or has no processor, or a report is invalid.
        model_card.CardError: The card is incomplete.
        upload.PrivateContentError: A file contains a secret or a local path; the message names file and line.
        FileExistsError: `output_dir` is not empty.
        NotADirectoryError: `output_dir` is a file.
    """
    checkpoint = checkpoint_folder(model_folder)
    output = Path(output_dir)
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"'{output}' is a file. Choose a new folder for the bundle.")
    if output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"'{output}' is not empty. Choose a new folder for the bundle.")
    model = load_checkpoint(checkpoint)
    staged = output.with_name(f".{output.name}.making")  # so that an incomplete bundle is never left behind
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        _save_model(model, staged, max_shard_size=max_shard_size)
        _save_processor(checkpoint, staged)
        facts = _run_facts(Path(model_folder), checkpoint, staged)
        for report in reports:
            _add_report(Path(report), staged, facts, model=model, example_pictures=example_pictures)
        _write_card(model, staged, {"name": output.name, **facts, **(card or {})}, facts)
        write_manifest(staged)
        options = _sums_of_options(card, reports, example_pictures=example_pictures, max_shard_size=max_shard_size)
        manifest = {**(_json_of(staged / "manifest.json") or {}), "options": options}
        (staged / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        read_bundle(staged)
        staged.replace(output)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return read_bundle(output)


def checkpoint_folder(folder: str | Path) -> Path:
    """Return the checkpoint folder: the folder itself, or its `backbone/` if it is a pretraining run.

    Raises:
        BundleError: The folder contains no RegViT checkpoint.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BundleError(f"'{folder}' is not a folder. Pass a checkpoint or the folder of a run.")
    for candidate in (folder, folder / "backbone"):
        if (candidate / "config.json").is_file():
            kind = _config_of(candidate).get("model_type")
            if kind != "regvit":
                raise BundleError(
                    f"'{candidate}' contains a model of type '{kind}', not a RegViT. Run `regvit convert --model "
                    f"{candidate} --output_dir ...` first."
                )
            return candidate
    raise BundleError(f"'{folder}' has no config.json, and neither has a backbone/ in it. Pass a finished checkpoint.")


def _config_of(folder: Path) -> dict[str, Any]:
    config = _json_of(folder / "config.json")
    if not isinstance(config, dict):
        raise BundleError(f"'{folder}/config.json' holds a {type(config).__name__}. Expected a JSON object.")
    return config


def load_checkpoint(folder: Path) -> Any:
    """Load the model of a folder with the class from which it was saved.

    Raises:
        BundleError: The model class is not a RegViT class.
        CheckpointCorruptError: The checksum of the weights differs from the one in manifest.json.
    """
    config = _config_of(folder)
    name = (config.get("architectures") or ["RegViTModel"])[0]
    if name not in MODEL_CLASSES:
        raise BundleError(f"'{folder}' was saved from {name}. Supported classes: {', '.join(MODEL_CLASSES)}.")
    _compare_with_manifest(folder)
    return MODEL_CLASSES[name].from_pretrained(folder).eval()


def _compare_with_manifest(folder: Path) -> None:
    """Compare the weights with the checksums of manifest.json, because a flipped bit loads without an error."""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        sums = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # no manifest, or a file of that name from another program
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            continue  # loading reports a missing file
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != expected:
            raise CheckpointCorruptError(
                f"The sha256 of '{path}' differs from '{folder}/manifest.json'. Use an intact copy, or remove the "
                "manifest if you changed the weights on purpose."
            )


def _save_model(model: Any, output: Path, *, max_shard_size: str) -> None:
    model.save_pretrained(output, max_shard_size=max_shard_size)
    path = output / "config.json"
    config = {k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if k not in _FORBIDDEN_FIELDS}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _save_processor(checkpoint: Path, output: Path) -> None:
    from transformers import AutoImageProcessor

    source = checkpoint / "preprocessor_config.json"
    if not source.is_file():
        raise BundleError(
            f"'{checkpoint}' has no preprocessor_config.json, so users could not preprocess images for it. Save its "
            "image processor in the folder with processor.save_pretrained(folder)."
        )
    AutoImageProcessor.from_pretrained(checkpoint).save_pretrained(output)


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


def _json_of(path: Path) -> Any:
    """Return the content of a JSON file, or None if the file does not exist."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"'{path}' is not valid JSON ({error}).") from error


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


def _sums_of_options(
    card: Mapping[str, Any] | None, reports: Sequence[str | Path], *, example_pictures: bool, max_shard_size: str
) -> dict[str, str]:
    """Return a short hash of every non-default option, to detect a request for a different bundle."""
    wishes: dict[str, Any] = {
        **(card or {}),
        "reports": [_report_file(Path(report)).read_text(encoding="utf-8") for report in reports],
        "example_pictures": example_pictures,
        "max_shard_size": max_shard_size,
    }
    said = {name: value for name, value in wishes.items() if value and value not in (ANY_FOLDER, SHARD_SIZE)}
    return {name: hashlib.sha256(repr(value).encode()).hexdigest()[:16] for name, value in sorted(said.items())}


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


def _add_diagnosis(report: ArtifactReport, output: Path, *, example_pictures: bool) -> CardArtifacts:
    from .figures import write_report_figures

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
        preprocessing=_preprocessing_words(str(report.settings.get("preprocessing", ""))),
        figures=tuple(figures),
        has_outliers=report.bimodal,
    )


def _preprocessing_words(text: str) -> str:
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


def _write_card(model: Any, output: Path, facts: dict[str, Any], measured: Mapping[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(CardFacts)}
    if unknown := set(facts) - known:
        raise BundleError(
            f"The card has no field {', '.join(sorted(unknown))}. Choose from {', '.join(sorted(known))}."
        )
    # The author's entries follow the measured ones.
    for name in ("limits", "intended_use", "scores", "evaluation_notes"):
        if facts.get(name) is not measured.get(name):
            facts[name] = (*measured.get(name, ()), *facts[name])
    text = write_card_file(output, **{**facts, "parameters": model.num_parameters()})
    check_card(text, folder=output)


def _files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def read_bundle(folder: str | Path) -> Bundle:
    """Read a bundle from its folder and check that all of its files are allowed, in the manifest and unchanged.

    Raises:
        BundleError: A file is not allowed or is a link, or the configuration does not load without hf_regvit.
        CheckpointCorruptError: A file is missing or has changed since it was bundled.
        model_card.CardError: The card is incomplete.
        upload.PrivateContentError: A file contains a secret or a local path.
    """
    folder = Path(folder)
    names = _files_of(folder)
    strange = [name for name in names if not may_be_published(name) or (folder / name).is_symlink()]
    if strange:
        raise BundleError(
            f"'{folder}' contains {', '.join(strange)}, which {'is' if len(strange) == 1 else 'are'} not allowed in a "
            "bundle. Bundle the checkpoint again in a new folder."
        )
    try:
        verify_checkpoint(folder, required=("config.json", "preprocessor_config.json", CARD, *CODE_FILES))
    except CheckpointCorruptError as error:
        raise CheckpointCorruptError(
            f"{error} A bundle must not be edited. Remove the folder and bundle again; to add text to the card, use "
            "--description."
        ) from error
    files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    if surplus := set(names) - set(files) - {"manifest.json"}:
        raise BundleError(f"'{folder}' contains {', '.join(sorted(surplus))}, which manifest.json does not list.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    check_card((folder / CARD).read_text(encoding="utf-8"), folder=folder)
    _check_config(config, folder)
    scan(folder, names)
    model_class = config["architectures"][0]
    return Bundle(folder, files, model_class, _count_parameters(folder, files))


def _check_config(config: Mapping[str, Any], folder: Path) -> None:
    expected = {
        "AutoConfig": "configuration_regvit.RegViTConfig",
        **{auto: f"modeling_regvit.{name}" for name, (_, auto, _) in TASKS.items() if name != "RegViTBackbone"},
        "AutoBackbone": "modeling_regvit.RegViTBackbone",
    }
    if config.get("auto_map") != expected:
        raise BundleError(
            f"'{folder}/config.json' has auto_map={config.get('auto_map')}, which does not load without hf_regvit. "
            f"Expected {expected}. Save the model with this version of hf_regvit."
        )
    if found := [name for name in _FORBIDDEN_FIELDS if name in config]:
        raise BundleError(
            f"'{folder}/config.json' contains {', '.join(found)}, which must not be published. Bundle it again."
        )
    package = Path(__file__).parent
    for name in CODE_FILES:
        if (folder / name).read_bytes() != (package / name).read_bytes():
            raise BundleError(f"'{folder}/{name}' differs from this version of hf_regvit. Bundle it again.")
    processor = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    if missing := [name for name in _STATISTICS if processor.get(name) is None]:
        raise BundleError(
            f"'{folder}/preprocessor_config.json' lacks {', '.join(missing)}, so another version of transformers "
            "could preprocess images differently. Save the processor with all of these fields."
        )


def _count_parameters(folder: Path, names: Mapping[str, Any]) -> int:
    from safetensors import safe_open

    total = 0
    for name in names:
        if name.endswith(".safetensors"):
            with safe_open(folder / name, framework="pt") as file:
                total += sum(int(np.prod(file.get_slice(key).get_shape())) for key in file.keys())  # noqa: SIM118
    return total


# ---- Verify ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verification:
    """Result of loading a bundle in a clean process and comparing it with the original.

    Attributes:
        compared: Largest difference of each compared output.
        loaded: Class that each Auto class loaded, with its module.
        not_run: Reason for each pipeline that was skipped.
    """

    compared: dict[str, float]
    loaded: dict[str, str]
    not_run: dict[str, str]

    @property
    def largest_difference(self) -> float:
        """Largest difference over all compared outputs."""
        return max(self.compared.values())


def verify(bundle_folder: str | Path, *, original: str | Path | None = None, timeout: float = 600.0) -> Verification:
    """Load a bundle in a clean process, offline and without hf_regvit, and compare it with the original.

    The clean process runs AutoModel, the Auto class of the task, AutoImageProcessor and the pipelines of transformers
    on two images. All outputs must agree to 1e-5 with those of the original in this process.

    Args:
        bundle_folder: Folder made by `bundle`.
        original: Checkpoint or run from which the bundle was made. Default: the bundle, loaded by this package.
        timeout: Time limit of the process in seconds.

    Raises:
        BundleError: The bundle cannot be loaded in the clean process, or its outputs differ. See also `read_bundle`.
    """
    made = read_bundle(bundle_folder)
    source = made.folder if original is None else checkpoint_folder(original)
    task, auto_class, _ = TASKS[made.model_class]
    pipelines, not_run = _pipelines_of(task, source)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pictures = _pictures(folder)
        questions = {
            "images": list(pictures), "auto_classes": sorted({"AutoModel", auto_class}), "pipelines": pipelines
        }  # fmt: skip
        (folder / "questions.json").write_text(json.dumps(questions))
        answers, facts = _ask_a_stranger(made.folder.resolve(), folder, timeout=timeout)
        expected, words = _expected(source, list(pictures.values()), questions)
    strangers = {name: ".".join(found) for name, found in facts["classes"].items()}
    for name, found in strangers.items():
        if not found.startswith("transformers_modules."):
            raise BundleError(f"{name} loaded {found} instead of a class from the code files of the bundle.")
    compared = _compare(answers, expected, "")
    compared |= _compare_words(facts["pipelines"], words)
    return Verification(compared, strangers, not_run)


def _pipelines_of(task: str, source: Path) -> tuple[list[str], dict[str, str]]:
    from transformers import AutoImageProcessor

    needed = {
        "image-segmentation": "post_process_semantic_segmentation", "depth-estimation": "post_process_depth_estimation"
    }  # fmt: skip
    pipelines, not_run = ["image-feature-extraction"], {}
    if task != "image-feature-extraction":
        processor = AutoImageProcessor.from_pretrained(source)
        if task in needed and not hasattr(processor, needed[task]):
            not_run[task] = f"the processor {type(processor).__name__} has no {needed[task]}"
        else:
            pipelines.append(task)
    return pipelines, not_run


def _pictures(folder: Path) -> dict[str, Any]:
    """Save and return two images of different shapes with structure at several scales."""
    from PIL import Image

    pictures = {}
    for number, (rows, columns) in enumerate(((240, 320), (300, 225))):
        rng = np.random.default_rng(number)
        layers = [
            np.asarray(
                Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).resize((columns, rows)),
                dtype=np.float64,
            )
            for size in (4, 16, 64)
        ]
        picture = Image.fromarray(np.mean(layers, axis=0).astype(np.uint8))
        picture.save(folder / f"{number}.png")
        pictures[f"{number}.png"] = picture
    return pictures


def _ask_a_stranger(bundle_folder: Path, folder: Path, *, timeout: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors.torch import load_file

    # Exclude the user's settings, caches, network and token.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON", "HUGGING"))}
    environment |= {
        "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }  # fmt: skip
    command = [sys.executable, "-P", str(STRANGER), str(bundle_folder), str(folder), str(torch.get_num_threads())]
    try:
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise BundleError(f"Loading '{bundle_folder}' in a clean process took more than {timeout:.0f} s.") from error
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise BundleError(f"'{bundle_folder}' cannot be loaded without hf_regvit:\n{last}")
    return load_file(folder / "answers.safetensors"), json.loads((folder / "answers.json").read_text())


def _expected(
    source: Path, images: Sequence[Any], questions: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the outputs of the original in this process, under the names that the clean process uses."""
    import transformers

    tensors: dict[str, Tensor] = {}
    words: dict[str, Any] = {}
    processor = transformers.AutoImageProcessor.from_pretrained(source)
    for auto_class in questions["auto_classes"]:
        with _without_remarks():  # AutoModel reports that it does not load the head of a classifier
            model = _in_fresh_memory(getattr(transformers, auto_class).from_pretrained(source))
        for number, image in enumerate(images):
            inputs = processor(image, return_tensors="pt")
            tensors[f"{number}.pixel_values"] = inputs["pixel_values"]
            with torch.inference_mode():
                for key, value in model(**inputs).items():
                    if isinstance(value, Tensor):
                        tensors[f"{number}.{auto_class}.{key}"] = value
    for task in questions["pipelines"]:
        with _without_remarks():
            tool: Any = transformers.pipeline(task, model=str(source))
        _in_fresh_memory(tool.model)
        for number, image in enumerate(images):
            name = f"{number}.{task}"
            if task == "image-feature-extraction":
                tensors[name] = tool(image, return_tensors=True)
            elif task == "image-classification":
                words[name] = tool(image, top_k=5)
            elif task == "depth-estimation":
                tensors[name] = tool(image)["predicted_depth"]
            else:
                words[name] = [[entry["label"], sum(entry["mask"].histogram()[1:])] for entry in tool(image)]
    return tensors, words


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Silence the reports on weights that are not loaded on purpose and on model types unknown to transformers."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _in_fresh_memory(model: Any) -> Any:
    """Copy the weights as in `templates/stranger.py`: kernels round differently for addresses in a mapped file."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


def _compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> dict[str, float]:
    if found.keys() != expected.keys():
        raise BundleError(f"The outputs of the bundle are {sorted(found)}, those of the original {sorted(expected)}.")
    differences = {}
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise BundleError(
                f"{name}: shape {tuple(found[name].shape)} differs from {tuple(value.shape)} of the original."
            )
        difference = (found[name].float() - value.float()).abs()
        allowed = TOLERANCE * (1 + value.float().abs())
        differences[name] = float(difference.max()) if difference.numel() else 0.0  # a model without registers
        if not bool((difference <= allowed).all()):
            raise BundleError(
                f"{name}: the outputs differ by up to {differences[name]:.2g} from the original (tolerance "
                f"{TOLERANCE:g}). The bundle is not the model from which it was made."
            )
    return differences


def _compare_words(found: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, float]:
    """Compare the labels in their order, and their scores or pixel counts."""
    differences = {}
    for name, entries in expected.items():
        pairs = [(e["label"], e["score"]) if isinstance(e, dict) else tuple(e) for e in entries]
        other = [(e["label"], e["score"]) if isinstance(e, dict) else tuple(e) for e in found[name]]
        off = max((abs(a[1] - b[1]) for a, b in zip(pairs, other)), default=0.0)
        if [a[0] for a in pairs] != [b[0] for b in other] or off > TOLERANCE:
            raise BundleError(f"{name}: the pipeline returns {other}, that of the original {pairs}.")
        differences[name] = float(off)
    return differences


# ---- Publish -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Publication:
    """Result of `publish`; `sent` is None if nothing was uploaded."""

    bundle: Bundle
    verification: Verification
    sent: Sent | None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as a dict for JSON."""
        return {
            "folder": str(self.bundle.folder),
            "files": self.bundle.files,
            "model_class": self.bundle.model_class,
            "parameters": self.bundle.parameters,
            "loaded_without_hf_regvit": self.verification.loaded,
            "largest_difference": self.verification.largest_difference,
            "pipelines_not_run": self.verification.not_run,
            "sent": None if self.sent is None else dataclasses.asdict(self.sent),
        }

    def summary(self) -> dict[str, str]:
        """Return the result as lines for a terminal."""
        size = sum(entry["size"] for entry in self.bundle.files.values()) / 2**20
        lines = {
            "bundle": f"{self.bundle.folder}: {len(self.bundle.names)} files, {size:.1f} MiB",
            "verified": f"loaded without hf_regvit as {', '.join(self.verification.loaded)}; largest difference "
            f"{self.verification.largest_difference:.1g} over {len(self.verification.compared)} outputs",
        }
        lines |= {f"pipeline not tested, {task}": reason for task, reason in self.verification.not_run.items()}
        if self.sent is None:
            return {**lines, "upload": "Not uploaded. Add --push to upload."}
        return {**lines, "upload": self.sent.url + ("" if self.sent.changed else " (all files were already there)")}


def _check_same_options(output: Path, wanted: Mapping[str, str]) -> None:
    """Check that an existing bundle was made with the options that are given. Omitted options are not compared."""
    made_with = (_json_of(output / "manifest.json") or {}).get("options")
    if made_with is None:  # made before options were stored
        return
    other = [name for name, value in wanted.items() if made_with.get(name) != value and name != "name"]
    if other:  # `name` follows from the repository
        raise BundleError(
            f"'{output}' already contains a bundle made with a different {', '.join(other)}. Remove that folder, or "
            "choose another --output_dir."
        )


def _check_repo_id(repo_id: str) -> None:
    """Check the repository id before the bundle is made, because the card, its code and the folder name use it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise BundleError(f"'{repo_id}' is not a valid Hub repository id. Use owner/name. {error}") from error
    if "/" not in repo_id:
        raise BundleError(
            f"'{repo_id}' has no owner, so the code on the card could not load the model. Use owner/{repo_id}."
        )


def publish(
    model_folder: str | Path,
    repo_id: str | None = None,
    *,
    output_dir: str | Path,
    reports: Sequence[str | Path] = (),
    card: Mapping[str, Any] | None = None,
    example_pictures: bool = False,
    max_shard_size: str = SHARD_SIZE,
    push: bool = False,
    private: bool = True,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    retry: RetryPolicy | None = None,
) -> Publication:
    """Bundle a checkpoint, verify the bundle in a clean process, and upload it if `push` is set.

    If the folder already contains a bundle of the same checkpoint, that bundle is verified and uploaded, so the same
    command continues an interrupted push.

    Args:
        model_folder: RegViT checkpoint or run folder, see `bundle`.
        repo_id: Hub repository id `owner/name`, from which the card loads the model. Required to push.
        output_dir: Folder for the bundle.
        reports: Reports for the card, see `bundle`.
        card: Additional fields of the card, see `bundle`.
        example_pictures: Whether to include example figures, see `bundle`.
        max_shard_size: Maximum size of a weights file, see `bundle`.
        push: Whether to upload the bundle. If False, nothing is uploaded.
        private: Whether a new repository is private. An existing public repository requires False.
        revision: Branch to upload to. Default: main.
        commit_message: Message of the commit. Default: names the model class.
        token: Token with write access. Default: the stored token or `HF_TOKEN`.
        retry: Policy for retries after errors.

    Raises:
        BundleError: `bundle` or `verify` failed, `repo_id` is missing or invalid, or `output_dir` contains a bundle
            made with other options.
        upload.PushError: The upload failed; the bundle remains in `output_dir`.
    """
    if push and not repo_id:
        raise BundleError("Pushing requires a repository. Add --repo_id owner/name.")
    if repo_id:
        _check_repo_id(repo_id)
    output = Path(output_dir)
    words = {"repo_id": repo_id or ANY_FOLDER, **({"name": repo_id.split("/")[-1]} if repo_id else {})}
    asked: dict[str, Any] = {
        "reports": reports, "card": {**words, **(card or {})}, "example_pictures": example_pictures,
        "max_shard_size": max_shard_size,
    }  # fmt: skip
    if (output / "manifest.json").is_file():
        made = read_bundle(output)
        _check_same_options(output, _sums_of_options(**asked))
        logger.info("'%s' already contains a bundle, which is verified and used.", output)
    else:
        made = bundle(model_folder, output, **asked)
    verification = verify(output, original=model_folder)
    sent = None
    if push and repo_id:
        sent = send_folder(
            output,
            repo_id,
            names=made.names,
            message=commit_message or f"Upload {made.model_class} with hf_regvit",
            private=private,
            accept_public=not private,
            token=token,
            revision=revision,
            retry=retry,
        )
    return Publication(made, verification, sent)
