"""The rows of a config as a page that needs nothing else: each token with id, role, and whether it is learnt."""

from collections.abc import Mapping
from typing import Any

from lit_rlhf.callbacks.token_page import with_data

# As in the token microscope, text goes into the page as data and is set by textContent: no row becomes markup.
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Rows as the model sees them</title>
<style>
body { font: 14px/1.6 system-ui, sans-serif; margin: 1em auto; max-width: 60em; padding: 0 1em; color: #222; }
h2 { margin: 1.2em 0 .3em; } h3 { font-size: 1em; margin: 1em 0 .2em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .1em .8em .1em 0; text-align: right; vertical-align: bottom; }
td:first-child, th:first-child { text-align: left; }
section { border-bottom: 1px solid #ddd; padding: .4em 0; }
.text { white-space: pre-wrap; overflow-wrap: break-word; }
.bars { display: inline-flex; align-items: flex-end; height: 2.4em; gap: 1px; }
.bars span { width: 9px; background: #58c; }
.token { border-radius: 2px; border-right: 1px solid #fff; cursor: default; background: var(--of); color: #555; }
.token:hover { outline: 1px solid #000; }
.learnt { color: #000; font-weight: 600; border-bottom: 3px solid #2a8f3c; }
.control { font-family: monospace; font-size: 85%; border: 1px solid #a63; }
.cut { opacity: .45; text-decoration: line-through; }
.scissors { color: #b00; }
.user, .prompt { --of: #dcecfb; } .system, .text-role { --of: #ecdff5; } .tool { --of: #fbf0cf; }
.assistant, .completion, .chosen, .desirable, .right { --of: #def3de; }
.rejected, .undesirable, .wrong { --of: #fadfdc; }
</style></head><body>
<h1>Rows as the model sees them</h1>
<p id="head"></p>
<p>Colours: <span class="token user">user, prompt</span> <span class="token system">system</span>
<span class="token tool">tool</span> <span class="token assistant">assistant, chosen, right</span>
<span class="token rejected">rejected, wrong</span>; <span class="token assistant learnt">the loss counts it</span>;
<span class="token control">control token</span>; <span class="token user cut">cut off</span>. Hover for the id.</p>
<main id="roles"></main>
<script id="data" type="application/json">%s</script>
<script>
const found = JSON.parse(document.getElementById("data").textContent);
const get = id => document.getElementById(id);
function element(kind, of, text) {
  const made = document.createElement(kind);
  made.className = of;
  if (text !== undefined) made.textContent = text;
  return made;
}
const number = value => Number.isInteger(value) ? value.toLocaleString("en") : value.toFixed(1);
const total = counts => Object.values(counts).reduce((a, b) => a + b, 0);
const role = (token, part) => ["rejected", "undesirable"].includes(part) ? part
  : token.role.startsWith("step") ? token.role.split(" ").pop() : token.role === "text" ? "text-role" : token.role;
function show(token, part, isCut) {
  const of = ["token", role(token, part)];
  if (token.learnt) of.push("learnt");
  if (token.control) of.push("control");
  if (isCut) of.push("cut");
  const made = element("span", of.join(" "), token.text.replaceAll("\\n", "⏎\\n"));
  made.title = [`id ${token.id}`, JSON.stringify(token.text), `role ${token.role}`,
    `loss ${token.learnt ? "yes" : "no"}`, ...isCut ? ["cut off"] : []].join("\\n");
  return made;
}
function lines(of) {
  const said = of.sources.flatMap(s => [
    `${s.source}: ${number(s.read)} rows read = ${number(s.whole)} whole + ${number(s.cut)} cut + ` +
      `${number(total(s.dropped))} dropped`,
    ...Object.entries(s.dropped).map(([why, count]) => `${number(count)} dropped: ${why}`),
    ...s.not_taken ? [`${number(s.not_taken)} that could be used are not taken, by the weight of the source`] : [],
    ...s.empty ? [`${number(s.empty)} of the whole ones with an empty response`] : [],
    ...s.repeating ? [`${number(s.repeating)} whose response begins with the whole prompt`] : [],
    ...Object.entries(s.control).map(([token, count]) => `${number(count)} spell out the control token ${token}`)]);
  const share = 100 * of.learnt / of.tokens;
  const loss = of.learnt === null ? "" : `, ${number(of.learnt)} in the loss (${share.toFixed(1)} %)`;
  const batches = of.micro_batches === null ? "" : `, ${number(of.micro_batches)} micro-batches`;
  const epoch = of.learnt === null ? `${number(of.examples)} prompts` : `an epoch: ${number(of.examples)} examples`;
  said.push(`${epoch}, ${number(of.tokens)} tokens${loss}${batches}`);
  said.push(`duplicates: ${number(of.repeated)} rows are the same as an earlier one`);
  if (of.in_train !== null) said.push(`leaks: ${number(of.in_train)} rows are in the training data, too; ` +
    `${number(of.prompts_in_train)} have a prompt that is`);
  return said;
}
function lengths(of) {
  const table = element("table", ""), head = element("tr", "");
  for (const name of ["tokens", "least", "median", "mean", "95 %", "most", ""]) head.append(element("th", "", name));
  table.append(head);
  for (const [name, one] of Object.entries(of)) {
    const row = element("tr", ""), bars = element("div", "bars"), most = Math.max(...one.counts);
    row.append(element("td", "", name));
    for (const value of [one.least, one.median, one.mean, one.p95, one.most])
      row.append(element("td", "", number(value)));
    one.counts.forEach((count, at) => {
      const bar = element("span", "");
      bar.style.height = `${Math.max(count ? 4 : 0, 100 * count / most)}%`;
      bar.title = `${one.edges[at]} to ${one.edges[at + 1] - 1}: ${count}`;
      bars.append(bar);
    });
    row.append(element("td", ""));
    row.lastChild.append(bars);
    table.append(row);
  }
  return table;
}
get("head").textContent = `${found.data} for ${found.model}, tokenizer of ${found.tokenizer}, ` +
  (found.max_length === null ? "no limit of tokens" : `at most ${number(found.max_length)} tokens`);
for (const [name, of] of Object.entries(found.roles)) {
  get("roles").append(element("h2", "", name));
  for (const line of lines(of)) get("roles").append(element("div", "", line));
  get("roles").append(lengths(of.lengths));
  for (const row of of.rows) {
    const section = element("section", "row");
    section.append(element("h3", "", `${row.place}: ${row.status}`));
    if (!row.parts.length) section.append(element("div", "text", row.text));
    for (const part of row.parts) {
      const text = element("div", "text");
      section.append(element("div", "", `${part.name}, ${part.tokens.length} tokens`), text);
      text.append(...part.tokens.slice(0, part.cut_at).map(token => show(token, part.name, false)));
      if (part.left_out.length) text.append(element("span", "scissors", " ✂ "),
        ...part.left_out.map(token => show(token, part.name, true)), element("span", "scissors", " ✂ "));
      text.append(...part.tokens.slice(part.cut_at).map(token => show(token, part.name, false)));
    }
    get("roles").append(section);
  }
}
</script></body></html>
"""


def page(found: Mapping[str, Any]) -> str:
    """The page of what `data.as_plain` gives."""
    return with_data(PAGE, dict(found))
