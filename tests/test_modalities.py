"""Pictures and sounds among the tokens: in prompts, packed rows, the engine's cache and on disk."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from generating import tokenizer, whole_logits
from seeing import FORMS, asked, png, seeing_model, seeing_tokenizer, wav

from trivium.data import encoding, shards
from trivium.data.conversations import Encoder
from trivium.data.packed import PackedRows
from trivium.data.rows import NOTHING, collate, row_of_documents
from trivium.data.shards import ITEMS, Shards, write_encoded, write_shards
from trivium.data.sources import Source, read_documents
from trivium.generate.engine import Engine
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.kit.errors import TriviumError
from trivium.kit.files import checksum
from trivium.kit.fingerprint import fingerprint
from trivium.learn.objectives.next_token import NextToken
from trivium.model.arithmetic import counted
from trivium.model.attention import Documents
from trivium.model.folder import load_model, save_model
from trivium.model.modalities.encoder import EncoderConfig, EncoderLayer
from trivium.recipe.outside import Checksums, content_fingerprint
from trivium.tokens import items, parts
from trivium.tokens.items import FIRST, LIBRARY, Item, Library, content_of, is_item
from trivium.tokens.tokenizer import Tokenizer

GREEDY = Sampling(temperature=0, max_new_tokens=8, stop_ids=())


@pytest.fixture
def pictures(tmp_path):
    for name, colour in {"red": (200, 30, 30), "blue": (30, 30, 200)}.items():
        (tmp_path / f"{name}.png").write_bytes(png(colour))
    (tmp_path / "low.wav").write_bytes(wav(300))
    (tmp_path / "high.wav").write_bytes(wav(2000))
    return tmp_path


def test_a_picture_is_tokens_that_name_its_content(pictures):
    reader = seeing_tokenizer()
    red, blue = (reader.encode_prompt(asked(pictures / f"{name}.png")) for name in ("red", "blue"))
    items = [one for one in red if is_item(one)]
    assert len(items) == 4
    assert len(set(map(content_of, items))) == 1
    assert [one for one in red if not is_item(one)] == [one for one in blue if not is_item(one)]
    assert items != [one for one in blue if is_item(one)]
    (pictures / "copy.png").write_bytes((pictures / "red.png").read_bytes())
    assert reader.encode_prompt(asked(pictures / "copy.png")) == red


def test_any_number_of_items_stands_where_it_was_put(pictures):
    reader = seeing_tokenizer()
    parts = [
        {"type": "text", "text": "first"},
        {"type": "image", "path": str(pictures / "red.png")},
        {"type": "text", "text": "then"},
        {"type": "audio", "path": str(pictures / "low.wav")},
        {"type": "image", "path": str(pictures / "blue.png")},
    ]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}]
    chat = reader.encode_chat([*messages, {"role": "user", "content": [parts[1]]}])
    runs, before = [], None
    for token in chat.ids:
        content = content_of(token) if is_item(token) else None
        if content != before and content is not None:
            runs.append(content)
        before = content
    assert len(runs) == 4
    assert runs[0] == runs[3]
    assert [LIBRARY.get(content).kind for content in runs] == ["picture", "sound", "picture", "picture"]
    text = reader.decode([one for one in chat.ids if not is_item(one)])
    assert text.index("first") < text.index("then") < text.index("yes")
    learned = [token for token, one in zip(chat.ids, chat.learned, strict=True) if one]
    assert reader.decode(learned) == "yes"


def test_what_people_type_is_never_an_item(pictures):
    reader = seeing_tokenizer()
    ids = reader.encode_prompt([{"role": "user", "content": "<image> \U0010fffd* <item>"}])
    assert max(ids) < FIRST


def test_a_model_of_text_says_that_it_takes_none(pictures):
    with pytest.raises(TriviumError, match="takes only text"):
        tokenizer().encode_prompt(asked(pictures / "red.png"))
    with pytest.raises(TriviumError, match=r"gone\.png cannot be read"):
        seeing_tokenizer().encode_prompt(asked(pictures / "gone.png"))
    part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}
    with pytest.raises(TriviumError, match="not fetched"):
        seeing_tokenizer().encode_prompt([{"role": "user", "content": [part]}])


@torch.no_grad()
def test_the_rows_of_an_item_take_the_place_of_its_tokens(pictures):
    model, reader = seeing_model(), seeing_tokenizer()
    ids = torch.tensor(reader.encode_prompt(asked(pictures / "red.png")))
    rows = model.embed(ids)
    inside = ids >= FIRST
    assert torch.equal(rows[~inside], model.embedding(ids[~inside]))
    content = content_of(int(ids[inside][0]))
    expected = model.modalities.rows([content], torch.device("cpu"))[content]
    torch.testing.assert_close(rows[inside], expected)
    # In any order, and only some of them, as where a prompt is read in pieces.
    some = ids[inside][[2, 0]]
    torch.testing.assert_close(model.embed(some), expected[[2, 0]])


def test_the_engine_sees_what_the_model_sees(pictures):
    model, reader = seeing_model(), seeing_tokenizer()
    engine = Engine(model, reader, seed=0)
    for name, kind in (("red.png", "image"), ("blue.png", "image"), ("low.wav", "audio")):
        prompt = reader.encode_prompt(asked(pictures / name, kind=kind))
        [[found]] = engine.generate([Request(prompt, GREEDY)])
        ids = list(prompt)
        for token in found.tokens:
            assert int(whole_logits(model, ids)[-1].argmax()) == token
            ids.append(token)


def test_the_prefix_cache_tells_pictures_apart(pictures):
    model, reader = seeing_model(), seeing_tokenizer()
    plain = Engine(model, reader, seed=0)
    cached = Engine(model, reader, seed=0, prefix_cache_size=4)
    for name in ("red", "blue", "red", "blue"):
        prompt = reader.encode_prompt(asked(pictures / f"{name}.png", "What? " * 30))
        [[one]], [[other]] = (each.generate([Request(prompt, GREEDY)]) for each in (plain, cached))
        assert one.tokens == other.tokens
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_a_picture_that_left_memory_fails_alone(pictures):
    model, reader = seeing_model(), seeing_tokenizer()
    engine = Engine(model, reader, seed=0)
    [gone] = {content_of(one) for one in reader.encode_prompt(asked(pictures / "red.png")) if is_item(one)}
    lost = [token if not is_item(token) else token + (12345 << 14) for token in
            reader.encode_prompt(asked(pictures / "red.png"))]  # fmt: skip
    assert gone
    with pytest.raises(TriviumError, match="no longer held"):
        engine.generate([Request(lost, GREEDY)])
    [[fine]] = engine.generate([Request(reader.encode_prompt(asked(pictures / "blue.png")), GREEDY)])
    assert len(fine.tokens) == 8


def test_a_library_with_a_limit_forgets_what_was_used_longest_ago():
    library = Library()
    library.limit = 250
    items = [Item("picture", np.full((1, 6, 6, 1), value, np.uint8), 1) for value in range(8)]
    ids = [library.keep(item)[0] for item in items]
    library.get(content_of(ids[-6]))
    library.keep(Item("picture", np.full((1, 6, 6, 1), 99, np.uint8), 1))
    assert library.get(content_of(ids[-1])).data[0, 0, 0, 0] == 7
    library.get(content_of(ids[-6]))
    for forgotten in (ids[0], ids[-5]):
        with pytest.raises(TriviumError, match="no longer held"):
            library.get(content_of(forgotten))


def conversations(folder):
    lines = []
    for name in ("red", "blue"):
        said = {"role": "assistant", "content": name}
        lines.append({"messages": [*asked(f"{name}.png"), said]})
    (folder / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return read_documents(Source(path=str(folder / "data.jsonl")))


def test_shards_keep_the_pictures_and_nothing_predicts_them(pictures, tmp_path):
    reader = seeing_tokenizer()
    encoder = Encoder(reader, 128)
    write_encoded(encoder.encode(conversations(pictures)), reader, tmp_path / "shards")
    (pictures / "red.png").unlink()
    shards = Shards(tmp_path / "shards", tokenizer=reader)
    row = PackedRows(shards, 128).row(0)
    inside = row.tokens >= FIRST
    assert inside.sum() == 8
    assert (row.targets < FIRST).all()
    assert reader.decode(row.targets[row.weights > 0]) == "redblue" or set(
        reader.decode(row.targets[row.weights > 0])
    ) == set("redblue")
    held = Library()
    held.add_stored(tmp_path / "shards" / ITEMS, shards.manifest["items"]["index"])
    for token in row.tokens[inside].tolist():
        assert np.array_equal(held.get(content_of(token)).data, LIBRARY.get(content_of(token)).data)
    damaged = (tmp_path / "shards" / ITEMS).read_bytes()
    (tmp_path / "shards" / ITEMS).write_bytes(damaged[:-1] + b"x")
    with pytest.raises(TriviumError, match=r"items\.bin is damaged"):
        Shards(tmp_path / "shards")


@pytest.mark.parametrize("in_a_prompt", [False, True])
def test_pictures_of_tokenised_data_leave_memory(pictures, tmp_path, in_a_prompt, monkeypatch):
    library = Library()
    for module in (items, parts, shards, encoding):
        monkeypatch.setattr(module, "LIBRARY", library)
    reader = seeing_tokenizer()
    prompt = reader.encode_prompt(asked(pictures / "red.png")) if in_a_prompt else []
    write_shards(conversations(pictures), reader, tmp_path / "shards")
    assert set(library._held) == {content_of(one) for one in prompt if is_item(one)}
    assert library._bytes == sum(item.data.nbytes for _, item in library._held.values())
    row = PackedRows(Shards(tmp_path / "shards", tokenizer=reader), 128).row(0)
    assert len(items.items_of(row.tokens)) == 2


def test_where_everything_is_learned_pictures_are_not(pictures):
    reader = seeing_tokenizer()
    [one, _] = Encoder(reader, 128, "all").encode(conversations(pictures))
    assert (one.learned == (one.tokens < FIRST)).all()
    row = row_of_documents([one.tokens])
    assert ((row.targets == NOTHING) == np.append(one.tokens[1:] >= FIRST, True)).all()


def test_documents_of_a_row_do_not_see_each_others_pictures(pictures):
    model, reader = seeing_model(), seeing_tokenizer()
    one, two, three = (
        np.array(reader.encode_prompt(asked(pictures / name, kind=kind)))
        for name, kind in (("red.png", "image"), ("blue.png", "image"), ("high.wav", "audio"))
    )
    with torch.no_grad():

        def states(documents):
            tokens = torch.from_numpy(np.concatenate(documents))
            return model(tokens, Documents([len(part) for part in documents]))

        packed = states([one, two, three])
        for part, alone in zip(
            packed.split([len(one), len(two), len(three)]), (one, two, three), strict=True
        ):
            torch.testing.assert_close(part, states([alone]), atol=2e-5, rtol=0)


def test_the_gradient_reaches_projector_and_encoder_and_only_the_seen_tower(pictures):
    model, reader = seeing_model(), seeing_tokenizer()
    [one, _] = Encoder(reader, 128).encode(conversations(pictures))
    batch = collate([row_of_documents([one.tokens], learned=[one.learned])])
    NextToken().loss(model, batch).sum.backward()
    assert model.modalities.picture.encoder.patches.weight.grad.abs().sum() > 0
    assert model.modalities.picture.projector.out.weight.grad.abs().sum() > 0
    assert model.modalities.sound.encoder.first.weight.grad is None


def test_an_encoder_that_stays_as_it_is_does_so_when_opened(pictures, tmp_path):
    model = seeing_model()
    config = model.modalities.config
    model.modalities.config = replace(config, picture=replace(config.picture, learns=False))
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved").modalities
    assert not any(one.requires_grad for one in again.picture.encoder.parameters())
    learns = [again.picture.projector, again.sound.encoder, again.sound.projector]
    assert all(one.requires_grad for part in learns for one in part.parameters())


def test_an_encoder_that_does_not_learn_computes_a_picture_once(pictures, monkeypatch):
    model, reader = seeing_model(), seeing_tokenizer()
    model.modalities.picture.encoder.requires_grad_(False)
    tower, calls = model.modalities.picture, []
    encode = tower.encode
    monkeypatch.setattr(
        tower, "encode", lambda items, device: calls.append(len(items)) or encode(items, device)
    )
    ids = torch.tensor(reader.encode_prompt(asked(pictures / "red.png")))
    first = model.embed(ids)
    assert torch.equal(model.embed(ids), first)
    assert calls == [1]
    first.sum().backward()
    with torch.no_grad():
        tower.encoder.patches.weight.mul_(2)
    assert not torch.equal(model.embed(ids), first)
    assert calls == [1, 1]


def test_saved_and_opened_it_is_the_same_model(pictures, tmp_path):
    model, reader = seeing_model(), seeing_tokenizer()
    save_model(model, tmp_path / "saved")
    reader.save(tmp_path / "saved")
    again, opened = load_model(tmp_path / "saved"), Tokenizer.load(tmp_path / "saved")
    assert opened.forms == FORMS
    ids = reader.encode_prompt(asked(pictures / "red.png"))
    assert opened.encode_prompt(asked(pictures / "red.png")) == ids
    assert torch.equal(whole_logits(again, ids), whole_logits(model, ids))
    copied = copy.deepcopy(model)
    assert torch.equal(whole_logits(copied, ids), whole_logits(model, ids))
    path = tmp_path / "saved" / "modalities" / "config.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 7'))
    with pytest.raises(TriviumError, match="version 7"):
        load_model(tmp_path / "saved")


def test_in_bfloat16_the_engine_sees_as_well(pictures):
    model, reader = seeing_model(), seeing_tokenizer()
    engine = Engine(model, reader, seed=0, dtype=torch.bfloat16)
    prompts = [reader.encode_prompt(asked(pictures / f"{name}.png")) for name in ("red", "blue")]
    found = engine.generate([Request(prompt, GREEDY) for prompt in prompts])
    assert all(len(one.tokens) == 8 for [one] in found)


def test_a_recipe_counts_the_pictures_that_its_data_names(pictures):
    for _ in conversations(pictures):
        pass
    data = pictures / "data.jsonl"
    before = content_fingerprint("data.jsonl", pictures, Checksums())
    assert content_fingerprint("data.jsonl", pictures, Checksums()) == before
    (pictures / "red.png").write_bytes(png((0, 200, 0)))
    changed = content_fingerprint("data.jsonl", pictures, Checksums())
    assert changed != before
    (pictures / "red.png").unlink()
    with pytest.raises(TriviumError, match=r"data\.jsonl names .*red\.png, which is not there"):
        content_fingerprint("data.jsonl", pictures, Checksums())
    data.write_text('{"text": "a"}\n')
    plain = content_fingerprint("data.jsonl", pictures, Checksums())
    assert plain == fingerprint([["data.jsonl", checksum(data)]]), "that of text stays what it was"


def test_an_encoder_that_is_frozen_costs_no_gradients():
    layer, stream = EncoderLayer(EncoderConfig(32, 1, 2, 64)), torch.randn(2, 5, 32)
    with counted() as learned:
        layer(stream)
    with counted() as asked, torch.no_grad():
        layer(stream)
    with counted() as frozen:
        layer.requires_grad_(False)(stream)
    assert frozen.operations == asked.operations < learned.operations
