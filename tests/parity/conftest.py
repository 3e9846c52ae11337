"""Models that several tests share: torch is imported only when one is asked for."""

import pytest


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A function from a case's name to its `Pair`; each is made once."""
    import reference

    made = {}

    def get(name):
        if name not in made:
            made[name] = reference.make_pair(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get
