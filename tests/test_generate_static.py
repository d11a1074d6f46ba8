"""Decode steps of constant shape: the same text as through the growing context, on static addresses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from generating import assert_close_enough, prompt, tiny_model, tokenizer

from trivium.generate import scheduler, static_decode
from trivium.generate.engine import Engine
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.generate.static_decode import Captured, GraphMemory, bucket_of, reach_bucket
from trivium.model.arithmetic import counted, uncounted
from trivium.model.config import ExpertsConfig
from trivium.model.lora import AdapterSettings, add_adapter
from trivium.model.quantize import quantise
from trivium.model.transformer import Transformer

GREEDY = Sampling(temperature=0, max_new_tokens=24, stop_ids=(), logprobs=True)
DRAWN = Sampling(temperature=0.8, top_p=0.9, max_new_tokens=30, stop_ids=(), logprobs=True, seed=5)

DESIGNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "windows": {"windows": (20, None, 20)},
    "soft caps": {"attention_soft_cap": 5.0, "final_soft_cap": 10.0},
    "one key head for each query": {"key_value_heads": 4},
    "gemma": {"embedding_scale": 8.0, "norm_plus_one": True, "tied": True},
    "gpt-2": {"positions": "learned", "norm": "layer", "query_key_norm": "none", "rope": {}, "gated": False},
    "granite": {"residual_scale": 0.7, "logit_divisor": 2.0},
    "yarn": {"rope": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
}


def both(model: Transformer, **settings: Any) -> tuple[Engine, Engine]:
    """An engine as it is on a CPU, and one whose steps are static."""
    made = [Engine(model, tokenizer(), seed=0, static_steps=one, **settings) for one in (False, True)]
    return made[0], made[1]


def mixed_requests(sampling: Sampling = GREEDY) -> list[Request]:
    """Short and long prompts, two that begin alike, several samples of one."""
    shared = prompt(90, seed=7)
    prompts = [prompt(length, seed=length) for length in (1, 5, 40, 127, 180, 300)]
    prompts += [shared + prompt(3, seed=8), shared + prompt(20, seed=9)]
    return [Request(one, sampling, n=1 + index % 2) for index, one in enumerate(prompts)]


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "through its modules"])
@pytest.mark.parametrize("design", DESIGNS)
def test_static_steps_give_the_same_text(
    design: str, fused: bool, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:
        monkeypatch.setattr("trivium.generate.forward.covers", lambda model: False)
    plain, static = both(tiny_model(**DESIGNS[design]), max_rows=6)
    expected, found = plain.generate(mixed_requests(sampling)), static.generate(mixed_requests(sampling))
    assert static.scheduler.static is not None
    assert static.scheduler.static.captures > 0
    for one, other in zip(found, expected, strict=True):
        assert_close_enough(one, other)
    assert static.counts["copied_tokens"] == plain.counts["copied_tokens"] > 0


def test_requests_that_come_while_others_decode() -> None:
    answers = []
    for engine in both(tiny_model(), max_rows=4):
        handles = []
        for index, request in enumerate(mixed_requests()):
            handles.append(engine.submit(request))
            for _ in range(index):
                engine.step()
        while engine.step():
            pass
        answers.append([one for handle in handles for one in handle.completions])
    assert_close_enough(*answers)


def test_padding_writes_to_no_row_of_the_cache() -> None:
    """Rows that are kept, or being prefilled, lie behind those in decode, where padding is computed."""
    plain, static = both(tiny_model(), max_rows=8, prefix_cache_size=1)
    answers = []
    for engine in (plain, static):
        engine.generate([Request(prompt(40), GREEDY)])
        # Three rows are computed as four, and the fourth of the pool is the one that is kept
        with engine.keeping_prefixes(4):
            engine.generate([Request(prompt(40, seed=seed), GREEDY) for seed in (1, 2, 3)])
            answers.append(engine.generate([Request(prompt(40) + prompt(9, seed=9), GREEDY)])[0])
    assert_close_enough(*answers)
    assert static.counts["copied_tokens"] == plain.counts["copied_tokens"] > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"experts": ExpertsConfig(4, 2, 32)},
        {"rope": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ],
)
def test_models_that_look_at_numbers_on_the_way_keep_the_growing_context(changes: dict[str, Any]) -> None:
    engine = Engine(tiny_model(**changes), tokenizer(), static_steps=True)
    assert engine.scheduler.static is None


def test_a_single_matrix_that_rounds_its_rows_keeps_the_growing_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model()
    rounding = model.layers[1].mlp.up.weight
    monkeypatch.setattr(static_decode, "rounds_rows", lambda weight: weight is rounding)
    assert not static_decode.has_static_steps(model)
    monkeypatch.setattr(static_decode, "rounds_rows", lambda weight: False)
    assert static_decode.has_static_steps(model)


def test_drafts_and_several_adapters_keep_the_growing_context() -> None:
    model = tiny_model()
    assert Engine(model, tokenizer(), static_steps=True, draft="lookup").scheduler.static is None
    for name in ("one", "other"):
        add_adapter(model, AdapterSettings(rank=2), name=name)
    assert Engine(model, tokenizer(), static_steps=True).scheduler.static is None


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_lone_adapter_is_part_of_the_steps(kind: Any) -> None:
    model = tiny_model()
    add_adapter(model, AdapterSettings(rank=2, kind=kind))
    plain, static = both(model)
    assert static.scheduler.static is not None
    for one, other in zip(static.generate(mixed_requests()), plain.generate(mixed_requests()), strict=True):
        assert_close_enough(one, other)


def test_buckets() -> None:
    assert [bucket_of(rows, 12) for rows in (1, 2, 3, 5, 8, 9, 12)] == [1, 2, 4, 8, 8, 12, 12]
    assert [reach_bucket(length, 1024) for length in (1, 256, 257, 1024)] == [256, 256, 512, 1024]
    assert reach_bucket(100, 128) == 128


def operations_of(engine: Engine) -> float:
    with counted() as tally:
        engine.generate([Request(prompt(20, seed=seed), GREEDY) for seed in range(4)])
    return tally.operations


def test_a_step_counts_its_arithmetic_once() -> None:
    plain, static = both(tiny_model(), max_rows=4)
    # Attention reads a whole bucket of places
    assert operations_of(static) == pytest.approx(operations_of(plain), rel=0.2)


class Graph:
    """Stands for a CUDA graph: remembers what ran while it was recorded, and runs it on replay."""

    recording: Graph | None = None
    made: list[Graph] = []

    def __init__(self) -> None:
        self.replays = 0
        self.calls: list[tuple[Any, Any]] = []
        Graph.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        with uncounted():  # a replay runs no Python
            for function, output in self.calls:
                output.copy_(function())


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    """The parts of torch.cuda that a capture uses, without a GPU."""

    @contextmanager
    def recorded(graph: Graph, **options: Any) -> Iterator[None]:
        assert options["capture_error_mode"] == "thread_local"
        Graph.recording = graph
        try:
            yield
        finally:
            Graph.recording = None

    @contextmanager
    def on(stream: Any) -> Iterator[None]:
        yield

    def stream(device: Any = None) -> Any:
        return SimpleNamespace(wait_stream=lambda other: None)

    for name, value in {
        "CUDAGraph": Graph, "graph": recorded, "stream": on, "Stream": stream, "current_stream": stream,
        "set_stream": lambda stream: None, "graph_pool_handle": lambda: (0, 1),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    call = Captured.__call__

    def as_on_a_gpu(self: Captured) -> Any:
        if self._plain and not hasattr(self, "refused"):
            self._plain = False
            function = self._function

            def traced() -> Any:
                output = function()
                if Graph.recording is not None:
                    output = output.clone()
                    Graph.recording.calls.append((function, output))
                return output

            self._function = traced
        return call(self)

    monkeypatch.setattr(Captured, "__call__", as_on_a_gpu)
    Graph.made = []
    return Graph


def test_each_bucket_is_captured_once_and_replayed_from_then_on(graphs: type[Graph]) -> None:
    plain, static = both(tiny_model(), max_rows=4)
    requests = [Request(prompt(20, seed=seed), GREEDY) for seed in range(4)]
    for one, other in zip(static.generate(requests), plain.generate(requests), strict=True):
        assert_close_enough(one, other)
    # All four start and end together: one pool, one number of rows, one reach
    assert [graph.replays for graph in graphs.made] == [GREEDY.max_new_tokens]
    static.generate(requests)
    assert [graph.replays for graph in graphs.made] == [2 * GREEDY.max_new_tokens]
    static.generate(requests[:1])
    assert [graph.replays for graph in graphs.made] == [2 * GREEDY.max_new_tokens, GREEDY.max_new_tokens]


def test_a_replay_counts_what_its_capture_counted(graphs: type[Graph]) -> None:
    model = tiny_model()
    replayed = operations_of(Engine(model, tokenizer(), max_rows=4, static_steps=True))
    assert graphs.made
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Captured, "__call__", lambda self: self._function())
        assert replayed == operations_of(Engine(model, tokenizer(), max_rows=4, static_steps=True))


def test_the_addresses_of_a_step_do_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[tuple[int, int], set[tuple[int, ...]]] = {}
    decode = static_decode.StaticContext.mask

    def noted(self: static_decode.StaticContext) -> None:
        where = {self.positions.data_ptr(), self._places.data_ptr(), *(one.data_ptr() for one in self._flat)}
        seen.setdefault((self.tokens, self.reach), set()).add(tuple(sorted(where)))
        decode(self)

    monkeypatch.setattr(static_decode.StaticContext, "mask", noted)
    engine = Engine(tiny_model(), tokenizer(), max_rows=4, static_steps=True)
    requests = [Request(prompt(20, seed=seed), GREEDY) for seed in range(4)]
    engine.generate(requests)
    engine.generate(requests[:2])
    engine.generate(requests)
    assert {key: len(addresses) for key, addresses in seen.items()} == {(4, 128): 1, (2, 128): 1}


def test_weights_written_in_place_keep_the_graphs_and_moved_ones_do_not(graphs: type[Graph]) -> None:
    model = tiny_model()
    engine = Engine(model, tokenizer(), max_rows=2, static_steps=True)
    request = Request(prompt(20), GREEDY)
    engine.generate([request])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    engine.refresh()
    changed = engine.generate([request])
    assert len(graphs.made) == 1
    fresh = Engine(copy.deepcopy(model), tokenizer(), max_rows=2).generate([request])
    assert_close_enough(changed[0], fresh[0])
    model.embedding.weight.data = model.embedding.weight.data.clone()
    engine.generate([request])
    assert len(graphs.made) == 2


def test_what_cannot_be_captured_is_called(
    graphs: type[Graph], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    @contextmanager
    def refuses(graph: Graph, **options: Any) -> Iterator[None]:
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuses)
    step = Captured(lambda: torch.ones(2), torch.device("cuda"), GraphMemory(), "a step")
    step.refused = True  # type: ignore[attr-defined]
    assert step().tolist() == [1, 1]
    assert step().tolist() == [1, 1]
    assert caplog.text.count("without a CUDA graph") == 1


def with_ends(engine: Engine) -> list[Request]:
    """Requests that end at a token which their own greedy text has somewhere in the middle."""
    found = []
    for request, (answer, *_) in zip(mixed_requests(), engine.generate(mixed_requests()), strict=True):
        stop = answer.tokens[len(request.prompt) % 17]
        sampling = Sampling(temperature=0, max_new_tokens=24, stop_ids=(stop,), logprobs=True)
        found.append(Request(request.prompt, sampling, n=request.n))
    return found


@pytest.mark.parametrize("rows", [1, 3, 12])
def test_rows_that_end_are_read_a_step_late_and_lose_the_surplus_token(rows: int) -> None:
    plain, static = both(tiny_model(), max_rows=rows)
    requests = with_ends(plain)
    before = plain.counts["generated_tokens"]
    expected, found = plain.generate(requests), static.generate(requests)
    for one, other in zip(found, expected, strict=True):
        assert_close_enough(one, other)
    assert static.counts["generated_tokens"] == plain.counts["generated_tokens"] - before
    assert static.rows_in_use == 0


def test_no_step_waits_for_a_row_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_model(), tokenizer(), max_rows=4, static_steps=True)
    long = [Request(prompt(20 + seed, seed=seed), replace(GREEDY, max_new_tokens=99)) for seed in range(3)]
    said = {token for (answer,) in engine.generate(long) for token in answer.tokens}
    never = min(set(range(tokenizer().vocabulary_size)) - said)
    late: list[int] = []

    class Noted(static_decode.EndedRows):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.step = engine.counts["steps"]

        def wait(self) -> Any:
            late.append(engine.counts["steps"] - self.step)
            return super().wait()

    monkeypatch.setattr(scheduler, "EndedRows", Noted)
    monkeypatch.setattr(engine.scheduler, "_ended", lambda *_: pytest.fail("read at once"))
    for request in long:
        engine.submit(Request(request.prompt, replace(request.sampling, stop_ids=(never,))))
    for _ in range(20):
        engine.step()
    # Each step's ends are read when the next has been launched
    assert len(late) > 10
    assert set(late) == {1}


FILTERS = [
    {"temperature": 1.0},
    {"top_k": 5},
    {"top_p": 0.7},
    {"top_p": 0.999},
    {"top_k": 90, "top_p": 0.6, "min_p": 0.01},
    {"typical_p": 0.5},
    {"temperature": 0.3, "repetition_penalty": 1.3, "min_new_tokens": 4},
]


def test_filters_that_do_not_wait_draw_the_same() -> None:
    requests = [
        Request(prompt(20 + index, seed=index), Sampling(max_new_tokens=20, logprobs=True, seed=index, **one))
        for index, one in enumerate(FILTERS)
    ]
    plain, static = both(tiny_model(), max_rows=8)
    for engine in (plain, static):
        assert engine.scheduler.sampler.waits == (engine is plain)
    for some in (requests, *([one] for one in requests)):
        for one, other in zip(static.generate(some), plain.generate(some), strict=True):
            assert_close_enough(one, other)


def test_what_had_ended_before_a_step_failed_is_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, static = both(tiny_model(), max_rows=12)
    (request,) = with_ends(plain)[2:3]
    expected = plain.generate([request])
    decode, left = static_decode.StaticRows.decode, iter(expected[0][0].tokens)

    def as_far_as_needed(self: static_decode.StaticRows, tokens: torch.Tensor) -> torch.Tensor:
        if next(left, None) is None:
            raise RuntimeError("out of memory")
        return decode(self, tokens)

    monkeypatch.setattr(static_decode.StaticRows, "decode", as_far_as_needed)
    assert_close_enough(static.generate([request])[0], expected[0])


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("fused", [True, False], ids=["packed", "through its modules"])
def test_quantised_weights_are_decoded_in_constant_shapes(
    kind: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(inner_width=128)
    quantise(model, kind)
    if not fused:
        monkeypatch.setattr("trivium.generate.forward.covers", lambda model: False)
    plain, static = both(model, max_rows=4)
    assert static.scheduler.static is not None
    requests = [Request(prompt(20, seed=seed), GREEDY) for seed in range(3)]
    for one, other in zip(static.generate(requests), plain.generate(requests), strict=True):
        assert one[0].tokens == other[0].tokens


def test_all_steps_write_their_scores_to_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trivium.generate.forward.covers", lambda model: False)
    engine = Engine(tiny_model(), tokenizer(), max_rows=4, static_steps=True)
    seen: set[int] = set()
    call = Captured.__call__

    def noted(self: Captured) -> torch.Tensor:
        seen.add((scores := call(self)).data_ptr())
        return scores

    monkeypatch.setattr(Captured, "__call__", noted)
    engine.generate(mixed_requests())
    static = engine.scheduler.static
    assert static is not None
    assert static.captures > 3
    assert len(seen) == 1


def test_rounded_copies_of_trained_weights_keep_their_graphs(graphs: type[Graph]) -> None:
    """In RL the engine's bfloat16 copy is written in place after each step, an adapter merged into it."""
    model = tiny_model()
    add_adapter(model, AdapterSettings(rank=2))
    engine = Engine(model, tokenizer(), max_rows=2, dtype=torch.bfloat16, static_steps=True)
    request = Request(prompt(20), GREEDY)
    before = engine.generate([request])[0][0].tokens
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.ones_like(parameter))
    engine.refresh()
    assert engine.generate([request])[0][0].tokens != before
    assert len(graphs.made) == 1
