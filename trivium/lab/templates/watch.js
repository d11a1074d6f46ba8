"use strict";
let latest = null;

async function refresh() {
  let text;
  try {
    text = await (await fetch(location.href)).text();
  } catch {
    document.querySelector("[role=status]").textContent = "No answer: `trivium watch` has stopped.";
    latest = null;
    return;
  }
  if (text === latest) return;
  latest = text;
  const fresh = new DOMParser().parseFromString(text, "text/html");
  const page = document.getElementById("page");
  const open = [...page.querySelectorAll("details[open]")].map((one) => one.id);
  const scrolled = document.getElementById("stages")?.scrollTop ?? 0;
  const focused = document.activeElement?.dataset?.stage;
  page.replaceChildren(...fresh.getElementById("page").childNodes);
  document.title = fresh.title;
  for (const name of open) document.getElementById(name)?.setAttribute("open", "");
  const stages = document.getElementById("stages");
  if (stages) stages.scrollTop = scrolled;
  if (focused) page.querySelector(`[data-stage="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
}

document.addEventListener("change", (event) => {
  const form = event.target.closest("form");
  if (form) location.search = new URLSearchParams(new FormData(form)).toString();
});

async function follow() {
  // a list of choices that is open would close
  if (!document.hidden && document.activeElement?.tagName !== "SELECT") await refresh();
  setTimeout(follow, 1500);
}
follow();
