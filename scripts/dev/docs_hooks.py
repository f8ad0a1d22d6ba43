"""Hooks of mkdocs: list the tutorials in the navigation and insert generated tables into pages."""

import contextlib
import dataclasses
import io
import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]


def on_config(config: Any) -> Any:
    """Add every file of `docs/tutorials` to the navigation, with the main tutorial first."""
    tutorials = sorted(Path(config["docs_dir"], "tutorials").glob("*.md"))
    tutorials.sort(key=lambda path: path.stem != "train_on_your_own_images")
    for entry in config["nav"]:
        if "Tutorials" in entry:
            entry["Tutorials"] = [{title_of(path): f"tutorials/{path.name}"} for path in tutorials]
    return config


def title_of(path: Path) -> str:
    found = re.search(r"^# (.+)$", path.read_text(encoding="utf-8"), flags=re.M)
    if found is None:
        raise ValueError(f"'{path}' has no heading. Add a line '# ...'.")
    return found[1]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace placeholders such as `{{ commands }}` by generated text."""
    for name, make in (("commands", commands), ("recipes", recipes), ("options", options), ("config", config_fields)):
        if f"{{{{ {name} }}}}" in markdown:
            markdown = markdown.replace(f"{{{{ {name} }}}}", make())
    return markdown


def recipes() -> str:
    """Return the table of `examples/README.md`."""
    lines = (ROOT / "examples" / "README.md").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("|"))


def options() -> str:
    """Return a table of all pretraining options with their defaults and help texts."""
    from hf_regvit import PretrainingArguments

    rows = ["| option | default | description and published value |", "|---|---|---|"]
    own = PretrainingArguments.own_options()
    for field in dataclasses.fields(PretrainingArguments):
        if field.name in own:
            default = field.default_factory() if field.default is dataclasses.MISSING else field.default
            rows.append(f"| `{field.name}` | {default} | {field.metadata.get('help', '')} |")
    return "\n".join(rows)


def config_fields() -> str:
    """Return a table of the fields of `RegViTConfig`, whose docstring has the format of transformers."""
    from hf_regvit import RegViTConfig

    arguments = (RegViTConfig.__doc__ or "").partition("Args:\n")[2]
    rows = ["| field | type and default | description |", "|---|---|---|"]
    for head, text in re.findall(r"^ {8}(\w.*):\n((?: {12}.*\n)+)", arguments, flags=re.M):
        names = re.sub(r"\(.*?\)", "", head).split(",")
        kinds = "; ".join(re.findall(r"\((.*?)\)", head)).replace(", *optional*", "")
        cells = [", ".join(f"`{name.strip()}`" for name in names), kinds, " ".join(text.split())]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def commands() -> str:
    """Return a section for each command with its summary and a table of its options."""
    from hf_regvit.app import cli

    sentences = dict(re.findall(r"^  ([a-z-]+) +(\w.+)$", cli.USAGE, flags=re.M))
    parts = []
    for name in cli.COMMANDS:
        text = io.StringIO()
        with contextlib.redirect_stdout(text), mock.patch.dict(os.environ, COLUMNS="1000"):  # avoids line breaks
            cli.main([name, "--help"])
        words = re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue())  # terminal colors
        sentence = sentences[name][0].upper() + sentences[name][1:]
        parts.append(f"## regvit {name}\n\n{sentence}.\n\n{own_options(words)}\n")
    return "\n".join(parts)


def own_options(text: str) -> str:
    """Return a table of a command's options, without those inherited from transformers and without aliases."""
    from transformers import TrainingArguments

    _, _, options = text.partition("options:\n")
    inherited = set(TrainingArguments.__dataclass_fields__)
    rows = ["| option | default | description |", "|---|---|---|"]
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
        value = re.sub(r" [A-Z0-9_]+", " ...", found[2].partition(" [")[0])  # "[" begins an optional part
        default = "" if default in ("", "None", "False", "[]") else f"`{default}`"
        what = what.replace("|", "\\|")
        option = f"`--{name}`, `--no_{name}`" if default == "`True`" else f"`--{name}{value}`"
        rows.append(f"| {option} | {default} | {what} |")
    return "\n".join(rows)


# Options of Trainer to which this package gives another default or meaning.
OWN_MEANING = {
    "output_dir", "learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "per_device_train_batch_size",
    "max_steps", "num_train_epochs", "seed", "save_steps", "logging_steps", "resume_from_checkpoint", "bf16",
}  # fmt: skip
