"""What all tests share."""

import os

# Tests run beside others: a thread that waits must not keep a core busy. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
