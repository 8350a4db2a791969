"""Whom to ask next."""

from collections import Counter
from collections.abc import Iterable
from typing import Generic, TypeVar

_Name = TypeVar("_Name", bytes, int)


class Turns:
    """Each peer in turn. Counted by question: a common count that time drives could fall into step with the retries,
    and then one and the same peer, perhaps a silent one, would be asked for ever.
    """

    def __init__(self) -> None:
        self._asked: Counter[str] = Counter()  # by kind of question

    def count(self, question: str) -> int:
        """How often this kind of question was asked, this time included."""
        self._asked[question] += 1
        return self._asked[question]

    def next(self, others: list[str], question: str) -> str:
        """The peer to ask now, of at least one."""
        return others[self.count(question) % len(others)]


class Rota(Generic[_Name]):
    """What to ask a peer for, of more than one question holds: what it was asked for longest ago. Whoever can add to
    the names, or take some away, moves none that waits further back: where the next question began was once told by
    how many there were, and a faulty member that guessed it could dodge the one that mattered.
    """

    def __init__(self) -> None:
        self._turn = 0
        self._asked: dict[str, dict[_Name, int]] = {}  # peer -> name -> the turn when it was asked for, or came up

    def next(self, peer: str, names: Iterable[_Name], most: int) -> tuple[_Name, ...]:
        """Up to `most` of the names, to ask that peer for now."""
        self._turn += 1
        before = self._asked.get(peer, {})
        asked = self._asked[peer] = {name: before.get(name, self._turn) for name in names}
        chosen = sorted(asked, key=lambda name: (asked[name], name))[:most]
        self._turn += 1  # what has just come up is ahead of what is asked for now
        asked.update(dict.fromkeys(chosen, self._turn))
        return tuple(sorted(chosen))
