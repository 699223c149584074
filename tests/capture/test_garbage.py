"""Collections are paused while graphs are made, and go on afterwards as before."""

import gc
from collections.abc import Iterator

import pytest

from unrollc.capture.garbage import collection_paused


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.enable()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_state_is_put_back(enabled: bool) -> None:
    if not enabled:
        gc.disable()
    with pytest.raises(KeyError), collection_paused():
        assert not gc.isenabled()
        with collection_paused():
            pass
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled() is enabled
