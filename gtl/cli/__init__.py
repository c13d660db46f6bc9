"""The command line: typed functions in one table, parsed before torch or ray is imported."""

from gtl.cli.table import app, main

__all__ = ["app", "main"]
