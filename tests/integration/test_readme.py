"""Run the Python blocks of the README in order, as a reader would paste them."""

import re
from pathlib import Path

import pytest

from builders import write

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.slow
def test_examples_run(tmp_path, monkeypatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    pooled = names["features"](str(write(tmp_path / "noise.png")), pool=True, return_tensors=True)
    assert pooled.shape == (1, 192)
    assert type(names["regvit"]).__name__ == "RegViTModel"


def test_commands_of_the_readme_exist() -> None:
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README.read_text()):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    for script in re.findall(r"(?:scripts|examples|tests)/[\w/]+\.(?:py|yaml)", README.read_text()):
        assert (README.parent / script).is_file(), script
