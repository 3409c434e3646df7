"""The documentation: generated pages, checks of links, the picture of the architecture."""
