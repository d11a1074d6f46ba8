"""The verbs; each parses its words and makes one call below."""

import sys
from collections.abc import Sequence
from difflib import get_close_matches

import click

from trivium import __version__
from trivium.cli import export, models, runs, setup, shared, train
from trivium.kit.errors import TriviumError
from trivium.kit.files import BARRED, FAILING
from trivium.kit.stopping import StopRequested, stopped_as_asked
from trivium.serve.command import chat, serve

_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_VERBS = (
    *(runs.run, runs.plan, runs.status, runs.ls, runs.watch, runs.show, runs.why, runs.accept, runs.gc),
    *(shared.push, shared.pull),
    *(setup.init, setup.data, setup.schema, setup.launch, setup.doctor),
    *train.verbs(),
    *(chat, serve, models.eval_, models.compare, models.distance, models.grade),
    export.export,
    export.verify,
)


_MEANT = {
    "finetune": "sft",
    "fine-tune": "sft",
    "train": "run",
    "list": "ls",
    "logs": "show",
    "generate": "chat",
}
"""Verbs of other tools, each with what to write here."""


class Verbs(click.Group):
    """A group that answers an unknown verb with the nearest one."""

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        word = arguments[0]
        if self.get_command(context, word) is None and not word.startswith("-"):
            near = _MEANT.get(word) or next(iter(get_close_matches(word, self.commands, n=1)), None)
            hint = f"did you mean `trivium {near}`?" if near else "`trivium --help` lists the verbs."
            raise TriviumError(f"there is no verb `{word}`; {hint}")
        return super().resolve_command(context, arguments)


@click.group(cls=Verbs, context_settings=_HELP)
@click.version_option(__version__, prog_name="trivium")
def cli() -> None:
    """A language model's whole education: pre-training, mid-training, post-training, and what each did.

    RECIPE is a YAML file or the name of one that ships, such as `laptop`.
    """


for _verb in _VERBS:
    cli.add_command(_verb)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `trivium`: what a person can fix ends in one sentence and exit status 2."""
    try:
        cli.main(arguments, prog_name="trivium", standalone_mode=False)
    except TriviumError as error:
        click.echo(f"trivium: {error}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort) as stop:
        # click makes an Abort of every KeyboardInterrupt.
        if isinstance(stop.__cause__, StopRequested):
            click.echo("trivium: stopped as it was asked to; the same command goes on from here.", err=True)
            sys.exit(stopped_as_asked())
        click.echo("trivium: stopped; the same command goes on from here.", err=True)
        sys.exit(130)
    except OSError as error:
        if error.errno not in BARRED | FAILING or error.filename is None:
            raise
        click.echo(
            f"trivium: {error.filename} cannot be opened: {error.strerror}; fix that or name another.",
            err=True,
        )
        sys.exit(2)
