"""Evaluation tasks: the table of all tasks, and the options that they make together.

A task is one class in one file. A new task is a class with the attributes of `Task` and an entry in `TASKS`; the
command line, `evaluate_backbone` and the reports take everything else from the class. Importing this file loads
neither torch nor transformers, because the command line builds its options from it.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol, get_type_hints

from .image_tasks import FewShot, Knn, Linear, Logistic, Retrieval, Robustness, option
from .patch_tasks import Depth, Lost, Segmentation

if TYPE_CHECKING:
    from ..models.tokens import TokenReader
    from .report import Score
    from .run import TaskParts


class Task(Protocol):
    """Evaluation task, created from its settings.

    Attributes:
        name: Name on the command line and in reports.
        title: Name shown to readers.
        hub_type: Task type on the Hub.
        needs: Targets of the images: labels, masks, depth maps or boxes.
        Settings: Dataclass whose fields are options of the command line and of `evaluate_backbone`; their metadata
            holds the help text. Fields of two tasks may share a name if they share the default.
        settings: Settings of this task.
    """

    name: str
    title: str
    hub_type: str
    needs: str
    Settings: type
    settings: Any

    def __init__(self, settings: object) -> None: ...

    def run(self, reader: "TokenReader", parts: "TaskParts", *, seed: int) -> "list[Score]":
        """Return the scores of the model.

        Args:
            reader: Reader of the model.
            parts: Training and test images; opened and read on request, once for all tasks.
            seed: Random seed for sampling and confidence intervals.
        """
        ...


_ALL: tuple[Any, ...] = (Knn, Linear, Logistic, FewShot, Retrieval, Robustness, Segmentation, Depth, Lost)
TASKS: dict[str, type[Task]] = {task.name: task for task in _ALL}


@dataclass
class Sampling:
    """Options of all tasks: which images to use, and how many at once."""

    train_val_split: float = option(
        0.15, "Share of the images of each class used as test images if --data has no validation split."
    )
    max_images: int | None = option(
        None, "Maximum number of images per split, drawn at random with --seed. Default: all."
    )
    batch_size: int = option(32, "Number of images per forward pass.")

    def __post_init__(self) -> None:
        if not 0 < self.train_val_split < 1:
            raise ValueError(f"train_val_split={self.train_val_split} must lie between 0 and 1.")


def select_tasks(names: Sequence[str]) -> list[type[Task]]:
    """Return the tasks in the order of the table.

    Raises:
        ValueError: `names` is empty or holds an unknown name.
    """
    for name in names:
        if name not in TASKS:
            raise ValueError(f"Unknown task '{name}'. {_nearest(name, TASKS)} Choose from {', '.join(TASKS)}.")
    if not names:
        raise ValueError(f"tasks is empty. Choose from {', '.join(TASKS)}.")
    return [task for name, task in TASKS.items() if name in names]


def task_options() -> dict[str, tuple[object, Field]]:
    """Return type and field of every option of `Sampling` and of the settings of all tasks, by name.

    Raises:
        ValueError: Two tasks give one option different defaults.
    """
    options: dict[str, tuple[object, Field]] = {}
    for settings in (Sampling, *(task.Settings for task in TASKS.values())):
        hints = get_type_hints(settings)
        for one in fields(settings):
            _, known = options.setdefault(one.name, (hints[one.name], one))
            if known.default != one.default:
                raise ValueError(f"Two tasks give the option '{one.name}' different defaults. Rename one of them.")
    return options


def settings_from(kind: type, options: Mapping[str, object]) -> Any:
    """Create settings of one kind from those options that are its fields.

    Raises:
        ValueError: An option is not a field of any task, or has a value out of range.
    """
    known = task_options()
    for name in options:
        if name not in known:
            raise ValueError(f"Unknown option '{name}'. {_nearest(name, known)} Choose from {', '.join(known)}.")
    return kind(**{one.name: options[one.name] for one in fields(kind) if one.name in options})


def _nearest(name: str, known: Iterable[str]) -> str:
    return f"Did you mean '{difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]}'?"
