"""`prune_unstructured`: set single weights to zero, by magnitude or with calibration data."""
