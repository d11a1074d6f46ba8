"""The layers of isolation around a program: their names, and a description of those in force."""

from typing import Any

# Each can be left out by its name, so that tests can show what the others hold without it.
LAYERS = ("namespaces", "landlock", "calls", "limits", "cgroup")

# Without namespaces only Landlock stands behind the filter of system calls: since version 6 (Linux 6.12) it
# also refuses signals and abstract sockets that leave its domain.
NEEDED_LANDLOCK = 6


def describe(layers: dict[str, Any]) -> str:
    """One line for a person: the layers in force and, of those that are not, why."""
    words = []
    if layers.get("namespaces"):
        words.append("namespaces")
    if layers.get("landlock"):
        words.append(f"Landlock {layers['landlock']}")
    if layers.get("calls"):
        words.append(f"system-call filter ({layers['calls']})")
    if layers.get("limits"):
        words.append("resource limits")
    if layers.get("cgroup"):
        words.append(f"cgroup v2 ({', '.join(layers['cgroup'])})")
    missing = [f"no {name}: {why}" for name, why in layers.get("missing", {}).items()]
    if layers.get("unsafe"):
        ways = ", ".join(layers["open"]) or "nothing that was tried, but this kernel is not known to hold it"
        missing.append(f"UNSAFE, as --unsafe-sandbox accepts; what a program can reach: {ways}")
    return "; ".join([", ".join(words) or "no isolation", *missing])
