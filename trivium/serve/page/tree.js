// What a search drew: every step below the one before it, the best score first, the way to the answer marked.

import { make } from "./elements.js";

const LONGEST = 300;

export function drawTree(nodes) {
  const below = Map.groupBy(nodes, (node) => node.parent);
  const height = (node) => node.score ?? -Infinity;
  const draw = (parent) => (below.get(parent) || []).toSorted((a, b) => height(b) - height(a)).map((node) => {
    const step = make("details", "step");
    const line = make("summary");
    const words = node.text.trim().slice(0, LONGEST) || "(nothing)";
    const facts = [node.drawn > 1 && `drawn ${node.drawn} times`, node.visits && `${node.visits} visits`].filter(Boolean);
    line.append(`${node.score === null ? "not judged" : node.score.toFixed(2)} · `, make(node.chosen ? "mark" : "span", "", words));
    if (facts.length) line.append(` (${facts.join(", ")})`);
    step.open = node.chosen;
    step.append(line, ...draw(node.id));
    return step;
  });
  return draw(0);
}
