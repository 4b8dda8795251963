"""Compiles `cpu_kernels.cpp` once with the machine's C++ compiler, and calls it. See there for what it computes."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from dvpo.packed_row import Packing, keys_of
from server.logs import logger

KERNELS = "DVPO_KERNELS"
"""The environment variable that names the folder of the compiled kernels; the user's cache without it."""
_SOURCE = Path(__file__).with_suffix(".cpp")
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = [
    *("-std=c++17", "-O3", "-shared", "-fPIC", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    *("-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
]
_VECTORS = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "fma3")
_TILES = ("avx512_bf16", "amx_tile", "amx_bf16")
BLOCK = 32
"""Rows and columns of a product. A matrix in tiles has rows up to a multiple of it, used or not."""

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ATTEND = [_POINTER, _LONG, _INT, _INT, _INT, _FLOAT, _POINTER, _INT, _POINTER, _POINTER, _LONG]
_ARGUMENTS = {
    "dvpo_allow_tiles": [],
    "dvpo_unit": [_POINTER, _LONG, _LONG, _FLOAT, _POINTER],
    "dvpo_rotate": [_POINTER, _LONG, _LONG, _LONG, _LONG, _POINTER, _POINTER],
    "dvpo_attend_float32": _ATTEND,
    "dvpo_attend_tiles": _ATTEND,
    "dvpo_project_tiles": [
        _POINTER, _LONG, _INT, _FLOAT, _POINTER, _POINTER, _INT, _INT, _INT, _POINTER, _POINTER, _POINTER,
    ],
    "dvpo_finish_tiles": [
        _POINTER, _LONG, _INT, _POINTER, _LONG, _INT, _FLOAT, _POINTER, _POINTER, _POINTER, _POINTER, _INT, _POINTER,
        _POINTER,
    ],
}  # fmt: skip


class Panels:
    """A linear layer laid out for tiles: 32 columns of the result behind one another, read from front to back.

    Weight [out, in], both multiples of 32, bfloat16; bias [out] or none.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        out, depth = weight.shape
        tiles = weight.view(out // BLOCK, 2, 16, depth // BLOCK, 16, 2)
        self.weight = tiles.permute(0, 3, 1, 4, 2, 5).contiguous()
        self.bias = torch.zeros(out) if bias is None else bias.float().contiguous()
        self.depth, self.columns = depth, out


class Heads:
    """How attention's rows are read: so many heads of queries, of keys, the width of each, and the scores' scale.

    A row has the queries' heads, then the keys', then the values'.
    """

    def __init__(self, queries: int, keys: int, width: int, scaling: float) -> None:
        self.queries, self.keys, self.width, self.scaling = queries, keys, width, scaling

    @property
    def turning(self) -> int:
        """Columns of a row that are rotated: those of queries and keys."""
        return (self.queries + self.keys) * self.width

    def keys_and_values(self, qkv_N_C: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the rows' keys and values, [1, heads, N, width]."""
        heads = qkv_N_C.unflatten(1, (-1, self.width)).transpose(0, 1)[None]
        _, keys, values = heads.split([self.queries, self.keys, self.keys], 1)
        return keys, values


class Kernels:
    """The compiled functions for tensors. All are float32 but those for tiles, which take bfloat16.

    Each runs in the calling thread alone; the interpreter is free meanwhile.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._of = library
        for name, arguments in _ARGUMENTS.items():
            getattr(library, name).argtypes = arguments
            getattr(library, name).restype = _INT if name == "dvpo_allow_tiles" else None
        self.tiles = all(_can(name) for name in _TILES) and bool(library.dvpo_allow_tiles())

    def unit(self, hidden_N_D: Tensor, eps: float) -> Tensor:
        """Rows divided by the roots of their mean squares (plus eps). D is a multiple of 16. [N, D]."""
        out_N_D = torch.empty_like(hidden_N_D)
        self._of.dvpo_unit(hidden_N_D.data_ptr(), *hidden_N_D.shape, eps, out_N_D.data_ptr())
        return out_N_D

    def rotate(self, qkv_N_C: Tensor, heads: Heads, turning_2_N_W: Tensor) -> None:
        """Rotates queries and keys in place; see `turning`."""
        self._of.dvpo_rotate(
            qkv_N_C.data_ptr(), qkv_N_C.stride(0), len(qkv_N_C), heads.turning, heads.width, *_both(turning_2_N_W)
        )

    def attend(self, qkv_N_C: Tensor, heads: Heads, packing: Packing, layer: int) -> Tensor:
        """Attention of all segments of a row, of the row's type. [N, heads.queries * heads.width].

        In bfloat16 as `finish` takes it, [R, S]: rows up to a multiple of 32, and columns that keep them apart in the
        cache. What stands there beside the first N rows and what was asked for of their columns may be anything.
        """
        segments, pieces, held = _plan(qkv_N_C, heads, packing, layer)
        rows, columns = len(qkv_N_C), heads.queries * heads.width
        if qkv_N_C.dtype == torch.bfloat16:
            rows, columns = -(-rows // BLOCK) * BLOCK, _apart(columns)
        out_R_S = qkv_N_C.new_empty(rows, columns)
        attend = self._of.dvpo_attend_float32 if qkv_N_C.dtype == torch.float32 else self._of.dvpo_attend_tiles
        attend(
            qkv_N_C.data_ptr(), qkv_N_C.stride(0), heads.queries, heads.keys, heads.width, heads.scaling,
            segments.ctypes.data, len(segments), pieces.ctypes.data, out_R_S.data_ptr(), out_R_S.stride(0),
        )  # fmt: skip
        del held
        return out_R_S

    def project(self, hidden_N_D: Tensor, eps: float, qkv: Panels, heads: Heads, turning_2_N_W: Tensor) -> Tensor:
        """Norm, then queries, keys and values, rotated. [N, columns], bfloat16."""
        out_N_C = torch.empty(len(hidden_N_D), qkv.columns, dtype=torch.bfloat16)
        self._of.dvpo_project_tiles(
            hidden_N_D.data_ptr(), *hidden_N_D.shape, eps, *_pointers(qkv), qkv.columns, heads.turning, heads.width,
            *_both(turning_2_N_W), out_N_C.data_ptr(),
        )  # fmt: skip
        return out_N_C

    def finish(
        self, attended_R_S: Tensor, hidden_N_D: Tensor, eps: float, output: Panels, gated: Panels, down: Panels
    ) -> None:
        """Adds to the hidden states what follows attention. `attended_R_S` as `attend` gives it; see `gate_and_up`."""
        self._of.dvpo_finish_tiles(
            attended_R_S.data_ptr(), attended_R_S.stride(0), output.depth, hidden_N_D.data_ptr(), *hidden_N_D.shape,
            eps, *_pointers(output), *_pointers(gated), down.depth, *_pointers(down),
        )  # fmt: skip


def gate_and_up(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of two weights [out, in], or numbers of two biases [out], by turns, 16 and 16."""
    return torch.stack([gate.unflatten(0, (-1, 16)), up.unflatten(0, (-1, 16))], 1).flatten(0, 2)


def turning(cos_N_W: Tensor, sin_N_W: Tensor) -> Tensor:
    """Cosines and sines for pairs that stand side by side, from those of a head's two halves. [2, N, W], float32."""
    cos_N_P, sin_N_P = (of[:, : of.shape[1] // 2].float() for of in (cos_N_W, sin_N_W))
    return torch.stack([torch.stack([cos_N_P, cos_N_P], 2).flatten(1), torch.stack([-sin_N_P, sin_N_P], 2).flatten(1)])


@cache
def kernels() -> Kernels | None:
    """The kernels, compiled now if they are not yet; None where this machine cannot have them, which the log says."""
    if sys.platform != "linux" or not all(_can(name) for name in _VECTORS):
        return None
    try:
        return Kernels(ctypes.CDLL(str(compiled())))
    except (OSError, subprocess.SubprocessError) as error:
        logger().warning("no_kernels", reason=str(error), effect="torch's own, which are slower, take their place")
        return None


def compiled() -> Path:
    """The library. Raises OSError or SubprocessError where it is not there and cannot be compiled or kept."""
    source = _SOURCE.read_bytes()
    name = f"cpu-{sha256(source + ' '.join(_FLAGS).encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get(KERNELS) or _cache())
    path = folder / name
    if path.is_file():
        return path
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler (c++, g++, clang++) to make them with")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / name
        done = subprocess.run(
            [compiler, *_FLAGS, str(_SOURCE), "-o", str(made)], capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode:
            raise OSError(
                f"{compiler} failed: {done.stderr.strip().splitlines()[0] if done.stderr.strip() else 'no word'}"
            )
        made.replace(path)
    return path


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dvpo" / "kernels"


def _can(name: str) -> bool:
    return bool(torch.cpu.get_capabilities().get(name))


def _apart(width: int) -> int:
    """A row's length with which rows are an odd number of cache lines apart, in bfloat16."""
    return width if width // 32 % 2 else width + 32


def _pointers(panels: Panels) -> tuple[int, int]:
    return panels.weight.data_ptr(), panels.bias.data_ptr()


def _both(turning_2_N_W: Tensor) -> tuple[int, int]:
    return turning_2_N_W[0].data_ptr(), turning_2_N_W[1].data_ptr()


def _plan(
    qkv_N_C: Tensor, heads: Heads, packing: Packing, layer: int
) -> tuple[np.ndarray, np.ndarray, Sequence[Tensor]]:
    """Segments and pieces as the library's structs have them, and tensors that must outlive its call."""
    size, row = qkv_N_C.element_size(), qkv_N_C.stride(0)
    keys_at = qkv_N_C.data_ptr() + heads.queries * heads.width * size
    values_at = keys_at + heads.keys * heads.width * size
    segments: list[tuple[int, ...]] = []
    pieces: list[tuple[int, ...]] = []
    held: list[Tensor] = []
    for segment in packing.segments:
        first = len(pieces)
        for piece in (*segment.before, slice(segment.start, segment.stop)):
            if isinstance(piece, slice):
                at = piece.start * row * size
                length = piece.stop - piece.start
                pieces.append((keys_at + at, values_at + at, heads.width, row, heads.width, row, length))
            else:
                key, value = keys_of(piece, qkv_N_C, qkv_N_C, layer)
                held += (key, value)
                strides = (key.stride(1), key.stride(2), value.stride(1), value.stride(2))
                pieces.append((key.data_ptr(), value.data_ptr(), *strides, key.shape[2]))
        segments.append((segment.start, segment.stop, first, len(pieces)))
    return np.array(segments, dtype=np.int64), np.array(pieces, dtype=np.int64), held
