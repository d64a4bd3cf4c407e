"""A server with the wire contract of text-generation-inference 3.3, in one process, on a CPU or one GPU.

The way of a request, and where each step lives:

http, wire      routes; bodies within their limit, clients that go away, server-sent events
serde, params   JSON to checked values and the plain-text errors of what is not; the fields of all bodies as tables
validation      the checks in their order -> Accepted
service         permits, tokenizing beside the event loop, figures
batching, row   the model thread: requests join and leave between tokens
engine, cache   prefill and decode of rows, in the thread of worker; recorded and fused: faster on a GPU
attention       a row's bits do not depend on the batch: kernel on a GPU, packed on a CPU; alibi gives it to bloom
sampling, text  the next token and its spelling; chat templates
native, shapes  bodies of the native routes, key order included; openai has those of /v1
args, build     launcher flags and environment -> a running server; metrics; schemas and openapi: what /docs shows
"""
