"""Evaluation of one model: metrics on text and images by task, and speed and memory. docs/metrics.md defines all metrics."""
