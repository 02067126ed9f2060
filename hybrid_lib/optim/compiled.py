"""torch.compile as it is used here: whole functions, fixed shapes, and errors of one line."""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable

import torch


class CannotCompile(RuntimeError):
    """There is no compiler on the machine, or it cannot take this function."""


def compiled(function: Callable, what: str, only: str = "", **options) -> Callable:
    """``function``, compiled at its first call; it must not branch on the values of tensors.

    Tensors may change between calls, but a call with other shapes, dtypes, devices or strides
    compiles again. Compilations are kept on disk by torch, between processes too.

    Args:
        function: takes and returns tensors, in lists, tuples and dicts as it likes.
        what: names the function in errors, as in "the optimizer's step".
        only: the argument in whose tensors alone calls differ: the caller promises that everything
            else stays as it is, but for numbers. To look there would take a short function's time.
        options: of torch's inductor.

    Raises:
        CannotCompile: by the call that would compile, in one line; torch's own error is its cause.
    """
    # Dynamo counts compilations per code object and gives up at eight; so each has its own.
    own = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__,
        function.__defaults__, function.__closure__,
    )  # fmt: skip
    if only and hasattr(torch.compiler, "keep_tensor_guards_unsafe"):  # from torch 2.8
        looked_at = (only, f"L['{only}']")
        options["guard_filter_fn"] = lambda guards: [
            g.guard_type == "TENSOR_MATCH" and g.name.startswith(looked_at) for g in guards
        ]
    fast = None

    @functools.wraps(function)
    def call(*args):
        nonlocal fast
        try:
            if fast is None:
                if "1" in map(os.environ.get, ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")):
                    raise RuntimeError("TORCH_COMPILE_DISABLE or TORCHDYNAMO_DISABLE is set")
                fast = torch.compile(own, fullgraph=True, dynamic=False, options=options)
            return fast(*args)
        except Exception as error:
            module = type(error).__module__
            if fast and not module.startswith(("torch._dynamo", "torch._inductor")):
                raise  # not the compiler's: out of memory, say
            cause = getattr(error, "inner_exception", error)
            lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
            reason = f"{type(cause).__name__}: {lines[0] if lines else 'no reason given'}"
            raise CannotCompile(
                f"{what} cannot be compiled here ({reason}); do without, or mend that"
            ) from error

    return call
