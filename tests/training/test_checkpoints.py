"""Atomic checkpoints that are verified before use; stopping and resuming. Rows F42, F43, F57 to F64."""

import errno
import json
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from builders import SignalAt, WorkerFault
from hf_regvit import CheckpointCorruptError, CheckpointError
from hf_regvit.models.manifest import CheckpointIncompleteError, verify_checkpoint, write_manifest
from hf_regvit.models.saving import NoSpaceError
from hf_regvit.pretraining.distillation import HeadShape
from hf_regvit.training.checkpoints import STAGING, list_checkpoints, newest_checkpoint, rotate_checkpoints
from hf_regvit.training.samplers import EpochSampler
from hf_regvit.training.signals import REQUEUE_EXIT_CODE, TrainingInterrupted, WorkerDeaths
from tiny_run import Crops, arguments, checkpoint_state, same_state, trained

SAVING = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A finished run with checkpoints of the steps 2, 4 and 6; do not write to it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    trained(folder, **SAVING)
    return folder


@pytest.fixture
def run(saved, tmp_path) -> Path:
    """A copy of the run, to damage."""
    return shutil.copytree(saved, tmp_path / "run")


def names(run: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run)]


# ---- Checkpoint files ----


def test_a_checkpoint_lists_all_its_files_and_verifies(saved):
    assert names(saved) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert not (saved / STAGING).exists()
    for folder in list_checkpoints(saved):
        verify_checkpoint(folder)
        listed = json.loads((folder / "manifest.json").read_text())["files"]
        assert set(listed) == {path.name for path in folder.iterdir()} - {"manifest.json"}
        assert {"model.safetensors", "optimizer.pt", "trainer_state.json", "resume_state.json"} <= set(listed)


def damage(path: Path, how: str) -> None:
    """Damage a file in one of the ways that happen to files."""
    data = bytearray(path.read_bytes())
    match how:
        case "F42":  # the length of the header
            data[:8] = (2**40).to_bytes(8, "little")
        case "F43":  # one bit
            data[len(data) // 2] ^= 4
        case "F42cut":
            data = data[:-100]
        case "zero":
            data = b""
    path.write_bytes(data)
    if how == "F59":
        path.unlink()


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json", "resume_state.json"])
@pytest.mark.parametrize("how", ["F42", "F43", "F42cut", "zero", "F59"])
def test_damage_is_found_and_the_checkpoint_before_is_taken(run, file, how, caplog):
    path = run / "checkpoint-6" / file
    damage(path, how)
    with pytest.raises(CheckpointCorruptError, match=file):
        verify_checkpoint(run / "checkpoint-6")
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(run) == run / "checkpoint-4"
    assert file in caplog.text
    assert (run / "checkpoint-6.broken").is_dir()
    assert names(run) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": {"model.safetensors": 3}}', '{"format": 1}'])
def test_a_manifest_that_cannot_be_read_is_a_broken_checkpoint(run, text):
    (run / "checkpoint-6" / "manifest.json").write_text(text)
    assert newest_checkpoint(run) == run / "checkpoint-4"


def test_f57_a_folder_without_manifest_was_not_finished(run):
    for step in (4, 6):
        (run / f"checkpoint-{step}" / "manifest.json").unlink()
    assert newest_checkpoint(run) == run / "checkpoint-2"
    assert {path.name for path in run.glob("*.broken")} == {"checkpoint-4.broken", "checkpoint-6.broken"}


def test_f59_a_checkpoint_saved_without_optimizer_is_not_resumed_and_not_called_broken(run):
    without = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    trained(run.parent / "new", **without)
    for resume in (str(run.parent / "new" / "checkpoint-1"), True, "last"):
        with pytest.raises(CheckpointIncompleteError, match=r"has no optimizer\.pt.*save_only_model"):
            trained(run.parent / "new", resume=resume)
    shutil.copytree(run.parent / "new" / "checkpoint-1", run / "checkpoint-7")
    assert newest_checkpoint(run) == run / "checkpoint-6"  # an older checkpoint that is complete
    assert names(run)[-1] == "checkpoint-7"


def test_no_checkpoint_at_all(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    trainer = trained(tmp_path, max_steps=1, resume="last")
    assert trainer.state.global_step == 1
    with pytest.raises(CheckpointCorruptError, match="checkpoint-9"):
        trained(tmp_path, resume=str(tmp_path / "checkpoint-9"))


def test_a_named_checkpoint_that_is_broken_is_refused_and_left_where_it_is(run):
    damage(run / "checkpoint-4" / "model.safetensors", "F43")
    with pytest.raises(CheckpointCorruptError, match=r"checkpoint-4/model\.safetensors.*sha256"):
        trained(run, resume=str(run / "checkpoint-4"), **SAVING)
    assert names(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_a_run_resumed_after_damage_ends_like_the_unbroken_one(run, saved):
    damage(run / "checkpoint-6" / "optimizer.pt", "F43")
    damage(run / "checkpoint-4" / "model.safetensors", "zero")
    trainer = trained(run, resume="last", **SAVING)
    assert trainer.state.global_step == 6
    assert same_state(checkpoint_state(run / "checkpoint-6"), checkpoint_state(saved / "checkpoint-6"))
    assert names(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_weights_of_another_model_are_not_loaded_by_halves(run):
    with pytest.raises((CheckpointError, RuntimeError), match="ibot_head"):
        trained(run, resume=str(run / "checkpoint-6"), options={"ibot_head": HeadShape(12, 10, 6)})


def test_weights_of_other_sizes_are_refused_in_one_line(run):
    with pytest.raises(
        CheckpointError, match=r"another model: size mismatch for \S+: .* Resume with the recipe"
    ) as error:
        trained(run, resume=str(run / "checkpoint-6"), options={"dino_head": HeadShape(24, 10, 6)})
    assert "\n" not in str(error.value)


def test_what_is_no_checkpoint_is_not_called_a_broken_one(run, tmp_path):
    with pytest.raises(CheckpointCorruptError, match=r"The folder '.*nowhere' does not exist\..* 'last'"):
        trained(tmp_path, resume=str(tmp_path / "nowhere"))
    with pytest.raises(
        CheckpointCorruptError, match=r"is a run folder, not a checkpoint\. .* checkpoint-6\. Pass one"
    ):
        trained(tmp_path, resume=str(run))


# ---- Rotation ----


def test_rotation_keeps_the_newest_and_what_it_is_told_to(run):
    rotate_checkpoints(run, None)
    rotate_checkpoints(run, 5)
    assert len(names(run)) == 3
    rotate_checkpoints(run, 1, keep=[run / "checkpoint-2"])
    assert names(run) == ["checkpoint-2", "checkpoint-6"]


def test_save_total_limit(tmp_path):
    trained(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2)
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-6"]


def test_rotation_never_deletes_the_checkpoint_just_written(run):
    """Resume at step 2 while checkpoints of later steps exist."""
    for step in (4, 6):
        (run / f"checkpoint-{step}").rename(run / f"checkpoint-{step + 10}")
    trained(
        run, resume=str(run / "checkpoint-2"), max_steps=3, save_strategy="steps", save_steps=3, save_total_limit=1
    )
    assert names(run) == ["checkpoint-3", "checkpoint-16"]


# ---- Writing fails ----


@pytest.mark.parametrize("what", ["torch.save", "safetensors.torch.save_file", "os.fsync"])
def test_f58_disk_full_while_saving(tmp_path, monkeypatch, caplog, what):
    """The second of three checkpoints cannot be written: it is removed, the run continues, the others are intact."""

    class DiskFull(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                monkeypatch.setattr(what, Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
            if state.global_step == 4:
                monkeypatch.undo()

    trainer = trained(tmp_path, callbacks=[DiskFull()], **SAVING)
    assert trainer.state.global_step == 6
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-6"]
    assert not (tmp_path / STAGING).exists()
    assert "ALARM: The checkpoint of step 4" in caplog.text
    assert "No space left" in caplog.text
    assert [entry.get("failed_checkpoints") for entry in trainer.state.log_history if "loss" in entry] == [
        None,
        None,
        1,
    ]
    verify_checkpoint(tmp_path / "checkpoint-6")


def test_f58_space_is_checked_before_writing(tmp_path, monkeypatch, caplog):
    usage = shutil.disk_usage(tmp_path)

    class OthersFillTheDisk(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))

    trainer = trained(tmp_path, callbacks=[OthersFillTheDisk()], **SAVING)
    assert trainer.state.global_step == 6
    assert names(tmp_path) == []
    assert re.search(r"needs about \d\.\d MiB, but only \S+ KiB are free", caplog.text)


def test_f58_space_is_checked_before_the_first_step(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    cases = ((2**21, "steps", r"2\.0 MiB"), (2**19, "no", r"512\.0 KiB"))  # enough for the result alone; for nothing
    for free, strategy, left in cases:
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        with pytest.raises(NoSpaceError, match=rf"needs about \d\.\d MiB, but only {left} are free"):
            trained(tmp_path, **SAVING | {"save_strategy": strategy})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**21))
    assert trained(tmp_path, save_strategy="no").state.global_step == 6


def test_f58_the_system_refuses_to_write_a_file(tmp_path, caplog):
    """Files cannot grow beyond 16 KiB, so torch.save and safetensors meet a real error instead of a simulated one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class SmallFiles(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**14 if state.global_step == 3 else limits[0], limits[1]))

    try:
        trainer = trained(tmp_path, callbacks=[SmallFiles()], **SAVING)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert trainer.failed_saves == 1
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-6"]
    assert not (tmp_path / STAGING).exists()


def test_an_error_that_is_not_the_disks_is_not_swallowed(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", Mock(side_effect=RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        trained(tmp_path, **SAVING)


def test_what_a_killed_run_left_is_cleared_away(run):
    (run / STAGING / "checkpoint-8").mkdir(parents=True)
    (run / STAGING / "checkpoint-8" / "model.safetensors").write_bytes(b"half")
    trained(run, resume="last", **SAVING)
    assert not (run / STAGING).exists()


def test_a_new_run_does_not_mix_its_checkpoints_with_those_of_an_earlier_one(run):
    before = names(run)
    with pytest.raises(FileExistsError, match=r"holds checkpoint-6 of an earlier run.*--resume_from_checkpoint last"):
        trained(run, max_steps=1)
    assert names(run) == before


# ---- Signals ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_f60_a_signal_saves_stops_and_the_run_resumes_exactly(tmp_path, saved, number):

    before = signal.getsignal(number)
    with pytest.raises(TrainingInterrupted, match=rf"{number.name} after step 3 of 6") as stop:
        trained(tmp_path, callbacks=[SignalAt(2, number)], **SAVING)
    assert stop.value.code == REQUEUE_EXIT_CODE == 85
    assert signal.getsignal(number) == before
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    trained(tmp_path, resume="last", **SAVING)
    assert same_state(checkpoint_state(tmp_path / "checkpoint-6"), checkpoint_state(saved / "checkpoint-6"))


def test_f60_a_signal_in_the_last_step_changes_nothing(tmp_path):

    assert trained(tmp_path, callbacks=[SignalAt(5)]).state.global_step == 6


def test_f60_a_run_that_is_through_and_is_queued_again_makes_no_further_step(run, saved, caplog):
    with caplog.at_level("INFO", logger="hf_regvit"):
        trainer = trained(run, resume="last", **SAVING)
    assert "6 of 6 steps are done. There is nothing left to train." in caplog.text
    assert trainer.state.global_step == 6
    assert names(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert same_state(trainer.model.state_dict(), load_file(saved / "checkpoint-6" / "model.safetensors"))


# ---- Other batches, recipes and data ----


def test_f62_another_batch_is_refused_unless_allowed(run):
    with pytest.raises(ValueError, match=r"images_per_step is 2.* written with 3.*--allow_batch_change"):
        trained(run, resume=str(run / "checkpoint-4"), per_device_train_batch_size=2)
    rest = Crops()
    trainer = trained(
        run,
        resume=str(run / "checkpoint-2"),
        dataset=rest,
        per_device_train_batch_size=2,
        allow_batch_change=True,
        max_steps=9,
    )
    # 2 steps of 3 images were used; the rest of the epoch follows, and then complete epochs in other orders.
    first = Crops()
    trained(run / "first", dataset=first, max_steps=2)
    assert trainer.state.global_step == 9
    assert {epoch for epoch, _ in rest.seen[:4]} == {0}
    assert not {index for _, index in rest.seen[:4]} & {index for _, index in first.seen[:6]}
    assert [epoch for epoch, _ in rest.seen[4:14]] == [1] * 10
    assert trainer.state.epoch == pytest.approx(2.0)


def test_f62_the_same_step_in_other_pieces_is_the_same_run(tmp_path):
    """One micro-batch of 4, or two of 2: the same images in every step, also after a resume from one to the other."""
    whole, pieces, switched = Crops(11), Crops(11), Crops(11)
    trained(tmp_path / "a", dataset=whole, per_device_train_batch_size=4, **SAVING)
    trained(tmp_path / "b", dataset=pieces, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert whole.seen == pieces.seen
    assert len(whole.seen) == 24
    trained(
        tmp_path / "a", dataset=switched, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        resume=str(tmp_path / "a" / "checkpoint-4"),
    )  # fmt: skip
    assert whole.seen[16:] == switched.seen


def test_f63_what_changed_in_the_recipe_is_said(run, caplog):
    with caplog.at_level(logging.WARNING):
        trained(run, resume=str(run / "checkpoint-4"), weight_decay=0.05)
    changes = [text.partition(": ")[2] for text in caplog.messages if text.startswith("Changed since the checkpoint")]
    assert changes == [
        "save_steps is the default, was 2.",
        "save_strategy is no, was the default.",
        "weight_decay is 0.05, was 0.04.",
    ]


def test_f63_other_data_is_refused_unless_allowed(run):
    with pytest.raises(ValueError, match=r"'images': 12.*'images': 10.*--allow_data_change"):
        trained(run, resume=str(run / "checkpoint-4"), dataset=Crops(12))
    trained(run, resume=str(run / "checkpoint-4"), dataset=Crops(12), allow_data_change=True)


def test_f63_the_names_of_the_images_count(tmp_path):
    from types import SimpleNamespace

    first, second = Crops(), Crops()
    first.source = SimpleNamespace(ids=[f"{i}.jpg" for i in range(10)])
    second.source = SimpleNamespace(ids=[f"{i}.jpg" for i in (1, 0, *range(2, 10))])
    trained(tmp_path, dataset=first, **SAVING)
    trained(tmp_path, dataset=first, resume="last", **SAVING)
    with pytest.raises(ValueError, match="names_sha256"):
        trained(tmp_path, dataset=second, resume="last", **SAVING)


# ---- Workers ----


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_f64_workers_are_started_again_once(tmp_path, saved, caplog, how):
    fault = WorkerFault(tmp_path / "marks", how, 1, at=1, worker=1)
    options = {"dataloader_num_workers": 2, "dataloader_timeout": 4, **SAVING}
    trained(tmp_path / "run", dataset=Crops(before=fault), **options)
    assert "Restarting the workers. One of these images was being read:" in caplog.text
    assert same_state(checkpoint_state(tmp_path / "run" / "checkpoint-6"), checkpoint_state(saved / "checkpoint-6"))


@pytest.mark.slow
def test_f64_workers_that_fail_twice_end_the_run_and_the_images_are_named(tmp_path):
    fault = WorkerFault(tmp_path / "marks", "dies", 2, at=1, worker=1)
    with pytest.raises(RuntimeError, match="DataLoader") as failure:
        trained(tmp_path / "run", dataset=Crops(before=fault), dataloader_num_workers=2)
    assert "One of these images was being read" in "".join(failure.value.__notes__)


@pytest.fixture
def deaths():
    """`WorkerDeaths` around a handler that reports every death once, as the handler of torch does."""
    news = [RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")]

    def torchs_handler(number, frame):
        if news:
            raise news.pop()

    before = signal.signal(signal.SIGCHLD, torchs_handler)
    deaths = WorkerDeaths()
    yield deaths
    deaths.stop()
    signal.signal(signal.SIGCHLD, before)


def test_f64_a_connection_that_breaks_is_a_dead_worker(deaths):
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGCHLD)).start()
    with pytest.raises(RuntimeError, match="pid 1") as failure, deaths.waiting():
        ours.recv()
    assert isinstance(failure.value.__cause__, EOFError)
    with deaths.waiting():  # the connection and the signal report the same death
        pass
    with pytest.raises(FileNotFoundError), deaths.waiting():  # an error of the dataset itself
        Path("no such picture").stat()


def test_f64_a_death_during_a_step_is_told_when_the_next_batch_is_waited_for(deaths):
    with deaths.waiting():
        pass
    os.kill(os.getpid(), signal.SIGCHLD)
    with pytest.raises(RuntimeError, match="pid 1"), deaths.waiting():
        raise AssertionError("a dead worker gives no batch")
    with deaths.waiting():
        pass


def test_manifest_covers_folders_inside(tmp_path):
    """Sharded state dicts are folders."""
    (tmp_path / "optimizer_0").mkdir()
    (tmp_path / "optimizer_0" / "part").write_bytes(b"abc")
    for name in ("model.safetensors", "trainer_state.json"):
        (tmp_path / name).write_text("{}")
    write_manifest(tmp_path)
    verify_checkpoint(tmp_path)
    (tmp_path / "optimizer_0" / "part").write_bytes(b"abd")
    with pytest.raises(CheckpointCorruptError, match="optimizer_0/part"):
        verify_checkpoint(tmp_path)


def test_arguments_refuse_batches_that_are_split_or_sent_around(tmp_path):
    for name in ("split_batches", "dispatch_batches"):
        with pytest.raises(ValueError, match=name):
            arguments(tmp_path, accelerator_config={name: True})
    assert arguments(tmp_path).accelerator_config.dispatch_batches is False


@pytest.mark.parametrize("images_per_step", [1, 3, 4])
@pytest.mark.parametrize("num_images", [4, 10, 12])
def test_positions_equal_a_loop(num_images, images_per_step):
    """A sampler that starts at any step yields the rest of the order, epoch after epoch."""

    def order(start, epochs):
        sampler = EpochSampler(num_images, seed=1, images_per_step=images_per_step)
        sampler.start_at(*start)
        keys = []
        for epoch in range(start[0], epochs):
            sampler.set_epoch(epoch)
            keys += list(sampler)
        return sampler, keys

    sampler, whole = order((0, 0), 4)
    assert len(whole) == 4 * (num_images // images_per_step) * images_per_step
    for steps in range(3 * len(sampler) // images_per_step):
        again, rest = order(sampler.position(steps), 4)
        assert rest == whole[steps * images_per_step :]
        rest = order(again.position(1), 4)[1]
        assert rest == whole[(steps + 1) * images_per_step :]


def test_processes_share_every_batch_of_one_process():
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    one = list(BatchSampler(EpochSampler(23, seed=0, images_per_step=6), 6, drop_last=True))
    shares = [
        list(BatchSamplerShard(BatchSampler(EpochSampler(23, seed=0, images_per_step=6), 2, True), 3, rank))
        for rank in range(3)
    ]
    assert [a + b + c for a, b, c in zip(*shares, strict=True)] == one
    assert len(one) == 3
