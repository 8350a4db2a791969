"""The trusted wormhole agent (protocol §2): keys, counters and leases of one host's guests. It fails by crashing only.

What it rests on, in the order in which it is decided:
1. Controllers' and image signers' public keys come from files that the operator names at its start.
2. A guest is its channel: admission ties one group, replica and incarnation to one measured machine, and from then on
   everything that arrives on that machine's channel is that replica's word. No frame names a replica.
3. Keys are made here, live in memory only and are dropped when their epoch ends; a restart ends all epochs.
4. What opens or closes an epoch is a configuration record that a controller signed, or an order on the controller's
   socket, never a guest's word alone.
Deliberately not checked: that the host's root, its libvirt and its QEMU are honest; they are the trusted base.
"""
