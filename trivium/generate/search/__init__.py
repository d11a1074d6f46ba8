"""Search over what a model could say: a tree of steps, a scorer of partial texts, methods that walk it."""
