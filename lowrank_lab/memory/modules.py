"""Which module's forward pass, or which block's backward pass, is running."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowrank_lab.memory.trace import Block


class ModuleStack:
    """Follows a model's passes by hooks on its modules, and the blocks that each of them makes.

    Args:
        left: called at the end of a forward pass that no other one encloses, with the memory blocks
            that it made.
    """

    def __init__(self, model: nn.Module, left: Callable[[list[Block]], None]) -> None:
        self._left = left
        self._forward: list[tuple[str, list[Block]]] = []  # running, the innermost last
        self._backward = ""
        self.handles: list[RemovableHandle] = list(self._hooks(model))

    def owner(self, phase: str) -> str:
        """The module that is running, or the phase where none is."""
        if self._forward:
            return self._forward[-1][0]
        return self._backward if phase == "backward" else phase

    def made(self, block: Block) -> None:
        """Note a block as made by all modules that are running."""
        for _, blocks in self._forward:
            blocks.append(block)

    def _hooks(self, model: nn.Module) -> Iterator[RemovableHandle]:
        for name, module in model.named_modules():
            yield module.register_forward_pre_hook(self._enter(name))
            yield module.register_forward_hook(self._leave(name), always_call=True)

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            self._forward.append((name, []))

        return _observing(hook)

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            _, blocks = self._forward.pop()
            if not self._forward:
                self._left(blocks)
            if isinstance(output, Tensor) and output.requires_grad and name.count(".") == 2:
                output.register_hook(self._enter_backward(name))  # type: ignore[no-untyped-call]

        return _observing(hook)

    def _enter_backward(self, name: str) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:
            self._backward = name

        return hook


def _observing(hook: Callable[..., None]) -> Callable[..., None]:
    """The hook, marked as one that a fused half of a block may leave out (`models.fused`)."""
    hook.only_observes = True  # type: ignore[attr-defined]
    return hook
