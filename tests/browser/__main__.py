"""``python -m tests.browser PAGE``: look at a report in a real Chromium without a screen.

The page is opened from disk, at the widths of a phone, a tablet and a desk, light and dark, without
scripts, and printed. A fault is a message on the console, a request that leaves the disk, a picture
or chart without a size, a page wider than its window, a link that leads nowhere, or what axe-core
calls serious. The driver and axe-core are the extra ``browser``, put into ``.venv.browser`` when
they are first needed, so that the environment stays the locked one; Chromium is the system's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[2]
EXTRA = ROOT / ".venv.browser"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SIZES = {390: 844, 820: 1180, 1440: 900}  # width: height of a window, CSS pixels
THEMES = ("light", "dark")
SERIOUS = ("serious", "critical")
PLACES = (
    "top",
    "claims",
    "explore",
    "chart-outcomes",
    "chart-claims",
    "paper",
    "ours",
)  # what is kept as a picture
EMPTY = """() => [...document.querySelectorAll('img, .chart.ready .live svg')]
  .filter(e => !e.getBoundingClientRect().width || !e.getBoundingClientRect().height
               || (e.tagName === 'IMG' && !e.naturalWidth))
  .map(e => e.alt || e.closest('article').id)"""
STILL = """() => [...document.querySelectorAll('.still svg')]
  .filter(e => !e.getBoundingClientRect().height).map(e => e.closest('article').id)"""
WIDE = """() => document.documentElement.scrollWidth - window.innerWidth"""
SHOWN = "#vg-tooltip-element.visible td.value"
PATIENCE = 300  # tenths of a second
MARKS = """id => [...document.querySelectorAll(`#${id} .live svg path`)]
  .map(e => (e.getAttribute('d') || '') + e.getAttribute('transform')).join()"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.browser", description=__doc__)
    parser.add_argument("page", type=Path, help="an HTML file that kelib report wrote")
    parser.add_argument("--pictures", type=Path, help="keep screenshots and the print as PDF there")
    given = parser.parse_args()
    if not given.page.is_file():
        return refuse(f"no page {given.page}: python -m kelib report PROFILE writes one")
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        return refuse(
            f"no Chromium found (looked for {', '.join(NAMES)}): install it with your package "
            "manager (apt install chromium, dnf install chromium, pacman -S chromium, brew install "
            "--cask chromium) or name it (CHROMIUM=/path/to/it)"
        )
    install()
    if given.pictures:
        given.pictures.mkdir(parents=True, exist_ok=True)
    faults = list(look(given.page.resolve(), program, given.pictures))
    for fault in faults:
        print(f"fault: {fault}")
    print(f"{given.page}: {len(faults)} faults")
    return 1 if faults else 0


def refuse(message: str) -> int:
    print(f"kelib: {message}", file=sys.stderr)
    return 1


def install() -> None:
    """The extra ``browser`` in a folder of its own, at versions of the lock where it has them."""
    if not (EXTRA / ".ready").exists():
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        print("kelib: fetching a browser driver and axe-core: 50 MB, 170 MB on disk, once")
        shutil.rmtree(EXTRA, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(EXTRA)]
        pip += ["--constraint", str(ROOT / "requirements.lock")]
        subprocess.run([*pip, *project["optional-dependencies"]["browser"]], check=True)
        (EXTRA / ".ready").touch()
    sys.path.insert(0, str(EXTRA))


def look(file: Path, program: str, pictures: Path | None) -> Iterator[str]:
    """What is wrong with a page, in every way it is looked at."""
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses root otherwise
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=arguments)
        print(f"Chromium {browser.version}")
        for width, height in SIZES.items():
            for theme in THEMES:
                context = browser.new_context(
                    viewport={"width": width, "height": height}, color_scheme=theme
                )
                where = f"{width} px, {theme}"
                page, said = opened(context, file)
                yield from (f"{where}: {fault}" for fault in seen(page))
                if width == max(SIZES) and theme == THEMES[0]:
                    yield from pointing(page)
                    yield from (f"menus: {fault}" for fault in menus(page))
                    yield from links(page, file)
                    yield from keyboard(page)
                if width != 820:
                    yield from (f"{where}: {fault}" for fault in accessible(page))
                if pictures:
                    keep(page, pictures, f"{width}-{theme}")
                yield from (f"{where}: {fault}" for fault in said)
                context.close()
        context = browser.new_context(java_script_enabled=False)
        page, said = opened(context, file)
        yield from (f"without scripts: no picture of {name}" for name in page.evaluate(STILL))
        yield from (f"without scripts: {fault}" for fault in said)
        context.close()
        yield from printed(browser, file, pictures)
        browser.close()


def opened(context: Any, file: Path) -> tuple[Any, list[str]]:
    """The page, and a list that fills with what it says on the console and asks of a network."""
    page, said = context.new_page(), []

    def heard(message: Any) -> None:
        if message.type in ("error", "warning"):
            said.append(f"console: {message.text}")

    def asked(request: Any) -> None:
        if urlsplit(request.url).scheme not in ("file", "data", "blob"):
            said.append(f"asks for {request.url}")

    page.on("console", heard)
    page.on("pageerror", lambda error: said.append(f"script: {error}"))
    page.on("request", asked)
    page.goto(file.as_uri())
    return page, said


def seen(page: Any) -> Iterator[str]:
    """Scroll to every chart, then look for what has no size and what is too wide."""
    for chart in page.query_selector_all(".chart"):
        chart.scroll_into_view_if_needed()
        name = chart.get_attribute("id")
        try:
            page.wait_for_selector(f"#{name} .live svg", timeout=100 * PATIENCE)
        except Exception as error:  # the driver's own class is not importable by name here
            yield f"{name} was not drawn: {str(error).splitlines()[0]}"
    yield from (f"no size: {name}" for name in page.evaluate(EMPTY))
    if (over := page.evaluate(WIDE)) > 0:
        yield f"{over} px wider than the window"


def menus(page: Any) -> Iterator[str]:
    """Another choice in a menu must change what is drawn."""
    for chart in page.query_selector_all(".chart"):
        name = chart.get_attribute("id")
        for place, menu in enumerate(chart.query_selector_all("select")):
            before = page.evaluate(MARKS, name)
            menu.select_option(index=menu.evaluate("e => e.options.length") - 1)
            if not comes(lambda: page.evaluate(MARKS, name) != before, page):  # noqa: B023
                yield f"menu {place + 1} of {name} changes nothing"


def pointing(page: Any) -> Iterator[str]:
    """At a point of a chart its values must be shown."""
    for chart in page.query_selector_all(".chart"):
        points = chart.query_selector_all(".live svg .mark-symbol[aria-roledescription] path")
        if points:
            points[-1].scroll_into_view_if_needed()
            box = points[-1].bounding_box()
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        if not points or not comes(lambda: page.query_selector(SHOWN), page):
            yield f"no values are shown at a point of {chart.get_attribute('id')}"
        page.mouse.move(0, 0)
        comes(lambda: not page.query_selector(SHOWN), page)


def comes(true: Callable[[], Any], page: Any) -> bool:
    """Whether something becomes true while the page is given time, on a busy machine too."""
    for _ in range(PATIENCE):
        if true():
            return True
        page.wait_for_timeout(100)
    return False


def links(page: Any, file: Path) -> Iterator[str]:
    """Links into the page must have a target in it, links to files must have the file."""
    for href in page.eval_on_selector_all("a[href]", "all => all.map(a => a.getAttribute('href'))"):
        parts = urlsplit(href)
        if parts.scheme in ("http", "https"):
            continue
        if not parts.path and not page.query_selector(f'[id="{parts.fragment}"]'):
            yield f"no place {href}"
        if parts.path and not (file.parent / unquote(parts.path)).exists():
            yield f"no file {href}"


def keyboard(page: Any) -> Iterator[str]:
    """The first stop of the keyboard leads past the contents; every menu is one of its stops."""
    page.reload()
    page.keyboard.press("Tab")
    if page.evaluate("document.activeElement.className") != "skip":
        yield "the first stop of the Tab key is not the skip link"
    if page.evaluate("[...document.querySelectorAll('select, summary')].some(e => e.tabIndex < 0)"):
        yield "a menu or a fold cannot be reached by keyboard"


def accessible(page: Any) -> Iterator[str]:
    """What axe-core finds serious or worse."""
    from axe_playwright_python.sync_playwright import Axe

    for found in Axe().run(page).response["violations"]:
        if found["impact"] in SERIOUS:
            places = found["nodes"]
            what = f"axe {found['id']} ({found['impact']}, {len(places)})"
            yield f"{what}: {places[0]['html'][:160]}"


def printed(browser: Any, file: Path, pictures: Path | None) -> Iterator[str]:
    """On paper the charts are still pictures and every fold is open."""
    context = browser.new_context()
    page, said = opened(context, file)
    list(seen(page))
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    yield from (f"print: no picture of {name}" for name in page.evaluate(STILL))
    if page.query_selector("details:not([open])"):
        yield "print: something stays folded"
    if page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)":
        yield "print: the dark page goes to paper"
    paper = page.pdf(format="A4", margin=dict.fromkeys(("top", "bottom", "left", "right"), "14mm"))
    if not paper.startswith(b"%PDF"):
        yield "print: no PDF"
    if pictures:
        (pictures / "print.pdf").write_bytes(paper)
    yield from (f"print: {fault}" for fault in said)
    context.close()


def keep(page: Any, pictures: Path, name: str) -> None:
    """Screenshots of the places that a reader sees first."""
    for place in PLACES:
        at = page.query_selector("header" if place == "top" else f"#{place}")
        if at:
            at.evaluate("e => e.scrollIntoView()")
            page.wait_for_timeout(400)
            page.screenshot(path=pictures / f"{name}-{place}.png")


if __name__ == "__main__":
    sys.exit(main())
