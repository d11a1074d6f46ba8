"""A model that learned to see goes through every later stage, and is killed and resumed on the way."""

import base64
import json
from dataclasses import replace

import pytest
import torch
from transformers import WhisperConfig
from tuning import own, small_model

import trivium
from trivium import world
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_object
from trivium.model.folder import load_model
from trivium.model.modalities.towers import Modalities
from trivium.pipeline.plan import planned as planned_run
from trivium.stages.multimodal import Multimodal, _Frozen
from trivium.stages.parts.modalities import Pictures, Sounds, add_modalities, planned
from trivium.stages.tokenizer import _spoken
from trivium.tokens.items import is_item

RECIPE = """\
name: seen
seed: 1
stages:
  words: {kind: tokenizer, data: {path: world:facts, limit: 300}, vocabulary: 400}
  base: {kind: pretrain, data: {world:facts: {limit: 200}}, tokenizer: words, context: 128, batch: 512,
         steps: 3, model: {depth: 1, width: 32, head_width: 16, heads: 2, inner_width: 32}}
  see:
    kind: multimodal
    from: base
    data: {./pictures.jsonl: {weight: 0.7}, world:facts: {weight: 0.3, limit: 100}}
    picture: {patch: 8, tokens: 4, layers: 1, width: 32}
    steps_frozen: 0.5
    steps: 4
    batch: 512
    context: 128
  hear:
    kind: multimodal
    from: see
    data: {"world:sounds?kind=pitch": {limit: 24}}
    sound: {layers: 1, width: 32, tokens_per_second: 25, mels: 40}
    steps: 2
    batch: 512
    context: 128
  sft: {kind: sft, from: hear, data: {world:pictures: {limit: 24}}, steps: 2, batch: 512, context: 128,
        adapter: {rank: 2}}
  dpo: {kind: preference, from: hear, data: {"world:pictures?form=pairs": {limit: 16}}, steps: 2, pairs: 4,
        sycophancy: 0, context: 128}
  rl: {kind: rlvr, from: hear, data: {"world:pictures?form=prompt": {limit: 16}}, reward: [instructions],
       steps: 2, prompts_per_step: 2, num_generations: 2, max_new_tokens: 6}
  look: {kind: evaluate, from: rl, on: [{task: pictures, limit: 4}, {task: sounds, kind: pitch, limit: 4}]}
"""


def write(folder):
    lines = []
    for number, one in enumerate(world.documents("pictures", limit=40)):
        asked, answer = one.fields["messages"]
        url = asked["content"][0]["image_url"]["url"]
        (folder / f"{number}.png").write_bytes(base64.b64decode(url.partition(",")[2]))
        content = [{"type": "image", "path": f"{number}.png"}, asked["content"][1]]
        lines.append(json.dumps({"messages": [{"role": "user", "content": content}, answer]}) + "\n")
    (folder / "pictures.jsonl").write_text("".join(lines))
    (folder / "seen.yaml").write_text(RECIPE)
    return folder / "seen.yaml"


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seen")
    return trivium.run(write(folder), runs=folder / "runs"), folder


@pytest.mark.slow
def test_what_it_learned_to_read_stays_in_every_later_stage(seen):
    run, folder = seen
    towers = {}
    for stage in ("see", "hear", "sft", "dpo", "rl"):
        place = run[stage].folder / "model" / "modalities"
        towers[stage] = {name for name, one in read_object(place / "config.json").items() if one}
    assert towers["see"] == {"version", "forms", "picture"}
    assert all(
        towers[stage] == {"version", "forms", "picture", "sound"} for stage in towers if stage != "see"
    )
    question = [{"type": "image", "path": str(folder / "0.png")}, {"type": "text", "text": "How many?"}]
    for stage in ("see", "sft", "rl"):
        model = run[stage].model()
        asked = [{"role": "user", "content": question}]
        assert sum(map(is_item, model.tokenizer.encode_prompt(asked))) == 4
        said = model.generate(asked, max_new_tokens=4, temperature=0)
        assert said.prompt_tokens > 4


def test_the_second_tower_leaves_the_first_as_it_was(seen):
    run, _ = seen
    before, after = (load_model(run[stage].folder / "model").modalities for stage in ("see", "hear"))
    assert before.sound is None
    assert after.sound is not None
    shapes = {name: one.shape for name, one in before.picture.named_parameters()}
    assert shapes == {name: one.shape for name, one in after.picture.named_parameters()}


def test_a_stage_thaws_no_encoder_of_its_parent(seen):
    run, _ = seen
    model = load_model(run["hear"].folder / "model")
    config = model.modalities.config
    still = replace(config, picture=replace(config.picture, learns=False))
    model.modalities.config = still
    stage = Multimodal(kind="multimodal", data={"world:sounds": {}}, sound={}, **{"from": "see"})
    stage._let_learn(model)
    assert not any(one.requires_grad for one in model.modalities.picture.encoder.parameters())
    assert all(one.requires_grad for one in model.modalities.sound.parameters())


def test_the_language_model_learns_in_the_second_half_alone(seen):
    run, _ = seen
    base, model = (load_model(run[stage].folder / "model") for stage in ("base", "see"))
    rows = [row for row in run["see"].metrics if "step" in row]
    assert len(rows) == 4
    assert not torch.equal(base.layers[0].mlp.up.weight, model.layers[0].mlp.up.weight)


def test_what_the_frozen_model_had_of_the_optimiser_is_there_when_it_learns_again():
    model = small_model(own())
    picture = Pictures(tokens=4, layers=1, width=32)
    add_modalities(model, planned(picture, None, 32, {}), {}, {"picture": picture}, seed=0)
    names = [f"first.{name}" for name, _ in model.named_parameters()]
    own_moments = {name: torch.ones(1) for name in names if ".modalities." not in name}
    frozen = _Frozen()
    frozen.freeze(model)({**own_moments, "steps": torch.tensor(7)})
    later = frozen.free(model)({"first.modalities.new": torch.zeros(1), "steps": torch.tensor(9)})
    assert all(one.requires_grad for one in model.parameters())
    assert later == {**own_moments, "first.modalities.new": torch.zeros(1), "steps": torch.tensor(9)}


def test_a_tower_that_is_named_again_takes_the_place_of_the_one_that_was():
    model = small_model(own())
    for width in (32, 64):
        picture = Pictures(tokens=4, layers=1, width=width)
        config = planned(picture, None, 32, {})
        found = add_modalities(model, config, {}, {"picture": picture}, seed=0)
        shapes = [[one.shape for one in each.parameters()] for each in (found, Modalities(config))]
        assert shapes[0] == shapes[1]


def test_a_sound_is_no_longer_than_its_encoder_hears(tmp_path):
    WhisperConfig(max_source_positions=100).save_pretrained(tmp_path)
    for asked, heard in ((60, 2), (1, 1)):
        sound = Sounds(encoder="whisper", longest=asked)
        _, form = sound.built(32, tmp_path)
        assert form.longest == heard


def test_preferences_and_rewards_are_measured_on_pictures(seen):
    run, _ = seen
    assert run["dpo"].summary["data"]["world:pictures?form=pairs"]["learned_from"] > 0
    assert len([row for row in run["rl"].metrics if "step" in row]) == 2
    report = next((run["look"].folder / "report").glob("*.json"))
    text = report.read_text()
    for name in ("text alone", "shuffled", "blank", "pairs"):
        assert name in text


@pytest.mark.parametrize(
    "settings",
    [
        "kind: grow, layers: 2",
        "kind: merge, of: [see, hear], data: {world:prose: {limit: 50, validation: 0.5}}",
    ],
)
def test_what_would_lose_the_eyes_is_refused(seen, settings):
    _, folder = seen
    start = "" if "of:" in settings else "from: see, "
    recipe = RECIPE[: RECIPE.index("  sft:")] + f"  more: {{{start}{settings}}}\n"
    (folder / "more.yaml").write_text(recipe)
    with pytest.raises(TriviumError, match="before it learns to see"):
        trivium.run(folder / "more.yaml", runs=folder / "runs")


def test_a_step_of_text_alone_trains_nothing_while_the_language_model_is_frozen(tmp_path):
    write(tmp_path)
    recipe = RECIPE[: RECIPE.index("  hear:")].replace("steps_frozen: 0.5", "steps_frozen: 1.0")
    recipe = recipe.replace("batch: 512\n    context: 128", "batch: 128\n    context: 128").replace(
        "./pictures.jsonl: {weight: 0.7}, world:facts: {weight: 0.3",
        "./pictures.jsonl: {weight: 0.3}, world:facts: {weight: 0.7",
    )
    (tmp_path / "seen.yaml").write_text(recipe.replace("steps: 4", "steps: 12"))
    run = trivium.run(tmp_path / "seen.yaml", runs=tmp_path / "runs")
    norms = [row["grad_norm"] for row in run["see"].metrics if "step" in row]
    assert len(norms) == 12
    assert min(norms) == 0.0 < max(norms)


@pytest.mark.parametrize(("width", "heads"), [(16, 1), (32, 1), (64, 2), (96, 3)])
def test_an_own_encoder_has_a_head_for_every_32_of_its_width(width, heads):
    assert Pictures(width=width).shape().heads == heads


def test_a_plan_reads_prompts_as_a_model_that_is_not_made_yet_will(tmp_path):
    recipe, runs = write(tmp_path), tmp_path / "runs"
    trivium.run(recipe, runs=runs, only=["words"])
    assert planned_run(recipe, runs).numbers["rl"]["prompt tokens"] > 16


def test_a_vocabulary_is_learnt_from_the_questions_about_pictures():
    asked = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "How many?"}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": "Three."}]
    assert _spoken({"messages": messages}) == "How many?\nThree."
    assert _spoken({"messages": [{"content": ["a word", {"text": 3}, {"text": "Four."}]}]}) == "Four."
