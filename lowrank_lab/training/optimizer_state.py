"""The state of any optimizer as tensors and JSON, and back; nothing is ever unpickled.

A state may be a tensor, a number, text, None, a list, tuple, dict, set or deque of states, a dtype,
one of torchao's 8-bit tensors, or an object or enum member of the package that the optimizer's
class is from, which is stored by its attributes.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_lab.config import InputError
from lowrank_lab.layers import current_name
from lowrank_lab.optim.adam import is_quantized

KINDS: dict[str, type] = {
    "list": list, "tuple": tuple, "set": set, "dict": dict, "deque": deque, "size": torch.Size,
}  # fmt: skip
SHARED = "#shared"  # in the place of a parameter's name: states under a name of their own
PREFIX = "optimizer/"
DEEPEST = 64  # states in states


class Encoder:
    """Collects the tensors of states while it turns them into JSON.

    Attributes:
        tensors: by the name under which JSON refers to them.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._optimizer = optimizer
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._known: dict[int, str] = {}

    def states(self) -> dict[str, Any]:
        """All states: "parameter/key" → JSON. Tensors of usual states are found by that name."""
        found: dict[str, Any] = {}
        states: dict[Any, Any] = self._optimizer.state
        for owner, state in states.items():
            name = self._names.get(id(owner), SHARED)
            entries = {owner: state} if name == SHARED else state
            for key, value in entries.items():
                place = f"{name}/{key}"
                encoded = self.encode(value, place)
                if name == SHARED or encoded != {"tensor": PREFIX + place}:
                    found[place] = encoded
        return found

    def groups(self) -> list[dict[str, Any]]:
        """The options of each group; those that are no states, such as functions, are left out.

        A learning rate that is a tensor is left out too: the schedule sets it.
        """
        found = []
        for i, group in enumerate(self._optimizer.param_groups):
            kept = {}
            for key, value in group.items():
                if key == "params" or (key == "lr" and isinstance(value, Tensor)):
                    continue
                try:
                    kept[key] = self.encode(value, f"#group/{i}/{key}")
                except InputError:
                    continue
            found.append(kept)
        return found

    def more(self) -> dict[str, Any]:
        """What the optimizer's state_dict has beside `state` and `param_groups`."""
        whole = self._optimizer.state_dict().items()
        rest = {key: value for key, value in whole if key not in ("state", "param_groups")}
        return {key: self.encode(value, f"#more/{key}") for key, value in rest.items()}

    def encode(self, value: Any, place: str) -> Any:
        """A state as JSON; its tensors are added under names that begin with `place`.

        Raises:
            InputError: a state that a checkpoint can't have.
        """
        if place.count("#") > DEEPEST:
            raise self._refusal(place, "is nested too deep, or refers to itself")
        if isinstance(value, Tensor):
            return self._tensor(value, place)
        if isinstance(value, np.generic):
            return value.item()
        if value is None or (isinstance(value, bool | int | float | str) and not _is_enum(value)):
            return value
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        for kind, cls in KINDS.items():
            if type(value) is cls:
                return {"kind": kind, "items": self._items(value, place)} | _options(value)
        return self._object(value, place)

    def _items(self, value: Any, place: str) -> list[Any]:
        parts = value.items() if isinstance(value, dict) else value
        return [self.encode(item, f"{place}#{i}") for i, item in enumerate(parts)]

    def _tensor(self, value: Tensor, place: str) -> Any:
        if id(value) in self._names:
            return {"parameter": self._names[id(value)]}
        if id(value) in self._known:  # the same tensor in two places
            return {"tensor": self._known[id(value)]}
        if is_quantized(value):
            parts, context = cast(Any, value).__tensor_flatten__()
            signed, dtype = cast(tuple[bool, torch.dtype], context)
            for part in parts:
                self.tensors[f"{PREFIX}{place}#{part}"] = getattr(value, part)
            return {"signed": signed, "dtype": str(dtype), "at": place}
        name = self._known[id(value)] = PREFIX + place
        self.tensors[name] = value
        return {"tensor": name}

    def _object(self, value: Any, place: str) -> Any:
        cls = type(value)
        if not _is_own(cls, self._optimizer):
            raise self._refusal(place, f"is a {cls.__qualname__}, which no checkpoint can have")
        path = [cls.__module__, cls.__qualname__]
        if _is_enum(value):
            return {"enum": path, "name": value.name}
        return {"object": path, "items": self._items(vars(value), place)}

    def _refusal(self, place: str, why: str) -> InputError:
        cls = type(self._optimizer)
        return InputError(
            "optimizer", f"{cls.__module__}.{cls.__qualname__}", f"its state {place} {why}"
        )


class Decoder:
    """Turns JSON back into states, with the tensors that it refers to.

    Args:
        tensors: all of a checkpoint, by name.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
    ) -> None:
        self._optimizer = optimizer
        self._parameters = dict(model.named_parameters())
        self._tensors = tensors
        self._moved: dict[str, Tensor] = {}

    def load(self, facts: Mapping[str, Any]) -> None:
        """Load states, options of groups and what else the optimizer's state_dict has."""
        self._load_states(facts["optimizer"])
        device = next(iter(self._parameters.values())).device
        for group, kept in zip(self._optimizer.param_groups, facts["groups"], strict=True):
            group.update({key: self.decode(value, device) for key, value in kept.items()})
        more = {k: self.decode(v, device) for k, v in facts.get("more", {}).items()}
        if more:
            self._optimizer.load_state_dict({**self._optimizer.state_dict(), **more})
            self._load_states(facts["optimizer"])  # torch has converted their dtypes

    def _load_states(self, states: Mapping[str, Any]) -> None:
        plain = {name.removeprefix(PREFIX): {"tensor": name} for name in self._tensors
                 if name.startswith(PREFIX) and "#" not in name}  # fmt: skip
        device = next(iter(self._parameters.values())).device
        for place, value in {**plain, **states}.items():
            name, _, key = place.rpartition("/")
            if name == SHARED:
                self._optimizer.state[cast(Any, key)] = self.decode(value, device)
                continue
            parameter = self._parameters[name if name in self._parameters else current_name(name)]
            found = self.decode(value, parameter.device, place)
            self._optimizer.state[parameter][key] = found

    def decode(self, value: Any, device: torch.device, place: str = "") -> Any:
        """The state that `Encoder.encode` has turned into JSON.

        Args:
            place: of a state in a checkpoint of an earlier version, which doesn't repeat it.
        """
        if not isinstance(value, dict):
            return value
        if "tensor" in value:
            name = value["tensor"]
            return self._moved.setdefault(name, self._tensors[name].to(device))
        if "parameter" in value:
            return self._parameters[value["parameter"]]
        if "signed" in value:
            return _quantized(self._tensors, value, value.get("at", place)).to(device)
        if "dtype" in value:
            return getattr(torch, value["dtype"])
        if "enum" in value:
            return self._class(value["enum"])[value["name"]]
        if "kind" not in value and "object" not in value:  # a list of an earlier version
            return list(self._earlier_items(value["items"], device, place))
        items = [self.decode(item, device) for item in value["items"]]
        if "object" in value:
            cls = self._class(value["object"])
            found = cls.__new__(cls)
            vars(found).update(dict(items))
            return found
        if value["kind"] == "deque":
            return deque(items, value["maxlen"])
        return KINDS[value["kind"]](items)

    def _earlier_items(self, items: list[Any], device: torch.device, place: str) -> Iterator[Any]:
        for i, item in enumerate(items):
            tensor = self._tensors.get(f"{PREFIX}{place}#{i}")
            yield item if item is not None or tensor is None else tensor.to(device)

    def _class(self, path: list[str]) -> Any:
        module, name = path
        found: Any = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        if not (isinstance(found, type) and _is_own(found, self._optimizer)):
            raise InputError("checkpoint", f"{module}.{name}", "it is no class of the optimizer's")
        return found


def _is_enum(value: Any) -> bool:
    return isinstance(value, Enum)


def _options(value: Any) -> dict[str, Any]:
    return {"maxlen": value.maxlen} if isinstance(value, deque) else {}


def _is_own(cls: type, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a class is from the optimizer's package, with attributes as its whole state."""
    package = type(optimizer).__module__.partition(".")[0]
    plain = issubclass(cls, Enum) or (cls.__new__ is object.__new__ and not issubclass(cls, type))
    same = cls.__module__.partition(".")[0] == package
    return plain and same and not issubclass(cls, nn.Module | torch.optim.Optimizer)


def _quantized(tensors: Mapping[str, Tensor], facts: Mapping[str, Any], place: str) -> Tensor:
    """A state of torchao's 8-bit optimizers, from its parts."""
    from torchao.optim.subclass_8bit import OptimState8bit

    parts = [tensors[f"{PREFIX}{place}#{part}"] for part in OptimState8bit.tensor_attrs]
    shown = {str(d): d for d in (torch.float32, torch.bfloat16, torch.float16)}
    state: Tensor = OptimState8bit(*parts, facts["signed"], shown[facts["dtype"]])
    return state
