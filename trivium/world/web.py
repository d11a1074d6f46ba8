"""The web as it is: good texts under duplicates, boilerplate, spam, other languages and leaked items."""

from dataclasses import dataclass
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.world import facts, prose, sums, tongue
from trivium.world.chance import Chance
from trivium.world.document import Share, Split, WorldDocument
from trivium.world.words import GOODS, LOOKS, THINGS, sentences

LABELS = ("clean", "duplicate", "near duplicate", "boilerplate", "language", "spam", "leak", "noise")
_REACH = 2000
_MENU = tuple(sentences("web")["menu"])
_SPAM = tuple(sentences("web")["spam"])


@dataclass(frozen=True)
class Options:
    """How large a share of the pages is of each unwanted kind; the rest is clean."""

    country: int = 0
    people: int = 240
    duplicate: Share = 0.12
    near_duplicate: Share = 0.08
    boilerplate: Share = 0.12
    language: Share = 0.08
    spam: Share = 0.08
    leak: Share = 0.04
    noise: Share = 0.05


def _label(index: int, split: Split, seed: int, options: Options) -> str:
    shares = [getattr(options, label.replace(" ", "_")) for label in LABELS[1:]]
    if sum(shares) > 0.95:
        raise TriviumError("The unwanted shares of world:web must not sum to more than 0.95.")
    left = Chance("web label", split, seed, index).random()
    for label, share in zip(LABELS[1:], shares):
        left -= share
        if left < 0:
            return label
    return "clean"


def _clean(index: int, split: Split, seed: int, options: Options) -> str:
    """The good text of this number, whatever is made of it."""
    kind = Chance("web clean", split, seed, index).below(4)
    if kind == 0:
        page = facts.write(index, split, seed, facts.Options(country=options.country, people=options.people))
    elif kind == 1:
        page = sums.write(index, split, seed, sums.Options(country=options.country))
    else:
        page = prose.write(index, split, seed, prose.Options(country=options.country, texts=2))
    assert page.text is not None
    return page.text


def _earlier(chance: Chance, index: int, split: Split, seed: int, options: Options) -> int | None:
    """An earlier page that is clean, if one is near."""
    for _ in range(200):
        back = 1 + int(chance.random() * min(index, _REACH)) if index else 0
        if index and _label(index - back, split, seed, options) == "clean":
            return index - back
    return None


def _near(chance: Chance, text: str) -> str:
    """The text with about one word in fifteen lost, doubled or changed."""
    pieces = []
    for word in text.split(" "):
        fate = chance.below(45)
        pieces += [[], [word, word], [chance.pick(LOOKS)]][fate] if fate < 3 else [word]
    return " ".join((*pieces, chance.pick(THINGS)))


def _leaked(chance: Chance, index: int, options: Options) -> tuple[str, str]:
    """A question of the test with its answer, word for word, and which one it is."""
    if chance.happens(0.5):
        settings = facts.Options(country=options.country, people=options.people)
        number = chance.below(facts.count("test", settings))
        item, name = facts.ask(number, "test", 0, settings), "facts"
    else:
        number = chance.below(1000)
        item, name = sums.ask(number, "test", 0, sums.Options(country=options.country)), "sums"
    return f"Question: {item.question}\nAnswer: {item.answer}", f"world:{name}/test?{number}"


def write(index: int, split: Split, seed: int, options: Options) -> WorldDocument:
    """One page with its label; `of` names what it repeats or leaks, `clean` what a filter should leave."""
    chance = Chance("web", split, seed, index)
    label = _label(index, split, seed, options)
    own = _clean(index, split, seed, options)
    truth: dict[str, Any] = {
        "label": label,
        "keep": label in ("clean", "boilerplate"),
        "of": None,
        "clean": None,
    }
    if label in ("duplicate", "near duplicate"):
        first = _earlier(chance, index, split, seed, options)
        if first is None:
            label = truth["label"] = "clean"
            truth["keep"] = True
        else:
            text = _clean(first, split, seed, options)
            prefix = "world:web" if split == "train" else f"world:web/{split}"
            truth["of"] = f"{prefix}#{first}"
            return WorldDocument("", text if label == "duplicate" else _near(chance, text), truth=truth)
    if label == "clean":
        return WorldDocument("", own, truth=truth | {"clean": own})
    if label == "boilerplate":
        before, after = chance.sample(_MENU, 2), chance.sample(_MENU, 2)
        return WorldDocument("", "\n".join((*before, own, *after)), truth=truth | {"clean": own})
    if label == "language":
        settings = tongue.Options(country=options.country, facts_share=0.3, parallel_share=0.0)
        return WorldDocument("", tongue.write(index, split, seed, settings).text, truth=truth)
    if label == "spam":
        words = {"look": chance.pick(LOOKS), "thing": chance.pick(THINGS), "good": chance.pick(GOODS)}
        lines = [chance.pick(_SPAM).format(**words) for _ in range(chance.between(2, 4))]
        return WorldDocument("", " ".join(lines), truth=truth)
    if label == "leak":
        text, truth["of"] = _leaked(chance, index, options)
        # The leak hides in a page like any other.
        return WorldDocument("", f"{own}\n{text}", truth=truth)
    letters = [chr(33 + chance.below(94)) if chance.below(6) else " " for _ in range(chance.between(80, 300))]
    return WorldDocument("", "".join(letters).strip() or "?", truth=truth)
