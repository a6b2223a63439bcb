const KINDS = { auto: "Picked by the request", fusion: "Fusions", adapter: "Adapters", base: "Base" };
const KEY = "loraflow-api-key";
const NAMED = 12; // adapters that are named of those that one may pick from
const $ = (id) => document.getElementById(id);

const state = {
  models: [], model: null, adapters: [], // every adapter of the server, in one order: a colour means the same everywhere
  byHand: false, weights: {},
  turns: [], alone: new Set(), running: null,
  answers: [], tokens: [], layers: 0, layer: ALL, hovered: null, pinned: null,
  top: 0, follow: true, // the newest text, until the reader scrolls away from it
};

const plural = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;
const place = (name) => state.adapters.indexOf(name);
const short = (digest) => digest.replace("sha256:", "").slice(0, 12);

function swatch(a) {
  return element("span", { class: "token swatch", "data-colour": a % COLOURS }, keyOf(a));
}

/** A token as it can be read: control characters and marks of direction are spelled out. */
function printable(text) {
  return text.replace(/\n/g, "↵").replace(/[\p{Cc}\p{Cs}\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]/gu,
    (found) => `\\u${found.codePointAt(0).toString(16).padStart(4, "0")}`);
}

// Requests.

function savedKey() {
  try { return sessionStorage.getItem(KEY); } catch { return savedKey.memory ?? null; }
}

function saveKey(key) {
  savedKey.memory = key;
  try { sessionStorage.setItem(KEY, key); } catch { /* a browser without storage asks again after a reload */ }
}

class ServerError extends Error {
  constructor(status, { message, param = null, code = null }) {
    super(message);
    Object.assign(this, { status, param, code });
  }
}

async function request(path, options = {}) {
  const key = savedKey();
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(`The server cannot be reached (${error.message}).`);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const unsaid = { message: `The server answered ${response.status} ${response.statusText}.` };
  const error = new ServerError(response.status, body?.error ?? unsaid);
  if (response.status === 401) askForKey(error, key);
  throw error;
}

/** The objects of a stream of server-sent events, up to `[DONE]`. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  const read = () => reader.read().catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new Error(`The connection to the server was lost (${error.message}).`);
  });
  try {
    while (true) {
      const { done, value } = await read();
      if (done) throw new Error("The connection to the server was lost before the answer was complete.");
      const found = (held + value).split("\n\n");
      held = found.pop();
      for (const event of found) {
        const data = event.replace(/^data: /, "");
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have failed already
  }
}

function askForKey(error, refused) {
  $("key-form").hidden = false;
  $("controls").open = true;
  $("key-error").textContent = refused ? error.message : "This server asks for a key.";
  $("key").focus();
}

function complain(error) {
  $("status").textContent = error ? error.message : "";
  $("status").hidden = !error;
}

// Models and weights.

async function loadModels() {
  let list;
  try {
    list = (await (await request("/v1/models")).json()).data;
  } catch (error) {
    complain(error.status === 401 ? null : error);
    $("again").textContent = "Try again";
    $("again").hidden = error.status === 401;
    return;
  }
  complain(null);
  $("key-form").hidden = true;
  $("again").hidden = true;
  state.models = list;
  state.adapters = list.filter(({ kind }) => kind === "adapter").map(({ id }) => id);
  for (const name of list.flatMap(({ adapters }) => adapters)) if (place(name) < 0) state.adapters.push(name);
  const groups = Object.entries(KINDS).map(([kind, label]) => {
    const its = list.filter((model) => model.kind === kind);
    return element("optgroup", { label }, ...its.map(({ id }) => element("option", { value: id }, id)));
  });
  $("model").replaceChildren(...groups.filter((group) => group.children.length));
  $("model").disabled = false;
  $("send").disabled = false;
  chooseModel($("model").value);
}

/** The adapters whose weights a request for the model may set. */
function adaptersOf(model) {
  if (model.kind === "fusion") return model.adapters;
  return model.kind === "adapter" ? state.adapters : [];
}

function chooseModel(id) {
  state.model = state.models.find((model) => model.id === id);
  const { kind, method, adapters, digest } = state.model;
  const what = { base: "the base, without adapters", adapter: "one adapter:", fusion: `${method} over`,
    auto: `${method} picks from ${plural(adapters.length, "adapter")}:` }[kind];
  const named = kind === "auto" ? adapters.slice(0, NAMED) : adapters;
  const whose = named.map((name) => element("span", { class: "adapter" }, swatch(place(name)), ` ${name}`));
  if (named.length < adapters.length) whose.push(element("span", {}, `and ${adapters.length - named.length} more`));
  $("about").replaceChildren(element("span", {}, what), ...whose, element("code", { title: digest }, short(digest)));
  $("by-model").textContent = kind === "adapter" ? "As it is" : "As the fusion does";
  const names = adaptersOf(state.model);
  $("weights").hidden = !names.length;
  $("colours").hidden = !state.adapters.length;
  // Of all adapters: answers of other models stay in the conversation.
  $("legend").replaceChildren(...state.adapters.map((name, a) => element("li", {}, swatch(a), ` ${name}`)));
  setByHand(false);
  resetWeights();
}

function setByHand(byHand) {
  state.byHand = byHand;
  $("by-hand").setAttribute("aria-pressed", byHand);
  $("by-model").setAttribute("aria-pressed", !byHand);
  $("sliders").hidden = $("reset").hidden = !byHand;
}

/** Even weights for a fusion's adapters; a single adapter alone. */
function resetWeights() {
  const names = adaptersOf(state.model);
  const even = Math.round(20 / names.length) / 20;
  const own = ({ kind, id }, name) => (kind === "fusion" ? even : Number(name === id));
  state.weights = Object.fromEntries(names.map((name) => [name, own(state.model, name)]));
  $("sliders").replaceChildren(...names.flatMap((name) => slider(name, place(name))));
}

function slider(name, a) {
  const id = `weight-${a}`;
  const input = element("input", {
    type: "range", id, min: -0.5, max: 1.5, step: 0.05, value: state.weights[name], "data-colour": a % COLOURS,
  });
  const shown = element("output", { for: id }, number(state.weights[name], 2));
  input.addEventListener("input", () => {
    state.weights[name] = Number(input.value);
    shown.textContent = number(state.weights[name], 2);
  });
  return [element("label", { for: id, title: name }, swatch(a), ` ${name}`), input, shown];
}

// Asking.

/** The conversation before a turn, less what has found no answer; nothing for models that take one question only. */
function messagesFor(turn, alone) {
  const before = alone ? [] : state.turns.slice(0, state.turns.indexOf(turn)).filter(({ answer }) => answer !== null);
  const past = before.flatMap(({ question, answer }) => [
    { role: "user", content: question }, { role: "assistant", content: answer }]);
  return [...past, { role: "user", content: turn.question }];
}

function bodyFor(turn, alone) {
  const { id, kind } = state.model;
  const longest = $("max-tokens").valueAsNumber;
  return {
    model: id, messages: messagesFor(turn, alone), stream: true, stream_options: { include_usage: true },
    temperature: $("temperature").valueAsNumber || 0,
    ...(longest > 0 && { max_tokens: longest }),
    ...(kind !== "base" && { return_fusion_weights: "all" }),
    ...(state.byHand && { adapter_weights: state.weights }),
  };
}

async function post(body, signal) {
  const headers = { "Content-Type": "application/json" };
  return request("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
}

/** Ask with the conversation; where the model's prompt format takes none, with the question alone. */
async function open(turn, answer, signal) {
  const { id } = state.model;
  const body = bodyFor(turn, state.alone.has(id));
  if (state.alone.has(id) && state.turns.indexOf(turn) > 0) answer.note("Answered without the conversation before it.");
  try {
    return await post(body, signal);
  } catch (error) {
    const refused = error.status === 400 && error.param === "messages" && error.code === null;
    if (!refused || body.messages.length === 1) throw error;
    const response = await post({ ...body, messages: body.messages.slice(-1) }, signal);
    state.alone.add(id);
    answer.note(`Answered without the conversation before it. The server says: ${error.message}`);
    return response;
  }
}

async function run(turn) {
  const controller = new AbortController();
  const answer = new Answer();
  state.running = controller;
  state.answers.push(answer);
  showRunning();
  try {
    for await (const chunk of events(await open(turn, answer, controller.signal))) {
      if (chunk.error) throw new ServerError(null, chunk.error);
      answer.take(chunk);
    }
    turn.answer = answer.content;
    answer.end("");
  } catch (error) {
    if (error.name === "AbortError") {
      if (answer.count) turn.answer = answer.content;
      answer.end("stopped");
    } else {
      answer.end("", error);
      if (!$("question").value && !answer.count) $("question").value = turn.question;
    }
  }
  // After "New chat", another one may be running.
  if (state.running === controller) state.running = null;
  showRunning();
}

function showRunning() {
  const running = state.running !== null;
  $("send").hidden = running;
  $("stop").hidden = !running;
  $("again").textContent = "Ask the last question again";
  $("again").hidden = running || !state.turns.length;
  $("welcome").hidden = state.turns.length > 0;
}

function ask() {
  const question = $("question").value;
  if (state.running || !state.model || !question.trim()) return;
  complain(null);
  const turn = { question, answer: null };
  state.turns.push(turn);
  $("question").value = "";
  $("conversation").append(element("div", { class: "question" }, element("p", { dir: "auto" }, question)));
  run(turn);
}

function askAgain() {
  if (!state.model) return void loadModels();
  if (state.running || !state.turns.length) return;
  run(state.turns.at(-1));
}

function newChat() {
  state.running?.abort();
  Object.assign(state, { running: null, turns: [], answers: [], tokens: [], hovered: null, pinned: null });
  $("conversation").replaceChildren();
  complain(null);
  showRunning();
  showNumbers();
  $("question").focus();
}

// Answers.

function meanOf(rows) {
  return rows[0].map((_, a) => rows.reduce((sum, row) => sum + row[a], 0) / rows.length);
}

class Answer {
  constructor() {
    this.given = state.byHand ? { ...state.weights } : null;
    this.content = "";
    this.count = 0;
    this.tokens = []; // those with weights
    this.total = null; // of their weights, [layers][adapters]
    this.names = [];
    this.started = performance.now();
    this.maker = element("p", { class: "maker" }, element("b", {}, state.model.id));
    this.text = element("div", { class: "text", dir: "auto" });
    this.facts = element("p", { class: "facts" });
    this.element = element("article", { class: "answer", "aria-busy": "true" }, this.maker, this.text, this.facts);
    $("conversation").append(this.element);
    state.follow = true;
    toBottom();
  }

  note(text) {
    this.element.insertBefore(element("p", { class: "note" }, text), this.facts);
  }

  take(chunk) {
    if (!this.fusion) this.name(chunk.fusion);
    if (chunk.usage) this.usage = chunk.usage;
    const [choice] = chunk.choices;
    if (!choice) return;
    const text = choice.delta.content ?? "";
    this.finish = choice.finish_reason ?? this.finish;
    if (choice.auto) this.pick(choice.auto);
    this.content += text;
    const told = choice.fusion_weights;
    // The base alone, which `auto` may leave a question to, has no adapters to weigh.
    if (told?.tokens.length && told.adapters.length) {
      this.count += told.tokens.length;
      this.names = told.adapters;
      // Text belongs to the token that completes it.
      told.tokens.forEach((token, i) => this.add(token, told.weights[i], i === told.tokens.length - 1 ? text : ""));
    } else {
      this.count += text ? 1 : 0;
      this.text.append(text);
    }
    followSoon();
  }

  add(source, weights, text) {
    const token = { source, text, weights, mean: meanOf(weights), answer: this, place: this.tokens.length };
    const end = text === "" && this.finish === "stop";
    const kind = end ? " empty end" : text === "" ? " empty" : text.startsWith("\n") ? " newline" : "";
    const index = state.tokens.push(token) - 1;
    token.span = element("span", { class: `token${kind}`, "data-token": index, tabindex: token.place ? -1 : 0 }, text);
    this.tokens.push(token);
    this.total = this.total ? this.total.map((row, l) => row.map((sum, a) => sum + weights[l][a])) : weights;
    if (state.layers !== weights.length) setLayers(weights.length);
    paint(token);
    this.text.append(token.span);
  }

  name(fusion) {
    this.fusion = fusion;
    const how = this.given ? "weights by hand" : fusion.method;
    const digest = element("code", { title: fusion.digest }, short(fusion.digest));
    this.maker.append(` · ${how} · `, digest);
    if (this.given) {
      const weights = Object.entries(this.given).map(([name, weight]) => `${name} ${number(weight, 2)}`);
      this.maker.append(` · ${weights.join(", ")}`);
    }
  }

  /** Which adapters were picked, and by which scores; null scores where each token was weighed anew. */
  pick({ adapter_weights: weights, scores, measure, candidates }) {
    const score = (name) => (scores ? ` (${number(scores[name], 3)})` : "");
    const picked = Object.entries(weights).map(([name, weight]) => `${name} ${number(weight, 2)}${score(name)}`);
    const best = scores && Object.keys(scores)[0];
    const who = picked.length ? picked.join(", ") : `the base alone${best ? `; best: ${best}${score(best)}` : ""}`;
    const picks = element("span", { class: "picks" }, ` · ${who}, of ${candidates}`);
    picks.title = measure ? `weight (score: ${measure})` : "mean weight of the answer's tokens";
    this.maker.append(picks);
  }

  end(remark, error) {
    this.element.setAttribute("aria-busy", "false");
    const seconds = (performance.now() - this.started) / 1000;
    const count = this.usage?.completion_tokens ?? this.count;
    const facts = count
      ? [`${plural(count, "token")} in ${seconds.toFixed(1)} s`, `${(count / seconds).toFixed(1)} tokens/s`] : [];
    if (this.usage) facts.push(`prompt of ${plural(this.usage.prompt_tokens, "token")}`);
    if (this.finish === "length") facts.push("cut at the longest answer");
    if (remark) facts.push(remark);
    this.facts.textContent = facts.join(" · ");
    if (error) this.element.append(element("p", { class: "error", role: "alert" }, error.message));
    if (!this.count) this.text.hidden = true;
    if (shownToken() === null) showNumbers();
    followSoon();
  }
}

const atBottom = () => $("talk").scrollHeight - $("talk").scrollTop - $("talk").clientHeight < 60;
const toBottom = () => { $("talk").scrollTop = $("talk").scrollHeight; };

/** Show the newest text and numbers, once for all tokens between two frames: layout takes longer than a token. */
function followSoon() {
  if (followSoon.due) return;
  followSoon.due = requestAnimationFrame(() => {
    followSoon.due = 0;
    if (state.follow) toBottom();
    if (shownToken() === null) showNumbers();
  });
}

// Colours.

const weightsOf = (token, layer) => (layer === ALL ? token.mean : token.weights[layer] ?? token.mean);

/** The adapter that dominates a token, by its place on the server; null where none does. */
function leader(token) {
  const { top, share } = dominating(weightsOf(token, state.layer));
  return { a: top === null ? null : place(token.answer.names[top]), share };
}

function paint(token) {
  const { a, share } = leader(token);
  const before = token.place ? leader(token.answer.tokens[token.place - 1]).a : null;
  const { dataset, style } = token.span;
  for (const name of ["adapter", "colour", "key"]) delete dataset[name];
  if (a !== null) {
    dataset.adapter = state.adapters[a];
    dataset.colour = a % COLOURS;
    if (a !== before) dataset.key = keyOf(a);
  }
  style.setProperty("--strength", strength(share));
}

function setLayers(layers) {
  state.layers = layers;
  $("layer").max = layers;
  $("layers").hidden = layers < 2;
}

function showLayer(layer) {
  state.layer = Math.min(Math.max(layer, ALL), state.layers - 1);
  $("layer").value = state.layer + 1;
  const name = sliderText(state.layer, state.layers);
  $("layer").setAttribute("aria-valuetext", name);
  $("layer-name").textContent = name;
  state.tokens.forEach(paint);
  showNumbers();
}

// The chosen token's weights.

const wide = matchMedia("(min-width: 60rem)"); // the style sheet's, where the numbers have a column of their own
const shownToken = () => state.hovered ?? state.pinned;

function tableRow(name, layer, weights, names, full) {
  const { top } = dominating(weights);
  const cells = weights.map((weight, i) => {
    const cell = element("td", { "data-colour": place(names[i]) % COLOURS, ...(i === top && { class: "top" }) }, number(weight));
    cell.style.setProperty("--fill", fill(weight, full));
    return cell;
  });
  const current = layer === state.layer && { "aria-current": "true" };
  return element("tr", { "data-layer": layer, ...current }, element("th", { scope: "row" }, name), ...cells);
}

function weightTable(mean, rows, names) {
  const heads = names.map((name) => element("th", { scope: "col", title: name }, swatch(place(name)),
    element("span", { class: "name" }, name)));
  const full = Math.max(1, ...rows.flat()); // weights of more than one have longer bars, and the others shorter ones
  return element("table", names.length > 4 ? { class: "crowd" } : {},
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "layer"), ...heads)),
    element("tbody", {}, tableRow("mean", ALL, mean, names, full),
      ...rows.map((row, layer) => tableRow(layer, layer, row, names, full))));
}

function showNumbers() {
  const index = shownToken();
  const last = state.answers.findLast(({ tokens }) => tokens.length);
  $("readout").hidden = index === null;
  $("let-go").hidden = state.pinned === null;
  if (index !== null) {
    const { source, text, mean, weights, answer, place: at } = state.tokens[index];
    const shown = element("code", {}, printable(text || source) || " ");
    const part = text || (answer.finish === "stop" && at === answer.tokens.length - 1) ? "" : ", part of the next character";
    $("numbers").replaceChildren(element("h2", {}, "Weights of one token"),
      element("p", {}, shown, ` token ${at + 1} of ${answer.tokens.length}${part}`), weightTable(mean, weights, answer.names));
  } else if (last) {
    const means = last.total.map((row) => row.map((sum) => sum / last.tokens.length));
    $("numbers").replaceChildren(element("h2", {}, "Weights of the last answer"),
      element("p", {}, `mean of ${plural(last.tokens.length, "token")}`), weightTable(meanOf(means), means, last.names));
  } else $("numbers").replaceChildren(element("p", { class: "small" }, "The weights of an answer's tokens appear here."));
}

function markToken(kind, index) {
  if (index === state[kind]) return;
  state.tokens[state[kind]]?.span.classList.remove(kind);
  state.tokens[index]?.span.classList.add(kind);
  state[kind] = index;
  showNumbers();
}

function pin(index) {
  if (index !== null) {
    const { answer, span } = state.tokens[index];
    for (const token of answer.tokens) token.span.tabIndex = token.span === span ? 0 : -1;
  }
  markToken("pinned", index);
  // The box with the numbers may have come up over it.
  if (index !== null) state.tokens[index].span.scrollIntoView({ block: "nearest" });
}

function tokenAt(event) {
  const span = event.target.closest("[data-token]");
  return span ? Number(span.dataset.token) : null;
}

function onTokenKey(event) {
  const index = tokenAt(event);
  if (index === null) return;
  const { answer: { tokens }, place: at } = state.tokens[index];
  const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: tokens.length - 1 };
  const climbs = { ArrowUp: 1, ArrowDown: -1 };
  if (event.key in moves) tokens[Math.min(Math.max(moves[event.key], 0), tokens.length - 1)].span.focus();
  else if (event.key in climbs) showLayer(state.layer + climbs[event.key]);
  else if (event.key === "Escape") pin(null);
  else return;
  event.preventDefault();
}

$("model").addEventListener("change", () => chooseModel($("model").value));
$("new-chat").addEventListener("click", newChat);
$("by-model").addEventListener("click", () => setByHand(false));
$("by-hand").addEventListener("click", () => setByHand(true));
$("reset").addEventListener("click", resetWeights);
$("layer").addEventListener("input", () => showLayer(Number($("layer").value) - 1));
$("layer-down").addEventListener("click", () => showLayer(state.layer - 1));
$("layer-up").addEventListener("click", () => showLayer(state.layer + 1));
$("letters").addEventListener("change", () => document.body.classList.toggle("letters", $("letters").checked));
$("stop").addEventListener("click", () => state.running?.abort());
$("again").addEventListener("click", askAgain);
$("let-go").addEventListener("click", () => pin(null));
$("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("question").addEventListener("keydown", (event) => {
  // Enter also ends what an input method composes, such as Pinyin.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  saveKey($("key").value);
  $("key").value = "";
  loadModels();
});
$("numbers").addEventListener("click", (event) => {
  const row = event.target.closest("[data-layer]");
  if (row) showLayer(Number(row.dataset.layer));
});
// Where the box with the numbers comes up over the text, only a choice brings it up.
$("talk").addEventListener("pointermove", (event) => {
  if (wide.matches && event.pointerType !== "touch") markToken("hovered", tokenAt(event));
});
$("talk").addEventListener("pointerleave", () => markToken("hovered", null));
$("talk").addEventListener("scroll", () => {
  // The text grows meanwhile: only who scrolls up leaves its end.
  const top = $("talk").scrollTop;
  state.follow = atBottom() || (state.follow && top >= state.top);
  state.top = top;
});
$("talk").addEventListener("focusin", (event) => { if (tokenAt(event) !== null) pin(tokenAt(event)); });
$("talk").addEventListener("click", (event) => { if (tokenAt(event) !== null) pin(tokenAt(event)); });
$("talk").addEventListener("keydown", onTokenKey);

wide.addEventListener("change", () => { $("controls").open = wide.matches; });
$("controls").open = wide.matches;
showNumbers();
loadModels();
