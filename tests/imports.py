"""Which test files are about a module: the import graph from tests to the package."""

from __future__ import annotations

import ast
import heapq
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Imports:
    """Which test files import which modules, and how directly."""

    def __init__(self) -> None:
        paths = [path for folder in ("trivium", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
        self.files = {_module(str(path.relative_to(ROOT))): path for path in paths}
        self.texts = {name: path.read_text() for name, path in self.files.items()}
        self.edges = {name: self._imported(text) for name, text in self.texts.items()}
        self.tests = [name for name in self.files if name.startswith("tests.test_")]
        for module, text in self.texts.items():
            # A recipe in a test names the kind of a stage, not the module that holds it.
            for kind in re.findall(r"^    kind: Literal\[\"(\w+)\"", text, re.MULTILINE):
                used = re.compile(rf"kind[\"']?[:=] *[\"']?{kind}\b")
                for test in self.tests:
                    self.edges[test] |= {module} if used.search(self.texts[test]) else set()

    def _imported(self, text: str) -> set[str]:
        names: set[str] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= (inside & self.files.keys()) or {node.module}
        return {name if name in self.files else f"tests.{name}" for name in names} & self.files.keys()

    def distances(self, test: str) -> dict[str, float]:
        """How many imports lead from a test to every module; one inside `tests` counts half."""
        found: dict[str, float] = {}
        waiting = [(0.0, test)]
        while waiting:
            distance, name = heapq.heappop(waiting)
            if name not in found:
                found[name] = distance
                for near in self.edges[name] - found.keys():
                    heapq.heappush(waiting, (distance + (0.5 if near.startswith("tests.") else 1.0), near))
        return found

    def tests_of(self, path: str, least: int, most: int) -> list[str]:
        """The test files that import a module, the likeliest first; where they are few, the next nearest.

        Steps are looked up by name and parts of the sandbox run in a process of their own: no test reaches
        them by imports, so theirs are the tests of their folder.
        """
        module, ranked = _module(path), []
        words = set(re.split(r"[._]", module))
        distances = {test: self.distances(test) for test in self.tests}
        near = {module}
        if not any(module in found for found in distances.values()):
            near = {name for name in self.files if name.rpartition(".")[0] == module.rpartition(".")[0]}
        for test, found in distances.items():
            shared = len(words & set(re.split(r"[._]", test)))
            if near & found.keys():
                wide = sum(distance <= 1 for distance in found.values())
                nearest = min(found[name] for name in near & found.keys())
                ranked.append((nearest, -shared, wide, str(self.files[test].relative_to(ROOT))))
        direct = sum(distance < 2 for distance, *_ in ranked)
        return [file for *_, file in sorted(ranked)[: min(max(direct, least), most)]]


def _module(path: str) -> str:
    return ".".join(Path(path).with_suffix("").parts).removesuffix(".__init__")
