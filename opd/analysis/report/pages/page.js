"use strict";
/** An element with attributes and children; text is always text, never markup. */
function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "circle", "rect", "text", "title", "polyline"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") node.style.cssText = value; // as an attribute, the page's policy forbids it
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined));
  return node;
}
const $ = (selector) => document.querySelector(selector);
const DATA = JSON.parse($("#data").textContent);
const color = (i) => `var(--c${i % 8})`;
/** A number with as many digits as a reader needs. */
function show(x, digits = 3) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e5) return x.toLocaleString("en", { maximumFractionDigits: 0 });
  if (size !== 0 && size < 1e-4) return x.toExponential(1).replace("-", "−").replace("e-", "e−");
  const places = size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : digits;
  return x.toFixed(places).replace("-", "−");
}
const signed = (x, digits) => (x > 0 ? "+" : "") + show(x, digits);
/** Place a tip beside the pointer, inside the window. */
function place(tip, x, y) {
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, x + 16 + width > innerWidth ? x - width - 12 : x + 16)}px`;
  tip.style.top = `${Math.max(4, Math.min(y + 14, innerHeight - height - 6))}px`;
}
function theme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme || (dark ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
}
