"""Builds a model of which a process keeps a part, with the values that it would have as a whole.

Initial values are drawn from one generator, parameter after parameter, so that a rank can't draw its own alone. So
each is drawn whole, as ever, and cut to what is kept before the next one is: at any time one parameter is whole. (A
model draws most of its parameters twice, in the modules' own initialisation and in its own.)

What a module holds from its first parameter on are stand-ins without values. A model that does more with them than to
draw and to scale (that copies a part of one into another, say) is built whole, and cut afterwards.
"""

from __future__ import annotations

import copy
import numbers
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

Cut = Callable[[Tensor], Tensor]  # the part of a whole tensor that is kept

_OVERWRITING = {"uniform_", "normal_", "zero_", "fill_", "copy_", "random_", "bernoulli_", "exponential_"}
_SCALING = {"mul_", "div_", "add_", "sub_", "clamp_", "neg_"}  # number by number, so of the kept part alone
_OWN = (torch.Tensor.requires_grad, torch.Tensor.grad, torch.Tensor.is_leaf, torch.Tensor.grad_fn)  # of the stand-in


@dataclass(frozen=True)
class Draft:
    """A model without values, and the part of them that this process keeps."""

    model: nn.Module  # its parameters are on the device meta; its buffers have values
    kept: dict[str, Tensor]  # parameter name -> values on the CPU; a shared parameter is under its first name
    was_whole: bool  # while it was built, since it does more with its parameters than a draft allows


def draft(build: Callable[[], nn.Module], cut: Cut) -> Draft:
    """Return what `build` returns, cut.

    build: makes the model on the CPU, and seeds what it draws from; called twice if the model must be built whole.
    """
    drafting = _Drafting(cut)
    handle = register_module_parameter_registration_hook(drafting.register)  # type: ignore[arg-type]  # may return one
    try:
        with drafting:
            model = build()
    except _NeedsWholeError:
        drafting.is_refused = True
    finally:
        handle.remove()
    if not drafting.is_refused and (kept := drafting.finish(model)) is not None:
        return Draft(model, kept, was_whole=False)
    model = build()
    kept = _Drafting(cut).finish(model)
    assert kept is not None, "the model has parameters or buffers on the device meta"
    return Draft(model, kept, was_whole=True)


def copied(draft: Draft) -> Draft:
    """Return a copy of a model that isn't sharded yet: a sharded one can't be copied."""
    kept = {name: rows.clone() for name, rows in draft.kept.items()}
    return Draft(copy.deepcopy(draft.model), kept, draft.was_whole)


class _NeedsWholeError(Exception):
    """A model reads a parameter whose values are not there."""


class _Drafting(TorchFunctionMode):
    """Has what is done to a stand-in done to its values: to all of them for the last that was drawn."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self._cut = cut
        self._kept: dict[int, Tensor] = {}  # by the id of the stand-in
        self._stand_ins: dict[int, nn.Parameter] = {}  # keyed by id(), which is unique while they are held
        self._originals: dict[int, tuple[weakref.ref[Tensor], nn.Parameter]] = {}
        self._open: nn.Parameter | None = None  # whose values are whole
        self._whole: Tensor | None = None
        self.is_refused = False  # also where the error was caught on its way

    def register(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:  # noqa: ARG002
        """Return what the module holds instead of a parameter; None: itself. A hook of torch's."""
        if parameter is None or id(parameter) in self._stand_ins:
            return None
        if parameter.is_meta:  # a model that has no values anyway
            return None
        if known := self._originals.get(id(parameter)):
            if known[0]() is parameter:
                return known[1]
        self._close()
        stand_in, whole = _without_values(parameter), parameter.detach()  # before it is known, and stood in for
        self._stand_ins[id(stand_in)] = stand_in
        self._originals[id(parameter)] = (weakref.ref(parameter), stand_in)
        self._open, self._whole = stand_in, whole
        return stand_in

    def _close(self) -> None:
        if self._open is not None and self._whole is not None:
            self._kept[id(self._open)] = self._cut(self._whole).clone()
        self._open = self._whole = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self._standing_in(args), self._standing_in(kwargs or {})
        targets = list(self._found(args)) + list(self._found(kwargs))
        return self._called(func, args, kwargs, targets) if targets else func(*args, **kwargs)

    def _called(self, func: Any, args: Any, kwargs: Any, targets: list[nn.Parameter]) -> Any:
        owner, name = getattr(func, "__self__", None), getattr(func, "__name__", "")
        if name == "detach" or (owner is torch.Tensor.data and name == "__get__"):
            return targets[0]  # what is done to it is done to the parameter
        if owner is torch.Tensor.device:
            return torch.device("cpu")
        if owner is torch.Tensor.is_meta:
            return False
        if any(owner is each for each in _OWN) or name in ("requires_grad_", "__hash__"):
            return func(*args, **kwargs)
        if owner is torch.Tensor.data and name == "__set__":
            self._begin(args[0], args[1].detach().clone())
            return None
        if name.startswith("new_"):  # a new tensor, of the same type as the parameter
            return func(torch.empty(0, dtype=targets[0].dtype), *args[1:], **kwargs)
        if (name.endswith("_") and not name.startswith("__")) or name == "__setitem__":
            return self._write(func, name, args, kwargs, targets)
        return self._read(func, args, kwargs, targets)

    def _write(self, func: Any, name: str, args: Any, kwargs: Any, targets: list[nn.Parameter]) -> Any:
        target = args[0] if args else kwargs.get("tensor")
        if not isinstance(target, nn.Parameter) or id(target) not in self._stand_ins or len(targets) > 1:
            raise self._refused()
        if target is not self._open:
            if name in _OVERWRITING or getattr(func, "__module__", None) == "torch.nn.init":
                self._begin(target, torch.empty(target.shape, dtype=target.dtype))
            elif name in _SCALING and all(isinstance(each, numbers.Number) for each in (*args[1:], *kwargs.values())):
                func(self._kept[id(target)], *args[1:], **kwargs)
                return target
            else:
                raise self._refused()
        with torch.no_grad():
            func(*self._opened(args), **self._opened(kwargs))
        return target

    def _read(self, func: Any, args: Any, kwargs: Any, targets: list[nn.Parameter]) -> Any:
        """Answer from the values if they are whole, else from the shape alone."""
        is_open = all(target is self._open for target in targets)
        try:
            found = func(*self._opened(args), **self._opened(kwargs)) if is_open else func(*args, **kwargs)
        except Exception as error:
            raise self._refused() from error
        results = found if isinstance(found, (tuple, list)) else (found,)
        if any(isinstance(each, Tensor) and (not is_open or self._shares(each)) for each in results):
            raise self._refused()
        return found

    def _begin(self, target: nn.Parameter, whole: Tensor) -> None:
        if whole.shape != target.shape:
            raise self._refused()
        if target is not self._open:
            self._close()
        self._open, self._whole = target, whole

    def _shares(self, tensor: Tensor) -> bool:
        """Return whether it is a view of the open parameter, which may be written to once that is cut."""
        assert self._whole is not None
        return tensor.untyped_storage().data_ptr() == self._whole.untyped_storage().data_ptr()

    def _refused(self) -> _NeedsWholeError:
        self.is_refused = True
        return _NeedsWholeError()

    def _standing_in(self, value: Any) -> Any:
        """Put stand-ins in the place of parameters that were registered."""
        if isinstance(value, dict):
            return {name: self._standing_in(each) for name, each in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self._standing_in(each) for each in value)
        known = self._originals.get(id(value))
        return known[1] if known is not None and known[0]() is value else value

    def _opened(self, value: Any) -> Any:
        """Put the whole values in the place of the open stand-in."""
        if isinstance(value, dict):
            return {name: self._opened(each) for name, each in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self._opened(each) for each in value)
        return self._whole if value is self._open and value is not None else value

    def _found(self, value: Any) -> Iterator[nn.Parameter]:
        """Yield the stand-ins among arguments."""
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (tuple, list)):
            for each in value:
                yield from self._found(each)
        elif id(value) in self._stand_ins:
            yield value

    def finish(self, model: nn.Module) -> dict[str, Tensor] | None:
        """Return what is kept of each parameter, and put stand-ins in the place of those that are whole.

        None if a parameter or a buffer has been made of a stand-in.
        """
        self._close()
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                if id(parameter) in self._stand_ins or parameter.is_meta:
                    continue
                known = self._originals.get(id(parameter))
                if known is None or known[0]() is not parameter:
                    stand_in = _without_values(parameter)
                    self._stand_ins[id(stand_in)] = stand_in
                    self._originals[id(parameter)] = (weakref.ref(parameter), stand_in)
                    self._kept[id(stand_in)] = self._cut(parameter.detach()).clone()
                module._parameters[name] = self._originals[id(parameter)][1]
        parameters = dict(model.named_parameters())
        if any(id(each) not in self._kept for each in parameters.values()) or any(
            each.is_meta for each in model.buffers()
        ):
            return None
        return {name: self._kept[id(parameter)] for name, parameter in parameters.items()}


def _without_values(parameter: nn.Parameter) -> nn.Parameter:
    values = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    return nn.Parameter(values, requires_grad=parameter.requires_grad)
