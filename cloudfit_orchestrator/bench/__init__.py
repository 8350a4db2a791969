"""Measuring: real groups of processes on this host under load, beside etcd; checkpoints by size of state; curves."""
