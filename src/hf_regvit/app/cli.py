"""Command-line interface `regvit`: parse the options, call one public function, print the result.

Results go to stdout, logs to stderr. Exit status: 0 success, 1 failure, 2 wrong usage, 130 Ctrl-C. To use several
processes, run `accelerate launch -m hf_regvit pretrain ...`.
"""

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

USAGE = """usage: regvit COMMAND [options]

commands:
  data-check check a data set before training: counts, sizes, duplicates, unreadable images
  pretrain   pretrain a RegViT on unlabeled images with the DINOv2 losses
  finetune   train a classifier, a segmentation model or a depth model on labeled images
  convert    convert a DINOv2, timm or transformers ViT to a RegViT with the same outputs
  diagnose   find artifact tokens in one or more models: how many, where, and from which block on
  retrofit   add registers to a trained model without training and move its artifacts into them
  extract    write the CLS, register and patch tokens of many images to files, for any supported model
  evaluate   compare frozen features: kNN, linear probes, segmentation, depth, object discovery
  publish    create a Hub-ready folder with a model card, verify that it loads without hf_regvit, and upload it
  demo       serve a web page that shows the attention, norms, PCA and objects of one or two models
  doctor     check the installation: versions, devices, conflicts, disk space, a self-test

Run `regvit COMMAND --help` to list the options of a command.
Every command accepts --dry_run (print the resolved options and stop), --json (print the result as JSON) and --debug
(show the full traceback of an error).
"""


def _check_output(folder: str | Path | None) -> None:
    """Check that results can be written to a folder before the work starts. Nothing is created.

    Raises:
        OSError: The folder cannot be written to.
    """
    path = Path(folder or ".")
    place = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"'{place}' is a file, so '{path}' cannot be created. Choose another folder.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"'{place}' is not writable. Choose another folder, or change its permissions.")


def pretrain_command(args: Sequence[str], switches: dict[str, bool]) -> dict[str, Any]:
    """Run `regvit pretrain --config examples/photos_cpu.yaml --output_dir runs/a`."""
    from ..pretraining.arguments import PretrainingArguments
    from ..pretraining.run import pretrain
    from .recipes import RecipeParser

    parser = RecipeParser(PretrainingArguments, prog="regvit pretrain")
    if switches["dry_run"]:
        return _resolved(*parser.parse([*args, *_dry_run_device_options()]))
    (arguments,) = parser.parse(args)
    _check_output(arguments.output_dir)
    model = pretrain(arguments)
    return {"backbone": f"{arguments.output_dir}/backbone", "parameters": model.num_parameters()}


def finetune_command(args: Sequence[str], switches: dict[str, bool]) -> dict[str, Any]:
    """Run `regvit finetune --model runs/a/backbone --data photos --output_dir runs/b`."""
    from ..finetuning.arguments import FinetuningArguments
    from ..finetuning.run import finetune
    from .recipes import RecipeParser

    parser = RecipeParser(FinetuningArguments, prog="regvit finetune")
    if switches["dry_run"]:
        return _resolved(*parser.parse([*args, *_dry_run_device_options()]))
    (arguments,) = parser.parse(args)
    _check_output(arguments.output_dir)
    finetune(arguments)
    metrics = json.loads(Path(arguments.output_dir, "metrics.json").read_text()) if arguments.should_save else {}
    return {"output_dir": arguments.output_dir, **metrics.get("eval", {})}


def data_check_command(args: Sequence[str], switches: dict[str, bool]) -> dict[str, Any]:
    """Run `regvit data-check --data FOLDER`."""
    from ..data.check import check_data
    from .arguments import DataCheckArguments
    from .recipes import RecipeParser

    (arguments,) = RecipeParser(DataCheckArguments, prog="regvit data-check").parse(args)
    if switches["dry_run"]:
        return _resolved(arguments)
    report = check_data(**vars(arguments), progress=True)
    if switches["json"]:
        return report.to_dict()
    print(report.summary())
    return {"verdict": report.verdict}


def convert_command(args: Sequence[str], switches: dict[str, bool]) -> dict[str, Any]:
    """Run `regvit convert --model SOURCE --output_dir FOLDER`."""
    from ..models.conversion import convert_to_folder
    from .arguments import ConvertArguments
    from .recipes import RecipeParser

    (arguments,) = RecipeParser(ConvertArguments, prog="regvit convert").parse(args)
    if switches["dry_run"]:
        return _resolved(arguments)
    _check_output(arguments.output_dir)
    model = convert_to_folder(
        arguments.model_name_or_path, arguments.output_dir, verify=arguments.verify, **arguments.overrides()
    )
    config = model.config
    return {
        "output_dir": arguments.output_dir,
        "class": type(model).__name__,
        "parameters": model.num_parameters(),
        "registers": config.num_register_tokens,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
    }


def diagnose_command(args: Sequence[str], switches: dict[str, bool]) -> dict[str, Any]:
    """Run `regvit diagnose --model SOURCE --data FOLDER --output_dir diagnosis`."""
    from ..data.loading import load_images
    from ..diagnosis.comparison import compare_checkpoints
    from ..diagnosis.diagnose import diagnose
    from ..figures.diagnosis_page import write_report
    from ..figures.maps import write_report_figures
    from ..models.loading import load_model
    from .arguments import DiagnoseArguments
    from .recipes import RecipeParser

    (arguments,) = RecipeParser(DiagnoseArguments, prog="regvit diagnose").parse(args)
    settings = arguments.settings()
    if switches["dry_run"]:
        return _resolved(arguments)
    _check_output(arguments.output_dir)
    images = load_images(arguments.data, split=arguments.split)
    if len(arguments.model_name_or_path) == 1:
        model, processor = load_model(arguments.model_name_or_path[0], device=arguments.device)
        outcome: Any = diagnose(model, images, processor=processor, **settings)
        reports = {".": outcome}
    else:
        outcome = compare_checkpoints(arguments.model_name_or_path, images, device=arguments.device, **settings)
        reports = outcome.folders()
    path = outcome.save(arguments.output_dir)
    for folder, report in reports.items():
        write_report(report, f"{arguments.output_dir}/{folder}/report.html")
        write_report_figures(report, f"{arguments.output_dir}/{folder}/figures")
    if switches["json"]:
        return outcome.to_dict()
    print(outcome.summary())
    return {"report": str(path)}


def retrofit_command(args: Sequence[str], switches: dict[str, bool]) -> dict[str, Any]:
    """Run `regvit retrofit --model SOURCE --data FOLDER --output_dir FOLDER`."""
    from ..data.loading import load_images
    from ..diagnosis.retrofit import retrofit_to_folder
    from ..figures.maps import before_after_figure, read_token_maps, save_figure
    from .arguments import RetrofitArguments
    from .recipes import RecipeParser

    (arguments,) = RecipeParser(RetrofitArguments, prog="regvit retrofit").parse(args)
    settings = arguments.settings()
    if switches["dry_run"]:
        return _resolved(arguments)
    _check_output(arguments.output_dir)
    images = load_images(arguments.data, split=arguments.split)
    result = retrofit_to_folder(arguments.model_name_or_path, images, arguments.output_dir, **settings)
    pictures = [result.transform.picture(pixels) for pixels in result.examples]
    before, after = (read_token_maps(model, result.examples) for model in (result.source, result.model))
    path = f"{arguments.output_dir}/before_after.png"
    save_figure(before_after_figure(pictures, before, after), path)
    if switches["json"]:
        return result.report.to_dict()
    print(result.report.summary())
    return {"checkpoint": arguments.output_dir, "picture": path}


def extract_command(args: Sequence[str], switches: dict[str, bool]) -> dict[str, Any]:
    """Run `regvit extract --model SOURCE --images FOLDER --output_dir features`."""
    from ..evaluation.extraction import extract_to_folder
    from .arguments import ExtractArguments
    from .recipes import RecipeParser

    (arguments,) = RecipeParser(ExtractArguments, prog="regvit extract").parse(args)
    settings = arguments.settings()
    if switches["dry_run"]:
        return _resolved(arguments)
    _check_output(arguments.output_dir)
    return extract_to_folder(
        arguments.model_name_or_path, arguments.images(), arguments.output_dir, settings=settings
    ).to_dict()


def evaluate_command(args: Sequence[str], switches: dict[str, bool]) -> dict[str, Any]:
    """Run `regvit evaluate --model A --model B --tasks knn linear --data FOLDER`."""
    from ..evaluation.report import EvaluationTable
    from ..evaluation.run import compare_backbones
    from .arguments import EvaluateArguments
    from .recipes import RecipeParser

    (arguments,) = RecipeParser(EvaluateArguments, prog="regvit evaluate").parse(args)
    settings = arguments.settings()
    if switches["dry_run"]:
        return _resolved(arguments)

    def keep(table: EvaluationTable) -> None:  # called after each model, so a later failure loses no earlier result
        table.save(arguments.output_dir)

    _check_output(arguments.output_dir)
    table = compare_backbones(
        arguments.model_name_or_path, arguments.data, device=arguments.device, on_report=keep, **settings
    )
    result: dict[str, Any] = {"report": f"{arguments.output_dir}/report.json"}
    if switches["json"]:
        return result | {"results": [report.summary() for report in table.reports]}
    print(table.markdown())
    for report in table.reports:
        if report.lost:
            print("\n  ".join([report.model, *report.lost.lines(report.seed)]), end="\n\n")
    return result


def demo_command(args: Sequence[str], switches: dict[str, bool]) -> dict[str, Any]:
    """Run `regvit demo --model A --compare B`."""
    from .arguments import DemoArguments
    from .demo import serve
    from .recipes import RecipeParser

    (arguments,) = RecipeParser(DemoArguments, prog="regvit demo").parse(args)
    if switches["dry_run"]:
        return _resolved(arguments)
    return serve(**vars(arguments))


def publish_command(args: Sequence[str], switches: dict[str, bool]) -> dict[str, Any]:
    """Run `regvit publish --model runs/a --license apache-2.0 --repo_id me/vit --push`."""
    from ..hub.publish import publish
    from .arguments import PublishArguments
    from .recipes import RecipeParser

    (arguments,) = RecipeParser(PublishArguments, prog="regvit publish").parse(args)
    if switches["dry_run"]:
        return _resolved(arguments)
    done = publish(
        arguments.model_name_or_path,
        arguments.repo_id,
        output_dir=arguments.folder(),
        reports=arguments.reports,
        card=arguments.card(),
        example_pictures=arguments.example_pictures,
        max_shard_size=arguments.max_shard_size,
        push=arguments.push,
        private=not arguments.public,
        revision=arguments.revision,
        commit_message=arguments.commit_message,
    )
    return done.to_dict() if switches["json"] else done.summary()


def doctor_command(args: Sequence[str], switches: dict[str, bool]) -> dict[str, Any]:
    """Run `regvit doctor`."""
    from .arguments import DoctorArguments
    from .doctor import examine
    from .recipes import RecipeParser

    (arguments,) = RecipeParser(DoctorArguments, prog="regvit doctor").parse(args)
    if switches["dry_run"]:
        return _resolved(arguments)
    diagnosis = examine(arguments.output_dir, self_test=arguments.self_test)
    print(json.dumps(diagnosis.to_dict()) if switches["json"] else "\n".join(diagnosis.lines()))
    raise SystemExit(0 if diagnosis.healthy else 1)


COMMANDS: dict[str, Callable[[Sequence[str], dict[str, bool]], dict[str, Any]]] = {
    "data-check": data_check_command,
    "pretrain": pretrain_command,
    "finetune": finetune_command,
    "convert": convert_command,
    "diagnose": diagnose_command,
    "retrofit": retrofit_command,
    "extract": extract_command,
    "evaluate": evaluate_command,
    "publish": publish_command,
    "demo": demo_command,
    "doctor": doctor_command,
}


def _dry_run_device_options() -> list[str]:
    """Return the options that let a dry run resolve a bfloat16 recipe on a machine without an accelerator."""
    import torch

    return [] if torch.accelerator.is_available() else ["--use_cpu", "True"]


def _resolved(arguments: Any) -> dict[str, Any]:
    """Return the arguments that differ from their defaults or have no default."""
    resolved = {}
    for field in dataclasses.fields(arguments):
        default = field.default_factory() if callable(field.default_factory) else field.default
        value = getattr(arguments, field.name)
        if field.init and value != default and isinstance(value, str | int | float | bool | list | None):
            resolved[field.name] = value
    return resolved


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if args else 2
    if args[0] == "--version":
        from ..models.configuration_regvit import __version__

        print(f"hf_regvit {__version__}")
        return 0
    name, *rest = args
    if name not in COMMANDS:
        import difflib

        nearest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        print(f"error: Unknown command '{name}'. Did you mean '{nearest}'?", file=sys.stderr)
        return 2
    switches = {switch: f"--{switch}" in rest for switch in ("dry_run", "json", "debug")}
    rest = [argument for argument in rest if argument not in ("--dry_run", "--json", "--debug")]
    logging.basicConfig(level=os.environ.get("REGVIT_LOG", "INFO"), format="%(message)s", stream=sys.stderr)
    for chatty in ("httpx", "httpx2", "httpcore", "httpcore2", "urllib3", "PIL", "matplotlib", "timm"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        result = COMMANDS[name](rest, switches)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:  # argparse has already printed its message
        return stop.code if isinstance(stop.code, int) else 2
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError, ArithmeticError) as error:
        if switches["debug"]:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    if switches["json"]:
        print(json.dumps(result))
    else:
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in result.items()}
        print("\n".join(f"{key}: {value}" for key, value in shown.items()))
    return 0
