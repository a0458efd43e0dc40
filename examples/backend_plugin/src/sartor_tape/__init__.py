"""The backend `tape`. Sartor constructs the class without arguments and keeps no state in it.

`FolderBackend` turns the modules of this package into the methods of a backend: `legality.check`, `lower.lower`
and so on; its docstring has the list. Import a vendor's package inside functions, by `import_vendor` of
`sartor.backends.telemetry`: its telemetry is off then, and where it is missing users get the line that installs it.
"""

from sartor.backends.folder import FolderBackend


class TapeBackend(FolderBackend):
    """Backend `tape`. See `sartor.backends.protocol.Backend` for what each method promises."""

    name = "tape"
    package = __name__
