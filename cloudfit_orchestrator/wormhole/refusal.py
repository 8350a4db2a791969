"""How the wormhole says no to a guest."""

from cloudfit_orchestrator.model.channel import ErrorCode


class Refusal(Exception):  # noqa: N818  the word of the protocol
    """A request that a rule forbids; `code` goes to the guest. The channel goes on."""

    def __init__(self, code: ErrorCode, fact: str) -> None:
        """`fact`: what was refused and why, for the guest's log."""
        super().__init__(fact)
        self.code = code
        self.fact = fact


class Malformed(Exception):  # noqa: N818
    """A frame that no honest guest sends. The channel is dropped; `reason` is counted."""

    def __init__(self, reason: str) -> None:
        """`reason`: one of a small fixed set of words, for it names a counter."""
        super().__init__(reason)
        self.reason = reason
