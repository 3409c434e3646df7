"""`local_attention`: some blocks see everything, all others a sliding window."""
