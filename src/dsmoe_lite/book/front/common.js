// What the scripts of the front page share. Each adds its functions to `dsmoePage`; common.js is loaded first.
window.dsmoePage = (function () {
  "use strict";

  function make(tag, properties = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in node) node[name] = value;
      else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  }

  const wait = (ms = 0) => new Promise((resolve) => setTimeout(resolve, ms));
  const percent = (share) => (share > 0 && share < 0.005 ? "<1%" : `${Math.round(100 * share)}%`);

  // a, b and c
  function list(words) {
    return words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`;
  }

  // "1 fact", "no facts", "46 facts"
  const facts = (n) => `${n || "no"} ${n === 1 ? "fact" : "facts"}`;

  // Colour a square by its share of the layer's output, beside the largest one; 0 is not picked.
  function shade(square, share, largest) {
    square.style.setProperty("--used", share > 0 ? 25 + 75 * (share / largest) : 0);
  }

  return { make, wait, percent, list, facts, shade };
})();
