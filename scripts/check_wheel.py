"""Build the wheel and check what makes it portable: its symbols and its manylinux tag.

Usage: python scripts/check_wheel.py (needs auditwheel, patchelf and nm)
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.resolve()
# Names of C++ symbols that would tie the library to one torch version: at::, c10::, torch::.
TORCH_MANGLED = ("_ZN2at", "_ZNK2at", "_ZN3c10", "_ZNK3c10", "_ZN5torch", "_ZNK5torch", "_ZTIN3c10")


def undefined_symbols(library: Path) -> list[str]:
    """Return the names a library expects others to provide."""
    out = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], check=True, capture_output=True, text=True
    ).stdout
    return [line.split()[-1] for line in out.splitlines() if line.strip()]


def run(*command: str, env: dict[str, str] | None = None) -> str:
    """Run a command; on failure print what it said and stop."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    if done.returncode != 0:
        sys.exit(f"check_wheel: {' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(
            sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
            "-w", folder, str(ROOT),
        )  # fmt: skip
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            archive.extractall(Path(folder) / "unpacked")
        required = ("libnld_ops.so", "py.typed", "assets/nld-tiny/config.json")
        missing = [n for n in required if f"nld_cuda/{n}" not in names]
        if missing:
            sys.exit(f"check_wheel: the wheel lacks {', '.join(missing)}")
        library = Path(folder) / "unpacked/nld_cuda/libnld_ops.so"
        bad = [s for s in undefined_symbols(library) if s.startswith(TORCH_MANGLED)]
        if bad:
            sys.exit(f"check_wheel: libnld_ops.so uses unstable torch symbols: {', '.join(bad)}")
        env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        report = run(
            sys.executable, "-m", "auditwheel", "repair", "-w", f"{folder}/repaired",
            "--exclude", "libtorch*.so", "--exclude", "libc10*.so", str(wheel), env=env,
        )  # fmt: skip
        repaired = list(Path(folder, "repaired").glob("*manylinux*.whl"))
        if not repaired:
            sys.exit(f"check_wheel: auditwheel gave no manylinux tag:\n{report}")
        size = wheel.stat().st_size / 2**20
        print(f"check_wheel: {repaired[0].name}, {size:.1f} MiB, no unstable torch symbol")


if __name__ == "__main__":
    main()
