"""The goldens' rule for numbers out of nothing: a name and a shape settle an array, on every machine and in any order.

Each array comes from numpy's legacy RandomState, whose stream never changes, seeded with the CRC-32 of salt + name.
`summary` is what a golden file keeps of an output, `compare` holds an array against it.
"""

import math
import zlib
from functools import lru_cache

import numpy as np


def _source(name, salt):
    return np.random.RandomState(zlib.crc32(f"{salt}{name}".encode()))


def weight(name, shape, salt=""):
    """A parameter of a state dict -> float32.

    Matrices and filters: std 1/sqrt(fan-in); gains ("...weight", 1-D): 1 +- 0.1; the rest: +- 0.1.
    """
    return _weight(name, tuple(shape), salt).copy()


@lru_cache(maxsize=5000)       # several cases fill the same networks
def _weight(name, shape, salt):
    z = _source(name, salt).standard_normal(math.prod(shape))
    if len(shape) > 1:
        z = z / math.sqrt(math.prod(shape) / shape[0])
    else:
        z = 0.1 * z + (1 if shape and name.endswith("weight") else 0)
    return z.astype(np.float32).reshape(shape)


def uniform(name, shape, low=-1.0, high=1.0, salt=""):
    return _source(name, salt).uniform(low, high, math.prod(shape)).astype(np.float32).reshape(shape)


def normal(name, shape, salt=""):
    return _source(name, salt).standard_normal(math.prod(shape)).astype(np.float32).reshape(shape)


def state_dict(shapes, salt=""):
    """{name: shape} -> {name: array}"""
    return {name: weight(name, shape, salt) for name, shape in shapes.items()}


def summary(x, samples=32):
    """Shape, three statistics and evenly spaced values of an array."""
    x = np.asarray(x, dtype=np.float64)
    flat = x.ravel()
    at = np.linspace(0, flat.size - 1, min(samples, flat.size)).round().astype(int)
    values = [float(f"{v:.7g}") for v in flat[at]]
    return {"shape": list(x.shape), "mean": flat.mean(), "std": flat.std(), "absmax": np.abs(flat).max(),
            "at": at.tolist(), "values": values}


def compare(x, golden, rtol=1e-3, atol=1e-4):
    """Hold an array against a summary. -> None when it matches, else a sentence that says what differs and by how much.

    atol grows with the golden's std where that exceeds 1; mean and std get ten times the tolerance.
    """
    x = np.asarray(x, dtype=np.float64)
    if list(x.shape) != golden["shape"]:
        return f"shape {list(x.shape)}, expected {golden['shape']}"
    got, want = x.ravel()[golden["at"]], np.asarray(golden["values"], dtype=np.float64)
    atol *= max(1.0, golden["std"])
    faults = []
    if not np.allclose(got, want, rtol=rtol, atol=atol):
        pairs = "  ".join(f"{g:.6g}/{w:.6g}" for g, w in zip(got[:5], want))
        faults.append(f"largest difference {np.abs(got - want).max():.3g}, got/expected {pairs}")
    if not abs(x.mean() - golden["mean"]) <= 10 * atol:
        faults.append(f"mean {x.mean():.6g}, expected {golden['mean']:.6g}")
    if not abs(x.std() - golden["std"]) <= 10 * rtol * max(golden["std"], 1e-12):
        faults.append(f"std {x.std():.6g}, expected {golden['std']:.6g}")
    return "; ".join(faults) or None
