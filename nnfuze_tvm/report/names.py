"""Names of layers and kernels as people tell them apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

MOST = 40
_GAP = "…"


def short_names(names: Iterable[str], most: int = MOST) -> dict[str, str]:
    """Return for each name a short one: what is longer than ``most`` is cut to what tells it from the others.

    TensorFlow's names are paths of a hundred characters, several of them joined by ``;``, whose beginnings are all the
    same. The task in front and the last parts of the path stay, as many as there is room for; where these are some
    other's, too, the end of the path is cut instead. No two names become the same one.

    Parameters
    ----------
    names : iterable of str
        All names that stand beside each other.
    most : int
        The most characters that a name shall have.
    """
    wanted = list(dict.fromkeys(names))
    found = {name: name for name in wanted}
    options = {name: list(_options(name, most)) for name in wanted if len(name) > most}
    # Taken away are whole names, and options that several names have.
    count = Counter(option for each in options.values() for option in set(each))
    count.update(name for name in wanted if name not in options)
    for name, each in options.items():
        found[name] = next((option for option in each if count[option] == 1), name)
    return found


def _options(name: str, most: int) -> Iterator[str]:
    """Give short forms of a name, the best first."""
    first, *_ = name.split(";")
    task, slash, path = first.partition("/")
    front = f"{task}/{_GAP}/" if slash and len(task) <= most // 2 else f"{_GAP}/"
    parts = [part for part in path.split("/") if part]
    ends = ["/".join(parts[-count:]) for count in range(1, len(parts))]
    fitting = [front + end for end in ends if len(front + end) <= most]
    if len(first) <= most:
        yield first
    yield from reversed(fitting)
    # No part of a path, but characters: more of the end, which tells more.
    for whole in (first, name):
        for tail in range(most * 2 // 3, most - 2, 4):
            yield whole[: most - tail - 1] + _GAP + whole[-tail:]
        yield whole[: most - 1] + _GAP
