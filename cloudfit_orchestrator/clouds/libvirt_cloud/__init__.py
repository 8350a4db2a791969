"""The libvirt driver: QEMU machines on this host or, over libvirt's own SSH transport, on another."""
