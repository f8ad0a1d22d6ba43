"""Build the sdist and the wheel of a release in dist/, with a README whose images and links work on a package index.

    python scripts/dev/build_release.py

An index shows the README without the repository around it, so its relative links get the address of the repository and
the tag of the version. The committed files are built; the README of the repository stays as it is.
"""

import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(!?)(\[[^\]\n]*\])\((?!https?:|#)([^()\s]+)\)")


def repository_of(project: Mapping[str, Any]) -> str:
    """Return the address of the repository from the table `[project]` of pyproject.toml.

    Raises:
        SystemExit: There is none, or it is not on the web.
    """
    address = project.get("urls", {}).get("Repository", "")
    if not address.startswith("https://"):
        raise SystemExit(
            f"error: Repository in [project.urls] of pyproject.toml is {address!r}, expected an address such as "
            "'https://github.com/OWNER/NAME'. Without it, images and links of the README are broken on an index."
        )
    return address.rstrip("/")


def with_absolute_links(readme: str, repository: str, tag: str) -> str:
    """Return the README with links and images at the address of the repository, in the form of GitHub."""

    def absolute(found: re.Match[str]) -> str:
        image, text, path = found.groups()
        return f"{image}{text}({repository}/{'raw' if image else 'blob'}/{tag}/{path})"

    return LINK.sub(absolute, readme)


def main() -> None:
    repository = repository_of(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"])
    source = (ROOT / "src" / "hf_regvit" / "models" / "configuration_regvit.py").read_text(encoding="utf-8")
    (version,) = re.findall(r'^__version__ = "(.+)"$', source, flags=re.M)
    with tempfile.TemporaryDirectory() as folder:
        packed, tree = Path(folder, "head.tar"), Path(folder, "tree")
        subprocess.run(["git", "archive", "--output", str(packed), "HEAD"], cwd=ROOT, check=True)
        with tarfile.open(packed) as archive:
            archive.extractall(tree, filter="data")
        readme = tree / "README.md"
        text = with_absolute_links(readme.read_text(encoding="utf-8"), repository, f"v{version}")
        readme.write_text(text, encoding="utf-8")
        subprocess.run([sys.executable, "-m", "build", "--outdir", str(ROOT / "dist"), str(tree)], check=True)


if __name__ == "__main__":
    main()
