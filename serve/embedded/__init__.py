"""A server with the wire contract of text-generation-inference 3.3, in one process, on a CPU or one GPU.

errors      the JSON errors                 serde      request bodies and the plain-text errors of bad ones
params      request fields as data          validation the checks and their order
text        tokenizer, template, streaming  sampling   one request's choice of the next token
cache       keys and values of all requests attention, packed: decoding a row gives the same numbers in any batch
engine      prefill and decode              batching   the model thread: requests join and leave between tokens
service     limits, permits, cancellation   shapes     response bodies, key order included
http        routes                          openai     /v1 routes
args        launcher flags, environment     metrics, openapi
"""
