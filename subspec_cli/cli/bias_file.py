"""The file of `--logit-bias`: a JSON object from tokens to numbers, as `logit_bias` of the OpenAI API."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from subspec_cli.errors import UsageError
from subspec_cli.setting_rules import MOST_BIAS

_MOST_BYTES: Final = 8 << 20
_HINT: Final = 'write a JSON object such as {"65": 2.5, " the": -100}: ids, or texts that are one token'


def read_bias_file(name: str) -> dict[str, Any]:
    """Return the numbers by token, as they are written.

    Raises UsageError for a file that cannot be read, that is no strict JSON, or for a bias out of its range.
    """
    from subspec_cli.files.json_object import parse_json_object

    path = Path(name)
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"--logit-bias {path}: {error.strerror or error}", "give a JSON file") from error
    if len(content) > _MOST_BYTES:
        raise UsageError(f"--logit-bias {path}: larger than {_MOST_BYTES >> 20} MiB", _HINT)
    biases = parse_json_object(content, f"--logit-bias {path}", UsageError, _HINT)
    for token, bias in biases.items():
        if not token:
            raise UsageError(f"--logit-bias {path}: a token is empty", _HINT)
        if type(bias) not in (int, float) or not abs(bias) <= MOST_BIAS:
            raise UsageError(
                f"--logit-bias {path}: the bias of {token[:40]!r} is {str(bias)[:40]}, "
                f"not a number from -{MOST_BIAS} to {MOST_BIAS}",
                _HINT,
            )
    return biases
