"""Forecasting: what the next size will reach, written down before that size is trained."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from trivium.evals.scaling import forecast
from trivium.kit.errors import TriviumError
from trivium.kit.files import whole_folder, write_json
from trivium.kit.metrics import read_metrics
from trivium.stages.parts.stage import Product, Reference, Stage, Work

AHEAD = (1.0, 1.5, 2.0, 3.0, 4.0, 8.0, 16.0)
"""How many times the last size's FLOPs the written table goes."""


class Forecast(Stage):
    """Fit loss against compute over models of several sizes, and forecast it for more compute."""

    kind: Literal["forecast"]
    """Forecast the loss of a larger model."""
    produces: ClassVar[Product] = "report"
    computes: ClassVar[bool] = False

    of: list[Annotated[list[str], Field(min_length=1)]] = Field(min_length=3)
    """The trained models by size, the smallest first; of each size one or more, such as one for each seed."""
    take: str = "bits_per_byte"
    """The column of their logs that is forecast; its last value counts."""

    def references(self) -> list[Reference]:
        return [
            Reference(f"of.{place}", name, ("model",)) for place, rung in enumerate(self.of) for name in rung
        ]

    def run(self, work: Work) -> dict[str, Any]:
        """Fit, and write the law, what chance does to it, and a table."""
        rungs = [[reached(work.path(name).parent, self.take) for name in rung] for rung in self.of]
        found = forecast(rungs, work.seed)
        last = max(flops for flops, _ in rungs[-1])
        table = []
        for times in AHEAD:
            low, high = found.interval(times * last)
            table.append(
                {"flops": times * last, "value": found.law.at(times * last), "low": low, "high": high}
            )
        with whole_folder(work.output("report")) as folder:
            write_json(
                folder / "forecast.json",
                {
                    "take": self.take,
                    "rungs": rungs,
                    "law": _numbers(found.law),
                    "resampled": [_numbers(law) for law in found.resampled],
                    "left": found.left,
                    "wider": found.wider,
                    "spent": found.spent,
                    "missed": found.missed,
                    "table": table,
                },
            )
        twice = table[AHEAD.index(2.0)]
        work.say(
            f"{self.take} after twice the FLOPs of the last size: {twice['value']:.4g}"
            f" ({twice['low']:.4g} to {twice['high']:.4g})"
        )
        return {"power": found.law.power, "floor": found.law.floor, "forecast": table}


def reached(folder: Path, take: str) -> tuple[float, float]:
    """The last value of a column of a stage's log, after the FLOPs spent until then."""
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if take in row and "flops" in row]
    if not rows:
        raise TriviumError(
            f"{folder / 'metrics.jsonl'} has no `{take}` beside FLOPs to forecast from; name another column."
        )
    return float(rows[-1]["flops"]), float(rows[-1][take])


def _numbers(law: Any) -> list[float]:
    return [law.floor, law.scale, law.power]
