"""What `doctor` measures and where the planner puts it: decoding, the cache, and the memory of a process."""

from dataclasses import replace

import numpy as np
import pytest

from trivium.generate.engine import Engine
from trivium.generate.prefill import CHUNK
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.lab.planner.catalogue import this_machine
from trivium.lab.planner.estimate import estimate
from trivium.lab.planner.layout import Layout
from trivium.lab.planner.memory import activation_numbers, memory_of
from trivium.lab.planner.work import Job, Phase
from trivium.learn.validation import PASS_TOKENS
from trivium.model.config import ModelConfig
from trivium.model.flops import parameter_count
from trivium.model.initialise import new_model
from trivium.pipeline.calibrate import MIXED, SHORT, TOKENS, _Training, not_negative
from trivium.pipeline.workload import cached
from trivium.tokens.train import train_tokenizer

SMALL = ModelConfig(vocabulary=300, width=64, layers=2, heads=4, inner_width=96, context=512)
HERE = this_machine({"peak": 1e11, "bandwidth": 1e10, "runtime": 1e8, "gaps": 0.0})
ALONE = Layout(micro_batch=2048)


def answering(**changes: float) -> Job:
    written = Phase("generation", 3200.0, 100.0, 3200.0, decode_steps=100.0, rows=32.0)
    read = Phase("generation", 9000.0, 90.0, 0.0)
    return replace(Job("sums", "evaluate", SMALL, (read, written)), **changes)


def test_costs_are_found_again_from_counts_and_none_is_below_zero():
    counts = np.random.default_rng(0).uniform(1, 100, (6, 4))
    each = np.array([5e-4, 5e-5, 0.0, 1.6e-4])
    assert not_negative(counts, counts @ each) == pytest.approx(each, abs=1e-12)
    # Seconds that fall with a count: its cost is nothing.
    assert (not_negative(counts, counts @ np.array([1.0, 0.1, -0.05, 0.2])) >= 0).all()


def test_what_decoding_reads_of_the_cache_takes_as_long_as_was_measured():
    plain, slow = (estimate(answering(), one, ALONE).seconds for one in (HERE, replace(HERE, cache_rate=1e9)))
    read = 100 * 32 * 100 * 4 * 2 * SMALL.layers * SMALL.heads * SMALL.head_width
    assert slow - plain == pytest.approx(read / 1e9 - read / (1e10 * 0.75))


def test_a_training_takes_as_much_more_memory_as_was_measured():
    job = Job("base", "pretrain", SMALL, trained_parameters=float(parameter_count(SMALL)))
    tight, loose = (memory_of(job, replace(HERE, gaps=gaps), ALONE).total for gaps in (0.0, 0.3))
    assert loose - 1e8 == pytest.approx(1.3 * (tight - 1e8))


def test_a_process_that_answers_holds_more_than_one_that_only_trains():
    trained = Job("base", "pretrain", SMALL, trained_parameters=float(parameter_count(SMALL)))
    asked = replace(answering(), cached_tokens=3200.0)
    more = replace(HERE, answering=3e7)
    assert memory_of(asked, more, ALONE).total - memory_of(asked, HERE, ALONE).total == pytest.approx(3e7)
    assert memory_of(trained, more, ALONE).total == memory_of(trained, HERE, ALONE).total


def test_a_training_that_predicts_no_token_holds_no_scores():
    learnt = Phase("training", 2048.0, 64.0, 2048.0, trained=1.0)
    job = Job("judge", "reward", SMALL, (learnt,), trained_parameters=float(parameter_count(SMALL)))
    assert memory_of(job, HERE, ALONE).logits > 0
    marked = replace(job, phases=(replace(learnt, predicted=0.0),))
    assert memory_of(marked, HERE, ALONE).logits == 0


def test_without_a_backward_pass_one_layer_of_one_pass_is_held():
    worked = 4 * activation_numbers(SMALL, "none")
    assert memory_of(answering(), HERE, ALONE).activations == CHUNK * worked
    scored = Phase("scoring", 1e6, 100.0, 1e6)
    measured = memory_of(answering(phases=(scored,)), HERE, ALONE)
    assert measured.activations == PASS_TOKENS * worked


def test_the_cache_that_is_planned_is_the_most_that_an_engine_holds(monkeypatch):
    """Rows have the places of the next larger size, and the old half stays while the storage doubles."""
    tokenizer = train_tokenizer(["one and two and three are six"] * 40, 268)
    model = new_model(replace(SMALL, vocabulary=tokenizer.vocabulary_size), seed=1).requires_grad_(False)
    engine, held = Engine(model, tokenizer, max_rows=8), [0]
    pool_type = type(engine.cache).place.__globals__["Pool"]
    resize = pool_type.resize

    def watched(pool, rows):
        held.append(pool.rows * pool.capacity + rows * pool.capacity)
        resize(pool, rows)

    monkeypatch.setattr(pool_type, "resize", watched)
    prompt = tokenizer.encode("one and two are three") * 30
    wish = Sampling(max_new_tokens=40, min_new_tokens=40, seed=1)
    engine.generate([Request(prompt[:100], wish)] * 16)
    assert max(held) == cached(8, 140)


def test_the_documents_that_doctor_learns_from_have_many_lengths():
    training = _Training(32)
    first, second = training._mixed(), training._mixed()
    assert sum(first) == sum(second) == TOKENS
    assert first != second
    assert len(set(first)) > 10
    assert max(first) <= MIXED[1]
    assert np.mean([len(training._mixed()) for _ in range(20)]) == pytest.approx(TOKENS / SHORT, rel=0.1)
