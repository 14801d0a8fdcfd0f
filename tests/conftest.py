"""Settings of the whole test run."""

import os

# Threads that spin at barriers take the cores from each other where other processes run too. Read when torch is
# imported, so it has to be here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
