"""The verbs `chat` and `serve`: their words, in groups, and one call each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import click

from trivium.serve.limits import Limits

ANSWERS = "How answers are drawn"
MACHINE = "The machine"
BOUNDS = "What clients may ask for"
ASKING = "How the model is asked"
OVERFLOWS = ("refuse", "drop", "slide", "summarise")
REASONINGS = ("off", "ask", "open")

Decorator = Callable[[Any], Any]


class Grouped(click.Option):
    """An option that help shows under a heading of its own."""

    def __init__(self, *names: Any, group: str = "Options", **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.group = group


class InGroups(click.Command):
    """A verb whose help lists its options heading by heading."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, those without a heading of their own first."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for one in self.get_params(context):
            record = one.get_help_record(context) if isinstance(one, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(one, "group", "Options"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def option(
    group: str, name: str, default: Any = None, help: str = "", argument: str | None = None, **settings: Any
) -> Decorator:
    """An option of a group, whose default is shown where there is one; `argument` is its name in Python."""
    names = (name,) if argument is None else (name, argument)
    shown = default is not None
    return click.option(
        *names, cls=Grouped, group=group, default=default, show_default=shown, help=help, **settings
    )


def limit_options(verb: Any) -> Any:
    """An option for every field of `Limits`, under the field's name."""
    for limit in reversed(fields(Limits)):
        kind = int if limit.default is None else type(limit.default)
        name = f"--{limit.name.replace('_', '-')}"
        how = {"is_flag": True} if kind is bool else {"type": kind}
        verb = option(BOUNDS, name, limit.default, limit.metadata["told"], **how)(verb)
    return verb


_device = option(MACHINE, "--device", help="Such as cpu or cuda:1; else the best there is.")
_dtype = option(
    MACHINE,
    "--dtype",
    help="What weights are held in; else bfloat16 on a GPU that has it, float32 on a processor.",
    type=click.Choice(("float32", "bfloat16", "float16")),
)


DRAFT = (
    "A smaller model that guesses tokens ahead, or lookup: the same answers, sooner where it guesses right"
)

_runs = click.option("--runs", default="runs", show_default=True, help="The folder of results.")


@click.command(cls=InGroups)
@click.argument("model")
@_runs
@click.option("--compare", multiple=True, metavar="MODEL", help="Answer with this model, too.")
@click.option("--system", help="The system message before the conversation.")
@option(
    ASKING,
    "--overflow",
    "drop",
    "What becomes of a conversation longer than the context.",
    type=click.Choice(OVERFLOWS),
)
@option(
    ASKING,
    "--reasoning",
    "off",
    "Ask for thoughts before the answer, or open them for the model.",
    type=click.Choice(REASONINGS),
)
@option(ASKING, "--search", help="Search for answers, as /search does: `best_of 8 SCORER`.")
@option(ASKING, "--examples", help="Worked examples, as rows of prompt and completion, or of messages.")
@option(
    ANSWERS,
    "--temperature",
    help="0 always takes the likeliest token; else the model's own, or 0.8.",
    type=float,
)
@option(ANSWERS, "--top-k", help="Keep this many of the likeliest tokens; 0 keeps all.", type=int)
@option(ANSWERS, "--top-p", help="Keep the likeliest tokens up to this share.", type=float)
@option(ANSWERS, "--min-p", help="Drop tokens less likely than this share of the best.", type=float)
@option(ANSWERS, "--typical-p", help="Keep the most typical tokens up to this share.", type=float)
@option(ANSWERS, "--repetition-penalty", help="Above 1, what was read or said is less likely.", type=float)
@option(ANSWERS, "--presence-penalty", help="Taken off the score of what was said.", type=float)
@option(ANSWERS, "--frequency-penalty", help="The same for each time it was said.", type=float)
@option(ANSWERS, "--max-new-tokens", help="How long an answer may be.", type=int)
@option(ANSWERS, "--seed", help="The same seed gives the same answers.", type=int)
@option(MACHINE, "--draft", help=f"{DRAFT}.")
@_device
@_dtype
def chat(model: str, **settings: Any) -> None:
    """Talk with a model: a stage (`laptop/sft`), a Hugging Face folder, or an id on the hub."""
    from trivium.serve.chat import chat

    chat(model, **settings)


@click.command(cls=InGroups)
@click.argument("models", nargs=-1, required=True)
@_runs
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True)
@click.option("--api-key", help="What clients must send; else TRIVIUM_API_KEY, else nothing.")
@click.option(
    "--allow-origin", "allow_origins", multiple=True, metavar="URL", help="A web page that may ask."
)
@option(
    MACHINE,
    "--engine",
    "own",
    "What generates: our engine, or vLLM's own server for one model, which needs a GPU.",
    type=click.Choice(("own", "vllm")),
)
@option(
    MACHINE,
    "--compile",
    False,
    "On a GPU, compile the layers first: slow to start, then faster.",
    argument="compiled",
    is_flag=True,
)
@option(MACHINE, "--max-rows", 32, "Answers each model writes at the same time.", type=click.IntRange(min=1))
@option(
    MACHINE,
    "--keep-prompts",
    8,
    "Finished prompts each model keeps cached, for follow-up requests.",
    argument="prefix_cache_size",
    type=click.IntRange(min=0),
)
@option(
    MACHINE,
    "--draft",
    help=f"{DRAFT}; NAME=DRAFT drafts for one model only.",
    argument="drafts",
    multiple=True,
)
@option(
    MACHINE,
    "--scorer",
    help="A reward model that searches may name as their scorer; NAME=PLACE gives it a name.",
    argument="scorers",
    multiple=True,
)
@_device
@_dtype
@option(
    MACHINE,
    "--cache-mib",
    help="MiB each model's cache may take; else a share of what is free.",
    type=click.IntRange(min=1),
)
@limit_options
@click.pass_context
def serve(
    context: click.Context, models: tuple[str, ...], engine: str, cache_mib: int | None, **settings: Any
) -> None:
    """Serve models over OpenAI's protocol, with a web page to talk to them; NAME=FOLDER names one."""
    if engine == "vllm":
        from trivium.serve.vllm_server import UNDERSTOOD, serve_with_vllm

        given = {
            one.name: one.opts[0]
            for one in context.command.params
            if context.get_parameter_source(one.name) is click.core.ParameterSource.COMMANDLINE
        }
        passed = {name: settings[name] for name in UNDERSTOOD & settings.keys()}
        serve_with_vllm(models, given, **passed)
        return
    from trivium.serve.server import serve

    limits = Limits(**{limit.name: settings.pop(limit.name) for limit in fields(Limits)})
    budget = None if cache_mib is None else cache_mib * 2**20
    serve(models, memory_budget=budget, limits=limits, **settings)
