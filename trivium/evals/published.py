"""Tests that others published, in their published form, and a person's own questions with a scorer."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trivium.data.sources import read_documents
from trivium.evals.asking import Item, Subject, ask, with_shots
from trivium.evals.settings import Settings
from trivium.evals.task import Found, as_task
from trivium.grade.scorer import Scorer, scorer
from trivium.kit.errors import TriviumError

# Where HumanEval's own harness lets a completion end (Chen et al., 2021).
_PROGRAM_END = re.compile(r"\n(?=class |def |#|if |print)")
_CALCULATION = re.compile(r"<<[^<>]*>>")
PROMPTS = ("prompt", "question", "problem", "query", "instruction")
ANSWERS = ("answer", "gold", "solution", "target", "expected")


def rows_of(data: str, settings: Settings, needed: Sequence[str] = ()) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a file, as many as are asked for, each with its id."""
    rows: list[tuple[str, dict[str, Any]]] = []
    for document in read_documents(data):
        if len(rows) == settings.limit:
            break
        missing = [name for name in needed if name not in document.fields]
        if missing:
            raise TriviumError(
                f"{document.id} has no column {missing[0]!r}, only {', '.join(document.fields)}."
            )
        rows.append((document.id, dict(document.fields)))
    return rows


def graded(grade: Scorer, columns: Mapping[str, Any]) -> Callable[[str], dict[str, float]]:
    """A judge that asks a scorer; where the grader itself fails, the item has no score."""

    def judge(text: str) -> dict[str, float]:
        if not text.strip():
            return {"accuracy": 0.0}
        score = grade(text, **columns)
        return {} if score.value is None else {"accuracy": score.value}

    return judge


def _sums(
    subject: Subject,
    settings: Settings,
    listed: Sequence[tuple[str, str, str, str]],
    examples: Sequence[tuple[str, str]],
) -> Found:
    """Word problems (id, question, worked answer, gold), judged by their result."""
    grade = scorer("math")
    items = []
    for name, question, worked, gold in listed:
        messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
        prompt, messages = with_shots(examples, question, messages)
        items.append(
            Item(
                name, prompt, messages, worked, graded(grade, {"gold": gold}),
                begin="" if settings.chain_of_thought else "####",
            )
        )  # fmt: skip
    return Found(ask(subject, items, settings, most=256 if settings.chain_of_thought else 16))


def _examples(
    rows: Sequence[tuple[str, dict[str, Any]]], settings: Settings, told: Callable[[dict[str, Any]], str],
    asked: Callable[[dict[str, Any]], str],
) -> list[tuple[str, str]]:  # fmt: skip
    if len(rows) < settings.shots:
        raise TriviumError(f"There are {len(rows)} rows to take {settings.shots} examples from.")
    return [(asked(row), told(row)) for _, row in rows[: settings.shots]]


_SUMS = ("shots", "samples", "chain_of_thought", "reasoning", "search")


@as_task("gsm8k", ("accuracy",), _SUMS, scorer="math")
def run_gsm8k(subject: Subject, settings: Settings, data: str, examples: str | None = None) -> Found:
    """GSM8K's word problems, by their result.

    Of a jsonl: `question` and a worked `answer` that ends in `#### result` (Cobbe et al., 2021).
    """
    rows = rows_of(data, settings, ("question", "answer"))

    def told(row: Mapping[str, Any]) -> str:
        worked = _CALCULATION.sub("", row["answer"])
        return worked if settings.chain_of_thought else f"#### {_result(row['answer'])}"

    listed = [(name, row["question"], told(row), _result(row["answer"])) for name, row in rows]
    shown = _shown(examples, settings, told, lambda row: row["question"], ("question", "answer"))
    return _sums(subject, settings, listed, shown)


def _result(worked: str) -> str:
    return worked.rsplit("####", 1)[-1].strip().replace(",", "")


def _shown(
    path: str | None, settings: Settings, told: Callable[[dict[str, Any]], str],
    asked: Callable[[dict[str, Any]], str], needed: Sequence[str],
) -> list[tuple[str, str]]:  # fmt: skip
    if not settings.shots:
        return []
    if path is None:
        raise TriviumError("Worked examples need a file of their own: add `examples` with its path.")
    few = settings.model_copy(update={"limit": settings.shots})
    return _examples(rows_of(path, few, needed), settings, told, asked)


@as_task("svamp", ("accuracy",), _SUMS, scorer="math")
def run_svamp(subject: Subject, settings: Settings, data: str, examples: str | None = None) -> Found:
    """SVAMP's word problems, by their result.

    Of a json: `Body`, `Question`, `Equation` and `Answer` (Patel et al., 2021).
    """
    needed = ("Body", "Question", "Answer")

    def asked(row: Mapping[str, Any]) -> str:
        body = str(row["Body"]).strip()
        return f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} {str(row['Question']).strip()}"

    def told(row: Mapping[str, Any]) -> str:
        work = f"{row['Equation']} = {_number(row['Answer'])}\n" if "Equation" in row else ""
        return f"{work if settings.chain_of_thought else ''}#### {_number(row['Answer'])}"

    listed = [
        (str(row.get("ID", name)), asked(row), told(row), _number(row["Answer"]))
        for name, row in rows_of(data, settings, needed)
    ]
    return _sums(subject, settings, listed, _shown(examples, settings, told, asked, needed))


def _number(value: Any) -> str:
    """SVAMP writes whole numbers as 8.0."""
    return str(int(float(value))) if float(value).is_integer() else str(float(value))


@as_task("humaneval", ("accuracy",), ("samples",), scorer="code")
def run_humaneval(
    subject: Subject, settings: Settings, data: str, seconds: float = 10.0, unsafe_sandbox: bool = False
) -> Found:
    """HumanEval's functions, by their tests.

    Of a jsonl: `prompt`, `test`, `entry_point`; programs run only in the sandbox.
    """
    grade: Any = scorer("code", seconds=seconds, unsafe_sandbox=unsafe_sandbox)
    from trivium.grade.code import read_tests

    style = subject.style(settings)
    items = []
    for _, row in rows_of(data, settings, ("task_id", "prompt", "test", "entry_point")):

        def judge(text: str, row: dict[str, Any] = row) -> dict[str, float]:
            if style == "chat":
                score = grade(text, test=row["test"], entry_point=row["entry_point"])
            else:
                score = grade.run(row["prompt"] + text, read_tests(row["test"], row["entry_point"]))
            return {} if score.value is None else {"accuracy": score.value}

        asked = f"Complete this Python function:\n\n```python\n{row['prompt']}```"
        items.append(
            Item(
                row["task_id"], row["prompt"], [{"role": "user", "content": asked}],
                row.get("canonical_solution", ""), judge,
            )
        )  # fmt: skip
    records = ask(subject, items, settings, most=384, cut=lambda text: _PROGRAM_END.split(text)[0])
    return Found(records)


@as_task("own", ("accuracy",), ("shots", "samples", "search"), scorer="math")
def run_own(
    subject: Subject,
    settings: Settings,
    data: str,
    scorer: str = "math",
    most: int = 128,
    examples: str | None = None,
    model: str | None = None,
) -> Found:
    """A person's own questions, by the scorer they name.

    Of a jsonl with a prompt or messages, and the columns the scorer reads.

    `scorer` may also be a function, `file.py:function`; with `scorer: learned` the reward model in the folder
    `model` scores the answers.
    """
    from trivium.grade.rewards import FunctionScorer, is_in_a_file
    from trivium.grade.scorer import scorer as made

    settings_of_scorer = {} if model is None else {"model": model}
    function = is_in_a_file(scorer)
    grade: Scorer = FunctionScorer(scorer) if function else made(scorer, **settings_of_scorer)
    items = []
    for name, row in rows_of(data, settings):
        messages = question_of(name, row)
        question = str(messages[-1]["content"])
        shown = _shown(examples, settings, _told, lambda one: str(question_of("", one)[-1]["content"]), ())
        prompt, messages = with_shots(shown, question, messages)
        if not shown and isinstance(row.get("prompt"), str):
            prompt = row["prompt"]
        columns = {
            key: value for key, value in row.items() if key not in ("prompt", "messages", "completion")
        } | {"prompt": messages}
        items.append(
            Item(
                str(row.get("id", name)), prompt, messages, _told(row), graded(grade, columns),
                cluster=str(row.get("cluster", "")),
                groups={"kind": str(row["kind"])} if "kind" in row else {},
            )
        )  # fmt: skip
    return Found(ask(subject, items, settings, most=most))


def question_of(name: str, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages that a row asks with."""
    listed = row.get("messages") if isinstance(row.get("messages"), list) else row.get("prompt")
    if isinstance(listed, list) and listed:
        return [dict(one) for one in listed]
    found = next((row[key] for key in PROMPTS if isinstance(row.get(key), str)), None)
    if found is None:
        raise TriviumError(f"{name} has no question: give it `messages` or one of {', '.join(PROMPTS)}.")
    return [{"role": "user", "content": found}]


def _told(row: Mapping[str, Any]) -> str:
    return str(next((row[key] for key in ANSWERS if row.get(key) is not None), ""))
