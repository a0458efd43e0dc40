"""Fixtures that several files share."""

import pytest


@pytest.fixture(scope="module")
def cache_of_its_own(tmp_path_factory):
    """A cache of conversions for one module, warm between its tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SARTOR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
