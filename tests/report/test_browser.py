"""How a browser shows the page: on a phone and on a desk, light and dark, and on paper."""

import io
import shutil

import numpy as np
import pytest
from example_run import change, written
from matplotlib import image

from spin_jax.report import drawing

LONG = "It depends on what is asked. " * 12

_QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
_QUIET += "--disable-component-update --disable-sync"

# Each text's contrast with the ground behind it, by WCAG 2: [ratio / what it should be, what], least first.
_CONTRAST = """() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number)
  const light = ([r, g, b]) => [r, g, b].reduce((sum, value, n) => {
    const v = value / 255
    return sum + [0.2126, 0.7152, 0.0722][n] * (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  }, 0)
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const color = rgb(getComputedStyle(e).backgroundColor)
      if (color.length < 4 || color[3] > 0) return color
    }
    return [255, 255, 255]
  }
  const found = []
  const add = (element, color, least) => {
    const [a, b] = [light(rgb(color)), light(ground(element))]
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)
    found.push([ratio / least, `${element.tagName} ${element.textContent.slice(0, 40)} ${ratio}`])
  }
  for (const element of document.querySelectorAll('body *')) {
    const style = getComputedStyle(element)
    if ([...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) {
      add(element, style.color, 4.5)
    }
  }
  return found.sort((a, b) => a[0] - b[0])
}"""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    if path is None:
        pytest.skip("no Chromium is here")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=_QUIET.split())
        yield opened
        opened.close()


@pytest.fixture(scope="module", params=["a run", "long answers", "several runs"])
def shown(request, several, tmp_path_factory):
    """A page's file."""
    folder = tmp_path_factory.mktemp("shown")
    if request.param == "several runs":
        written(several, folder / "page.html")
        return folder / "page.html"
    copied = shutil.copytree(several[0], folder / "run")
    if request.param == "long answers":
        for path in copied.glob("*/samples.jsonl"):
            change(path, lambda row: {**row, "real": "x" * 300, "generated": LONG + "y" * 500})
        change(copied / "summary.json", lambda row: {**row, f"{'a_very_long_task_name' * 3}/acc": 0.5})
    written([copied], folder / "page.html")
    return folder / "page.html"


def open_page(browser, path, width, scheme):
    """The page, what it asked for, and what the browser complained of."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri(), wait_until="networkidle")
    return page, [url for url in asked if not url.startswith("data:")], complaints


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1440])
def test_a_browser_shows_it(width, scheme, shown, browser):
    page, asked, complaints = open_page(browser, shown, width, scheme)
    assert asked == [shown.as_uri()]
    assert complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    widths = page.evaluate(
        "[...document.images].map(image => image.naturalWidth && image.getBoundingClientRect().width)"
    )
    assert min(widths) * 9 / (3.8 * 72) >= 10  # pixels of the smallest text: it can be read on a phone
    spilled = page.evaluate(
        "[...document.querySelectorAll('figure')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    )
    assert spilled == 0
    contrasts = page.evaluate(_CONTRAST)
    assert len(contrasts) > 100
    assert contrasts[0][0] >= 1, contrasts[:3]
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 26)")
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_color_of_a_curve_is_seen(scheme, shown, browser):
    """As the browser shows it on the page's ground, after the style sheet's filter: 3:1 or more."""
    page, _, _ = open_page(browser, shown, 1440, scheme)
    key = page.locator(".key:has(path)").first
    for color in drawing.COLORS:
        key.locator("path").evaluate("(path, color) => path.setAttribute('stroke', color)", color)
        pixels = image.imread(io.BytesIO(key.screenshot()))[..., :3]
        light = np.where(pixels <= 0.03928, pixels / 12.92, ((pixels + 0.055) / 1.055) ** 2.4)
        light = light @ [0.2126, 0.7152, 0.0722] + 0.05
        assert light.max() / light.min() >= 3, (color, light.max() / light.min())
    page.close()


def test_charts_are_light_on_dark(shown, browser):
    """Text and axes of a chart, which is an image of its own, change with the page."""
    for scheme, has_light_text in (("light", False), ("dark", True)):
        page, _, _ = open_page(browser, shown, 1440, scheme)
        pixels = image.imread(io.BytesIO(page.locator("figure > img").first.screenshot()))[..., :3]
        ground = np.median(pixels, (0, 1))
        farthest = pixels.reshape(-1, 3)[np.abs(pixels - ground).sum(-1).argmax()]
        assert np.abs(farthest - ground).min() > 0.6
        assert (farthest > ground).all() == has_light_text
        page.close()


def test_print_is_light(shown, browser):
    page, _, _ = open_page(browser, shown, 794, "dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    contrasts = page.evaluate(_CONTRAST)
    assert contrasts[0][0] >= 1, contrasts[:3]
    assert page.evaluate("document.documentElement.scrollWidth") <= 794
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()
