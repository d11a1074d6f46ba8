"""`tokenizer.model` alone: the ids that SentencePiece gave, from models that it trained (0.2.3)."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest

from trivium.kit.errors import TriviumError
from trivium.tokens.sentencepiece import read_sentencepiece
from trivium.tokens.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden" / "sentencepiece"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))


def folder_of(name: str, place: Path, **settings: object) -> Path:
    shutil.copy(GOLDEN / f"{name}.model", place / "tokenizer.model")
    if settings:
        (place / "tokenizer_config.json").write_text(json.dumps(settings))
    return place


@pytest.mark.parametrize("name", EXPECTED)
def test_ids_and_texts_are_sentencepieces(name, tmp_path):
    """Merged and Unigram pieces, with bytes for unknown letters and without, with a first space or none."""
    tokenizer = Tokenizer.load(folder_of(name, tmp_path))
    for row in EXPECTED[name]:
        assert tokenizer.encode(row["text"]) == row["ids"], row["text"]
        if 0 not in row["ids"]:
            # SentencePiece writes what is unknown as two question marks.
            assert tokenizer.decode(row["ids"]) == row["back"]


def test_the_converted_tokenizer_is_the_same_when_saved(tmp_path):
    (tmp_path / "old").mkdir()
    before = Tokenizer.load(folder_of("unigram", tmp_path / "old"))
    before.save(tmp_path / "new")
    after = Tokenizer.load(tmp_path / "new")
    assert after.fingerprint == before.fingerprint
    text = "the river rises"
    assert after.encode(text) == before.encode(text)
    assert after.token(after.end_of_text_id) == "</s>"
    assert after.beginning_id == after.token_id("<s>")


def test_what_the_settings_add_stands_behind_the_pieces(tmp_path):
    place = folder_of(
        "bpe", tmp_path, add_bos_token=False, chat_template="{{ messages }}",
        added_tokens_decoder={"380": {"content": "<|end|>", "special": True}, "0": {"content": "<unk>"}},
    )  # fmt: skip
    tokenizer = Tokenizer.load(place)
    assert tokenizer.vocabulary_size == 381
    assert 380 in tokenizer.control_ids
    assert tokenizer.beginning_id is None
    assert tokenizer.templates == {"default": "{{ messages }}"}


def test_text_never_becomes_a_control_token(tmp_path):
    tokenizer = Tokenizer.load(folder_of("bpe", tmp_path))
    assert not set(tokenizer.encode("the </s> river <s>")) & tokenizer.control_ids


@pytest.mark.parametrize(
    "content", [b"", b"IQ== 0\nIg== 1\n", b"\xff" * 40, struct.pack("<I", 10) + b"\x00" * 8]
)
def test_another_file_of_that_name_is_refused(content, tmp_path):
    """Llama 3's list of tokens, say, which does not say how words are split."""
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TriviumError, match=r"tokenizer\.model") as refusal:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["qwen.tiktoken", "tiktoken.model"])
def test_ranks_of_tiktoken_alone_are_refused_with_the_remedy(name, tmp_path):
    (tmp_path / name).write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(TriviumError, match=f"{name} lists byte pairs .* put the tokenizer.json beside it"):
        Tokenizer.load(tmp_path)


def test_a_file_that_ends_early_is_refused(tmp_path):
    whole = (GOLDEN / "bpe.model").read_bytes()
    for size in (1, 100, len(whole) - 3):
        (tmp_path / "tokenizer.model").write_bytes(whole[:size])
        with pytest.raises(TriviumError):
            read_sentencepiece(tmp_path / "tokenizer.model")
