"""Whether a JSON schema allows an answer that ends: one may refer to itself so that every answer holds another."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import unquote

_MOST_ROUNDS: Final = 8
"""Looks at a schema. Each finds the references that end by those found before, and most schemas need two."""


def has_finite_answer(schema: dict[str, Any] | bool) -> bool:
    """Whether some answer to a schema ends. What is not understood, or too deep, is taken as if it did."""
    finite = set[str]()
    for _ in range(_MOST_ROUNDS):
        before = len(finite)
        try:
            if _Round(schema, finite).ends(schema):
                return True
        except RecursionError:
            return True
        if len(finite) == before:
            return False
    return True


class _Round:
    """One look at a schema; references that are proven to end are added to `finite`."""

    def __init__(self, root: dict[str, Any] | bool, finite: set[str]) -> None:
        self._root = root
        self._finite = finite
        self._seen = set[str]()

    def ends(self, schema: object) -> bool:
        """Whether an answer to a part of the schema is proven to end."""
        if not isinstance(schema, dict):
            return True
        reference = schema.get("$ref")
        if isinstance(reference, str) and not self._reference_ends(reference):
            return False
        if not all(map(self.ends, _list_in(schema, "allOf"))):
            return False
        for name in ("anyOf", "oneOf"):
            choices = _list_in(schema, name)
            if choices and not any(map(self.ends, choices)):
                return False
        if "const" in schema or "enum" in schema or "type" not in schema:
            return True
        kinds = [schema["type"]] if isinstance(schema["type"], str) else _list_in(schema, "type")
        return not kinds or any(self._kind_ends(kind, schema) for kind in kinds)

    def _kind_ends(self, kind: object, schema: dict[str, Any]) -> bool:
        if kind == "object":
            named = schema.get("properties")
            known = named if isinstance(named, dict) else {}
            other = True if "patternProperties" in schema else schema.get("additionalProperties", True)
            return all(self.ends(known.get(str(name), other)) for name in _list_in(schema, "required"))
        if kind == "array":
            least = schema.get("minItems", 0)
            first = _list_in(schema, "prefixItems")
            needs_more = isinstance(least, int) and least > len(first)
            wanted = first[:least] if isinstance(least, int) else []
            return all(map(self.ends, wanted)) and (not needs_more or self.ends(schema.get("items", True)))
        return True

    def _reference_ends(self, reference: str) -> bool:
        if reference in self._finite or not (reference == "#" or reference.startswith("#/")):
            return True
        if reference in self._seen:
            return False
        self._seen.add(reference)
        is_proven = self.ends(self._target(reference))
        if is_proven:
            self._finite.add(reference)
        return is_proven

    def _target(self, reference: str) -> object:
        """Return what a JSON pointer names; True if there is nothing, which the grammar refuses."""
        found: object = self._root
        for part in reference.split("/")[1:]:
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict):
                found = found.get(name, True)
            elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            else:
                return True
        return found


def _list_in(schema: dict[str, Any], name: str) -> list[Any]:
    found = schema.get(name)
    return found if isinstance(found, list) else []
