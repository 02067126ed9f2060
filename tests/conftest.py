"""One thread per process, also in the ones that tests start: xdist already uses every core."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
