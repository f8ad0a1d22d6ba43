"""Write all options of every recipe in `examples/` to `tests/golden_recipes/`.

A test compares them, so that a changed default is visible in review. Run this script after a deliberate change.
"""

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]


def resolved(recipe: Path) -> str:
    """Return all options of a recipe as YAML text, in the order of the dataclass."""
    from hf_regvit.app.recipes import RecipeParser
    from hf_regvit.finetuning.arguments import FinetuningArguments
    from hf_regvit.image_text.arguments import ImageTextArguments
    from hf_regvit.pretraining.arguments import PretrainingArguments

    values = yaml.safe_load(recipe.read_text())
    arguments_class: Any = PretrainingArguments if "global_crop_size" in values else FinetuningArguments
    if "text_layers" in values:
        arguments_class = ImageTextArguments
    # Without a GPU, transformers rejects bfloat16 unless --use_cpu is set. Nothing else depends on the machine.
    flags = ["--config", str(recipe), "--output_dir", "runs/x", "--use_cpu", "--report_to", "none"]
    if "text_layers" in values:
        flags += ["--data", "photos"]  # it has no default
    (arguments,) = RecipeParser(arguments_class).parse(flags)
    # Options of Trainer change with its versions, so include only those that the recipe names.
    named = set(values) | arguments_class.own_options()
    values = {name: value for name, value in arguments.resolved().items() if name in named}
    # Keep the order of the reviewed file, so that a difference shows changed values only.
    reviewed = ROOT / "tests" / "golden_recipes" / f"{recipe.stem}.txt"
    order = list(yaml.safe_load(reviewed.read_text()) if reviewed.is_file() else [])
    values = dict(sorted(values.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))
    return yaml.safe_dump(values, sort_keys=False, width=119)


def main() -> None:
    folder = ROOT / "tests" / "golden_recipes"
    folder.mkdir(exist_ok=True)
    for recipe in sorted((ROOT / "examples").glob("*.yaml")):
        (folder / f"{recipe.stem}.txt").write_text(resolved(recipe))
        print(recipe.name)


if __name__ == "__main__":
    main()
