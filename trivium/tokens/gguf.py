"""Tokenizers in GGUF's metadata: the same pieces, merges and control tokens under llama.cpp's names.

A GGUF file has no `tokenizer.json`. It lists the pieces with a type each, the merges (byte-level BPE) or a
score of each piece (SentencePiece), and a *name* for the pattern that splits text into words. llama.cpp has
the patterns themselves in its code, so a name that is not in the table below cannot be read, and a pattern
that has no name cannot be written.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.tokens.roles import content_of
from trivium.tokens.tokenizer import Tokenizer
from trivium.tokens.train import splitting

Json = dict[str, Any]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SIGNS_AND_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TRIPLES = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _SIGNS_AND_SPACES
SINGLES = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _SIGNS_AND_SPACES
PATTERNS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), TRIPLES),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), SINGLES),
}
"""The patterns of names; `gpt-2` and its like split as the byte-level step itself does."""
BYTE_LEVEL = ("gpt-2", "gpt2", "olmo", "mpt", "phi-2", "default")
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
"""Names under which every digit stands alone and the byte-level step splits the rest."""
NEAR = {splitting("single"): "qwen2", splitting("triples"): "llama-bpe"}
"""Patterns of Trivium's own, which differ from a named one only in that a mark stays with its letter."""


def read_tokenizer(metadata: Mapping[str, Any], where: str) -> Tokenizer | None:
    """The tokenizer that a file's metadata describes; None where the file has none."""
    kind = metadata.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return None
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise TriviumError(f"{where} lists no tokens: fetch it again.")
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise TriviumError(
            f"{where} has {len(tokens)} tokens and {len(types)} types of them: fetch it again."
        )
    if kind == "gpt2":
        content = _byte_level(metadata, tokens, where)
    elif kind == "llama":
        content = _sentencepiece(metadata, tokens, where)
    else:
        raise TriviumError(
            f"{where}: tokenizers of the kind {kind!r} are not read; convert the model's Hugging Face folder."
        )
    content["added_tokens"] = [
        added_token(identity, token, kind == CONTROL)
        for identity, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    settings: Json = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, name in ROLES.items():
        identity = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if identity is not None and 0 <= identity < len(tokens):
            settings[role] = tokens[identity]
    begins = metadata.get("tokenizer.ggml.add_bos_token")
    # Files of a time before the flag: SentencePiece and Llama 3 put it there unasked.
    begins = kind_begins(metadata) if begins is None else begins
    if begins and "bos_token" in settings:
        content["post_processor"] = begin_with(settings["bos_token"], tokens)
    return Tokenizer(complete(content), settings, _templates(metadata), _ends(metadata, len(tokens)))


def kind_begins(metadata: Mapping[str, Any]) -> bool:
    """Whether a file without the flag means its beginning token to stand before every text."""
    third = metadata.get("tokenizer.ggml.pre") in ("llama-bpe", "llama3")
    return third or metadata["tokenizer.ggml.model"] == "llama"


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], where: str) -> Json:
    name = metadata.get("tokenizer.ggml.pre", "default")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    steps: list[Json] = []
    if name in PATTERNS:
        split = {
            "type": "Split",
            "pattern": {"Regex": PATTERNS[name]},
            "behavior": "Isolated",
            "invert": False,
        }
        steps, level = [split], level | {"use_regex": False}
    elif name in SINGLE_DIGITS:
        steps = [{"type": "Digits", "individual_digits": True}]
    elif name not in BYTE_LEVEL:
        known = sorted({*PATTERNS, *SINGLE_DIGITS, *BYTE_LEVEL})
        raise TriviumError(
            f"{where}: its tokenizer splits words as {name!r}, which is not known ({', '.join(known)} are); "
            "use the model's Hugging Face folder."
        )
    merges = [merge.split(" ", 1) for merge in metadata.get("tokenizer.ggml.merges") or []]
    vocabulary = _vocabulary(tokens, where)
    for pair in merges:
        if len(pair) != 2 or "".join(pair) not in vocabulary:
            raise TriviumError(f"{where}: the merge {' '.join(pair)!r} makes no token: fetch it again.")
    return {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, level]} if steps else level,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        # Llama 3 takes a word that is a token whole, whatever merges would make of it.
        "model": bpe_model(vocabulary, merges, ignore_merges=PATTERNS.get(name) == TRIPLES),
    }


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], where: str) -> Json:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise TriviumError(f"{where}: its tokenizer has no score for each token: fetch it again.")
    vocabulary = _vocabulary(tokens, where)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    normaliser: Json = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoders: list[Json] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        normaliser = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, normaliser]}
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    model = bpe_model(vocabulary, merges_by_score(tokens, scores), byte_fallback=True, fuse_unk=True)
    model["unk_token"] = tokens[unknown] if 0 <= unknown < len(tokens) else None
    return {"normalizer": normaliser, "decoder": {"type": "Sequence", "decoders": decoders}, "model": model}


def merges_by_score(tokens: Sequence[str], scores: Sequence[float]) -> list[list[str]]:
    """Every way to make a piece of two others, the best piece first: SentencePiece's rule as a list."""
    ids = {token: identity for identity, token in enumerate(tokens)}
    found: list[tuple[float, int, int, int]] = []
    for token, identity in ids.items():
        pairs = [
            (ids[token[:cut]], ids[token[cut:]])
            for cut in range(1, len(token))
            if token[:cut] in ids and token[cut:] in ids
        ]
        found += [(-scores[identity], identity, left, right) for left, right in sorted(pairs)]
    found.sort(key=lambda one: one[:2])
    return [[tokens[left], tokens[right]] for _, _, left, right in found]


def _vocabulary(tokens: Sequence[str], where: str) -> dict[str, int]:
    vocabulary = {token: identity for identity, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise TriviumError(f"{where}: its tokenizer lists a token twice: fetch it again.")
    return vocabulary


def bpe_model(vocabulary: dict[str, int], merges: list[list[str]], **settings: bool) -> Json:
    """The model part of a tokenizer that merges pairs, in the order of `merges`."""
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        **settings, "vocab": vocabulary, "merges": merges,
    }  # fmt: skip


def added_token(identity: int, token: str, special: bool) -> Json:
    """A token that is matched whole, before anything is merged."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": identity, "content": token, **plain, "special": special}


def begin_with(token: str, tokens: Sequence[str]) -> Json:
    """The step that puts a token before every text."""
    one = {"SpecialToken": {"id": token, "type_id": 0}}
    text, other = ({"Sequence": {"id": name, "type_id": kind}} for name, kind in (("A", 0), ("B", 1)))
    known = {token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]}}
    return {
        "type": "TemplateProcessing", "single": [one, text], "pair": [one, text, other],
        "special_tokens": known,
    }  # fmt: skip


def complete(content: Json) -> Json:
    """The whole of a `tokenizer.json`, with nothing where a step is left out."""
    keys = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": content["added_tokens"]}
    return head | {key: content.get(key) for key in keys} | {"model": content["model"]}


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    found = {"default": metadata[prefix]} if isinstance(metadata.get(prefix), str) else {}
    named = {
        key.removeprefix(f"{prefix}."): value
        for key, value in metadata.items()
        if key.startswith(f"{prefix}.")
    }
    return found | {name: value for name, value in named.items() if name != "default"}


def _ends(metadata: Mapping[str, Any], count: int) -> list[int]:
    """The tokens that end a turn or a message, where the file names them beside the end of a text."""
    named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return sorted({identity for identity in named if identity is not None and 0 <= identity < count})


def write_tokenizer(tokenizer: Tokenizer, vocabulary: int) -> tuple[Json, list[str]]:
    """The metadata of a tokenizer for a model with `vocabulary` rows, and what a person should know of it."""
    content = json.loads(tokenizer.backend.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise TriviumError(
            f"GGUF: tokenizers of the kind {model['type']} are not written, only BPE; export with --to hf."
        )
    notes: list[str] = []
    pieces = {
        identity: piece for piece, identity in tokenizer.backend.get_vocab(with_added_tokens=True).items()
    }
    special = {token["id"]: token["special"] for token in content["added_tokens"]}
    tokens, types = [], []
    for identity in range(vocabulary):
        tokens.append(pieces.get(identity, f"[PAD{identity}]"))
        types.append(NORMAL if identity in pieces else UNUSED)
        if identity in tokenizer.control_ids or special.get(identity):
            types[-1] = CONTROL
        elif identity in special:
            types[-1] = USER_DEFINED
    merges = [
        tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]
    ]
    found: Json = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if model["byte_fallback"]:
        found |= _scored(content, merges, tokens, types)
    else:
        name, note = _name_of_pattern(content["pre_tokenizer"])
        notes += note
        found |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name}
        found["tokenizer.ggml.merges"] = [f"{left} {right}" for left, right in merges]
    # llama.cpp stops at this one, and at those whose names it knows for ends of a text or a turn.
    ids = {"eos": tokenizer.end_of_reply_id, "padding": tokenizer.pad_id}
    for role in ("bos_token", "unk_token"):
        named = tokenizer.token_id(content_of(tokenizer.settings.get(role)) or "")
        if named is not None:
            ids[ROLES[role]] = named
    found |= {f"tokenizer.ggml.{name}_token_id": identity for name, identity in ids.items()}
    found["tokenizer.ggml.add_bos_token"] = tokenizer.beginning_id is not None
    for name, template in tokenizer.templates.items():
        key = "tokenizer.chat_template" + ("" if name == "default" else f".{name}")
        found[key] = template
    return found, notes


def _name_of_pattern(step: Json | None) -> tuple[str, list[str]]:
    """What llama.cpp calls a way to split words, and where it differs a little."""
    steps = (step or {}).get("pretokenizers") or ([step] if step else [])
    kinds = [one["type"] for one in steps]
    if kinds == ["ByteLevel"] and steps[0]["use_regex"] and not steps[0]["add_prefix_space"]:
        return "gpt-2", []
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
        return "smollm", []
    if kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"]:
        pattern = steps[0]["pattern"].get("Regex")
        if pattern in NEAR:
            return NEAR[pattern], ["combining marks in a text are split from their letters by llama.cpp"]
        for name, known in PATTERNS.items():
            if pattern == known:
                return name, []
    raise TriviumError(
        "GGUF: llama.cpp has no name for the way this tokenizer splits words; export with --to hf."
    )


def _scored(
    content: Json, merges: Sequence[tuple[str, ...]], tokens: Sequence[str], types: list[int]
) -> Json:
    """SentencePiece's form: a piece's score falls with the rank of the first merge that makes it."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    for identity, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and types[identity] == NORMAL:
            types[identity] = BYTE
    unknown = content["model"].get("unk_token")
    if unknown in tokens:
        types[list(tokens).index(unknown)] = UNKNOWN
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [float(-ranks.get(token, 0)) for token in tokens],
        "tokenizer.ggml.add_space_prefix": _puts_a_space_first(content),
    }  # fmt: skip


def _puts_a_space_first(content: Json) -> bool:
    """Whether a text is read as if a space stood before it."""
    normaliser, before = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    steps = normaliser.get("normalizers") or [normaliser]
    scheme = before.get("prepend_scheme") if before.get("type") == "Metaspace" else None
    return any(step.get("type") == "Prepend" for step in steps) or scheme in ("always", "first")
