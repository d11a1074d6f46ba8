"""Fenced blocks in a text, found in one pass whatever the text is."""


def fenced_lines(text: str) -> list[tuple[str, str]]:
    """The blocks between lines that begin with three backticks: the word after them, and what is inside.

    A block that never closes is none.
    """
    blocks = []
    language: str | None = None
    inside: list[str] = []
    for line in text.split("\n"):
        content = line.lstrip(" \t")
        if not content.startswith("```"):
            inside.append(line)
        elif language is None:
            language, inside = (content[3:].split() or [""])[0], []
        else:
            blocks.append((language, "".join(f"{one}\n" for one in inside)))
            language = None
    return blocks


def fenced_anywhere(text: str) -> list[tuple[str, str]]:
    """The same for fences anywhere in a line; the rest of an opening fence's line names the language."""
    blocks = []
    # Outside, inside, outside...; what is left after the last fence is outside, or never closes.
    parts = text.split("```")
    for inside in parts[1 : len(parts) - 1 : 2]:
        first, newline, rest = inside.partition("\n")
        if newline:
            blocks.append((first.strip(), rest))
    return blocks
