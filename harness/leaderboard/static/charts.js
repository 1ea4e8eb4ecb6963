// Charts that the pages share: densities, scales of blocks, distances between them.
"use strict";

const STAGE_COLOURS = { init: "#56b4e9", p10: "#009e73", p25: "#e69f00", p50: "#d55e00", final: "#cc79a7" };
// Of `step-N`, the stages of one's own training: from dark to light as the names come.
const stageColour = (stage, i, count) => STAGE_COLOURS[stage] ?? `hsl(215 70% ${25 + (50 * i) / Math.max(count - 1, 1)}%)`;
const STYLE = { fontSize: "11px", background: "transparent" };
const byId = (id) => document.getElementById(id);
const minus = (text) => `${text}`.replace("-", "−");

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// 0.001, 1, 100, but 10⁴ and 10⁻⁵.
function power(t) {
  const exponent = Math.round(Math.log10(Math.abs(t)));
  if (Math.abs(exponent) < 4) return minus(+t.toPrecision(3));
  const raised = [...minus(exponent)].map((c) => (c === "−" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c])).join("");
  return `${t < 0 ? "−" : ""}10${raised}`;
}

const isPower = (t) => Math.abs(Math.log10(Math.abs(t)) % 1) < 1e-9;

// What all names begin with, and ".weight", tell nothing.
function shortNames(names) {
  const parts = names.map((name) => name.replace(/\.weight$/, "").split("."));
  let shared = 0;
  const same = (i) => parts.every((p) => p.length > i + 1 && p[i] === parts[0][i]);
  while (names.length > 1 && same(shared)) shared += 1;
  return new Map(names.map((name, i) => [name, parts[i].slice(shared).join(".")]));
}

// A name of at most so many letters: layers' numbers and the end tell names apart, and tips have the whole.
function cropped(name, letters) {
  const parts = name.split(".");
  for (let i = 0; i < parts.length - 1 && parts.join(".").length > letters; i += 1) {
    if (!/^\d/.test(parts[i])) parts[i] = parts[i].slice(0, 1);
  }
  const short = parts.join(".");
  return short.length > letters ? `…${short.slice(1 - letters)}` : short;
}

// -- densities

function curve(packed, bins) {
  const [first, ...values] = packed;
  return values.map((v, i) => ({ x: Math.sinh((first + i + 0.5) / bins), y: v === null ? NaN : 10 ** (v / 100) }));
}

function extentOf(packs, { bins_per_unit: bins, floor }) {
  let [low, high, top] = [-1, 1, 1];
  for (const [first, ...values] of packs) {
    if (!values.length) continue;
    low = Math.min(low, Math.sinh(first / bins));
    high = Math.max(high, Math.sinh((first + values.length) / bins));
    top = Math.max(top, ...values.map((v) => (v === null ? 0 : 10 ** (v / 100))));
  }
  return { x: [low, high], y: [floor, 1.5 * top] };
}

// 0 and powers of ten, as many as have room beside each other.
function ticksOf([low, high], pixels) {
  const place = (t) => Math.log1p(t);
  const unit = pixels / (place(high) + place(-low));
  const ticks = [0];
  for (const [sign, end] of [[1, high], [-1, -low]]) {
    let last = 0;
    for (let t = 1; t <= end; t *= 10) {
      if (place(t) * unit - last < 32) continue;
      ticks.push(sign * t);
      last = place(t) * unit;
    }
  }
  return ticks;
}

// Lines are {packed, colour, dashed}.
function spectrumFigure(title, lines, extent, { bins_per_unit: bins, floor }, said) {
  const figure = element("figure", {}, element("figcaption", { textContent: title }));
  const drawn = lines.filter(({ packed }) => packed?.length > 1);
  if (!drawn.length) {
    figure.append("no spectrum at these stages, or exactly zero");
    return figure;
  }
  const one = drawn.length <= 3;
  figure.append(Plot.plot({
    width: 260,
    height: 150,
    marginLeft: 46,
    marginRight: 14,
    marginBottom: 22,
    marginTop: 8,
    style: STYLE,
    x: { type: "symlog", domain: extent.x, ticks: ticksOf(extent.x, 200), tickFormat: (t) => (t ? power(t) : "0"), label: null },
    y: { type: "log", domain: extent.y, ticks: 4, tickFormat: (t) => (isPower(t) ? power(t) : ""), label: null, clamp: true },
    ariaLabel: `Spectral density of ${title} ${said}`,
    marks: [
      Plot.ruleX([0], { strokeOpacity: 0.2 }),
      ...drawn.flatMap(({ packed, colour, dashed }) => {
        const line = curve(packed, bins);
        const stroke = Plot.lineY(line, { x: "x", y: "y", stroke: colour, strokeWidth: one ? 1.2 : 0.8,
          strokeDasharray: dashed ? "4 2" : null });
        return one ? [Plot.areaY(line, { x: "x", y1: floor, y2: "y", fill: colour, fillOpacity: 0.14 }), stroke] : [stroke];
      }),
    ],
  }));
  return figure;
}

// Models have up to hundreds of blocks: a panel is drawn when it comes near the window.
function drawPanels(target, panels) {
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((e) => e.isIntersecting)) {
      watcher.unobserve(entry.target);
      entry.target.replaceWith(panels[entry.target.dataset.index]());
    }
  }, { rootMargin: "400px" });
  target.replaceChildren(...panels.map((_, i) => {
    const place = element("figure");
    place.dataset.index = i;
    return place;
  }));
  for (const place of [...target.children]) watcher.observe(place);
}

// -- scales of the blocks

function drawScales(target, data, stages, domain) {
  const { blocks, scales, kinds } = data;
  const known = stages.filter((stage) => scales[stage]);
  if (!known.length) {
    target.replaceChildren(element("p", { className: "note", textContent: "The scales of these blocks are not known." }));
    return;
  }
  const points = known.flatMap((stage) => blocks
    .map((b, i) => ({ ...b, stage, value: scales[stage][i], open: stage !== known[0] }))
    .filter((p) => p.value !== null));
  const names = blocks.map((b) => b.name);
  const short = shortNames(names);
  const row = names.length > 60 ? 6 : names.length > 30 ? 12 : 16;
  const width = Math.max(280, Math.min(target.clientWidth || 700, 900));
  const longest = Math.max(...[...short.values()].map((n) => n.length));
  const margin = row < 12 ? 12 : Math.min(6.4 * longest + 12, width * 0.55);
  const present = Object.keys(kinds).filter((kind) => blocks.some((b) => b.kind === kind));
  const color = { domain: present, range: present.map((kind) => kinds[kind]) };
  const named = (p) => `${p.name} (${p.kind})\n${p.stage}: ${p.value.toPrecision(3)}`;
  const shared = { x: "value", y: "name", stroke: "kind", r: row < 12 ? 2.5 : 4 };
  const chart = Plot.plot({
    width,
    height: row * names.length + 50,
    marginLeft: margin,
    marginRight: 24,
    marginBottom: 36,
    marginTop: 8,
    style: STYLE,
    color,
    x: { type: "log", domain, label: "rms eigenvalue →", grid: true, ticks: Math.round((width - margin) / 70), tickFormat: (t) => (isPower(t) ? power(t) : "") },
    y: { type: "band", domain: names, label: null, axis: row < 12 ? null : "left", tickSize: 0, tickFormat: (name) => cropped(short.get(name), Math.floor((margin - 12) / 6.4)) },
    ariaLabel: `rms eigenvalue of each of ${names.length} blocks at ${known.join(" and ")}`,
    marks: [
      Plot.ruleY(points, Plot.groupY({ x1: "min", x2: "max" }, { x1: "value", x2: "value", y: "name", strokeOpacity: 0.3 })),
      Plot.dot(points.filter((p) => !p.open), { ...shared, fill: "kind" }),
      Plot.dot(points.filter((p) => p.open), { ...shared, fill: "none" }),
      Plot.tip(points, Plot.pointer({ x: "value", y: "name", title: named, maxRadius: 20 })),
    ],
  });
  target.replaceChildren(Plot.legend({ color: { ...color, type: "categorical" }, style: STYLE }), chart);
}

// -- distances

function pairsOf({ values }) {
  return values.flatMap((row, i) => row.slice(0, i)).map((v) => v / 1000);
}

function drawHeatmap(target, heatmap, stage, top = Math.max(...pairsOf(heatmap), 0.001)) {
  const { blocks: names, values } = heatmap;
  const short = shortNames(names);
  const cells = names.flatMap((a, i) => names.map((b, j) => ({ a, b, value: values[i][j] / 1000 })));
  const font = names.length > 40 ? 8 : 11;
  const margin = font * 0.62 * Math.max(...[...short.values()].map((n) => n.length)) + 14;
  const room = Math.min(target.clientWidth || 700, 900);
  const side = Math.max(font + 1, Math.min(28, (room - margin - 24) / names.length));
  const size = Math.round(side * names.length);
  const style = { ...STYLE, fontSize: `${font}px` };
  const chart = Plot.plot({
    width: size + margin + 24,
    height: size + margin + 10,
    marginLeft: margin,
    marginBottom: margin,
    marginTop: 10,
    marginRight: 24,
    padding: 0,
    style,
    x: { domain: names, tickRotate: -90, label: null, tickFormat: (n) => short.get(n) },
    y: { domain: names, label: null, tickFormat: (n) => short.get(n) },
    color: { scheme: "cividis", domain: [0, top] },
    ariaLabel: `Distances between the blocks at ${stage}, mean ${d3.mean(pairsOf(heatmap)).toFixed(3)}`,
    marks: [Plot.cell(cells, { x: "a", y: "b", fill: "value", tip: true, title: (c) => `${c.a}\n${c.b}\n${c.value.toFixed(3)}` })],
  });
  const legend = chart.legend("color", { label: "Jensen-Shannon distance", width: 280, marginLeft: 24, marginRight: 24, ticks: 4, tickFormat: (t) => `${+t.toPrecision(2)}`, style: STYLE });
  target.replaceChildren(legend, chart);
}
