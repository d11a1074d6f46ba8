"""A vocabulary that grows: merges learnt on new text, after which every old id still means what it meant."""

import heapq
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable

from tokenizers import Tokenizer as Backend

from trivium.kit.errors import TriviumError
from trivium.tokens.tokenizer import Tokenizer

Pair = tuple[str, str]


def word_pieces(backend: Backend, texts: Iterable[str]) -> Counter[tuple[str, ...]]:
    """How often each word occurs in the texts, as the pieces the old merges leave of it."""
    words: Counter[str] = Counter()
    normalizer, splitter = backend.normalizer, backend.pre_tokenizer
    for text in texts:
        clean = normalizer.normalize_str(text) if normalizer is not None else text
        words.update(word for word, _ in splitter.pre_tokenize_str(clean))
    pieces: Counter[tuple[str, ...]] = Counter()
    for word, count in words.items():
        pieces[tuple(token.value for token in backend.model.tokenize(word))] += count
    return pieces


def learn_merges(words: Counter[tuple[str, ...]], known: set[str], count: int) -> list[Pair]:
    """The `count` most useful further merges, by repeatedly joining the pair that is seen most often."""
    spellings = [list(word) for word in words]
    frequency = list(words.values())
    pairs: Counter[Pair] = Counter()
    where: dict[Pair, set[int]] = defaultdict(set)
    for index, spelling in enumerate(spellings):
        for pair in itertools.pairwise(spelling):
            pairs[pair] += frequency[index]
            where[pair].add(index)
    # Ties go to the pair that sorts first, so that the same text always teaches the same merges.
    queue = [(-seen, pair) for pair, seen in pairs.items()]
    heapq.heapify(queue)
    merges: list[Pair] = []
    while queue and len(merges) < count:
        seen, pair = heapq.heappop(queue)
        if pairs[pair] != -seen:
            if pairs[pair] > 1:
                heapq.heappush(queue, (-pairs[pair], pair))
            continue
        if -seen < 2:
            break
        if "".join(pair) in known:
            # The old merges reach this token by another way; a second way to it would add no token.
            pairs[pair] = 0
            continue
        merges.append(pair)
        known.add("".join(pair))
        touched: set[Pair] = set()
        for index in where.pop(pair):
            spelling, times = spellings[index], frequency[index]
            for old in itertools.pairwise(spelling):
                pairs[old] -= times
            joined: list[str] = []
            for piece in spelling:
                if joined and (joined[-1], piece) == pair:
                    # The mark keeps a freshly joined piece from joining again in the same pass.
                    joined[-1] = joined[-1] + piece + "\0"
                else:
                    joined.append(piece)
            spellings[index] = [piece.removesuffix("\0") for piece in joined]
            for new in itertools.pairwise(spellings[index]):
                pairs[new] += times
                where[new].add(index)
                touched.add(new)
        for new in touched:
            heapq.heappush(queue, (-pairs[new], new))
    return merges


def extended_backend(backend: Backend, texts: Iterable[str], added: int) -> Backend:
    """The same tokenizer with up to `added` further tokens, whose ids come after every old one."""
    content = json.loads(backend.to_str())
    if content["model"]["type"] != "BPE" or backend.pre_tokenizer is None:
        raise TriviumError(
            f"A {content['model']['type']} tokenizer cannot be extended with merges: use a byte-level BPE"
        )
    vocabulary: dict[str, int] = content["model"]["vocab"]
    merges = learn_merges(word_pieces(backend, texts), set(vocabulary), added)
    # A control token that stands only among the added tokens would get a new number behind the new merges.
    for token in content["added_tokens"]:
        vocabulary.setdefault(token["content"], token["id"])
    first = max(vocabulary.values()) + 1
    for offset, pair in enumerate(merges):
        vocabulary["".join(pair)] = first + offset
    old = content["model"]["merges"]
    as_text = bool(old) and isinstance(old[0], str)
    content["model"]["merges"] = old + [" ".join(pair) if as_text else list(pair) for pair in merges]
    return Backend.from_str(json.dumps(content))


def extend_tokenizer(tokenizer: Tokenizer, texts: Iterable[str], added: int) -> Tokenizer:
    """The tokenizer with up to `added` tokens learnt from the texts; settings and chat template stay."""
    grown = extended_backend(tokenizer.backend, texts, added)
    return Tokenizer(
        json.loads(grown.to_str()), tokenizer.settings, tokenizer.templates, sorted(tokenizer.stop_ids)
    )
