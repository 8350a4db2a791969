"""The USIG engine (protocol §2-§5): MinBFT and EBAWA over streams of messages that a wormhole numbers."""
