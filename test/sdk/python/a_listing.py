"""Program a: a server in the sandbox, reached by its public name; the closed-port answer once it is gone."""

import json

from check import answering, get, saw, until
from e2b import Sandbox

sandbox = Sandbox.create()
try:
    process = sandbox.commands.run("python -m http.server 3000", background=True)
    url = "https://" + sandbox.get_host(3000)
    status, _, text = answering(url)
    assert status == 200 and "Directory listing for /" in text, (status, text)
    saw("listing", "Directory listing for /")

    assert process.kill() is True

    def closed():
        answer = get(url)
        return answer if answer[0] == 502 else None

    _, _, text = until("the port closes", closed)
    assert json.loads(text) == {
        "sandboxId": sandbox.sandbox_id,
        "message": "The sandbox is running but port is not open",
        "port": 3000,
        "code": 502,
    }, text
    saw("after kill", text)
finally:
    sandbox.kill()
