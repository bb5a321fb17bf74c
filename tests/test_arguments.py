"""Numbers on the command line.    python -m pytest tests/test_arguments.py"""

import argparse

import pytest

from models.support.arguments import SEED, between, positive


def test_what_is_a_number_of_that_range():
    assert [between(0, 8)(text) for text in ("0", "2.5", "8", "4.0", "1e0")] == [0, 2.5, 8, 4, 1]
    assert type(between(0, 8)("4.0")) is int and positive("1") == 1 and SEED(str(2**63 - 1)) == 2**63 - 1


@pytest.mark.parametrize("kind, text", [(between(0, 8), "nan"), (between(0, 8), "inf"), (between(0, 8), "8.01"), (between(0, 8), "x"),
                                        (between(0, 8), ""), (positive, "0"), (positive, "-2"), (positive, "2.5"), (positive, "nan"),
                                        (positive, "1e3"), (positive, "9" * 5000), (SEED, "-1"), (SEED, str(2**63))])
def test_anything_else_is_refused(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match="number from"):
        kind(text)
