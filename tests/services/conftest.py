"""What the tests of pages share."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.browsers import Watched, watched
from tests.support.dashboards import Dashboard


@pytest.fixture
def page(browser: Any, service: Dashboard) -> Iterator[Watched]:
    """A page of the test file's own service."""
    with watched(browser, service.url) as page:
        yield page
