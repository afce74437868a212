"""Program i: a sandbox whose time is over is paused, and woken by traffic. Who may not pass wakes nothing."""

from concurrent.futures import ThreadPoolExecutor

from check import PATIENCE, answering, get, saw, until
from e2b import Sandbox

TOKEN = "e2b-traffic-access-token"
sandbox = Sandbox.create(
    timeout=300 * PATIENCE,
    lifecycle={"on_timeout": "pause", "auto_resume": True},
    network={"allow_public_traffic": False},
)


def state():
    return Sandbox.get_info(sandbox.sandbox_id).state.value


try:
    url = "https://" + sandbox.get_host(3000)
    right = {TOKEN: sandbox.traffic_access_token}
    sandbox.commands.run("python -m http.server 3000", background=True, timeout=0)
    assert answering(url, right)[0] == 200
    sandbox.set_timeout(1)
    until("it is paused when its time is over", lambda: state() == "paused", 20)

    assert get(url)[0] == 403
    assert get(url, {TOKEN: "f" * 64})[0] == 403
    assert state() == "paused"
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: get(url, right)[0], range(10)))
    assert answers == [200] * 10, answers
    assert state() == "running"
    saw("wake", "ten requests with the token woke it, those without did not")
finally:
    sandbox.kill()
