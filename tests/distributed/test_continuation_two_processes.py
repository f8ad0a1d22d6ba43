"""Two processes that continue a model against one: every mode, with DDP and FSDP2, uninterrupted and resumed."""

import pytest
import torch
import two_continued_processes
from processes import Runs, start
from safetensors.torch import load_file
from two_continued_processes import MODES, outcome
from two_processes import PER_PROCESS

from tiny_run import same_state

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Results of one process with the doubled batch, and `run(name)`: those of both processes."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("continued")
    one = {mode: outcome(folder / f"one_{mode}", mode, per_device_train_batch_size=2 * PER_PROCESS) for mode in MODES}
    start(two_continued_processes.scenarios, folder)
    return Runs(folder, one)


@pytest.mark.parametrize("kind", ["", "_sharded", "_sharded_from_ddp"])
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_equal_one_with_the_doubled_batch(run, mode, kind):
    one = run.one[mode]["teacher"]
    for result in run(f"{mode}{kind}"):
        torch.testing.assert_close(result["teacher"], one, atol=1e-5, rtol=0)
    assert same_state(*(result["teacher"] for result in run(f"{mode}{kind}")))
    torch.manual_seed(0)
    start_of_all = two_continued_processes.RegViTModel(two_continued_processes.tiny_config()).state_dict()
    moved = {name for name, tensor in one.items() if (tensor - start_of_all[name]).abs().max() > 1e-4}
    assert ("layers.0.attention.qkv.weight" in moved) == (mode != "last_blocks")
    assert ("layers.1.mlp.fc1.weight" in moved) == (mode != "lora")


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_of_two_processes_equals_the_uninterrupted_one(run, mode):
    for whole, resumed in zip(run(mode), run(f"{mode}_resumed"), strict=True):
        assert same_state(whole["teacher"], resumed["teacher"])


def test_sharded_processes_write_the_same_adapter(run):
    whole, sharded = (
        load_file(run.folder / name / "adapter/adapter_model.safetensors") for name in ("lora", "lora_sharded")
    )
    torch.testing.assert_close(whole, sharded, atol=1e-5, rtol=0)
