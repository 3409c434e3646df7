"""Sizes that bound the memory of a sweep; the plan reckons with the same ones. No torch here."""

#: Tokens of one forward pass through a block; on a CPU few enough for its caches.
TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 8192}
#: Bytes that freed tensors may leave with the process, to be used again.
KEPT_FREED = 128 << 20
#: Input widths up to which statistics are summed in float64; wider ones in float32.
WIDE = 2048
#: Bytes of statistics gathered at a time, if one group's alone are not more.
STATISTICS_BYTES = 1 << 30
