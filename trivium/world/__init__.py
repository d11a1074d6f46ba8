"""The embedded curriculum: a generated country whose every document has a known truth."""

from trivium.world.catalogue import documents, entropy, options, questions, sources
from trivium.world.document import Question, WorldDocument

__all__ = ["Question", "WorldDocument", "documents", "entropy", "options", "questions", "sources"]
