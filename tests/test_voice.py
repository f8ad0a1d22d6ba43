"""The language of the repository: openings of docstrings, arguments and help texts, and words that are not used.

Each check lists every place as `file:line: word`. Code is never text: identifiers, text in backticks, quoted single
words such as 'photos', options, links, fenced blocks, and strings without a space are left out.
"""

import ast
import functools
import io
import itertools
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import hf_regvit

ROOT = Path(__file__).resolve().parents[1]

# A docstring begins with an imperative verb or with a noun phrase that is a name.
NO_OPENINGS = {
    "what", "whether", "one", "of", "where", "when", "who", "whom", "whose", "why", "how", "which", "that", "those",
    "as", "if", "because", "nothing", "everything", "anything", "something", "same", "likewise", "trainer's",
    "torch's",
}  # fmt: skip
# The description of an argument, and the help of an option, begins with a noun phrase or with "Whether to".
NO_DESCRIPTIONS = NO_OPENINGS - {"one"}

# The words that this project uses instead: image; test images or held-out images; clean process; "at random".
# "photos" is the name of the built-in set, and "a photo of a {}" is the template of CLIP.
NO_WORDS = "|".join(
    (
        r"pictur(?:e|es|ed|ing)|photo(?:graph|graphs|graphed|graphic)?(?!\s+of\s+a\s+\{)|strangers?|by\s+lot",
        r"judg(?:e|es|ed|ing)|judge?ments?",
    )
)

# British spellings. "analyses" is left out, for it is also a plural.
STEMS_OF_ISE = (
    "apolog|author|binar|capital|categor|central|character|critic|crystall|custom|diagonal|digit|discret|emphas|equal|"
    "factor|familiar|final|formal|general|harmon|ideal|initial|item|linear|local|material|maxim|memor|minim|modern|"
    "modular|neutral|normal|optim|organ|parallel|parametr|penal|polar|prior|quant|random|real|recogn|regular|scrutin|"
    "sens|serial|special|stabil|standard|summar|symmetr|synchron|synthes|token|util|vector|visual"
)
STEMS_OF_OUR = "behavi|col|endeav|fav|flav|harb|hon|hum|lab|neighb|od|rig|rum|sav|vap|vig"
STEMS_OF_LL = "cancel|channel|dial|equal|fuel|label|level|model|panel|pixel|signal|total|travel|tunnel"
SPELLINGS = "|".join(
    (
        rf"(?:de|over|pre|re|un)?-?(?:{STEMS_OF_ISE})is(?:e|es|ed|ing|er|ers|able|ation|ations)",
        rf"(?:dis|mis|multi|un)?-?(?:{STEMS_OF_OUR})our(?:s|ed|ing|ful|less|al|able|ite|ites|hood|hoods|maps?|bars?)?",
        rf"(?:mis|re|un)?-?(?:{STEMS_OF_LL})l(?:ed|ing|er|ers)",
        r"grey(?:s|ed|ish|er|scale)?|analys(?:e|ed|er|ers|ing)|catalys(?:e|ed|es|ing)|artefacts?|per\s+cent",
        r"(?:re|de|off-?)?centr(?:e|es|ed|ing)|(?:centi|kilo|milli)?metres?|fibres?|litres?|theatres?",
        r"licen(?:ce|ces|ced|cing)|defences?|offences?|pretences?|practis(?:e|ed|es|ing)|programmes?|mou?ld(?:s|ed)",
        r"ageing|amongst|whilst|learnt|spelt|sceptics?|sceptical|enrols?|fulfils?|skilful|cosy",
    )
)

# Proper names with a word or a spelling from above, such as the title of a data set. Keep this list short: the names
# of functions, options and files belong in backticks, which need no entry.
EXCEPTIONS: tuple[str, ...] = ()

NOT_TEXT = re.compile(
    "|".join(
        (
            r"(?P<tick>`+).+?(?P=tick)",  # code
            r"https?://\S+|\]\([^)\s]*\)",  # addresses, targets of links
            r"\{[%{#].*?[%}#]\}",  # Jinja
            r"(?<!\w)'[\w:.-]+'(?!\w)",  # the value of an option
            r"(?<!\w)--\w[\w-]*",  # an option
        )
    ),
    re.DOTALL,
)

Findings = list[tuple[int, str]]  # line and word


# --- Text


def blank(match: re.Match[str]) -> str:
    """As many spaces and line breaks as the match has, so that places and lines stay."""
    return re.sub(r"[^\n]", " ", match[0])


def words_in(text: str, pattern: str, *, exceptions: tuple[str, ...] = EXCEPTIONS) -> Findings:
    """Find whole words; lines count from 0."""
    text = NOT_TEXT.sub(blank, text)
    for name in exceptions:
        text = re.sub(re.escape(name), blank, text)
    found = re.finditer(rf"(?<![\w-])(?:{pattern})(?!\w)", text, re.IGNORECASE)
    return [(text.count("\n", 0, match.start()), " ".join(match[0].split())) for match in found]


def first_word(text: str) -> str:
    """The word that a text begins with, of any case; nothing if it begins with code or with an expression."""
    found = re.match(r"[\s\"'(*_]*([\w'-]+)", text)
    return found[1] if found else ""


# --- Python


@functools.cache
def parsed(source: str) -> tuple[ast.Module, dict[int, ast.Constant]]:
    """The tree, and its docstrings by the identity of their nodes."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node) is not None)
    return tree, {id(node.body[0].value): node.body[0].value for node in nodes}


def docstring_openings(source: str) -> Findings:
    found = []
    for node in parsed(source)[1].values():
        skipped = len(node.value) - len(node.value.lstrip())
        word = first_word(node.value)
        if word.lower() in NO_OPENINGS:
            found.append((node.lineno + node.value.count("\n", 0, skipped), word))
    return found


def argument_descriptions(source: str) -> Findings:
    found = []
    for node in parsed(source)[1].values():
        lines = node.value.split("\n")
        for index, description in entries(lines):
            if word := wrong_description(description):
                found.append((node.lineno + index, word))
    return found


def entries(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Line and description of each entry of the Args and Attributes sections of a docstring."""
    header = level = None
    for index, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if line.strip() in ("Args:", "Arguments:", "Attributes:"):
            header, level = indent, None
        elif header is not None and line.strip():
            if indent <= header:
                header = None
                continue
            level = indent if level is None else level
            entry = re.match(r"\s+\*{0,2}\w+(?:, \*{0,2}\w+)*(?: \(.*\))?:\s*(.*)", line)
            if indent == level and entry:
                yield index, " ".join([entry[1], *lines[index + 1 : index + 3]])  # transformers describes below


def wrong_description(text: str) -> str:
    """The opening of a description if it is a wrong one, else nothing."""
    word = first_word(text)
    if word.lower() == "whether":
        return "" if re.match(r"whether\s+to\b", text.strip(), re.IGNORECASE) else word
    return word if word.lower() in NO_DESCRIPTIONS else ""


def help_texts(source: str) -> Findings:
    return [(node.lineno, word) for node in help_nodes(source) if (word := wrong_description(string_value(node)))]


def helpers_of_options(source: str) -> dict[str, int]:
    """Position of the parameter `help` or `help_text` of each function that has one."""
    found = {}
    for node in ast.walk(parsed(source)[0]):
        if isinstance(node, ast.FunctionDef):
            names = [argument.arg for argument in node.args.posonlyargs + node.args.args]
            for name in {"help", "help_text"} & set(names):
                found[node.name] = names.index(name)
    return found


@functools.cache
def helpers_everywhere() -> dict[str, int]:
    sources = (path.read_text(encoding="utf-8") for path in PYTHON)
    return {name: place for source in sources for name, place in helpers_of_options(source).items()}


def help_nodes(source: str) -> Iterator[ast.expr]:
    """Strings under a key or a keyword "help", and those given to any function of ours as its `help_text`."""
    tree = parsed(source)[0]
    places = helpers_everywhere() | helpers_of_options(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            yield from (value for key, value in pairs if isinstance(key, ast.Constant) and key.value == "help")
        elif isinstance(node, ast.Call):
            yield from (keyword.value for keyword in node.keywords if keyword.arg in ("help", "help_text"))
            place = places.get(getattr(node.func, "id", getattr(node.func, "attr", None)))
            if place is not None:
                yield from node.args[place : place + 1]


def string_value(node: ast.AST) -> str:
    """The text of a literal, of an f-string (expressions become `{}`), and of sums of both; else nothing."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(string_value(part) or "`{}`" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return string_value(node.left) + string_value(node.right)
    return ""


@functools.cache
def python_texts(source: str) -> list[tuple[range, str]]:
    """Docstrings, comments, and strings that contain a space, each with its lines."""
    tree, docstrings = parsed(source)
    texts = [(range(token.start[0], token.start[0] + 1), token.string) for token in comments(source)]
    for node in outermost_strings(tree):
        text, lines = string_value(node), range(node.lineno, node.end_lineno + 1)
        if id(node) in docstrings:
            texts.append((lines, without_names_of_entries(text)))
        elif " " in text.strip():
            texts.append((lines, text))
    return texts


def comments(source: str) -> Iterator[tokenize.TokenInfo]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return (token for token in tokens if token.type == tokenize.COMMENT)


def without_names_of_entries(docstring: str) -> str:
    """Blank out the names of arguments in the sections of a docstring."""
    lines = docstring.split("\n")
    for index, _ in entries(lines):
        lines[index] = re.sub(r"^[^:]*:", blank, lines[index])
    return "\n".join(lines)


def python_words(source: str, pattern: str) -> Findings:
    found, rows = [], source.split("\n")
    for lines, text in python_texts(source):
        # Where a string has escapes or several parts, its own line breaks do not tell the line; the source does.
        places: dict[str, Iterator[int]] = {}
        for _, word in words_in(text, pattern):
            with_word = [line for line in lines if re.search(rf"\b{word.split()[0]}\b", rows[line - 1])]
            found.append((next(places.setdefault(word, itertools.cycle(with_word or lines[:1]))), word))
    return sorted(set(found))


def outermost_strings(tree: ast.AST) -> Iterator[ast.expr]:
    """Literals and f-strings; not the parts of an f-string, but the strings inside its expressions."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.JoinedStr):
            yield node
            waiting += [part.value for part in node.values if isinstance(part, ast.FormattedValue)]
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node
        waiting += ast.iter_child_nodes(node)


# --- Markdown and other files


def markdown_words(text: str, pattern: str) -> Findings:
    """Words outside of front matter, fenced code, code in a line, and the directives of the reference."""
    kept, fence = [], None
    lines = text.split("\n")
    if lines[0] == "---" and "---" in lines[1:]:
        end = lines.index("---", 1)
        lines[: end + 1] = [""] * (end + 1)
    for line in lines:
        mark = re.match(r"\s*(?:>\s*|[-*]\s+)?(`{3,}|~{3,})", line)
        if fence is None and mark:
            fence = mark[1]
        elif fence is not None and line.strip().startswith(fence):
            fence = None
            kept.append("")
            continue
        kept.append("" if fence is not None or line.startswith(":::") else line)
    # Code in a line ends with its paragraph, or one stray backtick would hide the rest of the page.
    found, start = [], 0
    for paragraph in re.split(r"(\n\s*\n)", "\n".join(kept)):
        found += [(start + line + 1, word) for line, word in words_in(paragraph, pattern)]
        start += paragraph.count("\n")
    return found


def comment_words(text: str, pattern: str) -> Findings:
    """Words behind the first `#` of each line: YAML, TOML, Makefile."""
    comments = "\n".join(line.partition("#")[2] for line in text.split("\n"))
    return [(line + 1, word) for line, word in words_in(comments, pattern)]


def script_words(text: str, pattern: str) -> Findings:
    """Words in the comments and in the strings of a script or style sheet that is sent to a browser."""
    parts = re.finditer(r"/\*.*?\*/|//[^\n]*|'[^'\n]* [^'\n]*'|\"[^\"\n]* [^\"\n]*\"|`[^`]* [^`]*`", text, re.DOTALL)
    found = []
    for part in parts:
        before = text.count("\n", 0, part.start())
        found += [(before + line + 1, word) for line, word in words_in(part[0].strip("'\"`"), pattern)]
    return found


def private_imports(text: str) -> Findings:
    """Imports from modules of the package; users import from the package itself."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if match := re.search(r"\b(?:from|import)\s+(hf_regvit\.\w[\w.]*)", line):
            found.append((number, match[1]))
        elif match := re.search(r"\bfrom\s+hf_regvit\s+import\s+([\w, ]+)", line):
            names = (name.split()[0] for name in match[1].split(",") if name.strip())
            found += [(number, f"hf_regvit.{name}") for name in names if name not in hf_regvit.__all__]
    return found


# --- Files


def files(*patterns: str) -> list[Path]:
    return sorted({path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()})


PYTHON = files("src/**/*.py", "scripts/**/*.py", "examples/**/*.py", "benchmarks/**/*.py")
MARKDOWN = files(
    "docs/**/*.md", "*.md", "skills/**/*.md", "model_cards/*.md", "examples/**/*.md", "benchmarks/**/*.md",
    "src/**/templates/**/*.md", "src/**/templates/**/*.jinja*", "src/**/templates/**/*.html",
)  # fmt: skip
COMMENTED = files("Makefile", "pyproject.toml", "mkdocs.yml", "examples/**/*.yaml", "examples/**/*.yml")
SCRIPTS = files("src/**/templates/**/*.js", "src/**/templates/**/*.css", "docs/**/*.css", "docs/**/*.js")


def expect_none(paths: list[Path], check: Callable[..., Findings], *rule: str) -> None:
    """Fail with the file, line and word of every finding."""
    __tracebackhide__ = True
    found = [
        f"{path.relative_to(ROOT).as_posix()}:{line}: {word}"
        for path in paths
        for line, word in check(path.read_text(encoding="utf-8"), *rule)
    ]
    if found:
        pytest.fail("\n".join([f"{len(found)} places:", *found]), pytrace=False)


def test_files_of_every_kind_are_read():
    names = {path.relative_to(ROOT).as_posix() for path in PYTHON + MARKDOWN + COMMENTED + SCRIPTS}
    assert {
        "src/hf_regvit/__init__.py", "examples/quickstart.py", "README.md", "CONTRIBUTING.md", "CHANGELOG.md",
        "docs/index.md", "Makefile", "pyproject.toml", "mkdocs.yml",
    } <= names  # fmt: skip
    for folder in ("scripts/", "docs/how_to/", "docs/tutorials/", "model_cards/", "src/hf_regvit/", "examples/"):
        assert any(name.startswith(folder) for name in names), folder


def test_docstrings_begin_with_a_verb_or_a_name():
    expect_none(PYTHON, docstring_openings)


def test_descriptions_of_arguments_begin_with_a_noun():
    expect_none(PYTHON, argument_descriptions)


def test_help_texts_begin_with_a_noun():
    expect_none(PYTHON, help_texts)


@pytest.mark.parametrize("rule", [NO_WORDS, SPELLINGS], ids=["words", "spelling"])
@pytest.mark.parametrize(
    ("paths", "check"),
    [(PYTHON, python_words), (MARKDOWN, markdown_words), (COMMENTED, comment_words), (SCRIPTS, script_words)],
    ids=["python", "markdown", "comments", "scripts"],
)
def test_words(paths, check, rule):
    expect_none(paths, check, rule)


def test_documentation_imports_public_names_only():
    expect_none(files("README.md", "docs/**/*.md", "examples/**/*.md"), private_imports)


# --- The checks find what they look for, and only that


@pytest.mark.parametrize("opening", sorted(NO_OPENINGS))
@pytest.mark.parametrize(
    "source",
    [
        '"""{} it is."""\n',
        'def f():\n    """{}, read from a file."""\n',
        'class A:\n    async def f(self):\n        """\n        {} the model.\n        """\n',
    ],
    ids=["module", "function", "method"],
)
def test_a_wrong_opening_is_found(source, opening):
    text = source.format(opening.capitalize())
    line = next(number for number, row in enumerate(text.split("\n"), 1) if opening.capitalize() in row)
    assert docstring_openings(text) == [(line, opening.capitalize())]


@pytest.mark.parametrize("text", ["Return one of them.", "RegViT with registers.", "Offset of it.", "Ones of a kind."])
def test_a_right_opening_is_not_found(text):
    assert docstring_openings(f'"""{text}"""\nx = """What is no docstring."""\n') == []


ARGUMENTS = '''def f(a, b, c):
    """Read it.

    Args:
        a: {}
            continued: what follows is no entry.
        b: Number of images, one of them gray.
        **kwargs: Whether to read.

    Returns:
        what: not an argument.
    """
'''


@pytest.mark.parametrize(
    "description", ["Of the run.", "What is read.", "Whether it is read.", "How often.", "Where it is.", "Likewise."]
)
def test_a_wrong_description_of_an_argument_is_found(description):
    assert argument_descriptions(ARGUMENTS.format(description)) == [(5, description.rstrip(".").split()[0])]
    assert argument_descriptions(ARGUMENTS.format("Random seed.")) == []
    assert argument_descriptions(ARGUMENTS.format("Whether\n            to read.")) == []
    upstream = (
        f'"""Name.\n\n    Args:\n        a (`int`, *optional*, defaults to 4):\n            {description}\n    """\n'
    )
    assert argument_descriptions(upstream) == [(4, description.rstrip(".").split()[0])]


@pytest.mark.parametrize(
    "source",
    [
        'a: int = field(default=1, metadata={{"help": {}}})\n',
        'a: int = HfArg(default=1, aliases=["--b"], help={})\n',
        'parser.add_argument("--a", help={})\n',
        "def _field(default, help_text, *aliases): ...\na: int = _field(1, {})\n",
        "def _field(default, help_text): ...\na: int = _field(1, help_text={})\n",
    ],
    ids=["metadata", "HfArg", "argparse", "helper", "keyword of a helper"],
)
def test_a_wrong_help_text_is_found(source):
    line = source.count("\n")
    assert help_texts(source.format('"Of the run."')) == [(line, "Of")]
    assert help_texts(source.format('"Whether it " + "is read."')) == [(line, "Whether")]
    assert help_texts(source.format('f"What to do: {x}."')) == [(line, "What")]
    assert help_texts(source.format('"Whether to read."')) == []
    assert help_texts(source.format('f"{x} of the run."')) == []


def test_a_helper_of_another_file_is_known(monkeypatch):
    source = 'a: int = elsewhere(1, "Of the run.")\n'
    assert help_texts(source) == []
    monkeypatch.setitem(globals(), "helpers_everywhere", lambda: {"elsewhere": 1})
    assert help_texts(source) == [(1, "Of")]


@pytest.mark.parametrize(
    "word",
    [
        "judged", "judging", "judge", "judgment", "picture", "pictures", "photograph", "photographs", "photo",
        "stranger", "strangers", "by lot",
    ],
)  # fmt: skip
def test_a_word_is_found_in_every_kind_of_text(word):
    finds_in_every_kind_of_text(word, NO_WORDS)


@pytest.mark.parametrize(
    "word",
    [
        "colour", "coloured", "colours", "grey", "greyscale", "normalise", "normalised", "normalisation",
        "unnormalised",
        "standardise", "initialise", "reinitialising", "centre", "centred", "behaviour", "labelled", "unlabelled",
        "labelling", "neighbour", "neighbours", "neighbourhood", "favour", "favourite", "licence", "analyse",
        "analysing", "optimise", "optimiser", "recognised", "serialise", "visualisation", "summarises", "modelling",
        "metres", "artefact", "per cent", "whilst", "learnt",
    ],
)  # fmt: skip
def test_a_british_spelling_is_found_in_every_kind_of_text(word):
    finds_in_every_kind_of_text(word, SPELLINGS)


def finds_in_every_kind_of_text(word: str, rule: str) -> None:
    for form in (word, word.capitalize()):
        assert python_words(f'def f():\n    """Return it.\n\n    A {form}, once.\n    """\n', rule) == [(4, form)]
        entry = f'"""Read.\n\n    Args:\n        x: A {form}.\n        {word.split()[0]}: Number of x.\n    """\n'
        assert python_words(entry, rule) == [(4, form)]
        assert python_words(f"x = 1\ny = 2  # a {form}.\n", rule) == [(2, form)]
        assert python_words(f'x = 1\ny = "of a {form}"\n', rule) == [(2, form)]
        assert python_words(f'raise ValueError(\n    f"{{x!r}} is "\n    f"a {form}: {{y}}"\n)\n', rule) == [(3, form)]
        assert markdown_words(f"# Title\n\nOf `x` a {form}.\n", rule) == [(3, form)]
        assert markdown_words(f"```python\nx = 1\n```\n\n- ~~~\n  y\n  ~~~\n{form}\n", rule) == [(8, form)]
        assert comment_words(f"x: 1\ny: 2  # a {form}\n", rule) == [(2, form)]
        assert script_words(f"let x = 1;\n// a {form}\nlet y = 'of a {form}';\n", rule) == [(2, form), (3, form)]


@pytest.mark.parametrize("word", ["picture", "colour", "judged"])
def test_code_is_no_text(word):
    for rule in (NO_WORDS, SPELLINGS):
        assert python_words(f'{word} = {{"{word}": f"{{{word}}} is it", "b": "{word}_map"}}\n', rule) == []
        assert python_words(f'"""Return `{word}` of the option --{word} for \'{word}\'."""\n# `{word}`\n', rule) == []
        assert python_words(f'x = "https://example.org/{word} is its address; {word}_of_x"\n', rule) == []
        page = f"---\ntags: {word}\n---\n[name](../{word}.md) and `a {word}`\n```\na {word}\n```\n::: x.{word} y\n"
        assert markdown_words(page, rule) == []
        assert comment_words(f"{word}: a {word}\n", rule) == []
        assert script_words(f"let {word} = '{word}';\n", rule) == []
    stray = f"one ` backtick\n\na {word} of a `name`\n"
    assert [line for rule in (NO_WORDS, SPELLINGS) for line, _ in markdown_words(stray, rule)] == [3]


@pytest.mark.parametrize(
    "word",
    [
        "color", "gray", "normalize", "analyses", "analysis", "emphasis", "precise", "exercise", "otherwise", "noise",
        "promise", "raised", "specialist", "realistic", "hour", "four", "labeled", "model", "strange", "photos",
        "by lots", "a lot", "hypothesis", "parameter", "diameter", "practice", "tokenizer",
    ],
)  # fmt: skip
def test_an_american_spelling_is_not_found(word):
    assert markdown_words(word, NO_WORDS) == markdown_words(word, SPELLINGS) == []


def test_an_exception_is_not_found():
    text = "the Grey Area set and a\ngrey area"
    assert words_in(text, SPELLINGS) == [(0, "Grey"), (1, "grey")]
    assert words_in(text, SPELLINGS, exceptions=("Grey Area",)) == [(1, "grey")]


def test_every_exception_is_needed():
    texts = [path.read_text(encoding="utf-8") for path in PYTHON + MARKDOWN + COMMENTED + SCRIPTS]
    assert [name for name in EXCEPTIONS if not any(name in text for text in texts)] == []
    assert [name for name in EXCEPTIONS if not words_in(name, f"{NO_WORDS}|{SPELLINGS}", exceptions=())] == []


def test_a_private_import_is_found():
    page = (
        "```python\nfrom hf_regvit.models.tokens import load_model\nfrom hf_regvit import RegViTModel, nothing\n```\n"
    )
    assert private_imports(page) == [(2, "hf_regvit.models.tokens"), (3, "hf_regvit.nothing")]
    assert private_imports("from hf_regvit import RegViTModel, RegViTConfig as Config\nimport hf_regvit\n") == []


def test_a_finding_names_file_line_and_word():
    path = ROOT / "README.md"
    with pytest.raises(pytest.fail.Exception, match=r"1 places:\nREADME\.md:7: picture$"):
        expect_none([path], lambda text: [(7, "picture")])
