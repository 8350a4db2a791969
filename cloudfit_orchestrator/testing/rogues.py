"""Byzantine clients: admitted, with a good key, and up to no good.

Their operations touch keys of their own, so the history of the others says whether anybody else suffered.
"""

import hashlib
import random
from typing import TYPE_CHECKING

from cloudfit_orchestrator.bft.messages import Bundle, BundleBody, Request, bundle_bytes, encode
from cloudfit_orchestrator.services.kv import Put, encode_operation
from cloudfit_orchestrator.testing.crypto import Signer
from cloudfit_orchestrator.testing.workload import NAME_BYTES

if TYPE_CHECKING:
    from cloudfit_orchestrator.testing.simulator import Simulation

PAUSE_S = 0.15
FLOOD = 40  # bundles at once: several full windows of batches
FAR = (64, 65, 1000, 1 << 40)  # ahead of the last number: at the window's edge, beyond it, absurd


class Rogue:
    """One of them. It goes on for as long as the troubles do."""

    def __init__(self, world: "Simulation", name: str, key: Signer, rng: random.Random) -> None:
        """`key` is admitted in the configuration."""
        self._world = world
        self._name = name
        self._key = key
        self._rng = rng
        self._number = rng.choice([0, 0, 1 << 30])
        self._sent: list[bytes] = []

    def start(self) -> None:
        """Begin."""
        self._plan()

    def _plan(self) -> None:
        self._world.schedule.after(self._rng.expovariate(1 / PAUSE_S), self._act)

    def _act(self) -> None:
        if not self._world.in_trouble:
            return
        tricks = {
            "equivocates": self._equivocate,
            "repeats": self._repeat,
            "numbers far ahead": self._far,
            "floods": self._flood,
            "sends nonsense": self._nonsense,
            "steals frames": self._steal,
        }
        name = self._rng.choice(list(tricks))
        self._world.happened(f"attack:client {name}")
        tricks[name]()
        self._plan()

    def _bundle(self, numbers: list[int], *, operations: int = 1) -> list[bytes]:
        """Bundles with these numbers, and as many different `operations` under them."""
        found = []
        for variant in range(operations):
            requests = []
            for number in numbers:
                value = b"%d/%d/%d" % (number, variant, self._rng.getrandbits(32))
                name = hashlib.sha256(self._key.public + value).digest()[:NAME_BYTES]
                operation = name + encode_operation(Put(b"rogue", value))
                self._world.issued(operation)
                requests.append(Request(number, operation))
            body = encode(BundleBody(self._world.newest().life, self._key.public, tuple(requests)))
            found.append(encode(Bundle(body, self._key.sign(bundle_bytes(body)))))
        self._sent += found
        return found

    def _tell(self, frame: bytes, *, everybody: bool = False) -> None:
        members = [m.replica for m in self._world.newest().members]
        for replica in members if everybody else self._rng.sample(members, self._rng.randint(1, len(members))):
            self._world.ask(self._name, self._key.public, replica, frame)

    def _equivocate(self) -> None:
        """One number, a different operation for each replica."""
        self._number += 1
        for frame in self._bundle([self._number], operations=3):
            self._tell(frame)

    def _repeat(self) -> None:
        """Old bundles, and old numbers in new company."""
        if self._sent:
            self._tell(self._rng.choice(self._sent), everybody=True)
        self._number += 1
        numbers = sorted({self._number, max(1, self._number - self._rng.randint(0, 5))})
        for frame in self._bundle(numbers):
            self._tell(frame)

    def _far(self) -> None:
        ahead = self._number + self._rng.choice(FAR)
        for frame in self._bundle([ahead]):
            self._tell(frame, everybody=True)
        if self._rng.random() < 0.3:
            self._number = ahead

    def _flood(self) -> None:
        for _ in range(FLOOD):
            self._number += 1
            for frame in self._bundle([self._number]):
                self._tell(frame)

    def _nonsense(self) -> None:
        self._number += 1
        (good,) = self._bundle([self._number])
        body = encode(BundleBody("another group", self._key.public, (Request(self._number, b"x"),)))
        several = encode(
            BundleBody(self._world.newest().life, self._key.public, tuple(Request(n, b"") for n in (3, 2, 2)))
        )
        for frame in (
            good[:-1],
            bytes([good[0]]) + self._rng.randbytes(40),
            encode(Bundle(body, self._key.sign(bundle_bytes(body)))),
            encode(Bundle(several, self._key.sign(bundle_bytes(several)))),
            encode(Bundle(body, bytes(64))),
            encode(Bundle(self._rng.randbytes(1 << 16), bytes(64))),
        ):
            self._tell(frame)

    def _steal(self) -> None:
        """Frames of other clients, under the own name and under theirs with another content."""
        for client in self._world.clients.values():
            frame = client.open_frame
            if frame is not None:
                self._tell(frame)
                self._tell(frame[:-1] + bytes([frame[-1] ^ 1]))
