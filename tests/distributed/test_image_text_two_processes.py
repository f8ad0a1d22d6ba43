"""Contrastive losses and whole runs on two processes with batch 4 against one with batch 8."""

import pytest
import torch
import two_image_text_processes
from processes import Runs, start

from tiny_image_text import captioned_folder, tower
from tiny_run import same_state

pytestmark = pytest.mark.slow
LOSSES = two_image_text_processes.LOSSES


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("image_text")
    captioned_folder(folder / "data")
    tower(folder / "tower")
    one = {loss: two_image_text_processes.outcome(folder / f"one_{loss}", loss=loss) for loss in LOSSES}
    start(two_image_text_processes.scenarios, folder)
    return Runs(folder, one)


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradients_of_two_processes_are_those_of_the_whole_batch(run, loss):
    """DDP averages gradients of parameters; those of rows reach the parameters of their own process alone."""
    first, second = run(f"gradients_{loss}")
    whole = two_image_text_processes.loss_and_gradients(loss)
    assert (first["loss"] + second["loss"]) / 2 == pytest.approx(whole["loss"], rel=1e-12)
    for name in ("images", "texts"):
        rows = torch.cat([first[name], second[name]]) / 2
        torch.testing.assert_close(rows, whole[name], atol=1e-12, rtol=0)
    for name in ("scale", "bias") if loss == "sigmoid" else ("scale",):
        torch.testing.assert_close((first[name] + second[name]) / 2, whole[name], atol=1e-12, rtol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_of_four_equal_one_of_eight(run, loss):
    for result in run(loss):
        for key, value in run.one[loss].items():
            torch.testing.assert_close(result[key], value, atol=1e-5, rtol=0, msg=key)
    assert same_state(*run(loss))
    assert not torch.equal(*(run.one[loss]["visual_projection.weight"] for loss in LOSSES))


def test_an_interrupted_run_goes_on_exactly(run):
    for result, unbroken in zip(run("resumed"), run("softmax"), strict=True):
        assert same_state(result, unbroken)
