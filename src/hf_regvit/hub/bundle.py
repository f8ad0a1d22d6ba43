"""Publish a checkpoint: bundle its public files, verify in a clean process that they load, and upload them.

`bundle` collects weights, code, processor, card, figures, reports and recipe from a list of allowed files. `verify`
loads the bundle where hf_regvit cannot be imported and compares it with the original. `publish` does both and uploads
the bundle.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..models.loading import BundleError, _json_of, checkpoint_folder, load_checkpoint
from ..models.manifest import verify_checkpoint, write_manifest
from ..models.modeling_regvit import CheckpointCorruptError
from .card import check_card, write_card_file
from .facts import ANY_FOLDER, TASKS, CardFacts, _add_report, _report_file, _run_facts
from .scan import CARD, CODE_FILES, may_be_published, scan

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
        options = _option_hashes(card, reports, example_pictures=example_pictures, max_shard_size=max_shard_size)
        manifest = {**(_json_of(staged / "manifest.json") or {}), "options": options}
        (staged / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        read_bundle(staged)
        staged.replace(output)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return read_bundle(output)


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


def _option_hashes(
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
    package = Path(__file__).parents[1] / "models"
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
