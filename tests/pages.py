"""Pages as tests see them: what their HTML is made of, and how a real browser lays them out."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

EVIL = "<script>alert(1)</script>\" onerror='alert(2)' & </pre></style>"


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.charts: list[str] = []
        self.lines: list[dict[str, Any]] = []
        """Polylines: chart, label, class, number of points."""
        self._within = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.text += " "
        self.elements.append((tag, values))
        if tag == "polyline":
            points = len(values["points"].split())
            self.lines.append({"chart": self.charts[-1], "class": values["class"], "points": points})
        self._within = "svg title" if tag == "title" and "id" in values else tag

    def handle_data(self, data: str) -> None:
        if self._within == "svg title":
            self.charts.append(data)
        elif self._within == "title" and self.lines and data.strip():
            self.lines[-1].setdefault("label", data)
        self.text += data
        self._within = "" if data.strip() else self._within

    def points(self, chart: str, name: str = "line") -> list[int]:
        """Points of the lines of a chart."""
        return [line["points"] for line in self.lines if line["chart"] == chart and name in line["class"]]


def contrast(one: str, other: str) -> float:
    """Of WCAG 2: ratio of the relative luminances, from 1 to 21."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def find_browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium here")
    return found


FRAME = """<!DOCTYPE html><meta name="color-scheme" content="light dark">
<iframe style="width: 375px; height: 800px; border: 0" srcdoc="%s"></iframe>"""
"""As narrow as a phone, which a browser's own window does not become."""
PROBE = """<script>
document.querySelectorAll("details").forEach(one => { one.open = true; });
const pictures = [...document.images];
parent.document.title = JSON.stringify({
  inner: innerWidth, scroll: document.documentElement.scrollWidth,
  dark: matchMedia("(prefers-color-scheme: dark)").matches, paper: getComputedStyle(document.body).backgroundColor,
  pictures: pictures.length, broken: pictures.filter(one => !one.naturalWidth).length,
});
</script></body>"""


def look(chromium: str, file: Path, folder: Path, is_dark: bool) -> dict[str, Any]:
    """What a browser makes of a page in a frame as wide as a phone."""
    frame = folder / "frame.html"
    frame.write_text(FRAME % html.escape(file.read_text().replace("</body>", PROBE)))
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if is_dark else 1}", "--dump-dom", frame.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    (seen,) = re.findall("<title>(.*?)</title>", done.stdout.partition("<iframe")[0])
    return dict(json.loads(html.unescape(seen)))
