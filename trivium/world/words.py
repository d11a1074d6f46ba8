"""The common words of the country."""


def words(text: str) -> tuple[str, ...]:
    """The words of a line, so that long lists stay readable."""
    return tuple(text.split())


CRAFTS = words(
    "weaver potter smith baker miller tanner mason cooper "
    "dyer fletcher glazier tailor carter fisher brewer painter"
)
ANIMALS = words("cat dog goat pig hen fox horse mule goose duck crow hare")
GOODS = words("salt wool wine honey iron copper silk glass cheese paper rope wheat")
REGIONS = words("north south east west")
AGES = words("old young poor rich clever kind quiet brave")
THINGS = words(
    "lamp key coat bell boat drum cup map knife hat chair basket "
    "clock mirror flute blanket kettle ladder wheel candle bucket ring spoon box"
)
LOOKS = words(
    "red blue thin small heavy broken golden wooden new round long strange green white black bright"
)
