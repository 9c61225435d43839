"""Keys that are typed while a chat's editor does not read."""

import os
import sys
from types import SimpleNamespace

import pytest
from fakes_cli import Terminal

from subspec_cli.cli import keyboard
from subspec_cli.cli.keyboard import held_keys

termios = pytest.importorskip("termios")
EDITABLE = SimpleNamespace(can_edit=True)


@pytest.fixture
def terminal(monkeypatch):
    """The two ends of a terminal that this process owns."""
    ours, its = os.openpty()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(fileno=lambda: its))
    monkeypatch.setattr(keyboard.os, "tcgetpgrp", lambda descriptor: os.getpgrp())
    yield ours, its
    os.close(its)
    os.close(ours)


def flags(descriptor):
    found = termios.tcgetattr(descriptor)
    return bool(found[0] & termios.ICRNL), bool(found[3] & termios.ECHO), bool(found[3] & termios.ISIG)


def test_keys_wait_unseen_and_enter_stays_enter(terminal):
    ours, its = terminal
    before = flags(its)
    assert before == (True, True, True)
    with held_keys(EDITABLE):
        assert flags(its) == (False, False, True)
        os.write(ours, b"next\r")
        assert os.read(its, 10) == b"next\r"
    assert flags(its) == before


def test_the_terminal_of_another_job_or_reader_is_left_alone(terminal, monkeypatch):
    _, its = terminal
    with held_keys(SimpleNamespace(can_edit=False)):
        assert flags(its) == (True, True, True)
    monkeypatch.setattr(keyboard.os, "tcgetpgrp", lambda descriptor: os.getpgrp() + 1)
    with held_keys(EDITABLE):
        assert flags(its) == (True, True, True)
    for stdin in (Terminal(), None):
        monkeypatch.setattr(sys, "stdin", stdin)
        with held_keys(EDITABLE):
            pass
