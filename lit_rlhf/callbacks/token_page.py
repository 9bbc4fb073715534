"""The token microscope: a page of the same prompts at each validation, each token coloured by what the stage knows."""

from collections.abc import Sequence
from typing import Any

from lit_rlhf.files import strict_json

# Text goes into the page as data and is set by textContent: whatever it holds, the browser takes it for text. Within
# <script>, "<" could end the element or open a comment, so that it is written as its escape.
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Token microscope</title>
<style>
body { font: 14px/1.5 system-ui, sans-serif; margin: 1em auto; max-width: 60em; padding: 0 1em; color: #222; }
header { position: sticky; top: 0; background: #fff; padding: .5em 0; border-bottom: 1px solid #ccc; z-index: 1; }
header label { margin-right: 1.5em; white-space: nowrap; }
input[type=range] { width: 14em; max-width: 60%; vertical-align: middle; }
section { border-bottom: 1px solid #ddd; padding: .6em 0; }
.prompt, .response, .reference { white-space: pre-wrap; overflow-wrap: break-word; }
.prompt, .reference { color: #666; }
.prompt::before { content: "prompt "; font-weight: 600; }
.reference::before { content: "reference "; font-weight: 600; }
.numbers span { display: inline-block; margin-right: 1em; color: #444; font-variant-numeric: tabular-nums; }
.token { border-radius: 2px; cursor: default; }
.token:hover { outline: 1px solid #000; }
#scale { display: inline-block; width: 8em; height: .8em; vertical-align: middle; }
</style></head><body>
<header>
<label>validation <input id="when" type="range" min="0" step="1"> <b id="step"></b></label>
<label>colour by <select id="by"></select></label>
<label><span id="low"></span> <span id="scale"></span> <span id="high"></span></label>
</header>
<main id="samples"></main>
<script id="data" type="application/json">%s</script>
<script>
const runs = JSON.parse(document.getElementById("data").textContent);
const get = id => document.getElementById(id);
const names = [...new Set(runs.flatMap(run => run.samples.flatMap(sample => Object.keys(sample.readings))))];
const numeric = value => typeof value === "number" ? value.toFixed(3) : value === null ? "none" : String(value);
for (const name of names) get("by").append(new Option(name));
get("when").max = runs.length - 1;
get("when").value = runs.length - 1;
function reach(name) {  // the same at every validation, so that colours compare; the farthest of 98 % of tokens
  const all = runs.flatMap(run => run.samples.flatMap(s => s.readings[name] || [])).filter(v => v !== null);
  const sizes = all.map(Math.abs).sort((a, b) => a - b);
  return sizes.length ? sizes[Math.floor(0.98 * (sizes.length - 1))] || 1 : 1;
}
function colour(value, most) {  // blue below 0, red above
  if (value === null || value === undefined) return "transparent";
  const share = Math.max(-1, Math.min(1, value / most));
  return share < 0 ? `rgba(33, 102, 220, ${-0.75 * share})` : `rgba(214, 60, 40, ${0.75 * share})`;
}
function element(kind, of, text) {
  const made = document.createElement(kind);
  made.className = of;
  if (text !== undefined) made.textContent = text;
  return made;
}
function draw() {
  const run = runs[get("when").value], name = get("by").value, most = reach(name);
  get("step").textContent = run.step === 0 ? "before training" : "step " + run.step;
  get("low").textContent = (-most).toFixed(2);
  get("high").textContent = most.toFixed(2);
  get("scale").style.background = `linear-gradient(90deg, ${colour(-most, most)}, transparent, ${colour(most, most)})`;
  get("samples").replaceChildren(...run.samples.map(sample => {
    const section = element("section", ""), row = sample.row, response = element("div", "response");
    section.append(element("div", "prompt", row.prompt));
    sample.pieces.forEach((piece, at) => {
      const token = element("span", "token", piece);
      const readings = names.filter(n => n in sample.readings).map(n => n + " " + numeric(sample.readings[n][at]));
      token.title = [JSON.stringify(piece), ...readings].join("\\n");
      token.style.background = colour((sample.readings[name] || [])[at], most);
      response.append(token);
    });
    const numbers = element("div", "numbers");
    for (const [key, value] of Object.entries(row))
      if (!["prompt", "completion", "reference_completion"].includes(key))
        numbers.append(element("span", "", key + " " + numeric(value)));
    section.append(response, numbers);
    if (row.reference_completion) section.append(element("div", "reference", row.reference_completion));
    return section;
  }));
}
get("when").oninput = get("by").onchange = draw;
draw();
</script></body></html>
"""


def token_page(validations: Sequence[dict[str, Any]]) -> str:
    """The page of validations, each {"step", "samples": [{"row", "pieces", "readings"}]}; it needs nothing else."""
    return with_data(PAGE, list(validations))


def with_data(page: str, value: Any) -> str:
    """A page with a plain value in the place of its %s, where its script reads it."""
    data = strict_json(value, ensure_ascii=False).replace("<", "\\u003c")
    # Separators that end a line in JavaScript of before 2019, and halves of characters, which UTF-8 has no bytes for.
    data = data.encode("utf-8", "replace").decode().replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return page.replace("%s", data, 1)
