"""A recipe's run: order, fingerprints, resume, evaluation, gates, publication."""
