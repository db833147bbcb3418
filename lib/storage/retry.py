"""Retries: transient errors of a store (503, reset, timeout, a restart) are retried, permanent ones raised with their remedy."""

import errno
import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa

from ..errors import StorageError

RETRY_SECONDS = 120.0  # a store that restarts is back in 1 to 20 s
PROBE_SECONDS = 4.0  # a user is waiting, and a wrong endpoint gives no answer at all
FIRST_PAUSE, LAST_PAUSE = 0.2, 8.0  # seconds between two attempts: doubled each time, random by half

T = TypeVar("T")


def retrying(attempt: Callable[[], T], url: str, seconds: float = RETRY_SECONDS) -> T:
    """Run `attempt` until it succeeds, fails for good, or time is up: `seconds` for a store that is silent, else RETRY_SECONDS."""
    started = time.monotonic()
    pause = FIRST_PAUSE
    while True:
        try:
            return attempt()
        except (TypeError, AttributeError, LookupError, AssertionError, StorageError):
            raise  # an error in our code, or a StorageError with its message already
        except Exception as error:
            final = final_reason(error)
            if isinstance(error, FileNotFoundError) and not final:
                raise
            limit = RETRY_SECONDS if error_code(error) else seconds
            if final or time.monotonic() + pause > started + limit:
                raise StorageError(f"{url}: {final or _transient_reason(error, limit)}") from error
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 2, LAST_PAUSE)


def error_code(error: BaseException) -> str:
    """The store's own error code, from botocore's exception, the one s3fs made of it, or an HTTP status (gcsfs)."""
    if isinstance(status := getattr(error, "code", None), int):
        return str(status)
    for e in (error, error.__cause__):
        response = getattr(e, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def final_reason(error: Exception) -> str | None:
    """The reason why a retry is useless, with the remedy; None for a transient error, or one that the caller must judge."""
    code, text = error_code(error), f"{type(error).__name__}: {error}"
    if "ParamValidationError" in text:
        return f"{text}. Correct the URL"
    if "NoCredentials" in text or "Unable to locate credentials" in text or "PartialCredentials" in text:
        return "no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or --storage-option anon=true"
    if code == "NoSuchBucket" or "bucket does not exist" in text:
        return "no such bucket. Create it, or correct the URL; AWS_ENDPOINT_URL names the server"
    denied = ("SignatureDoesNotMatch", "InvalidAccessKeyId", "AccessDenied", "401", "403")
    if isinstance(error, PermissionError) or code in denied or text.startswith("OSError: Forbidden"):
        return f"access denied ({code or error}). Check the access key, the secret and the bucket's policy"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full. Free space and start the same command again: it goes on where it stopped"
    if isinstance(error, (IsADirectoryError, NotADirectoryError, ValueError)):
        return text
    return None


def _transient_reason(error: Exception, seconds: float) -> str:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    place = f" at {endpoint}" if endpoint else ""
    return (
        f"the store{place} did not serve this within {seconds:.0f} s ({type(error).__name__}: {error}). "
        "Check the endpoint and the network, then start the same command again"
    )


def is_damage(error: Exception) -> bool:
    """Whether a reader's error is about the data, which no retry changes, and not about the disk or the network."""
    # pyarrow raises its own classes, or a plain OSError without errno, for bytes that it cannot parse.
    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)
