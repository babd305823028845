"""When Python collects garbage in a stage."""

import gc
import weakref

import pytest

from cgspn.distill.garbage import Garbage


class Cycle:
    def __init__(self):
        self.own = self


def left(make=Cycle):
    """A reference to something that only a collection frees."""
    return weakref.ref(make())


@pytest.fixture(autouse=True)
def automatic():
    was = gc.isenabled()
    gc.enable()
    yield
    (gc.enable if was else gc.disable)()


def test_cycles_of_a_step_are_collected_after_its_launch_and_not_before():
    with Garbage(True) as garbage:
        assert gc.isenabled()  # workers that start with the first batch inherit this
        garbage.after_launch()
        assert not gc.isenabled()
        cycle = left()
        [Cycle() for _ in range(5000)]
        assert cycle() is not None
        garbage.after_launch()
        assert cycle() is None
    assert gc.isenabled()


def test_a_snapshot_collects_what_is_old():
    with Garbage(True) as garbage:
        old = Cycle()
        cycle = weakref.ref(old)
        for _ in range(3):
            garbage.after_launch()
        del old
        garbage.after_launch()
        garbage.at_snapshot()
        assert cycle() is None


@pytest.mark.parametrize("before", [True, False])
def test_an_error_leaves_collections_as_they_were(before):
    if not before:
        gc.disable()

    def step():
        with Garbage(True) as garbage:
            garbage.after_launch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        step()
    assert gc.isenabled() == before


def test_unwanted_nothing_changes():
    with Garbage(False) as garbage:
        garbage.after_launch()
        assert gc.isenabled()
