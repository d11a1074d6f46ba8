"""A page on this machine that shows a run while it goes on: its stages, and the curves of each."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.kit.tree import below_the_deepest
from trivium.lab.charts import render
from trivium.lab.section_training import curve, label_of

POINTS = 240
State = Callable[..., Mapping[str, Any]]
"""What holds right now: all stages, the curves of the one asked for (or of the one that runs), and those of
another result laid over them."""
BESIDE = {"loss": "validation_loss"}
"""What is drawn in the same panel, where both are logged."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
SHOWN = 6
"""How many curves are drawn before the rest is folded away."""
FIRST = (
    "reward", "rewards/accuracies", "rewards/margins", "accuracy", "kl", "objective/kl", "entropy",
    "policy/entropy_avg", "completions/mean_length", "frac_reward_zero_std", "loss", "bits_per_byte",
    "validation_loss", "rewards/", "bits_per_byte/", "validation_loss/", "learning_rate", "grad_norm",
)  # fmt: skip


class Tail:
    """A metrics log read as it grows; only what is new is read, unless the log was cut back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin((0, 0))

    def _begin(self, file: tuple[int, int]) -> None:
        self.columns: dict[str, list[tuple[int, float]]] = {}
        self.last: dict[str, Any] = {}
        self.changes: list[dict[str, Any]] = []
        self._read = 0
        self._file = file

    def update(self) -> None:
        """Take in the whole lines that were added."""
        try:
            facts = self.path.stat()
        except FileNotFoundError:
            return
        if (facts.st_dev, facts.st_ino) != self._file or facts.st_size < self._read:
            self._begin((facts.st_dev, facts.st_ino))
        with open(self.path, "rb") as file:
            file.seek(self._read)
            added = file.read()
        whole = added.rfind(b"\n") + 1
        self._read += whole
        for line in added[:whole].splitlines():
            self._take(json.loads(line))

    def _take(self, row: dict[str, Any]) -> None:
        if "change" in row:
            self.changes.append(row)
        if "step" not in row:
            return
        self.last = row
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                self.columns.setdefault(name, []).append((row["step"], float(value)))


def thinned(points: list[tuple[int, float]], most: int = POINTS) -> list[tuple[int, float]]:
    """At most so many points: of every stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= most:
        return points
    stretches = (most - 2) // 2
    inside = points[1:-1]
    kept = [points[0]]
    for place in range(stretches):
        part = inside[place * len(inside) // stretches : (place + 1) * len(inside) // stretches]
        kept += sorted({min(part, key=lambda one: one[1]), max(part, key=lambda one: one[1])})
    return [*kept, points[-1]]


def application(state: State) -> Any:
    """The page, and what it shows as JSON; only names of this machine are answered to."""
    try:
        from fastapi import FastAPI
        from fastapi.responses import HTMLResponse, JSONResponse
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    except ImportError:
        raise TriviumError("watching needs fastapi and uvicorn; install Trivium's extra 'serve'.") from None
    made = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    # A page elsewhere that makes its own name mean this machine gets no answer.
    made.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    headers = {"Cache-Control": "no-store"}

    def state_of(stage: str | None, beside: str | None) -> Mapping[str, Any]:
        try:
            return state(stage, beside)
        except TriviumError as error:
            return {"waiting": str(error)}

    def show(stage: str | None = None, beside: str | None = None, log: bool = False) -> HTMLResponse:
        content = page(state_of(stage, beside), logarithmic=log)
        return HTMLResponse(content, headers={**headers, "Content-Security-Policy": POLICY})

    def tell(stage: str | None = None, beside: str | None = None) -> JSONResponse:
        return JSONResponse(dict(state_of(stage, beside)), headers=headers)

    made.get("/")(show)
    made.get("/state")(tell)
    return made


def page(state: Mapping[str, Any], *, logarithmic: bool = False) -> str:
    """The page of a run as it is now; in a browser it asks for itself again and again."""
    if "waiting" in state:
        return render("watch.jinja", state=state)
    stages = {stage["name"]: stage for stage in state["stages"]}
    columns, other = state["columns"], state.get("beside_columns") or {}
    drawn = {BESIDE[name] for name in BESIDE if name in columns and columns.get(BESIDE[name])}
    names = [name for name, points in columns.items() if name != "tokens" and points and name not in drawn]
    ranked = [
        curve(
            name, columns[name], label_of(name, columns), settled=True, logarithmic=logarithmic,
            validation=columns.get(BESIDE.get(name, ""), ()), beside=other.get(name, ()),
        )
        for name in sorted(names, key=_rank)
    ]  # fmt: skip
    return render(
        "watch.jinja",
        state=state,
        stages=[(stages[name], depth) for name, depth in ordered(state["stages"])],
        shown=stages[state["shown"]],
        logarithmic=logarithmic,
        keys=_keys(state, bool(drawn), bool(other)),
        first=ranked[:SHOWN],
        more=ranked[SHOWN:],
    )


def _keys(state: Mapping[str, Any], validation: bool, beside: bool) -> list[tuple[str, str]]:
    """What the lines are, where a panel has several."""
    lines = [("other", "validation")] if validation else []
    lines += [("faint", str(state.get("beside")))] if beside else []
    return [("main", str(state["shown"])), *lines] if lines else []


def ordered(stages: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """The stages with their depths, each below the deepest of those it needs."""
    below = below_the_deepest({stage["name"]: stage["parents"] for stage in stages})

    def walk(name: str, depth: int) -> Iterator[tuple[str, int]]:
        yield name, depth
        for child in below.get(name, []):
            yield from walk(child, depth + 1)

    return [row for root in below.get(None, []) for row in walk(root, 0)]


def _rank(name: str) -> tuple[int, str]:
    """The curves that tell most come first."""
    fits = (name.startswith(one) if one.endswith("/") else name == one for one in FIRST)
    return next((place for place, fit in enumerate(fits) if fit), len(FIRST)), name


def serve(state: State, port: int, say: Callable[[str], None]) -> None:
    """Serve on this machine alone until it is stopped."""
    made = application(state)
    import uvicorn

    configuration = uvicorn.Config(made, host="127.0.0.1", port=port, log_level="warning")
    server = uvicorn.Server(configuration)
    say(f"Watching at http://127.0.0.1:{port} (stop with Ctrl-C)")
    try:
        server.run()
    except SystemExit:
        raise TriviumError(f"port {port} is taken; name another with --port.") from None
