"""Sources of the world in recipes: what could not be read is refused before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from trivium import world
from trivium.evals.settings import Settings
from trivium.evals.task import planned
from trivium.kit.errors import TriviumError
from trivium.recipe import graph
from trivium.recipe.schema import load

BEFORE = """\
name: tiny
stages:
  words: {kind: tokenizer, data: {path: world:prose, limit: 20}, vocabulary: 300}
  corpus: {kind: corpus, data: {path: world:prose, limit: 20}, tokenizer: words}
  base: {kind: pretrain, data: corpus, model: {depth: 1, width: 32}, context: 32, steps: 2}
"""


def built(folder: Path, text: str) -> dict[str, graph.Node]:
    path = folder / "tiny.yaml"
    path.write_text(BEFORE + text)
    return graph.build(load(path))


def refused(folder: Path, text: str) -> str:
    with pytest.raises(TriviumError) as caught:
        built(folder, text)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("{kind: corpus, tokenizer: words, data: {path: 'world:sums?steps_low=9x', limit: 5}}",
         ["stages.one.data.0.path: The option 'steps_low' of world:sums", "'9x'"]),
        ("{kind: corpus, tokenizer: words, data: {path: 'world:sums?steps=9', limit: 5}}",
         ["stages.one.data.0.path", "no option 'steps'", "steps_low, steps_high"]),
        ("{kind: corpus, tokenizer: words, data: {path: 'world:facts?towns_share=7', limit: 5}}",
         ["stages.one.data.0.path", "'towns_share'", "a share from 0 to 1, not 7"]),
        ("{kind: corpus, tokenizer: words, data: {path: world:facts, split: tset, limit: 5}}",
         ["stages.one.data.0.path", "no split 'tset'"]),
        ("{kind: corpus, tokenizer: words, data: {path: world:facts}}",
         ["stages.one.data.0.path", "say how many documents with `limit`"]),
        ("{kind: corpus, tokenizer: words, data: {path: 'world:facts?limit=9x'}}",
         ["stages.one.data.0.path", "The `limit` of world:facts is a whole number from 0 on, not '9x'"]),
        ("{kind: midtrain, from: base, data: {world:fcts: {limit: 5}}, steps: 1}",
         ["stages.one.data: There is no source world:fcts (did you mean 'facts'?)"]),
        ("{kind: midtrain, from: base, data: {mine: {of: world:prose}}, steps: 1}",
         ["stages.one.data.mine.of", "`limit`"]),
        ("{kind: midtrain, from: base, data: corpus, steps: 1,"
         " watch: {'world:craft?products=3': {limit: 5}}}",
         ["stages.one.watch", "from 20 to 5000 products, not 3"]),
        ("{kind: midtrain, from: base, data: corpus, steps: 1, replay: {share: 0.2, data: {world:web: {}}}}",
         ["stages.one.replay.data", "`limit`"]),
        ("{kind: midtrain, from: base, data: corpus, steps: 1,"
         " vocabulary: {added: 8, data: {path: 'world:tongue?script=old', limit: 5}}}",
         ["stages.one.vocabulary.data.0.path", "no script 'old'; use own or latin"]),
        ("{kind: anneals, from: base, candidates: {a: corpus}, steps: 1, measure: {world:facts: {split: x,"
         " limit: 5}}}", ["stages.one.measure", "no split 'x'"]),
        ("{kind: reward, from: base, data: {world:taste: {limit: 9}}, "
         "test: {'world:taste?cause=luck': {limit: 9}}}", ["stages.one.test", "no cause 'luck'"]),
        ("{kind: text_to_sql, database: 'world:ledger?peeple=40', data: {path: world:ledger, limit: 9}}",
         ["stages.one.database", "no option 'peeple' (did you mean 'people'?)"]),
        ("{kind: text_to_sql, database: world:ledger, data: {path: world:ledger, limit: 9}, held_out: -1}",
         ["stages.one.held_out cannot be -1"]),
        ("{kind: text_to_sql, database: world:facts, data: {path: world:ledger, limit: 9}}",
         ["stages.one.database", "world:facts is no data base"]),
        ("{kind: text_to_sql, database: world:ledger, data: {path: world:ledger, limit: 9},"
         " held_out: {path: world:ledger}}", ["stages.one.held_out.path", "`limit`"]),
        ("{kind: rlvr, from: base, data: {'world:sums?form=prompt': {limit: 5}}, steps: 1,"
         " reward: [{name: sql, database: 'world:ledger?people=9x'}]}", ["stages.one.reward.0", "'9x'"]),
        ("{kind: rlvr, from: base, data: {'world:sums?form=prompt': {limit: 5}}, steps: 1, reward: [maths]}",
         ["stages.one.reward.0", "no scorer called 'maths'"]),
        ("{kind: rlvr, from: base, data: {'world:sums?form=promt': {limit: 5}}, steps: 1, reward: [math]}",
         ["stages.one.data", "no form 'promt'; use document, chat, prompt or steps"]),
        ("{kind: evaluate, from: base, on: ['facts?people=9x']}", ["stages.one.on", "'people'", "'9x'"]),
        ("{kind: evaluate, from: base, on: ['facts?form=chat']}", ["stages.one.on", "take `form` away"]),
        ("{kind: evaluate, from: base, on: ['sums?family=none']}", ["stages.one.on", "no family 'none'"]),
        ("{kind: evaluate, from: base, on: [{task: sums, family: unseen, shots: 2}]}",
         ["stages.one.on", "train cannot use it"]),
        ("{kind: evaluate, from: base, on: [{task: bits, sources: ['world:facts?form=chat']}]}",
         ["stages.one.on", "world:facts holds no plain texts"]),
        ("{kind: evaluate, from: base, on: [{task: positions, source: 'world:prose?texts=x'}]}",
         ["stages.one.on", "'texts'"]),
        ("{kind: evaluate, from: base, on: ['calibration?source=sums']}", ["stages.one.on", "no choices"]),
        ("{kind: evaluate, from: base, on: ['passkey?kinds=ring']}", ["stages.one.on", "no kind 'ring'"]),
        ("{kind: evaluate, from: base, on: ['passkey?depths=2']}", ["stages.one.on", "between 0 and 1"]),
        ("{kind: evaluate, from: base, on: ['conversation?hops=0']}", ["stages.one.on", "hops"]),
        ("{kind: evaluate, from: base, on: ['sycophancy?agree=1']}", ["stages.one.on", "no option 'agree'"]),
        ("{kind: evaluate, from: base, on: [{task: own, data: 'world:sums?form=prompt'}]}",
         ["stages.one.on.0.data", "`limit`"]),
    ],
)  # fmt: skip
def test_a_source_of_the_world_that_cannot_be_read_is_refused_before_anything_runs(tmp_path, stage, words):
    sentence = refused(tmp_path, f"  one: {stage}\n")
    assert all(word in sentence for word in words), sentence


def test_what_a_report_asks_of_the_world_is_checked_as_well(tmp_path):
    sentence = refused(tmp_path, "report: {on: ['craft?products=few']}\n")
    assert "report.on" in sentence
    assert "'products'" in sentence
    sentence = refused(tmp_path, "report: {on: [{task: own, data: 'world:chat?form=prompts&limit=5'}]}\n")
    assert "report.on.0" in sentence
    assert "no form 'prompts'" in sentence


def test_what_an_arm_reads_of_the_world_is_checked_as_well(tmp_path):
    arms = (
        "  one: {kind: evaluate, from: base, on: [facts]}\n"
        "experiment:\n"
        "  arms: {few: {}, many: {one: {on: ['facts?people=9x']}}}\n"
        "  measure: {knows: {stage: one, take: 'facts: right'}}\n"
        "  claims: [{says: it, on: knows, arm: few, against: many, control: many}]\n"
    )
    sentence = refused(tmp_path, arms)
    assert "In the arm `many`" in sentence
    assert "'9x'" in sentence


def test_a_source_is_looked_at_as_it_will_be_read(tmp_path):
    unseen = "{path: 'world:sums?family=unseen', split: test, limit: 5}"
    one = f"  one: {{kind: corpus, tokenizer: words, data: {unseen}}}\n"
    assert built(tmp_path, one)
    assert "train cannot use it" in refused(tmp_path, one.replace("split: test, ", ""))


@pytest.mark.parametrize("name", sorted(world.sources()))
def test_no_value_of_a_dial_ends_in_anything_but_a_sentence(name):
    reads = [lambda **options: world.documents(name, limit=1, **options)]
    if name not in ("prose", "web"):
        reads.append(lambda **options: world.questions(name, limit=1, **options))
    for option in vars(world.options(name, {})):
        # A million texts in one document are long to write, and no mistake.
        large = [] if option == "texts" else [10**6]
        for value in (-1, 0, 1, 7, 0.5, "9x", "", None, True, [1], *large):
            for read in reads:
                said = f"`{option}` of world:{name}"
                try:
                    assert list(read(**{option: value})), said
                except TriviumError as error:
                    said = str(error)
                assert f"world:{name}" in said or option in said, (option, value, said)


@pytest.mark.parametrize(
    "given", [{"seed": "x"}, {"start": "x"}, {"start": -1}, {"limit": -1}, {"limit": "9x"}]
)
def test_numbers_that_are_none_are_refused(given):
    with pytest.raises(TriviumError, match=f"`{next(iter(given))}` of world:facts is a whole number"):
        list(world.documents("facts", **{"limit": 1, **given}))


@pytest.mark.parametrize(
    "spec",
    ["facts?source=craft", "facts?most=3", "facts?start=x", "tongue?settings=1", "bits?sources=facts?seed=x"],
)
def test_what_is_no_dial_of_a_task_is_named(spec):
    with pytest.raises(TriviumError, match=r"no option|whole number"):
        planned(spec, Settings())
