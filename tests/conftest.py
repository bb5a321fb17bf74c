"""One thread: networks of a few thousand parameters only wait for a second one, and a busy machine makes them wait long."""

import os
import subprocess

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")   # of the commands that tests start, too


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("nothing can be mounted here")
    yield disk
    subprocess.run(["umount", disk])
