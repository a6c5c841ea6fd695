"""Numbers as people write them: `134M`, `8.6B`, `1Mi`, `120MB`."""

from decimal import Decimal, InvalidOperation

from efficientllm.errors import ConfigError

SUFFIXES = {
    "": 1,
    "k": 10**3,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "B": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
}

BYTE_SUFFIXES = {
    "": 1,
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}


def parse_count(text: str | int, name: str = "number") -> int:
    """Returns the whole number that `text` stands for: digits with an optional k, M, B or G, T or Ki, Mi, Gi.

    Raises:
        ConfigError: if the text is not a number, has another suffix, or is not whole.
    """
    stripped = str(text).strip().replace("_", "")
    digits = stripped.rstrip("kKMBTGi")
    suffix = stripped[len(digits) :]
    try:
        value = Decimal(digits) * SUFFIXES[suffix]
        whole = int(value)
    except (InvalidOperation, KeyError, ValueError, OverflowError):
        raise ConfigError(
            f"{name}: '{text}' is not a number; write digits, optionally with k, M, B or G, T (decimal) or Ki, Mi, Gi"
        ) from None
    if value != whole:
        raise ConfigError(f"{name}: '{text}' is not a whole number")
    return whole


def parse_bytes(text: str | int, name: str = "bytes") -> int:
    """Returns the whole number of bytes that `text` stands for: digits with an optional kB, MB, GB or KiB, MiB, GiB.

    Raises:
        ConfigError: if the text is not a number, or has another suffix: in 120M the M may be of parameters.
    """
    stripped = str(text).strip().replace("_", "")
    digits = stripped.rstrip("kKMGiB")
    try:
        return int(Decimal(digits) * BYTE_SUFFIXES[stripped[len(digits) :]])
    except (InvalidOperation, KeyError, ValueError, OverflowError):
        raise ConfigError(
            f"{name}: '{text}' is not a number of bytes; write digits, optionally with kB, MB, GB (decimal) or KiB, "
            "MiB, GiB, such as 120MB"
        ) from None


def counted(number: int, noun: str) -> str:
    """Returns a number and what it counts, in the singular or plural: 1 thread, 2,048 threads."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_count(value: float) -> str:
    """Returns a count in three digits or so with a decimal suffix: 134M, 8.6B, 512."""
    for suffix, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if abs(value) >= size:
            scaled = value / size
            return f"{scaled:.0f}{suffix}" if scaled >= 100 else f"{scaled:.3g}{suffix}"
    return f"{value:.0f}"
