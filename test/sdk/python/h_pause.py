"""Program h: a paused sandbox goes on where it was: processes, files and servers."""

from check import PATIENCE, answering, saw
from e2b import Sandbox
from machine import counted, start_counter

sandbox = Sandbox.create(timeout=300 * PATIENCE)
try:
    sandbox.files.write("notes.txt", "written before")
    name = start_counter(sandbox)
    sandbox.commands.run("python -m http.server 3000", background=True, timeout=0)
    url = "https://" + sandbox.get_host(3000)
    assert answering(url)[0] == 200
    before = counted(sandbox, name, 3)

    assert sandbox.pause() is True
    assert sandbox.pause() is False
    saw("pause", f"True, then False; it had counted to {before}")

    again = Sandbox.connect(sandbox.sandbox_id, timeout=300 * PATIENCE)
    after = counted(again, name, before)
    assert again.files.read("notes.txt") == "written before"
    assert answering(url)[0] == 200
    saw("connect", f"the same process has counted on to {after}")
finally:
    assert sandbox.kill() is True
