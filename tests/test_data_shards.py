"""Shards: every token and byte accounted for, the same from any number of workers, damage named (L10)."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from trivium.data.encoding import Encoded
from trivium.data.shards import Shards, write_encoded, write_shards
from trivium.data.sources import Document, read_documents
from trivium.data.split import in_validation, text_hash
from trivium.kit.errors import TriviumError
from trivium.tokens.tokenizer import Tokenizer
from trivium.tokens.train import train_tokenizer

CHAT = [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": "three sacks"}]


def documents(count: int = 200) -> list[Document]:
    made = []
    for index in range(count):
        text = f"Document {index} tells of {index % 7} sacks of flour, é漢🙂 " + "and more " * (index % 13)
        if index % 10 == 9:
            made.append(
                Document(None, {"messages": [*CHAT, {"role": "user", "content": text}]}, f"c:{index}")
            )
        else:
            made.append(Document(text, {"text": text, "score": index / 2}, f"t:{index}"))
    return made


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer([document.text or "" for document in documents()], 400)


def test_shards_give_back_what_was_written(tmp_path: Path) -> None:
    manifest = write_shards(documents(), tokenizer(), tmp_path / "s", tokens_per_shard=1000)
    shards = Shards(tmp_path / "s", tokenizer=tokenizer())
    assert len(manifest["splits"]["train"]["shards"]) > 3
    assert len(shards) == 200
    lengths = tokenizer().byte_lengths()
    for index, document in enumerate(documents()):
        ids = shards.document(index)
        assert shards.id(index) == document.id
        assert shards.lengths[index] == len(ids)
        if document.text is not None:
            assert ids.tolist() == [*tokenizer().encode(document.text), tokenizer().end_of_text_id]
            assert shards.bytes[index] == len(document.text.encode()) == lengths[ids].sum()
        else:
            chat = tokenizer().encode_chat(document.fields["messages"])
            assert ids.tolist() == chat.ids
            assert shards.learned_of(index, 0, len(ids)).tolist() == chat.learned
            assert shards.learned_of(index, 3, 9).tolist() == chat.learned[3:9]
            assert shards.bytes[index] == lengths[ids].sum()
    assert manifest["splits"]["train"]["tokens"] == shards.tokens == shards.lengths.sum()
    assert manifest["splits"]["train"]["bytes"] == shards.bytes.sum()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path) -> None:
    many = documents(3000)
    for workers in (1, 2, 3):
        write_shards(many, tokenizer(), tmp_path / str(workers), workers=workers, validation=0.1)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2") == files_of(tmp_path / "3")


def test_large_vocabularies_take_four_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Tokenizer(json.loads(tokenizer().backend.to_str()), tokenizer().settings)
    monkeypatch.setattr(Tokenizer, "vocabulary_size", 1 << 17)
    wide.byte_lengths = lambda: np.zeros(1 << 17, dtype=np.int64)  # type: ignore[method-assign]
    text_only = [document for document in documents(20) if document.text]
    assert write_shards(text_only, wide, tmp_path / "s")["dtype"] == "uint32"
    assert Shards(tmp_path / "s").document(3).tolist()[:-1] == wide.encode(text_only[3].text or "")


PARTS = [".bin", ".idx", ".bytes", ".ids", ".mask"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "missing"])
def test_a_damaged_shard_is_named_and_not_opened(part: str, damage: str, tmp_path: Path) -> None:
    write_shards(documents(), tokenizer(), tmp_path / "s", tokens_per_shard=2000)
    path = tmp_path / "s" / f"train-00001{part}"
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 0x10
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": data[:-1], "emptied": b"", "flipped": data}[damage])
    with pytest.raises(TriviumError, match=rf"train-00001\{part} is (damaged|missing)"):
        Shards(tmp_path / "s")


def test_a_damaged_or_missing_manifest_is_named(tmp_path: Path) -> None:
    write_shards(documents(20), tokenizer(), tmp_path / "s")
    path = tmp_path / "s" / "manifest.json"
    whole = path.read_text()
    for broken in (
        whole[:-20],
        whole.replace('"tokens": ', '"tokens": 1', 1),
        whole.replace('"version": 1', '"version": 9'),
    ):
        path.write_text(broken)
        with pytest.raises(TriviumError, match=r"manifest\.json"):
            Shards(tmp_path / "s")
    path.unlink()
    with pytest.raises(TriviumError, match="no finished corpus"):
        Shards(tmp_path / "s")


def test_a_writer_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    def some():
        yield from documents(50)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(some(), tokenizer(), tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    write_shards(documents(20), tokenizer(), tmp_path / "s")
    other = train_tokenizer(["quite other text " * 5], 300)
    with pytest.raises(TriviumError, match="another tokenizer"):
        Shards(tmp_path / "s", tokenizer=other)


def test_validation_is_a_function_of_the_text_alone(tmp_path: Path) -> None:
    some = documents(500)
    write_shards(some, tokenizer(), tmp_path / "a", validation=0.2)
    again = [Document(d.text, d.fields, f"copy:{d.id}") for d in reversed(some)]
    write_shards(again, tokenizer(), tmp_path / "b", validation=0.2)

    def ids(folder: str, split: str) -> set[str]:
        shards = Shards(tmp_path / folder, split)
        return {shards.id(index).removeprefix("copy:") for index in range(len(shards))}

    assert ids("a", "validation") == ids("b", "validation")
    assert ids("a", "train") | ids("a", "validation") == {document.id for document in some}
    assert not ids("a", "train") & ids("a", "validation")
    assert 60 < len(ids("a", "validation")) < 140
    assert not in_validation(text_hash(some[0]), 0.0)
    assert in_validation(text_hash(some[0]), 1.0)


def test_where_a_picture_lies_does_not_decide_whether_its_row_is_held_out(tmp_path: Path) -> None:
    hashes = []
    for folder in (tmp_path / "a", tmp_path / "elsewhere" / "b"):
        folder.mkdir(parents=True)
        rows = [
            {"messages": [{"role": "user", "content": [{"type": "image", "path": f"{n % 2}.png"}]}]}
            for n in range(3)
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = list(read_documents(str(folder / "rows.jsonl")))
        assert found[0].fields["messages"][0]["content"][0]["path"] == str(folder / "0.png")
        hashes.append([text_hash(one) for one in found])
    assert hashes[0] == hashes[1]
    assert hashes[0][0] == hashes[0][2] != hashes[0][1]


def test_masked_documents_beside_unmasked_ones(tmp_path: Path) -> None:
    """What is not masked is learned whole; the first token of a document is never predicted."""
    random = np.random.default_rng(3)
    found = []
    for number in range(30):
        tokens = random.integers(0, 40, int(random.integers(1, 9)))
        # Shards of a few documents each: some hold masks, some do not, some hold both kinds of documents.
        learned = None if number % 3 or number > 20 else random.random(len(tokens)) < 0.6
        found.append(Encoded(Document(f"text {number}", {}, f"n:{number}"), tokens, 7, learned))
    write_encoded(iter(found), tokenizer(), tmp_path / "shards", tokens_per_shard=20)
    shards = Shards(tmp_path / "shards")
    whole = [np.ones(len(one.tokens), bool) if one.learned is None else one.learned for one in found]
    assert {mask is None for mask in shards._masks} == {True, False}
    assert any(one.learned is not None and one.learned[0] for one in found)
    assert shards.learned_tokens == sum(int(mask[1:].sum()) for mask in whole)
    for index, mask in enumerate(whole):
        for start, end in ((0, len(mask)), (len(mask) // 2, len(mask))):
            learned = shards.learned_of(index, start, end)
            expected = mask[start:end]
            assert np.array_equal(np.ones(end - start, bool) if learned is None else learned, expected)


def test_exact_copies_are_dropped_when_asked(tmp_path: Path) -> None:
    doubled = documents(30) + [Document(d.text, d.fields, "copy") for d in documents(30)]
    assert write_shards(doubled, tokenizer(), tmp_path / "a")["splits"]["train"]["documents"] == 60
    manifest = write_shards(doubled, tokenizer(), tmp_path / "b", unique=True)
    assert manifest["splits"]["train"]["documents"] == 30
    assert manifest["read"]["duplicates"] == 30


def test_documents_that_cannot_be_tokenised_are_named(tmp_path: Path) -> None:
    some = [*documents(5), Document(None, {"prompt": "p"}, "a.jsonl:7")]
    with pytest.raises(TriviumError, match=r"a\.jsonl:7 has neither `text` nor `messages`, but 'prompt'"):
        write_shards(some, tokenizer(), tmp_path / "s")
    manifest = write_shards(some, tokenizer(), tmp_path / "s", skip_refused=True)
    assert manifest["read"]["refused"] == 1
    assert manifest["read"]["named"][0].startswith("a.jsonl:7")


def test_numbers_are_kept_per_document(tmp_path: Path) -> None:
    texts = [document for document in documents(40) if document.text]
    write_shards(texts, tokenizer(), tmp_path / "s", columns=("score",))
    kept = Shards(tmp_path / "s").column("score")
    assert kept.tolist() == [document.fields["score"] for document in texts]
    write_shards(texts, tokenizer(), tmp_path / "none")
    with pytest.raises(TriviumError, match=r"keeps no column 'score' \(it keeps: none\)"):
        Shards(tmp_path / "none").column("score")
    with pytest.raises(TriviumError, match=r"keeps no column 'grade' \(it keeps: score\)"):
        Shards(tmp_path / "s").column("grade")
    with pytest.raises(TriviumError, match=r"c:9: `score`"):
        write_shards(documents(40), tokenizer(), tmp_path / "t", columns=("score",))


def test_an_empty_corpus_opens(tmp_path: Path) -> None:
    write_shards([], tokenizer(), tmp_path / "s")
    shards = Shards(tmp_path / "s")
    assert (len(shards), shards.tokens) == (0, 0)
