"""Values that all rooms speak in: ids, records, UIs, manifests, errors. No I/O; stdlib and cryptography only."""
