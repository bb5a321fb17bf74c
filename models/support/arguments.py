"""Numbers on the command line: types for argparse, which then refuses by the flag's name."""

import argparse
import math


def between(low, high, whole=False):
    """A type of argument: a number from low to high, an int where it is whole; with `whole` nothing else."""
    def number(text):
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is no {'whole ' * whole}number from {low} to {high}")
        return int(value) if value == int(value) else value
    return number


positive = between(1, 2**31 - 1, whole=True)
SEED = between(0, 2**63 - 1, whole=True)
