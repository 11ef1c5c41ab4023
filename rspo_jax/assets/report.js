// Draws the page from the JSON in #data. Text from runs goes in as text, never
// as markup.
"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const groups = data.groups;
const dark = matchMedia("(prefers-color-scheme: dark)");
const $ = (id) => document.getElementById(id);

// Eight hues that stay apart for the colour-blind; then the same ones dashed.
const HUES = [
  ["#1f6fd1", "#7db3ff"], ["#d1541c", "#ff9a63"], ["#17805a", "#5fd3a2"],
  ["#8547c9", "#c79bff"], ["#a87a00", "#e8c04d"], ["#c2357b", "#ff8fc0"],
  ["#1b8a9a", "#63d4e3"], ["#5f6673", "#b3bac7"],
];
const DASHES = [[], [6, 4], [2, 3], [10, 3, 2, 3]];
const colour = (i) => HUES[i % HUES.length][dark.matches ? 1 : 0];
const dash = (i) => DASHES[Math.floor(i / HUES.length) % DASHES.length];
const css = (name) => getComputedStyle(document.documentElement)
  .getPropertyValue(name).trim();

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") node.className = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function options(select, items, chosen) {
  select.replaceChildren(...items.map(([value, text]) =>
    el("option", {value}, text)));
  if (chosen !== undefined) select.value = chosen;
}

function swatch(i) {
  const node = el("span", {class: "swatch", "aria-hidden": "true"});
  node.style.borderColor = colour(i);
  if (dash(i).length) node.style.borderTopStyle = "dashed";
  return node;
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e5 || size < 1e-3)) return value.toExponential(1);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(digits)));
}
const percent = (value) => value === null || value === undefined
  ? "–" : (100 * value).toFixed(1);
const signed = (value) => value === null || value === undefined
  ? "–" : (value >= 0 ? "+" : "−") + (100 * Math.abs(value)).toFixed(1);

// Series: mean over seeds, and a band.

const T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262,
  2.228];
const t95 = (n) => n - 2 < T95.length ? T95[n - 2] : 1.96 + 2.4 / (n - 1);
const state = {
  shown: new Set(groups.keys()), axis: "step", smoothing: 0.8,
  band: "interval",
};

// Exponential mean without the pull to 0 at the start.
function smooth(values, weight) {
  if (!weight) return values;
  let mean = 0, total = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return mean / total;
  });
}

// Points {step, x, value} of one run.
function pointsOf(run, key) {
  const {columns, sparse} = run;
  if (sparse[key]) {
    const {step, value} = sparse[key];
    return step.map((s, i) => ({step: s, x: axisAt(run, s), value: value[i]}));
  }
  if (!columns[key]) return [];
  const values = smooth(columns[key], state.smoothing);
  return columns.step.map((s, i) => ({
    step: s,
    x: state.axis === "step" ? s : (columns[state.axis] || [])[i] ?? null,
    value: values[i],
  })).filter((point) => point.value !== null && point.x !== null);
}

function axisAt(run, step) {
  if (state.axis === "step") return step;
  const {columns} = run;
  if (step === 0) return 0;
  let i = columns.step.findIndex((s) => s >= step);
  if (i < 0) i = columns.step.length - 1;
  return (columns[state.axis] || [])[i] ?? null;
}

function seriesOf(group, key) {
  const byStep = new Map();
  for (const run of group.runs) {
    for (const point of pointsOf(run, key)) {
      if (!byStep.has(point.step)) byStep.set(point.step, []);
      byStep.get(point.step).push({...point, run});
    }
  }
  const out = {x: [], mean: [], low: [], high: []};
  for (const step of [...byStep.keys()].sort((a, b) => a - b)) {
    const points = byStep.get(step);
    const values = points.map((point) => point.value);
    const n = values.length;
    const mean = values.reduce((a, b) => a + b) / n;
    let low = mean, high = mean;
    if (state.band === "range") {
      low = Math.min(...values);
      high = Math.max(...values);
    } else if (state.band === "interval" && n > 1) {
      const variance = values.reduce((a, v) => a + (v - mean) ** 2, 0) / (n - 1);
      const half = t95(n) * Math.sqrt(variance / n);
      low = mean - half;
      high = mean + half;
    } else if (state.band === "interval") {
      [low, high] = wilson(points[0].run, key, step) || [mean, mean];
    }
    out.x.push(points.reduce((a, point) => a + point.x, 0) / n);
    out.mean.push(mean);
    out.low.push(low);
    out.high.push(high);
  }
  return out;
}

// The interval that one seed's evaluation logged itself.
function wilson(run, key, step) {
  const end = {"eval/accuracy": "", "eval/accuracy_sampled": "_sampled"}[key];
  if (end === undefined) return null;
  const at = (name) => {
    const series = run.sparse[name + end];
    const i = series ? series.step.indexOf(step) : -1;
    return i < 0 ? null : series.value[i];
  };
  const low = at("eval/ci_low"), high = at("eval/ci_high");
  return low === null || high === null ? null : [low, high];
}

const has = (key) => groups.some((group) => group.runs.some((run) =>
  run.columns[key] || run.sparse[key]));

// Charts.

const AXIS_NAMES = {
  step: "step", "x/seconds": "seconds", "x/forwards": "forwards",
};
const NAMES = {
  "reward/mean": "Mean reward of rollouts",
  "reward/correct": "Share of right rollouts",
  "reward/equal_groups": "Groups with equal rewards",
  "eval/accuracy": "Accuracy, greedy",
  "eval/accuracy_sampled": "Accuracy, sampled",
  "rollout/length_mean": "Mean length, tokens",
  "calibration/target_share": "Share of the target: slope · λ",
  "calibration/correlation": "Correlation of estimate and advantage",
  "score/mask_variance": "Variance of d over masks",
  "score/relative_std": "Spread of d, nats per token",
  "gap/lambda_share": "λ-share: std(λ d̂) / std(A)",
  "gap/std": "Spread of the gap",
};
const LINES = {"calibration/target_share": 1};
const SECTIONS = {
  curves: ["reward/mean", "eval/accuracy", "reward/correct",
    "eval/accuracy_sampled", "reward/equal_groups", "rollout/length_mean",
    "loss"],
  calibration: ["calibration/target_share", "calibration/correlation"],
  scores: ["score/mask_variance", "gap/lambda_share", "score/relative_std",
    "gap/std"],
};
const charts = [];
const sync = uPlot.sync("steps");

class Chart {
  constructor(place, key) {
    this.key = key;
    this.head = el("h3", {}, NAMES[key] || key);
    this.box = el("div", {class: "plot"});
    this.tip = el("div", {class: "tip", hidden: ""});
    this.node = el("div", {
      class: "chart", tabindex: "0", role: "img", "data-metric": key,
      onkeydown: (event) => this.onKey(event), onblur: () => this.hide(),
    }, this.head, this.box, this.tip);
    place.append(this.node);
    this.plot = null;
    charts.push(this);
    new ResizeObserver(() => this.resize()).observe(this.node);
  }

  remove() {
    this.plot?.destroy();
    this.node.remove();
    charts.splice(charts.indexOf(this), 1);
  }

  width() { return Math.max(220, Math.floor(this.node.clientWidth)); }

  height() { return this.node.parentNode.classList.contains("one") ? 300 : 220; }

  resize() {
    if (this.plot && this.plot.width !== this.width()) {
      this.plot.setSize({width: this.width(), height: this.height()});
    }
  }

  draw() {
    this.plot?.destroy();
    this.plot = null;
    this.box.replaceChildren();
    this.hide();
    this.lines = [...state.shown].sort((a, b) => a - b)
      .map((i) => ({i, ...seriesOf(groups[i], this.key)}))
      .filter((line) => line.x.length);
    this.describe();
    if (!this.lines.length) {
      this.box.append(el("p", {class: "empty"},
        "Not logged by the groups shown."));
      return;
    }
    const tables = this.lines.map((line) =>
      [line.x, line.mean, line.low, line.high]);
    const joined = tables.length > 1 ? uPlot.join(tables) : tables[0];
    const series = [{}], bands = [];
    for (const [place, line] of this.lines.entries()) {
      const stroke = colour(line.i);
      const few = line.x.length <= 30;
      series.push({
        stroke, width: 2, dash: dash(line.i), spanGaps: true,
        points: {show: few, size: 5, fill: stroke},
      });
      const edge = {stroke: "transparent", width: 0, spanGaps: true,
        points: {show: false}};
      series.push(edge, {...edge});
      if (state.band !== "none") {
        bands.push({series: [3 * place + 3, 3 * place + 2],
          fill: stroke + "26"});
      }
    }
    this.plot = new uPlot({
      width: this.width(), height: this.height(), series, bands,
      padding: [8, 18, 0, 0],
      legend: {show: false},
      scales: {x: {time: false}, y: {range: () => this.range()}},
      axes: [this.axis(true), this.axis(false)],
      cursor: {
        sync: {key: sync.key, setSeries: false},
        drag: {x: true, y: false}, points: {show: false}, y: false,
      },
      hooks: {
        setCursor: [(plot) => this.onCursor(plot)],
        drawAxes: [(plot) => this.target(plot)],
      },
    }, joined, this.box);
  }

  axis(horizontal) {
    return {
      stroke: css("--faint"), grid: {stroke: css("--grid"), width: 1},
      ticks: {stroke: css("--grid"), width: 1, size: 4},
      font: "12px system-ui, sans-serif",
      size: horizontal ? 32 : 52,
      values: (_, splits) => splits.map((value) => short(value)),
    };
  }

  // Of the lines, with the bands as far as they leave the lines readable.
  range() {
    let low = Infinity, high = -Infinity, bandLow = low, bandHigh = high;
    for (const line of this.lines) {
      for (let i = 0; i < line.x.length; i++) {
        low = Math.min(low, line.mean[i]);
        high = Math.max(high, line.mean[i]);
        bandLow = Math.min(bandLow, line.low[i]);
        bandHigh = Math.max(bandHigh, line.high[i]);
      }
    }
    const goal = LINES[this.key];
    if (goal !== undefined) high = Math.max(high, Math.min(goal, 3 * high));
    const room = 0.6 * Math.max(high - low, 0.02 * Math.abs(high));
    low = Math.max(low - room, Math.min(low, bandLow));
    high = Math.min(high + room, Math.max(high, bandHigh));
    // A flat line gets an axis with different numbers on it.
    const least = 0.05 * Math.max(Math.abs(low), Math.abs(high)) || 1;
    const pad = high - low > 1e-3 * least ? 0.05 * (high - low) : least;
    return [low - pad, high + pad];
  }

  target(plot) {
    const goal = LINES[this.key];
    if (goal === undefined) return;
    const y = plot.valToPos(goal, "y", true);
    const {left, top, width, height} = plot.bbox;
    if (y < top || y > top + height) return;
    const {ctx} = plot;
    ctx.save();
    ctx.strokeStyle = css("--faint");
    ctx.setLineDash([4, 4]);
    ctx.beginPath();
    ctx.moveTo(left, y);
    ctx.lineTo(left + width, y);
    ctx.stroke();
    ctx.restore();
  }

  describe() {
    const ends = this.lines.map((line) =>
      `${groups[line.i].name} ${number(line.mean.at(-1))}`);
    this.node.setAttribute("aria-label",
      `${NAMES[this.key] || this.key}, last values: ${ends.join(", ")}`);
  }

  onCursor(plot) {
    const {idx, left, top} = plot.cursor;
    if (idx === null || idx === undefined || left < 0) {
      this.hide();
      return;
    }
    const pointed = this.node.matches(":hover") ||
      this.node === document.activeElement;
    if (!pointed) {
      this.hide();
      return;
    }
    const x = plot.data[0][idx];
    const rows = this.lines.map((line) => {
      let near = 0;
      line.x.forEach((value, i) => {
        if (Math.abs(value - x) < Math.abs(line.x[near] - x)) near = i;
      });
      return {line, near};
    }).filter(({line, near}) => Math.abs(line.x[near] - x) <=
      0.05 * (plot.scales.x.max - plot.scales.x.min))
      .sort((a, b) => b.line.mean[b.near] - a.line.mean[a.near]);
    this.tip.replaceChildren(
      el("div", {}, `${AXIS_NAMES[state.axis]} ${number(x, 4)}`),
      ...rows.slice(0, 12).map(({line, near}) => {
        const spread = line.high[near] > line.low[near]
          ? ` (${number(line.low[near])} to ${number(line.high[near])})` : "";
        return el("div", {}, swatch(line.i),
          `${groups[line.i].name} ${number(line.mean[near])}${spread}`);
      }),
      rows.length > 12 ? el("div", {}, `and ${rows.length - 12} more`) : null);
    this.tip.hidden = false;
    const edge = plot.bbox.left / devicePixelRatio;
    const place = edge + left + 14;
    const room = this.node.clientWidth - this.tip.offsetWidth;
    this.tip.style.left = `${Math.max(0, place > room
      ? Math.min(room, edge + left - this.tip.offsetWidth - 14) : place)}px`;
    this.tip.style.top = `${this.box.offsetTop + Math.max(0,
      Math.min(top || 0, this.height() - this.tip.offsetHeight))}px`;
  }

  hide() { this.tip.hidden = true; }

  onKey(event) {
    if (!this.plot) return;
    const count = this.plot.data[0].length;
    const jump = {ArrowRight: 1, ArrowLeft: -1, PageUp: 10, PageDown: -10,
      Home: -count, End: count}[event.key];
    if (event.key === "Escape") this.hide();
    if (jump === undefined) return;
    event.preventDefault();
    const now = this.plot.cursor.idx ?? (jump > 0 ? -1 : count);
    const next = Math.max(0, Math.min(count - 1, now + jump));
    const left = this.plot.valToPos(this.plot.data[0][next], "x");
    this.plot.setCursor({left: Math.max(0, left), top: 20});
  }
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${number(value / 1e9)}G`;
  if (size >= 1e6) return `${number(value / 1e6)}M`;
  if (size >= 1e4) return `${number(value / 1e3)}k`;
  if (size !== 0 && size < 1e-3) return value.toExponential(0);
  return String(Number(value.toPrecision(4)));
}

let pending = false;
function redraw() {
  if (pending) return;
  pending = true;
  requestAnimationFrame(() => {
    pending = false;
    for (const chart of charts) chart.draw();
  });
}

function layCharts() {
  for (const [section, keys] of Object.entries(SECTIONS)) {
    const place = document.querySelector(`[data-charts=${section}]`);
    const kept = keys.filter(has);
    for (const key of kept) new Chart(place, key);
    if (!kept.length) {
      place.append(el("p", {class: "fine"}, "These runs logged nothing of it."));
    }
  }
  const all = new Set();
  for (const group of groups) {
    for (const run of group.runs) {
      for (const key of [...Object.keys(run.columns), ...Object.keys(run.sparse)]) {
        if (key !== "step" && !key.startsWith("x/")) all.add(key);
      }
    }
  }
  const keys = [...all].sort();
  const first = keys.find((key) => key.startsWith("parts/")) ||
    (all.has("grad_norm") ? "grad_norm" : keys[0]);
  options($("metric"), keys.map((key) => [key, key]), first);
  let any = null;
  const show = () => {
    any?.remove();
    any = $("metric").value
      ? new Chart(document.querySelector("[data-charts=any]"),
        $("metric").value) : null;
    any?.draw();
  };
  $("metric").addEventListener("change", show);
  if (keys.length) show();
}

function layLegend() {
  const legend = $("legend");
  const all = el("button", {type: "button", onclick: () => {
    state.shown = new Set(state.shown.size === groups.length ? []
      : groups.keys());
    update();
  }});
  const buttons = groups.map((group, i) => el("button", {
    type: "button", "data-group": group.name,
    title: "Click: show or hide. Double-click: this one alone.",
    onclick: () => {
      if (!state.shown.delete(i)) state.shown.add(i);
      update();
    },
    ondblclick: () => {
      state.shown = new Set([i]);
      update();
    },
  }));
  const update = () => {
    all.textContent = state.shown.size === groups.length ? "none" : "all";
    buttons.forEach((button, i) => {
      button.setAttribute("aria-pressed", String(state.shown.has(i)));
      button.replaceChildren(swatch(i), groups[i].name);
    });
    redraw();
  };
  if (groups.length > 1) legend.append(all);
  legend.append(...buttons);
  update();
  dark.addEventListener("change", update);
}

function layControls() {
  const remember = (id, key, convert = String) => {
    const control = $(id);
    const set = () => {
      state[key] = convert(control.value);
      if (id === "smoothing") $("smoothing-value").value = control.value;
      redraw();
    };
    control.addEventListener("input", set);
    set();
  };
  // Many bands on top of each other show nothing.
  if (groups.length > 6) $("band").value = "none";
  remember("axis", "axis");
  remember("smoothing", "smoothing", Number);
  remember("band", "band");
}

// The table.

const last = (run, key) => {
  const column = run.columns[key];
  if (!column) return null;
  const tail = column.slice(-Math.max(1, Math.ceil(column.length / 10)))
    .filter((value) => value !== null);
  return tail.length ? tail.reduce((a, b) => a + b) / tail.length : null;
};
const mean = (values) => {
  const found = values.filter((value) => value !== null && value !== undefined);
  return found.length ? found.reduce((a, b) => a + b) / found.length : null;
};
const over = (group, key) => mean(group.runs.map((run) => last(run, key)));

function interval(cell, write) {
  if (!cell || cell[0] === null) return {text: "–", value: null};
  const fine = cell[1] === null ? "" : `${write(cell[1])} to ${write(cell[2])}`;
  return {text: write(cell[0]), fine, value: cell[0],
    mark: {"1": "up", "-1": "down"}[cell[3]]};
}

function tableColumns() {
  const kinds = (group, kind, what) => (group.summary[kind] || {})[what];
  const columns = [
    {name: "group", cell: (group, i) => ({text: group.name, value: i, group: i})},
    {name: "seeds", cell: (group) => ({
      text: group.runs.every((run) => run.finished) ? `${group.runs.length}`
        : `${group.runs.filter((run) => run.finished).length} of ${group.runs.length}`,
      value: group.runs.length})},
  ];
  for (const kind of ["greedy", "sampled"]) {
    if (!groups.some((group) => group.summary[kind])) continue;
    columns.push(
      {name: `${kind} before, %`, cell: (group) =>
        interval(kinds(group, kind, "before"), percent)},
      {name: `${kind} after, %`, cell: (group) =>
        interval(kinds(group, kind, "after"), percent)},
      {name: `${kind} gain, points`, cell: (group) =>
        interval(kinds(group, kind, "gain"), signed)});
    if (groups.length > 1) {
      const baseline = Number($("baseline").value);
      columns.push({name: `${kind} after, against ${groups[baseline].name}`,
        cell: (group, i) => {
          if (i === baseline) return {text: "·", value: 0};
          return interval(group.versus[kind][baseline], signed);
        }});
    }
  }
  columns.push(
    {name: "reward, last tenth", cell: (group) => plain(over(group, "reward/mean"))},
    {name: "λ-share", cell: (group) => plain(over(group, "gap/lambda_share"))},
    {name: "share of target", cell: (group) =>
      plain(over(group, "calibration/target_share"))},
    {name: "correlation", cell: (group) =>
      plain(over(group, "calibration/correlation"))},
    {name: "minutes", cell: (group) => plain(mean(group.runs.map((run) =>
      (run.columns["x/seconds"] || []).at(-1))) / 60 || null)},
    {name: "forwards, M", cell: (group) => plain(mean(group.runs.map((run) =>
      (run.columns["x/forwards"] || []).at(-1))) / 1e6 || null)});
  return columns;
}
const plain = (value) => ({text: number(value), value});

const order = {column: 0, down: false};
function layTable() {
  // A column that no group has anything in only takes room.
  const columns = tableColumns().filter((column) =>
    groups.some((group, i) => column.cell(group, i).value !== null));
  const rows = groups.map((group, i) => columns.map((c) => c.cell(group, i)));
  const sorted = rows.map((row, i) => i).sort((a, b) => {
    const [x, y] = [a, b].map((i) => rows[i][order.column].value);
    if (x === null || y === null) return (x === null) - (y === null);
    return order.down ? y - x : x - y;
  });
  const head = el("tr", {}, ...columns.map((column, i) => el("th", {
    scope: "col",
    "aria-sort": i !== order.column ? "none"
      : order.down ? "descending" : "ascending",
  }, el("button", {type: "button", onclick: () => {
    order.down = order.column === i ? !order.down : i > 0;
    order.column = i;
    layTable();
    $("comparison").querySelectorAll("thead button")[i].focus();
  }}, column.name))));
  const body = sorted.map((i) => el("tr", {"data-group": groups[i].name},
    ...rows[i].map((cell, place) => el(place ? "td" : "th",
      {scope: place ? null : "row", class: cell.mark || null},
      cell.group === undefined ? null : swatch(cell.group),
      cell.group === undefined ? cell.text : ` ${cell.text}`,
      cell.fine ? el("small", {}, cell.fine) : null))));
  $("comparison").replaceChildren(el("thead", {}, head),
    el("tbody", {}, ...body));
}

function tableNote() {
  const summaries = groups.flatMap((group) =>
    ["greedy", "sampled"].map((kind) => group.summary[kind]).filter(Boolean));
  const how = [...new Set(summaries.map((summary) => summary.how))];
  const n = [...new Set(summaries.map((summary) => summary.n).filter(Boolean))];
  const splits = [...new Set(groups.map((group) => group.split))];
  const few = Math.min(...groups.map((group) => group.summary.runs)
    .filter((runs) => runs > 0));
  $("table-note").textContent = summaries.length
    ? `Split: ${splits.join(", ")}${n.length ? `, n = ${n.join(", ")}` : ""}. ` +
      `Small figures: 95 % intervals (${how.join("; ")}); gains and ` +
      "differences are paired by prompt and seed; green or red where the " +
      "interval leaves 0 out." +
      (few === 1 ? " With one seed an interval sees nothing of the seeds: it " +
        "is narrower than the truth, and a difference of groups gets no colour."
        : "")
    : "No run has two evaluations yet.";
}

// Calibration.

function svg(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) {
    node.setAttribute(key, value);
  }
  if (text !== undefined) node.textContent = text;
  return node;
}

function ticks(low, high, count = 5) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const out = [];
  for (let v = Math.ceil(low / step) * step; v <= high + 1e-9 * step; v += step) {
    out.push(Math.abs(v) < 1e-9 * step ? 0 : v);
  }
  return out;
}

// Calibration of a run at a step: measured points, or what slope and
// correlation imply for advantages of -2 to 2.
function calibrationsOf(group, run) {
  if (run.scatter.length) return run.scatter;
  const lambda = group.lambda;
  const share = run.columns["calibration/target_share"];
  if (!lambda || !share) return [];
  const known = share.map((value, i) => i).filter((i) => share[i] !== null);
  const picked = [...new Set([0.1, 0.5, 1].map((at) =>
    known[Math.round(at * (known.length - 1))]))];
  return picked.map((i) => ({
    step: run.columns.step[i], slope: share[i], intercept: 0,
    correlation: (run.columns["calibration/correlation"] || [])[i],
    points: [], reach: 2 / lambda,
  }));
}

function layCalibration() {
  const able = groups.map((group, i) => i).filter((i) =>
    groups[i].runs.some((run) => calibrationsOf(groups[i], run).length));
  const [groupBox, runBox, stepBox] = ["group", "run", "step"].map((name) =>
    $(`calibration-${name}`));
  if (!able.length) {
    groupBox.closest(".controls").hidden = true;
    $("scatter").append(el("figcaption", {},
      "No group has λ > 0 and logged its calibration."));
    return;
  }
  options(groupBox, able.map((i) => [i, groups[i].name]));
  const group = () => groups[Number(groupBox.value)];
  const run = () => group().runs[Number(runBox.value)];
  const setRuns = () => {
    options(runBox, group().runs.map((run, i) => [i, run.seed])
      .filter(([i]) => calibrationsOf(group(), group().runs[i]).length));
    setSteps();
  };
  const setSteps = () => {
    const found = calibrationsOf(group(), run());
    options(stepBox, found.map((entry, i) => [i, entry.step]),
      String(found.length - 1));
    draw();
  };
  const draw = () => drawScatter(group(), groups.indexOf(group()), run(),
    Number(stepBox.value));
  groupBox.addEventListener("change", setRuns);
  runBox.addEventListener("change", setSteps);
  stepBox.addEventListener("change", draw);
  dark.addEventListener("change", draw);
  setRuns();
}

function drawScatter(group, index, run, place) {
  const found = calibrationsOf(group, run);
  const chosen = found[place];
  const measured = chosen.points.length > 0;
  const W = 640, H = 360, left = 58, right = 14, top = 12, bottom = 44;
  const xs = measured ? chosen.points.map((p) => p[0])
    : [-chosen.reach, chosen.reach];
  const ys = measured ? chosen.points.map((p) => p[1])
    : found.flatMap((entry) => xs.map((x) => entry.slope * x));
  const room = (values) => {
    const low = Math.min(0, ...values), high = Math.max(0, ...values);
    const pad = 0.06 * (high - low) || 1;
    return [low - pad, high + pad];
  };
  const [x0, x1] = room(xs), [y0, y1] = room(ys);
  const X = (x) => left + (x - x0) / (x1 - x0) * (W - left - right);
  const Y = (y) => H - bottom - (y - y0) / (y1 - y0) * (H - top - bottom);
  const picture = svg("svg", {viewBox: `0 0 ${W} ${H}`, role: "img",
    "aria-label": `Estimate against target at step ${chosen.step}: slope ` +
      `${number(chosen.slope)}, correlation ${number(chosen.correlation)}`});
  const clip = svg("clipPath", {id: "frame"});
  clip.append(svg("rect", {x: left, y: top, width: W - left - right,
    height: H - top - bottom}));
  picture.append(clip);
  for (const x of ticks(x0, x1)) {
    picture.append(
      svg("line", {x1: X(x), x2: X(x), y1: top, y2: H - bottom,
        stroke: css("--grid")}),
      svg("text", {x: X(x), y: H - bottom + 16, "text-anchor": "middle"},
        short(x)));
  }
  for (const y of ticks(y0, y1)) {
    picture.append(
      svg("line", {x1: left, x2: W - right, y1: Y(y), y2: Y(y),
        stroke: css("--grid")}),
      svg("text", {x: left - 6, y: Y(y) + 4, "text-anchor": "end"}, short(y)));
  }
  const unit = group.unit ? `, nats per ${group.unit}` : "";
  picture.append(
    svg("text", {x: (left + W - right) / 2, y: H - 8, "text-anchor": "middle"},
      `target A/λ${unit}`),
    svg("text", {x: 14, y: (top + H - bottom) / 2, "text-anchor": "middle",
      transform: `rotate(-90 14 ${(top + H - bottom) / 2})`}, "estimate d̂"));
  const inside = svg("g", {"clip-path": "url(#frame)"});
  picture.append(inside);
  const line = (slope, intercept, attributes) => inside.append(svg("line", {
    x1: X(x0), x2: X(x1), y1: Y(slope * x0 + intercept),
    y2: Y(slope * x1 + intercept), ...attributes}));
  line(1, 0, {stroke: css("--faint"), "stroke-dasharray": "5 4"});
  for (const [x, y] of chosen.points) {
    inside.append(svg("circle", {cx: X(x), cy: Y(y), r: 3, fill: colour(index),
      "fill-opacity": 0.45}));
  }
  if (!measured) {
    for (const entry of found) {
      if (entry !== chosen) {
        line(entry.slope, 0, {stroke: colour(index), "stroke-width": 1.5,
          "stroke-opacity": 0.35});
      }
    }
  }
  if (chosen.slope !== null) {
    line(chosen.slope, chosen.intercept || 0,
      {stroke: colour(index), "stroke-width": 2.5});
  }
  const origin = measured
    ? `${chosen.n} completions, points thinned to ${chosen.points.length}`
    : "lines from the logged slope, for advantages of −2 to 2; the runs wrote " +
      "no single completions";
  $("scatter").replaceChildren(picture, el("figcaption", {},
    `${group.name}, seed ${run.seed}, step ${chosen.step}: regression slope ` +
    `${number(chosen.slope)} (dashed: 1, estimate = target), correlation ` +
    `${number(chosen.correlation)}. ${origin}.`));
}

// Bars.

function layParts() {
  const place = $("parts-bars");
  const names = [...new Set(groups.flatMap((group) =>
    Object.keys(group.parts.after)))];
  if (!names.length) {
    place.append(el("p", {class: "fine"}, "No evaluation logged parts."));
    return;
  }
  const bars = el("div", {class: "bars"});
  for (const name of names) {
    const top = Math.max(1e-9, ...groups.flatMap((group) =>
      [group.parts.before[name] || 0, group.parts.after[name] || 0]));
    const scale = top <= 1 ? 1 : top;
    bars.append(el("div", {class: "part"}, name));
    groups.forEach((group, i) => {
      const [before, after] = [group.parts.before[name], group.parts.after[name]];
      if (after === undefined) return;
      const bar = (value, opacity) => {
        const node = el("i");
        node.style.width = `${100 * Math.max(0, value || 0) / scale}%`;
        node.style.background = colour(i);
        node.style.opacity = opacity;
        return node;
      };
      bars.append(el("div", {class: "name"}, group.name),
        el("div", {class: "track pair"}, bar(before, 0.4), bar(after, 1)),
        el("div", {class: "value"}, `${number(before)} → ${number(after)}`));
    });
  }
  place.replaceChildren(bars, el("p", {class: "fine"},
    "Upper, pale bar: before; lower: after. Mean over prompts and seeds."));
}

function layTime() {
  const place = $("time-bars");
  const means = groups.map((group) => {
    const names = [...new Set(group.runs.flatMap((run) =>
      Object.keys(run.phases)))];
    return Object.fromEntries(names.map((name) =>
      [name, mean(group.runs.map((run) => run.phases[name]))]));
  });
  const names = [...new Set(means.flatMap(Object.keys))]
    .filter((name) => name !== "first step" && name !== "other");
  const wanted = ["data", "rollout", "reward", "score", "update"];
  names.sort((a, b) => (wanted.indexOf(a) + 99) % 99 - (wanted.indexOf(b) + 99) % 99);
  if (means.some((times) => times.other > 0)) names.push("other");
  if (!names.length) {
    place.append(el("p", {class: "fine"}, "No step was timed."));
    return;
  }
  const total = means.map((times) =>
    names.reduce((sum, name) => sum + (times[name] || 0), 0));
  const top = Math.max(...total);
  const hue = (i) => names[i] === "other" ? css("--line") : colour(i);
  const bars = el("div", {class: "bars"});
  groups.forEach((group, g) => {
    if (!total[g]) return;
    const track = el("div", {class: "track", role: "img",
      "aria-label": names.map((name) =>
        `${name} ${number(means[g][name] || 0)} s`).join(", ")});
    names.forEach((name, i) => {
      const piece = el("i", {title: `${name}: ${number(means[g][name] || 0)} s`});
      piece.style.width = `${100 * (means[g][name] || 0) / top}%`;
      piece.style.background = hue(i);
      track.append(piece);
    });
    bars.append(el("div", {class: "name"}, group.name), track,
      el("div", {class: "value"}, `${number(total[g])} s` +
        (means[g]["first step"] ? `, first ${number(means[g]["first step"])} s` : "")));
  });
  const key = el("div", {class: "keyline"}, ...names.map((name, i) => {
    const mark = el("i");
    mark.style.background = hue(i);
    return el("span", {}, mark, name);
  }));
  place.replaceChildren(key, bars);
}

// Completions.

const FIRST_PAIRS = 6;
// Names of special tokens, such as the end of the text: one mark instead.
const SPECIAL = /^<\|?[\w ]+\|?>$/;
const players = new Set();
function layPairs() {
  const able = groups.map((group, i) => i).filter((i) =>
    groups[i].runs.some((run) => Object.keys(run.pairs).length));
  const [groupBox, runBox, kindBox, changeBox] =
    ["group", "run", "kind", "change"].map((name) => $(`samples-${name}`));
  if (!able.length) {
    groupBox.closest(".controls").hidden = true;
    $("samples-count").textContent = "No run kept two evaluations' completions.";
    return;
  }
  options(groupBox, able.map((i) => [i, groups[i].name]));
  const run = () => groups[Number(groupBox.value)].runs[Number(runBox.value)];
  const setRuns = () => {
    options(runBox, groups[Number(groupBox.value)].runs
      .map((run, i) => [i, run.seed])
      .filter(([i]) => Object.keys(
        groups[Number(groupBox.value)].runs[i].pairs).length));
    setKinds();
  };
  const setKinds = () => {
    const before = kindBox.value;
    const kinds = Object.keys(run().pairs);
    options(kindBox, kinds.map((kind) => [kind, kind]),
      kinds.includes(before) ? before : kinds[0]);
    show();
  };
  const show = () => {
    for (const timer of players) clearInterval(timer);
    players.clear();
    const all = run().pairs[kindBox.value] || [];
    const kept = all.filter((pair) => !changeBox.value || changeBox.value ===
      `${Number(pair.before.correct)}${Number(pair.after.correct)}`);
    $("samples-count").textContent =
      `${kept.length} of the ${all.length} prompts kept in this page.`;
    const article = (pair) => el("article", {class: "pair", tabindex: "-1"},
      el("div", {class: "prompt"}, `prompt ${pair.index}: `,
        el("code", {}, pair.prompt)),
      el("div", {class: "sides"}, side("before", pair.before),
        side("after", pair.after)));
    layDenoising(kept.find((pair) => pair.before.pieces || pair.after.pieces));
    const more = el("button", {type: "button", onclick: () => {
      const rest = kept.slice(FIRST_PAIRS).map(article);
      more.replaceWith(...rest);
      rest[0].focus({preventScroll: true});
    }}, `show the other ${kept.length - FIRST_PAIRS}`);
    $("pairs").replaceChildren(...kept.slice(0, FIRST_PAIRS).map(article));
    if (kept.length > FIRST_PAIRS) $("pairs").append(more);
  };
  groupBox.addEventListener("change", setRuns);
  runBox.addEventListener("change", setKinds);
  kindBox.addEventListener("change", show);
  changeBox.addEventListener("change", show);
  setRuns();
}

function side(when, sample) {
  const text = el("pre", {}, sample.text || "(empty)");
  return el("div", {class: sample.correct ? "side right" : "side"},
    el("h3", {}, when,
      el("b", {}, `${sample.correct ? "right" : "wrong"}, reward ${number(sample.reward)}`)),
    text, sample.pieces ? player(sample, text) : null,
    el("div", {class: "reason"}, sample.reason));
}

// One completion large, before and after, played together.
function layDenoising(pair) {
  const place = $("denoising");
  place.replaceChildren();
  if (!pair) {
    place.append(el("p", {class: "fine"},
      "These samples do not tell which forward wrote which piece."));
    return;
  }
  const stages = ["before", "after"].filter((when) => pair[when].pieces)
    .map((when) => {
      const cells = el("div", {class: "cells"});
      const controls = player(pair[when], cells, true);
      return {controls, node: el("div", {class: "stage"},
        el("h3", {}, `${when}: ${pair[when].correct ? "right" : "wrong"}`),
        cells, controls)};
    });
  const all = el("button", {type: "button", id: "play-all", onclick: () => {
    for (const stage of stages) {
      stage.controls.querySelector("button").click();
    }
  }}, "play both");
  place.append(el("p", {}, `prompt ${pair.index}: `, el("code", {},
    pair.prompt)), el("div", {class: "stages"},
  ...stages.map((stage) => stage.node)), stages.length > 1 ? all : "",
  el("p", {class: "fine"}, "Small figures: the forward that wrote the piece. " +
    "The choice above picks the completion."));
}

// The denoising of one completion: pieces appear in the order of their commit.
function player(sample, text, large = false) {
  const steps = [...new Set(sample.commit_step)].sort((a, b) => a - b);
  const slider = el("input", {type: "range", min: "0", max: steps.length,
    value: steps.length, "aria-label": "denoising step"});
  const say = el("span", {});
  let timer = null;
  const draw = () => {
    const at = Number(slider.value);
    say.textContent = `step ${at} of ${steps.length}`;
    if (at === steps.length && timer === null && !large) {
      text.textContent = sample.text || "(empty)";
      return;
    }
    text.replaceChildren(...sample.pieces.map((raw, i) => {
      const piece = SPECIAL.test(raw) ? "∎" : raw;
      const place = steps.indexOf(sample.commit_step[i]);
      if (place >= at) {
        return el("span", {class: "hidden-piece"}, large ? "" : "▯");
      }
      const node = el("span", {class: place === at - 1 && at < steps.length
        ? "new-piece" : ""}, piece);
      if (large) node.append(el("small", {}, String(sample.commit_step[i] + 1)));
      return node;
    }));
  };
  const stop = () => {
    clearInterval(timer);
    players.delete(timer);
    timer = null;
    button.textContent = "play";
    draw();
  };
  const button = el("button", {type: "button", onclick: () => {
    if (timer !== null) return stop();
    slider.value = 0;
    button.textContent = "stop";
    timer = setInterval(() => {
      if (Number(slider.value) >= steps.length) return stop();
      slider.value = Number(slider.value) + 1;
      draw();
    }, Math.max(60, Math.min(400, 6000 / steps.length)));
    players.add(timer);
    draw();
  }}, "play");
  slider.addEventListener("input", draw);
  draw();
  return el("div", {class: "player"}, button, slider, say);
}

// Config.

function layConfig() {
  const keys = [...new Set(groups.flatMap((group) => Object.keys(group.changes)))];
  if (keys.length) {
    $("changes").append(el("table", {},
      el("thead", {}, el("tr", {}, el("th", {scope: "col"}, "group"),
        ...keys.map((key) => el("th", {scope: "col"}, key)))),
      el("tbody", {}, ...groups.map((group, i) => el("tr", {},
        el("th", {scope: "row"}, swatch(i), ` ${group.name}`),
        ...keys.map((key) => el("td", {}, key in group.changes
          ? String(group.changes[key]) : "·")))))));
    $("changes").append(el("p", {class: "fine"},
      "A dot: what most groups have."));
  } else {
    $("changes").append(el("p", {class: "fine"},
      "The groups' configs do not differ."));
  }
  const list = (place, entries, none) => place.append(
    ...(entries.length ? entries.map(([key, value]) => el("div", {},
      el("span", {}, `${key} = `), value)) : [none]));
  list($("shared"), Object.entries(data.config).map(([key, value]) =>
    [key, typeof value === "string" ? value || '""' : JSON.stringify(value)]),
  "Nothing.");
  list($("environment"), Object.entries(data.environment).map(([key, values]) =>
    [key, values.join(" | ")]), "These runs did not write it down.");
  $("runs").append(el("table", {},
    el("thead", {}, el("tr", {}, ...["folder", "group", "seed", "step", ""]
      .map((name) => el("th", {scope: "col"}, name)))),
    el("tbody", {}, ...groups.flatMap((group) => group.runs.map((run) =>
      el("tr", {}, el("td", {}, run.folder), el("td", {}, group.name),
        el("td", {}, String(run.seed)),
        el("td", {}, `${run.step} of ${run.steps ?? "?"}`),
        el("td", {}, run.finished ? "finished" : "not finished")))))));
}

function start() {
  const runs = groups.flatMap((group) => group.runs);
  const open = runs.filter((run) => !run.finished).length;
  $("lead").textContent = `${runs.length} run${runs.length > 1 ? "s" : ""} in ` +
    `${groups.length} group${groups.length > 1 ? "s" : ""}` +
    (open ? `, ${open} not finished` : "") +
    (data.bin > 1 ? `; each point of a curve is a mean over ${data.bin} steps` : "") +
    ".";
  document.querySelector("nav").append(...[...document.querySelectorAll(
    "section")].map((section) => el("a", {href: `#${section.id}`},
    section.querySelector("h2").textContent.split(/[:,]/)[0])));
  if (data.notes.length) {
    $("notes").hidden = false;
    $("notes").append(...data.notes.map((note) => el("div", {}, note)));
  }
  options($("baseline"), groups.map((group, i) => [i, group.name]));
  if (groups.length < 2) $("baseline").closest(".controls").hidden = true;
  $("baseline").addEventListener("change", layTable);
  layTable();
  tableNote();
  layLegend();
  layCharts();
  layControls();
  layCalibration();
  layParts();
  layTime();
  layPairs();
  layConfig();
  dark.addEventListener("change", () => {
    layTable();
    layParts();
    layTime();
    redraw();
  });
}

start();
})();
