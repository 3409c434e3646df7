"""Tools of the repository: the pages of the documentation, and their checks."""
