"""Greedy answers of transformers and of the embedded server's engine. Call them without gradients."""

import torch


def of_model(model, ids, count):
    """``count`` tokens, each from a plain forward pass over all before it."""
    out = []
    for _ in range(count):
        out.append(int(model(torch.tensor([ids + out])).logits[0, -1].argmax()))
    return out


def of_engine(engine, ids, count):
    """-> (tokens, logits of every step), in row 0, over whatever was there."""
    logits, tokens, seen = engine.prefill(0, ids, 0)[0], [], []
    for step in range(count):
        seen.append(logits.clone())
        tokens.append(int(logits.argmax()))
        logits = engine.decode([tokens[-1]], [len(ids) + step])[0]
    return tokens, seen
