"""`factorize`: replace a matrix by the product of two of low rank."""
