import base64
import io
import wave

import numpy as np
import pytest
from PIL import Image

from trivium import world
from trivium.kit.errors import TriviumError
from trivium.world import sounds
from trivium.world.chance import Chance
from trivium.world.drawing import COLOURS
from trivium.world.pictures import combinations
from trivium.world.sounds import PITCHES, RATE, played


def picture_of(question):
    url = question.messages[0]["content"][0]["image_url"]["url"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB"))


def pieces(inked):
    """How many connected areas there are."""
    left, found = {(int(y), int(x)) for y, x in np.argwhere(inked)}, 0
    while left:
        found, edge = found + 1, [left.pop()]
        while edge:
            y, x = edge.pop()
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= near
            edge += near
    return found


def samples_of(question):
    data = base64.b64decode(question.messages[0]["content"][0]["input_audio"]["data"])
    with wave.open(io.BytesIO(data)) as file:
        assert file.getframerate() == RATE
        return np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767


def test_no_combination_is_in_two_splits_and_every_part_is_in_training():
    splits = {split: set(combinations(split)) for split in ("train", "validation", "test")}
    assert sum(map(len, splits.values())) == len(set.union(*splits.values())) == 6 * 8 * 4
    assert len(splits["test"]) > 10
    for place in range(3):
        assert {one[place] for one in splits["test"]} <= {one[place] for one in splits["train"]}
    asked = {
        (one.truth["shape"], one.truth["colour"], one.truth["count"])
        for one in world.questions("pictures", limit=300)
    }
    assert asked <= splits["test"]


def test_the_picture_shows_the_colour_that_is_answered():
    for question in world.questions("pictures", limit=60, kind="colour", size=64):
        pixels = picture_of(question).astype(int)
        near = {
            name: int((np.abs(pixels - np.array(ink)).sum(-1) < 12).sum()) for name, ink in COLOURS.items()
        }
        assert max(near, key=near.get) == question.answer


def test_the_picture_shows_as_many_shapes_as_are_answered():
    for question in world.questions("pictures", limit=60, kind="count", size=96):
        pixels = picture_of(question).astype(int)
        found = pieces(np.abs(pixels - pixels[0, 0]).max(-1) > 40)
        assert ("one", "two", "three", "four").index(question.answer) + 1 == found


@pytest.mark.parametrize("kind", ["what", "attribute", "all", "position", "digit", "chart"])
def test_a_pair_differs_in_picture_and_answer_and_asks_the_same(kind):
    asked = list(world.questions("pictures", limit=40, kind=kind))
    for one, other in zip(asked[::2], asked[1::2], strict=True):
        assert one.truth["pair"] == other.truth["pair"]
        assert one.question == other.question
        assert one.answer != other.answer
        assert (picture_of(one) != picture_of(other)).any()


def test_what_baselines_show_is_another_picture_an_empty_one_or_none():
    own, shuffled, blank, none = (
        list(world.questions("pictures", limit=20, shown=shown))
        for shown in ("own", "shuffled", "blank", "none")
    )
    assert [one.answer for one in own] == [one.answer for one in shuffled]
    assert sum((picture_of(a) != picture_of(b)).any() for a, b in zip(own, shuffled, strict=True)) > 15
    assert len({picture_of(one).tobytes() for one in blank}) == 1
    assert all(len(one.messages[0]["content"]) == 1 for one in none)


def test_the_melody_is_the_one_that_is_answered():
    for question in world.questions("sounds", limit=30, noise=0.0):
        samples = samples_of(question)
        loud = np.flatnonzero(np.abs(samples) > 0.02)
        # Where a pause is longer than a few hundredths of a second, another tone begins.
        starts = [loud[0], *loud[1:][np.diff(loud) > 0.03 * RATE]]
        heard = []
        for start in starts:
            piece = samples[start : start + int(0.18 * RATE)] * np.hanning(int(0.18 * RATE))
            peak = np.abs(np.fft.rfft(piece, 1 << 15)).argmax() * RATE / (1 << 15)
            heard.append(min(PITCHES, key=lambda name: abs(PITCHES[name] - peak)))
        assert " ".join(heard) == question.answer


def test_no_two_sounds_have_the_same_noise():
    noises = set()
    for number in range(200):
        loud, quiet = (played([(440.0, 0.1)], Chance(number), noise) for noise in (1.0, 0.0))
        noises.add(tuple((loud - quiet)[:4].round(6)))
    assert len(noises) == 200


def test_pairs_for_preferences_have_a_right_and_a_wrong_answer():
    for one in world.documents("pictures", limit=20, form="pairs"):
        assert one.fields["chosen"][0]["content"] == one.truth["answer"]
        assert one.fields["rejected"][0]["content"] != one.truth["answer"]


@pytest.mark.parametrize("options", [{"kind": "x"}, {"size": 7}, {"form": "x"}, {"shown": "x"}])
def test_what_cannot_be_drawn_is_refused(options):
    with pytest.raises(TriviumError, match="world:pictures"):
        list(world.documents("pictures", limit=1, **options))


@pytest.mark.parametrize("heard", [sounds._melody, sounds._pitch, sounds._count])
def test_the_other_sound_has_another_answer(heard):
    for number in range(20):
        first, other = (heard(Chance(number), "train", second, sounds.Options()) for second in (False, True))
        assert first.answer != other.answer


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("kind", sorted(sounds.KINDS))
def test_every_kind_of_sound_is_played_in_every_split(kind, split):
    for seed in range(8):
        rows = list(world.documents("sounds", kind=kind, split=split, seed=seed, limit=20))
        assert len(rows) == 20
        assert all(row.truth["kind"] == kind for row in rows)


def test_a_split_with_one_pitch_has_no_pairs():
    with pytest.raises(TriviumError, match="no second pitch in this split; ask without pairs"):
        sounds._pitch(Chance(1), "validation", True, sounds.Options())
    assert sounds._pitch(Chance(1), "validation", False, sounds.Options()).answer in PITCHES
