"""Tests of `regvit doctor`: every check can fail, and its message says what to do."""

import json
import re
from importlib.metadata import PackageNotFoundError
from unittest.mock import Mock

import pytest
from huggingface_hub import constants

from hf_regvit.app import cli, doctor


def test_this_installation_is_fit():
    diagnosis = doctor.examine(self_test=False)
    assert diagnosis.healthy, diagnosis.lines()
    assert [finding.name for finding in diagnosis.findings] == [
        "python", "packages", "torch pair", "together", "opencv", "extras", "devices", "threads", "memory", "disk",
        "cache", "hub", "network",
    ]  # fmt: skip
    assert diagnosis.lines()[-1] == "ready"


@pytest.mark.slow
def test_the_self_test_runs_a_model():
    finding = doctor._self_test()
    assert finding.state == "ok", finding.text
    assert "a tiny model was trained, saved and loaded in" in finding.text


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
     ("2.15.0+cpu", "==2.15", True), ("0.0.1b1", "==0.0.1b1", True), ("0.0.1b2", "==0.0.1b1", False),
     ("2.15.0a0+git1", ">=2.15", True), ("2.15.0rc1", ">=2.15.0rc1,<3", True), ("6.0.dev0", "<6", False)],
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
    finding = doctor._together()
    assert finding.state == "bad"
    assert finding.text.startswith("hf_regvit")
    for name, number in (("transformers", "4.57.0 is installed"), ("accelerate", "not installed")):
        assert re.search(rf"needs {name}[^;]*, (but|which is) {number}", finding.text)
    assert "transformers 4.57.0" in doctor._packages().text


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


def test_a_package_that_others_need_in_another_version_is_named(monkeypatch):
    versions(monkeypatch, **{"huggingface-hub": "0.30.0", "tokenizers": None})
    real = doctor.requires

    def requires(name):
        wanted = ["huggingface-hub<3,>=1.5", 'notthere>1; extra == "dev"', "tokenizers>=0.22"]
        return wanted if name == "transformers" else ["huggingface-hub>=0.20"] if name == "timm" else real("numpy")

    monkeypatch.setattr(doctor, "requires", requires)
    finding = doctor._together()
    assert finding.state == "bad"
    assert finding.text.endswith(
        "needs tokenizers>=0.22, which is not installed. Run: pip install -U hf_regvit transformers"
    )
    monkeypatch.setattr(doctor, "requires", lambda name: ["huggingface-hub<3,>=1.5"] if name == "transformers" else [])
    assert "needs huggingface-hub<3,>=1.5, but 0.30.0 is installed" in doctor._together().text
    monkeypatch.setattr(doctor, "requires", lambda name: ['notthere>1; extra == "dev"', 'x; python_version < "3"'])
    assert doctor._together().state == "ok"


@pytest.mark.parametrize("also", ["opencv-python", "opencv-contrib-python"])
def test_two_distributions_of_one_opencv_are_noted(monkeypatch, also):
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "4.11.0" if name == also else real(name))
    finding = doctor._opencv()
    assert finding.state == "note"
    assert f"{also} 4.11.0" in finding.text
    assert "pip install opencv-python-headless" in finding.text


def test_an_opencv_that_cannot_be_imported_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "cv2", None)
    assert doctor._opencv().state == "bad"
    monkeypatch.setattr(doctor, "version", lambda name: (_ for _ in ()).throw(PackageNotFoundError(name)))
    assert "pip install 'hf_regvit[train]'" in doctor._opencv().text
    assert doctor._opencv().state == "ok"


@pytest.mark.parametrize(
    ("cuda", "visible", "said"),
    [(None, None, "this build of torch is for CPUs"), ("12.8", "", "which hides all GPUs"),
     ("12.8", "-1", "which hides all GPUs"), ("12.8", None, "too old for CUDA 12.8"),
     ("12.8", "0", "too old for CUDA 12.8")],
)  # fmt: skip
def test_a_gpu_that_torch_does_not_see_is_noted(monkeypatch, cuda, visible, said):
    import torch

    monkeypatch.setattr(doctor.shutil, "which", lambda name: "nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    finding = doctor._devices()
    assert (finding.state, said in finding.text) == ("note", True), finding.text


@pytest.mark.parametrize(("free", "state"), [(2**34, "ok"), (64 * 2**20, "note")])
def test_shared_memory(monkeypatch, tmp_path, free, state):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")(2**40, 0, free)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert doctor._shared_memory(tmp_path).state == state
    assert doctor._shared_memory(tmp_path / "nowhere").state == "ok"


def test_a_cache_that_cannot_be_written_to_is_bad(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    assert doctor._cache().state == "ok"
    real = doctor.os.access
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: path != tmp_path and real(path, mode))
    finding = doctor._cache()  # root can write everywhere, so only os.access reports this
    assert (finding.state, "Set HF_HOME" in finding.text) == ("bad", True)


@pytest.mark.parametrize(
    ("value", "state", "shown"),
    [("http://proxy.example.org:3128", "note", "http://proxy.example.org:3128"),
     ("http://me:pass" + "word@proxy:3128", "note", "http://...@proxy:3128"),
     ("socks5h://127.0.0.1:9", "note", "socks5h"),
     ("proxy:3128", "bad", "Expected http://host:port"), ("me:pass" + "word@proxy:3128", "bad", "...@proxy:3128"),
     ("", "ok", "no proxy")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_proxies(monkeypatch, value, state, shown, name):
    for known in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(known, raising=False)
        monkeypatch.delenv(known.lower(), raising=False)
    monkeypatch.setenv(name, value)
    finding = doctor._network()
    assert (finding.state, shown in finding.text) == (state, True), finding.text
    assert "password" not in finding.text
    if state == "note":
        assert "NO_PROXY does not contain 127.0.0.1" in finding.text
        monkeypatch.setenv("no_proxy", "example.org, localhost")
        assert "NO_PROXY" not in doctor._network().text


@pytest.mark.parametrize(("free", "state"), [(2**40, "ok"), (2**30, "note"), (2**20, "bad")])
def test_disk(monkeypatch, tmp_path, free, state):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")(2**40, 0, free)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert doctor._disk(tmp_path / "not" / "there").state == state
    monkeypatch.setattr(doctor.os, "access", lambda *args: False)
    assert doctor._disk(tmp_path).state == "bad"


def test_offline_is_noted(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    finding = doctor._hub()
    assert (finding.state, "HF_HUB_OFFLINE" in finding.text) == ("note", True)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    assert "offline (TRANSFORMERS_OFFLINE)" in doctor._hub().text


def test_too_many_threads_are_noted(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 10**6)
    assert "OMP_NUM_THREADS" in doctor._threads().text


def test_the_token_does_not_show(monkeypatch):
    token = "hf_" + "z" * 34
    monkeypatch.setenv("HF_TOKEN", token)
    assert token not in doctor._hub().text


def test_a_look_that_fails_is_a_finding(monkeypatch):

    monkeypatch.setattr(doctor, "_devices", Mock(side_effect=RuntimeError("driver too old")))
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
    assert [finding["name"] for finding in report["findings"] if finding["state"] == "bad"] == ["together"]
