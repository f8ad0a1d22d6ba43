"""Decide which files may be published and search them for secrets and private paths."""

import re
from collections.abc import Sequence
from pathlib import Path

CODE_FILES = ("configuration_regvit.py", "modeling_regvit.py")
CARD = "README.md"
WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_ROOT_FILES = {"config.json", "preprocessor_config.json", CARD, "manifest.json", "recipe.yaml", "LICENSE", *CODE_FILES}
_ROOT_FILES |= {"metrics.json", "curves.png", "confusion_matrix.png"}  # of fine-tuned models; no images of the data
_FOLDERS = {"figures": {".png", ".svg"}, "reports": {".json", ".jsonl", ".html"}}


# ---- What may be sent --------------------------------------------------------------------------------------------


class PrivateContentError(ValueError):
    """A file contains private content. The message names the file and the line."""


def may_be_published(name: str) -> bool:
    """Return whether a path in a bundle is on the list of public files. Optimizer and random state, e.g., are not."""
    folder, _, file = name.rpartition("/")
    if not folder:
        return file in _ROOT_FILES or WEIGHT_FILES.fullmatch(file) is not None
    return Path(file).suffix in _FOLDERS.get(folder, ())


def public_files(folder: str | Path) -> list[str]:
    """List the files of a folder that may be published, relative to the folder."""
    paths = (path for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink())
    return sorted(name for path in paths if may_be_published(name := path.relative_to(folder).as_posix()))


# Tokens in the formats of their issuers, then assignments to names such as "password". Keys of wandb are hexadecimal
# like checksums (sha1 of commits, sha256 of files), so they count only next to the word wandb.
_SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "a Hugging Face organization token": r"\bapi_org_[A-Za-z0-9]{20,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_.-]{20,}",
    "an API key": r"\bsk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}",
    "a Slack token": r"\bxox[abeprs]-[A-Za-z0-9-]{10,}",
    "a Google API key": r"\bAIza[0-9A-Za-z_-]{35}",
    "a package registry token": r"\b(?:pypi-AgE[A-Za-z0-9_-]{20,}|npm_[A-Za-z0-9]{36})",
    "a Weights & Biases key": r"(?i)\bwandb(?:_v\d_\w{30,}|"
    r"[\w \t\"'.:=-]{0,24}?(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f]))",
    "a signed token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "a signed URL": r"(?i)[?&](?:sig|x-amz-signature|x-goog-signature)=[A-Za-z0-9%+/=]{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----",
    "a password in a URL": r"(?i)\b[a-z][a-z0-9+.-]*://[^/\s:@\"']*:[^/\s:@\"']+@",
    "a value named password, secret or key": r"(?i)\b[a-z_]*(?:(?:api|access|account|private|secret)_?key|secret|"
    r"passwd|password|(?:access|api|auth|bearer|hub|refresh)_?token)[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9_\-+/]{12,}",
}
# A path has two parts or more, so "and / or" and closing HTML tags do not match. `/m/0jbk` is an Open Images class.
_PATHS = {
    "an absolute path": r"(?<![\w./~<*+\-\])}%&;])/(?![mgt]/[0-9a-z_]+(?![\w./@+\-]))(?:[\w.@+\-]+/)+[\w.@+\-]*",
    "a Windows path": r"\b[A-Za-z]:\\{1,2}\w+|(?<!\\)(?:\\\\[\w.-]+\\(?!\\)|\\{4}[\w.-]+\\{2})[\w$.-]+",
    "a path in a home directory": r"(?<!\w)~/\w+|file:/",
}
# Images encoded as text in pages and reports: base64 of a JPEG begins like a path.
_INLINE_IMAGES = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=]+|(?<=\")[A-Za-z0-9+/]{400,}={0,2}(?=\")")
_TEXT = {".json", ".jsonl", ".yaml", ".yml", ".md", ".txt", ".html", ".svg", ""}


def scan(folder: str | Path, names: Sequence[str], *, paths: bool = True) -> None:
    """Search the text of a folder for secrets and local paths.

    The text chunks of images and the metadata of weights are searched too. The two code files are skipped, because
    they are compared with those of the package elsewhere.

    Args:
        folder: Folder to search.
        names: Files to search, relative to the folder.
        paths: Whether to search for absolute paths.

    Raises:
        PrivateContentError: A file contains a secret or a path; the message names the first one with file and line.
    """
    patterns = {**_SECRETS, **(_PATHS if paths else {})}
    compiled = {kind: re.compile(pattern) for kind, pattern in patterns.items()}
    for name in names:
        if name in CODE_FILES:
            continue
        for number, line in enumerate(_text_of(Path(folder) / name), 1):
            for kind, pattern in compiled.items():
                if found := pattern.search(line):
                    text = found.group()
                    shown = text if kind in _PATHS else f"{text[:6]}..."
                    raise PrivateContentError(
                        f"{name}, line {number}, contains {kind} ('{shown}'), which must not be published. Remove it, "
                        "or leave the file out."
                    )


def _text_of(path: Path) -> list[str]:
    if path.suffix in _TEXT:
        text = path.read_text(encoding="utf-8", errors="replace")
        # JSON may escape the slashes of a path.
        return _INLINE_IMAGES.sub("", text.replace("\\/", "/")).splitlines()
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            return [f"{key}: {value}" for key, value in (file.metadata() or {}).items()]
    if path.suffix == ".png":
        from PIL import Image

        with Image.open(path) as image:
            return [f"{key}: {value}" for key, value in image.info.items() if isinstance(value, str)]
    return []
