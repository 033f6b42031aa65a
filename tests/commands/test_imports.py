"""Imports without searches for garbage: what is there stays where it can be found."""

import gc
import weakref

import pytest

from funmatch.commands.common.imports import no_collections


class Node:
    """Refers to itself, so that only a search finds that nobody else does."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture(autouse=True)
def nothing_is_frozen():
    """Thaws what the tests froze for their own speed, and freezes it again."""
    was_frozen = gc.get_freeze_count()
    gc.unfreeze()
    yield
    gc.enable()
    gc.unfreeze()
    if was_frozen:
        gc.freeze()


def test_garbage_of_the_block_is_found_by_later_searches_alone():
    node = Node()
    found = weakref.ref(node)
    with no_collections():
        assert not gc.isenabled()
        made = [Node()]
        del node
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    assert any(each is made for each in gc.get_objects(2)), "as old as can be: young ones are searched often"
    gc.collect()
    assert found() is None


def test_what_others_froze_stays_frozen_and_disabled_stays_disabled():
    gc.freeze()
    gc.disable()
    with no_collections():
        pass
    assert gc.get_freeze_count() > 0
    assert not gc.isenabled()
    with pytest.raises(ImportError), no_collections():
        raise ImportError
    assert not gc.isenabled()
