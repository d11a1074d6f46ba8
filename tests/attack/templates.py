"""Chat templates that would loop for ever or make gigabytes; each must be refused, soon and in a sentence."""

import resource
import time
from pathlib import Path

from attack.frame import attack, sections
from trivium.kit.errors import TriviumError
from trivium.tokens import budget, template

_MACROS = "{% macro a() %}xx{% endmacro %}" + "".join(
    f"{{% macro a{n} () %}}{{{{ a{n - 1 if n else ''}() }}}}{{{{ a{n - 1 if n else ''}() }}}}{{% endmacro %}}"
    for n in range(60)
)
HOSTILE = {
    **sections("grade/hostile/templates.jinja.txt"),
    "macros that double": _MACROS + "{{ a59() }}",
    "a number of 100,000 digits": "{{ " + "9" * 100_000 + " }}",
    "brackets within brackets": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "lists within lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "a source of a million characters": "x" * 1_000_000,
    "comparisons of long lists": "{% set x = range(99999)|list %}{% set y = range(99999)|list %}"
    + "{% if x == y %}{% endif %}" * 5000,
}
MESSAGES = [
    {"role": "user", "content": "hello " * 10},
    {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
]


def render(source: str) -> str:
    """What a template writes for a short conversation."""
    return template.render(
        source, MESSAGES, tools=None, add_generation_prompt=True, variables={"bos_token": "<s>"}
    )


@attack("chat template", cases=HOSTILE, seconds=120)
def hostile_template(scratch: Path, source: str) -> None:
    """The template is refused within its processor time and within a gigabyte."""
    budget.SECONDS = 2.0
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))
    start = time.thread_time()
    try:
        written = render(source)
    except (TriviumError, *template.REFUSALS):
        assert time.thread_time() - start < 4, "it took too long"
        return
    raise AssertionError(f"it was rendered, to {len(written)} characters")
