"""Tests of the recipes in `examples/`: complete headers, valid options, and the values to which they resolve."""

import re
from pathlib import Path

import pytest
import yaml

from helpers import load_script

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "examples").glob("*.yaml"))
GOLDEN = ROOT / "tests" / "golden_recipes"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_header_says_what_a_reader_needs(recipe):
    comment = re.match(r"(?:#.*\n)+", recipe.read_text()).group()
    for label in ("Purpose:", "Data:", "Command:", "Hardware:", "Time:", "Memory:", "Expected:"):
        assert f"# {label}" in comment, label
    assert f"examples/{recipe.name}" in comment


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
def test_recipe_resolves_to_the_reviewed_values(recipe):
    """After a deliberate change, run `python scripts/dev/resolve_recipes.py` and review the difference."""
    resolved = load_script("scripts/dev/resolve_recipes.py").resolved(recipe)
    assert resolved == (GOLDEN / f"{recipe.stem}.txt").read_text()


def test_no_golden_recipe_is_left_over():
    assert {path.stem for path in GOLDEN.glob("*.txt")} == {path.stem for path in RECIPES}


def test_crops_fit_the_patches_and_prototypes_the_batch():
    for recipe in RECIPES:
        values = yaml.safe_load((GOLDEN / f"{recipe.stem}.txt").read_text())
        if "global_crop_size" not in values:  # fine-tuning, images with texts
            continue
        for name in ("global_crop_size", "local_crop_size"):
            assert values[name] % values["patch_size"] == 0, (recipe.name, name)
        assert values["global_crop_size"] // values["patch_size"] >= 6, recipe.name


def test_readme_of_the_examples_lists_every_recipe():
    text = (ROOT / "examples" / "README.md").read_text()
    assert [path.name for path in RECIPES if f"`{path.name}`" not in text] == []


def test_accelerate_configurations_are_read_by_accelerate():
    from accelerate.commands.config.config_args import load_config_from_file

    for path in (ROOT / "examples" / "accelerate").glob("*.yaml"):
        config = load_config_from_file(str(path))
        assert config.num_processes > 1
