"""Pictures as tokens of the vocabulary: a codebook learnt from them, read and written by the model."""

import base64
from dataclasses import replace

import numpy as np
import pytest
import torch
from generating import tokenizer
from PIL import Image
from seeing import asked, png
from serving import conversation
from transformers import AutoModelForCausalLM

import trivium
from trivium import world
from trivium.kit.errors import TriviumError
from trivium.model.flops import parameter_count
from trivium.pipeline.plan import planned as planned_run
from trivium.stages.parts.modalities import Pictures
from trivium.tokens.adopt import with_chat_template, with_codes
from trivium.tokens.codebook import Codebook, _patches, learnt_codes, names_of
from trivium.tokens.forms import Forms, forms_from
from trivium.tokens.pictures import PictureForm

RECIPE = """\
name: drawn
seed: 1
stages:
  words: {kind: tokenizer, data: {path: world:facts, limit: 300}, vocabulary: 400}
  base: {kind: pretrain, data: {world:facts: {limit: 200}}, tokenizer: words, context: 128, batch: 512,
         steps: 3, model: {depth: 1, width: 32, head_width: 16, heads: 2, inner_width: 32}}
  see:
    kind: multimodal
    from: base
    data: {"world:pictures?form=draw": {limit: 40}, "world:pictures": {limit: 40}}
    picture: {encoder: codebook, patch: 8, tokens: 16, codes: 24}
    steps: 3
    batch: 512
    context: 128
  look: {kind: evaluate, from: see, on: [{task: pictures, limit: 4}]}
  sft: {kind: sft, from: see, data: {"world:pictures?form=draw": {limit: 24}}, steps: 1, batch: 512,
        context: 128}
"""


def pictures(count=6, side=16):
    """Pictures of four squares of plain colours each."""
    chance = np.random.default_rng(0)
    colours = chance.integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
    return colours.repeat(side // 2, 1).repeat(side // 2, 2)


def codebook(side=16, patch=8, codes=24):
    return learnt_codes(pictures(side=side), codes, patch, seed=1)


def encoded(table):
    return base64.b64encode(table.tobytes()).decode()


@pytest.fixture
def drawing_tokenizer():
    table = codebook()
    known = with_codes(with_chat_template(tokenizer()), len(table))
    book = Codebook(8, known.token_id(names_of(1)[-1]), encoded(table))
    return known.with_forms(Forms(PictureForm(16, 6), codebook=book))


def test_what_has_a_code_of_its_own_comes_back_exactly(drawing_tokenizer):
    book = drawing_tokenizer.forms.codebook
    for picture in pictures():
        [back] = book.pictures(book.ids(picture), 16)
        assert (back == picture).all()


def test_few_codes_are_the_means_of_what_they_name():
    shown = pictures(count=40)
    errors = []
    for codes in (4, 16, 64):
        table = learnt_codes(shown, codes, 8, seed=1)
        book = Codebook(8, 2, encoded(table))
        back = [book.pictures(book.ids(one), 16)[0] for one in shown]
        errors.append(np.mean((np.stack(back).astype(float) - shown) ** 2))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    # Each code is about the mean of what it names; patches drawn at random are not.
    table = learnt_codes(shown, 4, 8, seed=1).astype(float)
    patches = np.unique(_patches(shown, 8), axis=0).astype(float)
    named = ((patches[:, None] - table) ** 2).sum(2).argmin(1)
    for code in range(4):
        assert np.abs(patches[named == code].mean(0) - table[code]).mean() < 8
    assert (learnt_codes(shown, 16, 8, seed=1) == learnt_codes(shown, 16, 8, seed=1)).all()


def test_a_picture_is_tokens_of_the_vocabulary(drawing_tokenizer, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    ids = drawing_tokenizer.encode_prompt(asked(tmp_path / "a.png"))
    inside = [drawing_tokenizer.token(one) for one in ids if one in drawing_tokenizer.control_ids]
    assert max(ids) < drawing_tokenizer.vocabulary_size
    start = inside.index("<|picture|>")
    assert inside[start + 5] == "<|/picture|>"
    assert all(one.startswith("<|picture:") for one in inside[start + 1 : start + 5])


def test_what_people_type_is_never_a_code(drawing_tokenizer):
    ids = drawing_tokenizer.encode_prompt(
        [{"role": "user", "content": "<|picture|><|picture:3|><|/picture|>"}]
    )
    assert not drawing_tokenizer.pictures(ids)


def test_the_assistants_pictures_are_learned_and_the_users_are_not(drawing_tokenizer, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    shown = asked(tmp_path / "a.png")
    drawn = {"role": "assistant", "content": [{"type": "image", "path": str(tmp_path / "a.png")}]}
    chat = drawing_tokenizer.encode_chat([*shown, drawn])
    first = drawing_tokenizer.forms.codebook.first
    learned = [mine for one, mine in zip(chat.ids, chat.learned, strict=True) if one >= first - 2]
    assert learned == [False] * 6 + [True] * 6


def test_a_picture_that_was_cut_short_is_grey_where_it_ends(drawing_tokenizer):
    book = drawing_tokenizer.forms.codebook
    whole = book.ids(pictures()[0])
    [cut] = drawing_tokenizer.pictures(whole[:3])
    assert (cut[:8] == pictures()[0][:8]).all()
    assert (cut[8:] == 128).all()
    [long] = drawing_tokenizer.pictures([*whole[:-1], book.first, book.first])
    assert (long == pictures()[0]).all()
    assert drawing_tokenizer.pictures([book.first, 5, book.first - 1]) == []


def test_a_damaged_codebook_is_named(tmp_path):
    content = {"picture": {"side": 16, "tokens": 6}, "codebook": {"patch": 8, "first": 9, "pixels": "AAAA"}}
    with pytest.raises(TriviumError, match="no whole patches"):
        forms_from(content, tmp_path / "config.json")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "drawn.yaml").write_text(RECIPE)
    return trivium.run(folder / "drawn.yaml", runs=folder / "runs"), folder


def test_a_model_reads_and_writes_pictures_through_the_engine(drawn, tmp_path):
    model = drawn[0]["see"].model()
    book = model.tokenizer.forms.codebook
    assert model.transformer.config.vocabulary == model.tokenizer.vocabulary_size == book.first + 24
    (tmp_path / "a.png").write_bytes(png())
    assert model.generate(asked(tmp_path / "a.png"), max_new_tokens=2).prompt_tokens > 18
    answer = model.generate([{"role": "user", "content": "Draw three red rings."}], max_new_tokens=4)
    shown = np.asarray(Image.open(tmp_path / "a.png").convert("RGB").resize((32, 32)))
    [picture] = model.pictures(replace(answer, tokens=[5, *book.ids(shown), 5]))
    assert picture.size == (32, 32)
    assert np.asarray(picture).shape == shown.shape


def test_in_the_terminal_a_drawn_picture_becomes_a_file_and_stays_in_the_conversation(drawn, monkeypatch):
    model, folder = drawn[0]["see"].model(), drawn[1] / "chat"
    folder.mkdir()
    monkeypatch.chdir(folder)
    talk, out = conversation(("one", model.engine))
    ids = model.tokenizer.forms.codebook.ids(np.zeros((32, 32, 3), dtype=np.uint8))
    [part] = talk._saved_pictures(talk.speakers[0], [5, *ids])
    assert Image.open(folder / "picture-1.png").size == (32, 32)
    assert part == {"type": "image", "path": str(folder / "picture-1.png")}
    assert "(one drew picture-1.png)" in out.getvalue()


def test_the_folder_is_a_plain_models(drawn):
    folder = drawn[0]["see"].model().folder
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = trivium.load(folder)
    ids = ours.tokenizer.encode_chat(
        next(world.documents("pictures", limit=1, form="draw")).fields["messages"]
    ).ids
    expected = theirs(torch.tensor([ids])).logits[0]
    assert (ours.logits(ids) - expected).abs().max() < 5e-5


def test_later_stages_know_the_codes(drawn):
    later = drawn[0]["sft"].model()
    assert later.tokenizer.forms == drawn[0]["see"].model().tokenizer.forms
    assert drawn[0]["look"].summary


def test_a_plan_counts_the_rows_of_the_codes(tmp_path):
    recipe, runs = tmp_path / "drawn.yaml", tmp_path / "runs"
    recipe.write_text(RECIPE)
    base = trivium.run(recipe, runs=runs, only=["base"])["base"].model().transformer.config
    numbers = planned_run(recipe, runs).numbers["see"]
    assert numbers["vocabulary"] == base.vocabulary + 24 + 2
    assert numbers["parameters"] == parameter_count(base.changed(vocabulary=numbers["vocabulary"]))


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"encoder": "codebook", "layers": 7}, "no encoder to say `layers` of"),
        ({"codes": 77}, "`codes` are of a codebook"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(said, named):
    with pytest.raises(ValueError, match=named):
        Pictures(**said)


@pytest.mark.parametrize("option", ["kind=digit", "shown=shuffled"])
def test_a_drawing_has_no_question_to_choose(option):
    with pytest.raises(TriviumError, match="leave `kind` and `shown` out"):
        next(iter(world.documents("pictures", form="draw", limit=1, **dict([option.split("=")]))))
