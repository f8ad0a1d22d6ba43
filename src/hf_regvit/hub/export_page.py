"""Write a static page that runs an exported model in the browser, with the runtime that it needs."""

import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from .exported import ExportError, sha256

PACKAGE = "onnxruntime-web@1.30.0"  # the version that was tested
_RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
_TEMPLATES = Path(__file__).parent / "templates"
_PAGE = {"page.html": "index.html", "page.css": "page.css", "page.js": "page.js"}
_PAGE |= {"onnxruntime_web.txt": "runtime/LICENSE.txt"}


def write_page(folder: Path, runtime: str | Path | None) -> dict[str, Any]:
    """Write the page and the runtime to a folder that will have `proof.json` and `onnx/model.onnx`.

    Args:
        folder: Folder of the export.
        runtime: Folder of the unpacked npm package onnxruntime-web. None: npm downloads it.

    Returns:
        The version of the runtime and the checksums of its files.

    Raises:
        ExportError: There is no runtime; the message says how to get it.
    """
    write_static_files(folder)
    target = folder / "runtime"
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        package = Path(runtime) if runtime else _download(Path(work))
        if missing := [name for name in _RUNTIME if not (package / "dist" / name).is_file()]:
            raise ExportError(
                f"'{package}' has no dist/{missing[0]}. Run `npm pack {PACKAGE}`, unpack it, and name its folder "
                "'package' as --web_runtime."
            )
        for name in _RUNTIME:
            shutil.copyfile(package / "dist" / name, target / name)
        version = json.loads((package / "package.json").read_text(encoding="utf-8"))["version"]
    return {"onnxruntime-web": version, "sha256": {f"runtime/{name}": sha256(target / name) for name in _RUNTIME}}


def write_static_files(folder: Path) -> None:
    """Write the page without its runtime, and the license of the runtime."""
    (folder / "runtime").mkdir()
    for source, name in _PAGE.items():
        shutil.copyfile(_TEMPLATES / source, folder / name)


def _download(work: Path) -> Path:
    """Return the folder of the npm package, which npm compares with the checksum of its registry."""
    remedy = (
        f"Run `npm pack {PACKAGE}` where npm and a network are available, unpack the file, and name its folder "
        "'package' as --web_runtime."
    )
    if (npm := shutil.which("npm")) is None:
        raise ExportError(f"A page needs the npm package {PACKAGE}, but npm is not installed. {remedy}")
    command = [npm, "pack", PACKAGE, "--silent", "--ignore-scripts"]  # into `cwd`
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    archives = list(work.glob("*.tgz"))
    if done.returncode or not archives:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise ExportError(f"npm could not download {PACKAGE}: {reason}. {remedy}")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(work, filter="data")
    return work / "package"
