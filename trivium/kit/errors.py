"""The errors that are told to a person in one sentence."""


class TriviumError(Exception):
    """One sentence for a person: what is wrong, where, and how to fix it."""


class DamagedError(TriviumError):
    """A file is not what was written to it; an older copy or another run can replace it."""
