"""Calibration: text ▶ token batches, and what blocks do to them."""
