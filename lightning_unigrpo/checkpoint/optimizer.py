"""The state of an optimizer under the names of the weights, so that every strategy finds its part of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer


def by_name(
    names: Mapping[Parameter, str], optimizer: Optimizer, state: Mapping[str, Any]
) -> dict[str, Any]:
    """Return ``optimizer.state_dict()`` with names where numbers stand.

    The numbers of torch run through the parameter groups, and those that Lightning's sharded strategies
    look up run through the model: with a group for texts and one for images they are not the same, and
    moments would go to other weights. An optimizer itself takes either, it goes by the order.

    Args:
        names: of the weights.
        optimizer: whose state it is.
        state: with numbers.
    """
    groups = [
        {**saved, "params": [names[parameter] for parameter in live["params"]]}
        for saved, live in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    found = dict(zip(numbers, (name for group in groups for name in group["params"]), strict=True))
    return {
        **state,
        "state": {found[number]: moments for number, moments in state["state"].items()},
        "param_groups": groups,
    }
