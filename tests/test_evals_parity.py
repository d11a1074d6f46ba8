"""Log-likelihoods, bits and greedy answers against transformers on the same folder, branch by branch."""

import math

import pytest
import torch
import transformers
from test_model_families import HEAD, SHAPE, reference
from test_tokens import own

from trivium.evals.asking import Item, Subject
from trivium.evals.bits import bits_of
from trivium.evals.evaluate import evaluate
from trivium.evals.likelihood import Forest, Tree, log_likelihoods
from trivium.evals.settings import Settings
from trivium.kit.errors import TriviumError
from trivium.model.folder import load_model
from trivium.model.transformer import Transformer
from trivium.tokens.tokenizer import Tokenizer

LONG = {"max_position_embeddings": 256}
FAMILIES = {
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "llama": ("LlamaConfig", SHAPE | LONG),
    "mistral-window": ("MistralConfig", SHAPE | LONG | {"sliding_window": 7}),
    "qwen3": ("Qwen3Config", SHAPE | HEAD | LONG),
    "gemma2-capped": ("Gemma2Config", SHAPE | HEAD | LONG | {"sliding_window": 8}),
    "olmoe": ("OlmoeConfig", SHAPE | LONG | {"num_experts": 4, "num_experts_per_tok": 2}),
    "dynamic": ("LlamaConfig", SHAPE | {"max_position_embeddings": 16, "rope_parameters": {
        "rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
}  # fmt: skip


def folder_of(name, tmp_path):
    """A folder of transformers' model with our tokenizer, and that model."""
    tokenizer = own()
    kind, arguments = FAMILIES[name]
    theirs = reference(kind, arguments | {"vocab_size": tokenizer.vocabulary_size})
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    return theirs


def questions():
    """Texts that begin alike, wholly and in part, choices of one token and of several, and loners."""
    generator = torch.Generator().manual_seed(3)

    def some(count):
        return torch.randint(10, 120, (count,), generator=generator).tolist()

    shared = some(9)
    prompts, continuations = [], []
    for length in (3, 3, 1):
        prompt = shared + some(length)
        for count in (1, 1, 4, 2):
            prompts.append(prompt)
            continuations.append(some(count))
    prompts += [some(4), shared, shared]
    continuations += [some(5), some(1), shared[:3]]
    prompts.append(prompts[0])
    continuations.append(continuations[2][:2])
    return prompts, continuations


@torch.no_grad()
def theirs_of(model, prompt, continuation):
    ids = prompt + continuation
    # As lm-eval asks: the last token is predicted and never read.
    logits = model(torch.tensor([ids[:-1]])).logits[0].float()
    logprobs = logits.log_softmax(-1)[len(prompt) - 1 :]
    chosen = logprobs.gather(1, torch.tensor(continuation)[:, None])[:, 0]
    return chosen.tolist(), bool((logprobs.argmax(-1) == torch.tensor(continuation)).all())


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "dynamic"])
def test_log_likelihoods_equal_those_of_transformers(name, tmp_path):
    theirs = folder_of(name, tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    prompts, continuations = questions()
    with torch.no_grad():
        wanted = theirs(torch.tensor([prompts[0]])).logits[0, -1].argmax().item()
    prompts.append(prompts[0])
    continuations.append([wanted])
    found = log_likelihoods(model, prompts, continuations)
    for prompt, continuation, ours in zip(prompts, continuations, found, strict=True):
        logprobs, greedy = theirs_of(theirs, prompt, continuation)
        assert ours.logprobs == pytest.approx(logprobs, abs=1e-4)
        assert ours.greedy is greedy
    assert found[-1].greedy


def test_angles_that_grow_with_the_text_are_not_shared(tmp_path):
    theirs = folder_of("dynamic", tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    prompts = [list(range(20, 44))] * 3
    continuations = [[30, 31, 32], list(range(40, 54)), [30, 31, 33]]
    found = log_likelihoods(model, prompts, continuations)
    # Transformers keeps the angles of the longest text it has seen, so the short ones are asked first.
    for index in sorted(range(3), key=lambda index: len(continuations[index])):
        ours = found[index]
        logprobs, _ = theirs_of(theirs, prompts[index], continuations[index])
        assert ours.logprobs == pytest.approx(logprobs, abs=1e-4)


def test_a_shared_beginning_is_computed_once(tmp_path, monkeypatch):
    folder_of("qwen3", tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    seen = []
    forward = Transformer.forward

    def counted(self, tokens, context, **more):
        seen.append(len(tokens))
        return forward(self, tokens, context, **more)

    monkeypatch.setattr(Transformer, "forward", counted)
    prompt = list(range(20, 60))
    log_likelihoods(model, [prompt] * 4, [[1], [2], [3], [4]])
    assert seen == [40], "choices of one token need nothing beyond the question"
    seen.clear()
    log_likelihoods(model, [prompt] * 4, [[70, 71, 72], [70, 73, 74], [75, 76], [77]])
    assert sum(seen) == 40 + 2 + 1 + 1


def test_only_the_tokens_asked_for_meet_the_output_matrix(tmp_path, monkeypatch):
    folder_of("qwen3", tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    rows = []
    logits = Transformer.logits
    monkeypatch.setattr(
        Transformer, "logits", lambda self, hidden: (rows.append(len(hidden)), logits(self, hidden))[1]
    )
    log_likelihoods(model, [list(range(20, 60))] * 4, [[1], [2], [3], [4]])
    assert sum(rows) == 1


def test_a_branch_sees_its_ancestors_and_no_other_branch():
    tree = Tree()
    tree.grow((5, 6, 7), 0)
    tree.grow((5, 6, 8, 9), 2)
    assert tree.tokens == [5, 6, 7, 8, 9]
    assert tree.depths == [0, 1, 2, 2, 3]
    assert tree.forked
    assert tree.seen(6).int().tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0], [1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1],
    ]  # fmt: skip
    assert Forest([tree], torch.device("cpu")).positions.tolist() == [0, 1, 2, 2, 3]


def test_a_question_longer_than_the_window_is_an_error(tmp_path):
    folder_of("gpt2", tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    with pytest.raises(TriviumError, match="window is 256"):
        log_likelihoods(model, [[20] * 256], [[1, 2]])


def test_choices_and_greedy_answers_of_a_task_equal_those_of_transformers(tmp_path):
    theirs = folder_of("qwen3", tmp_path)
    model, tokenizer = load_model(tmp_path, dtype=torch.float32), Tokenizer.load(tmp_path)
    reading = transformers.AutoTokenizer.from_pretrained(tmp_path)
    result = evaluate(model, tokenizer, ["facts"], Settings(limit=12, style="continue")).tasks["facts"]
    for record in result.records:
        prompt = reading(record.asked, add_special_tokens=False).input_ids
        whole = reading(f"{record.asked} {record.expected}", add_special_tokens=False).input_ids
        assert whole[: len(prompt)] == prompt
        logprobs, _ = theirs_of(theirs, prompt, whole[len(prompt) :])
        assert record.scores["log-likelihood"] == pytest.approx(sum(logprobs), abs=1e-4)
        with torch.no_grad():
            ids = theirs.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=16, do_sample=False, eos_token_id=sorted(tokenizer.stop_ids), pad_token_id=0,
            )[0, len(prompt) :].tolist()  # fmt: skip
        ended = ids[-1] in tokenizer.stop_ids
        assert record.answers[0]["text"] == reading.decode(ids[:-1] if ended else ids)
        assert record.answers[0]["tokens"] == len(ids)


def test_bits_equal_those_of_transformers_also_for_texts_longer_than_the_window(tmp_path):
    theirs = folder_of("llama", tmp_path)
    subject = Subject(load_model(tmp_path, dtype=torch.float32), Tokenizer.load(tmp_path))
    texts = ["the river rises in the hills", "a", "the miller counts 12 sacks. " * 90]
    found = bits_of(subject, texts)
    for text, (bits, size) in zip(texts, found, strict=True):
        ids = subject.tokenizer.encode(text)
        expected = 0.0
        for start in range(0, len(ids) - 1, 255):
            piece = ids[start : start + 256]
            logprobs, _ = theirs_of(theirs, piece[:1], piece[1:])
            expected -= sum(logprobs) / math.log(2)
        assert bits == pytest.approx(expected, abs=1e-3 * max(len(ids) / 100, 1))
        assert size == len(text.encode()) - int(subject.tokenizer.byte_lengths()[ids[0]])
    assert len(subject.tokenizer.encode(texts[2])) > 256


def test_a_choice_that_grows_together_with_the_question_is_scored_from_where_they_part(tmp_path):
    folder_of("qwen3", tmp_path)
    subject = Subject(load_model(tmp_path, dtype=torch.float32), Tokenizer.load(tmp_path))
    prompt = "the river"
    item = Item("q", prompt, [], "", lambda text: {}, ("rises", "falls"))
    for choice in item.choices:
        before, after = subject._continued(item, "continue", choice)
        assert before + after == subject.tokenizer.encode(f"{prompt} {choice}")
        assert after
