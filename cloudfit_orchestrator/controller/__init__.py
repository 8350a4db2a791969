"""The controller: spec, journal, and the journalled operations that apply, recover and destroy groups."""
