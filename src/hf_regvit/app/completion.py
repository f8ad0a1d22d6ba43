"""Scripts that complete commands, options and values of `regvit` with the Tab key in bash, zsh and fish.

The command line runs this file by its path, because importing any part of `hf_regvit` loads torch. The scripts are
static: a shell that completes a word starts no Python.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from hf_regvit_cli import COMMANDS, EVERY_COMMAND, OPTIONS, TABLES

SHELLS = ("bash", "zsh", "fish")
# Values of options without names: what follows the @ is not listed in the script.
_OTHERWISE = {"bool": ["true", "false"], "str": ["@files"], "int": ["@none"], "float": ["@none"]}


def main(args: Sequence[str]) -> int:
    """Print the script of a shell, or the usage, and return the exit status."""
    if len(args) == 1 and args[0] in SHELLS:
        print(script(args[0]), end="")
        return 0
    if not args or {"-h", "--help", "--help_all", "--help-all"}.intersection(args):
        print(TABLES["completion"], end="")
        return 0 if args else 2
    print(f"error: Unknown shell '{' '.join(args)}'. Choose from {', '.join(SHELLS)}.", file=sys.stderr)
    return 2


def script(shell: str) -> str:
    """Return the completion script for a shell."""
    options = json.loads(OPTIONS.read_text(encoding="utf-8"))["commands"]
    lists, values, known_words = [], {"completion::1": list(SHELLS)}, TABLES["values"]
    for command, all_options in options.items():
        helps = {option["name"]: (option["flags"][0], option["help"]) for option in all_options}
        flags = {flag: option["name"] for option in all_options for flag in [option["name"], *option["flags"]]}
        names = [flags[name] for group in COMMANDS[command].daily.values() for name in group.split()]
        daily = [helps.pop(name) for name in names] + [("help", "List the daily options.")]
        daily += [(name.split()[0], text) for name, text in EVERY_COMMAND.items()]
        lists.append(_options(shell, command, daily, helps.values()))
        for option in all_options:
            own = known_words.get(f"{command} {option['name']}", known_words.get(option["name"], ""))
            known = option["choices"] or own.split() or _OTHERWISE[option["type"]]
            for flag in option["flags"]:
                values[f"{command}:{flag}:{'*' if option['many'] else 1}"] = known
        values[f"{command}:config:1"] = ["@files"]
    summaries = [(name, command.summary) for name, command in COMMANDS.items()]
    summaries.append(("completion", "print a script that completes commands and options with the Tab key"))
    text = (Path(__file__).parent / "templates" / f"completion.{shell}").read_text(encoding="utf-8")
    text = text.replace("@commands@", _words(shell, summaries, dashes=""))
    return text.replace("@options@", "\n".join(lists)).replace("@values@", "\n".join(_values(shell, values)))


def _options(shell: str, command: str, daily: Iterable[tuple[str, str]], others: Iterable[tuple[str, str]]) -> str:
    """Return the branch that sets the options of a command."""
    first, rest = _words(shell, daily), _words(shell, others)
    if shell == "fish":
        return f"    case {command}\n        set daily {first}\n        set others {rest}"
    return f"    {command}) daily=({first}) others=({rest}) ;;"


def _values(shell: str, values: dict[str, list[str]]) -> Iterable[str]:
    """Yield the branches that set the values of a position, one for all positions with the same values."""
    for known in dict.fromkeys(map(tuple, values.values())):
        words = " ".join(known)
        keys = [key for key, value in values.items() if tuple(value) == known]
        if shell == "fish":
            yield f"    case {' '.join(map(repr, keys))}\n        set values {words}"
        else:
            yield f"    {' | '.join(keys)}) values=({words}) ;;"


def _words(shell: str, named: Iterable[tuple[str, str]], *, dashes: str = "--") -> str:
    """Return names as words of a shell, with their help where the shell shows it."""
    if shell == "bash":
        return " ".join(dashes + name for name, _ in named)
    between, quote = {"zsh": (":", r"'\''"), "fish": ("\t", r"\'")}[shell]
    texts = (f"{dashes}{name}{between}{text}" for name, text in named)
    if shell == "fish":
        texts = (text.replace("\\", "\\\\") for text in texts)
    return " ".join(f"'{text.replace(chr(39), quote)}'" for text in texts)
