"""Divide dense MLPs into an expert that all tokens use and experts that a router chooses."""
