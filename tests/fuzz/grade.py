"""Fuzz targets of the graders."""

from hypothesis import strategies as st

from fuzz.frame import fuzz
from trivium.grade.scorer import scorer

_MATHS = st.lists(
    st.sampled_from(
        [
            *"0123456789+-*/^_=<>(){}[],;:|!%.& $'\"abxyzπ√∞½²",
            *(
                "\\frac",
                "\\sqrt",
                "\\text",
                "\\left",
                "\\right",
                "\\pm",
                "\\cup",
                "\\infty",
                "\\boxed",
                "\\pi",
            ),
            *("\\begin{pmatrix}", "\\end{pmatrix}", "\\\\", "\\{", "\\}", "\\degree", "\\cdot", "\\%", "\\$"),
            *("10^{99}", "1e999", "9999999999", "####", "answer is ", "\\log", "\\sin", "\\binom", "meters"),
        ]
    )
    | st.text(max_size=3),
    max_size=40,
).map("".join)


@fuzz("maths parser", st.tuples(_MATHS, _MATHS))
def maths(pair: tuple[str, str]) -> None:
    """Any answer against any gold answer has a score."""
    scorer("math", symbolic=False)(pair[0], gold=pair[1])
