"""The page of --page, in a headless Chromium where there is one, as a user's hands find it.    python -m pytest tests/test_page.py

Chromium is driven through a pipe (Chrome DevTools Protocol), so no package is needed. `python tests/test_page.py FOLDER` writes pictures of the page.
"""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from models.support import page  # noqa: E402
from models.support.evaluation import measure, record_of, row_of  # noqa: E402
from models.support.imaging import read_picture, resize, to_uint8  # noqa: E402
from models.support.metrics import psnr_y, ssim_y  # noqa: E402
from models.support.page import embed, figure_of, page_of  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")
NASTY = "a \"b\" 'c' <img src=x onerror=alert(1)> & </script> \udcff\n.png"


# -----------------------------------------------------------------------------
# a browser

class Browser:
    """A tab of a headless Chromium. What goes wrong on the page, and what it asks the network for, is in .errors and .requests."""

    def __init__(self, folder, width=1280, height=900):
        self.errors, self.requests, self.number = [], [], 0
        (theirs_in, self.out), (self.back, theirs_out) = os.pipe(), os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
                 "--remote-debugging-pipe", f"--user-data-dir={folder}", f"--window-size={width},{height}", "--hide-scrollbars", "about:blank"]
        self.process = subprocess.Popen(["bash", "-c", f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}', CHROMIUM, *flags],
                                        pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs_in), os.close(theirs_out)
        self.buffer, self.session = b"", None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")
        self.size(width, height)

    def message(self):
        while b"\0" not in self.buffer:
            data = os.read(self.back, 1 << 20)
            assert data, "Chromium has ended"
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(line)

    def __call__(self, method, **params):
        self.number += 1
        request = {"id": self.number, "method": method, "params": params} | ({"sessionId": self.session} if self.session else {})
        os.write(self.out, json.dumps(request).encode() + b"\0")
        while (answer := self.message()).get("id") != self.number:
            self.note(answer.get("method"), answer.get("params", {}))
        assert "error" not in answer, answer
        return answer["result"]

    def note(self, event, params):
        if event == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("file:", "data:")):
            self.requests.append(params["request"]["url"])
        if event in ("Runtime.exceptionThrown", "Log.entryAdded") or event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.errors.append(params)

    def open(self, path):
        self("Page.navigate", url=path.as_uri())
        ready = "document.readyState === 'complete' && [...document.images].every(i => i.complete) && location.protocol === 'file:'"
        for _ in range(30_000):
            if self.js(ready):
                return
            time.sleep(0.02)
        raise AssertionError("the page does not load")

    def size(self, width, height, mobile=False):
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def js(self, expression):
        result = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def mouse(self, *points, **more):
        """Press at the first point, move along, let go at the last."""
        for i, (x, y) in enumerate([*points, points[-1]]):
            kind = "mousePressed" if i == 0 else "mouseReleased" if i == len(points) else "mouseMoved"
            self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=int(i < len(points)), clickCount=1, **more)

    def touch(self, *moments):
        """Each moment is a list of fingers; then all are lifted."""
        for i, fingers in enumerate(moments):
            points = [{"x": x, "y": y, "id": n} for n, (x, y) in enumerate(fingers)]
            self("Input.dispatchTouchEvent", type="touchMove" if i else "touchStart", touchPoints=points)
        self("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def key(self, key, modifiers=0):
        text = {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, modifiers=modifiers, **(text if kind == "keyDown" else {}))

    def screenshot(self, path):
        Path(path).write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        os.close(self.out)      # which ends it
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.back)

    # what the page shows
    def splits(self):
        return self.js("[...document.querySelectorAll('[role=slider]')].map(e => +e.getAttribute('aria-valuenow'))")

    def zooms(self):
        """The size of every visible image as a multiple of its view's."""
        return self.js("[...document.querySelectorAll('.view')].map(v => [...v.querySelectorAll('.left img, .right img')].map("
                       "i => +(i.getBoundingClientRect().width / v.getBoundingClientRect().width).toFixed(3)))")

    def box(self, i=0):
        return self.js(f"(b => [b.left, b.top, b.width, b.height])(document.querySelectorAll('.view')[{i}].getBoundingClientRect())")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


# -----------------------------------------------------------------------------
# a page

METRICS = {"psnr_y": lambda x, hq: psnr_y(x, hq, 4), "ssim_y": lambda x, hq: ssim_y(x, hq, 4)}


def example(number=1, references=True, names=None, side=None):
    """A page of the example picture, its left half, ...: bicubic, something sharper, the original.  -> HTML"""
    lq, hq = (read_picture(ROOT / "assets" / file)[0] for file in ("example.png", "example_hq.png"))
    figures, rows = [], []
    versions = ["bicubic", "vosr-tiny", "reference"][: 3 if references else 2]
    for i in range(number):
        x, y = (lq[..., : 50 + i % 3 * 25, :], hq[..., : 200 + i % 3 * 100, :]) if number > 1 else (lq, hq)
        if side:
            x, y = resize(x, (side // 4, side // 4)), resize(y, (side, side))
        bicubic = resize(x, y.shape[-2:])
        sr = (0.4 * bicubic + 0.6 * y).clamp(0, 1)
        has = references and (number == 1 or i != 1)
        (found,), failed = measure([sr], bicubic, y if has else None, METRICS if references and number < 50 and not names else {}, f"no reference named {i}")
        absent = {"lpips": "needs a.pth"} | ({} if references else dict.fromkeys(METRICS, "needs --ref"))
        rows.append(row_of(names[i] if names else f"example-{i}.png", y.shape[-2:], 0.5, found, absent | failed))
        figures.append(figure_of(rows[-1:], [bicubic, sr, y][: 2 + has], versions, number * len(versions)))
    record = record_of(rows, "python sample.py lq/ --ref hq/ --page --prompt '<b>'", {"seed": 0, "scale": 4, "border": 4}, {}, [ROOT / "LICENSE"])
    return page_of("".join(figures), len(figures), versions, [record])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(example(3), encoding="utf-8")
    return path


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


# -----------------------------------------------------------------------------
# what is in the file

def test_self_contained():
    html = example(2)
    tags = Tags(html).found
    assert [tag for tag, _ in tags].count("img") == 5, "the second has no reference"
    assert all(a["src"].startswith("data:image/png;base64,") for tag, a in tags if tag == "img")
    assert not any(re.match("https?:|//", value or "") for _, a in tags for value in a.values()) and "url(" not in html
    assert "default-src 'none'" in html and "no reference named 1" in html and "needs a.pth" in html
    assert "<p>2 images by nanoSR." in html and "<p>1 image by nanoSR." in example(1, references=False)
    assert "python sample.py lq/ --ref hq/ --page --prompt &#x27;&lt;b&gt;&#x27;" in html and "border cut" in html


def test_odd_names_are_text():
    plain, odd = example(1, names=["a.png"]), example(1, names=[NASTY])
    odd.encode()    # no half characters
    assert [tag for tag, _ in Tags(plain).found] == [tag for tag, _ in Tags(odd).found]
    assert Tags(odd).found[-2][0] == "pre" and any(a.get("aria-label", "").startswith('Divider of a "b" \'c\' <img') for _, a in Tags(odd).found)


def test_small_pictures_are_exact_and_large_ones_fit(monkeypatch):
    x = torch.rand(1, 3, 30, 40, generator=torch.Generator().manual_seed(0))

    def opened(uri):
        return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))

    uri, note = embed(x, 1)
    assert note == "" and np.array_equal(opened(uri), to_uint8(x[0]))
    monkeypatch.setattr(page, "EXACT", 1000)
    uri, note = embed(x, 1)
    assert opened(uri).format == "JPEG" and opened(uri).size == (40, 30) and note == "shown here as JPEG, measured as PNG"
    monkeypatch.setattr(page, "MOST", 600)
    uri, note = embed(x, 2)
    assert opened(uri).size == (20, 15) and "at 50% of its size" in note


def test_fifty_pictures_stay_mailable():
    assert len(example(50, side=256)) < 12e6


# -----------------------------------------------------------------------------
# how it behaves

@needs_chromium
def test_divider(browser, file):
    browser.open(file)
    assert browser.splits() == [50, 50, 50]
    left, top, width, height = browser.box()
    assert width > 300 and top < 600
    y = top + height / 3
    browser.mouse((left + width / 2, y), (left + 0.4 * width, y), (left + 0.2 * width, y))
    assert browser.splits() == [20, 50, 50], "dragged by the line"
    browser.mouse((left + 0.9 * width, y))
    assert browser.splits() == [90, 50, 50], "called by a click"
    browser.mouse((left + 0.9 * width, y), (left + 5 * width, y))
    assert browser.splits() == [100, 50, 50], "not beyond the edge"
    grip = browser.js("(b => b.left + b.width / 2)(document.querySelector('.grip').getBoundingClientRect())")
    assert grip == pytest.approx(left + width, abs=1)
    browser("Emulation.setTouchEmulationEnabled", enabled=True)
    browser.touch([(left + 0.5 * width, y)], [(left + 0.4 * width, y)], [(left + 0.3 * width, y)])
    browser("Emulation.setTouchEmulationEnabled", enabled=False)
    assert browser.splits() == [30, 50, 50]


@needs_chromium
def test_a_finger_that_scrolls_moves_no_divider(browser, file):
    browser.size(390, 700, mobile=True)
    browser("Emulation.setTouchEmulationEnabled", enabled=True)
    try:
        browser.open(file)
        left, top, width, height = browser.box()
        browser.touch([(left + 0.7 * width, top + 0.6 * height)])
        assert browser.splits() == [70, 50, 50], "a tap calls it"
        for start in (0.7, 0.2):        # at the divider and beside it
            browser.open(file)
            x, y = left + start * width, top + 0.8 * height
            if start == 0.7:
                browser.touch([(x, y)])
            before = browser.splits()
            browser.touch(*([(x + i, y - 25 * i)] for i in range(8)))
            assert browser.js("new Promise(done => setTimeout(() => done(scrollY > 0), 300))") and browser.splits() == before
    finally:
        browser("Emulation.setTouchEmulationEnabled", enabled=False)
        browser.size(1280, 900)


@needs_chromium
def test_keyboard(browser, file):
    browser.open(file)
    browser.key("ArrowLeft")
    assert browser.splits() == [48, 48, 48], "nothing has the focus: all of them"
    browser.js("document.querySelectorAll('[role=slider]')[1].focus()")
    for key, value in (("ArrowRight", 50), ("ArrowUp", 52), ("PageDown", 42), ("Home", 0), ("ArrowLeft", 0), ("End", 100)):
        browser.key(key)
        assert browser.splits() == [48, value, 48]
    assert browser.js("document.querySelectorAll('[role=slider]')[1].getAttribute('aria-valuetext')") == "100 % bicubic, 0 % vosr-tiny"
    browser.key("+"), browser.key("+")
    assert {z for some in browser.zooms() for z in some} == {2}
    shift = "+document.documentElement.style.getPropertyValue('--x')"
    before = browser.js(shift)
    browser.key("ArrowRight", 8)
    assert browser.js(shift) == pytest.approx(before - 0.1) and browser.splits() == [48, 100, 48]
    browser.key("-")
    assert {z for some in browser.zooms() for z in some} == {1.414}
    browser.key("0")
    assert {z for some in browser.zooms() for z in some} == {1}
    assert browser.js("document.getElementById('fit').disabled")


@needs_chromium
def test_zoom_and_pan_are_shared(browser, file):
    browser.open(file)
    left, top, width, height = browser.box()
    u, v = 0.25, 0.6
    browser("Input.dispatchMouseEvent", type="mouseWheel", x=left + u * width, y=top + v * height, deltaX=0, deltaY=-60, modifiers=2)
    where = ("[...document.querySelectorAll('.left img')].map(i => {"
             "const a = i.getBoundingClientRect(), b = i.closest('.view').getBoundingClientRect();"
             "return [(b.left - a.left) / a.width, (b.top - a.top) / a.height] })")
    zoom = browser.zooms()[0][0]
    assert {z for some in browser.zooms() for z in some} == {zoom} and 1.4 < zoom < 1.6
    first, *others = browser.js(where)
    assert first[0] + u / zoom == pytest.approx(u, abs=0.01) and first[1] + v / zoom == pytest.approx(v, abs=0.01), "stays under the pointer"
    assert all(other == pytest.approx(first, abs=0.01) for other in others)
    at = (left + 0.75 * width, top + height / 2)        # not at the divider: pans
    browser.mouse(at, (at[0] + 0.1 * width, at[1]))
    assert browser.splits() == [50, 50, 50] and browser.js(where)[1][0] == pytest.approx(first[0] - 0.1 / zoom, abs=0.02)
    middle = left + width / 2, top + height / 2
    browser.mouse(middle, (left + 0.6 * width, middle[1]))
    assert browser.splits() == [60, 50, 50], "at the divider: moves it"
    browser.key("0")
    browser("Emulation.setTouchEmulationEnabled", enabled=True, maxTouchPoints=2)
    browser.touch([(middle[0] - 30, middle[1]), (middle[0] + 30, middle[1])], [(middle[0] - 60, middle[1]), (middle[0] + 60, middle[1])])
    browser("Emulation.setTouchEmulationEnabled", enabled=False)
    assert {z for some in browser.zooms() for z in some} == {2}, "pinched"
    browser.js("document.getElementById('in').click()")
    assert browser.js("document.getElementById('zoom').textContent") == "2.8×"
    browser.js("document.getElementById('fit').click()")
    assert {z for some in browser.zooms() for z in some} == {1}


@needs_chromium
def test_pairs(browser, file):
    browser.open(file)
    shown = "[...document.querySelectorAll('.view')].map(v => ['left', 'right'].map(s => v.querySelector('.layer.' + s).dataset.name).join())"
    tags = "[...document.querySelectorAll('.view')].map(v => [...v.querySelectorAll('.tag')].map(e => e.textContent).join())"
    for i, pair in enumerate(("bicubic,vosr-tiny", "vosr-tiny,reference", "bicubic,reference")):
        browser.js(f"document.querySelectorAll('input')[{i}].click()")
        assert browser.js(shown) == browser.js(tags) == [pair] * 3
    assert browser.js("document.querySelectorAll('.view')[1].querySelector('.layer.right').innerText") == "no reference"


@needs_chromium
def test_keys_after_a_click_on_a_pair(browser, file):
    """They do what the help says; with the focus on a pair, which only Tab brings, arrows choose another."""
    browser.open(file)
    x, y = browser.js("(b => [b.left + b.width / 2, b.top + b.height / 2])(document.querySelectorAll('label')[1].getBoundingClientRect())")
    browser.mouse((x, y))
    checked = "[...document.querySelectorAll('input')].findIndex(i => i.checked)"
    assert browser.js(checked) == 1
    browser.key("ArrowLeft"), browser.key("+")
    assert browser.splits() == [48, 48, 48] and {z for some in browser.zooms() for z in some} == {1.414} and browser.js(checked) == 1
    browser.js("document.querySelectorAll('input')[1].focus()")
    browser.key("0"), browser.key("ArrowRight")
    assert {z for some in browser.zooms() for z in some} == {1} and browser.splits() == [48, 48, 48]


@needs_chromium
def test_buttons_stay_with_their_labels(browser, tmp_path):
    names = ["bicubic", "vosr-tiny", "s3diff-tiny", "gramsr-tiny", "reference"]
    x = torch.rand(1, 3, 40, 60)
    rows = [row_of("a.png", (40, 60), 0.5, {}, {}) for _ in names[1:4]]
    records = [record_of([row], "", {"seed": 0, "scale": 4, "border": 4}, {}, []) for row in rows]
    (tmp_path / "page.html").write_text(page_of(figure_of(rows, [x] * 5, names, 5), 1, names, records), encoding="utf-8")
    for width in (320, 390, 500, 700, 1000):
        browser.size(width, 800, mobile=width < 500)
        browser.open(tmp_path / "page.html")
        apart = browser.js("""[...document.querySelectorAll('label')].map(label => {
            const range = document.createRange(), text = label.lastChild
            range.setStart(text, 0), range.setEnd(text, 1)
            const a = label.firstChild.getBoundingClientRect(), b = range.getBoundingClientRect()
            return Math.abs(a.top + a.height / 2 - b.top - b.height / 2)
        })""")
        assert len(apart) == 10 and max(apart) < 8, (width, apart)
    browser.size(1280, 900)


@needs_chromium
def test_without_scripts_all_versions_stand_side_by_side(browser, file):
    browser("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(file)
        boxes = browser.js("""[...document.querySelectorAll('.layer img')].map(i => {
            const b = i.getBoundingClientRect(), e = document.elementsFromPoint(b.left + b.width / 2, b.top + 9)
            return [Math.round(b.left), Math.round(b.top), Math.round(b.width), Math.round(b.height)] })""")
        assert len(boxes) == 8 and len({tuple(box) for box in boxes}) == 8 and all(w > 100 and h > 20 for _, _, w, h in boxes), boxes
        assert browser.js("document.body.innerText").count("vosr-tiny") >= 3 and "Divider" not in browser.js("document.body.innerText")
    finally:
        browser("Emulation.setScriptExecutionDisabled", value=False)


@needs_chromium
def test_light_dark_small_and_silent(browser, file):
    """No error, no request, no sideways scrolling, whatever the screen."""
    colours = set()
    for scheme in ("light", "dark"):
        browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        browser.open(file)
        colours.add(browser.js("getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2
    for width in (320, 700, 1280):
        browser.size(width, 800, mobile=width < 500)
        assert browser.js("document.documentElement.scrollWidth <= innerWidth"), width
    browser.size(1280, 900)
    (file.parent / "odd.html").write_text(example(1, names=[NASTY], references=False), encoding="utf-8")
    browser.open(file.parent / "odd.html")
    assert browser.js("document.querySelector('h2').textContent").startswith("a \"b\" 'c' <img src=x")
    assert browser.errors == [] and browser.requests == []


def main(folder):
    """Pictures of the page, to be looked at."""
    import tempfile
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        browser = Browser(temporary)
        for name, number, size, scheme in (("one-light", 1, (1280, 900), "light"), ("three-dark", 3, (1280, 900), "dark"),
                                           ("phone", 1, (390, 844), "light"), ("many-light", 7, (1600, 1000), "light")):
            (folder / f"{name}.html").write_text(example(number), encoding="utf-8")
            browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            browser.size(*size, mobile=name == "phone")
            browser.open(folder / f"{name}.html")
            browser.screenshot(folder / f"{name}.png")
            if name == "three-dark":
                [browser.key("+") for _ in range(6)]
                browser.js("document.querySelector('[role=slider]').focus()")
                browser.screenshot(folder / f"{name}-zoomed.png")
            browser.js("scrollTo(0, 1e6)")
            browser.screenshot(folder / f"{name}-end.png")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
