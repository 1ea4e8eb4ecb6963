// Two models, or one at two stages: numbers, scales, spectra and distances side by side.
"use strict";

const SIDES = { a: "#0072b2", b: "#d55e00" };
const cache = {};

// A page from file:// may not fetch; a script of data runs and leaves it in window.DATA.
function load(model) {
  cache[model] ??= new Promise((resolve, reject) => {
    const script = element("script", { src: `data/models/${model}.js` });
    script.onload = () => resolve(window.DATA);
    script.onerror = () => reject(new Error(`no data of ${model}`));
    document.head.append(script);
  });
  return cache[model];
}

function choose(select, values, wanted) {
  select.replaceChildren(...values.map((v) => new Option(v, v)));
  if (values.includes(wanted)) select.value = wanted;
}

function numbersOf({ data, stage }) {
  const sizes = (data.scales[stage] ?? []).filter((v) => v !== null).map(Math.log10);
  const heatmap = data.heatmaps[stage];
  return {
    "blocks": data.blocks.length,
    "mean distance between blocks": heatmap && d3.mean(pairsOf(heatmap)),
    "largest distance": heatmap && Math.max(...pairsOf(heatmap)),
    "spread of scale (sd of log₁₀ rms)": sizes.length > 1 ? d3.deviation(sizes) : undefined,
    ...Object.fromEntries(data.standing.map(({ label, value }) => [label, value])),
  };
}

function drawNumbers(sides) {
  const found = sides.map(numbersOf);
  const labels = [...new Set(found.flatMap(Object.keys))];
  byId("numbers").tBodies[0].replaceChildren(...labels.map((label) => element("tr", {},
    element("th", { scope: "row", textContent: label }),
    ...found.map((n) => element("td", { className: "number", textContent: n[label] === undefined ? "–" : minus(+n[label].toPrecision(3)) })))));
}

function drawOverlays(sides) {
  const [a, b] = sides;
  const same = a.model === b.model;
  const ours = sides.map(({ data, stage }, i) => ({ data, table: data.spectra[stage] ?? {}, colour: Object.values(SIDES)[i], dashed: i === 1 }));
  const keyOf = (block) => (same ? block.name : block.kind);
  const keys = [...new Set(ours.flatMap(({ data }) => data.blocks.map(keyOf)))];
  const extent = extentOf(ours.flatMap(({ table }) => Object.values(table)), a.data);
  byId("spectra-note").textContent = (same ? "A panel for each block." : "A panel for each kind of block, with all blocks of that kind.") +
    " Density (logarithmic) of the eigenvalues, each block's divided by their rms; the first solid, the second dashed.";
  drawPanels(byId("spectra"), keys.map((key) => () => spectrumFigure(key, ours.flatMap(({ data, table, colour, dashed }) =>
    data.blocks.filter((block) => keyOf(block) === key).map((block) => ({ packed: table[block.name], colour, dashed }))),
  extent, a.data, `of ${sides.map((s) => `${s.model} at ${s.stage}`).join(" and ")}`)));
}

function drawBoth(target, sides, draw) {
  const places = sides.map(({ model, stage }) => element("figure", {}, element("figcaption", { textContent: `${model} at ${stage}` }), element("div", { className: "chart" })));
  target.replaceChildren(...places);
  sides.forEach((side, i) => draw(places[i].lastChild, side));
}

async function draw() {
  const sides = await Promise.all(Object.keys(SIDES).map(async (key) => {
    const model = byId(`model-${key}`).value;
    const data = await load(model);
    const select = byId(`stage-${key}`);
    choose(select, Object.keys(data.spectra), select.value || select.dataset.wanted);
    return { model, data, stage: select.value };
  }));
  history.replaceState(null, "", `#${Object.keys(SIDES).map((key, i) => `${key}=${sides[i].model}:${sides[i].stage}`).join("&")}`);
  byId("said").textContent = `${sides.map((s) => `${s.model} at ${s.stage}`).join(" beside ")}.`;
  drawNumbers(sides);
  const sizes = sides.flatMap(({ data, stage }) => (data.scales[stage] ?? []).filter((v) => v !== null));
  const domain = sizes.length ? [d3.min(sizes) / 1.5, d3.max(sizes) * 1.5] : undefined;
  drawBoth(byId("scales"), sides, (target, { data, stage }) => drawScales(target, data, [stage], domain));
  drawOverlays(sides);
  const maps = sides.filter(({ data, stage }) => data.heatmaps[stage]);
  const top = Math.max(...maps.flatMap(({ data, stage }) => pairsOf(data.heatmaps[stage])), 0.001);
  drawBoth(byId("heatmaps"), maps, (target, { data, stage }) => drawHeatmap(target, data.heatmaps[stage], stage, top));
}

const asked = new URLSearchParams(location.hash.slice(1));
Object.keys(SIDES).forEach((key, i) => {
  const [model, stage] = (asked.get(key) ?? "").split(":");
  const select = byId(`model-${key}`);
  const names = [...select.options].map((o) => o.value);
  select.value = names.includes(model) ? model : names[Math.min(i, names.length - 1)];
  byId(`stage-${key}`).dataset.wanted = stage ?? "init";
  for (const id of [`model-${key}`, `stage-${key}`]) byId(id).addEventListener("change", draw);
});
if (byId("model-a").options.length) draw();
else byId("said").textContent = "No model has spectra yet.";
