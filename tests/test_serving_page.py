"""The page at `/` in a real browser, over a server whose model says what a test dictates."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from urllib.request import Request, urlopen

import pytest
from browser import CHROMIUM, Chromium, Tab
from dictated_server import DictatedServer

from subspec_cli.serving.service import QueueFullError, State

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
MakeServer = Callable[..., DictatedServer]
Open = Callable[..., Tab]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    found = Chromium(tmp_path_factory.mktemp("chromium"))
    yield found
    found.close()


@pytest.fixture
def make_server() -> Iterator[MakeServer]:
    made: list[DictatedServer] = []

    def make(**how: object) -> DictatedServer:
        made.append(DictatedServer(**how))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def open_page(browser: Chromium) -> Iterator[Open]:
    """Opens pages; whatever a test does, the browser must not complain of them."""
    tabs: list[Tab] = []

    def open_one(server: DictatedServer, **how: object) -> Tab:
        tabs.append(browser.tab(server.url, **how))  # type: ignore[arg-type]
        return tabs[-1]

    yield open_one
    complaints = [tab.complaints() for tab in tabs]
    for tab in tabs:
        tab.close()
    assert not any(complaints), complaints


@pytest.fixture
def server(make_server: MakeServer) -> DictatedServer:
    return make_server()


@pytest.fixture
def page(server: DictatedServer, open_page: Open) -> Tab:
    found = open_page(server)
    ready(found)
    return found


def ready(page: Tab) -> None:
    page.until("!document.querySelector('#send').disabled")


def ask(page: Tab, text: str) -> None:
    """Send a message by keyboard."""
    page.focus("#prompt")
    page.type(text)
    page.press("Enter")
    page.until("document.querySelector('#prompt').value === ''")


def press_button(page: Tab, name: str) -> None:
    """Press a button of that name by keyboard."""
    place = (
        f"[...document.querySelectorAll('button')].find((each) => each.textContent === {json.dumps(name)})"
    )
    page.until(f"{place}?.checkVisibility()")
    page.value(f"{place}.focus()")
    page.press(" ")


def ended(page: Tab) -> None:
    page.until("document.querySelector('#log > :last-child').ariaBusy === 'false'")


def test_policy_allows_only_the_script_and_the_style_of_the_page(server):
    with urlopen(server.url) as response:
        html, policy = response.read().decode(), response.headers["Content-Security-Policy"]
    for name in ("script", "style"):
        (text,) = re.findall(f"<{name}[^>]*>(.*?)</{name}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}';" in policy
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "innerHTML" not in html
    assert not re.search(r"(?:src|href)=\"(?!data:)", html)


@pytest.mark.parametrize("asks", [False, True])
def test_pieces_of_a_stream_have_figures_if_they_are_asked_for(server, asks):
    options = {"include_usage": True, "continuous_usage_stats": asks}
    messages = [{"role": "user", "content": "hello"}]
    body = json.dumps({"messages": messages, "stream": True, "stream_options": options}).encode()
    server.say("a")
    server.say("b", "stop")
    while server.service.state is State.LOADING:
        time.sleep(0.01)
    with urlopen(
        Request(f"{server.url}v1/chat/completions", body, {"Content-Type": "application/json"})
    ) as reply:
        lines = [line.removeprefix("data: ") for line in reply.read().decode().splitlines() if "{" in line]
    *_, first, last, totals = map(json.loads, lines)
    written = [piece["usage"] and piece["usage"]["completion_tokens"] for piece in (first, last, totals)]
    assert written == ([4, 8, 8] if asks else [None, None, 8])
    assert ("subspec" in first) == asks
    assert last["subspec"]["choices"][0]["passes"] == 2


@needs_browser
def test_policy_blocks_script_that_is_put_into_the_page(browser, server):
    tab = browser.tab(server.url)
    ready(tab)
    tab.value("document.body.append(Object.assign(document.createElement('b'), {id: 'b'}))")
    with pytest.raises(AssertionError, match="TrustedHTML"):
        tab.value("document.querySelector('#b').innerHTML = '<i>x</i>'")
    tab.value("document.querySelector('#b').setAttribute('style', 'color: red')")
    assert tab.value("getComputedStyle(document.querySelector('#b')).color") != "rgb(255, 0, 0)"
    assert tab.complaints()
    tab.close()


@needs_browser
def test_answer_streams_and_its_figures_show(server, page):
    assert page.focused() == "prompt"
    page.type("one")
    page.press("Enter", shift=True)
    page.type("two")
    page.press("Enter")
    server.say("The first part")
    page.until_text(".answer", "The first part")
    assert page.text(".said") == "one\ntwo"
    page.until_text("#speed", "1.50 tokens/s")
    page.until_text("#answers", "1 in flight, 0 waiting; 1 at a time")
    assert page.text("#draft") == "25\u00a0%"
    assert page.text("#verify") == "25\u00a0%"
    assert page.text("#wait") == "50\u00a0%"
    assert page.text("#other") == "0\u00a0%"
    assert page.text("#first") == "250 ms"
    assert page.text("#context") == "24 of 100 tokens"
    assert page.text("#memory") == "1.00 GiB of 2.00 GiB, peak 1.50 GiB"
    server.say(" and the end.", "stop")
    ended(page)
    assert page.text(".answer") == "The first part and the end."
    assert page.text("#tau") == "3.50, 2 passes"
    assert page.text(".took") == "1.75 tokens/s · tau 3.50 · first token 250 ms · 8 tokens · seed 7"
    page.until_text("#answers", "0 in flight")
    assert page.text("#exactness") == "exact: rows checked"
    assert page.text("#model") == "house/tiny-model · exact"


@needs_browser
@pytest.mark.parametrize("how", ["Escape", "Stop"])
def test_stop_ends_the_answer_on_the_server_too(server, page, how):
    ask(page, "hello")
    server.say("Some")
    page.until_text(".answer", "Some")
    if how == "Escape":
        page.press("Escape")
    else:
        press_button(page, "Stop")
    page.until_text(".note", "Stopped.")
    assert server.session.model.left.wait(10)
    assert page.text(".answer") == "Some"
    assert page.focused() == ("prompt" if how == "Escape" else "send")
    ask(page, "again")
    server.say("More", "stop")
    page.until_text(".turn:last-child .answer", "More")
    assert [turn["content"] for turn in server.session.conversations[-1]] == ["hello", "Some", "again"]


@needs_browser
def test_answer_is_never_markup(server, page):
    page.value("window.alert = () => { window.hasRun = true; }")
    evil = (
        "<img src=x onerror=alert(1)> **<b>bold</b>** `<i>`\n\n- <svg onload=alert(1)>\n\n"
        "```\n<script>alert(1)</script>\n```"
    )
    ask(page, evil.replace("\n", " "))
    server.say(evil, "stop")
    ended(page)
    assert page.text(".answer p") == "<img src=x onerror=alert(1)> <b>bold</b> <i>"
    assert page.text(".answer li") == "<svg onload=alert(1)>"
    assert page.text(".answer pre") == "<script>alert(1)</script>"
    assert page.value("document.querySelectorAll('#log :is(img, svg, b, i, script)').length") == 0
    assert page.value("window.hasRun") is None


@needs_browser
def test_simple_marks_are_shown_whatever_the_pieces(server, page):
    text = (
        "# Head\nf(*args, **kw) and g(**kw), **not\n\n1. one\n   more\n  - inner\n2. two `x`\n\n"
        "~~~py\na\n\n  b\n~~~\nend"
    )
    ask(page, "hello")
    for at in range(0, len(text), 7):
        server.say(text[at : at + 7], "stop" if at + 7 >= len(text) else None)
    ended(page)
    shown = page.value(
        "[...document.querySelector('.answer').children].map((e) => e.tagName + ' ' + e.textContent)"
    )
    assert shown == [
        "H4 Head",
        "P f(*args, **kw) and g(**kw), **not",
        "OL one\nmoreinnertwo x",
        "PRE a\n\n  b",
        "P end",
    ]
    assert page.value("document.querySelector('.answer ol').lastChild.value") == 2


@needs_browser
def test_key_is_asked_for_and_kept_for_the_tab_only(make_server, open_page):
    server = make_server(api_key="open sesame")
    page = open_page(server)
    page.until_text("#key-reason", "asks for an API key")
    assert page.focused() == "key"
    assert page.value("document.querySelector('#key').type") == "password"
    page.type("wrong")
    page.press("Enter")
    page.until_text("#key-reason", "is wrong")
    page.value("document.querySelector('#key').select()")
    page.type("open sesame")
    page.press("Enter")
    ready(page)
    assert page.focused() == "prompt"
    assert page.value("document.querySelector('#key-form').hidden")
    ask(page, "hello")
    server.say("Welcome", "stop")
    page.until_text(".answer", "Welcome")
    assert page.value("JSON.stringify({...localStorage})") == "{}"
    page.reload()
    ready(page)


@needs_browser
def test_page_waits_while_the_model_is_loading(make_server, open_page):
    server = make_server(is_loaded=False, api_key="open sesame")
    page = open_page(server)
    page.until_text("#key-reason", "asks for an API key")
    page.type("open sesame")
    page.press("Enter")
    page.until_text("#state", "Not ready: the model is loading. This page waits.")
    assert page.value("document.querySelector('#key-form').hidden")
    assert page.value("document.querySelector('#send').disabled")
    server.loaded.set()
    ready(page)
    assert page.text("#state") == ""


@needs_browser
def test_failures_are_said_where_the_answer_would_be(server, page, monkeypatch):
    ask(page, "hello")
    server.say("Begun")
    page.until_text(".answer", "Begun")
    server.fail(RuntimeError("the disk is gone"))
    page.until_text(".note", "The answer failed: RuntimeError: the disk is gone.")
    assert page.text(".answer") == "Begun"

    class FullError(QueueFullError):
        def __init__(self) -> None:
            Exception.__init__(self, "3 answers wait already")

    def full(*_: object) -> None:
        raise FullError

    with monkeypatch.context() as patch:
        patch.setattr(server.service, "submit", full)
        press_button(page, "Regenerate")
        page.until_text(".note", "The queue is full: 3 answers wait already. Try again in 5 s.")
    press_button(page, "Try again")
    server.say("Whole", "length")
    page.until_text(".answer", "Whole")
    page.until_text(".note", "Cut off at the limit of tokens.")
    assert server.session.conversations[-1] == [{"role": "user", "content": "hello"}]


@needs_browser
def test_page_says_when_the_server_has_gone(make_server, open_page):
    server = make_server()
    page = open_page(server)
    ready(page)
    ask(page, "hello")
    server.say("Begun")
    page.until_text(".answer", "Begun")
    server.close()
    page.until_text(".note", "The answer failed: the server is stopping.")
    page.until_text("#state", "The server does not answer.")


@needs_browser
def test_settings_reach_the_request_and_are_kept(server, page):
    page.value("document.querySelector('#settings').open = true")
    for name, value in {"system": "Be brief.", "temperature": "0.5", "top_p": "0.9", "seed": "11"}.items():
        page.focus(f"#{name}")
        page.type(value)
    ask(page, "hello")
    server.say("Hi", "stop")
    page.until_text(".answer", "Hi")
    order = server.session.orders[-1]
    assert (order["sampling"].temperature, order["sampling"].top_p, order["seed"]) == (0.5, 0.9, 11)
    assert server.session.conversations[-1][0] == {"role": "system", "content": "Be brief."}
    ended(page)
    page.reload()
    ready(page)
    assert page.value("document.querySelector('#system').value") == "Be brief."
    assert page.text(".answer") == "Hi"
    page.value("document.querySelector('#top_p').value = '3'")
    page.focus("#prompt")
    page.type("more")
    page.press("Enter")
    assert page.focused() == "top_p"
    assert len(server.session.conversations) == 1


@needs_browser
def test_conversation_is_edited_copied_and_begun_anew(browser, server, page):
    page.call(
        "Browser.setPermission", permission={"name": "clipboard-write"}, setting="granted", origin=server.url
    )
    ask(page, "first")
    server.say("**One**", "stop")
    ended(page)
    press_button(page, "Copy answer")
    page.until_text(".actions", "Copied")
    press_button(page, "Edit message")
    assert page.focused() == "prompt"
    assert page.value("document.querySelector('#prompt').value") == "first"
    assert page.text("#log") == ""
    page.press("Enter")
    server.say("Two", "stop")
    page.until_text(".answer", "Two")
    assert server.session.conversations[-1] == [{"role": "user", "content": "first"}]
    ended(page)
    press_button(page, "New conversation")
    assert page.text("#log") == ""
    ask(page, "second")
    server.say("Three", "stop")
    page.until_text(".answer", "Three")
    assert server.session.conversations[-1] == [{"role": "user", "content": "second"}]


@needs_browser
def test_phone_needs_no_horizontal_scrolling(server, open_page):
    page = open_page(server, width=360, height=640)
    ready(page)
    page.value("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    ask(page, "m" * 200)
    server.say(f"{'w' * 200} `{'c' * 100}`\n\n- {'i' * 100}\n\n```\n{'x' * 300}\n```\n", "stop")
    ended(page)
    assert page.value("document.documentElement.scrollWidth") == 360
    assert page.value("document.querySelector('#middle').scrollWidth") <= 360
    wide = "[...document.querySelectorAll('body *:not(code)')].filter((e) => e.getBoundingClientRect().right > 360.5)"
    assert page.value(f"{wide}.map((e) => e.outerHTML.slice(0, 100))") == []
    assert page.value("document.querySelector('#prompt').getBoundingClientRect().bottom") < 640


@needs_browser
def test_everything_is_reached_by_keyboard_and_has_a_name(server, page):
    ask(page, "hello")
    server.say("Hi", "stop")
    ended(page)
    page.value("document.querySelector('#settings').open = true")
    page.focus("#new")
    order = []
    while page.focused() not in order:
        order.append(page.focused())
        assert page.value("getComputedStyle(document.activeElement).outlineStyle") == "solid", order[-1]
        page.press("Tab")
        if page.value("document.activeElement === document.body"):
            break
    assert order == [
        *("new", "middle", "Figures", "Settings", "system", "temperature", "top_p", "max_tokens", "seed"),
        *("Copy answer", "Regenerate", "Edit message", "prompt", "send"),
    ]
    nameless = "[...document.querySelectorAll('input, textarea')].filter((each) => !each.labels.length)"
    assert page.value(f"{nameless}.length") == 0


@needs_browser
def test_page_works_behind_a_prefix(make_server, open_page):
    server = make_server(prefix="/box/model")
    page = open_page(server)
    ready(page)
    ask(page, "hello")
    server.say("Hi", "stop")
    page.until_text(".answer", "Hi")
