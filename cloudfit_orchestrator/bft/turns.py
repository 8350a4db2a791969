"""Whom to ask next."""

from collections import Counter


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
