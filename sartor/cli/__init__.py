"""The command `sartor`: see `sartor --help`. One module per command; exit codes are in `sartor.errors`."""

from sartor.cli.main import main

__all__ = ["main"]
