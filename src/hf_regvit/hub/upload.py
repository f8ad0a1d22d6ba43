"""Upload a folder to the Hub: check which files may be published, and retry after errors.

`huggingface_hub` sends the request for a commit only once and waits for its answer without a time limit. This module
retries a push after errors of the server or the network and after a conflicting commit. Retries are cheap and safe:
the Hub knows uploaded large files by their sha256, unchanged files are left out of the commit, and a commit whose
answer was lost is recognized.
"""

import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from ..models.configuration_regvit import __version__
from ..models.foreign_weights import first_line
from .scan import WEIGHT_FILES

logger = logging.getLogger(__name__)

# Transport errors are not OSErrors. They come from httpx or httpx2, depending on the version of huggingface_hub.
_HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]

# Status codes of a Hub that is busy, restarting or has just received another commit.
TRANSIENT = {408, 409, 412, 423, 425, 429}


# ---- Uploading ---------------------------------------------------------------------------------------------------


class PushError(RuntimeError):
    """A push that failed. The message says what to do."""


class PermanentPushError(PushError):
    """A permanent failure: retrying will not help."""


@dataclass(frozen=True)
class RetryPolicy:
    """Policy for retries of a push.

    Attributes:
        attempts: Maximum number of attempts of each push, including the first one.
        first_wait: Seconds before the second attempt. The wait doubles with each attempt, plus up to half at random.
        longest_wait: Maximum wait in seconds. If the server asks for more (`Retry-After`), the push fails.
        timeout: Seconds without received data after which a request fails.
    """

    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 120.0
    timeout: float = 300.0


@dataclass(frozen=True)
class PushResult:
    """Result of a successful push.

    Attributes:
        repo_id: Repository id with its owner.
        commit: Hash of the commit, which is an existing one if nothing changed.
        url: URL of the commit.
        changed: False if the Hub already had all files.
        tries: Number of attempts.
    """

    repo_id: str
    commit: str
    url: str
    changed: bool
    tries: int = 1


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
) -> PushResult:
    """Upload files of a folder in one commit, and create the repository if it does not exist.

    The commit also deletes weights of earlier commits that the new weights replace under other names (one file instead
    of shards, or the reverse). Nothing else is deleted.

    Args:
        folder: Folder with the files.
        repo_id: Repository id `owner/name`, or a name alone for the owner of the token.
        names: Files to upload, relative to the folder. Large files that the Hub already has are not sent again.
        message: Message of the commit.
        private: Whether to make a new repository private; None uses the default of the owner's account. The visibility
            of an existing repository does not change.
        accept_public: Whether to upload to an existing public repository.
        token: Token with write access. Default: the token stored by `hf auth login`, or `HF_TOKEN`.
        revision: Branch, created if it does not exist. Default: main.
        retry: Policy for retries.

    Raises:
        PushError: The upload failed.
    """
    api, folder = _api(token), Path(folder)

    def attempt() -> PushResult:
        whole_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision not in (None, "main"):
            api.create_branch(whole_id, branch=revision, exist_ok=True)
        head = api.model_info(whole_id, revision=revision)
        if not head.private and not accept_public:
            raise PermanentPushError(
                f"'{whole_id}' exists and is public. Use --public (private=False), or another name."
            )
        if head.private and private is False:
            logger.warning("'%s' exists and remains private. Make it public in its settings on the Hub.", whole_id)
        old = {sibling.rfilename for sibling in head.siblings or ()} - set(names)
        stale = sorted(filter(WEIGHT_FILES.fullmatch, old)) if any(map(WEIGHT_FILES.fullmatch, names)) else []
        commit = api.create_commit(
            whole_id,
            operations=[
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(folder / name)) for name in names),
                *(CommitOperationDelete(path_in_repo=name) for name in stale),
            ],
            commit_message=message,
            revision=revision,
            parent_commit=head.sha,
        )
        return PushResult(whole_id, commit.oid, commit.commit_url, changed=commit.oid != head.sha)

    sent, tries = with_retries(attempt, what=repo_id, retry=retry or RetryPolicy())
    return replace(sent, tries=tries)


def create_repository(repo_id: str, *, private: bool | None, token: str | None = None) -> str:
    """Create a repository if it does not exist, and return its id with the owner.

    Raises:
        PermanentPushError: The token has no write access, or the name is invalid.
        PushError: The Hub cannot be reached.
    """
    attempt = partial(_api(token).create_repo, repo_id, private=private, exist_ok=True)
    return str(with_retries(attempt, what=repo_id, retry=RetryPolicy())[0].repo_id)


def _api(token: str | None) -> HfApi:
    return HfApi(token=token, library_name="hf_regvit", library_version=__version__)


_T = TypeVar("_T")


def with_retries(attempt: Callable[[], _T], *, what: str, retry: RetryPolicy) -> tuple[_T, int]:
    """Call a function that contacts the Hub until it succeeds, and return its result and the number of attempts.

    Raises:
        PermanentPushError: The error is permanent.
        PushError: The last attempt failed.
    """
    jitter = random.Random()  # not seeded, so that runs that failed together do not retry together
    tries = 0
    while True:
        tries += 1
        try:
            with _time_limit(retry.timeout):
                return attempt(), tries
        except (_HTTPError, OSError, RuntimeError, ValueError) as error:
            reason = _hub_error(error)
            if reason is None:
                raise
            if not _is_transient(reason):
                raise PermanentPushError(_advice(reason, what)) from error
            said = _summarize_error(reason)
            wait = retry.first_wait * 2 ** (tries - 1) * (1 + jitter.random() / 2)
            wait = max(min(wait, retry.longest_wait), _retry_after(reason))
            if tries >= retry.attempts or wait > retry.longest_wait:
                longer = f"The Hub asks to wait {wait:.0f} s. " if wait > retry.longest_wait else ""
                raise PushError(
                    f"'{what}' was not uploaded after {tries} {'attempt' if tries == 1 else 'attempts'}: {said}. "
                    f"{longer}Run the same command again later; uploaded files are not sent again."
                ) from error
            logger.warning("Hub: %s. Attempt %d of %d in %.1f s.", said, tries + 1, retry.attempts, wait)
            time.sleep(wait)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Set a timeout on the shared client of huggingface_hub, which has none, and restore it afterwards."""
    client = get_session()
    before = client.timeout
    client.timeout = seconds
    try:
        yield
    finally:
        client.timeout = before


def _hub_error(error: BaseException | None) -> BaseException | None:
    """Return the server or network error behind `error`, which uploads of large files wrap, or None."""
    known = (HfHubHTTPError, HFValidationError, ConnectionError, TimeoutError)
    while error is not None and not isinstance(error, known):
        if any(base.__name__ == "TransportError" for base in type(error).__mro__):
            break
        error = error.__cause__
    return error


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TRANSIENT or error.response.status_code >= 500
    return not isinstance(error, OfflineModeIsEnabled | HFValidationError)


def _retry_after(error: BaseException) -> float:
    """Return the seconds that the server asks to wait, or 0 if it names none or a date."""
    text = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else 0.0


def _summarize_error(error: BaseException) -> str:
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, HfHubHTTPError):
        said = f"{error.response.status_code} {error.server_message or error.response.reason_phrase}"
    return said.splitlines()[0][:200]


def _advice(error: BaseException, what: str) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it and run the command again."
    if isinstance(error, HFValidationError):
        return f"'{what}' is not a valid Hub repository id. Use owner/name. {first_line(error)}"
    advice = {
        401: "The Hub does not accept the token. Run `hf auth login`, or set HF_TOKEN to a token with write access",
        402: "The account has no private storage left. Delete files there, or publish with --public",
        403: f"The token has no write access to '{what}'. Use a token with write access "
        "(huggingface.co/settings/tokens) and an owner to which you belong",
        404: f"'{what}' does not exist, or the token cannot access it. Check the owner and the name",
        413: "A file is too large for the Hub. Use smaller shards (--max_shard_size)",
    }
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    said = advice.get(status, f"The Hub rejected the request for '{what}'")
    return f"{said}. Response of the Hub: {_summarize_error(error)}"


# ---- In the background -------------------------------------------------------------------------------------------


@dataclass
class BackgroundPushes:
    """Pushes that run one after the other in a thread. Failures are collected and do not raise.

    Attributes:
        sent: Labels of the successful pushes.
        failures: Labels of the failed pushes, with the reasons.
    """

    sent: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """True while a push is running."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, send: Callable[[], object], *, label: str) -> None:
        """Run `send` after the earlier pushes. A push that is still running when the process ends is abandoned."""
        before = self._thread

        def run() -> None:
            if before is not None:
                before.join()
            self.note(send, label=label)

        self._thread = threading.Thread(target=run, name=f"push of {label}", daemon=True)
        self._thread.start()

    def note(self, send: Callable[[], object], *, label: str) -> bool:
        """Run `send` in this thread, record the outcome, and return whether it succeeded."""
        succeeded = self.prepare(send, label=label)
        self.sent += [label] * succeeded
        return succeeded

    def prepare(self, work: Callable[[], object], *, label: str) -> bool:
        """Run the preparation of a push and return whether it succeeded. A failure counts as a failed push."""
        try:
            work()
        except (_HTTPError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            self.failures.append(f"{label}: {error}")
            logger.warning("The push of %s failed; training is not affected. %s", label, error)
            return False
        return True

    @property
    def count(self) -> int:
        """Number of pushes that have ended."""
        return len(self.sent) + len(self.failures)

    def wait(self, seconds: float | None = None) -> None:
        """Wait until all pushes have ended, at most `seconds`; a push that is still running then counts as failed."""
        if self._thread is None:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.failures.append(f"{self._thread.name}: not finished after {seconds:.0f} s")
