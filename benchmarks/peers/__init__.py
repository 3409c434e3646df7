"""Other tools on the same model, calibration ids and held-out texts, each in an environment of its own."""
