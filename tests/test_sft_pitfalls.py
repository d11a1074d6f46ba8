"""What goes wrong in other fine-tuning tools (pitfalls A-J, U, X-Z of the survey), each with its test.

Each letter stands in the names of its tests here, but G, in test_sft.py (the report conserves every token),
test_sft_formats.py (no row without a learned token) and test_data_packing.py (packed once or counted).
Beside those here: A in test_sft_guards.py (the pull of the parent), E in test_model_documents.py, H in
test_tokens_chat.py and test_sft_formats.py, X and Y with adapters in test_lora_stages.py and test_lora.py,
where `test_the_quantize_stage_says_what_it_costs` reports what rounding costs, Z in test_tokens_chat.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small import RATES
from test_tokens import gpt2_like, llama3_like, own
from test_tokens_chat import LLAMA3, STOPS, TEMPLATES, said
from tuning import CHAT, encoded, learned_text, one, packed, save, small_model, tokenizer_of

from trivium.data.rows import collate
from trivium.generate.engine import Engine
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.kit.files import read_json
from trivium.kit.metrics import MetricsLog
from trivium.kit.progress import Progress
from trivium.learn.objectives.next_token import NextToken
from trivium.learn.settings import Training
from trivium.learn.trainer import Trainer
from trivium.model.attention import Documents
from trivium.model.folder import load_model
from trivium.model.lora import AdapterSettings, add_adapter, merged, selected
from trivium.model.quantize import quantise
from trivium.model.vocabulary import grow_vocabulary
from trivium.tokens.adopt import with_chat_template
from trivium.tokens.tokenizer import Tokenizer

FAMILIES = ["own", *TEMPLATES]
ALTERNATING = CHAT[1:]


class Fixed:
    """The same rows at every step."""

    def __init__(self, rows, steps=1):
        self.given, self.steps, self.fingerprint = rows, steps, "fixed"

    def rows(self, step):
        return self.given

    def metrics(self, step):
        return {}

    def state(self):
        return {}, {}

    def restore(self, json, tensors):
        pass


def trainer(folder, model, rows, *, steps=1, **options) -> Trainer:
    return Trainer(
        model=model, objective=NextToken(), batches=Fixed(rows, steps), folder=folder, rates=RATES,
        log=MetricsLog(folder / "metrics.jsonl"), progress=Progress("test"), settings=Training(**options),
    )  # fmt: skip


def ragged(tokenizer):
    rows = [{"prompt": "the river", "completion": " rises " * times} for times in (1, 9, 2, 14, 1, 3, 20, 5)]
    return [packed([example]) for example in encoded(rows, tokenizer)[0]]


def test_A_the_gradient_does_not_depend_on_how_a_batch_is_divided(tmp_path):
    """A: ragged rows in 1, 4 or 8 passes give the same logged loss, gradient and weights."""
    tokenizer = own()
    rows = ragged(tokenizer)
    results = []
    for micro in (1, 60, 10_000):
        model = small_model(tokenizer)
        sized = trainer(tmp_path / str(micro), model, rows, micro_batch=micro)
        measures, norm = sized._gradient(rows)
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        total, weight = measures["loss"]
        results.append((float(total) / float(weight), norm, gradient))
    for loss, norm, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        assert norm == pytest.approx(results[0][1], rel=1e-6)
        torch.testing.assert_close(gradient, results[0][2], atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_B_every_turn_of_the_assistant_ends_in_a_learned_stop(family):
    """B: the last supervised token of each turn is the stop token, and generation stops at it."""
    tokenizer = tokenizer_of(family)
    found = one({"messages": ALTERNATING}, tokenizer)
    stop = tokenizer.token_id(STOPS[family])
    edges = np.flatnonzero(np.diff(np.append(found.learned, False).astype(int)) == -1)
    assert len(edges) == 2
    assert [found.tokens[edge] for edge in edges] == [stop, stop]
    assert stop in tokenizer.stop_ids


def test_B_a_stop_that_is_also_the_padding_is_learned():
    """B: masks go by position, so a family whose padding is its end of text still learns to stop."""
    tokenizer = tokenizer_of("zephyr")
    same = Tokenizer(tokenizer._json, {**tokenizer.settings, "pad_token": "</s>"}, tokenizer.templates)
    assert same.pad_id == same.end_of_turn_id
    found = one({"messages": ALTERNATING}, same)
    assert found.tokens[found.learned].tolist().count(same.pad_id) == 2


@pytest.mark.slow
def test_B_C_X_a_trained_model_halts_and_answers_the_same_saved_and_in_transformers(tmp_path):
    """B, C, X: overfitted on four rows it stops by itself, here, after a round trip, and in transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = own()
    answers = {
        "the river?": "rises in the hills",
        "12?": "345 sacks",
        "the miller?": "counts",
        "l'été?": "漢字!",
    }
    chats = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        for asked, answer in answers.items()
    ]
    rows = [packed(encoded([{"messages": chat} for chat in chats], tokenizer)[0])]
    model = small_model(tokenizer)
    trainer(
        tmp_path / "run", model, rows, steps=60, optimiser="adamw", learning_rate={"decay": "constant"}
    ).run()
    folder = save(tmp_path / "model", model, tokenizer)
    assert tokenizer.pad_id not in read_json(folder / "generation_config.json")["eos_token_id"]

    requests = [
        Request(
            tokenizer.encode_chat(chat[:1], add_generation_prompt=True).ids, Sampling(0.0, max_new_tokens=64)
        )
        for chat in chats
    ]
    ours = [one for (one,) in Engine(model, tokenizer).generate(requests)]
    assert [one.text for one in ours] == list(answers.values())
    assert {one.finish_reason for one in ours} == {"stop"}
    loaded = Engine(load_model(folder), Tokenizer.load(folder))
    assert [one.tokens for (one,) in loaded.generate(requests)] == [one.tokens for one in ours]

    theirs, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for chat, request, answer in zip(chats, requests, ours, strict=True):
        prompt = words.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        assert list(prompt) == request.prompt
        generated = theirs.generate(torch.tensor([request.prompt]), max_new_tokens=64, do_sample=False)
        said_there = generated[0, len(request.prompt) :].tolist()
        stop = tokenizer.end_of_turn_id
        assert said_there[: said_there.index(stop)] == [token for token in answer.tokens if token != stop]
        assert answer.text == words.decode(said_there, skip_special_tokens=True)


def test_D_every_way_in_begins_with_one_beginning():
    """D: one beginning-of-text token, whether the template or the tokenizer writes it."""
    bare = llama3_like()
    tokenizer = Tokenizer(bare._json, bare.settings, {"default": LLAMA3})
    begin = tokenizer.beginning_id
    assert begin is not None
    for row in ({"text": "the river"}, {"prompt": "the", "completion": " river"}, {"messages": CHAT}):
        tokens = one(row, tokenizer).tokens.tolist()
        assert tokens.count(begin) == 1
        assert tokens[0] == begin


def logits_of(model, row):
    batch = collate([row])
    return model.logits(model(batch.tokens, Documents(batch.lengths)))


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_E_J_packed_behind_another_document_nothing_changes(positions):
    """E, J: logits and gradients of B do not know what A is or how far B stands from the row's start."""
    tokenizer = own()
    changes = {"positions": positions, **({"rope": {}} if positions == "learned" else {})}
    model = small_model(tokenizer, **changes)
    if positions == "learned":
        torch.nn.init.normal_(model.position_embedding.weight, std=0.2)
    a, other = (one({"text": text}, tokenizer) for text in ("the river rises", "counts 12 or 3"))
    b = one({"messages": CHAT}, tokenizer)
    length = len(b.tokens)
    alone = logits_of(model, packed([b]))
    behind = [logits_of(model, packed([first, b]))[-length:] for first in (a, other)]
    torch.testing.assert_close(behind[0], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(behind[1], alone, atol=1e-5, rtol=0)
    changed = packed([a, b])
    changed.tokens[1] = (changed.tokens[1] + 7) % 300
    assert torch.equal(logits_of(model, changed)[-length:], behind[0])

    def gradient(row):
        model.zero_grad()
        # Only B's loss: whatever A is must not reach the weights through it.
        row.weights[: len(row) - length] = 0
        NextToken().loss(model, collate([row])).sum.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    first, second = gradient(packed([a, b])), gradient(changed)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_F_nothing_is_predicted_across_a_border():
    """F: the loss of a packed row is the sum of its documents' losses."""
    tokenizer = own()
    model = small_model(tokenizer)
    found = [one(row, tokenizer) for row in ({"text": "the river rises"}, {"messages": CHAT}, {"text": "12"})]
    row = packed(found)
    whole = NextToken().loss(model, collate([row])).sum.item()
    parts = sum(NextToken().loss(model, collate([packed([one])])).sum.item() for one in found)
    assert whole == pytest.approx(parts, rel=1e-6)
    ends = np.cumsum(row.lengths) - 1
    assert (row.targets[ends] == -1).all()
    assert (row.weights[ends] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
@given(
    answers=st.lists(
        st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20), min_size=1, max_size=3
    ),
    asked=st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20),
)
@settings(max_examples=25, deadline=None)
def test_H_what_is_learned_is_what_the_assistant_said(family, answers, asked):
    """H: with markers or without, over turns, Unicode and texts that look like control tokens."""
    tokenizer = tokenizer_of(family)
    messages = []
    for answer in answers:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    expected = "".join(
        said(family, answer, place == len(answers) - 1) for place, answer in enumerate(answers)
    )
    whole = one({"messages": messages}, tokenizer, context=2048)
    assert learned_text(whole, tokenizer) == expected


@given(
    st.text(st.sampled_from("the rivs12 .é漢"), max_size=12),
    st.text(st.sampled_from("the rivs12 .é漢"), max_size=12),
)
@settings(max_examples=200, deadline=None)
def test_I_a_prompt_is_tokenised_as_whoever_asks_will(prompt, completion):
    """I: before the completion stand the prompt's own tokens, and all of the completion is learned."""
    assume(prompt or completion)
    tokenizer = own()
    found = one({"prompt": prompt, "completion": completion}, tokenizer)
    before = tokenizer.encode(prompt)
    assert found.tokens[: len(before)].tolist() == before
    assert not found.learned[: len(before)].any()
    assert found.learned[len(before) :].all()
    assert tokenizer.decode(found.tokens[len(before) :].tolist()) == completion


def test_I_only_a_token_across_the_border_makes_it_differ_from_the_joint_tokens():
    tokenizer = own()
    joint = tokenizer.encode("the river")
    assert one({"prompt": "the", "completion": " river"}, tokenizer).tokens.tolist()[:-1] == joint
    apart = one({"prompt": "the r", "completion": "iver"}, tokenizer).tokens.tolist()[:-1]
    assert apart == [*tokenizer.encode("the r"), *tokenizer.encode("iver")] != joint


def test_U_the_system_prompt_stays_when_a_conversation_is_cut():
    """U: whichever end is cut, the system prompt and the beginning of the text stay."""
    tokenizer = tokenizer_of("llama3")
    turns = [
        message
        for turn in range(5)
        for message in ({"role": "user", "content": f"{turn}?"}, {"role": "assistant", "content": f"{turn}."})
    ]
    row = {"messages": [{"role": "system", "content": "You count."}, *turns]}
    whole = one(row, tokenizer)
    for learned in ("assistant", "last"):
        cut = one(row, tokenizer, context=len(whole.tokens) - 3, learned=learned)
        assert len(cut.tokens) < len(whole.tokens)
        assert "You count." in tokenizer.decode(cut.tokens.tolist())
        assert cut.tokens[0] == tokenizer.token_id("<s>")


@pytest.mark.parametrize("tied", [False, True])
def test_Y_a_vocabulary_grown_for_the_template_leaves_old_logits_alone(tied):
    """Y: two marks more in the vocabulary, tied or not, and the old tokens' logits are the same."""
    before = gpt2_like()
    after = with_chat_template(before)
    assert after.end_of_turn_id == after.token_id("<|im_end|>") == before.vocabulary_size + 1
    model = small_model(before, tied=tied)
    row = packed(encoded([{"text": "the river rises"}], before)[0])
    old = logits_of(model, row)
    grow_vocabulary(model, before, after)
    new = logits_of(model, row)
    assert new.shape[1] == before.vocabulary_size + 2
    torch.testing.assert_close(new[:, : old.shape[1]], old, atol=1e-4, rtol=0)
    assert (model.head is None) == tied
    assert with_chat_template(after) is after


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "pissa"])
def test_Y_merged_is_what_the_adapter_was(tmp_path, kind, tied):
    """Y: with tied embeddings or not, in a grown vocabulary whose rows are trained along: within 1e-4."""
    before = gpt2_like()
    after = with_chat_template(before)
    model = small_model(before, tied=tied)
    grow_vocabulary(model, before, after)
    add_adapter(model, AdapterSettings(kind=kind, rank=4, train=["embedding", "head"]), seed=1)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    row = packed(encoded([{"messages": ALTERNATING}], after)[0])
    with selected(model, None):
        off = logits_of(model, row)
    acting = logits_of(model, row)
    assert (acting - off).abs().max() > 0.1
    with merged(model):
        assert (logits_of(model, row) - acting).abs().max() < 1e-4
        folder = save(tmp_path / "merged", model, after)
    assert (logits_of(load_model(folder), row) - acting).abs().max() < 1e-4
    assert torch.equal(logits_of(model, row), acting)


def test_Y_an_adapter_on_rounded_matrices_merges_into_what_it_was(tmp_path):
    """Y: QLoRA's merged model keeps the rounding it was trained with; what rounding costs is reported."""
    tokenizer = own()
    model = small_model(tokenizer, width=64, head_width=32, inner_width=64)
    row = packed(encoded([{"messages": ALTERNATING}], tokenizer)[0])
    plain = logits_of(model, row)
    quantise(model, "int4")
    add_adapter(model, AdapterSettings(rank=4, base="int4"), seed=1)
    rounded = logits_of(model, row)
    assert (rounded - plain).abs().max() > 1e-2
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05
    acting = logits_of(model, row)
    with merged(model):
        assert (logits_of(model, row) - acting).abs().max() < 1e-3 * acting.abs().max()
        folder = save(tmp_path / "merged", model, tokenizer)
    assert (logits_of(load_model(folder), row) - acting).abs().max() < 1e-3 * acting.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_Z_what_a_row_says_never_becomes_a_control_token(family):
    """Z: control strings in prompts, answers and tools are letters, of which no control token comes."""
    tokenizer = tokenizer_of(family)
    clean = one({"messages": ALTERNATING}, tokenizer)
    count = sum(token in tokenizer.control_ids for token in clean.tokens)
    for mark in ("<|im_end|>", "<|im_start|>", "</s>", "<s>", "<|eot_id|>", "<end_of_turn>"):
        typed = [{**message, "content": message["content"] + f" {mark} "} for message in ALTERNATING]
        found = one({"messages": typed}, tokenizer)
        assert sum(token in tokenizer.control_ids for token in found.tokens) == count
    stop = tokenizer.token(tokenizer.end_of_reply_id)
    for row in ({"text": f"a {stop} b"}, {"prompt": f"a {stop}", "completion": f"b {stop} c"}):
        tokens = one(row, tokenizer).tokens
        assert sum(token in tokenizer.control_ids for token in tokens) == 1
    assert (
        one({"text": f"a b{stop}"}, tokenizer).tokens.tolist()
        == one({"text": "a b"}, tokenizer).tokens.tolist()
    )
