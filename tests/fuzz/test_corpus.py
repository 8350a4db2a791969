"""Every target on its corpus, which holds what once broke it, and on inputs at random: in seconds, without a fuzzer."""

import importlib
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.fuzz.corpus import MAX_CORPUS_BYTES, TARGETS, inputs

SLOW = {"disk": 20, "core": 60}  # examples; the others take 200


def target(name: str) -> tuple[Callable[[bytes], None], Callable[[], list[bytes]]]:
    module = importlib.import_module(f"tests.fuzz.fuzz_{name}")
    return module.run, module.seeds


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_breaks_nothing(name: str) -> None:
    run, seeds = target(name)
    assert inputs(name), "a target without a corpus: docs/fuzzing.md says how to make one"
    for data in (*seeds(), *(path.read_bytes() for path in inputs(name))):
        run(data)


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_at_random_break_nothing(name: str) -> None:
    run, seeds = target(name)
    places = st.integers(0, 400)
    changed = st.builds(lambda seed, at, new: seed[:at] + new + seed[at + len(new) :], of(seeds()), places, octets)

    @settings(max_examples=SLOW.get(name, 200), deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @example(b"")
    @given(octets | changed)
    def broken_by(data: bytes) -> None:
        run(data)

    broken_by()


octets = st.binary(max_size=200)
of = st.sampled_from


@pytest.mark.parametrize("name", TARGETS)
def test_a_corpus_is_small(name: str) -> None:
    size = sum(path.stat().st_size for path in inputs(name))
    assert size <= MAX_CORPUS_BYTES, "keep what reaches new code, minimised (docs/fuzzing.md)"
