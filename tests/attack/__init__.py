"""Attacks on Trivium, one module per class; `make attack` runs them and prints what held and what broke.

To add a class, add a module to this folder; its presence is enough:

    from attack.frame import attack

    @attack("store", "a flipped bit in the optimiser's state")
    def flipped_moment(scratch: Path) -> None:      # `scratch` is an empty folder
        ...
        assert refused, "the run resumed from damaged moments"

    @attack("server", cases=BODIES)                 # one attack for each entry of a dictionary: name -> value
    def body(scratch: Path, value: bytes) -> None: ...

An attack *holds* where its function returns and is *broken* where it raises or takes longer than its
`seconds`. A module's attacks run one after another in a process of their own, which they may end or block:
that attack is broken, and the rest go on in a new process. What listens, listens on 127.0.0.1; temporary
files go to `scratch`.
"""
