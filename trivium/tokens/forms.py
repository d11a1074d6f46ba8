"""How a model's pictures and sounds become tokens, as its folder says."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.kit.files import read_object
from trivium.tokens.codebook import Codebook
from trivium.tokens.pictures import PictureForm
from trivium.tokens.sounds import SoundForm

FOLDER = "modalities"
"""Beside a model's config.json: its encoders and projectors, with a config.json of their own."""
LLAVA = "llava"
_FILTERS = range(6)


@dataclass(frozen=True)
class Forms:
    """How the pictures and sounds of a model become tokens; None for what it does not take."""

    picture: PictureForm | None = None
    sound: SoundForm | None = None
    picture_token: str | None = None
    """The control token that the model's own chat template writes for a picture, where it does."""
    sound_token: str | None = None
    codebook: Codebook | None = None
    """Where pictures are tokens of the vocabulary: what these look like."""

    def written(self) -> dict[str, Any]:
        return asdict(self)


def forms_from(content: Mapping[str, Any], path: Path) -> Forms:
    """The forms that `written` wrote."""
    try:
        picture, sound, codebook = (content.get(name) for name in ("picture", "sound", "codebook"))
        return Forms(
            None if picture is None else PictureForm(**picture),
            None if sound is None else SoundForm(**sound),
            content.get("picture_token"),
            content.get("sound_token"),
            None if codebook is None else Codebook(**codebook),
        )
    except (TypeError, ValueError) as error:
        raise TriviumError(f"{path} says in `forms` what is not known here: {error}.") from error


def read_forms(folder: Path) -> Forms | None:
    """The forms of a model's folder: our own, or those of a LLaVA model; None for a model of text."""
    own = folder / FOLDER / "config.json"
    if own.is_file():
        return forms_from(read_object(own).get("forms") or {}, own)
    config = folder / "config.json"
    if config.is_file() and read_object(config).get("model_type") == LLAVA:
        return llava_forms(folder, read_object(config))
    return None


def processor_of(folder: Path) -> dict[str, Any]:
    """What a folder's processor does with its input; empty where it says nothing."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            content = read_object(folder / name)
            return content.get("image_processor") or content.get("feature_extractor") or content
    return {}


def filter_of(processor: Mapping[str, Any]) -> int:
    """Pillow's number of the filter with which a processor resizes: bicubic where it names none."""
    return processor["resample"] if processor.get("resample") in _FILTERS else 3


def llava_forms(folder: Path, config: Mapping[str, Any]) -> Forms:
    """The forms of a LLaVA folder: the size and filter of its processor, the tokens of its tower."""
    vision, processor = config.get("vision_config") or {}, processor_of(folder)
    side, patch = int(vision.get("image_size", 336)), int(vision.get("patch_size", 14))
    with_class = 0 if "siglip" in str(vision.get("model_type")) else 1
    dropped = 1 if config.get("vision_feature_select_strategy", "default") == "default" else 0
    tokens = (side // patch) ** 2 + with_class - dropped
    crops = bool(processor.get("do_center_crop", "clip" in str(vision.get("model_type"))))
    name = None
    tokenizer = folder / "tokenizer.json"
    if tokenizer.is_file():
        added = read_object(tokenizer).get("added_tokens") or []
        index = config.get("image_token_index", config.get("image_token_id"))
        name = next((one["content"] for one in added if one["id"] == index), None)
    form = PictureForm(
        side=side, tokens=tokens, resize="crop" if crops else "stretch",
        filter=filter_of(processor),
    )  # fmt: skip
    return Forms(picture=form, picture_token=name)
