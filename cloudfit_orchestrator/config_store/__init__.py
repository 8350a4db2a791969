"""Trusted CONFIG STORAGE: the signed, hash-chained sequence of configuration records of each group."""
