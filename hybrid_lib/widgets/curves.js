// Draws the data of curves.py: a table that is also the legend, four SVG panels and a layer map.

const PANELS = [
  { of: "loss", title: "loss (nats)", height: 190 },
  { of: "accuracy", title: "accuracy", height: 190 },
  { of: "lr", title: "rate η", height: 56 },
  { of: "lambdas", title: "weights λ", height: 70 },
];
const LEFT = 46, RIGHT = 10, ABOVE = 32, BELOW = 40; // margins in pixels, ABOVE over each panel
const CELL = 6, KEY = 32; // layer map: heights of a row and of the key above
const HEIGHT = BELOW + PANELS.reduce((sum, panel) => sum + ABOVE + panel.height, 0);
const GREEN = "#009E73"; // of the rate; below, the weights by rule: colour, dash, line in text
const WEIGHTS = [["#D55E00", "", "━━"], ["#0072B2", "7 5", "╍╍"], [GREEN, "2 3", "┅┅"]];
const STYLE = `
.hybrid-curves { color: var(--jp-widgets-label-color, inherit); font-size: 12px; line-height: 1.35;
  font-family: var(--jp-ui-font-family, system-ui, sans-serif); width: 100%; }
.hybrid-curves h4 { font-size: 15px; font-weight: 600; margin: 0; }
.hybrid-curves table { border-collapse: collapse; width: 100%; margin: 4px 0 0; font-size: inherit; }
.hybrid-curves :is(th, td) { background: none; border: 0; color: inherit; font-weight: normal;
  padding: 2px 0 2px 9px; text-align: right; vertical-align: top; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.hybrid-curves tr { background: none !important; border: 0; }
.hybrid-curves tbody tr { border-top: 1px solid rgba(128, 128, 128, 0.3); }
.hybrid-curves :is(th, td):first-child { text-align: left; padding-left: 0; white-space: normal; }
.hybrid-curves button { all: unset; cursor: pointer; display: flex; gap: 8px; }
.hybrid-curves button > svg { flex: none; margin-top: 3px; }
.hybrid-curves :is(button, svg):focus-visible { outline: 2px solid #0072B2; }
.hybrid-curves button[aria-pressed=false] { opacity: 0.45; text-decoration: line-through; }
.hybrid-curves .faint { opacity: 0.75; }
.hybrid-curves > svg { display: block; overflow: visible; touch-action: pan-y; }
.hybrid-curves label { display: flex; gap: 8px; align-items: center; margin: 10px 0 6px; }
.hybrid-curves label[hidden] { display: none; }
.hybrid-curves select { font: inherit; max-width: 70%; }
.hybrid-curves text { fill: currentColor; }`;

const clean = (text) => String(text).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
const short = (value, digits = 4) =>
  value === undefined ? "–" : value !== 0 && Math.abs(value) < 1e-3
    ? value.toExponential(1) : String(+value.toPrecision(digits));
const fixed = (value) => (value === undefined ? "–" : value < 1e4 ? value.toFixed(4) : short(value));

/** Multiples of 1, 2 or 5 times a power of ten, in about `count` steps of at least `least`. */
function ticks([low, high], count, least = 0) {
  const rough = Math.max((high - low) / count, least);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((n) => n * power >= rough * 0.999) * power;
  const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
  const found = Array.from({ length: Math.max(0, last - first + 1) }, (_, i) => (first + i) * step);
  return found.map((value) => +value.toPrecision(8));
}

function logTicks([low, high]) {
  const ratio = high / low, found = [];
  const digits = ratio > 300 ? [1] : ratio > 4 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++)
    for (const digit of digits) found.push(+(digit * 10 ** power).toPrecision(3));
  const inside = found.filter((value) => value >= low && value <= high);
  return inside.length > 1 ? inside : ticks([low, high], 4);
}

/** The range of the values with a small margin. */
function paddedRange(values, empty, isLog) {
  if (!values.length) return empty;
  const scale = isLog ? Math.log : (v) => v, back = isLog ? Math.exp : (v) => v;
  const low = scale(Math.min(...values)), high = scale(Math.max(...values));
  const more = 0.06 * (high - low) || (isLog ? 0.1 : 0.01);
  return [back(low - more), back(high + more)];
}

/** The lines of each panel, with points [epoch, value]. */
function linesOf(data, hidden) {
  const lines = PANELS.map(() => []), points = (x, y) => x.map((epoch, i) => [epoch, y[i]]);
  for (const run of [...data.runs].reverse()) { // the first run lies on top
    if (hidden.has(run.name)) continue;
    for (const [row, what] of [[0, "loss"], [1, "accuracy"]])
      for (const part of ["train", "test"]) {
        const kept = points(run.epoch, run[`${part}_${what}`]).filter(([, y]) => row || y > 0);
        const width = part === "test" ? 2.4 : 1.1;
        lines[row].push({ ...run, points: kept, part, width });
      }
  }
  if (data.report && !hidden.has(data.report.name)) {
    const known = points(data.report.epoch, data.report.test_accuracy);
    lines[1].push({ points: known.filter(([epoch]) => epoch <= data.epochs), part: "report" });
  }
  const { epoch, lr, lambdas } = data.planned, shared = { part: "planned", width: 2 };
  lines[2].push({ ...shared, points: points(epoch, lr), colour: GREEN, dash: "" });
  Object.values(lambdas).forEach((values, i) => {
    const [colour, dash] = WEIGHTS[i % 3];
    lines[3].push({ ...shared, points: points(epoch, values), colour, dash });
  });
  return lines;
}

function drawLine(line, x, y, at) {
  const { points, colour, dash, part, width } = line;
  const place = ([e, v]) => [x(e).toFixed(1), y(v).toFixed(1)];
  if (part === "report") {
    const diamonds = points.map(([e, v]) => `M${x(e)},${y(v) - 6}l5,6l-5,6l-5,-6z`).join("");
    return `<path data-part="report" d="${diamonds}" fill="none" stroke="currentColor"/>`;
  }
  const last = points.length - 1; // a planned value holds for a whole epoch
  const corners = part !== "planned" ? points
    : points.flatMap(([e, v], i) => [[i ? e - 0.5 : e, v], [i < last ? e + 0.5 : e, v]]);
  const least = part === "test" ? 2.6 : 1.4;
  const dots = points.filter(([e]) => e === at || !last || (part !== "planned" && last < 30))
    .map((point) => [...place(point), point[0] === at ? least + 1.6 : least])
    .map(([cx, cy, r]) => `<circle cx="${cx}" cy="${cy}" r="${r}"/>`);
  return `<g fill="${colour}" stroke-linejoin="round"><path data-part="${part}"
    data-points="${points.length}" d="${corners.map((at, i) => `${i ? "L" : "M"}${place(at)}`).join("")}" fill="none"
    stroke="${colour}" stroke-width="${width}" stroke-dasharray="${dash}"/>${dots.join("")}</g>`;
}

/** The epoch axis: its left end, pixels per epoch, and x, an epoch's place in pixels. */
function axis(epochs, width) {
  const margin = Math.max(0.5, 0.02 * epochs), from = 1 - margin, to = epochs + margin;
  const perEpoch = (width - LEFT - RIGHT) / (to - from);
  return { from, perEpoch, x: (e) => LEFT + (e - from) * perEpoch };
}

/** The four panels, `width` pixels wide, with the cross-hair at an epoch. */
function panels(data, hidden, width, at) {
  const { x, perEpoch, from } = axis(data.epochs, width);
  const epochs = ticks([1, data.epochs], width / 45, 1);
  const lines = linesOf(data, hidden);
  let svg = "", top = 0;
  PANELS.forEach(({ of, title, height }, row) => {
    top += ABOVE;
    const values = lines[row].flatMap((line) => line.points.map(([, y]) => y));
    const most = Math.max(...values), range = [
      paddedRange(values, [0.1, 3], true), paddedRange(values, [0, 1]),
      [0, 1.15 * most], [-0.08, 1.08 * Math.max(1, most)],
    ][row];
    const scale = row ? (v) => v : Math.log, bottom = top + height;
    const [low, high] = range.map(scale);
    const y = (v) => bottom - ((scale(v) - low) / (high - low)) * height;
    const marks = row ? ticks(range, row > 1 ? 2 : 5) : logTicks(range);
    const grid = marks.map((v) => `M${LEFT},${y(v).toFixed(1)}H${width - RIGHT}`)
      .concat(epochs.map((e) => `M${x(e).toFixed(1)},${top}V${bottom}`)).join("");
    const text = (words, left, above, more) => `<text x="${left}" y="${above}" ${more}>${words}</text>`;
    const end = 'text-anchor="end"';
    svg += `<g data-panel="${of}"><path d="${grid}" stroke="currentColor" stroke-opacity="0.16"/>
      ${marks.map((v) => text(short(v), LEFT - 7, y(v) + 4, end)).join("")}
      ${text(title, 0, top - 11, 'font-weight="600"')}
      ${text(caption(data.planned, row, at), width - RIGHT, top - 11, end)}
      ${at ? `<path d="M${x(at)},${top}V${bottom}" stroke="currentColor" opacity="0.6"/>` : ""}
      ${lines[row].map((line) => drawLine(line, x, y, at)).join("")}</g>`;
    top = bottom;
  });
  const below = epochs.map((e) => `<text x="${x(e)}" y="${top + 17}">${e}</text>`).join("");
  const name = `<text x="${(LEFT + width - RIGHT) / 2}" y="${top + 34}">epoch</text>`;
  svg += `<g text-anchor="middle">${below}${name}</g>`;
  return { svg, epochAt: (px) => Math.round(from + (px - LEFT) / perEpoch) };
}

/** The text above a panel, on the right: its lines, and their values at the cross-hair. */
function caption({ lr, lambdas }, row, at) {
  const value = (values) => (lr[at - 1] === undefined ? "" : ` = ${short(values[at - 1], 3)}`);
  const weights = Object.entries(lambdas).map(([rule, values], i) =>
    `<tspan fill="${WEIGHTS[i % 3][0]}">${WEIGHTS[i % 3][2]}</tspan> λ of ${rule}${value(values)}`);
  const next = `next run${value(lr) && `: η${value(lr)}`}`;
  return ["thick: test, thin: training", "", next, weights.join(" \u00a0 ")][row];
}

/** The legend: each run's values at the cross-hair, or in its last epoch. */
function legend(data, hidden, at) {
  const faint = (text) => `<span class="faint">${text}</span>`;
  const row = ({ name, label }, swatch, cells) => `<tr><td>
    <button data-run="${clean(name)}" aria-pressed="${!hidden.has(name)}" title="hide or show">
      <svg width="30" height="11"><path d="${swatch} fill="none"/></svg>
      <span><b>${clean(name)}</b><br>${faint(clean(label))}</span></button></td>
    ${cells.map((lines) => `<td>${lines.join("<br>")}</td>`).join("")}</tr>`;
  const rows = data.runs.map((run) => {
    const i = at ? run.epoch.indexOf(at) : run.epoch.length - 1;
    const pair = (what) => [fixed(run[`test_${what}`][i]), faint(fixed(run[`train_${what}`][i]))];
    const swatch = `M0,5.5H30" stroke="${run.colour}" stroke-width="3" stroke-dasharray="${run.dash}"`;
    const λ = (run.lambdas[i] ?? []).map((value) => short(value, 3));
    const cells = [["test", faint("train")], pair("loss"), pair("accuracy"), [short(run.lr[i])], λ];
    return row(run, swatch, cells);
  });
  if (data.report) {
    const value = data.report.test_accuracy[data.report.epoch.indexOf(at)];
    const cells = [["test"], [], [value === undefined ? "" : fixed(value)], [], []];
    rows.push(row(data.report, 'M15,0l5,5.5l-5,5.5l-5,-5.5z" stroke="currentColor"', cells));
  }
  if (!rows.length) return "";
  const heads = [at ? `epoch ${at}` : "last epoch", "", "loss", "accuracy", "η", "λ"];
  return `<table><thead><tr>${heads.map((head) => `<th>${head}</th>`).join("")}</tr></thead>
    <tbody>${rows.join("")}</tbody></table>`;
}

/** From the first rule's colour through grey to the last rule's; `share` is from 0 to 1. */
function colour(share) {
  const [low, middle, high] = [[213, 94, 0], [214, 214, 214], [0, 114, 178]];
  const [from, to, part] = share < 0.5 ? [low, middle, 2 * share] : [middle, high, 2 * share - 1];
  return `rgb(${from.map((v, i) => Math.round(v + part * (to[i] - v))).join()})`;
}

/** A map of one measure: a row per layer, a cell per epoch. */
function layerMap({ epoch, every, layers }, { low, high, values }, epochs, width, [row, column]) {
  const { x, perEpoch } = axis(epochs, width), isLog = low === undefined;
  const found = values.flat().filter((v) => v !== null && (!isLog || v > 0));
  const ends = isLog ? [Math.min(...found), Math.max(...found)] : [low, high];
  const scale = isLog ? Math.log : (v) => v, [from, to] = ends.map(scale);
  const cells = values.flatMap((line, i) => line.map((v, j) => {
    if (v === null || (isLog && v <= 0)) return "";
    const share = Math.min(1, Math.max(0, (scale(v) - from) / (to - from || 1)));
    const until = Math.min(epoch[j + 1] ?? epochs + 1, epoch[j] + every);
    return `<rect data-layer="${i}" data-column="${j}" x="${x(epoch[j] - 0.5).toFixed(1)}"
      y="${KEY + i * CELL}" width="${((until - epoch[j]) * perEpoch + 0.3).toFixed(1)}"
      height="${CELL}" fill="${colour(share)}"/>`;
  }));
  const steps = Array.from({ length: 11 }, (_, i) => `<rect x="${LEFT + 12 * i}" y="2" width="12.5"
    height="9" fill="${colour(i / 10)}"/>`);
  const middle = isLog ? Math.sqrt(ends[0] * ends[1]) : (low + high) / 2;
  const key = found.length ? [ends[0], middle, ends[1]].map((v, i) => `<text x="${LEFT + 66 * i}"
    y="24" text-anchor="${["start", "middle", "end"][i]}">${short(v, 2)}</text>`) : [];
  const here = layers[row] === undefined || epoch[column] === undefined ? "" : `${clean(layers[row])}, epoch ${epoch[column]}:
    ${values[row][column] === null ? "–" : short(values[row][column], 3)}`;
  const name = `<text data-here x="${width - RIGHT}" y="12" text-anchor="end">${here}</text>`;
  const middles = layers.length * CELL / 2 + KEY, up = `rotate(-90 34 ${middles})`;
  return `${steps.join("")}${key.join("")}${name}${cells.join("")}
    <text x="34" y="${middles}" text-anchor="middle" transform="${up}">layers, first on top</text>`;
}

function render({ model, el }) {
  el.innerHTML = `<div class="hybrid-curves"><style>${STYLE}</style><h4></h4><div></div>
    <svg tabindex="0" role="img" height="${HEIGHT}" data-lm-suppress-shortcuts="true"></svg>
    <label hidden><b></b> <select></select></label><svg tabindex="0" role="img" data-panel="inside"
    data-lm-suppress-shortcuts="true"></svg></div>`;
  const root = el.firstChild, [, title, table, svg, label, map] = root.children;
  const [heading, select] = label.children, hidden = new Set();
  let at = 0, cell = [], wanted, epochAt;
  function draw() {
    const data = model.get("data"), width = Math.max(280, root.clientWidth || 500);
    at = Math.min(at, data.epochs);
    const focused = root.contains(document.activeElement) && document.activeElement.dataset.run;
    title.textContent = data.title;
    table.innerHTML = legend(data, hidden, at);
    table.querySelector(`[data-run="${focused}"]`)?.focus(); // the new button of the same run
    const made = panels(data, hidden, width, at);
    epochAt = made.epochAt;
    svg.innerHTML = made.svg;
    svg.setAttribute("width", width);
    svg.setAttribute("aria-label", `Curves: ${data.title}. Arrow keys move the cross-hair.`);
    drawInside(data, width);
  }
  function drawInside({ inside, epochs }, width) {
    const measures = inside?.measures ?? [], names = measures.map(({ name }) => name);
    label.hidden = !inside;
    map.style.display = inside ? "block" : "none"; // no empty map
    map.setAttribute("height", inside ? KEY + CELL * inside.layers.length + 10 : 0);
    map.setAttribute("width", width);
    if (select.dataset.names !== names.join()) {
      const before = names.includes(wanted) ? wanted : names[names.length > 1 ? 1 : 0];
      select.innerHTML = names.map((name) => `<option>${clean(name)}</option>`).join("");
      select.dataset.names = names.join();
      select.value = before;
    }
    const measure = measures.find(({ name }) => name === select.value);
    heading.textContent = inside ? `inside ${inside.run}` : "";
    map.innerHTML = measure ? layerMap(inside, measure, epochs, width, cell) : "";
    const here = map.querySelector("[data-here]")?.textContent || "Arrow keys choose a cell.";
    map.setAttribute("aria-label", measure ? `${measure.name}, by layer and epoch. ${here}` : "");
  }
  function point(epoch) { // 0: no cross-hair
    if (epoch === at) return;
    at = epoch;
    draw();
  }
  svg.addEventListener("pointermove", (e) =>
    point(Math.max(1, epochAt(e.clientX - svg.getBoundingClientRect().left))));
  svg.addEventListener("pointerleave", () => point(0));
  svg.addEventListener("blur", () => point(0));
  svg.addEventListener("keydown", (e) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
    if (step) { e.preventDefault(); point(Math.max(1, at + step)); }
  });
  select.addEventListener("change", () => { wanted = select.value; draw(); });
  function pointInside(...here) {
    if (cell.join() === here.join()) return;
    cell = here;
    drawInside(model.get("data"), +map.getAttribute("width"));
  }
  map.addEventListener("pointermove", ({ target }) =>
    pointInside(target.dataset.layer, target.dataset.column));
  map.addEventListener("pointerleave", () => pointInside());
  map.addEventListener("blur", () => pointInside());
  map.addEventListener("keydown", (e) => {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!(e.key in moves)) return;
    e.preventDefault();
    const { layers, epoch } = model.get("data").inside;
    pointInside(...[layers, epoch].map(({ length }, i) => cell[i] === undefined ? 0
      : Math.max(0, Math.min(length - 1, +cell[i] + moves[e.key][i]))));
  });
  table.addEventListener("click", (e) => {
    const name = e.target.closest("button")?.dataset.run;
    if (name === undefined) return;
    if (!hidden.delete(name)) hidden.add(name);
    draw();
  });
  model.on("change:data", draw);
  const watcher = new ResizeObserver(draw);
  watcher.observe(root);
  draw();
  return () => { watcher.disconnect(); model.off("change:data", draw); };
}

export default { render };
