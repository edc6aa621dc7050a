"""How a call is packed for the native library."""

from __future__ import annotations

import pytest

from colltensor.backends.shm import requests
from colltensor.types import DTYPES
from colltensor.view import BufferView

HEAD = 18
"""Fields before the views: native/src/request.h."""
VIEW = BufferView.from_address(4096, (6,), DTYPES["float32"], owner=None)
WORDS = (1, 2, 3)


@pytest.mark.parametrize(
    ("destination", "source", "sent", "received", "views"),
    [
        (1, -1, VIEW, None, [4096, 0]),
        (-1, 2, None, VIEW, [4096, 0]),
        (1, 2, VIEW, VIEW, [4096, 0, 4096, 0]),
        (1, -1, None, None, [0, 0]),
        (-1, 2, None, None, [0, 0]),
    ],
)
def test_every_transfer_has_a_view(
    destination: int,
    source: int,
    sent: BufferView | None,
    received: BufferView | None,
    views: list[int],
) -> None:
    """Also one of nothing: the library reads one for each peer."""
    request = requests.transfer(sent, destination, WORDS, received, source, WORDS, 0)
    assert request.tolist()[HEAD:] == views
