"""The PBFT engine (Castro and Liskov, OSDI 1999): 3f+1 members, signed messages, no trusted counter (protocol §5)."""
