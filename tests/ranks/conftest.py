"""What the tests of ranks share: the numbers of one run of four processes."""

import pytest

from .processes import run


def asked(request, fixture, parameter):
    """Name the cases that tests of this session take: processes compute no others, nor compile kernels for them."""
    taken = (item for item in request.session.items if fixture in getattr(item, "fixturenames", ()))
    cases = [item.callspec.params[parameter].name for item in taken if _has(item, parameter)]
    return {"ASKED": ",".join(sorted(set(cases)))}


def _has(item, parameter):
    return hasattr(item, "callspec") and parameter in item.callspec.params


@pytest.fixture(scope="session")
def matrix(request, tmp_path_factory):
    """The cases of the table, computed by processes: for each rank its numbers by the case's name."""
    return run("matrix", 4, tmp_path_factory.mktemp("matrix"), **asked(request, "matrix", "case"))


@pytest.fixture(scope="session")
def forms(request, tmp_path_factory):
    """The masked and ghost batches of their table, and what is called wrongly."""
    return run("forms", 4, tmp_path_factory.mktemp("forms"), **asked(request, "forms", "form"))
