"""Chat templates on a budget: what would run or grow without end is refused, and the rest reads as before."""

import json
import threading

import pytest
from attack.frame import sections
from attack.templates import HOSTILE, MESSAGES, render
from test_tokens import own
from transformers.utils.chat_template_utils import render_jinja_template

from trivium.kit.errors import TriviumError
from trivium.tokens import budget, template
from trivium.tokens.tokenizer import Tokenizer


@pytest.mark.quick_cases(12)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_without_end_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "SECONDS", 0.2)
    with pytest.raises((TriviumError, *template.REFUSALS)):
        render(HOSTILE[name])


def test_the_refusal_is_one_sentence_wherever_it_is_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "SECONDS", 0.2)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer = Tokenizer(json.loads(own().backend.to_str()), own().settings, {"default": loop})
    said: list[str] = []

    def ask(method: str) -> None:
        try:
            getattr(tokenizer, method)(MESSAGES)
        except TriviumError as error:
            said.append(str(error))

    # In a thread too, where no signal could have stopped it.
    threads = [
        threading.Thread(target=ask, args=[method])
        for method in ("render_chat", "encode_chat", "encode_prompt")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == ["The chat template takes more than 0.2 seconds for one conversation; fix its loops."] * 3


LEGITIMATE = sections("golden/templates.jinja.txt")


@pytest.mark.parametrize("name", LEGITIMATE)
def test_what_templates_do_reads_as_in_transformers(name: str) -> None:
    source = LEGITIMATE[name]
    settings = {"chat_template": source, "add_generation_prompt": True, "bos_token": "<s>"}
    rendered, _ = render_jinja_template([MESSAGES], **settings)
    assert [render(source)] == rendered


def test_the_budget_grows_with_the_conversation() -> None:
    source = (
        "{% set ns = namespace(x='') %}{% for m in messages %}"
        "{% set ns.x = ns.x + m.content %}{% endfor %}{{ ns.x }}"
    )
    messages = [{"role": "user", "content": "a" * 1_000_000} for _ in range(20)]
    written = template.render(source, messages, tools=None, add_generation_prompt=False, variables={})
    assert len(written) == 20_000_000
