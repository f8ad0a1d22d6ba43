"""What mkdocs asks while it builds the site: which tutorials there are, and what the commands say of themselves."""

import contextlib
import dataclasses
import io
import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]


def on_config(config: Any) -> Any:
    """Every file of `docs/tutorials` is in the navigation, the longest-standing one first."""
    tutorials = sorted(Path(config["docs_dir"], "tutorials").glob("*.md"))
    tutorials.sort(key=lambda path: path.stem != "train_on_your_own_images")
    for entry in config["nav"]:
        if "Tutorials" in entry:
            entry["Tutorials"] = [{title_of(path): f"tutorials/{path.name}"} for path in tutorials]
    return config


def title_of(path: Path) -> str:
    found = re.search(r"^# (.+)$", path.read_text(encoding="utf-8"), flags=re.M)
    if found is None:
        raise ValueError(f"'{path}' has no heading '# ...'.")
    return found[1]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lines such as `{{ commands }}` become what they name."""
    for name, make in (("commands", commands), ("recipes", recipes), ("options", options), ("config", config_fields)):
        if f"{{{{ {name} }}}}" in markdown:
            markdown = markdown.replace(f"{{{{ {name} }}}}", make())
    return markdown


def recipes() -> str:
    """The table of `examples/README.md`."""
    lines = (ROOT / "examples" / "README.md").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("|"))


def options() -> str:
    """Every option of a pretraining run with its default and what its help says of the published value."""
    from hf_regvit import PretrainingArguments

    rows = ["| option | default | what, and the published value |", "|---|---|---|"]
    own = PretrainingArguments.__annotations__
    for field in dataclasses.fields(PretrainingArguments):
        if field.name in own:
            default = field.default_factory() if field.default is dataclasses.MISSING else field.default
            rows.append(f"| `{field.name}` | {default} | {field.metadata.get('help', '')} |")
    return "\n".join(rows)


def config_fields() -> str:
    """The fields of `RegViTConfig`, whose docstring has the format of transformers and not the one of this site."""
    from hf_regvit import RegViTConfig

    arguments = (RegViTConfig.__doc__ or "").partition("Args:\n")[2]
    rows = ["| field | type and default | what |", "|---|---|---|"]
    for head, text in re.findall(r"^ {8}(\w.*):\n((?: {12}.*\n)+)", arguments, flags=re.M):
        names = re.sub(r"\(.*?\)", "", head).split(",")
        kinds = "; ".join(re.findall(r"\((.*?)\)", head)).replace(", *optional*", "")
        cells = [", ".join(f"`{name.strip()}`" for name in names), kinds, " ".join(text.split())]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def commands() -> str:
    """Each command with its sentence and a table of its options."""
    from hf_regvit import cli

    sentences = dict(re.findall(r"^  ([a-z-]+) +(\w.+)$", cli.USAGE, flags=re.M))
    parts = []
    for name in cli.COMMANDS:
        text = io.StringIO()
        with contextlib.redirect_stdout(text), mock.patch.dict(os.environ, COLUMNS="1000"):  # sentences in one piece
            cli.main([name, "--help"])
        words = re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue())  # colours of a terminal
        sentence = sentences[name][0].upper() + sentences[name][1:]
        parts.append(f"## regvit {name}\n\n{sentence}.\n\n{own_options(words)}\n")
    return "\n".join(parts)


def own_options(text: str) -> str:
    """Without the hundred options that every training of transformers has, and each under one name."""
    from transformers import TrainingArguments

    _, _, options = text.partition("options:\n")
    inherited = set(TrainingArguments.__dataclass_fields__)
    rows = ["| option | default | what |", "|---|---|---|"]
    for entry in re.split(r"\n(?=  -)", "\n" + options.strip("\n")):
        flags, _, what = re.sub(r"\n\s*|\s{2,}", "\t", entry.strip()).partition("\t")
        found = re.match(r"--([a-z0-9_]+)([^,]*)", flags)
        if found is None or found[1].startswith("no_") or found[1] == "config":
            continue
        if found[1] in inherited - OWN_MEANING:
            continue
        what = what.replace("\t", " ")
        given = re.search(r" ?\(default: (.*)\)$", what)
        what, default = (what[: given.start()], given[1]) if given else (what, "")
        name = "model" if "--model " in flags else found[1]
        value = re.sub(r" [A-Z0-9_]+", " ...", found[2].partition(" [")[0])  # behind "[" stands what may be left out
        default = "" if default in ("", "None", "False", "[]") else f"`{default}`"
        what = what.replace("|", "\\|")
        option = f"`--{name}`, `--no_{name}`" if default == "`True`" else f"`--{name}{value}`"
        rows.append(f"| {option} | {default} | {what} |")
    return "\n".join(rows)


# Options of Trainer to which this package gives a default or a meaning of its own.
OWN_MEANING = {
    "output_dir", "learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "per_device_train_batch_size",
    "max_steps", "num_train_epochs", "seed", "save_steps", "logging_steps", "resume_from_checkpoint", "bf16",
}  # fmt: skip
