"""The timing of calls by a clock of the test's own, which moves only when a call says so."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest

from esparse.bench.timing import Protocolled, measure, rotation


class TestClock:
    """Milliseconds pass where a call lets them; a graph makes launches free."""

    __test__ = False

    def __init__(self, cache_bytes: int = 0, *, can_graph: bool = True, launch_ms: float = 0.0) -> None:
        self.cache_bytes, self.can_graph, self.launch_ms = cache_bytes, can_graph, launch_ms
        self.now, self.launches, self.log = 0.0, launch_ms, []

    def call(self, name: str, *times: float) -> Callable[[], None]:
        turns = iter(())

        def run() -> None:
            nonlocal turns
            self.log.append(name)
            try:
                took = next(turns)
            except StopIteration:
                turns = iter(times)
                took = next(turns)
            self.now += took + self.launches

        return run

    def milliseconds(self, run: Callable[[], object]) -> float:
        before = self.now
        run()
        return self.now - before

    def graphed(self, run: Callable[[], object]) -> Callable[[], None] | None:
        if not self.can_graph:
            return None

        def replay() -> None:
            self.launches = 0.0
            run()
            self.launches = self.launch_ms

        return replay


HOW = Protocolled(warm_up=2, repeats=5, least_ms=0.0, graph_below_ms=0.5)


def test_median_and_quartiles_by_hand() -> None:
    clock = TestClock()
    # turns: 2 to warm, 1 to estimate, 2 warm-ups, then five that count
    call = clock.call("a", 1.0, 1.0, 1.0, 1.0, 1.0, 5.0, 1.0, 9.0, 3.0, 7.0)
    timing = measure({"a": [call]}, clock, HOW)["a"]
    assert (timing.ms, timing.low_ms, timing.high_ms) == (5.0, 3.0, 7.0)
    assert (timing.repeats, timing.calls, timing.graph) == (5, 1, False)


def test_one_repeat() -> None:
    clock = TestClock()
    timing = measure({"a": [clock.call("a", 2.0)]}, clock, Protocolled(1, 1, 0.0, 0.0))["a"]
    assert (timing.low_ms, timing.ms, timing.high_ms) == (2.0, 2.0, 2.0)


def test_alternatives_are_timed_turn_by_turn() -> None:
    clock = TestClock()
    measure({"a": [clock.call("a", 1.0)], "b": [clock.call("b", 2.0)]}, clock, HOW)
    assert "".join(clock.log)[-14:] == "ab" * 7
    assert gc.isenabled()


def test_copies_are_gone_through_in_turn_and_a_call_is_what_is_told() -> None:
    clock = TestClock()
    copies = [clock.call(str(i), 1.0) for i in range(3)]
    timing = measure({"a": copies}, clock, Protocolled(1, 3, 7.5, 0.0))["a"]
    assert timing.ms == 1.0
    assert timing.calls == 9  # whole turns of three, until 7.5 ms are over
    assert "".join(clock.log) == "012" * (2 + 1 + 3 + 3 * 3)


def test_small_calls_become_a_graph_and_launches_do_not_count() -> None:
    clock = TestClock(launch_ms=0.1)
    timing = measure({"a": [clock.call("a", 0.01)]}, clock, Protocolled(1, 3, 2.0, 0.5))["a"]
    assert timing.graph and timing.ms == pytest.approx(0.01)
    assert timing.calls >= 200  # as many as fill 2 ms without launches
    clock = TestClock(launch_ms=0.1, can_graph=False)
    timing = measure({"a": [clock.call("a", 0.01)]}, clock, Protocolled(1, 3, 2.0, 0.5))["a"]
    assert not timing.graph and timing.ms == pytest.approx(0.11)
    clock = TestClock()
    large = measure({"a": [clock.call("a", 3.0)]}, clock, Protocolled(1, 3, 2.0, 0.5))["a"]
    assert not large.graph


def test_rotation_goes_four_times_beyond_the_cache() -> None:
    clock = TestClock(cache_bytes=50)
    assert rotation(33, clock) == 7  # 231 bytes; six would be 198
    assert rotation(200, clock) == 1
    assert rotation(1000, clock) == 1
    assert rotation(33, clock, most_bytes=70) == 2
    assert rotation(33, clock, most_bytes=10) == 1
    assert rotation(1, TestClock()) == 1
    assert rotation(1, TestClock(cache_bytes=10**6)) == 256
