"""What the programs share: a place to say what was seen, a wait that has an end, and a plain HTTP client."""

import json
import os
import ssl
import time
import urllib.error
import urllib.request

PATIENCE = int(os.environ.get("LAB_PATIENCE", "1"))  # how much longer everything may take here than usual

_context = ssl.create_default_context(cafile=os.environ["SLUICE_CA_FILE"])


def saw(what, value):
    print(f"{what}: {value if isinstance(value, str) else json.dumps(value)}", flush=True)


def until(what, probe, seconds=10.0):
    """Calls probe until it returns something true, for at most that many seconds, with patience."""
    seconds *= PATIENCE
    end = time.monotonic() + seconds
    while True:
        value = probe()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {seconds} s")
        time.sleep(0.025)


def get(url, headers=None):
    """Returns (status, content type, text); an HTTP error is an answer like any other."""
    request = urllib.request.Request(url, headers=headers or {})
    try:
        with urllib.request.urlopen(request, context=_context, timeout=20 * PATIENCE) as answer:
            return answer.status, answer.headers.get("content-type", ""), answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get("content-type", ""), error.read().decode()


def answering(url, headers=None):
    """Waits until a server in the sandbox answers through the edge with something else than 502."""

    def probe():
        answer = get(url, headers)
        return None if answer[0] == 502 else answer

    return until(f"{url} answers", probe)
