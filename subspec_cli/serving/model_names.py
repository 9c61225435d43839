"""The names by which a request may call the model."""

from __future__ import annotations

from subspec_cli.serving.request_body import RequestRefusedError
from subspec_cli.substitutes.prepared_names import last_name


def model_names(model_id: str) -> tuple[str, ...]:
    """Return the names that mean a model: its id, and the last part of it."""
    return tuple(dict.fromkeys((model_id, last_name(model_id))))


def check_model(name: str | None, model_id: str) -> None:
    """Raise RequestRefusedError if a request wants another model; one without a name takes what is there."""
    names = model_names(model_id)
    if name is not None and name not in names:
        raise RequestRefusedError(
            f"the model {name!r} is not here, only {' or '.join(map(repr, names))}",
            "model",
            code="model_not_found",
        )
