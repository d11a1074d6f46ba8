// Everything a model writes reaches the page through textContent: its HTML is letters.

export const $ = (id) => document.getElementById(id);
export const copyOf = (id) => $(id).content.firstElementChild.cloneNode(true);
export const make = (tag, className, text) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
};
