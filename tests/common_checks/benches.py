"""Runs that several lines of the table look at are made once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from tiny_run import Inputs, Seen, make_inputs, run_stage


class Bench:
    """Makes the inputs when the first run needs them, and remembers runs of unmoved stages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[str, Seen] = {}

    @cached_property
    def inputs(self) -> Inputs:
        """The files and models that the stages start from."""
        return make_inputs(self.folder)

    def run(self, kind: str, settings: Mapping[str, Any], **how: Any) -> Seen:
        """One stage of a kind with these settings, run now."""
        return run_stage(self.inputs, kind, settings, **how)

    def known_run(self, kind: str, settings: Mapping[str, Any], **how: Any) -> Seen:
        """The same, run only if it was not run before."""
        name = json.dumps([kind, settings, how], sort_keys=True)
        if name not in self.known:
            self.known[name] = self.run(kind, settings, **how)
        return self.known[name]
