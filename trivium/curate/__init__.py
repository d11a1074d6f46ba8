"""Curation: documents in, documents out, and for every one that is left out the step and the reason."""
