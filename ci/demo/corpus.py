"""chatterbot-corpus (BSD, English and Chinese) -> conversation records, one JSON object a line.

    python ci/demo/corpus.py OUTPUT.jsonl [--english N] [--chinese N]

Takes short dialogues whose first question appears once, so that each has one right answer and all are learnt by heart in minutes.
"""

import argparse
import json
from pathlib import Path
from typing import Dict, List

import chatterbot_corpus
import yaml

TOPICS = ("science", "computers", "history", "literature", "money", "ai", "sports", "food")


def dialogues(language: str) -> List[List[str]]:
    """Every dialogue of the topics as a list of lines, ask and answer in turn."""
    folder = Path(chatterbot_corpus.__file__).parent / "data" / language
    found: List[List[str]] = []
    for path in (folder / (topic + ".yml") for topic in TOPICS):
        if not path.exists():  # not every language has every topic
            continue
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
        found += [[" ".join(str(line).split()) for line in entry] for entry in entries]
    return found


def choose(language: str, count: int, longest: int) -> List[List[str]]:
    """The first ``count`` dialogues of whole rounds, at most ``longest`` characters long, with no first question twice."""
    by_question: Dict[str, List[List[str]]] = {}
    for lines in dialogues(language):
        by_question.setdefault(lines[0].lower().strip(" ?.!？。"), []).append(lines)
    fitting = [
        group[0]
        for group in by_question.values()
        if len(group) == 1 and len(group[0]) % 2 == 0 and all(group[0]) and len("".join(group[0])) <= longest
    ]
    return fitting[:count]


def record(lines: List[str]) -> Dict[str, object]:
    return {"type": "conversation", "rounds": [["ans" if i % 2 else "ask", line] for i, line in enumerate(lines)]}


def write(output: str, english: int, chinese: int) -> int:
    """Writes the records and returns how many there are."""
    chosen = choose("english", english, longest=140) + choose("chinese", chinese, longest=40)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text("".join(json.dumps(record(d), ensure_ascii=False) + "\n" for d in chosen), encoding="utf-8")
    return len(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output")
    parser.add_argument("--english", type=int, default=24)
    parser.add_argument("--chinese", type=int, default=8)
    args = parser.parse_args()
    print("%s: %d conversations" % (args.output, write(args.output, args.english, args.chinese)))


if __name__ == "__main__":
    main()
