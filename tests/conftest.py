"""Fixtures that many tests share."""

import os
from collections.abc import Iterator

import pytest
from bases import FAMILIES, Base, mini, tied, untied


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What vismem remembers of checked data is this session's, in child processes too."""
    before = os.environ.get("VISMEM_CACHE")
    os.environ["VISMEM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["VISMEM_CACHE"]
    if before is not None:
        os.environ["VISMEM_CACHE"] = before


@pytest.fixture(params=[tied, untied], ids=lambda make: make.__name__)
def base(request: pytest.FixtureRequest) -> Base:
    """A tiny random model, with tied and with untied head."""
    return request.param()  # type: ignore[no-any-return]


@pytest.fixture(params=[tied, untied, mini, *FAMILIES], ids=lambda make: make.__name__)
def any_base(request: pytest.FixtureRequest) -> Base:
    """The tiny ones, the trained one, and every other family."""
    return request.param()  # type: ignore[no-any-return]
