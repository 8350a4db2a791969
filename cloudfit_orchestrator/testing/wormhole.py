"""The wormhole of one simulated machine: the agent's own rules (`cloudfit_orchestrator.wormhole`), in process.

Only the keys are the simulation's, so that a run can be repeated and costs little.
"""

import random
from collections.abc import Callable

from cloudfit_orchestrator.model.channel import ErrorCode
from cloudfit_orchestrator.model.record import Status, check_confirmations, open_record
from cloudfit_orchestrator.model.statement import Kind
from cloudfit_orchestrator.model.ui import EpochEnd
from cloudfit_orchestrator.testing.crypto import Keys
from cloudfit_orchestrator.wormhole.epoch import Epoch, State
from cloudfit_orchestrator.wormhole.records import GroupRecords, Held
from cloudfit_orchestrator.wormhole.refusal import Refusal


def _unheard(*_: object) -> None:
    """Nobody listens."""


class SimWormhole:
    """Epochs and records for one incarnation.

    `lapse` and `lose_keys` are its only faults, and count as its replica's. `certified` and `signed` are told of all
    that it vouches for.
    """

    def __init__(
        self, *, group: str, replica: str, keys: Keys, controller_keys: list[bytes], rng: random.Random
    ) -> None:
        """`keys` makes the epochs' keys; `controller_keys` may sign records."""
        self._group = group
        self._replica = replica
        self._keys = keys
        self._controller_keys = controller_keys
        self._rng = rng
        self._epochs: dict[int, Epoch] = {}
        self._records = GroupRecords()
        self._lapsed = False
        self.certified: Callable[[int, int, bytes, bytes], object] = _unheard  # (c, cv, digest, certificate)
        self.signed: Callable[[int, Kind, bytes, bytes], object] = _unheard  # (c, kind, body, signature)

    # ------------------------------------------------------------------------------------------ the controller's side
    def prepare(self, c: int) -> tuple[bytes, bytes]:
        """(usig key, kss key) of epoch c, raw; the same on repetition."""
        if c not in self._epochs:
            epoch = Epoch(self._group, self._replica, c)
            # The agent makes real keys of real randomness. Nothing else of the epoch is touched.
            for holder in (epoch._usig, epoch._kss):  # noqa: SLF001
                key = self._keys.generate(self._rng)
                holder._key = key  # type: ignore[assignment]  # noqa: SLF001
                holder.public_key = key.public
            self._epochs[c] = epoch
        return self._epochs[c].usig_key, self._epochs[c].kss_key

    def install(self, envelope: bytes) -> bool:
        """Take a record; True if it is news. ACTIVE(c) opens epoch c and closes all before it."""
        record = open_record(envelope, self._controller_keys)
        held = Held(envelope, record)
        if record.status is Status.ACTIVE:
            check_confirmations(record, self._keys)
        if not self._records.check(held):
            return False
        self._records.hold(held)
        if record.status is Status.PREPARED:
            return True
        for c, epoch in self._epochs.items():
            if c < record.c:
                epoch.end()
            elif c == record.c:
                epoch.activate()
        return True

    def freeze(self, c: int) -> bool:
        """Refuse everything in epoch c until `thaw`. False if it never was here, or is not open yet."""
        if c not in self._epochs or self._epochs[c].state is State.PREPARED:
            return False
        self._epochs[c].freeze()
        return True

    def thaw(self, c: int) -> None:
        """Undo `freeze`, unless the epoch was closed meanwhile."""
        if c in self._epochs and self._epochs[c].state is State.FROZEN:
            self._epochs[c].thaw()

    def lapse(self) -> None:
        """The lease is over: it certifies and signs nothing more, but it still closes epochs."""
        self._lapsed = True

    def lose_keys(self) -> None:
        """The agent restarts: its memory, and all keys with it, are gone. It refuses an ACTIVE that it made no keys
        for.
        """
        self._epochs.clear()

    def counter(self, c: int) -> int:
        """The last counter value that epoch c certified; -1 if its keys are not here."""
        return self._epochs[c].cv if c in self._epochs else -1

    @property
    def alive(self) -> list[int]:
        """Epochs that can still speak."""
        return [c for c, epoch in self._epochs.items() if epoch.state in (State.OPEN, State.FROZEN)]

    def close(self, c: int) -> EpochEnd | None:
        """End epoch c; None if it never was here."""
        epoch = self._epochs.get(c)
        return None if epoch is None else epoch.end()

    # ------------------------------------------------------------------------------------------------ the guest's side
    def greet(self) -> list[bytes]:
        """A guest's HELLO: its earlier sessions end. The records that it is shown, in order."""
        for epoch in self._epochs.values():
            epoch.forget_session()
        return [held.envelope for held in (self._records.active, self._records.prepared) if held is not None]

    def open_session(self, c: int) -> tuple[int, int, list[tuple[int, bytes, bytes]]]:
        """(session, next cv, recent UIs). Raises Refusal."""
        session, next_cv = self._epoch(c).open_session()
        return session, next_cv, self._epoch(c).recent(session)

    def create_ui(self, session: int, c: int, cv: int, digest: bytes) -> bytes:
        """The certificate. Raises Refusal."""
        self._check_lease()
        certificate = self._epoch(c).create_ui(session, cv, digest)
        self.certified(c, cv, digest, certificate)
        return certificate

    def sign(self, c: int, kind: Kind, body: bytes) -> bytes:
        """The signature. Raises Refusal."""
        self._check_lease()
        signature = self._epoch(c).sign(kind, body)
        self.signed(c, kind, body, signature)
        return signature

    def end_epoch(self, c: int) -> EpochEnd:
        """After a wedge: granted only if a record supersedes c. Raises Refusal."""
        if not self._records.supersedes(c):
            raise Refusal(ErrorCode.FORBIDDEN, f"no record supersedes epoch {c}")
        return self._epoch(c).end()

    def _check_lease(self) -> None:
        if self._lapsed:
            raise Refusal(ErrorCode.LEASE_OVER, "the lease is over")

    def _epoch(self, c: int) -> Epoch:
        epoch = self._epochs.get(c)
        if epoch is None:
            raise Refusal(ErrorCode.NO_EPOCH, f"epoch {c} is not known")
        return epoch
