// A model's page: its place among others, its blocks, their distances, its training.
"use strict";

const { blocks, spectra, heatmaps, full, training, scales, standing } = window.DATA;
const OPTIMIZERS = { sgd: ["SGD with momentum", "#0072b2"], adamw: ["AdamW", "#d55e00"] };

function drawStanding() {
  byId("standing").replaceChildren(...standing.map(({ label, value, others, smaller }) => {
    const log = value > 0 && others.every((v) => v > 0);
    const width = Math.max(280, Math.min(byId("standing").clientWidth || 700, 900));
    const said = `${label}: ${minus(+value.toPrecision(3))}, larger than in ${smaller} of ${others.length} others`;
    return element("figure", { className: "strip" }, element("figcaption", { textContent: said }), Plot.plot({
      width,
      height: 52,
      marginLeft: 16,
      marginRight: 24,
      marginBottom: 24,
      marginTop: 2,
      style: STYLE,
      x: { type: log ? "log" : "linear", label: null, nice: true, ticks: log ? 4 : 6, tickFormat: (t) => minus(+t.toPrecision(3)) },
      ariaLabel: said,
      marks: [
        Plot.tickX(others, { x: (v) => v, strokeOpacity: 0.45 }),
        Plot.dot([value], { x: (v) => v, r: 6, fill: "#d55e00", stroke: "currentColor" }),
      ],
    }));
  }));
}

function drawSpectra() {
  const chosen = [...document.querySelectorAll("#stages input:checked")].map((box) => box.value);
  const extent = extentOf(Object.values(spectra).flatMap(Object.values), window.DATA);
  const said = `at ${chosen.join(", ")}`;
  const lines = (of) => chosen.map((stage, i) => ({ packed: of(stage), colour: stageColour(stage, i, chosen.length) }));
  const panels = blocks.map((b) => () =>
    spectrumFigure(`${b.name} (${b.kind})`, lines((stage) => spectra[stage]?.[b.name]), extent, window.DATA, said));
  if (Object.keys(full).length) {
    const range = extentOf(Object.values(full), window.DATA);
    panels.push(() => spectrumFigure("full Hessian: all parameters as one block", lines((stage) => full[stage]), range, window.DATA, said));
  }
  drawPanels(byId("spectra"), panels);
}

// Which blocks make the mean, and where a reading by λ10 depends on the probes.
function whoMakesIt({ extreme, without, inner, at_gap: atGap }) {
  const parts = [];
  if (extreme) parts.push(`Without ${extreme}, the most extreme block, the mean is ${without.toFixed(3)}.`);
  if (inner !== null) parts.push(`Without embeddings, positions and heads it is ${inner.toFixed(3)}.`);
  if (atGap.length) parts.push(`λ10 lies at a gap of the spectrum of ${atGap.join(", ")}: readings by it depend on the probes there.`);
  return parts.map((part) => ` ${part}`).join("");
}

function drawDistances() {
  const stage = byId("heatmap-stage").value;
  const pairs = pairsOf(heatmaps[stage]);
  byId("heatmap-note").textContent = "Jensen-Shannon distance of every pair of blocks, 0 where two spectra have " +
    `the same shape and at most 1. At ${stage} their mean is ${d3.mean(pairs).toFixed(3)}; the largest is ` +
    `${Math.max(...pairs).toFixed(3)}.${whoMakesIt(heatmaps[stage].readings)}`;
  drawHeatmap(byId("heatmap"), heatmaps[stage], stage);
}

// -- training

// A logarithmic axis of less than a factor of ten has few ticks of its own.
const lossAxis = ([low, high]) => ({ type: "log", domain: [low, high], clamp: true, grid: true,
  ticks: high / low < 10 ? d3.ticks(low, high, 6) : 5, tickFormat: (t) => `${+t.toPrecision(2)}` });
const pointsOf = (runs) => runs.flatMap((r) => r.steps.map((step, i) => ({ ...r, step, loss: r.losses[i] })));

function domainOf(runs) {
  const starts = runs.map((r) => r.losses[0]).filter(Number.isFinite);
  const every = pointsOf(runs).filter((p) => !p.diverged && p.loss > 0).map((p) => p.loss);
  return [0.9 * Math.min(...every), 1.2 * Math.max(...starts)];
}

function saidOf(optimizer) {
  const runs = training.tuned.filter((r) => r.optimizer === optimizer);
  if (!runs.length) return `${OPTIMIZERS[optimizer][0]}: no run yet`;
  const fixed = training.ends.filter((e) => e.optimizer === optimizer).map((e) => e.loss);
  const ends = fixed.length ? fixed : runs.map((r) => r.losses.at(-1));
  const spread = ends.length > 1 ? ` ± ${d3.deviation(ends).toPrecision(2)}` : "";
  const where = ends.length > 1 ? `${ends.length} seeds` : "one seed";
  const lost = training.diverged[optimizer];
  return `${OPTIMIZERS[optimizer][0]} at its best learning rate, ${runs[0].lr}, ends at ${d3.mean(ends).toPrecision(3)}${spread} (${where})` +
    (lost ? `; it diverged at ${lost.join(", ")}` : "");
}

function drawTuned() {
  const { tuned, ends, loss } = training;
  const points = pointsOf(tuned);
  const mean = Object.keys(OPTIMIZERS).flatMap((optimizer) =>
    [...d3.rollup(points.filter((p) => p.optimizer === optimizer), (ps) => d3.mean(ps, (p) => p.loss), (p) => p.step)]
      .map(([step, value]) => ({ optimizer, step, loss: value })));
  const last = d3.max(points, (p) => p.step);
  const names = Object.keys(OPTIMIZERS);
  const target = byId("tuned");
  byId("tuned-note").textContent = `The ${loss}: thin a seed, thick their mean` +
    (ends.length ? "; dots the last loss on a fixed training subset" : "") + `. ${names.map(saidOf).join(". ")}.`;
  const [low, high] = domainOf(tuned);
  target.replaceChildren(Plot.plot({
    width: Math.max(300, Math.min(target.clientWidth || 700, 900)),
    height: 320,
    marginRight: 70,
    marginLeft: 46,
    marginBottom: 36,
    style: STYLE,
    color: { domain: names, range: names.map((o) => OPTIMIZERS[o][1]) },
    x: { label: "step →", domain: [0, last] },
    y: { ...lossAxis([Math.min(low, 0.95 * (d3.min(ends, (e) => e.loss) ?? low)), high]), label: "↑ loss" },
    ariaLabel: `Losses of tuned SGD and AdamW. ${names.map(saidOf).join(". ")}`,
    marks: [
      Plot.lineY(points, { x: "step", y: "loss", z: (p) => `${p.optimizer}${p.seed}`, stroke: "optimizer", strokeOpacity: 0.4, strokeWidth: 0.8 }),
      ...names.map((o) => Plot.lineY(mean.filter((p) => p.optimizer === o), { x: "step", y: "loss", stroke: "optimizer",
        strokeWidth: 2.2, strokeDasharray: o === "sgd" ? "6 3" : null })),
      Plot.dot(ends, { x: () => last, y: "loss", stroke: "optimizer", r: 4, clip: false }),
      Plot.text(mean, Plot.selectLast({ x: "step", y: "loss", z: "optimizer", fill: "optimizer", text: (p) => (p.optimizer === "sgd" ? "SGD" : "AdamW"),
        textAnchor: "start", dx: 10, fontWeight: 600, fontSize: 12 })),
    ],
  }));
}

function drawGrid() {
  const domain = domainOf(training.grid);
  byId("curves").replaceChildren(...Object.entries(OPTIMIZERS).map(([optimizer, [title, colour]]) => {
    const ours = training.grid.filter((c) => c.optimizer === optimizer);
    const best = ours.find((c) => c.best);
    const lost = training.diverged[optimizer];
    const text = title + (best ? `, best at learning rate ${best.lr}` : "") + (lost ? `, diverged at ${lost.join(", ")}` : "");
    const points = pointsOf(ours);
    return element("figure", {}, element("figcaption", { textContent: text }), Plot.plot({
      width: 480,
      height: 300,
      style: STYLE,
      x: { label: "step →" },
      y: { ...lossAxis(domain), label: "↑ loss" },
      ariaLabel: `Training curves of ${title} at learning rates ${ours.map((c) => c.lr).join(", ")}`,
      marks: [
        Plot.lineY(points.filter((p) => !p.best), { x: "step", y: "loss", z: "lr", stroke: colour, strokeOpacity: 0.45, strokeWidth: 1 }),
        Plot.lineY(points.filter((p) => p.best), { x: "step", y: "loss", z: "lr", stroke: colour, strokeWidth: 2.4 }),
        Plot.tip(points, Plot.pointer({ x: "step", y: "loss", title: (p) => `learning rate ${p.lr}\nstep ${p.step}\nloss ${p.loss}`, maxRadius: 20 })),
      ],
    }));
  }));
}

if (byId("standing")) drawStanding();
if (byId("scales")) drawScales(byId("scales"), window.DATA, Object.keys(scales).filter((s, i, all) => !i || i === all.length - 1));
if (byId("spectra")) {
  drawSpectra();
  byId("stages").addEventListener("change", drawSpectra);
}
if (byId("heatmap")) {
  drawDistances();
  byId("heatmap-stage").addEventListener("change", drawDistances);
}
if (byId("curves")) {
  drawTuned();
  drawGrid();
}
