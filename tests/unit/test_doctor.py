"""`regvit doctor`: every finding can be bad, and says what to do."""

import json
from importlib.metadata import PackageNotFoundError

import pytest

from hf_regvit import cli, doctor


def test_this_installation_is_fit():
    diagnosis = doctor.examine(self_test=False)
    assert diagnosis.healthy, diagnosis.lines()
    assert [finding.name for finding in diagnosis.findings] == [
        "python", "packages", "torch pair", "extras", "devices", "threads", "disk", "hub"
    ]  # fmt: skip
    assert diagnosis.lines()[-1] == "ready"


@pytest.mark.slow
def test_the_self_test_runs_a_model():
    finding = doctor._self_test()
    assert finding.state == "ok", finding.text
    assert "trains, is saved and loaded again" in finding.text


@pytest.mark.parametrize(
    ("code", "said"),
    [("raise RuntimeError('no kernel')", "no kernel"), ("import os; os.kill(os.getpid(), 11)", "signal 11"),
     ("import time; time.sleep(9)", "not finished after")],
)  # fmt: skip
def test_a_self_test_that_fails_is_told(code, said):
    finding = doctor._self_test(code, seconds=0.5 if "sleep" in code else 30)
    assert finding.state == "bad"
    assert said in finding.text


@pytest.mark.parametrize(
    ("found", "bounds", "fits"),
    [("5.23.0", ">=5.15,<6", True), ("5.14.9", ">=5.15,<6", False), ("6.0", ">=5.15,<6", False), ("4", "<=4.0", True),
     ("2.9", ">=2.9.0", True), ("1.0.1", "", True), ("2.10", ">=2.9", True), ("4.0", ">4", False),
     ("2.15.0+cpu", "==2.15", True)],
)  # fmt: skip
def test_versions_and_bounds(found, bounds, fits):
    assert doctor._fits(found, bounds) == fits


def versions(monkeypatch, **changed):
    real = doctor.version

    def version(name):
        if name in changed and changed[name] is None:
            raise PackageNotFoundError(name)
        return changed.get(name) or real(name)

    monkeypatch.setattr(doctor, "version", version)


def test_old_and_missing_packages_are_named(monkeypatch):
    versions(monkeypatch, transformers="4.57.0", accelerate=None)
    finding = doctor._packages()
    assert finding.state == "bad"
    assert "transformers 4.57.0 is not" in finding.text
    assert "accelerate is missing" in finding.text


def test_a_torchvision_of_another_torch_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "requires", lambda name: ["numpy", "torch==2.8.0", 'gdown; extra == "x"'])
    finding = doctor._torch_pair()
    assert finding.state == "bad"
    assert "needs torch ==2.8.0" in finding.text
    assert "pip install --force-reinstall torch torchvision" in finding.text


def test_builds_for_different_devices_are_noted(monkeypatch):
    versions(monkeypatch, torch="2.15.0+cpu", torchvision="0.29.2")
    monkeypatch.setattr(doctor, "requires", lambda name: ["torch (>=2.14.0)"])
    assert doctor._torch_pair().state == "note"


def test_a_torchvision_that_cannot_be_imported_is_named(monkeypatch):
    import builtins

    real = builtins.__import__

    def broken(name, *args, **options):
        if name == "torchvision.ops":
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", broken)
    finding = doctor._torch_pair()
    assert (finding.state, "nms does not exist" in finding.text) == ("bad", True)


@pytest.mark.parametrize(("free", "state"), [(2**40, "ok"), (2**30, "note"), (2**20, "bad")])
def test_disk(monkeypatch, tmp_path, free, state):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")(2**40, 0, free)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert doctor._disk(tmp_path / "not" / "there").state == state
    monkeypatch.setattr(doctor.os, "access", lambda *args: False)
    assert doctor._disk(tmp_path).state == "bad"


def test_offline_is_noted(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    finding = doctor._hub()
    assert (finding.state, "HF_HUB_OFFLINE" in finding.text) == ("note", True)


def test_too_many_threads_are_noted(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 10**6)
    assert "OMP_NUM_THREADS" in doctor._threads().text


def test_the_token_does_not_show(monkeypatch):
    token = "hf_" + "z" * 34
    monkeypatch.setenv("HF_TOKEN", token)
    assert token not in doctor._hub().text


def test_a_look_that_fails_is_a_finding(monkeypatch):
    def broken():
        raise RuntimeError("driver too old")

    monkeypatch.setattr(doctor, "_devices", broken)
    diagnosis = doctor.examine(self_test=False)
    assert not diagnosis.healthy
    assert "BAD   devices        RuntimeError: driver too old" in diagnosis.lines()


def test_the_command_prints_and_exits(capsys, monkeypatch):
    assert cli.main(["doctor", "--no_self_test"]) == 0
    assert capsys.readouterr().out.endswith("ready\n")
    versions(monkeypatch, transformers="4.0")
    assert cli.main(["doctor", "--no_self_test", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["healthy"]
    assert [finding["name"] for finding in report["findings"] if finding["state"] == "bad"] == ["packages"]
