"""Prompts, spelled out; templates rendered as transformers renders them; templates that cannot be trained."""

import pytest

from pipeline_train.data.template import (
    DEFAULT_CHAT_TEMPLATE,
    PromptFormat,
    TemplateRefused,
    TurnEnd,
    find_end,
    instruct_prompt,
    messages_of,
    render,
)
from pipeline_train.errors import UserError
from tests.tokenizers import CHATML

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
BLOCKS = """{%- set ns = namespace(n=0) %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- continue %}
    {%- endif %}
    {%- set ns.n = ns.n + 1 %}
    {{- '<|' + message.role + '|>' + message.content | trim | tojson }}
    {%- if message.role == 'assistant' %}{% generation %}{{ eos_token }}{% endgeneration %}
    {% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
{{ ns.n }} {{ tools is none }} {{ messages | length }}
"""
REWRITES = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[' + m['content'] + ']' }}"
    "{% else %}{{ (m['content'] if loop.last else '...') + eos_token }}{% endif %}{% endfor %}"
)
TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": " a <b> 'q' \"é\" "},
    {"role": "assistant", "content": "b\n"},
    {"role": "user", "content": "你好"},
]
ROUNDS = {"rounds": [("ask", "a"), ("ans", "b"), ("ask", "c"), ("ask", "d"), ("ans", "e")], "system": None}


def default(end=None):
    return PromptFormat(DEFAULT_CHAT_TEMPLATE, TOKENS, end or TurnEnd("</s>", "</s>", "\n"), False, "m")


def own(source):
    end = find_end(source, TOKENS, ["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    return PromptFormat(source, TOKENS, end, True, "m")


def test_the_instruct_prompt_is_the_well_known_one():
    assert instruct_prompt("Name one.", "Fruit.") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\nName one.\n\n### Input:\nFruit.\n\n### Response:"
    )
    short = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName one.\n\n### Response:"
    )
    assert instruct_prompt("Name one.") == instruct_prompt("Name one.", " ") == short
    turns = default().turns("instruct", {"instruct": "Name one.", "input": None, "output": "Pear"})
    assert turns == [(short, "Pear", True)]


def test_the_default_conversation_and_reference():
    assert default().turns("conversation", ROUNDS) == [
        ("### Human: a\n### Assistant:", " b", True),
        ("### Human: a\n### Assistant: b</s>\n### Human: c\n### Human: d\n### Assistant:", " e", True),
    ]
    fields = {"reference": "r", "rounds": [("ask", "a"), ("ans", "")], "system": None}
    assert default().turns("ref_qa", fields) == [("### Reference:\nr\n### Human: a\n### Assistant:", " ", False)]
    fields = {"rounds": [("ask", "a"), ("ans", "b"), ("ask", "c")], "system": "be kind"}
    assert default().turns("conversation", fields) == [("be kind\n### Human: a\n### Assistant:", " b", True)]
    with pytest.raises(TemplateRefused, match="unknown role tool"):
        render(DEFAULT_CHAT_TEMPLATE, [{"role": "tool", "content": ""}], True, TOKENS)


def test_records_as_messages_for_a_models_own_template():
    instruct = {"instruct": "i", "input": "x", "output": "o"}
    assert messages_of("instruct", instruct, True)[0] == {"role": "user", "content": "i\n\nx"}
    assert messages_of("instruct", dict(instruct, input=None), True)[0] == {"role": "user", "content": "i"}
    assert [m["content"] for m in messages_of("conversation", ROUNDS, True)] == ["a", "b", "c\nd", "e"]
    ref_qa = dict(ROUNDS, reference="r", system="s")
    assert [m["content"] for m in messages_of("ref_qa", ref_qa, True)] == ["s", "r\n\na", "b", "c\nd", "e"]


@pytest.mark.parametrize("source", [DEFAULT_CHAT_TEMPLATE, CHATML, LLAMA2, BLOCKS], ids=["default", "chatml", "llama2", "blocks"])
def test_rendering_equals_transformers(source):
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="transformers of this age has no chat templates")
    for messages in (TALK, TALK[1:], TALK[1:3]):
        for ask in (True, False):
            theirs, _ = utils.render_jinja_template([messages], chat_template=source, add_generation_prompt=ask, **TOKENS)
            assert render(source, messages, ask, TOKENS) == theirs[0]


@pytest.mark.parametrize(
    "source, end",
    [
        (DEFAULT_CHAT_TEMPLATE, ("</s>", "</s>", "\n")),
        (CHATML, ("<|im_end|>", "<|im_end|>", "\n")),
        (LLAMA2, (" </s>", "</s>", "")),
    ],
    ids=["default", "chatml", "llama2"],
)
def test_the_end_of_turn_is_found_in_the_template(source, end):
    assert find_end(source, TOKENS, ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]) == end


def test_an_own_template_learns_the_answer_and_what_ends_its_turn():
    turns = own(LLAMA2).turns("conversation", ROUNDS)
    assert turns[0] == ("<s>[INST] a [/INST]", " b", True)
    assert turns[1] == ("<s>[INST] a [/INST] b </s><s>[INST] c\nd [/INST]", " e", True)


def test_templates_that_cannot_be_trained_say_why():
    with pytest.raises(UserError, match='m: the chat template rewrites earlier turns.* Set data.template to "default"'):
        own(REWRITES).turns("conversation", ROUNDS)
    thinks = CHATML.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>' }}{% endif %}")
    with pytest.raises(UserError, match="writes an answer differently from the prompt that asks for it"):
        own(thinks).turns("conversation", ROUNDS)
    moody = CHATML.replace("+ '<|im_end|>' +", "+ ('<|im_end|>' if message['content'] != 'b' else '') +")
    with pytest.raises(UserError, match="does not end every answer with"):
        own(moody).turns("conversation", ROUNDS)
    assert find_end("{% for m in messages %}{{ m['content'] + '\\n' }}{% endfor %}", TOKENS, ["</s>"]) is None


@pytest.mark.parametrize(
    "source, message",
    [
        ("{% for m in messages %}", "line 1 of the chat template: Unexpected end of template"),
        ("{{ raise_exception('no system') }}", "no system"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ range(10000000) | list }}", "Range too big"),
    ],
)
def test_what_a_template_refuses_is_a_message(source, message):
    with pytest.raises(TemplateRefused) as error:
        render(source, TALK, True, TOKENS)
    assert message in str(error.value)
