"""The embedded curriculum: a generated country whose every document has a known truth."""

from trivium.world.catalogue import dials, documents, entropy, questions, sources
from trivium.world.document import Question, WorldDocument

__all__ = ["Question", "WorldDocument", "dials", "documents", "entropy", "questions", "sources"]
