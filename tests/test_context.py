"""Conversations longer than the window, thinking, and worked examples."""

import json

import pytest
from generating import tiny_engine, tokenizer

from trivium.generate.chat_fit import (
    Summariser,
    ask_to_reason,
    few_shot,
    few_shot_text,
    fit_conversation,
    split_reasoning,
    summariser,
    transcript,
)
from trivium.generate.streaming import ReasoningStream
from trivium.kit.errors import TriviumError

LONG = [{"role": "system", "content": "be brief"}]
for _number in range(8):
    LONG.append({"role": "user", "content": f"question {_number}: " + "the bell rings. " * 6})
    LONG.append({"role": "assistant", "content": f"answer {_number}: " + "the doves fly. " * 4})
LONG.append({"role": "user", "content": "and now?"})


def size(messages):
    return len(tokenizer().encode_chat(messages, add_generation_prompt=True).ids)


def test_what_fits_is_left_alone():
    fitted = fit_conversation(LONG, tokenizer(), size(LONG))
    assert fitted.messages == LONG
    assert fitted.tokens == tokenizer().encode_chat(LONG, add_generation_prompt=True).ids
    assert fitted.left_out == 0


def test_refuse_says_how_long_it_is():
    with pytest.raises(TriviumError, match=str(size(LONG))):
        fit_conversation(LONG, tokenizer(), size(LONG) - 1)


@pytest.mark.parametrize("less", [1, 200, 500])
def test_drop_leaves_out_as_few_of_the_oldest_turns_as_will_do(less):
    room = size(LONG) - less
    fitted = fit_conversation(LONG, tokenizer(), room, overflow="drop")
    assert fitted.messages[0] == LONG[0]
    assert fitted.messages[1:] == LONG[1 + fitted.left_out :]
    assert fitted.messages[1]["role"] == "user"
    assert len(fitted.tokens) <= room
    assert size([LONG[0], *LONG[1 + fitted.left_out - 2 :]]) > room


def test_the_system_message_and_the_last_turn_are_never_dropped():
    least = size([LONG[0], LONG[-1]])
    fitted = fit_conversation(LONG, tokenizer(), least, overflow="drop")
    assert fitted.messages == [LONG[0], LONG[-1]]
    with pytest.raises(TriviumError, match="last turn alone"):
        fit_conversation(LONG, tokenizer(), least - 1, overflow="drop")


def test_slide_keeps_everything_for_the_cache_to_forget():
    fitted = fit_conversation(LONG, tokenizer(), 10, overflow="slide")
    assert fitted.messages == LONG
    assert fitted.slide is not None
    assert fit_conversation(LONG, tokenizer(), size(LONG), overflow="slide").slide is None


def test_old_turns_are_replaced_by_their_summary_and_the_system_message_stays_as_it_is():
    asked = []

    def summarise(messages, most):
        asked.append(list(messages))
        return "eight questions about bells"

    room = size(LONG) - 300
    fitted = fit_conversation(LONG, tokenizer(), room, overflow="summarise", summarise=summarise)
    assert len(fitted.tokens) <= room
    assert fitted.summary == "eight questions about bells"
    assert fitted.messages[0] == LONG[0]
    assert asked == [LONG[1 : 1 + fitted.left_out]]
    first, *rest = LONG[1 + fitted.left_out :]
    assert fitted.messages[1]["role"] == "user"
    assert fitted.messages[1]["content"].endswith(first["content"])
    assert fitted.summary in fitted.messages[1]["content"]
    assert fitted.messages[2:] == rest


@pytest.mark.parametrize("less", [1, 120, 300, 500])
def test_a_summary_of_the_full_length_fits_without_asking_twice(less):
    times = []

    def summarise(messages, most):
        times.append(most)
        return tokenizer().decode(tokenizer().encode("the bell rings; " * 60)[:most])

    room = size(LONG) - less
    fitted = fit_conversation(LONG, tokenizer(), room, overflow="summarise", summarise=summarise)
    assert len(fitted.tokens) <= room
    assert len(times) == 1


def test_a_summary_that_is_too_long_is_refused():
    room = size(LONG) - 300
    with pytest.raises(TriviumError, match="choose overflow drop"):
        fit_conversation(LONG, tokenizer(), room, overflow="summarise", summarise=lambda *_: "x " * 2000)
    with pytest.raises(TriviumError, match="no earlier turns"):
        fit_conversation(LONG[-1:], tokenizer(), 4, overflow="summarise", summarise=lambda *_: "x")


def test_the_model_itself_writes_the_summary():
    engine = tiny_engine(context=1024)
    room = size(LONG) - 250
    summarise = summariser(engine)
    fitted = fit_conversation(LONG, tokenizer(), room, overflow="summarise", summarise=summarise)
    assert fitted.summary == summarise(LONG[1 : 1 + fitted.left_out], min(200, room // 4))
    assert summarise.prompt_tokens == engine.counts["prompt_tokens"] + engine.counts["copied_tokens"] + 2
    assert summarise.completion_tokens == engine.counts["generated_tokens"]


def test_what_is_too_long_to_be_read_at_once_is_summarised_in_parts():
    prompts = []

    def complete(request):
        prompts.append(tokenizer().decode(request.prompt))
        assert len(request.prompt) + request.sampling.max_new_tokens <= 300
        return f"<think>hm</think>part {len(prompts)}", 9

    summarise = Summariser(tokenizer(), 300, complete)
    assert summarise(LONG[1:], 60) == f"part {len(prompts)}"
    assert len(prompts) > 2
    assert [f"part {number - 1}\n" in one for number, one in enumerate(prompts, 1)][1:] == [True] * (
        len(prompts) - 1
    )
    # nothing is left out, nothing is read twice
    between = lambda one: one.partition("user\n")[2].rpartition("\n\nSumm")[0].rpartition("\n\n")[2]
    read = "".join(map(between, prompts))
    assert "".join(read.split()) == "".join(transcript(LONG[1:]).split())


def test_a_summary_is_told_of_calls_and_what_tools_answered():
    """Whatever a turn holds is in what the model is asked to summarise, under who said it."""
    function = {"name": "weather", "arguments": '{"town": "Ærø"}'}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "is it"}, {"type": "text", "text": "cold?"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": function}] * 2},
        {"role": "tool", "tool_call_id": "1", "content": "frost"},
        {"role": "assistant", "content": "Yes.", "tool_calls": [{"id": "2", "function": function}]},
    ]
    written = json.dumps(function, ensure_ascii=False)
    expected = [
        "user: is it\ncold?",
        f"assistant:  [{written}, {written}]",
        "tool: frost",
        f"assistant: Yes. [{written}]",
    ]
    assert transcript(turns) == "".join(f"{line}\n" for line in expected)
    prompts = []

    def complete(request):
        prompts.append(tokenizer().decode(request.prompt))
        return "cold", 1

    assert Summariser(tokenizer(), 2000, complete)(turns, 60) == "cold"
    [asked] = prompts
    assert all(line in asked for line in expected)


def test_short_turns_before_a_long_one_cost_no_part_of_their_own():
    prompts = []
    turns = [{"role": "user", "content": "hi"}, {"role": "user", "content": "the bell rings. " * 80}]

    def complete(request):
        prompts.append(request.prompt)
        return "bells", 1

    Summariser(tokenizer(), 300, complete)(turns, 60)
    assert len(prompts) < 8
    assert min(map(len, prompts[:-1])) > 150


@pytest.mark.parametrize(("name", "word"), [("overflow", "drops"), ("reasoning", "yes")])
def test_a_way_that_nobody_knows_is_refused_and_not_taken_for_another(name, word):
    with pytest.raises(TriviumError, match=f"{name} is '{word}'; choose one of "):
        fit_conversation(LONG, tokenizer(), size(LONG), **{name: word})


def test_what_cannot_be_summarised_is_refused():
    never = lambda request: pytest.fail("the model was asked")
    with pytest.raises(TriviumError, match="no room for asking"):
        Summariser(tokenizer(), 90, never)(LONG[1:], 60)
    with pytest.raises(TriviumError, match="16 parts"):
        Summariser(tokenizer(), 300, never)(LONG[1:] * 10, 60)
    with pytest.raises(TriviumError, match="is empty"):
        Summariser(tokenizer(), 300, lambda request: ("<think>", 1))(LONG[1:3], 60)


def test_worked_examples_are_never_dropped():
    examples = few_shot([("1+1", "2"), ("2+2", "4")], "")[:-1]
    whole = [LONG[0], *examples, *LONG[1:]]
    fitted = fit_conversation(LONG, tokenizer(), size(whole), examples=examples)
    assert fitted.messages == whole
    fitted = fit_conversation(LONG, tokenizer(), size(whole) - 400, overflow="drop", examples=examples)
    assert fitted.messages == [LONG[0], *examples, *LONG[1 + fitted.left_out :]]


def test_thinking_is_asked_for_and_opened_within_the_room():
    opened = fit_conversation(LONG, tokenizer(), 4096, reasoning="open")
    assert opened.thinking
    assert tokenizer().decode(opened.tokens).endswith("<think>\n")
    asked = fit_conversation(LONG, tokenizer(), 4096, reasoning="ask")
    assert not asked.thinking
    assert asked.messages == opened.messages == ask_to_reason(LONG, "ask")[0]
    longer = fit_conversation(LONG, tokenizer(), len(opened.tokens) - 1, reasoning="open", overflow="drop")
    assert longer.left_out == 2


def test_reasoning_is_asked_for_and_separated():
    plain, opening = ask_to_reason(LONG[-1:], "off")
    assert (plain, opening) == (LONG[-1:], "")
    asked, opening = ask_to_reason(LONG, "ask")
    assert "<think>" in asked[0]["content"]
    assert asked[1:] == LONG[1:]
    assert opening == ""
    assert ask_to_reason(LONG[-1:], "open")[1] == "<think>\n"
    assert LONG[0]["content"] == "be brief"


@pytest.mark.parametrize(
    ("text", "opened", "thoughts", "answer"),
    [
        ("<think>\n2+2\n</think>\n\n4", False, "2+2", "4"),
        ("2+2\n</think>\n4", True, "2+2", "4"),
        ("2+2\n</think>\n4", False, "2+2", "4"),
        ("just 4", False, None, "just 4"),
        ("never ends", True, "never ends", ""),
        ("<think>never ends", False, "never ends", ""),
        ("<think>a</think>", False, "a", ""),
    ],
)
def test_thoughts_and_answer(text, opened, thoughts, answer):
    reasoned = split_reasoning(text, opened=opened)
    assert (reasoned.thoughts, reasoned.answer) == (thoughts, answer)


@pytest.mark.parametrize("step", [1, 2, 5, 100])
def test_thoughts_and_answer_while_they_arrive(step):
    text = "<think>is 2 < 3? yes</think>2 < 3 <thin"
    stream, kinds = ReasoningStream(), {"thoughts": "", "answer": ""}
    for start in range(0, len(text), step):
        for kind, piece in stream.feed(text[start : start + step], last=start + step >= len(text)):
            kinds[kind] += piece
    assert kinds == {"thoughts": "is 2 < 3? yes", "answer": "2 < 3 <thin"}


def test_examples_come_before_the_question():
    messages = few_shot([("1+1", "2"), ("2+2", "4")], "3+3", system="add")
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert messages[-1]["content"] == "3+3"
    text = few_shot_text([("1+1", "2")], "3+3")
    assert text == "Question: 1+1\nAnswer: 2\n\nQuestion: 3+3\nAnswer:"


def test_python_reaches_every_way_of_asking(tmp_path):
    from generating import tiny_model

    import trivium
    from trivium.model.folder import save_model

    save_model(tiny_model(), tmp_path)
    tokenizer().save(tmp_path)
    model = trivium.load(tmp_path)
    settings = {"max_new_tokens": 24, "temperature": 0}
    with pytest.raises(TriviumError, match="choose overflow"):
        model.chat(LONG * 2, **settings)
    examples = few_shot([("1+1", "2")], "")[:-1]
    dropped = model.chat(LONG * 2, overflow="drop", reasoning="open", examples=examples, **settings)
    assert dropped.fitted.left_out > 0
    assert examples[0] in dropped.fitted.messages
    assert (dropped.text, dropped.thoughts) == ("", dropped.completion.text.strip())
    slid = model.chat(LONG * 2, overflow="slide", **settings)
    assert slid.completion.prompt_tokens == size(LONG * 2)
    assert slid.text == slid.completion.text
    assert model.chat([LONG[0], *LONG[7:]], overflow="summarise", **settings).fitted.summary
