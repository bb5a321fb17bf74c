"""What a training run shows: log.csv, line charts of it drawn with Pillow, a sheet of images."""

import csv
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from models.support.files import writing
from models.support.imaging import contact_sheet, save_png

COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]     # Okabe-Ito: safe for colour-blind eyes


def axis_ticks(low, high, log=False):
    """Round numbers from low to high: steps of 1, 2 or 5 times a power of ten; on a log axis 1, 2, 5 of each decade."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [d * 10.0**k for k in decades for d in ((1, 2, 5) if len(decades) < 5 else (1,))]
        found = [v for v in found if low <= v <= high]
        if len(found) > 2:
            return found
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= max(m for m in (1, 2, 5) if m * step <= (high - low) / 4 or m == 1)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def loss_curves(curves, path, title=""):
    """Draw losses over training steps, on a log axis, as PNG.  curves: {name: [(step, loss), ...]}"""
    k = 2       # drawn at twice the size, then halved: Pillow's lines have no antialiasing
    W, H = 900 * k, 520 * k
    left, right, top, bottom = 72 * k, W - 20 * k, 44 * k, H - 40 * k
    curves = {name: [(s, v) for s, v in points if math.isfinite(v) and v > 0] for name, points in curves.items()}
    steps, losses = zip(*sum(curves.values(), []) or [(0, 1.0)])
    x0, x1, y0, y1 = min(steps), max(max(steps), min(steps) + 1), min(losses), max(losses)
    if y0 == y1:
        y0, y1 = y0 / 2, y1 * 2

    def at(s, v):
        across, along = (s - x0) / (x1 - x0), math.log(v / y0) / math.log(y1 / y0)
        return left + across * (right - left), bottom - along * (bottom - top)

    img, font = Image.new("RGB", (W, H), "white"), ImageFont.load_default(14 * k)
    draw = ImageDraw.Draw(img)
    for v in axis_ticks(y0, y1, log=True):
        y = at(x0, v)[1]
        draw.line([left, y, right, y], fill="#e4e4e4", width=k)
        draw.text((left - 8 * k, y), f"{v:g}", fill="#444444", font=font, anchor="rm")
    for s in axis_ticks(x0, x1):
        draw.text((at(s, y0)[0], bottom + 9 * k), f"{s:g}", fill="#444444", font=font, anchor="ma")
    draw.line([left, top, left, bottom, right, bottom], fill="#444444", width=k)
    draw.text((left, top - 28 * k), title, fill="black", font=font)
    x = right
    for (name, points), color in reversed([*zip(curves.items(), COLORS * len(curves))]):
        if len(points) > 1:
            draw.line([at(*point) for point in points], fill=color, width=2 * k, joint="curve")
        x -= font.getlength(name)       # legend: names in their colours, from the right
        draw.text((x, top - 28 * k), name, fill=color, font=font)
        x -= 18 * k
    save_png(img.reduce(k), path)


class Log:
    """log.csv, a row at a time. Rows after `step`, that of a resumed checkpoint, are dropped: they will come again.

    Raises WriteError.
    """

    def __init__(self, path, columns, step):
        self.path, self.columns = Path(path), columns
        kept = [row for row in self.rows() if int(row["step"]) <= step]
        with writing(self.path), open(self.path, "w", newline="") as f:
            writer = csv.DictWriter(f, columns)
            writer.writeheader()
            writer.writerows(kept)

    def rows(self):
        """The whole rows of the file -> list of {column: text}, "" where a row has no such value"""
        if not self.path.exists():
            return []
        with open(self.path, newline="") as f:
            rows = list(csv.DictReader(f))
        columns = set(self.columns)     # a killed run may leave half a line
        return [row for row in rows if row.keys() == columns and None not in row.values()]

    def write(self, **row):
        """Append a row.  row: {column: number}"""
        with writing(self.path), open(self.path, "a", newline="") as f:
            csv.DictWriter(f, self.columns).writerow({name: f"{x:.6g}" for name, x in row.items()})

    def draw(self, path, names, title):
        """Curves of the named columns that have two points or more, as a PNG."""
        curves = {}
        for name in names:
            points = [(int(row["step"]), float(row[name])) for row in self.rows() if row[name]]
            if len(points) > 1:
                curves[name] = points
        loss_curves(curves, path, title)


def save_sheet(path, columns):
    """Contact sheet with one column per entry. columns: {title: (B, 3, H, W) in [-1, 1]}."""
    pictures = ((x.float().cpu().clamp(-1, 1) / 2 + 0.5).split(1) for x in columns.values())
    save_png(contact_sheet(list(zip(*pictures)), [list(columns)]), path)
