"""The `cloudfit` command: thin, no logic."""
