"""Build the sdist and from it the wheel, install it into a bare environment and use it there as a new user would."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from helpers import load_script

ROOT = Path(__file__).parents[2]
FIRST_EMBED = """
import hf_regvit
assert hf_regvit.__file__.startswith({folder!r}), hf_regvit.__file__
reader = hf_regvit.open_model({model!r})
images = hf_regvit.load_images("builtin:digits").subset([0, 1])
print(reader.embed(images).shape)
"""


def run(*command: str | Path, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_wheel_works_without_the_checkout(tmp_path):
    """The environment shares the dependencies of this one, but not its editable installation."""
    from builders import save_model, tiny_model

    run(sys.executable, "-m", "build", "--outdir", tmp_path, ROOT, folder=tmp_path)
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CONTRIBUTING.md", "tests/builders.py", "docs/figures/demo.png", "Makefile"} <= packed
    packaged = zipfile.ZipFile(wheel).namelist()
    sources = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*") if path.suffix != ".pyc"}
    files = {name for name in sources if (ROOT / "src" / name).is_file()}
    assert files <= set(packaged)
    assert not [name for name in packaged if name.startswith(("tests", "scripts", "benchmarks"))]

    venv.create(tmp_path / "env", with_pip=True)
    purelib = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env")}))
    (purelib / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read
    python, regvit = (tmp_path / "env" / "bin" / name for name in ("python", "regvit"))
    run(python, "-m", "pip", "uninstall", "--quiet", "-y", "setuptools", folder=tmp_path)  # torch needs a newer one
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel, folder=tmp_path)
    assert "retrofit" in run(regvit, "--help", folder=tmp_path)
    assert run(regvit, "doctor", folder=tmp_path).splitlines()[-1] == "ready"
    model = save_model(tiny_model(), tmp_path / "model")
    code = FIRST_EMBED.format(folder=str(purelib), model=str(model))
    assert run(python, "-c", code, folder=tmp_path).startswith("(2, ")


def test_a_release_has_a_readme_whose_links_work_on_an_index():
    release = load_script("scripts/dev/build_release.py")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    places = re.findall(r"\]\((?!https?:)([^)\s]+)\)", readme)
    assert len(places) >= 3
    assert all((ROOT / place).is_file() for place in places)
    text = release.with_absolute_links(readme, "https://host.example/me/name", "v1")
    assert re.findall(r"!\[[^\]]*\]\((.+)\)", text)[0].startswith("https://host.example/me/name/raw/v1/docs/")
    assert re.findall(r"\]\((?!https?:)", text) == []
    assert re.sub(r"https://host\.example/me/name/(?:raw|blob)/v1/", "", text) == readme


@pytest.mark.parametrize("project", [{}, {"urls": {"Repository": "github.com/me/name"}}])
def test_a_release_needs_the_address_of_the_repository(project):
    release = load_script("scripts/dev/build_release.py")
    with pytest.raises(SystemExit, match=r"pyproject.toml is '.*', expected an address"):
        release.repository_of(project)
    assert release.repository_of({"urls": {"Repository": "https://host.example/me/"}}) == "https://host.example/me"
