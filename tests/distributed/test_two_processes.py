"""Two processes over gloo against one: the same steps, whatever the kind of parallelism, and clean stops."""

import json
from pathlib import Path

import pytest
import torch
import two_processes
from processes import Runs, start
from transformers import AutoModel

from hf_regvit.models.manifest import verify_checkpoint
from hf_regvit.training.checkpoints import list_checkpoints
from tiny_run import feature_network, same_state

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Results of one process with the doubled batch, and `run(name)`: those of both processes."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("processes")
    twice = {"per_device_train_batch_size": 2 * two_processes.PER_PROCESS}
    saving = {"save_strategy": "steps", "save_steps": 2}
    one = {
        "softmax": two_processes.outcome(folder / "one", **twice, **saving),
        "sinkhorn": two_processes.outcome(folder / "one_sinkhorn", centering="sinkhorn", **twice),
        "optional": two_processes.outcome(folder / "one_optional", **two_processes.WITH_OPTIONAL, **twice),
        "teacher": two_processes.outcome(folder / "one_teacher", network=feature_network(), **twice),
    }
    start(two_processes.scenarios, folder)

    return Runs(folder, one)


@pytest.mark.parametrize("objective", ["softmax", "sinkhorn", "optional", "teacher"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_equal_one_with_the_doubled_batch(run, kind, objective):
    one = run.one[objective]
    for result in run(f"{kind}_{objective}"):
        torch.testing.assert_close(result["gradients"], one["gradients"], atol=5e-6, rtol=0)
        torch.testing.assert_close(result["state"], one["state"], atol=1e-5, rtol=0)
        assert result["steps"] == 4
    name = "FeatureDistillation" if objective == "teacher" else "SelfDistillation"
    assert result["sharded"] == {"ddp": name, "fsdp": f"FSDP{name}"}[kind]
    for half in ("student", "teacher"):  # the runs are not equal because nothing happened
        assert (one["state"][f"{half}.backbone.layernorm.weight"] - 1).abs().max() > 1e-4


def test_sharding_does_not_change_the_precision_of_bf16(run):
    """Autocast over float32 parameters in both: what differs is the order of sums, not what is rounded to bf16."""
    one = run.one["softmax"]
    for ddp, fsdp in zip(run("ddp_bf16"), run("fsdp_bf16"), strict=True):
        torch.testing.assert_close(fsdp["gradients"], ddp["gradients"], atol=1e-5, rtol=0)
        torch.testing.assert_close(fsdp["state"], ddp["state"], atol=1e-5, rtol=0)
    rounded = max((ddp["gradients"][name] - one["gradients"][name]).abs().max() for name in one["gradients"])
    assert rounded > 1e-3


@pytest.mark.parametrize("name", ["ddp_softmax", "ddp_sinkhorn", "fsdp_softmax", "fsdp_sinkhorn", "unequal_masks"])
def test_both_processes_hold_the_same_bits(run, name):
    first, second = run(name)
    assert same_state(first["state"], second["state"])
    if "sinkhorn" not in name:
        for center in ("dino_center.center", "ibot_center.center"):
            assert torch.isfinite(first["state"][center]).all()
            assert first["state"][center].any()


def test_logs_are_means_over_the_processes(run):
    one, (first, second) = run.one["softmax"], run("ddp_softmax")
    for log, other, expected in zip(first["logs"], second["logs"], one["logs"], strict=True):
        for name in ("loss", "dino_local_loss", "ibot_loss", "teacher_entropy", "grad_norm_backbone"):
            assert log[name] == other[name] == pytest.approx(expected[name], rel=1e-4)


def test_the_images_of_a_step_are_those_of_one_process(run):
    first, second = run("ddp_softmax")
    n = two_processes.PER_PROCESS
    one = run.one["softmax"]["seen"]
    steps = [one[start : start + 2 * n] for start in range(0, 4 * 2 * n, 2 * n)]
    shares = [[seen[start : start + n] for start in range(0, 4 * n, n)] for seen in (first["seen"], second["seen"])]
    assert [a + b for a, b in zip(*shares, strict=True)] == steps


@pytest.mark.parametrize("name", ["accumulated", "fsdp_accumulated"])
def test_accumulated_sinkhorn_targets_equal_those_of_one_big_batch(run, name):
    one = run.one["sinkhorn"]
    for result in run(name):
        torch.testing.assert_close(result["gradients"], one["gradients"], atol=5e-6, rtol=0)
        torch.testing.assert_close(result["state"], one["state"], atol=1e-5, rtol=0)


def test_fsdp_resumes_bit_for_bit(run):
    for unbroken, resumed in zip(run("fsdp_softmax"), run("fsdp_resumed"), strict=True):
        assert same_state(unbroken["state"], resumed["state"])


def test_sharded_files_are_verified_and_resume_bit_for_bit(run):
    folder = run.folder / "sharded" / "checkpoint-2"
    verify_checkpoint(folder)
    assert (folder / "pytorch_model_fsdp_0").is_dir()
    for unbroken, resumed in zip(run("sharded_files"), run("sharded_files_resumed"), strict=True):
        assert same_state(unbroken["state"], resumed["state"])


@pytest.mark.parametrize("name", ["fsdp_from_ddp", "ddp_from_fsdp", "from_one_process"])
def test_a_checkpoint_resumes_under_another_kind_of_parallelism(run, name):
    for result in run(name):
        assert result["steps"] == 4
        torch.testing.assert_close(result["state"], run.one["softmax"]["state"], atol=1e-5, rtol=0)


def test_optional_objectives_resume_under_another_kind_of_parallelism(run):
    for result in run("optional_resumed"):
        torch.testing.assert_close(result["state"], run.one["optional"]["state"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["ddp_softmax", "fsdp_softmax"])
def test_f62_from_two_processes_back_to_one(run, name):
    back = two_processes.outcome(
        run.folder / f"back_{name}",
        resume=str(run.folder / name / "checkpoint-2"),
        per_device_train_batch_size=2 * two_processes.PER_PROCESS,
    )
    assert back["seen"] == run.one["softmax"]["seen"][-len(back["seen"]) :]
    torch.testing.assert_close(back["state"], run.one["softmax"]["state"], atol=1e-5, rtol=0)


def test_drop_path_draws_differ_between_processes_and_steps(run):
    first, second = (result["seeds"] for result in run("drop_path"))
    assert len({*first, *second}) == 8
    assert same_state(*(result["state"] for result in run("drop_path")))


def test_f60_a_signal_to_one_process_stops_both_after_the_same_step(run):
    for result in run("signal"):
        assert result["code"] == 85
        assert "stopped by SIGUSR1 after step 3 of 4" in result["message"]
    for resumed, unbroken in zip(run("signal"), run("ddp_softmax"), strict=True):
        assert same_state(resumed["resumed"]["state"], unbroken["state"])


@pytest.mark.parametrize("name", ["disk_full", "disk_full_fsdp"])
def test_f58_one_process_meets_a_full_disk_and_both_go_on(run, name):
    for result in run(name):
        assert (result["steps"], result["failed_saves"]) == (4, 1)
        assert result["checkpoints"] == ["checkpoint-4"]


@pytest.mark.parametrize("name", ["not_finite", "not_finite_fsdp"])
def test_f55_a_nan_in_one_process_stops_both_and_names_it(run, name):
    """The average of the gradients is NaN everywhere; the losses tell where it came from."""
    for result in run(name):
        assert "The loss is nan at step 2 on rank 1" in result["message"]
    (process,) = json.loads((run.folder / name / "nan_batch.json").read_text())["processes"]
    assert process["rank"] == 1
    # Steps of six images, of which the second process has the last three.
    expected = run.one["softmax"]["seen"][15:18]
    (batch,) = process["micro_batches"]
    assert list(zip(batch["epochs"], batch["sample_ids"], strict=True)) == expected


def test_the_monitors_of_a_sharded_run_see_the_whole_teacher(run):
    lines = [json.loads(line) for line in (run.folder / "export" / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "feature_std" in line]
    assert [line["step"] for line in measured] == [0, 1, 2]
    assert measured[0]["teacher_student_distance"] == 0 < measured[2]["teacher_student_distance"]
    assert len(list((run.folder / "export" / "panels").iterdir())) == 3


def test_the_teacher_is_exported_whole(run):
    first, second = run("export")
    assert same_state(first["state"], second["state"])
    loaded = AutoModel.from_pretrained(run.folder / "export" / "backbone")
    assert same_state(loaded.state_dict(), first["state"])
    assert (run.folder / "export" / "training" / "student.safetensors").is_file()


def test_every_checkpoint_left_behind_verifies(run):
    folders = [folder for path in Path(run.folder).iterdir() if path.is_dir() for folder in list_checkpoints(path)]
    assert len(folders) > 8
    for folder in folders:
        if "export" not in str(folder):
            verify_checkpoint(folder)
