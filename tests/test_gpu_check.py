"""scripts/gpu_check.py without a GPU: sections, time limits, reports; bytes of attention."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest

import gpu_check
from gpu_check import Check, Result
from nld_cuda.bench import traffic


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(out), *arguments])
    return gpu_check.main()


def passes(check: Check) -> Result:
    code, output = check.run([sys.executable, "-c", "print('fine')"], 60)
    return Result("passes", code == 0, summary=gpu_check.last_lines(output))


def fails(check: Check) -> Result:
    code, output = check.run([sys.executable, "-c", "print('FAILED one'); exit(3)"], 60)
    return Result("fails", code == 0, details={"failed": gpu_check.failures(output)})


def raises(check: Check) -> Result:
    raise ValueError("no such thing")


def test_a_failing_section_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sections = {f.__name__: f for f in (raises, fails, passes)}
    monkeypatch.setattr(gpu_check, "SECTIONS", sections)
    assert run(monkeypatch, tmp_path, "--sections", "raises,fails,passes") == 2
    report = json.loads((tmp_path / "report.json").read_text())["sections"]
    assert [(r["name"], r["passed"]) for r in report] == [
        ("raises", False), ("fails", False), ("passes", True),
    ]  # fmt: skip
    assert report[0]["summary"] == "ValueError: no such thing"
    assert report[2]["summary"] == "fine"
    page = (tmp_path / "report.md").read_text()
    assert "| fails | FAILED |" in page and "- FAILED one" in page
    assert "exit code 3" in (tmp_path / "log.txt").read_text()
    assert len(list(tmp_path.iterdir())) == 3


def test_what_takes_too_long_is_stopped_with_its_children(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(alive)!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    check = Check(None, tmp_path, time.monotonic() + 1)  # type: ignore[arg-type]
    begin = time.monotonic()
    code, output = check.run([sys.executable, "-c", parent], 60)
    assert code == 124 and "stopped after 1 s" in output
    assert time.monotonic() - begin < 2.5
    time.sleep(3)
    assert not alive.exists(), "a child went on"


def test_no_section_starts_after_the_deadline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_check, "SECTIONS", {"passes": passes})
    assert run(monkeypatch, tmp_path, "--limit-s", "0") == 1
    assert "not started" in (tmp_path / "report.md").read_text()


def test_options(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, "--list") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in gpu_check.SECTIONS)
    for wrong, message in (
        (["--sections", "env,nothing"], "--sections must be of env,build,.*got nothing"),
        (["--library", str(tmp_path / "none.so")], "--library must be a file"),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, tmp_path, *wrong)
        error = " ".join(capsys.readouterr().err.split())
        assert re.search(message, error), error


def test_sources_have_a_name_without_git() -> None:
    assert len(gpu_check.source_hash()) == 12
    assert gpu_check.first_line(["no-such-program"]) == "none"


def test_traffic_of_attention() -> None:
    """One layer of an 8B model: 4096 bytes a key, 512 KiB of q and out for 32 rows."""
    work = traffic.attention([(32, 1000)] * 3, 32, 8, 128, 2, 3 * 32 * 1000)
    lse = 3 * 32 * 32 * 4
    assert work.floor_bytes == 3 * (4096 * 1000 + 524288) + lse
    assert work.num_bytes == work.floor_bytes, "32 rows x 4 heads are one tile"
    assert work.flops == 3 * 524288 * 1000
    prompt = traffic.attention([(100, 1000)], 32, 8, 128, 2, 1)  # 400 packed rows: 4 tiles
    assert prompt.num_bytes - prompt.floor_bytes == 3 * 4096 * 1000
