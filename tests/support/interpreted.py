"""Whether this process runs vLLM's second model runner in Triton's interpreter. Imports nothing of vLLM.

vLLM wants a Triton with a CPU backend there; a placeholder is enough, because nothing is compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import types
from typing import Any

ENVIRONMENT = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
INTERPRETING = all(os.environ.get(name) == value for name, value in ENVIRONMENT.items())


def pretend_triton_runs() -> None:
    """Give Triton a CPU backend; before vLLM is imported."""
    from triton.backends import backends

    driver = types.SimpleNamespace(is_active=staticmethod(lambda: True))
    backends.setdefault("cpu", types.SimpleNamespace(driver=driver))


def hasten_interpreter() -> None:
    """Leave out most of the interpreter's time, which it spends on what it has done already or never reads.

    It replaces Triton's whole language at every launch and at every call of a function within a kernel; looks up a type
    in a table that it builds anew; and repeats integer operations in int64 for an assertion that only debug mode makes.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    _hasten_types()
    _hasten_operands()
    interpreter._patch_attr = _patch_without_detour
    sees_all = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
    interpreter._patch_lang(sees_all)
    once = types.SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda _: once
    looked_up = functools.cache(interpreter._get_np_dtype)
    type_of = interpreter._get_np_dtype  # of pointers, which have no hash
    interpreter._get_np_dtype = lambda t: (looked_up if type(t.scalar) is tl.dtype else type_of)(t.scalar)
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _patch_without_detour(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """What the interpreter's ``_patch_attr`` does, in one call instead of three."""
    from triton.runtime import interpreter

    semantic = interpreter.interpreter_semantic
    function = getattr(member, "__wrapped__", member)  # the wrapper only asks whether there is a semantic

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return function(*args, **kwargs)

    scope.set_attr(owner, name, call)


def _hasten_types() -> None:
    """Make what depends only on a shape once for every shape, and tell types apart by their names' sets."""
    from triton.language import core

    @functools.cache
    def measures(shape: tuple[int, ...]) -> tuple[Any, Any]:
        return core.constexpr(math.prod(shape)), core.tuple([core.constexpr(size) for size in shape])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = measures(tuple(type.shape.values) if type.is_block() else ())

    core.tensor.__init__ = tensor
    make_block = core.block_type.__init__

    @functools.cache
    def block(shape: tuple[int, ...]) -> Any:
        made = object.__new__(core.block_type)
        make_block(made, core.int32, list(shape))
        return made

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        known = block(tuple(shape.values if isinstance(shape, core.tuple) else core._unwrap_shape(shape)))
        self.element_ty, self.shape, self.numel = element_ty, known.shape, known.numel

    core.block_type.__init__ = block_type
    name = functools.cached_property(lambda self: f"<{self.shape}, {self.element_ty}>")
    name.__set_name__(core.block_type, "name")
    core.block_type.name = name
    integers = frozenset(core.dtype.SINT_TYPES + core.dtype.UINT_TYPES)
    core.dtype.is_int = lambda self: self.name in integers
    equal = core.dtype.__eq__
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    unwrap = core._unwrap_if_constexpr
    core._unwrap_if_constexpr = lambda some: some if type(some) in (int, core.tensor) else unwrap(some)


def _hasten_operands() -> None:
    """Convert and broadcast operands only where they differ, and make each constant once per type and shape."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    offsets = {id(getattr(core, name)) for name in ("int32", "int64", "uint32", "uint64")}
    numbers = offsets | {id(core.float32)}
    agree, broadcast = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value
    constants: dict[Any, Any] = {}

    def same_shape(a: Any, b: Any) -> bool:
        return getattr(a.type, "shape", None) is getattr(b.type, "shape", None)  # one object for every shape

    def equal_types(a: Any, b: Any) -> bool:
        """Whether no operand is converted: numbers of one type, or a pointer and its offset."""
        if a.dtype is b.dtype:
            return id(a.dtype) in numbers
        return type(a.dtype) is core.pointer_type and id(b.dtype) in offsets

    def with_constant(self: Any, a: Any, b: int, args: Any) -> Any:
        key = b, id(a.dtype), id(getattr(a.type, "shape", None)), args
        known = constants.get(key)
        if known is None:
            converted, known = agree(self, a, b, *args)
            if converted is not a:
                return converted, known
            constants[key] = known
        return a, known

    def binary_op_type_checking_impl(self: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
        if type(a) is core.tensor and not kwargs:
            if type(b) is core.tensor and equal_types(a, b):
                return broadcast_impl_value(self, a, b)
            if type(b) is int and id(a.dtype) in numbers:
                return with_constant(self, a, b, args)
        return agree(self, a, b, *args, **kwargs)

    def broadcast_impl_value(self: Any, a: Any, b: Any) -> Any:
        return (a, b) if same_shape(a, b) else broadcast(self, a, b)

    TritonSemantic.binary_op_type_checking_impl = binary_op_type_checking_impl
    TritonSemantic.broadcast_impl_value = broadcast_impl_value
