"""Tasks of lm-evaluation-harness on this engine: `lm_eval:gsm8k`, `lm_eval:arc_easy`, or a local task's name.

The harness writes the prompts, cuts and judges the answers; the model here only says how likely a
continuation is and goes on with a text. Both are what the harness's own `hf` backend computes on the same
folder. Every item is kept as a record, so that intervals and paired comparisons work as for tasks of our
own.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from trivium.evals.asking import Subject
from trivium.evals.likelihood import log_likelihoods
from trivium.evals.results import Record
from trivium.evals.settings import Settings
from trivium.evals.task import Found, Task
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.kit.errors import TriviumError

PREFIX = "lm_eval:"
HEADLINES = ("acc", "exact_match", "pass@1", "f1", "word_perplexity", "bits_per_byte")
NEW_TOKENS = 256
"""How long an answer may be where a task does not say; the harness's own default."""


def harness_task(name: str) -> Task:
    """The task of the harness that `lm_eval:NAME` names."""
    inside = name.removeprefix(PREFIX)

    def run(subject: Subject, settings: Settings, include: str | None = None) -> Found:
        return _run(subject, settings, inside, include)

    return Task(name, f"{inside} of lm-evaluation-harness.", HEADLINES, run, ("shots",))


def _run(subject: Subject, settings: Settings, name: str, include: str | None) -> Found:
    lm_eval = _harness()
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include)
    if name not in manager.all_tasks:
        raise TriviumError(f"lm-evaluation-harness has no task {name!r}; `include` names a folder of others.")
    try:
        results = lm_eval.simple_evaluate(
            model=_model_class()(subject), tasks=[name], limit=settings.limit, bootstrap_iters=0,
            num_fewshot=settings.shots or None, log_samples=True, task_manager=manager,
            apply_chat_template=settings.style == "chat", random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )  # fmt: skip
    except (OSError, ConnectionError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TriviumError(f"the task {PREFIX}{name} could not be asked: {reason}") from error
    return Found(_records(results["samples"]), style="chat" if settings.style == "chat" else "continue")


def _records(samples: dict[str, list[dict[str, Any]]]) -> list[Record]:
    """One record an item, with the scores of all filters; of a group of tasks each item says its task."""
    found: list[Record] = []
    for task, rows in samples.items():
        merged: dict[int, dict[str, float]] = {}
        first: dict[int, dict[str, Any]] = {}
        for row in rows:
            suffix = "" if row.get("filter", "none") == "none" else f" ({row['filter']})"
            scores = {f"{metric}{suffix}": row[metric] for metric in row["metrics"]}
            numbers = {key: float(value) for key, value in scores.items() if isinstance(value, int | float)}
            merged.setdefault(row["doc_id"], {}).update(numbers)
            first.setdefault(row["doc_id"], row)
        for identity, row in first.items():
            arguments = row["arguments"]
            asked = arguments[0] if isinstance(arguments, list | tuple) else next(iter(arguments.values()))
            text = str(asked[0] if isinstance(asked, list | tuple) else next(iter(asked.values())))
            answers = tuple({"text": str(one)} for one in row["filtered_resps"])
            groups = {"task": task} if len(samples) > 1 else {}
            found.append(
                Record(
                    f"{task}/{identity}", text, str(row["target"]), answers, merged[identity], groups=groups
                )
            )
    return found


def _harness() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise TriviumError(
            f"tasks named {PREFIX}NAME need lm-evaluation-harness: `pip install trivium[eval]`."
        ) from error
    return lm_eval


@cache
def _model_class() -> type:
    """The harness's model, whose base class is only there where the harness is installed."""
    _harness()
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class EngineModel(TemplateLM):
        """A model of ours as the harness asks it."""

        def __init__(self, subject: Subject) -> None:
            super().__init__()
            self.subject, self.tokenizer = subject, subject.tokenizer
            self.max_length = subject.window

        @property
        def eot_token_id(self) -> int:
            return self.tokenizer.end_of_reply_id

        @property
        def prefix_token_id(self) -> int:
            named = self.tokenizer.settings.get("bos_token")
            known = None if named is None else self.tokenizer.token_id(str(named))
            return self.eot_token_id if known is None else known

        @property
        def tokenizer_name(self) -> str:
            return self.tokenizer.fingerprint

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **options: Any
        ) -> list[int]:
            """Ids as transformers gives them: the harness's own texts may hold control tokens."""
            adds = add_special_tokens is not False
            if add_special_tokens is None and string.startswith(self.tokenizer.token(self.prefix_token_id)):
                adds = False
            return self.tokenizer.backend.encode(string, add_special_tokens=adds).ids

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return self.tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)

        def _loglikelihood_tokens(self, requests: Any, **options: Any) -> list[tuple[float, bool]]:
            prompts, continuations = [], []
            for _, context, continuation in requests:
                # What does not fit loses its beginning, as in the harness's own backends.
                text = [*context, *continuation][-(self.max_length + 1) :]
                size = min(len(continuation), len(text) - 1)
                prompts.append(text[:-size])
                continuations.append(text[-size:])
            found = log_likelihoods(self.subject.model, prompts, continuations)
            return [(one.total, one.greedy) for one in found]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            totals = []
            for (text,) in (request.args for request in requests):
                windows = get_rolling_token_windows(
                    self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
                )
                pairs = [("", *make_disjoint_window(window)) for window in windows]
                totals.append(sum(total for total, _ in self._loglikelihood_tokens(pairs)))
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            eos = self.tokenizer.token(self.eot_token_id)
            asked, stops = [], []
            for context, wishes in (request.args for request in requests):
                until = [one for one in handle_stop_sequences(wishes.get("until"), eos=eos) if one]
                most = int(wishes.get("max_gen_toks", wishes.get("max_new_tokens", NEW_TOKENS)))
                most = min(most, self.max_length - 1)
                sampling = Sampling(
                    temperature=_temperature(wishes), max_new_tokens=most,
                    stop=tuple(one for one in until if one != eos),
                )  # fmt: skip
                ids = self.tok_encode(context)[-(self.max_length - most) :]
                asked.append(Request(ids, sampling))
                stops.append(until)
            answers = [samples[0].text for samples in self.subject.engine.generate(asked)]
            return [_cut(text, until) for text, until in zip(answers, stops, strict=True)]

    return EngineModel


def _temperature(wishes: dict[str, Any]) -> float:
    """Greedy unless a task asks for samples."""
    return float(wishes.get("temperature") or 0.0) if wishes.get("do_sample") else 0.0


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of these strings."""
    places = [text.find(stop) for stop in stops if stop in text]
    return text[: min(places)] if places else text
