"""The quick part tests every part: no file, no function and no room falls out but those that say why."""

from fnmatch import fnmatchcase

from quick import KEPT, SLOW, parted


def test_only_what_says_why_falls_out_whole(request):
    kept, left = parted(request.session.items)
    assert len(kept) + len(left) == len(request.session.items)

    def functions(items):
        return {item.nodeid.partition("[")[0] for item in items}

    whole = functions(left) - functions(kept)
    browsers = functions(item for item in left if item.get_closest_marker("browser"))
    assert not {name for name in whole - browsers if not any(fnmatchcase(name, pattern) for pattern in SLOW)}


def test_every_room_is_tested(request):
    def rooms(items):
        return {item.nodeid.rpartition("::")[0].rpartition("/")[0] for item in items}

    kept, left = parted(request.session.items)
    assert rooms(left) - rooms(kept) <= {"tests/differential"}


def test_of_many_cases_the_first_and_the_last_stay():
    class Item:
        def __init__(self, number):
            self.nodeid = f"tests/a.py::test_b[{number}]"

        def get_closest_marker(self, name):
            return None

    items = [Item(number) for number in range(30)]
    kept, left = parted(items)
    assert [item.nodeid for item in kept[:KEPT]] == [item.nodeid for item in items[:KEPT]]
    assert kept[-1] is items[-1]
    assert len(kept) + len(left) == 30
    assert KEPT < len(kept) < 12
