"""What colours a picture file means: its colour profile, its transparent colour; on Pillow's images."""

import io
from contextlib import suppress

import numpy as np
from PIL import ImageCms


def scale_key(img):
    """Bring a PNG's transparent colour to the 8 bits that Pillow makes of its pixels; before they are loaded."""
    key = img.info.get("transparency")
    tile = getattr(img, "tile", None)       # of what is still to be loaded
    factor = tile and {"1": 255, "L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}.get(str(tile[0][3]))
    if img.format == "PNG" and factor and key is not None:
        scaled = [min(int(v * factor), 255) for v in np.atleast_1d(key)]    # Pillow 13 has scaled 1 bit already
        img.info["transparency"] = scaled[0] if isinstance(key, int) else tuple(scaled)


def to_srgb(img):
    """A Pillow image of any mode in RGB or RGBA, by its colour profile if it has one; a useless profile is ignored."""
    img = img.convert("L") if img.mode == "1" else img      # whose transparent colour Pillow before 12.1 forgets
    plain = img.convert("RGBA" if img.has_transparency_data else "RGB")  # palettes and colour keys included
    with suppress(KeyError, TypeError, OSError, ImageCms.PyCMSError):
        profile = ImageCms.ImageCmsProfile(io.BytesIO(img.info["icc_profile"]))
        space, source = profile.profile.xcolor_space.strip(), None
        if space == "RGB" and img.mode != "CMYK":
            source = plain.convert("RGB")
        elif space == "GRAY" and np.ptp(np.asarray(plain)[..., :3], axis=2).max() == 0:
            source = plain.getchannel("G")
        elif space == "CMYK" == img.mode:
            source = img
        if source:
            srgb = ImageCms.profileToProfile(source, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if plain.mode == "RGBA":
                srgb.putalpha(plain.getchannel("A"))
            return srgb
    return plain
