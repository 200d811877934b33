"""Settings of a run: the dataclasses, their checks, the command line and TOML."""
