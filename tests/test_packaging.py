"""What each extra installs is what the code it is for imports."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# A distribution that is imported under another name, or that brings another it stands on.
BRINGS = {"pyyaml": {"yaml"}, "fastapi": {"fastapi", "starlette"}}


def distributions(requirements):
    return {re.match(r"[\w-]+", requirement)[0].lower() for requirement in requirements}


def modules(requirements):
    return {
        module
        for name in distributions(requirements)
        for module in BRINGS.get(name, {name.replace("-", "_")})
    }


def imported(*rooms):
    """The top-level names of everything imported in some rooms, wherever in a file it stands."""
    found = set()
    for path in (path for room in rooms for path in (ROOT / "trivium" / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"trivium"}


def test_the_extra_serve_brings_everything_a_server_imports():
    extras = PROJECT["optional-dependencies"]
    # Engines behind an address, and vLLM, are opened by those who name them.
    elsewhere = modules(extras["endpoint"]) | {"vllm"}
    needed = imported("serve", "generate") - elsewhere
    assert needed <= modules([*PROJECT["dependencies"], *extras["serve"]])


def test_the_commands_for_a_fresh_machine_install_the_server():
    for file in ("Makefile", "README.md"):
        [installed] = re.findall(r'-e "\.\[((?!dev)[\w,]+)\]"', (ROOT / file).read_text(encoding="utf-8"))
        assert "serve" in installed.split(",")
