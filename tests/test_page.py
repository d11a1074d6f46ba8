"""The page in a real Chromium: models answer side by side, and what they write stays letters."""

import re
import struct
import zlib

import pytest
from browser import Browser, find_chromium
from generating import tiny_engine
from serving import ScriptedEngine, raw, running, until

HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script><b>bold</b> & naïve'
ENTER, RIGHT, ESCAPE, UP, TAB, SPACE = "\ue007", "\ue014", "\ue00c", "\ue013", "\ue004", " "
ANSWERED = (
    "document.querySelectorAll('.answer').length > 0"
    " && document.querySelectorAll('.answer[aria-busy=true]').length === 0"
)
TEXTS = "[...document.querySelectorAll('.answer .words')].map((words) => words.textContent)"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engines():
    return {
        "plain": ScriptedEngine("the town of number 3 has a baker and a smith", delay=0.05),
        "hostile": ScriptedEngine(HOSTILE, delay=0.02),
        "real": tiny_engine(rows=4),
    }


@pytest.fixture(scope="module")
def address(engines):
    find_chromium()
    with running(engines) as address:
        yield address


@pytest.fixture(scope="module")
def window():
    find_chromium()
    window = Browser()
    yield window
    window.close()


@pytest.fixture
def browser(window, address):
    window.anew(address)
    window.until("document.querySelectorAll('.chip').length === 3")
    return window


def choose(browser, *names):
    browser.run(
        "for (const chip of document.querySelectorAll('.chip'))"
        " if (chip.querySelector('input').checked !== arguments[0].includes(chip.textContent))"
        " chip.querySelector('input').click()",
        list(names),
    )


def colours(picture):
    """How many different colours a PNG of 8-bit RGB or RGBA holds in its raw rows, filters aside."""
    width, _, _, kind = struct.unpack(">IIBB", picture[16:26])
    data, place = b"", 8
    while place < len(picture):
        (length,) = struct.unpack(">I", picture[place : place + 4])
        if picture[place + 4 : place + 8] == b"IDAT":
            data += picture[place + 8 : place + 8 + length]
        place += length + 12
    rows, step = zlib.decompress(data), 3 if kind == 2 else 4
    return len({rows[at : at + step] for at in range(1, len(rows) - step, width * step // 97)})


def test_two_models_stream_their_answers_side_by_side(browser, tmp_path):
    choose(browser, "plain", "real")
    browser.press("#prompt", "the town of number 3" + ENTER)
    first = "document.querySelectorAll('.answer .words')[0].textContent.length"
    begun = browser.until(first)
    browser.until(f"{first} > {begun}")  # it grew while we watched: it streams
    browser.until(ANSWERED)
    texts = browser.run(f"return {TEXTS}")
    assert texts[0] == "the town of number 3 has a baker and a smith"
    assert texts[1]
    names = browser.run("return [...document.querySelectorAll('.who')].map((name) => name.textContent)")
    assert names == ["plain", "real"]
    tops = browser.run(
        "return [...document.querySelectorAll('.answer')].map((one) => one.getBoundingClientRect().top)"
    )
    assert tops[0] == tops[1]
    assert colours(browser.screenshot(tmp_path / "two.png")) > 20
    assert browser.log() == []


def test_a_models_html_is_letters(browser):
    choose(browser, "hostile")
    browser.press("#prompt", "<i>hello</i>" + ENTER)
    browser.until(ANSWERED)
    assert browser.run(f"return {TEXTS}") == [HOSTILE]
    assert browser.run("return document.title") == "Trivium"
    assert (
        browser.run("return document.querySelectorAll('main img, main script, main b, main i').length") == 0
    )
    assert browser.run("return document.querySelector('.asked .words').textContent") == "<i>hello</i>"


def test_arrow_keys_show_what_the_model_weighed(browser):
    choose(browser, "plain")
    browser.press("#prompt", "hello" + ENTER)
    browser.until(ANSWERED)
    browser.press(".answer .words", RIGHT + RIGHT)
    rows = browser.run(
        "return [...document.querySelectorAll('#weighed .weighed-row')].map((row) => row.innerText.trim())"
    )
    assert len(rows) == 3
    assert "70 %" in rows[0]
    assert "20 %" in rows[1]
    assert browser.run("return document.getElementById('spoken').textContent").count("%") == 3
    browser.press(".answer .words", ESCAPE)
    assert browser.run("return document.getElementById('weighed').hidden")


def test_stop_frees_the_row_and_keeps_what_was_said(browser, engines):
    choose(browser, "plain")
    browser.press("#prompt", "hello" + ENTER)
    browser.until("document.querySelector('.answer .words')?.textContent.length > 4")
    browser.press("#prompt", ESCAPE)
    browser.until(ANSWERED)
    assert "stopped" in browser.run("return document.querySelector('.facts').textContent")
    [text] = browser.run(f"return {TEXTS}")
    assert 0 < len(text) < len("the town of number 3 has a baker and a smith")
    until(lambda: engines["plain"].rows_in_use == 0)


def test_regenerate_and_edit(browser, engines):
    choose(browser, "real")
    browser.press("#prompt", "a smith" + ENTER)
    browser.until(ANSWERED)
    [before] = browser.run(f"return {TEXTS}")
    browser.click(".again")
    browser.until(f"{ANSWERED} && {TEXTS}[0] !== arguments[0]".replace("arguments[0]", repr(before)))
    browser.press("#prompt", "and then" + ENTER)
    browser.until(f"{TEXTS}.length === 2 && {ANSWERED}")
    browser.press("#prompt", UP)
    browser.press(".editing:not([hidden]) textarea", " what" + ENTER)
    browser.until(f"document.querySelectorAll('.turn').length === 2 && {ANSWERED}")
    asked = browser.run("return [...document.querySelectorAll('.asked .words')].map((w) => w.textContent)")
    assert asked == ["a smith", "and then what"]


def test_settings_reach_the_engine_and_are_remembered(browser, engines):
    choose(browser, "plain")
    browser.click("#settings-button")
    browser.press("#system", "be brief")
    browser.run(
        "const slider = document.getElementById('slider-max_tokens'); slider.value = 16;"
        "slider.dispatchEvent(new Event('input'))"
    )
    browser.press("#prompt", "hello" + ENTER)
    browser.until(ANSWERED)
    seen = engines["plain"].tokenizer.decode(engines["plain"].prompts[-1])
    assert "be brief" in seen
    assert engines["plain"].samplings[-1].max_new_tokens == 16
    browser.run("location.reload()")
    browser.until("document.querySelectorAll('.chip').length === 3")
    assert browser.run("return document.getElementById('system').value") == "be brief"


def test_the_end_of_a_talk_stays_in_sight_when_it_becomes_narrower(browser):
    choose(browser, "plain")
    for _ in range(3):
        browser.press("#prompt", "hello " * 120 + ENTER)
        browser.until(ANSWERED)
    talk = "document.getElementById('talk')"
    at_end = f"{talk}.scrollHeight - {talk}.scrollTop - {talk}.clientHeight < 2"
    browser.until(at_end)
    height = browser.run(f"return {talk}.scrollHeight")
    browser.run(f"{talk}.style.maxWidth = '24rem'")
    browser.until(f"{talk}.scrollHeight > {height}")
    browser.until(at_end)


def test_everything_can_be_reached_by_keyboard(browser):
    nameless = browser.run(
        "return [...document.querySelectorAll('button, input, select, textarea')]"
        ".filter((one) => !one.closest('[aria-hidden]') && one.getAttribute('aria-hidden') === null)"
        ".filter((one) => !one.textContent.trim() && !one.labels?.length && !one.getAttribute('aria-label'))"
        ".map((one) => one.id)"
    )
    assert nameless == []
    choose(browser, "plain")
    browser.press("#prompt", "hello" + ENTER)
    browser.until(ANSWERED)
    browser.run(
        "document.getElementById('settings-button').click(); document.activeElement.blur();"
        "window.scrollTo(0, 0); window.reached = [];"
        "document.addEventListener('focusin', (focus) => window.reached.push(focus.target));"
    )
    wanted = browser.run(
        "const kinds = 'a, button, input, select, textarea, summary, [tabindex=\"0\"]';"
        "window.wanted = [...document.querySelectorAll(kinds)]"
        ".filter((one) => one.checkVisibility() && !one.disabled && !one.hasAttribute('aria-hidden'));"
        "return window.wanted.length"
    )
    assert wanted > 20
    browser.hit(*[TAB] * (wanted + 3))
    missed = "window.wanted.filter((one) => !window.reached.includes(one)).map((one) => one.outerHTML)"
    assert browser.run(f"return {missed}") == []
    # whoever follows the focus sees where it is
    unseen = browser.run(
        "const marked = (style) => style.outlineStyle !== 'none' || style.boxShadow !== 'none';"
        "return window.wanted.filter((one) => {"
        "  one.focus({ focusVisible: true });"
        "  const seen = [one, one.closest('label, .field') || one];"
        "  return !seen.map((place) => getComputedStyle(place)).some(marked);"
        "}).map((one) => one.outerHTML)"
    )
    assert unseen == []


def test_a_conversation_with_the_keyboard_alone(browser, engines):
    def to(selector):
        for _ in range(60):
            if browser.run("return document.activeElement.matches(arguments[0])", selector):
                return
            browser.hit(TAB)
        raise AssertionError(f"{selector} is not reached")

    browser.run("document.activeElement.blur()")
    for name in ("hostile", "real"):
        position = (
            "[...document.querySelectorAll('.chip')].findIndex((chip) => chip.textContent === arguments[0])"
        )
        place = browser.run(f"return {position} + 1", name)
        to(f".chip:nth-of-type({place}) input")
        browser.hit(SPACE)
    to("#settings-button")
    browser.hit(ENTER)
    to("#system")
    browser.hit(*"be brief")
    browser.hit(ESCAPE)
    assert browser.run("return document.getElementById('settings').hidden")
    to("#prompt")
    browser.hit(*"hello", ENTER)
    browser.until(ANSWERED)
    assert len(browser.run(f"return {TEXTS}")) == 1
    assert "be brief" in engines["plain"].tokenizer.decode(engines["plain"].prompts[-1])
    to(".answer .words")
    browser.hit(RIGHT)
    assert not browser.run("return document.getElementById('weighed').hidden")
    to(".again")
    browser.hit(ENTER)
    browser.until("document.querySelectorAll('.answer[aria-busy=true]').length === 1")
    to(".answer .stop")
    browser.hit(SPACE)
    browser.until(ANSWERED)
    assert "stopped" in browser.run("return document.querySelector('.facts').textContent")


def test_pointing_at_a_word_shows_what_the_model_weighed(browser):
    choose(browser, "plain")
    browser.press("#prompt", "hello" + ENTER)
    browser.until(ANSWERED)
    word, x, y = browser.run(
        "const word = document.querySelectorAll('.answer .token')[3], place = word.getBoundingClientRect();"
        "return [word.textContent, place.x + place.width / 2, place.y + place.height / 2]"
    )
    assert browser.run("return document.getElementById('weighed').hidden")
    browser.point(x, y)
    browser.until("!document.getElementById('weighed').hidden")
    rows = browser.run(
        "return [...document.querySelectorAll('#weighed .weighed-row')].map((row) => row.innerText.trim())"
    )
    shares = [float(re.search(r"([\d.]+) %", row)[1]) for row in rows]
    assert shares == pytest.approx([70, 20, 10])
    assert rows[0].startswith(word.replace(" ", "␣"))
    box = browser.run(
        "const box = document.getElementById('weighed').getBoundingClientRect();"
        "return box.left >= 0 && box.top >= 0 && box.right <= innerWidth && box.bottom <= innerHeight"
    )
    assert box
    browser.point(2, 2)
    browser.until("document.getElementById('weighed').hidden")


def test_one_answer_is_stopped_and_the_other_goes_on(browser, engines):
    choose(browser, "plain", "hostile")
    browser.press("#prompt", "hello" + ENTER)
    browser.until("document.querySelector('.answer .words')?.textContent.length > 4")
    browser.click(".answer .stop")
    browser.until("document.querySelector('.answer').getAttribute('aria-busy') === 'false'")
    until(lambda: engines["plain"].rows_in_use == 0)
    browser.until(ANSWERED)
    stopped, whole = browser.run(f"return {TEXTS}")
    assert 0 < len(stopped) < len("the town of number 3 has a baker and a smith")
    assert whole == HOSTILE
    facts = browser.run("return [...document.querySelectorAll('.facts')].map((one) => one.textContent)")
    assert ["stopped" in told for told in facts] == [True, False]
    assert browser.run("return [...document.querySelectorAll('.stop')].every((one) => one.hidden)")


def test_a_phone_shows_everything_without_sideways_scrolling(address, tmp_path):
    phone = Browser(390, 844, dark=True)
    try:
        phone.go(address)
        phone.until("document.querySelectorAll('.chip').length === 3")
        phone.press("#prompt", "hello" + ENTER)
        phone.until(ANSWERED)
        assert phone.run("return document.documentElement.scrollWidth <= innerWidth")
        lefts = phone.run(
            "return [...document.querySelectorAll('.answer')].map((one) => one.getBoundingClientRect().left)"
        )
        assert len(set(lefts)) == 1
        assert (
            phone.run("return getComputedStyle(document.documentElement).backgroundColor")
            == "rgb(23, 25, 27)"
        )
        sizes = phone.run(
            "return [...document.querySelectorAll('.bar button, #send')].map((one) => one.offsetHeight)"
        )
        assert min(sizes) >= 36
        phone.screenshot(tmp_path / "phone.png")
    finally:
        phone.close()


def test_a_key_is_asked_for_and_used(engines):
    with running(engines, api_key="Sésam, öffne dich – ☃") as address:
        window = Browser()
        try:
            window.go(address)
            window.until("document.activeElement.id === 'key'")
            assert window.run("return document.getElementById('send').disabled")
            window.press("#key", "Sésam, öffne dich – ☃" + ENTER)
            window.until("document.querySelectorAll('.chip').length === 3")
            assert window.run("return document.getElementById('key-setting').hidden")
            assert window.run("return document.getElementById('settings').hidden")
        finally:
            window.close()


def test_the_page_asks_nobody_else(address):
    with raw(address) as http:
        for path in (
            "/",
            "/page.css",
            "/page.js",
            "/settings.js",
            "/words.js",
            "/tree.js",
            "/elements.js",
            "/attachments.js",
        ):
            text = http.get(path).text
            assert "innerHTML" not in text
            assert text.count("http") == text.count("http://www.w3.org/2000/svg")
