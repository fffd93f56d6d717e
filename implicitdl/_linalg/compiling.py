"""What a compiled graph makes of a function with derivatives of its own."""

import torch
from torch.autograd import forward_ad


def reverse_only(what: str) -> bool:
    """Whether a graph is being compiled, which admits no `torch.autograd.Function` with a `jvp`.

    Args:
        what: The quantity, for the message.

    Raises:
        RuntimeError: A graph is being compiled inside forward mode or a `torch.func` transform.
            There torch drops, without a word, the tangents of an operator and the second
            derivatives of a function that has its own backward.
    """
    if not torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise RuntimeError(
            f"{what} cannot be compiled inside torch.func transforms or forward mode. Apply the "
            "transform without torch.compile, or leave out fullgraph=True."
        )
    return True
