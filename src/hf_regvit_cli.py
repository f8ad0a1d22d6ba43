"""Entry point of the command line `regvit`: read the options, run one command, print its result.

This module lies outside of the package, because importing any part of `hf_regvit` loads torch and transformers, which
takes seconds. `--help`, `--version`, `--dry_run` and mistyped commands and options need neither: the options are read
from `hf_regvit/app/options.json`, which `scripts/dev/write_options.py` derives from the argument classes, and the
commands from `hf_regvit/app/commands.toml`.

Results go to stdout, logs to stderr. Exit status: 0 success, 1 failure, 2 wrong usage, 130 after Ctrl-C. To use
several processes, run `accelerate launch -m hf_regvit pretrain ...`.
"""

import argparse
import difflib
import json
import logging
import math
import os
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

PACKAGE = Path(__file__).with_name("hf_regvit")
OPTIONS = PACKAGE / "app" / "options.json"


class Command(NamedTuple):
    """A command: its summary, an example, the class of its arguments, and its daily options by group."""

    summary: str
    example: str
    arguments: str
    daily: dict[str, str]


TABLES = tomllib.loads((PACKAGE / "app" / "commands.toml").read_text(encoding="utf-8"))
COMMANDS = {name: Command(**entries) for name, entries in TABLES["commands"].items()}
HELP = {name: " ".join(text.split()) for name, text in TABLES["help"].items()}
_DINOV2 = TABLES["dinov2"]  # names of options there, and their names here

EVERY_COMMAND = {
    "config RECIPE.yaml": "Flat YAML file with any of these options. Options on the command line override it.",
    "dry_run": "Print the options that differ from their defaults, and stop.",
    "json": "Print the result as JSON.",
    "debug": "Show the full traceback of an error.",
    "help": "List the daily options.",
    "help_all": "List all options.",
}


class RecipeError(ValueError):
    """A recipe file that cannot be used; the message names file, line and key."""


def suggestion(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return a sentence with the known name that was probably meant, or an empty string if none is similar."""
    known = list(known)
    word = name.lstrip("-").partition("=")[0].rpartition(".")[2]
    theirs = {other: ours for other, ours in _DINOV2.items() if ours in known and other not in known}
    near = difflib.get_close_matches(word.replace("-", "_"), [*known, *theirs], n=1, cutoff=0.7)
    near = near or [one for one in known if one.startswith(word) or word.startswith(f"{one}-")]
    if near and near[0] in theirs:
        return f" The option '{near[0]}' of DINOv2 is called '{prefix}{theirs[near[0]]}' here."
    return f" Did you mean '{prefix}{near[0]}'?" if len(near) == 1 else ""


class _HelpFormatter(argparse.HelpFormatter):
    """Show one spelling of every option."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        values = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[0]} {values}".strip()


class OptionParser(argparse.ArgumentParser):
    """Parser of options with `--config recipe.yaml`. The result holds only the options that were given.

    Recipes are flat. Their values are converted to the type of the option, because YAML reads `1e-4` as text. An
    unknown key is an error that names the nearest known key.
    """

    def __init__(self, options: Sequence[Mapping[str, Any]], command: Command | None = None, **kwargs: Any) -> None:
        kwargs |= {"add_help": False, "allow_abbrev": False, "argument_default": argparse.SUPPRESS}
        super().__init__(**kwargs, formatter_class=_HelpFormatter)
        self.options = {option["name"]: option for option in options}
        # Every spelling of an option, without the dashes at its front.
        self.names = {flag: option["name"] for option in options for flag in [option["name"], *option["flags"]]}
        self.command = command
        for option in options:
            self._add(self, option)
        self.add_argument("--config")

    @staticmethod
    def _add(parser: "argparse.ArgumentParser | argparse._ArgumentGroup", option: Mapping[str, Any]) -> None:
        flags = [flag for name in option["flags"] for flag in _spellings(name)]
        how: dict[str, Any] = {"dest": option["name"], "type": _TYPES[option["type"]]}
        how["metavar"] = _METAVARS.get(option["type"]) or option["flags"][0].upper()
        help_text, default = option["help"], option["default"]
        if default not in (None, "", []):
            help_text += f" (default: {' '.join(map(str, default)) if isinstance(default, list) else default})"
        if option["many"]:
            how |= {"nargs": "+", "action": "extend" if option["extend"] else "store"}
        elif option["type"] == "bool":
            how |= {"nargs": "?", "const": True}
        if option["choices"]:
            how["choices"] = option["choices"]
        parser.add_argument(*flags, help=help_text.replace("%", "%%"), **how)
        if option["type"] == "bool" and default is not False:
            name = f"no_{option['name']}"
            parser.add_argument(*_spellings(name), dest=option["name"], action="store_false", help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        """Print one line, and exit with status 2."""
        message = re.sub(r"^argument (--\w+)(/[\w/-]+)?: ", r"\1: ", message)
        self.exit(2, f"error: {message[0].upper()}{message[1:]}\n")

    def full_help(self, *, everything: bool) -> str:
        """Return the daily options in groups or, if `everything`, all options."""
        groups = self.command.daily.items() if self.command else ()
        sections = {title: [self.options[self.names[name]] for name in names.split()] for title, names in groups}
        shown = {option["name"] for options in sections.values() for option in options}
        others = [option for name, option in self.options.items() if name not in shown]
        page = argparse.ArgumentParser(
            add_help=False, prog=self.prog, formatter_class=_HelpFormatter, conflict_handler="resolve"
        )
        page.usage = "%(prog)s [--config RECIPE.yaml] [--option value ...]"
        if self.command:
            page.description = f"{self.command.summary[0].upper()}{self.command.summary[1:]}."
        if everything:
            sections["further options"] = [option for option in others if not option["inherited"]]
            sections["transformers.TrainingArguments"] = [option for option in others if option["inherited"]]
        for title, options in sections.items():
            section = page.add_argument_group(title)
            for option in options:
                self._add(section, option)
        section = page.add_argument_group("every command")
        for flag, text in EVERY_COMMAND.items():
            name, _, metavar = flag.partition(" ")
            how: dict[str, Any] = {"metavar": metavar} if metavar else {"action": "store_true"}
            section.add_argument(f"--{name}", help=text, **how)
        text = page.format_help()
        if others and not everything:
            text += f"\n`{self.prog} --help_all` lists {len(others)} further options.\n"
        return text + (f"\nexample:\n  {self.command.example}\n" if self.command else "")

    def values(self, args: Sequence[str]) -> dict[str, Any]:
        """Parse `args`, which do not include the program name. Options on the command line override the recipe.

        Raises:
            RecipeError: The recipe is missing, is not flat YAML, or has an unknown key or a value of the wrong type.
        """
        given, unknown = self.parse_known_args([_expand_home(argument) for argument in args])
        if unknown:
            option = next((word for word in unknown if word.startswith("--")), None)
            if option is None:
                self.error(f"unexpected argument '{unknown[0]}'. Quote values that contain spaces.")
            hint = suggestion(option, self.names, "--") or f" Run `{self.prog} --help_all` to list the options."
            self.error(f"unknown option '{option.partition('=')[0]}'.{hint}")
        values = vars(given)
        if recipe := values.pop("config", None):
            values = self._read_recipe(Path(recipe)) | values
        missing = [name for name, option in self.options.items() if option["required"] and name not in values]
        if missing:
            flags = ", ".join(f"--{self.options[name]['flags'][0]}" for name in missing)
            self.error(f"the following options are required: {flags}")
        return values

    def _read_recipe(self, path: Path) -> dict[str, Any]:
        pairs, values = read_yaml(path)
        read: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, node in pairs:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key not in self.names:
                raise RecipeError(f"Unknown key '{key}' in {path}:{line}.{suggestion(key, self.names)}")
            name = self.names[key]
            if lines.setdefault(name, line) != line:  # YAML silently keeps the last value
                where = f"in lines {lines[name]} and {line}, under this or another of its names"
                raise RecipeError(f"'{key}' appears twice in {path}, {where}.")
            try:
                read[name] = _typed(self.options[name], node, values.get(key))
            except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
                raise RecipeError(f"Invalid value {key}: {values.get(key)!r} in {path}:{line}: {error}") from error
        return read


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _to_bool(text: str) -> bool:
    known = dict.fromkeys(("yes", "true", "t", "y", "on", "1"), True)
    known |= dict.fromkeys(("no", "false", "f", "n", "off", "0"), False)
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return known[text.lower()]


def _to_int(text: str) -> int:
    """Read a whole number; Python also accepts 1_000 and digits of other scripts, and YAML 010 for eight."""
    if not re.fullmatch(r"[+-]?(0|[1-9][0-9]*)", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number such as 12")
    return int(text)


def _to_float(text: str) -> float:
    number = re.fullmatch(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?", text, re.IGNORECASE)
    if number is None or not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"'{text}' is not a finite number such as 0.5 or 1e-4")
    return float(text)


_TYPES: dict[str, Callable[[str], Any]] = {"int": _to_int, "float": _to_float, "bool": _to_bool, "str": str}
_METAVARS = {"int": "N", "float": "X", "bool": "BOOL"}


_MOST_SIGNS, _MOST_ALIASES, _MOST_LEVELS = 2**18, 16, 16  # of a recipe; nested aliases multiply their content


def read_yaml(path: Path) -> tuple[list[tuple[Any, Any]], dict[str, Any]]:
    """Return the keys and values of a recipe as nodes, which hold their texts and lines, and as YAML reads them.

    Raises:
        RecipeError: The recipe is missing, too large, or not flat YAML.
    """
    import yaml

    if not path.is_file():
        raise RecipeError(f"The recipe '{path}' does not exist. Check the path after --config.")
    try:
        with path.open(encoding="utf-8-sig") as file:
            text, aliases, depth = file.read(_MOST_SIGNS + 1), 0, 0
        for event in yaml.parse(text):  # lazily, because deep nesting takes time in the square of its depth
            aliases += isinstance(event, yaml.AliasEvent)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if aliases > _MOST_ALIASES or depth > _MOST_LEVELS or len(text) > _MOST_SIGNS:
                raise ValueError("it is too long, or has too many aliases or levels. Write one value per line")
        values, node = yaml.safe_load(text), yaml.compose(text)
    except UnicodeDecodeError as error:
        raise RecipeError(f"'{path}' is not UTF-8 text ({error}). Save it again as UTF-8.") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date that does not exist
        raise RecipeError(f"'{path}' is not valid YAML: {error}") from error
    if values is not None and not isinstance(values, dict):
        raise RecipeError(f"'{path}' holds a {type(values).__name__}. Expected one 'option: value' per line.")
    return [] if values is None else node.value, values or {}


def _typed(option: Mapping[str, Any], node: Any, value: Any) -> Any:
    """Convert a value of a recipe, given as its node and as YAML reads it, to the type of the option."""
    kinds = option["kinds"]
    if value is None:
        if "NoneType" not in kinds:
            raise ValueError("the value is missing; remove the line to use the default")
        return None
    if isinstance(value, dict | list) and type(value).__name__ not in kinds:
        raise ValueError("expected a single value" + (" or a list" if "list" in kinds else ""))
    if isinstance(value, dict):
        return value
    if isinstance(value, list):
        return [_scalar(option, *one) for one in zip(node.value, value, strict=True)]
    return [_scalar(option, node, value)] if option["many"] else _scalar(option, node, value)


def _scalar(option: Mapping[str, Any], node: Any, value: Any) -> Any:
    """Convert one value from its text: YAML reads 12:30:45 as 45045, 010 as eight, and yes as true."""
    if not isinstance(node.value, str):
        raise ValueError("expected a single value")
    text = node.value.rstrip("\n")  # of a block of lines
    names_text = isinstance(value, str) or text in (option["choices"] or ())
    if option["type"] == "str" and not names_text and not re.fullmatch(r"(0|[1-9]\d*)([.-]\d+)*", text):
        raise ValueError(f"expected text, but YAML reads it as {value}; write '{text}' if this text is meant")
    return _TYPES[option["type"]](_expand_home(text))


def _expand_home(argument: str) -> str:
    """Expand `~/x` from a recipe or from `--option=~/x`, which shells do not expand."""
    name, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return name + equals + (str(Path(value).expanduser()) if value.startswith("~/") else value)


class _Lines:
    """Standard error on which every message begins on a line of its own, also while a progress bar is shown.

    If standard error is not a terminal, each state of a bar becomes a plain line.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.in_bar, self.is_terminal = stream, False, stream.isatty()
        self.state = ""  # of the last bar, without its times

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        if not self.is_terminal:
            if "\r" in text or "\x1b[A" in text:
                lines = [line.rstrip() for line in re.split(r"[\r\n]|\x1b\[A", text)]
                text = "".join(f"{line}\n" for line in lines if line and self._is_new(line))
                self.in_bar = True
            elif self.in_bar and text.strip("\n"):
                self.in_bar = False
            elif self.in_bar:
                text = ""  # the end of the line of a bar, which has ended already
        else:
            if self.in_bar and text and text[0] not in "\r\n\x1b":
                text = f"\n{text}"
            last = text.rpartition("\n")[2]
            if "\n" in text or "\r" in text:
                self.in_bar = "\r" in last and bool(last.rpartition("\r")[2].strip())
        return self.stream.write(text)

    def _is_new(self, bar: str) -> bool:
        before, self.state = self.state, re.sub(r"\d[\d:]*<[\d:?]+", "", bar)
        return self.state != before


def _check_output(folder: str) -> None:
    """Check that results can be written to a folder before the work starts. Nothing is created.

    Raises:
        OSError: The folder cannot be written to.
    """
    path = Path(folder)
    place = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"'{place}' is a file, so '{path}' cannot be created. Choose another folder.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"'{place}' is not writable. Choose another folder, or change its permissions.")


def _go_offline_if_unreachable(values: Mapping[str, Any], *, seconds: float = 3.0) -> None:
    """Set `HF_HUB_OFFLINE` if a model or data set may be on the Hub and the Hub does not answer.

    Otherwise the Hub client tries for half a minute, even for a misspelled folder. Cached files can still be used.
    """
    if "huggingface_hub" in sys.modules or os.environ.get("HF_HUB_OFFLINE"):
        return
    named = [value for name, value in values.items() if re.search(r"^(model|init_from|compare)|data$", name)]
    words = [word for value in named for word in (value if isinstance(value, list) else [value])]
    remote = r"(?!(?:photos|digits)$)([\w-][\w.-]*/)?[\w-][\w.-]*(:[\w.-]+)?"
    if not any(isinstance(word, str) and re.fullmatch(remote, word) and not Path(word).exists() for word in words):
        return
    import socket
    from threading import Thread
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass

    url = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    proxy = getproxies().get(url.scheme)
    if proxy and not proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy)
    answers = []

    def connect() -> None:
        with suppress(OSError), socket.create_connection((url.hostname, url.port or 443), seconds):
            answers.append(True)

    thread = Thread(target=connect, daemon=True)  # the time limit of a socket does not cover the look-up of its name
    thread.start()
    thread.join(seconds)
    if not answers:
        os.environ["HF_HUB_OFFLINE"] = "1"
        logging.info("%s does not answer, so only files in the cache are used (HF_HUB_OFFLINE=1).", url.hostname)


def parser_of(name: str) -> OptionParser:
    """Return the parser of a command."""
    options = json.loads(OPTIONS.read_text(encoding="utf-8"))["commands"][name]
    return OptionParser(options, COMMANDS[name], prog=f"regvit {name}")


def _fields_of_transformers(words: Iterable[str]) -> list[str]:
    """Return the words that the installed transformers declares as training arguments, without importing it."""
    path = Path(str(distribution("transformers").locate_file("transformers/training_args.py")))
    text = path.read_text(encoding="utf-8")
    return [word for word in words if re.search(rf"^    {re.escape(word)}: ", text, flags=re.MULTILINE)]


def _values(name: str, args: Sequence[str]) -> tuple[OptionParser, dict[str, Any]]:
    """Parse the options of a command, including those that only the installed version of transformers has."""
    parser = parser_of(name)
    inherits = any(option["inherited"] for option in parser.options.values())
    words = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in args if word.startswith("--")}
    if inherits and _fields_of_transformers(words - set(parser.names)):
        from hf_regvit.app.recipes import options_of_command

        parser = OptionParser(options_of_command(name), COMMANDS[name], prog=f"regvit {name}")
    return parser, parser.values(args)


def _advice(text: str, parser: OptionParser) -> str:
    """Write the names of options in an error message as they are spelled on the command line."""
    flags = {name: parser.options[ours]["flags"][0] for name, ours in parser.names.items()}
    for name, flag in sorted(flags.items(), key=lambda pair: -len(pair[0])):
        after = r"(?![\w(/]|\.\w)" if "_" in name else r"(?==| is ['\d\[])"
        text = re.sub(rf"(?<![\w./'\"`-]){name}{after}", f"--{flag}", text)
    return text


class _Advising(logging.Formatter):
    """Messages in which the names of options are spelled as on the command line."""

    def __init__(self, advise: Callable[[str], str]) -> None:
        super().__init__("%(message)s")
        self.advise = advise

    def format(self, record: logging.LogRecord) -> str:
        """Return the message of a record."""
        return self.advise(super().format(record))


def _report(error: Exception, advise: Callable[[str], str]) -> int:
    """Print an error in one line, followed by its notes, and return the exit status."""
    expected = ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError, ArithmeticError
    text = advise(str(error).strip())
    if not isinstance(error, expected) or not text:
        text = f"{type(error).__name__}{': ' if text else ''}{text}. Run the command with --debug to see where."
    print("\n".join([f"error: {text}", *map(advise, getattr(error, "__notes__", ()))]), file=sys.stderr)
    return 1


def _run(name: str, args: Sequence[str], switches: Mapping[str, bool]) -> int:
    """Run one command and return its exit status."""
    advise: Callable[[str], str] = str
    formatters = {handler: handler.formatter for handler in logging.getLogger().handlers}
    try:
        parser, values = _values(name, args)
        advise = lambda text: _advice(text, parser)  # noqa: E731
        for handler in formatters:
            handler.setFormatter(_Advising(advise))
        if switches["dry_run"]:
            changed = {key: value for key, value in values.items() if value != parser.options[key]["default"]}
            _show(changed, as_json=switches["json"])
            return 0
        if name not in ("data-check", "demo", "doctor"):
            default = parser.options.get("output_dir", {}).get("default")
            _check_output(values.get("output_dir") or default or ".")
        _go_offline_if_unreachable(values)
        from hf_regvit.app.cli import run

        outcome = run(name, values)
    except SystemExit as stop:  # the parser has already printed its message; a run saved a checkpoint and stopped
        return stop.code if isinstance(stop.code, int) else 2
    except Exception as error:
        if switches["debug"]:
            raise
        return _report(error, advise)
    finally:
        for handler, formatter in formatters.items():
            handler.setFormatter(formatter)
    if outcome.shown:
        if outcome.text and not switches["json"]:
            print(outcome.text)
        _show(outcome.result if switches["json"] else outcome.lines, as_json=switches["json"])
        if outcome.following and not switches["json"]:
            print(f"next: regvit {shlex.join(outcome.following)}")
    return outcome.status


def _show(result: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
    for key, value in () if as_json else result.items():
        print(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")


def usage() -> str:
    """Return the list of the commands."""
    lines = "\n".join(f"  {name:10} {command.summary}" for name, command in COMMANDS.items())
    return str(TABLES["usage"]).replace("COMMANDS", lines)


def _main(args: Sequence[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0 if args else 2
    if args[0] == "--version":
        text = (PACKAGE / "models" / "configuration_regvit.py").read_text(encoding="utf-8")
        found = re.search(r'^__version__ = "(.+)"$', text, flags=re.M)
        print(f"hf_regvit {found[1] if found else 'of an unknown version'}")
        return 0
    name, *rest = args
    if name == "completion":  # run by its path, because importing the package loads torch
        return int(runpy.run_path(str(PACKAGE / "app" / "completion.py"))["main"](rest))
    if name not in COMMANDS:
        hint = suggestion(name, [*COMMANDS, "completion"]) or f" Choose from {', '.join(COMMANDS)}."
        print(f"error: Unknown command '{name}'.{hint}", file=sys.stderr)
        return 2
    if asked := {"-h", "--help", "--help_all", "--help-all"}.intersection(rest):
        print(parser_of(name).full_help(everything="--help_all" in asked or "--help-all" in asked), end="")
        return 0
    switches = {switch: f"--{switch}" in rest for switch in ("dry_run", "json", "debug")}
    rest = [argument for argument in rest if argument not in ("--dry_run", "--json", "--debug")]
    level = os.environ.get("REGVIT_LOG", "INFO" if os.environ.get("RANK", "0") == "0" else "WARNING")
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    # A half imported torch, which has not set its own level yet, prints statistics when it is interrupted.
    for chatty in ("httpx", "httpx2", "httpcore", "httpcore2", "urllib3", "PIL", "matplotlib", "timm", "torch"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    return _run(name, rest, switches)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    stderr = sys.stderr
    sys.stderr = _Lines(stderr)  # type: ignore[assignment]
    if not stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")
        os.environ.setdefault("TQDM_BAR_FORMAT", "{desc} {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]")
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("\n" * stderr.isatty() + "error: interrupted", file=sys.stderr)  # a terminal has shown ^C
        return 130
    finally:
        sys.stderr = stderr


if __name__ == "__main__":
    sys.exit(main())
