"""JSON values changed at random places: what a hostile or broken config.json may hold."""

import copy
import random
from collections.abc import Sequence
from typing import Any

Way = tuple[Any, ...]


def places(value: Any, most: int, before: Way = ()) -> list[Way]:
    """The way to every entry of a nest; of a list the first `most`."""
    found: list[Way] = []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value[:most]):
        found.append((*before, key))
        if isinstance(inner, dict | list):
            found += places(inner, most, (*before, key))
    return found


def mutated(draw: random.Random, original: Any, ways: Sequence[Way], hostile: Sequence[Any], most: int) -> Any:
    """A copy with up to `most` entries replaced by hostile ones, or gone."""
    values = copy.deepcopy(original)
    for _ in range(draw.randint(1, most)):
        *way, last = draw.choice(ways)
        inside = values
        try:
            for step in way:
                inside = inside[step]
            if draw.randrange(5):
                inside[last] = copy.deepcopy(draw.choice(hostile))
            else:
                del inside[last]
        except (KeyError, IndexError, TypeError):  # an earlier change took that place away
            pass
    return values
