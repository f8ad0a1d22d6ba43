"""Hooks of mkdocs: list tutorials, insert generated tables and an exported page, make search work from the disk."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = Path(os.environ.get("EXPORTED_PAGE", ROOT / ".cache" / "docs_page"))  # written by `make docs`
EXAMPLE = "chelsea"  # built-in image of a cat, CC0


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
    tables = (("commands", commands), ("recipes", recipes), ("options", options), ("config", config_fields))
    for name, make in (*tables, ("exported_page", exported_page)):
        if f"{{{{ {name} }}}}" in markdown:
            markdown = markdown.replace(f"{{{{ {name} }}}}", make())
    return markdown


def on_post_build(config: Any, **_: Any) -> None:
    """Write the files of the search without a server, and copy the page of an exported model with its image."""
    search_from_disk(Path(config["site_dir"]))
    if not PAGE.is_dir():
        return
    from hf_regvit.data.builtin import builtin_images

    target = Path(config["site_dir"], "exported_page")
    shutil.copytree(PAGE, target, dirs_exist_ok=True)
    image = builtin_images()[EXAMPLE]
    image.thumbnail((512, 512))
    image.save(target / "example.png")


def search_from_disk(site: Path) -> None:
    """Write what the search needs on a page that is opened from the disk, where browsers refuse `fetch` and workers.

    There the theme reads `search_index.js` in place of the JSON file. Its worker is started from its code as a string;
    English needs none of the files that the worker could import. `extra.polyfills` of mkdocs.yml loads the script.
    (The offline plugin of the theme would load such a script from another server.)
    """
    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    (site / "search" / "search_index.js").write_text(f"var __index = {index}", encoding="utf-8")
    (worker,) = (site / "assets" / "javascripts" / "workers").glob("search.*.min.js")
    code = json.dumps(worker.read_text(encoding="utf-8"))
    script = f"""if (location.protocol === "file:") {{
  const address = URL.createObjectURL(new Blob([{code}]));
  window.Worker = class extends Worker {{ constructor() {{ super(address); }} }};
}}
"""
    (site / "search" / "worker_from_disk.js").write_text(script, encoding="utf-8")


def exported_page() -> str:
    """Return a frame with the page of an exported model, or a sentence where there is none."""
    if not PAGE.is_dir():
        return "*The page is not shown here, because this site was built without npm (`make docs`).*"
    return (
        '<iframe class="exported-page" src="../exported_page/index.html?image=example.png" loading="lazy" '
        'title="Page of an exported model"></iframe>'
    )


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
    """Return a section for each command with its summary, its example and a table of its options."""
    from hf_regvit_cli import COMMANDS, parser_of

    parts = []
    for name, command in COMMANDS.items():
        options = parser_of(name).options.values()
        rows = ["| option | default | description |", "|---|---|---|"]
        rows += [row_of(option) for option in options if not option["inherited"] or option["name"] in COMMON]
        summary = f"{command.summary[0].upper()}{command.summary[1:]}."
        table = "\n".join(rows)
        parts.append(f"## regvit {name}\n\n{summary}\n\n```bash\n{command.example}\n```\n\n{table}\n")
    return "\n".join(parts)


def row_of(option: dict[str, Any]) -> str:
    """Return the row of an option, with its other spellings."""
    first, *others = option["flags"]
    value = "" if option["type"] == "bool" else " ..."
    spellings = [f"`--{first}{value}`", *(f"`--{other}`" for other in others)]
    default = option["default"]
    if default is True:
        spellings.append(f"`--no_{option['name']}`")
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    default = "" if default is None or default is False or shown == "" else f"`{shown}`"
    return f"| {', '.join(spellings)} | {default} | {option['help'].replace('|', '&#124;')} |"


# Inherited options that many runs use.
COMMON = {
    "output_dir", "max_steps", "seed", "save_steps", "resume_from_checkpoint", "bf16", "num_train_epochs", "use_cpu",
    "gradient_accumulation_steps", "dataloader_num_workers",
}  # fmt: skip
