"""How many heads a width is split into."""

from math import gcd, log

from zoo.layers.checks import integer


def choose_heads(width: int, heads: int | None) -> int:
    """`heads` if they divide `width`; None: as many as make heads of about 64, and in a small width about four, with an
    even number of features (rotary turns pairs) where the width allows it.

    Raises ValueError that names both numbers and one that fits.
    """
    if heads is None:
        wanted = min(64, max(8, width // 4))
        sizes = [size for size in range(1, width + 1) if width % size == 0]
        sizes = [size for size in sizes if size % 2 == 0] or sizes
        return width // min(sizes, key=lambda size: abs(log(size / wanted)))
    integer("heads", heads, otherwise="; None chooses one")
    if width % heads:
        raise ValueError(f"heads={heads} must divide width={width}; try {gcd(heads, width)}")
    return heads


def up_to_four(heads: int | None, **sizes: int) -> int:
    """`heads` if they divide each of `sizes`; None: 4, or fewer where 4 do not divide them all.

    Raises ValueError that names the sizes as they are named here, and a number that fits.
    """
    common = gcd(*sizes.values())
    if heads is None:
        return next(each for each in (4, 3, 2, 1) if common % each == 0)
    integer("heads", heads, otherwise="; None chooses")
    if common % heads:
        named = " and ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(f"heads={heads} must divide {named}; try {gcd(common, heads)}")
    return heads


def heads_and_dim(width: int, heads: int | None, head_dim: int | None, dim_name: str = "head_dim") -> tuple[int, int]:
    """heads and head_dim, those not given chosen: heads of about 64 components, at least four of them in a small
    width, even in size (rotary turns pairs) and dividing the width where it has such a divisor. `dim_name`: what the
    caller calls head_dim, for messages."""
    for name, value in (("heads", heads), (dim_name, head_dim)):
        if value is not None:
            integer(name, value, otherwise="; None chooses one")
    if heads is not None and head_dim is None:
        if width % heads:
            raise ValueError(f"heads={heads} must divide width={width}; try {gcd(heads, width)}, or give {dim_name}")
        return heads, width // heads
    if heads is not None and head_dim is not None:
        return heads, head_dim
    if head_dim is not None:
        return max(1, round(width / head_dim)), head_dim
    wanted = min(64, max(8, width // 4))
    even = [size for size in range(2, width + 1, 2) if width % size == 0 and wanted / 2 <= size <= wanted * 2]
    size = min(even, key=lambda each: abs(log(each / wanted))) if even else wanted // 2 * 2
    return max(1, width // size), size
