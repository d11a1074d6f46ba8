"use strict";
const data = JSON.parse(document.getElementById("answers-data").textContent);
const form = document.getElementById("filters");
const found = document.getElementById("found");
const count = document.getElementById("count");
const more = document.getElementById("more");
const PAGE = 12;
let listed = [];
let shown = 0;

function element(name, words, kind) {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  if (words !== undefined) made.textContent = words;
  return made;
}

function choices(select, names) {
  for (const name of names) select.append(new Option(name, name));
}

function fits(question, model, verdict) {
  const own = question.a[model];
  if (!own) return false;
  const before = question.a[data.before[model]];
  if (verdict === "wrong") return own[1] < 1;
  if (verdict === "right") return own[1] >= 1;
  if (verdict === "gained") return before && before[1] < own[1];
  if (verdict === "lost") return before && before[1] > own[1];
  return true;
}

function card(entry) {
  const box = element("article", undefined, "example");
  box.append(element("p", entry.question.q, "asked"));
  box.append(element("p", `Expected: ${entry.question.e || "judged by a program"}`, "soft expected"));
  const row = element("div", undefined, "said");
  for (const name of data.models) {
    const answer = entry.question.a[name];
    if (!answer) continue;
    const one = element("div");
    const who = element("span", undefined, "who");
    who.append(element("span", name));
    who.append(element("span", answer[1] >= 1 ? "✓ right" : "✗ wrong", answer[1] >= 1 ? "right" : "wrong"));
    one.append(who, element("pre", answer[0] || "(nothing)"));
    row.append(one);
  }
  box.append(row);
  return box;
}

function reveal() {
  for (const entry of listed.slice(shown, shown + PAGE)) found.append(card(entry));
  shown = Math.min(shown + PAGE, listed.length);
  count.textContent = listed.length ? `${shown} of ${listed.length} questions` : "No question fits.";
  more.hidden = shown >= listed.length;
}

function search() {
  const words = form.elements.words.value.toLowerCase();
  const task = form.elements.task.value;
  const model = form.elements.model.value;
  listed = data.tasks[task].questions
    .filter((question) => fits(question, model, form.elements.verdict.value))
    .filter((question) => !words || (question.q + "\n" + question.e + "\n" + question.a[model][0]).toLowerCase().includes(words))
    .map((question) => ({ question }));
  shown = 0;
  found.replaceChildren();
  reveal();
}

choices(form.elements.task, Object.keys(data.tasks));
choices(form.elements.model, data.models);
form.elements.model.value = data.models[data.models.length - 1];
form.addEventListener("input", search);
form.addEventListener("submit", (event) => event.preventDefault());
more.addEventListener("click", reveal);
search();
