"""Speculative decoding: answers are those without drafts, whatever drafts them and whatever they ask for."""

import copy
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from generating import assert_as_promised, prompt, tiny_model, tokenizer, whole_logits

from trivium.data.rows import collate, row_of_documents
from trivium.generate.drafts import Draft, NgramIndex
from trivium.generate.engine import Engine
from trivium.generate.requests import Request, Slide
from trivium.generate.sampling import Sampling, filtered_log_probabilities
from trivium.generate.speculation import LONGEST_SPAN, TRIAL, Choice, Payoff
from trivium.kit.errors import TriviumError
from trivium.learn.objectives.draft_heads import DraftsAhead
from trivium.model.config import ExpertsConfig
from trivium.model.draft_heads import DraftHeads
from trivium.model.lora import AdapterSettings, add_adapter, selection_of
from trivium.tokens.train import train_tokenizer

DRAFTERS = ["lookup", "model", "heads"]
GREEDY = Sampling(temperature=0, max_new_tokens=24, stop_ids=(), logprobs=True)


def draft_like(model, noise=0.02):
    """A model that often, but not always, agrees with another one."""
    torch.manual_seed(9)
    near = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return Draft(near, tokenizer())


KNOWN = {}


def heads_of(model):
    """Two heads that learnt, as their stage teaches them, from some answers of the model."""
    key = float(sum(parameter.detach().double().abs().sum() for parameter in model.parameters()))
    if key not in KNOWN:
        asked = [Request(repetitive(20 + index, index), GREEDY) for index in range(24)]
        answers = Engine(model, tokenizer(), max_rows=24).generate(asked)
        texts = [[*one.prompt, *found.tokens] for one, (found,) in zip(asked, answers, strict=True)]
        rows = [row_of_documents([np.array(text)]) for text in texts]
        torch.manual_seed(1)
        objective = DraftsAhead(DraftHeads(model.config.width, 2))
        adam = torch.optim.Adam(objective.extra.parameters(), 0.02)
        for _ in range(40):
            adam.zero_grad()
            (objective.loss(model, collate(rows)).sum / objective.weight(rows)).backward()
            adam.step()
        KNOWN[key] = objective.extra
    return copy.deepcopy(KNOWN[key])


def drafting_engine(drafter, *, model=None, always=True, **settings):
    model = model or tiny_model()
    engine = Engine(model, tokenizer(), draft=draft_of(drafter, model), seed=0, **settings)
    if always:
        engine.scheduler.speculation.payoff.worth = lambda rows: True
    return engine


def draft_of(drafter, model):
    made = {"lookup": lambda _: "lookup", "model": draft_like, "heads": heads_of}
    return made[drafter](model)


def repetitive(length, seed):
    """A prompt in which a look-up finds something."""
    part = prompt(max(length // 3, 4), seed=seed)
    return (part * 4)[:length]


def requests_of_all_kinds():
    return [
        Request(repetitive(30, 1), GREEDY),
        Request(repetitive(60, 2), Sampling(seed=3, temperature=0.7, max_new_tokens=30, logprobs=True), n=3),
        Request(
            repetitive(9, 3),
            Sampling(seed=5, top_p=0.9, top_k=20, min_p=0.01, temperature=0.9, max_new_tokens=40),
        ),
        Request(
            repetitive(200, 4),
            Sampling(
                seed=8, repetition_penalty=1.2, frequency_penalty=0.3, logit_bias={7: 2.0}, max_new_tokens=20
            ),
        ),
        Request(repetitive(40, 5), Sampling(temperature=0, max_new_tokens=12, top_logprobs=3, logprobs=True)),
        Request(repetitive(21, 6), Sampling(seed=2, min_new_tokens=5, max_new_tokens=1 + 32)),
        Request(
            repetitive(100, 7),
            Sampling(seed=4, max_new_tokens=150, stop_ids=()),
            slide=Slide(window=128),
        ),
        Request(prompt(1), Sampling(temperature=0.5, seed=1, max_new_tokens=1)),
    ]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy_answers_to_a_hundred_prompts_are_those_without_drafts(drafter):
    model = tiny_model()
    asked = [Request(repetitive(4 + index % 90, index), GREEDY) for index in range(100)]
    plain = Engine(model, tokenizer(), max_rows=16).generate(asked)
    engine = drafting_engine(drafter, model=model, max_rows=16)
    found = engine.generate(asked)
    assert_as_promised(engine, [one for (one,) in found], [one for (one,) in plain])
    counts = engine.counts
    assert counts["generated_tokens"] == 100 * 24
    assert 0 < counts["accepted_tokens"] < counts["drafted_tokens"]
    assert engine.rows_in_use == 0


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("rows", [1, 3, 32])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_sampled_answers_of_every_kind_are_those_without_drafts(drafter, rows):
    model = tiny_model()
    asked = requests_of_all_kinds()
    plain = Engine(model, tokenizer(), max_rows=32).generate(asked)
    engine = drafting_engine(drafter, model=model, max_rows=rows)
    found = engine.generate(asked)
    assert_as_promised(engine, [*chain(*found)], [*chain(*plain)])
    assert [c.top_logprobs for c in found[4]] == [c.top_logprobs for c in plain[4]]
    assert engine.counts["accepted_tokens"] > 0


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    "changes",
    [
        {"windows": (9, None, 9)},
        {"attention_soft_cap": 20.0, "final_soft_cap": 15.0},
        {"positions": "learned"},
        {"rope": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}, "context": 128},
        {"experts": ExpertsConfig(4, 2, 48)},
    ],
    ids=["windows", "soft caps", "learned", "dynamic", "experts"],
)
def test_models_of_other_designs_verify_drafts_alike(changes):
    model = tiny_model(**changes)
    asked = [
        Request(repetitive(30 + 9 * index, index), replace(GREEDY, max_new_tokens=40)) for index in range(6)
    ]
    plain = Engine(model, tokenizer(), max_rows=8).generate(asked)
    engine = drafting_engine("model", model=model, max_rows=8)
    assert_as_promised(engine, [*chain(*engine.generate(asked))], [*chain(*plain)])
    assert engine.counts["accepted_tokens"] > 0


def chance_of(found, wanted):
    """How often chance alone takes counts as far from what is wanted (Pearson's chi-square)."""
    distance = sum((one - other) ** 2 / other for one, other in zip(found, wanted, strict=True))
    return float(torch.special.gammaincc(torch.tensor((len(found) - 1) / 2), torch.tensor(distance / 2)))


@pytest.mark.slow
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_first_three_tokens_follow_the_models_distribution(drafter):
    settings = Sampling(temperature=1.2, top_k=3, max_new_tokens=4, stop_ids=())
    # the first token repeats a beginning, so that a look-up has something to draft
    asked = repetitive(18, 4)
    engine = drafting_engine(drafter, model=tiny_model(layers=1), max_rows=128)
    drawn = engine.generate([Request(asked, settings, n=20_000)])[0]
    expected = {}
    _extend(engine.model, asked, settings, (), 1.0, expected)
    tuples = list(expected)
    counts = dict.fromkeys(tuples, 0)
    for completion in drawn:
        counts[tuple(completion.tokens[:3])] += 1
    assert engine.counts["drafted_tokens"] > 1000
    found, whole = [counts[one] for one in tuples], sum(expected.values())
    assert whole == pytest.approx(1, abs=1e-6)
    wanted = [20_000 * expected[one] / whole for one in tuples]
    assert chance_of(found, wanted) > 0.001


def _extend(model, asked, settings, before, mass, into):
    """The probability of every way to go on with three tokens."""
    if len(before) == 3:
        into[before] = mass
        return
    logits = whole_logits(model, [*asked, *before])[-1:]
    logs = filtered_log_probabilities(logits, settings)[0].double()
    for token in (logs > float("-inf")).nonzero()[:, 0].tolist():
        _extend(model, asked, settings, (*before, token), mass * float(logs[token].exp()), into)


SCHEMA = {
    "type": "object",
    "properties": {"town": {"type": "string", "maxLength": 8}, "doves": {"type": "integer"}},
    "required": ["town", "doves"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_grammars_are_followed_as_without_drafts(drafter):
    model = tiny_model()
    asked = [
        Request(repetitive(20, i), Sampling(seed=i, json_schema=SCHEMA, max_new_tokens=60)) for i in range(3)
    ]
    asked += [Request(repetitive(20, i), Sampling(seed=i, regex="(ab|ba){3,9}c"), n=2) for i in range(3)]
    plain = Engine(model, tokenizer(), max_rows=8).generate(asked)
    engine = drafting_engine(drafter, model=model, max_rows=8)
    assert_as_promised(engine, [*chain(*engine.generate(asked))], [*chain(*plain)])
    assert engine.counts["accepted_tokens"] > 0


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_rows_under_adapters_are_verified_under_them(drafter):
    model = tiny_model()
    for seed, name in enumerate(("one", "other")):
        add_adapter(model, AdapterSettings(rank=4), name=name, seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".up." in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    selection_of(model).active = None
    names = ["one", None, "other", "one"]
    asked = [
        Request(repetitive(30, 1), Sampling(seed=index, max_new_tokens=30, temperature=0.8), adapter=name)
        for index, name in enumerate(names)
    ]
    plain = Engine(model, tokenizer(), max_rows=8).generate(asked)
    assert len({tuple(one.tokens[:4]) for (one,) in plain}) > 2, "the adapters make a difference"
    engine = Engine(model, tokenizer(), max_rows=8, draft=draft_of(drafter, tiny_model()))
    engine.scheduler.speculation.payoff.worth = lambda rows: True
    assert_as_promised(engine, [*chain(*engine.generate(asked))], [*chain(*plain)])
    assert engine.counts["drafted_tokens"] > 0


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_stop_texts_and_listeners_see_each_token_once(drafter):
    model = tiny_model()
    free = Sampling(seed=6, temperature=0.7, max_new_tokens=60, stop_ids=())
    asked = repetitive(30, 3)
    [[whole]] = Engine(model, tokenizer()).generate([Request(asked, free)])
    stop = whole.text[len(whole.text) // 2 :][:3]
    events = {}
    for always in (False, True):
        engine = drafting_engine(drafter, model=model, always=always)
        if not always:
            engine.scheduler.speculation = None
        events[always] = []
        request = Request(asked, replace(free, stop=(stop,), logprobs=True, top_logprobs=2))
        handle = engine.submit(request, events[always].append)
        while not handle.done:
            engine.step()
        assert handle.completions[0].text == whole.text[: whole.text.index(stop)]
    assert_as_promised(engine, [events[True][-1].completion], [events[False][-1].completion])
    assert [one.token for one in events[True]] == [one.token for one in events[False]]
    assert [one.text for one in events[True]] == [one.text for one in events[False]]


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_follow_ups_cancellations_and_a_full_house(drafter):
    model = tiny_model()
    engine = drafting_engine(drafter, model=model, max_rows=4, prefix_cache_size=2)
    settings = Sampling(temperature=0, max_new_tokens=30, stop_ids=())
    first = repetitive(64, 1)
    [[answer]] = engine.generate([Request(first, settings)])
    follow = Request([*first, *answer.tokens, *prompt(9, seed=5)], settings)
    asked = [follow, *(Request(repetitive(40 + i, i), settings) for i in range(8))]
    handles = [engine.submit(request) for request in asked]
    before = engine.counts["copied_tokens"]
    for _ in range(6):
        engine.step()
    engine.cancel(handles[2])
    engine.cancel(handles[7])
    while engine.busy:
        engine.step()
    assert engine.counts["copied_tokens"] - before >= 48
    assert engine.rows_in_use == 0
    plain = Engine(model, tokenizer(), max_rows=4).generate(asked)
    for index, (handle, (expected,)) in enumerate(zip(handles, plain, strict=True)):
        [found] = handle.completions
        if index in (2, 7):
            assert found.finish_reason == "cancelled"
            assert found.tokens == expected.tokens[: len(found.tokens)]
        else:
            assert found.tokens == expected.tokens


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_drafts_that_come_and_go_change_nothing(drafter):
    model = tiny_model()
    asked = requests_of_all_kinds()
    plain = Engine(model, tokenizer(), max_rows=32).generate(asked)
    engine = drafting_engine(drafter, model=model, max_rows=8, always=False)
    turns = iter(range(10**6))
    engine.scheduler.speculation.payoff.worth = lambda rows: next(turns) % 50 < 6 or next(turns) % 3 == 0
    assert_as_promised(engine, [*chain(*engine.generate(asked))], [*chain(*plain)])
    assert engine.counts["accepted_tokens"] > 0


def test_a_failing_drafter_is_switched_off_and_harms_nothing(monkeypatch, caplog):
    engine = drafting_engine("model")
    monkeypatch.setattr(
        type(engine.scheduler.speculation.drafter),
        "_logits",
        lambda *_: (_ for _ in ()).throw(RuntimeError("no")),
    )
    [[found]] = engine.generate([Request(repetitive(30, 1), GREEDY)])
    [[expected]] = Engine(tiny_model(), tokenizer()).generate([Request(repetitive(30, 1), GREEDY)])
    assert_as_promised(engine, [found], [expected])
    assert "switched off" in caplog.text
    assert not engine.drafting


def test_a_row_that_makes_a_verified_token_fail_fails_alone():
    engine = drafting_engine("lookup", max_rows=4)

    class Failing(type(engine.scheduler.sampler)):
        def choose(self, logits):
            for settings, drawn in zip(self.settings, self.count[:, 0].tolist(), strict=True):
                if settings.seed == 13 and drawn >= 9:
                    raise RuntimeError("an index out of range")
            return super().choose(logits)

    engine.scheduler.sampler = Failing(engine.vocabulary, engine.model.device)
    good = [Request(repetitive(30, i), replace(GREEDY, seed=i)) for i in range(2)]
    handles = [engine.submit(one) for one in good]
    bad = engine.submit(Request(repetitive(30, 3), replace(GREEDY, seed=13)))
    while not all(one.done for one in [*handles, bad]):
        engine.step()
    expected = Engine(tiny_model(), tokenizer(), max_rows=4).generate(good)
    assert_as_promised(engine, [one.completions[0] for one in handles], [one for (one,) in expected])
    assert "out of range" in str(bad.failure)
    assert engine.rows_in_use == 0


def test_a_smaller_draft_may_know_fewer_tokens_and_have_a_shorter_window():
    model = tiny_model()
    small = tiny_model(layers=1, vocabulary=tokenizer().vocabulary_size - 40, context=48)
    engine = Engine(model, tokenizer(), draft=Draft(small, tokenizer()))
    engine.scheduler.speculation.payoff.worth = lambda rows: True
    asked = [Request(repetitive(20, i), replace(GREEDY, max_new_tokens=60)) for i in range(4)]
    plain = Engine(model, tokenizer()).generate(asked)
    assert_as_promised(engine, [*chain(*engine.generate(asked))], [*chain(*plain)])
    assert engine.counts["drafted_tokens"] > 0


def test_a_draft_with_other_tokens_is_refused():
    other = train_tokenizer(["other words altogether, of other lengths"] * 40, 380)
    with pytest.raises(TriviumError, match="same tokenizer"):
        Engine(tiny_model(), tokenizer(), draft=Draft(tiny_model(), other))
    with pytest.raises(TriviumError, match="'lookup', not 'look'"):
        Engine(tiny_model(), tokenizer(), draft="look")


def test_a_look_up_continues_the_longest_run_it_has_seen():
    index = NgramIndex()
    assert index.follow([1, 2, 3, 4, 9, 1, 2], 3) == [3, 4, 9]
    assert index.follow([1, 2, 3, 4, 9, 1, 2, 7], 3) == []
    assert index.follow([1, 2, 3, 4, 9, 1, 2, 7, 1, 2], 3) == [7, 1, 2], "the last time counts"
    assert index.follow([1, 2, 3, 4, 9, 1, 2, 7, 1, 2, 3, 4], 2) == [9, 1], "three tokens tell more than two"
    assert NgramIndex().follow([5, 5, 5], 4) == [5, 5, 5, 5], "a run may overlap its own end"
    assert NgramIndex().follow([5], 4) == []


def test_drafts_are_kept_where_they_pay_and_dropped_where_not():
    slow, quick = Payoff(), Payoff()
    for _ in range(3000):
        for payoff, factor in ((slow, 0.6), (quick, 1.5)):
            mode = payoff.worth(1)
            payoff.note(1, mode, 1, 1 / (factor if mode else 1.0))
    assert (slow.drafting, quick.drafting) == (False, True)
    # the other way is still tried, ever more rarely
    modes = [slow.worth(1)]
    for _ in range(4 * LONGEST_SPAN):
        slow.note(1, modes[-1], 1, 1 / (0.6 if modes[-1] else 1.0))
        modes.append(slow.worth(1))
    assert 0 < sum(modes) < 0.02 * len(modes) + TRIAL[True]


def test_where_drafts_begin_to_pay_they_come_back():
    choice = Choice(drafting=False, span=64)
    for _ in range(400):
        choice.note(2.0 if choice.mode else 1.0)
    assert choice.drafting
