"""Models that several tests share: torch is imported only when one is asked for."""

import functools

import pytest


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A function from a case's name to its `Pair`; each is made once."""
    import reference

    @functools.cache
    def get(name, multimodal=False):
        make = reference.make_multimodal if multimodal else reference.make_pair
        return make(name, tmp_path_factory.mktemp(name))

    return get
