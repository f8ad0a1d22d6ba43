"""Bundle the low-rank updates of a continued run: the three small files that peft loads, without the model."""

import re
from pathlib import Path

from safetensors.torch import load_file

from ..models.configuration_regvit import CheckpointError, check_weight_files
from ..models.manifest import write_manifest
from ..models.saving import read_json, read_object, whole_folder, write_json
from .bundle import Bundle
from .card import CardError, card_header
from .facts import Json, is_hub_id
from .scan import CARD, scan

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(source: str | Path) -> bool:
    """Return True for the folder `adapter/` of a run of `regvit pretrain --mode lora`."""
    return (Path(source) / _CONFIG).is_file()


def bundle_adapter(folder: str | Path, output_dir: str | Path, *, card: Json) -> Bundle:
    """Collect the configuration, the updates and the card of an adapter in a new folder.

    Args:
        folder: Folder `adapter/` of a run; the merged model is beside it, in `backbone/`.
        output_dir: New or empty folder. An earlier bundle of the same adapter is replaced.
        card: Fields of the header: license, base_model, datasets, and repo_id, from which the card loads the updates.

    Raises:
        CheckpointError: The updates are not finite, do not fit the merged model beside them, or belong to a model that
            is not on the Hub.
        CardError: The license is missing.
        PrivateContentError: A file contains a secret or a local path.
    """
    from huggingface_hub import ModelCardData

    folder, output = Path(folder), Path(output_dir)
    config, text = read_object(folder / _CONFIG), (folder / CARD).read_text(encoding="utf-8")
    trained_from = str(config.get("base_model_name_or_path"))
    base = str(card.get("base_model") or trained_from)
    if not is_hub_id(base):
        raise CheckpointError(
            f"The updates belong to '{base}', which is not the id of a model on the Hub, so nobody else could use "
            "them. Publish that model first and name it with --base_model owner/name."
        )
    if not card.get("license"):
        raise CardError("The card of the updates has no license. Give one, such as --license apache-2.0.")
    check_weight_files(folder)
    parameters = _check_updates(folder)
    header = ModelCardData(
        **{name: card[name] for name in ("license", "license_name", "license_link") if name in card},
        datasets=list(card.get("datasets") or ()) or None, base_model=base, library_name="peft",
        pipeline_tag="image-feature-extraction", tags=card_header(text).get("tags"),
    )  # fmt: skip
    body = re.sub(r"^---\n.*?\n---\n", "", text, count=1, flags=re.DOTALL).replace(trained_from, base)
    body = body.replace("path/to/this/folder", str(card.get("repo_id") or "path/to/this/folder"))
    if output.is_dir() and any(output.iterdir()) and not (output / _CONFIG).is_file():
        raise FileExistsError(f"'{output}' is not empty. Choose a new folder for the bundle.")
    with whole_folder(output.parent) as parent:
        staged = parent / output.name
        staged.mkdir()
        write_json(staged / _CONFIG, {**config, "base_model_name_or_path": base})
        (staged / _WEIGHTS).write_bytes((folder / _WEIGHTS).read_bytes())
        (staged / CARD).write_text(f"---\n{header.to_yaml().strip()}\n---\n{body}", encoding="utf-8")
        scan(staged, (_CONFIG, _WEIGHTS, CARD))
        write_manifest(staged)
        for name in (_CONFIG, _WEIGHTS, CARD, "manifest.json"):  # of an earlier bundle, now that the new one is whole
            (output / name).unlink(missing_ok=True)
    return Bundle(output, read_json(output / "manifest.json")["files"], "LoRA adapter", parameters)


def _check_updates(folder: Path) -> int:
    """Check the updates against the merged weights beside them, if they are there, and return their number."""
    from ..models.modeling_regvit import RegViTModel

    tensors = load_file(folder / _WEIGHTS)
    shapes = {}
    if (folder.parent / "backbone" / "config.json").is_file():
        merged = RegViTModel.from_pretrained(folder.parent / "backbone")
        shapes = {name: tuple(tensor.shape) for name, tensor in merged.state_dict().items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{name} in '{folder / _WEIGHTS}' has NaN or infinity. Publish another checkpoint.")
        target, is_down, _ = name.removeprefix("base_model.model.").partition(".lora_A.")
        if is_down and shapes:
            up = tensors[name.replace(".lora_A.", ".lora_B.")]
            if shapes.get(f"{target}.weight") != (up.shape[0], tensor.shape[1]):
                raise CheckpointError(
                    f"The update of {target} is for {up.shape[0]} x {tensor.shape[1]} weights, but the merged model "
                    f"has {shapes.get(f'{target}.weight')}. Publish an adapter with the backbone of its own run."
                )
    return sum(tensor.numel() for tensor in tensors.values())
