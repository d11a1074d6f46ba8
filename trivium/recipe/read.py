"""From a name or a path to the plain content of a recipe: library, `extends`, overrides."""

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trivium.kit.errors import TriviumError, nearest
from trivium.kit.files import expanded, readable
from trivium.recipe.yaml_text import parse

LIBRARY = Path(__file__).parent / "library"
RENAMED = {"experiments/flattery": "experiments/sycophancy"}
"""Earlier names of recipes of the library."""


@dataclass(frozen=True)
class Written:
    """A recipe as written, overrides applied, and where it came from."""

    path: Path
    content: dict[str, Any]
    lines: dict[tuple[str, ...], int]

    def place(self, keys: Iterable[str]) -> str:
        """`file.yaml:12: stages.base.context`, with the line of the innermost of these keys in this file."""
        keys = tuple(keys)
        line = next(
            (self.lines[keys[:end]] for end in range(len(keys), 0, -1) if keys[:end] in self.lines), 0
        )
        return f"{self.path.name}{f':{line}' if line else ''}: {'.'.join(keys)}"


class Translate(Protocol):
    """Gives the keys of stages their present names."""

    def __call__(self, stages: Any, *, laid_over: bool = False) -> Any: ...


def read(
    name: str | Path, overrides: Iterable[str] | Mapping[str, Any] = (), translate: Translate | None = None
) -> Written:
    """The recipe of that name (library) or path, with what it extends and the given `a.b=c` applied."""
    path = find(name)
    content, lines = _load(path)
    content = _extended(content, path, seen=[path])
    content.setdefault("name", path.stem)
    if translate is not None and "stages" in content:
        content["stages"] = translate(content["stages"])
    pairs = overrides.items() if isinstance(overrides, Mapping) else map(_pair, overrides)
    for key, value in pairs:
        _override(content, key, _parse(value, key) if isinstance(value, str) else value)
    if translate is not None and "stages" in content:
        content["stages"] = translate(content["stages"], laid_over=True)
    return Written(path, content, lines)


def find(name: str | Path) -> Path:
    """The file of a recipe: a path, or a name in the library such as `laptop` or `experiments/replay`."""
    path = expanded(name)
    if path.is_file():
        return path.resolve()
    name = RENAMED.get(str(name), name)
    shipped = LIBRARY / f"{name}.yaml"
    if shipped.is_file() and LIBRARY in shipped.resolve().parents:
        return shipped
    known = library()
    written = [path.with_name(file.name) for file in path.parent.glob("*.y*ml")]
    hint = nearest(str(name), [*known, *map(str, written)]) or f" ({_named(known)})."
    raise TriviumError(f"There is no recipe `{name}`: no such file, and not one of the library's{hint}")


def library() -> list[str]:
    """The names of the recipes that ship."""
    return sorted(path.relative_to(LIBRARY).with_suffix("").as_posix() for path in LIBRARY.rglob("*.yaml"))


def _named(known: list[str]) -> str:
    """The names of the library in one sentence, those in a folder behind its name."""
    plain = [one for one in known if "/" not in one]
    experiments = [one.partition("/")[2] for one in known if "/" in one]
    return f"it has {', '.join(plain)}, and in experiments/ {', '.join(experiments)}"


def _extended(content: dict[str, Any], path: Path, seen: list[Path]) -> dict[str, Any]:
    """The content laid over what it `extends`: mappings merge, `null` takes a key away, the rest replaces."""
    parent_name = content.pop("extends", None)
    if parent_name is None:
        return content
    beside = path.parent / str(parent_name)
    parent_path = beside.resolve() if beside.is_file() else find(str(parent_name))
    if parent_path in seen:
        chain = " -> ".join(one.name for one in [*seen, parent_path])
        raise TriviumError(
            f"{path}: recipes extend each other in a circle ({chain}); take one `extends` away."
        )
    parent = _extended(_load(parent_path)[0], parent_path, [*seen, parent_path])
    parent.pop("name", None)
    return laid_over(parent, content)


def laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge, `null` takes a key away, another `kind` starts afresh, and the rest replaces."""
    if "kind" in above and above["kind"] != below.get("kind"):
        return above
    result = dict(below)
    for key, value in above.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = laid_over(result[key], value)
        else:
            result[key] = value
    return result


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise TriviumError(f"--set {text} has no value; write --set stages.base.tokens=2M.")
    return key, value


def _parse(value: str, key: str) -> Any:
    try:
        return parse(value, "")[0]
    except TriviumError:
        raise TriviumError(f"--set {key}={value} is not valid YAML; quote the value.") from None


def _override(content: dict[str, Any], key: str, value: Any) -> None:
    """Set one value deep inside; `base.tokens` is short for `stages.base.tokens`."""
    keys = key.split(".")
    stages = content.get("stages") or {}
    if len(keys) > 1 and keys[0] not in ("stages", "report", "experiment"):
        keys = ["stages", *keys]
    if not isinstance(stages, dict):
        raise TriviumError(f"--set {key}: `stages` is {stages!r}, not a mapping; fix the recipe first.")
    if keys[0] == "stages" and len(keys) > 1 and keys[1] not in stages:
        raise TriviumError(
            f"--set {key}: the recipe has no stage `{keys[1]}`{nearest(keys[1], stages)}"
            f" (its stages are {', '.join(map(str, stages))})."
        )
    inside: Any = content
    for step, part in enumerate(keys, start=1):
        if not isinstance(inside, (dict, list)):
            above = ".".join(keys[: step - 1])
            raise TriviumError(f"--set {key}: `{above}` is {inside!r}, not a mapping; set it as a whole.")
        place: Any = part
        if isinstance(inside, list):
            if not part.isdecimal() or int(part) >= len(inside):
                raise TriviumError(f"--set {key}: a list of {len(inside)} has no place `{part}`.")
            place = int(part)
        if step == len(keys):
            inside[place] = value
        else:
            # A copy, so that a mapping shared by a YAML anchor changes here only.
            deeper = inside[place] if isinstance(inside, list) else inside.get(place, {})
            inside[place] = copy(deeper)
            inside = inside[place]


def _load(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """A YAML file's mapping, and the line of every key in it."""
    with readable(path):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TriviumError(f"{path} is not valid YAML: {error}.") from None
    content, lines = parse(text, str(path))
    if not isinstance(content, dict):
        raise TriviumError(f"{path} is not a recipe: it needs `stages:` with a mapping of names to stages.")
    return content, lines
