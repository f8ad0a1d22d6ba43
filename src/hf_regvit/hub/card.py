"""Model cards: text written from the facts of a run, and a check that a card is complete.

The caller collects the facts: a run while it trains, or `hub.bundle` afterwards.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..models.configuration_regvit import __version__
from .facts import ORIGINS, TASKS, CardFacts

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
SECTIONS = (
    "How to load", "Training data", "Training", "Evaluation", "Artifact tokens", "Intended use", "Limits", "License",
    "How this was made",
)  # fmt: skip


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
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters.update(cell=_cell, line=_line)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=facts.name,
        summary=_summary(facts),
        description=facts.description.strip(),
        model=_model_rows(facts),
        tokens=_tokens(facts),
        snippet=snippet(facts),
        data=_line(facts.data) or "Unknown. The files of the run do not name the training images.",
        recipe=facts.recipe,
        untrained="No training settings are available. This model is " + ORIGINS[facts.origin] + ".",
        has_recipe_file=facts.recipe_file,
        curves=facts.curves,
        alarms=facts.alarms,
        scores=facts.scores,
        evaluation_notes=facts.evaluation_notes,
        pictures=facts.pictures,
        artifacts=facts.artifacts,
        intended_use=_intended_use(facts),
        limits=_limits(facts),
        licenses=_licenses(facts),
        version=__version__,
        environment=facts.environment,
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
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    text = render_card(CardFacts(**{**facts, "config": config}))
    (Path(folder) / "README.md").write_text(text, encoding="utf-8")
    return text


def _line(value: object) -> str:
    return " ".join(str(value).split()).replace("<", "&lt;")


def _cell(value: object) -> str:
    return _line(value).replace("|", "\\|") or "-"


def _header(facts: CardFacts) -> str:
    from huggingface_hub import ModelCardData

    # Only ids of the form "owner/name" are links on the Hub. Other names appear in the text only.
    base = facts.base_model if facts.base_model and re.fullmatch(r"[\w.-]+/[\w.-]+", facts.base_model) else None
    data = ModelCardData(
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        library_name="transformers",  # required by the Hub's widget and snippet; hf_regvit is a tag
        pipeline_tag=facts.pipeline_tag,
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


def _summary(facts: CardFacts) -> str:
    registers = int(facts.config.get("num_register_tokens", 0))
    what = TASKS[facts.model_class][2]
    count = {0: "no register tokens", 1: "one register token"}.get(registers, f"{registers} register tokens")
    start = f" The base model is `{facts.base_model}`." if facts.base_model else ""
    return f"A Vision Transformer with {count}: {what}, {ORIGINS[facts.origin]}.{start}"


def _tokens(facts: CardFacts) -> str:
    """Return the text on the tokens in `last_hidden_state` and on registers."""
    paper = '"Vision Transformers Need Registers", arXiv 2309.16588'
    if not facts.config.get("num_register_tokens", 0):
        return f"The tokens are `[CLS | patches]`. This model has no registers ({paper}); `hf_regvit` can add them."
    what = (
        f"Registers ({paper}) give the\nmodel space for global information. They have no position in the image, and "
        "no head reads them."
    )
    if facts.config.get("discard_registers"):
        return (
            f"The blocks process `[CLS | registers | patches]`, and the model returns `[CLS | patches]`. {what}\n"
            "Only `output.register_tokens` contains them."
        )
    return f"The tokens are `[CLS | registers | patches]`. {what}\n`output.output_mask` is False for registers."


def _model_rows(facts: CardFacts) -> list[tuple[str, str]]:
    config = facts.config

    def pixels(value: Any) -> str:
        rows, columns = (value, value) if isinstance(value, int) else value
        return f"{rows} x {columns} pixels"

    rows = [
        ("class", f"`{facts.model_class}`"),
        ("parameters", f"{facts.parameters:,}"),
        ("blocks, width, heads", ", ".join(
            str(config[key]) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))),
        ("registers", str(config["num_register_tokens"])),
        ("patch size", pixels(config["patch_size"])),
        ("position embeddings", f"for {pixels(config['image_size'])}; resampled for other sizes"),
    ]  # fmt: skip
    labels = config.get("id2label") or {}
    if facts.model_class in ("RegViTForImageClassification", "RegViTForSemanticSegmentation"):
        names = [str(labels[key]) for key in sorted(labels, key=int)]
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        rows.append(("classes", f"{len(names)}: {shown}"))
    if facts.model_class == "RegViTForDepthEstimation":
        rows.append(("depth range", f"{config['min_depth']:g} to {config['max_depth']:g} m"))
    return rows


def snippet(facts: CardFacts) -> str:
    """Return Python code that loads the model and runs it on `image.jpg`. A test executes it."""
    task, auto_class, _ = TASKS[facts.model_class]
    calls = {
        "image-classification": 'pipe("image.jpg")  # labels and scores',
        "image-segmentation": 'pipe("image.jpg", subtask="semantic")  # a mask of the image for each class',
        "depth-estimation": 'pipe("image.jpg")["predicted_depth"]  # (H, W), meters, at the size of the image',
    }
    results = {
        "image-feature-extraction": "output.pooler_output  # (1, D), features of the whole image\n"
        "output.patch_tokens  # (1, N, D), patch features in row-major order, without registers\n"
        "output.register_tokens  # (1, R, D)",
        "image-classification": "best = output.logits[0].softmax(-1).topk(min(5, model.config.num_labels))\n"
        "print([(model.config.id2label[int(i)], round(float(p), 3)) for p, i in zip(best.values, best.indices)])",
        "image-segmentation": "classes = output.logits.argmax(1)  # (1, H, W), at the size of the processed image",
        "depth-estimation": "output.predicted_depth  # (1, H, W), meters, at the size of the processed image",
    }
    stock = (
        f"""

pipe = pipeline("{task}", model=name, trust_remote_code=True)  # does all of the above
{calls[task]}"""
        if task in calls
        else ""
    )
    imported = f"AutoImageProcessor, {auto_class}" + ", pipeline" * (task in calls)
    return f"""import torch
from PIL import Image
from transformers import {imported}

name = "{facts.repo_id}"
processor = AutoImageProcessor.from_pretrained(name)
model = {auto_class}.from_pretrained(name, trust_remote_code=True).eval()
inputs = processor(Image.open("image.jpg").convert("RGB"), return_tensors="pt")
with torch.inference_mode():
    output = model(**inputs)
{results[task]}{stock}"""


def _intended_use(facts: CardFacts) -> list[str]:
    general = {
        "image-feature-extraction": "Frozen image features for nearest neighbors, linear probes, retrieval and dense "
        "tasks, or a starting point for fine-tuning.",
        "image-classification": "Classification into the classes above of images like the training images.",
        "image-segmentation": "Segmentation into the classes above of images like the training images.",
        "depth-estimation": "Estimation of depth in meters for images and cameras like those of the training images.",
    }
    research = "Research on register and artifact tokens: hf_regvit reads norms, attention maps and registers."
    return [general[facts.pipeline_tag], research, *facts.intended_use]


def _limits(facts: CardFacts) -> list[str]:
    limits = list(facts.limits)
    if not facts.scores:
        limits.append("The quality of this model has not been measured.")
    if facts.artifacts and facts.artifacts.has_outliers:
        limits.append("A few patch tokens are artifacts (see above), which affect dense features and attention maps.")
    if not facts.data:
        limits.append("The training images and their biases are unknown.")
    limits.append(
        "The model has not been tested for bias, for robustness or for use on images of people. Do not use it to make "
        "decisions about people."
    )
    limits.append("The model may perform poorly on images that differ from its training images.")
    return limits


def _licenses(facts: CardFacts) -> list[tuple[str, str]]:
    weights = facts.license or "not stated"
    if facts.license_name:
        weights += f" ({facts.license_name})"
    if facts.license_link:
        weights += f", {facts.license_link}"
    rows = [("these weights", weights), ("code (the two Python files)", "apache-2.0")]
    if facts.base_model:
        rows.append((f"weights of {facts.base_model}", facts.base_model_license or "not stated"))
    rows.append(("training images", facts.data_license or "not stated"))
    return rows


# ---- Checking ----------------------------------------------------------------------------------------------------


class CardError(ValueError):
    """A card that cannot be published. The message lists all problems."""


# "None" and "nan" in the place of a value, but not in a phrase such as "None of these images".
_UNFILLED = re.compile(
    r"\{\{|\{%|\}\}|%\}|\bTODO\b|\bFIXME\b|\[?[Mm]ore [Ii]nformation [Nn]eeded|\b(?:None|nan)\b(?=\W*$| *[|%,;\])])",
    flags=re.MULTILINE,
)
_CLASS_NAMES = re.compile(r"^(?:\| classes \||- IoU of each class:).*$", flags=re.MULTILINE)


def card_header(text: str) -> dict[str, Any]:
    """Return the YAML header of a card, or an empty dict if it has none."""
    import yaml

    found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", text, flags=re.DOTALL)
    content = yaml.safe_load(found[1]) if found else {}
    return content if isinstance(content, dict) else {}


def card_snippets(text: str) -> list[str]:
    """Return the Python code blocks of a card."""
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def check_card(
    text: str, *, folder: str | Path | None = None, required: Sequence[str] = ("license", "pipeline_tag")
) -> None:
    """Check that a card is complete.

    Args:
        text: Text of the card.
        folder: Folder with the figures of the card; None skips the check of the figures.
        required: Required fields of the header.

    Raises:
        CardError: Sections, header fields or figures are missing, or placeholders were not filled in.
    """
    wrong = []
    header = card_header(text)
    wrong += [f"the header has no '{name}'" for name in (*required, "library_name", "tags") if not header.get(name)]
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
