"""Bundle a checkpoint: collect its public files in a folder, and read such a folder.

`bundle` collects weights, code, processor, card, figures, reports and recipe from a list of allowed files.
`verify.verify` loads the bundle where hf_regvit cannot be imported, and `publish.publish` does both and uploads it.
"""

import dataclasses
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from hf_regvit_cli import read_yaml

from ..data.decoding import ImageLimits, open_image
from ..diagnosis.report import ArtifactReport
from ..diagnosis.retrofit import RetrofitReport
from ..evaluation.report import EvaluationTable
from ..models import saving
from ..models.configuration_regvit import CheckpointCorruptError, CheckpointError
from ..models.loading import checkpoint_folder, load_checkpoint, weights_fingerprint
from ..models.manifest import verify_checkpoint, write_manifest
from ..models.processing import require_rgb, saved_processor
from ..models.results import markdown_table
from ..models.saving import num_bytes, read_json, whole_folder, write_json
from . import facts as about
from .card import check_card, write_card_file
from .export import add_exported
from .exported import load_proof
from .facts import TASKS, CardFacts, CardFigure, CardScore, Facts, Json
from .scan import CARD, CODE_FILES, MOST_TEXT, may_be_published, scan

logger = logging.getLogger(__name__)

SHARD_SIZE = "5GB"
_ANY_SIZE = ImageLimits(min_side=1, max_aspect=1e6)

# Fields that a processor must store itself, because the defaults of its class belong to another model.
_STATISTICS = (
    "image_mean", "image_std", "rescale_factor", "resample", "do_resize", "do_rescale", "do_normalize", "size",
)  # fmt: skip
_FORBIDDEN_FIELDS = ("use_cache", "_name_or_path", "_commit_hash", "hub_token")
# file of a run: its path in the bundle. Of the two reports a run has one.
_FILES_OF_A_RUN = {
    "environment.json": "reports/environment.json",
    "metrics.json": "reports/training.json",
    "report.json": "reports/training.json",
    "metrics.jsonl": "reports/metrics.jsonl",
    "curves.png": "figures/curves.png",
    "confusion_matrix.png": "figures/confusion_matrix.png",
}
_FIGURES = {
    "layer_norms": "Norms of the patch tokens by block",
    "positions": "Positions of the outliers",
    "example_00": "Attention and norm maps of an image",
    "example_01": "Attention and norm maps of a second image",
}


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
    files: dict[str, Json]
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
    card: Json | None = None,
    example_pictures: bool = False,
    max_shard_size: str = SHARD_SIZE,
    exported: str | Path | None = None,
) -> Bundle:
    """Collect the public files of a checkpoint in a new folder.

    The weights are saved again as safetensors, the code files are those of this package, the configuration names all
    Auto classes, and the processor stores all of its settings. From the folder of a run, its recipe, report,
    environment and curves are added without local paths. All files are searched for secrets and absolute paths.

    Args:
        model_folder: RegViT checkpoint, or the folder of a run of `regvit pretrain` or `regvit finetune`.
        output_dir: New or empty folder.
        reports: Reports of `regvit diagnose` and `regvit evaluate`: JSON files, or the folders that contain them.
        card: Fields of `CardFacts` that the files do not contain, such as `license`.
        example_pictures: Whether to include the example figures of a diagnosis, which show images of the data set.
        max_shard_size: Maximum size of a weights file; larger weights are split.
        exported: Folder that `regvit export` wrote from this checkpoint; its ONNX and OpenVINO files and its page are
            added.

    Raises:
        CheckpointError: The checkpoint is not a RegViT or has no processor, or a report is invalid.
        ExportError: The exported files were changed, or are those of another model.
        CardError: The card is incomplete.
        PrivateContentError: A file contains a secret or a local path; the message names file and line.
        FileExistsError: `output_dir` is not empty.
        NotADirectoryError: `output_dir` is a file.
    """
    checkpoint, output = checkpoint_folder(model_folder), Path(output_dir)
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"'{output}' is a file. Choose a new folder for the bundle.")
    if output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"'{output}' is not empty. Choose a new folder for the bundle.")
    model, processor = load_checkpoint(checkpoint), saved_processor(checkpoint)
    require_rgb(model)
    if processor is None:
        raise CheckpointError(
            f"'{checkpoint}' has no preprocessor_config.json, so users could not preprocess images for it. Save its "
            "image processor in the folder with processor.save_pretrained(folder)."
        )
    needed = num_bytes(model.state_dict().values())
    with whole_folder(output.parent, needed=needed) as parent:  # the finished folder is moved at once
        staged = parent / output.name
        (staged / "reports").mkdir(parents=True)
        (staged / "figures").mkdir()
        model.save_pretrained(staged, max_shard_size=max_shard_size)
        config = read_json(staged / "config.json")
        write_json(staged / "config.json", {k: v for k, v in config.items() if k not in _FORBIDDEN_FIELDS})
        processor.save_pretrained(staged)
        facts = _run_facts(Path(model_folder), checkpoint, staged, example_pictures=example_pictures)
        for report in reports:
            _add_report(Path(report), staged, facts, model=model, example_pictures=example_pictures)
        if exported is not None:
            facts["exported"] = add_exported(Path(exported), staged, model)
        _write_card(model, staged, {"name": output.name, **facts, **(card or {})}, facts)
        for path in staged.rglob("*.png"):  # anew, from the pixels alone: metadata may hold names, places and secrets
            open_image(path, limits=_ANY_SIZE).save(path, "PNG")
        for folder in (staged / "reports", staged / "figures"):
            if not any(folder.iterdir()):
                folder.rmdir()
        write_manifest(staged)
        options = option_hashes(
            card, reports, example_pictures=example_pictures, max_shard_size=max_shard_size, exported=exported
        )
        write_json(staged / "manifest.json", {**read_json(staged / "manifest.json"), "options": options})
        made = read_bundle(staged)
    return dataclasses.replace(made, folder=output)


def option_hashes(
    card: Json | None,
    reports: Sequence[str | Path],
    *,
    example_pictures: bool,
    max_shard_size: str,
    exported: str | Path | None,
) -> dict[str, str]:
    """Return a short hash of every non-default option, to detect a request for a different bundle."""
    wishes = {
        **(card or {}),
        "reports": [_report_file(Path(report)).read_text(encoding="utf-8") for report in reports],
        "example_pictures": example_pictures,
        "max_shard_size": max_shard_size,
        "exported": None if exported is None else load_proof(Path(exported))["files"],
    }
    said = {name: value for name, value in wishes.items() if value and value not in (about.ANY_FOLDER, SHARD_SIZE)}
    return {name: hashlib.sha256(repr(value).encode()).hexdigest()[:16] for name, value in sorted(said.items())}


def _write_card(model: nn.Module, output: Path, facts: Facts, measured: Facts) -> None:
    known = sorted(field.name for field in dataclasses.fields(CardFacts))
    if unknown := sorted(set(facts).difference(known)):
        raise CheckpointError(f"The card has no field {', '.join(unknown)}. Choose from {', '.join(known)}.")
    # The author's entries follow the measured ones.
    for name in ("limits", "intended_use", "scores", "evaluation_notes"):
        if facts.get(name) is not measured.get(name):
            facts[name] = (*measured.get(name, ()), *facts[name])
    text = write_card_file(output, **{**facts, "parameters": sum(p.numel() for p in model.parameters())})
    check_card(text, folder=output)


# ---- Files of runs and reports -----------------------------------------------------------------------------------


def read_object(path: Path) -> Json | None:
    """Return the content of a JSON or YAML file with names and values, or None if the file does not exist.

    Raises:
        CheckpointError: The file is not valid JSON or YAML, holds another value, or is a link.
    """
    if not _is_there(path):
        return None
    try:
        return read_yaml(path)[1] if path.suffix == ".yaml" else saving.read_object(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _is_there(path: Path) -> bool:
    """Return whether a file exists. A link could publish any file of this machine, so it is an error."""
    if path.is_symlink():
        raise CheckpointError(f"'{path}' is a link, which is not published. Replace it by the file, or remove it.")
    return path.is_file()


def _run_facts(folder: Path, checkpoint: Path, output: Path, *, example_pictures: bool) -> Facts:
    """Copy recipe, report, environment and curves of a checkpoint's run, and return them as facts for the card."""
    import yaml

    candidates = (folder, checkpoint.parent if checkpoint.name == "backbone" else checkpoint)
    run = next((place for place in candidates if (place / "resolved_recipe.yaml").is_file()), None)
    if run is None:
        return _retrofit_facts(checkpoint, output, example_pictures=example_pictures)
    recipe = about.public_recipe(read_object(run / "resolved_recipe.yaml") or {})
    (output / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    fine_tuned = read_object(run / "metrics.json")
    collect = about.finetuning_facts if fine_tuned else about.pretraining_facts
    try:
        facts = collect(recipe, fine_tuned or read_object(run / "report.json"), read_object(run / "environment.json"))
    except KeyError as error:
        raise CheckpointError(
            f"The recipe, report or environment in '{run}' is incomplete: {error} is missing. Publish a folder that "
            "contains only the checkpoint, and describe it with --data, --origin and --description."
        ) from error
    for name, public in _FILES_OF_A_RUN.items():
        if not _is_there(run / name) or (output / public).exists():
            continue
        if (run / name).stat().st_size > MOST_TEXT:
            logger.warning("'%s' is larger than %d MiB and is left out.", run / name, MOST_TEXT >> 20)
        else:
            shutil.copyfile(run / name, output / public)
    if (output / "figures/curves.png").is_file():
        facts["curves"] = "figures/curves.png"
    if (output / "figures/confusion_matrix.png").is_file():
        facts["pictures"] = (CardFigure("figures/confusion_matrix.png", "Confusion matrix"),)
    return {**facts, "recipe_file": True}


def _retrofit_facts(checkpoint: Path, output: Path, *, example_pictures: bool) -> Facts:
    """Return the facts from the report that `regvit retrofit` wrote into the checkpoint folder."""
    path = checkpoint / "retrofit_report.json"
    content = read_object(path)
    if content is None:
        return {}
    try:
        report = RetrofitReport(**content)
    except TypeError as error:
        raise CheckpointError(f"'{path}' is not a report of `regvit retrofit`: {error}.") from error
    shutil.copyfile(path, output / "reports" / "retrofit.json")
    text = f"{report.card_text}\n\n{markdown_table(report.table_rows())}"
    if example_pictures and _is_there(checkpoint / "before_after.png"):
        shutil.copyfile(checkpoint / "before_after.png", output / "figures" / "before_after.png")
        text += "\n\n![Test images before and after](figures/before_after.png)"
    return {"origin": "retrofitted", "base_model": report.model["name"], "description": text}


def _report_file(path: Path) -> Path:
    if (path / "comparison.json").is_file() and not (path / "report.json").is_file():
        single = ", ".join(f"'{report.parent}'" for report in sorted(path.glob("*/report.json")))
        raise CheckpointError(f"'{path}' compares several models. Pass the report of the model to publish: {single}.")
    path = path / "report.json" if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"There is no report at '{path}'. Pass the output of `regvit diagnose` or `evaluate`.")
    return path


def _add_report(path: Path, output: Path, facts: Facts, *, model: nn.Module, example_pictures: bool) -> None:
    """Copy the public part of a diagnosis or evaluation report, and add it to the facts for the card."""
    path = _report_file(path)
    content = read_object(path) or {}
    if "bimodal" in content:
        try:
            report = ArtifactReport.load(path)
        except (TypeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"'{path}' is not a report of this version of `regvit diagnose`: {error}."
            ) from error
        if report.model.get("weights") not in (None, weights_fingerprint(model)):  # older reports lack this field
            logger.warning(
                "'%s' is a diagnosis of different weights (%s), but the card does not mention this. Diagnose this "
                "checkpoint, unless both are the same model in two formats.", path, report.model["name"]
            )  # fmt: skip
        facts["artifacts"] = _diagnosis(report, output, example_pictures=example_pictures)
        versions = ", ".join(f"{name} {number}" for name, number in report.versions.items() if name != "hf_regvit")
        facts.setdefault("environment", versions)
    elif "reports" in content and "models" not in content:
        table = EvaluationTable.load(path)
        write_json(output / "reports" / "evaluation.json", [report.summary() for report in table.reports])
        for key, value in _evaluation_facts(table, path, model).items():
            facts[key] = (*facts.get(key, ()), *value)
    else:
        raise CheckpointError(
            f"'{path}' is neither a report of `regvit diagnose` for one model nor of `regvit evaluate`. "
            f"Its fields: {', '.join(sorted(content)[:6]) or 'none'}."
        )


def _diagnosis(report: ArtifactReport, output: Path, *, example_pictures: bool) -> about.CardArtifacts:
    from ..figures.maps import write_report_figures

    # Image names and images belong to the data set, so they are private by default.
    public = dataclasses.replace(report, skipped=[], examples=report.examples[:2] if example_pictures else [])
    write_json(output / "reports" / "artifacts.json", public.to_dict())
    paths = write_report_figures(public, output / "figures")
    if not report.outliers["per_image"]:  # no outliers, so the map is empty
        (output / "figures" / "positions.png").unlink()
    return about.CardArtifacts(
        verdict=report.verdict,
        summary=report.summary(),
        num_images=report.num_images,
        preprocessing=describe_preprocessing(report.settings.get("preprocessing", "")),
        figures=tuple(CardFigure(f"figures/{path.name}", _FIGURES[path.stem]) for path in paths if path.exists()),
        has_outliers=report.bimodal,
    )


def describe_preprocessing(text: str) -> str:
    """Return the processor settings that `diagnose` stores as JSON, as part of a sentence."""
    try:
        processor = json.loads(text)
    except json.JSONDecodeError:
        return text or "images preprocessed by the model's own processor"

    def size(value: object) -> str:
        return " x ".join(map(str, value.values())) if isinstance(value, dict) else str(value)

    steps = [f"resized to {size(processor['size'])}"] if processor.get("do_resize") else []
    if processor.get("do_center_crop"):
        steps.append(f"cropped to {size(processor['crop_size'])}")
    if processor.get("do_normalize", True):
        steps.append(f"mean {processor.get('image_mean')}, standard deviation {processor.get('image_std')}")
    else:
        steps.append("not normalized")
    return ", ".join(steps)


def _evaluation_facts(table: EvaluationTable, path: Path, model: nn.Module) -> dict[str, tuple[object, ...]]:
    """Return the rows, notes and `model-index` results of an evaluation.

    Only the results of the published model enter the index, and its rows omit the model name. An older report does
    not identify the weights; it is taken for one of this model if it covers only one model.
    """
    weights = weights_fingerprint(model)
    if len(table.reports) == 1 and not table.reports[0].weights:
        weights = table.reports[0].weights
    own = next((report for report in table.reports if report.weights == weights), None)
    if own is None:
        logger.warning(
            "'%s' is an evaluation of different weights (%s). The card lists its numbers under those names, but not "
            "in its model-index. Evaluate this checkpoint to add its own numbers.",
            path, ", ".join(report.model for report in table.reports),
        )  # fmt: skip
    rows = list(table.rows())
    scores = []
    for score, report, _ in rows:
        name = score.name if report is own else f"{report.model}: {score.name}"
        images = f"{score.num_train:,} / {score.num_images:,}"
        scores.append(CardScore(name, score.data, score.show(score.value, score.interval), images))
    notes = [
        *(f"{score.task}: {score.protocol}" for score, _, _ in rows),
        *(note for report in table.reports for note in report.notes),
        "Brackets: 95 % confidence interval from 2,000 resamples of the test images.",
    ]
    results = [] if own is None else own.model_index("model")[0]["results"]
    return {"scores": tuple(scores), "evaluation_notes": tuple(dict.fromkeys(notes)), "results": tuple(results)}


# ---- Reading -----------------------------------------------------------------------------------------------------


def read_bundle(folder: str | Path) -> Bundle:
    """Read a bundle from its folder and check that all of its files are allowed, in the manifest and unchanged.

    Raises:
        CheckpointError: A file is not allowed or is a link, or the configuration does not load without hf_regvit.
        CheckpointCorruptError: A file is missing or has changed since it was bundled.
        CardError: The card is incomplete.
        PrivateContentError: A file contains a secret or a local path.
    """
    folder = Path(folder)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    if strange := [name for name in names if not may_be_published(name) or (folder / name).is_symlink()]:
        raise CheckpointError(
            f"'{folder}' contains files that are not allowed in a bundle: {', '.join(strange)}. Bundle the checkpoint "
            "again in a new folder."
        )
    try:
        verify_checkpoint(folder, required=("config.json", "preprocessor_config.json", CARD, *CODE_FILES))
    except CheckpointCorruptError as error:
        raise CheckpointCorruptError(
            f"{error} A bundle must not be edited. Remove the folder and bundle again; to add text to the card, use "
            "--description."
        ) from error
    files = read_json(folder / "manifest.json")["files"]
    if surplus := set(names) - set(files) - {"manifest.json"}:
        raise CheckpointError(f"'{folder}' contains {', '.join(sorted(surplus))}, which manifest.json does not list.")
    config = read_json(folder / "config.json")
    check_card((folder / CARD).read_text(encoding="utf-8"), folder=folder)
    _check_config(config, folder)
    scan(folder, names)
    return Bundle(folder, files, config["architectures"][0], _count_parameters(folder, files))


def _check_config(config: Json, folder: Path) -> None:
    expected = {
        "AutoConfig": "configuration_regvit.RegViTConfig",
        **{task.auto_class: f"modeling_regvit.{name}" for name, task in TASKS.items() if name != "RegViTBackbone"},
        "AutoBackbone": "modeling_regvit.RegViTBackbone",
    }
    if config.get("auto_map") != expected:
        raise CheckpointError(
            f"'{folder}/config.json' has auto_map={config.get('auto_map')}, which does not load without hf_regvit. "
            f"Expected {expected}. Save the model with this version of hf_regvit."
        )
    if found := [name for name in _FORBIDDEN_FIELDS if name in config]:
        raise CheckpointError(
            f"'{folder}/config.json' contains {', '.join(found)}, which must not be published. Bundle it again."
        )
    package = Path(__file__).parents[1] / "models"
    for name in CODE_FILES:
        if (folder / name).read_bytes() != (package / name).read_bytes():
            raise CheckpointError(f"'{folder}/{name}' differs from this version of hf_regvit. Bundle it again.")
    processor = read_json(folder / "preprocessor_config.json")
    if missing := [name for name in _STATISTICS if processor.get(name) is None]:
        raise CheckpointError(
            f"'{folder}/preprocessor_config.json' lacks {', '.join(missing)}, so another version of transformers "
            "could preprocess images differently. Save the processor with all of these fields."
        )


def _count_parameters(folder: Path, names: Mapping[str, object]) -> int:
    from safetensors import safe_open

    total = 0
    for name in names:
        if name.endswith(".safetensors"):
            with safe_open(folder / name, framework="pt") as file:
                total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return total
