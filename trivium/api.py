"""The public API: `trivium.load` a model, `trivium.run` a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trivium.evals.searching import Searcher, find_scorer
from trivium.generate.chat_fit import (
    Fitted,
    Overflow,
    Reasoning,
    fit_conversation,
    split_reasoning,
    summariser,
)
from trivium.generate.defaults import sampling_defaults
from trivium.generate.drafting import open_draft
from trivium.generate.engine import Engine
from trivium.generate.requests import Completion, Request
from trivium.generate.sampling import Sampling
from trivium.generate.search.run import SearchResult
from trivium.generate.search.settings import search_settings
from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.kit.files import whole_folder
from trivium.model.attention import Documents
from trivium.model.folder import load_model, save_model
from trivium.model.named import RUNS, find_model, model_of
from trivium.pipeline import run as pipeline
from trivium.pipeline.cards import CARD
from trivium.pipeline.store import Entry
from trivium.tokens.bare import TokenIds
from trivium.tokens.pictures import pillow
from trivium.tokens.tokenizer import Tokenizer

Conversation = Sequence[Mapping[str, Any]]
Prompt = str | Conversation


@dataclass(frozen=True)
class Reply:
    """An answer to a conversation, the thoughts before it, and what of the conversation was read."""

    text: str
    thoughts: str | None
    completion: Completion
    fitted: Fitted


class Model:
    """A model with its tokenizer: ask it, look at its logits, save it."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | None = None,
        draft: str | Path | None = None,
        runs: str | Path = RUNS,
    ) -> None:
        place = machine.usable(device)
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TriviumError(f"dtype {dtype!r} is none of torch's; give one such as torch.bfloat16.")
        self.folder = folder
        self.transformer = load_model(folder, dtype=dtype or machine.compute_dtype(place), device=place)
        if any(folder.glob("token*.json")) or any(folder.glob("*.model")) or any(folder.glob("*.tiktoken")):
            self.tokenizer = Tokenizer.load(folder)
        else:
            self.tokenizer = TokenIds.of(folder, self.transformer.config.vocabulary)
        self.sampling_defaults = sampling_defaults(folder)
        self.transformer.requires_grad_(False).eval()
        self._draft = open_draft(draft, runs=runs, device=device)

    @cached_property
    def engine(self) -> Engine:
        """The engine that generates with this model."""
        return Engine(self.transformer, self.tokenizer, dtype=self.transformer.dtype, draft=self._draft)

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """The scores of every next token after each of `tokens`: float32, [tokens, vocabulary]."""
        if not tokens:
            raise TriviumError("There are no tokens to compute logits of; give at least one.")
        last = self.transformer.config.vocabulary - 1
        if not all(isinstance(token, Integral) and 0 <= token <= last for token in tokens):
            raise TriviumError(
                f"Logits are of token ids, whole numbers from 0 to {last}; encode a text first."
            )
        ids = torch.tensor(list(tokens), device=self.transformer.device)
        context = Documents([len(ids)], self.transformer.device)
        return self.transformer.logits(self.transformer(ids, context))

    def generate(self, prompt: Prompt | Sequence[Prompt], **sampling: Any) -> Any:
        """A `Completion` of a text or of a conversation; a list of either gives a list.

        `sampling` are the fields of `generate.sampling.Sampling`: max_new_tokens, temperature, top_p, seed...
        """
        alone = _is_one(prompt)
        prompts: Sequence[Any] = [prompt] if alone else list(prompt)
        settings = _sampling({**self.sampling_defaults, **sampling})
        requests = [Request(self._ids(one), settings) for one in prompts]
        completions: list[Completion] = [samples[0] for samples in self.engine.generate(requests)]
        return completions[0] if alone else completions

    def chat(
        self,
        conversation: Conversation,
        *,
        overflow: Overflow = "refuse",
        reasoning: Reasoning = "off",
        examples: Conversation = (),
        **sampling: Any,
    ) -> Reply:
        """Answer a conversation as `trivium chat` does, brought to fit and asked for thoughts as told."""
        settings = _sampling({**self.sampling_defaults, **sampling})
        if isinstance(conversation, str):
            raise TriviumError('A chat takes a list of messages: [{"role": "user", "content": ...}].')
        if overflow != "slide" and settings.max_new_tokens >= self.engine.window:
            raise TriviumError(
                f"An answer of {settings.max_new_tokens} tokens leaves no room for a question in the model's"
                f" window of {self.engine.window}; lower max_new_tokens."
            )
        fitted = fit_conversation(
            conversation,
            self.tokenizer,
            self.engine.window - settings.max_new_tokens,
            overflow=overflow,
            summarise=summariser(self.engine),
            reasoning=reasoning,
            examples=examples,
        )
        [[completion]] = self.engine.generate([Request(fitted.tokens, settings, slide=fitted.slide)])
        reasoned = split_reasoning(completion.text, opened=fitted.thinking)
        return Reply(reasoned.answer, reasoned.thoughts, completion, fitted)

    def search(
        self, prompt: Prompt, method: str = "best_of", *, scorer: Any = None, **settings: Any
    ) -> SearchResult:
        """Search for an answer to a text or a conversation: the result has it, its text and the tree.

        `scorer` is any callable over a partial text, a scorer, the name of a reward model (a stage or a
        folder), or None for the model's own probability; `settings` are those of `SearchSettings`.
        """
        asked = search_settings({"method": method, **settings})
        ids = self._ids(prompt)
        searcher = Searcher(self.engine, asked, find_scorer(scorer))
        content = prompt if isinstance(prompt, str) else [dict(one) for one in prompt]
        most = asked.max_new_tokens or self.sampling_defaults.get("max_new_tokens", 256)
        (result,) = searcher.run([searcher.explorer(ids, content, most)])
        return result

    def pictures(self, completion: Completion) -> list[Any]:
        """The pictures that the model wrote (early fusion), in Pillow's form."""
        return [pillow().Image.fromarray(one) for one in self.tokenizer.pictures(completion.tokens)]

    def save(self, folder: str | Path) -> None:
        """Write a Hugging Face folder, which appears whole and replaces nothing but a model."""
        ends = {"eos_token_id": sorted(self.tokenizer.stop_ids), "pad_token_id": self.tokenizer.pad_id}
        with whole_folder(folder) as beside:
            save_model(self.transformer, beside, generation=ends)
            self.tokenizer.save(beside)
            _refuse_to_bury(Path(folder), beside)

    def _ids(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return self.tokenizer.encode_prompt(prompt)
        begin = self.tokenizer.beginning_id
        ids = [*([] if begin is None else [begin]), *self.tokenizer.encode(prompt)]
        # A document starts after the end of another: that is what "write something" looks like.
        return ids or [self.tokenizer.end_of_text_id]


class StageResult:
    """What one stage of a run made."""

    def __init__(self, entry: Entry) -> None:
        self.folder = entry.folder
        self._entry = entry

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of its metrics log, one for a step; `changes` are apart."""
        return [row for row in self._entry.metrics if "step" in row]

    @property
    def changes(self) -> list[dict[str, Any]]:
        """What the stage changed on taking over from its parent: before and after."""
        return [row for row in self._entry.metrics if "change" in row]

    def metrics_frame(self) -> Any:
        """The rows of its metrics log as a pandas DataFrame, indexed by step."""
        try:
            import pandas
        except ImportError:
            raise TriviumError(
                "metrics_frame needs pandas: pip install pandas; `metrics` is a list."
            ) from None
        return pandas.DataFrame(self.metrics).set_index("step")

    @property
    def summary(self) -> dict[str, Any]:
        """What the stage said of itself at the end."""
        return self._entry.record.get("summary") or {}

    def model(self, **settings: Any) -> Model:
        """The model it made."""
        return Model(model_of(self.folder, self.folder.name), **settings)


class Run:
    """A recipe's run; `run["base"]` is what the stage `base` made."""

    def __init__(self, prepared: pipeline.Run) -> None:
        self.name = prepared.recipe.name
        self.became = dict(prepared.became)
        self._prepared = prepared

    def __getitem__(self, stage: str) -> StageResult:
        if stage not in self.became:
            raise TriviumError(f"This run made no stage `{stage}`; it made {', '.join(self.became)}.")
        return StageResult(self._prepared.entry(stage))

    def __iter__(self) -> Any:
        return iter(self.became)


def load(
    name: str | Path,
    *,
    runs: str | Path = RUNS,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    draft: str | Path | None = None,
) -> Model:
    """The model of a stage (`laptop/sft`, `runs/laptop/sft`), of a Hugging Face folder, or of a hub id.

    `draft` is a smaller model with the same tokenizer, or "lookup": the same answers, sooner where it guesses
    the next tokens right.
    """
    return Model(find_model(name, runs), dtype=dtype, device=device, draft=draft, runs=runs)


def run(
    recipe: str | Path,
    *,
    set: Mapping[str, Any] | None = None,
    only: Iterable[str] = (),
    runs: str | Path = "runs",
    unsafe_sandbox: bool = False,
) -> Run:
    """Run a recipe, as `trivium run` does."""
    chosen = [only] if isinstance(only, str) else only
    return Run(pipeline.run(recipe, runs, set or {}, chosen, unsafe_sandbox=unsafe_sandbox))


def _refuse_to_bury(folder: Path, written: Path) -> None:
    """A folder takes the place of the one before it: nothing else of a person's may lie in that."""
    for there in sorted(folder.iterdir()) if folder.is_dir() else ():
        if there.name != CARD and not (
            (written / there.name).exists() or fnmatchcase(there.name, "model*.safetensors*")
        ):
            raise TriviumError(
                f"{folder} holds {there.name}, which is no part of a model; name another folder."
            )


def _is_one(prompt: Any) -> bool:
    """Whether this is one prompt: a text, or a conversation (a list of messages)."""
    if isinstance(prompt, str):
        return True
    if not isinstance(prompt, Sequence) or not all(
        isinstance(one, (str, Mapping, Sequence)) for one in prompt
    ):
        raise TriviumError("A prompt is a text or a list of messages; several make a list.")
    return len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    known = Sampling.__dataclass_fields__
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise TriviumError(f"Generation has no setting `{unknown[0]}`; it has {', '.join(known)}.")
    return Sampling(**settings)
