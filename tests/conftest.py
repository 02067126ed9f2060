"""One thread per process, also in the ones that tests start: xdist already uses every core."""

import os
import signal

# Read when torch is imported. Sums round otherwise with more threads, so no other number will do.
os.environ["OMP_NUM_THREADS"] = "1"

# Started in the background of a script, a process ignores Ctrl-C, and so do its children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
