"""Two processes that push to a Hub on loopback: one of them asks, every save is one commit, failures are told once."""

import pytest
import two_pushing_processes
from processes import Runs, start
from two_pushing_processes import SECOND_TOKEN

from fake_hub import WRITE_TOKEN, FakeHub
from hf_regvit import RegViTForImageClassification, RegViTModel
from tiny_run import same_state

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The Hub after all runs, and `run(name)`: what both processes gave back."""
    folder = tmp_path_factory.mktemp("pushes")
    with FakeHub() as hub, pytest.MonkeyPatch.context() as patch:
        hub.tokens[SECOND_TOKEN] = "write"  # it could; nothing but the package keeps it from doing so
        hub.fail("someone/broken/commit", 503, times=10**6)
        # Constants of huggingface_hub are read when a process starts; tests are offline otherwise.
        for key, value in (hub.environment(str(folder / "home")) | {"HF_HUB_OFFLINE": "0"}).items():
            patch.setenv(key, value)
        start(two_pushing_processes.scenarios, folder)

    return Runs(folder, hub=hub)


def test_only_the_first_process_asks_the_hub(run):
    assert len(run.hub.asked[WRITE_TOKEN]) > 30
    assert SECOND_TOKEN not in run.hub.asked


@pytest.mark.parametrize("name", ["whole", "sharded"])
def test_every_save_is_one_commit_and_the_last_is_the_teacher(run, name, tmp_path):
    steps = [f"Training in progress, step {step}" for step in (2, 4)]
    assert run.hub.messages(f"someone/{name}") == [*steps, "End of training"]
    for file, content in run.hub.files(f"someone/{name}").items():
        (tmp_path / file).write_bytes(content)
    loaded = RegViTModel.from_pretrained(tmp_path)
    for result in run(name):
        assert same_state(loaded.state_dict(), result["state"])


def test_weights_in_pieces_are_not_pushed_before_the_end_and_the_log_says_why(run):
    assert run.hub.messages("someone/pieces") == ["End of training"]
    first, second = (result["log"] for result in run("pieces"))
    told = [line for line in first if line.startswith("This push did not reach the Hub")]
    assert [line.split(": ")[1] for line in told] == ["checkpoint-2", "checkpoint-4"]
    assert all("FULL_STATE_DICT" in line for line in told)
    assert not [line for line in second if "Hub" in line]


def test_f65_a_hub_that_is_down_is_told_once_at_the_end_and_changes_no_weight(run):
    assert run.hub.messages("someone/broken") == []
    first, second = run("broken")
    told = [line.split(": ")[1] for line in first["log"] if line.startswith("This push did not reach the Hub")]
    assert told == ["checkpoint-2", "checkpoint-4", "the result"]
    assert "regvit publish --model" in first["log"][-1]
    assert not [line for line in second["log"] if "Hub" in line]
    for broken, whole in zip(run("broken"), run("whole"), strict=True):
        assert same_state(broken["state"], whole["state"])
    assert not list((run.folder / "broken").glob(".pushing*"))


def test_f65_a_refusal_ends_both_processes_before_training(run):
    first, second = run("refused")
    assert first == second
    assert "has no write access to 'someone/refused'" in first["refused"]
    assert not list((run.folder / "refused").glob("checkpoint*"))


def test_a_fine_tuned_model_is_pushed_once_a_save(run, tmp_path):
    assert run.hub.messages("someone/finetuned") == ["Training in progress, step 1", "End of training"]
    for file, content in run.hub.files("someone/finetuned").items():
        (tmp_path / file).write_bytes(content)
    loaded = RegViTForImageClassification.from_pretrained(tmp_path)
    for result in run("finetuned"):
        assert same_state(loaded.state_dict(), result["state"])
