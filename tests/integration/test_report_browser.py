"""report.html in a headless Chromium: the curves are drawn, the script runs, and nothing is asked of a network.

``bash ci/report.sh`` installs Chromium where it may; without one these tests are skipped.
"""

import pytest

from pipeline_train import report
from tests import chromium
from tests.run_folder import lines_of, make_run

pytestmark = pytest.mark.skipif(chromium.find() is None, reason="no Chromium here; bash ci/report.sh installs it")

HOSTILE = "<img src=//evil.example/x onerror=document.title='in'><script>document.title='in'</script>"
BOXES = (
    "[...document.querySelectorAll('%s')].map(e => { const b = e.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; })"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of 120 steps of two stages, in a window of 1000 x 900."""
    root = tmp_path_factory.mktemp("browser")
    lines = lines_of(90) + [{"kind": "start", "step": 80, "total_steps": 120}]  # resumed at the checkpoint of step 80
    lines += [line for line in lines_of(120) if line["step"] > 80]
    out = make_run(root / "out", lines, name=HOSTILE)
    (root / "profile").mkdir()
    with chromium.Page(root / "profile") as opened:
        opened.open(report.write(out))
        yield opened


def test_the_check_itself_sees_requests_and_errors(page, tmp_path):
    """A page that asks for an image and throws: else the tests below could not fail."""
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('a'); throw new Error('b')</script>")
    (tmp_path / "profile").mkdir()
    with chromium.Page(tmp_path / "profile") as other:
        other.open(bad)
        assert other.requests == ["http://127.0.0.1:9/x.png"] and len(other.problems) >= 3, (other.requests, other.problems)


def test_it_asks_for_nothing_and_complains_of_nothing(page):
    assert (page.requests, page.problems) == ([], [])


def test_the_curves_are_drawn(page):
    points = page.ask("[...document.querySelectorAll('path.line')].map(p => p.getAttribute('d').split(/[ML]/).length - 1)")
    assert len(points) == 8 and min(points) >= 100  # loss and its smoothed curve, norm, rate, two speeds, time, bubble
    lengths = page.ask("[...document.querySelectorAll('path.line')].map(p => p.getTotalLength())")
    assert min(lengths) > 600  # from one side of the picture to the other
    strokes = page.ask("[...document.querySelectorAll('path.line')].map(p => getComputedStyle(p).stroke)")
    assert "none" not in strokes and len(set(strokes)) == 4
    boxes = page.ask(BOXES % "path.line")
    assert all(width > 200 for _, _, width, _ in boxes) and max(height for *_, height in boxes) > 50
    assert page.ask("document.querySelectorAll('circle.dot').length") == 12  # evaluations
    assert page.ask("document.querySelectorAll('.mark').length") == 6  # the resume, in every chart


def test_the_stages_have_their_bars(page):
    for css, number in (("a", 2), ("b", 2), ("c", 2)):
        boxes = page.ask(BOXES % ("rect.bar." + css))
        assert len(boxes) == number and all(width > 30 and height > 3 for _, _, width, height in boxes)
    busy = page.ask(BOXES % "rect.bar.b")
    assert busy[0][2] / busy[1][2] == pytest.approx(3.0, rel=0.01)  # 0.15 s and 0.05 s


def test_nothing_is_wider_than_the_window(page):
    assert page.ask("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_text_stays_text(page):
    assert HOSTILE in page.ask("document.title") and HOSTILE in page.ask("document.querySelector('h1').textContent")
    assert page.ask("document.querySelectorAll('img').length") == 0


def test_values_are_shown_under_the_pointer_and_under_the_keys(page):
    x, y, width, height = page.ask(BOXES % "figure[data-chart=Loss] svg")[0]
    page.point(x + width / 2, y + height / 2)
    shown = page.ask("document.getElementById('hover').textContent").split("\n")
    step = int(shown[0][len("step ") :])
    assert 50 <= step <= 66  # the middle of the picture, which the axis' labels push to the right
    assert shown[1] == "training loss: %g" % float("%.5g" % (3.0 - 0.001 * step)) and shown[2].startswith("smoothed over about 2")
    assert shown[3].startswith("eval loss: ") and page.ask("document.getElementById('hover').hidden") is False
    page.ask("document.querySelector('figure[data-chart=Loss] svg').focus()")
    page.press("ArrowRight")
    assert page.ask("document.getElementById('hover').textContent").split("\n")[0] == "step %d" % (step + 1)
    page.press("Escape")
    assert page.ask("document.getElementById('hover').hidden") is True


def test_dark_mode_turns_the_ground_dark_and_the_text_light(page):
    colours = "[document.body, document.querySelector('svg text')].map(e => getComputedStyle(e))"
    colours += ".map(s => [s.backgroundColor, s.fill])"
    light = page.ask(colours)
    page.dark()
    dark = page.ask(colours)
    assert light[0][0] == "rgb(255, 255, 255)" and dark[0][0] == "rgb(20, 23, 27)" and light[1][1] != dark[1][1]
