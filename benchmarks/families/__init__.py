"""The family matrix: what works on which of transformers' classes. `make families` writes docs/families.md."""
