"""Golden numbers: does this code compute what the official code computes?

    python tests/golden.py tests/golden/degrade.json [...]

A golden file holds cases: a configuration, inputs by the rule of fill.py, and summaries of the official outputs. Its stem names the system;
cases_<stem>.py next to this file has a dict CASES of builders, case name -> function(case, get) -> {output name: array or number}, where
get(input name) gives an input. One line per case; exit status 1 if any failed.
"""

import importlib.util
import json
import sys
import traceback
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # fill.py and cases_*.py; degrade.py and models/

import fill  # noqa: E402


def builders(stem):
    """The module cases_<stem>, or None if there is none."""
    return importlib.import_module(f"cases_{stem}") if importlib.util.find_spec(f"cases_{stem}") else None


def build_input(entry, salt=""):
    """An input's entry -> float32 array, or the literal value. What its 'then' says is left to the case's builder."""
    salt = entry.get("salt", salt)
    if entry["kind"] == "normal":
        return fill.normal(entry["name"], entry["shape"], salt)
    if entry["kind"] == "uniform":
        return fill.uniform(entry["name"], entry["shape"], entry["low"], entry["high"], salt)
    return entry["value"]


def fault(got, golden, tolerance=(1e-3, 0.0)):
    """What is wrong with one output, or None. golden: a summary (maybe with factor, rtol, atol), a number, or anything else, which must be equal."""
    if hasattr(got, "detach"):
        got = got.detach().cpu().numpy()
    if isinstance(golden, dict) and "values" in golden:
        given = {key: golden[key] for key in ("rtol", "atol") if key in golden}
        return fill.compare(np.asarray(got, dtype=np.float64) * golden.get("factor", 1), golden, **given)
    if isinstance(golden, float):
        rtol, atol = tolerance
        same = np.size(got) == 1 and np.allclose(np.float64(got), golden, rtol=rtol, atol=atol)
    else:
        same = got.tolist() == golden if isinstance(got, np.ndarray) else got == golden
    return None if same else f"got {str(got)[:200]}, expected {str(golden)[:200]}"


def check(stem, name, case):
    """Run one case. -> list of faults, empty when all its outputs match."""
    module = builders(stem)
    if module is None or name not in module.CASES:
        return ["unknown case"]
    salt = case.get("fill", {}).get("salt", "")
    try:
        outputs = module.CASES[name](case, lambda key: build_input(case["inputs"][key], salt))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return [f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"]
    tolerance = getattr(module, "tolerance", lambda key: (1e-3, 0.0))  # (rtol, atol) of outputs that are plain numbers
    faults = []
    for key, golden in case["outputs"].items():
        text = fault(outputs[key], golden, tolerance(key)) if key in outputs else "not computed"
        faults += [f"{key}: {text}"] if text else []
    return faults


def main(paths):
    passed = failed = 0
    for path in map(Path, paths):
        try:
            cases = json.loads(path.read_text())["cases"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"FAIL {path}: not a golden file ({type(error).__name__}: {error})")
            failed += 1
            continue
        for name, case in cases.items():
            faults = check(path.stem, name, case)
            passed, failed = passed + (not faults), failed + bool(faults)
            print("\n     ".join([f"FAIL {path.stem}/{name}", *faults]) if faults else f"ok   {path.stem}/{name}", flush=True)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python tests/golden.py FILE.json [...]")
    sys.exit(main(sys.argv[1:]))
