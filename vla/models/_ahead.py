"""A model whose first call has all of its kernels compiled side by side."""

import copy
import logging
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from ..layers.hooks import hooks_of
from ..layers.norm import autocast_dtype
from ..layers.weights import product_weights
from ..ops import _ahead

_logger = logging.getLogger(__name__)
# Kinds of calls that a model has had.
_known: weakref.WeakKeyDictionary[nn.Module, set[tuple]] = weakref.WeakKeyDictionary()


class Backbone(nn.Module):
    """A model that compiles its kernels side by side.

    Triton compiles a kernel when it is first launched, one after the other. When the first call of a kind meets a
    kernel that is not in Triton's cache on disk, it is followed through with fake tensors, and its backward if
    gradients are on; see `vla.ops._ahead`.

    Compiled for inference under autocast, it casts the weights of its products at once, see `vla.layers.weights`.
    """

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            weights = product_weights(self, autocast_dtype(args[0])) if _casts_on_gpu(args) else {}
            if weights:
                return functional_call(self, weights, args, kwargs, tie_weights=False)
            return super().__call__(*args, **kwargs)
        _expect(self, args, kwargs)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            # Otherwise its backward may be the first to compile.
            if not torch.is_grad_enabled():
                _ahead.at_compilation(None)


def is_exporting() -> bool:
    """Whether `torch.export` traces. PyTorch 2.11's own `is_exporting` is true in every compilation."""
    return getattr(torch.compiler, "_is_exporting_flag", False)


def _casts_on_gpu(args: tuple) -> bool:
    """Whether a compiled call without gradients is one in whose course autocast has a GPU cast every weight."""
    if torch.is_grad_enabled() or is_exporting() or not args or not isinstance(args[0], Tensor) or not args[0].is_cuda:
        return False
    dtype = autocast_dtype(args[0])
    return dtype is not None and dtype.itemsize == 2


def _expect(model: nn.Module, args: tuple, kwargs: Mapping) -> None:
    """Prepares for a kernel that this call has to compile."""
    images = args[0] if args else None
    if type(images) is not Tensor or not images.is_cuda or torch._C._are_functorch_transforms_active():
        return
    autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    kind = (images.get_device(), images.dtype, autocast, torch.is_grad_enabled(), model.training)
    known = _known.setdefault(model, set())
    if kind in known:
        _ahead.at_compilation(None)
        return
    known.add(kind)
    if not all(_is_plain(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)):
        return
    args, kwargs = tree_map_only(Tensor, partial(_like, device="meta"), (args, kwargs))
    call = _Call(weakref.ref(model), args, kwargs, images.device, autocast, torch.is_grad_enabled())
    _ahead.at_compilation(call.compile)


@dataclass
class _Call:
    """A call of a model.

    Args:
        model: The model.
        args: What it is called with, tensors without memory.
        kwargs: Likewise.
        device: GPU of the tensors.
        autocast: dtype of autocast, None if it is off.
        grad: Whether gradients are on.
    """

    model: weakref.ref[nn.Module]
    args: tuple
    kwargs: Mapping
    device: torch.device
    autocast: torch.dtype | None
    grad: bool

    def compile(self) -> None:
        """Compiles what the call and its backward launch."""
        # A thread of its own has no modes, hooks or settings of the call that goes on.
        thread = threading.Thread(target=self._try)
        thread.start()
        thread.join()

    def _try(self) -> None:
        try:
            with torch.cuda.device(self.device), _ahead.compile_launches():
                self._follow()
        except Exception:
            # Of no harm: kernels are compiled when they are launched.
            _logger.debug("cannot follow the call of a model", exc_info=True)

    def _follow(self) -> None:
        """The call and its backward, of a copy of the model without values."""
        model = self.model()
        tensors = [*model.parameters(), *model.buffers()]
        if not all(map(_is_plain, tensors)):
            return
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = copy.deepcopy(model, {id(x): _like(x, x.device) for x in tensors})
            for module in model.modules():
                for hooks in hooks_of(module):
                    hooks.clear()
            _shorten(model)
            args, kwargs = tree_map_only(Tensor, partial(_like, device=self.device), (self.args, self.kwargs))
            with (
                torch.set_grad_enabled(self.grad),
                torch.autocast("cuda", self.autocast, enabled=self.autocast is not None, cache_enabled=False),
            ):
                outputs = model.forward(*args, **kwargs)
            outputs = [x for x in tree_leaves(outputs) if _wants_grad(x)]
            inputs = [x for x in chain(model.parameters(), tree_leaves((args, kwargs))) if _wants_grad(x)]
            if outputs and inputs:
                # In this thread, which takes note of launches.
                with torch.autograd.set_multithreading_enabled(False):
                    torch.autograd.grad(outputs, inputs, [torch.empty_like(x) for x in outputs], allow_unused=True)


def _shorten(model: nn.Module) -> None:
    """Leaves the first and the last of blocks in a row that are alike: those between launch the same kernels."""
    for blocks in [module for module in model.modules() if isinstance(module, nn.Sequential | nn.ModuleList)]:
        forms = [_form(block) for block in blocks]
        for i in range(len(blocks) - 2, 0, -1):
            if forms[i - 1] == forms[i] == forms[i + 1] and next(blocks[i].parameters(), None) is not None:
                del blocks[i], forms[i]


def _form(module: nn.Module) -> list:
    """What a module launches depends on: kinds and settings of its modules, layouts of their tensors."""
    form = []
    for name, part in module.named_modules():
        settings = {key: str(x) for key, x in vars(part).items() if isinstance(x, bool | int | str | tuple)}
        # Of rates, which grow from block to block, whether they are zero.
        settings |= {key: bool(x) for key, x in vars(part).items() if isinstance(x, float)}
        tensors = chain(part.named_parameters(recurse=False), part.named_buffers(recurse=False))
        form.append((name, type(part), settings, [(key, x.shape, x.stride(), x.dtype) for key, x in tensors]))
    return form


def _is_plain(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter)


def _wants_grad(x: object) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _like(x: Tensor, device: torch.device | str) -> Tensor:
    """Another tensor of the same layout."""
    out = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    return nn.Parameter(out, x.requires_grad) if isinstance(x, nn.Parameter) else out.requires_grad_(x.requires_grad)
