"""Trackers: what they receive of a run, that nothing comes twice, and that their failures end no run."""

import logging
from pathlib import Path

import pytest
from transformers import TrainerCallback

from hf_regvit.pretraining.run import pretrain
from tiny_finetune import run as finetune
from tiny_run import Crops, arguments, trained

RUN = {"panel_steps": 2, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1, "run_name": "first"}


def tracker(name, **events):
    """A callback that counts as one of the trackers of transformers."""
    module = {"__module__": "transformers.integrations.integration_utils"}
    return type(f"{name}Callback", (TrainerCallback,), module | events)()


def test_a_tracker_that_fails_ends_no_run_and_is_told_once(tmp_path, caplog, capsys) -> None:
    def on_log(self, args, state, control, **kwargs):
        seen.append(state.global_step)
        print("a dashboard is at ...")
        if state.global_step > 2:
            raise ConnectionError("the server does not answer")

    seen: list[int] = []
    with caplog.at_level(logging.WARNING):
        trainer = trained(tmp_path, callbacks=[tracker("Mlflow", on_log=on_log)])
    assert trainer.state.global_step == 6
    assert seen == [2, 4]
    alarms = [record.getMessage() for record in caplog.records if "ALARM" in record.getMessage()]
    assert alarms == [
        "ALARM: mlflow failed at on_log (ConnectionError: the server does not answer). The run continues without it; "
        "metrics.jsonl has all measurements."
    ]
    printed = capsys.readouterr()
    assert "dashboard" in printed.err
    assert "dashboard" not in printed.out  # which is for results


def test_a_tracker_is_closed_after_the_result(tmp_path) -> None:
    def on_train_end(self, args, state, control, **kwargs):
        closed.append(state.global_step)

    closed: list[int] = []
    trainer = trained(tmp_path, callbacks=[tracker("Dvclive", on_train_end=on_train_end)])
    assert closed == []
    trainer.trackers.finish(tmp_path)
    assert closed == [6]


class Crash(TrainerCallback):
    """Ends a run at step 5, after the checkpoint of step 3 and the panel of step 4."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise RuntimeError("crashed")


def crashed_and_resumed(folder, tracker, **options):
    """A run that crashed and was resumed, with the same run of a tracker."""
    with pytest.raises(RuntimeError, match="crashed"):
        pretrain(arguments(folder, report_to=tracker, **RUN | options), train_dataset=Crops(), callbacks=[Crash()])
    again = {"report_to": tracker, "resume_from_checkpoint": "last"}
    pretrain(arguments(folder, **RUN | options | again), train_dataset=Crops())
    pretrain(arguments(folder, **RUN | options | again), train_dataset=Crops())  # has ended already


@pytest.mark.slow
def test_tensorboard_shows_panels_curves_and_report_once(tmp_path, monkeypatch) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard, which the extra `dev` does not install")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    crashed_and_resumed(tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "events"), purge_orphaned_data=False, size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Images("figures/panel")] == [0, 2, 4, 6]
    (curves,) = events.Images("figures/curves")
    assert (curves.step, curves.width > 300) == (6, True)
    text = events.Tensors("report/text_summary")[0]
    assert b'"images' in text.tensor_proto.string_val[0]
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 4, 5, 6]  # from transformers


@pytest.mark.slow
def test_trackio_receives_panels_curves_report_and_model_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # is read at the import
    pytest.importorskip("trackio", reason="needs trackio, which the extra `dev` does not install")
    from trackio.sqlite_storage import SQLiteStorage

    crashed_and_resumed(tmp_path / "run", "trackio", project="panels")
    logged = SQLiteStorage.get_logs("panels", "first")
    for name, steps in {"panel": [0, 2, 4, 6], "curves": [6]}.items():
        assert [line["train/global_step"] for line in logged if f"figures/{name}" in line] == steps
    kinds = [artifact["type"] for artifact in SQLiteStorage.list_artifacts("panels")]
    assert sorted(kinds) == ["model", "report"]


@pytest.fixture
def artifacts(tmp_path, monkeypatch):
    """Artifacts that Weights & Biases logs offline, as (type, names of the files)."""
    wandb = pytest.importorskip("wandb", reason="needs wandb, which the extra `dev` does not install")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    logged = []
    log_artifact = wandb.Run.log_artifact

    def spy(self, artifact, *args, **kwargs):
        logged.append((artifact.type, sorted(artifact.manifest.entries)))
        return log_artifact(self, artifact, *args, **kwargs)

    monkeypatch.setattr(wandb.Run, "log_artifact", spy)
    yield logged
    wandb.finish()
    wandb.teardown()  # which would keep the folder


def images_of_wandb(folder):
    """Names of the images of all runs, without step and digest."""
    images = Path(folder).glob("wandb/offline-run*/files/media/images/figures/*")
    return sorted(path.name.split("_")[0] for path in images)


@pytest.mark.slow
def test_wandb_receives_panels_curves_report_and_model_once(tmp_path, artifacts) -> None:
    crashed_and_resumed(tmp_path / "run", "wandb")
    assert images_of_wandb(tmp_path) == ["curves"] + 4 * ["panel"]
    assert [kind for kind, _ in artifacts] == ["report", "model", "report"]  # the report of the third start differs
    assert {"config.json", "model.safetensors", "modeling_regvit.py", "README.md"} < set(artifacts[1][1])


@pytest.mark.slow
def test_the_model_is_kept_back_or_left_to_transformers(tmp_path, artifacts, monkeypatch, caplog) -> None:
    finetune(tmp_path / "kept", report_to="wandb", track_model=False)
    assert images_of_wandb(tmp_path) == ["confusion", "curves"]
    assert [kind for kind, _ in artifacts] == ["report"]
    monkeypatch.setenv("WANDB_LOG_MODEL", "end")
    finetune(tmp_path / "left", report_to="wandb")
    kinds = [kind for kind, files in artifacts[1:] if kind != "model" or "config.json" in files]
    assert kinds == ["report", "model"]  # transformers logs the model last, without its image processor
    assert "preprocessor_config.json" not in artifacts[-1][1]
    assert "ALARM" not in caplog.text
