"""Check the documentation: public names, options, sources of defaults, questions, figures, and the site."""

import ast
import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import hf_regvit
from builders import mask_folder, save_model, tiny_model
from helpers import load_script, requires_shared, shared_dir
from hf_regvit import PretrainingArguments
from hf_regvit.app import cli
from hf_regvit_cli import main as regvit
from hf_regvit_cli import parser_of

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SKILL = ROOT / "skills" / "hf-regvit" / "SKILL.md"
# Another test executes the tutorials.
OURS = [page for page in [*PAGES, SKILL] if page.parent.name != "tutorials"]


def text_of(page):
    return page.read_text(encoding="utf-8")


DOCUMENTED = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", text_of(page), flags=re.M)]


def test_every_public_name_is_in_the_reference():
    missing = {f"hf_regvit.{name}" for name in hf_regvit.__all__} - set(DOCUMENTED) - {"hf_regvit.__version__"}
    assert not missing, f"Add '::: NAME' for {missing} to a page of docs/reference."
    assert "hf_regvit.__version__" in text_of(DOCS / "reference" / "models.md")


@pytest.mark.parametrize("name", DOCUMENTED)
def test_what_is_documented_is_public(name):
    package, _, attribute = name.rpartition(".")
    assert package == "hf_regvit", f"document '{attribute}' as hf_regvit.{attribute}"
    assert attribute in hf_regvit.__all__
    assert hasattr(hf_regvit, attribute)


def test_places_that_contributing_names_exist():
    text = text_of(ROOT / "CONTRIBUTING.md")
    places = [(ROOT / "src" / "hf_regvit" / path, ROOT / path) for path in re.findall(r"`((?:\w+/)+\w+\.\w+)`", text)]
    assert [inside for inside, outside in places if not (inside.exists() or outside.exists())] == []
    for name, path in re.findall(r"`(\w+)` of `([\w/]+\.py)`", text):
        source = text_of(ROOT / "src" / "hf_regvit" / path)
        assert re.search(rf"^(def |class )?{name}\b", source, flags=re.MULTILINE), f"{path} has no {name}"


def test_every_hyperparameter_has_a_source():
    _, _, rest = text_of(DOCS / "papers.md").partition("## Source of each option")
    table, _, _ = rest.partition("## Evaluation")
    named = re.findall(r"`(\w+)`", table)
    assert len(named) == len(set(named)), "an option has one source"
    own = PretrainingArguments.own_options()
    assert not set(named) - own
    technical = {
        "data", "data_weights", "streaming", "image_column", "label_column", "max_bad_share", "stop_on_collapse",
        "init_from", "allow_batch_change", "allow_data_change", "dataloader_timeout", "ddp_timeout", "track_model",
        "ddp_find_unused_parameters", "ddp_broadcast_buffers", "ignore_data_skip", "logging_steps",
        "logging_nan_inf_filter", "remove_unused_columns", "dataloader_drop_last", "dataloader_pin_memory",
        "lr_scheduler_type",
    }  # fmt: skip
    assert own - set(named) - technical == set()


def test_every_field_of_the_configuration_is_in_the_table():
    hooks = load_script("scripts/dev/docs_hooks.py")
    named = set(re.findall(r"`(\w+)`", "".join(row.split(" | ")[0] for row in hooks.config_fields().splitlines())))
    own = {name for name in vars(hf_regvit.RegViTConfig)["__annotations__"] if not name.startswith("_")}
    assert len(own) >= 30
    assert own == named, "write them into the docstring of RegViTConfig"


def commands_in(page):
    for block in re.findall(r"^```bash\n(.*?)^```", text_of(page), flags=re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["regvit"]:
                yield words[1:]


def test_commands_of_the_pages_exist_with_their_options():
    used = {}
    for page in OURS:
        for command, *words in commands_in(page):
            flags = {word.partition("=")[0] for word in words if word.startswith("--")}
            used.setdefault(command, set()).update(flags - {"--help", "--help_all"})
    assert len(used) >= 6
    used.pop("completion")  # has no options
    for command, flags in used.items():
        assert command in cli.COMMANDS
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            assert cli.main([command, "--help_all"]) == 0
        known = set(re.findall(r"--\w+", text.getvalue())) | {f"--{name}" for name in parser_of(command).names}
        assert flags <= known, f"regvit {command} has no {flags - known}"


@pytest.mark.parametrize("page", [*PAGES, SKILL], ids=lambda page: page.stem)
def test_python_of_the_pages_is_python_and_imports_what_there_is(page):
    for block in re.findall(r"^```python\n(.*?)^```", text_of(page), flags=re.S | re.M):
        for node in ast.walk(ast.parse(block.replace('--8<-- "examples/quickstart.py"', ""))):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("hf_regvit"):
                module = import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_badges_say_what_the_package_declares():
    badges = re.findall(r"<text[^>]*>([^<]+)</text>", text_of(DOCS / "badges.svg"))
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]
    (transformers,) = [each for each in project["dependencies"] if each.startswith("transformers>")]
    oldest = {"python": project["requires-python"], "transformers": transformers.split(",")[0]}
    stated = {name: f"{bound.split('>=')[1]}+" for name, bound in oldest.items()} | {"license": project["license"]}
    assert dict(zip(badges[::2], badges[1::2], strict=True)) == stated


def test_figures_are_small_used_and_ours():
    figures = sorted((DOCS / "figures").glob("*"))
    assert len(figures) >= 6
    written = "\n".join(text_of(page) for page in PAGES)
    for figure in figures:
        assert figure.stat().st_size < 600_000, figure.name
        assert Image.open(figure).mode == "RGB", f"{figure.name} has a palette, which draws contours into smooth maps"
        Image.open(figure).verify()
        assert f"figures/{figure.name}" in written, f"{figure.name} is on no page"
        assert figure.name in text_of(ROOT / "scripts" / "dev" / "docs_figures.py"), "every figure has its script"


def test_questions_have_answers_and_threads():
    page = text_of(DOCS / "faq.md")
    questions = re.split(r"^### ", page, flags=re.M)[1:]
    assert len(questions) >= 20
    for question in questions:
        title, _, answer = question.partition("\n")
        assert title.endswith(("?", ".")), title
        assert len(answer.strip()) > 60, title
        assert re.search(r"^```(?:bash|python)$", answer, flags=re.M), f"{title}: add something to run"
    assert len(re.findall(r"https://github\.com/[\w-]+/[\w-]+/(?:issues|pull)/\d+", page)) >= 20


def texts_of_the_source():
    """All strings of the package, with "..." in place of what is inserted, one message a line."""
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_troubleshooting_quotes_the_messages_of_this_version():
    quoted = re.findall(r"^### `(.*)`$", text_of(DOCS / "troubleshooting.md"), flags=re.M)
    assert len(quoted) >= 20
    texts = "\n".join(texts_of_the_source())
    inserted = r"'?\.\.\.'?"
    patterns = {message: inserted.join(map(re.escape, re.split(inserted, message))) for message in quoted}
    assert [message for message, pattern in patterns.items() if not re.search(pattern, texts)] == []


# Questions from the issues of other projects, numbered as in two lists of the specification, and the anchors of their
# answers.
ANSWERS_TO_PAPER_USERS = {
    1: "how-do-i-draw-the-attention-maps-of-the-paper", 2: "i-cannot-find-the-high-norm-tokens",
    3: "my-lost-numbers-differ-from-the-registers-paper", 4: "how-do-i-pretrain-with-registers",
    5: "are-there-heads-for-segmentation-and-depth-that-fit", 6: "can-i-export-to-onnx",
    7: "keys-or-shapes-of-a-checkpoint-do-not-match", 8: "which-tokens-of-the-output-are-registers",
    9: "registers-were-averaged-into-my-features", 10: "is-regvit-part-of-transformers",
    11: "how-do-i-add-registers-to-a-pretrained-model-or-change-their-number",
    12: "why-do-registers-start-at-random-and-not-at-zero",
    13: "do-small-models-need-registers-do-artifacts-come-from-fine-tuning-or-from-training-too-long",
    14: "where-are-clip-and-deit-iii-with-registers", 15: "the-colors-of-pca-differ-between-images",
    16: "why-four-why-not-one", 17: "can-i-continue-from-dinov2-on-my-own-domain",
    18: "may-i-drop-the-registers-after-training", 19: "do-registers-help-or-hurt-depth",
    20: "should-intermediate-features-be-normalized",
}  # fmt: skip
ANSWERS_TO_LIBRARY_USERS = {
    1: "registers-were-averaged-into-my-features", 2: "do-registers-have-a-position",
    3: "my-image-is-not-square-or-not-a-multiple-of-the-patch",
    4: "is-a-feature-map-rows-by-columns-or-columns-by-rows",
    5: "my-image-is-not-square-or-not-a-multiple-of-the-patch", 6: "why-is-outputattentions-empty",
    7: "can-i-use-flash-attention", 8: "which-token-is-the-feature-of-an-image",
    9: "autobackbone-does-not-know-my-folder", 10: "are-there-heads-for-segmentation-and-depth-that-fit",
    11: "ddp-reports-unused-parameters",
    12: "is-drop-path-really-applied-are-weights-initialized-as-in-the-original",
    13: "lora-targets-or-hooks-broke-after-an-upgrade",
    14: "the-image-processor-of-a-checkpoint-is-not-recognized-or-resizes-differently",
    15: "the-image-processor-of-a-checkpoint-is-not-recognized-or-resizes-differently",
    16: "trust_remote_code-fails-offline-or-after-save_pretrained",
    17: "after-moving-to-transformers-5-loading-fails-on-the-meta-device",
    18: "trust_remote_code-fails-offline-or-after-save_pretrained",
    19: "can-i-continue-from-dinov2-on-my-own-domain", 20: "i-cannot-find-the-high-norm-tokens",
}  # fmt: skip


def test_every_question_of_users_has_its_answer():
    from markdown.extensions.toc import slugify

    titles = re.findall(r"^### (.+)$", text_of(DOCS / "faq.md"), flags=re.M)
    anchors = [slugify(title.replace("`", ""), "-") for title in titles]
    assert len(anchors) == len(set(anchors))
    for answers in (ANSWERS_TO_PAPER_USERS, ANSWERS_TO_LIBRARY_USERS):
        assert list(answers) == list(range(1, 21))
        assert not set(answers.values()) - set(anchors)


@requires_shared
def test_the_lists_of_questions_have_as_many_rows_as_were_answered():
    spec = shared_dir() / "spec"
    _, _, asked = text_of(spec / "registers_paper.md").partition("## 7. What users ask for")
    rows = re.findall(r"^(\d+)\. ", asked.partition("\n## ")[0], flags=re.M)
    assert list(map(int, rows)) == list(ANSWERS_TO_PAPER_USERS)
    _, _, asked = text_of(spec / "hf_conventions.md").partition("## 8. What users complain about")
    rows = re.findall(r"^\| (\d+) \|", asked.partition("\n## ")[0], flags=re.M)
    assert list(map(int, rows)) == list(ANSWERS_TO_LIBRARY_USERS)


@pytest.mark.slow
def test_the_answers_run_and_are_true(tmp_path, monkeypatch):
    """Run all blocks in one process, with a small model, small data and few steps in the commands."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("MODEL", "MODEL_A", "MODEL_B")):
        save_model(tiny_model(seed=seed), tmp_path / name)
    maps = [np.kron(np.arange(6).reshape(2, 3) % 2, np.ones((10, 8))).astype(np.uint8)] * 8
    depths = [1000 + 500 * each.astype(np.uint16) for each in maps]
    for split in ("train", "validation"):
        mask_folder(tmp_path / "MASKS", maps, split=split)
        mask_folder(tmp_path / "DEPTH_MAPS", depths, kind="depth", split=split)
    small = {
        "--tasks depth": "--tasks depth --dense_steps 4", "--max_steps 3": "--max_steps 3 --knn_steps 0",
        "--mode linear": "--mode linear --max_steps 2 --per_device_train_batch_size 4",
    }  # fmt: skip
    names, ran = {}, []
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```", text_of(DOCS / "faq.md"), flags=re.S | re.M):
        if language == "python":
            exec(compile(block, "faq.md", "exec"), names)
            continue
        for word, other in small.items():
            block = block.replace(word, other)
        command, *words = shlex.split(block.replace("\\\n", " "))
        assert command == "regvit"
        assert regvit(words) == 0, block
        ran.append(words[0])
    assert ran == ["evaluate", "pretrain", "pretrain", "finetune"]
    assert Image.open("overview.png").width > 500


def test_nothing_comes_from_elsewhere():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert config["theme"]["font"] is False
    assert "extra_javascript" not in config
    for sheet in config["extra_css"]:
        assert not re.search(r"url\(|@import", text_of(DOCS / sheet))
    for page in PAGES:
        assert not re.search(r"!\[[^\]]*\]\(https?:|<(?:script|iframe|img)\b", text_of(page)), page.name


class Assets(HTMLParser):
    """Collect what a browser loads with a page, as opposed to links that a reader may follow."""

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag in ("script", "img", "iframe", "source"):
            self.found.append(attributes.get("src") or "")
        if tag == "link" and attributes.get("rel") not in ("canonical", "next", "prev", "edit"):
            self.found.append(attributes.get("href") or "")


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        reader = Assets()
        reader.found = []
        reader.feed(page.read_text(encoding="utf-8"))
        assert not [asset for asset in reader.found if re.match(r"(https?:)?//", asset)], page.name
        assert "{{ " not in page.read_text(encoding="utf-8"), page.name
    reference = (tmp_path / "site" / "reference" / "command_line.html").read_text(encoding="utf-8")
    assert all(f"regvit {command}" in reference for command in cli.COMMANDS)
    assert "--num_register_tokens" in reference
    models = (tmp_path / "site" / "reference" / "models.html").read_text(encoding="utf-8")
    assert "num_register_tokens" in models
