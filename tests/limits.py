"""Models as published, and a short way to ask the judge about them."""

from serve.limits import Files, Question, judge
from tests.real_configs import BLOOM_560M


def llama(hidden=4096, ffn=11008, blocks=32, heads=32, kv_heads=None, **more):
    return dict({"model_type": "llama", "vocab_size": 32000, "hidden_size": hidden, "intermediate_size": ffn,
                 "num_hidden_layers": blocks, "num_attention_heads": heads, "num_key_value_heads": kv_heads or heads,
                 "max_position_embeddings": 2048, "torch_dtype": "float16"}, **more)  # fmt: skip


def bloom(hidden=4096, blocks=30, heads=32, **more):
    return dict(BLOOM_560M, n_embed=hidden, n_layer=blocks, num_attention_heads=heads, **more)


LLAMA_7B, LLAMA_13B, LLAMA_30B = llama(), llama(5120, 13824, 40, 40), llama(6656, 17920, 60, 52)
LLAMA_70B = llama(8192, 28672, 80, 64, 8)
BLOOM_7B = bloom()
QWEN2_7B = {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768,
            "torch_dtype": "bfloat16"}  # fmt: skip

# Folders that a server loads: (the names of the files, more of Files)
OLD_LLAMA = Files(("config.json", "pytorch_model.bin", "model.safetensors", "tokenizer.model", "tokenizer.json"),
                  bins=frozenset({"model.embed_tokens.weight", "lm_head.weight"}),
                  safetensors=frozenset({"model.embed_tokens.weight", "lm_head.weight"}))  # fmt: skip
NEW_LLAMA = Files(("config.json", "model.safetensors", "tokenizer.json"),
                  safetensors=frozenset({"model.embed_tokens.weight", "lm_head.weight"}))  # fmt: skip
PREFIXED_BLOOM = Files(("config.json", "model.safetensors", "tokenizer.json"),
                       safetensors=frozenset({"transformer.word_embeddings.weight", "lm_head.weight"}), same_head=True)  # fmt: skip
BARE_BLOOM = Files(("config.json", "model.safetensors", "tokenizer.json"), safetensors=frozenset({"word_embeddings.weight"}))


def ask(config, engine="tgi", version=None, shards=1, gpu=None, **more):
    return judge(Question(config, engine, version, shards, gpu, **more))


def accepted(*question, **more):
    """The verdict, which must have no reason."""
    verdict = ask(*question, **more)
    assert verdict.reasons == []
    return verdict


def refused(*question, **more):
    """The one reason."""
    (reason,) = ask(*question, **more).reasons
    return reason


def note(verdict, word):
    """The one note with this word in it."""
    (found,) = [text for text in verdict.notes if word in text]
    return found
