"""Fuzz target of chat templates: any source, any conversation."""

from typing import Any

from attack.templates import HOSTILE
from hypothesis import strategies as st

from fuzz.frame import fuzz, words
from trivium.tokens import budget, template

_VALUES = st.sampled_from(
    [
        *(
            "messages",
            "messages[0]",
            "messages[0].content",
            "messages[0]['role']",
            "m",
            "m.content",
            "m.role",
            "ns.x",
        ),
        *(
            "bos_token",
            "tools",
            "none",
            "true",
            "1",
            "3",
            "99999",
            "'a'",
            "'%s'",
            "[1, 2]",
            "{'a': 1}",
            "range(99)",
        ),
        *(
            "loop.index",
            "loop.last",
            "x",
            "y",
            "namespace(x='a')",
            "undefined_name",
            "[ns.x, ns.x]",
            "messages[::-1]",
        ),
    ]
)
_FILTERS = words(
    "tojson length trim upper lower title list join first last sort unique reverse string "
    "int float items map "
    "select replace('a','bb') replace('','xyz') center(40) indent(4) batch(3) slice(3) "
    "dictsort groupby(0) sum "
    "round(2) tojson(indent=4) default('z') urlencode escape safe format(1) wordwrap(5) "
    "striptags xmlattr pprint"
)
_METHODS = words(
    "strip() split('a') upper() join(x) replace('a','aaa') format(x) items() get('role') "
    "center(9) encode() "
    "pop() append(1) startswith('a') zfill(5) __class__ mro() translate(x)"
)
_OPERATORS = st.sampled_from(
    ["+", "~", "*", "-", "/", "//", "%", "**", "==", "in", "and", "or", "is", "<", "not in"]
)
_EXPRESSIONS = st.recursive(
    _VALUES | st.integers(-5, 10**6).map(str) | st.text("abc'{}%<|", max_size=4).map(repr),
    lambda inner: (
        st.tuples(inner, _OPERATORS, inner).map(lambda p: f"({p[0]} {p[1]} {p[2]})")
        | st.tuples(inner, _FILTERS).map("|".join)
        | st.tuples(inner, _METHODS).map(".".join)
        | st.tuples(inner, inner).map(lambda p: f"{p[0]}[{p[1]}]")
        | st.lists(inner, max_size=3).map(lambda p: f"[{', '.join(p)}]")
    ),
    max_leaves=8,
)
_STATEMENTS = st.recursive(
    _EXPRESSIONS.map(lambda e: f"{{{{ {e} }}}}") | st.text("ab{}%#<|im_start|> \n", max_size=12),
    lambda inner: (
        st.tuples(_EXPRESSIONS, inner).map(lambda p: f"{{% for m in {p[0]} %}}{p[1]}{{% endfor %}}")
        | st.tuples(_EXPRESSIONS, inner).map(lambda p: f"{{% if {p[0]} %}}{p[1]}{{% else %}}b{{% endif %}}")
        | st.tuples(_EXPRESSIONS, inner).map(lambda p: f"{{% set ns.x = {p[0]} %}}{p[1]}")
        | st.tuples(_EXPRESSIONS, inner).map(lambda p: f"{{% set x = {p[0]} %}}{p[1]}")
        | st.tuples(inner, inner).map(
            lambda p: f"{{% macro y(x) %}}{p[0]}{{{{ y(x) }}}}{{% endmacro %}}{p[1]}"
        )
        | st.lists(inner, max_size=4).map("".join)
        | inner.map(lambda p: f"{{% generation %}}{p}{{% endgeneration %}}")
        | inner.map(lambda p: f"{{% for m in messages recursive %}}{p}{{{{ loop(messages) }}}}{{% endfor %}}")
    ),
    max_leaves=8,
)
_SOURCES = st.tuples(
    st.sampled_from(
        ["", "{% set ns = namespace(x='a') %}", "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}"]
    ),
    _STATEMENTS,
    st.sampled_from(["", "{% endfor %}"]),
).map("".join)
_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_CONVERSATIONS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": _PLAIN},
        optional={"tool_calls": _PLAIN, "thinking": _PLAIN},
    ),
    min_size=1,
    max_size=4,
)


@fuzz(
    "chat templates",
    st.tuples(_SOURCES | st.sampled_from(sorted(HOSTILE.values(), key=len)[:60]), _CONVERSATIONS, _PLAIN),
    refuses=template.REFUSALS,
    seconds=20.0,
)
def templates(case: tuple[str, list[dict[str, Any]], Any]) -> None:
    """A conversation is written or refused, within a second of processor time and a gigabyte."""
    source, messages, tools = case
    budget.SECONDS = 1.0
    normal = template.normal_messages(messages)
    tools = [tools] if tools else None
    written = template.render(
        source, normal, tools=tools, add_generation_prompt=True, variables={"bos_token": "<s>"}
    )
    assert len(written) <= budget._MOST_BYTES + 64 * len(repr(case))
