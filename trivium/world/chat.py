"""Chats: instructions whose fulfilment a program can check, one or two turns long."""

from dataclasses import dataclass
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.world.chance import Chance
from trivium.world.checks import fulfils
from trivium.world.country import peopled
from trivium.world.document import Question, Share, Split, WorldDocument
from trivium.world.instructions import KINDS, Task, make_task


@dataclass(frozen=True)
class Options:
    """Which instructions there are, how many chats have a second turn, and in which form they are given."""

    country: int = 0
    people: int = 240
    kind: str = "all"
    second_turn: Share = 0.2
    form: str = "chat"


def _task(chance: Chance, split: Split, options: Options) -> Task:
    if options.kind != "all" and options.kind not in KINDS:
        raise TriviumError(f"world:chat has no kind '{options.kind}'; it has all, {', '.join(KINDS)}.")
    kind = chance.pick(tuple(KINDS)) if options.kind == "all" else options.kind
    return make_task(kind, chance, peopled(options.country, options.people), split)


def write(index: int, split: Split, seed: int, options: Options) -> WorldDocument:
    """One chat; what it is checked by belongs to its last answer."""
    chance = Chance("chat", split, seed, index)
    task = _task(chance, split, options)
    messages: list[dict[str, Any]] = []
    if task.system:
        messages.append({"role": "system", "content": task.system})
    elif chance.happens(options.second_turn):
        earlier = _task(chance, split, options)
        if not earlier.system:
            messages += _turn(earlier)
    messages += _turn(task)
    truth = {"kind": task.kind, "answer": task.answer, **task.checked}
    if options.form == "chat":
        return WorldDocument("", None, {"messages": messages}, truth)
    if options.form == "prompt":
        asked = {"prompt": messages[:-1], "answer": task.answer, "checks": [task.checked]}
        return WorldDocument("", None, asked, truth)
    if options.form == "pairs":
        missed = [{"role": "assistant", "content": near_miss(chance, task, options, split)}]
        pair = {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": missed}
        return WorldDocument("", None, pair, truth)
    raise TriviumError(f"world:chat has no form '{options.form}'; use chat, prompt or pairs.")


def near_miss(chance: Chance, task: Task, options: Options, split: Split) -> str:
    """An answer like those of models that half listen: a word too few, too many or astray, or another's."""
    words = task.answer.split()
    place = chance.below(len(words))
    other = make_task(task.kind, chance, peopled(options.country, options.people), split).answer
    strange = chance.pick(other.split())
    tries = [
        " ".join([*words[:place], *words[place + 1 :]]),
        " ".join([*words[:place], strange, *words[place + 1 :]]),
        " ".join([*words[: place + 1], *words[place:]]),
        " ".join(reversed(words)),
        task.answer.lower(),
        other,
    ]
    missed = [one for one in tries if one and not fulfils(one, task.checked)]
    return chance.pick(missed) if missed else "I do not know"


def _turn(task: Task) -> list[dict[str, str]]:
    return [{"role": "user", "content": task.asked}, {"role": "assistant", "content": task.answer}]


def ask(index: int, split: Split, seed: int, options: Options) -> Question:
    """One instruction with the check of its fulfilment."""
    task = _task(Chance("ask chat", split, seed, index), split, options)
    system = [{"role": "system", "content": task.system}] if task.system else []
    whole = f"{task.system} {task.asked}".strip()
    return Question(
        id="",
        prompt=f"Question: {whole}\nAnswer:",
        question=task.asked,
        messages=(*system, {"role": "user", "content": task.asked}),
        answer=task.answer,
        check=task.checked,
        truth={"kind": task.kind},
    )
