import logging

import pytest


@pytest.fixture(autouse=True)
def logging_as_it_was():
    """The command line sets up logging for its own process; here it shares one with other tests."""
    root, ours = logging.getLogger(), logging.getLogger("hcodec_core")
    before = list(root.handlers), root.level, ours.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])
