"""A small grammar engine: rules with slots become text, and the choices made are counted in bits."""

import re
from collections.abc import Callable, Mapping, Sequence

from trivium.world.chance import Chance

_SLOT = re.compile(r"<(\w+)>|\{(\w+)\}")
Memory = dict[str, str]
Drawing = Callable[[Chance, Memory], str]
_Part = tuple[str, str, bool]


class Grammar:
    """Rules `symbol -> alternatives`; `<symbol>` expands again each time, `{word}` is drawn once a text."""

    def __init__(self, rules: Mapping[str, Sequence[str]], drawings: Mapping[str, Drawing]):
        self._rules = {symbol: [_parts(text) for text in texts] for symbol, texts in rules.items()}
        self._drawings = dict(drawings)
        for alternatives in self._rules.values():
            for parts in alternatives:
                for _, slot, once in parts:
                    assert not slot or slot in (self._drawings if once else self._rules), slot

    def write(self, symbol: str, chance: Chance, memory: Memory) -> str:
        """One text of this symbol."""
        pieces: list[str] = []
        self._expand(symbol, chance, memory, pieces)
        return "".join(pieces)

    def _expand(self, symbol: str, chance: Chance, memory: Memory, pieces: list[str]) -> None:
        for literal, slot, once in chance.pick(self._rules[symbol]):
            if literal:
                pieces.append(literal)
            if not slot:
                continue
            if not once:
                self._expand(slot, chance, memory, pieces)
                continue
            if slot not in memory:
                memory[slot] = self._drawings[slot](chance, memory)
            pieces.append(memory[slot])


def _parts(text: str) -> tuple[_Part, ...]:
    parts: list[_Part] = []
    place = 0
    for found in _SLOT.finditer(text):
        symbol, word = found.groups()
        parts.append((text[place : found.start()], symbol or word, word is not None))
        place = found.end()
    if place < len(text):
        parts.append((text[place:], "", False))
    return tuple(parts)
