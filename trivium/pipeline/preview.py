"""`trivium data FILE`: what a file holds, how long its rows are, and one row as it would be learned."""

from pathlib import Path

import numpy as np

from trivium.data.conversations import Encoder
from trivium.data.encoding import Encoded
from trivium.data.preference_forms import recognised_form
from trivium.data.preferences import PreferenceData, row_of
from trivium.data.preview import PLAIN, previewed
from trivium.data.rows import row_of_documents
from trivium.data.shapes import recognised
from trivium.data.sources import Document, Source
from trivium.kit.errors import TriviumError
from trivium.model.named import find_model
from trivium.pipeline.looking import Looked, content_of, look
from trivium.tokens.adopt import with_chat_template
from trivium.tokens.tokenizer import Tokenizer
from trivium.tokens.train import train_tokenizer

VOCABULARY = 4096
MEASURED = 500
SHOWN = 1500
LEARNERS = {"preferences": "preference, reward", "prompts": "rlvr, ppo", "text": "pretrain, midtrain, sft"}


def preview(
    name: str, *, model: str | None = None, runs: str | Path = "runs", limit: int | None = None,
    split: str | None = None, colour: bool = False,
) -> tuple[list[list[str]], str]:  # fmt: skip
    """A table of what a source holds, and one of its rows with the learned tokens marked."""
    source = Source(path=name, split=split, limit=limit or (1000 if name.startswith("world:") else None))
    looked = look(source)
    if not looked.rows:
        raise TriviumError(f"{name} holds no document; name a file with rows in it.")
    tokenizer, spoken = _tokenizer(looked, model, runs)
    form, learners = form_of(looked.rows[0])
    counts = np.array([len(tokenizer.encode(content_of(row))) for row in looked.rows[:MEASURED]])
    about = "" if looked.whole else "about "
    documents = "unknown" if looked.documents is None else f"{about}{looked.documents:,}"
    total = "" if looked.documents is None else f"; about {looked.documents * counts.mean():,.0f} in all"
    rows = [
        ["what", "found"],
        ["format", form],
        ["learned from by", learners],
        ["columns", ", ".join(looked.columns)],
        ["rows", documents],
        ["tokens in a row", f"median {np.median(counts):,.0f}, 90 % below {np.percentile(counts, 90):,.0f}, "
                            f"longest {counts.max():,}{total}"],
        ["counted with", spoken],
    ]  # fmt: skip
    if looked.bad:
        rows.append(["unreadable", looked.bad[0]])
    return rows, rendered(looked.rows[0], tokenizer, colour=colour)


def form_of(row: Document) -> tuple[str, str]:
    """What a row is, and the kinds of stage that learn from such rows."""
    for known, learners in ((recognised_form, LEARNERS["preferences"]), (recognised, "sft")):
        try:
            name = str(known(row.fields).name)
        except TriviumError:
            continue
        if name == "plain text":
            return name, LEARNERS["text"]
        has_problem = learners == "sft" and any(row.fields.get(column) for column in ("question", "problem"))
        return name, f"{learners}, {LEARNERS['prompts']}" if has_problem else learners
    if any(row.fields.get(name) for name in ("prompt", "question", "problem")):
        return "prompts without answers", LEARNERS["prompts"]
    return "unknown columns", "name yours with `columns`, as in `columns: {text: body}`"


def rendered(row: Document, tokenizer: Tokenizer, *, colour: bool) -> str:
    """One row as a stage would learn from it, learned tokens in colour or between ⟦ and ⟧."""
    longest, why = 1 << 20, "\nNothing is learned from it."
    form, _ = form_of(row)
    try:
        pairs = (
            list(PreferenceData(tokenizer, longest).read([row])) if "label" in form or _is_pair(row) else []
        )
        if pairs:
            return _cut(previewed(row_of(pairs, share=False), tokenizer, colour=colour))
        encoded = [one for one in Encoder(tokenizer, longest).encode([row]) if isinstance(one, Encoded)]
    except TriviumError as error:
        encoded, why = [], f"\nNothing is learned from it: {error}"
    if not encoded:
        return "\n".join(f"{name}: {str(value)[:SHOWN]}" for name, value in row.fields.items()) + why
    [one] = encoded
    learned = np.ones(len(one.tokens)) if one.learned is None else one.learned.astype(float)
    packed = row_of_documents([one.tokens], learned=[learned.astype(np.float32)], ids=[row.id])
    return _cut(previewed(packed, tokenizer, colour=colour))


def _cut(text: str) -> str:
    """The beginning of a long row, and how much was left out."""
    left_out = len(text) - SHOWN
    return (
        text
        if left_out <= 0
        else f"{text[:SHOWN]}{PLAIN if PLAIN in text else ''} … ({left_out:,} characters more)"
    )


def _is_pair(row: Document) -> bool:
    try:
        recognised_form(row.fields)
    except TriviumError:
        return False
    return True


def _tokenizer(looked: Looked, model: str | None, runs: str | Path) -> tuple[Tokenizer, str]:
    """The tokenizer of a model, or one learnt from these rows, with a chat template either way."""
    if model is not None:
        tokenizer, spoken = Tokenizer.load(find_model(model, runs)), f"the tokenizer of {model}"
    else:
        texts = [content_of(row) for row in looked.rows]
        tokenizer = train_tokenizer(iter(texts), VOCABULARY)
        spoken = f"{tokenizer.vocabulary_size:,} tokens learnt from these rows; name a model with --model"
    try:
        row = looked.rows[0].fields
        is_conversation = bool(recognised(row).read(row).messages)
    except TriviumError:
        is_conversation = True
    return with_chat_template(tokenizer) if is_conversation else tokenizer, spoken
