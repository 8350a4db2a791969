"""Who a guest is. It never says so itself."""

import re
from dataclasses import dataclass

from cloudfit_orchestrator.model.errors import BadInputError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
MAX_NAME_CHARACTERS = 61  # `group/replica#incarnation` and " CA" are a common name: 64 characters (RFC 5280)


@dataclass(frozen=True, slots=True)
class Identity:
    """One incarnation of one replica of one group."""

    group: str
    replica: str
    incarnation: int

    def __post_init__(self) -> None:
        if not (_NAME.fullmatch(self.group) and _NAME.fullmatch(self.replica)) or len(str(self)) > MAX_NAME_CHARACTERS:
            raise BadInputError(
                f"{self!s:.100} is no group/replica#incarnation of letters, digits, '.', '_', '-' "
                f"and at most {MAX_NAME_CHARACTERS} characters"
            )
        if not 0 < self.incarnation < 1 << 63:
            raise BadInputError(f"incarnation {self.incarnation} is out of range")

    def __str__(self) -> str:
        return f"{self.group}/{self.replica}#{self.incarnation}"
