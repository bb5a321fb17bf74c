"""The page that --page writes: every image with a divider between two of its versions, in one HTML file.

Images are data URIs, so the file can be mailed and opens without a server; it forbids itself every request. Its style
and its script are in assets/page.html.
"""

import base64
import io
import math
import re
from html import escape
from itertools import combinations
from pathlib import Path

from PIL import Image

from models.support.evaluation import METRICS, average
from models.support.files import printable
from models.support.imaging import png_text, to_pil

EXACT, MOST, LARGEST = 6e6, 90e6, 16e6      # pixels: of all images together as PNG, else as JPEG; of one image
TEMPLATE = Path(__file__).parents[2] / "assets" / "page.html"


def text(x):
    """Anything as text of HTML and of its attributes; names of files may hold quotes, tags, bytes of no encoding."""
    return escape(printable(x))


def embed(x, images):
    """An image (1, 3, H, W) in [0, 1], of which the page has so many -> data URI, what was lost on the way or "" """
    img, kind, note, data = to_pil(x[0]), "png", "", io.BytesIO()
    width, height = img.size
    if width * height > EXACT / images:
        scale = min((min(MOST / images, LARGEST) / (width * height)) ** 0.5, 16384 / max(img.size), 1)
        size = [max(round(side * scale), 1) for side in img.size]
        kind, note = "jpeg", f"shown here as JPEG{f' at {scale:.0%} of its size' * (scale < 1)}, measured as PNG"
        img = img.resize(size, Image.Resampling.LANCZOS)        # which copies it where the size is the same
    img.save(data, kind, quality=92, subsampling=0, pnginfo=png_text())     # each kind takes what it knows
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}", note


def table(rows, names):
    """Figures of each model, {metric: ours, metric_bicubic: its}, as a table; the best are bold."""
    lines = [f"<th>{text(name)}</th>" for name in names]
    head = ""
    for m, (name, digits, better) in METRICS.items():
        if m not in rows[0]:
            continue
        figures = [rows[0][f"{m}_bicubic"], *(row.get(m, math.nan) for row in rows)]
        best = (max if better == "higher" else min)(figures)
        head += f"<th>{name} {'↑' if better == 'higher' else '↓'}</th>"
        for i, figure in enumerate(figures):
            lines[i] += f"<td>{'<b>' * (figure == best)}{figure:.{digits}f}{'</b>' * (figure == best)}</td>"
    return head and f"<table><tr><td></td>{head}</tr><tr>{'</tr><tr>'.join(lines)}</tr></table>"


def figure_of(rows, versions, names, images):
    """One image.

    rows: of `row_of`, of each model; versions: (1, 3, H, W) each, fewer than names if one is missing
    names: bicubic, models, reference if any; images: on the whole page -> HTML
    """
    row, models = rows[0], names[1 : len(rows) + 1]
    picture, layers, notes = text(row["picture"]), "", {}
    for i, name in enumerate(map(text, names)):
        inside = f"<p>no {name}</p>"
        if i < len(versions):
            uri, note = embed(versions[i], images)
            inside = f'<img src="{uri}" alt="{picture}, {name}" draggable="false">'
            notes[note] = None
        layers += f'<div class="layer" data-name="{name}">{inside}</div>'
    missing = ", ".join(f"{METRICS[m][0]} ({why})" for m, why in row["not_measured"].items())
    seconds = ["made earlier" if row["seconds"] is None else f"{row['seconds']:.2f} s" for row in rows]
    if len(rows) > 1:
        seconds = [f"{name} {said}" for name, said in zip(models, seconds)]
    lines = [f"{row['width']} × {row['height']}, {', '.join(seconds)}", *notes, missing and f"not measured: {missing}"]
    aspect = min(max(row["width"] / row["height"], 0.4), 4)
    return f"""<figure>
<div class="view" style="--split: 50%; --aspect: {aspect:.4f}">{layers}
<span class="tag"></span><span class="tag"></span>
<div class="grip" role="slider" tabindex="0" aria-label="Divider of {picture}"></div></div>
<figcaption><div><h2>{picture}</h2>{"".join(f"<p>{text(line)}</p>" for line in lines if line)}</div>
{table(rows, names[: len(rows) + 1])}</figcaption></figure>
"""


def page_of(figures, number, names, records):
    """The page.

    figures: of `figure_of`, one after the other; number: how many; names: of the versions
    records: of `record_of`, of each model -> HTML
    """
    record, models = records[0], names[1 : len(records) + 1]
    pairs = sorted(combinations(range(len(names)), 2), key=lambda pair: pair[1] - pair[0])
    choices = "".join(f'<label><input type="radio" name="pair" value="[{a}, {b}]"{" checked" * (b == a + 1 == 1)}>'
                      f"{text(names[a])} | {text(names[b])}</label> " for a, b in pairs)
    means = [average(each["pictures"]) for each in records]
    averages = f"<p>Averages:</p>{table(means, names[: len(records) + 1])}" if number > 1 and means[0] else ""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    hashes = "\n".join(f"{sha}  {text(name)}" for name, sha in record["weights"].items())
    counted = "1 image" if number == 1 else f"{number} images"
    parts = {"title": text(", ".join(models)), "number": counted, "averages": averages, "choices": choices,
             "figures": figures, "command": text(record["command"]), "protocol": text(record["protocol"]),
             "versions": text(versions), "hashes": hashes or "none"}
    return re.sub(r"{{(\w+)}}", lambda name: parts[name[1]], TEMPLATE.read_text(encoding="utf-8"))
