"""A wrapper of torch.compile: whole functions, fixed shapes and one-line errors."""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable

import torch


class CannotCompile(RuntimeError):
    """No compiler is available, or it cannot compile this function."""


def compiled(function: Callable, what: str, only: str = "", **options) -> Callable:
    """Compile ``function`` at its first call; it must not branch on the values of tensors.

    Tensors may change between calls, but a call with other shapes, dtypes, devices or strides
    recompiles. Torch caches compilations on disk, across processes too.

    Args:
        function: takes and returns tensors, nested in lists, tuples and dicts if needed.
        what: names the function in errors, as in "the optimizer's step".
        only: the one argument whose tensors differ between calls. The caller promises that the rest
            stays the same, except numbers: checking it would take as long as a short function.
        options: passed to torch's inductor.

    Raises:
        CannotCompile: by the call that compiles; a one-line message, with torch's error as cause.
    """
    # Dynamo gives up after eight compilations of one code object, so each function gets a copy.
    function_copy = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__,
        function.__defaults__, function.__closure__,
    )  # fmt: skip
    if only and hasattr(torch.compiler, "keep_tensor_guards_unsafe"):  # from torch 2.8
        guarded = (only, f"L['{only}']")
        options["guard_filter_fn"] = lambda guards: [
            g.guard_type == "TENSOR_MATCH" and g.name.startswith(guarded) for g in guards
        ]
    fast = None

    @functools.wraps(function)
    def call(*args):
        nonlocal fast
        try:
            if fast is None:
                if "1" in map(os.environ.get, ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")):
                    raise RuntimeError("TORCH_COMPILE_DISABLE or TORCHDYNAMO_DISABLE is set")
                # Older torch reuses code on disk that was made for another number of threads.
                how = {"cpp.threads": torch.get_num_threads(), **options}
                fast = torch.compile(function_copy, fullgraph=True, dynamic=False, options=how)
            return fast(*args)
        except Exception as error:
            module = type(error).__module__
            if fast and not module.startswith(("torch._dynamo", "torch._inductor")):
                raise  # not a compiler error, e.g. out of memory
            cause = getattr(error, "inner_exception", error)
            reason = f"{type(cause).__name__}: {first_line(cause)}"
            raise CannotCompile(
                f"{what} cannot be compiled here ({reason}): fix that or run without compiling"
            ) from error

    return call


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
