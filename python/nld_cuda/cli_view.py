"""How `nld` shows text, statistics, and blocks while they are denoised or verified."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nld_cuda.decode.stats import DecodeStats
    from nld_cuda.decode.stream import BlockToken, StreamEvent

MASK = "·"
FRAME_SECONDS = 0.05  # a live frame stays at least this long, or fast models could not be watched
STYLES = {
    "seed": "bold",
    "masked": "dim",
    "committed": "green",
    "draft": "yellow",
    "accepted": "green",
    "rejected": "red strike",
}
# Without colours, a mark behind the token tells what became of it.
MARKS = {
    "seed": "",
    "masked": "",
    "committed": "",
    "draft": "?",
    "accepted": "+",
    "rejected": "-",
}


def show_text(events: Iterable[StreamEvent]) -> DecodeStats | None:
    """Print text as soon as it is final; return the statistics."""
    stats = None
    for event in events:
        if event.final:
            print(event.final, end="", flush=True)
        if event.result is not None:
            stats = event.result.stats
    print(flush=True)
    return stats


def show_denoising(events: Iterable[StreamEvent]) -> DecodeStats | None:
    """Show every forward: live on a terminal with rich installed, else one plain line each."""
    if sys.stdout.isatty():
        try:
            import rich  # noqa: F401
        except ImportError:
            pass
        else:
            return _show_live(events)
    return _show_lines(events)


def _show_lines(events: Iterable[StreamEvent]) -> DecodeStats | None:
    text, stats = "", None
    for event in events:
        text += event.final
        if event.result is not None:
            stats = event.result.stats
            continue
        block = " ".join(_plain(token) for token in event.provisional)
        line = f"{event.num_forwards:4d} {event.kind:8s} final {event.final!r}"
        print(f"{line}  block {block}" if block else line, flush=True)
    print(text, flush=True)
    return stats


def _plain(token: BlockToken) -> str:
    if token.is_masked:
        return MASK
    shown = token.text if token.text.strip() else repr(token.text or token.token)[1:-1]
    return shown.replace("\n", "\\n") + MARKS[token.status]


def _show_live(events: Iterable[StreamEvent]) -> DecodeStats | None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False)
    text, stats = "", None
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for event in events:
            text += event.final
            if event.result is not None:
                stats = event.result.stats
                continue
            frame = Text(_last_lines(text, console))
            # After a verify or refresh the accepted tokens are part of the text already.
            seen = event.kind in ("refresh", "prefill")
            for token in event.provisional:
                if token.status == "seed" or (token.status == "accepted" and not seen):
                    continue
                frame.append(MASK if token.is_masked else token.text, STYLES[token.status])
            frame.append(f"\n{event.num_forwards} forwards, {event.kind}", "dim")
            live.update(frame, refresh=True)
            time.sleep(FRAME_SECONDS)
    print(text, flush=True)
    return stats


def _last_lines(text: str, console: Any) -> str:
    """Return the part of the text that fits on the screen: a live region cannot scroll."""
    return "\n".join(text.split("\n")[-max(console.size.height - 8, 1) :])


def stats_line(mode: str, stats: DecodeStats) -> str:
    """Return one line of figures: tokens, forwards, tokens per forward, speed."""
    parts = [f"{mode}: {stats.new_tokens} tokens in {stats.nfe} forwards"]
    if stats.tokens_per_forward is not None:
        parts.append(f"{stats.tokens_per_forward:.2f} tokens/forward")
    if stats.tokens_per_cycle is not None:
        parts.append(f"{stats.tokens_per_cycle:.2f} tokens/cycle")
    if stats.tokens_per_second is not None:
        parts.append(f"{stats.tokens_per_second:.0f} tokens/s")
    parts.append(f"first token after {stats.first_token_seconds * 1e3:.0f} ms")
    return ", ".join(parts)


def print_comparison(record: dict[str, Any]) -> None:
    """Print the prompt, the ar text, and a table of all modes."""
    title = f"--- {record['kind']} " if record["kind"] else "--- "
    print(title + "-" * (78 - len(title)))
    print(record["prompt"].rstrip("\n"))
    ar = record["modes"][0]
    print("-" * 78)
    print(ar["text"])
    print()
    header = (
        f"{'mode':15s}{'tokens':>7s}{'forwards':>9s}{'tokens/forward':>15s}"
        f"{'tokens/cycle':>13s}{'tokens/s':>10s}{'x ar':>6s}  text"
    )
    print(header)
    ar_speed = ar["stats"]["tokens_per_second"]
    for row in record["modes"]:
        stats = row["stats"]
        same = (
            "" if row is ar else "equal to ar" if row["text"] == ar["text"] else "differs from ar"
        )
        if "correct" in row:
            same = ("right" if row["correct"] else "wrong") + (f", {same}" if same else "")
        speed = stats["tokens_per_second"]
        ratio = f"{speed / ar_speed:.1f}" if speed and ar_speed else "-"
        print(
            f"{row['mode']:15s}{stats['new_tokens']:7d}{stats['nfe']:9d}"
            f"{_number(stats['tokens_per_forward'], 2):>15s}"
            f"{_number(stats['tokens_per_cycle'], 2):>13s}{_number(speed, 0):>10s}"
            f"{ratio:>6s}  {same}"
        )
    print()
    for row in record["modes"][1:]:
        if row["text"] != ar["text"]:
            print(f"{row['mode']} wrote instead:\n{row['text']}\n")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
