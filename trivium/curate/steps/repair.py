"""Repair: text that was decoded wrongly, and Unicode in one form."""

from __future__ import annotations

import re
import unicodedata
from typing import ClassVar, Literal

from trivium.curate.batch import Batch, Outcome
from trivium.curate.step import Step
from trivium.kit.errors import needing

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_BLANKS = re.compile(r"[ \t]+(?=\n)")
_GAPS = re.compile(r"\n{3,}")


class Repair(Step):
    """Undo wrong decoding (`cafÃ©`), normalise Unicode and blank lines, and remove control characters."""

    name: ClassVar[str] = "repair"
    short: ClassVar[str] = "form"

    form: Literal["NFC", "NFKC", "none"] = "NFC"
    """The Unicode form."""
    decoding: bool = True
    """Undo text that was decoded with the wrong character set."""

    def check(self) -> None:
        if self.decoding:
            _ftfy()

    def run(self, batch: Batch) -> Outcome:
        fix = _ftfy() if self.decoding else None
        texts, reasons, changed = [], [], 0
        for text in batch.texts:
            found = text if text.isascii() or fix is None else fix(text)
            if self.form != "none" and not found.isascii():
                found = unicodedata.normalize(self.form, found)
            found = _CONTROL.sub("", found.replace("\r\n", "\n").replace("\r", "\n"))
            found = _GAPS.sub("\n\n", _BLANKS.sub("", found)).strip()
            changed += found != text
            texts.append(found)
            reasons.append(None if found else "empty: nothing is left of it")
        return Outcome(reasons, texts, notes={"texts changed": changed})


def _ftfy():
    with needing(
        "`repair` undoes wrong decoding with ftfy: pip install 'trivium[curate]', or write "
        "`{repair: {decoding: false}}`."
    ):
        import ftfy
    settings = ftfy.TextFixerConfig(unescape_html=False, uncurl_quotes=False, fix_latin_ligatures=False,
                                    fix_character_width=False, normalization=None, explain=False)  # fmt: skip
    return lambda text: ftfy.fix_text(text, settings)
