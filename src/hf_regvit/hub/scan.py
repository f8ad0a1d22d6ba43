"""Decide which files may be published and search them for secrets and private paths."""

import base64
import html
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

import yaml

CODE_FILES = ("configuration_regvit.py", "modeling_regvit.py")
CARD = "README.md"
WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_ROOT_FILES = {"config.json", "preprocessor_config.json", CARD, "manifest.json", "recipe.yaml", "LICENSE", *CODE_FILES}
_ROOT_FILES |= {"metrics.json", "curves.png", "confusion_matrix.png"}  # of fine-tuned models; no images of the data
_ROOT_FILES |= {"proof.json", "check.npz", "run.py"}  # of an export, with its folders; never a pickle of torch
_ROOT_FILES |= {"adapter_config.json", "adapter_model.safetensors"}  # of low-rank updates
_ROOT_FILES |= {"index.html", "page.css", "page.js"}  # of an export with a page
_FOLDERS = {"figures": {".png"}, "reports": {".json", ".jsonl"}, "onnx": {".onnx", ".data"}}
_FOLDERS |= {"openvino": {".xml", ".bin"}, "runtime": {".mjs", ".wasm", ".txt"}}  # the last one is that of a page


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
    "an absolute path": r"(?<![\w./~<*+\-\])}%&;])/(?![mgt]/[0-9a-z_]+(?![\w./@+\-]))(?:[\w.@+\-]+/)+[\w.@+\-]*"
    r"|(?<![\w./])/(?:home|Users|root|mnt|media|tmp|var|etc|opt|srv|data|scratch|Volumes|private|workspace)/[\w.@+\-]+",
    "a Windows path": r"\b[A-Za-z]:\\{1,2}\w+|(?<!\\)(?:\\\\[\w.-]+\\(?!\\)|\\{4}[\w.-]+\\{2})[\w$.-]+",
    "a path in a home directory": r"(?<!\w)~/\w+|file:/",
}
# Reported before an upload, but no errors: text like this is often meant to be public.
_DOUBTFUL = {
    "an e-mail address": r"[\w.+-]+@(?!example\.)[\w-]+(?:\.[\w-]+)+",
    "the name of a host": r"\b[\w-]+\.(?:local|internal|lan|intra|corp|cluster|localdomain)\b"
    r"|(?<![\d.])(?:10|127|172\.(?:1[6-9]|2\d|3[01])|192\.168)(?:\.\d{1,3}){2,3}(?![\d.])",
    "what could be a key": r"(?<![\w/+-])(?=[\w-]*\d)(?=[\w-]*[a-z])(?=[\w-]*[A-Z])[A-Za-z0-9_-]{20,}(?![\w/+-])"
    r"|(?<![0-9a-f])(?<!commit: )(?<!\"git_commit\": \")[0-9a-f]{40}(?![0-9a-f])",
}
# Images encoded as text in reports: base64 of a JPEG begins like a path.
_INLINE_IMAGES = re.compile(r"data:[\w/+.-]+;base64,([A-Za-z0-9+/=]+)|(?<=\")([A-Za-z0-9+/]{400,}={0,2})(?=\")")
_TEXT = {".json", ".jsonl", ".yaml", ".yml", ".md", ".txt", ".html", ".css", ".js", ".svg", ""}
MOST_TEXT = 2**26  # bytes of a text file; searching a larger one would take many minutes
# Chunks of a PNG that hold pixels or numbers. All others can hold text, and so can what follows the last one.
_PNG_CHUNKS = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD"}


def scan(folder: str | Path, names: Sequence[str], *, paths: bool = True) -> None:
    """Search the files of a folder for secrets and local paths.

    The headers of weights and the text of images are searched too; other metadata of images is not allowed. The two
    code files are skipped, because they are compared with those of the package elsewhere.

    Args:
        folder: Folder to search.
        names: Files to search, relative to the folder.
        paths: Whether to search for absolute paths.

    Raises:
        PrivateContentError: A file contains a secret, a path or metadata; the message names the first one with file
            and line.
    """
    for name, number, kind, text in _search(Path(folder), names, {**_SECRETS, **(_PATHS if paths else {})}):
        shown = text if kind in _PATHS else f"{text[:6]}..."
        raise PrivateContentError(
            f"{name}, line {number}, contains {kind} ('{shown}'), which must not be published. Remove it, or leave "
            "the file out."
        )


def doubtful_content(folder: str | Path, names: Sequence[str]) -> list[str]:
    """Return sentences on e-mail addresses, names of hosts and possible keys in the files, at most 20."""
    local = {"the name of this machine": socket.gethostname(), "your user name": os.environ.get("USER", "")}
    own = {kind: rf"(?<![\w-]){re.escape(name)}(?![\w-])" for kind, name in local.items() if len(name) > 4}
    searched = [name for name in names if name != "manifest.json"]  # sizes and checksums
    found = _search(Path(folder), searched, {**_DOUBTFUL, **own})
    return list(islice((f"{name}, line {number}: {kind} ('{text}')" for name, number, kind, text in found), 20))


def _search(folder: Path, names: Sequence[str], patterns: Mapping[str, str]) -> Iterator[tuple[str, int, str, str]]:
    compiled = {kind: re.compile(pattern) for kind, pattern in patterns.items()}
    for name in names:
        for number, line in enumerate(_text_of(folder / name) if name not in CODE_FILES else (), 1):
            for kind, pattern in compiled.items():
                if found := pattern.search(line):
                    yield name, number, kind, found.group()


def _text_of(path: Path) -> list[str]:
    if path.suffix in _TEXT:
        if path.stat().st_size > MOST_TEXT:
            raise PrivateContentError(f"{path.name} has too much text to be searched. Leave the file out.")
        return _plain_text(path.suffix, path.read_text(encoding="utf-8", errors="replace")).splitlines()
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little")).decode("utf-8", "replace")
        return _plain_text(".json", header).splitlines()
    return _png_text(path) if path.suffix == ".png" else []


def _plain_text(suffix: str, text: str) -> str:
    """Return text together with what it stands for, without escapes and encodings that would hide a secret."""
    images = ["".join(groups) for groups in _INLINE_IMAGES.findall(text)]
    text = _INLINE_IMAGES.sub("", text)
    plain = [text.replace("\\/", "/"), html.unescape(text)]
    for line in text.splitlines() if suffix == ".jsonl" else [text] if suffix in (".json", ".yaml", ".yml") else []:
        with suppress(ValueError, RecursionError, yaml.YAMLError):
            content = yaml.safe_load(line) if suffix.startswith(".y") else json.loads(line)
            plain.append(json.dumps(content, ensure_ascii=False, indent=0, default=str).replace("\\\\", "\\"))
    with suppress(ValueError):
        plain += [base64.b64decode(image).decode("latin-1") for image in images]
    return "\n".join(dict.fromkeys(plain))


def _png_text(path: Path) -> list[str]:
    data, start, text = path.read_bytes(), 8, []
    while kind := data[start + 4 : start + 8]:
        length = int.from_bytes(data[start : start + 4], "big")
        if kind == b"tEXt":
            text.append(data[start + 8 : start + 8 + length].decode("latin-1").replace("\0", ": "))
        elif kind not in _PNG_CHUNKS:
            raise PrivateContentError(
                f"{path.name} holds metadata ({kind!r}), which must not be published. Save the image without it."
            )
        start += 12 + length
        if kind == b"IEND" and data[start:]:
            raise PrivateContentError(f"{path.name} goes on after its end. Save the image again.")
    return text
