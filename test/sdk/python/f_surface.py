"""Program f: the surface of files, commands, pty and lifecycle that programs use."""

from check import PATIENCE, get, saw, until
from e2b import CommandExitException, FileNotFoundException, FilesystemEventType, PtySize, Sandbox, SandboxQuery, TimeoutException


def raises(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


sandbox = Sandbox.create(metadata={"test": "f python", "a b": "c&d=e"}, envs={"FROM_CREATE": "yes"}, timeout=120 * PATIENCE)
try:
    # files
    files = sandbox.files
    assert files.write("hello.txt", "hello, wörld").path == "/home/user/hello.txt"
    assert files.read("hello.txt") == "hello, wörld"
    data = bytes(i * 31 & 0xFF for i in range(3 << 20))
    files.write("deep/er/data.bin", data)
    assert bytes(files.read("deep/er/data.bin", format="bytes")) == data
    assert files.write("empty", "") and files.read("empty") == ""
    files.write_files([{"path": "many/1", "data": "one"}, {"path": "many/2", "data": "two"}])
    assert sorted(e.name for e in files.list("many")) == ["1", "2"]
    assert files.make_dir("made") is True and files.make_dir("made") is False
    files.rename("hello.txt", "made/renamed.txt")
    assert not files.exists("hello.txt")
    info = files.get_info("made/renamed.txt")
    assert (info.size, info.owner, info.permissions) == (13, "user", "-rw-r--r--"), info
    files.remove("made")
    raises(FileNotFoundException, lambda: files.read("made/renamed.txt"))
    watch = files.watch_dir("many", recursive=True)
    files.write("many/3", "three")
    events = []

    def created():
        events.extend(watch.get_new_events())
        return any(e.name == "3" and e.type == FilesystemEventType.CREATE for e in events)

    until("the watcher reports", created)
    watch.stop()
    assert get(sandbox.download_url("many/1", use_signature_expiration=60))[2] == "one"
    saw("files", "write read list watch rename remove exists info signed")

    # commands
    run = sandbox.commands.run
    out = []
    result = run('echo "$FROM_CREATE $FROM_RUN $(pwd) $(whoami)"; echo err >&2', envs={"FROM_RUN": "too"}, cwd="/tmp", on_stdout=out.append)
    assert result.stdout == "yes too /tmp user\n" and result.stderr == "err\n", result
    assert "".join(out) == result.stdout
    assert run("id -u", user="root").stdout == "0\n"
    assert raises(CommandExitException, lambda: run("exit 3")).exit_code == 3
    raises(TimeoutException, lambda: run("sleep 31", timeout=0.5))
    until("the timed-out process is gone", lambda: run("pgrep -fx 'sleep 31' || true").stdout == "")
    cat = run("cat", background=True, stdin=True)
    cat.send_stdin("through stdin\n")
    cat.close_stdin()
    assert cat.wait().stdout == "through stdin\n"
    sleeper = run("sleep 60", background=True)
    assert any(p.pid == sleeper.pid for p in sandbox.commands.list())
    joined = sandbox.commands.connect(sleeper.pid)
    assert sandbox.commands.kill(sleeper.pid) is True
    raises(CommandExitException, joined.wait)
    assert sandbox.commands.kill(999999) is False
    saw("commands", "stdout stderr stdin env cwd user exit timeout kill list connect")

    # pty
    screen = bytearray()
    pty = sandbox.pty.create(PtySize(rows=24, cols=80))
    sandbox.pty.resize(pty.pid, PtySize(rows=30, cols=100))
    sandbox.pty.send_stdin(pty.pid, b"stty size; tty; exit\n")
    assert pty.wait(on_pty=screen.extend).exit_code == 0
    assert b"30 100" in screen and b"/dev/pts/" in screen, bytes(screen)
    saw("pty", "input, size and exit")

    # lifecycle
    assert sandbox.get_info().metadata == {"test": "f python", "a b": "c&d=e"}
    assert sandbox.is_running() is True
    before = sandbox.get_info().end_at
    sandbox.set_timeout(120 * PATIENCE + 180)
    assert (sandbox.get_info().end_at - before).total_seconds() > 100
    listed = Sandbox.list(query=SandboxQuery(metadata={"a b": "c&d=e"})).next_items()
    assert [s.sandbox_id for s in listed] == [sandbox.sandbox_id]
    assert Sandbox.connect(sandbox.sandbox_id).files.read("many/1") == "one"
    saw("lifecycle", "get_info is_running set_timeout list connect")
finally:
    assert sandbox.kill() is True
assert sandbox.is_running() is False
assert sandbox.kill() is False
saw("end", "kill() true then false")
