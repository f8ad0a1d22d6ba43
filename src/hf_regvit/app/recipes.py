"""Command-line options as dataclasses, and a parser that reads their defaults from YAML recipes."""

import difflib
from argparse import ArgumentDefaultsHelpFormatter, ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser


class RecipeError(ValueError):
    """A recipe file that cannot be used; the message names file, line and key."""


# Inherited options that many runs use. The help lists them with the command's own training options.
_COMMON = (
    "output_dir", "max_steps", "gradient_accumulation_steps", "label_smoothing_factor", "bf16", "seed", "use_cpu",
    "eval_steps", "save_steps", "dataloader_num_workers", "resume_from_checkpoint", "push_to_hub", "hub_model_id",
)  # fmt: skip


class _HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Show one spelling of every option, and a default only if there is one."""

    def _get_help_string(self, action: Any) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)

    def _format_action_invocation(self, action: Any) -> str:
        spellings = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        if not spellings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(spellings)} {self._format_args(action, self._get_default_metavar_for_optional(action))}"


class RecipeParser(HfArgumentParser):
    """`HfArgumentParser` with `--config recipe.yaml`: default < recipe < flag.

    Values of the recipe become the parser's defaults and are converted to the option's type, because YAML reads `1e-4`
    as text and the YAML parsing of transformers does not convert it. Recipes are flat. An unknown key is an error that
    names the nearest known key.
    """

    def __init__(self, dataclass_types: Any, **kwargs: Any) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        self.add_argument(
            "--config", metavar="RECIPE.yaml", help="Flat YAML file with any of these options. Flags override it."
        )

    def format_help(self) -> str:
        """Return the help text: first the command's own options, then the roughly 120 inherited from transformers."""
        from transformers import TrainingArguments

        runs: list[Any] = [one for one in self.dataclass_types if issubclass(one, TrainingArguments)]
        of_base = set(TrainingArguments.__dataclass_fields__) if runs else set()
        redefined = {name for one in runs for name in one.own_options()}

        def section(action: Any) -> int:
            if action.dest not in of_base:
                return 0
            return 1 if action.dest in redefined or action.dest in _COMMON else 2

        formatter = self._get_formatter()
        formatter.add_usage("%(prog)s [--config RECIPE.yaml] [--option value ...]", [], [])
        formatter.add_text(self.description)
        for number, title in enumerate(("options", "training", "other transformers.TrainingArguments")):
            formatter.start_section(title)
            formatter.add_arguments([action for action in self._actions if section(action) == number])
            formatter.end_section()
        return formatter.format_help()

    def parse(self, args: Sequence[str]) -> tuple[Any, ...]:
        """Parse `args`, which do not include the program name, into the dataclasses.

        Raises:
            RecipeError: The recipe is missing, is not flat YAML, or has an unknown key or a value of the wrong type.
        """
        args = [_expand_home(argument) for argument in args]
        recipe = _take_config(args)
        if recipe is not None:
            self._use_recipe(Path(recipe))
        # The dataclasses are followed by the parser's own namespace, which holds --config, and the unknown arguments.
        *parsed, _, unknown = self.parse_args_into_dataclasses(
            list(args), return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            nearest = difflib.get_close_matches(unknown[0], options, n=1, cutoff=0.0)[0]
            self.error(f"Unknown option '{unknown[0]}'. Did you mean '{nearest}'?")  # exits with status 2
        return tuple(parsed)

    def _use_recipe(self, path: Path) -> None:
        if not path.is_file():
            raise RecipeError(f"The recipe '{path}' does not exist. Check the path after --config.")
        try:
            text = path.read_text(encoding="utf-8-sig")
            values, node = yaml.safe_load(text) or {}, yaml.compose(text)
        except UnicodeDecodeError as error:
            raise RecipeError(f"'{path}' is not UTF-8 text ({error}). Save it again as UTF-8.") from error
        except yaml.YAMLError as error:
            raise RecipeError(f"'{path}' is not valid YAML: {error}") from error
        if not isinstance(values, dict):
            raise RecipeError(f"'{path}' holds a {type(values).__name__}. Expected one 'option: value' per line.")
        first: dict[str, int] = {}
        # YAML silently keeps the last value of a repeated key.
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            line = key.start_mark.line + 1
            if first.setdefault(key.value, line) != line:
                raise RecipeError(
                    f"The key '{key.value}' appears twice in {path}, in lines {first[key.value]} and {line}."
                )
        known: dict[str, list[Any]] = {}  # a boolean option has a second action of the same name, --no_option
        for action in self._actions:
            if action.dest not in ("help", "config"):
                known.setdefault(action.dest, []).append(action)
        for key, value in values.items():
            line = next((i for i, row in enumerate(text.splitlines(), 1) if row.startswith(f"{key}:")), 0)
            if key not in known:
                nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
                raise RecipeError(f"Unknown key '{key}' in {path}:{line}. Did you mean '{nearest}'?")
            try:
                default = self._typed(known[key][0], value, self._kinds(key))
            except (TypeError, ValueError, ArgumentTypeError) as error:
                raise RecipeError(f"Invalid value {key}: {value!r} in {path}:{line}: {error}") from error
            for action in known[key]:
                action.default, action.required = default, False

    def _kinds(self, key: str) -> set[Any]:
        """Return the types that an option accepts: int and NoneType for `int | None`, list for `list[str]`."""
        hint = next(hints[key] for one in self.dataclass_types if key in (hints := get_type_hints(one)))
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        return {get_origin(kind) or kind for kind in kinds}

    @staticmethod
    def _typed(action: Any, value: Any, kinds: set[Any]) -> Any:
        if value is None:
            if type(None) not in kinds:
                raise ValueError("the value is missing; remove the line to use the default")
            return None
        if isinstance(value, dict | list) and not kinds & {type(value), Any}:
            raise ValueError("expected a single value" + (" or a list" if list in kinds else ""))
        if isinstance(value, dict):
            return value
        if value is False and "no" in (action.choices or ()):
            value = "no"  # YAML reads `save_strategy: no` as false
        if list in kinds and action.nargs in ("+", "*") and not isinstance(value, list):
            value = [value]
        convert = action.type or str
        if isinstance(value, bool) and action.type is None:
            return value
        if isinstance(value, list):
            return [convert(_expand_home(item) if isinstance(item, str) else str(item)) for item in value]
        return convert(_expand_home(value) if isinstance(value, str) else str(value))


def _expand_home(argument: str) -> str:
    """Expand `~/x` from a recipe or from `--option=~/x`, which shells do not expand."""
    name, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return name + equals + (str(Path(value).expanduser()) if value.startswith("~/") else value)


def _take_config(args: Sequence[str]) -> str | None:
    for i, argument in enumerate(args):
        if argument == "--config" and i + 1 < len(args):
            return args[i + 1]
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
    return None
