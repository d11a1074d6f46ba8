"""The page's settings for long conversations and for thinking, in a real Chromium."""

import pytest
from browser import Browser, find_chromium
from generating import tokenizer
from serving import running
from test_page import ANSWERED, ENTER
from test_serve_overflow import Summing

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engine():
    return Summing(context=600)


@pytest.fixture(scope="module")
def window(engine):
    find_chromium()
    with running({"summing": engine}) as address:
        window = Browser()
        try:
            window.go(address)
            yield window
        finally:
            window.close()


@pytest.fixture
def browser(window):
    window.run("localStorage.clear(); location.reload()")
    window.until("document.querySelectorAll('.chip').length === 1")
    window.click("#settings-button")
    # half of the context is for the answer, half for the conversation
    window.run(
        "const slider = document.getElementById('slider-max_tokens'); slider.value = 304;"
        "slider.dispatchEvent(new Event('input'))"
    )
    return window


def choose(window, setting, value):
    window.run(
        "const one = document.getElementById(arguments[0]); one.value = arguments[1];"
        "one.dispatchEvent(new Event('input'))",
        setting,
        value,
    )


def ask(window, *turns):
    for number, words in enumerate(turns, 1):
        window.press("#prompt", words + ENTER)
        window.until(f"document.querySelectorAll('.turn').length === {number} && {ANSWERED}")
    return window.run("return document.querySelector('.turn:last-child .facts').textContent")


LONG = "the bell rings. " * 30


def test_thoughts_are_asked_for_folded_and_forgotten(browser, engine):
    choose(browser, "reasoning", "open")
    ask(browser, "who?", "and then?")
    thoughts = "document.querySelector('.turn:first-child .thoughts')"
    assert browser.run(f"return [{thoughts}.hidden, {thoughts}.open]") == [False, False]
    assert browser.run(f"return {thoughts}.querySelector('.thought-words').textContent").strip() != ""
    browser.click(".turn:first-child .thoughts summary")
    assert browser.run(f"return {thoughts}.querySelector('.thought-words').checkVisibility()")
    assert browser.run("return document.querySelector('.answer .words').textContent") == "sixty bells"
    seen = tokenizer().decode(engine.prompts[-1])
    assert "between <think> and </think>" in seen
    assert seen.endswith("assistant\n<think>\n")
    assert "hm" not in seen


@pytest.mark.parametrize(
    ("overflow", "turns", "told"),
    [
        ("drop", 2, "2 earlier messages did not fit"),
        ("summarise", 2, "2 earlier messages are summarised"),
        ("slide", 4, "earlier tokens are forgotten"),
    ],
)
def test_what_becomes_of_a_long_conversation_is_chosen_and_told(browser, engine, overflow, turns, told):
    choose(browser, "overflow", overflow)
    assert told in ask(browser, *[LONG] * turns)
    recap = "document.querySelector('.turn:last-child .recap')"
    assert browser.run(f"return {recap}.hidden") == (overflow != "summarise")
    if overflow == "summarise":
        browser.click(".turn:last-child .recap summary")
        assert browser.run(f"return {recap}.querySelector('.recap-words').innerText") == "bells rang"
        assert "Summary of the earlier conversation: bells rang" in tokenizer().decode(engine.prompts[-1])


def test_a_conversation_may_be_refused(browser, engine):
    choose(browser, "overflow", "refuse")
    ask(browser, LONG, LONG)
    problem = browser.run("return document.querySelector('.turn:last-child .problem').textContent")
    assert "the context of summing holds 600" in problem
    assert any("400 (Bad Request)" in line for line in browser.log())


def test_the_choices_are_remembered(browser):
    choose(browser, "overflow", "slide")
    choose(browser, "reasoning", "ask")
    browser.run("location.reload()")
    browser.until("document.querySelectorAll('.chip').length === 1")
    assert browser.run(
        "return [document.getElementById('overflow').value, document.getElementById('reasoning').value]"
    ) == ["slide", "ask"]
