"""Whatever a kill leaves behind, at any call that changes the disk, is cleared or finished by the next start."""

import pytest
from write_sites import KINDS, Place, Tries


def names_a_part_of_a_run(place: Place) -> bool:
    """Whether a place is in the instant before a file or folder of a run gets its name."""
    call, *lines = place.site
    own = next((line for line in lines if not line.startswith("runtime/")), "")
    return call in ("rename", "replace") and not place.after and own.startswith(("training/run/", "training/student/"))


def test_a_run_that_is_ended_at_each_of_its_renames_ends_as_if_nothing_had_happened(tmp_path):
    ends, problem = Tries(KINDS["labels"], tmp_path).march(names_a_part_of_a_run)
    assert problem == ""
    assert ends > 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_commands_that_are_ended_at_any_write_end_as_if_nothing_had_happened(tmp_path, kind):
    tries = Tries(KINDS[kind], tmp_path)
    ends, problem = tries.march()
    assert (problem, ends > 40) == ("", True)
    for command, place in tries.places(every=False):
        assert tries.attempt(command, place) == "", place
