"""Replication, sans-IO: bytes, messages and ticks in, effects out (protocol reference: docs/protocol.md)."""
