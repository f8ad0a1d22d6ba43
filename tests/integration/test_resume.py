"""Runs in separate processes that are stopped in many ways and resumed, compared with an uninterrupted run."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_regvit.models.manifest import verify_checkpoint
from hf_regvit.pretraining.arguments import PretrainingArguments
from hf_regvit.pretraining.run import pretrain
from hf_regvit.training.checkpoints import STAGING, list_checkpoints
from tiny_run import checkpoint_state, same_state

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_figures")]

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "run_dino_pretraining.py"
# Built-in digits through the real augmentation: 1,797 images, so an epoch is 18 steps of 96.
RECIPE = {
    "data": "digits", "preset": "tiny", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "patch_size": 8, "global_crop_size": 24, "local_crop_size": 16, "num_local_crops": 1, "drop_path_rate": 0.3,
    "head_num_prototypes": 12, "head_hidden_size": 10, "head_bottleneck_size": 6, "learning_rate_reference_batch": 0,
    "learning_rate": 2e-3, "per_device_train_batch_size": 96, "max_steps": 20, "logging_steps": 5,
    "save_strategy": "steps", "save_steps": 7, "use_cpu": True, "disable_tqdm": True, "seed": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """A run of 20 steps with checkpoints of the steps 7, 14 and 20; 18 is the end of the first epoch."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("unbroken")
    pretrain(PretrainingArguments(output_dir=str(folder), **RECIPE))
    return folder


def start(folder: Path, *, launcher: tuple[str, ...] = (), code: str | None = None, **overrides) -> subprocess.Popen:
    """Run the script in a separate process; `code` runs in it before the script."""
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(RECIPE | overrides))
    arguments = [str(SCRIPT), "--config", str(recipe), "--output_dir", str(folder)]
    if code is not None:
        hook = folder.with_suffix(".py")
        run = "import runpy, sys\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
        hook.write_text(f"{code}\n{run}")
        arguments = [str(hook), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *launcher, *arguments], env=environment, **streams)


@pytest.mark.parametrize(("step", "workers"), [(7, 0), (7, 2), (14, 2)])
def test_resumed_run_equals_the_unbroken_one(unbroken, tmp_path, step, workers):
    args = PretrainingArguments(
        output_dir=str(tmp_path),
        resume_from_checkpoint=str(unbroken / f"checkpoint-{step}"),
        dataloader_num_workers=workers,
        **RECIPE,
    )
    pretrain(args)
    assert same_state(checkpoint_state(tmp_path / "checkpoint-20"), checkpoint_state(unbroken / "checkpoint-20"))
    exported = [load_file(folder / "backbone" / "model.safetensors") for folder in (tmp_path, unbroken)]
    assert all(torch.equal(exported[0][name], tensor) for name, tensor in exported[1].items())


KILL_WHILE_SAVING = """
import os, signal, torch
save = torch.save
def killed(value, path, *args, **kwargs):
    if "checkpoint-14" in str(path) and str(path).endswith("optimizer.pt"):
        with open(path, "wb") as file:
            file.write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return save(value, path, *args, **kwargs)
torch.save = killed
"""


def test_f57_killed_while_saving(unbroken, tmp_path, caplog):
    folder = tmp_path / "run"
    process = start(folder, code=KILL_WHILE_SAVING)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, output
    assert (folder / STAGING / "checkpoint-14" / "model.safetensors").is_file()
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-7"]
    with caplog.at_level(logging.INFO):
        pretrain(PretrainingArguments(output_dir=str(folder), resume_from_checkpoint="last", **RECIPE))
    assert f"Resuming from {folder / 'checkpoint-7'}" in caplog.text
    assert not (folder / STAGING).exists()
    assert same_state(checkpoint_state(folder / "checkpoint-20"), checkpoint_state(unbroken / "checkpoint-20"))


def test_f60_sigterm_saves_and_asks_to_be_queued_again(unbroken, tmp_path):
    folder = tmp_path / "run"
    process = start(folder, logging_steps=1, dataloader_num_workers=2)
    deadline = time.monotonic() + 240
    while not (folder / "metrics.jsonl").is_file() or len((folder / "metrics.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 85, output
    assert "SIGTERM after step" in output
    (checkpoint,) = list_checkpoints(folder)[-1:]
    verify_checkpoint(checkpoint)
    assert int(checkpoint.name.split("-")[1]) < 20
    assert not (folder / "backbone").exists()
    pretrain(PretrainingArguments(output_dir=str(folder), resume_from_checkpoint="last", **RECIPE))
    assert same_state(checkpoint_state(folder / "checkpoint-20"), checkpoint_state(unbroken / "checkpoint-20"))


KILL_ONE_PROCESS = """
import os, signal
from pathlib import Path
from hf_regvit.pretraining.distillation import SelfDistillation
begin, mark = SelfDistillation.begin_step, Path(os.environ["MARK"])
steps = []
def killed(self, temperature):
    steps.append(temperature)
    if os.environ["RANK"] == "1" and len(steps) == 5 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    begin(self, temperature)
SelfDistillation.begin_step = killed
"""


def test_f61_a_killed_process_is_named_and_the_run_starts_again_from_its_checkpoint(tmp_path, monkeypatch):
    """Recovery with `torchrun --max-restarts` and `resume_from_checkpoint: last`."""
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    # torch 2.15: gloo finds addresses of dead processes in the store of the launcher and cannot connect.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    folder, launcher = tmp_path / "run", ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    fields = {"per_device_train_batch_size": 48, "max_steps": 8, "save_steps": 3, "resume_from_checkpoint": "last"}
    began = time.monotonic()
    process = start(folder, launcher=(*launcher, "--max_restarts=1"), code=KILL_ONE_PROCESS, **fields)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output[-3000:]
    assert time.monotonic() - began < 400
    assert "Signal 9 (SIGKILL)" in output or "exitcode: -9" in output
    assert "local_rank: 1" in output
    assert "checkpoint-3" in output
    verify_checkpoint(folder / "checkpoint-8")
    assert (folder / "backbone" / "model.safetensors").is_file()
