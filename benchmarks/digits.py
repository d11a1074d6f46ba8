"""Real scans: scikit-learn's 1,797 handwritten digits, asked one by one: Which digit is this?

    python benchmarks/digits.py [--seed 1] [--steps 150] [--to FOLDER]

A fifth of the scans is held out. Beside the share that is named right stand what is guessed from an empty
picture and from another one, and a logistic regression on the same pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from digit_questions import answers, arguments_of, learned, taught
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

QUESTION = "Which digit is this?"
TOWER = "picture: {encoder: own, patch: 16, tokens: 4, layers: 2, width: 96}"


def picture_of(scan: np.ndarray) -> Image.Image:
    """A scan of 8 × 8 values up to 16 as a grey picture of 32 × 32."""
    small = Image.fromarray((scan / 16 * 255).round().astype(np.uint8))
    return small.resize((32, 32), Image.Resampling.BICUBIC)


def main() -> None:
    """Write the scans, train, ask, and print the table."""
    arguments = arguments_of(__doc__, "digits", steps=150)
    folder = arguments.to
    scans, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(scans))
    train, test = order[360:], order[:360]
    for number in order:
        picture_of(scans[number].reshape(8, 8)).save(folder / f"{number}.png")
    picture_of(np.zeros((8, 8))).save(folder / "blank.png")
    rows = [taught("image", f"{number}.png", QUESTION, digits[number]) for number in train]
    model = learned(arguments, "digits", "see", TOWER, rows)

    def right(shown: list[Path]) -> float:
        said = answers(model, "image", shown, QUESTION)
        return float(np.mean([one == str(digits[number]) for one, number in zip(said, test, strict=True)]))

    own = [folder / f"{number}.png" for number in test]
    peer = LogisticRegression(max_iter=2000).fit(scans[train] / 16, digits[train])
    print(f"held-out scans named right: {right(own):.3f}")
    print(f"the picture of another scan: {right([*own[1:], own[0]]):.3f}")
    print(f"an empty picture: {right([folder / 'blank.png'] * len(own)):.3f}")
    print(f"logistic regression on the pixels: {peer.score(scans[test] / 16, digits[test]):.3f}")


if __name__ == "__main__":
    main()
