"""How much the model's loss or output depends on each weight, matrix and block."""
