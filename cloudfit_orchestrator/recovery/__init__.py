"""When a replica may be recovered, and in which steps (protocol §6). No I/O: facts and events in, decisions out."""
