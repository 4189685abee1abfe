"""What torch's functions do with the tensors that they are given.

A function that is in no table here reads the values of its arguments.
"""

from collections.abc import Callable
from typing import Any

import torch

# Besides these, no property but those among VIEWS is about values.
NOT_ABOUT_VALUES = """
    size dim ndimension numel nelement stride is_contiguous storage_offset element_size get_device
    is_floating_point is_complex is_signed is_conj is_neg is_inference is_shared is_pinned
    is_same_size is_set_to has_names __len__ __hash__ requires_grad_ retain_grad register_hook
    register_post_accumulate_grad_hook share_memory_ storage untyped_storage _typed_storage _is_view
    _has_compatible_shallow_copy_type zeros_like ones_like empty_like full_like rand_like randn_like
    new new_empty new_full new_zeros new_ones
""".split()  # noqa: SIM905
VIEWS = """
    data T mT H mH real detach alias view view_as reshape reshape_as flatten unflatten squeeze
    unsqueeze expand expand_as broadcast_to t transpose permute movedim moveaxis swapaxes swapdims
    adjoint narrow select diagonal unfold as_strided __getitem__ split split_with_sizes chunk
    tensor_split unbind contiguous to cpu cuda float double half bfloat16 type type_as
""".split()  # noqa: SIM905
_WRITES = """
    data= __setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __imod__ __ipow__
    __iand__ __ior__ __ixor__ __ilshift__ __irshift__ __idiv__
""".split()  # noqa: SIM905
MEMORY = ("data_ptr", "__cuda_array_interface__")
PROPERTY = ("__get__", "__set__", "__delete__")
# These mean a tensor's place in the graph, not its values. Each has one argument that is values.
IDENTITIES: dict[Callable[..., Any], str] = {
    torch.autograd.grad: "grad_outputs",
    torch.autograd.backward: "grad_tensors",
    torch.Tensor.backward: "gradient",
}
_COLLECTIVES = "torch.distributed.distributed_c10d"
_ONLY_READ = ("send", "isend")  # of the collectives


def name_of(func: Callable[..., Any]) -> str:
    """Return a function's name: of a property's getter or deleter `data`, of its setter `data=`."""
    if func.__name__ in PROPERTY:
        return getattr(func, "__self__", func).__name__ + ("=" * (func.__name__ == "__set__"))
    return func.__name__


def is_collective(func: Callable[..., Any]) -> bool:
    """Return whether `func` is one of torch.distributed's."""
    return getattr(func, "__module__", None) == _COLLECTIVES


def written_by(func: Callable[..., Any], name: str, args: tuple, kwargs: dict) -> list[object]:
    """Return the arguments that `func`, called `name`, writes to.

    It is the first one of what works in place and of a collective, and `out`. The collective
    "gather" writes to its list.
    """
    if is_collective(func):
        in_place = name not in (*_ONLY_READ, "gather")
    elif name in NOT_ABOUT_VALUES:
        in_place = False
    else:
        in_place = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
        in_place = in_place or kwargs.get("inplace") is True
    first = (args[0] if args else next(iter(kwargs.values()), None)) if in_place else None
    return [first, kwargs.get("out"), kwargs.get("gather_list")]
