// Draws the data of curves.py: a table that is the legend too, and below it four panels of SVG.

const PANELS = [
  { of: "loss", title: "loss (nats)", height: 190 },
  { of: "accuracy", title: "accuracy", height: 190 },
  { of: "lr", title: "rate η", height: 56 },
  { of: "lambdas", title: "weights λ", height: 64 },
];
const LEFT = 46, RIGHT = 10, ABOVE = 28, BELOW = 40; // margins in pixels, ABOVE of each panel
const HEIGHT = BELOW + PANELS.reduce((sum, panel) => sum + ABOVE + panel.height, 0);
const GREEN = "#009E73", WEIGHTS = [["#D55E00", ""], ["#0072B2", "7 5"]];
const STYLE = `
.hybrid-curves { color: var(--jp-widgets-label-color, inherit); font-size: 12px; line-height: 1.35;
  font-family: var(--jp-ui-font-family, system-ui, sans-serif); width: 100%; }
.hybrid-curves h4 { font-size: 15px; margin: 0; line-height: 1.3; }
.hybrid-curves table { border-collapse: collapse; width: 100%; margin: 4px 0 2px; }
.hybrid-curves :is(th, td) { background: none; border: 0; color: inherit; font-weight: normal;
  padding: 2px 0 2px 10px; text-align: right; vertical-align: top; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.hybrid-curves tr { background: none !important; border: 0; }
.hybrid-curves tbody tr { border-top: 1px solid rgba(128, 128, 128, 0.3); }
.hybrid-curves :is(th, td):first-child { text-align: left; padding-left: 0; white-space: normal; }
.hybrid-curves button { all: unset; cursor: pointer; display: flex; gap: 8px; overflow-wrap: anywhere; }
.hybrid-curves button > svg { flex: none; margin-top: 3px; }
.hybrid-curves button:focus-visible, .hybrid-curves > svg:focus-visible { outline: 2px solid #0072B2; }
.hybrid-curves button[aria-pressed=false] { opacity: 0.45; text-decoration: line-through; }
.hybrid-curves .faint { opacity: 0.75; }
.hybrid-curves > svg { display: block; overflow: visible; touch-action: pan-y; }
.hybrid-curves text { fill: currentColor; }`;

const clean = (text) => String(text).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
const short = (value, digits = 4) =>
  value === undefined ? "–" : value !== 0 && Math.abs(value) < 1e-3
    ? value.toExponential(1) : String(+value.toPrecision(digits));
const fixed = (value) => (value === undefined ? "–" : value < 1e4 ? value.toFixed(4) : short(value));

/** Multiples of 1, 2 or 5 times a power of ten, at most `count` steps apart. */
function ticks([low, high], count, least = 0) {
  const rough = Math.max((high - low) / count, least);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((n) => n * power >= rough * 0.999) * power;
  const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
  return Array.from({ length: Math.max(0, last - first + 1) }, (_, i) => +((first + i) * step).toPrecision(8));
}

function logTicks([low, high]) {
  const digits = high / low > 300 ? [1] : high / low > 4 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9];
  const found = [];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++)
    for (const digit of digits) found.push(+(digit * 10 ** power).toPrecision(3));
  return found.filter((value) => value >= low && value <= high);
}

/** From the least to the largest value, and a little more. */
function reach(values, empty, isLog) {
  if (!values.length) return empty;
  const of = isLog ? Math.log : (v) => v, back = isLog ? Math.exp : (v) => v;
  const low = of(Math.min(...values)), high = of(Math.max(...values));
  const more = 0.06 * (high - low) || (isLog ? 0.1 : 0.01);
  return [back(low - more), back(high + more)];
}

/** What there is to draw: per panel, lines of points [epoch, value]. */
function linesOf(data, hidden) {
  const lines = PANELS.map(() => []), points = (x, y) => x.map((epoch, i) => [epoch, y[i]]);
  for (const run of [...data.runs].reverse()) { // the first one lies on top
    if (hidden.has(run.name)) continue;
    for (const [row, what] of [[0, "loss"], [1, "accuracy"]])
      for (const part of ["train", "test"]) {
        const kept = points(run.epoch, run[`${part}_${what}`]).filter(([, y]) => row || y > 0);
        lines[row].push({ ...run, points: kept, part, width: part === "test" ? 2.4 : 1.1, run: run.name });
      }
  }
  if (data.report && !hidden.has(data.report.name))
    lines[1].push({ points: points(data.report.epoch, data.report.test_accuracy), part: "report" });
  const { epoch, lr, lambdas } = data.planned, held = { part: "planned", width: 2 };
  lines[2].push({ ...held, points: points(epoch, lr), colour: GREEN, dash: "" });
  Object.values(lambdas).forEach((values, i) => {
    const [colour, dash] = WEIGHTS[i % 2];
    lines[3].push({ ...held, points: points(epoch, values), colour, dash });
  });
  return lines;
}

function drawn(line, x, y, at) {
  const { points, colour, dash, part, width } = line, place = ([e, v]) => `${x(e).toFixed(1)},${y(v).toFixed(1)}`;
  if (part === "report")
    return points.map(([e, v]) =>
      `<path class="report" d="M${x(e)},${y(v) - 6}l5,6l-5,6l-5,-6z" fill="none" stroke="currentColor"/>`).join("");
  const last = points.length - 1; // what is planned holds for a whole epoch
  const corners = part !== "planned" ? points
    : points.flatMap(([e, v], i) => [[i ? e - 0.5 : e, v], [i < last ? e + 0.5 : e, v]]);
  const least = part === "test" ? 2.6 : 1.4;
  const dots = points.filter(([e], i) => e === at || (part !== "planned" && last < 30) || !last)
    .map(([e, v]) => `<circle cx="${x(e).toFixed(1)}" cy="${y(v).toFixed(1)}" r="${e === at ? least + 1.6 : least}"/>`);
  return `<g fill="${colour}" stroke-linejoin="round"><path data-run="${clean(line.run ?? "")}" data-part="${part}"
    data-points="${points.length}" d="M${corners.map(place).join("L")}" fill="none" stroke="${colour}"
    stroke-width="${width}" stroke-dasharray="${dash}"/>${dots.join("")}</g>`;
}

/** The four panels, `width` pixels wide, with the cross-hair at an epoch. */
function panels(data, hidden, width, at) {
  const margin = Math.max(0.3, 0.02 * data.epochs), from = 1 - margin, to = data.epochs + margin;
  const x = (epoch) => LEFT + ((epoch - from) / (to - from)) * (width - LEFT - RIGHT);
  const epochs = ticks([1, data.epochs], width / 45, 1);
  const lines = linesOf(data, hidden);
  let svg = "", top = 0;
  PANELS.forEach(({ of, title, height }, row) => {
    top += ABOVE;
    const values = lines[row].flatMap((line) => line.points.map(([, y]) => y)), most = Math.max(...values);
    const range = [reach(values, [0.1, 3], true), reach(values, [0, 1]), [0, 1.15 * most], [-0.08, 1.08 * Math.max(1, most)]][row];
    const scale = row ? (v) => v : Math.log, bottom = top + height;
    const y = (v) => bottom - ((scale(v) - scale(range[0])) / (scale(range[1]) - scale(range[0]))) * height;
    const marks = row ? ticks(range, row > 1 ? 2 : 5) : logTicks(range);
    const grid = marks.map((v) => `M${LEFT},${y(v).toFixed(1)}H${width - RIGHT}`)
      .concat(epochs.map((e) => `M${x(e).toFixed(1)},${top}V${bottom}`)).join("");
    const labels = marks.map((v) => `<text x="${LEFT - 7}" y="${y(v) + 4}" text-anchor="end">${short(v)}</text>`);
    svg += `<g data-panel="${of}"><path d="${grid}" stroke="currentColor" stroke-opacity="0.16"/>${labels.join("")}
      <text x="0" y="${top - 8}" font-weight="600">${title}</text>
      <text x="${width - RIGHT}" y="${top - 8}" text-anchor="end">${caption(data.planned, row, at)}</text>
      ${at ? `<path d="M${x(at)},${top}V${bottom}" stroke="currentColor" stroke-opacity="0.6"/>` : ""}
      ${lines[row].map((line) => drawn(line, x, y, at)).join("")}</g>`;
    top = bottom;
  });
  svg += epochs.map((e) => `<text x="${x(e)}" y="${top + 17}" text-anchor="middle">${e}</text>`).join("");
  svg += `<text x="${(LEFT + width - RIGHT) / 2}" y="${top + 34}" text-anchor="middle">epoch</text>`;
  return { svg, epochAt: (px) => Math.round(from + ((px - LEFT) / (width - LEFT - RIGHT)) * (to - from)) };
}

/** To the right above a panel: what its lines are, and their values at the cross-hair. */
function caption({ lr, lambdas }, row, at) {
  const value = (values) => (at && values[at - 1] !== undefined ? ` = ${short(values[at - 1])}` : "");
  if (row === 0) return "thick: test, thin: training";
  if (row === 2) return `what starts next: η${value(lr)}`;
  return row === 1 ? "" : Object.entries(lambdas).map(([rule, values], i) =>
    `<tspan fill="${WEIGHTS[i % 2][0]}" dx="10">${i ? "╍╍" : "━━"}</tspan> λ of ${clean(rule)}${value(values)}`).join("");
}

/** The legend: per run its values at the cross-hair, or in its last epoch. */
function legend(data, hidden, at) {
  const row = (name, label, swatch, cells) => `<tr><td><button data-run="${clean(name)}" aria-pressed="${!hidden.has(name)}"
    title="hide or show">${swatch}<span><b>${clean(name)}</b><br><span class="faint">${clean(label)}</span></span></button></td>
    ${cells.map((pair) => `<td>${pair.join("<br>")}</td>`).join("")}</tr>`;
  const rows = data.runs.map((run) => {
    const i = at ? run.epoch.indexOf(at) : run.epoch.length - 1;
    const pair = (what) => [fixed(run[`test_${what}`][i]), `<span class="faint">${fixed(run[`train_${what}`][i])}</span>`];
    const swatch = `<svg width="30" height="11"><path d="M0,5.5H30" stroke="${run.colour}" stroke-width="3"
      stroke-dasharray="${run.dash}"/></svg>`;
    return row(run.name, run.label, swatch, [["test", '<span class="faint">train</span>'], pair("loss"), pair("accuracy"),
      [short(run.lr[i])], (run.lambdas[i] ?? []).map((λ) => short(λ, 3))]);
  });
  if (data.report) {
    const i = data.report.epoch.indexOf(at), swatch = `<svg width="30" height="11"><path d="M15,0l5,5.5l-5,5.5l-5,-5.5z"
      fill="none" stroke="currentColor"/></svg>`;
    rows.push(row(data.report.name, data.report.label, swatch,
      [["test"], [""], [data.report.test_accuracy[i] ?? ""], [""], [""]]));
  }
  const heads = ["", "loss", "accuracy", "η", "λ"].map((head) => `<th>${head}</th>`).join("");
  return rows.length ? `<table><thead><tr><th>${at ? `epoch ${at}` : "last epoch"}</th>${heads}</tr></thead>
    <tbody>${rows.join("")}</tbody></table>` : "";
}

function render({ model, el }) {
  el.innerHTML = `<div class="hybrid-curves"><style>${STYLE}</style><h4></h4><div></div>
    <svg tabindex="0" role="img" height="${HEIGHT}" data-lm-suppress-shortcuts="true"></svg></div>`;
  const root = el.firstChild, [, title, table, svg] = root.children, hidden = new Set();
  let at = 0, epochAt;
  function draw() {
    const data = model.get("data"), width = Math.max(280, root.clientWidth || 500);
    at = Math.min(at, data.epochs);
    const focused = root.contains(document.activeElement) && document.activeElement.dataset.run;
    title.textContent = data.title;
    table.innerHTML = legend(data, hidden, at);
    table.querySelector(`[data-run="${focused}"]`)?.focus(); // the new one of the same run
    const made = panels(data, hidden, width, at);
    epochAt = made.epochAt;
    svg.innerHTML = made.svg;
    svg.setAttribute("width", width);
    svg.setAttribute("aria-label", `Curves: ${data.title}. Arrow keys move the cross-hair.`);
  }
  function point(epoch) {
    const next = Math.max(0, Math.min(epoch, model.get("data").epochs));
    if (next !== at) { at = next; draw(); }
  }
  svg.addEventListener("pointermove", (e) => point(Math.max(1, epochAt(e.clientX - svg.getBoundingClientRect().left))));
  svg.addEventListener("pointerleave", () => point(0));
  svg.addEventListener("blur", () => point(0));
  svg.addEventListener("keydown", (e) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
    if (step) { e.preventDefault(); point(Math.max(1, at + step)); }
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
