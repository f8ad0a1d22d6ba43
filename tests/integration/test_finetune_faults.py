"""Faults of a fine-tuning run: full disks, SIGKILL, failing workers, memory, non-finite numbers."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from transformers import TrainerCallback

from builders import PoisonAt, WorkerFault
from hf_regvit.models.configuration_regvit import CheckpointCorruptError
from hf_regvit.models.manifest import verify_checkpoint
from hf_regvit.models.modeling_regvit import RegViTForImageClassification
from hf_regvit.training.checkpoints import STAGING, list_checkpoints
from hf_regvit.training.finite import NonFiniteError
from hf_regvit.training.samplers import EpochSampler
from tiny_finetune import run, source
from tiny_run import same_state

pytestmark = pytest.mark.usefixtures("without_figures")

EVERY_TWO = {
    "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None,
}  # fmt: skip


class At(TrainerCallback):
    """Run an action at the beginning of a step."""

    def __init__(self, **actions):
        self.actions = {int(name[1:]): action for name, action in actions.items()}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if action := self.actions.get(state.global_step):
            action(model)


def test_f54_a_nan_keeps_the_last_finite_checkpoint_and_names_the_images(tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 5.*picture/\d+, picture/\d+.*Resume from checkpoint-4") as stopped:
        run(tmp_path, callbacks=[PoisonAt(5, "classifier.weight")], **EVERY_TWO)
    (batch,) = json.loads((tmp_path / "nan_batch.json").read_text())["processes"][0]["micro_batches"]
    assert batch["images"] == [f"picture/{index}" for index in batch["sample_ids"]]
    assert len(batch["images"]) == 8
    assert "--learning_rate 0.0015 (now 0.003)" in str(stopped.value)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    verify_checkpoint(tmp_path / "checkpoint-4")
    result, _ = run(tmp_path, resume_from_checkpoint="last", **EVERY_TWO)
    assert all(bool(value.isfinite().all()) for value in result.state_dict().values())
    assert json.loads((tmp_path / "metrics.json").read_text())["steps"] == 6


@pytest.mark.slow
def test_f58_a_full_disk_costs_one_checkpoint_and_no_run(tmp_path, monkeypatch, caplog):
    full = Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    save = torch.save
    patched = At(
        s3=lambda model: monkeypatch.setattr(torch, "save", full),
        s4=lambda model: monkeypatch.setattr(torch, "save", save),
    )
    run(tmp_path, callbacks=[patched], **EVERY_TWO | {"load_best_model_at_end": False})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-6"]
    assert not (tmp_path / STAGING).exists()
    assert "ALARM: The checkpoint of step 4" in caplog.text
    assert RegViTForImageClassification.from_pretrained(tmp_path).config.num_labels == 3


def test_f58_a_best_checkpoint_that_was_never_written_is_told(tmp_path, monkeypatch):
    """With a full disk there is no best checkpoint to load, and the last weights must not take its place."""

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(torch, "save", Mock(side_effect=full))
    with pytest.raises(FileNotFoundError, match=r"The best checkpoint, of step \d, could not be written"):
        run(tmp_path, **EVERY_TWO)
    assert not (tmp_path / "model.safetensors").exists()


def test_f43_a_best_checkpoint_that_changed_on_the_disk_is_not_the_result(tmp_path):
    def damage(model):
        file = tmp_path / "checkpoint-2" / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)

    with pytest.raises(CheckpointCorruptError, match="checkpoint-2"):
        run(tmp_path, callbacks=[At(s5=damage)], **EVERY_TWO, metric_for_best_model="loss", greater_is_better=True)


KILLED = """
    import os, signal, sys
    sys.path[:0] = {paths!r}
    import torch; torch.set_num_threads(1)
    from hf_regvit.training import checkpoints
    from hf_regvit.finetuning.classification import ImageClassification
    from tiny_finetune import run
    write = checkpoints.write_manifest
    def die(folder):  # everything is written except the list that completes a checkpoint
        if str(folder).endswith("checkpoint-4"):
            os.kill(os.getpid(), signal.SIGKILL)
        write(folder)
    checkpoints.write_manifest = die
    run({folder!r}, eval_strategy="no", save_strategy="steps", save_steps=2, drop_path_rate=0.3)
"""


@pytest.mark.slow
def test_f57_killed_while_saving_the_run_goes_on_from_the_checkpoint_before(tmp_path, caplog):
    tests = str(Path(__file__).parents[1])
    code = textwrap.dedent(KILLED.format(paths=[tests], folder=str(tmp_path / "b")))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert (tmp_path / "b" / STAGING / "checkpoint-4" / "model.safetensors").is_file()
    assert [path.name for path in list_checkpoints(tmp_path / "b")] == ["checkpoint-2"]
    options = {"eval_strategy": "no", "save_strategy": "steps", "save_steps": 2, "drop_path_rate": 0.3}
    resumed, _ = run(tmp_path / "b", resume_from_checkpoint="last", **options)
    unbroken, _ = run(tmp_path / "a", **options)
    assert same_state(resumed.state_dict(), unbroken.state_dict())
    assert not (tmp_path / "b" / STAGING).exists()


OFTEN = {"eval_strategy": "no", "save_strategy": "no", "gradient_accumulation_steps": 2, "mixup_alpha": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_f64_workers_are_started_again_once_and_nothing_changes(tmp_path, caplog, how):
    options = OFTEN | {"per_device_train_batch_size": 4}
    unbroken, _ = run(tmp_path / "a", **options)
    train = source(24, before=WorkerFault(tmp_path / "marks", how, 1, at=5))
    result, _ = run(tmp_path / "b", train=train, dataloader_num_workers=1, dataloader_timeout=3, **options)
    assert "Restarting the workers. One of these images was being read: picture/" in caplog.text
    assert same_state(unbroken.state_dict(), result.state_dict())


@pytest.mark.slow
def test_f64_workers_that_fail_twice_end_the_run_and_the_images_are_named(tmp_path):
    train = source(24, before=WorkerFault(tmp_path / "marks", "dies", 2, at=5))
    with pytest.raises(RuntimeError, match="DataLoader") as failure:
        run(tmp_path / "a", train=train, dataloader_num_workers=1, **OFTEN)
    assert "This happened twice. One of these images was being read: " in "".join(failure.value.__notes__)
    assert "picture/5" in "".join(failure.value.__notes__)


def test_the_rest_of_an_epoch_is_what_was_left_of_it():
    whole = EpochSampler(22, seed=3, images_per_step=8, repeats=2)
    epochs = []
    for epoch in range(3):
        whole.set_epoch(epoch)
        epochs.append(list(whole))
    for step in range(6):
        for images in (0, 4):
            rest = whole.after(step, images)
            assert list(rest) == epochs[step // 2][step % 2 * 8 + images :]
            assert len(rest) == len(list(rest))


def test_f66_no_memory_says_what_to_change(tmp_path, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    monkeypatch.setattr(RegViTForImageClassification, "forward", Mock(side_effect=error))
    with pytest.raises(torch.OutOfMemoryError) as stopped:
        run(tmp_path, eval_strategy="no", save_strategy="no", bf16=True)
    message = str(stopped.value)
    assert message.startswith("Out of memory at step 0: this process used ")
    for advice in (
        "--per_device_train_batch_size 4 --gradient_accumulation_steps 2", "checkpointing True", "--mode linear",
    ):  # fmt: skip
        assert advice in message
