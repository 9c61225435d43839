"""Chat templates: programs of strangers, rendered in a process of their own that is bounded in time and memory."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from subspec_cli.errors import PromptRefusedError, ResourceError
from subspec_cli.limits import MOST_PROMPT_BYTES
from subspec_cli.units import format_bytes, printable

RAW_HINT: Final = "--raw completes the bare text of a prompt, without the template"
_SCRIPT: Final = Path(__file__).with_name("chat_template_child.py")
_MOST_CPU_S: Final = 2
_MOST_WALL_S: Final = 30
"""A busy machine may need this long for the seconds of work."""
_MOST_BYTES: Final = 128 << 20
_COPIES: Final = 32
"""Bytes of memory for a character of conversation: a few copies of a text whose characters take 4 bytes each."""


class ChatTemplate:
    """A model's chat template. Its process starts with the first conversation and ends with this object."""

    def __init__(self, template: object, variables: Mapping[str, Any]) -> None:
        """`variables` are what the template may name besides the messages: the special tokens."""
        self._template = template
        self._variables = dict(variables)
        self._child: _Child | None = None

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the text of a conversation up to the beginning of the assistant's answer.

        Raises PromptRefusedError if the template refuses, is broken, takes too long or too much memory, or gives no
        text or too much of it.
        """
        said = [{key: value for key, value in item.items() if value is not None} for item in messages]
        most_bytes = _MOST_BYTES + _COPIES * sum(len(str(text)) for item in said for text in item.values())
        reply = self._ask(
            {
                "template": self._template,
                "messages": said,
                "variables": self._variables,
                "most_cpu_s": _MOST_CPU_S,
                "most_bytes": most_bytes,
                "most_text_bytes": MOST_PROMPT_BYTES,
            }
        )
        text, reason = reply.get("text", ""), printable(reply.get("reason", ""))[:300]
        wrong = {
            "refused": f"refuses this conversation: {reason}",
            "broken": f"is broken: {reason}",
            "time": f"takes too long: more than {_MOST_CPU_S} s",
            "memory": f"takes too much memory: more than {format_bytes(most_bytes)}",
            "long": f"gives a text of more than {format_bytes(MOST_PROMPT_BYTES)}",
        }
        if "error" in reply:
            raise PromptRefusedError(f"the chat template {wrong[reply['error']]}", RAW_HINT)
        if not text.strip():
            raise PromptRefusedError("the chat template gives an empty text", RAW_HINT)
        return text

    def _ask(self, order: Mapping[str, Any]) -> dict[str, str]:
        """Send the order to the process, which is started if there is none, and return its reply."""
        content = json.dumps(order, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
        if self._child is None or not self._child.is_alive:
            self._child = _Child()
        reply = self._child.ask(content)
        return json.loads(reply.decode("utf-8", "surrogatepass")) if reply else self._child.how_it_ended()


class _Child:
    """A process that renders; it ends with this object at the latest."""

    def __init__(self) -> None:
        try:
            self._process = subprocess.Popen(  # noqa: S603 - a file of this package
                [sys.executable, "-I", "-S", "-B", str(_SCRIPT), *_paths_of("jinja2", "markupsafe")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise ResourceError(f"the chat template gets no process: {error.strerror}", RAW_HINT) from error
        self._is_late = False
        self._end = weakref.finalize(self, _end, self._process)

    @property
    def is_alive(self) -> bool:
        """Whether it can take another order."""
        return self._process.poll() is None

    def ask(self, order: bytes) -> bytes:
        """Return the reply to an order; none if the process has ended instead."""
        requests, replies = self._process.stdin, self._process.stdout
        assert requests is not None
        assert replies is not None
        clock = threading.Timer(_MOST_WALL_S, self._stop)
        clock.start()
        try:
            requests.write(len(order).to_bytes(8, "big") + order)
            requests.flush()
            reply = replies.read(int.from_bytes(replies.read(8), "big"))
        except BrokenPipeError:
            reply = b""
        except BaseException:
            self._end()  # a reply that nobody reads would be taken for the next one's
            raise
        finally:
            clock.cancel()
            clock.join()  # until its thread has ended it holds this object
        if not reply:
            self._process.wait()
        return reply

    def how_it_ended(self) -> dict[str, str]:
        """Return what an ended process means for its template, as a reply."""
        status = self._process.returncode
        if self._is_late or status == -signal.SIGXCPU:
            return {"error": "time"}
        if status == -signal.SIGKILL:  # the system is short of memory
            return {"error": "memory"}
        return {"error": "broken", "reason": f"its process ended with {status}"}

    def _stop(self) -> None:
        self._is_late = True
        self._process.kill()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    process.wait()


def _paths_of(*packages: str) -> list[str]:
    """Return the directories that packages are imported from."""
    found = [find_spec(name) for name in packages]
    return sorted({str(Path(spec.origin).parent.parent) for spec in found if spec and spec.origin})
