"""Compiles `kernels/` once with the machine's C++ compiler, and calls it. See there for what it computes."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from dvpo.packed_row import Packing, keys_of
from server.logs import logger

KERNELS = "DVPO_KERNELS"
"""The environment variable that names the folder of the compiled kernels; the user's cache without it."""
_SOURCES = Path(__file__).parent / "kernels"
COMPILERS = ("c++", "g++", "clang++")
_FLAGS = [
    *("-std=c++17", "-O3", "-shared", "-fPIC", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    *("-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-fopenmp"),
]
_VECTORS = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "fma3")
_TILES = ("avx512_bf16", "amx_tile", "amx_bf16")
BLOCK = 32
"""Rows of a product, and what depths are multiples of. A matrix in tiles has rows up to a multiple, used or not."""
Kind = Literal["float32", "split", "tiles"]
"""How products are computed: in float32; in float32 by tiles, each number split into three; in bfloat16 by tiles."""
PANELS: dict[Kind, int] = {"float32": 64, "split": 32, "tiles": 32}
"""Columns of a product."""

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ATTEND = [_POINTER, _LONG, _POINTER, _POINTER, _LONG, _POINTER, _POINTER, _LONG]
_PROJECT = [_POINTER, _LONG, _FLOAT, _POINTER, _POINTER, _POINTER]
_FINISH = [_POINTER, _LONG, _POINTER, _LONG, _FLOAT, _POINTER, _POINTER, _POINTER]
_ARGUMENTS = {
    "allow_tiles": [],
    "unit": [_POINTER, _LONG, _LONG, _FLOAT, _POINTER],
    "rotate": [_POINTER, _LONG, _LONG, _POINTER],
    "attend_float32": _ATTEND,
    "attend_tiles": _ATTEND,
    **{f"project_{kind}": _PROJECT for kind in PANELS},
    **{f"finish_{kind}": _FINISH for kind in PANELS},
}


class _Linear(ctypes.Structure):
    _fields_ = (("panels", _POINTER), ("bias", _POINTER), ("depth", _LONG), ("columns", _LONG))


class _Rotation(ctypes.Structure):
    _fields_ = (("cos", _POINTER), ("sin", _POINTER), ("width", _LONG), ("columns", _LONG))


class _Heads(ctypes.Structure):
    _fields_ = (("queries", _LONG), ("keys", _LONG), ("width", _LONG), ("scale", _FLOAT))


class Panels:
    """A linear layer laid out for its products: so many columns of the result behind one another, read front to back.

    Weight [out, in], multiples of `PANELS` and of 32, float32 or (for `tiles`) bfloat16; bias [out] or none.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: Kind) -> None:
        self.kind, self.dtype = kind, weight.dtype
        self.columns, depth = weight.shape
        if kind == "float32":
            self._weight = weight.unflatten(0, (-1, PANELS[kind])).transpose(1, 2).contiguous()
        else:
            parts_C_P_D = split(weight) if kind == "split" else weight[:, None]
            # Two numbers of a column that follow one another stand together.
            tiles = parts_C_P_D.unflatten(0, (-1, 2, 16)).unflatten(4, (-1, 16, 2))
            self._weight = tiles.permute(0, 4, 3, 1, 5, 2, 6).contiguous()
        self._bias = torch.zeros(self.columns) if bias is None else bias.float().contiguous()
        self.struct = _Linear(self._weight.data_ptr(), self._bias.data_ptr(), depth, self.columns)


class Heads:
    """How attention's rows are read: so many heads of queries, of keys, the width of each, and the scores' scale.

    A row has the queries' heads, then the keys', then the values'.
    """

    def __init__(self, queries: int, keys: int, width: int, scaling: float) -> None:
        self.queries, self.keys, self.width, self.scaling = queries, keys, width, scaling
        self.struct = _Heads(queries, keys, width, scaling)

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
    """The compiled functions for tensors: float32, but bfloat16 where it is said.

    They use as many threads as torch does in the calling one; the interpreter is free meanwhile. All raise MemoryError,
    and ValueError for a tensor of another type or layout.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._of = {name: _function(library, name, arguments) for name, arguments in _ARGUMENTS.items()}
        self.tiles = all(_can(name) for name in _TILES) and bool(self._of["allow_tiles"]())

    def kind(self, dtype: torch.dtype) -> Kind | None:
        """How products with weights of a type are computed here; None where they are not."""
        kinds: dict[torch.dtype, Kind] = {torch.float32: "split", torch.bfloat16: "tiles"}
        return kinds.get(dtype) if self.tiles else "float32" if dtype == torch.float32 else None

    def unit(self, hidden_N_D: Tensor, eps: float) -> Tensor:
        """Rows divided by the roots of their mean squares (plus eps). D is a multiple of 16. [N, D]."""
        out_N_D = torch.empty_like(_checked(hidden_N_D))
        self._call("unit", hidden_N_D.data_ptr(), *hidden_N_D.shape, eps, out_N_D.data_ptr())
        return out_N_D

    def rotate(self, qkv_N_C: Tensor, heads: Heads, turning_2_N_W: Tensor) -> None:
        """Rotates queries and keys in place; see `turning`."""
        rotation = _rotation(heads, turning_2_N_W)
        self._call("rotate", _checked(qkv_N_C).data_ptr(), qkv_N_C.stride(0), len(qkv_N_C), rotation)

    def attend(self, qkv_N_C: Tensor, heads: Heads, packing: Packing, layer: int) -> Tensor:
        """Attention of all segments of a row, float32 or (in tiles) bfloat16. [R, S], of the same type.

        As `finish` takes it: rows up to a multiple of 32, and columns that keep them apart in the cache. The first N
        and the first `heads.queries * heads.width` are what was asked for, the others may be anything.
        """
        row = (_checked(qkv_N_C, qkv_N_C.dtype).data_ptr(), qkv_N_C.stride(0), ctypes.addressof(heads.struct))
        segments, pieces, held = _plan(qkv_N_C, heads, packing, layer)
        columns = _apart(heads.queries * heads.width, qkv_N_C.dtype)
        out_R_S = qkv_N_C.new_empty(-(-len(qkv_N_C) // BLOCK) * BLOCK, columns)
        plan = (segments.ctypes.data, len(segments), pieces.ctypes.data)
        name = "attend_float32" if qkv_N_C.dtype == torch.float32 else "attend_tiles"
        self._call(name, *row, *plan, out_R_S.data_ptr(), columns)
        del held  # until here its tensors had to be there
        return out_R_S

    def project(self, hidden_N_D: Tensor, eps: float, qkv: Panels, heads: Heads, turning_2_N_W: Tensor) -> Tensor:
        """Norm, then queries, keys and values, rotated. [N, columns], of the weights' type."""
        out_N_C = torch.empty(len(hidden_N_D), qkv.columns, dtype=qkv.dtype)
        hidden = (_checked(hidden_N_D).data_ptr(), len(hidden_N_D))
        layer = (ctypes.addressof(qkv.struct), _rotation(heads, turning_2_N_W))
        self._call(f"project_{qkv.kind}", *hidden, eps, *layer, out_N_C.data_ptr())
        return out_N_C

    def finish(
        self, attended_R_S: Tensor, hidden_N_D: Tensor, eps: float, output: Panels, gated: Panels, down: Panels
    ) -> None:
        """Adds to the hidden states what follows attention, which is given as `attend` has it, of the weights' type.

        gated: a layer of `gate_and_up`.
        """
        attended = (_checked(attended_R_S, output.dtype).data_ptr(), attended_R_S.stride(0))
        hidden = (_checked(hidden_N_D).data_ptr(), len(hidden_N_D))
        layers = (ctypes.addressof(of.struct) for of in (output, gated, down))
        self._call(f"finish_{output.kind}", *attended, *hidden, eps, *layers)

    def _call(self, name: str, *arguments: object) -> None:
        if not self._of[name](*arguments):
            raise MemoryError(f"no memory for {name}")


def split(weight_C_D: Tensor) -> Tensor:
    """float32 as the sum of three of bfloat16, the greatest first: [C, 3, D]."""
    parts, rest = [], weight_C_D
    for _ in range(3):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1].float()
    return torch.stack(parts, 1)


def gate_and_up(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of two weights [out, in], or numbers of two biases [out], by turns, 16 and 16."""
    return torch.stack([gate.unflatten(0, (-1, 16)), up.unflatten(0, (-1, 16))], 1).flatten(0, 2)


def turning(cos_N_W: Tensor, sin_N_W: Tensor) -> Tensor:
    """Cosines and sines for pairs that stand side by side, from those of a head's two halves. [2, N, W], float32."""
    cos_N_P, sin_N_P = (of[:, : of.shape[1] // 2].float() for of in (cos_N_W, sin_N_W))
    return torch.stack([torch.stack([cos_N_P, cos_N_P], 2).flatten(1), torch.stack([-sin_N_P, sin_N_P], 2).flatten(1)])


@cache
def kernels() -> Kernels | None:
    """The kernels, compiled now if they are not yet; None on a CPU that they are not for.

    None too, and a line in the log, where they cannot be compiled, kept or loaded.
    """
    if sys.platform != "linux" or not all(_can(name) for name in _VECTORS):
        return None
    try:
        path = compiled()
        try:
            return Kernels(ctypes.CDLL(str(path)))
        except (OSError, AttributeError):  # damaged, or made for another system's libraries
            path.unlink()
            return Kernels(ctypes.CDLL(str(compiled())))
    except (OSError, subprocess.SubprocessError, RuntimeError, AttributeError) as error:
        logger().warning("no_kernels", reason=str(error), effect="torch's own, which are slower, take their place")
        return None


def compiled() -> Path:
    """The library. Raises OSError, SubprocessError or RuntimeError where it cannot be compiled, kept or trusted."""
    texts = b"".join(path.read_bytes() for path in sorted(_SOURCES.glob("*.[ch]pp")))
    folder = Path(os.environ.get(KERNELS) or _cache()).absolute()
    path = folder / f"cpu-{sha256(texts + ' '.join(_FLAGS).encode()).hexdigest()[:16]}.so"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _compile(path)
    for place in (folder, path):
        found = place.stat()
        if found.st_uid not in (0, os.getuid()) or found.st_mode & 0o022:
            raise PermissionError(f"{place} can be changed by others; name a folder of your own in {KERNELS}")
    return path


def _compile(path: Path) -> None:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler (c++, g++, clang++) to make them with")
    with TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        command = [compiler, *_FLAGS, str(_SOURCES / "kernels.cpp"), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120, check=False)
        if done.returncode:
            words = done.stderr.strip().splitlines() or ["it says no more"]
            raise OSError(f"{compiler} failed: {words[0]}")
        made.chmod(0o755)
        made.replace(path)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dvpo" / "kernels"


def _can(name: str) -> bool:
    return bool(torch.cpu.get_capabilities().get(name))


def _apart(width: int, dtype: torch.dtype) -> int:
    """A row's length with which rows are an odd number of cache lines apart."""
    line = 64 // dtype.itemsize
    return width if width // line % 2 else width + line


def _checked(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    if tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(f"a kernel was given {tensor.dtype} for {dtype}, or rows with gaps")
    return tensor


def _function(library: ctypes.CDLL, name: str, arguments: list[Any]) -> Callable[..., int]:
    function = getattr(library, f"dvpo_{name}")
    function.argtypes, function.restype = arguments, ctypes.c_int
    return cast(Callable[..., int], function)


def _rotation(heads: Heads, turning_2_N_W: Tensor) -> Any:
    """The struct for the time of a call."""
    cos_N_W, sin_N_W = _checked(turning_2_N_W)
    if cos_N_W.shape[1] != heads.width:
        raise ValueError(f"heads of {heads.width} are rotated by {cos_N_W.shape[1]} angles")
    return ctypes.byref(_Rotation(cos_N_W.data_ptr(), sin_N_W.data_ptr(), heads.width, heads.turning))


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
