"""Mathematical answers: read exactly, compared exactly, and refused where they hedge."""

from trivium.grade.maths.scorer import MathScorer

__all__ = ["MathScorer"]
