"""Numbers as people read them: counts, bytes and seconds in three digits and a unit."""

import math


def three_digits(value: float) -> str:
    """1.23, 12.3, 123."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def format_count(count: float) -> str:
    """Three digits and a suffix: 812, 12.3k, 1.23M, 4.56B, 7.89T."""
    if isinstance(count, int) and abs(count) < 1000:
        return str(count)
    if not math.isfinite(count) or count < 0:
        return str(count)
    for suffix in ("", "k", "M", "B"):
        if count < 999.5:
            return three_digits(count) + suffix
        count /= 1000
    return three_digits(count) + "T"


def format_bytes(num_bytes: float) -> str:
    """Three digits and a binary unit: 512 B, 1.21 GiB."""
    if num_bytes < 1024:
        return f"{num_bytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        num_bytes /= 1024
        if num_bytes < 999.5:
            return f"{three_digits(num_bytes)} {unit}"
    return f"{three_digits(num_bytes / 1024)} TiB"


def format_seconds(seconds: float) -> str:
    """Two units at most: 83.2 ms, 12.3 s, 2m31s, 1h02m, 2d03h."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 0.9995:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
