"""Options of the argument classes: as records for the command line, and as a parser that returns an instance."""

from collections.abc import Sequence
from enum import Enum
from importlib import import_module
from types import UnionType
from typing import Any, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser, TrainingArguments

from hf_regvit_cli import COMMANDS, HELP, OptionParser, RecipeError

from .arguments import DemoArguments

__all__ = ["RecipeError", "RecipeParser", "arguments_class", "options_of", "options_of_command"]


_Arguments = TypeVar("_Arguments")


class RecipeParser(OptionParser, Generic[_Arguments]):
    """Parser of the options of an argument class, with `--config recipe.yaml`: default < recipe < flag."""

    def __init__(self, arguments_class: type[_Arguments], **kwargs: Any) -> None:
        super().__init__(options_of(arguments_class), **kwargs)
        self.arguments_class = arguments_class

    def parse(self, args: Sequence[str]) -> tuple[_Arguments]:
        """Parse `args`, which do not include the program name, into an instance of the class.

        Raises:
            RecipeError: The recipe is missing, is not flat YAML, or has an unknown key or a value of the wrong type.
        """
        return (self.arguments_class(**self.values(args)),)


def arguments_class(command: str) -> type:
    """Return the class of the arguments of a command."""
    module, _, name = COMMANDS[command].arguments.rpartition(".")
    found = getattr(import_module(f"hf_regvit.{module}"), name)
    return found if isinstance(found, type) else found()  # the options of an evaluation are those of its tasks


def options_of_command(command: str) -> list[dict[str, Any]]:
    """Return the options of a command; those inherited from transformers are those of the installed version."""
    options, shown = options_of(arguments_class(command)), " ".join(COMMANDS[command].daily.values()).split()
    if any(option["inherited"] for option in options):
        options.append(options_of(DemoArguments)[-1])  # --device; `cli.run` translates it for Trainer
    for option in options:
        option["flags"].sort(key=lambda flag: flag not in shown)  # the spelling of the table first
        if option["inherited"]:
            option["help"] = HELP.get(option["name"], option["help"])
    return options


def options_of(arguments_class: Any) -> list[dict[str, Any]]:
    """Return a record of every option of an argument class.

    A record holds the name of the field, the spellings of the option, of which the first is shown, the help text, the
    type of a value, all types that a recipe may give ("kinds"), and whether the option is inherited from transformers.
    """
    hints = get_type_hints(arguments_class)
    above = arguments_class.__mro__
    above = above[: above.index(TrainingArguments)] if issubclass(arguments_class, TrainingArguments) else above
    own = {name for one in above for name in vars(one).get("__annotations__", ())}
    records: dict[str, dict[str, Any]] = {}
    for action in HfArgumentParser(arguments_class)._actions:
        if action.dest == "help" or action.dest in records:  # the second action of a name is --no_option
            continue
        hint = hints[action.dest]
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        name = getattr(action.type, "__name__", "str").replace("string_to_bool", "bool")
        default = action.default.value if isinstance(action.default, Enum) else action.default
        records[action.dest] = {
            "name": action.dest,
            "flags": [flag.removeprefix("--") for flag in action.option_strings if "-" not in flag.removeprefix("--")],
            "help": " ".join((action.help or "").split()),
            "type": name if name in ("int", "float", "bool") else "str",
            "many": action.nargs in ("+", "*"),
            "extend": type(action).__name__ == "_ExtendAction",
            "required": action.required,
            "default": default,
            "choices": None if action.choices is None else list(action.choices),
            "kinds": sorted((get_origin(kind) or kind).__name__ for kind in kinds),
            "inherited": action.dest not in own,
        }
    return list(records.values())
