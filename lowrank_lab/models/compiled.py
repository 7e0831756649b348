"""Functions that torch compiles at their first call, each into one graph and for one model."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lowrank_lab.config import InputError
from lowrank_lab.device import mkl_is_slow

BACKEND = "inductor"


class Compiled:
    """A function of tensors, compiled at its first call with gradients and at its first without.

    torch keeps at most eight graphs per code object, for all models of a process and both grad
    modes together. Here each mode of each model has its own code object, so that neither evaluation
    nor another model compiles anything again.

    Args:
        function: a function of a module, not a closure; it must compile without a graph break.

    Raises:
        InputError: at a call, if torch can't compile `function` into one graph.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._training, self._inference = (_compile(_with_own_code(function)) for _ in range(2))

    def __call__(self, *args: Any) -> Any:
        chosen = self._training if torch.is_grad_enabled() else self._inference
        with refused_in_one_line():
            return chosen(*args)

    def __reduce__(self) -> Any:
        """Copies and pickles compile again."""
        return Compiled, (self._function,)


class CompiledGraph:
    """A graph of operations on tensors of fixed shapes, compiled at its first call.

    Raises:
        InputError: at a call, if torch can't compile it.
    """

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        self._compiled = _compile(graph, dynamic=False)

    def __call__(self, *tensors: Any) -> Any:
        with refused_in_one_line():
            return self._compiled(*tensors)


@contextmanager
def refused_in_one_line() -> Iterator[None]:
    """What torch can't compile in this block is an InputError."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = " ".join(str(error).strip().split("\n\n")[0].split())  # without traceback
        allowed = f"torch can't compile the model ({reason}); False"
        raise InputError("compile", True, allowed) from error


def _compile(function: Any, dynamic: bool | None = None) -> Callable[..., Any]:
    options: dict[str, Any] | None = None
    if BACKEND == "inductor" and mkl_is_slow():
        from lowrank_lab.kernels.graphs import ReturnedProducts  # imports the compiler

        options = {"post_grad_custom_post_pass": ReturnedProducts()}
    made: Callable[..., Any] = torch.compile(
        function, fullgraph=True, dynamic=dynamic, backend=BACKEND, options=options
    )
    return made


def _with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a copy of its code."""
    assert isinstance(function, types.FunctionType)
    assert not function.__closure__
    copy = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    copy.__defaults__, copy.__module__ = function.__defaults__, function.__module__
    return copy
