"""A GPU that is not there: tensors without numbers that count as CUDA's, so that a step takes the path of a CUDA run.

PyTorch's FakeTensorMode holds tensors of any device, and real autocast, autograd formulas and kernels' shapes run on
them. A build of PyTorch for CPUs lacks four things, which are put in their places here: a device guard for CUDA (that of
the meta device, which does nothing), the choice of an attention kernel, the fused RMSNorm, and the engine of the backward
pass, which wants CUDA's streams: `backward` walks the same nodes in the engine's order.

What reads numbers back from the device gets zeros; the counter (benchmarks/counted.py) notes each such wait.
"""

from __future__ import annotations

import ctypes
import gc
import heapq
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import GraphExecGroup

DEVICE = torch.device("cuda:0")
_REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"
_CUDA, _META, _DEVICE_TYPES = 1, 14, 20
"""Of c10::DeviceType; the registry has a place for each type."""
_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.is_nonzero.default)
SYNCHRONIZE = "synchronize"
"""What `seen` is told of instead of an operation where the host waits for all that the device has to do."""
Seen = Callable[[Any, Sequence[Any], dict[str, Any], Any], None]


class NotPossible(Exception):
    """This PyTorch cannot pretend."""


@contextmanager
def _guard() -> Iterator[None]:
    """Has CUDA's device guard do nothing where there is none: autograd asks it for a stream at each node."""
    if torch.backends.cuda.is_built():
        yield  # FakeTensorMode does it itself
        return
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        registry = (ctypes.c_void_p * _DEVICE_TYPES).in_dll(library, _REGISTRY)
    except (OSError, ValueError):
        raise NotPossible("this PyTorch keeps its device guards elsewhere: only one for CUDA, or for Linux") from None
    before = registry[_CUDA]
    registry[_CUDA] = before or registry[_META]
    try:
        yield
    finally:
        registry[_CUDA] = before


class _Pretend(TorchDispatchMode):
    """Real tensors of the host stay real, so that Python may look at masks and times; all else is fake. `seen` is told of
    what would run on the device."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        wanted = kwargs.get("device")
        there = DEVICE.type if wanted is not None and torch.device(wanted).type == DEVICE.type else "cpu"
        if there == "cpu" and not any(isinstance(x, FakeTensor) for x in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        back = func in _READS or (func is torch.ops.aten._to_copy.default and wanted is not None and there == "cpu")
        if back:
            with unset_fake_temporarily():
                found = torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
                answer: Any = found if func not in _READS else found.flatten()[0].item()
        elif func.namespace == "bitsandbytes":  # its kernels write into their arguments
            assert not func._schema.returns, func
            answer = None
        else:
            answer = func(*args, **kwargs)
        self.seen(func, args, kwargs, answer)
        return answer


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by CUDA's kernels: the flash kernel, or with a mask the memory-efficient one."""
    q, k, v = query, key, value
    if torch.is_autocast_enabled(DEVICE.type):
        dtype = torch.get_autocast_dtype(DEVICE.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    aten = torch.ops.aten
    if attn_mask is None and q.dtype != torch.float32:
        found: Tensor = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
        return found
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            nothing = torch.zeros((), dtype=q.dtype, device=q.device)
            attn_mask = torch.where(attn_mask, nothing, torch.full_like(nothing, -torch.inf))
        attn_mask = attn_mask.to(q.dtype)
        if attn_mask.shape[-1] % 16:  # the kernel wants aligned rows
            length = attn_mask.shape[-1]
            attn_mask = torch.nn.functional.pad(attn_mask, (0, 16 - length % 16))[..., :length]
        attn_mask = attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    needs = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    found = aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, needs, dropout_p, is_causal, scale=scale)[
        0
    ]
    return found


def _never(*_: Any) -> Any:
    raise AssertionError("only its shapes are asked for")


running: list[str] = []
"""The node of the backward pass that computes now, for who asks where an operation comes from."""


def backward(loss: Tensor, gradient: Tensor | None = None, **_: Any) -> None:
    """What `Tensor.backward` does, by Python: nodes with the largest number first, gradients added where they meet."""
    start: Any = loss.grad_fn
    assert start is not None
    waiting: dict[Any, int] = {start: 0}
    stack = [start]
    while stack:
        for node, _place in stack.pop().next_functions:
            if node is not None:
                if node not in waiting:
                    waiting[node] = 0
                    stack.append(node)
                waiting[node] += 1
    grads: dict[Any, list[Tensor | None]] = {start: [torch.ones_like(loss) if gradient is None else gradient]}
    ready = [(-start._sequence_nr(), 0, start)]
    count = 0
    with torch.no_grad(), GraphExecGroup():
        while ready:
            node = heapq.heappop(ready)[2]
            running[:] = [node.name()]
            for (target, place), grad in _through(node, grads.pop(node, None)):
                slots = grads.setdefault(target, [None] * len(target._input_metadata))
                if grad is not None:
                    before, fitted = slots[place], _fitted(grad, target._input_metadata[place])
                    slots[place] = fitted if before is None else before + fitted
                waiting[target] -= 1
                if not waiting[target]:
                    count += 1
                    heapq.heappush(ready, (-target._sequence_nr(), count, target))
    running.clear()


def _through(node: Any, given: list[Tensor | None] | None) -> list[tuple[tuple[Any, int], Tensor | None]]:
    """((node, place), its gradient) of what a node hands on."""
    targets = list(node.next_functions)
    if given is None or all(grad is None for grad in given):
        return [(target, None) for target in targets if target[0] is not None]
    if node.name() == "torch::autograd::AccumulateGrad":
        _accumulate(node.variable, given[0])
        return []
    if hasattr(node, "apply"):  # a function of Python's: its answers are one for each argument
        given = [
            torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device) if grad is None else grad
            for grad, meta in zip(given, node._input_metadata, strict=True)
        ]
        found = node.apply(*given)
        found = found if isinstance(found, tuple) else (found,)
        found = [grad for grad, needed in zip(found, node.needs_input_grad, strict=True) if needed]
        return list(zip([target for target in targets if target[0] is not None], found, strict=True))
    found = node(*given)
    found = found if isinstance(found, tuple) else (found,)
    return [pair for pair in zip(targets, found, strict=True) if pair[0][0] is not None]


def _fitted(grad: Tensor, meta: Any) -> Tensor:
    """As the engine hands it on: of the shape and dtype of what it is the gradient of."""
    grad = grad if grad.shape == torch.Size(meta.shape) else grad.sum_to_size(meta.shape)
    return grad if grad.dtype == meta.dtype else grad.to(meta.dtype)


def _accumulate(variable: Tensor, grad: Tensor | None) -> None:
    if grad is None:
        return
    if variable.grad is not None:
        variable.grad = variable.grad + grad
    else:  # taken as it is where it lies as the weight does
        same = grad.stride() == variable.stride()
        variable.grad = grad.detach() if same else torch.empty_like(variable).copy_(grad)


@contextmanager
def pretended(seen: Seen) -> Iterator[None]:
    """Within it "cuda" is there, and `seen(operation, args, kwargs, answer)` is told of each operation on it."""
    lifted = torch._C._only_lift_cpu_tensors()
    deterministic = torch.are_deterministic_algorithms_enabled()
    with _guard(), ExitStack() as stack:
        if gc.isenabled():  # a step makes millions of small objects, and none of them is large
            gc.disable()
            stack.callback(gc.enable)
        if not torch.backends.cuda.is_built():
            library = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
            for name in ("_fused_rms_norm", "_fused_rms_norm_backward"):
                library.impl(name, _never, "CUDA")
        stack.enter_context(patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        stack.enter_context(patch("torch.cuda.is_bf16_supported", lambda *_: True))
        stack.enter_context(patch("torch.cuda.synchronize", lambda *_: seen(SYNCHRONIZE, (), {}, None)))
        stack.enter_context(patch.object(Tensor, "backward", backward))
        stack.enter_context(patch("torch.nn.functional.scaled_dot_product_attention", _attention))
        stack.enter_context(patch("torch.nn.utils.clip_grad._has_foreach_support", lambda *_: True))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        torch.use_deterministic_algorithms(True, warn_only=True)
        stack.callback(torch.use_deterministic_algorithms, deterministic)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_Pretend(seen))
        yield
