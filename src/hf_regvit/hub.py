"""From a checkpoint to a repository: bundle what may be published, prove that strangers can load it, send it.

`bundle` collects weights, code, processor, card, figures, reports and recipe by a list of what may go; `verify` loads
the result where hf_regvit cannot be imported and compares it with the original; `publish` does both and sends.
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
TOLERANCE = 1e-5  # absolute, and relative to the value
SHARD_SIZE = "5GB"

# What a processor has to say itself, because the defaults of its class are another model's.
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
    """A model that cannot be bundled, or a bundle that is not what it should be; the message says what to do."""


@dataclass(frozen=True)
class Bundle:
    """A folder that may be published.

    Attributes:
        folder: Where it is.
        files: Size in bytes and sha256 of every file, as in `manifest.json`.
        model_class: Name of the class of the model.
        parameters: Their number.
    """

    folder: Path
    files: dict[str, dict[str, Any]]
    model_class: str
    parameters: int

    @property
    def names(self) -> list[str]:
        """Every file, the manifest last."""
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
    """Collects what may be published of a checkpoint into a new folder.

    Weights are written again as safetensors, the code files are this package's, the configuration names all Auto
    classes, the processor says all of its numbers. Of a run folder come its recipe, report, environment and curves;
    folders of this machine are left out of them. Everything is searched for secrets and absolute paths.

    Args:
        model_folder: A RegViT checkpoint, or the folder of a run of `regvit pretrain` or `regvit finetune`.
        output_dir: A new or empty folder.
        reports: Reports of `regvit diagnose` and `regvit evaluate`: the JSON file, or the folder that holds it.
        card: What the files cannot tell: fields of `model_card.CardFacts`, `license` first.
        example_pictures: Publish the example pictures of a diagnosis, which are images of the data set.
        max_shard_size: Larger weights are split into files of this size.

    Raises:
        BundleError: No RegViT, no processor, a report that is none.
        model_card.CardError: A card with something missing.
        upload.PrivateContentError: A secret or a path of this machine; names the file and the line.
        FileExistsError: `output_dir` is not empty.
    """
    checkpoint = checkpoint_folder(model_folder)
    output = Path(output_dir)
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"'{output}' is a file. A bundle gets a new folder.")
    if output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"'{output}' is not empty. A bundle gets a new folder.")
    model = load_checkpoint(checkpoint)
    staged = output.with_name(f".{output.name}.making")  # a bundle is whole or not there
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
    """The checkpoint that a folder stands for: itself, or `backbone/` of a pretraining run.

    Raises:
        BundleError: There is no RegViT.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BundleError(f"'{folder}' is no folder. Name a checkpoint, or the folder of a run.")
    for candidate in (folder, folder / "backbone"):
        if (candidate / "config.json").is_file():
            kind = _config_of(candidate).get("model_type")
            if kind != "regvit":
                raise BundleError(
                    f"'{candidate}' holds a model of type '{kind}', not a RegViT. Run `regvit convert --model "
                    f"{candidate} --output_dir ...` first."
                )
            return candidate
    raise BundleError(f"'{folder}' holds neither a config.json nor a backbone/ with one. Name a finished checkpoint.")


def _config_of(folder: Path) -> dict[str, Any]:
    config = _json_of(folder / "config.json")
    if not isinstance(config, dict):
        raise BundleError(f"'{folder}/config.json' holds a {type(config).__name__}, not an object of fields.")
    return config


def load_checkpoint(folder: Path) -> Any:
    """The model of a folder, as the class that it was saved from.

    Raises:
        BundleError: A class that is none of ours.
        CheckpointCorruptError: Weights that a manifest beside them knows otherwise (a checkpoint of a run, a bundle).
    """
    config = _config_of(folder)
    name = (config.get("architectures") or ["RegViTModel"])[0]
    if name not in MODEL_CLASSES:
        raise BundleError(f"'{folder}' was saved from {name}; expected one of {', '.join(MODEL_CLASSES)}.")
    _compare_with_manifest(folder)
    return MODEL_CLASSES[name].from_pretrained(folder).eval()


def _compare_with_manifest(folder: Path) -> None:
    """A flipped bit in a tensor loads without complaint everywhere; where sums were kept, they tell."""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        sums = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # none, or a file of that name that is not ours
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            continue  # what is missing is told by loading
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != expected:
            raise CheckpointCorruptError(
                f"'{path}' has changed since '{folder}/manifest.json' was written: its sha256 differs. Take another "
                "copy; if you changed the weights yourself, remove the manifest."
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
            f"'{checkpoint}' has no preprocessor_config.json, so nobody could know how to prepare pictures for it. "
            "Save its image processor there: processor.save_pretrained(folder)."
        )
    AutoImageProcessor.from_pretrained(checkpoint).save_pretrained(output)


def _run_facts(folder: Path, checkpoint: Path, output: Path) -> dict[str, Any]:
    """Recipe, report, environment and curves of the run around a checkpoint, copied, and as facts for the card."""
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
            f"Recipe, report and environment in '{run}' are not those of a whole run: {error} is missing. Publish a "
            "folder of the checkpoint alone, and say what is known with --data, --origin and --description."
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
    """What `regvit retrofit` wrote beside the checkpoint."""
    content = _json_of(checkpoint / "retrofit_report.json")
    if content is None:
        return {}
    _write_report(output, "retrofit.json", content)
    try:
        report = RetrofitReport(**content)
    except TypeError as error:
        raise BundleError(
            f"'{checkpoint}/retrofit_report.json' is not what `regvit retrofit` writes: {error}."
        ) from error
    return {"origin": "retrofitted", "base_model": report.model["name"], "description": report.card_text}


def _json_of(path: Path) -> Any:
    """The content of a JSON file; None where there is none."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"'{path}' is not JSON text ({error}).") from error


def _recipe_of(path: Path) -> dict[str, Any]:
    import yaml

    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BundleError(f"'{path}' is not YAML text: {error}") from error
    if not isinstance(recipe, dict):
        raise BundleError(f"'{path}' holds a {type(recipe).__name__}, expected one 'option: value' a line.")
    return recipe


def _write_report(output: Path, name: str, content: Any) -> None:
    path = output / "reports" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _report_file(path: Path) -> Path:
    if (path / "comparison.json").is_file() and not (path / "report.json").is_file():
        single = ", ".join(f"'{report.parent}'" for report in sorted(path.glob("*/report.json")))
        raise BundleError(f"'{path}' compares several models. Name the report of the one to publish: {single}.")
    path = path / "report.json" if path.is_dir() else path
    if not path.is_file():
        raise BundleError(f"There is no report at '{path}'. Name what `regvit diagnose` or `regvit evaluate` wrote.")
    return path


def _sums_of_options(
    card: Mapping[str, Any] | None, reports: Sequence[str | Path], *, example_pictures: bool, max_shard_size: str
) -> dict[str, str]:
    """What a bundle was asked to be, as a short sum of each option that is no default, to compare wishes."""
    wishes: dict[str, Any] = {
        **(card or {}),
        "reports": [_report_file(Path(report)).read_text(encoding="utf-8") for report in reports],
        "example_pictures": example_pictures,
        "max_shard_size": max_shard_size,
    }
    said = {name: value for name, value in wishes.items() if value and value not in (ANY_FOLDER, SHARD_SIZE)}
    return {name: hashlib.sha256(repr(value).encode()).hexdigest()[:16] for name, value in sorted(said.items())}


def _add_report(path: Path, output: Path, facts: dict[str, Any], *, model: Any, example_pictures: bool) -> None:
    """One report of a diagnosis or an evaluation, copied without what is private, and as facts for the card."""
    path = _report_file(path)
    content = _json_of(path)
    if not isinstance(content, dict):
        raise BundleError(f"'{path}' holds a {type(content).__name__}, not a report.")
    if "bimodal" in content:
        try:
            report = ArtifactReport.load(path)
        except (TypeError, ValueError, KeyError) as error:
            raise BundleError(f"'{path}' is not what this version of `regvit diagnose` writes: {error}.") from error
        if report.model.get("weights") not in (None, weights_fingerprint(model)):  # older reports do not say
            logger.warning(
                "'%s' is about other weights than these (%s). The card says nothing of that: diagnose the checkpoint "
                "itself, unless both are the same model in two forms.", path, report.model["name"]
            )  # fmt: skip
        facts["artifacts"] = _add_diagnosis(report, output, example_pictures=example_pictures)
        versions = {name: number for name, number in report.versions.items() if name != "hf_regvit"}  # said before
        facts.setdefault("environment", ", ".join(f"{name} {number}" for name, number in versions.items()))
    elif "reports" in content and "models" not in content:
        table = EvaluationTable.load(path)
        _write_report(output, "evaluation.json", [report.summary() for report in table.reports])
        own = _report_of(model, table)
        if own is None:
            names = ", ".join(report.model for report in table.reports)
            logger.warning(
                "'%s' is about other weights than these (%s): its numbers are on the card under those names, and not "
                "in its model-index. Evaluate the checkpoint itself.", path, names
            )  # fmt: skip
        for key, value in evaluation_facts(table, own).items():
            facts[key] = (*facts.get(key, ()), *value)
    else:
        raise BundleError(
            f"'{path}' is neither the report of one model's diagnosis (`regvit diagnose`) nor of an evaluation "
            f"(`regvit evaluate`): it has {', '.join(sorted(content)[:6]) or 'no fields'}."
        )


def _add_diagnosis(report: ArtifactReport, output: Path, *, example_pictures: bool) -> CardArtifacts:
    from .figures import write_report_figures

    # Names of images and the pictures themselves are the data set's.
    public = dataclasses.replace(report, skipped=[], examples=report.examples[:2] if example_pictures else [])
    _write_report(output, "artifacts.json", public.to_dict())
    titles = {
        "layer_norms": "Norms of the patch tokens, layer by layer",
        "positions": "Where the outliers are",
        "example_00": "Attention and norms in a picture",
        "example_01": "Attention and norms in another picture",
    }
    figures = []
    for path in write_report_figures(public, output / "figures"):
        figures.append(CardFigure(f"figures/{path.name}", titles[path.stem]))
    if not report.outliers["per_image"]:  # an empty map says nothing
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
    """What `diagnose` keeps as JSON of the processor, as part of a sentence."""
    try:
        processor = json.loads(text)
    except json.JSONDecodeError:
        return text or "pictures prepared by the model's own processor"

    def size(value: Any) -> str:
        return " x ".join(map(str, value.values())) if isinstance(value, dict) else str(value)

    steps = [f"resized to {size(processor['size'])}"] if processor.get("do_resize") else []
    if processor.get("do_center_crop"):
        steps.append(f"cropped to {size(processor['crop_size'])}")
    steps.append(f"mean {processor.get('image_mean')}, standard deviation {processor.get('image_std')}")
    return ", ".join(steps)


def _report_of(model: Any, table: EvaluationTable) -> EvaluationReport | None:
    """The report of these very weights; None if all are of others.

    An older report, which does not say, is believed where it is about one model only.
    """
    if len(table.reports) == 1 and not table.reports[0].weights:
        return table.reports[0]
    weights = weights_fingerprint(model)
    return next((report for report in table.reports if report.weights == weights), None)


def evaluation_facts(table: EvaluationTable, own: EvaluationReport | None) -> dict[str, tuple[Any, ...]]:
    """Rows, notes and `model-index` results of an evaluation.

    Args:
        table: Of one or several models.
        own: The report of the model that the card is about: the only one that is indexed, and whose rows need no name.
    """
    scores: list[CardScore] = []
    notes: dict[str, None] = {}  # in order, each once
    for score, report, _ in table.rows():
        name = score.name if report is own else f"{report.model}: {score.name}"
        images = f"{score.num_train:,} / {score.num_images:,}"
        scores.append(CardScore(name, score.data, score.show(score.value, score.interval), images))
        notes[f"{score.task}: {score.protocol}"] = None
    for report in table.reports:
        notes.update(dict.fromkeys(report.notes))
    notes["Brackets: 95 % interval from 2,000 resamples of the judged images."] = None
    results = [] if own is None else own.model_index("model")[0]["results"]
    return {"scores": tuple(scores), "evaluation_notes": tuple(notes), "results": tuple(results)}


def _write_card(model: Any, output: Path, facts: dict[str, Any], measured: Mapping[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(CardFacts)}
    if unknown := set(facts) - known:
        raise BundleError(f"The card has no field {', '.join(sorted(unknown))}; expected {', '.join(sorted(known))}.")
    for name in ("limits", "intended_use", "scores", "evaluation_notes"):  # the author adds to what was measured
        if facts.get(name) is not measured.get(name):
            facts[name] = (*measured.get(name, ()), *facts[name])
    text = write_card_file(output, **{**facts, "parameters": model.num_parameters()})
    check_card(text, folder=output)


def _files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def read_bundle(folder: str | Path) -> Bundle:
    """A bundle from its folder, every file of which is on the list, in the manifest and as it was.

    Raises:
        BundleError: A file that does not belong there, a link, a configuration that strangers could not load.
        CheckpointCorruptError: A file is missing or has changed since it was bundled.
        model_card.CardError: The card is not complete.
        upload.PrivateContentError: See `bundle`.
    """
    folder = Path(folder)
    names = _files_of(folder)
    strange = [name for name in names if not may_be_published(name) or (folder / name).is_symlink()]
    if strange:
        raise BundleError(
            f"'{folder}' holds {', '.join(strange)}, which {'is' if len(strange) == 1 else 'are'} not published. "
            "Bundle the checkpoint again into a new folder."
        )
    try:
        verify_checkpoint(folder, required=("config.json", "preprocessor_config.json", CARD, *CODE_FILES))
    except CheckpointCorruptError as error:
        raise CheckpointCorruptError(
            f"{error} A bundle is sent as it was made: remove the folder and bundle again. Words of your own for the "
            "card go into --description."
        ) from error
    files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    if surplus := set(names) - set(files) - {"manifest.json"}:
        raise BundleError(f"'{folder}' holds {', '.join(sorted(surplus))}, which the manifest does not list.")
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
            f"'{folder}/config.json' has auto_map {config.get('auto_map')}, so strangers could not load it; expected "
            f"{expected}. Save the model with this version of hf_regvit."
        )
    if found := [name for name in _FORBIDDEN_FIELDS if name in config]:
        raise BundleError(f"'{folder}/config.json' holds {', '.join(found)}, which a published model does not.")
    package = Path(__file__).parent
    for name in CODE_FILES:
        if (folder / name).read_bytes() != (package / name).read_bytes():
            raise BundleError(f"'{folder}/{name}' is not the file of this version of hf_regvit. Bundle it again.")
    processor = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    if missing := [name for name in _STATISTICS if processor.get(name) is None]:
        raise BundleError(
            f"'{folder}/preprocessor_config.json' does not say {', '.join(missing)}; another version of transformers "
            "could prepare pictures differently. Save the processor with all of them."
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
    """How a bundle was loaded elsewhere, and how far it was from the original.

    Attributes:
        compared: What was compared, with the largest difference of each.
        loaded: Auto class to the class that it gave, with its module.
        not_run: Pipelines that were left out, with the reason.
    """

    compared: dict[str, float]
    loaded: dict[str, str]
    not_run: dict[str, str]

    @property
    def largest_difference(self) -> float:
        """Over everything that was compared."""
        return max(self.compared.values())


def verify(bundle_folder: str | Path, *, original: str | Path | None = None, timeout: float = 600.0) -> Verification:
    """Loads a bundle in a fresh process, offline and without hf_regvit, and compares it with the original.

    There AutoModel, the Auto class of the task, AutoImageProcessor and the pipelines of transformers run on two
    pictures; all they give has to equal, to 1e-5, what the original gives here.

    Args:
        bundle_folder: From `bundle`.
        original: The checkpoint, or run, that it was made from; default: the bundle, loaded by this package.
        timeout: Seconds for the process.

    Raises:
        BundleError: It cannot be loaded there, or gives something else. Further as `read_bundle`.
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
            raise BundleError(f"{name} gave {found} there, not a class of the bundle's own code.")
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
            not_run[task] = f"its processor, {type(processor).__name__}, has no {needed[task]}"
        else:
            pipelines.append(task)
    return pipelines, not_run


def _pictures(folder: Path) -> dict[str, Any]:
    """Two pictures of different shape with structure at every scale."""
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

    # Nothing of this user's settings or caches, no network, no token.
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
        raise BundleError(f"Loading '{bundle_folder}' in a fresh process took more than {timeout:.0f} s.") from error
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise BundleError(f"'{bundle_folder}' cannot be loaded where hf_regvit is not installed:\n{last}")
    return load_file(folder / "answers.safetensors"), json.loads((folder / "answers.json").read_text())


def _expected(
    source: Path, images: Sequence[Any], questions: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the original gives here, by the names that the other process uses."""
    import transformers

    tensors: dict[str, Tensor] = {}
    words: dict[str, Any] = {}
    processor = transformers.AutoImageProcessor.from_pretrained(source)
    for auto_class in questions["auto_classes"]:
        with _without_remarks():  # AutoModel leaves out the head of a classifier, and reports it
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
    """No report of what was left out on purpose, no error of pipelines for models that transformers does not know."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _in_fresh_memory(model: Any) -> Any:
    """As in `templates/stranger.py`: kernels round differently for the addresses of a mapped file."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


def _compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> dict[str, float]:
    if found.keys() != expected.keys():
        raise BundleError(f"The bundle gives {sorted(found)}, the original {sorted(expected)}.")
    differences = {}
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise BundleError(f"{name}: shape {tuple(found[name].shape)}, of the original {tuple(value.shape)}.")
        difference = (found[name].float() - value.float()).abs()
        allowed = TOLERANCE * (1 + value.float().abs())
        differences[name] = float(difference.max()) if difference.numel() else 0.0  # a model without registers
        if not bool((difference <= allowed).all()):
            raise BundleError(
                f"{name}: up to {differences[name]:.2g} from the original, allowed are {TOLERANCE:g}. The bundle "
                "is not the model it was made from."
            )
    return differences


def _compare_words(found: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, float]:
    """Labels in their order, and scores or numbers of pixels."""
    differences = {}
    for name, entries in expected.items():
        pairs = [(e["label"], e["score"]) if isinstance(e, dict) else tuple(e) for e in entries]
        other = [(e["label"], e["score"]) if isinstance(e, dict) else tuple(e) for e in found[name]]
        off = max((abs(a[1] - b[1]) for a, b in zip(pairs, other)), default=0.0)
        if [a[0] for a in pairs] != [b[0] for b in other] or off > TOLERANCE:
            raise BundleError(f"{name}: the pipeline gives {other}, the original {pairs}.")
        differences[name] = float(off)
    return differences


# ---- Publish -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Publication:
    """What `publish` did; `sent` is None where nothing was sent."""

    bundle: Bundle
    verification: Verification
    sent: Sent | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
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
        """For a terminal."""
        size = sum(entry["size"] for entry in self.bundle.files.values()) / 2**20
        lines = {
            "bundle": f"{self.bundle.folder}: {len(self.bundle.names)} files, {size:.1f} MiB",
            "verified": f"loaded without hf_regvit as {', '.join(self.verification.loaded)}; largest difference "
            f"{self.verification.largest_difference:.1g} over {len(self.verification.compared)} outputs",
        }
        lines |= {f"not run, {task}": reason for task, reason in self.verification.not_run.items()}
        if self.sent is None:
            return {**lines, "sent": "nothing (--push sends it)"}
        return {**lines, "sent": self.sent.url + ("" if self.sent.changed else " (the Hub had every file already)")}


def _check_same_options(output: Path, wanted: Mapping[str, str]) -> None:
    """What is not said again, as in a second command that only adds `--push`, is no other wish."""
    made_with = (_json_of(output / "manifest.json") or {}).get("options")
    if made_with is None:  # it was made before options were kept
        return
    other = [name for name, value in wanted.items() if made_with.get(name) != value and name != "name"]
    if other:  # a name follows the repository
        raise BundleError(
            f"'{output}' holds a bundle that was made with another {', '.join(other)}. Remove that folder, or name "
            "another --output_dir, to bundle anew with these options."
        )


def _check_repo_id(repo_id: str) -> None:
    """Before anything is made: the name goes into the card and its code, and names the folder of the bundle."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise BundleError(f"repo_id '{repo_id}' is none of the Hub, expected owner/name: {error}") from error
    if "/" not in repo_id:
        raise BundleError(
            f"repo_id '{repo_id}' has no owner, so nobody could load what the card names: owner/{repo_id}."
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
    """Bundles a checkpoint, verifies the bundle as a stranger, and sends it if asked.

    A folder that already holds the bundle of the same checkpoint is verified and sent as it is, so an interrupted push
    goes on with the same command.

    Args:
        model_folder: As for `bundle`.
        repo_id: `owner/name`; also what the card tells people to load. Needed to push.
        output_dir: Folder for the bundle.
        reports: As for `bundle`.
        card: As for `bundle`.
        example_pictures: As for `bundle`.
        max_shard_size: As for `bundle`.
        push: Send it. Without, nothing leaves this machine.
        private: Visibility of a repository that is created; a public one is only used with False.
        revision: Branch to send to; default main.
        commit_message: Default: the version of the package.
        token: With write access; default the stored one, or `HF_TOKEN`.
        retry: How long to go on after faults.

    Raises:
        BundleError: As `bundle` and `verify`; a push without `repo_id`; or `output_dir` holds a bundle that was made
            with another licence, report or the like than is said now.
        upload.PushError: It was not sent; the bundle is there all the same.
    """
    if push and not repo_id:
        raise BundleError("push needs a repository. Add --repo_id owner/name.")
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
        logger.info("'%s' holds a bundle already; it is verified and used as it is.", output)
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
