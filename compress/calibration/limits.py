"""Sizes that bound the memory of a sweep; the plan reckons with the same ones. No torch here."""

#: Tokens of one forward pass through a block; on a CPU few enough for its caches.
TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 8192}
#: Bytes that freed tensors may leave with the process, to be used again.
KEPT_FREED = 128 << 20
#: Input widths up to which statistics are summed in float64; wider ones in float32.
WIDE = 2048
#: Bytes of statistics gathered at a time, if one group's alone are not more.
STATISTICS_BYTES = 1 << 30
#: Tokens that tell which errors at the outputs of matrices matter; a quarter of these costs 3 % of the divergence gained.
GRADIENT_TOKENS = 32768
#: Bytes of curvatures by outputs that are held of one block; the matrices with most outputs gain least by them.
OUTPUTS_BYTES = 512 << 20
#: Tokens whose logits are computed at a time.
LOGITS_AT_ONCE = 256
