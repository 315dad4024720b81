"""Compiled code that works with addresses: no array is freed while somebody still has its address."""

import inspect

import numpy as np
import pytest
from fasttrain.loaders import baseline, crop, huffman, show, vectors
from fasttrain.loaders.vectors import load_uint8
from numba.core import compiler, ir, postproc
from numba.core.analysis import compute_cfg_from_blocks
from numba.core.dispatcher import Dispatcher

TAKERS = {name for name, found in vars(vectors).items() if type(found).__name__ == "_Intrinsic"} | {"read_block"}


def freed_early(function) -> set[str]:
    """Arrays of a function whose address was taken, and that numba frees where code that takes addresses may follow.

    numba frees an array after the last line that names it. That a number is its address it does not know.
    """
    code = compiler.run_frontend(function)
    postproc.PostProcessor(code).run(emit_dels=True)
    graph, asked, kept, freed, taking = compute_cfg_from_blocks(code.blocks), set(), set(), [], set()
    for label, block in code.blocks.items():
        for line in block.body:
            if isinstance(line, ir.Del):
                freed.append((line.value, label))
            value = getattr(line, "value", None)
            if isinstance(value, ir.Expr) and value.op == "getattr" and value.attr == "ctypes":
                asked.add(value.value.name)
            if isinstance(value, ir.Global) and value.name in TAKERS:
                taking.add(label)
            if isinstance(value, ir.Arg | ir.Global):  # whoever called keeps it
                kept.add(line.target.name)
    after = {label: {label for label, _ in graph.successors(label)} for label in code.blocks}
    for _ in code.blocks:  # whatever may follow
        after = {label: found.union(*(after[f] for f in found)) for label, found in after.items()}
    return {name for name, label in freed if name in asked - kept and after[label] & taking}


def compiled() -> list:
    modules = (baseline, crop, huffman, show)
    return [
        pytest.param(f.py_func, id=f.__name__)
        for m in modules
        for f in vars(m).values()
        if isinstance(f, Dispatcher) and inspect.getmodule(f.py_func) is m
    ]


@pytest.mark.parametrize("function", compiled())
def test_nothing_is_freed_early(function):
    assert freed_early(function) == set()


def test_that_this_would_be_found():
    assert len(compiled()) > 15 and len(TAKERS) > 8

    def wrong(n):
        array = np.zeros(n)
        address, total = array.ctypes.data, 0
        for i in range(n):
            total += load_uint8(address, i)
        return total

    assert freed_early(wrong) == {"array"}
