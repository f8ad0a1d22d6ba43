"""Publish a model: bundle, verify, upload."""

import dataclasses
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..models.configuration_regvit import CheckpointError
from ..models.loading import open_model
from ..models.modeling_regvit import RegViTPreTrainedModel
from ..models.processing import EvaluationTransform, unknown_processor
from ..models.saving import num_bytes, remove_leftovers, whole_folder
from ..models.tokens import TokenReader
from .adapter import bundle_adapter, is_adapter
from .bundle import SHARD_SIZE, Bundle, bundle, option_hashes, read_bundle, read_object
from .card import card_header
from .facts import ANY_FOLDER, Json, is_hub_id
from .scan import doubtful_content
from .upload import PushResult, RetryPolicy, send_folder
from .verify import Verification, verify

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Publication:
    """Result of `publish`; `sent` is None if nothing was uploaded, and `verification` is None for an adapter."""

    bundle: Bundle
    verification: Verification | None
    sent: PushResult | None

    def to_dict(self) -> dict[str, object]:
        """Return the result as a dict for JSON."""
        verified: dict[str, object] = {}
        if done := self.verification:
            verified = {"loaded_without_hf_regvit": done.loaded, "largest_difference": done.largest_difference}
            verified["pipelines_not_run"] = done.not_run
        return {
            **dataclasses.asdict(self.bundle),
            "folder": str(self.bundle.folder),
            **verified,
            "sent": None if self.sent is None else dataclasses.asdict(self.sent),
        }

    def summary(self) -> dict[str, str]:
        """Return the result as lines for a terminal."""
        size = sum(entry["size"] for entry in self.bundle.files.values()) / 2**20
        upload = "Not uploaded. Add --push to upload."
        if self.sent:
            upload = self.sent.url + ("" if self.sent.changed else " (all files were already there)")
        verified = {"verified": f"{self.bundle.parameters:,} numbers of low-rank updates, all finite"}
        if done := self.verification:
            text = f"loaded without hf_regvit as {', '.join(done.loaded)}; largest difference "
            verified = {"verified": f"{text}{done.largest_difference:.1g} over {len(done.compared)} outputs"}
            verified |= {f"pipeline not tested, {task}": reason for task, reason in done.not_run.items()}
        files = f"{self.bundle.folder}: {len(self.bundle.names)} files, {size:.1f} MiB"
        return {"bundle": files, **verified, **_open_points(self.bundle.folder / "README.md"), "upload": upload}


def publish(
    model: TokenReader | nn.Module | str | Path,
    repo_id: str | None = None,
    *,
    output_dir: str | Path | None = None,
    reports: Sequence[str | Path] = (),
    card: Json | None = None,
    example_pictures: bool = False,
    max_shard_size: str = SHARD_SIZE,
    exported: str | Path | None = None,
    push: bool = False,
    private: bool = True,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    retry: RetryPolicy | None = None,
) -> Publication:
    """Bundle a model, verify the bundle in a clean process, and upload it if `push` is set.

    If the folder already contains a bundle of the same checkpoint, that bundle is verified and uploaded, so the same
    command continues an interrupted push.

    Args:
        model: RegViT: a checkpoint or run folder (see `bundle`), a Hub id, a module, or a reader of `open_model`; or
            the folder `adapter/` of a run with low-rank updates, which is published without the model.
        repo_id: Hub repository id `owner/name`, from which the card loads the model. Required to push.
        output_dir: Folder for the bundle. Default: `bundles/` followed by the name of the repository or model.
        reports: Reports for the card, see `bundle`.
        card: Additional fields of the card, see `bundle`.
        example_pictures: Whether to include example figures, see `bundle`.
        max_shard_size: Maximum size of a weights file, see `bundle`.
        exported: Folder of an export of this model to include, see `bundle`.
        push: Whether to upload the bundle. If False, nothing is uploaded.
        private: Whether to make a new repository private. An existing public repository requires False.
        revision: Branch to upload to. Default: main.
        commit_message: Message of the commit. Default: names the model class.
        token: Token with write access. Default: the stored token or `HF_TOKEN`.
        retry: Policy for retries after errors.

    Raises:
        CheckpointError: `bundle` or `verify` failed, `repo_id` is missing or invalid, or `output_dir` contains a
            bundle made with other options.
        PushError: The upload failed; the bundle remains in `output_dir`.
    """
    if push and not repo_id:
        raise CheckpointError("Pushing requires a repository. Add --repo_id owner/name.")
    if repo_id:
        _check_repo_id(repo_id)
    own_name = Path(model).resolve().name if isinstance(model, str | Path) else type(open_model(model).model).__name__
    output = Path(output_dir or f"bundles/{(repo_id or own_name).split('/')[-1]}")
    names = {"repo_id": repo_id, "name": repo_id.split("/")[-1]} if repo_id else {"repo_id": ANY_FOLDER}
    asked: dict[str, Any] = {
        "reports": reports, "card": {**names, **(card or {})}, "example_pictures": example_pictures,
        "max_shard_size": max_shard_size, "exported": exported,
    }  # fmt: skip
    remove_leftovers(output.parent)
    verification: Verification | None = None
    if isinstance(model, str | Path) and is_adapter(model):
        made = bundle_adapter(model, output, card={**(card or {}), "repo_id": repo_id})
    else:
        with _as_folder(model) as folder:
            if (output / "manifest.json").is_file():
                made = read_bundle(output)
                _check_same_options(output, option_hashes(**asked))
                logger.info("'%s' already contains a bundle, which is verified and used.", output)
            else:
                made = bundle(folder, output, **asked)
            verification = verify(output, original=folder)
    for sentence in doubtful_content(output, made.names):
        logger.warning("This may be private, so check it before an upload: %s.", sentence)
    if not push or not repo_id:
        return Publication(made, verification, None)
    message = commit_message or f"Upload {made.model_class} with hf_regvit"
    sent = send_folder(
        output, repo_id, names=made.names, message=message, private=private, accept_public=not private, token=token,
        revision=revision, retry=retry,
    )  # fmt: skip
    return Publication(made, verification, sent)


@contextmanager
def _as_folder(model: TokenReader | nn.Module | str | Path) -> Iterator[Path]:
    """Yield the folder of a checkpoint: a local folder, or a temporary one for a module or a model from the Hub."""
    if isinstance(model, str | Path) and (Path(model).exists() or not is_hub_id(str(model))):
        yield Path(model)
        return
    reader = open_model(model)
    if not isinstance(reader.model, RegViTPreTrainedModel):
        kind = type(reader.model).__name__
        raise CheckpointError(f"The model is a {kind}, not a RegViT. Call `hf_regvit.convert(model)` first.")
    if reader.processor is None:
        raise unknown_processor(reader.model)
    if isinstance(reader.processor, EvaluationTransform):
        raise CheckpointError(
            "The image processor is the transform of a timm model, which cannot be saved. Open the model with an "
            "image processor of transformers: open_model(source, processor=AutoImageProcessor.from_pretrained(...))."
        )
    with tempfile.TemporaryDirectory() as folder:
        with whole_folder(folder, needed=num_bytes(reader.model.state_dict().values())) as staged:
            reader.model.save_pretrained(staged)
            reader.processor.save_pretrained(staged)
        yield Path(folder)


def _open_points(card: Path) -> dict[str, str]:
    """Return what a card leaves open and only its author can say, as lines for a terminal."""
    text, found = card.read_text(encoding="utf-8"), {}
    if unstated := re.findall(r"^\| (.+) \| not stated \|$", text, flags=re.MULTILINE):
        found["license not stated"] = f"{', '.join(unstated)}; see --base_model_license and --data_license"
    base = re.search(r"The base model is `(.+?)`", text)
    if base and "base_model" not in card_header(text):
        found["base model"] = f"'{base[1]}' is not on the Hub under this name; give its id with --base_model"
    return found


def _check_same_options(output: Path, wanted: Mapping[str, str]) -> None:
    """Check that an existing bundle was made with the options that are given. Omitted options are not compared."""
    made_with = (read_object(output / "manifest.json") or {}).get("options", wanted)  # absent in older bundles
    other = [name for name, value in wanted.items() if made_with.get(name) != value and name != "name"]
    if other:  # `name` follows from the repository
        raise CheckpointError(
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
        raise CheckpointError(f"'{repo_id}' is not a valid Hub repository id. Use owner/name. {error}") from error
    if "/" not in repo_id:
        raise CheckpointError(f"'{repo_id}' has no owner, so the card's code could not load it. Use owner/{repo_id}.")
