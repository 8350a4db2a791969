"""Values that all rooms speak in: ids, records, UIs, manifests, errors. No I/O; standard library and cryptography only."""
