"""What all tests share."""

import os
import tempfile

# Tests run beside others: a thread that waits must not keep a core busy. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Code of exported models is copied here when it is loaded, not into the user's own cache.
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="tiny-onn-tests-"))
