"""State transfer by Merkle difference (protocol §4, §6): no source is believed, each chunk blames its sender."""

import pytest

from cloudfit_orchestrator.bft.messages import Chunk, ChunkQuery, Frozen, StateIndex, StateQuery
from cloudfit_orchestrator.bft.store import BUCKETS, Snapshot, StateStore, bucket_of
from cloudfit_orchestrator.bft.transfer import (
    EXPORTER_PATIENCE_S,
    EXPORTER_SILENT,
    EXPORTER_TRIES,
    RETRY_S,
    SILENT_S,
    Blame,
    Transfer,
)

PEERS = ["r0#1", "r1#2", "r2#3"]
DISK = "old#9"


def state(entries: int, *, salt: bytes = b"") -> Snapshot:
    store = StateStore()
    for i in range(entries):
        store.put(b"key%d" % i, b"value%d" % i + salt)
    return store.snapshot()


WANTED = state(300)
EMPTY = StateStore().snapshot()


class Site:
    """A transfer, its clock and its sources. A source is a function of (message) -> answers, or absent: silent."""

    def __init__(self, local: Snapshot = EMPTY, exporters: tuple[str, ...] = (), *, member: bool = False) -> None:
        self.member = member
        self.sent: list[tuple[str, Frozen]] = []
        self.transfer = Transfer(64, WANTED.root, local, lambda peer, m: self.sent.append((peer, m)))
        self.exporters = list(exporters)
        self.now_s = 1.0
        self.sources = {}
        self.asked: list[tuple[str, Frozen]] = []

    def run(self, rounds: int = 2000) -> None:
        for _ in range(rounds):
            if self.transfer.done:
                return
            self.run_once()
        raise AssertionError("the transfer does not end")

    def run_once(self) -> None:
        self.now_s += RETRY_S / 4
        self.transfer.tick(self.now_s, PEERS, self.exporters, member=self.member)
        sent, self.sent = self.sent, []
        self.asked += sent
        for source, message in sent:
            answer = self.sources.get(source)
            for reply in answer(message) if answer else ():
                if isinstance(reply, StateIndex):
                    self.transfer.index(source, reply, self.exporters)
                else:
                    self.transfer.chunk(source, reply, self.now_s)

    def queries(self, source: str) -> set[int]:
        return {i for s, m in self.asked if s == source and isinstance(m, ChunkQuery) for i in m.indices}


def honest(snapshot: Snapshot = WANTED, *, corrupt: tuple[int, ...] = (), missing: tuple[int, ...] = ()):
    def answer(message: Frozen):
        if isinstance(message, StateQuery):
            return [StateIndex(message.root or snapshot.root, 64, b"".join(snapshot.chunk_hashes))]
        assert isinstance(message, ChunkQuery)
        return [
            Chunk(message.root, i, b"" if i in missing else snapshot.chunk(i) + b"!" * (i in corrupt), i in missing)
            for i in message.indices
        ]

    return answer


def test_a_state_is_fetched_from_all_peers() -> None:
    site = Site()
    site.sources = dict.fromkeys(PEERS, honest())
    site.run()
    assert site.transfer.result() == WANTED
    figures = site.transfer.figures
    assert set(figures.fetched) == set(PEERS)
    assert figures.kept + sum(figures.fetched.values()) == BUCKETS


def test_only_what_differs_is_fetched() -> None:
    store = StateStore.from_snapshot(WANTED)
    store.put(b"key7", b"mine")
    site = Site(local=store.snapshot())
    site.sources = dict.fromkeys(PEERS, honest())
    site.run()
    assert site.transfer.figures.kept == BUCKETS - 1
    assert set().union(*(site.queries(p) for p in PEERS)) == {bucket_of(b"key7")}


@pytest.mark.parametrize("silent", [("r0#1",), ("r0#1", "r2#3")])
def test_silent_peers_delay_a_transfer_but_do_not_stop_it(silent: tuple[str, ...]) -> None:
    site = Site()
    site.sources = {p: honest() for p in PEERS if p not in silent}
    site.run()
    assert site.transfer.result() == WANTED


def test_who_sends_a_corrupt_chunk_is_blamed_for_it_and_asked_for_it_no_more() -> None:
    bad = tuple(range(0, BUCKETS, 7))
    site = Site()
    site.sources = {**dict.fromkeys(PEERS, honest()), "r1#2": honest(corrupt=bad)}
    site.run()
    assert site.transfer.result() == WANTED
    corrupt = site.transfer.figures.corrupt
    assert corrupt
    assert {b.source for b in corrupt} == {"r1#2"}
    assert len(corrupt) == len({b.index for b in corrupt}), "each chunk is blamed once"
    assert all(b.index in bad for b in corrupt)


def test_a_wrong_index_is_refused() -> None:
    site = Site()
    other = state(300, salt=b"lie")
    assert not site.transfer.index("r1#2", StateIndex(WANTED.root, 64, b"".join(other.chunk_hashes)), [])
    assert not site.transfer.index("r1#2", StateIndex(WANTED.root, 64, b"short"), [])
    assert site.transfer.index("r1#2", StateIndex(other.root, 64, b""), []), "an answer to another question: no lie"
    assert not site.transfer.done


def test_an_exporter_is_asked_first_and_only_for_what_its_disk_has_right() -> None:
    store = StateStore.from_snapshot(WANTED)
    stale = {bucket_of(b"key%d" % i) for i in range(10)}
    for i in range(10):
        store.put(b"key%d" % i, b"old")
    site = Site(exporters=(DISK,))
    site.sources = {**dict.fromkeys(PEERS, honest()), DISK: honest(store.snapshot())}
    site.run()
    figures = site.transfer.figures
    assert site.transfer.result() == WANTED
    assert figures.stale[DISK] == len(stale)
    assert not site.queries(DISK) & stale
    assert set().union(*(site.queries(p) for p in PEERS)) == stale
    assert figures.fetched[DISK] + figures.kept + len(stale) == BUCKETS


def test_a_disk_that_lies_chunk_by_chunk_is_found_out() -> None:
    lies = {bucket_of(b"key3"), bucket_of(b"key4")}
    site = Site(exporters=(DISK,))
    site.sources = {**dict.fromkeys(PEERS, honest()), DISK: honest(corrupt=tuple(lies))}
    site.run()
    assert site.transfer.result() == WANTED
    assert sorted(site.transfer.figures.corrupt, key=lambda b: b.index) == [Blame(i, DISK) for i in sorted(lies)]


def test_chunks_that_a_disk_cannot_read_come_from_peers() -> None:
    gone = {bucket_of(b"key5"), bucket_of(b"key6")}
    site = Site(exporters=(DISK,))
    site.sources = {**dict.fromkeys(PEERS, honest()), DISK: honest(missing=tuple(gone))}
    site.run()
    assert site.transfer.result() == WANTED
    assert site.transfer.figures.absent[DISK] == len(gone)
    assert site.transfer.figures.corrupt == []


def test_a_silent_exporter_is_waited_for_a_while_only() -> None:
    site = Site(exporters=(DISK,))
    site.sources = dict.fromkeys(PEERS, honest())
    site.run()
    assert site.transfer.result() == WANTED
    assert sum(source == DISK for source, _ in site.asked) == EXPORTER_TRIES


def test_who_is_a_member_already_waits_for_a_silent_exporter_no_longer_than_for_one_that_falls_silent() -> None:
    """Beside two faulty members of five the group stood still for 40 seconds: the new one asked nobody who answers."""
    site = Site(exporters=(DISK,), member=True)
    site.sources = dict.fromkeys(PEERS, honest())
    site.run()
    assert site.transfer.result() == WANTED
    assert sum(source == DISK for source, _ in site.asked) == EXPORTER_SILENT


def test_a_silent_exporter_is_waited_for_once_even_if_newer_states_replace_older_ones() -> None:
    """Each newer state asked it twenty times again: a new member that was needed never had one, as each was replaced
    before that, and the group went on from view to view.
    """
    site = Site(exporters=(DISK,))
    site.sources = dict.fromkeys(PEERS, honest())
    for slot in range(128, 128 + 64 * EXPORTER_TRIES, 64):
        with pytest.raises(AssertionError, match="does not end"):
            site.run(8)  # four seconds: without news it is replaced
        site.transfer = Transfer(slot, WANTED.root, EMPTY, site.transfer._send, site.transfer)
        if sum(source == DISK for source, _ in site.asked) >= EXPORTER_TRIES:
            break
    site.run()
    assert site.transfer.result() == WANTED
    assert sum(source == DISK for source, _ in site.asked) == EXPORTER_TRIES


def test_an_exporter_that_goes_away_after_its_index_is_waited_for_a_while_only() -> None:
    site = Site(exporters=(DISK,))
    site.sources = {peer: honest() for peer in PEERS}
    index = honest()
    site.sources[DISK] = lambda message: index(message) if isinstance(message, StateQuery) else []
    site.run()
    assert site.transfer.result().root == WANTED.root
    assert sum(source == DISK and isinstance(m, ChunkQuery) for source, m in site.asked) == EXPORTER_SILENT


def test_chunks_nobody_asked_for_are_dropped() -> None:
    site = Site()
    t = site.transfer
    assert t.chunk("r1#2", Chunk(WANTED.root, 1, b"x"), 1.0) is None, "before the index"
    t.index("r1#2", StateIndex(WANTED.root, 64, b"".join(WANTED.chunk_hashes)), [])
    for index in (-1, 1, BUCKETS, 1 << 60):
        assert t.chunk("r1#2", Chunk(WANTED.root, index, b"x"), 1.0) is None
    assert t.figures.corrupt == []
    assert t.figures.fetched.total() == 0


def test_a_transfer_goes_on_from_the_chunks_of_the_one_it_replaces() -> None:
    first = Site()
    first.sources = dict.fromkeys(PEERS, honest())
    first.run()
    second = Transfer(128, WANTED.root, EMPTY, lambda *_: None, first.transfer)
    assert second.index("r0#1", StateIndex(WANTED.root, 128, b"".join(WANTED.chunk_hashes)), [])
    assert second.done
    assert second.result() == WANTED


def test_a_dead_peer_is_waited_for_once_even_if_newer_states_replace_older_ones() -> None:
    site = Site()
    site.sources = dict.fromkeys(PEERS[:2], honest())
    site.run()
    assert not any(site.transfer.stalled(t) for t in (site.now_s, site.now_s + RETRY_S)), "its share went to others"
    asked = len(site.queries(PEERS[2]))
    assert 0 < asked < 20, "one question"
    site.transfer = Transfer(128, WANTED.root, EMPTY, site.transfer._send, site.transfer)
    site.transfer._known = {}  # everything has changed
    began = site.now_s
    site.run()
    assert len(site.queries(PEERS[2])) == asked, "not asked again while others answer"
    assert site.now_s - began < BUCKETS / 32 * RETRY_S


def test_what_those_that_speak_have_not_got_is_asked_of_the_silent_too() -> None:
    site = Site()
    site.sources = dict.fromkeys(PEERS[:2], honest(missing=(5,)))
    with pytest.raises(AssertionError, match="does not end"):
        site.run(80)
    site.sources[PEERS[2]] = honest()
    site.run()
    assert site.transfer.result() == WANTED


def test_a_transfer_without_news_is_stalled() -> None:
    site = Site()
    site.transfer.tick(1.0, PEERS, [])
    assert not site.transfer.stalled(1.5)
    assert site.transfer.stalled(10.0)


class Dripping:
    """A source that has one chunk come just before whoever waits for it gives up."""

    def __init__(self, snapshot: Snapshot = WANTED, *, wrong: bool) -> None:
        self._answer = honest(snapshot, corrupt=tuple(range(BUCKETS)) if wrong else ())
        self._due_s = 0.0
        self._asked: list[Chunk] = []

    def __call__(self, message: Frozen) -> list[Frozen]:
        if isinstance(message, StateQuery):
            return self._answer(message)
        self._asked += self._answer(message)
        return []

    def drip(self, now_s: float) -> list[Chunk]:
        if not self._asked or now_s < self._due_s:
            return []
        self._due_s = now_s + 0.7 * RETRY_S
        return [self._asked.pop(0)]


def drips(site: Site, source: str, tap: Dripping) -> float:
    """How long the transfer takes while that source drips."""
    site.sources[source] = tap
    began = site.now_s
    while not site.transfer.done and site.now_s < began + 3000:
        for chunk in tap.drip(site.now_s):
            site.transfer.chunk(source, chunk, site.now_s)
        site.run_once()
    return site.now_s - began


@pytest.mark.parametrize("wrong", [False, True])
def test_an_exporter_that_drips_chunks_is_not_waited_for(*, wrong: bool) -> None:
    """One chunk every 1.9 s kept all others from the peers: a transfer took 1,984 s in place of 2."""
    site = Site(exporters=(DISK,))
    site.sources = dict.fromkeys(PEERS, honest())
    assert drips(site, DISK, Dripping(wrong=wrong)) < EXPORTER_PATIENCE_S + 16 * RETRY_S
    assert site.transfer.result() == WANTED
    assert site.transfer.figures.fetched[DISK] < 10


def test_an_exporter_that_is_at_work_keeps_its_share() -> None:
    site = Site(exporters=(DISK,))
    site.sources = {peer: honest(missing=tuple(range(BUCKETS))) for peer in PEERS}
    site.sources[DISK] = honest()
    site.run()
    assert site.transfer.figures.fetched[DISK] + site.transfer.figures.kept == BUCKETS


def test_a_peer_that_drips_chunks_is_not_left_alone_with_a_transfer() -> None:
    """Once the correct peers had each lost an answer, only the one that dripped was asked."""
    site = Site()
    slow = Dripping(wrong=False)
    site.sources = {PEERS[0]: slow}
    for _ in range(20):
        for chunk in slow.drip(site.now_s):
            site.transfer.chunk(PEERS[0], chunk, site.now_s)
        site.run_once()
    assert site.transfer.silent[PEERS[1]]
    assert site.transfer.silent[PEERS[2]]
    site.sources |= {PEERS[1]: honest(), PEERS[2]: honest()}
    assert drips(site, PEERS[0], slow) < 4 * SILENT_S
