import numpy as np
import pytest

from hcodec_core.inference.spans import starts_of, strays

INF = np.inf


def law(margins, max_span):
    """Starts as the codec makes them."""
    starts, run = [], 0
    for frame, margin in enumerate(margins):
        own = frame == 0 or margin <= 0
        starts.append(own or (frame - run) % max_span == 0)
        run = frame if own else run
    return np.array(starts)


def test_starts_follow_from_spans():
    assert starts_of(np.array([1, 3, 2], np.int32)).tolist() == [1, 1, 0, 0, 1, 0]


def test_what_follows_from_the_margins_is_no_stray():
    rng = np.random.default_rng(0)
    for _ in range(50):
        margins = rng.normal(0.3, 0.3, 40)
        assert strays(law(margins, 4), margins, 4) == {}


@pytest.mark.parametrize("frame", [3, 9, 17])
@pytest.mark.parametrize("usual", [0.5, -0.5])
def test_one_decision_the_other_way_is_one_stray(frame, usual):
    margins = np.full(40, usual)
    other = margins.copy()
    other[frame] = -usual
    changed = law(other, 4)
    assert (changed != law(margins, 4)).any()
    # The bounds after it move along, and are no decisions of their own.
    assert strays(changed, margins, 4) == {frame: 0.5}


def test_what_no_decision_explains_is_never_a_tie():
    margins = np.full(8, 0.5)
    too_long = np.array([1, 0, 0, 0, 0, 0, 1, 0], bool)
    assert strays(too_long, margins, 4)[4] == INF
    assert strays(np.zeros(3, bool), margins[:3], 4)[0] == INF
