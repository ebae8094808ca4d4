"""Stands in for a completion server such as vLLM: it speaks the protocol, and misbehaves on request.

    python tests/helpers/completion_server.py --port=PORT --model=NAME

An answer is a function of the prompt, the seed and the limits alone: see `answer`. With faults, the first attempts at
some requests fail, each time in another way.
"""

import argparse
import collections
import contextlib
import http.server
import json
import random
import socket
import threading
import time

# What may go wrong with a request, once. The first ones end in an error, the others in an answer of no use.
FAULTS = (
    *("slow", "500", "429", "503", "cut", "closed", "no JSON"),
    *("other prompt", "beyond", "negative", "text", "long", "short", "after stop", "empty", "two answers"),
)


def answer(prompt, seed, max_tokens, stops):
    """The ids of the one right answer to a request."""
    rng = random.Random(f"{prompt} {seed}")
    ids = [rng.randrange(8, 262) for _ in range(rng.randint(1, max_tokens))]
    if rng.random() < 0.7:
        return [*ids[:-1], stops[0]]
    return (ids * max_tokens)[:max_tokens]


class Server(http.server.ThreadingHTTPServer):
    """Serves `models` on a free port of this machine, or on `port`, in threads of this process."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, models, faults=(), port=0, key="", slow_s=0.3, refuses=None):
        super().__init__(("127.0.0.1", port), _Handler)
        self.models, self.faults, self.key, self.slow_s = models, faults, key, slow_s
        self.refuses = refuses  # (status, text) for each request
        self.asked = []  # the body of each request for an answer
        self.answered = collections.Counter()  # (prompt, seed) of the right answers that were sent whole
        self.most_at_once = self.at_once = 0
        self.lock = threading.Lock()
        self.sockets = set()
        threading.Thread(target=self.serve_forever, args=[0.05], daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def get_request(self):
        connection, address = super().get_request()
        self.sockets.add(connection)
        return connection, address

    def close(self):
        """Ends at once, and cuts all connections."""
        self.shutdown()
        self.server_close()
        for connection in self.sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def send(self, status, value, cut=False, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut

    def do_GET(self):
        if self.path == "/health":
            return self.send(200, b"")
        if not self.is_allowed():
            return self.send(401, {"error": "Unauthorized"})
        if self.path != "/v1/models":
            return self.send(404, {"error": "there is no such page"})
        cards = [{"id": name, "object": "model", "root": name} for name in self.server.models]
        return self.send(200, {"object": "list", "data": cards})

    def is_allowed(self):
        return not self.server.key or self.headers.get("Authorization") == f"Bearer {self.server.key}"

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append(body)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            self.complete(server, body)
        finally:
            with server.lock:
                server.at_once -= 1

    def complete(self, server, body):
        if not self.is_allowed():
            return self.send(401, {"error": "Unauthorized"})
        if server.refuses:
            return self.send(server.refuses[0], {"error": server.refuses[1]})
        if body["model"] not in server.models:
            return self.send(404, {"error": f"the model {body['model']} does not exist"})
        prompt, stops, most = body["prompt"], body["stop_token_ids"], body["max_tokens"]
        ids, key = answer(prompt, body["seed"], most, stops), (tuple(prompt), body["seed"])
        before = sum((tuple(asked["prompt"]), asked["seed"]) == key for asked in server.asked) - 1
        rng = random.Random(str(key))
        chosen = rng.sample(server.faults, min(len(server.faults), rng.randint(0, 2)))
        fault = chosen[before] if before < len(chosen) else ""
        if fault == "slow":
            time.sleep(server.slow_s)
        elif fault in ("500", "429", "503"):
            return self.send(int(fault), {"error": "not now"})
        elif fault == "closed":
            self.close_connection = True
            return None
        elif fault == "no JSON":
            return self.send(200, b"<html>a proxy")
        wrong = {
            "beyond": [10**6],
            "negative": [-1],
            "text": ["ab"],
            "long": [*[9] * most, stops[0]],
            "short": [9] * (most - 1),
            "after stop": [stops[0], 9],
            "empty": [],
        }
        choice = {
            "index": 0,
            "text": "",
            "finish_reason": "stop" if ids[-1] in stops else "length",
            "token_ids": wrong.get(fault, ids),
            "prompt_token_ids": prompt[1:] if fault == "other prompt" else prompt,
        }
        choices = [choice] * (2 if fault == "two answers" else 1)
        if not body.get("return_token_ids"):
            del choice["token_ids"], choice["prompt_token_ids"]
        if not fault:
            with server.lock:
                server.answered[key] += 1
        return self.send(200, {"object": "text_completion", "choices": choices}, cut=fault == "cut")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    options = parser.parse_args()
    Server([options.model], port=options.port)
    print(f"serving {options.model}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
