// The words of an answer: each a token that knows how likely it was and what else the model weighed.

import { $, make } from "./elements.js";

export function tokensOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((token) => ({ text: token.token, logprob: token.logprob, weighed: token.top_logprobs.map((other) => [other.token, other.logprob]) }));
  }
  return logprobs.tokens.map((text, index) => ({ text, logprob: logprobs.token_logprobs[index], weighed: Object.entries(logprobs.top_logprobs[index] || {}) }));
}

// Text may arrive later than its tokens (half letters, held-back stop strings), and some tokens have no text.
export function place(one, last) {
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
export function forget(one) {
  one.tokens[one.current]?.span.classList.remove("current");
  $("weighed").hidden = true;
}
export function walkTokens(one, press) {
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
