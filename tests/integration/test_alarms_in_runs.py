"""Alarms in real runs on real photographs: a seeded collapse sets them off in time, a healthy run never."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from hf_regvit.pretraining.arguments import PretrainingArguments
from hf_regvit.pretraining.run import pretrain

pytestmark = pytest.mark.slow

PHOTOS = Path(__file__).resolve().parents[2] / "examples" / "photos_cpu.yaml"
STEPS, WARM_UP = 30, 3
# The recipe for the photographs with a smaller network, fewer images and fewer steps.
SMALLER = {
    "hidden_size": 96, "num_hidden_layers": 2, "head_num_prototypes": 256, "head_hidden_size": 128,
    "head_bottleneck_size": 32, "per_device_train_batch_size": 16, "max_steps": STEPS, "warmup_steps": WARM_UP,
    "logging_steps": 5, "monitor_steps": 5, "panel_steps": 0, "knn_steps": 0, "save_strategy": "no",
    "disable_tqdm": True, "use_cpu": True, "report_to": "none",
}  # fmt: skip
# No centering, and temperatures at which a softmax over 256 cosines is flat.
COLLAPSE = {
    "center_momentum": 1 - 1e-9, "student_temperature": 1.0, "warmup_teacher_temperature": 1.0,
    "teacher_temperature": 1.0,
}  # fmt: skip


def run(folder: Path, seed: int, **overrides) -> tuple[dict, list[dict]]:
    recipe = yaml.safe_load(PHOTOS.read_text()) | SMALLER | {"seed": seed, "output_dir": str(folder)} | overrides
    torch.set_num_threads(1)
    pretrain(PretrainingArguments(**recipe))
    report = json.loads((folder / "report.json").read_text())
    return report, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_f56_a_seeded_collapse_is_noticed(tmp_path):
    report, lines = run(tmp_path, 0, **COLLAPSE)
    raised = {alarm["name"]: alarm["step"] for alarm in report["alarms"]}
    # Three lines on end after the warm-up: at steps 5, 10 and 15.
    assert raised["uniform_targets"] == 15
    assert raised["loss_at_ln_k"] == 15
    assert {line["alarm"]: line["step"] for line in lines if "alarm" in line} == raised
    messages = " ".join(alarm["message"] for alarm in report["alarms"])
    assert "--teacher_temperature" in messages


def test_f56_few_prototypes_that_take_everything_are_noticed(tmp_path):
    """Without centering, at the usual temperatures, the targets go the other way."""
    report, _ = run(tmp_path, 0, center_momentum=1 - 1e-9)
    raised = {alarm["name"]: alarm["step"] for alarm in report["alarms"]}
    assert raised["one_prototype"] <= STEPS
    assert not report["stopped"]


def test_f56_a_healthy_run_raises_nothing(tmp_path):
    report, lines = run(tmp_path, 0)
    assert report["alarms"] == []
    measured = [line for line in lines if "feature_std" in line]
    assert [line["step"] for line in measured] == list(range(0, STEPS + 1, 5))
