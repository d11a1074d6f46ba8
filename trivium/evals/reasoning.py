"""What a model works out: word problems with their steps, and queries over tables."""

from dataclasses import replace
from typing import Any

from trivium.evals.asking import Subject, ask
from trivium.evals.knowledge import first_question, item_of, questions
from trivium.evals.settings import Settings
from trivium.evals.task import Found, as_task
from trivium.grade.scorer import scorer
from trivium.world.checks import fulfils

AT_ONCE = "####"


@as_task(
    "sums",
    ("accuracy", "valid steps"),
    ("shots", "samples", "chain_of_thought", "reasoning", "search"),
    first_question("sums"),
)
def run_sums(subject: Subject, settings: Settings, **options: Any) -> Found:
    """Word problems of several steps: the answer right, and of answers that show steps the share that
    hold.
    """
    steps = scorer("steps")

    def judged(check: dict[str, Any], text: str) -> dict[str, float]:
        scores = {"accuracy": float(fulfils(text, check))}
        if settings.chain_of_thought:
            valid = steps(text)
            # An answer without a step has no share of steps that hold.
            if valid.value is not None and valid.status != "unparsed":
                scores["valid steps"] = valid.value
            scores["steps"] = float(sum("=" in line for line in text.splitlines()))
        return scores

    items = []
    for question, examples in questions("sums", settings, **options):
        groups = {"steps": str(question.truth["steps"]), "family": question.truth["family"]}
        if not settings.chain_of_thought:
            answer = f"{AT_ONCE} {question.truth['answer']}"
            examples = [(asked, f"{AT_ONCE} {told.rsplit(maxsplit=1)[-1]}") for asked, told in examples]
            question = replace(question, answer=answer)
        items.append(
            item_of(
                question,
                examples,
                groups=groups,
                judge=lambda text, check=question.check: judged(check, text),
                begin="" if settings.chain_of_thought else AT_ONCE,
            )
        )
    return Found(ask(subject, items, settings, most=96 if settings.chain_of_thought else 8))


@as_task("sql", ("accuracy",), ("shots", "samples", "search"), first_question("ledger"))
def run_sql(subject: Subject, settings: Settings, **options: Any) -> Found:
    """Questions over tables: the query finds the right rows."""
    grade = scorer("sql")
    own = {name: options[name] for name in ("country", "people") if name in options}
    place = "world:ledger" + ("?" + "&".join(f"{name}={value}" for name, value in own.items()) if own else "")

    def judged(truth: dict[str, Any], text: str) -> dict[str, float]:
        columns = {"sql": truth["sql"], "ordered": truth["ordered"], "database": place}
        score = grade(text, **columns)
        return {"accuracy": score.value or 0.0, "runs": float(score.status in ("ok", "wrong"))}

    items = [
        item_of(
            question,
            examples,
            groups={"family": question.truth["family"]},
            judge=lambda text, truth=question.truth: judged(truth, text),
        )
        for question, examples in questions("ledger", settings, **options)
    ]
    return Found(ask(subject, items, settings, most=96))
