"""The commands and programs on the pages under docs/how-to run, page by page, as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nld_cuda

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs/how-to").glob("*.md"))
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# torchrun chooses a free port only if told so
COMMANDS = {
    "nld": "-m nld_cuda", "python": "", "torchrun": "-m torch.distributed.run --standalone",
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_page(page: Path, tmp_path: Path) -> None:
    """All bash blocks are one script, all Python blocks one program, as a reader would go on."""
    blocks = BLOCK.findall(page.read_text())
    script = "set -euo pipefail\n" + "\n".join(text for kind, text in blocks if kind == "bash")
    program = "\n".join(text for kind, text in blocks if kind == "python")
    assert "nld " in script and "import nld_cuda" in program
    commands = tmp_path / "bin"  # of this Python, whichever else is installed
    commands.mkdir()
    for name, options in COMMANDS.items():
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {options} "$@"\n')
        (commands / name).chmod(0o755)
    package = str(Path(nld_cuda.__file__).resolve().parent.parent)
    environment = {
        **os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": package,
    }  # fmt: skip
    for line in (["bash", "-c", script], [sys.executable, "-c", program]):
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        assert done.stdout.strip()


def test_every_page_is_linked() -> None:
    readme = (ROOT / "README.md").read_text()
    for page in PAGES:
        assert f"docs/how-to/{page.name}" in readme
