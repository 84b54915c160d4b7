# SPDX-License-Identifier: BSD-3-Clause
"""Every page in a real browser: no error, no request that fails or leaves this machine, nothing
wider than a phone; search, copying and the dark colours do what they are there for."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --window-size=1280,900"
).split()
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
SOUGHT = "masked_cross_entropy"
PICTURES = (
    "index.html",
    f"reference/{SOUGHT}.html",
    "reference/index.html",
    "reference/RowIntervals.html",
    "guide/padding_leaks.html",
    "how_it_works.html",
    "performance.html",
    "trust.html",
)
# Elements that stick out to the right, but for those in a box that scrolls.
WIDE = """
const wide = [];
for (const one of document.querySelectorAll('main *, article *')) {
  if (one.getBoundingClientRect().right <= arguments[0] + 1 || !one.offsetParent) continue;
  let box = one.parentElement;
  while (box && !['auto', 'scroll', 'hidden'].includes(getComputedStyle(box).overflowX)) {
    box = box.parentElement;
  }
  if (!box || box.querySelector('article')) wide.push(one.outerHTML.slice(0, 120));
}
if (document.documentElement.scrollWidth > arguments[0]) wide.unshift('the page itself scrolls');
return wide.slice(0, 3);
"""
LIGHTNESS = """
const [r, g, b] = getComputedStyle(arguments[0]).getPropertyValue(arguments[1]).match(/\\d+/g);
return (0.299 * r + 0.587 * g + 0.114 * b) / 255;
"""


def start(profile: str) -> Any:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    return webdriver.Chrome(options=options, service=service)


class Log:
    """What the console said, and requests that failed or went elsewhere, since the last time."""

    def __init__(self, driver: Any, base: str):
        self.driver, self.base = driver, base
        self.asked: dict[str, str] = {}  # address by request

    def new(self) -> Iterator[str]:
        for line in self.driver.get_log("browser"):
            if line["level"] == "SEVERE":
                yield f"console: {line['message']}"
        for line in self.driver.get_log("performance"):
            event = json.loads(line["message"])["message"]
            yield from self._about(event["method"], event["params"])

    def _about(self, event: str, told: dict[str, Any]) -> Iterator[str]:
        if event == "Network.requestWillBeSent":
            self.asked[told["requestId"]] = address = told["request"]["url"]
            if not address.startswith((self.base, "data:", "chrome:", "about:")):
                yield f"asks for {address}"
        elif event == "Network.responseReceived" and told["response"]["status"] >= 400:
            yield f"{told['response']['status']} {told['response']['url']}"
        elif event == "Network.loadingFailed" and not told.get("canceled"):
            if address := self.asked.get(
                told["requestId"]
            ):  # else no page asked: the browser's own
                yield f"{told['errorText']} {address}"


def waited(found: Callable[[], Any], seconds: float = 10.0) -> Any:
    """What ``found`` gives, once it gives something."""
    end = time.monotonic() + seconds
    while not (result := found()) and time.monotonic() < end:
        time.sleep(0.05)
    return result


def pages_are_clean(driver: Any, html: Path, base: str, log: Log) -> Iterator[str]:
    """Each page at the width of a phone, which is the narrower of two; wide ones load alike."""
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    width = PHONE["width"]  # not innerWidth, which grows with what is too wide
    names = sorted(path.relative_to(html).as_posix() for path in html.glob("**/*.html"))
    for name in tqdm(names, unit="page", disable=not sys.stderr.isatty()):
        driver.get(f"{base}/{name}")
        yield from (f"{name}: {message}" for message in log.new())
        yield from (
            f"{name}: wider than a phone: {one}" for one in driver.execute_script(WIDE, width)
        )
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def search_finds(driver: Any, base: str) -> Iterator[str]:
    from selenium.webdriver.common.by import By

    driver.get(f"{base}/search.html?q={SOUGHT}")
    results = waited(lambda: driver.find_elements(By.CSS_SELECTOR, "#search-results li a"))
    first = results[0].get_attribute("href") if results else "nothing"
    if f"/reference/{SOUGHT}.html" not in first:
        yield f"search for {SOUGHT} finds first: {first}"


def code_is_copied(driver: Any, base: str) -> Iterator[str]:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    allowed = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": base}
    driver.execute_cdp_cmd("Browser.grantPermissions", allowed)
    driver.get(f"{base}/index.html")
    with_button = By.CSS_SELECTOR, "div.highlight:has(.copybtn)"
    if not (blocks := waited(lambda: driver.find_elements(*with_button))):
        yield "no code has a copy button"
        return
    block = blocks[0]
    ActionChains(driver).move_to_element(block).perform()  # it shows under the pointer alone
    block.find_element(By.CLASS_NAME, "copybtn").click()
    read = "navigator.clipboard.readText().then(arguments[0], error => arguments[0](`${error}`))"
    shown = block.find_element(By.TAG_NAME, "pre").text.strip()
    copied = waited(lambda: driver.execute_async_script(read).strip())
    if copied != shown:
        yield f"the copy button copied {copied!r} of {shown!r}"


def dark_is_dark(driver: Any, base: str) -> Iterator[str]:
    from selenium.webdriver.common.by import By

    driver.get(f"{base}/index.html")
    for wanted, limit in (("light", 0.85), ("dark", 0.25)):
        button = ".theme-toggle-header, .theme-toggle-content"
        for _ in range(3):
            if driver.execute_script("return document.body.dataset.theme") == wanted:
                break
            buttons = driver.find_elements(By.CSS_SELECTOR, button)
            next(one for one in buttons if one.is_displayed()).click()
        body = driver.find_element(By.TAG_NAME, "body")
        ground = driver.execute_script(LIGHTNESS, body, "background-color")
        text = driver.execute_script(LIGHTNESS, body, "color")
        right = ground > limit and text < 0.4 if wanted == "light" else ground < limit < text - 0.4
        if not right:
            yield f"{wanted}: background {ground:.2f}, text {text:.2f}"


def take_pictures(driver: Any, base: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        for kind in ("light", "dark", "phone"):
            scheme = "dark" if kind == "dark" else "light"
            feature = [{"name": "prefers-color-scheme", "value": scheme}]
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
            wide = {"width": 1280, "height": 1600, "deviceScaleFactor": 1, "mobile": False}
            size = {**PHONE, "height": 1700} if kind == "phone" else wide
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            driver.get(f"{base}/{name}")
            driver.execute_script(
                "localStorage.removeItem('theme'); document.body.dataset.theme = 'auto'"
            )
            path = folder / f"{name.replace('/', '_').removesuffix('.html')}_{kind}.png"
            driver.save_screenshot(str(path))
    print(f"pictures in {folder}")


def check(html: Path, base: str, pictures: Path | None) -> int:
    missing = [one for one in ("chromium", "chromedriver") if not shutil.which(one)]
    if missing:
        print(f"{' and '.join(missing)} missing: apt-get install chromium chromium-driver")
        return 1
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        driver = start(profile)
        try:
            log = Log(driver, base)
            problems = list(pages_are_clean(driver, html, base, log))
            for look in (search_finds, code_is_copied, dark_is_dark):
                problems += look(driver, base)
            problems += log.new()
            if pictures:
                take_pictures(driver, base, pictures)
        finally:
            driver.quit()
    number = len(list(html.glob("**/*.html")))
    print(
        "\n".join(problems)
        or f"{number} pages in Chromium: no error, none wider than a phone; "
        "search, copy button and dark colours work"
    )
    return bool(problems)
