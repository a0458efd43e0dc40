"""Processes that a test looks for."""

import time


def is_running(pid):
    """Whether there is such a process, and it is no zombie that its parent has not asked about yet."""
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(pid, seconds=10.0):
    """Whether it is gone within some seconds."""
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


def children(pid, seconds=20.0):
    """Processes that `pid` has started, waiting for the first."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with open(f"/proc/{pid}/task/{pid}/children") as stream:
            found = [int(child) for child in stream.read().split()]
        if found:
            return found
        time.sleep(0.02)
    return []
