"use strict";

// Everything a model writes reaches the page through textContent: its HTML is letters.

const $ = (id) => document.getElementById(id);
const copyOf = (id) => $(id).content.firstElementChild.cloneNode(true);
const make = (tag, className, text) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
};

const off = (value) => (Number(value) === 0 ? "off" : value);
const DIALS = [
  { key: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, value: 0.8, note: "0 always takes the likeliest word." },
  { key: "top_p", label: "Top-p", min: 0.05, max: 1, step: 0.05, value: 1, note: "Keeps the likeliest words up to this share." },
  { key: "top_k", label: "Top-k", min: 0, max: 200, step: 1, value: 0, show: off, note: "Keeps this many of the likeliest words." },
  { key: "min_p", label: "Min-p", min: 0, max: 0.5, step: 0.01, value: 0, show: off, note: "Drops words this much less likely than the best." },
  { key: "repetition_penalty", label: "Repetition penalty", min: 1, max: 2, step: 0.05, value: 1, note: "1 changes nothing." },
  { key: "max_tokens", label: "Longest answer", min: 16, max: 2048, step: 16, value: 256, show: (value) => `${value} tokens` },
  { key: "alternatives", label: "Alternatives shown", min: 0, max: 10, step: 1, value: 5, show: off },
];

const state = { models: [], turns: [], settings: {}, key: null };

// ---- What is remembered ------------------------------------------------------------------------------------------

function remembered(store, key) {
  try { return store.getItem(key); } catch { return null; }
}
function remember(store, key, value) {
  try { store.setItem(key, value); } catch { /* a private window forgets, and the page works all the same */ }
}
function keep() {
  remember(localStorage, "trivium", JSON.stringify(state.settings));
}
function defaults() {
  const settings = { system: "", format: "chat", seed: "", tint: false, theme: "", chosen: null };
  for (const dial of DIALS) settings[dial.key] = dial.value;
  return settings;
}
function recall() {
  state.settings = defaults();
  try {
    const kept = JSON.parse(remembered(localStorage, "trivium") || "{}");
    for (const key of Object.keys(state.settings)) if (key in kept) state.settings[key] = kept[key];
  } catch { /* what cannot be read is forgotten */ }
  state.key = remembered(sessionStorage, "trivium-key");
}

// ---- Settings ----------------------------------------------------------------------------------------------------

function buildDials() {
  for (const dial of DIALS) {
    const row = make("div", "setting");
    const head = make("div", "dial-head");
    const label = make("label", "", dial.label);
    const value = make("output");
    const range = make("input");
    Object.assign(range, { type: "range", min: dial.min, max: dial.max, step: dial.step, id: `dial-${dial.key}` });
    label.htmlFor = value.htmlFor = range.id;
    head.append(label, value);
    row.append(head, range);
    if (dial.note) {
      const note = make("p", "note", dial.note);
      note.id = `${range.id}-note`;
      range.setAttribute("aria-describedby", note.id);
      row.append(note);
    }
    const show = () => {
      const text = dial.show ? dial.show(range.value) : range.value;
      value.textContent = text;
      range.setAttribute("aria-valuetext", text);
    };
    range.addEventListener("input", () => { state.settings[dial.key] = Number(range.value); show(); keep(); });
    dial.refresh = () => { range.value = state.settings[dial.key]; show(); };
    $("dials").append(row);
  }
}
function showSettings() {
  for (const dial of DIALS) dial.refresh();
  for (const key of ["system", "format", "seed", "theme"]) $(key).value = state.settings[key];
  $("tint").checked = state.settings.tint;
  applyLook();
}
function applyLook() {
  document.documentElement.dataset.theme = state.settings.theme;
  document.body.classList.toggle("tinted", state.settings.tint);
}
function openSettings(open, focus = true) {
  $("settings").hidden = !open;
  $("settings-button").setAttribute("aria-expanded", String(open));
  if (focus) (open ? $("settings") : $("settings-button")).focus();
}
function wireSettings() {
  for (const key of ["system", "format", "seed", "theme"]) {
    $(key).addEventListener("input", () => { state.settings[key] = $(key).value; keep(); applyLook(); });
  }
  $("tint").addEventListener("change", () => { state.settings.tint = $("tint").checked; keep(); applyLook(); });
  $("settings-button").addEventListener("click", () => openSettings($("settings").hidden));
  $("settings-close").addEventListener("click", () => openSettings(false));
  $("defaults").addEventListener("click", () => {
    state.settings = { ...defaults(), chosen: state.settings.chosen };
    showSettings();
    keep();
  });
  $("key-setting").addEventListener("submit", useKey);
}
function useKey(submit) {
  submit.preventDefault();
  state.key = $("key").value.trim();
  remember(sessionStorage, "trivium-key", state.key);
  loadModels();
}

// ---- Talking to the server ---------------------------------------------------------------------------------------

async function call(path, body, signal) {
  const headers = {};
  if (state.key) headers.Authorization = `Bearer ${state.key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new Error("The server does not answer.");
  }
  if (response.ok) return response;
  let message = `The server answered ${response.status}.`;
  try { message = (await response.json()).error.message; } catch { /* the status has to do */ }
  if (response.status === 401) askForKey();
  throw new Error(message);
}
function askForKey() {
  $("key-setting").hidden = false;
  openSettings(true, false);
  $("key").focus();
}
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const blocks = held.split("\n\n");
    held = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
function say(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// ---- Models ------------------------------------------------------------------------------------------------------

async function loadModels() {
  try {
    state.models = (await (await call("/v1/models")).json()).data;
  } catch (problem) {
    say(problem.message);
    return;
  }
  say("");
  $("key-setting").hidden = true;
  const names = state.models.map((model) => model.id);
  const kept = (state.settings.chosen || []).filter((name) => names.includes(name));
  state.settings.chosen = kept.length ? kept : names.slice(0, 3);
  $("models").querySelectorAll(".chip").forEach((chip) => chip.remove());
  for (const model of state.models) {
    const chip = make("label", "chip");
    const box = make("input");
    box.type = "checkbox";
    box.checked = state.settings.chosen.includes(model.id);
    chip.title = `${(model.trivium.parameters / 1e6).toFixed(1)} M parameters, context ${model.trivium.context}`;
    box.addEventListener("change", () => {
      const chosen = new Set(state.settings.chosen);
      if (box.checked) chosen.add(model.id); else chosen.delete(model.id);
      state.settings.chosen = names.filter((name) => chosen.has(name));
      keep();
      refresh();
    });
    chip.append(box, make("span", "", model.id));
    $("models").append(chip);
  }
  refresh();
}
const chosen = () => state.models.filter((model) => (state.settings.chosen || []).includes(model.id));

// ---- Turns -------------------------------------------------------------------------------------------------------

const running = () => state.turns.flatMap((turn) => [...turn.answers.values()]).filter((answer) => answer.stopper);

function refresh() {
  const busy = running().length > 0;
  $("send").textContent = busy ? "Stop" : "Send";
  $("send").disabled = !busy && (!$("prompt").value.trim() || chosen().length === 0);
  $("empty").hidden = state.turns.length > 0;
  $("turns").classList.toggle("several", state.turns.some((turn) => turn.answers.size > 1));
  const last = state.turns.at(-1);
  for (const turn of state.turns) {
    turn.element.querySelector(".edit").disabled = busy;
    for (const answer of turn.answers.values()) answer.parts.again.hidden = turn !== last || Boolean(answer.stopper);
  }
}
function ask(words) {
  const turn = { words, answers: new Map(), element: copyOf("turn-template") };
  state.turns.push(turn);
  turn.element.querySelector(".asked .words").textContent = words;
  turn.element.querySelector(".edit").addEventListener("click", () => edit(turn));
  $("turns").append(turn.element);
  for (const model of chosen()) answer(turn, model);
  refresh();
  toEnd();
}
function edit(turn) {
  const asked = turn.element.querySelector(".asked");
  const form = turn.element.querySelector(".editing");
  const box = form.querySelector("textarea");
  const close = () => { form.hidden = true; asked.hidden = false; };
  box.value = turn.words;
  asked.hidden = true;
  form.hidden = false;
  box.focus();
  form.querySelector(".cancel").onclick = () => { close(); asked.querySelector(".edit").focus(); };
  form.onkeydown = (press) => {
    if (press.key === "Escape") { press.stopPropagation(); form.querySelector(".cancel").click(); }
    if (press.key === "Enter" && !press.shiftKey && !press.isComposing) { press.preventDefault(); form.requestSubmit(); }
  };
  form.onsubmit = (submit) => {
    submit.preventDefault();
    if (!box.value.trim() || chosen().length === 0) return;
    for (const later of state.turns.splice(state.turns.indexOf(turn))) later.element.remove();
    ask(box.value);
    $("prompt").focus();
  };
}

function requestFor(turn, model) {
  const settings = state.settings;
  const body = { model: model.id, stream: true, stream_options: { include_usage: true } };
  for (const key of ["temperature", "top_p", "top_k", "min_p", "repetition_penalty"]) body[key] = settings[key];
  body.max_tokens = Math.min(settings.max_tokens, model.trivium.new_tokens);
  if (settings.seed !== "" && Number.isSafeInteger(Number(settings.seed))) body.seed = Number(settings.seed);
  const alternatives = Math.min(settings.alternatives, model.trivium.top_logprobs);
  if (settings.format === "plain" || !model.trivium.chat) {
    return ["/v1/completions", { ...body, prompt: turn.words, logprobs: alternatives }];
  }
  const messages = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  for (const earlier of state.turns.slice(0, state.turns.indexOf(turn))) {
    const answered = earlier.answers.get(model.id);
    if (!answered || !answered.text) continue;
    messages.push({ role: "user", content: earlier.words }, { role: "assistant", content: answered.text });
  }
  messages.push({ role: "user", content: turn.words });
  return ["/v1/chat/completions", { ...body, messages, logprobs: true, top_logprobs: alternatives }];
}

// ---- One answer --------------------------------------------------------------------------------------------------

function answer(turn, model) {
  const old = turn.answers.get(model.id);
  const element = copyOf("answer-template");
  const find = (name) => element.querySelector(`.${name}`);
  const parts = Object.fromEntries(["words", "thoughts", "problem", "facts", "stop", "copy", "again"].map((name) => [name, find(name)]));
  const one = { model: model.id, text: "", element, parts, tokens: [], pending: "", queue: [], count: 0, finish: null };
  one.thoughtWords = find("thought-words");
  find("who").textContent = model.id;
  parts.words.setAttribute("aria-label", `Answer of ${model.id}. The arrow keys go through its words and their probabilities.`);
  parts.stop.addEventListener("click", () => one.stopper?.abort());
  parts.again.addEventListener("click", () => { answer(turn, model); refresh(); });
  parts.copy.addEventListener("click", () => copyText(one));
  parts.words.addEventListener("keydown", (press) => walkTokens(one, press));
  parts.words.addEventListener("blur", () => forget(one));
  if (old) old.element.replaceWith(element); else turn.element.querySelector(".answers").append(element);
  turn.answers.set(model.id, one);
  run(one, turn, model);
}
async function run(one, turn, model) {
  one.stopper = new AbortController();
  one.started = performance.now();
  try {
    const [path, body] = requestFor(turn, model);
    const response = await call(path, body, one.stopper.signal);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) one.count = event.usage.completion_tokens;
      if (event.choices.length) take(one, event.choices[0]);
    }
  } catch (problem) {
    if (problem.name === "AbortError") one.finish = "stopped";
    else {
      one.finish = "failed";
      one.parts.problem.textContent = problem.message;
      one.parts.problem.hidden = false;
    }
  }
  one.ended = performance.now();
  one.stopper = null;
  settle(one);
}
function take(one, choice) {
  const follow = atEnd();
  one.first ??= performance.now();
  const delta = choice.delta || { content: choice.text };
  if (delta.reasoning_content) {
    one.parts.thoughts.hidden = false;
    one.thoughtWords.textContent += delta.reasoning_content;
  }
  for (const called of delta.tool_calls || []) delta.content = `${delta.content || ""}${called.function.name}(${called.function.arguments})`;
  one.text += delta.content || "";
  one.pending += delta.content || "";
  const scored = tokensOf(choice.logprobs);
  one.count += scored.length;
  if (delta.content || !delta.reasoning_content) one.queue.push(...scored);
  if (choice.finish_reason) one.finish = choice.finish_reason;
  place(one, false);
  showFacts(one);
  if (follow) toEnd();
}
function tokensOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((token) => ({ text: token.token, logprob: token.logprob, weighed: token.top_logprobs.map((other) => [other.token, other.logprob]) }));
  }
  return logprobs.tokens.map((text, index) => ({ text, logprob: logprobs.token_logprobs[index], weighed: Object.entries(logprobs.top_logprobs[index] || {}) }));
}

// Text may arrive later than its tokens (half letters, held-back stop strings), and some tokens have no text.
function place(one, last) {
  while (one.queue.length && one.pending) {
    const token = one.queue[0];
    if (!token.text.includes("\ufffd")) {
      if (one.pending.startsWith(token.text)) put(one, token.text, [one.queue.shift()]);
      else if (!last && token.text.startsWith(one.pending)) return;
      else one.queue.shift();
      continue;
    }
    const whole = one.queue.findIndex((other) => !other.text.includes("\ufffd"));
    const letters = whole < 0 ? (last ? one.pending.length : 0) : one.pending.indexOf(one.queue[whole].text);
    if (letters <= 0 && whole < 0) return;
    const halves = one.queue.splice(0, whole < 0 ? one.queue.length : whole);
    if (letters > 0) put(one, one.pending.slice(0, letters), halves);
  }
  if (one.pending && (last || !one.queue.length)) put(one, one.pending, []);
}
function put(one, text, tokens) {
  one.pending = one.pending.slice(text.length);
  if (!tokens.length) { one.parts.words.append(text); return; }
  const span = make("span", "token", text);
  const token = tokens[0];
  span.style.setProperty("--chance", Math.exp(token.logprob).toFixed(4));
  one.tokens.push({ span, ...token, text });
  span.addEventListener("pointerenter", () => weigh(one, one.tokens.findIndex((known) => known.span === span)));
  span.addEventListener("pointerleave", () => forget(one));
  one.parts.words.append(span);
}
function settle(one) {
  place(one, true);
  one.element.setAttribute("aria-busy", "false");
  one.parts.stop.hidden = true;
  one.parts.copy.hidden = !one.text;
  showFacts(one);
  refresh();
  $("spoken").textContent = `${one.model} ${one.finish === "failed" ? "failed" : "has answered"}.`;
}
function showFacts(one) {
  const facts = [];
  if (one.count) facts.push(`${one.count} tokens`);
  const seconds = ((one.ended || performance.now()) - one.started) / 1000;
  if (one.ended && one.count > 1 && seconds > 0) facts.push(`${Math.round(one.count / seconds)}/s`);
  if (one.ended && one.first) facts.push(`${((one.first - one.started) / 1000).toFixed(2)} s to the first`);
  const endings = { length: "cut at the limit", stopped: "stopped", tool_calls: "called a tool" };
  if (endings[one.finish]) facts.push(endings[one.finish]);
  one.parts.facts.textContent = facts.join(" · ");
}
async function copyText(one) {
  try {
    await navigator.clipboard.writeText(one.text);
    one.parts.copy.textContent = "Copied";
  } catch { one.parts.copy.textContent = "Not allowed"; }
  setTimeout(() => { one.parts.copy.textContent = "Copy"; }, 1500);
}

// ---- What the model weighed --------------------------------------------------------------------------------------

const seen = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
const percent = (logprob) => {
  const share = Math.exp(logprob) * 100;
  return `${share >= 10 ? share.toFixed(0) : share >= 0.1 ? share.toFixed(1) : "<0.1"} %`;
};

function weigh(one, index, aloud = false) {
  const token = one.tokens[index];
  if (!token) return;
  forget(one);
  one.current = index;
  token.span.classList.add("current");
  const rows = token.weighed.some(([text]) => text === token.text) ? token.weighed : [[token.text, token.logprob], ...token.weighed];
  const box = $("weighed");
  box.replaceChildren(...rows.toSorted((a, b) => b[1] - a[1]).map(([text, logprob]) => {
    const row = make("div", text === token.text ? "weighed-row taken" : "weighed-row");
    row.style.setProperty("--chance", Math.exp(logprob).toFixed(4));
    row.append(make("span", "letters", seen(text)), make("span", "chance", percent(logprob)));
    return row;
  }));
  box.hidden = false;
  const place = token.span.getClientRects()[0] || token.span.getBoundingClientRect();
  const below = place.bottom + box.offsetHeight + 12 < innerHeight;
  box.style.left = `${Math.max(8, Math.min(place.left, innerWidth - box.offsetWidth - 8))}px`;
  box.style.top = `${Math.max(8, below ? place.bottom + 6 : place.top - box.offsetHeight - 6)}px`;
  if (aloud) $("spoken").textContent = rows.map(([text, logprob]) => `${text} ${percent(logprob)}`).join(", ");
}
function forget(one) {
  one.tokens[one.current]?.span.classList.remove("current");
  $("weighed").hidden = true;
}
function walkTokens(one, press) {
  const here = one.current ?? -1;
  const last = one.tokens.length - 1;
  const steps = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: last };
  if (press.key === "Escape" && !$("weighed").hidden) { press.stopPropagation(); forget(one); return; }
  if (!(press.key in steps) || last < 0) return;
  press.preventDefault();
  const index = Math.max(0, Math.min(last, steps[press.key]));
  one.tokens[index].span.scrollIntoView({ block: "nearest" });
  weigh(one, index, true);
}

// ---- The desk ----------------------------------------------------------------------------------------------------

const atEnd = () => $("talk").scrollHeight - $("talk").scrollTop - $("talk").clientHeight < 60;
const toEnd = () => { $("talk").scrollTop = $("talk").scrollHeight; };
const stopAll = () => running().forEach((one) => one.stopper.abort());

function fitPrompt() {
  const box = $("prompt");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
  refresh();
}
function wireDesk() {
  $("compose").addEventListener("submit", (submit) => {
    submit.preventDefault();
    if (running().length) { stopAll(); return; }
    const words = $("prompt").value;
    if (!words.trim() || chosen().length === 0) return;
    $("prompt").value = "";
    ask(words);
    fitPrompt();
  });
  $("prompt").addEventListener("input", fitPrompt);
  $("prompt").addEventListener("keydown", (press) => {
    if (press.key === "Enter" && !press.shiftKey && !press.isComposing) {
      press.preventDefault();
      if (!running().length) $("compose").requestSubmit();
    } else if (press.key === "ArrowUp" && !$("prompt").value && state.turns.length && !running().length) {
      press.preventDefault();
      edit(state.turns.at(-1));
    }
  });
  $("fresh").addEventListener("click", () => {
    stopAll();
    state.turns = [];
    $("turns").replaceChildren();
    $("weighed").hidden = true;
    refresh();
    $("prompt").focus();
  });
  $("talk").addEventListener("scroll", () => { $("weighed").hidden = true; }, { passive: true });
  document.addEventListener("keydown", (press) => {
    const typing = press.target.matches("input, textarea, select");
    if (press.key === "Escape") {
      if (running().length) stopAll();
      else if (!$("settings").hidden) openSettings(false);
    } else if (press.key === "/" && !typing && !press.ctrlKey && !press.metaKey && !press.altKey) {
      press.preventDefault();
      $("prompt").focus();
    }
  });
}

recall();
buildDials();
showSettings();
wireSettings();
wireDesk();
loadModels();
