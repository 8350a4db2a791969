from hypothesis import given
from hypothesis import strategies as st

from cloudfit_orchestrator.bench.latencies import added, histogram, percentile_ms, rounded_us


@given(st.integers(0, 10**9))
def test_rounding_is_at_most_half_a_percent_off(latency_us: int) -> None:
    assert abs(rounded_us(latency_us) - latency_us) <= latency_us * 0.005


def test_percentiles_are_of_the_nearest_rank() -> None:
    bars = histogram(1000 * i for i in range(1, 101))
    assert [percentile_ms(bars, p) for p in (0, 50, 99, 100)] == [1, 50, 99, 100]
    assert percentile_ms(histogram([7000]), 99) == 7
    assert percentile_ms({}, 50) is None


def test_histograms_add_up_also_after_json() -> None:
    assert added([{5: 1, 7: 2}, {"7": 3}]) == {5: 1, 7: 5}
