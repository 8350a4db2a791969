"""State transfer by Merkle difference (protocol §4, §6.6): every chunk is checked against a certified root.

Sources are peers and, in a recovery, the exporter that serves the old machine's disk. No source is believed: the index
must hash to the root, a chunk to its place in the index, and who sends a wrong one is blamed for that chunk.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from cloudfit_orchestrator.bft.messages import (
    MAX_CHUNKS_ASKED,
    Chunk,
    ChunkQuery,
    Frozen,
    StateIndex,
    StateQuery,
)
from cloudfit_orchestrator.bft.store import BUCKETS, Snapshot, decode_chunk, root_of
from cloudfit_orchestrator.bft.trie import Node
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.signing import DIGEST_BYTES

RETRY_S = 2.0  # a source that has not answered by then is asked again, or another is; liveness only
SILENT_S = 30.0  # then a peer that left a question open is asked again: those that answer may be slow on purpose
EXPORTER_SILENT = 3  # chunk questions in a row that an exporter left open: peers are asked for all of it from then on
# What an exporter may take: so long at first, and more with each chunk that was right. One that is always just about to
# answer would keep its chunks from the peers, who have them, for as long as it likes.
EXPORTER_PATIENCE_S = EXPORTER_SILENT * RETRY_S
EXPORTER_CHUNK_S = 0.1  # for a right chunk, and besides for its bytes as at this rate:
EXPORTER_BYTES_PER_S = 1 << 20
EXPORTER_TRIES = 20  # an exporter that has given no index by then is not waited for; it may have to start first
EXPORTER_TRIES_OF_MEMBER = EXPORTER_SILENT  # … by who is a member already: the group may stand still without it
INDEX_RETRY_S = 0.5
STALLED_S = 2 * RETRY_S  # so that a silent source's share has been asked of another by then
PARALLEL = 16  # chunks asked of one peer at once; they may be large


@dataclass(frozen=True, slots=True)
class Blame:
    """A source sent a chunk that is not what its place in the certified state holds."""

    index: int
    source: str


@dataclass(slots=True)
class Figures:
    """What a transfer did. Bytes by source; chunks kept from the own disk, fetched, and blamed."""

    kept: int = 0
    fetched: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    corrupt: list[Blame] = field(default_factory=list)
    absent: Counter[str] = field(default_factory=Counter)  # chunks that a source could not read
    stale: Counter[str] = field(default_factory=Counter)  # chunks that an exporter's own index names otherwise


class Transfer:
    """One state to be had: that with Merkle root `root`, after `slot`."""

    def __init__(
        self,
        slot: int,
        root: bytes,
        local: Snapshot,
        send: Callable[[str, Frozen], None],
        before: "Transfer | None" = None,
    ) -> None:
        """`local`: a state whose equal chunks are taken over, like those of `before`, which this one replaces;
        `send(peer, message)` asks a source.
        """
        self.slot = slot
        self.root = root
        self.figures = Figures()
        self._local = local
        self._known = {node[0]: node for node in before.chunks.values()} if before is not None else {}
        self._news_s = 0.0
        self._send = send
        self._hashes: list[bytes] = []
        self.chunks: dict[int, Node] = {}  # decoded and checked as they come: the result is there with the last one
        self._asked: dict[str, tuple[float, set[int]]] = {}  # source -> (when, chunks outstanding)
        self._refused: dict[str, set[int]] = {}  # source -> chunks it cannot give, or gave wrong
        self._index_asked_s = -1e9
        self._turn = 0
        # Questions for an exporter's index that it left open, over all states that replaced each other, as below.
        self.exporter_tries: Counter[str] = Counter(before.exporter_tries) if before is not None else Counter()
        # Questions for chunks in a row that a source left open. A state that changes all the time is replaced by a
        # newer one again and again: each time to wait for the same dead peer would never come to an end.
        self.silent: Counter[str] = Counter(before.silent) if before is not None else Counter()
        self.silent_s: dict[str, float] = dict(before.silent_s) if before is not None else {}  # when it did so last
        self.patience: dict[str, float] = dict(before.patience) if before is not None else {}  # exporters: until when
        self._exporter_knows: set[str] = set()  # exporters whose index has come
        self._exporter_asked_s: dict[str, float] = {}

    @property
    def indexed(self) -> bool:
        """The chunk hashes are known."""
        return bool(self._hashes)

    @property
    def done(self) -> bool:
        """All chunks are here."""
        return bool(self._hashes) and len(self.chunks) == BUCKETS

    def stalled(self, now_s: float) -> bool:
        """Nothing has come for a while: perhaps nobody keeps this state any more."""
        return now_s - self._news_s > STALLED_S

    def result(self) -> Snapshot:
        """The state. It shares with the local one what they have in common."""
        return Snapshot([self.chunks[i] for i in range(BUCKETS)])

    def tick(self, now_s: float, peers: list[str], exporters: list[str], *, member: bool = False) -> None:
        """Ask for what is missing; exporters first, each peer for its share. `member`: the state is waited for."""
        if not peers:
            return
        if not self._news_s:
            self._news_s = now_s
        if not self._hashes:
            if now_s - self._index_asked_s >= INDEX_RETRY_S:
                self._index_asked_s = now_s
                for peer in peers:
                    self._send(peer, StateQuery(self.root))
            return
        if all(source in self._asked for source in (*peers, *exporters)) and self._answering(now_s, exporters):
            return
        outstanding: set[int] = set()
        for source in exporters:
            if not self._patient(source, now_s):
                self._asked.pop(source, None)  # what it still has is asked of the peers
        for source, (when, indices) in list(self._asked.items()):
            if now_s - when >= RETRY_S:
                del self._asked[source]
                self.silent[source] += 1
                self.silent_s[source] = now_s
            else:
                outstanding |= indices
        lacking = [i for i in range(BUCKETS) if i not in self.chunks and i not in outstanding]
        from_disk: set[int] = set()  # these wait for an exporter's word
        for source in exporters:
            if source not in self._exporter_knows:
                if self.exporter_tries[source] < (EXPORTER_TRIES_OF_MEMBER if member else EXPORTER_TRIES):
                    self._ask_index(source, now_s)
                    from_disk.update(lacking)
                continue
            if self.silent[source] >= EXPORTER_SILENT or not self._patient(source, now_s):
                continue
            wanted = [i for i in lacking if i not in self._refused.get(source, ())]
            if wanted:
                self.patience.setdefault(source, now_s + EXPORTER_PATIENCE_S)
            from_disk.update(wanted)
            self._ask(source, wanted, MAX_CHUNKS_ASKED, now_s)
        rest = [i for i in lacking if i not in from_disk]
        if not rest:
            return
        speaking = [p for p in peers if not self.silent[p] or now_s - self.silent_s[p] >= SILENT_S] or peers
        if len(speaking) < len(peers) and any(all(i in self._refused.get(p, ()) for p in speaking) for i in rest):
            speaking = peers  # those that speak have not got it
        self._turn += 1  # with each question, not with time: no chunk depends on one silent peer
        turn = self._turn % len(speaking)
        for position, source in enumerate(speaking[turn:] + speaking[:turn]):
            share = [i for i in rest if i not in self._refused.get(source, ())][position :: len(speaking)]
            self._ask(source, share, PARALLEL, now_s)

    def _answering(self, now_s: float, exporters: list[str]) -> bool:
        """Nobody's time is over: there is nothing to ask anew."""
        return all(now_s - when < RETRY_S for when, _ in self._asked.values()) and all(
            self._patient(source, now_s) for source in exporters
        )

    def _patient(self, exporter: str, now_s: float) -> bool:
        """Whether the exporter is worth waiting for."""
        return now_s < self.patience.get(exporter, now_s + 1)

    def _ask_index(self, exporter: str, now_s: float) -> None:
        if now_s - self._exporter_asked_s.get(exporter, -1e9) >= RETRY_S:
            self._exporter_asked_s[exporter] = now_s
            self.exporter_tries[exporter] += 1
            self._send(exporter, StateQuery(b""))

    def _ask(self, source: str, indices: list[int], most: int, now_s: float) -> None:
        if indices and source not in self._asked:
            chosen = indices[:most]
            self._asked[source] = (now_s, set(chosen))
            self._send(source, ChunkQuery(self.root, tuple(chosen)))

    def index(self, source: str, message: StateIndex, exporters: list[str]) -> bool:
        """An index arrived. False if a peer's is not that of the root."""
        data = message.hashes
        hashes = [data[i : i + DIGEST_BYTES] for i in range(0, len(data), DIGEST_BYTES)]
        if source in exporters:
            # What an exporter says it holds only chooses what it is asked for: each chunk is checked when it comes.
            if self._hashes and source not in self._exporter_knows and len(hashes) == BUCKETS:
                self._exporter_knows.add(source)
                self.exporter_tries[source] = 0
                stale = {i for i in range(BUCKETS) if hashes[i] != self._hashes[i]}
                self._refused[source] = stale
                self.figures.stale[source] = len(stale - self.chunks.keys())
            return True
        if self._hashes or message.root != self.root:
            return True
        try:
            if root_of(hashes) != self.root:
                return False
        except BadError:
            return False
        self._hashes = hashes
        for i, known in enumerate(self._local.chunk_hashes):
            if known == hashes[i]:
                self.chunks[i] = self._local.buckets[i]
                self.figures.kept += 1
            elif hashes[i] in self._known:
                self.chunks[i] = self._known[hashes[i]]
        self._known = {}
        return True

    def chunk(self, source: str, message: Chunk, now_s: float) -> Blame | None:
        """A chunk arrived. Returns the blame if it is wrong."""
        index = message.index
        if message.root != self.root or not self._hashes or not 0 <= index < BUCKETS:
            return None
        asked = self._asked.get(source)
        if asked is None or index not in asked[1]:
            return None
        asked[1].discard(index)
        if not asked[1]:
            del self._asked[source]
        if index in self.chunks:
            return None
        if message.missing:
            self._refused.setdefault(source, set()).add(index)
            self.figures.absent[source] += 1
            return None
        node = _decoded(message.data, index)
        if node is None or node[0] != self._hashes[index]:
            self._refused.setdefault(source, set()).add(index)
            blame = Blame(index, source)
            self.figures.corrupt.append(blame)
            return blame
        self._news_s = now_s  # only what helps is news: anybody can send a chunk again and again
        self.silent[source] = 0
        if source in self._asked:
            self._asked[source] = (now_s, asked[1])
        if source in self.patience:
            self.patience[source] += EXPORTER_CHUNK_S + len(message.data) / EXPORTER_BYTES_PER_S
        self.chunks[index] = node
        self.figures.fetched[source] += 1
        self.figures.bytes[source] += len(message.data)
        return None


def _decoded(data: bytes, index: int) -> Node | None:
    """The content of a chunk, None if it is not canonical: then no certified root has it."""
    try:
        return decode_chunk(data, index)
    except BadError:
        return None
