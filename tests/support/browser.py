"""A headless Chromium, driven by selenium, and what its accessibility tree says."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip


def missing() -> str | None:
    """Return what a browser test lacks on this machine, or None."""
    for program, package in (("chromium", "chromium"), ("chromedriver", "chromium-driver")):
        if shutil.which(program) is None:
            return f"no {program} (apt-get install {package})"
    return None if importlib.util.find_spec("selenium") else "no selenium (pip install selenium)"


@contextlib.contextmanager
def browser(width: int = 1280, height: int = 860) -> Iterator[Any]:
    """Yield a selenium driver of a browser with an empty profile."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory() as profile:
        options = ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


INTERACTIVE = {"button", "combobox", "textbox", "checkbox", "spinbutton", "link", "searchbox"}

CONTRAST = """
const parse = (color) => (color.match(/[\\d.]+/g) || []).map(Number);
const light = ([r, g, b]) => {
  const f = (v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b);
};
const behind = (node) => {
  for (; node; node = node.parentElement) {
    const color = parse(getComputedStyle(node).backgroundColor);
    if (color.length === 3 || color[3] === 1) return color;
  }
  return [255, 255, 255];
};
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let text; (text = walker.nextNode()); ) {
  const node = text.parentElement;
  if (!text.data.trim() || !node.checkVisibility({ visibilityProperty: true })) continue;
  const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < 4.5) found.push(`${ratio.toFixed(2)}: ${text.data.trim().slice(0, 40)} (${node.className})`);
}
return found;
"""
"""Text whose contrast with its background is below 4.5 to 1 (WCAG AA), as the browser paints it."""


def accessibility_faults(driver: Any) -> list[str]:
    """Return what Chromium's accessibility tree and its styles say that is wrong with the page, one line each."""
    nodes = driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    seen = [node for node in nodes if not node.get("ignored")]
    faults = []
    for node in seen:
        role, name = node.get("role", {}).get("value"), node.get("name", {}).get("value", "")
        if role in INTERACTIVE and not name.strip():
            faults.append(f"{role} without a name")
        if role in ("image", "img") and not name.strip():
            faults.append("image without a name")
    roles = [node.get("role", {}).get("value") for node in seen]
    faults += [f"no {role}" for role in ("main", "banner", "contentinfo", "heading", "status") if role not in roles]
    ids = driver.execute_script("return [...document.querySelectorAll('[id]')].map((node) => node.id)")
    faults += [f"id {name} twice" for name in {one for one in ids if ids.count(one) > 1}]
    if not driver.execute_script("return document.documentElement.lang && document.title"):
        faults.append("no language or no title")
    levels = driver.execute_script(
        "const shown = [...document.querySelectorAll('h1,h2,h3,h4')].filter((node) => node.checkVisibility());"
        "return shown.map((node) => +node.tagName[1]);"
    )
    faults += [f"heading of level {b} after {a}" for a, b in pairwise(levels) if b > a + 1]
    return faults + [f"contrast {one}" for one in driver.execute_script(CONTRAST)]
