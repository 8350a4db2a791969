"""The recovery of one replica as a table: stage x event -> stage (protocol §6).

The order matters. The new machine takes what verifies of the old disk (from a snapshot of the machine at work) and is
up to date *before* the old one is frozen, so that the replica is out only from FREEZE to READY. The old epoch is closed
before PREPARED is written, so that what the old machine may still hold of signed words is finite and ends with base.
"""

from dataclasses import dataclass
from enum import StrEnum


class Stage(StrEnum):
    """What is being done. The last three are ends."""

    LAUNCH = "launch"  # new VM beside the old one, measured, admitted; members serve it as a learner
    SNAPSHOT = "snapshot"  # the old VM is paused for an instant, its state disk snapshotted; it goes on serving
    EXTRACT = "extract"  # recovery VM over the snapshot; the learner takes the chunks that verify
    PRECOPY = "precopy"  # the learner follows the members until it is behind by nothing
    RETIRE = "retire"  # members get the signed RETIRE and stop relying on the replica
    FREEZE = "freeze"  # epoch frozen, a suspected one's VM paused: whatever it does, it cannot speak
    JUDGE = "judge"  # do the others reach a view-change quorum without its vote?
    THAW = "thaw"  # undo FREEZE: they do not, and nobody suspects it
    CLOSE = "close"  # EPOCH-END of the old epoch, handed to the others
    PREPARE = "prepare"  # keys of c', PREPARED(c') stored and installed everywhere
    CONFIRM = "confirm"  # f'+k'+1 confirmations of one state
    ACTIVATE = "activate"  # compare-and-swap, ACTIVE(c') installed everywhere
    READY = "ready"  # every member of c' that can be reached serves
    CLEAN = "clean"  # old VM and recovery VM gone, evidence kept
    DONE = "done"
    PUT_OFF = "put-off"  # nothing has changed; the next attempt closes the epoch all the same
    GIVEN_UP = "given-up"  # nothing has changed: the new VM never got up to date


class Event(StrEnum):
    """What ended a stage."""

    OK = "ok"
    LOST = "lost"  # the old machine or its cloud is gone
    INCOMPLETE = "incomplete"  # the old disk could not be read in time; its log is no vote, and one is needed
    STALLED = "stalled"  # the learner made no progress
    SUPERSEDED = "superseded"  # PREPARED(c') cannot become ACTIVE any more: another record on the same base follows


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What is decided before the recovery begins."""

    lost: bool = False  # the old machine is gone already
    suspected: bool = False  # step 4 closes its epoch whatever its log looks like
    put_off_before: bool = False  # so does a second attempt


_OK = Event.OK
TABLE: dict[tuple[Stage, Event], Stage] = {
    (Stage.LAUNCH, _OK): Stage.SNAPSHOT,
    (Stage.LAUNCH, Event.LOST): Stage.PRECOPY,
    (Stage.SNAPSHOT, _OK): Stage.EXTRACT,
    (Stage.SNAPSHOT, Event.LOST): Stage.PRECOPY,
    (Stage.EXTRACT, _OK): Stage.PRECOPY,
    (Stage.EXTRACT, Event.INCOMPLETE): Stage.PRECOPY,  # all comes from peers then
    (Stage.PRECOPY, _OK): Stage.RETIRE,
    (Stage.PRECOPY, Event.STALLED): Stage.GIVEN_UP,
    (Stage.RETIRE, _OK): Stage.FREEZE,
    (Stage.RETIRE, Event.LOST): Stage.PREPARE,
    (Stage.FREEZE, _OK): Stage.JUDGE,
    (Stage.FREEZE, Event.LOST): Stage.PREPARE,
    (Stage.JUDGE, _OK): Stage.CLOSE,
    (Stage.JUDGE, Event.INCOMPLETE): Stage.THAW,
    (Stage.THAW, _OK): Stage.PUT_OFF,
    (Stage.THAW, Event.LOST): Stage.PREPARE,
    (Stage.CLOSE, _OK): Stage.PREPARE,
    (Stage.PREPARE, _OK): Stage.CONFIRM,
    (Stage.CONFIRM, _OK): Stage.ACTIVATE,
    (Stage.ACTIVATE, _OK): Stage.READY,
    (Stage.ACTIVATE, Event.SUPERSEDED): Stage.PREPARE,
    (Stage.READY, _OK): Stage.CLEAN,
    (Stage.CLEAN, _OK): Stage.DONE,
}
FIRST = Stage.LAUNCH
ENDS = frozenset({Stage.DONE, Stage.PUT_OFF, Stage.GIVEN_UP})


def next_stage(stage: Stage, event: Event, circumstances: Circumstances) -> Stage:
    """The stage after `stage`. KeyError if `event` cannot end it.

    A lost machine skips what needs it; a missing vote does not stop the recovery of a replica that is suspected or was
    put off before (protocol §6, step 4).
    """
    if stage in (Stage.LAUNCH, Stage.RETIRE) and event is Event.OK and circumstances.lost:
        event = Event.LOST
    if stage is Stage.JUDGE and event is Event.INCOMPLETE and (circumstances.suspected or circumstances.put_off_before):
        event = Event.OK
    return TABLE[stage, event]


def plan(circumstances: Circumstances) -> tuple[Stage, ...]:
    """The stages of a recovery in which nothing goes wrong, in order."""
    stages = [FIRST]
    while stages[-1] not in ENDS:
        stages.append(next_stage(stages[-1], Event.OK, circumstances))
    return tuple(stages)
