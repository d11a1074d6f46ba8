"""The verbs that train in one line: sft, pretrain, midtrain, dpo, reward, rlvr and others."""

from pathlib import Path
from typing import Any

import click

from trivium.cli.runs import next_commands
from trivium.kit.errors import TriviumError
from trivium.kit.table import print_table

STAGES = Path(__file__).parent.parent / "stages"
HELP = {
    "pretrain": "Train a new model on texts; MODEL may name a tokenizer.",
    "midtrain": "Go on with a model on curated texts.",
    "sft": "Fine-tune a model on chats or on prompts with completions.",
    "dpo": "Train a model on preferences; --loss kto, orpo, simpo and others.",
    "reward": "Train a reward model on preferences.",
    "rlvr": "Reinforce answers that --reward finds right.",
    "ppo": "Move a model towards what a reward model scores higher.",
    "distill": "Train a model on what another one says.",
}
KINDS = {verb: "preference" if verb == "dpo" else verb for verb in HELP}
"""Verbs, each with its kind of stage; a verb is there where its kind is."""


class OneStage(click.Command):
    """A command whose help lists the settings of its kind of stage."""

    def __init__(self, *names: Any, kind: str, **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.kind = kind

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """The command's own options, then every setting of the stage."""
        super().format_options(context, formatter)
        from trivium.pipeline.oneliner import described
        from trivium.stages import kinds

        with formatter.section("Settings of the stage (--key VALUE; --outer.inner VALUE for those inside)"):
            formatter.write_dl(list(described(kinds()[self.kind]).items()))


def verbs() -> list[click.Command]:
    """A command for every verb whose kind of stage exists."""
    return [_verb(verb, kind) for verb, kind in KINDS.items() if (STAGES / f"{kind}.py").is_file()]


def _verb(verb: str, kind: str) -> click.Command:
    @click.command(verb, cls=OneStage, kind=kind, context_settings={"ignore_unknown_options": True})
    @click.argument("model", required=False)
    @click.argument("settings", nargs=-1, type=click.UNPROCESSED)
    @click.option("--data", multiple=True, required=True, help="A file, folder, data set or world:NAME.")
    @click.option("--to", type=click.Path(file_okay=False, path_type=Path), help="Copy the model here.")
    @click.option("--runs", default="runs", show_default=True, help="The folder of results.")
    @click.option("--name", help="What the recipe is called; else the verb and the data.")
    @click.option("--print-recipe", is_flag=True, help="Print the recipe instead of running it.")
    @click.option("--plan", "only_plan", is_flag=True, help="Say what it would do and cost instead.")
    def command(
        model: str | None,
        settings: tuple[str, ...],
        data: tuple[str, ...],
        to: Path | None,
        runs: str,
        name: str | None,
        print_recipe: bool,
        only_plan: bool,
    ) -> None:
        from trivium.pipeline import oneliner
        from trivium.pipeline.plan import planned
        from trivium.pipeline.run import run, table

        words = list(settings)
        if model is not None and model.startswith("--"):
            words, model = [model, *words], None
        title, text = oneliner.recipe_of(verb, kind, model, data, words, Path(runs), name)
        if print_recipe:
            click.echo(text, nl=False)
            return
        recipe = oneliner.written(title, text, Path(runs))
        try:
            found = planned(recipe, runs)
        except TriviumError as error:
            raise TriviumError(oneliner.complaint(str(error), verb)) from error
        if only_plan:
            from trivium.cli.runs import print_plan

            print_plan(found)
            return
        prepared = run(recipe, runs)
        print_table(table(prepared))
        if to is not None:
            oneliner.copied(prepared.entry(verb).output, to)
            click.echo(f"The model is in {to} as well.")
        click.echo(f"Its recipe is {recipe}; the same command goes on from here.")
        next_commands(f"{title}/{verb}", runs, prepared.nodes[verb].stage.produces)

    command.help = HELP[verb]
    return command
