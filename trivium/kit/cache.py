"""Where what follows from other files is kept, so that it is made once."""

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

from trivium.kit.files import expanded


def cache_folder() -> Path:
    """`TRIVIUM_CACHE`, else `trivium` in the user's cache folder; if empty, a folder for this process."""
    named = os.environ.get("TRIVIUM_CACHE")
    if named == "":
        return _of_this_process()
    return expanded(named or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "trivium")


@cache
def _of_this_process() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="trivium-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
