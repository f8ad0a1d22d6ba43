"""Kill a writer at points spread over all changes that it makes on the disk, and let the next run repair what is left.

`python kill_points.py WRITER COUNT FOLDER` prints one JSON line for each kill. Every attempt is a fork of this
process, which has the libraries loaded and has never computed a gradient.
"""

import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401  (every fork would import both)

from hf_regvit.hub.export import export
from hf_regvit.hub.exported import ExportError, check
from hf_regvit.hub.publish import publish
from hf_regvit.models.conversion import convert_to_folder
from hf_regvit.models.manifest import verify_checkpoint
from hf_regvit.models.saving import read_json, whole_folder, write_json
from hf_regvit.pretraining.run import pretrain
from hf_regvit.training.checkpoints import list_checkpoints

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataclasses import dataclass

import builders
import tiny_finetune
import tiny_run

# Events of `sys.audit` that change the disk; of "open" only those that write.
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.link", "os.chmod", "open")


@dataclass
class Killer:
    """Audit hook that counts the changes below a folder, and kills the process before one of them."""

    folder: Path
    at: int | None = None
    count: int = 0

    def __call__(self, event: str, args: tuple) -> None:
        if event not in CHANGES or not args or not isinstance(args[0], str | bytes | os.PathLike):
            return
        if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if os.fsencode(args[0]).startswith(os.fsencode(self.folder)):
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)


def forked(work: Callable[[], int | None], folder: Path, at: int | None = None) -> tuple[int, int]:
    """Run `work` in a fork; return its status, negative for a signal, and the number of changes below `folder`."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        killer = Killer(folder, at)
        sys.addaudithook(killer)
        status = 1
        try:
            status = int(work() or 0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os.write(writing, str(killer.count).encode())
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        count = int(pipe.read() or 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), count


# --- Writers: what to run, and what has to hold after a kill and after the next run


def pretraining(folder: Path) -> None:
    """Six steps with three checkpoints; resumed if there is one."""
    saving = {"save_strategy": "steps", "save_steps": 2, "resume_from_checkpoint": "last", "logging_steps": 1}
    args = tiny_run.arguments(folder, **saving)
    pretrain(args, train_dataset=tiny_run.Crops())


def finetuning(folder: Path) -> None:
    """Four steps with two checkpoints and evaluations; resumed if there is one."""
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    tiny_finetune.run(folder, resume_from_checkpoint="last", **saving)


def conversion(folder: Path) -> None:
    """A ViT from a folder beside; to a finished conversion, only the next command that writes there does anything."""
    source = folder.parent / "source"
    if not source.exists():
        builders.save_model(builders.tiny_source("ViTModel"), source)
    if (folder / "config.json").exists():
        write_json(folder / "manifest.json", read_json(folder / "manifest.json"))
    else:
        convert_to_folder(source, folder)


def publishing(folder: Path) -> None:
    """A bundle of a model from a folder beside; it is not loaded in a clean process, which writes elsewhere."""
    source = folder.parent / "source"
    if not source.exists():
        builders.save_model(builders.tiny_model(), source)
    with patch("hf_regvit.hub.publish.verify"):
        publish(source, output_dir=folder / "bundle", card={"license": "mit", "data": "images"})


def exporting(folder: Path) -> None:
    """An ONNX file of a model from a folder beside; the next command finds a whole folder, and leaves it alone."""
    source = folder.parent / "source"
    if not source.exists():
        builders.save_model(builders.tiny_model(), source)
    try:
        export(source, folder / "files", format="onnx")
    except ExportError as error:
        if "is not an empty folder" not in str(error) or not all(row[-1] for row in check(folder / "files")):
            raise
        with whole_folder(folder):  # removes what the kill has left
            pass


def replacing(folder: Path) -> None:
    """A result is written over another one, with weights in one file instead of two."""
    for number, names in enumerate((("model-1.safetensors", "model-2.safetensors"), ("model.safetensors",))):
        if number == 0 and (folder / "config.json").exists():
            continue
        with whole_folder(folder) as staged:
            for name in names:
                (staged / name).write_text(str(number))
            write_json(staged / "preprocessor_config.json", {"number": number})
            write_json(staged / "config.json", {"number": number})


WRITERS = {one.__name__: one for one in (pretraining, finetuning, conversion, publishing, exporting, replacing)}


def faults(writer: str, folder: Path, unbroken: Path) -> list[str]:
    """Return what is wrong right after a kill: a broken checkpoint, or a model that is neither absent nor whole."""
    found = []
    for checkpoint in list_checkpoints(folder) if folder.exists() else []:
        try:
            verify_checkpoint(checkpoint)
        except ValueError as error:
            found.append(str(error))
    inside = {"pretraining": "backbone", "publishing": "bundle"}.get(writer, "")
    model, expected = folder / inside, unbroken / inside
    if not (model / "config.json").exists():
        return found
    numbers = {}
    for path in [*model.glob("model*.safetensors"), model / "preprocessor_config.json"]:
        same = (expected / path.name).exists() and path.read_bytes() == (expected / path.name).read_bytes()
        if writer == "replacing":
            text = path.read_text()
            numbers[path.name] = json.loads(text)["number"] if path.suffix == ".json" else int(text)
        elif not same:
            found.append(f"{path.name} differs or is missing")
    if len({*numbers.values()}) > 1:
        found.append(f"files of two results: {numbers}")
    return found


def remains(writer: str, folder: Path, unbroken: Path) -> list[str]:
    """Return what the next run did not repair: other names of files, other weights, another history."""
    found = faults(writer, folder, unbroken)
    names, expected = ({path.relative_to(top).as_posix() for path in top.rglob("*")} for top in (folder, unbroken))
    found += [f"{name} is left or missing" for name in sorted(names ^ expected)]
    if (unbroken / "metrics.jsonl").exists():
        steps, others = (
            [json.loads(line)["step"] for line in (top / "metrics.jsonl").read_text().splitlines()]
            for top in (folder, unbroken)
        )
        if steps != others:
            found.append(f"the history has the steps {steps}, expected {others}")
    return found


def main(writer: str, count: int, folder: Path) -> None:
    gc.collect()
    gc.freeze()  # a collection in a fork would copy all memory
    unbroken = folder / "unbroken"
    status, changes = forked(lambda: WRITERS[writer](unbroken), unbroken)
    assert status == 0, "the unbroken run failed"
    for number in range(count):
        at = 1 + round(number * (changes - 1) / max(count - 1, 1))
        run = folder / f"run-{number}"
        status, _ = forked(lambda run=run: WRITERS[writer](run), run, at)
        broken = faults(writer, run, unbroken)
        again, _ = forked(lambda run=run: WRITERS[writer](run), run)
        result = {"at": at, "of": changes, "status": status, "broken": broken, "again": again}
        print(json.dumps(result | {"remains": remains(writer, run, unbroken)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
