"""How far two models' next-token distributions lie apart, token by token, on texts neither has seen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trivium import world
from trivium.data.split import unseen
from trivium.evals.own import exchanges
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json, write_text
from trivium.kit.fingerprint import fingerprint
from trivium.lab.formatting import compact
from trivium.lab.gather import Member
from trivium.lab.gather_answers import code, fitting
from trivium.model.attention import Documents
from trivium.model.transformer import Transformer
from trivium.tokens.tokenizer import Tokenizer

LONGEST = 128
DIGITS = 5
NO_KL = "they cut text into different tokens, so no divergence per token can be given"
NO_ROOM = "no text fits into their windows, so no divergence can be given"
_SCORES_AT_ONCE = 2**23


@dataclass(frozen=True)
class Passage:
    """A text to read: what stands before, and what is looked at token by token."""

    id: str
    kind: str
    before: str
    text: str
    messages: tuple[Mapping[str, Any], ...] = ()


def passages(sources: Mapping[str, Mapping[str, str]], count: int = 12, seed: int = 0) -> list[Passage]:
    """Unseen texts with right answers: instructions and sums always, tales where they were taught."""
    options = {name: one for found in sources.values() for name, one in found.items()}
    found = []
    for source, kind in (("chat", "instructions"), ("sums", "sums")):
        own = fitting(
            source, {name: options[name] for name in options if source == "chat" or name == "country"}
        )
        for one in world.questions(source, "test", seed=seed + 1, limit=count, **own):
            said = (*one.messages, {"role": "assistant", "content": one.answer})
            found.append(Passage(one.id, kind, one.prompt, f" {one.answer}", said))
    if "prose" in sources:
        own = {name: options[name] for name in options if name == "country"}
        for document in world.documents("prose", split="test", seed=seed + 1, limit=count, **own):
            assert document.text is not None
            found.append(Passage(document.id, "prose", "", document.text))
    return found


def own_passages(tasks: Sequence[Mapping[str, Any]], count: int = 12) -> list[Passage]:
    """Unseen texts and answers of a person's own data, as the tasks about them name it."""
    found = []
    for task in tasks:
        if task["task"] == "bits":
            (source,) = task["sources"]
            documents = unseen(source, task["held_out"], count)
            found += [Passage(one.id, task["name"], "", one.text) for one in documents if one.text]
        if task["task"] == "replies":
            for name, prompt, messages, answer in exchanges(unseen(task["data"], task["held_out"], count)):
                said = (*messages, {"role": "assistant", "content": answer})
                found.append(Passage(name, task["name"], prompt, f" {answer}", said))
    return found


def encode(passage: Passage, tokenizer: Tokenizer, longest: int) -> tuple[list[int], list[int]]:
    """The tokens of a passage, and the places from which those that are looked at are predicted."""
    if passage.messages:
        try:
            chat = tokenizer.encode_chat([dict(one) for one in passage.messages])
            looked = [place for place, learned in enumerate(chat.learned[:longest]) if learned and place]
            return chat.ids[:longest], [place - 1 for place in looked]
        except TriviumError:
            # A tokenizer without a template reads the question as text to continue.
            pass
    begin = [] if tokenizer.beginning_id is None else [tokenizer.beginning_id]
    before = [*begin, *tokenizer.encode(passage.before)]
    ids = [*before, *tokenizer.encode(passage.text)][:longest]
    # Nothing comes before the first token, so nothing predicts it.
    return ids, list(range(max(len(before), 1) - 1, len(ids) - 1))


@torch.inference_mode()
def apart(
    model: Transformer, other: Transformer, ids: Sequence[int], before: Sequence[int], vocabulary: int
) -> dict[str, list[float]]:
    """For each token after these places: KL both ways, Jensen-Shannon, entropies, log-probabilities; nats."""
    places = torch.tensor(list(before), dtype=torch.long)
    tokens = torch.tensor(list(ids))
    hidden = [
        one(tokens.to(one.device), Documents([len(ids)], one.device))[places.to(one.device)]
        for one in (model, other)
    ]
    parts: list[Tensor] = []
    size = max(1, _SCORES_AT_ONCE // vocabulary)
    for start in range(0, len(places), size):
        left, right = (
            torch.log_softmax(
                one.logits(states[start : start + size])[:, :vocabulary].float().cpu(), dim=-1
            ).double()
            for one, states in zip((model, other), hidden)
        )
        parts.append(_measures(left, right, tokens[places[start : start + size] + 1]))
    columns = torch.cat(parts).T.tolist() if parts else [[] for _ in COLUMNS]
    return {name: [round(value, DIGITS) for value in column] for name, column in zip(COLUMNS, columns)}


COLUMNS = ("kl", "reverse", "js", "entropy", "entropy before", "logprob", "logprob before")


def _measures(left: Tensor, right: Tensor, chosen: Tensor) -> Tensor:
    mean = torch.logaddexp(left, right) - torch.tensor(2.0, dtype=left.dtype).log()
    p, q = left.exp(), right.exp()
    toward, backward = _divergence(p, left, right), _divergence(q, right, left)
    js = (_divergence(p, left, mean) + _divergence(q, right, mean)) / 2
    own = chosen[:, None]
    return torch.stack(
        [toward, backward, js, -_sum(p, left), -_sum(q, right), left.gather(1, own)[:, 0],
         right.gather(1, own)[:, 0]],
        dim=1,
    )  # fmt: skip


def _divergence(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    # Rounding may leave a hair below nothing, which no divergence is.
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).clamp_min(0)


def _sum(p: Tensor, log_p: Tensor) -> Tensor:
    return torch.where(p > 0, p * log_p, 0.0).sum(-1)


def divergence(member: Member, other: Member, texts: Sequence[Passage], kept: Path) -> dict[str, Any]:
    """Everything about two models on these texts, read from where it was kept or computed now."""
    found: dict[str, Any] = {"model": member.name, "before": other.name, "why_not": None, "texts": []}
    if member.tokenizer.fingerprint != other.tokenizer.fingerprint:
        return {**found, "why_not": NO_KL}
    key = fingerprint(
        [[one.id, one.before, one.text, list(map(dict, one.messages))] for one in texts] + [code()]
    )
    place = kept / f"{member.fingerprint}-{other.fingerprint}-{key}.json"
    if not place.is_file():
        write_text(place, compact([_read(member, other, one) for one in texts]))
    read = [one for one in read_json(place) if one["tokens"]]
    return {**found, "texts": read, "why_not": None if read else NO_ROOM}


def _read(member: Member, other: Member, passage: Passage) -> dict[str, Any]:
    tokenizer = member.tokenizer
    longest = min(LONGEST, member.model.config.context, other.model.config.context)
    ids, before = encode(passage, tokenizer, longest)
    return {
        "id": passage.id,
        "kind": passage.kind,
        "before": passage.before,
        "tokens": [tokenizer.decode([ids[place + 1]], skip_control=False) for place in before],
        **apart(member.model, other.model, ids, before, tokenizer.vocabulary_size),
    }


def continued(member: Member, prompts: Sequence[str], most: int, seed: int) -> list[Passage]:
    """Prompts of a person, each with what this model draws after it at temperature one."""
    from trivium.generate.engine import Engine

    begin = [] if member.tokenizer.beginning_id is None else [member.tokenizer.beginning_id]
    requests = []
    for number, prompt in enumerate(prompts):
        ids = [*begin, *member.tokenizer.encode(prompt)] or [member.tokenizer.end_of_text_id]
        requests.append(Request(ids, Sampling(max_new_tokens=most, seed=seed * 1_000_003 + number)))
    drawn = Engine(member.model, member.tokenizer).generate(requests)
    return [
        Passage(f"prompt {number}", "prompts", prompt, one[0].text)
        for number, (prompt, one) in enumerate(zip(prompts, drawn), 1)
    ]
