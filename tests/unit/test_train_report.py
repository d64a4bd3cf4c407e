"""report.html: what is read from a run folder, what is drawn of it, and that nothing in the folder can break or enter the page."""

import html.parser
import json
import re
from pathlib import Path

import pytest

from pipeline_train import report
from pipeline_train.errors import RunFailed, UserError
from pipeline_train.report import curves, facts, stages, svg, words
from tests.run_folder import lines_of, make_run, step_line
from verbs import report as verb


def ascii_head(value):
    return ascii(value)[:20]


def read(tmp_path, *lines):
    (tmp_path / "m").write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return curves.Curves(tmp_path / "m").update()


def losses(found):
    steps = list(found.series["loss"].steps)
    assert steps == sorted(set(steps))
    return dict(zip(steps, found.series["loss"].values))


class Elements(html.parser.HTMLParser):
    """Every element of a page, as a browser would find them: (tag, attributes)."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def of(self, tag, css=""):
        return [attributes for name, attributes in self.found if name == tag and css in (attributes.get("class") or "")]


def page_of(out):
    return report.write(out).read_text(encoding="utf-8")


def test_a_start_voids_later_steps_and_later_lines_win(tmp_path):
    start = {"kind": "start", "step": 2, "total_steps": 9}
    save = {"kind": "save", "step": 4, "seconds": 1.0}
    evaluation = {"kind": "eval", "step": 3, "loss": 7.0}
    found = read(tmp_path, *[step_line(n, loss=float(n)) for n in (1, 2, 3, 4)], save, evaluation, start, step_line(3, loss=30.0))
    assert losses(found) == {1: 1.0, 2: 2.0, 3: 30.0} and found.saves == [] and not found.series["eval"].steps
    assert found.step == 3 and found.total == 9 and found.starts == [(2, 9)]
    again = read(tmp_path, step_line(1, loss=1.0), step_line(2, loss=2.0), step_line(2, loss=20.0))
    assert losses(again) == {1: 1.0, 2: 20.0}


def test_a_start_that_only_evaluates_leaves_what_was_measured(tmp_path):
    """Nothing is trained behind it that could take its place."""
    steps = [step_line(n, step_s=2.0) for n in (1, 2)]
    memory = {"kind": "memory", "step": 1, "mem_gib": [1.0], "planned_gib": [1.5]}
    again = {"kind": "start", "step": 2, "total_steps": 2}
    found = read(tmp_path, *steps, memory, again, {"kind": "eval", "step": 2, "loss": 7.0})
    assert found.mean("step_s") == 2.0 and found.planned == [1.5] and list(found.series["eval"].values) == [7.0]
    longer = read(tmp_path, *steps, memory, dict(again, total_steps=3))
    assert longer.mean("step_s") is None and longer.planned == []


def test_reading_goes_on_where_it_stopped_and_waits_for_whole_lines(tmp_path):
    path = tmp_path / "m"
    path.write_text(json.dumps(step_line(1)) + "\n" + '{"kind": "st')
    found = curves.Curves(path).update()
    assert list(losses(found)) == [1]
    with path.open("a") as file:
        file.write(json.dumps(step_line(2))[len('{"kind": "st') :] + "\n")
    assert list(losses(found.update())) == [1, 2] and found.unreadable == 0
    assert list(losses(curves.Curves(tmp_path / "missing").update())) == []


@pytest.mark.parametrize("line", [
    "{", "[1]", "null", "\x00\xff", '{"kind": "step"}', '{"kind": "step", "step": true}', '{"kind": "step", "step": -1}',
    '{"kind": "step", "step": "1"}', '{"kind": "step", "step": 1e999}', "[" * 100000,
    '{"kind": "step", "step": 1%s}' % ("0" * 5000),
])  # fmt: skip
def test_lines_that_are_none_are_counted(tmp_path, line):
    found = read(tmp_path, step_line(1), line, step_line(2))
    assert found.unreadable == 1 and list(losses(found)) == [1, 2]


@pytest.mark.parametrize("value", [None, True, "1.5", [1.0], {}, 10**400, float("nan"), float("inf")], ids=ascii_head)
def test_values_that_are_no_numbers_are_left_out(tmp_path, value):
    found = read(tmp_path, step_line(1, loss=2.0), step_line(2, loss=value, stage_s=value, mem_gib=[0.5, value]))
    assert losses(found) == {1: 2.0} and found.series["lr"].steps[-1] == 2
    if value != [1.0]:
        assert found.per_stage("stage_s") == [0.15, 0.05]  # the newest line that has it
    assert found.per_stage("mem_gib") == [0.5, 0.25]


def test_the_figures_of_the_stages_are_of_this_start_and_its_stage_count(tmp_path):
    start = {"kind": "start", "step": 1, "total_steps": 9}
    found = read(tmp_path, step_line(1, stage_s=[9.0, 9.0], step_s=9.0), start, step_line(2), step_line(3, stage_s=[0.25, 0.15]))
    assert found.per_stage("stage_s") == pytest.approx([0.2, 0.1]) and found.mean("step_s") == pytest.approx(0.2)
    assert read(tmp_path, start).per_stage("stage_s") == [] and read(tmp_path, start).mean("step_s") is None


def test_planned_memory_stands_beside_the_measured(tmp_path):
    memory = {"kind": "memory", "step": 1, "mem_gib": [0.5, 0.25], "planned_gib": [0.75, 0.3]}
    found = read(tmp_path, step_line(1), memory)
    section = stages.stages_section(found, None, [])
    bars = re.findall(r"(stage \d), (planned|measured): ([\d.]+) GiB</title>", section)
    assert [gib for _, _, gib in bars] == ["0.75", "0.50", "0.30", "0.25"]
    assert "planned, GiB" in section
    again = read(tmp_path, step_line(1), memory, {"kind": "start", "step": 1, "total_steps": 9}, step_line(2))
    assert "planned" not in stages.stages_section(again, None, [])  # at another layout, perhaps
    spoilt = read(tmp_path, step_line(1), dict(memory, planned_gib=[1.0, "x"]))
    assert "planned" not in stages.stages_section(spoilt, None, [])


def test_thinning_keeps_ends_and_extremes():
    steps = list(range(1, 100001))
    values = [1.0] * 100000
    values[0], values[-1], values[43210], values[77777] = 5.0, 6.0, 1000.0, -1000.0
    thin_steps, thin_values = curves.thin(steps, values, 100)
    assert len(thin_steps) <= 202 and thin_steps == sorted(thin_steps)
    kept = dict(zip(thin_steps, thin_values))
    assert (kept[1], kept[100000], kept[43211], kept[77778]) == (5.0, 6.0, 1000.0, -1000.0)
    assert curves.thin([1, 2], [3.0, 4.0], 1) == ([1, 2], [3.0, 4.0])


def test_smoothing_starts_at_the_first_value_and_follows():
    assert curves.smooth([2.0] * 5, 10) == pytest.approx([2.0] * 5)
    smoothed = curves.smooth([0.0] * 100 + [1.0] * 1000, 20)
    assert smoothed[99] == 0.0 and 0.6 < smoothed[119] < 0.67 and smoothed[-1] > 0.99  # 1 - 1/e after one span
    assert curves.smooth([1.0, 2.0, 3.0], 1) == pytest.approx([1.0, 2.0, 3.0])


@pytest.mark.parametrize("low, high, wanted", [
    (0.0, 10.0, [0, 2, 4, 6, 8, 10]), (0.0, 1e-3, [0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3]), (-3.0, 3.0, [-2, 0, 2]), (5.0, 5.0, [5.0]),
])  # fmt: skip
def test_ticks_are_round_numbers(low, high, wanted):
    assert svg.ticks(low, high) == pytest.approx(wanted)


def test_a_chart_lies_within_its_picture_and_says_what_it_shows():
    line = svg.Line("loss", "a", "line", [10, 20, 30], [3.0, 1.0, 2.0])
    element, known = svg.chart("Loss", "nats", [line], marks=[20, 99])
    points = re.search(r'd="M([^"]*)"', element).group(1).split("L")
    places = [tuple(float(number) for number in point.split()) for point in points]
    assert len(places) == 3 and all(svg.LEFT <= x <= svg.WIDTH and svg.TOP <= y <= svg.HEIGHT for x, y in places)
    assert places[1][1] > places[2][1] > places[0][1]  # a larger value is higher, where y is smaller
    assert places[1][0] == pytest.approx((places[0][0] + places[2][0]) / 2)
    assert 'aria-label="Loss"' in element and ">nats</text>" in element and ">optimizer step</text>" in element
    assert "from 3 to 2" in element and element.count("resumed after step 20") == 1 and "step 99" not in element
    assert known["lines"] == [{"name": "loss", "steps": [10, 20, 30], "values": [3.0, 1.0, 2.0]}]


@pytest.mark.parametrize(
    "values, scale", [([1.0, 1000.0], True), ([1.0, 10.0], False), ([0.0, 1000.0], False), ([5.0, 5.0], False)]
)
def test_the_axis_is_logarithmic_only_where_that_helps(values, scale):
    element, _ = svg.chart("c", "u", [svg.Line("l", "a", "line", [1, 2], values)])
    assert ("log scale" in element) is scale and "nan" not in element


def test_one_step_is_a_dot(tmp_path):
    out = make_run(tmp_path / "out", lines_of(1))
    elements = Elements(page_of(out))
    assert elements.of("circle", "dot a") and not elements.of("path", "line")


def test_the_page_holds_every_curve_bar_and_table(tmp_path):
    lines = lines_of(120)
    lines += [dict(line, loss_scale=1024.0, skipped=int(line["step"] == 125)) for line in map(step_line, range(121, 130))]
    out = make_run(tmp_path / "out", lines)
    facts.begin(out, 0)
    facts.end(out, "finished")
    page = page_of(out)
    elements = Elements(page)
    charts = [figure["data-chart"] for figure in elements.of("figure")]
    assert charts == ["Loss", "Gradient norm", "Learning rate", "Throughput", "Time of a step", "Pipeline bubble",
                      "Loss scale (fp16)", "Share of the work", "Peak memory, largest rank of each stage"]  # fmt: skip
    assert [int(path["data-points"]) for path in elements.of("path", "line")] == [129, 129, 129, 129, 129, 129, 129, 129, 9]
    assert len(elements.of("circle", "dot b")) == 12 + 1  # evaluations, the skipped step
    assert [len(elements.of("rect", "bar " + css)) for css in "abc"] == [2, 2, 2]  # plan, measured, memory: two stages
    for text in ("Bubble measured: 50.0 %", "(P-1)/(M+P-1) = 1/7 = 14.3 %", "12 saves; training stood still for 3.0 s in all",
                 "stage 0, layers 0-2", "train.jsonl:3: no text", "2.13.0", "global: 6", ">finished</span>", "75.0 %"):  # fmt: skip
        assert text in page, text
    assert elements.of("meta")[1]["content"].startswith("default-src 'none'")


def test_the_plans_share_is_the_flops_of_its_layers(tmp_path):
    """tiny llama: three blocks and a head; stage 0 holds embed and two blocks."""
    out = make_run(tmp_path / "out", lines_of(1))
    stages = facts.stages(out, facts.run_config(facts.run_yaml(out)))
    hidden, ffn, vocab, seq_len = 48, 80, 131, 64
    block, head = 2 * (4 * hidden * hidden + 3 * hidden * ffn) + 2 * hidden * seq_len, 2 * hidden * vocab
    assert [(s.first, s.last) for s in stages] == [(0, 2), (3, 4)]
    assert stages[0].share == pytest.approx(2 * block / (3 * block + head)) and stages[0].share + stages[1].share == pytest.approx(
        1
    )
    assert sum(s.params for s in stages) == 3 * (4 * hidden * hidden + 3 * hidden * ffn + 2 * hidden) + 2 * hidden * vocab + hidden


def test_proofs_are_shown_as_they_are(tmp_path):
    out = make_run(tmp_path / "out", lines_of(2), export={"dir": str(tmp_path / "export")})
    (out / "resolved" / "self_test.json").write_text(json.dumps({"ok": True, "worst": {"gradients": 1e-7}, "seconds": 9.0}))
    page = page_of(out)
    assert "against transformers: passed" in page and "1e-07" in page and "Proof that the export" not in page
    (tmp_path / "export").mkdir()
    proof = {"holds": False, "step": 2, "tensors": {"compared": 30}, "logits": {"relative": 0.5}, "failures": ["logits <differ>"]}
    (tmp_path / "export" / "proof.json").write_text(json.dumps(proof))
    page = page_of(out)
    assert "it does NOT hold" in page and "logits &lt;differ&gt;" in page
    (tmp_path / "export" / "proof.json").write_text(json.dumps(dict(proof, holds=True, failures=[])))
    assert "it holds" in page_of(out)


HOSTILE = [
    '</title><script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "{{script}}{{data}}", "'; onload='x", "</script><!--",
    "\u202egnp.exe", "\x00\x1b[31m\ud800", "javascript:alert(1)", "&lt;b&gt;", "a" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=ascii_head)
def test_nothing_of_a_users_text_becomes_part_of_the_page(tmp_path, text):
    """Names, paths, data, errors, versions, metrics: the page has the same elements as with a harmless text in all of them."""
    found = []
    for name in ("harmless", text):
        out = make_run(tmp_path / str(len(found)), lines_of(3), name=name, data_file=name, export={"dir": str(tmp_path / "export")})
        (out / "resolved" / "versions.json").write_text(json.dumps({name: name}))
        (out / "resolved" / "self_test.json").write_text(json.dumps({"ok": name, "worst": {name: name}}))
        (out / "data" / "eval.json").write_text(json.dumps({name: {name: name}, "warnings": [name], "bad_lines": [name, 3]}))
        (tmp_path / "export").mkdir(exist_ok=True)
        (tmp_path / "export" / "proof.json").write_text(
            json.dumps({"holds": name, "failures": [name], "step": name, "logits": name})
        )
        with (out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"kind": "save", "step": 3, "path": name, "seconds": name, "asynchronous": name}) + "\n")
        facts.begin(out, 0)
        facts.end(out, name, name)
        elements = Elements(page_of(out)).found
        found.append([(tag, sorted(key for key in attributes)) for tag, attributes in elements])
    assert found[0] == found[1]


def test_hidden_characters_are_spelled_out():
    assert words.text("a\u202eb\x00\x1b\ud800\n<&\"'") == "a\\u202eb\\u0000\\u001b\\ud800\n&lt;&amp;&quot;&#x27;"
    assert words.attribute('x\n"y') == "x &quot;y" and words.text("äöü 你好") == "äöü 你好"
    assert words.script_json({"a": "</script><!-- &"}) == '{"a":"\\u003c/script\\u003e\\u003c!-- \\u0026"}'


@pytest.mark.parametrize("spoil", ["data/train.json", "resolved/versions.json", "resolved/run.yaml", "resolved/sessions.json",
                                   "resolved/model/config.json", "metrics.jsonl"])  # fmt: skip
@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[]", b"\xff\x00", b"[" * 50000, b'{"a": [1, {"b": null}], "sessions": [1]}']
)
def test_a_page_is_made_of_what_can_be_read(tmp_path, spoil, content):
    out = make_run(tmp_path / "out", lines_of(12))
    (out / spoil).unlink() if (out / spoil).exists() else None
    if content is not None:
        (out / spoil).write_bytes(content)
    page = page_of(out)
    assert (">%s</text>" % "nats per learnt token" in page) is (spoil != "metrics.jsonl")
    assert "</html>" in page


def test_states(tmp_path):
    import fcntl

    out = make_run(tmp_path / "out", lines_of(3))

    def state():
        return re.search('<span class="state ([a-z]+)">([^<]*)</span>', page_of(out)).groups()

    assert state() == ("finished", "finished")  # of an older version: all its steps are there
    (out / "metrics.jsonl").write_text('{"kind": "start", "step": 0, "total_steps": 9}\n')
    assert state() == ("stopped", "stopped")
    facts.begin(out, 0)
    assert state() == ("stopped", "stopped") and "It ended without a word" in page_of(out)
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert state() == ("running", "running")
    facts.end(out, "failed", "rank 1: <disk> full")
    assert state() == ("failed", "failed") and "rank 1: &lt;disk&gt; full" in page_of(out)
    facts.begin(out, 3)
    facts.end(out, "interrupted")
    assert (
        state() == ("interrupted", "interrupted") and page_of(out).count("rank 1: &lt;disk&gt; full") == 1
    )  # in the list of starts


def test_a_hundred_thousand_steps_make_a_small_page(tmp_path):
    text = json.dumps(step_line(0, loss=0.5, mfu=0.4, loss_scale=1024.0, skipped=1)).replace('"step": 0', '"step": %d')
    text = text.replace('"loss": 0.5', '"loss": %r').replace('"grad_norm": 1.0', '"grad_norm": %r')
    lines = [text % (step, 2.0 + (step * 7919 % 1000) / 1000, 1.0 + (step * 104729 % 997) / 997) for step in range(1, 100001)]
    lines += ['{"kind": "eval", "step": 100000, "loss": 2.0}'] + ['{"kind": "save", "step": 100000, "seconds": 1}'] * 1000
    out = make_run(tmp_path / "out", [])
    (out / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = report.write(out)
    assert page.stat().st_size < 300000
    points = [int(number) for number in re.findall('data-points="([0-9]+)"', page.read_text())]
    assert points[0] > 400 and max(points) <= 482 and len(points) == 10 and ">100,000</text>" in page.read_text()


def test_writing_replaces_the_page_at_once_and_says_what_is_wrong(tmp_path):
    out = make_run(tmp_path / "out", lines_of(2))
    assert report.write(out) == out / "report.html" and report.write(out, tmp_path / "page.html") == tmp_path / "page.html"
    assert not list(out.glob("*.partial"))
    with pytest.raises(UserError, match=r"empty: holds no run \(no metrics.jsonl, no resolved/\); name the run.out of a training$"):
        report.write(tmp_path / "empty")
    with pytest.raises(UserError, match="gone/page.html: cannot be written: No such file or directory$"):
        report.write(out, tmp_path / "gone" / "page.html")
    (out / "report.html").unlink()
    (out / "report.html").mkdir()
    with pytest.raises(RunFailed, match="report.html: cannot be written: Is a directory$"):
        report.write(out)


def test_the_verb(tmp_path, capsys):
    import pipedock

    out = make_run(tmp_path / "out", lines_of(2))
    assert pipedock.main(["report", "--run", str(out), "--output", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").stat().st_size > 5000 and not (out / "report.html").exists()
    assert pipedock.main(["report", "--run", str(tmp_path / "nothing")]) == 2
    assert "pipedock report: %s: holds no run" % (tmp_path / "nothing") in capsys.readouterr().err
    assert verb.text({"report": "x", "bytes": 3}) == "x: 3 bytes"


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_a_running_training_keeps_its_report_now_and_then(tmp_path, monkeypatch):
    out, clock, said = make_run(tmp_path / "out", lines_of(2)), Clock(), []
    written = []
    monkeypatch.setattr(report, "write", lambda out, output=None, curves=None: written.append(clock.now))
    keeper = report.Keeper(out, 0, said.append, clock)
    save = {"line": {"kind": "save", "step": 1}}
    for seconds in (0, 1, 29, 30, 31, 90):
        clock.now = 1000.0 + seconds
        keeper.show({"step": 1, "total": 2, "line": {"kind": "step", "step": 1}})
        keeper.show(save)
    assert written == [1000.0, 1030.0, 1090.0] and said == []


def test_a_slow_report_is_written_less_often(tmp_path, monkeypatch):
    out, clock, written = make_run(tmp_path / "out", lines_of(2)), Clock(), []

    def slow(out, output=None, curves=None):
        written.append(clock.now)
        clock.now += 6.0

    monkeypatch.setattr(report, "write", slow)
    keeper = report.Keeper(out, 0, lambda line: None, clock)
    for seconds in (0, 100, 300, 310):  # 6 s are 2 % of 300 s
        clock.now = max(clock.now, 1000.0 + seconds)
        keeper.show({"line": {"kind": "eval", "step": 1}})
    assert written == [1000.0, 1310.0]


def test_a_report_that_cannot_be_written_is_said_once_and_stops_nothing(tmp_path):
    said = []
    keeper = report.Keeper(tmp_path / "gone", 0, said.append)
    keeper.show({"line": {"kind": "save", "step": 1}})
    keeper.end("finished")
    assert len(said) == 1 and said[0].startswith("report.html is not up to date: ")


def test_the_page_travels_with_the_package():
    """What build() reads at run time must be in the wheel too."""
    text = (Path(report.__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    packaged = re.search(r'"pipeline_train.report" = \[(.*)\]', text).group(1)
    beside = {path.name for path in Path(report.__file__).parent.iterdir() if path.suffix in (".html", ".css", ".js")}
    assert set(re.findall('"([^"]+)"', packaged)) == beside and '"pipeline_train.report",' in text
