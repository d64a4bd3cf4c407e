"""How a running server is reached and tried, and the end of what it has said."""

from pathlib import Path
from typing import List, Optional

import requests


def url_of(host: str, port: int) -> str:
    """Where this machine reaches a server that listens on ``host``."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, "[%s]" % host if ":" in host else host)
    return "http://%s:%d" % (reached, port)


def curl_lines(url: str, api_key: bool = False, routes: str = "tgi", model: str = "") -> List[str]:
    """Commands to try the server with. ``routes``: "tgi", "tgi-0.8" (no chat) or "openai", which wants the ``model``'s name."""
    key = " -H 'Authorization: Bearer KEY'" if api_key else ""
    head = "curl %s/%s -X POST -H 'Content-Type: application/json'%s -d '%s'"
    named = '"model":"%s",' % model if routes == "openai" else ""
    chat = '{%s"messages":[{"role":"user","content":"Hello"}],"max_tokens":20,"temperature":0}' % named
    if routes == "openai":
        body = '{%s"prompt":"Hello","max_tokens":20,"temperature":0}' % named
        return [head % (url, "v1/completions", key, body), head % (url, "v1/chat/completions", key, chat)]
    body = '{"inputs":"Hello","parameters":{"max_new_tokens":20}}'
    lines = [head % (url, "generate", key, body), head.replace("curl", "curl -N") % (url, "generate_stream", key, body)]
    return lines if routes == "tgi-0.8" else lines + [head % (url, "v1/chat/completions", key, chat)]


def healthy(url: str) -> bool:
    with requests.Session() as session:
        session.trust_env = False  # no proxy between this machine and itself
        try:
            return session.get(url + "/health", timeout=5).status_code == 200
        except requests.RequestException:
            return False


def tail(log: str, lines: Optional[int] = 20) -> str:
    """The last lines of a file; None: all of them."""
    try:
        said = Path(log).read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(said if lines is None else said[-lines:])
    except OSError:
        return "(no log)"
