// The first page: the scatter, the ranking of the measures, and the table of the models.
"use strict";

const { models, points, board, columns, labels, statistics } = window.DATA;
const byId = (id) => document.getElementById(id);
const rows = board.map((row) => Object.fromEntries(row.map((value, i) => [columns[i], value])));
const families = [...new Set(models.map((m) => m.family))].sort();
const SYMBOLS = ["circle", "square", "triangle", "diamond", "star", "cross", "wye"];

function label(metric, scale) {
  const name = labels[metric] ?? metric;
  return ["lambda10", "none"].includes(scale) ? name : `${name}, ${scale}`;
}

function fill(select, entries) {
  select.append(...entries.map(([value, text]) => new Option(text, value)));
}

function fixed(value) {
  return value === null ? "–" : value.toFixed(2).replace("-", "−");
}

function interval(row) {
  if (!row || row.value === null) return "–";
  if (row.ci_low === null) return fixed(row.value);
  return `${fixed(row.value)} [${fixed(row.ci_low)}, ${fixed(row.ci_high)}]`;
}

function find(stage, reading, statistic) {
  return rows.find((r) => r.stage === stage && `${r.metric}:${r.scale}` === reading &&
    r.statistic === statistic);
}

// -- the scatter

function selectedPoints() {
  const found = (points[byId("stage").value] ?? {})[byId("reading").value] ?? [];
  const family = byId("scatter-family").value;
  return found
    .map(([i, x, error]) => ({ ...models[i], x, error }))
    .filter((p) => p.gap !== null && p.x > 0 && (!family || p.family === family));
}

function drawScatter() {
  const data = selectedPoints();
  const stage = byId("stage").value;
  const reading = byId("reading").value;
  const name = label(...reading.split(":"));
  const target = byId("scatter");
  if (!data.length) {
    target.replaceChildren(Object.assign(document.createElement("p"), {
      textContent: "No model has both this measure at this stage and a gap.",
    }));
    byId("statistics").textContent = "";
    return;
  }
  const width = Math.max(300, Math.min(target.clientWidth || 900, 1000));
  const wide = data.map((p) => p.x + p.error).concat(data.map((p) => Math.max(p.x - p.error, p.x / 2)));
  const gaps = data.map((p) => p.gap);
  const bounds = [Math.min(...gaps, 0) - 0.05, Math.max(...gaps, 0.1) + 0.1];
  const clamp = (y) => Math.max(bounds[0], Math.min(bounds[1], y));
  const signed = (value) => value.toFixed(3).replace("-", "−");
  const named = (p) => `${p.model}: ${name} ${p.x.toPrecision(3)} ± ${p.error.toPrecision(1)}, ` +
    `gap ${signed(p.gap)} [${signed(p.low)}, ${signed(p.high)}]`;
  const legend = families.filter((f) => data.some((p) => p.family === f));
  const chart = Plot.plot({
    width,
    height: Math.round(Math.min(520, Math.max(320, width * 0.55))),
    marginLeft: 52,
    marginBottom: 44,
    style: { fontSize: "13px", background: "transparent" },
    x: { type: "log", domain: d3.extent(wide).map((v, i) => v * [0.9, 1.1][i]), label: `${name} at ${stage} →`,
      ticks: width < 500 ? 3 : 8, tickFormat: (v) => `${+v.toPrecision(3)}`, grid: true },
    y: { domain: bounds, label: "↑ SGD-Adam gap", grid: true },
    color: { domain: families, scheme: "Observable10", legend: false },
    symbol: { domain: families, range: families.map((_, i) => SYMBOLS[i % SYMBOLS.length]) },
    ariaLabel: `Scatter of the SGD-Adam gap against ${name} at ${stage}, ${data.length} models`,
    marks: [
      Plot.ruleY([0.1], { strokeDasharray: "4 4", strokeOpacity: 0.7 }),
      Plot.ruleX(data, { x: "x", y1: (p) => clamp(p.low), y2: (p) => clamp(p.high), stroke: "family", strokeOpacity: 0.7 }),
      Plot.ruleY(data, { y: "gap", x1: (p) => Math.max(p.x - p.error, p.x / 2), x2: (p) => p.x + p.error,
        stroke: "family", strokeOpacity: 0.7 }),
      Plot.dot(data, { x: "x", y: "gap", stroke: "family", fill: (p) => (p.enters ? p.family : "none"), symbol: "family", r: 5,
        strokeWidth: 1.5, href: (p) => `models/${p.model}.html`, ariaLabel: named }),
      Plot.tip(data, Plot.pointer({ x: "x", y: "gap", title: named, maxRadius: 30, pointerEvents: "none" })),
    ],
  });
  const key = Plot.legend({ color: { domain: legend, range: legend.map((f) => chart.scale("color").apply(f)) },
    symbol: { domain: legend, range: legend.map((f) => chart.scale("symbol").apply(f)) }, fill: "color", style: { fontSize: "13px", background: "transparent" } });
  target.replaceChildren(key, chart);
  const all = ["spearman", "spearman_families", "kendall", "auc", "accuracy"];
  const said = all.map((s) => `${statistics[s]} ${interval(find(stage, reading, s))}`).join("; ");
  const row = find(stage, reading, "spearman");
  byId("statistics").textContent = row
    ? `${row.num_models} models of ${row.num_families} families: ${said}.`
    : `${data.length} models; none enters the statistics at this stage.`;
}

// -- the ranking

function drawRanking() {
  const stage = byId("stage").value;
  const all = byId("all-readings").checked;
  const table = byId("ranking");
  const at = rows.filter((r) => r.stage === stage && (all || ["lambda10", "none"].includes(r.scale)));
  const readings = [...new Set(at.map((r) => `${r.metric}:${r.scale}`))];
  const size = (reading) => Math.abs(find(stage, reading, "spearman")?.value ?? 0);
  readings.sort((a, b) => size(b) - size(a));
  const head = [`measure at ${stage}`, "products per block", ...Object.values(statistics)];
  table.closest("section").hidden = readings.length === 0;
  table.tHead.rows[0].replaceChildren(...head.map((text, i) => {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = text;
    cell.className = i ? "number" : "";
    return cell;
  }));
  table.tBodies[0].replaceChildren(...readings.map((reading) => {
    const row = document.createElement("tr");
    const name = document.createElement("th");
    name.scope = "row";
    name.textContent = label(...reading.split(":"));
    row.append(name);
    const products = find(stage, reading, "spearman")?.num_products ?? null;
    const cells = [[products, products === null ? "–" : products.toFixed(0)]];
    for (const statistic of Object.keys(statistics)) {
      const found = find(stage, reading, statistic);
      cells.push([found?.value ?? null, interval(found)]);
    }
    for (const [value, text] of cells) {
      const cell = row.insertCell();
      cell.className = "number";
      cell.dataset.value = value ?? "";
      const [first, ...rest] = text.split(" ");
      cell.textContent = rest.length ? `${first} ` : first;
      if (rest.length) {
        cell.append(Object.assign(document.createElement("span"), { className: "interval", textContent: rest.join(" ") }));
      }
    }
    return row;
  }));
  makeSortable(table);
}

// -- the table of the models

function filterModels() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const family = byId("family").value;
  const show = byId("show").value;
  let count = 0;
  for (const row of byId("models").tBodies[0].rows) {
    const pending = row.dataset.pending === "1";
    const text = row.textContent.toLowerCase();
    const seen = words.every((w) => text.includes(w)) && (!family || row.dataset.family === family) &&
      (!show || (show === "pending") === pending);
    row.hidden = !seen;
    count += seen;
  }
  byId("count").textContent = `${count} of ${models.length} models`;
}

function readHash() {
  const asked = new URLSearchParams(location.hash.slice(1));
  for (const id of ["reading", "stage"]) {
    const value = asked.get(id);
    if (value && [...byId(id).options].some((o) => o.value === value)) byId(id).value = value;
  }
}

function onSelect() {
  const state = new URLSearchParams({ reading: byId("reading").value, stage: byId("stage").value });
  history.replaceState(null, "", `#${state}`);
  drawScatter();
  drawRanking();
}

const readings = [...new Set(Object.values(points).flatMap(Object.keys))];
const rank = (reading) => (reading === "js0:lambda10" ? 0 : /:(lambda10|none)$/.test(reading) ? 1 : 2);
readings.sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
fill(byId("reading"), readings.map((r) => [r, label(...r.split(":"))]));
for (const id of ["family", "scatter-family"]) fill(byId(id), families.map((f) => [f, f]));
readHash();
drawScatter();
drawRanking();
makeSortable(byId("models"));
filterModels();
for (const id of ["reading", "stage"]) byId(id).addEventListener("change", onSelect);
byId("scatter-family").addEventListener("change", drawScatter);
byId("all-readings").addEventListener("change", drawRanking);
byId("search").addEventListener("input", filterModels);
for (const id of ["family", "show"]) byId(id).addEventListener("change", filterModels);
let resizing;
addEventListener("resize", () => {
  clearTimeout(resizing);
  resizing = setTimeout(drawScatter, 150);
});
