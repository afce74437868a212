"""Program b: a private sandbox is reached with its token only; a person's browser gets a page."""

import json

from check import answering, get, saw
from e2b import Sandbox

TOKEN = "e2b-traffic-access-token"
sandbox = Sandbox.create(network={"allow_public_traffic": False})
try:
    assert sandbox.traffic_access_token, "a private sandbox has a traffic token"
    sandbox.commands.run("python -m http.server 3000", background=True, timeout=0)
    url = "https://" + sandbox.get_host(3000)
    status, _, _ = answering(url, {TOKEN: sandbox.traffic_access_token})
    assert status == 200, status

    status, _, text = get(url)
    assert status == 403 and f"'{TOKEN}' is missing" in json.loads(text)["message"], text
    saw("no token", text)
    status, _, text = get(url, {TOKEN: "f" * 64})
    assert status == 403 and "is invalid" in json.loads(text)["message"], text
    saw("wrong token", text)
    status, kind, text = get(url, {"User-Agent": "Mozilla/5.0 (X11; Linux x86_64) Firefox/140.0", "Accept": "text/html"})
    assert status == 403 and kind.startswith("text/html") and "Missing Traffic Access Token" in text, (status, kind)
    saw("browser", kind)

    assert Sandbox.connect(sandbox.sandbox_id).traffic_access_token == sandbox.traffic_access_token
    saw("with token", "200, and connect() returns the same token")
finally:
    sandbox.kill()
