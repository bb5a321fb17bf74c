"""A script with smaller tiny networks, which train in seconds: python tests/shrunk.py train_vosr.py --stage flow ...

They keep what stages take from each other and from embedded files: the autoencoder and its 64 channels.
"""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import runs  # noqa: E402
from models import tiny  # noqa: E402
from models.vit import DINOv3Config, ViTConfig  # noqa: E402

UNET = replace(tiny.UNET, widths=(16, 16), num_heads=(0, 1), context_dim=8, norm_groups=4)
DIT = replace(tiny.TinyVOSRConfig().dit, hidden_size=32, depth=1, num_heads=2, z_dims=16)
CONFIGS = {
    "TinyVOSRConfig": {"dit": DIT, "vit": ViTConfig(img_size=28, embed_dim=16, depth=1, num_heads=2), "vit_input": 28, "steps": 2},
    "TinyS3DiffConfig": {"unet": UNET, "r_unet": 4, "r_vae": 2, "denet_widths": (8, 8, 8, 8)},
    "TinyGramSRConfig": {"unet": UNET, "vit": DINOv3Config(embed_dim=12, depth=1, num_heads=3)},
}


def shrink(name):
    """Give a config class other defaults; files keep what they say."""
    config = getattr(tiny, name)

    def smaller(**given):
        return config(**(CONFIGS[name] | given))

    smaller.from_dict = config.from_dict
    setattr(tiny, name, smaller)


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs.watch_less(pytest.MonkeyPatch())
    if sys.argv[1].startswith("train_"):
        for config in CONFIGS:
            shrink(config)
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
