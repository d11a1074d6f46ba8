"""What preference stages learn from: each source of pairs read, reported, and divided by prompt."""

from collections.abc import Mapping, Sequence

from trivium.data.counted import CountedSource, CountedSources, read_counted
from trivium.data.door import Place
from trivium.data.preferences import PreferenceData, PreferencePair, unpaired
from trivium.data.settings import MixtureSource
from trivium.kit.errors import TriviumError
from trivium.tokens.tokenizer import Tokenizer

Preferences = CountedSources[PreferencePair]


def read_preferences(
    work: Place,
    mixture: Mapping[str, MixtureSource],
    tokenizer: Tokenizer,
    context: int,
    *,
    single: bool = False,
) -> Preferences:
    """Read every source; where `single`, pairs count as two answers, else every row has to be a pair."""

    def accept(name: str, pairs: list[PreferencePair]) -> list[PreferencePair]:
        if not single and not all(one.is_pair for one in pairs):
            raise TriviumError(
                f"{name}: holds single answers with a `label`, and this loss compares two; use `loss: kto`, "
                "apo_zero_unpaired or bco, or give it `chosen` and `rejected`."
            )
        return unpaired(pairs) if single else pairs

    return read_counted(
        work, mixture, lambda: PreferenceData(tokenizer, context), accept=accept,
        called="pairs", cut="without their oldest turns", learned="in answers",
    )  # fmt: skip


def prompts_of(sources: Sequence[CountedSource[PreferencePair]], most: int) -> list[PreferencePair]:
    """Up to `most` pairs with different prompts, some of every source."""
    found: dict[bytes, PreferencePair] = {}
    queues = [list(source.items) for source in sources]
    for place in range(max(map(len, queues), default=0)):
        for queue in queues:
            if place < len(queue) and len(found) < most:
                found.setdefault(queue[place].prompt.tobytes(), queue[place])
    return list(found.values())
