"""Chat templates within a budget: none loops for ever or makes gigabytes out of a short conversation.

A template comes with a model, from a stranger. Jinja's sandbox keeps it from other objects; here every loop,
operator, filter and call of a rendering is counted. What can multiply (`'x' * n`, `center(n)`, a join of many
by much) is looked at before it is done; everything else works in proportion to what it is given, and what it
makes is counted afterwards, a list with everything it holds. The processor time of the thread is looked at in
between.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import update_wrapper
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from trivium.kit.errors import TriviumError

SECONDS = 10.0
_LOOK_EVERY = 16
_LONGEST_SOURCE = 1 << 18
_LONGEST_TEXT = 4 << 20
_LONGEST_LIST = 200_000
_MOST_BYTES = 256 << 20
_WIDEST = 1000
# For filters of Jinja's own that take more than a linear time.
_LONGEST_FOR_SLOW_FILTERS = 20_000
_WIDE_FORMAT = re.compile(r"\d{5,}|%[-+ #0]*\*|%[^a-zA-Z%]*\.\*|\{[^{}]*:[^{}]*\{")


class Meter:
    """What one rendering may still use; sizes grow with what it is given."""

    def __init__(self, given: Any) -> None:
        size, parts = deep_size(given)
        self.longest_text = _LONGEST_TEXT + 8 * size
        self.longest_list = _LONGEST_LIST + 8 * parts
        self.bytes_left = _MOST_BYTES + 64 * size
        self.until = time.thread_time() + SECONDS
        self.steps = 0

    def step(self, parts: int = 0) -> None:
        """Count one operation, on so many parts of a list."""
        self.steps += 1 + parts // 100
        if self.steps < _LOOK_EVERY:
            return
        self.steps = 0
        if time.thread_time() > self.until:
            raise TriviumError(
                f"The chat template takes more than {SECONDS:g} seconds for one conversation; fix its loops."
            )

    def room(self, length: int) -> None:
        """Refuse to make a text of this length."""
        if length > self.longest_text:
            raise too_large(length)

    def listed(self, value: Any) -> None:
        """Count a list by its length alone."""
        if len(value) > self.longest_list:
            raise too_large(len(value))
        self.bytes_left -= 8 * len(value)

    def text(self, value: str) -> str:
        """Count a new text and give it back."""
        length = len(value)
        self.bytes_left -= length
        if length > self.longest_text or self.bytes_left < 0:
            raise too_large(max(length, _MOST_BYTES))
        return value

    def made(self, value: Any) -> Any:
        """Count a new value and give it back."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, bytes):
            self.room(len(value))
            self.bytes_left -= len(value)
        elif isinstance(value, (list, tuple, dict)):
            self.listed(value)
            # It may hold one long text many times over, which a comparison or an output would spell out.
            self.step(deep_size(value, self.longest_text, self.longest_list)[1])
        elif isinstance(value, Namespace):
            raise SecurityError("a namespace is not a value of a chat template")
        if self.bytes_left < 0:
            raise too_large(_MOST_BYTES)
        return value


def too_large(size: int) -> TriviumError:
    """What is said of a template that makes too much."""
    return TriviumError(f"The chat template makes a text or list of {size} or more; fix what it repeats.")


class _Current(threading.local):
    meter: Meter | None = None


_current = _Current()


def meter() -> Meter:
    """The meter of the rendering that goes on in this thread."""
    assert _current.meter is not None
    return _current.meter


def deep_size(value: Any, longest: float = float("inf"), most: float = float("inf")) -> tuple[int, int]:
    """The characters and the parts of a nested value, each part counted as often as it is reached."""
    size, parts, waiting = 0, 0, [value]
    while waiting:
        part = waiting.pop()
        parts += 1
        kind = type(part)
        if kind is str or isinstance(part, (str, bytes)):
            size += len(part)
        elif isinstance(part, dict):
            waiting += part
            waiting += part.values()
        elif isinstance(part, (list, tuple)):
            waiting += part
        elif kind is Namespace or isinstance(part, Namespace):
            raise SecurityError("a namespace is not part of a list of a chat template")
        if size > longest or parts + len(waiting) > most:
            raise too_large(max(size, parts))
    return size, parts


def _counted(items: Any, letters: int) -> Iterator[Any]:
    """The items of a loop, and the letters that each of its turns writes down."""
    counted = meter()
    for item in items:
        counted.step()
        counted.bytes_left -= letters
        if counted.bytes_left < 0:
            raise too_large(_MOST_BYTES)
        yield item


def _made(value: Any) -> Any:
    """A value that an operator, a list or an output makes, counted."""
    counted = meter()
    counted.step()
    return counted.made(value)


@pass_context
def _written(context: Context, value: Any) -> Any:
    """What an output is made of, before it becomes text; the context keeps it from being worked out early."""
    return _made(value)


class BudgetedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with everything a template does on a meter."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, **settings: Any) -> None:
        # Constants are not worked out beforehand: 'x'|center(10 ** 9) would be, with no meter.
        super().__init__(optimized=False, finalize=_written, **settings)
        del self.globals["lipsum"]

    def meter_filters(self) -> None:
        """Put every filter that is known by now on the meter."""
        for name, function in list(self.filters.items()):
            self.filters[name] = _metered(name, function)
        # No template can spell these names.
        self.filters |= {" counted": _counted, " made": _made}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > _LONGEST_SOURCE:
            raise TriviumError(f"The chat template is longer than {_LONGEST_SOURCE} characters.")
        tree = super()._parse(source, name, filename)
        _meter_tree(tree)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Work out one operator."""
        counted = meter()
        counted.step()
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            return counted.text(left + right)
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, str | bytes | list | tuple) and isinstance(times, int):
                    counted.room(len(text) * max(times, 0) * (1 if isinstance(text, str | bytes) else 8))
        elif operator == "%" and isinstance(left, str | bytes):
            _refuse_wide(str(left))
            counted.made(right)
        elif operator == "**":
            _refuse_power(left, right)
        return counted.made(_whole(super().call_binop(context, operator, left, right)))

    def getitem(self, obj: Any, argument: Any) -> Any:
        """One item, or a slice."""
        found = super().getitem(obj, argument)
        if isinstance(argument, slice):
            counted = meter()
            counted.step()
            if isinstance(found, list | tuple):
                counted.listed(found)
            else:
                counted.made(found)
        return found

    def call(__self, __context: Context, __obj: Any, *args: Any, **named: Any) -> Any:
        """Call a method of plain data, a macro or one of the few functions a template has."""
        counted = meter()
        counted.step()
        if isinstance(__obj, BuiltinMethodType | MethodType):
            owner, name = __obj.__self__, __obj.__name__
            for kind, methods in _METHODS.items():
                if isinstance(owner, kind):
                    if name not in methods:
                        raise SecurityError(f"a chat template may not call {name} of a {kind.__name__}")
                    if name == "join":
                        args = tuple(map(_all_of, args))
                    methods[name](counted, owner, args, named)
                    break
            else:
                # Of the classes themselves, whose methods make things out of nothing.
                if isinstance(owner, type):
                    raise SecurityError(f"a chat template may not call {name} of a class")
        elif getattr(__obj, "__name__", "") in ("format", "format_map"):
            _refuse_wide(str(getattr(__obj, "__wrapped__", __obj).__self__))
            counted.made([*args, *named.values()])
        elif isinstance(__obj, LoopContext) and args:
            args = (_counted(args[0], 0), *args[1:])
        result = super().call(__context, __obj, *args, **named)
        return result if isinstance(result, Namespace) else counted.made(result)


def _meter_tree(tree: nodes.Template) -> None:
    """Put loops, joined texts and lists on the meter."""
    for loop in list(tree.find_all(nodes.For)):
        letters = sum(len(part.data) for part in loop.find_all(nodes.TemplateData))
        loop.iter = _filtered(loop.iter, " counted", nodes.Const(letters))
    _replace(tree)


def _replace(node: nodes.Node) -> None:
    for field, value in list(node.iter_fields()):
        if isinstance(value, list):
            value[:] = [_replaced(part) if isinstance(part, nodes.Node) else part for part in value]
        elif isinstance(value, nodes.Node):
            setattr(node, field, _replaced(value))


def _replaced(node: Any) -> Any:
    _replace(node)
    if not isinstance(node, nodes.Expr):
        return node
    if isinstance(node, nodes.Concat):
        node.nodes = [_filtered(part, " made") for part in node.nodes]
    if isinstance(node, nodes.Concat | nodes.Compare):
        return _filtered(node, " made")
    loads = getattr(node, "ctx", "load") == "load"
    if isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and loads):
        parts = node.iter_child_nodes()
        return node if all(isinstance(part, nodes.Const) for part in parts) else _filtered(node, " made")
    return node


def _filtered(node: Any, name: str, *arguments: nodes.Expr) -> nodes.Filter:
    made = nodes.Filter(node, name, list(arguments), [], None, None)
    made.set_lineno(node.lineno)
    assert node.environment is not None
    made.set_environment(node.environment)
    return made


def within_budget(render: Callable[..., str], values: Mapping[str, Any]) -> str:
    """Render with these values on a meter of its own."""
    before, _current.meter = _current.meter, Meter(values)
    try:
        return render(**values)
    except MemoryError as error:
        raise TriviumError("The chat template uses up the memory; fix what it repeats.") from error
    finally:
        _current.meter = before


def _whole(value: Any) -> Any:
    if isinstance(value, int) and value.bit_length() > 1 << 14:
        raise too_large(value.bit_length())
    return value


def _refuse_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > 1 << 14:
        raise too_large(left.bit_length() * abs(right))


def _refuse_wide(form: str) -> None:
    if _WIDE_FORMAT.search(form):
        raise TriviumError("The chat template pads to thousands of places; fix its format.")


Look = Callable[[Meter, Any, tuple[Any, ...], dict[str, Any]], None]


def _fine(counted: Meter, owner: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Work in proportion to what is there."""


def _padded(counted: Meter, owner: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    for value in (*args, *named.values()):
        if isinstance(value, int) and abs(value) > _WIDEST:
            raise too_large(value)
        if isinstance(value, str) and len(value) > _WIDEST:
            raise too_large(len(value))


def _replaced_text(counted: Meter, owner: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    old, new = (str(named.get(name, args[place] if place < len(args) else ""))
                for place, name in enumerate(("old", "new")))  # fmt: skip
    text = str(owner)
    if len(new) > len(old):
        counted.room(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _joined(counted: Meter, owner: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    items = counted.made(args[0] if args else ())
    counted.room(len(items) * len(str(owner)))


def _all_of(items: Any) -> Any:
    """The items of a generator, which can then be counted."""
    return items if isinstance(items, list | tuple | dict | str) else list(_counted(items, 0))


_TEXT_METHODS: dict[str, Look] = {
    **dict.fromkeys(
        (
            "capitalize", "casefold", "count", "encode", "endswith", "find", "index", "isalnum", "isalpha",
            "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable",
            "isspace", "istitle", "isupper", "lower", "partition", "removeprefix", "removesuffix",
            "rfind", "rindex", "rpartition", "rsplit", "split", "splitlines", "startswith", "swapcase",
            "title", "upper", "unescape",
        ),
        _fine,
    ),
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "expandtabs"), _padded),
    **dict.fromkeys(("strip", "lstrip", "rstrip"), _padded),
    "replace": _replaced_text,
    "join": _joined,
}  # fmt: skip
_METHODS: dict[type, dict[str, Look]] = {
    str: _TEXT_METHODS,
    bytes: dict.fromkeys(("decode", "hex"), _fine),
    list: dict.fromkeys(("count", "index", "copy"), _fine),
    tuple: dict.fromkeys(("count", "index"), _fine),
    dict: dict.fromkeys(("get", "items", "keys", "values", "copy"), _fine),
    float: dict.fromkeys(("is_integer", "as_integer_ratio", "hex"), _fine),
    int: dict.fromkeys(("bit_length", "bit_count", "is_integer", "as_integer_ratio"), _fine),
}


def _joined_by(counted: Meter, owner: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    _joined(counted, named.get("d", args[0] if args else ""), (owner,), {})


def _summed(counted: Meter, owner: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    start = named.get("start", args[1] if len(args) > 1 else 0)
    if not isinstance(start, int | float):
        raise SecurityError("a chat template may only sum numbers")


def _listed(counted: Meter, owner: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    if isinstance(owner, str | bytes) and len(owner) > counted.longest_list:
        raise too_large(len(owner))


def _formatted(counted: Meter, owner: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    _refuse_wide(str(owner))


def _slow(counted: Meter, owner: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    deep_size(owner, _LONGEST_FOR_SLOW_FILTERS, _LONGEST_FOR_SLOW_FILTERS)
    _padded(counted, owner, args, named)


def _indented(counted: Meter, owner: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    _padded(counted, owner, args, named)
    width = named.get("width", args[0] if args else 4)
    text = str(owner)
    counted.room(len(text) + text.count("\n") * (width if isinstance(width, int) else len(width)))


def _as_json(counted: Meter, owner: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    flat = [
        one for value in (*args, *named.values()) for one in (value if isinstance(value, tuple) else (value,))
    ]
    _padded(counted, owner, tuple(flat), {})


_FILTERS: dict[str, Look] = {
    **dict.fromkeys(("center", "batch", "slice", "round", "trim", "truncate", "filesizeformat"), _padded),
    **dict.fromkeys(("striptags", "urlize", "wordwrap", "pprint", "wordcount", "xmlattr", "title"), _slow),
    **dict.fromkeys(("list", "unique", "sort", "reverse", "random", "max", "min"), _listed),
    "replace": _replaced_text,
    "join": _joined_by,
    "indent": _indented,
    "format": _formatted,
    "sum": _summed,
    "tojson": _as_json,
}


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose value and arguments are looked at before and whose result is counted afterwards."""
    look = _FILTERS.get(name, _fine)
    # Some filters are handed the environment or the context first.
    before = 0 if getattr(function, "jinja_pass_arg", None) is None else 1

    def filtered(*args: Any, **named: Any) -> Any:
        counted = meter()
        counted.step()
        passed, owner, rest = args[:before], args[before], args[before + 1 :]
        if name == "join":
            owner = _all_of(owner)
        if any(isinstance(value, Namespace) for value in (owner, *rest, *named.values())):
            raise SecurityError(f"a namespace is not a value of the filter {name}")
        look(counted, owner, rest, named)
        return counted.made(function(*passed, owner, *rest, **named))

    return update_wrapper(filtered, function)
