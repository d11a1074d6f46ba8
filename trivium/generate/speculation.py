"""Speculative decoding: which drafts are verified when, and whether that pays.

In each pass the model computes the distributions after a sequence's last token and after every token of its
draft. Token by token it draws, as always, with the sequence's own random numbers; the draft is accepted as
long as it is what was drawn, and the first token that differs is the model's own. Coupling draft and model by
the random number, in place of the rejection rule of Leviathan et al. 2023, is what Daliri, Musco and Suresh
2024 call drafter-invariant: every token is drawn from the model's own distribution, so greedy and sampled
texts, with all filters, penalties and grammars, are those of decoding without drafts, seed for seed. The
price is a share of the acceptances at high temperature; what is gained is that drafts may come, go and be
switched off at any step without changing an answer.
"""

from __future__ import annotations

import logging
import weakref
from collections import abc
from dataclasses import dataclass, field

from torch import Tensor

from trivium.generate.drafts import DraftedText, Drafter
from trivium.generate.head_drafts import HeadDrafter
from trivium.generate.sampling import Sampler
from trivium.generate.sequence import Sequence
from trivium.tokens.items import FIRST

log = logging.getLogger("trivium.generate")

MOST_TOKENS = 256
"""Tokens of all sequences in one pass; beyond that a processor has no idle arithmetic left."""
SHORTEST_SPAN, LONGEST_SPAN = 64, 2048
TRIAL = {True: 12, False: 4}
"""How many steps with drafts, and without, are compared with the steps before them."""
WEIGHT = 0.1
"""Of the latest step in the running means."""


@dataclass
class Choice:
    """Whether to draft for one number of sequences: the way that was faster, and trials of the other way."""

    drafting: bool = True
    trial: bool = False
    steps: int = 0
    """In the present phase."""
    span: int = TRIAL[True]
    speeds: dict[bool, float] = field(default_factory=dict)
    """Tokens per second and sequence with drafts and without."""

    @property
    def mode(self) -> bool:
        """Whether this step drafts."""
        return self.drafting is not self.trial

    def note(self, speed: float) -> None:
        """Take in how fast a step of the present mode was; now and then the other mode is tried."""
        self.steps += 1
        # the first step of a phase also lays out what the other mode had no use for
        if self.steps > 1:
            before = self.speeds.get(self.mode, speed)
            self.speeds[self.mode] = before + max(WEIGHT, 1 / self.steps) * (speed - before)
        if self.steps <= (TRIAL[self.mode] if self.trial else self.span):
            return
        self.steps = 0
        if self.trial:
            changed = self.speeds[self.mode] > self.speeds[not self.mode]
            self.span = SHORTEST_SPAN if changed else min(max(2 * self.span, SHORTEST_SPAN), LONGEST_SPAN)
            self.drafting ^= changed
        self.trial = not self.trial


class Payoff:
    """Whether drafts pay, by what steps with and without them took lately."""

    def __init__(self) -> None:
        self._choices: dict[int, Choice] = {}
        self.drafting = True

    def _choice(self, rows: int) -> Choice:
        return self._choices.setdefault(rows.bit_length(), Choice())

    def worth(self, rows: int) -> bool:
        """Whether the next step of so many sequences shall draft."""
        choice = self._choice(rows)
        self.drafting = choice.drafting
        return choice.mode

    def note(self, rows: int, drafted: bool, tokens: int, seconds: float) -> None:
        """Take in what a step of so many sequences made; one that found nothing to draft says nothing."""
        choice = self._choice(rows)
        if drafted == choice.mode and rows and seconds > 0:
            choice.note(tokens / rows / seconds)


@dataclass
class Followed:
    """The text of a sequence, and how long its next draft shall be."""

    text: DraftedText
    length: int


class Speculation:
    """Has texts drafted, and learns from how the drafts fared."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter: Drafter | None = drafter
        self.payoff = Payoff()
        self._longest = drafter.longest
        self._followed: weakref.WeakKeyDictionary[Sequence, Followed] = weakref.WeakKeyDictionary()

    def drafts(self, sequences: abc.Sequence[Sequence], sampler: Sampler) -> list[list[int]] | None:
        """A draft for each sequence, some of them empty; None where there is none worth verifying."""
        if self.drafter is None or not self.payoff.worth(len(sequences)):
            return None
        room = MOST_TOKENS // len(sequences) - 1
        texts = []
        for row, sequence in enumerate(sequences):
            followed = self._followed.get(sequence)
            if followed is None:
                text = DraftedText(sequence, list(sequence.tokens))
                followed = self._followed[sequence] = Followed(text, min(4, self._longest))
            text = followed.text
            text.tokens += sampler.drawn_since(row, len(text.tokens) - len(sequence.tokens))
            left = sequence.sampling.max_new_tokens - (len(text.tokens) - len(sequence.tokens)) - 1
            # A draft of pictures would be one that no model can write.
            undrafted = sequence.slides or max(sequence.tokens) >= FIRST
            text.limit = 0 if undrafted else max(0, min(followed.length, left, room))
            texts.append(text)
        if not any(text.limit for text in texts):
            return None
        try:
            drafts = self.drafter.propose(texts, sampler)
        except Exception:
            # answers do without drafts; without this drafter from now on, for it may be left half done
            log.exception("drafting failed and is switched off")
            self.drafter = None
            return None
        return drafts if any(drafts) else None

    def observe(
        self, sequences: abc.Sequence[Sequence], hidden: Tensor, places: list[int] | None = None
    ) -> None:
        """Show a drafter that wants them the states from which each sequence's last token was drawn.

        They are the rows of `hidden` [N, width], or those at `places`.
        """
        if isinstance(self.drafter, HeadDrafter):
            self.drafter.observe(sequences, hidden if places is None else hidden[places])

    @property
    def active(self) -> bool:
        """Whether drafts were found to pay, as far as is known."""
        return self.drafter is not None and self.payoff.drafting

    def forget(self) -> None:
        """Drop all texts, as after a step that was cut off half done."""
        self._followed.clear()
        if self.drafter is not None:
            self.drafter.forget()

    def learn(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """Draft two more tokens after a draft that was right to its end, else one less."""
        if drafted and (followed := self._followed.get(sequence)) is not None:
            longer = followed.length + 2 if accepted == drafted else followed.length - 1
            followed.length = max(1, min(longer, self._longest))
