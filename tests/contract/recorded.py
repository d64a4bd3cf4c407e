"""Bytes of text-generation-inference 0.8 and 3.3 (from the contract) and vLLM (from its protocol), and a server that plays them."""

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
VLLM_MODELS = (
    b'{"object":"list","data":[{"id":"my-model","object":"model","created":1,"owned_by":"vllm","root":"/model","parent":null,'
    b'"max_model_len":100,"permission":[]}]}'
)
VLLM_VERSION = b'{"version":"0.11.0"}'
VLLM_TOKENS = b'{"count":4,"max_model_len":100,"tokens":[1,5,6,7],"token_strs":null}'
VLLM_WHOLE = (
    b'{"id":"cmpl-1","object":"text_completion","created":1,"model":"my-model","choices":[{"index":0,"text":"a b",'
    b'"logprobs":{"text_offset":[0,1],"token_logprobs":[-1.5,0.0],"tokens":["a"," b"],'
    b'"top_logprobs":[{"a":-1.5,"c":-2.0},{" b":0.0}]},'
    b'"finish_reason":"stop","stop_reason":" b","token_ids":[3,4],"prompt_token_ids":[1,5],'
    b'"prompt_logprobs":[null,{"5":{"logprob":-0.25,"rank":1,"decoded_token":"x"}}]}],"service_tier":null,'
    b'"usage":{"prompt_tokens":2,"total_tokens":4,"completion_tokens":2,"prompt_tokens_details":null},"kv_transfer_params":null}'
)
VLLM_OLD_WHOLE = (  # no token_ids before 0.10.2; no logprobs when details are not asked for
    b'{"id":"cmpl-1","object":"text_completion","created":1,"model":"my-model","choices":[{"index":0,"text":"a",'
    b'"logprobs":null,"finish_reason":"length","stop_reason":null,"prompt_logprobs":null}],'
    b'"usage":{"prompt_tokens":2,"total_tokens":3,"completion_tokens":1}}'
)
VLLM_STREAM = (  # the second chunk holds two tokens, the third only the end of sequence
    b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"my-model","choices":[{"index":0,"text":"\xe4\xbd\xa0",'
    b'"logprobs":{"text_offset":[0],"token_logprobs":[-0.5],"tokens":["\xe4\xbd\xa0"],"top_logprobs":[{"\xe4\xbd\xa0":-0.5}]},'
    b'"finish_reason":null,"stop_reason":null,"prompt_token_ids":[1,5],"token_ids":[6]}]}\n\n'
    b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"my-model","choices":[{"index":0,"text":" so",'
    b'"logprobs":null,"finish_reason":null,"stop_reason":null,"token_ids":[7,8]}]}\n\n'
    b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"my-model","choices":[{"index":0,"text":"",'
    b'"logprobs":null,"finish_reason":"stop","stop_reason":null,"token_ids":[2]}]}\n\n'
    b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"my-model","choices":[],'
    b'"usage":{"prompt_tokens":2,"total_tokens":6,"completion_tokens":4}}\n\n'
    b"data: [DONE]\n\n"
)
VLLM_CHAT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"my-model","choices":[{"index":0,'
    b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"my-model","choices":[{"index":0,'
    b'"delta":{"content":"Hi"},"logprobs":null,"finish_reason":null}]}\n\n'
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"my-model","choices":[{"index":0,'
    b'"delta":{"content":""},"logprobs":null,"finish_reason":"stop","stop_reason":null}]}\n\n'
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"my-model","choices":[],'
    b'"usage":{"prompt_tokens":3,"total_tokens":5,"completion_tokens":2}}\n\n'
    b"data: [DONE]\n\n"
)
VLLM_NO_ROUTE = b'{"detail":"Not Found"}'
VLLM_NO_MODEL = b'{"error":{"message":"The model `tgi` does not exist.","type":"NotFoundError","param":"model","code":404}}'
VLLM_TOO_LONG = (
    b'{"error":{"message":"This model\'s maximum context length is 100 tokens.","type":"BadRequestError","param":null,"code":400}}'
)
VLLM_OLD_TOO_LONG = (
    b'{"object":"error","message":"This model\'s maximum context length is 100 tokens.",'
    b'"type":"BadRequestError","param":null,"code":400}'
)
UNHEALTHY = b'{"error":"unhealthy","error_type":"healthcheck"}'
OVERLOADED = b'{"error":"Model is overloaded","error_type":"overloaded"}'


class Stub:
    """Answers request after request from a list of (status, body chunks, pause between chunks); the last one repeats. ``routes``:
    by path the same, or what makes it from the request's document; ``headers`` come with every answer."""

    def __init__(self, *answers, port=0, routes=None, headers=()):
        self.answers, self.seen, self.left, stub = list(answers), [], [], self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                self.do_POST()

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                stub.seen.append((self.path, json.loads(body) if body else None, self.headers.get("authorization")))
                found = (routes or {}).get(self.path, stub.answers[min(len(stub.seen), len(stub.answers)) - 1])
                status, chunks, pause = found(stub.seen[-1][1]) if callable(found) else found
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                try:
                    for chunk in [chunk for chunk in chunks if chunk] + [b""]:
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                        self.wfile.flush()
                        time.sleep(pause)
                except OSError:
                    self.close_connection = True  # the client has gone
                    stub.left.append(self.path)

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
