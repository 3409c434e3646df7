"""`cast`: store weights in another number format, by rounding alone or block by block with calibration data."""
