"""Is this installation fit to work? Versions, devices, known bad combinations, disk, the Hub, a short self-test."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

_OK, _NOTE, _BAD = "ok", "note", "bad"
_PACKAGES = (
    "torch", "torchvision", "transformers", "accelerate", "datasets", "huggingface-hub", "evaluate", "safetensors",
    "numpy", "pillow",
)  # fmt: skip
_EXTRAS = ("timm", "gradio", "peft", "trackio")
_OPENCV = (
    "opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless"
)  # fmt: skip
_PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
_SHARED_NOTE = 2**29  # bytes; a few batches of crops
_DISK_NOTE, _DISK_BAD = 5 * 2**30, 2**29  # bytes: a ViT-B run with three checkpoints; a small checkpoint


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        name: What was looked at.
        state: "ok", "note" (works, but worth knowing) or "bad" (something will fail).
        text: What was found and, if it is bad, what to do.
    """

    name: str
    state: str
    text: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found; `healthy` if nothing is bad."""

    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing is bad."""
        return all(finding.state != _BAD for finding in self.findings)

    def lines(self) -> list[str]:
        """For a terminal."""
        marks = {_OK: "ok  ", _NOTE: "note", _BAD: "BAD "}
        lines = [f"{marks[finding.state]}  {finding.name:13}  {finding.text}" for finding in self.findings]
        return [*lines, "ready" if self.healthy else "not ready: see the lines marked BAD"]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"healthy": self.healthy, "findings": [asdict(finding) for finding in self.findings]}


def examine(folder: str | Path = ".", *, self_test: bool = True) -> Diagnosis:
    """Looks at the installation; nothing is downloaded, nothing is left behind.

    Args:
        folder: Where runs would be written: its disk is looked at.
        self_test: Build, train, save and load a tiny model in a fresh process, a few seconds.
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
            findings.append(look())
        except (ImportError, OSError, RuntimeError, ValueError, AttributeError, AssertionError) as error:
            # A broken library fails in its own way; that is a finding, not an end.
            first = str(error).splitlines()[0] if str(error) else ""
            findings.append(Finding(name, _BAD, f"{type(error).__name__}: {first}"))
    return Diagnosis(tuple(findings))


def _python() -> Finding:
    return Finding("python", _OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _fits(found: str, bounds: str) -> bool:
    """Whether a version meets bounds such as `>=5.15,<6`; a development build counts as its release."""
    return SpecifierSet(bounds).contains(Version(found).base_version, prereleases=True)


def _required() -> dict[str, str]:
    """Our own requirements without those of extras: name to bounds."""
    wanted = [Requirement(line) for line in requires("hf_regvit") or ()]
    return {canonicalize_name(one.name): str(one.specifier) for one in wanted if one.marker is None}


def _packages() -> Finding:
    from .configuration_regvit import __version__

    wrong, found = [], {}
    for name, bounds in {**dict.fromkeys(_PACKAGES, ""), **_required()}.items():
        try:
            number = version(name)
        except PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        if name in _PACKAGES:
            found[name] = number
        if not _fits(number, bounds):
            wrong.append(f"{name} {number} is not {bounds}")
    if wrong:
        return Finding("packages", _BAD, f"{'; '.join(wrong)}. Run: pip install -U hf_regvit")
    numbers = ", ".join(f"{name} {number}" for name, number in found.items())
    return Finding("packages", _OK, f"hf_regvit {__version__}, {numbers}")


def torch_for_torchvision() -> str:
    """What the installed torchvision asks of torch, such as `==2.9.1`; empty if it does not say."""
    wanted = [Requirement(line) for line in requires("torchvision") or ()]
    return next((str(one.specifier) for one in wanted if one.name == "torch"), "")


def _torch_pair() -> Finding:
    torch_version, vision = version("torch"), version("torchvision")
    pair = f"torch {torch_version} with torchvision {vision}"
    advice = "Install both together: pip install --force-reinstall torch torchvision"
    if not _fits(torch_version, wanted := torch_for_torchvision()):
        return Finding("torch pair", _BAD, f"{pair}, which needs torch {wanted}. {advice}")
    try:
        import torchvision.ops  # noqa: F401
    except (ImportError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        return Finding("torch pair", _BAD, f"{pair} cannot be imported ({why}). {advice}")
    if len({text.partition("+")[2] for text in (torch_version, vision)}) > 1:
        return Finding("torch pair", _NOTE, f"{pair}: builds for different devices")
    return Finding("torch pair", _OK, pair)


def _together() -> Finding:
    """Whether what the large packages ask of each other is there, as `pip check` would say for all packages."""
    wrong: dict[str, str] = {}  # the package that asks, and what it does not get
    looked = 0
    for name in (*_PACKAGES, *_EXTRAS):
        try:
            wanted = [Requirement(line) for line in requires(name) or ()]
        except PackageNotFoundError:
            continue
        looked += 1
        for one in wanted:
            if one.marker is not None and not one.marker.evaluate({"extra": ""}):
                continue
            if (name, one.name) == ("torchvision", "torch"):
                continue  # told with its own advice
            try:
                number = version(one.name)
            except PackageNotFoundError:
                wrong[name] = f"needs {one.name}{one.specifier}, which is missing"
                continue
            if not _fits(number, str(one.specifier)):
                wrong[name] = f"{version(name)} needs {one.name}{one.specifier}, found {number}"
    if wrong:
        said = "; ".join(f"{name} {text}" for name, text in wrong.items())
        return Finding("together", _BAD, f"{said}. Run: pip install -U hf_regvit {' '.join(wrong)}")
    return Finding("together", _OK, f"what {looked} packages need of others is there")


def _opencv() -> Finding:
    """Four distributions install the same module `cv2`: the last one wins, and removing any of them breaks it."""
    found = []
    for name in _OPENCV:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    advice = f"Keep one: pip uninstall -y {' '.join(_OPENCV)}; pip install opencv-python-headless"
    try:
        import cv2
    except ImportError as error:
        why = str(error).splitlines()[0]
        return Finding("opencv", _BAD, f"cv2 cannot be imported ({why}). {advice}")
    if len(found) > 1:
        return Finding("opencv", _NOTE, f"{' and '.join(found)} hold the same module, cv2 {cv2.__version__}. {advice}")
    return Finding("opencv", _OK, ", ".join(found) or f"cv2 {cv2.__version__}, not from pip")


def _extras() -> Finding:
    found, missing = [], []
    for name in _EXTRAS:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    text = ", ".join(found) or "none"
    return Finding("extras", _OK, text + (f"; not installed: {', '.join(missing)}" if missing else ""))


def _devices() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            names.append(f"{properties.name} {properties.total_memory / 2**30:.0f} GiB")
        torch.ones(2, device="cuda").sum().item()  # a driver that is too old fails here
        return Finding("devices", _OK, f"{', '.join(names)}; CUDA {torch.version.cuda}")
    if torch.backends.mps.is_available():
        return Finding("devices", _OK, "Apple GPU (mps)")
    if shutil.which("nvidia-smi"):
        text = "there is a driver of NVIDIA, but torch sees no GPU"
        if torch.version.cuda is None:
            why = "this build of torch is for CPUs. Install one for CUDA (pytorch.org/get-started)"
        elif (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None and not visible.strip(" -1"):
            why = f"CUDA_VISIBLE_DEVICES is '{visible}', which hides all of them"
        else:
            why = f"the driver may be too old for CUDA {torch.version.cuda}, which torch was built with"
        return Finding("devices", _NOTE, f"{text}: {why}")
    return Finding("devices", _OK, "CPU only")


def _threads() -> Finding:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    text = f"{threads} threads on {cores} cores"
    if threads > cores:
        return Finding("threads", _NOTE, f"{text}: slower than one thread a core. Set OMP_NUM_THREADS={cores}")
    return Finding("threads", _OK, text)


def _shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Where loader workers hand over their batches; containers often get 64 MiB of it."""
    if not folder.is_dir():
        return Finding("memory", _OK, f"no {folder} on this system")
    free = shutil.disk_usage(folder).free
    text = f"{free / 2**30:.1f} GiB of shared memory free"
    if free < _SHARED_NOTE:
        advice = "loader workers may end with 'bus error'. Start the container with --shm-size 8g, or set "
        return Finding("memory", _NOTE, f"{text}: {advice}--dataloader_num_workers 0")
    return Finding("memory", _OK, text)


def _disk(folder: Path) -> Finding:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = f"{free / 2**30:.1f} GiB free"
    if not os.access(folder, os.W_OK):
        return Finding("disk", _BAD, f"{text}, but the folder cannot be written to. Name another --output_dir")
    if free < _DISK_BAD:
        return Finding("disk", _BAD, f"{text}: not enough for a checkpoint. Make room")
    if free < _DISK_NOTE:
        return Finding("disk", _NOTE, f"{text}: a run with several checkpoints of a ViT-B needs 5 GiB")
    return Finding("disk", _OK, text)


def _cache() -> Finding:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE).absolute()
    there = folder
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK | os.X_OK):
        advice = "nothing can be downloaded. Set HF_HOME to a folder that can be written to"
        return Finding("cache", _BAD, f"{folder} cannot be written to: {advice}")
    free = shutil.disk_usage(there).free
    text = f"{folder}, {free / 2**30:.1f} GiB free"
    if free < _DISK_BAD:
        return Finding("cache", _NOTE, f"{text}: too little to download a model. Make room, or set HF_HOME")
    return Finding("cache", _OK, text)


def _hub() -> Finding:
    from huggingface_hub import constants, get_token

    where = "" if constants.ENDPOINT == "https://huggingface.co" else f" at {constants.ENDPOINT}"
    if constants.HF_HUB_OFFLINE:
        names = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name)]
        by = " and ".join(names) or "HF_HUB_OFFLINE"
        return Finding("hub", _NOTE, f"offline ({by}): only what is in the cache can be loaded, nothing sent")
    token = "logged in" if get_token() else "no token: public models only, nothing can be pushed (`hf auth login`)"
    return Finding("hub", _OK, f"online mode{where}, not contacted; {token}")


def _network() -> Finding:
    """Proxies, which every download and push goes through. Their addresses may hold a password, which is not shown."""
    settings = {name: os.environ.get(name) or os.environ.get(name.lower()) for name in _PROXIES}
    used = {name: re.sub(r"[^/@\s]*@", "...@", value) for name, value in settings.items() if value}
    if not used:
        return Finding("network", _OK, "no proxy set")
    for name, value in used.items():
        if not re.match(r"(https?|socks[45]h?)://[^/]", value):
            return Finding("network", _BAD, f"{name} is '{value}', which is no address. Expected http://host:port")
    text = f"downloads and pushes go through {', '.join(f'{name} {value}' for name, value in used.items())}"
    exempt = (os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or "").split(",")
    if not {"*", "127.0.0.1", "localhost"} & {name.strip() for name in exempt}:
        text += ". NO_PROXY does not hold 127.0.0.1, so the page of `regvit demo` may not start: add it"
    return Finding("network", _NOTE, text)


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
assert losses[-1] < losses[0], f"the loss did not fall: {losses}"
model.eval()
with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
    model.save_pretrained(folder)
    again = RegViTModel.from_pretrained(folder).eval()
    off = (again(pixels).last_hidden_state - model(pixels).last_hidden_state).abs().max().item()
assert off < 1e-5, f"the loaded model differs by {off}"
assert output.register_tokens.shape == (4, 4, 32) and output.patch_tokens.shape == (4, 16, 32)
print(f"{time.perf_counter() - started:.1f}")
"""


def _self_test(code: str = _TEST, *, seconds: float = 120.0) -> Finding:
    """In a process of its own: a broken build of torch may end the process that uses it."""
    started = time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    try:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True,
                timeout=seconds, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Finding("self-test", _BAD, f"not finished after {seconds:.0f} s: the machine is far too busy, or stuck")
    took = time.perf_counter() - started
    if done.returncode < 0:
        return Finding(
            "self-test", _BAD, f"the process was ended by signal {-done.returncode}: a broken build of torch"
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Finding("self-test", _BAD, last)
    text = "a tiny model trains, is saved and loaded again"
    return Finding("self-test", _OK, f"{text}: {done.stdout.strip()} s, {took:.1f} s with the imports")
