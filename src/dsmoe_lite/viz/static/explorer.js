// The routing explorer: a text, token by token, and the experts that each token chooses, layer by layer.
// Everything drawn comes from the traits of the widget's model; messages {do, ...} ask Python to compute.

const NONE = 0xffff; // no expert
const N_SHADES = 5; // of a fill

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

function typedArray(view, ArrayType) {
  const copy = new Uint8Array(view.buffer, view.byteOffset, view.byteLength).slice(); // typed arrays need alignment
  return new ArrayType(copy.buffer);
}

// One traced model with typed arrays; index = (layer * T + token) * K + rank.
function unpack(view) {
  const before = view.before.byteLength ? typedArray(view.before, Float32Array) : null;
  const loss = typedArray(view.loss, Float32Array);
  return {
    ...view,
    T: view.tokens.length,
    ids: typedArray(view.ids, Uint16Array),
    gates: typedArray(view.gates, Uint16Array),
    kept: typedArray(view.kept, Uint8Array),
    loss,
    devices: typedArray(view.devices, Uint8Array),
    before,
    change: before ? loss.map((value, t) => value - before[t]) : null,
    isOff: new Set(view.off.map(([layer, expert]) => `${layer} ${expert}`)),
  };
}

function choices(view, layer, token) {
  const result = [];
  for (let rank = 0; rank < view.top_k; rank += 1) {
    const i = (layer * view.T + token) * view.top_k + rank;
    if (view.ids[i] === NONE) continue;
    const gate = (view.gates[i] / 65535) * view.gate_top;
    result.push({ expert: view.ids[i], gate, kept: view.kept[i] === 1 });
  }
  return result;
}

function expertCounts(view, layer) {
  const counts = new Array(view.n_experts).fill(0);
  for (let i = layer * view.T * view.top_k; i < (layer + 1) * view.T * view.top_k; i += 1) {
    if (view.ids[i] !== NONE) counts[view.ids[i]] += 1;
  }
  return counts;
}

function maxAbsolute(values) {
  let result = 0;
  for (const value of values) if (Math.abs(value) > result) result = Math.abs(value);
  return result;
}

function mean(values) {
  const finite = values.filter(Number.isFinite);
  return finite.length ? finite.reduce((sum, value) => sum + value, 0) / finite.length : NaN;
}

const decimal = (value) => (Number.isFinite(value) ? value.toFixed(2) : "none");
const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "±") + Math.abs(value).toFixed(2);
// unlike `disabled`, aria-disabled lets the button keep the focus
const setDisabled = (button, disabled) => button.setAttribute("aria-disabled", String(Boolean(disabled)));
const isDisabled = (button) => button.getAttribute("aria-disabled") === "true";
const shade = (share) => Math.min(N_SHADES, Math.max(1, Math.ceil(share * N_SHADES)));
const visible = (token) =>
  token === "" ? "∙" : token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ /, "").replaceAll(" ", "␣") || "␣";

// A list with one tab stop; arrows, Home and End move the selection.
function listbox(label, prefix, select, stepLayer) {
  const box = make("div", { role: "listbox", tabIndex: 0, "aria-label": label });
  let options = [];
  let selected = 0;

  function onNextLine(direction) { // the nearest option on the line above or below
    const from = options[selected].getBoundingClientRect();
    const distance = (box) => Math.abs(box.left + box.width / 2 - (from.left + from.width / 2));
    let best = selected;
    let lineTop = null;
    for (let i = selected + direction; i >= 0 && i < options.length; i += direction) {
      const to = options[i].getBoundingClientRect();
      if (Math.abs(to.top - from.top) < 3) continue;
      if (lineTop !== null && Math.abs(to.top - lineTop) > 3) break;
      lineTop = to.top;
      if (best === selected || distance(to) < distance(options[best].getBoundingClientRect())) best = i;
    }
    return best;
  }

  box.addEventListener("keydown", (event) => {
    const moves = {
      ArrowLeft: () => selected - 1,
      ArrowRight: () => selected + 1,
      ArrowUp: () => onNextLine(-1),
      ArrowDown: () => onNextLine(1),
      Home: () => 0,
      End: () => options.length - 1,
    };
    if (event.key === "PageUp" || event.key === "PageDown") stepLayer(event.key === "PageUp" ? -1 : 1);
    else if (event.key in moves && options.length) {
      select(Math.min(options.length - 1, Math.max(0, moves[event.key]())));
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });
  box.addEventListener("click", (event) => {
    const option = event.target.closest("[role=option]");
    if (option) select(Number(option.dataset.i));
  });

  return {
    box,
    fill(nodes) {
      options = nodes;
      nodes.forEach((node, i) => {
        node.id = `${prefix}-${i}`;
        node.dataset.i = i;
        node.setAttribute("role", "option");
      });
      box.replaceChildren(...nodes);
    },
    get options() {
      return options;
    },
    mark(i) {
      options[selected]?.setAttribute("aria-selected", "false");
      selected = i;
      options[i]?.setAttribute("aria-selected", "true");
      if (options[i]) box.setAttribute("aria-activedescendant", options[i].id);
      if (box.matches(":focus")) options[i]?.scrollIntoView({ block: "nearest" });
    },
  };
}

// One model: its experts, the text coloured for the expert in focus, and the selected token's experts in every layer.
function panel(number, prefix, state, act) {
  const title = make("p", { className: "dx-name" });
  const losses = make("p", { className: "dx-losses" });
  const experts = listbox("", `${prefix}-e${number}`, (i) => act.focus(number, i), act.stepLayer);
  const tokens = listbox("", `${prefix}-t${number}`, act.token, act.stepLayer);
  const toggle = make("button", { type: "button", className: "dx-toggle" });
  const path = make("table");
  const legend = make("div", { className: "dx-label" });
  const node = make(
    "div",
    { className: "dx-panel", role: "group" },
    title,
    losses,
    legend,
    experts.box,
    toggle,
    make("div", { className: "dx-label" }, "The text"),
    tokens.box,
    path,
  );
  experts.box.classList.add("dx-experts");
  tokens.box.classList.add("dx-tokens");
  toggle.addEventListener("click", () => isDisabled(toggle) || act.toggle(number));
  let view = null;
  let drawnTokens = "";

  function fill() {
    view = state.views[number];
    node.setAttribute("aria-label", view.name);
    const shared = view.n_shared ? `, ${view.n_shared} shared` : "";
    const upTo = view.ids.includes(NONE) ? "up to " : "";
    title.replaceChildren(view.name, make("small", {}, ` ${upTo}${view.top_k} of ${view.n_experts} experts${shared}`));
    legend.textContent = `Experts: bar, load${view.n_devices > 1 ? "; stripe, device" : ""}`;
    experts.fill(
      Array.from({ length: view.n_experts }, (_, e) => {
        const bar = make("i");
        const device = make("b", { className: `dx-device${view.devices[e] % 8}` });
        return make("span", {}, device, `e${e}`, bar);
      }),
    );
    const text = JSON.stringify(view.tokens);
    if (text === drawnTokens) return;
    drawnTokens = text;
    const nodes = view.tokens.map((token) => make("span", {}, visible(token)));
    tokens.fill(nodes);
    const lines = [];
    view.tokens.forEach((token, t) => { // keep spaces between words and line breaks
      if (token.startsWith(" ") && t) lines.push(" ");
      lines.push(nodes[t]);
      if (token.endsWith("\n")) lines.push(make("br", { role: "presentation" }));
    });
    tokens.box.replaceChildren(...lines);
  }

  function drawExperts(layer, focus) {
    const counts = expertCounts(view, layer);
    const maxCount = Math.max(1, ...counts);
    const meanCount = mean(counts) || 1;
    experts.box.setAttribute("aria-label", `${view.name}: experts of layer ${layer}`);
    experts.options.forEach((option, e) => {
      const off = view.isOff.has(`${layer} ${e}`);
      option.classList.toggle("dx-off", off);
      option.lastChild.style.height = `${(counts[e] / maxCount) * 100}%`;
      const device = view.n_devices > 1 ? `, device ${view.devices[e]}` : "";
      const load = off ? "switched off" : `${counts[e]} tokens, ${decimal(counts[e] / meanCount)} times the mean load`;
      option.setAttribute("aria-label", `e${e}${device}, ${load}`);
      option.title = option.getAttribute("aria-label");
    });
    experts.mark(focus);
  }

  function drawTokens(layer, focus, colour) {
    const { change } = view;
    tokens.box.setAttribute("aria-label", `${view.name}: the text in layer ${layer}`);
    tokens.options.forEach((option, t) => {
      const choice = choices(view, layer, t).find(({ expert }) => expert === focus);
      let fill = "";
      let label = choice ? `e${focus} ${decimal(choice.gate)}${choice.kept ? "" : ", dropped"}` : `not e${focus}`;
      if (colour === "gate" && choice) {
        fill = choice.kept ? `dx-s${shade(choice.gate / state.maxima.gate)}` : "dx-dropped";
      }
      if (colour === "loss" && Number.isFinite(view.loss[t])) {
        fill = `dx-s${shade(view.loss[t] / state.maxima.loss)}`;
        label += `, loss ${decimal(view.loss[t])}`;
      }
      if (colour === "change" && change && Math.abs(change[t]) >= 0.005) {
        const size = Math.ceil((Math.abs(change[t]) / state.maxima.change) * 3);
        fill = `dx-${change[t] > 0 ? "worse" : "better"} dx-c${size}`;
        label += `, loss ${signed(change[t])}`;
      }
      option.className = `${fill}${choice ? " dx-chosen" : ""}`;
      option.setAttribute("aria-label", `${view.tokens[t].trim() || visible(view.tokens[t])}, ${label}`);
    });
    tokens.mark(state.token);
  }

  function drawPath(layer) {
    const t = state.token;
    const rows = [];
    for (let l = 0; l < view.n_layers; l += 1) {
      const ofLayer = choices(view, l, t);
      const chips = ofLayer.map((choice) => {
        const device = view.devices[choice.expert];
        const deviceName = view.n_devices > 1 ? make("small", {}, ` d${device}`) : "";
        const name = `e${choice.expert} ${decimal(choice.gate)}${choice.kept ? "" : " ×"}`;
        const chip = make("span", { className: `dx-chip dx-device${device % 8}` }, name, deviceName);
        if (choice.expert === state.focus[number]) chip.classList.add("dx-chosen");
        if (!choice.kept) chip.title = "dropped, as the expert was full";
        return chip;
      });
      const devices = new Set(ofLayer.map((choice) => view.devices[choice.expert])).size;
      const reach = view.n_devices > 1 ? `${devices} device${devices === 1 ? "" : "s"}` : "";
      const head = make("th", { scope: "row" }, `layer ${l}`);
      const row = make("tr", {}, head, make("td", {}, ...(chips.length ? chips : ["no expert"])), make("td", {}, reach));
      if (l === layer) row.className = "dx-current";
      rows.push(row);
    }
    const intact = view.before ? `, ${decimal(view.before[t])} with all experts` : "";
    const predicted = Number.isFinite(view.loss[t]);
    const loss = predicted ? `loss ${decimal(view.loss[t])}${intact}` : "no loss at the start of a window";
    const caption = make("caption", {}, `Token ${t}, `, make("q", {}, visible(view.tokens[t])), `: ${loss}`);
    path.replaceChildren(caption, make("tbody", {}, ...rows));
  }

  function draw() {
    if (view !== state.views[number]) fill();
    const layer = Math.min(state.layer, view.n_layers - 1);
    const focus = state.focus[number];
    drawExperts(layer, focus);
    drawTokens(layer, focus, state.shade);
    drawPath(layer);
    const loss = mean(Array.from(view.loss));
    const before = view.before ? mean(Array.from(view.before)) : NaN;
    const change = Number.isFinite(before) ? `, ${signed(loss - before)} from the experts switched off` : "";
    losses.textContent = `mean loss ${decimal(loss)}${change}`;
    const off = view.isOff.has(`${layer} ${focus}`);
    toggle.textContent = `Switch e${focus} of layer ${layer} ${off ? "on" : "off"}`;
    setDisabled(toggle, !state.connected || state.busy);
  }

  return { node, draw, summary: () => path.caption?.textContent ?? "" };
}

function render({ model, el }) {
  const prefix = `dx${Math.random().toString(36).slice(2)}`; // a page can have several explorers
  const state = { views: [], colour: "gate", connected: false };
  const send = (message) => {
    try {
      model.send(message);
    } catch {
      // a saved notebook without a kernel
    }
  };
  const setTrait = (name, value) => {
    model.set(name, value);
    try {
      model.save_changes();
    } catch {
      // without a kernel
    }
  };
  const depth = () => Math.max(...state.views.map((view) => view.n_layers));
  const act = {
    focus: (number, expert) => setTrait("focus", model.get("focus").map((e, i) => (i === number ? expert : e))),
    token: (t) => setTrait("token", t),
    toggle: (number) => {
      const view = state.views[number];
      const layer = Math.min(state.layer, view.n_layers - 1);
      state.colour = "change";
      send({ do: "toggle", view: number, layer, expert: state.focus[number] });
    },
    stepLayer: (step) => {
      const layer = Math.min(depth() - 1, Math.max(0, state.layer + step));
      if (layer !== state.layer) setTrait("layer", layer);
    },
  };

  const text = make("textarea", { rows: 2, id: `${prefix}-text`, spellcheck: false });
  const route = make("button", { type: "submit" }, "Route this text");
  const form = make("form", {}, make("label", { htmlFor: text.id }, "Text"), text, route);
  const layers = make("select", { id: `${prefix}-layer` });
  const up = make("button", { type: "button", "aria-label": "previous layer" }, "◀");
  const down = make("button", { type: "button", "aria-label": "next layer" }, "▶");
  const colour = make("select", { id: `${prefix}-colour` });
  const colours = { gate: "gate of the expert in focus", loss: "loss of the token", change: "change of the loss" };
  for (const [value, name] of Object.entries(colours)) colour.append(make("option", { value }, name));
  const allOn = make("button", { type: "button" }, "All experts on");
  const legend = make("span", { className: "dx-legend" });
  const bar = make(
    "div",
    { className: "dx-bar" },
    make("label", { htmlFor: layers.id }, "Layer"),
    make("span", { className: "dx-step" }, up, layers, down),
    make("label", { htmlFor: colour.id }, "Colour"),
    colour,
    legend,
    allOn,
  );
  const message = make("p", { className: "dx-message", role: "status" });
  const announcement = make("p", { className: "dx-announcement", "aria-live": "polite" });
  const panels = make("div", { className: "dx-panels" });
  const root = make("div", { className: "dsmoe-explorer" }, form, bar, message, panels, announcement);
  let modelPanels = [];

  function readViews() {
    state.views = model.get("views").map(unpack);
    // the darkest shade stands for the same value in every panel
    const maximum = (least, valuesOf) => Math.max(least, ...state.views.map((view) => maxAbsolute(valuesOf(view) || [])));
    state.maxima = {
      gate: maximum(1e-6, (view) => [view.gate_top]),
      loss: maximum(1e-6, (view) => view.loss),
      change: maximum(0.1, (view) => view.change),
    };
    if (modelPanels.length !== state.views.length) {
      modelPanels = state.views.map((_, number) => panel(number, prefix, state, act));
      panels.replaceChildren(...modelPanels.map((one) => one.node));
    }
    const names = Array.from({ length: depth() }, (_, layer) => make("option", { value: layer }, `${layer}`));
    if (layers.length !== names.length) layers.replaceChildren(...names);
  }

  function draw() {
    for (const name of ["layer", "token", "focus", "busy"]) state[name] = model.get(name);
    // the selection must stay inside a new text or model
    state.layer = Math.min(state.layer, depth() - 1);
    state.token = Math.min(state.token, state.views[0].T - 1);
    state.focus = state.views.map((view, i) => Math.min(state.focus[i] ?? 0, view.n_experts - 1));
    layers.value = state.layer;
    setDisabled(up, state.layer === 0);
    setDisabled(down, state.layer >= depth() - 1);
    const changed = state.views.some((view) => view.before);
    colour.options[2].disabled = !changed;
    state.shade = changed || state.colour !== "change" ? state.colour : "gate"; // only a colour that can be shown
    colour.value = state.shade;
    legend.textContent = `darkest: ${decimal(state.maxima[state.shade])}`;
    setDisabled(allOn, !state.connected || state.busy || !state.views.some((view) => view.isOff.size));
    setDisabled(route, !state.connected || state.busy);
    text.readOnly = !state.connected;
    modelPanels.forEach((one) => one.draw());
    const hint = model.get("can_compute")
      ? "Run this cell to enter your own text and to switch experts off."
      : "A recorded trace: its text and experts are fixed.";
    message.textContent = state.busy ? "Computing …" : model.get("message") || (state.connected ? "" : hint);
    message.classList.toggle("dx-error", !state.busy && Boolean(model.get("message")));
    root.setAttribute("aria-busy", String(Boolean(state.busy)));
    const name = (i) => (modelPanels.length > 1 ? `${state.views[i].name}: ` : "");
    announcement.textContent = modelPanels.map((one, i) => name(i) + one.summary()).join(". ");
  }

  const onViews = () => {
    readViews();
    draw();
  };
  const onText = () => {
    text.value = model.get("text");
  };
  const onMessage = (content) => {
    if (content.do !== "ready") return;
    state.connected = true;
    draw();
  };

  layers.addEventListener("change", () => setTrait("layer", Number(layers.value)));
  up.addEventListener("click", () => act.stepLayer(-1));
  down.addEventListener("click", () => act.stepLayer(1));
  colour.addEventListener("change", () => {
    state.colour = colour.value;
    draw();
  });
  allOn.addEventListener("click", () => isDisabled(allOn) || send({ do: "all on" }));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!isDisabled(route)) send({ do: "route", text: text.value });
  });
  text.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      form.requestSubmit();
    }
  });

  onText();
  onViews();
  el.append(root);
  const listeners = [["change:views", onViews], ["change:text", onText], ["msg:custom", onMessage]];
  for (const name of ["layer", "token", "focus", "busy", "message"]) listeners.push([`change:${name}`, draw]);
  for (const [event, listener] of listeners) model.on(event, listener);
  send({ do: "hello" });
  return () => {
    for (const [event, listener] of listeners) model.off(event, listener);
  };
}

export default { render };
