"""Pushes to the Hub during training, for every `hub_strategy` of transformers.

Trainer itself pushes the run folder unchanged: without code files and model card before the end of the run, with a
pickle that contains the token, and in a single attempt whose error is lost. Here, every push sends a separate folder
with everything that loading needs. A failed push is retried; failures are reported at the end and never stop the run.
"""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, Trainer
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_utils import HubStrategy

from ..hub.card import write_card_file
from ..hub.scan import public_files, scan
from ..hub.upload import BackgroundPushes, PermanentPushError, PushError, create_repository, send_folder
from ..models.manifest import MANIFEST, WEIGHTS
from ..models.saving import read_json, write_json
from .arguments import RunArguments
from .distributed import from_first
from .run_folder import write_model
from .signals import StopSignals

logger = logging.getLogger(__name__)

TRAINING_ARGS = "training_args.bin"  # a pickle that contains the Hub token, so it is never pushed
PUSHING = ".pushing"  # prefix of the folders inside the run folder that hold the files being pushed


class PushingTrainer(Trainer):
    """`transformers.Trainer` whose pushes can be loaded without this package.

    Subclasses define the published content: `hub_model` and `hub_facts`.

    Args:
        image_processor: Image processor that is published with the model, if there is one.
        **options: Arguments of `transformers.Trainer`.

    Attributes:
        pushes: Completed and failed pushes.
        signals: Signals that stopped the run, after which the machine may disappear within half a minute.
    """

    args: RunArguments
    hub_model_id: Any  # Trainer declares it as None

    def __init__(self, *, image_processor: BaseImageProcessor | None = None, **options: Any) -> None:
        self.pushes, self.signals, self.image_processor = BackgroundPushes(), StopSignals(), image_processor
        super().__init__(**options)

    def hub_model(self, state: Mapping[str, torch.Tensor]) -> PreTrainedModel:
        """Return the model to publish, from the tensors of a checkpoint."""
        raise NotImplementedError

    def hub_facts(self) -> dict[str, Any]:
        """Return the fields of `model_card.CardFacts` that are known during the run."""
        raise NotImplementedError

    def hub_names(self) -> dict[str, str]:
        """Return the model name for the card and, if known, the repository id to load."""
        if not self.hub_model_id:
            return {"name": self.args.folder.absolute().name}
        return {"name": self.hub_model_id.split("/")[-1], "repo_id": self.hub_model_id}

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, private unless `hub_private_repo` is False; called on every process.

        Raises:
            RefusedError: If the Hub rejects the token or the name; raised on every process, before training starts.
        """
        answer: str | PermanentPushError | None = None
        if self.is_world_process_zero():
            try:
                answer = self._make_repository(token, private)
            except PermanentPushError as error:
                answer = error
        answer = from_first(answer)  # otherwise the other processes would wait until a timeout
        if isinstance(answer, PermanentPushError):
            raise answer
        self.hub_model_id = answer

    def _make_repository(self, token: str | None, private: bool | None) -> str:
        wanted = self.args.hub_model_id or self.args.folder.absolute().name
        private = self.args.hub_private_repo if private is None else private
        for left_over in self.args.folder.glob(f"{PUSHING}-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        try:
            return create_repository(wanted, private=private is not False, token=token or self.args.hub_token)
        except PermanentPushError:
            raise
        except PushError as error:
            logger.warning("The repository could not be created. Training starts, and pushes will retry. %s", error)
            return wanted

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing, because the folder is not finished yet; `push_checkpoint` is called later."""

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Push a finished checkpoint in the background, according to `hub_strategy`; errors are only logged."""
        args = self.args
        if not args.push_to_hub or args.hub_strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        if self.pushes.busy and not args.hub_always_push:
            logger.info(
                "%s is not pushed, because the previous push is not finished. Set hub_always_push to push it anyway.",
                checkpoint.name,
            )
            return
        beside = {
            HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name
        }.get(HubStrategy(args.hub_strategy))  # fmt: skip
        folder = checkpoint.with_name(f"{PUSHING}-{self.state.global_step}")

        def prepare() -> None:
            if not (checkpoint / WEIGHTS).is_file():
                raise ValueError(
                    f"It has no {WEIGHTS}, because its weights are sharded by process. Set the state_dict_type of "
                    "fsdp_config to FULL_STATE_DICT, or push only at the end (--hub_strategy end)."
                )
            names = self._write_hub_folder(folder, load_file(checkpoint / WEIGHTS))
            if beside:
                names += _link_checkpoint(checkpoint, folder / beside)
            message = f"Training in progress, step {self.state.global_step}"
            self.pushes.start(partial(self._send, folder, names, message), label=checkpoint.name)

        if not self.pushes.prepare(prepare, label=checkpoint.name):
            shutil.rmtree(folder, ignore_errors=True)

    def _write_hub_folder(self, folder: Path, state: Mapping[str, torch.Tensor]) -> list[str]:
        """Write model, code files, processor and card; return the names of the files to push."""
        shutil.rmtree(folder, ignore_errors=True)
        with torch.random.fork_rng(devices=[]):  # initializing the model must not change the random state of the run
            model = self.hub_model(state)
        write_model(folder, model, self.image_processor)  # its manifest is without the card, which may be edited
        write_card_file(folder, parameters=model.num_parameters(), **self.hub_names(), **self.hub_facts())
        names = public_files(folder)
        scan(folder, names)
        return names

    def _send(self, folder: Path, names: Sequence[str], message: str) -> None:
        args = self.args
        private = args.hub_private_repo is not False
        try:
            send_folder(
                folder, str(self.hub_model_id), names=names, message=message, private=private, token=args.hub_token,
                revision=args.hub_revision,
            )  # fmt: skip
        finally:
            if folder.name.startswith(PUSHING):
                shutil.rmtree(folder, ignore_errors=True)

    def _finish_current_push(self) -> None:
        """Wait for the current push, but only briefly if the process must end soon."""
        if self.pushes.busy:
            logger.info("Waiting for the current push to finish.")
        self.pushes.wait(10.0 if self.signals.stopped_by else 3600.0)
        if self.pushes.failures:
            logger.warning("%d of %d pushes succeeded.", len(self.pushes.sent), self.pushes.count)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse Trainer's own push, which would send the run folder unchanged, with the token of the user."""
        raise NotImplementedError(
            "push_to_hub would send the folder of the run unchanged. Run `regvit publish --push` on the finished run."
        )

    def push_result(self, folder: Path) -> None:
        """Push the finished folder of a run if `push_to_hub` is set; failures are only logged."""
        if not self.args.push_to_hub or not self.is_world_process_zero():
            return
        self._finish_current_push()
        names = public_files(folder)

        def send() -> None:
            scan(folder, names)
            self._send(folder, names, "End of training")

        if self.pushes.note(send, label="the result"):
            logger.info("Pushed the result to %s.", self.hub_model_id)
        for failure in self.pushes.failures:
            logger.warning("This push did not reach the Hub: %s", failure)
        if self.pushes.failures:
            logger.warning("To retry, run: regvit publish --model %s --repo_id %s --push", folder, self.hub_model_id)


def _link_checkpoint(checkpoint: Path, target: Path) -> list[str]:
    """Link a checkpoint to another folder, without the pickle of arguments, so that rotation cannot delete it."""
    names = []
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        name = path.relative_to(checkpoint).as_posix()
        if name == TRAINING_ARGS:
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if name == MANIFEST:
            content = read_json(path)
            content["files"].pop(TRAINING_ARGS, None)
            write_json(target / name, content)
        else:
            try:
                os.link(path, target / name)
            except OSError:  # file systems without hard links
                shutil.copy2(path, target / name)
        names.append(name)
    scan(target, names, paths=False)  # a checkpoint may contain paths, because it is meant for the owner of the run
    return [f"{target.name}/{name}" for name in names]
