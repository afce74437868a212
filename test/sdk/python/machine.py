"""What the programs about virtual machines share: a process that remembers who it is, to be found again after a pause or in a copy."""

import uuid

from check import until

_COUNTER = """
import os, sys, time
name, n = sys.argv[1], 0
while True:
    n += 1
    with open('/tmp/count.new', 'w') as f: f.write('%s %d' % (name, n))
    os.rename('/tmp/count.new', '/tmp/count')
    time.sleep(0.1)
"""


def start_counter(sandbox):
    """Starts a process that counts, and knows the name that it is given in its memory only."""
    name = str(uuid.uuid4())
    sandbox.files.write("/tmp/counter.py", _COUNTER)
    sandbox.commands.run(f"python /tmp/counter.py {name}", background=True, timeout=0)
    counted(sandbox, name, 3)
    return name


def counted(sandbox, name, n):
    """Waits until the counter of that name has come further than n, and returns how far."""

    def probe():
        if not sandbox.files.exists("/tmp/count"):
            return 0
        who, count = sandbox.files.read("/tmp/count").split()
        assert who == name, f"another process counts: {who}"
        return int(count) if int(count) > n else 0

    return until(f"the counter comes past {n}", probe)
