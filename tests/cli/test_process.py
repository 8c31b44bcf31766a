"""What the command line sets before torch is loaded."""

import platform
import subprocess
import sys

import pytest

from tiny_onn.cli import process

FAULTS = """
import resource
from tiny_onn.cli.process import keep_memory
{call}
import torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(12_000_000).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def page_faults(call):
    code = FAULTS.format(call=call)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_used_again():
    assert page_faults("assert keep_memory()") < 1000 < page_faults("")


def test_the_users_own_settings_go_first(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    assert not process.keep_memory()
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    process.tune()
    assert process.os.environ["OMP_WAIT_POLICY"] == "active"
    assert process.os.environ["GOMP_SPINCOUNT"] == "7"
