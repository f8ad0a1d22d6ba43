"""HTML page of an evaluation: verdicts, a chart of the scores with their intervals, the table, and the protocols."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluation.report import EvaluationTable, Score
from .maps import INK, LINE_COLORS, STYLE
from .pages import chart, render, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_evaluation(table: EvaluationTable, path: str | Path) -> Path:
    """Write the page of an evaluation beside its `report.json`, and return its path."""
    import matplotlib

    shown: dict[str, list[tuple[Score, str]]] = {}  # by unit
    for score, report, _ in table.rows():
        shown.setdefault(score.unit, []).append((score, report.model))
    models = [report.model for report in table.reports]
    with matplotlib.rc_context(STYLE | {"axes.edgecolor": INK, "axes.spines.top": False, "axes.spines.right": False}):
        charts = [chart(_bars(rows, models), f"scores in {unit}") for unit, rows in shown.items()]
    head, *rows = table.cells()
    kept = [i for i, name in enumerate(head) if name not in ("block", "selected", "seed", "seconds")]
    head, *rows = [[row[i] for i in kept] for row in (head, *rows)]
    page = render("evaluation.html", models=models, data=table.reports[0].data, verdicts=table.verdicts(),
                  charts=charts, head=head, rows=rows, remarks=table.remarks())  # fmt: skip
    return write_page(page, path)


def _bars(rows: list[tuple[Score, str]], models: list[str]) -> "Figure":
    """Draw a bar with its interval for each score of one unit; the models of a score stand together."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(score.name for score, _ in rows))
    head = 0.1 + 0.17 * len(models) * (len(models) > 1)  # inches
    height = 0.22 * len(rows) + 0.25 * len(names) + 0.45 + head
    figure = Figure(figsize=(4.6, height))
    axis = figure.add_axes((0.36, 0.45 / height, 0.6, 1 - (0.45 + head) / height))
    factor = 100 if rows[0][0].unit == "%" else 1
    for score, model in rows:
        place, number = names.index(score.name), models.index(model)
        y = place + 0.8 * ((number + 0.5) / len(models) - 0.5)
        low, value, high = (factor * bound for bound in (score.interval[0], score.value, score.interval[1]))
        color = LINE_COLORS[1:][number % (len(LINE_COLORS) - 1)]
        axis.barh(y, value, 0.7 / len(models), color=color, label=model if place == 0 else None,
                  gid=f"hover:{model}, {score.name}: {score.show(score.value, score.interval)}")  # fmt: skip
        axis.errorbar(value, y, xerr=[[max(value - low, 0)], [max(high - value, 0)]], color=INK, lw=1, capsize=2)
    axis.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5), xlabel=rows[0][0].unit)
    axis.set_xlim(0, 100 if factor == 100 else None)
    if len(models) > 1:
        figure.legend(loc="upper left", frameon=False, borderaxespad=0, labelspacing=0.2)
    return figure
