"""Building of a model of which a process keeps only its shard, with the same initial values as an unsharded model.

One generator draws the initial values, parameter after parameter, so a rank can't draw only its own rows. Instead, each
parameter is drawn in full and cut to the kept rows before the next one is drawn: at any time, one parameter is whole.
(Most parameters of a model are drawn twice: by the modules' own initialisation and by the model's.)

In the modules, parameters are replaced by stand-ins without values. If a model does more with its parameters than
overwriting and scaling (for example, copies a part of one to another), it is built whole and cut afterwards.
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
_SCALING = {"mul_", "div_", "add_", "sub_", "clamp_", "neg_"}  # elementwise, so the kept rows suffice
# properties that are read from the stand-in itself
_OWN = (torch.Tensor.requires_grad, torch.Tensor.grad, torch.Tensor.is_leaf, torch.Tensor.grad_fn)


@dataclass(frozen=True)
class Draft:
    """A model without parameter values, and the part of the values that this process keeps."""

    model: nn.Module  # its parameters are on the device meta; its buffers have values
    kept: dict[str, Tensor]  # parameter name -> values on the CPU; a shared parameter has its first name
    was_whole: bool  # whether the model had to be built whole


def draft(build: Callable[[], nn.Module], cut: Cut) -> Draft:
    """Build a model and keep only this process's part of its values.

    build: seeds the generator and builds the model on the CPU; called twice if the model must be built whole.
    cut: returns the part of a whole tensor to keep.
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
    """Return a copy of a draft, before it is sharded: a sharded model can't be copied."""
    kept = {name: rows.clone() for name, rows in draft.kept.items()}
    return Draft(copy.deepcopy(draft.model), kept, draft.was_whole)


class _NeedsWholeError(Exception):
    """A model uses a parameter whose values are not available."""


class _Drafting(TorchFunctionMode):
    """Redirects operations on a stand-in to its values: all values of the open parameter, kept rows of the others."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self._cut = cut
        self._kept: dict[int, Tensor] = {}  # id of the stand-in -> kept values
        self._stand_ins: dict[int, nn.Parameter] = {}  # by id, which is unique while they are referenced here
        # id of a registered parameter -> the parameter, and its stand-in
        self._originals: dict[int, tuple[weakref.ref[Tensor], nn.Parameter]] = {}
        self._open: nn.Parameter | None = None  # stand-in whose values are whole
        self._whole: Tensor | None = None  # these values
        self.is_refused = False  # set even if the model catches the error

    def register(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:  # noqa: ARG002
        """Return the stand-in to register instead of a parameter; None: register the parameter. A hook of torch."""
        if parameter is None or id(parameter) in self._stand_ins:
            return None
        if parameter.is_meta:  # it has no values anyway
            return None
        if known := self._originals.get(id(parameter)):
            if known[0]() is parameter:
                return known[1]
        self._close()
        stand_in, whole = _without_values(parameter), parameter.detach()  # before operations on it are redirected
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
            return targets[0]  # operations on the result apply to the parameter
        if owner is torch.Tensor.device:
            return torch.device("cpu")
        if owner is torch.Tensor.is_meta:
            return False
        if any(owner is each for each in _OWN) or name in ("requires_grad_", "__hash__"):
            return func(*args, **kwargs)
        if owner is torch.Tensor.data and name == "__set__":
            self._begin(args[0], args[1].detach().clone())
            return None
        if name.startswith("new_"):  # a new tensor of the parameter's dtype
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
        """Compute a read from the whole values if the parameter is open, else from its shape only."""
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
        """Return whether a tensor is a view of the open parameter: it might be written to after that is cut."""
        assert self._whole is not None
        return tensor.untyped_storage().data_ptr() == self._whole.untyped_storage().data_ptr()

    def _refused(self) -> _NeedsWholeError:
        self.is_refused = True
        return _NeedsWholeError()

    def _standing_in(self, value: Any) -> Any:
        """Replace registered parameters in arguments by their stand-ins."""
        if isinstance(value, dict):
            return {name: self._standing_in(each) for name, each in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self._standing_in(each) for each in value)
        known = self._originals.get(id(value))
        return known[1] if known is not None and known[0]() is value else value

    def _opened(self, value: Any) -> Any:
        """Replace the open stand-in in arguments by its whole values."""
        if isinstance(value, dict):
            return {name: self._opened(each) for name, each in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self._opened(each) for each in value)
        return self._whole if value is self._open and value is not None else value

    def _found(self, value: Any) -> Iterator[nn.Parameter]:
        """Yield the stand-ins in arguments."""
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (tuple, list)):
            for each in value:
                yield from self._found(each)
        elif id(value) in self._stand_ins:
            yield value

    def finish(self, model: nn.Module) -> dict[str, Tensor] | None:
        """Return the kept values of each parameter, and replace parameters that are still whole by stand-ins.

        None if a parameter or buffer was computed from a stand-in.
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
