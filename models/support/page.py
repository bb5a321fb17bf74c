"""The page that --page writes: every picture with a divider between two of its versions, in one HTML file that needs nothing else.

Pictures are data URIs, so the file can be mailed and opens without a server; it forbids itself every request (Content-Security-Policy).
All pictures share zoom and pan: they are two CSS variables' worth of state on the root element, and each picture is moved by them as a whole.
The divider is a pair of clip-paths, one on the layer of each version that is compared.
Left out: a lens, flicker, anything that would need a library.
"""

import base64
import io
from html import escape

from PIL import Image

from models.support.evaluation import METRICS
from models.support.files import printable
from models.support.imaging import to_pil

EXACT, MOST, LARGEST = 6e6, 90e6, 16e6      # pixels: of all pictures together as PNG and else as JPEG; of one picture

# -----------------------------------------------------------------------------
# how it looks

STYLE = """
:root { color-scheme: light dark; --paper: #faf9f7; --card: #fff; --ink: #1b1d21; --soft: #676b73; --line: #e3e1dc; --mark: #0b63ce; --on-mark: #fff;
        --z: 1; --x: 0; --y: 0 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #131417; --card: #1b1d21; --ink: #e9e8e4; --soft: #9b9fa8; --line: #2e3138; --mark: #7db4ff; --on-mark: #0c1522 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
header, main, footer { max-width: 110rem; margin: auto; padding: 0 clamp(.75rem, 3vw, 2.5rem) }
header { padding-top: 1.5rem }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; letter-spacing: -.015em } h2 { font-size: 1rem; margin: 0 }
p { margin: .35rem 0; color: var(--soft) } a { color: var(--mark) }
.bar { position: sticky; top: 0; z-index: 2; background: var(--paper); border-bottom: 1px solid var(--line); margin: .4rem 0 1.25rem }
.bar > div { display: flex; flex-wrap: wrap; gap: .5rem 1.25rem; align-items: center; max-width: 110rem; margin: auto;
             padding: .6rem clamp(.75rem, 3vw, 2.5rem) }
fieldset { border: 1px solid var(--line); border-radius: .6rem; background: var(--card); margin: 0; padding: .15rem; display: flex; min-width: 0 }
fieldset label span, button { display: block; padding: .25rem .7rem; border: 0; border-radius: .45rem; background: none; min-height: 2rem;
                              color: inherit; font: inherit; cursor: pointer }
fieldset label { min-width: 0 } input { position: absolute; opacity: 0 }
input:checked + span { background: var(--mark); color: var(--on-mark) }
button:hover { background: var(--line) }
button:disabled { opacity: .35; background: none; cursor: default }
output { align-self: center; min-width: 3.6rem; text-align: center; font-variant-numeric: tabular-nums }
:focus-visible, input:focus-visible + span { outline: 2px solid var(--mark); outline-offset: 2px }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1.5rem; align-items: start }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .8rem; overflow: hidden }
figure:only-child { width: min(100%, max(24rem, 70vh * var(--aspect) + 2px)) }
.view { position: relative; overflow: hidden; aspect-ratio: var(--aspect); width: min(100%, 70vh * var(--aspect)); margin: auto;
        background: #808080; touch-action: pan-y; user-select: none; -webkit-user-select: none; cursor: col-resize }
.zoomed .view { touch-action: none; cursor: grab }
.layer { position: absolute; inset: 0; display: none; overflow: hidden }
.layer.left { display: block; clip-path: inset(0 calc(100% - var(--split)) 0 0) }
.layer.right { display: block; clip-path: inset(0 0 0 var(--split)) }
.layer img { width: 100%; height: 100%; object-fit: contain; pointer-events: none; transform-origin: 0 0;
             transform: translate(calc(var(--x) * 100%), calc(var(--y) * 100%)) scale(var(--z)) }
.large img { image-rendering: pixelated }
.layer p { position: absolute; inset: 0; display: grid; place-content: center; margin: 0; color: #fff }
.tag { position: absolute; top: .6rem; max-width: 45%; padding: .05rem .55rem; border-radius: 1rem; background: #000a; color: #fff; font-size: .8rem;
       pointer-events: none; white-space: nowrap; overflow: hidden; text-overflow: ellipsis }
.tag.left { left: .6rem } .tag.right { right: .6rem }
.grip { position: absolute; top: 0; bottom: 0; left: var(--split); width: 44px; margin-left: -22px; outline: 0; touch-action: none;
        cursor: col-resize }
.grip::before { content: ""; position: absolute; inset: 0 21px; background: #fff; box-shadow: 0 0 0 1px #0006 }
.grip::after { content: "\\2039\\2009\\203a"; position: absolute; top: 50%; left: 4px; width: 36px; height: 36px; margin-top: -18px;
               border-radius: 50%; background: #fff; color: #222; box-shadow: 0 1px 5px #0008; font: 600 20px/32px system-ui, sans-serif;
               text-align: center; white-space: nowrap }
.grip:focus-visible::after { box-shadow: 0 0 0 3px var(--mark), 0 0 0 5px #fff }
figcaption { padding: .8rem 1rem 1rem; display: flex; flex-wrap: wrap; gap: .3rem 1.5rem; border-top: 1px solid var(--line) }
figcaption > div { flex: 1 1 11rem }
figcaption p { font-size: .85rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; align-self: start }
th, td { text-align: right; padding: .1rem 0 .1rem 1.1rem; font-weight: 400; white-space: nowrap }
th { color: var(--soft) } tbody th, thead td { text-align: left; padding-left: 0; max-width: 14rem; overflow: hidden; text-overflow: ellipsis }
td b { font-weight: 650 }
header table { margin: .2rem 0 .8rem } .keys { font-size: .85rem }
footer { padding-top: 2rem; padding-bottom: 3rem }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem; margin: .5rem 0 1rem; white-space: pre-wrap;
      font: 13px/1.5 ui-monospace, monospace }
"""

# -----------------------------------------------------------------------------
# how it moves

SCRIPT = """
'use strict'
const root = document.documentElement, views = [...document.querySelectorAll('.view')], find = id => document.getElementById(id)
const clamp = (x, low, high) => Math.min(Math.max(x, low), high)
let zoom = 1, x = .5, y = .5                        // the point of every picture, 0 to 1, that is in the middle of its view

function move(newZoom, newX, newY) {                // shared by all pictures
  zoom = clamp(newZoom, 1, 32)
  x = clamp(newX, .5 / zoom, 1 - .5 / zoom)
  y = clamp(newY, .5 / zoom, 1 - .5 / zoom)
  root.style.setProperty('--z', zoom)
  root.style.setProperty('--x', .5 - x * zoom)
  root.style.setProperty('--y', .5 - y * zoom)
  root.classList.toggle('zoomed', zoom > 1)
  for (const view of views)                         // from two pixels of the screen on, a pixel is shown as the square it is
    view.classList.toggle('large', zoom * view.clientWidth >= 2 * view.dataset.width)
  find('zoom').textContent = zoom.toFixed(1) + '\\u00d7'
  find('out').disabled = find('fit').disabled = zoom === 1
  find('in').disabled = zoom === 32
}

function zoomAt(factor, u, v) {                     // what is at (u, v) of a view, 0 to 1, stays there
  const to = clamp(zoom * factor, 1, 32)
  move(to, x + (u - .5) * (1 / zoom - 1 / to), y + (v - .5) * (1 / zoom - 1 / to))
}

function split(view, percent) {
  const at = clamp(percent, 0, 100), grip = view.querySelector('.grip'), [left, right] = [...view.querySelectorAll('.tag')].map(e => e.textContent)
  view.style.setProperty('--split', at + '%')
  grip.setAttribute('aria-valuenow', Math.round(at))
  grip.setAttribute('aria-valuetext', `${Math.round(at)} % ${left}, ${100 - Math.round(at)} % ${right}`)
}

const position = view => parseFloat(view.style.getPropertyValue('--split'))
function compare(pair) {
  for (const view of views) {
    const layers = view.querySelectorAll('.layer'), tags = view.querySelectorAll('.tag')
    layers.forEach((layer, i) => layer.className = 'layer ' + (i === pair[0] ? 'left' : i === pair[1] ? 'right' : ''))
    pair.forEach((version, side) => tags[side].textContent = layers[version].dataset.name)
    split(view, position(view))
  }
}

for (const view of views) {
  const down = new Map()                            // pointers on this view
  let dividing = false
  const place = e => { const box = view.getBoundingClientRect(); return [(e.clientX - box.left) / box.width, (e.clientY - box.top) / box.height] }
  const spread = () => { const [a, b] = [...down.values()]; return Math.hypot(a[0] - b[0], (a[1] - b[1]) / view.dataset.aspect) }

  view.addEventListener('pointerdown', e => {
    if (e.button) return
    const grip = view.querySelector('.grip')
    down.set(e.pointerId, place(e))
    view.setPointerCapture(e.pointerId)
    dividing = down.size === 1 && (zoom === 1 || e.target === grip)
    if (dividing) split(view, 100 * place(e)[0])
    grip.focus({ preventScroll: true, focusVisible: false })
    e.preventDefault()
  })
  view.addEventListener('pointermove', e => {
    if (!down.has(e.pointerId)) return
    const before = down.get(e.pointerId), now = place(e), apart = down.size === 2 && spread()
    down.set(e.pointerId, now)
    if (apart) zoomAt(spread() / apart, ...now)
    else if (dividing) split(view, 100 * now[0])
    else move(zoom, x - (now[0] - before[0]) / zoom, y - (now[1] - before[1]) / zoom)
  })
  for (const end of ['pointerup', 'pointercancel', 'lostpointercapture']) view.addEventListener(end, e => down.delete(e.pointerId))
  view.addEventListener('wheel', e => {             // a pinch on a touchpad arrives as wheel with ctrl
    if (!e.ctrlKey && !e.metaKey) return
    e.preventDefault()
    zoomAt(Math.exp(-clamp(e.deltaY, -60, 60) / 150), ...place(e))
  }, { passive: false })
  view.addEventListener('dblclick', e => zoom > 1 ? move(1, .5, .5) : zoomAt(4, ...place(e)))
}

document.addEventListener('keydown', e => {
  if (e.ctrlKey || e.metaKey || e.altKey || e.target.matches('input')) return
  const view = e.target.closest('.view'), some = view ? [view] : views, step = .1 / zoom
  const by = { ArrowLeft: -2, ArrowRight: 2, ...view && { ArrowDown: -2, ArrowUp: 2, PageDown: -10, PageUp: 10, Home: -100, End: 100 } }
  const pan = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }
  if (e.shiftKey && e.key in pan) move(zoom, x + pan[e.key][0], y + pan[e.key][1])
  else if (e.key in by) some.forEach(v => split(v, position(v) + by[e.key]))
  else if (e.key === '+' || e.key === '=') zoomAt(Math.SQRT2, .5, .5)
  else if (e.key === '-') zoomAt(Math.SQRT1_2, .5, .5)
  else if (e.key === '0') move(1, .5, .5)
  else return
  e.preventDefault()
})

find('in').onclick = () => zoomAt(Math.SQRT2, .5, .5)
find('out').onclick = () => zoomAt(Math.SQRT1_2, .5, .5)
find('fit').onclick = () => move(1, .5, .5)
for (const input of document.querySelectorAll('input')) {
  input.onchange = () => compare(JSON.parse(input.value))
  if (input.checked) input.onchange()
}
addEventListener('resize', () => move(zoom, x, y))
move(1, .5, .5)
"""

# -----------------------------------------------------------------------------
# what it holds

def text(x):
    """Anything as text of HTML and of its attributes; names of files may hold quotes, tags, bytes of no encoding."""
    return escape(printable(x))


def embed(x, pictures):
    """A picture (1, 3, H, W) in [0, 1], of which the page has so many -> data URI, what was lost on the way or "" """
    img, note, data = to_pil(x[0]), "", io.BytesIO()
    width, height = img.size
    if width * height <= EXACT / pictures:
        img.save(data, "PNG")
        return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}", note
    most = min(MOST / pictures, LARGEST)
    if width * height > most or max(img.size) > 16384:
        scale = min((most / (width * height)) ** 0.5, 16384 / max(img.size))
        img = img.resize((max(round(width * scale), 1), max(round(height * scale), 1)), Image.Resampling.LANCZOS)
        note = f" at {img.width / width:.0%} of its size"
    img.save(data, "JPEG", quality=92, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}", f"shown here as JPEG{note}, measured as PNG"


def table(found, names):
    """{metric: (ours, bicubic's)} as a table, the better figure in bold."""
    if not found:
        return ""
    arrow = {"higher": "↑", "lower": "↓"}
    head = "".join(f'<th scope="col">{METRICS[m][0]} <span title="{METRICS[m][2]} is better">{arrow[METRICS[m][2]]}</span></th>' for m in found)
    rows = ""
    for i, name in ((1, names[0]), (0, names[1])):
        cells = ""
        for m, pair in found.items():
            best = pair[i] == (max if METRICS[m][2] == "higher" else min)(pair)
            figure = f"{pair[i]:.{METRICS[m][1]}f}"
            cells += f"<td>{f'<b>{figure}</b>' if best else figure}</td>"
        rows += f'<tr><th scope="row">{text(name)}</th>{cells}</tr>'
    return f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>"


def figure_of(row, versions, names, pictures):
    """One picture.  row: of `row_of`; versions: (1, 3, H, W) each, fewer than names if one is missing; pictures: on the whole page -> HTML"""
    layers, notes = "", {}
    for i, name in enumerate(names):
        inside = f"<p>no {text(name)}</p>"
        if i < len(versions):
            uri, note = embed(versions[i], pictures)
            notes[note] = None
            inside = f'<img src="{uri}" alt="{text(row["picture"])}, {text(name)}" draggable="false">'
        layers += f'<div class="layer" data-name="{text(name)}">{inside}</div>'
    aspect = min(max(row["width"] / row["height"], 0.4), 4)
    found = {m: (row[m], row[f"{m}_bicubic"]) for m in METRICS if m in row}
    why = {}
    for m, reason in row["not_measured"].items():
        why.setdefault(reason, []).append(METRICS[m][0])
    seconds = "made earlier" if row["seconds"] is None else f"{row['seconds']:.2f} s"
    lines = [f"{row['width']} × {row['height']}, {seconds}", *filter(None, notes),
             *(f"not measured: {', '.join(metrics)} ({reason})" for reason, metrics in why.items())]
    return (f'<figure style="--aspect: {aspect:.4f}">'
            f'<div class="view" style="--split: 50%" data-aspect="{aspect:.4f}" data-width="{row["width"]}">{layers}'
            f'<span class="tag left"></span><span class="tag right"></span><div class="grip" role="slider" tabindex="0" aria-valuemin="0" '
            f'aria-valuemax="100" aria-valuenow="50" aria-orientation="horizontal" aria-label="Divider of {text(row["picture"])}"></div></div>'
            f'<figcaption><div><h2>{text(row["picture"])}</h2>{"".join(f"<p>{text(line)}</p>" for line in lines)}</div>'
            f'{table(found, names)}</figcaption></figure>\n')


def page_of(figures, names, record):
    """The page.  figures: of `figure_of`; names: of the versions; record: of `record_of` -> HTML"""
    pairs = [(0, 1)] if len(names) < 3 else [(0, 1), (1, 2), (0, 2)]
    choices = "".join(f'<label><input type="radio" name="pair" value="[{a}, {b}]"{" checked" * (a == 0 and b == 1)}>'
                      f"<span>{text(names[a])} | {text(names[b])}</span></label>" for a, b in pairs)
    means = {m: (mean["ours"], mean["bicubic"]) for m, mean in record["average"].items()}
    counts = {mean["pictures"] for mean in record["average"].values()}
    said = f"Average of {min(counts)}{f' to {max(counts)}' * (len(counts) > 1)} pictures" if len(figures) > 1 and counts else ""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    hashes = "\n".join(f"{sha}  {text(name)}" for name, sha in record["weights"].items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="nanoSR">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{text(names[1])}, before and after</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{text(names[1])}, before and after</h1>
<p>{len(figures)} picture{"s" * (len(figures) != 1)} by nanoSR, compared with {text(" and ".join(name for name in names if name != names[1]))}.
 <a href="#how">How it was made</a></p>
{f"<p>{said}</p>{table(means, names)}" if said else ""}
<p class="keys">Divider: drag, or ← →. Zoom: + −, pinch, Ctrl + wheel, double click. Pan: drag, or Shift + arrows. Fit: 0.</p>
</header>
<div class="bar"><div>
<fieldset aria-label="What is compared">{choices}</fieldset>
<fieldset aria-label="Zoom of all pictures"><button id="out" aria-label="Zoom out">−</button><output id="zoom" aria-live="polite"></output><button
 id="in" aria-label="Zoom in">+</button><button id="fit">Fit</button></fieldset>
</div></div>
<main>
{"".join(figures)}</main>
<footer id="how">
<h2>How it was made</h2>
<pre>{text(record["command"])}</pre>
<p>{text(record["protocol"])}</p>
<p>{text(versions)}</p>
<p>SHA-256 of the weight files that were read:</p>
<pre>{hashes or "none"}</pre>
</footer>
<script>{SCRIPT}</script>
</body>
</html>
"""
