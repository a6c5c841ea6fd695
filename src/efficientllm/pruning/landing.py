"""Landing: whether a model can still end within one FFN tile under its target, and under every size saved on the way.

A shape lands on a target where its size lies in (target - one FFN tile, target]. Selection asks before every removal
whether one can still be reached (docs/method.md section 11), so a run never ends at a size that misses.

The worst case, in shapes whose size is computed, for one target: in the uniform layout every legal number of KV groups
times every legal number of query heads, with a bisection over the hidden sizes each, kv · query · log2(hidden); where
layers have heads of their own one way down is searched, layers · (kv + query) · log2(hidden), each size a sum over
layers. Of m targets each is searched below every landing on the one before, so the bound is that to the power of m; the
first landing is nearly always one that lets the next follow.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product

from efficientllm.space.dims import Measure, Shape, of_kind
from efficientllm.space.limits import Limits


def is_landed(shape: Shape, limits: Limits, measure: Measure, target: int) -> bool:
    """Returns whether the shape is legal and at or under the target."""
    return measure(shape) <= target and limits.close(shape) == shape


def may_remove(bundle: str, shape: Shape, limits: Limits, measure: Measure, targets: Sequence[int]) -> bool:
    """Returns whether a unit of a bundle may go so that the model can still end within one FFN tile of every target.

    Once completing the open tiles is enough, only they continue.
    """
    return shape[bundle] > limits.floor[bundle] and may_become(
        {**shape, bundle: shape[bundle] - 1}, shape, limits, measure, targets
    )


def may_become(after: Shape, shape: Shape, limits: Limits, measure: Measure, targets: Sequence[int]) -> bool:
    """Returns whether a smaller shape within the floors may follow, as `may_remove` does of a single unit."""
    closed = limits.close(shape)
    if measure(closed) <= targets[0]:
        return all(closed[bundle] < size for bundle, size in shape.items() if after[bundle] < size)
    landing = limits.close(after)
    return landing == closed or can_land(landing, limits, measure, *targets)


def can_land(shape: Shape, limits: Limits, measure: Measure, *targets: int) -> bool:
    """Returns whether legal shapes lie at or below `shape`, each at or below the one before, that land on every target.

    A shape lands where its size lies in (target - one FFN tile, target]: a tile of every layer at once, or, in the
    per-layer layout, of one layer. Targets fall.
    """
    if not targets:
        return True
    return any(
        can_land(landing, limits, measure, *targets[1:]) for landing in _landings(shape, limits, measure, targets[0])
    )


def _landings(shape: Shape, limits: Limits, measure: Measure, target: int) -> Iterator[Shape]:
    """Yields the shapes at or below `shape` that land on a target, each with the widest FFN that does.

    With the other kinds fixed, FFN tiles cover a whole interval in steps of one tile, so only the others are searched:
    the shape's own first, then for every number of heads the hidden sizes, larger ones first, from the largest that is
    not too large, by bisection.

    Layers with heads of their own have too many combinations of them. There one way down is searched, which depends on
    nothing but the shape it starts at: after a step along it the rest of it is what is searched, so that a run that can
    land can always take a step and still land.
    """
    if _fills(shape, limits, measure, target) == 0:
        yield _filled(shape, limits, measure, target)
    hidden_sizes = limits.legal_sizes("hidden", shape["hidden"])
    on_one_way = "kv" not in shape
    for with_heads in _fewer_heads(shape, limits) if on_one_way else _all_heads(shape, limits):
        fits = partial(_fills_at, with_heads, limits, measure, target)
        if on_one_way and fits(hidden_sizes[-1]) < 0:
            return  # from here on every shape is smaller
        for hidden in reversed(hidden_sizes[: bisect_left(hidden_sizes, 1, key=fits)]):
            if fits(hidden) < 0:
                break
            yield _filled({**with_heads, "hidden": hidden}, limits, measure, target)


def _all_heads(shape: Shape, limits: Limits) -> Iterator[Shape]:
    """Yields a uniform shape with every legal number of heads at or below its own."""
    heads = product(
        reversed(limits.legal_sizes("kv", shape["kv"])), reversed(limits.legal_sizes("query", shape["query"]))
    )
    for num_kv, num_query in heads:
        yield {**shape, "kv": num_kv, "query": num_query}


def _fewer_heads(shape: Shape, limits: Limits) -> Iterator[Shape]:
    """Yields the shape, then with one legal step less at a time where most of the source's heads are left."""
    bundles = [*of_kind(shape, "kv"), *of_kind(shape, "query")]
    steps = {bundle: limits.legal_sizes(bundle, shape[bundle]) for bundle in bundles}
    yield shape
    while left := [bundle for bundle in bundles if len(steps[bundle]) > 1]:
        most = max(left, key=lambda bundle: steps[bundle][-1] / limits.source[bundle])
        steps[most] = steps[most][:-1]
        shape = {**shape, most: steps[most][-1]}
        yield shape


def _fills_at(shape: Shape, limits: Limits, measure: Measure, target: int, hidden: int) -> int:
    return _fills({**shape, "hidden": hidden}, limits, measure, target)


def _fills(shape: Shape, limits: Limits, measure: Measure, target: int) -> int:
    """Returns 0 if FFN tiles can bring the shape into the window, 1 if it stays too large, -1 if it is too small."""
    if measure({**shape, **{bundle: limits.floor[bundle] for bundle in of_kind(shape, "ffn")}}) > target:
        return 1
    size = measure(shape)
    return 0 if size > target or size > target - ffn_tile_size(shape, limits, measure) else -1


def _filled(shape: Shape, limits: Limits, measure: Measure, target: int) -> Shape:
    """Returns a shape that fills with the widest legal FFN at or under the target.

    Of layers with widths of their own the widest give way first: all are cut to a level, the first of them one step
    less. Whatever wide layer loses a tile, what is left of this fill stays the same.
    """
    sizes = {bundle: limits.legal_sizes(bundle, size) for bundle, size in of_kind(shape, "ffn").items()}
    levels = sorted({size for each in sizes.values() for size in each})

    def cut(level: int) -> Shape:
        return {**shape, **{name: each[max(bisect_right(each, level) - 1, 0)] for name, each in sizes.items()}}

    def grown(count: int) -> Shape:
        return {**low, **{bundle: high[bundle] for bundle in wider[:count]}}

    fitting = bisect_right(levels, target, key=lambda level: measure(cut(level)))
    low = cut(levels[fitting - 1])
    if fitting == len(levels):
        return low
    high = cut(levels[fitting])
    wider = [bundle for bundle in sizes if high[bundle] > low[bundle]]
    return grown(bisect_right(range(1, len(wider)), target, key=lambda count: measure(grown(count))))


def ffn_tile_size(shape: Shape, limits: Limits, measure: Measure) -> int:
    """Returns what one FFN tile adds to the size: over all layers, or to the layer where it adds most.

    To a source whose width is not a multiple of the tile the last step is narrower, but may be larger in bytes.
    """
    largest = 0
    for bundle, width in of_kind(shape, "ffn").items():
        tile, source = limits.tile[bundle], limits.source[bundle]
        largest = max(largest, measure({**shape, bundle: tile}) - measure({**shape, bundle: 0}))
        if source % tile:
            wider = {**shape, bundle: min(width + tile, source)}
            largest = max(largest, measure(wider) - measure(shape))
    return largest
