"""The page that --page writes: every picture with a divider between two of its versions, in one HTML file.

Pictures are data URIs, so the file can be mailed and opens without a server; it forbids itself every request.
All pictures share zoom and pan: two CSS variables and a factor on the root element move each picture as a whole.
The divider is a pair of clip-paths, one on the layer of each version that is compared.
"""

import base64
import io
import math
from html import escape
from itertools import combinations

from PIL import Image

from models.support.evaluation import METRICS
from models.support.files import printable
from models.support.imaging import to_pil

EXACT, MOST, LARGEST = 6e6, 90e6, 16e6      # pixels: of all pictures together as PNG, else as JPEG; of one picture

STYLE = """
:root { color-scheme: light dark; --z: 1; --x: 0; --y: 0 }
body { max-width: 110rem; margin: auto; padding: 1rem 3%; background: Canvas; color: CanvasText;
       font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1, h2 { font-size: 1.4rem; margin: 0 } h2 { font-size: 1rem }
p { margin: .3rem 0 } p, th { opacity: .75 }
nav { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; align-items: center;
      padding: .6rem 0; background: Canvas }
output { display: inline-block; min-width: 3.5rem; text-align: center }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1.5rem }
figure { margin: 0 }
.view { position: relative; overflow: hidden; aspect-ratio: var(--aspect); width: min(100%, 70vh * var(--aspect));
        background: #808080; touch-action: pan-y; user-select: none; -webkit-user-select: none; cursor: col-resize }
.zoomed .view { touch-action: none; cursor: grab }
.layer { position: absolute; inset: 0; display: none }
.layer.left { display: block; clip-path: inset(0 calc(100% - var(--split)) 0 0) }
.layer.right { display: block; clip-path: inset(0 0 0 var(--split)) }
.layer img { width: 100%; height: 100%; object-fit: contain; pointer-events: none; transform-origin: 0 0;
             transform: translate(calc(var(--x) * 100%), calc(var(--y) * 100%)) scale(var(--z)) }
.large img { image-rendering: pixelated }
.layer p { text-align: center; margin-top: 20%; color: #fff }
.tag { position: absolute; top: .6rem; left: .6rem; max-width: 45%; padding: 0 .5rem; border-radius: 1rem;
       background: #000a; color: #fff; pointer-events: none; white-space: nowrap; overflow: hidden }
.tag ~ .tag { left: auto; right: .6rem }
.grip { position: absolute; top: 0; bottom: 0; left: var(--split); width: 44px; margin-left: -22px; touch-action: none;
        background: linear-gradient(#fff, #fff) center / 2px 100% no-repeat }
.grip::after { content: "\\2039\\2009\\203a"; position: absolute; top: 50%; left: 4px; width: 36px; margin-top: -18px;
               border-radius: 50%; background: #fff; color: #222; font: 600 20px/36px sans-serif; text-align: center }
figcaption { display: flex; flex-wrap: wrap; gap: .3rem 1.5rem; padding: .5rem 0 }
figcaption > div { flex: 1 1 11rem }
th, td { text-align: right; padding: 0 0 0 1rem; font-weight: 400 }
pre { white-space: pre-wrap }
"""

SCRIPT = """
'use strict'
const root = document.documentElement, views = [...document.querySelectorAll('.view')]
const find = id => document.getElementById(id), clamp = (x, low, high) => Math.min(Math.max(x, low), high)
let zoom = 1, x = .5, y = .5     // the point of every picture, 0 to 1, in the middle of its view

function move(newX, newY, newZoom = zoom) {         // shared by all pictures
  zoom = newZoom
  x = clamp(newX, .5 / zoom, 1 - .5 / zoom)
  y = clamp(newY, .5 / zoom, 1 - .5 / zoom)
  root.style.setProperty('--z', zoom)
  root.style.setProperty('--x', .5 - x * zoom)
  root.style.setProperty('--y', .5 - y * zoom)
  root.classList.toggle('zoomed', zoom > 1)
  root.classList.toggle('large', zoom >= 3)         // a pixel is shown as the square it is
  find('zoom').textContent = zoom.toFixed(1) + '\\u00d7'
  find('out').disabled = find('fit').disabled = zoom === 1
  find('in').disabled = zoom === 32
}

function zoomAt(factor, u = .5, v = .5) {           // what is at (u, v) of a view, 0 to 1, stays there
  const to = clamp(zoom * factor, 1, 32)
  move(x + (u - .5) * (1 / zoom - 1 / to), y + (v - .5) * (1 / zoom - 1 / to), to)
}

const position = view => parseFloat(view.style.getPropertyValue('--split'))
function split(view, percent) {
  const at = clamp(percent, 0, 100), grip = view.querySelector('.grip')
  const [left, right] = [...view.querySelectorAll('.tag')].map(e => e.textContent)
  view.style.setProperty('--split', at + '%')
  grip.ariaValueNow = Math.round(at)
  grip.ariaValueText = `${Math.round(at)} % ${left}, ${100 - Math.round(at)} % ${right}`
}

function compare(pair) {
  for (const view of views) {
    const layers = view.querySelectorAll('.layer'), tags = view.querySelectorAll('.tag')
    layers.forEach((layer, i) => layer.className = 'layer ' + (['left', 'right'][pair.indexOf(i)] || ''))
    pair.forEach((version, side) => tags[side].textContent = layers[version].dataset.name)
    split(view, position(view))
  }
}

for (const view of views) {
  const down = new Map(), grip = view.querySelector('.grip')        // pointers on this view
  let dividing = false
  const place = e => {
    const box = view.getBoundingClientRect()
    return [(e.clientX - box.left) / box.width, (e.clientY - box.top) / box.height]
  }
  const spread = () => {
    const [a, b] = [...down.values()]
    return Math.hypot(a[0] - b[0], (a[1] - b[1]) * view.clientHeight / view.clientWidth)
  }
  view.onpointerdown = e => {
    if (e.button) return
    down.set(e.pointerId, place(e))
    view.setPointerCapture(e.pointerId)
    dividing = down.size === 1 && (zoom === 1 || e.target === grip)
    if (dividing) split(view, 100 * place(e)[0])
    grip.focus({ preventScroll: true })
    e.preventDefault()
  }
  view.onpointermove = e => {
    if (!down.has(e.pointerId)) return
    const before = down.get(e.pointerId), now = place(e), apart = down.size === 2 && spread()
    down.set(e.pointerId, now)
    if (apart) zoomAt(spread() / apart, ...now)
    else if (dividing) split(view, 100 * now[0])
    else move(x - (now[0] - before[0]) / zoom, y - (now[1] - before[1]) / zoom)
  }
  view.onlostpointercapture = e => down.delete(e.pointerId)
  view.ondblclick = e => zoomAt(zoom > 1 ? 0 : 4, ...place(e))
  view.onwheel = e => {                             // a pinch on a touchpad arrives as wheel with ctrl
    if (!e.ctrlKey && !e.metaKey) return
    e.preventDefault()
    zoomAt(Math.exp(-clamp(e.deltaY, -60, 60) / 150), ...place(e))
  }
}

document.onkeydown = e => {
  if (e.ctrlKey || e.metaKey || e.altKey || e.target.matches('input')) return
  const view = e.target.closest('.view'), step = .1 / zoom
  const slide = { ArrowLeft: -2, ArrowRight: 2 }
  if (view) Object.assign(slide, { ArrowDown: -2, ArrowUp: 2, PageDown: -10, PageUp: 10, Home: -100, End: 100 })
  const pan = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }
  const factor = { '+': Math.SQRT2, '=': Math.SQRT2, '-': Math.SQRT1_2, 0: 0 }
  if (e.shiftKey && e.key in pan) move(x + pan[e.key][0], y + pan[e.key][1])
  else if (e.key in slide) for (const some of view ? [view] : views) split(some, position(some) + slide[e.key])
  else if (e.key in factor) zoomAt(factor[e.key])
  else return
  e.preventDefault()
}

find('in').onclick = () => zoomAt(Math.SQRT2)
find('out').onclick = () => zoomAt(Math.SQRT1_2)
find('fit').onclick = () => zoomAt(0)
for (const input of document.querySelectorAll('input')) input.onchange = () => compare(JSON.parse(input.value))
compare([0, 1])
move(x, y)
"""


def text(x):
    """Anything as text of HTML and of its attributes; names of files may hold quotes, tags, bytes of no encoding."""
    return escape(printable(x))


def embed(x, pictures):
    """A picture (1, 3, H, W) in [0, 1], of which the page has so many -> data URI, what was lost on the way or "" """
    img, note, data = to_pil(x[0]), "", io.BytesIO()
    size = img.size
    if size[0] * size[1] <= EXACT / pictures:
        img.save(data, "PNG")
        return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}", ""
    most = min(MOST / pictures, LARGEST)
    scale = min((most / (size[0] * size[1])) ** 0.5, 16384 / max(size))
    if scale < 1:
        img = img.resize([max(round(side * scale), 1) for side in size], Image.Resampling.LANCZOS)
        note = f" at {img.width / size[0]:.0%} of its size"
    img.save(data, "JPEG", quality=92, subsampling=0)
    uri = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
    return uri, f"shown here as JPEG{note}, measured as PNG"


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


def figure_of(rows, versions, names, pictures):
    """One picture.

    rows: of `row_of`, of each model; versions: (1, 3, H, W) each, fewer than names if one is missing
    names: bicubic, models, reference if any; pictures: on the whole page -> HTML
    """
    row, models = rows[0], names[1 : len(rows) + 1]
    picture, layers, notes = text(row["picture"]), "", {}
    for i, name in enumerate(map(text, names)):
        inside = f"<p>no {name}</p>"
        if i < len(versions):
            uri, note = embed(versions[i], pictures)
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


def page_of(figures, names, records):
    """The page.  figures: of `figure_of`; names: of the versions; records: of `record_of`, of each model -> HTML"""
    record, models = records[0], names[1 : len(records) + 1]
    pairs = sorted(combinations(range(len(names)), 2), key=lambda pair: pair[1] - pair[0])
    choices = "".join(f'<label><input type="radio" name="pair" value="[{a}, {b}]"{" checked" * (b == a + 1 == 1)}>'
                      f"{text(names[a])} | {text(names[b])}</label> " for a, b in pairs)
    means = [{f"{m}{end}": mean[key] for m, mean in each["average"].items()
              for key, end in (("ours", ""), ("bicubic", "_bicubic"))} for each in records]
    averages = f"<p>Averages:</p>{table(means, names[: len(records) + 1])}" if len(figures) > 1 and means[0] else ""
    title = text(", ".join(models))
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    hashes = "\n".join(f"{sha}  {text(name)}" for name, sha in record["weights"].items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="nanoSR">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{title}, before and after</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}, before and after</h1>
<p>{len(figures)} pictures by nanoSR. <a href="#how">How it was made</a></p>
{averages}
<p>Divider: drag, or ← →. Zoom: + −, pinch, Ctrl + wheel, double click. Pan: drag, or Shift + arrows. Fit: 0.</p>
<nav>
<span>{choices}</span>
<span><button id="out" aria-label="Zoom out">−</button><output id="zoom"></output><button id="in"
 aria-label="Zoom in">+</button> <button id="fit">Fit</button></span>
</nav>
<main>
{"".join(figures)}</main>
<h2 id="how">How it was made</h2>
<pre>{text(record["command"])}</pre>
<p>{text(record["protocol"])}</p>
<p>{text(versions)}</p>
<p>SHA-256 of the weight files that were read:</p>
<pre>{hashes or "none"}</pre>
<script>{SCRIPT}</script>
</body>
</html>
"""
