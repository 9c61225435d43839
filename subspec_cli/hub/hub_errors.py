"""Errors of the hub in one sentence: the library's nested exceptions, unwrapped to their cause."""

from __future__ import annotations

import json
import os
from pathlib import Path

from subspec_cli.errors import (
    AccessError,
    IntegrityError,
    NetworkError,
    SubspecError,
    UsageError,
)
from subspec_cli.files.io_errors import write_error
from subspec_cli.units import printable

_TRANSFER_LIBRARIES = ("httpx", "httpx2", "hf_xet")
_RETRYABLE_FAULTS = {"TimeoutException", "NetworkError", "RemoteProtocolError", "ProxyError"}


def explain_hub_error(error: Exception, model_id: str, revision: str | None) -> SubspecError | None:
    """The error to show for an exception of `huggingface_hub`; None if the hub is not the cause.

    A refusal is an AccessError, a missing revision a UsageError, a damaged file an IntegrityError, a disk that
    cannot be written a ResourceError. Other faults of the network are a NetworkError. Headers and tokens are
    never quoted.
    """
    from huggingface_hub import errors

    # The library answers "not in the cache" for nearly every failure and keeps the reason as the cause.
    while isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, errors.OfflineModeIsEnabled):
        return NetworkError(
            f"offline mode is set (HF_HUB_OFFLINE), so {model_id} cannot be fetched",
            "unset HF_HUB_OFFLINE and run the command again",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(
            f"{model_id} has no revision {printable(revision or 'main')}",
            f"see the branches and tags: {_endpoint()}/{model_id}/tree/main",
        )
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_answer(error, model_id)
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"{model_id} is not the name of a model on the hub")
    if isinstance(error, (errors.FileMetadataError, errors.LocalEntryNotFoundError)):
        return not_a_hub()
    if _is_of_transfer_library(error) or isinstance(error, ConnectionError):
        return _unreachable(error)
    if isinstance(error, json.JSONDecodeError):
        return not_a_hub()
    if isinstance(error, OSError):
        return _explain_os_error(error)
    return None


def is_transfer_error(error: Exception) -> bool:
    """Whether a connection failed in a way that is worth a retry: refused, dropped, silent, cut short."""
    names = {base.__name__ for base in type(error).__mro__}
    if "OfflineModeIsEnabled" in names:  # a ConnectionError that no wait changes
        return False
    if isinstance(error, ConnectionError):
        return True
    return _is_of_transfer_library(error) and bool(names & _RETRYABLE_FAULTS)


def status_of(error: Exception) -> int | None:
    """HTTP status of the answer that an exception is about; None for any other exception."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_of_transfer_library(error: Exception) -> bool:
    return type(error).__module__.split(".")[0] in _TRANSFER_LIBRARIES


def _explain_answer(error: Exception, model_id: str) -> SubspecError:
    from huggingface_hub import errors

    response = getattr(error, "response", None)
    status = int(getattr(response, "status_code", 0))
    page = f"{_endpoint()}/{model_id}"
    if isinstance(error, errors.GatedRepoError):
        return AccessError(
            f"{model_id} is gated and {_token_source() or 'you are not logged in'}",
            f"accept its licence at {page}, then log in: hf auth login",
        )
    if isinstance(error, errors.DisabledRepoError):
        return AccessError(f"{model_id} has been disabled on the hub", f"see {page}")
    if status == 404 or (isinstance(error, errors.RepositoryNotFoundError) and _token_source() is None):
        return AccessError(
            f"{model_id} was not found on the hub, or is private",
            "check the name; for a private model log in: hf auth login",
        )
    if status in (401, 403):
        return AccessError(
            f"the hub refuses {model_id} ({status}): {_token_source() or 'you are not logged in'}",
            "log in with a token that may read it: hf auth login",
        )
    wait = response.headers.get("Retry-After", "") if response is not None else ""
    asked_wait = f", asks to wait {printable(wait)[:20]} s" if status == 429 and wait else ""
    return NetworkError(
        f"{_endpoint()} answered {status}{asked_wait}", "try again later; files that are complete are kept"
    )


def _unreachable(error: Exception) -> NetworkError:
    reason = printable(str(error).strip().split("\n")[0])[:200] or type(error).__name__
    return NetworkError(
        f"cannot reach {_endpoint()}: {reason}",
        "check the connection and HF_ENDPOINT, then run the command again",
    )


def lacks_header(name: str, header: str, meaning: str) -> NetworkError:
    """The error for a file of which neither a header nor the hub's listing says something that is needed."""
    return NetworkError(
        f"{_endpoint()} does not answer like a Hugging Face hub: it sends no usable {header} for {printable(name)}, "
        f"and its listing lacks {meaning}",
        "set HF_ENDPOINT to another mirror, or fetch the model by other means and give its directory",
    )


def not_a_hub(why: str = "") -> NetworkError:
    """The error for an answer that no hub would give."""
    return NetworkError(
        f"{_endpoint()} does not answer like a Hugging Face hub" + (f": {why}" if why else ""),
        "check HF_ENDPOINT, and whether a proxy or a login page stands in between",
    )


def _explain_os_error(error: OSError) -> SubspecError:
    if error.errno is None:  # the library reports a body of another length this way
        reason = printable(str(error).strip().split("\n")[0])[:200]
        return IntegrityError(f"a download is damaged: {reason}", "run the command again")
    return write_error(error, Path(os.fsdecode(error.filename or _cache_directory())))


def _endpoint() -> str:
    from huggingface_hub import constants

    return printable(constants.ENDPOINT)


def _cache_directory() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def _token_source() -> str | None:
    """Where the token was taken from, never its value; None if there is no token."""
    from huggingface_hub import get_token

    if os.environ.get("HF_TOKEN"):
        return "the token in HF_TOKEN has no access"
    return "the stored token has no access" if get_token() else None
