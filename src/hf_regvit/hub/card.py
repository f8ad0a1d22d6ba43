"""Model cards: text written from the facts of a run, and a check that a card is complete.

The caller collects the facts: a run while it trains, or `hub.bundle` afterwards.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..models.configuration_regvit import __version__
from ..models.saving import read_json, whole_file
from .facts import ORIGINS, TASKS, CardFacts, Json

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
SECTIONS = tuple(re.findall(r"^## (.+)$", TEMPLATE.read_text(encoding="utf-8"), flags=re.MULTILINE))


# ---- Writing -----------------------------------------------------------------------------------------------------


def render_card(facts: CardFacts) -> str:
    """Return the text of the card with its YAML header.

    Raises:
        ValueError: The origin or the model class is unknown.
    """
    import jinja2

    if facts.origin not in ORIGINS:
        raise ValueError(f"Unknown origin={facts.origin!r}. Choose from {', '.join(ORIGINS)}.")
    if facts.model_class not in TASKS:
        raise ValueError(f"Unknown model class {facts.model_class}. Model cards support {', '.join(TASKS)}.")
    # Names of data sets and classes are untrusted text, which must not break the Markdown of the card.
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters.update(cell=_cell, line=_line, pixels=_pixels)
    labels = facts.config.get("id2label") or {}
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        facts=facts,
        origin=ORIGINS[facts.origin],
        classes=[str(labels[key]) for key in sorted(labels, key=int)],
        version=__version__,
    )
    return f"---\n{_header(facts)}\n---\n\n{text}"


def write_card_file(folder: str | Path, **facts: Any) -> str:
    """Write `README.md` into the folder of a saved model and return its text.

    Args:
        folder: Folder of the saved model, whose `config.json` is read.
        facts: Other fields of `CardFacts`.

    Raises:
        TypeError: A field does not exist in `CardFacts`.
    """
    text = render_card(CardFacts(**{**facts, "config": read_json(Path(folder, "config.json"))}))
    with whole_file(Path(folder, "README.md")) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return text


def _line(value: object) -> str:
    return " ".join(str(value).split()).replace("<", "&lt;")


def _cell(value: object) -> str:
    return _line(value).replace("|", "\\|") or "-"


def _pixels(value: int | Sequence[int]) -> str:
    rows, columns = (value, value) if isinstance(value, int) else value
    return f"{rows} x {columns} pixels"


def _header(facts: CardFacts) -> str:
    from huggingface_hub import ModelCardData

    # Only ids of the form "owner/name" are links on the Hub. Other names appear in the text only.
    base = facts.base_model if facts.base_model and re.fullmatch(r"[\w.-]+/[\w.-]+", facts.base_model) else None
    data = ModelCardData(
        **{name: getattr(facts, name) for name in ("license", "license_name", "license_link")},
        library_name="transformers",  # required by the Hub's widget and snippet; hf_regvit is a tag
        pipeline_tag=facts.task.pipeline_tag,
        base_model=base,
        datasets=list(facts.datasets) or None,
        tags=["regvit", "hf_regvit", "registers", "vision", "custom_code", facts.origin],
    )
    header: str = data.to_yaml()
    if facts.results:
        import yaml

        index = {"model-index": [{"name": facts.name, "results": [dict(result) for result in facts.results]}]}
        header += "\n" + yaml.safe_dump(index, sort_keys=False, allow_unicode=True, width=10_000)
    return header.strip()


# ---- Checking ----------------------------------------------------------------------------------------------------


class CardError(ValueError):
    """A card that cannot be published. The message lists all problems."""


# "None" and "nan" in the place of a value, but not in a phrase such as "None of these images".
_UNFILLED = re.compile(
    r"\{\{|\{%|\}\}|%\}|\bTODO\b|\bFIXME\b|\[?[Mm]ore [Ii]nformation [Nn]eeded|\b(?:None|nan)\b(?=\W*$| *[|%,;\])])",
    flags=re.MULTILINE,
)
_REQUIRED = ("license", "pipeline_tag", "library_name", "tags")  # fields of the header
_CLASS_NAMES = re.compile(r"^(?:\| classes \||- IoU of each class:).*$", flags=re.MULTILINE)


def card_header(text: str) -> Json:
    """Return the YAML header of a card, or an empty dict if it has none."""
    import yaml

    found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", text, flags=re.DOTALL)
    content = yaml.safe_load(found[1]) if found else {}
    return content if isinstance(content, dict) else {}


def card_snippets(text: str) -> list[str]:
    """Return the Python code blocks of a card."""
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def check_card(text: str, *, folder: str | Path | None = None) -> None:
    """Check that a card is complete.

    Args:
        text: Text of the card.
        folder: Folder with the figures of the card; None skips the check of the figures.

    Raises:
        CardError: Sections, header fields or figures are missing, or placeholders were not filled in.
    """
    wrong = []
    header = card_header(text)
    advice = {"license": " (give one, such as --license apache-2.0)"}
    missing = [name for name in _REQUIRED if not header.get(name)]
    wrong += [f"the header has no '{name}'{advice.get(name, '')}" for name in missing]
    if (license := header.get("license")) and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", str(license)):
        wrong.append(
            f"license '{license}' is not a Hub license id; use a lower-case id such as apache-2.0, or 'other' with "
            "license_name and license_link"
        )
    if license == "other" and not (header.get("license_name") and header.get("license_link")):
        wrong.append("license is 'other', which requires license_name and license_link in the header")
    body = re.sub(r"^---\r?\n.*?\r?\n---\r?\n", "", text, count=1, flags=re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", body, flags=re.DOTALL | re.MULTILINE)
    parts = re.split(r"^## (.+)$", body, flags=re.MULTILINE)
    filled = {title.strip() for title, content in zip(parts[1::2], parts[2::2], strict=True) if content.strip()}
    wrong += [f"the section '{title}' is missing or empty" for title in SECTIONS if title not in filled]
    prose = _CLASS_NAMES.sub("", prose)  # a class may be called "None"
    wrong += [f"the placeholder '{found}' was not filled in" for found in sorted(set(_UNFILLED.findall(prose)))]
    if not card_snippets(body):
        wrong.append("there is no Python snippet that loads the model")
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", body)
    if folder is not None:
        wrong += [f"the figure '{name}' does not exist" for name in pictures if not (Path(folder) / name).is_file()]
    if wrong:
        raise CardError("The model card (README.md) cannot be published: " + "; ".join(wrong) + ".")
