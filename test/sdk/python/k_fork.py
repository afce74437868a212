"""Program k: sandboxes made from a snapshot, and forks, have the files and the running process, and go ways of their own."""

from check import PATIENCE, saw
from e2b import Sandbox
from machine import counted, start_counter

LIFE = 300 * PATIENCE
sandbox = Sandbox.create(timeout=LIFE)


def goes_its_own_way(what, copy, name, n):
    try:
        assert copy.files.read("shared.txt") == "from before"
        counted(copy, name, n)
        copy.files.write("shared.txt", "changed")
        assert sandbox.files.read("shared.txt") == "from before"
        copy.commands.run("pkill -f '[c]ounter.py'")
        counted(sandbox, name, counted(sandbox, name, 0))
        saw(what, "has the files and the process, and goes its own way")
    finally:
        copy.kill()


try:
    sandbox.files.write("shared.txt", "from before")
    name = start_counter(sandbox)
    n = counted(sandbox, name, 3)
    snapshot = sandbox.create_snapshot()
    goes_its_own_way("snapshot", Sandbox.create(snapshot.snapshot_id, timeout=LIFE), name, n)
    assert Sandbox.delete_snapshot(snapshot.snapshot_id) is True
    (fork,) = sandbox.fork(count=1, timeout=LIFE)
    assert isinstance(fork, Sandbox), fork
    goes_its_own_way("fork", fork, name, n)
finally:
    sandbox.kill()
