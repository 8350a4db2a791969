"""The end of a turn: each thing once, what takes long last, and an error of one holds up no other."""

import asyncio

import pytest

from cloudfit_orchestrator.guest.turn import Turn
from tests.unit.guest.helpers import scenario, until


@scenario
async def test_what_is_due_is_done_when_the_block_ends_and_the_last_things_last():
    turn, done = Turn(), []
    with turn:
        turn.later(lambda: done.append("sync"), last=True)
        turn.later(lambda: done.append("write"))
        turn.later(lambda: turn.later(lambda: done.append("came up meanwhile")))
        assert not done
    assert done == ["write", "came up meanwhile", "sync"]


@scenario
async def test_outside_of_a_block_the_loop_ends_the_turn():
    turn, done = Turn(), []
    turn.later(lambda: done.append(1))
    turn.later(lambda: done.append(2))
    assert not done
    await asyncio.sleep(0)
    assert done == [1, 2]


@scenario
async def test_after_an_error_the_rest_is_done_when_the_loop_comes_round():
    turn, done = Turn(), []

    def fail() -> None:
        raise OSError("made up")

    def turn_with_an_error() -> None:
        with turn:
            turn.later(fail)
            turn.later(lambda: done.append("the next one"))

    with pytest.raises(OSError, match="made up"):
        turn_with_an_error()
    await until(lambda: done == ["the next one"])
    turn.later(lambda: done.append("later"))
    await until(lambda: done == ["the next one", "later"])
