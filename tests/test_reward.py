"""Reward models: stored as transformers stores them, measured honestly, and usable as a scorer."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from judging import PAIRS, batches_of, pairs
from test_model_families import FAMILIES
from tuning import own, save, small_model, write_rows

import trivium
from trivium.data.counted import CountedSource
from trivium.data.preferences import PreferenceBatches
from trivium.data.rows import collate
from trivium.evals.pairwise import calibration, length_bias, pairwise
from trivium.grade.learned import LearnedScorer
from trivium.grade.rewards import combine
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json
from trivium.learn.objectives.reward import BradleyTerry, bradley_terry, pair_scores
from trivium.model.folder import load_model
from trivium.model.scalar_head import (
    ScalarHead,
    load_reward_model,
    save_reward_model,
    scores_at_ends,
    without_language_head,
)

LENGTHS = (17, 5, 1, 33)


def reward_model(seed: int = 0, **changes):
    model = without_language_head(small_model(own(), seed, **changes))
    return model, ScalarHead(model.config.width, seed=seed)


def padded(tokens: torch.Tensor, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and their mask, as transformers wants them."""
    parts = tokens.split(LENGTHS)
    ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=pad)
    mask = torch.arange(ids.shape[1])[None] < torch.tensor(LENGTHS)[:, None]
    return ids, mask.long()


# transformers has no sequence classifier of Granite and OLMoE, and of LongRoPE it takes the factors that
# suit the longest row for all rows of a batch.
SCORED = [name for name in FAMILIES if not name.startswith(("granite", "olmoe")) and name != "phi3-longrope"]


@pytest.mark.quick_cases(7)
@pytest.mark.parametrize("name", SCORED)
def test_scores_are_those_of_transformers_in_both_directions(name, tmp_path):
    config_class, arguments = FAMILIES[name]
    config = getattr(transformers, config_class)(**arguments, num_labels=1)
    config.pad_token_id = 0
    torch.manual_seed(3)
    theirs = transformers.AutoModelForSequenceClassification.from_config(config).eval().float()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = torch.randint(3, 61, (sum(LENGTHS),))
    ids, mask = padded(tokens, 0)
    expected = theirs(ids, attention_mask=mask).logits[:, 0]
    model, head = load_reward_model(tmp_path / "theirs")
    torch.testing.assert_close(scores_at_ends(model, head, tokens, LENGTHS), expected, atol=5e-5, rtol=1e-4)
    save_reward_model(model, head, tmp_path / "ours", pad_id=0)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert type(again) is type(theirs)
    assert again.config.num_labels == 1
    for (key, one), (_, other) in zip(
        sorted(theirs.state_dict().items()), sorted(again.state_dict().items()), strict=True
    ):
        assert torch.equal(one, other), key
    torch.testing.assert_close(again(ids, attention_mask=mask).logits[:, 0], expected, atol=1e-6, rtol=0)


def test_sharded_reward_models_are_read_and_written(tmp_path, monkeypatch):
    model, head = reward_model()
    import trivium.model.scalar_head as place

    whole = place.save_model
    monkeypatch.setattr(place, "save_model", lambda *one, **more: whole(*one, **more, shard_bytes=20_000))
    save_reward_model(model, head, tmp_path, pad_id=own().pad_id)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    again, _ = load_reward_model(tmp_path)
    assert torch.equal(again.embedding.weight, model.embedding.weight)


def test_what_is_no_reward_model_is_refused(tmp_path):
    save(tmp_path / "words", small_model(own()), own())
    with pytest.raises(TriviumError, match="no reward model"):
        load_reward_model(tmp_path / "words")
    model, head = reward_model()
    save_reward_model(model, head, tmp_path / "reward", pad_id=1)
    with pytest.raises(TriviumError, match=r"score\.weight"):
        load_model(tmp_path / "reward")
    (tmp_path / "reward" / "model-score.safetensors").unlink()
    with pytest.raises(TriviumError, match="missing"):
        load_reward_model(tmp_path / "reward")


def test_pitfall_b_the_place_is_read_and_not_the_padding_id():
    """A text that ends in the padding token is scored at its end all the same."""
    model, head = reward_model()
    pad = own().pad_id
    tokens = torch.tensor([5, 6, 7, pad])
    at_the_end = head(model(tokens, trivium_documents((4,))))[-1]
    torch.testing.assert_close(scores_at_ends(model, head, tokens, (4,))[0], at_the_end)


def trivium_documents(lengths):
    from trivium.model.attention import Documents

    return Documents(lengths)


def test_the_loss_is_bradley_terrys():
    chosen, rejected, margin = (
        np.array([1.0, -0.3, 4.0]),
        np.array([0.2, 0.5, -3.0]),
        np.array([0.0, 1.0, 0.5]),
    )
    expected = np.log1p(np.exp(-(chosen - rejected - margin))) + 0.01 * (chosen + rejected) ** 2
    found = bradley_terry(*(torch.tensor(one) for one in (chosen, rejected, margin)), 0.01)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    even = bradley_terry(torch.zeros(1), torch.zeros(1))
    torch.testing.assert_close(even, torch.tensor([2.0]).log())


def gradients(rows_of, share: bool) -> dict[str, torch.Tensor]:
    model, head = reward_model()
    objective = BradleyTerry(head, centring=0.1)
    batches = batches_of(pairs(), {"sigmoid": 1.0}, share=share)
    rows = batches.rows(0)
    weight = objective.weight(rows)
    for some in rows_of(rows):
        (objective.loss(model, collate(some)).sum / weight).backward()
    named = {**dict(model.named_parameters()), **{f"extra.{n}": p for n, p in head.named_parameters()}}
    return {name: one.grad for name, one in named.items() if one.grad is not None}


@pytest.mark.parametrize("share", [True, False])
def test_pitfall_a_the_gradient_does_not_depend_on_the_division_into_passes(share):
    whole = gradients(lambda rows: [rows], share)
    assert len(whole) > 10
    for division in (lambda rows: [[row] for row in rows], lambda rows: [rows[:2], rows[2:]]):
        found = gradients(division, share)
        for name, one in whole.items():
            torch.testing.assert_close(found[name], one, atol=1e-6, rtol=1e-5)


def test_a_shared_prompt_gives_the_same_rewards():
    model, head = reward_model()
    scores = []
    for share in (True, False):
        batches = PreferenceBatches([CountedSource("rows", pairs())], batch=5, seed=0, steps=1, share=share)
        rows = [batches.row([(0, place)]) for place in range(5)]
        scores.append(torch.stack(pair_scores(model, head, collate(rows))))
    torch.testing.assert_close(*scores, atol=1e-6, rtol=1e-5)


def test_a_reward_is_learned_measured_stored_and_used_from_a_recipe(tmp_path):
    save(tmp_path / "base", small_model(own()), own())
    write_rows(tmp_path / "pairs.jsonl", PAIRS * 2)
    (tmp_path / "rm.yaml").write_text(
        "name: rm\nstages:\n"
        "  rm: {kind: reward, from: ./base, data: ./pairs.jsonl, test: ./pairs.jsonl, pairs: 5, steps: 30, "
        "learning_rate: 3e-3, centring: 0.01}\n"
        "  more: {kind: reward, from: rm, data: ./pairs.jsonl, test: ./pairs.jsonl, pairs: 5, steps: 2}\n"
        "  asked: {kind: evaluate, from: ./base, on: [{task: own, data: ./pairs.jsonl, scorer: learned, "
        "model: rm, limit: 3, most: 8}]}\n"
    )
    run = trivium.run(tmp_path / "rm.yaml", runs=tmp_path / "runs")
    rows = [row for row in run["rm"].metrics if "step" in row]
    assert {"loss", "accuracy", "margin", "mean_reward", "rewards/chosen"} <= set(rows[0])
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    unseen = run["rm"].summary["test"]
    assert unseen["accuracy"]["value"] == 1.0
    assert unseen["accuracy"]["low"] < 1.0
    assert {"calibration", "length", "calibration_error"} <= set(unseen)
    folder = run["rm"].folder / "model"
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = PAIRS[0]["prompt"] + PAIRS[0]["chosen"]
    ids = torch.tensor([[*tokenizer(text)["input_ids"], own().end_of_reply_id]])
    reward = combine([{"name": "learned", "model": str(folder), "called": "rm"}])
    (values,) = reward.parts(prompts=[PAIRS[0]["prompt"]], completions=[PAIRS[0]["chosen"]])
    assert reward.names == ["rm"]
    assert values[0] == pytest.approx(theirs(ids).logits.item(), abs=1e-4)
    assert run["more"].metrics[-1]["loss"] < rows[-1]["loss"] + 0.05
    answers = (run["asked"].folder / "report" / "results.answers.jsonl").read_text().splitlines()
    one = json.loads(answers[0])
    (value,) = LearnedScorer(folder).many(
        [[{"role": "user", "content": PAIRS[0]["prompt"]}]], [one["answers"][0]["answer"]]
    )
    assert one["scores"]["accuracy"] == pytest.approx(value.value, abs=1e-5)


def test_a_scorer_reads_conversations_and_names_what_is_too_long(tmp_path):
    model, head = reward_model(context=32)
    save_reward_model(model, head, tmp_path, pad_id=own().pad_id)
    own().save(tmp_path)
    scorer = LearnedScorer(tmp_path)
    asked = [{"role": "user", "content": "12?"}]
    one = scorer("345", prompt=asked)
    both = scorer.many([asked, "the river"], [[{"role": "assistant", "content": "345"}], " rises"])
    assert both[0].value == pytest.approx(one.value, abs=1e-6)
    ids = own().encode_chat([*asked, {"role": "assistant", "content": "345"}]).ids
    expected = scores_at_ends(model, head, torch.tensor(ids), (len(ids),))
    assert one.value == pytest.approx(expected[0].item(), abs=1e-5)
    assert scorer("345 " * 40, prompt=asked).status == "fault"
    with pytest.raises(TriviumError, match="prompt"):
        scorer("345")


def test_length_bias_and_calibration_are_seen():
    random = np.random.default_rng(0)
    lengths = random.integers(5, 50, (2, 400))
    quality = random.normal(size=(2, 400))
    chosen, rejected = np.where(quality[0] > quality[1], 0, 1), np.where(quality[0] > quality[1], 1, 0)
    columns = np.arange(400)
    honest = [quality[chosen, columns], quality[rejected, columns]]
    biased = [0.1 * lengths[chosen, columns], 0.1 * lengths[rejected, columns]]
    sizes = [lengths[chosen, columns], lengths[rejected, columns]]
    found = length_bias(*biased, *sizes)
    assert found["correlation"]["low"] > 0.9
    assert found["accuracy_where_better_is_shorter"]["value"] == 0.0
    assert found["accuracy_where_better_is_longer"]["value"] == 1.0
    assert abs(length_bias(*honest, *sizes)["correlation"]["value"]) < 0.1
    assert pairwise(*honest, *sizes)["accuracy"]["value"] == 1.0
    apart = random.normal(size=4000) * 2
    flipped = np.where(random.random(4000) < 1 / (1 + np.exp(-apart)), apart, -apart)
    assert calibration(flipped)["calibration_error"] < 0.05
    assert calibration(-np.abs(apart))["calibration_error"] > 0.5


def test_the_settings_that_make_no_sense_are_refused(tmp_path):
    save(tmp_path / "base", small_model(own()), own())
    write_rows(tmp_path / "pairs.jsonl", PAIRS)
    for wrong in ("batch: 2k", "tokens: 1M", "steps: 1, epochs: 2"):
        (tmp_path / "rm.yaml").write_text(
            f"name: rm\nstages:\n  rm: {{kind: reward, from: ./base, data: ./pairs.jsonl, {wrong}}}\n"
        )
        with pytest.raises(TriviumError, match=r"pairs|steps"):
            trivium.run(tmp_path / "rm.yaml", runs=tmp_path / "runs")
    (tmp_path / "rm.yaml").write_text(
        "name: rm\nstages:\n  rm: {kind: reward, from: ./base, data: ./pairs.jsonl, steps: 1}\n"
        "  sft: {kind: sft, from: rm, data: ./pairs.jsonl}\n"
    )
    with pytest.raises(TriviumError, match="makes a reward model"):
        trivium.run(tmp_path / "rm.yaml", runs=tmp_path / "runs")


def test_the_folder_says_what_it_is(tmp_path):
    model, head = reward_model()
    save_reward_model(model, head, tmp_path, pad_id=7)
    content = read_json(tmp_path / "config.json")
    assert content["architectures"] == ["Qwen3ForSequenceClassification"]
    assert content["pad_token_id"] == 7
