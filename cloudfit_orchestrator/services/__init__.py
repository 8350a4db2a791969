"""Deterministic services that replicas run over a `StateStore`, and the operations that clients send them."""
