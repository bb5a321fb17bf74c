"""Embed trained tiny models: models/prior_tiny.safetensors, and what each system learned around it.

    python tests/embed.py runs/prior runs/s3diff runs/gramsr

The last two are --out folders of the tiny presets' last stages, or fewer; they must have started from that prior.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models.support.weights import EMBEDDED, PRIOR, save_tensors  # noqa: E402


def read(path):
    with safe_open(path, "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata()


def embed(source, target, known):
    """Copy a model file without the tensors that `known` has already -> its tensors. Exits where another prior is in it."""
    tensors, metadata = read(source)
    learned = {k: v for k, v in tensors.items() if k not in known or not torch.equal(v, known[k])}
    if len(learned.keys() & known.keys()) > 4:      # S3Diff trains conv_in too
        sys.exit(f"{source}: did not start from this prior; {len(learned.keys() & known.keys())} tensors differ")
    old, said = read(target) if target.exists() else ({}, None)
    if said != metadata or old.keys() != learned.keys() or any(not torch.equal(old[k], v) for k, v in learned.items()):
        save_tensors(target, learned, metadata)
    print(f"{target}: {len(learned)} tensors, {target.stat().st_size / 1e6:.1f} MB, from {source}")
    return learned


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("prior", type=Path, help="--out of train_s3diff.py --preset tiny --stage prior")
    p.add_argument("systems", type=Path, nargs="*", help="--out of the last stage of S3Diff or GramSR")
    args = p.parse_args()
    vae = {k: v for k, v in load_file(EMBEDDED["vosr-tiny"]).items() if k.startswith("vae.")}
    prior = vae | embed(args.prior / "model.safetensors", PRIOR, vae)
    for folder in args.systems:
        path = folder / "model.safetensors"
        with safe_open(path, "pt") as file:
            name = "s3diff" if any("modulation" in k for k in file.keys()) else "gramsr"
        embed(path, EMBEDDED[f"{name}-tiny"], prior)


if __name__ == "__main__":
    main()
