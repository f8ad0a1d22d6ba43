"""Hostile files in a checkpoint that a run resumes from; its manifest is correct, as an attacker would write it."""

import json
import os
import pickle
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_finetune
import tiny_run
from hf_regvit import CheckpointCorruptError, CheckpointError
from hf_regvit.models.manifest import write_manifest
from hf_regvit.pretraining.run import pretrain

pytestmark = pytest.mark.attacks
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


class RunsCode:
    """Object whose pickle would create a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def pretraining(folder, **options):
    return pretrain(tiny_run.arguments(folder, **SAVING, **options), train_dataset=tiny_run.Crops())


def finetuning(folder, **options):
    return tiny_finetune.run(folder, eval_strategy="steps", eval_steps=2, **SAVING, **options)


RUNS = {"pretrain": pretraining, "finetune": finetuning}


@pytest.fixture(scope="module", params=RUNS)
def resumed(request, tmp_path_factory):
    """A finished run, and a function that changes its first checkpoint and resumes from it in another folder."""
    top = tmp_path_factory.mktemp(request.param)
    run = RUNS[request.param]
    run(top / "whole")

    def resume(folder, change):
        checkpoint = shutil.copytree(top / "whole" / "checkpoint-2", folder / "from" / "checkpoint-2")
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        state["best_model_checkpoint"] = None  # it is in the other folder
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
        change(checkpoint)
        write_manifest(checkpoint)
        return run(folder / "to", resume_from_checkpoint=str(checkpoint))

    return resume


def pickled(how, name, checkpoint):
    value, file = {"a": RunsCode(checkpoint.parent / "ran")}, checkpoint / name
    if how == "pickle":
        file.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, file, _use_new_zipfile_serialization=how == "torch")


STATES = ["optimizer.pt", "scheduler.pt", "rng_state.pth"]


@pytest.mark.parametrize("how", ["pickle", "torch", "old torch"])
@pytest.mark.parametrize("name", [*STATES, "training_args.bin"])
def test_a_resumed_run_executes_no_code(name, how, resumed, tmp_path):
    change = partial(pickled, how, name)
    if name == "training_args.bin":
        resumed(tmp_path, change)  # it is not read
    else:
        with pytest.raises(CheckpointCorruptError, match=name) as caught:
            resumed(tmp_path, change)
        assert "Resume from another checkpoint" in str(caught.value)
        assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "from" / "ran").exists()


def damaged(name, content, checkpoint):
    if isinstance(content, bytes):
        (checkpoint / name).write_bytes(content)
    else:
        torch.save(content, checkpoint / name)


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x80\x04", {}, [1], {"state": 3}, torch.zeros(3)], ids=repr)
@pytest.mark.parametrize("name", STATES)
def test_damaged_states_are_refused_by_name(name, content, resumed, tmp_path):
    with pytest.raises(CheckpointCorruptError, match=r"from.checkpoint-2") as caught:
        resumed(tmp_path, partial(damaged, name, content))
    assert name in str(caught.value) or not isinstance(content, bytes)


def changed_json(name, change, checkpoint):
    file = checkpoint / name
    if isinstance(change, str):
        file.write_text(change)
    else:
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | change))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *(("trainer_state.json", text) for text in ("[", "[]", "3", "[" * 100_000)),
        *(("resume_state.json", text) for text in ("[", "[]", "3", "[" * 100_000)),
        ("trainer_state.json", {"unknown": 1}), ("trainer_state.json", {"best_model_checkpoint": 3}),
        ("trainer_state.json", {"best_model_checkpoint": "/"}),
        ("trainer_state.json", {"best_model_checkpoint": "../elsewhere/checkpoint-2"}),
        ("resume_state.json", {"recipe": []}), ("resume_state.json", {"position": 3}),
        ("resume_state.json", {"position": ["a", "b"]}), ("resume_state.json", {"seconds": "x"}),
        ("resume_state.json", {"packages": 3}),
    ],
)  # fmt: skip
def test_hostile_states_are_refused_before_the_first_step(name, change, resumed, tmp_path):
    with pytest.raises((CheckpointError, ValueError)) as caught:
        resumed(tmp_path, partial(changed_json, name, change))
    assert "checkpoint-2" in str(caught.value)


def test_weights_of_another_type_are_refused(resumed, tmp_path):
    def change(checkpoint):
        path = checkpoint / "model.safetensors"
        tensors = load_file(path)
        save_file({name: tensor.view(torch.int32) for name, tensor in tensors.items()}, path, {"format": "pt"})

    with pytest.raises(CheckpointCorruptError, match=r"model\.safetensors"):
        resumed(tmp_path, change)


def test_a_sharded_checkpoint_of_another_run_is_refused(resumed, tmp_path):
    """Torch reads the names of its tensors with a plain `pickle.load`."""

    def change(checkpoint):
        (checkpoint / "pytorch_model_fsdp_0").mkdir()
        pickled("pickle", "pytorch_model_fsdp_0/.metadata", checkpoint)

    with pytest.raises(CheckpointError, match="is sharded"):
        resumed(tmp_path, change)
    assert not list(tmp_path.rglob("ran"))
