"""Set before torch is loaded: threads that wait for each other at every small operation sleep instead of spinning."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
