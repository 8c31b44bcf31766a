"""What importing the routers costs."""

from __future__ import annotations

import subprocess
import sys


def test_routing_does_not_import_transformers() -> None:
    code = "import sys, tiny_onn.routing; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tiny_onn_alone_imports_nothing_heavy() -> None:
    code = (
        "import sys, tiny_onn; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
