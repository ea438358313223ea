const DASHES = ["", "7 4", "2 3", "9 3 2 3", "12 3", "4 2 1 2", "1 2", "14 4 4 4"];
const state = { smooth: 0, log: false, seeds: false, off: new Set() };
const charts = [];
const G = DATA.groups;
const tip = $("#tip");

/** Ticks at 1, 2, 5 times a power of ten. */
function ticks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((m) => m * power >= raw) * power, out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) out.push(+(i * step).toPrecision(12));
  return out;
}
function smoothed(values) {
  let mean = 0, weight = 0;
  return values.map((v) => {
    mean = state.smooth * mean + (1 - state.smooth) * v;
    weight = state.smooth * weight + (1 - state.smooth);
    return mean / weight;
  });
}
const key = (i, dash = i) => el("svg", { class: "key", viewBox: "0 0 30 10", "aria-hidden": true },
  el("line", { x1: 1, x2: 29, y1: 5, y2: 5, stroke: color(i), "stroke-width": 2.5, "stroke-dasharray": DASHES[dash % 8] }));

/** A line chart in its figure; `curve.lines` have x, mean, low, high, and a group or a name, color and dash. */
function chart(into, curve) {
  const label = (l) => l.label || G[l.group].name;
  const drawing = el("div"), table = el("div"), dots = curve.lines.every((l) => l.x.length <= 12), fixed = !curve.name || curve.name.startsWith("eval_");
  const numbers = el("details", { class: "data" }, el("summary", {}, "numbers"), table);
  into.append(el("figure", {}, el("figcaption", {}, el("h3", {}, curve.title), el("span", { class: "quiet" }, curve.unit),
    curve.lines.filter((l) => l.label).map((l) => el("span", { class: "quiet" }, key(l.color, l.dash), l.label))), curve.means ? el("p", { class: "means quiet" }, curve.means) : "", drawing, numbers));
  let lines = [], x0, x1, sx, sy, cursor, last = null;
  function draw() {
    const W = Math.max(240, drawing.clientWidth || 320), H = curve.height || 190, L = 44, R = 10, T = 10, B = 22;
    const log = state.log && /KL/.test(curve.title);
    lines = curve.lines.filter((l) => l.group === undefined || !state.off.has(l.group)).map((l) => {
      const keep = l.mean.map((v, i) => v !== null && (!log || v > 0) ? i : -1).filter((i) => i >= 0);
      const of = (name) => keep.map((i) => l[name][i]);
      const raw = fixed ? of : (name) => smoothed(of(name));
      return { ...l, x: of("x"), mean: raw("mean"), low: raw("low"), high: raw("high") };
    }).filter((l) => l.x.length);
    if (!lines.length) return drawing.replaceChildren(el("p", { class: "quiet" }, "nothing to show"));
    const xs = lines.flatMap((l) => l.x), ys = lines.flatMap((l) => [...l.low, ...l.high, ...l.mean]).filter((v) => v !== null);
    const map = log ? Math.log10 : (v) => v;
    x0 = Math.min(...xs); x1 = Math.max(...xs);
    let y0 = Math.min(...ys), y1 = Math.max(...ys);
    if (log) y0 = Math.max(y0, Math.min(...lines.flatMap((l) => l.mean)) / 2);
    else { if (y0 > 0 && y0 < 0.6 * y1) y0 = 0; const size = Math.max(Math.abs(y0), Math.abs(y1)), air = 0.05 * (y1 - y0 > 1e-6 * size ? y1 - y0 : size || 1); if (y0 !== 0) y0 -= air; y1 += air; }
    if (curve.unit === "%" && !log) { y0 = Math.max(0, y0); y1 = Math.min(Math.max(y1, y0 + 1), 100); }
    sx = (v) => L + (W - L - R) * (x1 > x0 ? (v - x0) / (x1 - x0) : 0.5);
    sy = (v) => T + (H - T - B) * (1 - (map(Math.max(v, log ? y0 : -Infinity)) - map(y0)) / (map(y1) - map(y0) || 1));
    const svg = el("svg", { viewBox: `0 0 ${W} ${H}`, height: H, role: "img", tabindex: 0, "aria-label": told() });
    const yticks = log ? [1, 2, 5].flatMap((m) => [-5, -4, -3, -2, -1, 0, 1, 2].map((p) => m * 10 ** p)).filter((v) => v >= y0 && v <= y1) : ticks(y0, y1, 4);
    for (const t of yticks) svg.append(el("line", { class: "axis", x1: L, x2: W - R, y1: sy(t), y2: sy(t) }), el("text", { x: L - 6, y: sy(t) + 4, "text-anchor": "end" }, tick(t)));
    for (const t of ticks(x0, x1, Math.min(6, W / 60)).filter(Number.isInteger)) svg.append(el("text", { x: sx(t), y: H - 5, "text-anchor": "middle" }, String(t)));
    for (const [n, l] of lines.entries()) {
      const c = color(l.color ?? l.group), dash = DASHES[(l.dash ?? l.group) % 8];
      const path = (xs, ys) => "M" + xs.map((x, i) => `${sx(x).toFixed(1)},${sy(ys[i]).toFixed(1)}`).join("L");
      if (l.low.some((v, i) => v !== l.high[i]) && l.x.length > 1)
        svg.append(el("path", { d: path(l.x, l.high) + "L" + path([...l.x].reverse(), [...l.low].reverse()).slice(1) + "Z", fill: c, opacity: 0.16 }));
      if (dots) for (const [i, x] of l.x.entries()) if (l.low[i] !== l.high[i]) svg.append(el("line", { x1: sx(x), x2: sx(x), y1: sy(l.low[i]), y2: sy(l.high[i]), stroke: c, opacity: 0.5 }));
      if (state.seeds) for (const [rx, ry] of l.runs || []) svg.append(el("path", { d: path(rx, fixed ? ry : smoothed(ry)), stroke: c, fill: "none", "stroke-width": 1, opacity: 0.6 }));
      svg.append(el("path", { d: path(l.x, l.mean), stroke: c, fill: "none", "stroke-width": 2, "stroke-dasharray": dash, "stroke-linejoin": "round" }));
      if (dots) for (const [i, x] of l.x.entries()) svg.append(el("circle", { cx: sx(x), cy: sy(l.mean[i]), r: 3, fill: n % 2 ? "var(--paper)" : c, stroke: c, "stroke-width": 1.6 }));
    }
    cursor = el("line", { class: "axis", y1: T, y2: H - B, stroke: "currentColor", visibility: "hidden" });
    svg.append(cursor);
    svg.addEventListener("pointermove", (e) => {
      const box = svg.getBoundingClientRect(), at = x0 + ((e.clientX - box.left) * W / box.width - L) / (W - L - R) * (x1 - x0);
      hover(nearest(at), e.clientX, e.clientY);
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (e) => {
      const way = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
      if (!way) return;
      e.preventDefault();
      const all = [...new Set(lines.flatMap((l) => l.x))].sort((a, b) => a - b), box = svg.getBoundingClientRect();
      const x = all[Math.min(all.length - 1, Math.max(0, last === null ? 0 : all.indexOf(last) + way))];
      hover(x, box.left + sx(x), box.top + 30);
    });
    drawing.replaceChildren(svg);
  }
  const tick = (t) => Math.abs(t) >= 1e4 ? `${+(t / 1000).toPrecision(3)}k` : String(+t.toPrecision(4)).replace("-", "−");
  const told = () => `${curve.title}: ` + lines.map((l) => `${label(l)} from ${show(l.mean[0])} to ${show(l.mean.at(-1))} ${curve.unit}`).join("; ");
  const nearest = (at) => lines.flatMap((l) => l.x).reduce((a, b) => a !== null && Math.abs(a - at) <= Math.abs(b - at) ? a : b, null); // null: every group is hidden
  function hover(x, px, py) {
    if (x === null) return hide();
    last = x;
    if (curve.name) for (const c of charts) c.mark(x); else mark(x);
    const rows = lines.filter((l) => l.x.includes(x)).map((l) => {
      const i = l.x.indexOf(x), wide = l.low[i] !== l.high[i];
      return el("tr", {}, el("td", {}, key(l.color ?? l.group, l.dash ?? l.group), label(l)), el("td", { class: "number" }, show(l.mean[i])), el("td", { class: "quiet number" }, wide ? `${show(l.low[i])} to ${show(l.high[i])}` : ""));
    });
    tip.replaceChildren(el("b", {}, `${curve.at || "step"} ${show(x, 0)} `), el("span", { class: "quiet" }, curve.unit), el("table", {}, rows));
    tip.hidden = false;
    place(tip, px, py);
  }
  function mark(x) {
    if (!cursor || !sx) return;
    const inside = x !== null && x >= x0 && x <= x1;
    cursor.setAttribute("visibility", inside ? "visible" : "hidden");
    if (inside) { cursor.setAttribute("x1", sx(x)); cursor.setAttribute("x2", sx(x)); }
  }
  function hide() { tip.hidden = true; last = null; for (const c of charts) c.mark(null); }
  numbers.addEventListener("toggle", () => {
    if (!numbers.open || table.childElementCount) return;
    const xs = [...new Set(curve.lines.flatMap((l) => l.x))].sort((a, b) => a - b);
    table.append(el("table", {}, el("tr", {}, el("th", {}, curve.at || "step"), curve.lines.map((l) => el("th", { class: "number" }, label(l)))),
      xs.map((x) => el("tr", {}, el("td", { class: "number" }, show(x, 0)), curve.lines.map((l) => el("td", { class: "number" }, l.x.includes(x) ? show(l.mean[l.x.indexOf(x)], 4) : ""))))));
  });
  charts.push({ draw, mark });
  draw();
}

const range = (e, factor, digits) => el("span", { class: "range number" }, `${show(e.low * factor, digits)} to ${show(e.high * factor, digits)}`);
function results() {
  const percent = (e) => e ? [`${show(e.value * 100)} %`, range(e, 100)] : ["–"], plain = (e) => e ? [show(e.value), range(e, 1)] : ["–"];
  const time = (s) => s >= 5400 ? `${show(s / 3600)} h` : s >= 90 ? `${show(s / 60)} min` : `${show(s)} s`;
  const columns = [
    ["Accuracy before", (g) => percent(g.eval_accuracy?.first), "eval_accuracy"], ["Accuracy after", (g) => percent(g.eval_accuracy?.last), "eval_accuracy"],
    ["Held-out KL before", (g) => plain(g.eval_reverse_kl?.first), "eval_reverse_kl"], ["Held-out KL after", (g) => plain(g.eval_reverse_kl?.last), "eval_reverse_kl"],
    ["KL of rollouts", (g) => g.reverse_kl ? [`${show(g.reverse_kl.first)} → ${show(g.reverse_kl.last)}`] : ["–"], "reverse_kl"],
    ["Length", (g) => [show(g.length?.last)], "length"], ["Ended", (g) => [`${show((g.stopped?.last ?? 0) * 100)} %`], "stopped"],
    ["Tokens / s", (g) => [show(g.tokens_per_s)], null], ["Time", (g) => [time(g.seconds)], null],
  ].filter(([, , name]) => !name || G.some((g) => g[name]));
  const head = el("tr", {}, ["", "Seeds", "Steps", ...columns.map((c) => c[0])].map((t, i) => el("th", { class: i > 2 ? "number" : "", scope: "col" }, t)));
  const rows = G.map((g, i) => el("tr", {}, el("td", { title: g.folders.join("\n") }, key(i), g.name), el("td", {}, g.seeds.join(", ")),
    el("td", {}, g.steps < g.asked ? `${g.steps} of ${g.asked}` : String(g.steps)), columns.map((c) => el("td", { class: "number" }, c[1](g)))));
  const n = [...new Set(G.map((g) => g.evaluated).filter(Boolean))].join(", ");
  $("#results").append(el("div", { class: "scroll" }, el("table", {}, head, rows)),
    el("p", { class: "quiet" }, n ? `Held out: ${n} prompts. Accuracy with Wilson's 95 % interval over prompts, widened to hold every seed; ` : "", "KL in nats per token, with a 95 % interval over prompts in the same way. Rollouts: the mean over the first and the last fifth of the steps."));
}

/** Differences with their intervals, on one axis through zero. */
function forest(into, table, question) {
  const rows = table.rows, W = 330, H = 26, all = rows.flatMap((r) => [r.low, r.high, 0]), span = Math.max(...all) - Math.min(...all) || 1;
  const lo = Math.min(...all) - 0.06 * span, hi = Math.max(...all) + 0.06 * span, sx = (v) => W * (v - lo) / (hi - lo);
  const line = (r) => el("svg", { viewBox: `0 0 ${W} ${H}`, height: H, style: `min-width:${W * 0.6}px`, role: "img", "aria-label": `${show(r.low)} to ${show(r.high)}` },
    el("line", { class: "axis", x1: sx(0), x2: sx(0), y1: 0, y2: H, "stroke-dasharray": "3 3", style: "stroke:var(--quiet)" }),
    el("line", { x1: sx(r.low), x2: sx(r.high), y1: H / 2, y2: H / 2, stroke: "var(--c0)", "stroke-width": 3 }),
    el("circle", { cx: sx(r.value), cy: H / 2, r: 4.5, fill: "var(--c0)" }));
  const digits = table.unit === "points" ? 1 : 3;
  const verdict = (r) => r.better + r.worse === 0 ? "no prompt differs" : r.low > 0 || r.high < 0 ? "" : "not told apart from zero";
  into.append(el("h3", {}, `${table.title}: ${question}`, el("span", { class: "quiet" }, ` ${table.unit}`)), el("div", { class: "scroll forest" }, el("table", {},
    el("tr", {}, ["", "difference", "95 % interval", "", "prompts up / down / all", ""].map((t, i) => el("th", { class: i === 1 ? "number" : "" }, t))),
    rows.map((r) => el("tr", {}, el("td", {}, el("b", {}, r.a), ` against ${r.b}`), el("td", { class: "number" }, el("b", {}, signed(r.value, digits))),
      el("td", { class: "number" }, `${signed(r.low, digits)} to ${signed(r.high, digits)}`), el("td", { style: "width:40%" }, line(r)),
      el("td", { class: "number" }, `${r.better} / ${r.worse} / ${r.prompts}`), el("td", { class: "quiet" }, verdict(r)))))), el("br"));
}

const PHASES = { rollout: "the student writes", wait: "for rollouts written elsewhere", measure: "a pass without gradient", ask: "a teacher that writes", update: "teacher's scores, gradient, optimizer",
  look: "both models' likeliest tokens, of some rollouts", save: "the likeliest tokens of all rollouts, and files", snapshot: "weights handed on", evaluate: "held-out prompts" };
function phases() {
  const names = [...new Set(DATA.phases.flatMap((p) => Object.keys(p.seconds)))], into = $("#phases");
  const total = (p) => Object.values(p.seconds).reduce((a, b) => a + b, 0), most = Math.max(...DATA.phases.map(total));
  const shade = ["#0072b2", "#a84a00", "#00795a", "#8f4170", "#7a5700", "#555b64", "#2b6f99", "#6a44a0"];
  into.append(el("nav", {}, names.map((n, i) => el("span", {}, el("span", { style: `display:inline-block;width:.8em;height:.8em;border-radius:2px;background:${shade[i % 8]}` }), ` ${n} `))));
  for (const p of DATA.phases)
    into.append(el("div", { class: "phase" }, el("b", {}, p.name), el("div", { class: "bar", style: `width:${100 * total(p) / most}%` },
      names.filter((n) => p.seconds[n]).map((n) => el("span", { style: `background:${shade[names.indexOf(n) % 8]};flex:${p.seconds[n]} 0 0`, title: `${n}: ${show(p.seconds[n])} s a step` }, p.seconds[n] / most > 0.09 ? `${n} ${show(p.seconds[n])} s` : ""))),
      el("span", { class: "quiet number" }, `${show(total(p))} s / step`)));
  into.append(el("p", { class: "quiet" }, names.filter((n) => PHASES[n]).map((n) => `${n}: ${PHASES[n]}`).join("; "), "."));
}

function grid(rows, heads, changed = () => false) {
  return el("div", { class: "scroll" }, el("table", {}, heads && el("tr", {}, ["", ...heads].map((h) => el("th", {}, h))),
    rows.map((r) => el("tr", { class: changed(r) ? "changed" : "" }, el("td", {}, r[0]), r.slice(1).map((v) => el("td", {}, el("code", {}, v)))))));
}

function all() {
  const teachers = [...new Set(G.map((g) => `${g.student} from ${g.teacher}, on ${g.prompts}`))];
  $("#about").textContent = teachers.join("; ");
  document.title = `${G.map((g) => g.name).join(" · ")} – opd report`;
  const causes = new Map();
  for (const a of DATA.alarms) causes.set(a.name + a.remedy, [...(causes.get(a.name + a.remedy) || []), a]);
  $("#alarms").append(...causes.size ? [...causes.values()].map((same) => el("div", { class: "alarm", role: "note" }, el("b", {}, `${same[0].name} `),
    same.map((a) => `${a.run}: ${a.text}`).join("; "), ". ", el("span", { class: "quiet" }, `What to do: ${same[0].remedy}.`)))
    : [el("p", { class: "fine" }, "No alarms: lengths, entropies, repetition, truncation and the sampler look healthy.")]);
  results();
  $("#legend").append(...G.map((g, i) => el("button", { "aria-pressed": true, title: "Show or hide", onclick: (e) => {
    const on = state.off.delete(i) || !state.off.add(i);
    e.currentTarget.setAttribute("aria-pressed", on);
    redraw();
  } }, key(i), g.name)));
  for (const c of DATA.curves.filter((c) => c.main)) chart($("#curves"), c);
  const rest = DATA.curves.filter((c) => !c.main), more = $("#others");
  more.hidden = !rest.length;
  more.addEventListener("toggle", () => { if (more.open && rest.length) for (const c of rest.splice(0)) chart(more.querySelector("section"), c); });
  $("#seeds").hidden = G.every((g) => g.seeds.length < 2);
  for (const t of DATA.gains) forest($("#paired"), t, "what training changed");
  for (const t of DATA.between) forest($("#paired"), t, "runs against each other");
  $("#paired").append(el("p", { class: "quiet" }, DATA.gains.length + DATA.between.length
    ? "On the same prompts; 95 % percentile bootstrap over prompts, and over seeds where there are several."
    : "Needs --eval-prompts: no run has evaluated single prompts."));
  const byGroup = new Map();
  for (const p of DATA.positions) byGroup.set(p.name, [...(byGroup.get(p.name) || []), p]);
  for (const [name, lines] of byGroup) chart($("#positions"), { title: name, unit: "nats per token, 95 % band", at: "token", height: 210,
    lines: lines.map((p, i) => ({ ...p, runs: [], label: `step ${p.step}`, color: i ? G.findIndex((g) => g.name === name) : 6, dash: i ? 0 : 1 })) });
  if (!DATA.positions.length) $("#positions").append(el("p", { class: "quiet" }, "No rollouts were saved."));
  phases();
  const names = G.map((g) => g.name);
  if (G.length > 1) $("#config").append(el("h3", {}, DATA.differ.length ? "What differs" : "Nothing differs"), DATA.differ.length ? grid(DATA.differ, names) : "");
  $("#config").append(el("details", {}, el("summary", {}, `${DATA.same.length} settings that ${G.length > 1 ? "all runs share" : "the run had"}`), grid(DATA.same)));
  const env = DATA.environment, moved = env.rows.filter((r) => r[1]);
  $("#environment").append(grid(env.rows.filter((r) => !r[1]).map(([k, , v]) => [k, v])), moved.length ? el("h3", {}, "Differs between runs") : "", moved.length ? grid(moved.map(([k, , ...v]) => [k, ...v]), env.runs, () => true) : "");
}
const redraw = () => charts.forEach((c) => c.draw());
const toggle = (id) => $(`#${id}`).addEventListener("click", (e) => { state[id] = !state[id]; e.currentTarget.setAttribute("aria-pressed", state[id]); redraw(); });
toggle("log"); toggle("seeds");
$("#smooth").addEventListener("input", (e) => { state.smooth = +e.target.value; redraw(); });
$("#theme").addEventListener("click", theme);
all();
let waiting;
addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(redraw, 80); });
addEventListener("beforeprint", redraw);
