"""Real scans: scikit-learn's 1,797 handwritten digits, asked one by one: Which digit is this?

    python benchmarks/digits.py [--seed 1] [--steps 150] [--to FOLDER]

A fifth of the scans is held out. Beside the share that is named right stand what is guessed from an empty
picture and from another one, and a logistic regression on the same pixels.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import trivium

QUESTION = "Which digit is this?"
RECIPE = """\
name: digits
seed: {seed}
stages:
  words: {{kind: tokenizer, vocabulary: 512, data: {{path: world:facts, limit: 2k}}}}
  base: {{kind: pretrain, data: {{"world:facts?people=40": {{limit: 2k}}}}, tokenizer: words, context: 128,
         batch: 2k, tokens: 100k, model: {{depth: 2, width: 64}}}}
  see:
    kind: multimodal
    from: base
    data: {{./train.jsonl: {{weight: 0.9}}, "world:facts?people=40": {{limit: 500, weight: 0.1}}}}
    picture: {{encoder: own, patch: 16, tokens: 4, layers: 2, width: 96}}
    steps_frozen: 0.1
    learning_rate: 0.02
    new_parts_rate: 1.0
    context: 128
    batch: 2k
    steps: {steps}
"""


def picture_of(scan: np.ndarray) -> Image.Image:
    """A scan of 8 × 8 values up to 16 as a grey picture of 32 × 32."""
    small = Image.fromarray((scan / 16 * 255).round().astype(np.uint8))
    return small.resize((32, 32), Image.Resampling.BICUBIC)


def asked(path: Path | str) -> list[dict]:
    """The question about a picture."""
    parts = [{"type": "image", "path": str(path)}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": parts}]


def main() -> None:
    """Write the scans, train, ask, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--to", type=Path)
    arguments = parser.parse_args()
    folder = arguments.to or Path(tempfile.mkdtemp(prefix="digits-"))
    folder.mkdir(parents=True, exist_ok=True)
    scans, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(scans))
    train, test = order[360:], order[:360]
    for number in order:
        picture_of(scans[number].reshape(8, 8)).save(folder / f"{number}.png")
    picture_of(np.zeros((8, 8))).save(folder / "blank.png")
    rows = [
        {"messages": [*asked(f"{number}.png"), {"role": "assistant", "content": str(digits[number])}]}
        for number in train
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = folder / "digits.yaml"
    recipe.write_text(RECIPE.format(seed=arguments.seed, steps=arguments.steps))
    model = trivium.run(recipe, runs=folder / "runs")["see"].model()

    def right(shown: list[Path]) -> float:
        said = model.generate([asked(path) for path in shown], temperature=0, max_new_tokens=4)
        return float(np.mean([one.text.strip() == str(digits[number]) for one, number in zip(said, test)]))

    own = [folder / f"{number}.png" for number in test]
    peer = LogisticRegression(max_iter=2000).fit(scans[train] / 16, digits[train])
    print(f"held-out scans named right: {right(own):.3f}")
    print(f"the picture of another scan: {right([*own[1:], own[0]]):.3f}")
    print(f"an empty picture: {right([folder / 'blank.png'] * len(own)):.3f}")
    print(f"logistic regression on the pixels: {peer.score(scans[test] / 16, digits[test]):.3f}")


if __name__ == "__main__":
    main()
