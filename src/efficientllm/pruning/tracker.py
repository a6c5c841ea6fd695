"""UnitTracker: which units wait to be compacted, and what every unit was called in the source."""

from collections.abc import Mapping
from typing import Any

import torch

from efficientllm.errors import CheckpointError
from efficientllm.pruning.removal import survivors
from efficientllm.pruning.saliency import Scores
from efficientllm.space.dims import Dim, Shape, Space, dim_name


class UnitTracker:
    """Keeps everything that names units right, while a compaction renumbers them.

    Attributes:
        space: the model's, at its present physical shape.
        retired: units that are zero but not yet compacted, by dim name.
        origin: source index of every physical unit, by dim name.
        average: the moving average of the scores, if one is kept.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self.retired: dict[str, list[int]] = {}
        self.origin = {dim.name: list(range(dim.size)) for dim in space.dims()}
        self.average: Scores | None = None

    @property
    def shape(self) -> Shape:
        """Live units of every bundle."""
        return {
            name: bundle.size - len(self.retired.get(bundle.dims[0].name, ()))
            for name, bundle in self.space.bundles.items()
        }

    def retire(self, units: Mapping[str, list[int]]) -> None:
        for name, chosen in units.items():
            self.retired.setdefault(name, []).extend(chosen)

    def waiting(self, tiles: Mapping[str, int]) -> dict[str, list[int]]:
        """Returns the retired units, by dim name, of the bundles in `tiles`: the oldest, in whole tiles.

        What is left after them is the least multiple of the tile that holds every live unit.
        """
        shape, units = self.shape, {}
        for name, tile in tiles.items():
            bundle = self.space.bundles[name]
            count = bundle.size + -shape[name] // tile * tile
            for dim in bundle.dims if count > 0 else ():
                units[dim.name] = self.retired[dim.name][:count]
        return units

    def counted(self, bundle: str, also_gone: Mapping[str, list[int]]) -> list[bool]:
        """Returns which dims of a bundle count: query dims not, whose KV group is retired or in `also_gone`."""

        def is_live(dim: Dim) -> bool:
            groups = dim_name("kv", dim.layer)
            return dim.group is None or dim.group not in (*self.retired.get(groups, ()), *also_gone.get(groups, ()))

        return [is_live(dim) for dim in self.space.bundles[bundle].dims]

    def in_source(self, chosen: Mapping[str, int]) -> dict[str, int]:
        """Returns chosen units (by dim name) under the source's names and indices."""
        dims, units = {dim.name: dim for dim in self.space.dims()}, {}
        for name, unit in chosen.items():
            dim = dims[name]
            group = None if dim.group is None else self.origin[dim_name("kv", dim.layer)][dim.group]
            units[dim_name(dim.kind, dim.layer, group)] = self.origin[name][unit]
        return units

    def renumber(self, gone: Mapping[str, list[int]], space: Space) -> None:
        """Forgets compacted units and counts on in `space`, the one that is left."""
        stay = {dim.name: survivors(dim, gone) for dim in self.space.dims()}

        def before(dim: Dim) -> str:
            """Returns what a dim of the new space was called: a KV group takes its query dim along."""
            group = None if dim.group is None else stay[dim_name("kv", dim.layer)][dim.group]
            return dim_name(dim.kind, dim.layer, group)

        old = {dim.name: before(dim) for dim in space.dims()}
        self.origin = {name: [self.origin[was][unit] for unit in stay[was]] for name, was in old.items()}
        if self.average:
            average = {
                dim.name: self.average[name][row]
                for name, bundle in self.space.bundles.items()
                for row, dim in enumerate(bundle.dims)
            }
            self.average = {
                name: torch.stack([average[old[dim.name]][stay[old[dim.name]]] for dim in bundle.dims])
                for name, bundle in space.bundles.items()
            }
        for name, units in gone.items():
            now = {unit: index for index, unit in enumerate(stay[name])}
            self.retired[name] = [now[unit] for unit in self.retired[name] if unit not in units]
        self.retired = {name: units for name, units in self.retired.items() if units}
        self.space = space

    def state_dict(self) -> dict[str, Any]:
        """Returns JSON values, and tensors under "average"."""
        return {
            "retired": {name: list(units) for name, units in self.retired.items()},
            "origin": {name: list(units) for name, units in self.origin.items()},
            "average": dict(self.average or {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError if the state is another shape's."""
        found = {dim.name: dim.size for dim in self.space.dims()}
        saved = {name: len(units) for name, units in state["origin"].items()}
        if found != saved:
            name = next(name for name in {**saved, **found} if saved.get(name) != found.get(name))
            raise CheckpointError(
                f"the saved state is of another shape: '{name}' has {saved.get(name)} units there and "
                f"{found.get(name)} here"
            )
        self.retired = {name: list(units) for name, units in state["retired"].items()}
        self.origin = {name: list(units) for name, units in state["origin"].items()}
        self.average = dict(state["average"]) or None
