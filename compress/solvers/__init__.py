"""Pure mathematics: tensors in, tensors out. Each has a slow, obvious twin in the tests."""
