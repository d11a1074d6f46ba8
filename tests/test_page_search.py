"""The page's search, in a real Chromium: it is asked for, and its tree can be walked."""

import pytest
from browser import Browser, find_chromium
from generating import tiny_engine
from serving import running
from test_page import ANSWERED, ENTER
from test_page_asking import choose

pytestmark = pytest.mark.slow


ALL = "return [...document.querySelectorAll({!r})].map((one) => one.{})"


def test_a_search_is_asked_for_and_its_tree_can_be_walked():
    find_chromium()
    with running({"one": tiny_engine(rows=8)}) as address:
        browser = Browser()
        try:
            browser.go(address)
            browser.until("document.querySelectorAll('.chip').length === 1")
            browser.click("#settings-button")
            offered = browser.run(ALL.format("#scorer option", "value"))
            assert offered == ["logprob", "steps"]
            browser.run(
                "const slider = document.getElementById('slider-max_tokens'); slider.value = 16;"
                "slider.dispatchEvent(new Event('input'))"
            )
            choose(browser, "search", "best_of")
            browser.press("#prompt", "who?" + ENTER)
            browser.until(f"document.querySelectorAll('.turn').length === 1 && {ANSWERED}")
            facts = browser.run("return document.querySelector('.facts').textContent")
            assert "solutions" in facts
            answer = browser.run("return document.querySelector('.answer .words').textContent")
            assert not browser.run("return document.querySelector('.answer .tree').open")
            browser.click(".answer .tree > summary")
            steps = browser.run(
                "return [...document.querySelectorAll('.tree .step')].map((one) => one.textContent)"
            )
            assert 2 <= len(steps) <= 8
            marked = browser.run(
                "return [...document.querySelectorAll('.tree mark')].map((one) => one.textContent)"
            )
            assert len(marked) == 1
            assert answer.strip().startswith(marked[0][:10])
            scores = [float(one.split(" · ")[0]) for one in steps]
            assert scores == sorted(scores, reverse=True)
        finally:
            browser.close()
