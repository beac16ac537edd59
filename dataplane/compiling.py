"""How numba and LLVM put our kernels together: the same machine code as numba's own, many times sooner.

Called by `jit` alone. Numba, as it comes, optimises every function together with all that it calls, makes
machine code and wrappers of it, and does that again in each caller. Here a function is optimised once, with
only the functions that are inlined into it (`Part`), and machine code is made once for each entry point
(`Whole`). Numba's own steps are kept to those that our code needs. All of it is classes of our own that
`pipeline_class` selects: a user's jitted functions are compiled as ever.
"""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Iterable
from typing import Any, ClassVar

from llvmlite import binding as llvm
from numba import _dynfunc, njit, types
from numba.core import cgutils, lowering, transforms, typed_passes, typeinfer, untyped_passes
from numba.core.bytecode import FunctionIdentity
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase
from numba.core.compiler_machinery import FunctionPass, PassManager, register_pass
from numba.core.errors import (  # type: ignore[attr-defined]
    LoweringError,
    NumbaWarning,
    WarningsFixer,
    new_error_context,
)

__all__ = ["PartCompiler", "WholeCompiler"]


# -- libraries ------------------------------------------------------------------------------


def _split(libraries: Iterable[Any]) -> tuple[list[Any], dict[Any, None]]:
    """Of a library's direct callees: those to be linked in now, because they are inlined, and
    all that must be linked into the entry point in the end (an ordered set)."""
    now: list[Any] = []
    later: dict[Any, None] = {}
    for library in dict.fromkeys(libraries):
        library._ensure_finalized()
        if isinstance(library, _Part):
            later.update(library.later)
            if library.shared:
                later[library] = None
                continue
        now.append(library)
    return now, later


class _Library(JITCodeLibrary):
    """What parts and wholes do alike."""

    def add_ir_module(self, ir_module: Any) -> None:
        """Takes the code over as it is: the whole library is optimised at once in the end."""
        module = llvm.parse_assembly(cgutils.normalize_ir_text(str(ir_module)))
        module.name = ir_module.name
        module.data_layout = self._codegen._data_layout
        self._final_module.link_in(module)

    def _optimise(self) -> None:
        manager, builder = self._codegen._module_pass_manager()
        manager.run(self._final_module, builder)


class _Part(_Library):
    """Code of a function that only kernels call: optimised, but never made machine code."""

    shared = False
    later: dict[Any, None]
    _linking_libraries: list[Any]

    def finalize(self) -> None:
        self._linking_libraries, self.later = _split(self._linking_libraries)
        for library in self._linking_libraries:
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._optimise()
        self._finalize_dynamic_globals()
        self._finalized = True


class _Whole(_Library):
    """Code of an entry point, with all the parts that it needs."""

    _linking_libraries: list[Any]

    def finalize(self) -> None:
        now, later = _split(self._linking_libraries)
        for library in now:
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._optimise()
        # Users before what they use: the linker passes over a function that nobody refers to yet.
        for library in reversed(later):
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._finalize_final_module()


# -- passes ---------------------------------------------------------------------------------


@register_pass(mutates_CFG=True, analysis_only=False)
class _Canonical(FunctionPass):
    """Drops dead blocks. Numba does it after most passes, together with the variables' lifetimes,
    which only code with reference counts or generators needs."""

    _name = "dataplane_canonical"

    def __init__(self) -> None:
        FunctionPass.__init__(self)

    def run_pass(self, state: Any) -> bool:
        state.func_ir.blocks = transforms.canonicalize_cfg(state.func_ir.blocks)
        return True


_PLAIN = (types.Integer, types.Boolean, types.Float)
_OPERATORS = frozenset(value for value in vars(operator).values() if callable(value))


class _Inferer(typeinfer.TypeInferer):
    """Remembers what a call's type was: numba tries some thirty templates for each `+`."""

    known: ClassVar[dict[Any, Any]] = {}

    def resolve_call(self, fnty: Any, pos_args: Any, kw_args: Any) -> Any:
        args = tuple(pos_args)
        if isinstance(fnty, types.BoundFunction) or kw_args or not all(one.is_precise() for one in args):
            return super().resolve_call(fnty, pos_args, kw_args)
        if isinstance(fnty, types.Function) and fnty.typing_key in _OPERATORS:
            plain = tuple(types.unliteral(one) for one in args)
            if all(isinstance(one, _PLAIN) for one in plain):
                args = plain
        key = (fnty, args)
        found = self.known.get(key)
        if found is None or found[0] is not fnty:
            found = fnty, super().resolve_call(fnty, args, kw_args)
            if found[1] is not None:
                self.known[key] = found
        return found[1]


@register_pass(mutates_CFG=True, analysis_only=False)
class _Inference(FunctionPass):
    """Finds the types of all variables: numba's own pass with an `_Inferer`."""

    _name = "dataplane_inference"

    def __init__(self) -> None:
        FunctionPass.__init__(self)

    def run_pass(self, state: Any) -> bool:
        context = state.typingctx
        infer = _Inferer(context, state.func_ir, WarningsFixer(NumbaWarning))
        with context.callstack.register(state.targetctx.target, infer, state.func_ir.func_id, state.args):
            for index, (name, kind) in enumerate(zip(state.func_ir.arg_names, state.args, strict=True)):
                infer.seed_argument(name, index, kind)
            if state.return_type is not None:
                infer.seed_return(state.return_type)
            infer.build_constraint()
            state.typing_errors = infer.propagate()
            state.typemap, state.return_type, state.calltypes = infer.unify()
        return True


@register_pass(mutates_CFG=True, analysis_only=False)
class _NoPhis(typed_passes.PreLowerStripPhis):
    """Makes assignments of what the SSA form's phi nodes stand for."""

    _name = "dataplane_no_phis"

    def run_pass(self, state: Any) -> bool:
        state.func_ir = self._strip_phi_nodes(state.func_ir)
        return True


class _Lower(lowering.Lower):
    """Numba's lowering without what serves debuggers and reference counts."""

    def lower_block(self, block: Any) -> None:
        self.pre_block(block)
        with new_error_context("lowering block at {loc}", loc=block.loc,
                               errcls_=functools.partial(LoweringError, loc=block.loc)):
            for inst in block.body:
                self.loc = inst.loc
                self.lower_inst(inst)
        self.post_block(block)

    def alloca_lltype(self, name: str, lltype: Any, datamodel: Any = None) -> Any:
        return cgutils.alloca_once(self.builder, lltype, name=name, zfill=False)

    def storevar(self, value: Any, name: str, argidx: int | None = None) -> None:
        self._alloca_var(name, self.typeof(name))
        if name in self._singly_assigned_vars:
            self._blk_local_varmap[name] = value
        else:
            self.builder.store(value, self.getvar(name))


@register_pass(mutates_CFG=True, analysis_only=False)
class _WholeLowering(typed_passes.NativeLowering):
    """Lowers to a `_Whole`."""

    _name = "dataplane_whole_lowering"
    lowering_class = _Lower

    def run_pass(self, state: Any) -> bool:
        state.library = _Whole(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        return bool(super().run_pass(state))


@register_pass(mutates_CFG=True, analysis_only=False)
class _PartLowering(typed_passes.NativeLowering):
    """Lowers to a `_Part`."""

    _name = "dataplane_part_lowering"
    lowering_class = _Lower

    def run_pass(self, state: Any) -> bool:
        state.library = _Part(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.shared = not state.flags.forceinline
        state.flags.no_compile = True
        super().run_pass(state)
        if state.library.shared:
            state.library.get_function(state.cr.fndesc.mangled_name).add_function_attribute("noinline")
        # Callers find a function's code by its entry point, so there must be one of its own.
        entry = _dynfunc.make_function(state.cr.fndesc.lookup_module(), state.func_id.func_name,
                                       "only for kernels", _refusal(), state.cr.env, (state.library,))
        state.cr = state.cr._replace(cfunc=entry)
        state.targetctx.insert_user_function(entry, state.cr.fndesc, [state.library])
        return True


@functools.cache
def _refusal() -> int:
    """Address of what answers when Python calls a function that is only for kernels: the wrapper
    of a function without parameters raises TypeError for any."""
    nothing = njit(_nothing)
    nothing.compile(())
    result = nothing.overloads[()]
    return int(result.library.get_pointer_to_function(result.fndesc.llvm_cpython_wrapper_name))


def _nothing() -> None:
    pass


class _Passes(PassManager):
    """Runs passes and nothing else: no timers, events or checks between them."""

    def run(self, state: Any) -> None:
        for step, _ in self.passes:
            step().run_pass(state)


class WholeCompiler(CompilerBase):
    """For an entry point. Left out of numba's pipeline is what no kernel has: with-blocks, closures, generators,
    raised exceptions, array expressions, literal unrolling, parallel loops, `del`."""

    lowering: Any = _WholeLowering

    def compile_extra(self, func: Any) -> Any:
        """Numba numbers functions from one in each process, and its symbols are a function's name, arguments and
        number. Objects that several processes have made are loaded into one here, and functions that one factory
        has made have all the same name: with such numbers, one's code could be linked to another's callers."""
        identity = FunctionIdentity.from_function(func)
        identity.unique_id = int.from_bytes(os.urandom(8), "big")
        identity.unique_name = f"{identity.func_qualname}${identity.unique_id}"
        self.state.func_id = identity
        untyped_passes.ExtractByteCode().run_pass(self.state)
        self.state.lifted, self.state.lifted_from = (), None
        return self._compile_bytecode()

    def define_pipelines(self) -> list[Any]:
        manager = _Passes("dataplane")
        for step in (untyped_passes.TranslateByteCode, untyped_passes.FixupArgs, _Canonical,
                     untyped_passes.GenericRewrites, untyped_passes.ReconstructSSA, _Inference, _NoPhis,
                     self.lowering, typed_passes.NoPythonBackend):
            manager.add_pass(step, step._name)
        manager.finalize()
        return [manager]


class PartCompiler(WholeCompiler):
    """For a function that only kernels call."""

    lowering = _PartLowering
