"""Sending a folder to the Hub: what must not leave the machine, and how to go on after a fault.

`huggingface_hub` tries the request that makes a commit once and waits for its answer without limit. Here a push is
tried again after errors of the server, of the network and of a commit in between. Trying again costs little and does
no harm: large files that have arrived are known to the Hub by their sha256, files that are the same are left out of
the commit, and a commit whose answer was lost is found to be there.
"""

import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from .configuration_regvit import __version__

logger = logging.getLogger(__name__)

# Errors of the transport are no OSError; their library is httpx or httpx2, by the version of huggingface_hub.
_HTTPError: Any = HfHubHTTPError.__bases__[0]

CODE_FILES = ("configuration_regvit.py", "modeling_regvit.py")
CARD = "README.md"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_ROOT_FILES = {"config.json", "preprocessor_config.json", CARD, "manifest.json", "recipe.yaml", "LICENSE", *CODE_FILES}
_ROOT_FILES |= {"metrics.json", "curves.png", "confusion_matrix.png"}  # of a fine-tuned model; no picture of its data
_FOLDERS = {"figures": {".png", ".svg"}, "reports": {".json", ".jsonl", ".html"}}

# The Hub answers so when it is busy, restarting or has just taken another commit.
TRANSIENT = {408, 409, 412, 423, 425, 429}


# ---- What may be sent --------------------------------------------------------------------------------------------


class PrivateContentError(ValueError):
    """A file holds something that must not be published; the message names file and line."""


def may_be_published(name: str) -> bool:
    """Whether a path in a bundle is on the list: everything else stays at home, optimizer and random state first."""
    folder, _, file = name.rpartition("/")
    if not folder:
        return file in _ROOT_FILES or _WEIGHTS.fullmatch(file) is not None
    return Path(file).suffix in _FOLDERS.get(folder, ())


def public_files(folder: str | Path) -> list[str]:
    """What of a folder may be published, relative to it."""
    paths = (path for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink())
    return sorted(name for path in paths if may_be_published(name := path.relative_to(folder).as_posix()))


# Tokens as their issuers write them; then assignments to names that say what they are. Sums (sha1 of commits, sha256
# of files) are hexadecimal like the keys of wandb, so those count only beside that name.
_SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "a Hugging Face token of an organisation": r"\bapi_org_[A-Za-z0-9]{20,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_.-]{20,}",
    "an API key": r"\bsk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}",
    "a Slack token": r"\bxox[abeprs]-[A-Za-z0-9-]{10,}",
    "a Google API key": r"\bAIza[0-9A-Za-z_-]{35}",
    "a token of a package registry": r"\b(?:pypi-AgE[A-Za-z0-9_-]{20,}|npm_[A-Za-z0-9]{36})",
    "a key of Weights & Biases": r"(?i)\bwandb(?:_v\d_\w{30,}|"
    r"[\w \t\"'.:=-]{0,24}?(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f]))",
    "a signed token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "a signed address": r"(?i)[?&](?:sig|x-amz-signature|x-goog-signature)=[A-Za-z0-9%+/=]{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----",
    "a password in an address": r"(?i)\b[a-z][a-z0-9+.-]*://[^/\s:@\"']*:[^/\s:@\"']+@",
    "a value called password, secret or key": r"(?i)\b[a-z_]*(?:(?:api|access|account|private|secret)_?key|secret|"
    r"passwd|password|(?:access|api|auth|bearer|hub|refresh)_?token)[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9_\-+/]{12,}",
}
# Two parts at least, so that "/" between words and closing tags of HTML are none. `/m/0jbk` is a class of Open Images.
_PATHS = {
    "an absolute path": r"(?<![\w./~<*+\-\])}%&;])/(?![mgt]/[0-9a-z_]+(?![\w./@+\-]))(?:[\w.@+\-]+/)+[\w.@+\-]*",
    "a path of Windows": r"\b[A-Za-z]:\\{1,2}\w+|(?<!\\)(?:\\\\[\w.-]+\\(?!\\)|\\{4}[\w.-]+\\{2})[\w$.-]+",
    "a path in a home directory": r"(?<!\w)~/\w+|file:/",
}
# Pictures as text, in pages and in reports: those of JPEG begin like a path.
_PICTURES = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=]+|(?<=\")[A-Za-z0-9+/]{400,}={0,2}(?=\")")
_TEXT = {".json", ".jsonl", ".yaml", ".yml", ".md", ".txt", ".html", ".svg", ""}


def scan(folder: str | Path, names: Sequence[str], *, paths: bool = True) -> None:
    """Looks for secrets and for paths of this machine in the texts of a folder.

    The two code files are compared with the package's own elsewhere and not searched; of pictures the text chunks
    are read, of weights the metadata.

    Args:
        folder: The folder.
        names: Files to look at, relative to it.
        paths: Whether absolute paths count.

    Raises:
        PrivateContentError: What was found first, with file and line.
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
                        f"{name}, line {number}, holds {kind} ('{shown}'); it would be published. Remove it there, "
                        "or leave the file out."
                    )


def _text_of(path: Path) -> list[str]:
    if path.suffix in _TEXT:
        text = path.read_text(encoding="utf-8", errors="replace")
        # A path in JSON may be written with escaped slashes.
        return _PICTURES.sub("", text.replace("\\/", "/")).splitlines()
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            return [f"{key}: {value}" for key, value in (file.metadata() or {}).items()]
    if path.suffix == ".png":
        from PIL import Image

        with Image.open(path) as image:
            return [f"{key}: {value}" for key, value in image.info.items() if isinstance(value, str)]
    return []


# ---- Sending -----------------------------------------------------------------------------------------------------


class PushError(RuntimeError):
    """A push that did not succeed; the message says what to do."""


class RefusedError(PushError):
    """A push that would not succeed later either, until someone changes something."""


@dataclass(frozen=True)
class RetryPolicy:
    """How long to go on.

    Attributes:
        attempts: Tries of each push, the first included.
        first_wait: Seconds before the second try; doubled for each further one, plus up to half of it at random.
        longest_wait: Seconds; a server that asks for more (`Retry-After`) ends the push.
        timeout: Seconds without a byte after which a request has failed.
    """

    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 120.0
    timeout: float = 300.0


@dataclass(frozen=True)
class Sent:
    """A push that arrived.

    Attributes:
        repo_id: With its owner.
        commit: Hash of the commit, also of one that was there already.
        url: Address of the commit.
        changed: False where the Hub had every file already.
        tries: Tries it took.
    """

    repo_id: str
    commit: str
    url: str
    changed: bool
    tries: int


def send_folder(
    folder: str | Path,
    repo_id: str,
    *,
    names: Sequence[str],
    message: str,
    private: bool | None = None,
    accept_public: bool = True,
    token: str | None = None,
    revision: str | None = None,
    retry: RetryPolicy | None = None,
) -> Sent:
    """Makes one commit of files of a folder, in a repository that is created if there is none.

    Weights of an earlier commit that the new ones replace under another name (one file instead of shards, or the other
    way round) are deleted by the same commit. Nothing else is deleted.

    Args:
        folder: The folder.
        repo_id: `owner/name`, or a name alone for the owner of the token.
        names: Files to send, relative to the folder; large ones of them may be there already.
        message: Of the commit.
        private: Visibility of a repository that is created; None: as the owner's account has it. One that exists stays
            as it is.
        accept_public: Whether to send to a repository that exists and is public.
        token: With write access; default the one that `hf auth login` stored, or `HF_TOKEN`.
        revision: Branch, created if there is none; default main.
        retry: How long to go on.

    Raises:
        PushError: It did not arrive.
    """
    api = HfApi(token=token, library_name="hf_regvit", library_version=__version__)
    retry = retry or RetryPolicy()
    attempt = partial(
        _commit, api, Path(folder), repo_id, names=names, message=message, private=private,
        accept_public=accept_public, revision=revision,
    )  # fmt: skip
    sent, tries = with_retries(attempt, what=repo_id, retry=retry)
    return Sent(**sent, tries=tries)


def create_repository(
    repo_id: str, *, private: bool | None, token: str | None = None, retry: RetryPolicy | None = None
) -> str:
    """Makes a repository if there is none, and returns its name with the owner.

    Raises:
        RefusedError: The token may not, or the name is none.
        PushError: The Hub cannot be reached now.
    """
    api = HfApi(token=token, library_name="hf_regvit", library_version=__version__)
    attempt = partial(api.create_repo, repo_id, private=private, exist_ok=True)
    url, _ = with_retries(attempt, what=repo_id, retry=retry or RetryPolicy())
    return str(url.repo_id)


def _commit(
    api: HfApi,
    folder: Path,
    repo_id: str,
    *,
    names: Sequence[str],
    message: str,
    private: bool | None,
    accept_public: bool,
    revision: str | None,
) -> dict[str, Any]:
    whole_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision not in (None, "main"):
        api.create_branch(whole_id, branch=revision, exist_ok=True)
    head = api.model_info(whole_id, revision=revision)
    if not head.private and not accept_public:
        raise RefusedError(
            f"'{whole_id}' exists and is public. Say --public (private=False) to publish there, or take another name."
        )
    if head.private and private is False:
        logger.warning("'%s' exists and is private, and stays so. Its settings on the Hub make it public.", whole_id)
    there = {sibling.rfilename for sibling in head.siblings or ()}
    stale = sorted(name for name in there if _WEIGHTS.fullmatch(name) and name not in names)
    if not any(_WEIGHTS.fullmatch(name) for name in names):
        stale = []  # nothing replaces them
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(folder / name)) for name in names]
    commit = api.create_commit(
        whole_id,
        operations=[*operations, *(CommitOperationDelete(path_in_repo=name) for name in stale)],
        commit_message=message,
        revision=revision,
        parent_commit=head.sha,
    )
    return {
        "repo_id": whole_id, "commit": commit.oid, "url": commit.commit_url, "changed": commit.oid != head.sha
    }  # fmt: skip


_T = TypeVar("_T")


def with_retries(attempt: Callable[[], _T], *, what: str, retry: RetryPolicy) -> tuple[_T, int]:
    """Runs something that talks to the Hub until it succeeds, and says how many tries it took.

    Raises:
        PushError: A lasting error, or the last try failed.
    """
    jitter = random.Random()  # runs that failed together must not come back together, so this is not seeded
    for tries in range(1, retry.attempts + 1):
        try:
            with _time_limit(retry.timeout):
                return attempt(), tries
        except (_HTTPError, OSError, RuntimeError, ValueError) as error:
            if isinstance(error, PushError):
                raise
            reason = _of_the_hub(error)
            if reason is None:
                raise
            if not _is_transient(reason):
                raise RefusedError(_advice(reason, what)) from error
            wait = retry.first_wait * 2 ** (tries - 1) * (1 + jitter.random() / 2)
            wait = max(min(wait, retry.longest_wait), _retry_after(reason))
            if tries == retry.attempts or wait > retry.longest_wait:
                raise PushError(
                    f"'{what}' was not sent after {tries} {'try' if tries == 1 else 'tries'}: {_short(reason)}. "
                    + (f"The Hub asks to wait {wait:.0f} s. " if wait > retry.longest_wait else "")
                    + "Run the same command again later; what has arrived is not sent twice."
                ) from error
            logger.warning("Hub: %s; try %d of %d in %.1f s.", _short(reason), tries + 1, retry.attempts, wait)
            time.sleep(wait)
    raise AssertionError("unreachable: the last try returns or raises")


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """The client of huggingface_hub waits for ever unless told; it is shared, so it is put back."""
    client = get_session()
    before = client.timeout
    client.timeout = seconds
    try:
        yield
    finally:
        client.timeout = before


def _of_the_hub(error: BaseException | None) -> BaseException | None:
    """The error of server or network behind `error`, which uploads of large files wrap; None if it is none."""
    while error is not None:
        if isinstance(error, HfHubHTTPError | HFValidationError | ConnectionError | TimeoutError):
            return error
        if any(base.__name__ == "TransportError" for base in type(error).__mro__):
            return error
        error = error.__cause__
    return None


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        status = _status(error) or 500
        return status in TRANSIENT or status >= 500
    return not isinstance(error, OfflineModeIsEnabled | HFValidationError)


def _retry_after(error: BaseException) -> float:
    """Seconds that the server asks to wait; 0 if it does not, or gives a date."""
    text = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else 0.0


def _short(error: BaseException) -> str:
    if isinstance(error, HfHubHTTPError):
        said = error.server_message or error.response.reason_phrase
        return f"{_status(error)} {said}".splitlines()[0][:200]
    return (f"{type(error).__name__}: {error}".splitlines() or [type(error).__name__])[0][:200]


def _advice(error: BaseException, what: str) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be sent. Unset it and run the command again."
    if isinstance(error, HFValidationError):
        return f"'{what}' is no name of a repository: {str(error).splitlines()[0]} Expected 'owner/name'."
    advice = {
        401: "The Hub does not know the token. Run `hf auth login`, or set HF_TOKEN to one with write access",
        402: "The account cannot hold more private storage. Make room, or publish with --public",
        403: f"The token may not write to '{what}'. Use one with write access (huggingface.co/settings/tokens) and an "
        "owner that you belong to",
        404: f"There is no '{what}', or this token cannot see it. Check owner and name",
        413: "A file is too large for the Hub. Write smaller shards (--max_shard_size)",
    }
    said = advice.get(_status(error) or 0, f"The Hub refused '{what}'")
    return f"{said}. The Hub said: {_short(error)}"


# ---- In the background -------------------------------------------------------------------------------------------


@dataclass
class BackgroundPushes:
    """Pushes in a thread, one after the other. What fails is kept for the end and raises nowhere.

    Attributes:
        sent: What arrived, in words.
        failures: What did not, with the reason.
    """

    sent: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether a push is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, send: Callable[[], object], *, label: str) -> None:
        """Runs `send` after those before it; at the end of the process what is under way is given up."""
        self._thread = threading.Thread(
            target=self._run, args=(send, label, self._thread), name=f"push of {label}", daemon=True
        )
        self._thread.start()

    def _run(self, send: Callable[[], object], label: str, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        self.note(send, label=label)

    def note(self, send: Callable[[], object], *, label: str) -> bool:
        """Runs `send` here and keeps what became of it; whether it succeeded."""
        if not self.prepare(send, label=label):
            return False
        self.sent.append(label)
        return True

    def prepare(self, work: Callable[[], object], *, label: str) -> bool:
        """Runs what a push needs before it; whether it succeeded. A failure counts as one of the push."""
        try:
            work()
        except (_HTTPError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            self.failures.append(f"{label}: {error}")
            logger.warning("The push of %s failed; training is not affected. %s", label, error)
            return False
        return True

    @property
    def count(self) -> int:
        """Pushes that have ended."""
        return len(self.sent) + len(self.failures)

    def wait(self, seconds: float | None = None) -> None:
        """Until nothing is under way, or for so many seconds; what is under way then counts as failed."""
        if self._thread is None:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.failures.append(f"{self._thread.name}: not finished after {seconds:.0f} s")

    def summary(self) -> dict[str, Any]:
        """For reports."""
        return {"sent": list(self.sent), "failed": list(self.failures)}
