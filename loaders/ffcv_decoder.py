"""FFCV's operation for images, replaced: shows rows of our epoch's table. Imports FFCV."""

from dataclasses import replace

import numba
import numpy as np
from ffcv.fields.decoders import SimpleRGBImageDecoder
from ffcv.memory_managers.os_cache import OSCacheManager
from ffcv.memory_managers.process_cache.manager import ProcessCacheManager
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler

from .ffcv_loader import _BOX, _INDEX, _ROW, _SIZE
from .show import show_at


def leave_torch_threads_alone() -> None:
    """FFCV sets PyTorch's threads to those of its loader, for the whole process; here it sets only numba's."""

    def set_num_threads(cls, n):
        cls.num_threads = max(1, min(n, numba.config.NUMBA_NUM_THREADS))
        numba.set_num_threads(cls.num_threads)

    Compiler.set_num_threads = classmethod(set_num_threads)


def leave_numba_types_alone() -> None:
    """FFCV sets numba's types of vectors to read-only, which are one object for the whole process: tables of compiled functions
    that hold one no longer find it, and may have no end. Here what is read-only has a type of its own."""
    types = numba.types
    bytes_N, numbers_N = types.Array(types.uint8, 1, "C", readonly=True), types.uint64[::1]
    mapped = types.Tuple([bytes_N, numbers_N, numbers_N])  # the file; where samples begin in it; their sizes

    def compile_reader(self):
        def sample(begin, file):
            return file[0][begin : begin + file[2][np.searchsorted(file[1], begin)]]

        return Compiler.compile(sample, bytes_N(types.uint64, mapped))

    OSCacheManager.state_type = property(lambda self: mapped)
    OSCacheManager.compile_reader = compile_reader
    in_memory = types.Tuple(
        [types.uint8[:, ::1], numbers_N, numbers_N, types.uint32[::1]]
    )  # pages first; can be written
    ProcessCacheManager.state_type = property(lambda self: in_memory)


def decoder(sample_bytes: int, still: int):
    """An operation whose output is flat: all samples' pixels, all their stills, and a byte each that says who failed."""
    return _Decoder(sample_bytes, still)


class _Decoder(SimpleRGBImageDecoder):  # FFCV takes no other class for the first operation
    def __init__(self, sample_bytes: int, still: int) -> None:
        super().__init__()
        self.sample_bytes, self.still = sample_bytes, still

    def declare_state_and_memory(self, previous_state):
        shape, kind = (self.sample_bytes,), np.dtype("u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=kind), AllocationQuery(shape, kind)

    def generate_code(self):
        read, threads, still, show = self.memory_read, Compiler.get_iterator(), self.still, show_at()

        def decode(table_BX, memory, records, storage):
            flat, n = memory.reshape(-1), len(table_BX)
            size = np.int64(table_BX[0, _SIZE])
            image, other, start = size * size * 3, still * still * 3, flat.ctypes.data
            for at in threads(n):
                row = table_BX[at]
                record, b = records[row[_INDEX]], np.int64(row[_ROW])
                data = read(record["data_ptr"], storage)
                flat[n * (image + other) + b] = show(
                    data.ctypes.data, len(data), record["data_ptr"], record["mode"] == 0, record["height"], record["width"],
                    row[_BOX:].ctypes.data, size, start + b * image, still, start + n * image + b * other,
                )  # fmt: skip
            return memory

        decode.is_parallel = True
        return decode
