"""Renders chat templates in a process of its own, each bounded in time and memory.

The process is started with this file as its script. It imports nothing but jinja2, so that it starts fast. Templates
see the filters, functions and tags that transformers gives them. Requests come on standard input and replies go to
standard output, each as 8 bytes of its length and a JSON object.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import resource
import signal
import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = sys.argv[1:]  # where jinja2 is

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class RefusedError(TemplateError):
    """What a template raises by `raise_exception`."""


class Generation(Extension):
    """The tag around what the assistant says; it changes nothing of the text."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> nodes.Node:
        """Read up to the end tag."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text_of"), [], [], body).set_lineno(line)

    def _text_of(self, caller: Callable[[], str]) -> str:
        return caller()


class PlainDict:
    """Makes dictionaries, and shows no attribute of their class but this one."""

    def __call__(self, *items: Any, **named: object) -> dict[Any, Any]:  # noqa: ANN401 - as `dict` has it
        """Make a dictionary."""
        return dict(*items, **named)

    def fromkeys(self, *items: Any) -> dict[Any, Any]:  # noqa: ANN401 - as `dict` has it
        """Make a dictionary of keys."""
        return dict.fromkeys(*items)


class PlainNamespace(Namespace):
    """A namespace whose names cannot reach into the interpreter."""

    def __init__(*items: Any, **named: object) -> None:  # noqa: ANN401 - `self` may be one of the names
        own, *rest = items
        values = dict(*rest, **named)
        for name in values:
            _refuse_hidden(name)
        Namespace.__init__(own, values)

    def __setitem__(self, name: str, value: object) -> None:
        _refuse_hidden(name)
        super().__setitem__(name, value)


def _refuse_hidden(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no name {name!r}")


def _raise_exception(message: object) -> None:
    raise RefusedError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    x: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def template_environment() -> ImmutableSandboxedEnvironment:
    """Return an environment as that in which transformers renders."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = PlainDict()
    environment.globals["namespace"] = PlainNamespace
    return environment


def main() -> None:
    """Answer requests until there are no more: with a `text`, or with the kind of an `error` and its `reason`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the parent
    compiled = functools.lru_cache(maxsize=1)(template_environment().from_string)
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    while header := requests.read(8):
        order = json.loads(requests.read(int.from_bytes(header, "big")).decode("utf-8", "surrogatepass"))
        _set_limits(order["most_cpu_s"], order["most_bytes"])
        try:
            reply = _as_bytes(_render(compiled, order))
        except MemoryError:
            reply = _as_bytes({"error": "memory"})
        _lift_limits()
        replies.write(len(reply).to_bytes(8, "big") + reply)
        replies.flush()


def _as_bytes(value: dict[str, str]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _render(compiled: Callable[[str], Template], order: dict[str, Any]) -> dict[str, str]:
    try:
        text = compiled(order["template"]).render(
            messages=order["messages"],
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **order["variables"],
        )
        size_bytes = len(text.encode("utf-8", "surrogatepass"))
    except MemoryError:
        raise
    except RefusedError as error:
        return {"error": "refused", "reason": str(error)}
    except Exception as error:  # templates are programs and raise anything
        line = getattr(error, "lineno", None)
        reason = str(error) or type(error).__name__
        return {"error": "broken", "reason": reason if line is None else f"line {line}: {reason}"}
    return {"error": "long"} if size_bytes > order["most_text_bytes"] else {"text": text}


def _set_limits(most_cpu_s: int, most_bytes: int) -> None:
    """Let the system end this process after some more seconds of work, and refuse it more memory than this."""
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as statistics:
        taken_bytes = int(statistics.read().split()[0]) * resource.getpagesize()
        _limit(resource.RLIMIT_AS, taken_bytes + most_bytes)
    _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + most_cpu_s)


def _lift_limits() -> None:
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU):
        _limit(kind, resource.getrlimit(kind)[1])


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY and (most > hard or most == resource.RLIM_INFINITY):
        most = hard
    with contextlib.suppress(
        ValueError, OSError
    ):  # a system that has no such limit; the parent's clock is left
        resource.setrlimit(kind, (most, hard))


if __name__ == "__main__":
    main()
