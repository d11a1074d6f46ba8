"""The page with pictures and sounds, in a real browser."""

import base64

import pytest
from browser import Browser
from generating import tiny_engine
from seeing import png, seeing_model, seeing_tokenizer, wav
from serving import running

from trivium.generate.engine import Engine

pytestmark = pytest.mark.slow
PASTE = """
const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
const data = new DataTransfer();
data.items.add(new File([bytes], arguments[1], { type: arguments[2] }));
const event = new ClipboardEvent('paste', { clipboardData: data, bubbles: true, cancelable: true });
document.getElementById('prompt').dispatchEvent(event);
"""
SEND = """
const box = document.getElementById('prompt');
box.value = arguments[0];
box.dispatchEvent(new Event('input', { bubbles: true }));
document.getElementById('compose').requestSubmit();
"""
ANSWERED = "[...document.querySelectorAll('.answer')].filter((one) => one.ariaBusy === 'false').length === "


def paste(window, data, name, kind):
    window.run(PASTE, base64.b64encode(data).decode(), name, kind)


def test_two_models_are_asked_about_a_picture_side_by_side(tmp_path):
    engines = {name: Engine(seeing_model(seed), seeing_tokenizer(), seed=0) for seed, name in enumerate("ab")}
    with running(engines) as address:
        window = Browser()
        try:
            window.go(address)
            window.until("document.querySelectorAll('.chip').length === 2")
            assert not window.run("return document.getElementById('choose-file').hidden")
            paste(window, png(size=(120, 80)), "red.png", "image/png")
            window.until("document.querySelectorAll('#attached img').length === 1")
            paste(window, wav(), "low.wav", "audio/wav")
            window.until("document.querySelectorAll('#attached audio').length === 1")
            window.run(SEND, "What is this?")
            window.until(ANSWERED + "2")
            assert window.run("return document.querySelectorAll('.problem:not([hidden])').length") == 0
            assert window.run("return document.querySelector('.turn .shown img').naturalWidth") == 120
            assert window.run("return document.querySelectorAll('.turn .shown audio').length") == 1
            assert window.run("return document.getElementById('attached').hidden")
            window.run(SEND, "And what else?")
            window.until(ANSWERED + "4")
            assert window.run("return document.querySelectorAll('.problem:not([hidden])').length") == 0
            assert len(window.screenshot(tmp_path / "page.png")) > 1000
        finally:
            window.close()


def test_of_a_model_of_text_no_file_is_wanted():
    with running({"one": tiny_engine()}) as address:
        window = Browser()
        try:
            window.go(address)
            window.until("document.querySelectorAll('.chip').length === 1")
            assert window.run("return document.getElementById('choose-file').hidden")
            assert window.run("return document.getElementById('record').hidden")
        finally:
            window.close()
