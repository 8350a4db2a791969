"""What runs inside the virtual machines: storage, channel, transport, replica runtime, recovery exporter."""
