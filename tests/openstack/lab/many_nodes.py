#!/usr/bin/python3
"""nova-compute for the fake cloud: its one host has as many nodes as a site would have hosts.

Whenever nova-compute makes a server it asks Placement for the allocations of every server of that node, one by one: on
a single node the last of 300 servers would wait for 300 answers. Nova's fake driver takes several nodes from its tests
only, and `compute_driver` names drivers of Nova's own package only.
"""

import sys

from nova.cmd import compute
from nova.virt import fake

NODES = 30


class ManyNodes(fake.FakeDriver):
    """The fake driver, on so many nodes."""

    def init_host(self, host):
        """Names the nodes after the host."""
        super().init_host(host)
        self._set_nodes([f"{host}-{number}" for number in range(NODES)])


fake.ManyNodes = ManyNodes  # where `compute_driver = fake.ManyNodes` is looked for

if __name__ == "__main__":
    sys.exit(compute.main())
