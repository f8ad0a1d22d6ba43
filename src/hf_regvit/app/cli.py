"""Commands of the command line `regvit`: each calls one public function and says what to print.

`hf_regvit_cli` parses the options before this module, and with it torch, is imported.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_regvit_cli import COMMANDS, main

from ..models import registration  # noqa: F401
from ..models.saving import check_space, keeping
from . import arguments as options
from .recipes import arguments_class

if TYPE_CHECKING:
    from ..data.source import ImageSource
    from ..diagnosis.report import ArtifactReport
    from ..finetuning.arguments import FinetuningArguments
    from ..pretraining.arguments import PretrainingArguments

logger = logging.getLogger(__name__)

_REPORT_BYTES = 5_000_000  # space for a report and its figures that is looked for before the work

__all__ = ["COMMANDS", "RUNS", "Outcome", "main", "run"]


@dataclass(frozen=True)
class Outcome:
    """Result of a command.

    Attributes:
        result: Result for `--json`.
        text: Text to print otherwise.
        lines: Names and values to print after the text.
        status: Exit status.
        shown: True if this process prints the result; by default, the first one of several does.
        following: Words of the command that usually comes next.
    """

    result: Mapping[str, Any]
    text: str = ""
    lines: Mapping[str, Any] = field(default_factory=dict)
    status: int = 0
    shown: bool = field(default_factory=lambda: os.environ.get("RANK", "0") == "0")
    following: Sequence[str] = ()


def _same(result: Mapping[str, Any], *following: str) -> Outcome:
    return Outcome(result, lines=result, following=following)


def _opened(data: str, split: Any) -> "ImageSource":
    from ..data.loading import load_images

    images = load_images(data, split=split)
    logger.info("Opened %s.", images.counted())
    return images


def _pretrain(arguments: "PretrainingArguments") -> Outcome:
    from ..models.saving import read_json
    from ..pretraining.run import pretrain

    model, folder = pretrain(arguments), str(arguments.output_dir)
    result = {"backbone": f"{folder}/backbone", "parameters": model.num_parameters()}
    if arguments.should_save:
        report = read_json(f"{folder}/report.json")
        final = {name: report["final"][name] for name in report["final"] if name == "loss" or "knn" in name}
        result |= {"steps": report["steps"], "images_seen": report["images_seen"], **final}
        result |= {"curves": f"{folder}/curves.png", "report": f"{folder}/report.json"}
    return _same(result, "diagnose", "--model", folder, "--data", arguments.data[0])


def _finetune(arguments: "FinetuningArguments") -> Outcome:
    from ..finetuning.run import conclusion, finetune
    from ..hub.facts import TASKS
    from ..models.saving import read_json

    task, folder = TASKS[type(finetune(arguments)).__name__].pipeline_tag, str(arguments.output_dir)
    metrics = read_json(f"{folder}/metrics.json") if arguments.should_save else {}
    result = {"output_dir": folder, **metrics.get("eval", {})}
    lines = {name: value for name, value in result.items() if name not in ("accuracy_low", "accuracy_high")}
    lines |= {"result": text} if metrics and (text := conclusion(metrics)) else {}
    lines["use it"] = f'pipeline("{task}", model="{folder}", trust_remote_code=True)'
    return Outcome(result, lines=lines, following=("publish", "--model", folder, "--license", "ID"))


def _data_check(arguments: options.DataCheckArguments) -> Outcome:
    from ..data.check import check_data

    report = check_data(**vars(arguments), progress=True)
    first = ("pretrain", "--data", *arguments.data, "--output_dir", "runs/a") if "can use" in report.verdict else ()
    return Outcome(report.to_dict(), report.summary(), {"verdict": report.verdict}, following=first)


def _convert(arguments: options.ConvertArguments) -> Outcome:
    from ..models.conversion import convert_to_folder

    model = convert_to_folder(arguments.model, arguments.output_dir, **arguments.given())
    config = model.config
    return _same(
        {
            "output_dir": arguments.output_dir,
            "class": type(model).__name__,
            "parameters": model.num_parameters(),
            "registers": config.num_register_tokens,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
        },
        *("diagnose", "--model", arguments.output_dir, "--data", "IMAGES"),
    )


def _diagnose(arguments: options.DiagnoseArguments) -> Outcome:
    from ..diagnosis.comparison import ComparisonReport, compare_checkpoints
    from ..diagnosis.diagnose import diagnose
    from ..diagnosis.findings import next_step
    from ..figures.diagnosis_page import write_comparison, write_report
    from ..figures.maps import write_report_figures

    settings = arguments.settings()
    check_space(arguments.output_dir, _REPORT_BYTES)
    images = _opened(arguments.data, arguments.split)
    outcome: ArtifactReport | ComparisonReport
    if len(arguments.model) == 1:
        outcome = diagnose(arguments.model[0], images, **settings)
        reports, page = {".": outcome}, f"{arguments.output_dir}/report.html"
    else:
        outcome = compare_checkpoints(arguments.model, images, **settings)
        reports, page = outcome.folders(), f"{arguments.output_dir}/comparison.html"
    with keeping(outcome.summary):
        path = outcome.save(arguments.output_dir)
        for model, (folder, report) in zip(arguments.model, reports.items()):
            write_report(report, f"{arguments.output_dir}/{folder}/report.html", model=model, data=arguments.data)
            write_report_figures(report, f"{arguments.output_dir}/{folder}/figures")
        if isinstance(outcome, ComparisonReport):
            write_comparison(outcome, page)
    following: tuple[str, ...] = ()
    if not isinstance(outcome, ComparisonReport):
        following = next_step(outcome, model=arguments.model[0], data=arguments.data)[1]
    return Outcome(outcome.to_dict(), outcome.summary(), {"report": path, "page": page}, following=following)


def _retrofit(arguments: options.RetrofitArguments) -> Outcome:
    from ..diagnosis.retrofit import retrofit
    from ..figures.diagnosis_page import write_retrofit
    from ..figures.maps import before_after_figure, read_token_maps, save_figure

    settings = arguments.settings()
    images = _opened(arguments.data, arguments.split)
    result = retrofit(arguments.model, images, output_dir=arguments.output_dir, **settings)
    examples = [result.transform.picture(pixels) for pixels in result.examples]
    before, after = (read_token_maps(model, result.examples) for model in (result.source, result.model))
    path, show = arguments.output_dir, ("demo", "--model", arguments.output_dir, "--compare", arguments.model)
    with keeping(result.summary):
        save_figure(before_after_figure(examples, before, after), f"{path}/before_after.png")
        page = write_retrofit(result, before, after, f"{path}/retrofit.html", command=show)
    lines = {"checkpoint": path, "figure": f"{path}/before_after.png", "page": page}
    return Outcome(result.report.to_dict(), result.report.summary(), lines, following=show)


def _extract(arguments: options.ExtractArguments) -> Outcome:
    from ..evaluation.extraction import extract_to_folder
    from ..hub.exported_reader import open_exported

    model = open_exported(arguments.model)
    if model is not arguments.model and not arguments.final_norm:
        raise ValueError("An exported file has only tokens after the final norm. Leave out --no_final_norm.")
    settings, device = arguments.settings(), arguments.device
    report = extract_to_folder(model, arguments.images(), arguments.output_dir, settings=settings, device=device)
    return replace(_same(report.to_dict()), shown=report.complete)  # true in the process that finished last


def _dense(arguments: options.DenseArguments) -> Outcome:
    from ..evaluation.dense_features import choose_features
    from ..evaluation.run import TaskParts
    from ..evaluation.tasks import Sampling
    from ..hub.exported_reader import open_exported
    from ..models.loading import open_model

    check_space(arguments.output_dir, _REPORT_BYTES)
    sampling = Sampling(max_images=arguments.max_images)
    parts = TaskParts(arguments.data, arguments.train_data, sampling, seed=arguments.seed)
    options = {"ignore_values": arguments.ignore_values} if arguments.task == "segmentation" else {}
    train, test = parts.maps("masks" if arguments.task == "segmentation" else "depth", **options)
    model, chosen = open_exported(arguments.model), arguments.settings()
    if model is not arguments.model:
        chosen["layers"] = (-1,)  # an exported file has no other block
    choice = choose_features(open_model(model, device=arguments.device), train, test, **chosen)
    with keeping(choice.summary):
        path = str(choice.save(arguments.output_dir))
    use = ("extract", "--model", arguments.model, "--data", "IMAGES", "--dense_settings", path)
    return Outcome(asdict(choice), choice.summary(), {"settings": path}, following=use)


def _evaluate(arguments: options.EvaluateArguments) -> Outcome:
    from ..evaluation.report import EvaluationTable
    from ..evaluation.run import compare_backbones
    from ..figures.evaluation_page import write_evaluation
    from ..hub.bundle import read_object
    from ..hub.exported_reader import open_exported

    def keep(table: EvaluationTable) -> None:  # called after each model, so a later failure loses no earlier result
        with keeping(table.markdown):
            table.save(arguments.output_dir)
            write_evaluation(table, f"{arguments.output_dir}/report.html")

    check_space(arguments.output_dir, _REPORT_BYTES)
    models = [open_exported(model) for model in arguments.model]
    table = compare_backbones(models, arguments.data, on_report=keep, **arguments.settings())
    lost = ["\n  ".join([one.model, *one.lost.lines(one.seed)]) + "\n" for one in table.reports if one.lost]
    path = {"report": f"{arguments.output_dir}/report.json", "page": f"{arguments.output_dir}/report.html"}
    result = path | {"results": [report.summary() for report in table.reports]}
    last = arguments.model[-1]  # a model on the Hub is published already
    following = ("publish", "--model", last, "--license", "ID", "--reports", arguments.output_dir)
    config = read_object(Path(last, "config.json")) or {}
    known = config.get("model_type") == "regvit" and Path(last, "model.safetensors").is_file()
    return Outcome(result, "\n".join([table.markdown(), *lost]), path, following=following if known else ())


def _publish(arguments: options.PublishArguments) -> Outcome:
    from ..hub.publish import publish

    done = publish(arguments.model, arguments.repo_id, **arguments.settings())
    return Outcome(done.to_dict(), lines=done.summary())


def _export(arguments: options.ExportArguments) -> Outcome:
    from ..hub.export import export

    done = export(arguments.model, arguments.output_dir, **arguments.settings())
    check = {"check it anywhere": f"python {arguments.output_dir}/run.py --check"}
    return Outcome(done.to_dict(), lines=done.summary() | check)


def _demo(arguments: options.DemoArguments) -> Outcome:
    from .demo import serve

    return _same(serve(**vars(arguments)))


def _doctor(arguments: options.DoctorArguments) -> Outcome:
    from .doctor import examine

    found = examine(arguments.output_dir, self_test=arguments.self_test)
    return Outcome(found.to_dict(), "\n".join(found.lines()), status=0 if found.healthy else 1)


RUNS: dict[str, Callable[[Any], Outcome]] = {
    "data-check": _data_check,
    "pretrain": _pretrain,
    "finetune": _finetune,
    "convert": _convert,
    "diagnose": _diagnose,
    "retrofit": _retrofit,
    "extract": _extract,
    "dense": _dense,
    "evaluate": _evaluate,
    "publish": _publish,
    "export": _export,
    "demo": _demo,
    "doctor": _doctor,
}


def run(command: str, values: Mapping[str, Any]) -> Outcome:
    """Run a command with the options that were given; the others have the defaults of its argument class."""
    kind = arguments_class(command)
    if hasattr(kind, "use_cpu"):
        values = _on_device(dict(values))
    return RUNS[command](kind(**values))


def _on_device(values: dict[str, Any]) -> dict[str, Any]:
    """Replace the device of a training run by the options of Trainer, which takes the first accelerator there is."""
    import torch

    device, found = values.pop("device", "auto"), torch.accelerator.current_accelerator(check_available=True)
    kind, _, index = device.partition(":")
    available = found.type if found and not values.get("use_cpu") else "cpu"
    if kind not in ("auto", "cpu", available):
        raise ValueError(f"device is '{device}', but torch finds only '{available}' here. Use --device auto.")
    if index and kind == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = index
    logger.info("The run uses the device '%s'.", available if device == "auto" else device)
    return values | {"use_cpu": True} if kind == "cpu" else values
