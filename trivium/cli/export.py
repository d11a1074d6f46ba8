"""The verb that hands a model to other programs."""

from __future__ import annotations

from pathlib import Path

import click

from trivium.cli.options import runs_option
from trivium.kit.errors import TriviumError


@click.command()
@click.argument("model")
@runs_option
@click.option(
    "--to", "target", required=True, type=click.Choice(["gguf", "hf", "peft", "hub", "llava"]), help="Form."
)
@click.option("--out", required=True, help="The file (gguf), folder (hf, peft, llava) or repository (hub).")
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
    model: str, runs: str, target: str, out: str, kind: str, licence: str | None, private: bool, dry_run: bool
) -> None:
    """Write MODEL as a GGUF file with a Modelfile, as a merged folder, as an adapter, or to the hub."""
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
    elif target == "hf":
        exporting.to_folder(folder, Path(out))
        click.echo(f"Wrote {out}.")
    elif target == "llava":
        exporting.to_llava(folder, Path(out))
        click.echo(f"Wrote {out}, which transformers opens as a LLaVA.")
    elif target == "peft":
        base = exporting.to_peft(folder, Path(out))
        click.echo(f"Wrote {out}, an adapter to {base}.")
    else:
        exporting.to_hub(folder, out, licence=licence, private=private, dry=dry_run, say=click.echo)
