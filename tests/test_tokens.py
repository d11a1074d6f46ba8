"""Tokenizers, our own and imported ones: lossless, bytes exact, control tokens cannot be typed (L5)."""

import copy
import json
import random
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, GenerationConfig

from trivium.kit.errors import TriviumError
from trivium.kit.files import write_json
from trivium.tokens.adopt import with_chat_template
from trivium.tokens.extend import extend_tokenizer
from trivium.tokens.lengths import byte_lengths
from trivium.tokens.tokenizer import Tokenizer
from trivium.tokens.train import CONTROL_TOKENS, TAGS, train_tokenizer

WORDS = "the river rises in the hills and the miller counts 12 or 345 sacks; l'été, Ægir, 漢字, 🙂!\n\n  "


def sample_texts(count: int = 300) -> list[str]:
    chance = random.Random(0)
    words = WORDS.split(" ")
    return [" ".join(chance.choices(words, k=30)) for _ in range(count)]


@cache
def own() -> Tokenizer:
    return train_tokenizer(sample_texts(), 400)


def special(content: str) -> AddedToken:
    return AddedToken(content, special=True, normalized=False)


def gpt2_like() -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        sample_texts(), trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([special("<|endoftext|>")])
    return Tokenizer(
        json.loads(backend.to_str()), {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    )


def llama3_like() -> Tokenizer:
    content = json.loads(own().backend.to_str())
    content["model"]["ignore_merges"] = True
    content["added_tokens"] = []
    backend = Backend.from_str(json.dumps(content))
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend.add_special_tokens([special(name) for name in names])
    begin = backend.token_to_id(names[0])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{names[0]} $A", special_tokens=[(names[0], begin)]
    )
    return Tokenizer(json.loads(backend.to_str()), {"bos_token": names[0], "eos_token": names[1]})


def byte_fallback(prefix: str) -> Backend:
    """A sentencepiece-like BPE: spaces as ▁, unknown letters as bytes, control tokens in the model itself."""
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    trained = Backend(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        [*sample_texts(), *["<s> </s>"] * 50],
        trainers.BpeTrainer(vocab_size=120, limit_alphabet=40, show_progress=False),
    )
    learned = json.loads(trained.to_str())["model"]
    letters = [piece for piece in learned["vocab"] if piece not in pieces]
    extra = [piece for piece in ("<", "s", "/", ">", "</", "s>") if piece not in letters]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *letters, *extra])}
    # Merges by which the model alone would spell its own control tokens.
    merges = [("s", ">"), ("<", "s>"), ("<", "/"), ("</", "s>"), *map(tuple, learned["merges"])]
    merges = [pair for pair in dict.fromkeys(merges) if "".join(pair) in vocabulary]
    backend = Backend(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if prefix == "always":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    strip = [] if prefix == "never" else [decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.add_special_tokens([special(piece) for piece in pieces[:3]])
    return backend


def llama2_like(prefix: str = "always") -> Tokenizer:
    return Tokenizer(
        json.loads(byte_fallback(prefix).to_str()),
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True},
    )


def gemma_like() -> Tokenizer:
    backend = byte_fallback("never")
    backend.add_special_tokens([special("<start_of_turn>"), special("<end_of_turn>")])
    return Tokenizer(json.loads(backend.to_str()), {"bos_token": "<s>", "eos_token": "</s>"})


def unigram_like() -> Tokenizer:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        sample_texts(),
        trainers.UnigramTrainer(
            vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
        ),
    )
    return Tokenizer(json.loads(backend.to_str()), {"eos_token": "</s>", "unk_token": "<unk>"})


KINDS = {
    "own": own,
    "gpt2": gpt2_like,
    "llama3": llama3_like,
    "llama2": llama2_like,
    "llama2-first": lambda: llama2_like("first"),
    "gemma": gemma_like,
    "unigram": unigram_like,
}


@cache
def kind(name: str) -> Tokenizer:
    return KINDS[name]()


@cache
def control_strings(name: str) -> tuple[str, ...]:
    return tuple(sorted(kind(name)._control))


any_letters = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_text_never_yields_a_control_token(name: str, data: st.DataObject) -> None:
    tokenizer = kind(name)
    typed = st.sampled_from(control_strings(name))
    text = "".join(
        data.draw(st.lists(st.one_of(any_letters, typed, typed.map(lambda s: s[:-1])), max_size=6))
    )
    ids = tokenizer.encode(text)
    assert not tokenizer.control_ids & set(ids)
    assert tokenizer.encode_batch([text]) == [ids]
    if name != "unigram":
        assert tokenizer.decode(ids) == read_back(name, text)


def read_back(name: str, text: str) -> str:
    """The text as decoding gives it: letters that stand for a space are spaces."""
    if name.startswith(("llama2", "gemma")):
        text = text.replace("▁", " ")
    # With "first" a space at the beginning is taken for the one that is put before every text.
    return text[1:] if name == "llama2-first" and text.startswith(" ") else text


@pytest.mark.parametrize("name", [name for name in KINDS if name != "unigram"])
@pytest.mark.parametrize("text", ["", " ", "▁", "  a ▁b", "a "])
def test_spaces_are_read_back(name: str, text: str) -> None:
    assert kind(name).decode(kind(name).encode(text)) == read_back(name, text)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=any_letters)
@example(text="The miller's 12 sacks\n\n  of flour")
def test_text_without_control_strings_encodes_as_ever(name: str, text: str) -> None:
    tokenizer = kind(name)
    if any(control in text for control in control_strings(name)):
        return
    assert tokenizer.encode(text) == tokenizer.backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", KINDS)
def test_a_control_string_would_be_a_control_token_if_we_let_it(name: str) -> None:
    tokenizer = kind(name)
    for control in control_strings(name):
        naive = tokenizer.backend.encode(control, add_special_tokens=False).ids
        assert tokenizer.token_id(control) in naive
        assert tokenizer.token_id(control) not in tokenizer.encode(control) or control == "<unk>"


@pytest.mark.parametrize("name", [name for name in KINDS if name != "unigram"])
@settings(max_examples=40, deadline=None)
@given(text=any_letters)
def test_byte_lengths_add_up(name: str, text: str) -> None:
    tokenizer = kind(name)
    ids = tokenizer.encode(text)
    dummy_prefix = name.startswith("llama2") and bool(text)
    if name == "llama2-first" and text.startswith((" ", "▁")):
        dummy_prefix = False
    letters_as_space = text.replace("▁", " ") if name.startswith(("llama2", "gemma")) else text
    assert tokenizer.byte_lengths()[ids].sum() == len(letters_as_space.encode()) + dummy_prefix


@pytest.mark.parametrize(
    ("decoder", "pieces"),
    [
        ("ByteLevel", {"Ġa": 2, "Ã©": 2, "naïve": 6, "漢": 3}),
        ("ByteFallback", {"<0x0A>": 1, "▁漢": 4, "naïve": 6, "é": 2}),
        ("Metaspace", {"▁漢": 4, "naïve": 6}),
        (None, {"漢": 3, "naïve": 6, "a": 1}),
    ],
)
def test_the_bytes_of_a_token_are_those_of_its_text_in_every_kind_of_vocabulary(decoder, pieces) -> None:
    """Letters that stand for bytes, pieces written in UTF-8, and tokens added by hand."""
    ids = {piece: index for index, piece in enumerate(pieces)} | {"<|end|>": len(pieces)}
    texts = list(ids)
    described = {"decoder": {"type": decoder}, "added_tokens": [{"content": "naïve"}, {"content": "<|end|>"}]}
    found = byte_lengths(described, ids, frozenset({len(pieces)}), len(ids) + 1, lambda one: texts[one])
    assert found.tolist() == [*pieces.values(), 0, 0]


@pytest.mark.parametrize("name", KINDS)
def test_control_tokens_have_no_bytes(name: str) -> None:
    tokenizer = kind(name)
    lengths = tokenizer.byte_lengths()
    assert len(lengths) == tokenizer.vocabulary_size
    assert not lengths[sorted(tokenizer.control_ids)].any()


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_folder_opens_in_transformers_and_here(name: str, tmp_path) -> None:
    tokenizer = kind(name)
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    referee = AutoTokenizer.from_pretrained(tmp_path)
    for text in ["The miller's 12 sacks\n\n  of flour", "漢字 🙂 x", " leading", "trailing ", "a\n\nb"]:
        assert again.encode(text) == tokenizer.encode(text)
        assert referee.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert referee.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert again.fingerprint == tokenizer.fingerprint
    assert again.end_of_text_id == tokenizer.end_of_text_id
    assert referee.eos_token_id in again.stop_ids


def test_roles_of_each_family() -> None:
    assert own().token(own().end_of_text_id) == "<|endoftext|>"
    assert own().token(own().end_of_turn_id) == "<|im_end|>"
    assert own().token(own().pad_id) == "<|pad|>"
    assert own().beginning_id is None
    assert own().stop_ids == {own().end_of_text_id, own().end_of_turn_id}
    assert kind("llama3").token(kind("llama3").beginning_id) == "<|begin_of_text|>"
    assert kind("llama2").token(kind("llama2").beginning_id) == "<s>"
    assert kind("gpt2").beginning_id is None
    assert kind("gpt2").end_of_turn_id is None


def changed(tokenizer: Tokenizer, **changes) -> Tokenizer:
    """The same tokenizer with other settings, chat templates or stop ids."""
    parts = {"settings": tokenizer.settings, "templates": tokenizer.templates, **changes}
    return Tokenizer(json.loads(tokenizer.backend.to_str()), **parts)


@pytest.mark.parametrize(
    "changes",
    [
        {"templates": {}},
        {"templates": {"default": "{{ messages[0].content }}"}},
        {"templates": {**own().templates, "tool_use": "{{ tools }}"}},
        {"settings": {**own().settings, "eos_token": "<|endoftext|>"}},
        {"settings": {**own().settings, "bos_token": "<|endoftext|>", "add_bos_token": True}},
        {"settings": {**own().settings, "extra_special_tokens": ["<think>"]}},
    ],
)
def test_whatever_changes_ids_or_rendered_chats_changes_the_fingerprint(changes: dict) -> None:
    assert changed(own()).fingerprint == own().fingerprint
    assert changed(own(), **changes).fingerprint != own().fingerprint


def test_a_token_before_every_text_is_part_of_the_fingerprint() -> None:
    """Only this setting differs, and with it every document that is encoded for training."""
    settings = {**own().settings, "bos_token": "<|endoftext|>"}
    without, begun = (changed(own(), settings={**settings, "add_bos_token": one}) for one in (False, True))
    assert (without.beginning_id, begun.beginning_id) == (None, own().end_of_text_id)
    assert without.fingerprint != begun.fingerprint


def test_every_stop_id_of_a_folder_is_kept(tmp_path) -> None:
    """As transformers reads them, through a copy, a new chat template and a grown vocabulary."""
    tokenizer = gpt2_like()
    tokenizer.save(tmp_path)
    further = [5, 7]
    GenerationConfig(eos_token_id=[tokenizer.end_of_text_id, *further]).save_pretrained(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert set(GenerationConfig.from_pretrained(tmp_path).eos_token_id) == loaded.stop_ids
    assert copy.deepcopy(loaded).stop_ids == loaded.stop_ids
    assert extend_tokenizer(loaded, sample_texts(), 4).stop_ids == loaded.stop_ids
    chat = with_chat_template(loaded)
    assert chat.stop_ids == loaded.stop_ids | {chat.token_id("<|im_end|>")}
    GenerationConfig(eos_token_id=further[0]).save_pretrained(tmp_path)
    assert Tokenizer.load(tmp_path).stop_ids == {tokenizer.end_of_text_id, further[0]}


def test_tags_are_tokens_but_not_control() -> None:
    tokenizer = own()
    for tag in TAGS:
        assert tokenizer.encode(f"a{tag}b").count(tokenizer.token_id(tag)) == 1
        assert tokenizer.token_id(tag) not in tokenizer.control_ids
    assert {tokenizer.token(identity) for identity in tokenizer.control_ids} == set(CONTROL_TOKENS)


@pytest.mark.parametrize(("digits", "pieces"), [("single", 6), ("triples", 2)])
def test_digits_policy(digits: str, pieces: int) -> None:
    tokenizer = train_tokenizer(["123456 123456 123456"] * 50, 400, digits=digits)
    assert len(tokenizer.encode("123456")) == pieces


def test_training_gives_the_same_tokenizer_twice_and_respects_the_size() -> None:
    one, two = (train_tokenizer(sample_texts(), 300) for _ in range(2))
    assert one.fingerprint == two.fingerprint
    assert one.vocabulary_size == 300
    assert train_tokenizer(sample_texts(), 301).fingerprint != one.fingerprint


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(TriviumError, match="need 264"):
        train_tokenizer(["a"], 263)


def test_a_folder_without_a_tokenizer_is_named(tmp_path) -> None:
    with pytest.raises(TriviumError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(TriviumError, match=str(tmp_path)):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("stop", [2**31 - 1, -1, 1.5, "</s>", True, [0, 10**9], [[0]]])
def test_a_generation_config_that_names_no_token_is_refused(tmp_path, stop):
    tokenizer = train_tokenizer(["the town has a baker"] * 20, 300)
    tokenizer.save(tmp_path)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": stop})
    with pytest.raises(TriviumError, match=r"generation_config.json: eos_token_id names .* go from 0 to"):
        Tokenizer.load(tmp_path)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [0, tokenizer.vocabulary_size - 1]})
    assert Tokenizer.load(tmp_path).stop_ids >= {0, tokenizer.vocabulary_size - 1}
