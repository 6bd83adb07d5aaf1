"""What the recording scripts share: the golden file's container and its error bounds. Needs numpy only.

A golden file is a safetensors file of float32 tensors. Beside each tensor X that a test compares stands bound/X: the largest
error of plain float32 PyTorch against the float64 result, one value per equal run of consecutive elements of X (usually one
for the whole tensor), and bound_bf16/X, the same of plain bf16 PyTorch. The test applies |ours - exact| <= 2 bound + rounding of
the output, with the bound of the compute type that it runs in.
"""
import json
import struct

import numpy as np


def write_safetensors(path, tensors, metadata=None):
    """u64 header length, JSON header, raw little-endian data, in the given order, without gaps."""
    header, end = {}, 0
    if metadata:
        header["__metadata__"] = metadata
    for name, value in tensors.items():
        begin, end = end, end + 4 * value.size
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for value in tensors.values():
            f.write(np.ascontiguousarray(value, dtype="<f4").tobytes())


def round_up(x):
    """float64 -> the next float32 above, so that a recorded bound is never smaller than the measured one."""
    y = np.asarray(x, np.float64).astype(np.float32)
    return np.where(y < x, np.nextafter(y, np.float32(np.inf)), y).astype(np.float32)


def with_bounds(exact, plain_runs, parts, bf16_runs):
    """exact: name -> float64 array; plain_runs, bf16_runs: lists of such dicts from float32 and bf16 runs; parts: name -> runs of
    elements with a bound each. Returns the tensors of a golden file."""
    tensors = {}
    for name, value in exact.items():
        value = np.asarray(value, np.float64)
        tensors[name] = value.astype(np.float32)
        for prefix, runs in (("bound/", plain_runs), ("bound_bf16/", bf16_runs)):
            error = max_error(value, [run[name] for run in runs])
            tensors[prefix + name] = round_up(error.reshape(parts.get(name, 1), -1).max(axis=1))
    return tensors


def max_error(exact, runs):
    return np.max([np.abs(np.asarray(run, np.float64) - exact) for run in runs], axis=0)
