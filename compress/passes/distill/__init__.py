"""`distill`: train a student towards one teacher or several."""
