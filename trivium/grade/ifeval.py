"""The verifiable instructions of IFEval (Zhou et al. 2023), each a function of the text and its arguments.

They decide as the published checker does, oddities included, so that scores can be compared; a test compares
the verdicts where lm-eval is installed. Languages, sentences and capital words are told apart by means of our
own, for which the published checker needs models or data that are fetched.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Sequence

from trivium.kit.errors import TriviumError

Check = Callable[..., bool]


def compare(count: int, wanted: int, relation: str) -> bool:
    """Whether a count stands in IFEval's `relation` to a number."""
    if relation not in ("at least", "less than", "at most", "exactly"):
        raise TriviumError(
            f"A relation is 'at least', 'less than', 'at most' or 'exactly', not {relation!r}."
        )
    return {
        "at least": count >= wanted,
        "less than": count < wanted,
        "at most": count <= wanted,
        "exactly": count == wanted,
    }[relation]


def words(text: str) -> list[str]:
    """The words of a text."""
    return re.findall(r"\w+(?:['’-]\w+)*", text)


def sentences(text: str) -> list[str]:
    """The sentences of a text: runs that end in a full stop, a question or an exclamation mark, or a line."""
    return [part for part in re.split(r"(?<=[.!?])[\"'”)]*\s+|\n+", text) if re.search(r"\w", part)]


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    """Whether three stars part so many paragraphs, none of them empty but at the ends."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    filled = sum(map(bool, parts))
    return all(parts[1:-1]) and filled == num_paragraphs


def _count(text: str, word: str) -> int:
    """How often a keyword occurs, inside of longer words too."""
    return len(re.findall(re.escape(word), text, re.I))


def _paragraph_starts(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = [part.strip() for part in text.split("\n\n")]
    filled = sum(map(bool, parts))
    if filled != num_paragraphs or nth_paragraph > filled or not parts[nth_paragraph - 1]:
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.split(rf"\s?{re.escape(section_spliter)}\s?\d+\s?", text)) - 1 >= num_sections


def _json(text: str) -> bool:
    text = text.strip()
    if text.startswith("```"):
        text = text[3:]
        text = text[4:] if text[:4].lower() == "json" else text
    try:
        json.loads(text.removesuffix("```"))
    except (ValueError, RecursionError):
        return False
    return True


def _two_answers(text: str) -> bool:
    parts = text.split("******")
    inside = [part.strip() for part in parts if part.strip()]
    blank_within = any(not part.strip() for part in parts[1:-1])
    return len(inside) == 2 and inside[0] != inside[1] and not blank_within


def _repeats_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == '"' and text[-1] == '"'


def _bullets(text: str, num_bullets: int) -> bool:
    return len(re.findall(r"^[^\S\n]*(?:\*[^*].*|-.*)$", text, re.M)) == num_bullets


def _highlights(text: str, num_highlights: int) -> bool:
    single, double = re.findall(r"\*([^\n*]*)\*", text), re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(bool(part.strip()) for part in single + double) >= num_highlights


def _postscript(text: str, postscript_marker: str) -> bool:
    known = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
    pattern = known.get(postscript_marker.strip()) or re.escape(postscript_marker.strip().lower())
    return re.search(pattern, text.lower()) is not None


def _capital_words(text: str, capital_frequency: int, capital_relation: str = "at least") -> bool:
    capitals = [word for word in words(text) if word.isupper()]
    return compare(len(capitals), capital_frequency, capital_relation)


def _letters(text: str, letter: str, let_frequency: int, let_relation: str = "at least") -> bool:
    return compare(text.lower().count(letter.lower()), let_frequency, let_relation)


def _all_in(case: Callable[[str], str]) -> Check:
    return lambda text: any(letter.isalpha() for letter in text) and text == case(text)


# One script names the language where it has it to itself; the rest are told apart by their commonest words.
_SCRIPTS = {
    "el": "GREEK", "he": "HEBREW", "ko": "HANGUL", "th": "THAI", "ta": "TAMIL", "te": "TELUGU",
    "kn": "KANNADA", "gu": "GUJARATI", "pa": "GURMUKHI", "bn": "BENGALI", "ml": "MALAYALAM",
    "ka": "GEORGIAN", "hy": "ARMENIAN", "hi": "DEVANAGARI", "mr": "DEVANAGARI", "ne":
    "DEVANAGARI", "ar": "ARABIC", "fa": "ARABIC", "ur": "ARABIC", "ru": "CYRILLIC", "bg":
    "CYRILLIC", "uk": "CYRILLIC", "zh": "CJK", "ja": "HIRAGANA",
}  # fmt: skip
_COMMON_WORDS = {
    "en": "the of and to in is that it was for with are this on as",
    "de": "der die und das ist nicht ein eine zu den mit von auf ich es",
    "fr": "le la les et des est un une dans que pour pas du sur qui",
    "es": "el la de que y los las en un una por con para es no",
    "it": "il la di che e un una per non sono con del della le gli",
    "pt": "o a de que e do da em um uma para com não os as",
    "nl": "de het een en van ik te dat die in is niet op met voor",
    "sv": "och att det som en på är av för med den till inte om ett",
    "fi": "ja on ei että se hän oli mutta kun niin ovat joka myös kuin tai",
    "pl": "i w nie na się że do to jest z o jak po co ale",
    "vi": "và là của có không một những được cho trong người này các với",
    "sw": "na ya wa kwa ni katika za la kuwa hii yake hiyo pia cha",
    "tr": "ve bir bu için ile de da ne çok gibi daha olarak ama var",
    "id": "yang dan di itu dengan untuk tidak ini dari dalam akan pada",
}

_COMMON = {name: frozenset(common.split()) for name, common in _COMMON_WORDS.items()}


def _language(text: str, language: str) -> bool:
    alphabetic = [letter for letter in text if letter.isalpha()]
    if not alphabetic:
        return False
    if language in _SCRIPTS:
        script = _SCRIPTS[language]
        allowed = (script, "CJK", "KATAKANA") if language == "ja" else (script,)
        names = [unicodedata.name(letter, "") for letter in alphabetic]
        share = sum(name.startswith(allowed) for name in names) / len(names)
        return share > 0.5 and any(name.startswith(script) for name in names)
    if language not in _COMMON_WORDS:
        raise TriviumError(f"The language {language!r} cannot be recognised here.")
    found = [word.lower() for word in words(text)]
    shares = {name: sum(word in common for word in found) for name, common in _COMMON.items()}
    latin = sum(unicodedata.name(letter, "").startswith("LATIN") for letter in alphabetic) / len(alphabetic)
    return latin > 0.5 and shares[language] > 0 and shares[language] == max(shares.values())


def _forbidden(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.I) for word in forbidden_words)


CHECKS: dict[str, Check] = {
    "keywords:existence": lambda text, keywords: all(_count(text, word) for word in keywords),
    "keywords:forbidden_words": _forbidden,
    "keywords:frequency": lambda text, keyword, frequency, relation="at least": compare(
        _count(text, keyword.strip()), frequency, relation
    ),
    "keywords:letter_frequency": _letters,
    "language:response_language": _language,
    "length_constraints:number_sentences": lambda text, num_sentences, relation="at least": compare(
        len(sentences(text)), num_sentences, relation
    ),
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": lambda text, num_words, relation="at least": compare(
        len(re.findall(r"\w+", text)), num_words, relation
    ),
    "length_constraints:nth_paragraph_first_word": _paragraph_starts,
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        len(re.findall(r"\[.*?\]", text)) >= num_placeholders
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": lambda text: any(
        choice in text for choice in ("My answer is yes.", "My answer is no.", "My answer is maybe.")
    ),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": lambda text: any(
        title.strip("<> ") for title in re.findall(r"<<[^\n]+>>", text)
    ),
    "combination:two_responses": _two_answers,
    "combination:repeat_prompt": _repeats_prompt,
    "startend:end_checker": _ends,
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _all_in(str.upper),
    "change_case:english_lowercase": _all_in(str.lower),
    "punctuation:no_comma": lambda text: "," not in text,
}
