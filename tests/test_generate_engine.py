"""The engine against transformers, against the model itself, and against its own promises."""

import random
import threading
from dataclasses import replace

import pytest
import torch
import transformers
from generating import assert_as_promised, prompt, tiny_engine, tiny_model, tokenizer, whole_logits

from trivium.generate.engine import Engine
from trivium.generate.requests import Request, Slide
from trivium.generate.sampling import Sampling, filtered_log_probabilities
from trivium.kit.errors import TriviumError
from trivium.model.attention import Documents
from trivium.model.folder import load_model

GREEDY = Sampling(temperature=0, max_new_tokens=24, stop_ids=())


class NoText:
    """Stands for the tokenizer where a test is about ids."""

    stop_ids = frozenset()

    def decode(self, ids):
        return " ".join(map(str, ids))


REFEREES = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 9}),
    "mistral": ("MistralConfig", {"num_key_value_heads": 2, "sliding_window": 9}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "olmo3": ("Olmo3Config", {"num_key_value_heads": 2, "sliding_window": 9}),
    "phi3": ("Phi3Config", {"num_key_value_heads": 2}),
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.7,
            "logits_scaling": 0.5,
            "attention_multiplier": 0.25,
        },
    ),
}


def referee(name):
    kind, changes = REFEREES[name]
    torch.manual_seed(1)
    config = getattr(transformers, kind)(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **changes,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", REFEREES)
def test_greedy_text_equals_transformers(name, rows, tmp_path):
    theirs = referee(name)
    theirs.save_pretrained(tmp_path)
    engine = Engine(load_model(tmp_path), NoText(), max_rows=rows)
    prompts = [prompt(length, seed=length, vocabulary=97) for length in (1, 7, 30, 64, 18)]
    found = engine.generate([Request(one, Sampling(temperature=0, max_new_tokens=40)) for one in prompts])
    for one, (completion,) in zip(prompts, found, strict=True):
        expected = theirs.generate(
            torch.tensor([one]), do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0
        )
        assert completion.tokens == expected[0, len(one) :].tolist()
    assert engine.rows_in_use == 0


def test_what_was_given_up_does_not_go_on_with_the_next_request(monkeypatch):
    engine = tiny_engine()
    with pytest.raises(TriviumError, match="window"):
        engine.generate([Request(prompt(5), GREEDY), Request(prompt(500), GREEDY)])
    step, steps = engine.step, iter(range(3))
    monkeypatch.setattr(engine, "step", lambda: step() if next(steps, None) is not None else _interrupt())
    with pytest.raises(KeyboardInterrupt):
        engine.generate([Request(prompt(5), GREEDY)])
    monkeypatch.undo()
    drawn = engine.counts["generated_tokens"]
    engine.generate([Request(prompt(7), Sampling(max_new_tokens=2, stop_ids=()))])
    assert engine.counts["generated_tokens"] == drawn + 2
    assert not engine.busy


def _interrupt():
    raise KeyboardInterrupt


def test_an_engine_without_rows_is_refused():
    with pytest.raises(TriviumError, match="at least 1"):
        tiny_engine(rows=0)


def test_sampled_tokens_follow_the_models_distribution():
    engine = tiny_engine(seed=4)
    one = prompt(6)
    settings = Sampling(temperature=0.8, top_k=6, max_new_tokens=1, stop_ids=())
    drawn = engine.generate([Request(one, settings, n=3000)])[0]
    expected = filtered_log_probabilities(whole_logits(engine.model, one)[-1:], settings)[0].exp()
    counts = torch.bincount(torch.tensor([c.tokens[0] for c in drawn]), minlength=len(expected)) / 3000
    assert bool(((counts - expected).abs() <= 4.5 * (expected * (1 - expected) / 3000).sqrt()).all())
    assert int((expected > 0).sum()) == 6


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(temperature=0, max_new_tokens=20, stop_ids=(), logprobs=True),
        Sampling(max_new_tokens=20, stop_ids=(), logprobs=True, seed=3),
        Sampling(temperature=0.7, top_p=0.8, top_k=12, max_new_tokens=20, stop_ids=(), logprobs=True, seed=3),
        Sampling(temperature=1.3, min_p=0.1, max_new_tokens=20, stop_ids=(), logprobs=True, seed=3),
    ],
)
def test_log_probabilities_are_the_trainers_under_the_same_settings(settings):
    engine = tiny_engine()
    one = prompt(21)
    (completion,) = engine.generate([Request(one, settings)])[0]
    logits = whole_logits(engine.model, one + completion.tokens)[len(one) - 1 : -1]
    expected = filtered_log_probabilities(logits, settings).gather(
        1, torch.tensor(completion.tokens)[:, None]
    )
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected[:, 0], atol=1e-4, rtol=0)


def test_the_same_seed_gives_the_same_text_alone_and_among_31_others():
    engine = tiny_engine(width=256, layers=4, heads=4, head_width=64, inner_width=704)
    rng = random.Random(0)
    requests = []
    for i in range(32):
        settings = Sampling(
            temperature=rng.choice([0.7, 1.0, 1.4, 0.0]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 20]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            max_new_tokens=rng.randint(5, 60),
            seed=i,
            logprobs=True,
        )
        requests.append(
            Request(prompt(rng.choice([1, 9, 16, 40, 90]), seed=i), settings, n=rng.choice([1, 1, 2]))
        )
    together = engine.generate(requests)
    for request, expected in zip(requests[::3], together[::3], strict=True):
        assert_as_promised(engine, engine.generate([request])[0], expected)


def test_samples_of_one_prompt_share_its_computation_and_differ():
    engine = tiny_engine()
    one = prompt(100)
    drawn = engine.generate([Request(one, Sampling(max_new_tokens=10, stop_ids=(), seed=5), n=8)])[0]
    assert len({tuple(c.tokens) for c in drawn}) == 8
    assert engine.counts["prompt_tokens"] == 99
    assert engine.counts["copied_tokens"] == 7 * 99
    alone = tiny_engine().generate([Request(one, Sampling(max_new_tokens=10, stop_ids=(), seed=5))])[0]
    assert alone[0] == drawn[0]


def test_different_prompts_share_their_common_beginning():
    engine = tiny_engine()
    head = prompt(70)
    requests = [Request(head + prompt(9, seed=i), GREEDY) for i in range(1, 6)]
    together = engine.generate(requests)
    assert engine.counts["copied_tokens"] == 4 * 64
    assert together == [tiny_engine().generate([request])[0] for request in requests]


def test_more_requests_than_rows_wait_and_are_all_answered():
    engine = tiny_engine(rows=3)
    requests = [Request(prompt(5 + i, seed=i), GREEDY) for i in range(11)]
    together = engine.generate(requests)
    assert [one[0].tokens for one in together] == [tiny_engine().generate([r])[0][0].tokens for r in requests]


def test_what_can_never_fit_is_refused_and_what_must_wait_waits():
    model = tiny_model()
    per_token = 3 * 2 * 2 * 16 * 4
    engine = Engine(model, tokenizer(), max_rows=16, memory_budget=per_token * 300)
    with pytest.raises(TriviumError, match="memory budget"):
        engine.submit(Request(prompt(400), GREEDY))
    with pytest.raises(TriviumError, match="window"):
        engine.submit(Request(prompt(500), GREEDY))
    requests = [Request(prompt(20, seed=i), GREEDY) for i in range(6)]
    running = [engine.submit(request) for request in requests]
    most = 0
    while engine.step():
        most = max(most, engine.rows_in_use)
        assert engine.cache.reserved * per_token <= engine.cache.budget
    assert most == 2
    assert all(one.done for one in running)
    # the small rows' storage is given back for one large row
    assert len(engine.generate([Request(prompt(200), GREEDY)])[0][0].tokens) == 24


def test_long_and_short_rows_lie_in_pools_of_their_own():
    engine = tiny_engine()
    requests = [Request(prompt(length, seed=length), GREEDY) for length in (5, 400, 30, 200, 8)]
    together = engine.generate(requests)
    assert sorted(engine.cache.pools) == [128, 256, 512]
    for request, one in zip(requests, together, strict=True):
        logits = whole_logits(engine.model, request.prompt + one[0].tokens)
        assert logits[len(request.prompt) - 1 : -1].argmax(-1).tolist() == one[0].tokens


def test_rows_enter_while_others_are_under_way():
    engine = tiny_engine()
    first = engine.submit(Request(prompt(40), GREEDY))
    for _ in range(9):
        engine.step()
    second = engine.submit(Request(prompt(33, seed=2), GREEDY))
    while engine.step():
        pass
    expected = tiny_engine().generate([first.request, second.request])
    assert [first.completions, second.completions] == expected


def test_cancelling_frees_rows_wherever_they_are():
    engine = tiny_engine(rows=4)
    long = Sampling(max_new_tokens=200, stop_ids=(), seed=1)
    running = [engine.submit(Request(prompt(30, seed=i), long, n=2)) for i in range(4)]
    kept = engine.submit(Request(prompt(12), GREEDY))
    for _ in range(5):
        engine.step()
    for one in running:
        engine.cancel(one)
    while engine.step():
        pass
    assert engine.rows_in_use == 0
    assert all(pool.decoding == 0 and not pool.slots for pool in engine.cache.pools.values())
    assert {c.finish_reason for one in running for c in one.completions} == {"cancelled"}
    assert 0 < len(running[0].completions[0].tokens) < 200
    assert running[3].completions[0].tokens == []
    assert kept.completions == tiny_engine().generate([kept.request])[0]


def test_requests_may_come_from_other_threads():
    engine = tiny_engine()
    running = []

    def send(seed):
        for i in range(5):
            running.append(engine.submit(Request(prompt(9, seed=seed + i), GREEDY)))

    threads = [threading.Thread(target=send, args=(100 * t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or engine.busy:
        engine.step()
    assert all(one.done for one in running)
    assert len(running) == 20


def test_scores_equal_the_models_and_share_beginnings():
    engine = tiny_engine(rows=4)
    question = prompt(50)
    answers = [prompt(length, seed=length) for length in (1, 5, 30, 3, 90, 2)]
    scores = engine.score([question] * 6, answers)
    for answer, found in zip(answers, scores, strict=True):
        logits = whole_logits(engine.model, question + answer).log_softmax(-1)[len(question) - 1 : -1]
        expected = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found.logprobs), expected, atol=1e-4, rtol=0)
    assert engine.counts["copied_tokens"] >= 4 * 48
    text = prompt(20)
    whole = whole_logits(engine.model, text).log_softmax(-1)[:-1].gather(1, torch.tensor(text[1:])[:, None])
    assert engine.score([[]], [text])[0].logprobs == pytest.approx(whole[:, 0].tolist(), abs=1e-4)


def test_long_prompts_are_read_in_chunks_beside_rows_that_write():
    engine = tiny_engine(context=2048)
    short = engine.submit(Request(prompt(4), Sampling(max_new_tokens=100, stop_ids=())))
    engine.step()
    long = engine.submit(Request(prompt(1500), Sampling(temperature=0, max_new_tokens=3, stop_ids=())))
    before = len(short.completions)
    engine.step()
    assert 0 < engine.counts["prompt_tokens"] < 1500
    assert before == 0
    while engine.step():
        pass
    tokens = long.completions[0].tokens
    logits = whole_logits(engine.model, long.request.prompt + tokens)
    assert logits[1499:-1].argmax(-1).tolist() == tokens


def test_embeddings_are_the_mean_of_the_last_hidden_states():
    engine = tiny_engine(rows=2)
    texts = [prompt(length, seed=length) for length in (3, 40, 17)]
    found = engine.embed(texts)
    with torch.no_grad():
        for text, one in zip(texts, found, strict=True):
            expected = engine.model(torch.tensor(text), Documents([len(text)])).mean(0)
            torch.testing.assert_close(one, expected, atol=2e-5, rtol=0)


# of 97, 113 and 129 tokens all but the last fill the window exactly
@pytest.mark.parametrize(("length", "new"), [(96, 40), (97, 40), (113, 40), (128, 40), (129, 40), (200, 300)])
def test_a_sliding_window_writes_on_without_end(length, new):
    engine = tiny_engine(context=128, layers=1)
    settings = Sampling(temperature=0, max_new_tokens=new, stop_ids=())
    request = Request(prompt(length), settings, slide=Slide(sinks=4, window=96))
    (completion,) = engine.generate([request])[0]
    assert len(completion.tokens) == new
    # one layer: what is cached depends on the token alone, so a fresh text of what is remembered agrees
    model, text = engine.model, request.prompt + completion.tokens
    gone = (96 - 4) // 4 // 16 * 16
    cached, forgotten = 0, 0
    for place in range(len(text) - 1):
        if cached >= 96:
            forgotten, cached = forgotten + gone, cached - gone
        cached += 1
        assert request.slide.forgotten(place + 1, 128) == forgotten
        if place >= length - 1:
            remembered = text[:4] + text[4 + forgotten : place + 1]
            assert len(remembered) == cached
            assert int(whole_logits(model, remembered)[-1].argmax()) == text[place + 1]


# the window of 128 is full after 69 tokens, its last place is the last of the row's storage
@pytest.mark.parametrize("until", [68, 69, 70])
def test_a_window_slides_also_in_the_step_in_which_another_row_ends(until):
    settings = Sampling(temperature=0, max_new_tokens=150, stop_ids=(), logprobs=True)
    asked = [
        Request(prompt(60), settings, slide=Slide(window=128)),
        Request(prompt(60, seed=1), replace(settings, max_new_tokens=until)),
        Request(prompt(60, seed=2), replace(settings, max_new_tokens=100)),
    ]
    engine = tiny_engine(rows=3)
    together = engine.generate(asked)
    for one, expected in zip(asked, together, strict=True):
        assert_as_promised(engine, tiny_engine(rows=3).generate([one])[0], expected)


def test_a_listener_that_raises_at_the_end_holds_no_place():
    def hear(event):
        if event.completion is not None:
            raise KeyboardInterrupt

    engine = tiny_engine(rows=1)
    request = Request(prompt(20), Sampling(temperature=0, max_new_tokens=4, stop_ids=()))
    generation = engine.submit(request, hear)
    while engine.counts["generated_tokens"] < 3:
        engine.step()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert generation.done
    assert engine.rows_in_use == 0
    assert engine.generate([request])[0] == generation.completions


def test_a_stretched_rope_is_that_of_the_reserved_length():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    engine = tiny_engine(context=64, rope=rope)
    one = prompt(100)
    (completion,) = engine.generate([Request(one, GREEDY)])[0]
    text = one + completion.tokens
    logits = whole_logits(engine.model, text)
    assert logits[99:-1].argmax(-1).tolist() == completion.tokens


def test_engine_sees_an_optimisers_step():
    engine = tiny_engine()
    request = Request(prompt(30), GREEDY)
    before = engine.generate([request])
    optimiser = torch.optim.SGD(engine.model.parameters(), lr=2.0)
    whole = engine.model(torch.tensor(request.prompt), Documents([30]))
    whole.square().mean().backward()
    optimiser.step()
    after = engine.generate([request])
    assert before != after
    logits = whole_logits(engine.model, request.prompt + after[0][0].tokens)
    assert logits[29:-1].argmax(-1).tolist() == after[0][0].tokens


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request([]), "prompt is empty"),
        (Request([10**6]), "vocabulary"),
        (Request([1], n=0), "at least 1"),
        (Request([1], adapter="x"), "adapter"),
        (Request([1], Sampling(logit_bias={10**6: 1.0})), "logit_bias"),
    ],
)
def test_impossible_requests_are_refused_in_a_sentence(request_, words):
    engine = tiny_engine()
    with pytest.raises(TriviumError, match=words):
        engine.submit(request_)
    assert not engine.busy
