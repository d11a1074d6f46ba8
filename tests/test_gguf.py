"""GGUF in both directions: transformers' reader and the original folder are the referees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf_files import FAMILIES, SHAPE, folder_of, tokenizer

import trivium
from trivium.kit.errors import TriviumError
from trivium.model.folder import load_model
from trivium.model.gguf.blocks import encode, stored_as
from trivium.model.gguf.read import convert
from trivium.model.gguf.write import MATRICES, _type_of, write_gguf
from trivium.model.hub import resolve
from trivium.pipeline.plan import plan
from trivium.tokens.gguf import read_tokenizer
from trivium.tokens.tokenizer import Tokenizer

# What transformers' own reader can open.
REFEREED = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2"]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.mark.quick_cases(5)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_goes_through_a_file_comes_back_as_it_was(family: str, tmp_path: Path) -> None:
    folder_of(family, tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    before, after = load_model(tmp_path / "model"), load_model(resolve(tmp_path / "model.gguf"))
    for name, weight in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], weight, rtol=0, atol=1e-7, msg=name)
    ignored = ("extra", "rotates", "windows", "family")
    for field, value in vars(before.config).items():
        if field not in ignored:
            found = getattr(after.config, field)
            if field == "experts" and value is not None:
                # How strongly training balances experts is no part of what a file computes.
                found = replace(found, balance=value.balance)
            assert found == value, field
    for layer in range(before.config.layers):
        assert after.config.rotates_at(layer) == before.config.rotates_at(layer)
        assert after.config.window(layer) == before.config.window(layer)


@pytest.mark.quick_cases(6)
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("family", REFEREED)
def test_a_file_gives_the_tensors_that_transformers_reads(
    family: str, kind: str, tmp_path: Path, quiet: None
) -> None:
    folder_of(family, tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", kind)  # type: ignore[arg-type]
    same_tensors(tmp_path)


@pytest.mark.parametrize("kind", ["BF16", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K"])
def test_types_that_other_programs_write_give_the_tensors_that_transformers_reads(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: None
) -> None:
    wide = SHAPE | {"hidden_size": 256, "intermediate_size": 256}
    monkeypatch.setitem(FAMILIES, "llama", ("LlamaConfig", wide))
    monkeypatch.setitem(MATRICES, "f32", kind)
    folder_of("llama", tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    assert kind in {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    same_tensors(tmp_path)


def same_tensors(place: Path) -> None:
    """What a file gives here is bit for bit what transformers reads from it."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        place, gguf_file="model.gguf", dtype=torch.float32
    )
    convert(place / "model.gguf", place / "read")
    ours = transformers.AutoModelForCausalLM.from_pretrained(place / "read", dtype=torch.float32)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_blocks_of_256_are_close_to_what_they_hold(kind: str) -> None:
    values = np.random.default_rng(0).normal(size=(32, 512)).astype(np.float32)
    values[3] = 0
    back = gguf.dequantize(encode(values, kind), gguf.GGMLQuantizationType[kind])
    error = np.sqrt(((back - values) ** 2).mean())
    assert np.array_equal(back[3], values[3])
    # A uniform grid of 16 (64) levels over what 32 (16) normal values span leaves about this much.
    assert error < {"Q4_K": 0.085, "Q6_K": 0.025}[kind]
    # Constant and one-sided groups have offsets and scales at the ends of their ranges.
    odd = np.stack(
        [np.full(256, 3.0), np.full(256, -3.0), np.linspace(1, 2, 256), -np.linspace(1, 2, 256)]
    ).astype(np.float32)
    back = gguf.dequantize(encode(odd, kind), gguf.GGMLQuantizationType[kind])
    assert np.abs(back - odd).max() < {"Q4_K": 0.12, "Q6_K": 0.05}[kind]


def test_six_bits_hold_whole_numbers_down_to_minus_32_and_their_mirror() -> None:
    """The largest of a group is given -32, whatever its sign, since there is no 32."""
    values = np.random.default_rng(0).integers(-31, 32, size=(8, 256)).astype(np.float32)
    values[:, ::16] = -32
    values[::2] *= -1
    back = gguf.dequantize(encode(values, "Q6_K"), gguf.GGMLQuantizationType["Q6_K"])
    assert np.abs(back - values).max() < 0.1


def test_rows_that_blocks_do_not_fill_are_stored_in_smaller_ones() -> None:
    assert [stored_as("Q4_K", width) for width in (512, 576, 40)] == ["Q4_K", "Q5_0", "F16"]
    assert [stored_as("Q6_K", width) for width in (512, 576)] == ["Q6_K", "Q8_0"]


def test_the_first_and_last_layers_and_every_third_between_get_more_bits():
    """As llama.cpp's `use_more_bits` gives them."""
    weight = torch.empty(256, 256)
    types = [_type_of(f"blk.{layer}.attn_v.weight", weight, "q4_K_M", 32, False) for layer in range(32)]
    finer = [layer for layer, kind in enumerate(types) if kind == "Q6_K"]
    assert finer == [0, 1, 2, 3, *range(6, 28, 3), 28, 29, 30, 31]


@pytest.mark.parametrize("kind", ["q8_0", "q4_K_M"])
def test_a_quantised_file_answers_like_its_model(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        FAMILIES, "llama", ("LlamaConfig", SHAPE | {"hidden_size": 256, "intermediate_size": 256})
    )
    folder_of("llama", tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", kind)  # type: ignore[arg-type]
    tokens = tokenizer().encode("the cat sat on the mat and the dog ran")
    before = trivium.load(tmp_path / "model").logits(tokens)
    after = trivium.load(tmp_path / "model.gguf").logits(tokens)
    error = (after - before).pow(2).mean().sqrt() / before.std()
    assert error < {"q8_0": 0.08, "q4_K_M": 0.8}[kind]


def test_the_tokenizer_and_template_come_along(tmp_path: Path) -> None:
    folder_of("qwen3", tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f16")
    before, after = tokenizer(), trivium.load(tmp_path / "model.gguf").tokenizer
    text = "the cat\n\n  sat 1234 <|im_end|> on <think>the</think> mat, don't été"
    assert after.encode(text) == before.encode(text)
    assert after.decode(after.encode(text)) == text
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    assert after.encode_chat(messages) == before.encode_chat(messages)
    assert after.stop_ids == before.stop_ids
    assert (after.pad_id, after.beginning_id) == (before.pad_id, before.beginning_id)


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2"])
def test_words_are_split_as_transformers_splits_them(name: str, tmp_path: Path, quiet: None) -> None:
    folder_of("llama", tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "plain.gguf", "f16")
    path = _with_pattern(tmp_path / "plain.gguf", tmp_path / "model.gguf", name)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours = Tokenizer.load(resolve(path))
    for text in ("We'll see 12345 cats, the THE\n\n\n  tab\tend  ", "the house of 7 dogs!!", "naïve été"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


def _with_pattern(source: Path, target: Path, name: str) -> Path:
    """The same file with another name for how words are split, which is as long or shorter."""
    content = source.read_bytes()
    key = b"tokenizer.ggml.pre"
    place = content.index(key) + len(key) + 4
    size = int.from_bytes(content[place : place + 8], "little")
    old, new = content[place : place + 8 + size], len(name).to_bytes(8, "little") + name.encode()
    # Alignment is to 32 bytes: another key is made longer or shorter by as much.
    filler = b"general.name"
    here = content.index(filler) + len(filler) + 4
    length = int.from_bytes(content[here : here + 8], "little")
    label = content[here + 8 : here + 8 + length] + b"-" * 32
    kept = length - (len(new) - len(old))
    head = content[:here] + kept.to_bytes(8, "little") + label[:kept] + content[here + 8 + length : place]
    target.write_bytes(head + new + content[place + len(old) :])
    return target


def sentencepiece_metadata() -> dict[str, object]:
    """A small vocabulary with scores and bytes, as SentencePiece lists it."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["\u2581t", "he", "\u2581the", "\u2581c", "at", "\u2581cat", "\u2581\u2581"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, "\u2581", *letters]
    count = len(pieces)
    kinds = [2, 3, 3, *[6] * 256, *[1] * (count - 259)]
    scores = [0.0] * 259 + [-float(rank) for rank in range(count - 259)]
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": pieces, "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip


def test_pieces_with_scores_merge_best_first() -> None:
    ours = read_tokenizer(sentencepiece_metadata(), "file")
    assert ours is not None
    shown = [ours.token(one) for one in ours.encode("the cat é")]
    assert shown == ["\u2581the", "\u2581cat", "\u2581", "<0xC3>", "<0xA9>"]
    assert ours.decode(ours.encode("the cat é  </s> x")) == "the cat é  </s> x"
    assert ours.beginning_id == 1
    assert ours.stop_ids == {2}


@pytest.mark.parametrize("cut", [3, 20, 400, 30_000, -1])
def test_a_file_that_is_cut_off_is_named(cut: int, tmp_path: Path) -> None:
    folder_of("llama", tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f16")
    content = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(content[:cut] if cut > 0 else content[: 2 * len(content) // 3])
    with pytest.raises(TriviumError, match=r"model\.gguf is damaged or no GGUF file.*fetch it again"):
        trivium.load(tmp_path / "model.gguf")


def test_a_file_of_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(TriviumError, match=r"architecture 'mamba' is not supported; gpt2, .*llama are"):
        trivium.load(tmp_path / "other.gguf")


def test_what_llama_cpp_would_compute_otherwise_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "mistral", ("MistralConfig", SHAPE | {"sliding_window": 16}))
    folder_of("mistral", tmp_path / "model")
    with pytest.raises(TriviumError, match="cannot compute attention windows"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f16")
    assert not (tmp_path / "model.gguf").exists()


def test_a_recipe_starts_from_a_file(tmp_path: Path) -> None:
    folder_of("llama", tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f16")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("the cat sat on the mat. " * 400)
    (tmp_path / "mine.yaml").write_text(
        "stages: {more: {kind: midtrain, from: ./model.gguf, data: ./texts, context: 32, tokens: 128,"
        " batch: 64}}"
    )
    assert "parameters" in plan(tmp_path / "mine.yaml", tmp_path / "runs")[1][4]
    made = trivium.run(tmp_path / "mine.yaml", runs=tmp_path / "runs")
    assert made["more"].model().transformer.config.family == "llama"
