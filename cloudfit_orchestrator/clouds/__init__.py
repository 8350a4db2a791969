"""Drivers, one a kind of cloud, behind the interface in `base`. Blocking: callers run them in threads."""
