"""benchmarks/bench_build.py: what it reads out of a build."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest

import bench_build

LOG = """# ninja log v7
0\t1500\t17\tCMakeFiles/nld_ops.dir/csrc/attention/launch_plan.cu.o\tab
10\t61010\t17\tCMakeFiles/nld_ops.dir/csrc/attention/launch_sm80_f16_64.cu.o\tcd
5\t2005\t17\tCMakeFiles/nld_cpu_avx2.dir/csrc/sampler/cpu.cpp.o\tef
2010\t2020\t17\tlibnld_ops.so\t01
"""


def test_steps_of_a_build() -> None:
    found = bench_build.steps(LOG)
    assert [seconds for seconds, _ in found] == [61.0, 2.0, 1.5, 0.01]
    assert bench_build.short(found[0][1]) == "csrc/attention/launch_sm80_f16_64.cu"
    assert bench_build.short(found[1][1]) == "csrc/sampler/cpu.cpp (avx2)"


def test_figures_of_a_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a pip that only leaves what a build leaves."""
    sources, wheels = tmp_path / "sources", tmp_path / "wheels"
    logs = sources / "build/cmake-cpython-311"
    logs.mkdir(parents=True)
    wheels.mkdir()

    def pip(command: list[str], env: dict[str, str], **_: Any) -> Any:
        assert command[3] == "wheel" and command[-1] == str(sources)
        assert env["CCACHE_DISABLE"] == "1" and env["MAX_JOBS"] == "3"
        (logs / ".ninja_log").write_text(LOG)
        with zipfile.ZipFile(wheels / "x.whl", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("nld_cuda/libnld_ops.so", b"0" * 2_000_000)
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(bench_build.subprocess, "run", pip)
    figures = bench_build.build(sources, wheels, 3)
    assert figures["library_mb"] == 2.0 and figures["library_in_wheel_mb"] < 0.1
    assert figures["wheel_mb"] < 0.1 and figures["cuda_files"] == 2
    assert next(iter(figures["longest_s"].items())) == (
        "csrc/attention/launch_sm80_f16_64.cu", 61.0
    )  # fmt: skip
    monkeypatch.undo()
    made = bench_build.document(figures, bench_build.default_archs(), "abc")
    page = bench_build.readable(made)
    assert "360 s on 2 cores, wheel below 20 MB" in page and "90a-real" in page
    assert "launch_sm80_f16_64.cu" in page


def test_a_build_that_fails_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = type("Done", (), {"returncode": 1, "stdout": "", "stderr": "no compiler"})
    monkeypatch.setattr(bench_build.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match="no compiler"):
        bench_build.build(tmp_path, tmp_path, 1)
