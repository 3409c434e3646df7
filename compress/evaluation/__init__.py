"""What a model is worth: `language` scores text, `latency` measures time and memory in processes of their own."""
