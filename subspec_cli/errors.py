"""Errors that a user can act on. The command line prints each as one line and a hint, and exits with its code."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit statuses of every command."""

    OK = 0
    BUG = 1
    USAGE = 2
    UNSUPPORTED = 3
    NETWORK = 4
    ACCESS = 5
    INTEGRITY = 6
    RESOURCE = 7
    BUSY = 8
    NOT_IDENTICAL = 9
    HUNG_UP = 129
    INTERRUPTED = 130
    TERMINATED = 143


class SubspecError(Exception):
    """An error with a message that says what is wrong, with the figures, and a hint that names the remedy."""

    exit_code: ExitCode = ExitCode.BUG
    follows_document: bool = False
    """Whether the result is complete and written when this is raised, so that `--json` adds no second document."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(SubspecError):
    """An argument, an option or a configuration value cannot be used."""

    exit_code = ExitCode.USAGE


class UnsupportedModelError(SubspecError):
    """The model's architecture or format is not supported."""

    exit_code = ExitCode.UNSUPPORTED


class NetworkError(SubspecError):
    """The hub could not be reached; trying again may help."""

    exit_code = ExitCode.NETWORK


class AccessError(SubspecError):
    """The hub refuses access: the model is gated, private or not found."""

    exit_code = ExitCode.ACCESS


class PromptRefusedError(UnsupportedModelError):
    """The model's chat template or tokenizer refuses this prompt; another one may do."""


class IntegrityError(SubspecError):
    """Stored or downloaded bytes do not match their checksum or format."""

    exit_code = ExitCode.INTEGRITY


class DamageFoundError(IntegrityError):
    """A check that ran to its end found damaged files; its result names them."""

    follows_document = True


class ResourceError(SubspecError):
    """Memory, disk space or a permission is missing."""

    exit_code = ExitCode.RESOURCE


class BusyError(SubspecError):
    """Another process holds a lock that this one needs."""

    exit_code = ExitCode.BUSY


class NotIdenticalError(SubspecError):
    """Tokens are not those promised: a benchmark's arms differ, or an audit finds more than rounding."""

    exit_code = ExitCode.NOT_IDENTICAL
    follows_document = True
