"""The tokenizer: text to ids and back, conversations to ids and what of them is learned."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

from trivium.kit.errors import TriviumError
from trivium.kit.files import read_object, write_json, write_text
from trivium.kit.fingerprint import fingerprint
from trivium.tokens import parts, roles, template
from trivium.tokens.chat import (
    ChatTokens,
    Message,
    Span,
    SpanFinder,
    Written,
    borders_behind,
    stop_after_turn,
)
from trivium.tokens.control import CLOSE, OPEN, ControlStrings, Disguise, alias, without_control
from trivium.tokens.forms import read_forms
from trivium.tokens.items import expanded, is_item
from trivium.tokens.lengths import byte_lengths

MOST_TOKENS = 2**24


class Tokenizer:
    """Any `tokenizer.json` with its settings and chat template; plain text never yields a control token."""

    def __init__(
        self,
        tokenizer: Mapping[str, Any],
        settings: Mapping[str, Any] | None = None,
        templates: Mapping[str, str] | None = None,
        stop_ids: Sequence[int] = (),
        forms: parts.Forms | None = None,
    ) -> None:
        self.forms = forms
        """How pictures and sounds become tokens, where the model takes any."""
        self._json = dict(tokenizer)
        self.settings = dict(settings or {})
        self.templates = dict(templates or {})
        self.backend = Backend.from_str(json.dumps(self._json))
        self.backend.no_truncation()
        self.backend.no_padding()
        self._ids: dict[str, int] = self.backend.get_vocab(with_added_tokens=True)
        if not self._ids or max(self._ids.values()) >= MOST_TOKENS:
            raise TriviumError(f"A tokenizer has from 1 to {MOST_TOKENS:,} tokens, and ids below that.")
        self._control = self._find_control()
        self._control_strings = ControlStrings(self._control)
        self.control_ids: frozenset[int] = frozenset(self._control.values()) - self._written_for_unknown()
        found = without_control(self._json, self._control)
        self._text_backend, self._open_id, self._close_id, self._item_id = found
        self._extra_stops = tuple(stop_ids)
        self._named = roles.named_tokens(self.settings)
        self._cuts_cleanly = self._encoded("\nb") == [
            identity for identity in self._encoded(f"\n{OPEN}b") if identity != self._open_id
        ]

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[Any, ...]]:
        return Tokenizer, (self._json, self.settings, self.templates, self._extra_stops, self.forms)

    def with_forms(self, forms: parts.Forms | None) -> "Tokenizer":
        """The same tokenizer for a model that takes pictures and sounds in these forms."""
        return Tokenizer(self._json, self.settings, self.templates, self._extra_stops, forms)

    def _find_control(self) -> dict[str, int]:
        special = {token["content"] for token in self._json.get("added_tokens") or [] if token["special"]}
        special |= set(roles.named_tokens(self.settings).values()) | set(roles.extra_tokens(self.settings))
        return {content: self._ids[content] for content in special if content in self._ids}

    def _written_for_unknown(self) -> frozenset[int]:
        """The token a model without byte fallback writes for letters it lacks, which is text."""
        model = self._json["model"]
        if model.get("byte_fallback"):
            return frozenset()
        unknown = model.get("unk_id")
        if unknown is None:
            unknown = self._ids.get(model.get("unk_token") or "")
        return frozenset() if unknown is None else frozenset([unknown])

    @classmethod
    def load(cls, folder: Path | str) -> "Tokenizer":
        """Open a Hugging Face folder that holds `tokenizer.json`."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        old = folder / "tokenizer.model"
        if not path.is_file() and not old.is_file():
            for ranks in [*folder.glob("*.tiktoken"), *folder.glob("tiktoken.model")]:
                raise TriviumError(
                    f"{ranks} lists byte pairs and does not say how words are split; put the tokenizer.json "
                    "beside it that transformers' AutoTokenizer writes with save_pretrained."
                )
            raise TriviumError(
                f"{folder} holds no tokenizer.json; give a folder saved by Trivium or transformers."
            )
        try:
            settings, templates, stops = _settings_in(folder)
            if path.is_file():
                content = read_object(path)
            else:
                from trivium.tokens.sentencepiece import tokenizer_json

                content, settings = tokenizer_json(old, settings)
            tokenizer = cls(content, settings, templates)
            place = folder / "generation_config.json"
            for stop in stops:
                if type(stop) is not int or not 0 <= stop < tokenizer.vocabulary_size:
                    raise TriviumError(
                        f"{place}: eos_token_id names {stop!r}, and the ids of the tokenizer go from 0 to "
                        f"{tokenizer.vocabulary_size - 1}; correct it."
                    )
            tokenizer._extra_stops = tuple(stops)
            tokenizer.forms = read_forms(folder)
            return tokenizer
        except TriviumError:
            raise
        except BaseException as error:
            # The library raises nothing narrower, and where its own code fails not even an Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise TriviumError(f"{path} is not a tokenizer that can be read: {error}.") from error

    def save(self, folder: Path | str) -> None:
        """Write the files from which transformers opens the same ids and the same chat template."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in self.settings.items() if key != "chat_template"}
        settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        settings.setdefault("clean_up_tokenization_spaces", False)
        settings = {**self._found_names(), **settings}
        write_text(folder / "tokenizer.json", json.dumps(self._json, ensure_ascii=False, indent=2))
        write_json(folder / "tokenizer_config.json", settings)
        for name, source in self.templates.items():
            path = folder / "chat_template.jinja"
            if name != "default":
                path = folder / "additional_chat_templates" / f"{name}.jinja"
                path.parent.mkdir(exist_ok=True)
            write_text(path, source)

    def _found_names(self) -> dict[str, str]:
        """The two tokens that generation needs, where the settings do not name them: what `save` adds."""
        found = {"eos_token": self.token(self.end_of_reply_id), "pad_token": self.token(self.pad_id)}
        return {name: token for name, token in found.items() if name not in self.settings}

    @cached_property
    def end_of_reply_id(self) -> int:
        """The token that ends a completion: the family's `eos_token`, at which generation stops."""
        named = self._control.get(self._named.get("eos_token", ""))
        if named is not None:
            return named
        return self.end_of_turn_id if self.end_of_turn_id is not None else self.end_of_text_id

    @cached_property
    def fingerprint(self) -> str:
        """Changes whenever ids or rendered conversations could change."""
        # A saved copy names these tokens, and it is the same tokenizer.
        named = {**self._found_names(), **self._named}
        # Most folders set neither what begins every text nor further control tokens.
        begun = {key: self.settings[key] for key in ("add_bos_token",) if key in self.settings}
        further = [part for part in (begun, sorted(roles.extra_tokens(self.settings))) if part]
        return fingerprint([self._json, named, self.templates, *further])

    @cached_property
    def vocabulary_size(self) -> int:
        """How many rows an embedding needs: the largest id plus one."""
        return max(self._ids.values()) + 1

    @cached_property
    def end_of_text_id(self) -> int:
        """The token that ends a document."""
        eos = self._control.get(self._named.get("eos_token", ""))
        if eos is not None and self.token(eos) in roles.ENDS_TEXT:
            return eos
        found = roles.first_known(roles.ENDS_TEXT, self._control)
        found = found if found is not None else eos
        if found is None:
            raise TriviumError(
                "The tokenizer has no token that ends a text; name its `eos_token` in tokenizer_config.json."
            )
        return found

    @cached_property
    def end_of_turn_id(self) -> int | None:
        """The token that ends an assistant's turn, None without a chat template."""
        if not self.templates:
            return None
        stop = stop_after_turn(
            self._control_strings.pattern, lambda m, prompt: self._render(m, None, prompt, {})
        )
        if stop is None:
            return roles.first_known(roles.ENDS_TURN, self._control)
        return self._control[stop]

    @cached_property
    def beginning_id(self) -> int | None:
        """The token the family puts before every text, if it does."""
        bos = self._control.get(self._named.get("bos_token", ""))
        if self.settings.get("add_bos_token") is False:
            return None
        ids = self.backend.encode("a", add_special_tokens=True).ids
        if len(ids) > 1 and ids[0] in self.control_ids and (bos is None or ids[0] == bos):
            return ids[0]
        return bos if self.settings.get("add_bos_token") else None

    @cached_property
    def pad_id(self) -> int:
        """The token that fills empty places where someone insists on rectangles."""
        named = self._control.get(self._named.get("pad_token", ""))
        known = named if named is not None else roles.first_known(roles.PADS, self._control)
        return known if known is not None else self.end_of_text_id

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The tokens at which generation stops."""
        eos = self._control.get(self._named.get("eos_token", ""))
        stops = {self.end_of_text_id, self.end_of_turn_id, eos, *self._extra_stops}
        return frozenset(stop for stop in stops if stop is not None)

    def token(self, identity: int) -> str:
        """How the vocabulary writes an id; a token of a picture or a sound is a filled square."""
        if is_item(identity):
            return "\u25a3"
        piece = self.backend.id_to_token(identity)
        if piece is None:
            raise TriviumError(
                f"The tokenizer has no token {identity}; its ids end at {self.vocabulary_size - 1}."
            )
        return piece

    def token_id(self, piece: str) -> int | None:
        """The id of a vocabulary entry, or None."""
        return self._ids.get(piece)

    def byte_lengths(self) -> np.ndarray:
        """The exact number of bytes of each id in decoded text (0 for control tokens)."""
        return byte_lengths(
            self._json,
            self._ids,
            self.control_ids,
            self.vocabulary_size,
            lambda identity: self.backend.decode([identity], skip_special_tokens=False),
        )

    def _encoded(self, text: str) -> list[int]:
        return self._text_backend.encode(text, add_special_tokens=False).ids

    def encode(self, text: str) -> list[int]:
        """Text to ids; a typed control string becomes letters."""
        return self._encoded(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Many texts to ids, in parallel threads unless TOKENIZERS_PARALLELISM forbids it."""
        encoded = self._text_backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in encoded]

    def decode(self, ids: Sequence[int], skip_control: bool = True) -> str:
        """Ids to text without pictures and sounds; control tokens are left out unless asked for."""
        kept = [
            int(identity)
            for identity in ids
            if not is_item(identity) and (not skip_control or identity not in self.control_ids)
        ]
        return self.backend.decode(kept, skip_special_tokens=False)

    def pictures(self, ids: Sequence[int]) -> list[np.ndarray]:
        """The pictures that a model wrote among these ids, uint8 [side, side, 3] each."""
        if self.forms is None or self.forms.codebook is None or self.forms.picture is None:
            return []
        return self.forms.codebook.pictures(ids, self.forms.picture.side)

    def _template(self, tools: Any) -> str:
        if not self.templates:
            raise TriviumError(
                "The tokenizer has no chat template; put a chat_template.jinja into the model's folder."
            )
        if tools and "tool_use" in self.templates:
            return self.templates["tool_use"]
        return self.templates.get("default") or next(iter(self.templates.values()))

    def _render(
        self, messages: Sequence[Message], tools: Any, prompt: bool, arguments: Mapping[str, Any]
    ) -> str:
        return template.render(
            self._template(tools),
            messages,
            tools=tools,
            add_generation_prompt=prompt,
            variables={**self._named, **arguments},
        )

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as its template writes it, for people to look at."""
        shown, _ = parts.taken_out(messages, self.forms)
        normal, arguments = template.normal_messages(shown), template.own_arguments(template_arguments)
        try:
            rendered = self._render(normal, template.plain_data(tools), add_generation_prompt, arguments)
        except template.REFUSALS as error:
            raise TriviumError(f"The chat template refuses the conversation: {error}.") from error
        return parts.shown(rendered).replace(OPEN, "").replace(CLOSE, "")

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> ChatTokens:
        """A conversation to ids, and which of them are the assistant's with the token that ends its turn."""
        written = self._written(messages, tools, add_generation_prompt, template_arguments)
        if OPEN in written.text:
            text, spans = self._marked(written)
        elif re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self._template(tools)):
            text, spans = written.text, []
        else:
            text = written.text
            spans = self._finder().unmarked(text, written.messages, written.render)
        return self._assembled(text, spans, written)

    def encode_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of `encode_chat` for those who answer: a few renderings however long the conversation."""
        written = self._written(messages, tools, add_generation_prompt, template_arguments)
        if OPEN in written.text:
            text, spans = self._marked(written)
        else:
            text, spans = written.text, borders_behind(written.header, written.text)
        return self._assembled(text, spans, written).ids

    def _written(
        self, messages: Any, tools: Any, prompt: bool, template_arguments: Mapping[str, Any] | None
    ) -> Written:
        """What the template writes, with everything that came from outside in disguise (law L5)."""
        messages, items = parts.taken_out(messages, self.forms)
        normal, arguments = template.normal_messages(messages), template.own_arguments(template_arguments)
        plain_tools = template.plain_data(tools)
        disguise = Disguise(self._control_strings, [normal, plain_tools, arguments])
        hidden, hidden_tools, values = (disguise.hide(one) for one in (normal, plain_tools, arguments))

        def render(some: Sequence[Message], asking: bool) -> str:
            return self._render(some, hidden_tools, asking, values)

        try:
            return Written(render(hidden, prompt), hidden, render, disguise, items)
        except template.REFUSALS as error:
            raise TriviumError(f"The chat template refuses the conversation: {error}.") from error

    def _finder(self) -> SpanFinder:
        return SpanFinder(self._control_strings.pattern, self._stops())

    def _marked(self, written: Written) -> tuple[str, list[Span]]:
        return self._finder().marked(written.text, written.header)

    def _stops(self) -> frozenset[str]:
        names = {name for name in roles.ENDS_TURN if name in self._control}
        if self.end_of_turn_id is not None:
            names.add(self.token(self.end_of_turn_id))
        return frozenset(names)

    def _assembled(self, rendered: str, spans: Sequence[Span], written: Written) -> ChatTokens:
        """Encode in one piece, cut where the assistant begins: as the engine sees it when it generates."""
        items = parts.InOrder(written.items, self.forms)

        def final(text: str) -> str:
            text = items.marked(text) if written.items else text
            return written.disguise.show(
                self._control_strings.pattern.sub(lambda m: alias(self._control[m[0]]), text)
            )

        chat = (
            self._cut(rendered, spans, final) if self._cuts_cleanly else self._joined(rendered, spans, final)
        )
        if not written.items:
            return chat
        ids, turns = expanded(chat.ids, chat.turns, self._item_id, items.all_of_them())
        # What an encoder reads is never predicted; a picture of the vocabulary's own tokens is.
        learned = [turn >= 0 and not is_item(identity) for identity, turn in zip(ids, turns, strict=True)]
        return ChatTokens(ids, learned, turns)

    def _joined(self, rendered: str, spans: Sequence[Span], final: Any) -> ChatTokens:
        """The ids of the whole text, for tokenizers that a cut would leave a trace in."""
        text, borders, done = "", [], 0
        for span in spans:
            text += final(rendered[done : span.start])
            start = len(text)
            text += final(rendered[span.start : span.end])
            borders.append((start, len(text)))
            done = span.end
        encoding = self._text_backend.encode(text + final(rendered[done:]), add_special_tokens=False)
        turns, turn = [], 0
        for start, end in encoding.offsets:
            while turn < len(borders) and borders[turn][1] <= start:
                turn += 1
            inside = turn < len(borders) and max(end, start + 1) > borders[turn][0]
            turns.append(turn if inside else -1)
        return ChatTokens(encoding.ids, [turn >= 0 for turn in turns], turns)

    def _cut(self, rendered: str, spans: Sequence[Span], final: Any) -> ChatTokens:
        text, done = "", 0
        for span in spans:
            body = rendered[span.start : span.end]
            stop = ""
            if span.stopped:
                # The stop stays joined to what follows, for in some families it swallows the space behind it.
                stop = [match[0] for match in self._control_strings.pattern.finditer(body)][-1]
                body = body[: -len(stop)]
            text += final(rendered[done : span.start]) + OPEN + final(body) + CLOSE + final(stop)
            done = span.end
        ids: list[int] = []
        turns: list[int] = []
        turn, inside, stop_at = -1, False, -1
        for identity in self._encoded(text + final(rendered[done:])):
            if identity == self._open_id:
                turn, inside = turn + 1, True
            elif identity == self._close_id:
                inside, stop_at = False, len(ids) if spans[turn].stopped else -1
            else:
                ids.append(identity)
                turns.append(turn if inside or len(ids) - 1 == stop_at else -1)
        return ChatTokens(ids, [turn >= 0 for turn in turns], turns)


def _settings_in(folder: Path) -> tuple[dict[str, Any], dict[str, str], list[Any]]:
    """What lies beside `tokenizer.json`: settings, chat templates by name, and tokens that end a reply."""
    settings = read_object(folder / "tokenizer_config.json") if _has(folder, "tokenizer_config.json") else {}
    if _has(folder, "special_tokens_map.json"):
        settings = {**read_object(folder / "special_tokens_map.json"), **settings}
    templates: dict[str, str] = {}
    inside = settings.get("chat_template")
    if isinstance(inside, str):
        templates["default"] = inside
    elif isinstance(inside, list):
        templates = {entry["name"]: entry["template"] for entry in inside}
    if _has(folder, "chat_template.json"):
        templates["default"] = read_object(folder / "chat_template.json")["chat_template"]
    if _has(folder, "chat_template.jinja"):
        templates["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for extra in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[extra.stem] = extra.read_text(encoding="utf-8")
    if not all(isinstance(text, str) for pair in templates.items() for text in pair):
        raise TriviumError(f"{folder} has a chat template that is no text; restore it.")
    stops: Any = []
    if _has(folder, "generation_config.json"):
        stops = read_object(folder / "generation_config.json").get("eos_token_id")
    return settings, templates, [] if stops is None else stops if isinstance(stops, list) else [stops]


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_file()
