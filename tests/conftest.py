"""Fixtures that many tests share."""

import pytest
from bases import FAMILIES, Base, mini, tied, untied


@pytest.fixture(params=[tied, untied], ids=lambda make: make.__name__)
def base(request: pytest.FixtureRequest) -> Base:
    """A tiny random model, with tied and with untied head."""
    return request.param()  # type: ignore[no-any-return]


@pytest.fixture(params=[tied, untied, mini, *FAMILIES], ids=lambda make: make.__name__)
def any_base(request: pytest.FixtureRequest) -> Base:
    """The tiny ones, the trained one, and every other family."""
    return request.param()  # type: ignore[no-any-return]
