"""The backend `tape`. Sartor constructs the class without arguments and keeps no state in it.

`FolderBackend` turns the modules of this package into the methods of a backend: `legality.check`, `lower.lower`
and so on; its docstring has the list. It imports a module when a method needs it, so vendor packages may be
imported at the top of `lower.py` and `run.py`, never here: Sartor lists its targets without loading one of them.
"""

from sartor.backends.folder import FolderBackend


class TapeBackend(FolderBackend):
    """Backend `tape`. See `sartor.backends.protocol.Backend` for what each method promises."""

    name = "tape"
    package = __name__
