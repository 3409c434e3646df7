"""The documentation: generated pages, checks of links, the pictures."""
