"""Write all options of every recipe in `examples/` to `tests/golden_recipes/`.

A test compares them, so that a changed default is visible in review. Run this script after a deliberate change.
"""

from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]


def resolved(recipe: Path) -> str:
    """Return all options of a recipe as YAML text, in the order of the dataclass."""
    from hf_regvit.app.recipes import RecipeParser
    from hf_regvit.finetuning.arguments import FinetuningArguments
    from hf_regvit.pretraining.arguments import PretrainingArguments

    values = yaml.safe_load(recipe.read_text())
    arguments_class = FinetuningArguments if "mode" in values else PretrainingArguments
    # Without a GPU, transformers rejects bfloat16 unless --use_cpu is set. Nothing else depends on the machine.
    flags = ["--config", str(recipe), "--output_dir", "runs/x", "--use_cpu", "--report_to", "none"]
    (arguments,) = RecipeParser(arguments_class).parse(flags)
    # Options of Trainer change with its versions, so include only those that the recipe names.
    named = set(values) | set(arguments_class.__annotations__)
    values = {name: value for name, value in arguments.resolved().items() if name in named}
    return yaml.safe_dump(values, sort_keys=False, width=119)


def main() -> None:
    folder = ROOT / "tests" / "golden_recipes"
    folder.mkdir(exist_ok=True)
    for recipe in sorted((ROOT / "examples").glob("*.yaml")):
        (folder / f"{recipe.stem}.txt").write_text(resolved(recipe))
        print(recipe.name)


if __name__ == "__main__":
    main()
