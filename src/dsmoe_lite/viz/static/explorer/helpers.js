// The routing explorer: what a model says next, and which experts each token of a text uses, layer by layer.
// The files of this folder are one module, joined by viz/explorer.py. Everything drawn comes from the traits of the
// widget's model; messages {do, ...} ask Python, or answers.js where there is no kernel, to compute.

const N_STEPS = 5; // of a fill

function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node && name !== "list") node[name] = value;
    else node.setAttribute(name, value);
  }
  // keys must not reach JupyterLab, where "d d" deletes the cell
  if (["BUTTON", "SELECT", "TEXTAREA"].includes(node.tagName) || "tabIndex" in properties) {
    node.setAttribute("data-lm-suppress-shortcuts", "true");
  }
  node.append(...children);
  return node;
}

function button(words, act, properties = {}) {
  const node = make("button", { type: "button", ...properties }, words);
  node.addEventListener("click", () => isDisabled(node) || act());
  return node;
}

// A menu with its name; options: {value: words}.
function menu(name, id, options) {
  const select = make("select", { id });
  for (const [value, words] of Object.entries(options)) select.append(make("option", { value }, words));
  return { select, node: make("span", { className: "dx-menu" }, make("label", { htmlFor: id }, name), select) };
}

// unlike `disabled`, aria-disabled lets the button keep the focus
const setDisabled = (node, disabled) => node.setAttribute("aria-disabled", String(Boolean(disabled)));
const isDisabled = (node) => node.getAttribute("aria-disabled") === "true";

const decimal = (value) => (Number.isFinite(value) ? value.toFixed(2) : "none");
const signed = (value) => (value >= 0.005 ? "+" : value <= -0.005 ? "−" : "±") + Math.abs(value).toFixed(2);
const percent = (share) => (share > 0 && share < 0.005 ? "<1%" : `${Math.round(100 * share)}%`);
const step = (share) => Math.min(N_STEPS, Math.max(1, Math.ceil(share * N_STEPS)));
const visible = (token) =>
  token === "" ? "∙" : token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ /, "").replaceAll(" ", "␣") || "␣";
const word = (token) => (token === "" ? "the end" : visible(token)); // of a next token: "" ends a document
const quoted = (token) => `“${visible(token)}”`;
const listed = (words) => (words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`);
const isCalm = () => window.matchMedia("(prefers-reduced-motion: reduce)").matches;
const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// Five swatches, weak to strong, and what the strongest stands for.
function ramp(words, top) {
  const swatches = Array.from({ length: N_STEPS }, (_, i) => make("i", { className: `dx-s${i + 1}` }));
  return [make("span", {}, words), make("span", { className: "dx-ramp", "aria-hidden": "true" }, ...swatches), `up to ${top}`];
}
