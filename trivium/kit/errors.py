"""The one error a person can cause."""


class TriviumError(Exception):
    """One sentence for a person: what is wrong, where, and how to mend it."""
