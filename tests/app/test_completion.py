"""Tests of the completion scripts: bash, zsh and fish read them and complete what a user has typed."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import time
import tomllib

import pytest

import hf_regvit_cli

COMMANDS = [*hf_regvit_cli.COMMANDS, "completion"]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Return a function from a shell to the path of its script; skips where the shell is not installed."""
    folder = tmp_path_factory.mktemp("completion")

    def script(shell):
        if shutil.which(shell) is None:
            pytest.skip(f"{shell} is not installed")
        path = folder / f"regvit.{shell}"
        if not path.exists():
            with path.open("w") as file, pytest.MonkeyPatch.context() as patch:
                patch.setattr("sys.stdout", file)
                assert hf_regvit_cli.main(["completion", shell]) == 0
        return path

    return script


def asked(shell, script, lines, folder):
    """Return the words that a shell offers at the end of each line, where `=` separates words as in bash."""
    if shell == "fish":
        program = [f"source '{script}'", *(f"complete -C '{line}'; echo ///" for line in lines)]
        arguments = ["--no-config"]
    else:
        program = [f"source '{script}'", "compopt() { :; }"]  # which works while readline completes only
        for line in lines:
            words = " ".join(f"'{word}'" for word in line.replace("=", " = ").split(" "))
            program += [f"COMP_WORDS=({words}) COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)) COMPREPLY=()"]
            program += ["_regvit", 'printf "%s\\n" "${COMPREPLY[@]}" ///']
        arguments = ["--norc"]
    # The script starts no program, so completion takes no time; fish itself lists files with `ls`.
    nothing = {**os.environ, "PATH": str(folder) if shell == "bash" else os.environ["PATH"]}
    done = subprocess.run(
        [shutil.which(shell), *arguments], input="\n".join(program), cwd=folder, env=nothing, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    offers = [offer.split("\n") for offer in done.stdout.split("///\n")[:-1]]
    return [[word.partition("\t")[0] for word in offer if word] for offer in offers]


CASES = {
    "regvit ": COMMANDS,
    "regvit di": ["diagnose"],
    "regvit completion ": ["bash", "zsh", "fish"],
    "regvit pretrain --num_lo": ["--num_local_crops"],
    "regvit pretrain --device c": ["cpu", "cuda"],
    "regvit pretrain --seed ": [],
    "regvit pretrain --bf16 ": ["true", "false"],
    "regvit pretrain --save-strategy s": ["steps"],
    "regvit finetune --task s": ["semantic-segmentation"],
    "regvit pretrain --mode l": ["lora", "last_blocks"],
    "regvit finetune --mode l": ["lora", "linear"],
    "regvit evaluate --model a b --tasks knn l": ["linear", "logistic", "lost"],
    "regvit unknown --": [],
}


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_commands_options_and_values_are_completed(shell, scripts, tmp_path) -> None:
    found = asked(shell, scripts(shell), CASES, tmp_path)
    assert {line: sorted(words) for line, words in zip(CASES, found, strict=True)} == {
        line: sorted(words) for line, words in CASES.items()
    }


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_two_dashes_list_the_daily_options_and_a_letter_all_of_them(shell, scripts, tmp_path) -> None:
    parser = hf_regvit_cli.parser_of("pretrain")
    flags = {name: f"--{option['flags'][0]}" for name, option in parser.options.items()}
    daily = {flags[parser.names[name]] for group in parser.command.daily.values() for name in group.split()}
    letters = sorted({flag[2] for flag in flags.values()})
    lines = ["regvit pretrain --", "regvit pretrain --device cpu ", *(f"regvit pretrain --{one}" for one in letters)]
    bare, after, *found = asked(shell, scripts(shell), lines, tmp_path)
    every = {"--config", "--dry_run", "--json", "--debug", "--help", "--help_all"}
    assert set(bare) == set(after) | ({"--"} & set(bare)) == daily | every
    assert {word for words in found for word in words} == {*flags.values(), *every}


def test_an_equals_sign_separates_option_and_value(scripts, tmp_path) -> None:
    lines = ["regvit pretrain --device=c", "regvit pretrain --device=", "regvit pretrain --device=cpu --num_lo"]
    words = ["auto", "cpu", "cuda", "mps", "xpu"]
    assert asked("bash", scripts("bash"), lines, tmp_path) == [["cpu", "cuda"], words, ["--num_local_crops"]]


def test_fish_completes_files_and_values_after_an_equals_sign(scripts, tmp_path) -> None:
    (tmp_path / "photos").mkdir()
    lines = ["regvit diagnose --data ph", "regvit diagnose --data=ph", "regvit pretrain --device=c"]
    found = asked("fish", scripts("fish"), lines, tmp_path)
    assert [sorted(words) for words in found] == [["photos/"], ["--data=photos/"], ["--device=cpu", "--device=cuda"]]


TYPED = {
    "regvit dia": "regvit diagnose ",
    "regvit pretrain --num_lo": "regvit pretrain --num_local_crops ",
    "regvit pretrain --preset b": "regvit pretrain --preset base ",
    "regvit pretrain --device=xp": "regvit pretrain --device=xpu ",
    "regvit diagnose --data ph": "regvit diagnose --data photos/",
}


@pytest.mark.parametrize("arguments", [["bash", "--norc", "-i"], ["zsh", "-f", "-i"]], ids=["bash", "zsh"])
def test_the_tab_key_completes(arguments, scripts, tmp_path) -> None:
    (tmp_path / "photos").mkdir()
    script = scripts(arguments[0])
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        os.environ["TERM"] = "dumb"
        os.execvp(arguments[0], arguments)

    def shows(keys, expected):
        seen, end = b"", time.monotonic() + 20
        os.write(terminal, keys.encode())
        while expected.encode() not in seen and time.monotonic() < end:
            if select.select([terminal], [], [], 0.1)[0]:
                seen += os.read(terminal, 65536)
        return expected if expected.encode() in seen else seen.decode(errors="replace")

    try:
        assert shows(f"source '{script}'; echo rea''dy\n", "ready\r\n") == "ready\r\n"
        for line, completed in TYPED.items():
            assert shows(f"{line}\t", completed) == completed
            assert "left" in shows("\x15echo l''eft\n", "left\r\n")  # Ctrl-U clears the line
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(terminal)


def test_words_of_options_are_those_of_their_help() -> None:
    """So a renamed choice is noticed; options without a list of names in their help would not need one here."""
    table = tomllib.loads((hf_regvit_cli.PACKAGE / "app" / "commands.toml").read_text())["values"]
    options = json.loads(hf_regvit_cli.OPTIONS.read_text())["commands"]
    assert table["accept"] == table["precision"]
    unused = set(table)
    for command, all_options in options.items():
        for option in all_options:
            key = next((key for key in (f"{command} {option['name']}", option["name"]) if key in table), "")
            words = table.get(key, "").split()
            unused.discard(key)
            if option["choices"]:
                assert set(words) <= set(option["choices"])
            elif option["name"] not in ("accept", "hub_strategy"):
                assert [word for word in words if word not in option["help"]] == []
    assert unused == set()


def test_another_shell_is_an_error(capsys) -> None:
    assert hf_regvit_cli.main(["completion", "tcsh"]) == 2
    assert capsys.readouterr().err == "error: Unknown shell 'tcsh'. Choose from bash, zsh, fish.\n"
    assert hf_regvit_cli.main(["completion"]) == 2
    assert hf_regvit_cli.main(["completion", "--help"]) == 0
    usage = hf_regvit_cli.TABLES["completion"]
    assert capsys.readouterr().out == usage * 2
