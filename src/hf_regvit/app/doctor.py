"""Checks of the installation: versions, devices, known conflicts, disk space, the Hub and a short self-test."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from ..hub.exported import available_threads
from ..models.foreign_weights import first_line

_OK, _NOTE, _BAD = "ok", "note", "bad"
_PACKAGES = (
    "torch", "torchvision", "transformers", "accelerate", "datasets", "huggingface-hub", "evaluate", "safetensors",
    "numpy", "pillow",
)  # fmt: skip
_EXTRAS = ("scikit-image", "timm", "gradio", "peft", "tensorboard", "trackio", "wandb")
_OPENCV = (
    "opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless"
)  # fmt: skip
_PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
_SHARED_NOTE = 2**29  # bytes; a few batches of crops
_DISK_NOTE, _DISK_BAD = 5 * 2**30, 2**29  # bytes: a ViT-B run with three checkpoints; a small checkpoint


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        state: "ok", "note" (works, but worth knowing) or "bad" (something will fail).
        text: Result of the check and, if it is bad, the remedy.
        name: Name of the check.
    """

    state: str
    text: str
    name: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Results of all checks."""

    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """True if no check found a problem."""
        return all(finding.state != _BAD for finding in self.findings)

    def lines(self) -> list[str]:
        """Return the lines to print in a terminal."""
        marks = {_OK: "ok  ", _NOTE: "note", _BAD: "BAD "}
        lines = [f"{marks[finding.state]}  {finding.name:13}  {finding.text}" for finding in self.findings]
        return [*lines, "ready" if self.healthy else "not ready: fix the problems marked BAD"]

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as a dict for JSON."""
        findings = [{"name": one.name, "state": one.state, "text": one.text} for one in self.findings]
        return {"healthy": self.healthy, "findings": findings}


def examine(folder: str | Path = ".", *, self_test: bool = True) -> Diagnosis:
    """Check the installation without downloading anything or leaving files behind.

    Args:
        folder: Folder for runs, whose free disk space is checked.
        self_test: Whether to build, train, save and load a tiny model in a new process, which takes a few seconds.
    """
    looks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", _python),
        ("packages", _packages),
        ("torch pair", _torch_pair),
        ("together", _together),
        ("opencv", _opencv),
        ("extras", _extras),
        ("devices", _devices),
        ("threads", _threads),
        ("memory", _shared_memory),
        ("disk", lambda: _disk(Path(folder))),
        ("cache", _cache),
        ("hub", _hub),
        ("network", _network),
    ]
    if self_test:
        looks.append(("self-test", _self_test))
    findings = []
    for name, look in looks:
        try:
            found = look()
        except (ImportError, OSError, RuntimeError, ValueError, AttributeError, AssertionError) as error:
            # A broken library can fail in any of these ways. Report it and go on with the other checks.
            found = Finding(_BAD, f"{type(error).__name__}: {' '.join(str(error).splitlines()[:1])}")
        findings.append(replace(found, name=name))
    return Diagnosis(tuple(findings))


def _version(name: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _python() -> Finding:
    return Finding(_OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _fits(found: str, bounds: str) -> bool:
    """Return whether a version meets bounds such as `>=5.15,<6`. A development build also counts as its release."""
    bound = SpecifierSet(bounds)
    return any(bound.contains(number, prereleases=True) for number in (found, Version(found).base_version))


def _packages() -> Finding:
    numbers = [f"{name} {number}" for name in ("hf_regvit", *_PACKAGES) if (number := _version(name))]
    return Finding(_OK, ", ".join(numbers))


def torch_for_torchvision() -> str:
    """Return the torch version that the installed torchvision requires, such as `==2.9.1`; empty if unspecified."""
    wanted = [Requirement(line) for line in requires("torchvision") or ()]
    return next((str(one.specifier) for one in wanted if one.name == "torch"), "")


def _torch_pair() -> Finding:
    torch_version, vision = version("torch"), version("torchvision")
    pair = f"torch {torch_version} with torchvision {vision}"
    advice = "Install both together: pip install --force-reinstall torch torchvision"
    if not _fits(torch_version, wanted := torch_for_torchvision()):
        return Finding(_BAD, f"{pair}, which needs torch {wanted}. {advice}")
    try:
        import torchvision.ops  # noqa: F401
    except (ImportError, RuntimeError) as error:
        return Finding(_BAD, f"{pair} cannot be imported ({first_line(error)}). {advice}")
    if len({text.partition("+")[2] for text in (torch_version, vision)}) > 1:
        return Finding(_NOTE, f"{pair} are builds for different devices")
    return Finding(_OK, pair)


def _together() -> Finding:
    """Check the requirements of the large packages, as `pip check` does for all packages."""
    wrong: list[tuple[str, str]] = []  # names of packages and their unmet requirements
    packages = [name for name in ("hf_regvit", *_PACKAGES, *_EXTRAS) if _version(name)]
    for name in packages:
        for one in map(Requirement, requires(name) or ()):
            if one.marker is not None and not one.marker.evaluate({"extra": ""}):
                continue
            if (name, one.name) == ("torchvision", "torch"):
                continue  # `_torch_pair` reports it with its own advice
            number = _version(one.name)
            if number is None:
                wrong.append((name, f"needs {one.name}{one.specifier}, which is not installed"))
            elif not _fits(number, str(one.specifier)):
                wrong.append((name, f"{_version(name)} needs {one.name}{one.specifier}, but {number} is installed"))
    if wrong:
        names = dict.fromkeys(["hf_regvit", *(name for name, _ in wrong)])
        return Finding(_BAD, f"{'; '.join(map(' '.join, wrong))}. Run: pip install -U {' '.join(names)}")
    return Finding(_OK, f"the requirements of {len(packages)} packages are met")


def _opencv() -> Finding:
    """Check OpenCV: four distributions install the module `cv2`, the last one wins, and removing any breaks it."""
    found = [f"{name} {number}" for name in _OPENCV if (number := _version(name))]
    advice = f"Keep only one: pip uninstall -y {' '.join(_OPENCV)}; pip install opencv-python-headless"
    if not found and importlib.util.find_spec("cv2") is None:
        return Finding(_OK, "not installed; training with augmentations needs it: pip install 'hf_regvit[train]'")
    try:
        import cv2
    except ImportError as error:
        return Finding(_BAD, f"cv2 cannot be imported ({first_line(error)}). {advice}")
    if len(found) > 1:
        return Finding(_NOTE, f"{' and '.join(found)} provide the same module, cv2 {cv2.__version__}. {advice}")
    return Finding(_OK, ", ".join(found) or f"cv2 {cv2.__version__}, not from pip")


def _extras() -> Finding:
    found = [f"{name} {number}" for name in _EXTRAS if (number := _version(name))]
    missing = [name for name in _EXTRAS if _version(name) is None]
    text = ", ".join(found) or "none"
    return Finding(_OK, text + (f"; not installed: {', '.join(missing)}" if missing else ""))


def _devices() -> Finding:
    import torch

    if torch.cuda.is_available():
        cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        names = [f"{card.name} {card.total_memory / 2**30:.0f} GiB" for card in cards]
        torch.ones(2, device="cuda").sum().item()  # a driver that is too old fails here
        return Finding(_OK, f"{', '.join(names)}; CUDA {torch.version.cuda}")
    if (other := torch.accelerator.current_accelerator(check_available=True)) is not None and other.type != "cuda":
        return Finding(_OK, f"a device of type {other.type}")
    if shutil.which("nvidia-smi"):
        text = "an NVIDIA driver is installed, but torch finds no GPU"
        if torch.version.cuda is None:
            why = "this build of torch is for CPUs. Install a CUDA build (pytorch.org/get-started)"
        elif (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None and not visible.strip(" -1"):
            why = f"CUDA_VISIBLE_DEVICES is '{visible}', which hides all GPUs"
        else:
            why = f"the driver may be too old for CUDA {torch.version.cuda}, with which torch was built"
        return Finding(_NOTE, f"{text}: {why}")
    return Finding(_OK, "CPU only")


def _threads() -> Finding:
    import torch

    cores, threads = available_threads(), torch.get_num_threads()
    text = f"{threads} threads on {cores} cores"
    if threads > cores:
        return Finding(_NOTE, f"{text}, which is slower than one thread per core. Set OMP_NUM_THREADS={cores}")
    return Finding(_OK, text)


def _shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Check the shared memory through which loader workers pass batches; containers often have only 64 MiB."""
    if not folder.is_dir():
        return Finding(_OK, f"this system has no {folder}")
    free = shutil.disk_usage(folder).free
    text = f"{free / 2**30:.1f} GiB of shared memory free"
    if free < _SHARED_NOTE:
        advice = "loader workers may crash with 'bus error'. Start the container with --shm-size 8g, or set "
        return Finding(_NOTE, f"{text}: {advice}--dataloader_num_workers 0")
    return Finding(_OK, text)


def _existing(folder: Path) -> Path:
    """Return the nearest existing folder at or above a path."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _disk(folder: Path) -> Finding:
    folder = _existing(folder)
    free = shutil.disk_usage(folder).free
    text = f"{free / 2**30:.1f} GiB free"
    if not os.access(folder, os.W_OK):
        return Finding(_BAD, f"{text}, but the folder is not writable. Choose another --output_dir")
    if free < _DISK_BAD:
        return Finding(_BAD, f"{text}, which is not enough for a checkpoint. Free some disk space")
    if free < _DISK_NOTE:
        return Finding(_NOTE, f"{text}; a run with several checkpoints of a ViT-B needs 5 GiB")
    return Finding(_OK, text)


def _cache() -> Finding:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE).absolute()
    there = _existing(folder)
    if not os.access(there, os.W_OK | os.X_OK):
        advice = "nothing can be downloaded. Set HF_HOME to a writable folder"
        return Finding(_BAD, f"{folder} is not writable, so {advice}")
    free = shutil.disk_usage(there).free
    text = f"{folder}, {free / 2**30:.1f} GiB free"
    if free < _DISK_BAD:
        return Finding(_NOTE, f"{text}, which is too little to download a model. Free some disk space, or set HF_HOME")
    return Finding(_OK, text)


def _hub() -> Finding:
    from huggingface_hub import constants, get_token

    where = "" if constants.ENDPOINT == "https://huggingface.co" else f" at {constants.ENDPOINT}"
    if constants.HF_HUB_OFFLINE:
        names = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name)]
        by = " and ".join(names) or "HF_HUB_OFFLINE"
        return Finding(_NOTE, f"offline ({by}): only cached models can be loaded, and nothing can be uploaded")
    token = "logged in" if get_token() else "no token, so only public models, and no uploads (run `hf auth login`)"
    return Finding(_OK, f"online{where} (not contacted); {token}")


def _network() -> Finding:
    """Check the proxies that downloads and uploads use. Passwords in their addresses are not shown."""
    settings = {name: os.environ.get(name) or os.environ.get(name.lower()) for name in _PROXIES}
    used = {name: re.sub(r"[^/@\s]*@", "...@", value) for name, value in settings.items() if value}
    if not used:
        return Finding(_OK, "no proxy set")
    for name, value in used.items():
        if not re.match(r"(https?|socks[45]h?)://[^/]", value):
            return Finding(_BAD, f"{name} is '{value}', which is not a URL. Expected http://host:port")
    text = f"downloads and uploads use {', '.join(f'{name} {value}' for name, value in used.items())}"
    exempt = (os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or "").split(",")
    if not {"*", "127.0.0.1", "localhost"} & {name.strip() for name in exempt}:
        text += ". NO_PROXY does not contain 127.0.0.1, so `regvit demo` may fail to start. Add 127.0.0.1 to NO_PROXY"
    return Finding(_NOTE, text)


_TEST = """
import tempfile
import time
import torch
from hf_regvit import RegViTConfig, RegViTModel
started = time.perf_counter()
torch.manual_seed(0)
config = RegViTConfig(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
model = RegViTModel(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
pixels = torch.randn(4, 3, 32, 32)
losses = []
for _ in range(3):
    output = model(pixels)
    loss = (output.pooler_output - 1).square().mean() + output.patch_tokens.square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], f"the loss did not decrease: {losses}"
model.eval()
with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
    model.save_pretrained(folder)
    again = RegViTModel.from_pretrained(folder).eval()
    off = (again(pixels).last_hidden_state - model(pixels).last_hidden_state).abs().max().item()
assert off < 1e-5, f"the outputs of the loaded model differ by {off}"
assert output.register_tokens.shape == (4, 4, 32) and output.patch_tokens.shape == (4, 16, 32)
print(f"{time.perf_counter() - started:.1f}")
"""


def _self_test(code: str = _TEST, *, seconds: float = 120.0) -> Finding:
    """Run the self-test in a new process, because a broken build of torch may crash the process that uses it."""
    started = time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    try:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True,
                timeout=seconds, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Finding(_BAD, f"not finished after {seconds:.0f} s: the machine is overloaded, or the test hangs")
    took = time.perf_counter() - started
    if done.returncode < 0:
        return Finding(_BAD, f"the process was killed by signal {-done.returncode}; the build of torch may be broken")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Finding(_BAD, last)
    text = "a tiny model was trained, saved and loaded"
    return Finding(_OK, f"{text} in {done.stdout.strip()} s ({took:.1f} s with imports)")
