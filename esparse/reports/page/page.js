"use strict";
// What the page does: sort, filter, fold out, compare, draw. Its data are gzipped JSON in <script> elements, since text
// in a page of hundreds of runs would be several times as large.

const find = (selector, within = document) => within.querySelector(selector);
const findAll = (selector, within = document) => [...within.querySelectorAll(selector)];

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

async function unpacked(id) {
  const element = document.getElementById(id);
  if (!element) return null;
  const bytes = Uint8Array.from(atob(element.textContent), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

// ---- The table: numbers by size, text by its words and numbers; what is not there stays at the end, whichever way.

const natural = (a, b) => a.localeCompare(b, "en", { numeric: true });
const detailsOf = (row) => (row.nextElementSibling?.classList.contains("details") ? row.nextElementSibling : null);

function sortBy(head) {
  const table = head.closest("table"), i = head.cellIndex, down = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const compare = head.classList.contains("number") ? (a, b) => Number(a) - Number(b) : natural;
  const within = "within" in head.dataset;
  const rows = [...table.tBodies[0].rows].filter((row) => !row.classList.contains("details"));
  const details = new Map(rows.map((row) => [row, detailsOf(row)]));
  rows.sort((a, b) => {
    const apart = within ? natural(a.dataset.scored ?? "", b.dataset.scored ?? "") : 0;
    if (apart) return apart;
    const x = a.cells[i].dataset.value, y = b.cells[i].dataset.value;
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    return down ? compare(y, x) : compare(x, y);
  });
  for (const row of rows) table.tBodies[0].append(row, ...[details.get(row) ?? []].flat());
  if (table === runs) {
    const metrics = new Set(rows.map((row) => row.dataset.scored));
    say(within && metrics.size > 1 ? "Sorted within each metric: each has a score of its own, not to be compared." : "");
  }
}

const runs = find("#table table"), area = find("#table"), count = find("#count"), hint = find("#hint");
const say = (text) => (hint.textContent = text);
const runRows = () => findAll("tr.run", runs);
const idsOf = (row) => (row.dataset.runs ? row.dataset.runs.split(" ") : []);

document.addEventListener("click", (event) => {
  const button = event.target.closest("th button");
  if (button) sortBy(button.closest("th"));
});

let facts = null, pictures = [];

function filter() {
  const words = find("input[type=search]").value.toLowerCase().split(/\s+/).filter(Boolean);
  let left = 0;
  for (const row of runRows()) {
    const cells = [...row.cells].map((cell) => cell.textContent.toLowerCase());
    row.hidden = !words.every((word) => cells.some((text) => text.includes(word)));
    if (detailsOf(row)) detailsOf(row).hidden = row.hidden;
    left += !row.hidden;
  }
  count.value = words.length ? `${left} of ${runRows().length} rows` : "";
}

let waiting = 0;
find("input[type=search]").addEventListener("input", () => {
  filter();
  clearTimeout(waiting);
  waiting = setTimeout(drawAll, 150);
});
find(".every input").addEventListener("change", (event) => area.classList.toggle("whole", event.target.checked));

// ---- What stands behind a row.

function listOf(pairs) {
  return make("dl", {}, ...pairs.flatMap(([label, text]) => [make("dt", {}, label), make("dd", {}, text)]));
}

function tableOf(heads, rows, name) {
  const head = heads.map(([text, number]) =>
    make("th", { scope: "col", ...(number && { class: "number" }) }, make("button", { type: "button" }, text)));
  const body = rows.map((row) => make("tr", {}, ...row.map((value, i) => {
    const cell = make("td", heads[i][1] ? { class: "number" } : {}, value === null ? "" : String(value));
    if (value !== null) cell.dataset.value = value;
    return cell;
  })));
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body));
  return make("div", { class: "wide", tabindex: "0", role: "region", "aria-label": name }, table);
}

const LAYER = [["density", "density"], ["relative_error", "error"], ["kept_score", "kept"], ["seconds", "seconds"]];

function layersOf(run) {
  const { names, shapes } = facts.shapes[run.layers.of];
  const columns = LAYER.filter(([field]) => run.layers[field]);
  const heads = [["layer", false], ["shape", false], ...(run.layers.pattern ? [["pattern", false]] : [])];
  const rows = names.map((name, i) => [
    name, shapes[i], ...(run.layers.pattern ? [run.layers.pattern[i]] : []), ...columns.map(([f]) => run.layers[f][i]),
  ]);
  return tableOf([...heads, ...columns.map(([, text]) => [text, true])], rows, `layers of ${run.name}`);
}

function behind(id) {
  const run = facts.runs[id], part = make("section", {});
  part.append(make("h3", {}, run.name, " ", make("span", { class: "dim" }, id)));
  if (run.links.length)
    part.append(make("p", { class: "links" }, ...run.links.map(([text, href]) => make("a", { href }, text))));
  const own = Object.entries(run.settings), parts = [["Run", run.facts], ["Measured", Object.entries(run.measured)]];
  if (own.length) parts.push(["Settings in which runs of this page differ", own]);
  const columns = parts.map(([title, pairs]) => make("div", {}, make("h4", {}, title), listOf(pairs)));
  part.append(make("div", { class: "facts" }, ...columns));
  const shared = make("details", {}, make("summary", {}, "Settings that all of them share"));
  shared.append(listOf(Object.entries(facts.shared)));
  part.append(make("h4", {}, shared));
  if (run.layers) part.append(make("h4", {}, "Layers"), layersOf(run));
  return part;
}

function fold(row, button) {
  const open = button.getAttribute("aria-expanded") === "true";
  button.setAttribute("aria-expanded", String(!open));
  if (open) return detailsOf(row)?.remove();
  const inside = make("div", { class: "inside" }, ...idsOf(row).filter((id) => facts.runs[id]).map(behind));
  row.after(make("tr", { class: "details" }, make("td", { colspan: row.cells.length }, inside)));
}

runs.addEventListener("click", (event) => {
  const button = event.target.closest("button.fold");
  if (button) fold(button.closest("tr"), button);
});
const measure = () => area.style.setProperty("--sight", `${area.clientWidth}px`);
new ResizeObserver(measure).observe(area);
measure();

// ---- What differs between ticked runs.

function compare() {
  const ids = findAll("input.compare:checked", runs).flatMap((box) => idsOf(box.closest("tr")));
  const place = find("#differences");
  place.replaceChildren();
  if (!ids.length) return;
  if (ids.length < 2) return place.append(make("p", {}, "Tick another run to see what differs between the two."));
  const chosen = ids.map((id) => facts.runs[id]), alike = new Set(chosen.map((run) => run.scored)).size === 1;
  const rows = [];
  const add = (part, valuesOf) => {
    const labels = [...new Set(chosen.flatMap((run) => Object.keys(valuesOf(run))))];
    for (const label of labels) {
      if (label === "kept" && !alike) continue;
      const values = chosen.map((run) => valuesOf(run)[label] ?? "");
      if (new Set(values).size > 1) rows.push([part, label, ...values]);
    }
  };
  add("setting", (run) => run.settings);
  add("measured", (run) => run.measured);
  add("run", (run) => Object.fromEntries(run.facts));
  const heads = [["", false], ["", false], ...chosen.map((run, i) => [`${run.name} ${ids[i]}`, false])];
  place.append(make("h3", {}, `What differs between ${ids.length} runs`), tableOf(heads, rows, "differences"));
  for (const button of findAll("th button", place)) button.replaceWith(button.textContent);
  if (!alike) place.append(make("small", {}, "Kept scores are left out: their metrics differ, and each has a score of its own."));
}

runs.addEventListener("change", (event) => event.target.matches("input.compare") && compare());

// ---- Figures. Colors: Okabe and Ito's and some of Tol's; on dark ground lighter ones of the same hues.

const COLORS = {
  light: ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#2D9BD8", "#666666", "#332288", "#117733", "#882255"],
  dark: ["#4DA9E0", "#FF8A3D", "#2CC79A", "#E79BC4", "#E6B422", "#8CCBF2", "#A9B1B8", "#A99BEF", "#6CBF84", "#D780AC"],
};
const SHAPES = [
  "M-1,0A1,1,0,1,1,1,0A1,1,0,1,1,-1,0Z", "M-.9,-.9L.9,-.9L.9,.9L-.9,.9Z", "M0,-1.25L1.25,0L0,1.25L-1.25,0Z",
  "M0,-1.15L1.15,.9L-1.15,.9Z", "M0,1.15L1.15,-.9L-1.15,-.9Z",
  "M-.4,-1.1L.4,-1.1L.4,-.4L1.1,-.4L1.1,.4L.4,.4L.4,1.1L-.4,1.1L-.4,.4L-1.1,.4L-1.1,-.4L-.4,-.4Z",
  "M-1.1,-.55L-.55,-1.1L0,-.55L.55,-1.1L1.1,-.55L.55,0L1.1,.55L.55,1.1L0,.55L-.55,1.1L-1.1,.55L-.55,0Z",
  "M0,-1.3L.35,-.45L1.25,-.4L.55,.17L.8,1.05L0,.55L-.8,1.05L-.55,.17L-1.25,-.4L-.35,-.45Z",
];
const CHARTS = 24; // of a picture, at most
const dark = matchMedia("(prefers-color-scheme: dark)");
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function theme() {
  const ink = css("--ink"), line = css("--line"), dim = css("--dim");
  return {
    background: "transparent",
    font: "system-ui, sans-serif",
    view: { stroke: null },
    axis: { labelColor: ink, titleColor: dim, gridColor: line, domainColor: dim, tickColor: dim, titleFontWeight: "normal",
      labelFontSize: 11, titleFontSize: 11, gridOpacity: 0.6 },
    rule: { color: ink }, tick: { color: ink }, text: { color: ink }, line: { color: ink },
  };
}

const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;

function grouped(rows, key) {
  const groups = new Map();
  for (const row of rows) groups.set(row[key], [...(groups.get(row[key]) ?? []), row]);
  return groups;
}

// The methods of a chart, the best first: by the mean of a field over runs, of several patterns the best one's.
function ranked(rows, field, best) {
  const sign = best === "max" ? -1 : 1, of = new Map();
  for (const [method, own] of grouped(rows.filter((row) => row.method !== undefined), "method")) {
    const means = [...grouped(own, "label").values()].map((g) => mean(g.map((row) => row[field] ?? sign * Infinity)));
    of.set(method, Math.min(...means.map((value) => sign * value)));
  }
  return [...of.keys()].sort((a, b) => of.get(a) - of.get(b) || natural(a, b));
}

// Of many methods those whose places in all charts are best, since more lines than that cannot be told apart.
function chosen(picture, charts) {
  const { n, field, best, runs: one, each } = picture.few ?? {};
  if (one) {
    const first = charts.flatMap((rows) => rows.map((row) => row.run))[0];
    return [charts.map((rows) => rows.filter((row) => row.run === first)), ""];
  }
  if (!field) return [charts, ""];
  const which = `${n} ${best === "min" ? "lowest" : "highest"}`;
  if (each) {
    const orders = charts.map((rows) => ranked(rows, field, best));
    const of = charts.map((rows, i) => rows.filter((row) => orders[i].slice(0, n).includes(row.method)));
    return [of, orders.some((order) => order.length > n) ? `In each panel the ${which} at most.` : ""];
  }
  const places = new Map();
  for (const rows of charts) {
    const order = ranked(rows, field, best);
    order.forEach((method, i) => places.set(method, [...(places.get(method) ?? []), i / order.length]));
  }
  if (places.size <= n) return [charts, ""];
  const ahead = [...places.keys()].sort((a, b) => mean(places.get(a)) - mean(places.get(b))).slice(0, n);
  return [charts.map((rows) => rows.filter((row) => ahead.includes(row.method))), `The ${which} of ${places.size} methods.`];
}

function legendOf(picture, rows, views) {
  const entries = new Map(rows.filter((row) => row.label).map((row) => [row.label, row]));
  const list = make("ul", { class: "legend" });
  const focus = (label) => views.forEach((view) => view.signal("focus", label).runAsync());
  for (const [label, row] of [...entries].sort(([a], [b]) => (a === "dense") - (b === "dense") || natural(a, b))) {
    const glyph = `<svg viewBox="-1.4 -1.4 2.8 2.8" aria-hidden="true"><path d="${row.shape}" fill="${row.color}"/></svg>`;
    const button = make("button", { type: "button", "aria-pressed": "false" });
    button.innerHTML = glyph;
    button.append(label);
    const pressed = () => find("[aria-pressed=true]", list);
    button.addEventListener("click", () => {
      const was = pressed();
      was?.setAttribute("aria-pressed", "false");
      if (was !== button) button.setAttribute("aria-pressed", "true");
      focus(was === button ? null : label);
    });
    button.addEventListener("pointerenter", () => pressed() || focus(label));
    button.addEventListener("pointerleave", () => pressed() || focus(null));
    list.append(make("li", {}, button));
  }
  return list;
}

// Methods of one metric share a color; where one metric is left, each has its own.
function toldApart(charts) {
  const rows = charts.flat().filter((row) => row.method !== undefined && row.style[0] >= 0);
  const methods = [...new Set(rows.map((row) => row.method))].sort(natural);
  if (methods.length < 2 || new Set(rows.map((row) => row.style[0])).size > 1 || rows.some((r) => r.label !== r.method))
    return charts;
  const place = (row) => (row.style[0] < 0 ? row.style : [methods.indexOf(row.method), methods.indexOf(row.method)]);
  return charts.map((of) => of.map((row) => ({ ...row, style: place(row) })));
}

function filled(picture, chart, rows, [low, high]) {
  const by = picture.order_by, order = by ? ranked(rows, by, picture.few?.best ?? "min") : [];
  const there = by ? rows.flatMap((row) => [row[by], row.dense]).filter((value) => value != null) : [];
  const far = Math.max(...there) > 5 * Math.min(...there);
  const scale = far ? { type: "log", nice: false, padding: 8 } : { zero: false, nice: true };
  const values = { order, low, high, scale };
  const spec = JSON.parse(JSON.stringify(chart.spec)
    .replace(/"\$(order|low|high|scale)"/g, (_, name) => JSON.stringify(values[name])));
  return { ...spec, data: { values: rows } };
}

async function draw(picture, shown, stale) {
  const palette = COLORS[dark.matches ? "dark" : "light"], ink = css("--ink");
  const style = (row) => ({
    ...row,
    color: row.style[0] < 0 ? ink : palette[row.style[0] % palette.length],
    shape: row.style[1] < 0 ? "M-1.3,-.3L1.3,-.3L1.3,.3L-1.3,.3Z" : SHAPES[row.style[1] % SHAPES.length],
  });
  const all = picture.charts.map((chart) => chart.rows.filter((row) => !shown || shown.has(row.run)));
  const [left, said] = chosen(picture, all), charts = toldApart(left);
  const values = charts.flat().flatMap((row) => picture.range_of.map((field) => row[field]).filter((v) => v != null));
  const range = values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
  const section = find(`#picture-${picture.name}`), views = [], place = find(".charts", section);
  const rows = charts.map((of) => of.map(style));
  const filledOnes = picture.charts.map((_, i) => i).filter((i) => rows[i].length), drawn = filledOnes.slice(0, CHARTS);
  const more = drawn.length < filledOnes.length
    ? ` The first ${CHARTS} of ${filledOnes.length} panels; the filter above chooses others.` : "";
  place.replaceChildren();
  find(".said", section).textContent = drawn.length ? said + more : "No run that is shown has something for it.";
  find(".legend", section).replaceWith(legendOf(picture, drawn.flatMap((i) => rows[i]), views));
  for (const i of drawn) {
    const chart = picture.charts[i];
    const target = make("div", { class: "chart" });
    place.append(make("figure", {}, make("figcaption", {}, chart.title), target));
    const options = {
      config: theme(), renderer: rows[i].length > 3000 ? "canvas" : "svg",
      actions: { export: true, source: false, compiled: false, editor: false },
      tooltip: { theme: dark.matches ? "dark" : "light" }, downloadFileName: `${picture.name} ${chart.title}`,
    };
    const spec = filled(picture, chart, rows[i], range);
    const limit = Math.max(90, 0.45 * target.clientWidth);
    options.config.axis.labelLimit = limit;
    views.push((await vegaEmbed(target, spec, options)).view);
    if (stale()) return;
  }
}

let turn = 0;
async function drawAll() {
  const mine = ++turn, named = runRows().some((row) => row.dataset.runs);
  const shown = named ? new Set(runRows().filter((row) => !row.hidden).flatMap(idsOf)) : null;
  document.body.dataset.drawn = "";
  for (const picture of pictures) {
    await draw(picture, shown, () => mine !== turn);
    if (mine !== turn) return;
  }
  document.body.dataset.drawn = "all";
}

async function begin() {
  facts = JSON.parse(await unpacked("facts"));
  pictures = JSON.parse((await unpacked("pictures")) ?? "[]");
  for (const handle of findAll("td.handle > *", runs)) handle.disabled = false;
  const library = await unpacked("library");
  if (!library) return (document.body.dataset.drawn = "all");
  document.head.append(make("script", { type: "module" }, `${library};window.dispatchEvent(new Event("library"))`));
  await new Promise((done) => window.addEventListener("library", done, { once: true }));
  dark.addEventListener("change", drawAll);
  await drawAll();
}

begin().catch((error) => {
  say(`This browser cannot show what stands behind the rows, or the figures: ${error.message}`);
  document.body.dataset.drawn = "all";
  throw error;
});
