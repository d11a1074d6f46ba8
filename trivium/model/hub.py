"""Where a model's files are: a folder, a GGUF file or an adapter here, or a repository of the hub."""

import re
from pathlib import Path

from trivium.kit.errors import TriviumError
from trivium.kit.files import expanded

WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
HUB_NAME = re.compile(r"^\w[\w.-]*/[\w.-]+(@[\w./-]+)?$")


def resolve(name: str | Path, fetch: bool = True) -> Path:
    """A folder, the model a stage made in it, a GGUF file or an adapter as one; else `owner/name[@revision]`.

    Without `fetch`, what is of the hub has to be on this machine already.
    """
    path = expanded(name)
    if path.is_dir():
        made = path / "model"
        # A finished stage shows its model's files beside its own as well; what is used is what it sealed.
        is_stage = (path / "stage.yaml").is_file() or not (path / "config.json").is_file()
        if is_stage and (made / "config.json").is_file():
            return made
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            from trivium.model.adapter_folder import as_folder as merged_folder

            return merged_folder(path)
        return path
    if path.exists():
        # Torch is imported only where a file is read.
        from trivium.model.gguf.read import as_folder, is_gguf

        if is_gguf(path):
            return as_folder(path)
        raise TriviumError(f"{path} is a file: name the folder that holds config.json, or a .gguf file.")
    if not HUB_NAME.match(str(name)):
        raise TriviumError(f"{name} is neither a folder nor an id of the hub (owner/name).")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    repository, _, revision = str(name).partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=WANTED, local_files_only=not fetch
        )
    except RepositoryNotFoundError as error:
        raise TriviumError(
            f"{name} is neither a folder here nor a repository of the hub that you may read: "
            "check its name, or log in with `hf auth login`."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TriviumError(
            f"{name} is no folder here and could not be fetched from the hub: {reason}"
        ) from error
    return Path(folder)
