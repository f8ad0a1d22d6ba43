"""Scripts that complete commands, options and values of `regvit` with the Tab key in bash, zsh and fish.

The command line runs this file by its path, because importing any part of `hf_regvit` loads torch. The scripts are
static: a shell that completes a word starts no Python.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from hf_regvit_cli import COMMANDS, EVERY_COMMAND, TABLES, parser_of

SHELLS = ("bash", "zsh", "fish")
# Branches that set the options of a command and the values of a position: bash and zsh, fish.
_BRANCHES = (
    ("    {}) daily=({}) others=({}) ;;", "    {}) values=({}) ;;"),
    ("    case {}\n        set daily {}\n        set others {}", "    case {}\n        set values {}"),
)
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
    lists, known_words = [], TABLES["values"]
    values = {"completion::1": list(SHELLS), "*:config:1": ["@files"]}
    for command, (_, _, _, groups) in COMMANDS.items():
        parser = parser_of(command)
        helps = {name: (option["flags"][0], option["help"]) for name, option in parser.options.items()}
        daily = [helps.pop(parser.names[name]) for group in groups.values() for name in group.split()]
        daily += [(name.split()[0], text) for name, text in EVERY_COMMAND.items()]
        options = _words(shell, daily), _words(shell, helps.values())
        lists.append(_BRANCHES[shell == "fish"][0].format(command, *options))
        for name, option in parser.options.items():
            own = known_words.get(f"{command} {name}", known_words.get(name, ""))
            known = option["choices"] or own.split() or _OTHERWISE[option["type"]]
            for flag in option["flags"]:
                values[f"{command}:{flag}:{'*' if option['many'] else 1}"] = known
    summaries = [(name, command.summary) for name, command in COMMANDS.items()]
    summaries.append(("completion", "print a script that completes commands and options with the Tab key"))
    text = (Path(__file__).parent / "templates" / f"completion.{shell}").read_text(encoding="utf-8")
    text = text.replace("@commands@", _words(shell, summaries, dashes=""))
    return text.replace("@options@", "\n".join(lists)).replace("@values@", "\n".join(_branches(shell, values)))


def _branches(shell: str, values: dict[str, list[str]]) -> Iterable[str]:
    """Yield the branches that set the values of a position, one for all positions with the same values."""
    for known in dict.fromkeys(map(tuple, values.values())):
        keys = [key for key, value in values.items() if tuple(value) == known]
        where = " ".join(map(repr, keys)) if shell == "fish" else " | ".join(keys)
        yield _BRANCHES[shell == "fish"][1].format(where, " ".join(known))


def _words(shell: str, named: Iterable[tuple[str, str]], *, dashes: str = "--") -> str:
    """Return names as words of a shell, with their help where the shell shows it."""
    if shell == "bash":
        return " ".join(dashes + name for name, _ in named)
    between, backslash, quote = {"zsh": (":", "\\", r"'\''"), "fish": ("\t", r"\\", r"\'")}[shell]
    texts = (f"{dashes}{name}{between}{text}".replace("\\", backslash).replace("'", quote) for name, text in named)
    return " ".join(f"'{text}'" for text in texts)
