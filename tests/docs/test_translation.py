"""README.zh-CN.md says what README.md says: the same sections and tables, and the very same code blocks and code words."""

import re
from typing import List, NamedTuple

import pytest

from tests.docs.readme import FENCE, ROOT, Block, blocks

ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
HEADING = re.compile(r"^(#+) (.+)$", re.M)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)]+)\)")


class Section(NamedTuple):
    level: int
    title: str
    blocks: List[Block]
    prose: str  # without its blocks


def sections(text: str) -> List[Section]:
    bare = FENCE.sub(lambda fence: re.sub(r"(?m)^#", "\0", fence.group()), text)  # a comment in a block is no heading
    found, heads = [], list(HEADING.finditer(bare))
    for head, following in zip(heads, [h.start() for h in heads[1:]] + [len(bare)]):
        body = bare[head.end() : following].replace("\0", "#")
        found.append(Section(len(head.group(1)), head.group(2), blocks(body), FENCE.sub("", body)))
    return found


def tables(prose: str) -> List[List[List[str]]]:
    """Each as its rows of cells."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", prose, re.M)
    return [[line.strip("|").split("|") for line in table.splitlines()] for table in found]


def words(text: str) -> List[str]:
    """Code spans, each of a list's parts (`a, b`) alone: Chinese separates them by its own marks."""
    return sorted(part for span in SPAN.findall(text) for part in span.split(", "))


def differences(english: str, chinese: str) -> List[str]:
    """One line for each thing that is not in both, naming the section."""
    ours, theirs = sections(english), sections(chinese)
    levels = [[section.level for section in page] for page in (ours, theirs)]
    if levels[0] != levels[1]:
        kinds = [[(section.level, section.blocks) for section in page] for page in (ours, theirs)]
        at = next((n for n, pair in enumerate(zip(*kinds)) if pair[0] != pair[1]), min(map(len, kinds)))
        return ["sections: README.md has %d, README.zh-CN.md %d; the first that differs: %r, %r"
                % (len(ours), len(theirs), _title(ours, at), _title(theirs, at))]  # fmt: skip
    return [line for pair in zip(ours, theirs) for line in _section_differences(*pair)]


def _title(page: List[Section], number: int) -> str:
    return page[number].title if number < len(page) else "none"


def _section_differences(ours: Section, theirs: Section) -> List[str]:
    where = "section %r (%r): " % (ours.title, theirs.title)
    found = []
    if len(ours.blocks) != len(theirs.blocks):
        found.append("%d code blocks, the translation has %d" % (len(ours.blocks), len(theirs.blocks)))
    for number, (one, other) in enumerate(zip(ours.blocks, theirs.blocks), 1):
        if one != other:
            found.append("code block %d is not the same: %r, %r" % (number, *_first_difference(one, other)))
    shapes = [[[len(row) for row in table] for table in tables(section.prose)] for section in (ours, theirs)]
    if shapes[0] != shapes[1]:
        found.append("tables of other shapes (cells of each row): %s, %s" % (shapes[0], shapes[1]))
    else:
        for rows in zip(*([row for table in tables(s.prose) for row in table] for s in (ours, theirs))):
            if words(" ".join(rows[0])) != words(" ".join(rows[1])):
                found.append("table row%s: %s" % (rows[0][0].rstrip(), _lost(" ".join(rows[0]), " ".join(rows[1]))))
    if words(ours.prose) != words(theirs.prose):
        found.append("code words: " + _lost(ours.prose, theirs.prose))
    links = [sorted(set(LINK.findall(section.prose)) - {"README.md", "README.zh-CN.md"}) for section in (ours, theirs)]
    if links[0] != links[1]:
        found.append("links: %s, %s" % (links[0], links[1]))
    return [where + line for line in found]


def _first_difference(one: Block, other: Block):
    if one[:2] != other[:2]:
        return one[:2], other[:2]
    pairs = zip((one.body + "\0").splitlines(True), (other.body + "\0").splitlines(True))
    return next(pair for pair in pairs if pair[0] != pair[1])


def _lost(ours: str, theirs: str) -> str:
    one, other = words(ours), words(theirs)
    lacks = [word for word in dict.fromkeys(one) if one.count(word) > other.count(word)]
    more = [word for word in dict.fromkeys(other) if other.count(word) > one.count(word)]
    return "the translation lacks %s and has %s in their place" % (lacks, more)


def test_the_translation_has_all_of_it():
    assert not differences(ENGLISH, CHINESE), "\n".join(["README.zh-CN.md is behind README.md:"] + differences(ENGLISH, CHINESE))


def test_every_fence_is_read_and_each_page_links_to_the_other():
    assert len(blocks(ENGLISH)) > 10 and len(tables(ENGLISH)) >= 3 and len(sections(ENGLISH)) > 10
    assert all(text.count("```") == 2 * len(blocks(text)) for text in (ENGLISH, CHINESE))
    assert ENGLISH.splitlines()[2] == "English | [简体中文](README.zh-CN.md)"
    assert CHINESE.splitlines()[2] == "[English](README.md) | 简体中文"


LAST = sections(ENGLISH)[-1].title
BLOCK = blocks(ENGLISH)[-1].body


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("\n## %s\n" % LAST, "\n```bash\nls\n```\n\n## %s\n" % LAST, "code blocks, the translation has"),
        (BLOCK, BLOCK.replace("pipedock", "pipedocks"), "code block 2 is not the same"),
        ("<!-- file: run.yaml -->", "<!-- file: other.yaml -->", "is not the same: ('yaml', 'file: other.yaml')"),
        ("\n## %s\n" % LAST, "\n## One more\n\n## %s\n" % LAST, "'none'"),
        ("\n## %s\n" % LAST, "\n### %s\n" % LAST, "the first that differs: '%s'" % LAST),
        ("| `model.init` |", "| `a.key` | `1` |\n| `model.init` |", "tables of other shapes"),
        ("| `model.init` |", "| `model.start` |", "table row `model.start`: the translation lacks ['model.start']"),
        ("`bash ci/install.sh` only", "`bash ci/setup.sh` only", "lacks ['bash ci/setup.sh']"),
        ("(docs/many.md)", "(docs/more.md)", "links: ['docs/more.md']"),
    ],
)  # fmt: skip
def test_what_the_translation_lacks_is_named_with_its_section(old, new, said):
    assert ENGLISH.count(old) == 1
    before, after = differences(ENGLISH, CHINESE), differences(ENGLISH.replace(old, new), CHINESE)
    news = [line for line in after if line not in before]
    assert any(said in line for line in news), after
    assert all(line.startswith(("section '", "sections: ")) for line in news)
