"""Train a RegViT and a text encoder on images with texts; the entry point is `train_image_text(args)`."""

import logging
import time
from collections.abc import Sequence

from transformers import PreTrainedModel, TrainerCallback, VisionTextDualEncoderProcessor

from ..diagnosis.diagnose import diagnose
from ..evaluation.run import evaluate_backbone
from ..models.foreign_weights import BACKBONE
from ..models.results import Record
from ..models.saving import write_json
from ..models.tokens import TokenReader
from ..training.callbacks import MetricsFile
from ..training.run_folder import BAD_IMAGES, RunRecord, run_lock, write_model
from .arguments import ImageTextArguments
from .captions import open_captioned
from .network import build_network
from .trainer import ImageTextTrainer
from .zero_shot import zero_shot

logger = logging.getLogger(__name__)


def train_image_text(args: ImageTextArguments, *, callbacks: Sequence[TrainerCallback] = ()) -> PreTrainedModel:
    """Train a dual encoder of images and texts, evaluate it, and write its folder.

    `output_dir` receives the dual encoder with its processor, the vision model alone in `backbone/`, `result.json`,
    `metrics.jsonl`, `resolved_recipe.yaml`, `environment.json` and checkpoints.

    Args:
        args: Arguments of the run.
        callbacks: Additional trainer callbacks.

    Returns:
        The dual encoder, a `VisionTextDualEncoderModel`, in eval mode.

    Raises:
        ValueError: The data or a model cannot be used, or arguments contradict each other.
        NonFiniteError: A loss or gradient is NaN or infinite.
        RunFolderInUseError: Another run uses `output_dir`.
        TrainingInterrupted: SIGTERM, SIGUSR1 or Ctrl-C was received; a checkpoint has been saved.
    """
    with run_lock(args):
        if args.process_index == 0 and not args.resume_from_checkpoint:
            (args.folder / BAD_IMAGES).unlink(missing_ok=True)  # left by an earlier run
        images = open_captioned(args)
        network, processor = build_network(args, images.corpus())
        encoder = network.encoder
        observers = [RunRecord(args.folder, args.resolved()), *callbacks, MetricsFile(args.folder / "metrics.jsonl")]
        trainer = ImageTextTrainer(network, args, images, processor=processor, callbacks=observers)
        reader, started = TokenReader(encoder.vision_model, processor.image_processor), time.perf_counter()
        before = _artifacts(trainer, reader)
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        encoder.eval()
        if trainer.is_world_process_zero():
            with trainer.writing_result():
                write_model(args.folder, encoder, processor)
                write_model(args.folder / BACKBONE, encoder.vision_model, processor.image_processor)
            report = _report(trainer, processor, reader)
            report["artifacts"] = {"before": before, "after": _artifacts(trainer, reader)}
            report["seconds"] = time.perf_counter() - started
            write_json(args.folder / "result.json", report)
            trainer.trackers.result(args.folder / "result.json")
            trainer.trackers.finish(args.folder)
            logger.info("Done in %.1f minutes. The models are in %s.", report["seconds"] / 60, args.folder)
        trainer.accelerator.wait_for_everyone()
        return encoder


def _artifacts(trainer: ImageTextTrainer, reader: TokenReader) -> Record | None:
    """Return the main numbers of a diagnosis of the vision model, on held-out images if there are any."""
    args, images = trainer.args, trainer.images
    if not args.diagnosis_images or not trainer.is_world_process_zero():
        return None
    source = (images.labeled and images.labeled.heldout) or images.source
    report = diagnose(reader, source, max_images=args.diagnosis_images, seed=args.seed, progress=False)
    names = ("outlier_share", "bimodal", "separation", "cutoff", "layer", "num_images")
    layer = next(one for one in report.layers if one["layer"] == report.layer)
    return {n: getattr(report, n) for n in names} | {n: layer.get(n) for n in ("median", "max", "register_norms")}


def _report(trainer: ImageTextTrainer, processor: VisionTextDualEncoderProcessor, reader: TokenReader) -> Record:
    """Return the content of `result.json` without the diagnosis."""
    args, network, images = trainer.args, trainer.model, trainer.images
    report: Record = {"loss": args.loss, "steps": trainer.state.global_step, "images": len(images.source)}
    report["logit_scale"] = network.encoder.logit_scale.exp().item()
    report["logit_bias"] = None if network.logit_bias is None else network.logit_bias.item()
    if images.labeled is not None and (heldout := images.labeled.heldout) is not None:
        chosen: Record = {"train": images.labeled.train, "max_images": args.max_probe_images, "seed": args.seed}
        probe = evaluate_backbone(reader, heldout, tasks=["linear"], **chosen).scores[0]
        found = zero_shot(network.encoder, processor, heldout, templates=images.templates, seed=args.seed)
        report["zero_shot"] = found | {"templates": images.templates}
        report["linear_probe"] = {"top1": probe.value, "interval": probe.interval, "images": probe.num_images}
    return report
