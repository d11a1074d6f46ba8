"""The sampler against brute force on small distributions, and against transformers' own processors."""

import ctypes
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as referee

from trivium.generate.constraints import Constraint
from trivium.generate.sampling import (
    MINIMUM_TEMPERATURE,
    Sampler,
    Sampling,
    SequenceSampling,
    filter_scores,
    filtered_log_probabilities,
    seed_of_sample,
    uniforms,
)
from trivium.kit.errors import TriviumError

VOCABULARY = 50


def logits(rows=6, seed=0, scale=2.0, vocabulary=VOCABULARY):
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def sampler_of(settings, *, prompts=None, seeds=None, stop_ids=(), vocabulary=VOCABULARY):
    sampler = Sampler(vocabulary, "cpu")
    sampler.rearrange(
        [],
        [
            SequenceSampling(one, seeds[i] if seeds else i, prompts[i] if prompts else [], stop_ids, None)
            for i, one in enumerate(settings)
        ],
    )
    return sampler


def filtered(scores, **settings):
    rows = scores.shape[0]
    one = Sampling(**settings)
    return filter_scores(
        scores,
        torch.full((rows,), one.top_k),
        torch.full((rows,), one.top_p, dtype=torch.float64),
        torch.full((rows,), one.min_p),
        torch.full((rows,), one.typical_p, dtype=torch.float64),
    )


FILTERS = [
    ({"top_k": 1}, lambda: [referee.TopKLogitsWarper(1)]),
    ({"top_k": 7}, lambda: [referee.TopKLogitsWarper(7)]),
    ({"top_k": 500}, lambda: [referee.TopKLogitsWarper(500)]),
    ({"top_p": 0.3}, lambda: [referee.TopPLogitsWarper(0.3)]),
    ({"top_p": 0.95}, lambda: [referee.TopPLogitsWarper(0.95)]),
    ({"min_p": 0.05}, lambda: [referee.MinPLogitsWarper(0.05)]),
    ({"typical_p": 0.6}, lambda: [referee.TypicalLogitsWarper(0.6)]),
    ({"top_k": 20, "top_p": 0.8}, lambda: [referee.TopKLogitsWarper(20), referee.TopPLogitsWarper(0.8)]),
    (
        {"top_k": 30, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.8},
        lambda: [
            referee.TopKLogitsWarper(30),
            referee.TopPLogitsWarper(0.9),
            referee.MinPLogitsWarper(0.02),
            referee.TypicalLogitsWarper(0.8),
        ],
    ),
]


@pytest.mark.parametrize("vocabulary", [50, 700])
@pytest.mark.parametrize(("settings", "processors"), FILTERS)
def test_filters_keep_what_transformers_keeps(settings, processors, vocabulary):
    for scale in (0.2, 2.0, 6.0):
        scores = logits(8, seed=3, scale=scale, vocabulary=vocabulary)
        expected = referee.LogitsProcessorList(processors())(None, scores.clone())
        assert torch.equal(filtered(scores.clone(), **settings), expected)


def test_rows_with_different_settings_do_not_disturb_each_other():
    scores = logits(len(FILTERS), vocabulary=700)
    settings = [Sampling(**one) for one, _ in FILTERS]
    mixed = filter_scores(
        scores,
        torch.tensor([one.top_k for one in settings]),
        torch.tensor([one.top_p for one in settings], dtype=torch.float64),
        torch.tensor([one.min_p for one in settings]),
        torch.tensor([one.typical_p for one in settings], dtype=torch.float64),
    )
    for row, (one, _) in enumerate(FILTERS):
        assert torch.equal(mixed[row], filtered(scores[row : row + 1].clone(), **one)[0])


def test_top_p_by_brute_force_is_the_smallest_set_that_reaches_p():
    scores = logits(20, seed=5, vocabulary=7)
    mass = scores.double().softmax(-1)
    for p in (0.2, 0.5, 0.9):
        kept = torch.isfinite(filtered(scores, top_p=p))
        for row in range(20):
            subsets = (
                set(one)
                for size in range(1, 8)
                for one in itertools.combinations(range(7), size)
                if mass[row, list(one)].sum() >= p
            )
            smallest = len(next(subsets))
            assert int(kept[row].sum()) == smallest
            assert mass[row][kept[row]].sum() >= p


def test_penalties_match_transformers_and_the_published_formula():
    scores = logits(3)
    prompts = [[1, 2, 3], [4, 4, 4], [49]]
    chosen = sampler_of([Sampling(temperature=0, repetition_penalty=1.7)] * 3, prompts=prompts)
    expected = torch.stack(
        [
            referee.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt]), scores[i : i + 1].clone())[
                0
            ]
            for i, prompt in enumerate(prompts)
        ]
    )
    assert torch.equal(chosen._shape(scores.clone()), expected)

    one = sampler_of([Sampling(temperature=0, presence_penalty=0.5, frequency_penalty=0.25)])
    steps = logits(1, seed=9)
    said = Counter()
    for _ in range(30):
        expected = steps[0].clone()
        for token, times in said.items():
            expected[token] -= 0.5 + 0.25 * times
        token = int(one.choose(steps.clone()).tokens[0])
        assert token == int(expected.argmax())
        said[token] += 1
    assert max(said.values()) > 1


def test_greedy_takes_the_lowest_id_among_equals():
    scores = torch.zeros(2, VOCABULARY)
    scores[0, [7, 9, 30]] = 4.0
    assert sampler_of([Sampling(temperature=0)] * 2).choose(scores).tokens.tolist() == [7, 0]


def test_bias_and_minimum_length():
    scores = torch.zeros(2, VOCABULARY)
    scores[:, 5] = 3.0
    sampler = sampler_of(
        [Sampling(temperature=0, logit_bias={9: 5.0}), Sampling(temperature=0, min_new_tokens=2)],
        stop_ids=(5,),
    )
    assert [sampler.choose(scores.clone()).tokens.tolist() for _ in range(3)] == [[9, 0], [9, 0], [9, 5]]


def test_the_coldest_draw_is_the_likeliest_token():
    scores = logits(4, scale=1000.0)
    for filters in ({}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {"typical_p": 0.5}):
        cold = sampler_of([Sampling(temperature=MINIMUM_TEMPERATURE, **filters)] * 4)
        chosen = cold.choose(scores.clone())
        assert chosen.tokens.tolist() == scores.argmax(-1).tolist()
        assert torch.equal(chosen.logprobs, torch.zeros(4))


@pytest.mark.parametrize("strength", [0.01, 100.0])
def test_the_strongest_penalty_is_transformers_and_finite(strength):
    scores, prompts = logits(3, scale=1000.0), [[1, 2, 3], [4, 4, 4], [49]]
    extreme = Sampling(temperature=MINIMUM_TEMPERATURE, repetition_penalty=strength, presence_penalty=100.0)
    chosen = sampler_of([extreme] * 3, prompts=prompts).choose(scores.clone())
    processor = referee.RepetitionPenaltyLogitsProcessor(strength)
    expected = [
        int(processor(torch.tensor([one]), scores[i : i + 1].clone()).argmax())
        for i, one in enumerate(prompts)
    ]
    assert chosen.tokens.tolist() == expected
    assert torch.isfinite(chosen.logprobs).all()


def test_a_minimum_length_never_bars_the_only_token_that_is_left():
    class OnlyTheEnd:
        def unsafe_compute_mask_ptr(self, address, size):
            ctypes.memset(address, 0, size)
            ctypes.memset(address, 1 << 5, 1)

    for temperature in (0.0, 1.0):
        one = Sampling(temperature=temperature, min_new_tokens=3, logprobs=True)
        sampler = Sampler(VOCABULARY, "cpu")
        sampler.rearrange([], [SequenceSampling(one, 0, [], (5,), Constraint(OnlyTheEnd()))])
        chosen = sampler.choose(logits(1))
        assert chosen.tokens.tolist() == [5]
        assert chosen.logprobs.tolist() == [0.0]


def test_draws_follow_the_distribution():
    scores = logits(1, vocabulary=8)
    settings = Sampling(temperature=0.7, top_p=0.9)
    count = 20_000
    sampler = sampler_of([settings] * count, seeds=list(range(count)), vocabulary=8)
    tokens = sampler.choose(scores.expand(count, 8).clone()).tokens
    expected = filtered_log_probabilities(scores, settings)[0].exp()
    observed = torch.bincount(tokens, minlength=8) / count
    assert not bool((observed[expected == 0] > 0).any())
    error = (expected * (1 - expected) / count).sqrt()
    assert bool(((observed - expected).abs() <= 4.5 * error).all())


def test_log_probabilities_are_those_of_the_filtered_distribution():
    settings = [
        Sampling(temperature=0.6, logprobs=True),
        Sampling(top_k=5, logprobs=True),
        Sampling(temperature=1.5, top_p=0.5, logprobs=True),
        Sampling(temperature=0, logprobs=True),
    ]
    scores = logits(4)
    chosen = sampler_of(settings).choose(scores.clone())
    for row, one in enumerate(settings):
        expected = filtered_log_probabilities(scores[row : row + 1], one)[0, chosen.tokens[row]]
        assert chosen.logprobs[row] == pytest.approx(float(expected), abs=1e-5)


def test_alternatives_are_the_models_own_best():
    scores = logits(2)
    chosen = sampler_of([Sampling(top_k=2, top_logprobs=5), Sampling()]).choose(scores.clone())
    own, values, ids = chosen.alternatives
    expected = scores.log_softmax(-1)
    assert torch.equal(values, expected.topk(5).values)
    assert torch.equal(ids, expected.topk(5).indices)
    assert torch.equal(own, expected.gather(1, chosen.tokens[:, None])[:, 0])


def test_a_row_draws_the_same_alone_and_in_company():
    every = [
        Sampling(temperature=0.9),
        Sampling(top_p=0.8),
        Sampling(temperature=0),
        Sampling(top_k=3, min_p=0.1),
    ]
    every.append(Sampling(repetition_penalty=1.3, typical_p=0.7))
    steps = [logits(5, seed=step) for step in range(20)]
    together = sampler_of(every, seeds=[11, 12, 13, 14, 15])
    mixed = [together.choose(step.clone()).tokens.tolist() for step in steps]
    for row, one in enumerate(every):
        alone = sampler_of([one], seeds=[11 + row])
        assert [int(alone.choose(step[row : row + 1].clone()).tokens) for step in steps] == [
            m[row] for m in mixed
        ]


def test_rows_keep_their_state_when_others_leave_and_enter():
    every = [Sampling(repetition_penalty=1.5, temperature=0), Sampling(max_new_tokens=4), Sampling(top_k=4)]
    steps = [logits(3, seed=step) for step in range(12)]
    steady = sampler_of(every, seeds=[1, 2, 3], prompts=[[1], [2], [3]])
    expected = [steady.choose(step.clone()).tokens.tolist() for step in steps[:4]]
    moving = sampler_of(every, seeds=[1, 2, 3], prompts=[[1], [2], [3]])
    got = [moving.choose(step.clone()).tokens.tolist() for step in steps[:2]]
    moving.rearrange([2, 0], [SequenceSampling(Sampling(max_new_tokens=200), 8, [], (), None)])
    later = [moving.choose(torch.cat([step[[2, 0]], step[:1]])).tokens.tolist() for step in steps[2:4]]
    assert expected[:2] == got
    assert [[one[2], one[0]] for one in expected[2:]] == [one[:2] for one in later]


def test_random_numbers_are_uniform_and_depend_on_nothing_but_seed_and_place():
    numbers = uniforms(3, 50_000)
    assert np.array_equal(numbers[100:200], uniforms(3, 100, start=100))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert np.abs(np.histogram(numbers, 20)[0] - 2500).max() < 6 * math.sqrt(2500)
    assert abs(np.corrcoef(numbers, uniforms(4, 50_000))[0, 1]) < 0.02
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.02
    assert len({seed_of_sample(7, sample) for sample in range(100)}) == 100


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"min_p": 2},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"temperature": math.nan},
        {"temperature": 1e-38},
        {"temperature": 1e9},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 1e30},
        {"presence_penalty": 1e38},
        {"frequency_penalty": -1e38},
        {"logit_bias": {3: math.nan}},
        {"logit_bias": {3: math.inf}},
        {"logit_bias": {3: 1e38}},
        {"stop": "END"},
        {"stop": [3]},
        {"stop_ids": 5},
        {"stop_ids": "5"},
        {"logit_bias": [1]},
        {"logit_bias": {"a": 1}},
        {"json_schema": "x"},
        {"regex": 3},
        {"temperature": "hot"},
        {"max_new_tokens": "5"},
        {"max_new_tokens": 2.5},
        {"top_k": None},
        {"seed": 1.5},
        {"top_n": 3},
    ],
)
def test_settings_that_cannot_be_are_refused_in_a_sentence(wrong):
    with pytest.raises(TriviumError, match=next(iter(wrong))):
        Sampling(**wrong)
