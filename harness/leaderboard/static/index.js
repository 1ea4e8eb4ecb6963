// The first page: the picture, the archive of protocol 1, and the table of the models.
"use strict";

const { models, entries, measured, points, board, columns, labels, leading, scales: scaleWords, statistics, thresholds } = window.DATA;
// The scale that each metric is judged at; dummies have none.
const leads = (metric, scale) => scale === (leading[metric] ?? "none");
const JS0 = `js0:${leading.js0}`;
const rows = board.map((row) => Object.fromEntries(row.map((value, i) => [columns[i], value])));
const families = [...new Set([...models, ...entries].map((m) => m.family))].sort();
// No two families share a colour until the palette ends, and then they differ in shape.
const SYMBOLS = ["circle", "square", "triangle", "diamond", "star", "cross", "wye"];
const PALETTE = ["#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e",
  "#9498a0", "#008b8b", "#b8860b", "#c71585", "#7f9f2f", "#d2691e", "#5f5fa0"];
const COLOURS = { domain: families, range: families.map((_, i) => PALETTE[i % PALETTE.length]) };
const SHAPES = { domain: families, range: families.map((_, i) => SYMBOLS[i % SYMBOLS.length]) };

function label(metric, scale) {
  const name = labels[metric] ?? metric;
  return leads(metric, scale) ? name : `${name}, ${scaleWords[scale] ?? scale}`;
}

const labelOf = (reading) => label(...reading.split(":"));

function fill(select, options) {
  select.append(...options.map(([value, text]) => new Option(text, value)));
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

// -- points with names

// Of each family the point that lies most apart from the others, in units of the plot.
function namesAt(data, x, y) {
  const away = (p) => d3.min(data, (q) => (q === p ? Infinity : Math.hypot(x(p) - x(q), y(p) - y(q))));
  return [...d3.group(data, (p) => p.family).values()].map((ps) => d3.greatest(ps, away));
}

// Names by where they stand beside their points, [dx, dy, anchor]: where they hide least of other names and points.
const SPOTS = [[0, -11, "middle"], [0, 13, "middle"], [9, 0, "start"], [-9, 0, "end"]];

function placeNames(named, data, textOf, x, y) {
  const boxes = [];
  const boxOf = (p, [dx, dy, anchor]) => {
    const wide = 7 * textOf(p).length;
    const left = x(p) + dx - { start: 0, middle: wide / 2, end: wide }[anchor];
    return [left, y(p) + dy - 6, left + wide, y(p) + dy + 6];
  };
  const meet = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
  const hidden = (box) => 10 * d3.sum(boxes, (b) => meet(b, box)) +
    d3.sum(data, (p) => meet([x(p) - 5, y(p) - 5, x(p) + 5, y(p) + 5], box));
  return d3.group(named, (p) => {
    const spot = d3.least(SPOTS, (s) => hidden(boxOf(p, s)));
    boxes.push(boxOf(p, spot));
    return spot;
  });
}

function placeOf(values, log, pixels) {
  const f = log ? Math.log : Number;
  const [low, high] = d3.extent(values, f);
  return (v) => pixels * (f(v) - low) / (high - low || 1);
}

// Points of {x, y, xLow, xHigh, yLow, yHigh, family, full, href, said}.
function pointChart(data, { width, height, x, y, marks = [], ariaLabel, names }) {
  const [px, py] = [placeOf(data.map((p) => p.x), x.type === "log", width - 80), placeOf(data.map((p) => -p.y), false, height - 64)];
  const at = [(p) => px(p.x), (p) => py(-p.y)];
  const named = names === "all" ? data : namesAt(data, ...at);
  const textOf = (p) => (names === "all" ? p.model : p.family);
  const shared = { x: "x", y: "y", stroke: "family", symbol: "family", r: 5, strokeWidth: 1.5, href: "href", ariaLabel: "said" };
  return Plot.plot({
    width, height, marginLeft: 52, marginBottom: 44, marginRight: 28,
    style: { fontSize: "13px", background: "transparent" },
    x: { grid: true, ...x },
    y: { grid: true, ...y },
    color: COLOURS,
    symbol: SHAPES,
    ariaLabel,
    marks: [
      ...marks,
      Plot.ruleX(data, { x: "x", y1: "yLow", y2: "yHigh", stroke: "family", strokeOpacity: 0.6 }),
      Plot.ruleY(data, { y: "y", x1: "xLow", x2: "xHigh", stroke: "family", strokeOpacity: 0.6 }),
      Plot.dot(data.filter((p) => p.full), { ...shared, fill: "family" }),
      Plot.dot(data.filter((p) => !p.full), { ...shared, fill: "none" }),
      ...[...placeNames(named, data, textOf, ...at)].map(([[dx, dy, textAnchor], some]) => Plot.text(some, {
        x: "x", y: "y", text: textOf, dx, dy, textAnchor, fontSize: 11,
        fill: "currentColor", stroke: "var(--back)", strokeWidth: 3, paintOrder: "stroke", ariaHidden: "true" })),
      Plot.tip(data, Plot.pointer({ x: "x", y: "y", title: "said", maxRadius: 30, pointerEvents: "none" })),
    ],
  });
}

const signed = (value, digits = 3) => (value === null ? "–" : minus(value.toFixed(digits)));
const widthOf = (target) => Math.max(300, Math.min(target.clientWidth || 900, 1000));

// -- the picture

function drawPicture() {
  const known = entries.filter((e) => e.y !== null);
  const target = byId("picture");
  const waiting = entries.length - known.length;
  const rest = waiting ? ` ${waiting} of ${entries.length} entries are not measured yet.` : "";
  if (measured.length) {
    target.replaceChildren(pictureOfBoth(widthOf(target)));
    byId("picture-note").textContent = "A point leads to its entry; open points are references. Bars are 95 % intervals of the " +
      `speed-up and standard errors of J; the line is ${thresholds.speedup}, above which Adam is needed.${rest}`;
    return;
  }
  const js0 = points.init?.[JS0] ? gapPoints("init", JS0, "") : [];
  target.replaceChildren(...(known.length ? [pictureOfSpeedups(known, widthOf(target))] : []));
  byId("picture-note").textContent = (known.length ? `Open points are references, which are not ranked; Adam is needed where a whole interval is above the dashed line, ${thresholds.speedup}.` : "") + rest;
  if (js0.length) {
    const chart = gapChart(js0, { width: widthOf(target), height: 250, stage: "init", name: "JS⁰" });
    target.append(element("p", { className: "caption", textContent: "Earlier runs (protocol 1, which ranks nothing): measure against gap" }), chart);
  }
}

function pictureOfSpeedups(known, width) {
  const said = (e) => `${e.model}: ${e.speedup}, Adam needed: ${e.needed}`;
  const data = known.map((e) => ({ ...e, said: said(e), href: e.has_page ? `models/${e.model}.html` : null }));
  const shared = { x: "y", y: "model", r: 6, stroke: "family", strokeWidth: 2, href: "href", ariaLabel: "said" };
  return Plot.plot({
    width,
    height: 34 * data.length + 60,
    marginLeft: 7.2 * d3.max(data, (e) => e.model.length) + 12,
    marginRight: 20,
    marginBottom: 44,
    style: { fontSize: "13px", background: "transparent" },
    color: COLOURS,
    x: { domain: [-2.1, 2.1], ticks: [-2, -1, 0, 1, 2], tickFormat: (t) => (t === 0 ? "as many" : `${2 ** Math.abs(t)}×`),
      label: width < 450 ? "← AdamW slower · SGD slower →" : "← AdamW needs more steps · SGD needs more →", labelAnchor: "center", labelArrow: "none", grid: true },
    y: { domain: data.map((e) => e.model), label: null, tickSize: 0 },
    ariaLabel: `Speed-ups: ${data.map((e) => e.said).join("; ")}`,
    marks: [
      Plot.ruleX([0], { strokeOpacity: 0.6 }),
      Plot.ruleX([thresholds.speedup], { strokeDasharray: "4 4", strokeOpacity: 0.7 }),
      Plot.ruleY(data, { y: "model", x1: (e) => e.low ?? -2.1, x2: (e) => e.high ?? 2.1, stroke: "family", strokeWidth: 2 }),
      Plot.dot(data.filter((e) => e.ranked), { ...shared, fill: "family" }),
      Plot.dot(data.filter((e) => !e.ranked), { ...shared, fill: "var(--back)" }),
      Plot.text(data, { x: "y", y: "model", dy: -13, text: (e) => signed(e.y, 2), fontSize: 12, fill: "currentColor", ariaHidden: "true" }),
    ],
  });
}

function pictureOfBoth(width) {
  const [bottom, top] = d3.extent(measured.flatMap((e) => [e.y, e.low ?? e.y, e.high ?? e.y])); // an end without a bound goes as far as others
  const data = measured.map((e) => ({ ...e, x: e.J, xLow: e.J - (e.J_error ?? 0), xHigh: e.J + (e.J_error ?? 0), yLow: e.low ?? bottom, yHigh: e.high ?? top,
    full: e.ranked, href: e.has_page ? `models/${e.model}.html` : null,
    said: `${e.model}: J ${e.J.toPrecision(3)}, speed-up ${e.speedup}` }));
  return pointChart(data, { width, height: Math.max(340, width * 0.62), names: width > 500 ? "all" : "families",
    x: { label: "JS⁰ of raw eigenvalues at initialisation (J) →" }, y: { label: "↑ log₂ of SGD's steps over AdamW's" },
    marks: [Plot.ruleY([thresholds.speedup], { strokeDasharray: "4 4", strokeOpacity: 0.7 })],
    ariaLabel: `Scatter of the speed-up against J, ${data.length} entries` });
}

// -- the scatter of protocol 1

function gapPoints(stage, reading, family) {
  const found = (points[stage] ?? {})[reading] ?? [];
  const name = labelOf(reading);
  return found
    .map(([i, x, error]) => ({ ...models[i], x, error }))
    .filter((p) => p.gap !== null && p.x > 0 && (!family || p.family === family))
    .map((p) => ({ ...p, y: p.gap, xLow: Math.max(p.x - p.error, p.x / 2), xHigh: p.x + p.error, full: p.enters, href: `models/${p.model}.html`,
      said: `${p.model}: ${name} ${p.x.toPrecision(3)} ± ${p.error.toPrecision(1)}, gap ${signed(p.gap)} [${signed(p.low)}, ${signed(p.high)}]` }));
}

function gapChart(data, { width, height, stage, name }) {
  const gaps = data.map((p) => p.gap);
  const bounds = [Math.min(...gaps, 0) - 0.05, Math.max(...gaps, thresholds.gap) + 0.1];
  const clamp = (y) => Math.max(bounds[0], Math.min(bounds[1], y));
  const cut = data.map((p) => ({ ...p, yLow: clamp(p.low), yHigh: clamp(p.high) }));
  const wide = d3.extent(cut.flatMap((p) => [p.xLow, p.xHigh]));
  return pointChart(cut, { width, height,
    x: { type: "log", domain: [0.9 * wide[0], 1.1 * wide[1]], label: `${name} at ${stage} →`, ticks: width < 700 ? 3 : 8, tickFormat: (v) => `${+v.toPrecision(3)}` },
    y: { domain: bounds, label: "↑ SGD-Adam gap" },
    marks: [Plot.ruleY([thresholds.gap], { strokeDasharray: "4 4", strokeOpacity: 0.7 })],
    ariaLabel: `Scatter of the SGD-Adam gap against ${name} at ${stage}, ${data.length} models` });
}

function drawScatter() {
  const stage = byId("stage").value;
  const reading = byId("reading").value;
  const data = gapPoints(stage, reading, byId("scatter-family").value);
  const target = byId("scatter");
  if (!data.length) {
    target.replaceChildren(element("p", { textContent: "No model has both this measure at this stage and a gap." }));
    byId("statistics").textContent = "";
    return;
  }
  const width = widthOf(target);
  const legend = families.filter((f) => data.some((p) => p.family === f));
  const chart = gapChart(data, { width, height: Math.round(Math.min(520, Math.max(320, width * 0.55))), stage, name: labelOf(reading) });
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

// -- the correlations

function drawRanking() {
  const stage = byId("stage").value;
  const all = byId("all-readings").checked;
  const table = byId("ranking");
  const at = rows.filter((r) => r.stage === stage && (all || leads(r.metric, r.scale)));
  const readings = [...new Set(at.map((r) => `${r.metric}:${r.scale}`))];
  // By name, dummies last: their correlations rank nothing.
  const last = (reading) => labelOf(reading).startsWith("dummy");
  readings.sort((a, b) => last(a) - last(b) || labelOf(a).localeCompare(labelOf(b)));
  const head = [`measure at ${stage}`, "products per block", ...Object.values(statistics)];
  byId("ranking-part").hidden = readings.length === 0;
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
    name.textContent = labelOf(reading);
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

let resizing;
drawPicture();
makeSortable(byId("entries"));
if (byId("measures")) makeSortable(byId("measures"));
if (byId("models")) {
  const readings = [...new Set(Object.values(points).flatMap(Object.keys))];
  const rank = (reading) => (reading === JS0 ? 0 : leads(...reading.split(":")) ? 1 : 2);
  readings.sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
  fill(byId("reading"), readings.map((r) => [r, labelOf(r)]));
  const there = [...new Set(models.map((m) => m.family))].sort();
  for (const id of ["family", "scatter-family"]) fill(byId(id), there.map((f) => [f, f]));
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
}
addEventListener("resize", () => {
  clearTimeout(resizing);
  resizing = setTimeout(() => {
    drawPicture();
    if (byId("models")) drawScatter();
  }, 150);
});
