"""What questions about pictures and about sounds have in common: how they are written and asked."""

from typing import Any, Protocol

from trivium.world.document import Question, WorldDocument


class Perceived(Protocol):
    """A question about something seen or heard, its answer, and what is true of it."""

    @property
    def question(self) -> str: ...

    @property
    def answer(self) -> str: ...

    @property
    def truth(self) -> dict[str, Any]:
        """What is known of it."""
        ...


def document_about(one: Perceived, content: list[Any], form: str) -> WorldDocument | None:
    """The question with its answer, as `chat` or `prompt`; None of another form."""
    asked = {"role": "user", "content": content}
    truth = {**one.truth, "answer": one.answer}
    if form == "chat":
        answer = {"role": "assistant", "content": one.answer}
        return WorldDocument("", None, {"messages": [asked, answer]}, truth)
    if form == "prompt":
        check = {"check": "equals", "arguments": {"answer": one.answer}}
        return WorldDocument("", None, {"prompt": [asked], "answer": one.answer, "checks": [check]}, truth)
    return None


def question_about(one: Perceived, content: list[Any]) -> Question:
    """The question to a model, whose answer has to be the one word for word."""
    return Question(
        id="",
        prompt=f"Question: {one.question}\nAnswer:",
        question=one.question,
        messages=({"role": "user", "content": content},),
        answer=one.answer,
        check={"check": "equals", "arguments": {"answer": one.answer}},
        truth=one.truth,
    )
