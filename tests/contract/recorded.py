"""Byte streams of text-generation-inference 0.8 and 3.3, written from the contract, and a server that plays answers back."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STREAM_33 = (
    b'data: {"index":1,"token":{"id":5,"text":"","logprob":-0.5,"special":false},"generated_text":null,"details":null}\n\n'
    b":\n\n"
    b'data: {"index":2,"token":{"id":6,"text":"\xe4\xbd\xa0","logprob":null,"special":false},'
    b'"top_tokens":[{"id":6,"text":"x","logprob":-1.0,"special":false}],"generated_text":null,"details":null}\n\n'
    b'data: {"index":3,"token":{"id":2,"text":"</s>","logprob":0.0,"special":true},"generated_text":"\xe4\xbd\xa0",'
    b'"details":{"finish_reason":"eos_token","generated_tokens":3,"seed":7,"input_length":4}}\n\n'
)
STREAM_08 = (
    b'data:{"token":{"id":5,"text":"","logprob":-0.5,"special":false},"generated_text":null,"details":null}\n\n'
    b'data:{"token":{"id":6,"text":"\xe4\xbd\xa0","logprob":null,"special":false},"generated_text":null,"details":null}\n\n'
    b'data:{"token":{"id":2,"text":"</s>","logprob":0.0,"special":true},"generated_text":"\xe4\xbd\xa0",'
    b'"details":{"finish_reason":"eos_token","generated_tokens":3,"seed":7}}\n\n'
)
CHAT_33 = (
    b'data: {"object":"chat.completion.chunk","id":"","created":1,"model":"m","system_fingerprint":"f",'
    b'"choices":[{"index":0,"delta":{"role":"assistant","content":"Hi"},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
    b'data: {"object":"chat.completion.chunk","id":"","created":1,"model":"m","system_fingerprint":"f",'
    b'"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":"stop"}],"usage":null}\n\n'
    b'data: {"object":"chat.completion.chunk","id":"","created":1,"model":"m","system_fingerprint":"f",'
    b'"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}\n\n'
    b"data: [DONE]\n\n"
)
WHOLE = (
    b'{"generated_text":"ab","details":{"finish_reason":"length","generated_tokens":2,"seed":9,"prefill":[{"id":1,"text":"x","logprob":null}],'
    b'"tokens":[{"id":3,"text":"a","logprob":-1.5,"special":false},{"id":4,"text":"b","logprob":0.0,"special":false}],'
    b'"best_of_sequences":[{"generated_text":"cd","finish_reason":"length","generated_tokens":2,"seed":1,"prefill":[],"tokens":[]}]}}'
)
UNHEALTHY = b'{"error":"unhealthy","error_type":"healthcheck"}'
OVERLOADED = b'{"error":"Model is overloaded","error_type":"overloaded"}'


class Stub:
    """Answers request after request from a list of (status, body chunks, pause between chunks); the last one repeats."""

    def __init__(self, *answers, port=0):
        self.answers, self.seen, stub = list(answers), [], self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                self.do_POST()

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                stub.seen.append((self.path, json.loads(body) if body else None, self.headers.get("authorization")))
                status, chunks, pause = stub.answers[min(len(stub.seen), len(stub.answers)) - 1]
                self.send_response(status)
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                try:
                    for chunk in [chunk for chunk in chunks if chunk] + [b""]:
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                        self.wfile.flush()
                        time.sleep(pause)
                except OSError:
                    self.close_connection = True  # the client has gone

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = "http://127.0.0.1:%d" % self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def whole(body, status=200):
    return (status, [body], 0)


def cut(body, size=7):
    return (200, [body[start : start + size] for start in range(0, len(body), size)], 0)
