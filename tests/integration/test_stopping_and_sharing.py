"""Ctrl-C, the lock of the run folder and the permissions of its files, with real processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_resume import RECIPE, unbroken  # noqa: F401  (a fixture)

from hf_regvit import FinetuningArguments, PretrainingArguments, finetune, pretrain
from hf_regvit.models.manifest import verify_checkpoint
from hf_regvit.models.processing import default_image_processor
from hf_regvit.training.checkpoints import list_checkpoints
from hf_regvit.training.run_folder import LOCK, RunFolderInUseError, run_lock
from tiny_finetune import backbone, picture
from tiny_run import Crops, arguments, checkpoint_state, same_state

pytestmark = pytest.mark.usefixtures("without_figures")

# Long enough to be stopped, with measurements and saves that are seldom.
LONG = RECIPE | {"max_steps": 500, "logging_steps": 1, "save_steps": 1000, "knn_steps": 0, "panel_steps": 0}


def start(folder: Path, recipe=RECIPE, command="pretrain", *, launcher=(), **overrides) -> subprocess.Popen:
    """Run the command line in a process group of its own, as a terminal does."""
    words = [command, "--output_dir", str(folder)]
    for name, value in (recipe | overrides).items():
        words += [f"--{name}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "hf_regvit", *words], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps_of(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return sum('"loss"' in line for line in file.read_text().splitlines()) if file.is_file() else 0


# ---- Ctrl-C ----


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_ctrl_c_saves_and_the_run_goes_on_exactly(unbroken, tmp_path, workers):  # noqa: F811
    folder = tmp_path / "run"
    process = start(folder, logging_steps=1, dataloader_num_workers=workers)
    wait_for(lambda: steps_of(folder) >= 3, process)
    os.killpg(process.pid, signal.SIGINT)  # the terminal signals the data workers too
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    assert "Ctrl-C: saving a checkpoint after this step. Press Ctrl-C again to stop at once." in output
    assert "The run was stopped by Ctrl-C after step" in output
    assert "Traceback" not in output
    (checkpoint,) = list_checkpoints(folder)[-1:]
    verify_checkpoint(checkpoint)
    assert not (folder / LOCK).exists()
    pretrain(PretrainingArguments(output_dir=str(folder), resume_from_checkpoint="last", **RECIPE))
    assert same_state(checkpoint_state(folder / "checkpoint-20"), checkpoint_state(unbroken / "checkpoint-20"))


@pytest.mark.slow
def test_the_second_ctrl_c_stops_at_once(tmp_path):
    """The step waits for an image that takes a minute."""
    folder = tmp_path / "run"
    code = (
        "import sys, time\nfrom hf_regvit.pretraining.trainer import DinoTrainer\nstep = DinoTrainer.compute_loss\n"
        "def slow(self, *args, **kwargs):\n"
        "    if self.state.global_step == 2: time.sleep(60)\n"
        "    return step(self, *args, **kwargs)\n"
        "DinoTrainer.compute_loss = slow\n"
        "from hf_regvit.app.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    words = ["pretrain", "--output_dir", str(folder)]
    for name, value in LONG.items():
        words += [f"--{name}", str(value)]
    process = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: steps_of(folder) >= 2, process)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert time.monotonic() - began < 30
    assert process.returncode == 130, errors
    assert errors.rstrip().endswith("error: interrupted")
    assert "Traceback" not in errors
    assert list_checkpoints(folder) == []
    assert not (folder / LOCK).exists()


@pytest.mark.slow
def test_ctrl_c_saves_a_fine_tuning_run_too(tmp_path):
    folder, data = tmp_path / "run", tmp_path / "data"
    for label, name in enumerate(("blue", "green", "red")):
        (data / name).mkdir(parents=True)
        for number in range(12):
            picture(number, label).save(data / name / f"{number}.png")
    backbone().save_pretrained(tmp_path / "model")
    default_image_processor(32).save_pretrained(tmp_path / "model")
    recipe = {
        "model": tmp_path / "model", "data": data, "use_cpu": True, "per_device_train_batch_size": 8,
        "num_train_epochs": 2000, "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no",
    }  # fmt: skip
    process = start(folder, recipe, "finetune")
    wait_for(lambda: steps_of(folder) >= 3, process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    assert "The run was stopped by Ctrl-C after step" in output
    verify_checkpoint(list_checkpoints(folder)[-1])
    assert not (folder / "model.safetensors").exists()


@pytest.mark.slow
def test_ctrl_c_under_torchrun_counts_once(tmp_path):
    """The terminal signals all processes, and torchrun passes the signal on."""
    folder = tmp_path / "run"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    process = start(folder, LONG, launcher=launcher, per_device_train_batch_size=48)
    wait_for(lambda: steps_of(folder) >= 3, process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert output.count("Ctrl-C: saving a checkpoint") == 1
    assert "The run was stopped by Ctrl-C after step" in output, output
    verify_checkpoint(list_checkpoints(folder)[-1])
    assert not (folder / LOCK).exists()


def test_resuming_from_nothing_says_so_and_starts(tmp_path, caplog):
    with caplog.at_level("INFO", logger="hf_regvit"):
        pretrain(arguments(tmp_path, max_steps=1, resume_from_checkpoint="last"), train_dataset=Crops())
    assert f"There is no checkpoint in {tmp_path} yet, so the run starts at its first step." in caplog.text


# ---- The lock ----


def lock_of(folder: Path, **changes) -> dict:
    """Write the lock of another run."""
    folder.mkdir(exist_ok=True)
    with run_lock(arguments(folder.parent / "other")):
        own = json.loads((folder.parent / "other" / LOCK).read_text())
    (folder / LOCK).write_text(json.dumps(own | changes))
    return own | changes


def test_a_lock_names_its_run_and_is_removed_at_every_exit(tmp_path):
    args = arguments(tmp_path / "run")
    for problem in (None, ValueError, KeyboardInterrupt, SystemExit):
        try:
            with run_lock(args):
                lock = json.loads((tmp_path / "run" / LOCK).read_text())
                assert (lock["process"], lock["machine"]) == (os.getpid(), socket.gethostname())
                assert lock["started"].startswith("20")
                if problem is not None:
                    raise problem
        except (ValueError, KeyboardInterrupt, SystemExit):
            pass
        assert not (tmp_path / "run").exists()  # nothing was written


def test_a_folder_in_use_is_refused_with_the_name_of_its_run(tmp_path):
    pattern = rf"is in use by process {os.getpid()} on {socket.gethostname()}, started 20.*Two runs in one folder"
    with run_lock(arguments(tmp_path)):
        for job in (
            lambda: pretrain(arguments(tmp_path, max_steps=1), train_dataset=Crops()),
            lambda: finetune(FinetuningArguments(output_dir=str(tmp_path), use_cpu=True)),
        ):
            with pytest.raises(RunFolderInUseError, match=pattern):
                job()
        assert (tmp_path / LOCK).is_file()  # the refused runs leave it
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_lock_that_was_left_behind_is_replaced(tmp_path, caplog):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for number, changes in enumerate(
        (
            {"process": ended.pid},  # killed, for example
            {"process": 1},  # its number was given to another process
            {"machine": "elsewhere", "age": 700},
        )
    ):
        folder = tmp_path / str(number)
        age = changes.pop("age", 0)
        lock_of(folder, **changes)
        os.utime(folder / LOCK, (time.time() - age,) * 2)
        caplog.clear()
        with run_lock(arguments(folder)):
            assert json.loads((folder / LOCK).read_text())["process"] == os.getpid()
        assert "has ended without removing" in caplog.text
        assert list(folder.iterdir()) == []


def test_a_run_on_another_machine_is_believed_while_it_renews_its_lock(tmp_path):
    for changes in ({"machine": "elsewhere"}, {"process_namespace": "pid:[1]"}):
        lock_of(tmp_path / "run", **changes)
        with (
            pytest.raises(RunFolderInUseError, match=r"If it has ended, delete '.*run\.lock'"),
            run_lock(arguments(tmp_path / "run")),
        ):
            pass


@pytest.mark.slow
def test_two_processes_in_one_folder_and_one_that_was_killed(tmp_path):
    folder = tmp_path / "run"
    first = start(folder, LONG)
    wait_for(lambda: steps_of(folder) >= 1, first)
    second = start(folder, LONG)
    output, _ = second.communicate(timeout=300)
    assert second.returncode == 1
    assert f"is in use by process {first.pid} on {socket.gethostname()}" in output
    assert "Traceback" not in output
    first.kill()
    first.wait()
    assert (folder / LOCK).is_file()
    third = start(folder, LONG, max_steps=2)
    output, _ = third.communicate(timeout=300)
    assert third.returncode == 0, output
    assert f"The run of process {first.pid} on" in output
    assert not (folder / LOCK).exists()


# ---- Permissions ----


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_get_the_permissions_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        save = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
        pretrain(arguments(tmp_path, panel_steps=0, **save), train_dataset=Crops())
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"model.safetensors", "student.safetensors", "optimizer.pt", "config.json"}
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {
        path.name: oct(0o666 & ~umask) for path in files
    }


# ---- As one would guess ----


@pytest.mark.slow
def test_the_two_jobs_from_python(tmp_path):
    for label, name in enumerate(("blue", "green", "red")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(14):
            picture(number, label).save(tmp_path / "data" / name / f"{number}.png")
    sizes = {"global_crop_size": 16, "local_crop_size": 8, "patch_size": 8, "preset": "tiny", "num_hidden_layers": 1}
    small = {"head_num_prototypes": 64, "max_steps": 1, "per_device_train_batch_size": 8}
    teacher = pretrain(PretrainingArguments(data=tmp_path / "data", output_dir=tmp_path / "pre", **sizes, **small))
    assert teacher.config.num_register_tokens == 4
    args = FinetuningArguments(model=tmp_path / "pre", data=tmp_path / "data", output_dir=tmp_path / "fine")
    assert args.model_name_or_path == str(tmp_path / "pre")
    classifier = finetune(args)
    assert list(classifier.config.id2label.values()) == ["blue", "green", "red"]
    assert (tmp_path / "fine" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="Give one"):
        FinetuningArguments(model="a", model_name_or_path="b", output_dir=str(tmp_path))
