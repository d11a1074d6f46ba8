"""The YAML of recipes: words and numbers of YAML 1.2, no key twice, and a bound on what aliases multiply."""

import re
from typing import Any

import yaml

from trivium.kit.errors import TriviumError

MOST_LETTERS, MOST_VALUES, DEEPEST = 1 << 17, 100_000, 64


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars (`on` is a word, 1e-3 a number), and a key written twice is an error."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > DEEPEST:
            raise RecursionError
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key has to be a word or a number", key_node.start_mark
                )
            key = self.construct_object(key_node, deep=True)
            if key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key}` is written twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


_HALF = re.compile("[\ud800-\udfff]")


def parse(text: str, where: str) -> tuple[Any, dict[tuple[str, ...], int]]:
    """What a YAML text says, and the line of every key in its mappings; `where` names the text in errors."""
    if len(text) > MOST_LETTERS:
        raise TriviumError(f"{where} is longer than {MOST_LETTERS:,} characters, as no recipe is.")
    lines: dict[tuple[str, ...], int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _measure(node, where, {})
        content = loader.construct_document(node)
        _note_lines(node, (), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark else ""
        fix = "; indent with spaces" if "'\\t'" in str(error.problem) else ""
        raise TriviumError(f"{where}{line} is not valid YAML: {error.problem}{fix}.") from None
    except yaml.YAMLError as error:
        raise TriviumError(f"{where} is not valid YAML: {error}.") from None
    except RecursionError:
        raise TriviumError(f"{where} is nested more than {DEEPEST} deep; write it flatter.") from None
    except (ValueError, OverflowError, AttributeError, LookupError, TypeError) as error:
        # A date of a thirteenth month, a number of thousands of digits, a tag that the value does not fit.
        raise TriviumError(f"{where} has a value that YAML cannot read ({error}); quote it.") from None
    return content, lines


def _measure(node: yaml.Node, where: str, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values a node stands for, aliases spelled out, and how deep they go."""
    if id(node) in known:
        values, depth = known[id(node)]
        if not values:
            raise TriviumError(f"{where}: an anchor (`&`) stands for something that holds itself.")
        return values, depth
    if isinstance(node, yaml.ScalarNode) and _HALF.search(node.value):
        raise TriviumError(
            f"{where}:{node.start_mark.line + 1} holds half of a sign (\\ud800 to \\udfff); write it whole."
        )
    known[id(node)] = (0, 0)
    inside = [one for pair in node.value for one in pair] if isinstance(node, yaml.MappingNode) else []
    inside = node.value if isinstance(node, yaml.SequenceNode) else inside
    values, depth = 1, 0
    for one in inside:
        more, below = _measure(one, where, known)
        values, depth = values + more, max(depth, below + 1)
        if values > MOST_VALUES:
            raise TriviumError(f"{where}: aliases (`*`) make more than {MOST_VALUES:,} values of it.")
        if depth > DEEPEST:
            raise RecursionError
    known[id(node)] = (values, depth)
    return values, depth


def _note_lines(node: yaml.Node, keys: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*keys, str(key.value))
            lines[inner] = key.start_mark.line + 1
            _note_lines(value, inner, lines)
