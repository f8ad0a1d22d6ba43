"""Make an environment with another version of transformers: `python scripts/dev/make_environment.py 5.15.0`.

The environment lies in `.cache/environments/transformers-VERSION/`, which git ignores, and shares the packages of this
interpreter, torch among them. pip installs transformers there, and only those dependencies of the project that this
version needs in another version too. The last line of the output is the path of its Python interpreter.
"""

import argparse
import importlib.metadata
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / ".cache" / "environments"


def requirements() -> list[str]:
    """Return the requirements of the project apart from transformers, without extras that are not installed here."""
    found = [Requirement(line) for line in importlib.metadata.requires("hf_regvit") or []]
    installed = {canonicalize_name(distribution.name) for distribution in importlib.metadata.distributions()}
    wanted = installed - {"hf-regvit", "transformers"}  # the extra `export` needs a newer transformers than the others
    return [f"{r.name}{r.specifier}" for r in found if canonicalize_name(r.name) in wanted]


def make(version: str, folder: Path) -> Path:
    """Make the environment in a folder that need not exist and return its interpreter.

    Raises:
        SystemExit: pip could not install the version beside the other requirements.
    """
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    shared = sysconfig.get_path("purelib")
    (own / "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    for command in ([*pip, "install", "--quiet", f"transformers=={version}", *requirements()], [*pip, "check"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(
                f"pip could not make the environment with transformers {version}. Its last output:\n"
                f"{(done.stdout + done.stderr)[-2000:]}"
            )
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", help="version of transformers, such as 5.15.0")
    version = parser.parse_args().version
    python = make(version, ENVIRONMENTS / f"transformers-{version}")
    code = "import importlib.metadata as m, torch; print(m.version('transformers'), m.version('torch'))"
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.split()
    expected = [version, importlib.metadata.version("torch")]
    if found != expected:
        raise SystemExit(f"The environment has transformers and torch {found}, not {expected}.")
    print(python)
    return 0


if __name__ == "__main__":
    sys.exit(main())
