// A model's page: spectra per block over stages, distances between blocks, training curves.
"use strict";

const { blocks, spectra, heatmaps, full, curves, bins_per_unit: BINS, floor: FLOOR } = window.DATA;
const byId = (id) => document.getElementById(id);
const STAGES = ["init", "p10", "p25", "p50", "final"];
const COLOURS = { init: "#56b4e9", p10: "#009e73", p25: "#e69f00", p50: "#d55e00", final: "#cc79a7" };
const STYLE = { fontSize: "11px", background: "transparent" };

// -- spectra

function curve(packed, stage) {
  const [first, ...values] = packed;
  return values.map((v, i) => ({
    stage,
    x: Math.sinh((first + i + 0.5) / BINS),
    y: v === null ? NaN : 10 ** (v / 100),
  }));
}

function extentOf(tables) {
  let [low, high, top] = [-1, 1, 1];
  for (const table of tables) {
    for (const [first, ...values] of Object.values(table)) {
      if (!values.length) continue;
      low = Math.min(low, Math.sinh(first / BINS));
      high = Math.max(high, Math.sinh((first + values.length) / BINS));
      top = Math.max(top, ...values.map((v) => (v === null ? 0 : 10 ** (v / 100))));
    }
  }
  return { x: [low, high], y: [FLOOR, 1.5 * top] };
}

function ticksOf([low, high]) {
  const ticks = [0];
  for (let t = 1; t < high; t *= 10) ticks.push(t);
  for (let t = 1; t < -low; t *= 10) ticks.push(-t);
  const size = Math.max(high, -low);
  return size < 200 ? ticks : ticks.filter((t) => t === 0 || Math.round(Math.log10(Math.abs(t))) % 2 === 0);
}

function spectrumFigure(title, table, name, extent, chosen) {
  const lines = chosen.filter((stage) => table[stage]?.[name]?.length > 1)
    .map((stage) => curve(table[stage][name], stage));
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  caption.textContent = title;
  figure.append(caption);
  if (!lines.length) {
    figure.append("no spectrum at these stages, or exactly zero");
    return figure;
  }
  figure.append(Plot.plot({
    width: 260,
    height: 150,
    marginLeft: 46,
    marginBottom: 22,
    marginTop: 8,
    style: STYLE,
    x: { type: "symlog", domain: extent.x, ticks: ticksOf(extent.x), tickFormat: (t) => `${t}`.replace("-", "−"), label: null },
    y: { type: "log", domain: extent.y, ticks: 4, tickFormat: (t) => (Number.isInteger(Math.log10(t)) ? `${t}` : ""), label: null, clamp: true },
    ariaLabel: `Spectral density of ${title} at ${chosen.join(", ")}`,
    marks: [
      Plot.ruleX([0], { strokeOpacity: 0.2 }),
      ...lines.flatMap((line) => [
        Plot.areaY(line, { x: "x", y1: FLOOR, y2: "y", fill: COLOURS[line[0].stage], fillOpacity: 0.14 }),
        Plot.lineY(line, { x: "x", y: "y", stroke: COLOURS[line[0].stage], strokeWidth: 1.2 }),
      ]),
    ],
  }));
  return figure;
}

function drawSpectra() {
  const chosen = [...document.querySelectorAll("#stages input:checked")].map((box) => box.value);
  const extent = extentOf(Object.values(spectra));
  const panels = blocks.map((b) => () => spectrumFigure(`${b.name} (${b.kind})`, spectra, b.name, extent, chosen));
  if (Object.keys(full).length) {
    const table = Object.fromEntries(Object.entries(full).map(([stage, packed]) => [stage, { all: packed }]));
    const range = extentOf(Object.values(table));
    panels.push(() => spectrumFigure("full Hessian: all parameters as one block", table, "all", range, chosen));
  }
  const target = byId("spectra");
  // Models have up to hundreds of blocks: a panel is drawn when it comes near the window.
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((e) => e.isIntersecting)) {
      watcher.unobserve(entry.target);
      entry.target.replaceWith(panels[entry.target.dataset.index]());
    }
  }, { rootMargin: "400px" });
  target.replaceChildren(...panels.map((_, i) => {
    const place = document.createElement("figure");
    place.dataset.index = i;
    return place;
  }));
  for (const place of [...target.children]) watcher.observe(place);
}

// -- distances

function drawHeatmap() {
  const stage = byId("heatmap-stage").value;
  const { blocks: names, values } = heatmaps[stage];
  const cells = names.flatMap((a, i) => names.map((b, j) => ({ a, b, value: values[i][j] / 1000 })));
  const pairs = values.flatMap((row, i) => row.slice(0, i));
  const mean = pairs.reduce((sum, v) => sum + v, 0) / pairs.length / 1000;
  byId("heatmap-note").textContent = "Jensen-Shannon distance of every pair of blocks, 0 where two spectra have " +
    `the same shape and at most 1. At ${stage} their mean is ${mean.toFixed(3)}; the largest is ` +
    `${(Math.max(...pairs) / 1000).toFixed(3)}.`;
  const target = byId("heatmap");
  const room = target.clientWidth || 700;
  const margin = Math.min(7 * Math.max(...names.map((n) => n.length)) + 12, room * 0.4);
  const side = Math.max(8, Math.min(28, (Math.min(room, 900) - margin - 20) / names.length));
  const size = Math.round(side * names.length);
  const cut = (name) => (name.length * 6.2 > margin ? `…${name.slice(-Math.floor(margin / 6.4))}` : name);
  const chart = Plot.plot({
    width: size + margin + 20,
    height: size + margin + 10,
    marginLeft: margin,
    marginBottom: margin,
    marginTop: 10,
    marginRight: 20,
    padding: 0,
    style: STYLE,
    x: { domain: names, tickRotate: -90, label: null, tickFormat: cut },
    y: { domain: names, label: null, tickFormat: cut },
    color: { scheme: "cividis", domain: [0, Math.max(...pairs, 1) / 1000] },
    ariaLabel: `Distances between the blocks at ${stage}, mean ${mean.toFixed(3)}`,
    marks: [Plot.cell(cells, { x: "a", y: "b", fill: "value", tip: true, title: (c) => `${c.a}\n${c.b}\n${c.value.toFixed(3)}` })],
  });
  target.replaceChildren(chart.legend("color", { label: "Jensen-Shannon distance", width: 240, style: STYLE }), chart);
}

// -- training curves

function drawCurves() {
  const starts = curves.map((c) => c.losses[0]).filter(Number.isFinite);
  const every = curves.filter((c) => !c.diverged).flatMap((c) => c.losses).filter((v) => v > 0);
  const domain = [0.9 * Math.min(...every), 1.3 * Math.max(...starts)];
  const target = byId("curves");
  const figures = [["sgd", "SGD with momentum", "#0072b2"], ["adamw", "AdamW", "#d55e00"]].map(([optimizer, title, colour]) => {
    const ours = curves.filter((c) => c.optimizer === optimizer);
    const best = ours.find((c) => c.best);
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = title + (best ? `, best at learning rate ${best.lr}` : "");
    const points = ours.flatMap((c) => c.steps.map((step, i) => ({ step, loss: c.losses[i], lr: c.lr, best: c.best })));
    figure.append(caption, Plot.plot({
      width: 480,
      height: 300,
      style: STYLE,
      x: { label: "step →" },
      y: { type: "log", domain, label: "↑ loss of the minibatch", clamp: true, grid: true, ticks: 5, tickFormat: (t) => `${+t.toPrecision(2)}` },
      ariaLabel: `Training curves of ${title} at learning rates ${ours.map((c) => c.lr).join(", ")}`,
      marks: [
        Plot.lineY(points.filter((p) => !p.best), { x: "step", y: "loss", z: "lr", stroke: colour, strokeOpacity: 0.45, strokeWidth: 1 }),
        Plot.lineY(points.filter((p) => p.best), { x: "step", y: "loss", z: "lr", stroke: colour, strokeWidth: 2.4 }),
        Plot.tip(points, Plot.pointer({ x: "step", y: "loss", title: (p) => `learning rate ${p.lr}\nstep ${p.step}\nloss ${p.loss}`, maxRadius: 20 })),
      ],
    }));
    return figure;
  });
  target.replaceChildren(...figures);
}

if (byId("spectra")) {
  drawSpectra();
  byId("stages").addEventListener("change", drawSpectra);
}
if (byId("heatmap")) {
  drawHeatmap();
  byId("heatmap-stage").addEventListener("change", drawHeatmap);
}
if (byId("curves")) drawCurves();
