"""Fetch the common test suite of the installed transformers: `python scripts/dev/get_hf_common_tests.py`.

The wheel contains no tests, but the source distribution of the same version does. This script downloads it with pip,
compares it with the digest below, and unpacks its `tests/` folder into `.cache/hf_common/`, which git ignores.
`pytest -m hf_common tests/hf_common` runs the suite from there. Nothing is copied into this repository.
"""

import argparse
import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "hf_common"

# SHA-256 of known source distributions. A version listed here must match. Other versions are accepted with a note,
# because pip compares the download with the digest of its index.
DIGESTS = {
    "5.15.1": "27c996bd9075ddc82d40f8590dfdc81ea45f611bfca477e0db5d7fd257a482f7",
    "5.23.0": "19d647a4d5d903a7c644ca5cde2d86efc3dde7d8c687ae7988806ff2205efa71",
    "5.24.0": "906cb8c3cb2123575e263962586a4d21a979ce97feeb95fe6aaf66fe6ae88bf3",
}


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(version: str, folder: Path) -> Path:
    """Download the source distribution of a version of transformers with the pip of this interpreter.

    Raises:
        SystemExit: The download failed, or its digest differs from the one in `DIGESTS`.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "transformers", "--dest", str(folder), f"transformers=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = sorted(folder.glob("transformers-*.tar.gz"))
    if done.returncode or len(archives) != 1:
        raise SystemExit(
            f"pip could not download the source distribution of transformers {version} (exit status "
            f"{done.returncode}). Last output:\n{done.stderr[-2000:]}\nCheck the package index of pip."
        )
    found, expected = digest_of(archives[0]), DIGESTS.get(version)
    if expected is not None and found != expected:
        raise SystemExit(
            f"{archives[0].name} has SHA-256 {found}, but {expected} was expected. Do not run it. Download it again; "
            "if the digest still differs, do not trust the package index."
        )
    if expected is None:
        print(f"transformers {version} is not in DIGESTS; pip accepted it with SHA-256 {found}.")
    return archives[0]


def unpack(archive: Path, target: Path, *, digest: str) -> None:
    """Unpack the `tests/` folder of an archive to `target/tests`; `target` appears only when it is complete."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        unfinished = Path(folder) / target.name
        with tarfile.open(archive) as tar:
            members = [m for m in tar.getmembers() if m.name.startswith(f"{target.name}/tests/")]
            tar.extractall(folder, members=members, filter="data")
        if not (unfinished / "tests" / "test_modeling_common.py").is_file():
            raise SystemExit(f"{archive.name} has no tests/test_modeling_common.py, so its layout is unknown.")
        (unfinished / "SHA256").write_text(f"{digest}  {archive.name}\n")
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--force", action="store_true", help="download the suite again even if it exists")
    arguments = parser.parse_args()
    version = importlib.metadata.version("transformers")
    target = CACHE / f"transformers-{version}"
    stamp = target / "SHA256"
    if (
        stamp.is_file()
        and not arguments.force
        and stamp.read_text()[:64] == DIGESTS.get(version, stamp.read_text()[:64])
    ):
        print(f"The common suite of transformers {version} is in {target.relative_to(CACHE.parents[1])}.")
        return 0
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        archive = download(version, Path(folder))
        unpack(archive, target, digest=digest_of(archive))
    print(f"Unpacked the common suite of transformers {version} to {target.relative_to(CACHE.parents[1])}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
