"""A plugin whose own requirement is missing."""

import a_package_that_nobody_has  # noqa: F401
