"""Model cards: what a model was made from and how, as README.md in its folder."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from trivium.kit.files import write_text
from trivium.kit.numbers import short
from trivium.kit.seals import RECORD, read_record
from trivium.pipeline.last_step import progress_of

CARD = "README.md"
LEFT_OUT = ("kind", "seed", "from", "data")
MEASURES = (
    "loss", "validation_loss", "bits_per_byte", "validation_bits_per_byte", "tokens", "steps", "parameters",
)  # fmt: skip
AT_LAST = ("validation_loss", "bits_per_byte")


def write_card(folder: Path, record: Mapping[str, Any], last: Mapping[str, Any]) -> None:
    """Write the card of the model in a stage's folder; equal runs write the same bytes.

    `last` is the row of the last step, which has what the summary leaves out.
    """
    model = folder / "model"
    if (model / "config.json").is_file():
        write_text(model / CARD, card(record, list(lineage(folder, record)), last))


def lineage(folder: Path, record: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The stages a model grew from, oldest first, each with its kind and the entry in the store."""
    start = (record.get("settings") or {}).get("from")
    entry = (record.get("parents") or {}).get(start) if isinstance(start, str) else None
    above = folder.parent / str(entry).partition("@")[0]
    if entry is not None and (above / RECORD).is_file():
        yield from lineage(above, read_record(above))
    elif isinstance(start, str) and (Path(start) / RECORD).is_file():
        yield from lineage(Path(start), read_record(Path(start)))
    elif isinstance(start, str):
        yield start, "model from outside", ""
    name = f"{record['stage']}-{record['fingerprint']}"
    yield str(record["stage"]), str(record["kind"]), name


def card(record: Mapping[str, Any], grown: list[tuple[str, str, str]], last: Mapping[str, Any]) -> str:
    """The card as Markdown, with the header that the hub reads."""
    settings = record.get("settings") or {}
    first = grown[0]
    head: dict[str, Any] = {
        "license": "other",
        "library_name": "transformers",
        "tags": ["trivium", record["kind"]],
    }
    if record["produces"] == "model":
        head["pipeline_tag"] = "text-generation"
    if not first[2]:
        head["base_model"] = Path(first[0]).name if first[0].startswith(("/", ".")) else first[0]
    header = yaml.safe_dump(head, sort_keys=False).replace("license: other\n", "license: other  # fill in\n")
    title = f"{record['recipe']}/{record['stage']}"
    results = dict(results_in(record.get("summary") or {}))
    measured = {name: f"{last[name]:.4g}" for name in AT_LAST if isinstance(last.get(name), float)}
    results |= {f"last step: {name}": value for name, value in {**measured, **progress_of(last)}.items()}
    parts = [
        f"---\n{header}---\n\n# {title}\n",
        f"Made by Trivium {record['versions']['trivium']}: the stage `{record['stage']}` ({record['kind']}) "
        f"of the recipe `{record['recipe']}`, seed {record['seed']}.\n",
        "## Lineage\n",
        _table(["stage", "kind", "result"], [list(one) for one in grown]),
        "## Data\n",
        _table(["source", "content"], [list(one) for one in _data(record)]) or "None of its own.\n",
        "## Results\n",
        _table(["measure", "value"], [list(one) for one in results.items()]) or "None were measured.\n",
        "## Recipe\n",
        f"```yaml\n{_written({record['stage']: _plain(settings)})}```\n",
    ]
    return "\n".join(parts)


def _written(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)


def _data(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every source with a fingerprint of what it holds: a stage's entry, or of files outside."""
    start = (record.get("settings") or {}).get("from")
    for name, entry in (record.get("parents") or {}).items():
        if name != start:
            yield name, str(entry)
    for name, content in (record.get("data") or {}).items():
        if name != start:
            yield (Path(name).name if name.startswith("/") else name), str(content)


def results_in(summary: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Numbers of the summary, with a 95 % interval where there is one."""
    for name, value in summary.items():
        if isinstance(value, Mapping) and {"value", "low", "high"} <= value.keys():
            ends = [value[end] for end in ("value", "low", "high")]
            if None in ends:
                # Of one or two items no interval follows.
                continue
            interval = f"{value['low']:.4g} to {value['high']:.4g}"
            count = f", n = {value['n']}" if value.get("n") is not None else ""
            yield f"{above}{name}", f"{value['value']:.4g} ({interval}{count})"
        elif isinstance(value, Mapping) and name in ("validation", "test", "unseen", "sycophancy", "kl"):
            yield from results_in(value, f"{name}: ")
        elif name in MEASURES and isinstance(value, (int, float)):
            yield f"{above}{name}", short(value) if isinstance(value, int) else f"{value:.4g}"


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without places on this machine."""
    found = {}
    for name, value in settings.items():
        if value in (None, [], {}):
            continue
        if name == "data" and isinstance(value, Mapping):
            value = {Path(key).name if str(key).startswith("/") else key: one for key, one in value.items()}
        found[name] = Path(value).name if isinstance(value, str) and value.startswith("/") else value
    return found


def _table(head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
