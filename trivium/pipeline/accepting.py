"""Accept a result as unchanged: the code that made it changed since, in a way that cannot matter."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trivium import __version__
from trivium.kit.errors import TriviumError
from trivium.pipeline.accepted import note
from trivium.pipeline.run import prepare
from trivium.pipeline.store import now
from trivium.pipeline.why import differences, earlier
from trivium.recipe.graph import needed


def accept(
    recipe: str | Path,
    stage: str,
    because: str,
    runs: str | Path = "runs",
    overrides: Iterable[str] | Mapping[str, Any] = (),
) -> str:
    """Let the result that a stage had before a change of code stand for it; a sentence that says so."""
    going = prepare(recipe, runs, overrides)
    needed(going.nodes, [stage])
    node, entry = going.nodes[stage], going.entry(stage)
    if entry.state == "done":
        return f"{stage} is done as it reads now ({entry.folder.name}); there is nothing to accept."
    if entry.state == "running":
        raise TriviumError(f"{stage} is being made; stop that run, or wait for it.")
    before = earlier(going, stage)
    if before is None or before.state != "done":
        raise TriviumError(
            f"{stage} has no finished result of {going.recipe.name} under {runs} to accept; run it."
        )
    before.verify(before.output)
    found = differences(going, stage, before)
    other = [sentence for what, sentence in found if what not in ("code", "new setting")]
    if other:
        raise TriviumError(
            f"{stage} differs from {before.folder.name} in more than code ({'; '.join(other)}); only a change"
            " of code can be accepted."
        )
    facts = {
        "stage": stage,
        "when": now(),
        "differences": [sentence for _, sentence in found],
        "versions": {
            "before": before.record.get("versions") or {},
            "now": {"trivium": __version__, "stage": node.stage.version},
        },
    }
    note(going.store.folder, node.fingerprint, before.folder.name, because, facts)
    return f"{stage}: {before.folder.name} stands for {node.entry} from now on."
