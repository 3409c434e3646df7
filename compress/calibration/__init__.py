"""Calibration: text ▶ token batches ▶ the sweep over blocks, with statistics of their inputs, changes and tuning."""
