"""Fine-tuning on two processes with batch 4 against one with batch 8: weights, metrics, best model, stopping."""

import pytest
import torch
import two_finetuning_processes
from processes import Runs, start

from builders import WreckFrom
from tiny_dense import write_parquet
from tiny_finetune import backbone
from tiny_run import same_state

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Results of one process with the doubled batch, and `run(name)`: those of both processes."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finetuning")
    outcome = two_finetuning_processes.outcome
    one = {
        "full": outcome(folder / "one"),
        "lora": outcome(folder / "one_lora", mode="lora"),
        "linear": outcome(folder / "one_linear", mode="linear"),
        "registers": outcome(
            folder / "one_registers", mode="linear", model=backbone(num_register_tokens=0), num_register_tokens=2
        ),
        "best": outcome(folder / "one_best", callbacks=[WreckFrom(3)], max_grad_norm=1e9),
    }
    write_parquet(folder / "semantic-segmentation", "mask")
    write_parquet(folder / "depth-estimation", "depth")
    dense = two_finetuning_processes.dense
    one["masks"] = dense(folder / "one_masks", "semantic-segmentation")
    one["depth"] = dense(folder / "one_depth", "depth-estimation")
    start(two_finetuning_processes.scenarios, folder)

    return Runs(folder, one)


@pytest.mark.parametrize("name", ["full", "lora", "registers"])
def test_two_processes_of_four_equal_one_of_eight(run, name):
    one = run.one[name]
    for result in run(name):
        assert result["state"].keys() == one["state"].keys()
        for key, value in result["state"].items():
            torch.testing.assert_close(value, one["state"][key], atol=1e-5, rtol=0, msg=key)
    assert same_state(*(result["state"] for result in run(name)))
    start = backbone(num_register_tokens=0).state_dict()
    moved = not torch.equal(one["state"]["classifier.weight"], torch.zeros_like(one["state"]["classifier.weight"]))
    if name == "full":
        moved = not torch.equal(one["state"]["regvit.layernorm.weight"], start["layernorm.weight"])
    assert moved  # the runs are not equal because nothing happened


@pytest.mark.parametrize("name", ["full", "lora"])
def test_every_validation_image_counts_once(run, name):
    """Ten images on two processes with batch 4: accelerate repeats six of them to fill the batches."""
    for result in run(name):
        for metrics, expected in zip(result["metrics"], run.one[name]["metrics"], strict=True):
            assert {k: v for k, v in metrics.items() if k != "eval_loss"} == pytest.approx(
                {k: v for k, v in expected.items() if k != "eval_loss"}, abs=1e-9
            )


def test_both_processes_return_the_best_checkpoint(run):
    first, second = run("best")
    assert same_state(first["state"], second["state"])
    for key, value in first["state"].items():
        torch.testing.assert_close(value, run.one["best"]["state"][key], atol=1e-5, rtol=0, msg=key)


def test_f60_a_signal_to_one_process_stops_both_and_the_run_goes_on_exactly(run):
    for result, unbroken in zip(run("signal"), run("full"), strict=True):
        assert "stopped by SIGTERM after step 2 of 6" in result["message"]
        assert same_state(result["resumed"]["state"], unbroken["state"])


@pytest.mark.parametrize("mode", ["full", "lora", "linear"])
def test_sharded_processes_equal_one(run, mode):
    for result in run("fsdp"):
        for key, value in result[mode]["state"].items():
            torch.testing.assert_close(value, run.one[mode]["state"][key], atol=1e-5, rtol=0, msg=key)


def test_a_sharded_run_goes_on_exactly(run):
    for result in run("fsdp"):
        assert same_state(result["resumed"]["state"], result["full"]["state"])


@pytest.mark.parametrize("name", ["masks", "depth"])
def test_two_dense_processes_equal_one(run, name):
    """With the statistics of the batch norm, which counts the pictures of both processes, and with the metrics."""
    one = run.one[name]
    for result in run(name):
        assert result["state"].keys() == one["state"].keys()
        for key, value in result["state"].items():
            torch.testing.assert_close(value, one["state"][key], atol=1e-5, rtol=0, msg=key)
        assert [list(m.values()) for m in result["metrics"]] == [
            pytest.approx(list(m.values()), abs=1e-4) for m in one["metrics"]
        ]
    assert same_state(*(result["state"] for result in run(name)))
    for result in run("fsdp_dense"):
        assert result[name]["state"].keys() == one["state"].keys()
        for key, value in result[name]["state"].items():
            torch.testing.assert_close(value, one["state"][key], atol=1e-5, rtol=0, msg=key)
    if name == "masks":
        assert one["state"]["head_norm.num_batches_tracked"] == 6
        assert one["state"]["head_norm.running_mean"].abs().max() > 0.01
