"""Errors that cross rooms. Each states the fact, the object and the next action.

"Bad" and "could not tell" are different types: only `Bad` may lead to a verdict of compromise.
"""


class CloudfitError(Exception):
    """Base of all errors that an operator may see. `next_command` is what to run or change next."""

    def __init__(self, fact: str, *, next_command: str = "") -> None:
        """`fact` names what was tried, on which object, and what was seen."""
        super().__init__(fact)
        self.fact = fact
        self.next_command = next_command

    def __str__(self) -> str:
        return f"{self.fact}\n  next: {self.next_command}" if self.next_command else self.fact


class BadInputError(CloudfitError):
    """What a person or a file said is wrong, and will be wrong again."""


class BadError(CloudfitError):
    """Verification failed: a signature, a digest, a certificate does not hold. Never raised for what is unreachable."""


class UnknownError(CloudfitError):
    """Could not tell: unreachable, timed out, not there yet. Says nothing of correctness."""


class TemporaryError(UnknownError):
    """Worth trying again after `retry_after_s`."""

    def __init__(self, fact: str, *, next_command: str = "", retry_after_s: float = 1.0) -> None:
        """`retry_after_s`: the earliest useful retry, in seconds."""
        super().__init__(fact, next_command=next_command)
        self.retry_after_s = retry_after_s


class PermanentError(CloudfitError):
    """Will fail again until somebody changes something; `next_command` says what."""


class LockedOutError(PermanentError):
    """A cloud does not take our credentials. What can do without it goes on, as if it did not answer."""


class RefusedError(CloudfitError):
    """A rule forbids it: fault budget, ownership, protection, epoch closed. Trying again does not help."""
