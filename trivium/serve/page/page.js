// The desk: models, turns and answers.

import { attach, contentOf, offer, preview, takeAttached, wireAttachments } from "./attachments.js";
import { $, copyOf, make } from "./elements.js";
import { buildDials, keep, openSettings, recall, remember, showSettings, state, wireSettings } from "./settings.js";
import { drawTree } from "./tree.js";
import { forget, place, tokensOf, walkTokens } from "./words.js";

// ---- Talking to the server ---------------------------------------------------------------------------------------

async function call(path, body, signal) {
  const headers = {};
  // A header holds single bytes: those of UTF-8, in which the server reads the key.
  if (state.key) headers.Authorization = `Bearer ${String.fromCharCode(...new TextEncoder().encode(state.key))}`;
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
function useKey(submit) {
  submit.preventDefault();
  state.key = $("key").value.trim();
  remember(sessionStorage, "trivium-key", state.key);
  loadModels();
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
    refresh();
    return;
  }
  say("");
  if (!$("key-setting").hidden) {
    $("key-setting").hidden = true;
    openSettings(false, false);
    $("prompt").focus();
  }
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
  const scorers = [...new Set(state.models.flatMap((model) => model.trivium.search.scorers))];
  $("scorer").replaceChildren(...scorers.map((name) => make("option", "", name)));
  $("scorer").value = scorers.includes(state.settings.scorer) ? state.settings.scorer : "logprob";
  refresh();
}
const chosen = () => state.models.filter((model) => (state.settings.chosen || []).includes(model.id));

// ---- Turns -------------------------------------------------------------------------------------------------------

const running = () => state.turns.flatMap((turn) => [...turn.answers.values()]).filter((answer) => answer.stopper);

function refresh() {
  const busy = running().length > 0;
  offer(chosen().some((model) => model.trivium.pictures), chosen().some((model) => model.trivium.sounds));
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
function ask(words, parts = []) {
  const turn = { words, parts, answers: new Map(), element: copyOf("turn-template") };
  state.turns.push(turn);
  turn.element.querySelector(".asked .words").textContent = words;
  turn.element.querySelector(".asked .shown").append(...parts.map(preview));
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
    ask(box.value, turn.parts);
    $("prompt").focus();
  };
}

function requestFor(turn, model) {
  const settings = state.settings;
  const body = { model: model.id, stream: true, stream_options: { include_usage: true } };
  for (const key of ["temperature", "top_p", "top_k", "min_p", "repetition_penalty"]) body[key] = settings[key];
  body.max_tokens = Math.min(settings.max_tokens, model.trivium.new_tokens, Math.ceil(model.trivium.context / 2));
  if (settings.seed !== "" && Number.isSafeInteger(Number(settings.seed))) body.seed = Number(settings.seed);
  const alternatives = Math.min(settings.alternatives, model.trivium.top_logprobs);
  if (settings.format === "plain" || !model.trivium.chat) {
    return ["/v1/completions", { ...body, prompt: turn.words, logprobs: alternatives }];
  }
  const messages = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  for (const earlier of state.turns.slice(0, state.turns.indexOf(turn))) {
    const answered = earlier.answers.get(model.id);
    if (!answered || !answered.text) continue;
    messages.push({ role: "user", content: contentOf(earlier.parts, earlier.words) }, { role: "assistant", content: answered.text });
  }
  messages.push({ role: "user", content: contentOf(turn.parts, turn.words) });
  if (settings.search) return ["/v1/chat/completions", searching(body, messages)];
  return ["/v1/chat/completions", { ...body, messages, logprobs: true, top_logprobs: alternatives, overflow: settings.overflow, reasoning: settings.reasoning }];
}

function searching(body, messages) {
  const { search: method, overflow, reasoning } = state.settings;
  for (const key of ["top_k", "min_p", "repetition_penalty"]) delete body[key];
  if (!body.temperature) delete body.temperature;
  const search = { method, scorer: $("scorer").value, tree: true };
  return { ...body, messages, search, reasoning, overflow: overflow === "slide" ? "drop" : overflow };
}

// ---- One answer --------------------------------------------------------------------------------------------------

function answer(turn, model) {
  const old = turn.answers.get(model.id);
  const element = copyOf("answer-template");
  const find = (name) => element.querySelector(`.${name}`);
  const parts = Object.fromEntries(["words", "recap", "thoughts", "tree", "problem", "facts", "stop", "copy", "again"].map((name) => [name, find(name)]));
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
      if (event.trivium) tellOverflow(one, event.trivium);
      if (event.trivium?.search) tellSearch(one, event.trivium.search);
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
function tellOverflow(one, report) {
  if (report.messages_left_out) one.overflow = `${report.messages_left_out} earlier messages did not fit`;
  if (report.prompt_tokens_forgotten) one.overflow = `${report.prompt_tokens_forgotten} earlier tokens are forgotten`;
  if (report.summary) {
    one.overflow = `${report.messages_summarised} earlier messages are summarised`;
    one.parts.recap.hidden = false;
    one.parts.recap.querySelector(".recap-words").textContent = report.summary;
  }
}
function tellSearch(one, found) {
  one.parts.tree.hidden = false;
  one.parts.tree.querySelector(".tree-steps").replaceChildren(...drawTree(found.tree));
  one.search = `${found.solutions} solutions`;
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
function settle(one) {
  const follow = atEnd();
  place(one, true);
  one.element.setAttribute("aria-busy", "false");
  one.parts.stop.hidden = true;
  one.parts.copy.hidden = !one.text;
  showFacts(one);
  refresh();
  if (follow) toEnd();
  $("spoken").textContent = `${one.model} ${one.finish === "failed" ? "failed" : "has answered"}.`;
}
function showFacts(one) {
  const facts = [];
  if (one.count) facts.push(`${one.count} tokens`);
  const seconds = ((one.ended || performance.now()) - one.started) / 1000;
  if (one.ended && one.count > 1 && seconds > 0) facts.push(`${Math.round(one.count / seconds)}/s`);
  if (one.ended && one.first) facts.push(`${((one.first - one.started) / 1000).toFixed(2)} s to the first`);
  const endings = { length: "cut at the limit", stopped: "stopped", tool_calls: "called a tool" };
  if (one.search) facts.push(one.search);
  if (one.overflow) facts.push(one.overflow);
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

// ---- The desk ----------------------------------------------------------------------------------------------------

const atEnd = () => $("talk").scrollHeight - $("talk").scrollTop - $("talk").clientHeight < 60;
const toEnd = () => { $("talk").scrollTop = $("talk").scrollHeight; };
// Who reads the end of the talk goes on reading it when the settings make the talk narrower.
function followEnd() {
  let following = true;
  $("talk").addEventListener("scroll", () => { following = atEnd(); }, { passive: true });
  new ResizeObserver(() => { if (following) toEnd(); }).observe($("talk"));
}
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
    ask(words, takeAttached());
    fitPrompt();
  });
  $("prompt").addEventListener("input", fitPrompt);
  followEnd();
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
    attach([]);
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
$("key-setting").addEventListener("submit", useKey);
wireDesk();
wireAttachments(say);
loadModels();
