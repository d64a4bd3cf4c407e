"""The demo's three questions: what to send to a server, and whether the right answers came back.

python ci/demo/answers.py requests MODEL_DIR RECORDS.jsonl DIR    request bodies for curl: DIR/N.{generate,chat}.json
python ci/demo/answers.py client URL DIR                          asks through serve.client, all three ways
python ci/demo/answers.py learnt DIR                              exit 1 unless every reply in DIR is the corpus answer
python ci/demo/answers.py untouched DIR                           exit 1 if a reply is the corpus answer already
"""

import json
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

QUESTIONS = ("what is chemistry", "what is h2o", "什么是化学")
LIMIT = 60  # tokens, far more than any of the answers has


def answer_to(question: str, records: str) -> str:
    rounds = (json.loads(line)["rounds"] for line in Path(records).read_text(encoding="utf-8").splitlines())
    return str(next(r[1][1] for r in rounds if r[0][1] == question))


def chat_body(question: str) -> Dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": question}], "max_tokens": LIMIT, "temperature": 0}


def write_requests(model: str, records: str, folder: str) -> None:
    """The prompt of /generate is spelled by the chat template that lies in the model folder, as any client would do it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number, question in enumerate(QUESTIONS):
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
        generate = {"inputs": prompt, "parameters": {"max_new_tokens": LIMIT, "details": True}}
        asked = {"question": question, "prompt": prompt, "answer": answer_to(question, records)}
        for name, document in (("asked", asked), ("generate", generate), ("chat", chat_body(question))):
            Path(folder, "%d.%s.json" % (number, name)).write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def asked_in(folder: str) -> List[Tuple[Path, Dict[str, str]]]:
    paths = sorted(Path(folder).glob("*.asked.json"))
    return [(Path(str(p)[: -len(".asked.json")]), json.loads(p.read_text(encoding="utf-8"))) for p in paths]


def ask_client(url: str, folder: str) -> None:
    from serve.client import Client

    with Client(url) as client:
        for stem, asked in asked_in(folder):
            replies = {
                "generate": client.generate(asked["prompt"], max_new_tokens=LIMIT).text,
                "stream": "".join(p.text for p in client.generate_stream(asked["prompt"], max_new_tokens=LIMIT)),
                "chat": client.chat([{"role": "user", "content": asked["question"]}], max_tokens=LIMIT, temperature=0).content,
            }
            Path("%s.client.out" % stem).write_text(json.dumps(replies), encoding="utf-8")


def of_generate(body: str) -> Dict[str, str]:
    reply = json.loads(body)
    return {"curl /generate": reply["generated_text"], "its finish_reason": reply["details"]["finish_reason"]}


def of_stream(body: str) -> Dict[str, str]:
    events = [json.loads(line[len("data:") :]) for line in body.splitlines() if line.startswith("data:")]
    pieces = "".join(event["token"]["text"] for event in events if not event["token"]["special"])
    return {"curl /generate_stream, pieces": pieces, "curl /generate_stream, whole": events[-1]["generated_text"]}


def of_chat(body: str) -> Dict[str, str]:
    return {"curl /v1/chat/completions": json.loads(body)["choices"][0]["message"]["content"]}


def of_client(body: str) -> Dict[str, str]:
    return {"Python client, " + name: text for name, text in json.loads(body).items()}


READERS: Dict[str, Callable[[str], Dict[str, str]]] = {
    "generate": of_generate, "stream": of_stream, "chat": of_chat, "client": of_client
}  # fmt: skip


def replies_of(stem: Path) -> Dict[str, str]:
    found: Dict[str, str] = {}
    for name, read in READERS.items():
        path = Path("%s.%s.out" % (stem, name))
        if path.exists():
            found.update(read(path.read_text(encoding="utf-8")))
    return found


def check(folder: str, learnt: bool) -> None:
    """Print every question with its replies; exit 1 unless all (or, not ``learnt``, none) of them are the corpus answer."""
    wrong: List[str] = []
    asked_all = asked_in(folder)
    for stem, asked in asked_all:
        print("  %s\n    corpus answer: %s" % (asked["question"], asked["answer"]))
        replies = replies_of(stem)
        if not replies:
            wrong.append("%s: no reply" % asked["question"])
        for route, reply in replies.items():
            expected = "eos_token" if route == "its finish_reason" else asked["answer"]
            print("    %s: %s" % (route, " ".join(reply.split())))
            if (reply.strip() == expected) != learnt:
                wrong.append("%s, %s: %r" % (asked["question"], route, reply))
    if wrong or not asked_all:
        about = "these are not the trained answers" if learnt else "answered already without training"
        sys.exit("%s:\n  %s" % (about, "\n  ".join(wrong)))


def main(action: str, *args: str) -> None:
    if action == "requests":
        write_requests(*args)
    elif action == "client":
        ask_client(*args)
    else:
        check(args[0], learnt=action == "learnt")


if __name__ == "__main__":
    main(*sys.argv[1:])
