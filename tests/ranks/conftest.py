"""What the tests of ranks share: the numbers of one run of four processes."""

import pytest

from .processes import run


@pytest.fixture(scope="session")
def matrix(tmp_path_factory):
    """Every case of the table, computed by processes: for each rank its numbers by the case's name."""
    return run("matrix", 4, tmp_path_factory.mktemp("matrix"))
