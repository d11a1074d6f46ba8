"""The families of word problems: how each tells of a number that grows, shrinks and doubles."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One kind of story, told in its own words, over one running number."""

    name: str
    people: int
    things: tuple[str, ...]
    openings: tuple[str, ...]
    events: dict[str, tuple[str, ...]]
    questions: tuple[str, ...]


FAMILIES = (
    Family(
        "basket",
        1,
        ("apples", "eggs", "pears", "nuts", "plums"),
        ("{name0} has {number} {thing}.", "There are {number} {thing} in the basket of {name0}."),
        {
            "+": ("{name0} finds {number} more {thing}.", "{name0} picks {number} more."),
            "-": ("{name0} eats {number} {thing}.", "{name0} loses {number}."),
            "*": ("Then {name0} has {number} times as many.",),
        },
        ("How many {thing} does {name0} have now?", "How many {thing} are left?"),
    ),
    Family(
        "gift",
        2,
        ("books", "coins", "rings", "cups", "cards"),
        ("{name0} owns {number} {thing}.", "{name0} starts with {number} {thing}."),
        {
            "+": ("{name1} gives {name0} {number} {thing}.", "{name0} gets {number} from {name1}."),
            "-": ("{name0} gives {number} {thing} to {name1}.", "{name1} takes {number} from {name0}."),
            "*": ("A rich uncle makes it {number} times as many.",),
        },
        ("How many {thing} does {name0} own at the end?", "How many {thing} does {name0} keep?"),
    ),
    Family(
        "shop",
        1,
        ("loaves", "pots", "shoes", "lamps", "ropes"),
        ("The shop of {name0} has {number} {thing}.", "In the morning {name0} puts out {number} {thing}."),
        {
            "+": ("{name0} makes {number} new {thing}.", "A cart brings {number} {thing}."),
            "-": ("{name0} sells {number} {thing}.", "A guest buys {number} {thing}."),
            "*": ("Overnight the stock grows to {number} times as many.",),
        },
        ("How many {thing} are in the shop?", "How many {thing} does {name0} still have to sell?"),
    ),
    Family(
        "road",
        1,
        ("miles", "steps", "stones", "fields"),
        ("{name0} walks {number} {thing} from home.", "{name0} is {number} {thing} away from home."),
        {
            "+": (
                "{name0} goes on for {number} {thing}.",
                "After lunch {name0} walks {number} {thing} more.",
            ),
            "-": ("{name0} turns back for {number} {thing}.", "{name0} comes {number} {thing} closer."),
            "*": ("A cart takes {name0} {number} times as far.",),
        },
        ("How many {thing} from home is {name0}?", "How far from home is {name0} in {thing}?"),
    ),
    Family(
        "purse",
        1,
        ("pennies", "crowns", "marks"),
        ("{name0} saves {number} {thing}.", "The purse of {name0} holds {number} {thing}."),
        {
            "+": ("{name0} earns {number} {thing}.", "{name0} puts in {number} more."),
            "-": ("{name0} pays {number} {thing} for bread.", "{name0} spends {number} {thing}."),
            "*": ("A good year brings {number} times as much.",),
        },
        ("How many {thing} does {name0} have?", "How many {thing} are in the purse?"),
    ),
    Family(
        "tower",
        1,
        ("bricks", "blocks", "boards"),
        ("{name0} builds a wall of {number} {thing}.", "A tower has {number} {thing}."),
        {
            "+": ("{name0} adds {number} {thing}.", "{number} {thing} are put on top."),
            "-": ("The wind takes {number} {thing} off.", "{name0} removes {number} {thing}."),
            "*": ("{name0} makes it {number} times as high.",),
        },
        ("How many {thing} are there now?", "How many {thing} does {name0} count?"),
    ),
)
UNSEEN = Family(
    "lake",
    1,
    ("ducks", "swans", "boats", "frogs"),
    ("{name0} sees {number} {thing} on the lake.", "There are {number} {thing} on the lake."),
    {
        "+": ("{number} more {thing} come.", "{name0} sees {number} new {thing}."),
        "-": ("{number} {thing} go away.", "The rain takes {number} {thing} away."),
        "*": ("In spring there are {number} times as many.",),
    },
    ("How many {thing} are on the lake now?", "How many {thing} does {name0} see at the end?"),
)
