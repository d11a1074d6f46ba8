"""The verb that hands a model to other programs."""

from pathlib import Path

import click

from trivium.cli.options import runs_option
from trivium.kit.errors import TriviumError


@click.command()
@click.argument("model")
@runs_option
@click.option(
    "--to", "target", type=click.Choice(["gguf", "hf", "mlx", "peft", "hub", "llava"]), help="Form."
)
@click.option("--out", help="The file (gguf), folder (hf, mlx, peft, llava) or repository (hub).")
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    help="A folder from which `trivium verify` makes the stage again.",
)
@click.option(
    "--type",
    "kind",
    type=click.Choice(["f32", "f16", "bf16", "q8_0", "q4_0", "q4_K_M"]),
    default="f16",
    show_default=True,
    help="How a GGUF file stores matrices.",
)
@click.option("--licence", "--license", help="The licence that the card on the hub names.")
@click.option("--private", is_flag=True, help="Make a new repository of the hub private.")
@click.option("--dry-run", is_flag=True, help="Say what would be sent to the hub.")
def export(
    model: str,
    runs: str,
    target: str | None,
    out: str | None,
    bundle: Path | None,
    kind: str,
    licence: str | None,
    private: bool,
    dry_run: bool,
) -> None:
    """Write MODEL as a GGUF file with a Modelfile, as a merged folder, as an adapter, or to the hub.

    With --bundle, write the recipe, data, records and checksums from which MODEL, a stage, is made again.
    """
    if bundle is not None:
        from trivium.pipeline.bundle import write_bundle

        if target or out:
            raise TriviumError("--bundle names its own folder; leave out --to and --out.")
        stages = write_bundle(runs, model, bundle)
        click.echo(f"Wrote {bundle} with {', '.join(stages)}; `trivium verify {bundle}` makes them again.")
        return
    if target is None or out is None:
        raise TriviumError("Name a form and a place (--to gguf --out FILE), or a folder with --bundle.")
    from trivium.model.named import find_model
    from trivium.pipeline import export as exporting

    if dry_run and target != "hub":
        raise TriviumError("--dry-run is for --to hub; other targets write only what --out names.")
    folder = find_model(model, runs)
    if target == "gguf":
        path = Path(out)
        if path.is_dir():
            raise TriviumError(f"{out} is a folder; name a file, such as {out.rstrip('/')}/model.gguf.")
        exporting.to_gguf(folder, path, kind, model.rstrip("/").rpartition("/")[2], click.echo)  # type: ignore[arg-type]
    elif target in ("hf", "mlx"):
        # mlx-lm opens a Hugging Face folder as it is.
        exporting.to_folder(folder, Path(out))
        click.echo(f"Wrote {out}{', which mlx_lm opens' if target == 'mlx' else ''}.")
    elif target == "llava":
        exporting.to_llava(folder, Path(out))
        click.echo(f"Wrote {out}, which transformers opens as a LLaVA.")
    elif target == "peft":
        base = exporting.to_peft(folder, Path(out))
        click.echo(f"Wrote {out}, an adapter to {base}.")
    else:
        exporting.to_hub(folder, out, licence=licence, private=private, dry=dry_run, say=click.echo)


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--runs", type=click.Path(path_type=Path), help="Where to make it; else BUNDLE/runs.")
def verify(bundle: Path, runs: Path | None) -> None:
    """Make every stage of BUNDLE again, and say whether each result is equal to the bundled one.

    This runs what the bundle holds, kinds of stages and scoring functions in Python among it.
    """
    from trivium.kit.table import print_table
    from trivium.pipeline.bundle import verify

    rows = verify(bundle, runs or bundle / "runs")
    print_table(rows)
    different = [row[0] for row in rows[1:] if row[2] != "equal"]
    if different:
        raise TriviumError(f"{', '.join(different)} came out otherwise than in the bundle; see the table.")
    click.echo(f"\nAll {len(rows) - 1} results are equal to those of the bundle, bit for bit.")
    reused = [row[0] for row in rows[1:] if row[1] == "reused"]
    if reused:
        click.echo(f"Not made again, but found there: {', '.join(reused)}; name an empty --runs to make all.")
