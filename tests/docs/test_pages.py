"""What docs/*.md say is so: verbs and options, files, run.yaml, hostfile, variables, figures, and the messages they quote."""

import ast
import re
import shlex

import pytest

import pipedock
from pipeline_train import config, hostfile, nodes, remote
from pipeline_train.plan import cards, plan
from tests.docs.readme import ROOT, blocks

PAGES = sorted((ROOT / "docs").glob("*.md"))
MANY = (ROOT / "docs" / "many.md").read_text(encoding="utf-8")
SPAN = re.compile(r"`([^`\n]+)`")
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
OURS = ("benchmarks", "ci", "compose", "docs", "export", "images", "pipeline_train", "serve", "tests", "verbs")
LLAMA_13B = {
    "model_type": "llama", "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
    "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip


def commands(shell):
    """The pipedock commands of a shell script, as argument lists; a variable is a number there."""
    script = re.sub(r'"?\$\w+"?', "1", shell.replace("\\\n", " "))
    found = []
    for line in re.findall(r"\bpipedock ([a-z-]+ [^\n;|&]*)", script):
        quoted = line if line.count("'") % 2 == 0 else line[: line.rindex("'")]  # the end of bash -c '...'
        found.append(shlex.split(quoted, comments=True))
    return found


def spans(text):
    return SPAN.findall(FENCED.sub("", text))


def section(title):
    return MANY.partition("\n## %s\n" % title)[2].partition("\n## ")[0]


def table(text, first):
    """The rows of the table whose head begins so, each as its cells."""
    lines = text[text.index("| " + first) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def strings():
    """Every string of the code, literals that stand beside each other joined."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "pipeline_train").rglob("*.py")))
    constants = (node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [value for value in constants if isinstance(value, str)]


def test_there_are_pages_and_every_fence_is_read():
    assert PAGES
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("```") == 2 * len(blocks(text)), page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_one(page):
    """Parsed by the command itself, which ends the test where it would end."""
    text = page.read_text(encoding="utf-8")
    told = [args for block in blocks(text) if block.lang == "bash" for args in commands(block.body)]
    assert len(told) == sum(block.body.count("pipedock ") for block in blocks(text) if block.lang == "bash")
    for args in told:
        _, unknown = pipedock.parser().parse_known_args(args)
        assert not unknown, "%s: pipedock %s" % (page.name, " ".join(args))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_verbs_and_options_in_running_text_exist(page):
    verbs = next(action for action in pipedock.parser()._actions if action.dest == "verb").choices
    named = [span for span in spans(page.read_text(encoding="utf-8")) if re.match(r"(docker compose .*)?pipedock ", span)]
    for span in named:
        verb, *words = span.partition("pipedock ")[2].split()
        assert verb in verbs, "%s: %s" % (page.name, span)
        options = [word for word in words if word.startswith("--")]
        assert set(options) <= set(verbs[verb]._option_string_actions), "%s: %s" % (page.name, span)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_link_exists(page):
    text = page.read_text(encoding="utf-8")
    files = [span for span in spans(text) if span.split("/")[0] in OURS and "/" in span]
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    missing = [name for name in files if not (ROOT / name).exists()] + [n for n in links if not (page.parent / n).exists()]
    assert not missing, page.name


def test_run_yaml_and_hostfile_fit_each_other(tmp_path):
    found = {block.file: block.body for block in blocks(MANY) if block.file}
    for name, text in found.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    run = config.load(tmp_path / "run.yaml")
    hosts = hostfile.read(tmp_path / "hostfile")
    assert nodes.counts(run.world, len(hosts), hosts) == [host.slots for host in hosts]
    assert run.micro_batches == int(re.search(r"# (\d+) micro-batches", found["run.yaml"]).group(1))
    words = commands(next(block.body for block in blocks(MANY) if "pipedock plan" in block.body))[0]
    asked = pipedock.parser().parse_args(words)
    assert (asked.gpus, asked.data, asked.micro_batches) == (run.world, run.parallel.data, run.micro_batches)
    assert asked.recompute == run.parallel.recompute


def test_the_variables_of_the_compose_files_are_theirs():
    part = section("In containers")
    set_in_commands = re.findall(r"\b([A-Z][A-Z_]+)=\S+ (?=.*docker compose)", part)
    named = [span.partition("=")[0] for span in spans(part) if re.fullmatch(r"[A-Z][A-Z_]+(=\S+)?", span)]
    known = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "compose").glob("*.yaml")))
    example = (ROOT / "compose" / "example.env").read_text(encoding="utf-8")
    assert {"NODES", "NODE_RANK", "MASTER_ADDR", "HOSTFILE"} <= set(set_in_commands) and len(named) > 3
    for name in set(set_in_commands + named):
        assert re.search(r"\b%s\b" % name, known + (ROOT / ".env").read_text(encoding="utf-8")), name
        assert re.search(r"^#?%s=" % name, example, re.M), "compose/example.env: %s" % name
    services = re.findall(r"docker compose (?:up|run)(?: --?\w+)* (\w+)", part)
    assert set(services) == {"train", "keys", "sshd"}
    shipped = (ROOT / "compose" / "compose.yaml").read_text(encoding="utf-8")
    assert all(re.search(r"^  %s:" % name, shipped, re.M) for name in services)
    assert "SHM_SIZE:-8gb" in known and "`SHM_SIZE`, 8gb" in part and "SSH_PORT:-2222" in known and "`SSH_PORT`, 2222" in part


def test_numbers_and_names_are_the_code_s():
    assert "waits %.0f s (`%s`)" % (nodes.JOIN_S, nodes.WAIT) in MANY
    assert "port %d, the launchers at the next one" % nodes.PORT in MANY
    assert "`%s`" % remote.ENV_FILE in MANY and "`%s`" % remote.SSH_ARGS in MANY
    links = re.search(r"talk over: (.*?)\.\n", MANY).group(1)
    named = set(SPAN.findall(links)) | {"pcie4", "eth25", "eth100"}
    assert named == set(cards.LINKS), "the page says pcie3 to pcie5, eth10 to eth400"


def test_the_planned_figures_are_what_plan_says():
    part = section("Plan")
    heads = re.search(r"^\| \| (`nvlink`.*) \|$", part, re.M).group(1)
    links = SPAN.findall(heads)
    rows = table(part, "| `nvlink`")
    for row, (gpus, data) in zip(rows, ((4, 1), (8, 2))):
        planned = [plan(LLAMA_13B, gpu="a100-80g", gpus=gpus, data=data, link=link, recompute="blocks", micro_batches=32)
                   for link in links]  # fmt: skip
        assert row[1:] == ["%.0f" % document["tokens_per_s"] for document in planned], row[0]
        assert rows[2][0] == "a stage boundary, %.0f MiB a micro-batch" % planned[0]["boundary_mib"]
        assert rows[2][1:] == ["%.1f ms" % (1e3 * document["boundary_s"]) for document in planned]


def test_messages_that_are_quoted_are_in_the_code():
    known = strings()
    quoted = [span for row in table(section("When NCCL fails"), "pipedock says") for span in SPAN.findall(row[0])]
    assert len(quoted) > 8
    assert not [text for text in quoted if not any(text in literal for literal in known)]
