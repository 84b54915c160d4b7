# SPDX-License-Identifier: BSD-3-Clause
"""Build the site into build/docs/html, strictly: what Sphinx warns of is an error.

``--check`` opens every page of it in a headless Chromium (apt-get install chromium chromium-driver)
and says what is wrong; ``--screenshots`` leaves pictures in build/docs/screenshots.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import shutil
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "docs"
HTML = BUILD / "html"


def build() -> int:
    """All pages anew, as Sphinx sees no change of our own extensions."""
    from sphinx.cmd.build import main as sphinx

    shutil.rmtree(HTML, ignore_errors=True)
    switches = ["--fail-on-warning", "--keep-going", "--quiet", "--fresh-env", "--write-all"]
    return sphinx([*switches, "--doctree-dir", f"{BUILD}/doctrees", str(ROOT / "docs"), str(HTML)])


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def serve(folder: Path) -> http.server.ThreadingHTTPServer:
    """On 127.0.0.1, at a port that is free."""
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.site", description=__doc__)
    parser.add_argument("--check", action="store_true", help="open every page in a browser")
    parser.add_argument("--screenshots", action="store_true", help="as --check, with pictures")
    parser.add_argument("--serve", action="store_true", help="show it here until Ctrl-C")
    options = parser.parse_args(arguments)
    if failed := build():
        return failed
    print(f"built {len(list(HTML.glob('**/*.html')))} pages: {HTML / 'index.html'}")
    if options.check or options.screenshots:
        from . import browser

        server = serve(HTML)
        base = f"http://127.0.0.1:{server.server_port}"
        return browser.check(HTML, base, BUILD / "screenshots" if options.screenshots else None)
    if options.serve:
        server = serve(HTML)
        print(f"http://127.0.0.1:{server.server_port}")
        threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
