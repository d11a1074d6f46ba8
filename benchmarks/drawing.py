"""Early fusion: a model learns to draw, and combinations that it never saw drawn are asked for.

    python benchmarks/drawing.py [--seed 1] [--steps 300] [--patch 4] [--to FOLDER]

A drawing is judged by a program: its colour is the nearest to what is not background, its count how many
quarters of the picture hold something, and its shape the one whose outline overlaps best. Beside what the
model drew stands what the same program says of true pictures, and of these in the codes of the codebook.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mode

import numpy as np
from digit_questions import arguments_of
from PIL import Image

import trivium
from trivium.world import drawing
from trivium.world.pictures import SENSE, Options

SIDE = 32
RECIPE = """\
name: drawing
seed: {seed}
stages:
  words: {{kind: tokenizer, vocabulary: 512, data: {{path: "world:pictures?kind=attribute", limit: 1k}}}}
  base: {{kind: pretrain, data: {{"world:facts?people=40": {{limit: 2k}}}}, tokenizer: words, context: 128,
         batch: 2k, tokens: 60k, model: {{depth: 2, width: 96}}}}
  draw:
    kind: multimodal
    from: base
    data: {{"world:pictures?form=draw": {{limit: 12k}}}}
    picture: {{encoder: codebook, patch: {patch}, tokens: {tokens}, codes: 512}}
    learning_rate: 0.02
    context: 128
    batch: 2k
    steps: {steps}
"""
OUTLINES = {
    shape: [
        np.asarray(drawing.marks([(shape, "white", 0.5, 0.5, radius)], SIDE, 0).convert("L")) > 122
        for radius in (0.15, 0.16, 0.17, 0.18, 0.19, 0.2)
    ]
    for shape in drawing.SHAPES
}
"""Each shape in the middle of a picture in every size: bool [SIDE, SIDE] each."""


def judged(picture: np.ndarray) -> tuple[str, str, int]:
    """Shape, colour and count of a picture, uint8 [SIDE, SIDE, 3]."""
    pixels = picture.astype(float)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    apart = np.abs(pixels - np.median(edge, axis=0)).max(-1)
    ink = apart > max(30.0, 0.4 * apart.max())
    half = SIDE // 2
    quarters = [(slice(y, y + half), slice(x, x + half)) for y in (0, half) for x in (0, half)]
    drawn = [place for place in quarters if ink[place].sum() >= 12]
    if not drawn:
        return "nothing", "none", 0
    tone = np.median(pixels[ink], axis=0)
    colour = min(drawing.COLOURS, key=lambda name: float(np.abs(tone - drawing.COLOURS[name]).sum()))
    return mode(_shape(ink[place]) for place in drawn), colour, len(drawn)


def _shape(ink: np.ndarray) -> str:
    """The shape whose outline overlaps best with a quarter of a picture, wherever in it the shape lies."""
    rows, columns = np.nonzero(ink)
    moved = np.zeros((SIDE, SIDE), bool)
    middle = SIDE // 2
    down = middle - round((rows.min() + rows.max()) / 2)
    along = middle - round((columns.min() + columns.max()) / 2)
    moved[rows + down, columns + along] = True

    def overlap(outline: np.ndarray) -> float:
        shifts = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
        laid = [np.roll(outline, shift, (0, 1)) for shift in shifts]
        return max((moved & one).sum() / (moved | one).sum() for one in laid)

    return max(OUTLINES, key=lambda shape: max(map(overlap, OUTLINES[shape])))


def shares(pictures: Iterable[np.ndarray], truths: list[dict]) -> str:
    """How many are right in shape, in colour, in count, and in all three."""
    right = []
    for picture, truth in zip(pictures, truths, strict=True):
        found = judged(picture)
        right.append(
            [one == truth[name] for one, name in zip(found, ("shape", "colour", "count"), strict=True)]
        )
    shape, colour, count = np.mean(right, axis=0)
    return (
        f"shape {shape:.3f}, colour {colour:.3f}, count {count:.3f}, all {np.mean(np.all(right, axis=1)):.3f}"
    )


def main() -> None:
    """Train, draw, and print the table."""
    arguments = arguments_of(__doc__, "drawing", steps=300, patch=4)
    folder = arguments.to
    recipe = folder / "drawing.yaml"
    tokens = (SIDE // arguments.patch) ** 2
    recipe.write_text(
        RECIPE.format(seed=arguments.seed, steps=arguments.steps, patch=arguments.patch, tokens=tokens)
    )
    model = trivium.run(recipe, runs=folder / "runs")["draw"].model()
    book = model.tokenizer.forms.codebook
    for split in ("train", "test"):
        made = [SENSE.made(number, split, 7, Options(), "write") for number in range(200)]
        truths = [one.truth for one in made]
        true = [np.asarray(one.item) for one in made]
        print(f"{split}, true pictures: {shares(true, truths)}")
        coded = [book.pictures(book.ids(one), SIDE)[0] for one in true]
        print(f"{split}, in codes: {shares(coded, truths)}")
        asked = [[{"role": "user", "content": f"Draw {one.answer}."}] for one in made]
        said = model.generate(asked, temperature=1.0, top_p=0.9, seed=1, max_new_tokens=tokens + 4)
        blank = np.full((SIDE, SIDE, 3), 128, np.uint8)
        drawn = [next(iter(model.tokenizer.pictures(one.tokens)), blank) for one in said]
        print(f"{split}, drawn: {shares(drawn, truths)}")
        sheet = np.concatenate([np.concatenate(drawn[row : row + 10], axis=1) for row in range(0, 60, 10)])
        Image.fromarray(sheet).resize((960, 576), Image.Resampling.NEAREST).save(folder / f"{split}.png")


if __name__ == "__main__":
    main()
