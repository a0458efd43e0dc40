"""Names of passes: built-ins and entry points of group `sartor.passes`, imported on first use."""

from __future__ import annotations

from sartor.errors import UsageError
from sartor.passes.base import Pass
from sartor.plugins import Registry

REGISTRY = Registry(
    "sartor.passes",
    "pass",
    {
        "cast": "sartor.passes.cast:Cast",
        "factorize": "sartor.passes.factorize:Factorize",
        "fold-batch-norm": "sartor.passes.fold_batch_norm:FoldBatchNorm",
        "fold-constants": "sartor.passes.fold_constants:FoldConstants",
        "fuse-mbconv": "sartor.passes.fuse_mbconv:FuseMbconv",
        "group-conv": "sartor.passes.group_conv:GroupConv",
        "harden-masks": "sartor.passes.insert_masks:HardenMasks",
        "insert-exits": "sartor.passes.insert_exits:InsertExits",
        "insert-masks": "sartor.passes.insert_masks:InsertMasks",
        "prune-channels": "sartor.passes.prune_channels:PruneChannels",
        "quantize": "sartor.passes.quantize:Quantize",
        "reestimate-batch-norm": "sartor.passes.reestimate_batch_norm:ReestimateBatchNorm",
        "remove-blocks": "sartor.passes.remove_blocks:RemoveBlocks",
        "remove-dead": "sartor.passes.remove_dead:RemoveDead",
        "remove-layers": "sartor.passes.remove_layers:RemoveLayers",
        "repair": "sartor.passes.repair:Repair",
        "rescale": "sartor.passes.rescale:Rescale",
        "split-tiles": "sartor.passes.split_tiles:SplitTiles",
    },
)


def pass_class(name: str) -> type[Pass]:
    """The pass class that is registered as `name`.

    Raises:
        UsageError: no such pass (with the nearest name), or what is registered is not a pass of this name.
    """
    loaded = REGISTRY.load(name)
    problem = ""
    if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
        problem = "it is not a subclass of sartor.passes.base.Pass"
    elif loaded.name != name:
        problem = f"its own name is '{loaded.name}'"
    elif "__dataclass_fields__" not in loaded.__dict__:
        problem = "its class lacks the decorator @dataclasses.dataclass(frozen=True)"
    elif loaded.__abstractmethods__:
        problem = f"it does not define {', '.join(sorted(loaded.__abstractmethods__))}"
    if problem:
        owner = next((p.owner for p in REGISTRY.plugins() if p.name == name), "unknown")
        raise UsageError(
            f"The pass '{name}', registered by '{owner}', cannot be used: {problem}. Repair that package."
        )
    found: type[Pass] = loaded
    return found
