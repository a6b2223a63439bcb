const page = JSON.parse(document.getElementById("data").textContent);
const { tokens, positions, promptTokens, layers, adapters, range, methods } = page;
const state = { layer: ALL, pinned: null, hovered: null, hoveredLayer: null, adapter: null };

/** A method's weights, kept as the integers they came as; the means over the layers are computed once. */
class Weights {
  constructor({ data, scale, tokens: stored }) {
    this.values = new Int16Array(Uint8Array.from(atob(data), (c) => c.charCodeAt(0)).buffer);
    this.scale = scale;
    this.constant = stored === 1;
    this.means = new Float32Array(stored * adapters.length);
    for (let token = 0; token < stored; token++)
      for (let layer = 0; layer < layers; layer++)
        for (let a = 0; a < adapters.length; a++)
          this.means[token * adapters.length + a] += this.at(token, layer, a) / layers;
  }

  at(token, layer, adapter) {
    const row = this.constant ? 0 : token;
    if (layer === ALL) return this.means[row * adapters.length + adapter];
    return this.scale * this.values[(row * layers + layer) * adapters.length + adapter];
  }

  of(token, layer) {
    return adapters.map((_, a) => this.at(token, layer, a));
  }
}

const layerName = (layer) => (layer === ALL ? "all layers (mean)" : `layer ${layer}`);
const swatch = (a) => element("span", { class: "token swatch", "data-adapter": a, style: "--strength: 1" }, keyOf(a));

// Tables: of layers in each panel, and of the chosen token at the bottom.

function tableHead(first) {
  const heads = adapters.map(({ name }, a) =>
    element("th", { scope: "col", title: name }, swatch(a), element("span", { class: "name" }, name)));
  return element("thead", {}, element("tr", {}, element("th", { scope: "col" }, first), ...heads));
}

function tableRow(name, weights, attributes = {}) {
  const { top } = dominating(weights);
  const cells = weights.map((weight, a) => {
    const style = `--fill: ${fill(weight, range.high)}`;
    return element("td", { "data-adapter": a, style, ...(a === top && { class: "top" }) }, number(weight));
  });
  return element("tr", attributes, element("th", { scope: "row" }, name), ...cells);
}

function layerTable(weights) {
  const start = promptTokens < tokens.length ? promptTokens : 0;
  const mean = (layer) => adapters.map((_, a) => {
    if (weights.constant) return weights.at(0, layer, a);
    let sum = 0;
    for (let token = start; token < tokens.length; token++) sum += weights.at(token, layer, a);
    return sum / (tokens.length - start);
  });
  const rows = [ALL, ...Array.from({ length: layers }, (_, layer) => layer)].map((layer) =>
    tableRow(layer === ALL ? "all" : layer, mean(layer), { "data-layer": layer }));
  const table = element("table", {}, tableHead("layer"), element("tbody", {}, ...rows));
  const part = weights.constant ? "Weights" : start ? "Mean weights, generated tokens" : "Mean weights, all tokens";
  return element("section", { class: "means" }, element("h3", {}, `${part}, by layer`),
    element("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "Weights by layer" }, table));
}

// Text.

function tokenSpan(index) {
  const text = tokens[index];
  const kind = text === "" ? " empty" : text.startsWith("\n") ? " newline" : "";
  return element("span", { class: `token${kind}`, "data-token": index, tabindex: index === 0 ? 0 : -1 }, text);
}

function textPart(kind, label, from, to) {
  const part = element("div", { class: `part ${kind}` }, element("span", { class: "label" }, label));
  for (let index = from; index < to; index++) part.append(tokenSpan(index));
  return part;
}

function textBox(name) {
  const box = element("div", { class: "text", role: "group", "aria-label": `Text, coloured by ${name}` });
  const whole = promptTokens === tokens.length;
  box.append(textPart(page.knowsPrompt ? "prompt" : "", page.knowsPrompt ? "Prompt" : "Text", 0, promptTokens));
  if (!whole) box.append(textPart("generated", "Generated", promptTokens, tokens.length));
  return box;
}

function paintText(panel) {
  let before;
  panel.spans.forEach((span, token) => {
    const weights = panel.weights.of(token, state.layer);
    let { top, share } = dominating(weights);
    if (state.adapter !== null) {
      top = state.adapter;
      share = Math.min(Math.max(weights[top], 0) / range.high, 1);
    }
    span.toggleAttribute("data-negative", state.adapter !== null && weights[top] < -EVEN / 2);
    if (top === null) delete span.dataset.adapter;
    else span.dataset.adapter = top;
    if (top === null || top === before) delete span.dataset.key;
    else span.dataset.key = keyOf(top);
    span.style.setProperty("--strength", state.adapter === null ? strength(share) : share.toFixed(3));
    before = top;
  });
}

// Heat maps: a canvas has one pixel for each token and layer; marks and labels are elements above it.

function heatMap(a) {
  const canvas = element("canvas", {
    width: tokens.length, height: layers, role: "img",
    "aria-label": `Weights of ${adapters[a].name}: tokens to the right, layers upwards`,
  });
  canvas.style.height = `${Math.min(Math.max(layers * 4, 48), 112)}px`;
  const mark = (kind) => element("div", { class: `mark ${kind}`, hidden: "" });
  const cells = element("div", { class: "cells" }, canvas, mark("layer"), mark("at"));
  if (promptTokens && promptTokens < tokens.length) {
    const line = element("div", { class: "mark answer", title: "first generated token" });
    line.style.left = `${(100 * promptTokens) / tokens.length}%`;
    cells.append(line);
  }
  const y = element("div", { class: "y" }, element("span", {}, layers - 1), element("span", {}, "layer"), element("span", {}, 0));
  const x = element("div", { class: "x" }, element("span", {}, positions[0]), element("span", {}, "position"),
    element("span", {}, positions[positions.length - 1]));
  return element("figure", { class: "map", "data-adapter": a },
    element("figcaption", {}, swatch(a), ` ${adapters[a].name}`), element("div", { class: "plot" }, y, cells, x));
}

/** 511 colours from -high to high, of the stops that the style sheet has for light or dark. */
function colourTable() {
  const style = getComputedStyle(document.documentElement);
  const stops = ["--minus-2", "--minus-1", "--zero", "--plus-1", "--plus-2"].map((name) => {
    const digits = style.getPropertyValue(name).trim().replace(/^#(.)(.)(.)$/, "#$1$1$2$2$3$3");
    return [1, 3, 5].map((start) => parseInt(digits.slice(start, start + 2), 16));
  });
  return Array.from({ length: 511 }, (_, i) => {
    const place = (i / 510) * 4;
    const stop = Math.min(Math.floor(place), 3);
    return stops[stop].map((value, channel) => value + (place - stop) * (stops[stop + 1][channel] - value));
  });
}

function paintMaps(panel, colours) {
  panel.element.querySelectorAll("canvas").forEach((canvas, a) => {
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    for (let token = 0; token < tokens.length; token++)
      for (let layer = 0; layer < layers; layer++) {
        const share = Math.min(Math.max(panel.weights.at(token, layer, a) / range.high, -1), 1);
        const pixel = 4 * ((layers - 1 - layer) * canvas.width + token);
        image.data.set(colours[Math.round(255 + 255 * share)], pixel);
        image.data[pixel + 3] = 255;
      }
    context.putImageData(image, 0, 0);
    // Shrunk, neighbours are averaged; enlarged, each token keeps its sharp cell.
    canvas.style.imageRendering = tokens.length > canvas.clientWidth ? "auto" : "pixelated";
  });
}

function colourScale() {
  const names = (range.low < 0 ? ["--minus-2", "--minus-1"] : []).concat("--zero", "--plus-1", "--plus-2");
  const bar = element("div", { class: "bar" });
  bar.style.background = `linear-gradient(to right, ${names.map((name) => `var(${name})`).join(", ")})`;
  const beyond = range.clipped ? ` Beyond the scale, with the colour of its end: ${range.clipped}.` : "";
  const whose = methods.length > 1 ? "The weights of all methods" : "The weights";
  const ends = `${whose} are from ${number(range.smallest)} to ${number(range.largest)}.${beyond}`;
  return [
    element("div", { class: "scale" }, element("span", {}, number(range.low)), bar, element("span", {}, number(range.high))),
    element("p", { class: "small range" }, ends),
  ];
}

// The page.

function makePanel(method, index) {
  const weights = new Weights(method);
  const head = element("div", { class: "head" }, element("h2", {}, method.name),
    ...method.notes.map((note) => element("p", { class: "notes" }, note)));
  const text = textBox(method.name);
  const maps = element("section", { class: "maps" });
  if (weights.constant && tokens.length > 1)
    maps.append(element("p", { class: "notes" }, "There is no heat map: every token has the weights of the table."));
  else
    maps.append(element("h3", {}, "Weight of each adapter, by token and layer"),
      ...adapters.map((_, a) => heatMap(a)), ...colourScale());
  const panel = element("section", { class: "panel", "data-method": index, "aria-label": method.name },
    head, text, layerTable(weights), maps);
  document.getElementById("panels").append(panel);
  return { element: panel, method, weights, text, spans: [...text.querySelectorAll("[data-token]")] };
}

function button(text, pressed, onPress, ...before) {
  const made = element("button", { type: "button", "aria-pressed": pressed, title: text }, ...before, text);
  made.addEventListener("click", () => onPress(made));
  return made;
}

function showLayer(layer) {
  state.layer = Math.min(Math.max(layer, ALL), layers - 1);
  const slider = document.getElementById("layer");
  slider.value = state.layer + 1;
  slider.setAttribute("aria-valuetext", layerName(state.layer));
  document.getElementById("layer-name").textContent = sliderText(state.layer, layers);
  panels.forEach(paintText);
  for (const row of document.querySelectorAll(".means tbody tr")) {
    if (Number(row.dataset.layer) === state.layer) row.setAttribute("aria-current", "true");
    else row.removeAttribute("aria-current");
  }
  for (const mark of document.querySelectorAll(".mark.layer")) {
    mark.hidden = state.layer === ALL;
    mark.style.top = `${(100 * (layers - 1 - state.layer)) / layers}%`;
    mark.style.height = `${100 / layers}%`;
  }
  showNumbers();
  // Measured last: every measurement between changes would lay the whole text out anew.
  for (const row of document.querySelectorAll(".means [aria-current]")) revealIn(row.closest(".scroll"), row);
}

function showAdapter(adapter) {
  state.adapter = adapter;
  document.querySelectorAll("#adapters [data-adapter]").forEach((swatchOf) => {
    const its = swatchOf.closest("button");
    its.setAttribute("aria-pressed", Number(swatchOf.dataset.adapter) === adapter);
  });
  panels.forEach(paintText);
}

function markToken(kind, token) {
  for (const panel of panels) {
    panel.element.querySelector(`.token.${kind}`)?.classList.remove(kind);
    if (token !== null) panel.spans[token].classList.add(kind);
  }
  state[kind] = token;
  const chosen = state.hovered ?? state.pinned;
  for (const mark of document.querySelectorAll(".mark.at")) {
    mark.hidden = chosen === null;
    mark.style.left = `${(100 * chosen) / tokens.length}%`;
    mark.style.width = `${100 / tokens.length}%`;
  }
  showNumbers();
}

function hover(token, layer = null) {
  if (token === state.hovered && layer === state.hoveredLayer) return;
  state.hoveredLayer = layer;
  markToken("hovered", token);
}

function pin(token) {
  if (token === null) state.hoveredLayer = null;
  for (const panel of panels)
    panel.spans.forEach((span, index) => { span.tabIndex = index === (token ?? 0) ? 0 : -1; });
  markToken("pinned", token);
}

/** Scroll within a box, and leave the page where it is. */
function revealIn(box, inner) {
  const [outside, inside] = [box.getBoundingClientRect(), inner.getBoundingClientRect()];
  if (inside.top < outside.top + 24 || inside.bottom > outside.bottom)
    box.scrollTop += inside.top - outside.top - outside.height / 2;
}

function reveal(token) {
  for (const { text, spans } of panels) revealIn(text, spans[token]);
}

function showNumbers() {
  const token = state.hovered ?? state.pinned;
  const numbers = document.getElementById("numbers");
  if (token === null) {
    numbers.replaceChildren(element("p", { class: "small" }, "Point at a token, tap it, or reach it with the Tab key, to read its weights here."));
    return;
  }
  const layer = state.hovered === null ? state.layer : state.hoveredLayer ?? state.layer;
  const generated = token >= promptTokens;
  const facts = [
    `position ${positions[token]}`,
    generated ? `generated, by the weights of position ${positions[token] - 1}` : page.knowsPrompt ? "prompt" : null,
    layerName(layer),
  ].filter((fact) => fact !== null).join(" · ");
  const shown = tokens[token] === "" ? "(part of the next character)" : tokens[token].replaceAll("\n", "↵");
  const rows = panels.filter((panel) => !panel.element.hidden)
    .map((panel) => tableRow(panel.method.name, panel.weights.of(token, layer)));
  numbers.replaceChildren(element("p", {}, element("code", {}, shown), ` ${facts}`),
    element("table", {}, tableHead("method"), element("tbody", {}, ...rows)));
}

function toggleMethod(panel, its) {
  const shown = panels.filter((each) => !each.element.hidden);
  if (shown.length === 1 && shown[0] === panel) return; // an empty page would say nothing
  panel.element.hidden = !panel.element.hidden;
  its.setAttribute("aria-pressed", !panel.element.hidden);
  document.getElementById("panels").dataset.count = panels.filter((each) => !each.element.hidden).length;
  repaintMaps();
  showNumbers();
}

function repaintMaps() {
  const colours = colourTable();
  panels.filter((panel) => !panel.element.hidden).forEach((panel) => paintMaps(panel, colours));
}

/** The token and layer under the pointer, in text or heat map; null elsewhere. */
function under(event) {
  const span = event.target.closest("[data-token]");
  if (span) return { token: Number(span.dataset.token), layer: null };
  const cells = event.target.closest(".cells");
  if (!cells) return null;
  const box = cells.querySelector("canvas").getBoundingClientRect();
  const index = (share, count) => Math.min(Math.max(Math.floor(share * count), 0), count - 1);
  return {
    token: index((event.clientX - box.left) / box.width, tokens.length),
    layer: layers - 1 - index((event.clientY - box.top) / box.height, layers),
  };
}

function onClick(event) {
  const row = event.target.closest(".means tbody tr");
  if (row) return showLayer(Number(row.dataset.layer));
  const found = under(event);
  if (!found) return undefined;
  pin(found.token);
  if (found.layer === null) return undefined;
  showLayer(found.layer);
  reveal(found.token);
  const panel = panels[Number(event.target.closest(".panel").dataset.method)];
  return panel.spans[found.token].scrollIntoView({ block: "nearest" });
}

function onKey(event) {
  const span = event.target.closest("[data-token]");
  if (!span) return;
  const token = Number(span.dataset.token);
  const moves = { ArrowLeft: token - 1, ArrowRight: token + 1, Home: 0, End: tokens.length - 1 };
  const climbs = { ArrowUp: 1, ArrowDown: -1 };
  if (event.key in moves) {
    const next = Math.min(Math.max(moves[event.key], 0), tokens.length - 1);
    panels[Number(span.closest(".panel").dataset.method)].spans[next].focus();
    reveal(next);
  } else if (event.key in climbs) showLayer(state.layer + climbs[event.key]);
  else if (event.key === "Escape") pin(null);
  else return;
  event.preventDefault();
}

const panels = methods.map(makePanel);
document.getElementById("panels").dataset.count = panels.length;

const counted = promptTokens < tokens.length
  ? `${tokens.length} tokens (${promptTokens} prompt, ${tokens.length - promptTokens} generated)` : `${tokens.length} tokens`;
document.getElementById("facts").textContent =
  `${counted} · ${layers} layers · ${adapters.length} adapters · ${methods.length} methods`.replace(/\b(1 \w+)s\b/g, "$1");
document.getElementById("producing").textContent = page.knowsPrompt
  ? "A generated token shows the weights that produced it, those of the position before it; a token of the prompt shows its own."
  : "Each token shows the weights computed at its position.";
document.getElementById("adapters").append(
  ...adapters.map(({ name }, a) => button(` ${name}`, false, () => showAdapter(state.adapter === a ? null : a), swatch(a))),
  button("Letters in the text", false, (its) => its.setAttribute("aria-pressed", document.body.classList.toggle("letters"))));
document.getElementById("methods").append(...panels.map((panel) =>
  button(panel.method.name, true, (its) => toggleMethod(panel, its))));
document.body.classList.toggle("many", adapters.length > 3);
document.body.classList.toggle("crowd", adapters.length > 5);
document.getElementById("methods").hidden = panels.length === 1;

const slider = document.getElementById("layer");
slider.max = layers;
slider.addEventListener("input", () => showLayer(slider.value - 1));
document.getElementById("layer-down").addEventListener("click", () => showLayer(state.layer - 1));
document.getElementById("layer-up").addEventListener("click", () => showLayer(state.layer + 1));
const main = document.getElementById("panels");
main.addEventListener("pointermove", (event) => {
  const found = under(event);
  hover(found?.token ?? null, found?.layer ?? null);
});
main.addEventListener("pointerleave", () => hover(null));
main.addEventListener("focusin", (event) => {
  const span = event.target.closest("[data-token]");
  if (span) pin(Number(span.dataset.token));
});
main.addEventListener("click", onClick);
main.addEventListener("keydown", onKey);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaintMaps);
addEventListener("resize", repaintMaps);
showLayer(ALL);
repaintMaps();
