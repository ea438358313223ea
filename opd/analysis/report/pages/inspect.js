const HEIGHT = 58, DIVERGING = /ratio|advantage/, NEGATIVE = /log [pq]$/;
const LOG_P = "student log p", LOG_Q = "teacher log q", KL = "reverse KL";
const rollouts = DATA.rollouts, start = DATA.start, size = rollouts.length, tip = $("#tip");
const state = { color: "", sort: "saved", filter: "all", search: "", low: 0.01, at: 0, token: -1 };
let ids, trained, alternatives, columns = {}, scale = {}, stats = [], order = [];

/** The numbers that Python packed: their type, then gzip in base64. */
async function unpacked(text) {
  const [kind, body] = text.split(":"), letters = atob(body), raw = new Uint8Array(letters.length);
  for (let i = 0; i < raw.length; i++) raw[i] = letters.charCodeAt(i);
  const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("gzip"));
  const bytes = await new Response(stream).arrayBuffer();
  if (kind !== "b16") return new { u8: Uint8Array, u16: Uint16Array, i32: Int32Array, f32: Float32Array }[kind](bytes);
  return new Float32Array(Uint32Array.from(new Uint16Array(bytes), (v) => v << 16).buffer); // bfloat16: the upper half
}
/** What the largest colour stands for: 98 % of the tokens lie inside. */
function reach(x) {
  const sizes = x.filter((v) => !Number.isNaN(v)).map(Math.abs).sort();
  return sizes[Math.min(sizes.length - 1, Math.floor(sizes.length * 0.98))] || 1;
}
function shade(name, v) {
  if (Number.isNaN(v)) return "";
  const far = Math.min(1, Math.abs(v) / scale[name]);
  if (far < 0.02) return "";
  const which = DIVERGING.test(name) && v < 0 ? "var(--less)" : "var(--more)";
  return `rgba(${which}, ${(0.66 * far ** 0.6).toFixed(3)})`;
}
/** Longest run of tokens whose KL stays low: where it begins, and its length. */
function trap(b) {
  const kl = columns[KL];
  let best = [0, 0], run = 0;
  if (kl) for (let i = start[b]; i < start[b + 1]; i++) {
    run = kl[i] < state.low ? run + 1 : 0;
    if (run > best[1]) best = [i - run + 1, run];
  }
  return best;
}
function mean(x, b) {
  let sum = 0, n = 0;
  if (x) for (let i = start[b]; i < start[b + 1]; i++) if (!Number.isNaN(x[i])) { sum += x[i]; n++; }
  return n ? sum / n : NaN;
}
const words = (b) => typeof rollouts[b].prompt === "string" ? rollouts[b].prompt : rollouts[b].prompt.map((t) => `${t.role}: ${t.content}`).join("\n\n");
const SORTS = {
  saved: ["as saved", (b) => b], trap: ["longest trap first", (b) => -stats[b].trap[1]], kl: ["highest mean KL first", (b) => -stats[b].kl],
  rock: ["highest rock score first", (b) => -stats[b].rock],
  lowkl: ["lowest mean KL first", (b) => stats[b].kl], wrong: ["lowest outcome first", (b) => rollouts[b].outcome], right: ["highest outcome first", (b) => -rollouts[b].outcome],
  long: ["longest first", (b) => -stats[b].length], short: ["shortest first", (b) => stats[b].length],
};
const FILTERS = {
  all: ["all rollouts", () => true], right: ["right", (b) => rollouts[b].outcome >= 1], wrong: ["wrong", (b) => rollouts[b].outcome < 1],
  cut: ["truncated", (b) => !rollouts[b].stopped], untrained: ["with untrained tokens", (b) => stats[b].off > 0],
};

function arrange() {
  const current = order[state.at], text = state.search.toLowerCase();
  order = [...Array(size).keys()].filter((b) => FILTERS[state.filter][1](b) && (!text || stats[b].text.includes(text)));
  const by = SORTS[state.sort][1], value = new Map(order.map((b) => [b, by(b)]));
  const last = (v) => Number.isNaN(v) ? Infinity : v;
  order.sort((a, b) => last(value.get(a)) - last(value.get(b)) || a - b);
  state.at = Math.max(0, order.indexOf(current));
  $("#space").style.height = `${order.length * HEIGHT}px`;
  for (const row of rows.values()) row.remove();
  rows.clear();
  list();
  one();
}
/** Only the rows in sight exist. */
const rows = new Map();
function list() {
  const box = $("#list"), first = Math.max(0, Math.floor(box.scrollTop / HEIGHT) - 4), end = Math.min(order.length, Math.ceil((box.scrollTop + box.clientHeight) / HEIGHT) + 4);
  for (const [k, row] of rows) if (k < first || k >= end) { row.remove(); rows.delete(k); }
  for (let k = first; k < end; k++) if (!rows.has(k)) { const row = item(k); rows.set(k, row); $("#space").append(row); }
  for (const [k, row] of rows) row.setAttribute("aria-selected", k === state.at);
  $("#list").setAttribute("aria-activedescendant", `row${state.at}`);
  $("#about").textContent = `${DATA.run}, step ${DATA.step}: ${order.length === size ? size : `${order.length} of ${size}`} rollouts`;
}
function item(k) {
  const b = order[k], r = rollouts[b], s = stats[b], strip = el("canvas", { width: Math.max(1, Math.min(s.length, 400)), height: 1, "aria-hidden": "true" });
  paint(strip, b);
  return el("div", { class: "row", role: "option", id: `row${k}`, style: `top:${k * HEIGHT}px`, onclick: () => select(k) },
    el("div", {}, el("span", { class: `mark ${r.outcome >= 1 ? "right" : "wrong"}` }, r.outcome >= 1 ? "✓" : r.outcome > 0 ? "◐" : "✗"),
      el("span", { class: "grow" }, words(b)), el("span", { class: "quiet number" }, `${s.length}${r.stopped ? "" : "…"}`),
      el("span", { class: "quiet number" }, s.trap[1] ? `trap ${s.trap[1]}` : ""), el("span", { class: "number" }, show(s.kl))), strip);
}
/** A strip of the whole response: each pixel the strongest colour of its tokens. */
function paint(canvas, b) {
  const x = columns[state.color], n = stats[b].length, pen = canvas.getContext("2d");
  const pixels = pen.createImageData(canvas.width, 1), [more, less] = [[0, 114, 178], [213, 94, 0]];
  for (let p = 0; p < canvas.width; p++) {
    let v = 0;
    for (let i = Math.floor(p * n / canvas.width); i < Math.max((p + 1) * n / canvas.width, Math.floor(p * n / canvas.width) + 1); i++) {
      const at = x[start[b] + i];
      if (Math.abs(at) > Math.abs(v)) v = at;
    }
    const hue = DIVERGING.test(state.color) && v < 0 ? less : more, far = Math.min(1, Math.abs(v) / scale[state.color]);
    pixels.data.set([...hue, 18 + 220 * far ** 0.7], 4 * p);
  }
  pen.putImageData(pixels, 0, 0);
}
function select(k, quiet) {
  if (!order.length) return;
  state.at = Math.max(0, Math.min(order.length - 1, k));
  const box = $("#list"), top = state.at * HEIGHT;
  if (top < box.scrollTop) box.scrollTop = top;
  if (top + HEIGHT > box.scrollTop + box.clientHeight) box.scrollTop = top + HEIGHT - box.clientHeight;
  list();
  one();
  if (!quiet) $("#one").scrollTop = 0;
}
/** The selected rollout, token by token. */
function one() {
  const b = order[state.at], holder = $("#tokens");
  state.token = -1;
  tip.hidden = true;
  if (b === undefined) { holder.replaceChildren(el("p", { class: "quiet" }, "No rollout is like that.")); $("#facts").replaceChildren(); $("#prompt").textContent = ""; $("#answer").textContent = ""; return; }
  const r = rollouts[b], s = stats[b], fact = (name, value) => el("span", {}, el("span", { class: "quiet" }, `${name} `), el("b", { class: "number" }, value));
  $("#facts").replaceChildren(fact("rollout", String(r.index)), fact("outcome", show(r.outcome)), fact("tokens", String(s.length)), Number.isNaN(s.kl) ? "" : fact("mean KL", `${show(s.kl)} nats`),
    columns[KL] ? fact("longest trap", `${s.trap[1]} tokens`) : "", r.stopped ? "" : fact("", "truncated"), s.off ? fact("not trained on", `${s.off} tokens`) : "");
  $("#prompt").textContent = words(b);
  $("#answer").textContent = r.answer ? `Expected answer: ${r.answer}` : "";
  const text = state.search.toLowerCase(), spans = [], ends = [];
  let whole = "";
  for (let i = start[b]; i < start[b + 1]; i++) {
    const raw = DATA.tokens[ids[i]], span = el("span", { class: "t", "data-i": i });
    whole += raw.toLowerCase();
    ends.push(whole.length);
    const parts = raw.split("\n");
    parts.forEach((part, n) => { if (n) span.append(el("span", { class: "mark" }, "⏎"), "\n"); span.append(part); });
    if (!trained[i]) span.classList.add("off");
    if (i >= s.trap[0] && i < s.trap[0] + s.trap[1]) span.classList.add("trap");
    spans.push(span);
  }
  if (text) for (let at = whole.indexOf(text); at >= 0; at = whole.indexOf(text, at + 1))
    spans.forEach((span, n) => { if (ends[n] > at && (n ? ends[n - 1] : 0) < at + text.length) span.classList.add("hit"); });
  holder.replaceChildren(...spans);
  tint();
  location.replace(`#i=${r.index}&color=${encodeURIComponent(state.color)}&sort=${state.sort}`);
}
function tint() {
  const x = columns[state.color], diverging = DIVERGING.test(state.color), top = scale[state.color];
  for (const span of $("#tokens").querySelectorAll(".t")) {
    const v = x[+span.dataset.i];
    span.style.background = shade(state.color, v);
    span.classList.toggle("less", diverging && v < -0.25 * top);
  }
  const stops = [-1, -0.6, -0.3, 0, 0.3, 0.6, 1].filter((f) => diverging || f >= 0).map((f) => shade(state.color, f * top) || "transparent");
  const sign = NEGATIVE.test(state.color) ? "−" : "";
  const means = { "log ratio r": "log q − log p: below zero (orange, underlined) the teacher would rather not have said it", "reverse KL": "KL(student ‖ teacher) of the next token, nats", "rock score": "the share of all reverse KL here that this kind of token has", weight: "1 is the share of a token in a mean over tokens" };
  $("#legend").replaceChildren(el("b", {}, state.color), el("span", { class: "number" }, diverging ? show(-top) : "0"),
    el("span", { class: "scale", style: `background: linear-gradient(to right, ${stops.join(", ")})` }), el("span", { class: "number" }, `${diverging ? "+" : sign}${show(top)}`),
    el("span", { class: "quiet" }, means[state.color] || (diverging ? "orange and underlined: below zero" : ""), columns[KL] ? " · dotted: the longest trap" : ""));
}
function recolor(name) {
  state.color = name;
  $("#color").value = name;
  for (const [k, row] of rows) paint(row.querySelector("canvas"), order[k]);
  tint();
  location.replace(`#i=${rollouts[order[state.at]]?.index ?? 0}&color=${encodeURIComponent(name)}&sort=${state.sort}`);
}

const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "·") || "∅";
const percent = (p) => Number.isNaN(p) ? "–" : p >= 0.9995 ? "~100 %" : p < 0.0005 ? "<0.05 %" : `${(100 * p).toFixed(1)} %`;
/** The numbers of a token, and what both models would rather have said. */
function tell(span, x, y) {
  for (const old of document.querySelectorAll(".t.now")) old.classList.remove("now");
  span.classList.add("now");
  const i = +span.dataset.i, b = order[state.at];
  state.token = i - start[b];
  const pairs = Object.entries(columns).filter(([, c]) => !Number.isNaN(c[i])).map(([name, c]) => [el("span", { class: "quiet" }, name), el("span", { class: "number" }, show(c[i]))]);
  const found = new Map(), add = (id, p, q) => { if (!found.has(id)) found.set(id, [p, q]); };
  if (trained[i] && columns[LOG_P] && columns[LOG_Q]) add(ids[i], columns[LOG_P][i], columns[LOG_Q][i]);
  if (trained[i] && alternatives) for (let k = 0; k < DATA.width; k++) { const at = i * DATA.width + k; add(alternatives.ids[at], alternatives.student[at], alternatives.teacher[at]); }
  const sorted = [...found].map(([id, [p, q]]) => [id, Math.exp(p), Math.exp(q)]).sort((a, c) => (Math.max(c[1], c[2] || 0)) - Math.max(a[1], a[2] || 0));
  const bar = (p) => el("td", { class: "number" }, el("span", { class: "p", style: `width:${3 * (p || 0)}em` }), percent(p));
  tip.replaceChildren(el("b", { class: "mono" }, visible(DATA.tokens[ids[i]])), el("span", { class: "quiet" }, ` token ${state.token}, id ${DATA.names[ids[i]]}${trained[i] ? "" : ", not trained on"}`),
    el("div", { class: "two" }, pairs), sorted.length ? el("table", {}, el("tr", {}, el("th", {}, "could have said"), el("th", {}, "student"), el("th", {}, "teacher")),
      sorted.map(([id, p, q]) => el("tr", { class: id === ids[i] ? "said" : "" }, el("td", { class: "mono" }, `${id === ids[i] ? "▸ " : ""}${visible(DATA.tokens[id])}`), bar(p), bar(q)))) : "");
  tip.hidden = false;
  place(tip, x, y);
}
function step(way) {
  const spans = $("#tokens").querySelectorAll(".t");
  if (!spans.length) return;
  const span = spans[Math.max(0, Math.min(spans.length - 1, state.token + way))];
  span.scrollIntoView({ block: "nearest" });
  const box = span.getBoundingClientRect();
  tell(span, box.right, box.bottom);
}
const KEYS = [
  ["j ↓ / k ↑", "next, previous rollout"], ["→ l / ← h", "next, previous token, with its numbers"], ["t", "jump to the longest trap"], ["m", "jump to the largest value of the colouring"],
  ["1 … 9", "colour by that column"], ["c", "next colouring"], ["s", "next sorting"], ["/", "search; Enter goes back to the list"], ["g / G", "first, last rollout"], ["Esc", "close, or clear the search"], ["?", "this help"],
];
const WORDS = [
  ["p, q", "the student's and the teacher's probability of the token that was written; r = log q − log p"], ["reverse KL", "how far the two models are apart at that token, over all tokens they could have said; 0: they agree"],
  ["trap", "a run of tokens on which both models agree, however wrong: there is nothing to learn in it"], ["rock score", "the share of all reverse KL here that this kind of token has"],
  ["weight", "a token's share in the loss, 1 in a plain mean; 0: not trained on"], ["advantage", "how much the method wants more (above 0) or less of the token"], ["in the list", "right or wrong, tokens (… was cut), longest trap, mean KL; a strip of the tokens' colours"],
];
function key(e) {
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  if (e.key === "Escape") {
    tip.hidden = true;
    if ($("#keys").open) return;
    if (state.search) { $("#search").value = state.search = ""; arrange(); }
    document.activeElement.blur();
    return;
  }
  if (e.target.matches("input, select")) { if (e.key === "Enter" && e.target.id === "search") { e.target.blur(); $("#list").focus(); } return; }
  const names = Object.keys(columns), next = (all, now) => all[(all.indexOf(now) + 1) % all.length];
  const acts = {
    j: () => select(state.at + 1), ArrowDown: () => select(state.at + 1), k: () => select(state.at - 1), ArrowUp: () => select(state.at - 1),
    PageDown: () => select(state.at + 10), PageUp: () => select(state.at - 10), g: () => select(0), G: () => select(order.length - 1), Home: () => select(0), End: () => select(order.length - 1),
    l: () => step(1), ArrowRight: () => step(1), h: () => step(-1), ArrowLeft: () => step(-1),
    c: () => recolor(next(names, state.color)), s: () => { state.sort = $("#sort").value = next(Object.keys(SORTS), state.sort); arrange(); select(0); },
    "/": () => { $("#search").focus(); $("#search").select(); }, "?": () => $("#keys").showModal(),
    t: () => { const b = order[state.at]; if (b !== undefined) { state.token = stats[b].trap[0] - start[b] - 1; step(1); } },
    m: () => { const b = order[state.at]; if (b === undefined) return; let best = start[b]; for (let i = best; i < start[b + 1]; i++) if (Math.abs(columns[state.color][i]) > Math.abs(columns[state.color][best])) best = i; state.token = best - start[b] - 1; step(1); },
  };
  for (let n = 0; n < 9 && n < names.length; n++) acts[n + 1] = () => recolor(names[n]);
  if (acts[e.key] && !$("#keys").open) { e.preventDefault(); acts[e.key](); }
}
function measure() {
  for (let b = 0; b < size; b++) {
    let off = 0;
    for (let i = start[b]; i < start[b + 1]; i++) off += !trained[i];
    stats[b] = { length: start[b + 1] - start[b], kl: mean(columns[KL], b), rock: mean(columns["rock score"], b), trap: trap(b), off, text: `${words(b)}\n${rollouts[b].response}\n${rollouts[b].answer}`.toLowerCase() };
  }
}
async function open() {
  const entries = Object.entries(DATA.columns), done = await Promise.all([unpacked(DATA.ids), unpacked(DATA.trained), ...entries.map(([, x]) => unpacked(x))]);
  [ids, trained] = done;
  entries.forEach(([name], n) => { columns[name] = done[n + 2]; scale[name] = reach(done[n + 2]); });
  const rest = async () => alternatives = { ids: await unpacked(DATA.alternatives), student: await unpacked(DATA.alternatives_student_logp), teacher: await unpacked(DATA.alternatives_teacher_logp) };
  measure();
  const asked = new URLSearchParams(location.hash.slice(1)), options = (into, all) => into.append(...all.map(([value, text]) => el("option", { value }, text)));
  options($("#sort"), Object.entries(SORTS).map(([k, [t]]) => [k, t]));
  options($("#filter"), Object.entries(FILTERS).map(([k, [t, keep]]) => [k, `${t} (${stats.filter((_, b) => keep(b)).length})`]));
  options($("#color"), Object.keys(columns).map((name, n) => [name, `${n + 1}  ${name}`]));
  state.color = columns[asked.get("color")] ? asked.get("color") : Object.keys(columns)[0];
  state.sort = SORTS[asked.get("sort")] ? asked.get("sort") : "saved";
  $("#color").value = state.color;
  $("#sort").value = state.sort;
  $("#keys").append(el("h3", {}, "Keys"), el("table", {}, KEYS.map(([k, what]) => el("tr", {}, el("td", {}, el("kbd", {}, k)), el("td", {}, what)))),
    el("h3", {}, "Words"), el("table", {}, WORDS.map(([k, what]) => el("tr", {}, el("td", {}, el("b", {}, k)), el("td", {}, what)))), el("form", { method: "dialog" }, el("button", {}, "Close")));
  $("#sort").addEventListener("change", (e) => { state.sort = e.target.value; arrange(); select(0); });
  $("#filter").addEventListener("change", (e) => { state.filter = e.target.value; arrange(); select(0); });
  $("#color").addEventListener("change", (e) => recolor(e.target.value));
  $("#search").addEventListener("input", (e) => { state.search = e.target.value; arrange(); select(0); });
  $("#low").addEventListener("input", (e) => { state.low = +e.target.value || 0; measure(); arrange(); });
  $("#list").addEventListener("scroll", list, { passive: true });
  $("#help").addEventListener("click", () => $("#keys").showModal());
  $("#theme").addEventListener("click", theme);
  $("#tokens").addEventListener("pointerover", (e) => { const span = e.target.closest(".t"); if (span) tell(span, e.clientX, e.clientY); });
  $("#tokens").addEventListener("pointerleave", () => { tip.hidden = true; });
  addEventListener("keydown", key);
  addEventListener("resize", list);
  arrange();
  select(Math.max(0, order.findIndex((b) => String(rollouts[b].index) === asked.get("i"))));
  document.title = `opd inspect: ${DATA.run}, step ${DATA.step}`;
  if (DATA.alternatives) await rest(); // the largest part: the page works meanwhile
  document.body.dataset.ready = "yes";
}
open();
