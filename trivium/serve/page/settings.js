// What a person has set, where it is remembered, and the panel that shows it.

import { $, make } from "./elements.js";

const off = (value) => (Number(value) === 0 ? "off" : value);
const SLIDERS = [
  { key: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, value: 0.8, note: "0 always takes the likeliest word." },
  { key: "top_p", label: "Top-p", min: 0.05, max: 1, step: 0.05, value: 1, note: "Keeps the likeliest words up to this share." },
  { key: "top_k", label: "Top-k", min: 0, max: 200, step: 1, value: 0, show: off, note: "Keeps this many of the likeliest words." },
  { key: "min_p", label: "Min-p", min: 0, max: 0.5, step: 0.01, value: 0, show: off, note: "Drops words this much less likely than the best." },
  { key: "repetition_penalty", label: "Repetition penalty", min: 1, max: 2, step: 0.05, value: 1, note: "1 changes nothing." },
  { key: "max_tokens", label: "Longest answer", min: 16, max: 2048, step: 16, value: 256, show: (value) => `${value} tokens` },
  { key: "alternatives", label: "Alternatives shown", min: 0, max: 10, step: 1, value: 5, show: off },
];

const WORDS = ["system", "format", "overflow", "reasoning", "search", "scorer", "seed", "theme"];

export const state = { models: [], turns: [], settings: {}, key: null };

// ---- What is remembered ------------------------------------------------------------------------------------------

export function remembered(store, key) {
  try { return store.getItem(key); } catch { return null; }
}
export function remember(store, key, value) {
  try { store.setItem(key, value); } catch { /* a private window forgets, and the page works all the same */ }
}
export function keep() {
  remember(localStorage, "trivium", JSON.stringify(state.settings));
}
function defaults() {
  const settings = { system: "", format: "chat", overflow: "drop", reasoning: "off", search: "", scorer: "logprob", seed: "", tint: false, theme: "", chosen: null };
  for (const slider of SLIDERS) settings[slider.key] = slider.value;
  return settings;
}
export function recall() {
  state.settings = defaults();
  try {
    const kept = JSON.parse(remembered(localStorage, "trivium") || "{}");
    for (const key of Object.keys(state.settings)) if (key in kept) state.settings[key] = kept[key];
  } catch { /* what cannot be read is forgotten */ }
  state.key = remembered(sessionStorage, "trivium-key");
}

// ---- Settings ----------------------------------------------------------------------------------------------------

export function buildDials() {
  for (const slider of SLIDERS) {
    const row = make("div", "setting");
    const head = make("div", "slider-head");
    const label = make("label", "", slider.label);
    const value = make("output");
    const range = make("input");
    Object.assign(range, { type: "range", min: slider.min, max: slider.max, step: slider.step, id: `slider-${slider.key}` });
    label.htmlFor = value.htmlFor = range.id;
    head.append(label, value);
    row.append(head, range);
    if (slider.note) {
      const note = make("p", "note", slider.note);
      note.id = `${range.id}-note`;
      range.setAttribute("aria-describedby", note.id);
      row.append(note);
    }
    const show = () => {
      const text = slider.show ? slider.show(range.value) : range.value;
      value.textContent = text;
      range.setAttribute("aria-valuetext", text);
    };
    range.addEventListener("input", () => { state.settings[slider.key] = Number(range.value); show(); keep(); });
    slider.refresh = () => { range.value = state.settings[slider.key]; show(); };
    $("sliders").append(row);
  }
}
export function showSettings() {
  for (const slider of SLIDERS) slider.refresh();
  for (const key of WORDS) $(key).value = state.settings[key];
  $("tint").checked = state.settings.tint;
  applyLook();
}
function applyLook() {
  document.documentElement.dataset.theme = state.settings.theme;
  document.body.classList.toggle("tinted", state.settings.tint);
}
export function openSettings(open, focus = true) {
  $("settings").hidden = !open;
  $("settings-button").setAttribute("aria-expanded", String(open));
  if (focus) (open ? $("settings") : $("settings-button")).focus();
}
export function wireSettings() {
  for (const key of WORDS) {
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
}
