"""What a fine-tuning run leaves beside the model: learning curves and a card.

The folder itself is listed in `hf_regvit.finetuning.finetune`.
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
    """`curves.png` from `metrics.jsonl`: losses, the metrics `shown`, learning rate; None if nothing was logged."""
    from matplotlib.figure import Figure

    path = folder / "metrics.jsonl"
    lines = read_metrics(path) if path.is_file() else []
    panels: list[tuple[str, dict[str, str]]] = [("loss", {"loss": "training", "eval_loss": "validation"})]
    panels += [(name, {f"eval_{name}": "validation"}) for name in shown]
    panels += [("learning rate", {"learning_rate": "largest of the groups"})]
    curves = [(title, {label: _points(lines, key) for key, label in keys.items()}) for title, keys in panels]
    curves = [(title, drawn) for title, drawn in curves if any(drawn.values())]
    if not curves:
        return None
    figure = Figure(figsize=(3.6 * len(curves), 3.0))
    # Constrained layout would draw everything several times over.
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
    """(step, value) of a metric, one a step: a second one is the best checkpoint's, judged after the last step."""
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
    """`README.md`: the card that `regvit publish` would write from the same files.

    Args:
        folder: of the run, with the saved model.
        recipe: `resolved_recipe.yaml`; folders of one's own are named by their last part only.
        report: `metrics.json`.
        environment: `environment.json`.
        pictures: title of each by its file name; those that show images of the data are left out.
        names: `name` and `repo_id` of the card.
    """
    facts = finetuning_facts(public_recipe(recipe), report, environment)
    shown = {name: title for name, title in pictures.items() if may_be_published(name)}
    if shown.pop(CURVES, None):
        facts["curves"] = CURVES
    facts["pictures"] = tuple(CardFigure(name, title) for name, title in shown.items())
    write_card_file(folder, parameters=report["parameters"]["result"], **facts, **names)
