"""Learning curves and model card in the folder of a fine-tuning run.

`hf_regvit.finetuning.finetune` lists all files of the folder.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .figures import save_figure
from .model_card import CardFigure, finetuning_facts, public_recipe, write_card_file
from .run_folder import read_metrics
from .upload import may_be_published

CURVES = "curves.png"


def draw_finetuning_curves(folder: Path, *, shown: Sequence[str]) -> Path | None:
    """Plot the losses, the metrics `shown` and the learning rate of `metrics.jsonl`; None if nothing was logged."""
    from matplotlib.figure import Figure

    path = folder / "metrics.jsonl"
    lines = read_metrics(path) if path.is_file() else []
    panels: list[tuple[str, dict[str, str]]] = [("loss", {"loss": "training", "eval_loss": "validation"})]
    panels += [(name, {f"eval_{name}": "validation"}) for name in shown]
    panels += [("learning rate", {"learning_rate": "maximum over groups"})]
    curves = [(title, {label: _points(lines, key) for key, label in keys.items()}) for title, keys in panels]
    curves = [(title, drawn) for title, drawn in curves if any(drawn.values())]
    if not curves:
        return None
    figure = Figure(figsize=(3.6 * len(curves), 3.0))
    # Constrained layout would draw everything several times, which is slow.
    figure.subplots_adjust(0.16 / len(curves), 0.16, 1 - 0.06 / len(curves), 0.9, wspace=0.3)
    for axis, (title, drawn) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        for label, points in drawn.items():
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1.3, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(color="#dddddd", lw=0.5)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7)
    target = folder / CURVES
    save_figure(figure, target)
    return target


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return (step, value) pairs of a metric, the first value of each step.

    A second value at the last step belongs to the best checkpoint, which is evaluated after the training.
    """
    values: dict[int, float] = {}
    for line in lines:
        if key in line:
            values.setdefault(line["step"], line[key])
    return list(values.items())


def write_finetuning_card(
    folder: Path,
    *,
    recipe: Mapping[str, Any],
    report: Mapping[str, Any],
    environment: Mapping[str, Any],
    pictures: Mapping[str, str],
    **names: Any,
) -> None:
    """Write `README.md`, the same card that `regvit publish` would write from the same files.

    Args:
        folder: Run folder with the saved model.
        recipe: Content of `resolved_recipe.yaml`; local folders appear on the card by their last path component only.
        report: Content of `metrics.json`.
        environment: Content of `environment.json`.
        pictures: Titles of the figures by file name; figures that show images of the data are left out.
        names: Keyword arguments `name` and `repo_id` of the card.
    """
    facts = finetuning_facts(public_recipe(recipe), report, environment)
    shown = {name: title for name, title in pictures.items() if may_be_published(name)}
    if shown.pop(CURVES, None):
        facts["curves"] = CURVES
    facts["pictures"] = tuple(CardFigure(name, title) for name, title in shown.items())
    write_card_file(folder, parameters=report["parameters"]["result"], **facts, **names)
