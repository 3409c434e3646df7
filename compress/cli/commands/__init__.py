"""The bodies of the commands: each calls the library and prints tables or one JSON document."""
