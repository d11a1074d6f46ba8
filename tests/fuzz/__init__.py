"""Fuzzing, one module per part of Trivium; `make fuzz SECONDS=120` runs it (SECONDS=86400 for a day).

To add a target, add a module to this folder; its presence is enough:

    from fuzz.frame import fuzz
    from hypothesis import strategies as st

    @fuzz("jsonl reader", st.binary(max_size=4096))
    def jsonl(content: bytes) -> None:
        read(content)

The property is the same everywhere: the function returns or raises `TriviumError` (or what `refuses=` names),
within `seconds` for each example and `memory` bytes above what the process had before. Asserts and
`hypothesis.assume` work as in any test. Each failure is printed with its example, becomes an ordinary test of
the part that is then fixed, and is tried first in the next run.
"""
