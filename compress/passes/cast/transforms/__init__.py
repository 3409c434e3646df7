"""Transforms of the dense weights that leave the model's function as it is and make it easier to round: see `plan`."""
