"""One thread: networks of a few thousand parameters only wait for a second one, and a busy machine makes them wait long."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")   # of the commands that tests start, too
