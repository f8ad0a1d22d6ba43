"""Tests of pushes from a training run to a fake local Hub: every strategy, every fault, and the effect on training."""

import json
import logging

import pytest
import torch

from fake_hub import READ_TOKEN, WRITE_TOKEN
from hf_regvit import RegViTModel
from hf_regvit.hub import upload
from hf_regvit.hub.card import CardError, check_card
from hf_regvit.models.manifest import verify_checkpoint
from hf_regvit.models.processing import default_image_processor
from hf_regvit.pretraining.run import pretrain
from hf_regvit.pretraining.trainer import DinoTrainer
from tiny_run import Crops, arguments, trained

MODEL_FILES = {
    ".gitattributes", "README.md", "config.json", "configuration_regvit.py", "manifest.json", "model.safetensors",
    "modeling_regvit.py", "preprocessor_config.json",
}  # fmt: skip


def pushed(folder, **overrides):
    """Train for six steps, with a checkpoint after every second step."""
    options = {"push_to_hub": True, "hub_model_id": "someone/tiny", "save_strategy": "steps", "save_steps": 2}
    return pretrain(
        arguments(folder, **options | overrides), train_dataset=Crops(), image_processor=default_image_processor(16)
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_every_push_of_every_strategy_can_be_loaded(hub, tmp_path, strategy):
    backbone = pushed(tmp_path / "run", hub_strategy=strategy, hub_always_push=True)
    commits = hub.repos["someone/tiny"].commits[1:]
    steps = [] if strategy == "end" else [f"Training in progress, step {step}" for step in (2, 4, 6)]
    assert [commit.message for commit in commits] == [*steps, "End of training"]
    for number, commit in enumerate(commits):
        folder = tmp_path / f"download{number}"
        folder.mkdir()
        beside = {name.split("/")[0] for name in commit.files if "/" in name}
        assert {name for name in commit.files if "/" not in name} == MODEL_FILES
        for name in MODEL_FILES:
            (folder / name).write_bytes(commit.files[name])
        model = RegViTModel.from_pretrained(folder)  # strict: it raises if a tensor is missing
        card = commit.files["README.md"].decode()
        with pytest.raises(CardError, match="no 'license'") as error:
            check_card(card)
        assert str(error.value).count(";") == 0  # only the license is missing, because it was not given
        assert ("The training of this model is not finished." in card) == (commit.message != "End of training")
        assert 'name = "someone/tiny"' in card
        expected = {"checkpoint": {"last-checkpoint"}} | {
            "all_checkpoints": {f"checkpoint-{step}" for step in (2, 4, 6)[: number + 1]}
        }
        assert beside == expected.get(strategy, set())
    last = model.state_dict()
    assert all((last[name] == tensor).all() for name, tensor in backbone.state_dict().items())


@pytest.mark.slow
def test_a_pushed_checkpoint_resumes_and_holds_no_token(hub, tmp_path):
    pushed(tmp_path / "run", hub_strategy="checkpoint", hub_always_push=True, hub_token=WRITE_TOKEN, max_steps=4)
    files = hub.files("someone/tiny")
    for name, content in files.items():
        assert WRITE_TOKEN.encode() not in content, name
        assert not name.endswith("training_args.bin")
    folder = tmp_path / "other" / "checkpoint-4"
    for name, content in files.items():
        if name.startswith("last-checkpoint/"):
            path = folder / name.removeprefix("last-checkpoint/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    verify_checkpoint(folder)
    resumed = trained(tmp_path / "resumed", resume=str(folder), max_steps=6)
    assert resumed.state.global_step == 6
    assert WRITE_TOKEN not in (tmp_path / "run" / "resolved_recipe.yaml").read_text()


@pytest.mark.slow
def test_the_repository_is_private_unless_the_run_says_otherwise(hub, tmp_path):
    pushed(tmp_path / "a", max_steps=2)
    pushed(tmp_path / "b", max_steps=2, hub_model_id="someone/open", hub_private_repo=False)
    assert hub.repos["someone/tiny"].private
    assert not hub.repos["someone/open"].private


@pytest.mark.slow
@pytest.mark.parametrize("kind", [500, 503, 429, 504, 409, "reset", "silence"])
def test_f65_a_fault_during_a_push_costs_one_try(hub, tmp_path, kind, caplog):
    hub.fail("/commit/", kind, times=1, headers={"Retry-After": "0.01"})
    with caplog.at_level(logging.WARNING, logger="hf_regvit"):
        pushed(tmp_path / "run", max_steps=2, hub_strategy="end")
    assert hub.messages("someone/tiny") == ["End of training"]
    assert "This push did not reach the Hub" not in caplog.text
    assert "Attempt 2 of 3" in caplog.text


@pytest.mark.slow
def test_f65_a_hub_that_is_down_hurts_nothing_and_is_told_at_the_end(hub, tmp_path, caplog):
    hub.fail("/commit/", 503, times=10**6)
    with caplog.at_level(logging.WARNING, logger="hf_regvit"):
        backbone = pushed(tmp_path / "run", hub_strategy="every_save", hub_always_push=True)
    quiet = pushed(tmp_path / "quiet", push_to_hub=False, hub_model_id=None)
    assert all((a == b).all() for a, b in zip(backbone.parameters(), quiet.parameters(), strict=True))
    assert json.loads((tmp_path / "run" / "report.json").read_text())["steps"] == 6
    told = [
        record.message for record in caplog.records if record.message.startswith("This push did not reach the Hub")
    ]
    assert [line.split(": ")[1] for line in told] == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "the result"]
    assert "regvit publish --model" in caplog.text
    assert not list((tmp_path / "run").glob(".pushing*"))


def test_f65_a_hub_that_cannot_be_reached_at_the_start_hurts_nothing(hub, tmp_path, caplog):
    hub.fail("/api/repos/create", "reset", times=3)
    with caplog.at_level(logging.WARNING, logger="hf_regvit"):
        pushed(tmp_path / "run", max_steps=2, hub_strategy="end")
    assert "Training starts, and pushes will retry." in caplog.text
    assert hub.messages("someone/tiny") == ["End of training"]


@pytest.mark.parametrize(
    ("token", "said"),
    [("hf_" + "x" * 34, "does not accept the token"), (READ_TOKEN, "has no write access")],
    ids=["unknown", "read only"],
)
def test_f65_a_token_that_may_not_write_is_refused_before_training(hub, tmp_path, monkeypatch, token, said):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(upload.PermanentPushError, match=said):
        pushed(tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoint*"))


@pytest.mark.slow
def test_a_push_that_is_slow_is_not_overtaken(hub, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(upload.BackgroundPushes, "busy", property(lambda self: self._thread is not None))
    with caplog.at_level(logging.INFO, logger="hf_regvit"):
        pushed(tmp_path / "run", hub_strategy="every_save")
    assert "is not pushed, because the previous push is not finished" in caplog.text
    assert hub.messages("someone/tiny") == ["Training in progress, step 2", "End of training"]


@pytest.mark.slow
def test_a_push_takes_no_random_number_from_the_run(hub, tmp_path):
    """Once, initializing the uploaded model drew random numbers, so a resumed run with pushes ended differently."""
    states = []
    for options in ({"push_to_hub": False}, {"hub_strategy": "every_save", "hub_model_id": "tiny"}):
        pushed(tmp_path / str(len(states)), max_steps=2, **options)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    # The name without an owner was completed.
    assert hub.messages("someone/tiny") == ["Training in progress, step 2", "End of training"]


def test_the_push_of_trainer_itself_is_refused(tmp_path):
    with pytest.raises(NotImplementedError, match="regvit publish --push"):
        trained(tmp_path, max_steps=1).push_to_hub()


@pytest.mark.slow
def test_a_checkpoint_with_a_secret_is_not_pushed(hub, tmp_path, caplog, monkeypatch):
    secret = "hf_" + "s" * 34
    monkeypatch.setattr(DinoTrainer, "hub_facts", lambda self: {"description": f"token {secret}"})
    with caplog.at_level(logging.WARNING, logger="hf_regvit"):
        pushed(tmp_path / "run", hub_strategy="every_save", max_steps=2)
    assert "checkpoint-2: README.md, line" in caplog.text
    assert secret not in caplog.text
    assert hub.messages("someone/tiny") == ["End of training"]
