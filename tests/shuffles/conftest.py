"""What the tests of swaps and assignments share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from esparse.shuffles import swap


@pytest.fixture(scope="module", params=["compiled", "plain"])
def maxima(request: pytest.FixtureRequest) -> Iterator[None]:
    """With the compiled sums of maxima and without them, as where numba is not installed."""
    if request.param == "compiled":
        pytest.importorskip("numba")
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swap, "_compiled", lambda: None)
        yield
