"""What can go wrong between here and the Hub: what is waited for and tried again, and what is said when it does not help.

huggingface_hub tries again by itself where it sends large files and asks for them; the calls that create, look and commit are left to us.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from json import JSONDecodeError
from types import TracebackType
from typing import TypeVar

from huggingface_hub import get_token
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import parse_ratelimit_headers

logger = logging.getLogger("awq_hf")

T = TypeVar("T")
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further try
LONGEST = 300.0  # what a Retry-After may ask for
OVERLOADED = (429, 503)  # the request was not carried out
TROUBLE = (408, 500, 502, 504)  # it may have been
CONFLICT = (409, 412)
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN, and run it again"


def checked_token(token: str | bool | None) -> str | bool | None:
    """The token as it can be sent. One that no header can hold is refused here: the client's error would print it."""
    if isinstance(token, str):
        token = token.strip()
        if not re.fullmatch(r"[!-~]+", token):
            raise ValueError("the token has characters that no token has; copy it again")
    return token


def has_token(token: str | bool | None) -> bool:
    """Whether the client has one to send: this, or where it is None or True, that of `hf auth login` or HF_TOKEN."""
    return isinstance(token, str) or (token is not False and get_token() is not None)


def status_of(error: BaseException) -> int | None:
    """The HTTP status; None where the connection broke."""
    return getattr(getattr(error, "response", None), "status_code", None)


def patiently(call: Callable[[], T]) -> T:
    """call(), tried again when the Hub is busy or the connection breaks; for calls that may be repeated."""
    for wait in WAITS:
        try:
            return call()
        except HTTPError as error:
            if status_of(error) not in (None, *OVERLOADED, *TROUBLE):
                raise
            _wait(error, wait)
    return call()


def _wait(error: BaseException, usual: float) -> None:
    """Sleep as long as the answer asks for; raise the error when that is too long."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    asked, limit = headers.get("Retry-After", ""), parse_ratelimit_headers(headers)
    if limit is not None and not limit.remaining:
        asked = str(limit.reset_in_seconds)
    seconds = float(asked) if asked.isdigit() else usual
    if seconds > LONGEST:
        raise error
    logger.warning("the Hub %s; trying again in %g s", f"answered {status}" if (status := status_of(error)) else "did not answer", seconds)
    time.sleep(seconds)


class BrokenUpload(Exception):
    """What was sent did not arrive; the cause says why."""


def sent(upload: Callable[[], None]) -> None:
    """upload(), which tries again by itself, in threads: one that reconnects closes the client that the others use, which ends them."""
    for last in (False, False, True):
        try:
            upload()
            return
        except (RuntimeError, OSError, ValueError) as error:  # by HTTP, by Xet
            cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
            if last or not isinstance(cause, RuntimeError):
                raise BrokenUpload from cause


class CommitRetries:
    """A context for one try to commit after another: swallows an error after which it makes sense to look again, having waited.

    A pull request that may have been opened is not opened twice: only what certainly was not carried out is repeated.
    """

    def __init__(self, create_pr: bool) -> None:
        self.again = (*CONFLICT, *OVERLOADED) if create_pr else (*CONFLICT, *OVERLOADED, *TROUBLE, None)
        self.waits = iter(WAITS)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> bool:
        page = isinstance(error, JSONDecodeError)  # a proxy's, in place of the Hub's answer, which the client takes apart unseen
        if error is None or not (page or isinstance(error, HTTPError)):
            return False
        if status_of(error) in self.again and (wait := next(self.waits, None)) is not None:
            _wait(error, wait)
            return True
        if page:
            raise BrokenUpload from error
        return False


@dataclass
class Stage:
    """What the repository holds at the moment, for the sentence that ends a failed run."""

    holds: str = "nothing was changed"

    def begun(self, created: bool) -> None:
        self.holds = "the repository is new and still empty" if created else "the repository is as it was"

    def pull_request_sent(self, url: str) -> None:
        self.holds += f", but a pull request may have been opened, so look at {url} first"


@contextmanager
def explained(repo_id: str, token: str | bool | None) -> Iterator[Stage]:
    """Turn errors of the Hub client into one sentence: what happened, what the repository holds, what to do. No token is in it."""
    stage = Stage()
    try:
        yield stage
    except (HTTPError, OfflineModeIsEnabled, LocalTokenNotFoundError, BrokenUpload) as error:
        cause = (error.__cause__ if isinstance(error, BrokenUpload) else None) or error
        line = (getattr(cause, "server_message", None) or str(cause) or type(cause).__name__).strip().splitlines()[0]
        explanation = _explain(cause, _redacted(line, token), repo_id, stage.holds)
        raise explanation from (cause if _redacted(str(cause), token) == str(cause) else None)
    except ValueError as error:
        if not isinstance(error.__cause__, HTTPError):
            raise
        raise ValueError(f"{repo_id}: the Hub refused it ({' '.join(str(error).split())}), {stage.holds}") from error


@contextmanager
def downloading(name: str) -> Iterator[None]:
    """Say that a download broke where that is what happened: transformers says that `name` is no model then."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, HTTPError):
            cause = cause.__cause__ or cause.__context__
        if cause is None or status_of(cause) not in (None, *OVERLOADED, *TROUBLE):
            raise
        said = _redacted(str(cause).strip().splitlines()[0], None)
        raise ConnectionError(f"{name}: the download broke ({said}); run it again, files that arrived are not fetched again") from error


def _explain(error: BaseException, said: str, repo_id: str, holds: str) -> Exception:
    status = status_of(error)
    if isinstance(error, OfflineModeIsEnabled):
        return ConnectionError(f"{repo_id}: the Hub client is offline; unset HF_HUB_OFFLINE and run it again")
    if isinstance(error, LocalTokenNotFoundError):
        return PermissionError(f"{repo_id}: no token was found; {_LOG_IN}")
    if status == 401:
        return PermissionError(f"{repo_id}: the Hub does not accept the token (401), {holds}; {_LOG_IN}")
    if status == 403:
        return PermissionError(
            f"{repo_id}: the token has no right to do this (403: {said}), {holds}; use one that can write to {repo_id.split('/')[0]}"
        )
    if status in CONFLICT:
        return RuntimeError(f"{repo_id}: others keep committing to it ({status}: {said}), {holds}; run the same command again")
    if status is not None and status not in (*OVERLOADED, *TROUBLE):
        return ValueError(f"{repo_id}: the Hub refused it ({status}: {said}), {holds}")
    broke = "the connection broke" if isinstance(error, HTTPError) else "an upload failed"
    what = broke if status is None else "the Hub is busy" if status in OVERLOADED else "the Hub has trouble"
    return ConnectionError(f"{repo_id}: {what} ({said}), {holds}; run the same command again, it sends only what has not arrived")


def _redacted(text: str, token: str | bool | None) -> str:
    known = token if isinstance(token, str) else get_token()
    text = text.replace(known, "<token>") if known else text
    return re.sub(r"\bhf_\w{8,}|(?<=Bearer )\S+", "<token>", text)
