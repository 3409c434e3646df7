"""`prune_structured`: remove whole blocks, heads, neurons, experts and hidden channels."""
