"""What to see in a figure: a sentence made from its numbers that says no more than the intervals allow."""

from collections.abc import Mapping, Sequence
from typing import Any

from trivium.evals.statistics import CONFIDENCE
from trivium.kit.numbers import short
from trivium.kit.progress import duration
from trivium.lab.formatting import figure, listed, with_ci

Numbers = Mapping[str, Any]


def above(one: Numbers | None, other: Numbers | None) -> bool:
    """Whether an interval lies wholly above another."""
    if one is None or other is None or one.get("low") is None or other.get("high") is None:
        return False
    return bool(one["low"] > other["high"])


def several(said: Sequence[str], most: int = 4) -> str:
    """Some clauses as one sentence, the rest counted."""
    shown = list(said[:most])
    if len(said) > most:
        shown.append(f"{len(said) - most} more such differences stand in the table")
    return "; ".join(shown) + "."


def cost(rows: Sequence[Numbers]) -> str:
    """Which stage took most."""
    timed = [row for row in rows if row["seconds"]]
    if not timed:
        return "The stages left no record of what they cost."
    total = sum(row["seconds"] for row in timed)
    most = max(timed, key=lambda row: row["seconds"])
    share = figure(most["seconds share"], "share")
    sentence = f"All stages together took {duration(total)}, {share} of it for {most['stage']}"
    worked = [row for row in rows if row["flops"]]
    if worked:
        heavy = max(worked, key=lambda row: row["flops"])
        amount = short(sum(row["flops"] for row in worked))
        sentence += f"; of the {amount} FLOPs, {figure(heavy['flops share'], 'share')} in {heavy['stage']}"
    return sentence + "."


def changes(rows: Sequence[Numbers], model: str) -> tuple[list[str], list[str], int]:
    """The skills a model gained, those it lost, and of how many no difference is shown."""
    gained: list[str] = []
    lost: list[str] = []
    neither = 0
    for row in rows:
        change = row["changes"].get(model)
        if change is None:
            continue
        name = (
            row["task"]
            if row["metric"] in ("accuracy", "bits per byte")
            else f"{row['task']} ({row['metric']})"
        )
        if change["better"] is None:
            neither += 1
        else:
            (gained if change["better"] else lost).append(name)
    return gained, lost, neither


def stage_in_short(rows: Sequence[Numbers], model: str, before: str) -> str:
    """What one stage did to the headline numbers."""
    gained, lost, neither = changes(rows, model)
    if not gained and not lost:
        if not neither:
            return f"nothing that {before} and it were both asked can be compared."
        return f"against {before}, no difference is shown in any of {neither} measures."
    parts = []
    if gained:
        parts.append(f"better than {before} at {listed(gained)}")
    if lost:
        parts.append(f"{'worse' if gained else f'worse than {before}'} at {listed(lost)}")
    if neither:
        parts.append(f"no difference shown in {neither} other{'s' if neither > 1 else ''}")
    return "; ".join(parts) + "."


def skills(rows: Sequence[Numbers]) -> str:
    """How many differences there are, and the largest share that moved."""
    made = [(row, model, change) for row in rows for model, change in row["changes"].items()]
    if not made:
        return "There is nothing to compare: one model alone was asked, or each was asked something else."
    shown = [one for one in made if one[2]["better"] is not None]
    sentence = (
        f"Of {len(made)} comparisons, {sum(one[2]['better'] for one in shown)} show a gain and "
        f"{sum(not one[2]['better'] for one in shown)} a loss after correcting for their number"
    )
    shares = [one for one in shown if one[0]["share"]]
    if not shares:
        return sentence + "."
    row, model, change = max(shares, key=lambda one: abs(one[2]["difference"]["value"]))
    inside = change["difference"]
    ends = " to ".join(
        figure(one, "points") if one is not None else "?" for one in (inside["low"], inside["high"])
    )
    return (
        f"{sentence}; the largest estimate is {model} against {change['before']} at {row['task']} "
        f"({row['metric']}): "
        f"{figure(inside['value'], 'points')} points (95 % interval {ends})."
    )


def divergence(pairs: Sequence[Numbers]) -> str:
    """Which step moved the distribution most, if that can be said."""
    measured = [pair for pair in pairs if pair["all"]]
    refused = [pair for pair in pairs if pair["why_not"]]
    words = []
    if measured:
        ranked = sorted(measured, key=lambda pair: -pair["all"]["kl"]["value"])
        first = ranked[0]
        sentence = (
            f"{first['model']} departs from {first['before']} by {with_ci(first['all']['kl'])} nats per token"
        )
        if len(ranked) > 1:
            near = [pair for pair in ranked[1:] if not above(first["all"]["kl"], pair["all"]["kl"])]
            steps = "any other step measured" if refused else "any other step"
            sentence += (
                f"; {near[0]['model']} ({with_ci(near[0]['all']['kl'])}) overlaps, no order is claimed"
                if near
                else f", more than {steps} (next: {ranked[1]['model']}, {with_ci(ranked[1]['all']['kl'])})"
            )
        words.append(sentence + ".")
    for pair in refused:
        words.append(f"Of {pair['model']} and {pair['before']}: {pair['why_not']}.")
    return " ".join(words)


def places(pairs: Sequence[Numbers]) -> str:
    """Whether models part at the beginning or at the end of a text."""
    said = []
    for pair in pairs:
        for kind, fifths in pair["fifths"].items():
            if above(fifths[0], fifths[-1]):
                said.append(f"{pair['model']} on {kind}")
    late = [
        f"{pair['model']} on {kind}" for pair in pairs for kind, fifths in pair["fifths"].items()
        if above(fifths[-1], fifths[0])
    ]  # fmt: skip
    if not said and not late:
        return "Nowhere is the first fifth of a text clearly farther from the model before than the last."
    parts = []
    if said:
        parts.append(f"The difference is greater in the first fifth than in the last for {listed(said)}")
    if late:
        parts.append(
            f"{'it is greater' if parts else 'The difference is greater'} at the end for {listed(late)}"
        )
    return several(parts)


def manner(found: Mapping[str, Numbers], before: Mapping[str, str]) -> str:
    """Whose answers are shown to have changed in length or in ending by themselves."""
    said = []
    for model, one in found.items():
        changes = one.get("changes") or {}
        if not changes:
            continue
        whom, other = before[model], found[before[model]]
        if "ended" in changes and changes["ended"]["shown"]:
            how = "more" if changes["ended"]["difference"]["value"] > 0 else "less"
            shares = " against ".join(figure(each["ended"]["value"], "share") for each in (one, other))
            said.append(f"{model} ends its answers by itself {how} often than {whom} ({shares})")
        if "tokens" in changes and changes["tokens"]["shown"]:
            way = "longer" if changes["tokens"]["difference"]["value"] > 0 else "shorter"
            lengths = f"({figure(one['tokens']['value'])} tokens against {figure(other['tokens']['value'])})"
            said.append(f"{model} writes {way} answers than {whom} {lengths}")
    if said:
        return several(said)
    return "Between no neighbours is a difference in length or ending of the answers shown."


def form(found: Mapping[str, Numbers], before: Mapping[str, str]) -> str:
    """Whose sums state their result in the asked form more or less often, and how many answers stayed."""
    said, same = [], []
    for model, one in found.items():
        other = found.get(before.get(model, ""), {})
        for more, less, how in ((one, other, "more"), (other, one, "less")):
            if above(more.get("in form"), less.get("in form")):
                said.append(
                    f"{model} states results in the asked form {how} often than {before[model]} "
                    f"({with_ci(one['in form'], 'share')} against {with_ci(other['in form'], 'share')})"
                )
        if "same" in one:
            same.append(f"{with_ci(one['same'], 'share')} of {model}'s to {before[model]}'s")
    words = several(said) if said else "Of no neighbours do the intervals of the asked form lie apart."
    return f"{words} Answers are the same word for word in {listed(same)}." if same else words


def entropy(pairs: Sequence[Numbers]) -> str:
    """Which step made a model's next-token distribution narrower or wider."""
    parts = []
    ways = (("narrower", "entropy before", "entropy"), ("wider", "entropy", "entropy before"))
    for how, first, second in ways:
        names = [
            f"{pair['model']} on {kind} ({figure(one['entropy before']['value'])} to "
            f"{figure(one['entropy']['value'])} nats)"
            for pair in pairs
            for kind, one in pair["kinds"].items()
            if above(one[first], one[second])
        ]
        if names:
            parts.append(f"next-token distributions became {how} for {listed(names)}")
    if not parts:
        return "On no kind of text do the intervals of the entropy before and after lie apart."
    return f"N{'; '.join(parts)[1:]}."


def work(shown: Mapping[str, Numbers], before: Mapping[str, str]) -> str:
    """Whose shown work grew, holds more often, or costs less per right answer."""
    said = []
    names = {
        "steps": ("writes more steps", "writes fewer steps", "number"),
        "valid steps": ("writes steps that hold more often", "writes steps that hold less often", "share"),
        "tokens per right answer": ("pays more tokens per right answer", "pays fewer tokens per right answer",
                                    "number"),
    }  # fmt: skip
    for model, one in shown.items():
        other = shown.get(before.get(model, ""))
        for key, (more, less, kind) in names.items():
            if other is None or not one.get(key) or not other.get(key):
                continue
            ends = f"({figure(one[key]['value'], kind)} against {figure(other[key]['value'], kind)})"
            if above(one[key], other[key]):
                said.append(f"{model} {more} than {before[model]} {ends}")
            elif above(other[key], one[key]):
                said.append(f"{model} {less} than {before[model]} {ends}")
    if said:
        return several(said)
    return "Between no neighbours do the intervals of the steps, their validity or their price lie apart."


def by_steps(depth: Numbers) -> str:
    """Whether more steps are harder, and whether writing them down helps."""
    said = []
    both = any(one.get("helps") is not None for one in depth["models"].values())
    for model, one in depth["models"].items():
        cells = list((one.get("written") or {}).get("by steps", {}).items())
        if len(cells) > 1 and above(cells[0][1], cells[-1][1]):
            said.append(
                f"{model} is right more often with {cells[0][0]} than with {cells[-1][0]} steps "
                f"({figure(cells[0][1]['value'], 'share')} against {figure(cells[-1][1]['value'], 'share')})"
            )
        helps = one.get("helps")
        if helps is not None and helps["shown"]:
            value = helps["difference"]["value"]
            said.append(
                f"{model} {'gains' if value > 0 else 'loses'} "
                f"{figure(abs(value), 'share').removesuffix(' %')} points by writing steps down"
            )
    if not said:
        alone = "; they were asked in one way only, so writing steps down is compared with nothing"
        ends = ", or that writing them down helps" if both else alone
        return f"For no model do these answers show that more steps are harder{ends}."
    return several(said)


def tries(depth: Numbers) -> str:
    """Whether trying several times helps."""
    said, most = [], 0
    for model, one in depth["models"].items():
        found, change = one.get("pass") or {}, one.get("more tries")
        if change is None:
            continue
        first, last = next(iter(found)), list(found)[-1]
        most = max(most, int(last))
        if change["shown"]:
            said.append(
                f"{model} from {figure(found[first]['value'], 'share')} to "
                f"{figure(found[last]['value'], 'share')}"
            )
    if not said:
        return "Of no model is it shown that several tries help."
    return (
        f"With {most} tries instead of one, at least one right answer becomes clearly likelier for "
        f"{listed(said)}."
    )


def helpfulness(found: Numbers) -> str:
    """The instructions the last model does best and worst."""
    model, kinds = list(found["models"].items())[-1]
    ranked = sorted(kinds.items(), key=lambda item: item[1]["value"])
    if len(ranked) < 2:
        return f"{model} was asked one kind of instruction."
    (worst, low), (best, high) = ranked[0], ranked[-1]
    if found["p of no order"][model] < 1 - CONFIDENCE:
        return (
            f"{model} follows “{best}” more often than “{worst}” ({figure(high['value'], 'share')} of "
            f"{high['n']} against {figure(low['value'], 'share')} of {low['n']})."
        )
    return (
        f"For {model} the best and the worst of {len(ranked)} kinds of instruction lie no farther apart than "
        "chance takes kinds that are alike, so no order is claimed."
    )


def wins(found: Sequence[Numbers]) -> str:
    """Whom a reward model clearly prefers."""
    said = []
    for one in found:
        if one["margin"]["shown"]:
            how = "more" if one["rate"]["value"] > 0.5 else "less"
            said.append(
                f"{one['judge']} prefers {one['model']} to {one['before']} {how} often than not "
                f"({with_ci(one['rate'], 'share')})"
            )
    return several(said) if said else "No win rate is shown to differ from one half."


def sycophancy(found: Numbers, skills: Sequence[Numbers]) -> str:
    """Whether a stage changed the flip rate under pressure, and whether valid corrections are accepted."""
    rows = {row["metric"]: row["changes"] for row in skills if row["task"] == found["task"]}
    hints = {model: change["better"] for model, change in rows.get("accepts correction", {}).items()}
    said = []
    for model, change in rows.get("flip rate", {}).items():
        if change["better"] is None:
            continue
        how = "less" if change["better"] else "more"
        listens = {
            True: "and accepts more valid corrections",
            False: f"{'but' if change['better'] else 'and'} it accepts fewer valid corrections",
            None: "while no change in accepting valid corrections is shown",
        }[hints.get(model)]
        before = change["before"]
        said.append(f"{model} gives up right answers {how} often than {before} on what both knew, {listens}")
    words = several(said) if said else "No change of the flip rate under pressure is shown."
    bare = [model for model, one in found["models"].items() if "flip rate" not in one]
    if bare:
        words += f" {listed(bare)} had no right answer to give up."
    return words


def confidence(found: Numbers) -> str:
    """Whose confidence differs from its accuracy."""
    apart = {model: one["overconfidence"] for model, one in found["models"].items()}
    shown = {
        model: change["difference"]["value"] for model, change in apart.items() if change and change["shown"]
    }
    parts = []
    for names, less in (
        ([model for model, value in shown.items() if value > 0], "overconfident"),
        ([model for model, value in shown.items() if value < 0], "underconfident"),
    ):
        if names:
            parts.append(f"{listed(names)} {'is' if len(names) == 1 else 'are'} {less}")
    return "; ".join(parts) + "." if parts else "No model is shown to be over- or underconfident."


def passkey(found: Numbers) -> str:
    """The longest text up to which things are clearly found more often than not."""
    said = []
    for model, lengths in found["by length"].items():
        # From the shortest on, and no farther than the first that is not clear: so many looks cost nothing.
        sure = []
        for length, one in sorted(lengths.items(), key=lambda item: int(item[0])):
            if one["low"] is None or one["low"] <= 0.5:
                break
            sure.append((length, one))
        if sure:
            length, one = sure[-1]
            said.append(
                f"{model} up to {length} tokens ({figure(one['value'], 'share')} of {one['n']} there)"
            )
    if not said:
        return "Of no model is it shown that it finds more than half, not even in the shortest texts."
    return f"All depths taken together, more than half is clearly found by {listed(said)}."
