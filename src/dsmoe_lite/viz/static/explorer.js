// The routing explorer: a text, token by token, and the experts that each token finds, layer by layer.
// Everything drawn comes from the model's traits; what needs Python is asked for by messages {do, ...}.

const NONE = 0xffff; // no expert
const STEPS = 5; // shades of a fill

function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node && name !== "list") node[name] = value;
    else node.setAttribute(name, value);
  }
  // keys belong to what has the focus, not to JupyterLab's cells, which "d d" would delete
  if (["BUTTON", "SELECT", "TEXTAREA"].includes(node.tagName) || "tabIndex" in properties) {
    node.setAttribute("data-lm-suppress-shortcuts", "true");
  }
  node.append(...children);
  return node;
}

function bytes(view, Kind) {
  const copy = new Uint8Array(view.buffer, view.byteOffset, view.byteLength).slice(); // Kinds need alignment
  return new Kind(copy.buffer);
}

// One traced model as numbers; i = (layer * T + token) * K + rank.
function unpack(view) {
  const before = view.before.byteLength ? bytes(view.before, Float32Array) : null;
  const loss = bytes(view.loss, Float32Array);
  return {
    ...view,
    T: view.tokens.length,
    ids: bytes(view.ids, Uint16Array),
    gates: bytes(view.gates, Uint16Array),
    kept: bytes(view.kept, Uint8Array),
    loss,
    devices: bytes(view.devices, Uint8Array),
    before,
    change: before ? loss.map((now, t) => now - before[t]) : null,
    isOff: new Set(view.off.map(([layer, expert]) => `${layer} ${expert}`)),
  };
}

function choices(view, layer, token) {
  const found = [];
  for (let rank = 0; rank < view.top_k; rank += 1) {
    const i = (layer * view.T + token) * view.top_k + rank;
    if (view.ids[i] === NONE) continue;
    const gate = (view.gates[i] / 65535) * view.gate_top;
    found.push({ expert: view.ids[i], gate, kept: view.kept[i] === 1 });
  }
  return found;
}

function loads(view, layer) {
  const counts = new Array(view.n_experts).fill(0);
  for (let i = layer * view.T * view.top_k; i < (layer + 1) * view.T * view.top_k; i += 1) {
    if (view.ids[i] !== NONE) counts[view.ids[i]] += 1;
  }
  return counts;
}

function most(values) {
  let top = 0;
  for (const value of values) if (Math.abs(value) > top) top = Math.abs(value);
  return top;
}

function mean(values) {
  const known = values.filter(Number.isFinite);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : NaN;
}

const short = (value) => (Number.isFinite(value) ? value.toFixed(2) : "none");
const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "±") + Math.abs(value).toFixed(2);
const forbid = (button, no) => button.setAttribute("aria-disabled", String(Boolean(no))); // it keeps the focus
const refused = (button) => button.getAttribute("aria-disabled") === "true";
const shade = (share) => Math.min(STEPS, Math.max(1, Math.ceil(share * STEPS)));
const visible = (token) =>
  token === "" ? "∙" : token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ /, "").replaceAll(" ", "␣") || "␣";

// A list with one tab stop, moved through by arrows, Home and End; selection follows.
function listbox(label, prefix, select, stepLayer) {
  const box = make("div", { role: "listbox", tabIndex: 0, "aria-label": label });
  let options = [];
  let at = 0;

  function line(direction) { // the nearest option on the line above or below
    const here = options[at].getBoundingClientRect();
    const middle = here.left + here.width / 2;
    let best = at;
    let found = null;
    for (let i = at + direction; i >= 0 && i < options.length; i += direction) {
      const there = options[i].getBoundingClientRect();
      if (Math.abs(there.top - here.top) < 3) continue;
      if (found !== null && Math.abs(there.top - found) > 3) break;
      found = there.top;
      const gap = (one) => Math.abs(one.left + one.width / 2 - middle);
      if (best === at || gap(there) < gap(options[best].getBoundingClientRect())) best = i;
    }
    return best;
  }

  box.addEventListener("keydown", (event) => {
    const moves = {
      ArrowLeft: () => at - 1,
      ArrowRight: () => at + 1,
      ArrowUp: () => line(-1),
      ArrowDown: () => line(1),
      Home: () => 0,
      End: () => options.length - 1,
    };
    if (event.key === "PageUp" || event.key === "PageDown") stepLayer(event.key === "PageUp" ? -1 : 1);
    else if (event.key in moves && options.length) select(Math.min(options.length - 1, Math.max(0, moves[event.key]())));
    else return;
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
      options[at]?.setAttribute("aria-selected", "false");
      at = i;
      options[i]?.setAttribute("aria-selected", "true");
      if (options[i]) box.setAttribute("aria-activedescendant", options[i].id);
      if (box.matches(":focus")) options[i]?.scrollIntoView({ block: "nearest" });
    },
  };
}

// One model: its experts, the text in their colours, and what the chosen token met.
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
  toggle.addEventListener("click", () => refused(toggle) || act.toggle(number));
  let view = null;
  let shown = "";

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
    if (text === shown) return;
    shown = text;
    const nodes = view.tokens.map((token) => make("span", {}, visible(token)));
    tokens.fill(nodes);
    const lines = [];
    view.tokens.forEach((token, t) => { // words keep their distance, lines their ends
      if (token.startsWith(" ") && t) lines.push(" ");
      lines.push(nodes[t]);
      if (token.endsWith("\n")) lines.push(make("br", { role: "presentation" }));
    });
    tokens.box.replaceChildren(...lines);
  }

  function drawExperts(layer, focus) {
    const counts = loads(view, layer);
    const most = Math.max(1, ...counts);
    const fair = mean(counts) || 1;
    experts.box.setAttribute("aria-label", `${view.name}: experts of layer ${layer}`);
    experts.options.forEach((option, e) => {
      const off = view.isOff.has(`${layer} ${e}`);
      option.classList.toggle("dx-off", off);
      option.lastChild.style.height = `${(counts[e] / most) * 100}%`;
      const where = view.n_devices > 1 ? `, device ${view.devices[e]}` : "";
      const load = off ? "switched off" : `${counts[e]} tokens, ${short(counts[e] / fair)} of the mean load`;
      option.setAttribute("aria-label", `e${e}${where}, ${load}`);
      option.title = option.getAttribute("aria-label");
    });
    experts.mark(focus);
  }

  function drawTokens(layer, focus, colour) {
    const { change } = view;
    tokens.box.setAttribute("aria-label", `${view.name}: the text in layer ${layer}`);
    tokens.options.forEach((option, t) => {
      const mine = choices(view, layer, t).find((choice) => choice.expert === focus);
      let look = "";
      let say = mine ? `e${focus} ${short(mine.gate)}${mine.kept ? "" : ", dropped"}` : `not e${focus}`;
      if (colour === "gate" && mine) look = mine.kept ? `dx-s${shade(mine.gate / state.tops.gate)}` : "dx-dropped";
      if (colour === "loss" && Number.isFinite(view.loss[t])) {
        look = `dx-s${shade(view.loss[t] / state.tops.loss)}`;
        say += `, loss ${short(view.loss[t])}`;
      }
      if (colour === "change" && change && Math.abs(change[t]) >= 0.005) {
        const size = Math.ceil((Math.abs(change[t]) / state.tops.change) * 3);
        look = `dx-${change[t] > 0 ? "worse" : "better"} dx-c${size}`;
        say += `, loss ${signed(change[t])}`;
      }
      option.className = `${look}${mine ? " dx-mine" : ""}`;
      option.setAttribute("aria-label", `${view.tokens[t].trim() || visible(view.tokens[t])}, ${say}`);
    });
    tokens.mark(state.token);
  }

  function drawPath(layer) {
    const t = state.token;
    const rows = [];
    for (let l = 0; l < view.n_layers; l += 1) {
      const chosen = choices(view, l, t);
      const chips = chosen.map((choice) => {
        const device = view.devices[choice.expert];
        const where = view.n_devices > 1 ? make("small", {}, ` d${device}`) : "";
        const name = `e${choice.expert} ${short(choice.gate)}${choice.kept ? "" : " ×"}`;
        const chip = make("span", { className: `dx-chip dx-device${device % 8}` }, name, where);
        if (choice.expert === state.focus[number]) chip.classList.add("dx-mine");
        if (!choice.kept) chip.title = "dropped: the expert was full";
        return chip;
      });
      const devices = new Set(chosen.map((choice) => view.devices[choice.expert])).size;
      const reach = view.n_devices > 1 ? `${devices} device${devices === 1 ? "" : "s"}` : "";
      const head = make("th", { scope: "row" }, `layer ${l}`);
      const row = make("tr", {}, head, make("td", {}, ...(chips.length ? chips : ["no expert"])), make("td", {}, reach));
      if (l === layer) row.className = "dx-here";
      rows.push(row);
    }
    const after = view.before ? `, ${short(view.before[t])} with all experts` : "";
    const loss = Number.isFinite(view.loss[t]) ? `loss ${short(view.loss[t])}${after}` : "no loss, a window starts here";
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
    const now = mean(Array.from(view.loss));
    const was = view.before ? mean(Array.from(view.before)) : NaN;
    const change = Number.isFinite(was) ? `, ${signed(now - was)} by the experts switched off` : "";
    losses.textContent = `mean loss ${short(now)}${change}`;
    const off = view.isOff.has(`${layer} ${focus}`);
    toggle.textContent = `Switch e${focus} of layer ${layer} ${off ? "on" : "off"}`;
    forbid(toggle, !state.awake || state.busy);
  }

  return { node, draw, say: () => path.caption?.textContent ?? "" };
}

function render({ model, el }) {
  const prefix = `dx${Math.random().toString(36).slice(2)}`; // several explorers may stand on one page
  const state = { views: [], colour: "gate", awake: false };
  const ask = (message) => {
    try {
      model.send(message);
    } catch {
      // a saved notebook: nobody listens
    }
  };
  const keep = (name, value) => {
    model.set(name, value);
    try {
      model.save_changes();
    } catch {
      // as above
    }
  };
  const depth = () => Math.max(...state.views.map((view) => view.n_layers));
  const act = {
    focus: (number, expert) => keep("focus", model.get("focus").map((old, i) => (i === number ? expert : old))),
    token: (t) => keep("token", t),
    toggle: (number) => {
      const view = state.views[number];
      const layer = Math.min(state.layer, view.n_layers - 1);
      state.colour = "change";
      ask({ do: "toggle", view: number, layer, expert: state.focus[number] });
    },
    stepLayer: (step) => {
      const layer = Math.min(depth() - 1, Math.max(0, state.layer + step));
      if (layer !== state.layer) keep("layer", layer);
    },
  };

  const text = make("textarea", { rows: 2, id: `${prefix}-text`, spellcheck: false });
  const route = make("button", { type: "submit" }, "Route this text");
  const form = make("form", {}, make("label", { htmlFor: text.id }, "Text"), text, route);
  const layers = make("select", { id: `${prefix}-layer` });
  const up = make("button", { type: "button", "aria-label": "previous layer" }, "◀");
  const down = make("button", { type: "button", "aria-label": "next layer" }, "▶");
  const colour = make("select", { id: `${prefix}-colour` });
  for (const [value, name] of [["gate", "gate of the expert in focus"], ["loss", "loss of the token"], ["change", "change of the loss"]]) {
    colour.append(make("option", { value }, name));
  }
  const all = make("button", { type: "button" }, "All experts on");
  const legend = make("span", { className: "dx-legend" });
  const bar = make(
    "div",
    { className: "dx-bar" },
    make("label", { htmlFor: layers.id }, "Layer"),
    make("span", { className: "dx-step" }, up, layers, down),
    make("label", { htmlFor: colour.id }, "Colour"),
    colour,
    legend,
    all,
  );
  const message = make("p", { className: "dx-message", role: "status" });
  const heard = make("p", { className: "dx-heard", "aria-live": "polite" });
  const panels = make("div", { className: "dx-panels" });
  const root = make("div", { className: "dsmoe-explorer" }, form, bar, message, panels, heard);
  let parts = [];

  function take() {
    state.views = model.get("views").map(unpack);
    // the deepest shade is the same value in every panel
    const top = (least, of) => Math.max(least, ...state.views.map((view) => most(of(view) || [])));
    state.tops = { gate: top(1e-6, (view) => [view.gate_top]), loss: top(1e-6, (view) => view.loss), change: top(0.1, (view) => view.change) };
    if (parts.length !== state.views.length) {
      parts = state.views.map((_, number) => panel(number, prefix, state, act));
      panels.replaceChildren(...parts.map((part) => part.node));
    }
    const names = Array.from({ length: depth() }, (_, layer) => make("option", { value: layer }, `${layer}`));
    if (layers.length !== names.length) layers.replaceChildren(...names);
  }

  function draw() {
    for (const name of ["layer", "token", "focus", "busy"]) state[name] = model.get(name);
    // a text or model may have changed under them
    state.layer = Math.min(state.layer, depth() - 1);
    state.token = Math.min(state.token, state.views[0].T - 1);
    state.focus = state.views.map((view, i) => Math.min(state.focus[i] ?? 0, view.n_experts - 1));
    layers.value = state.layer;
    forbid(up, state.layer === 0);
    forbid(down, state.layer >= depth() - 1);
    const changed = state.views.some((view) => view.before);
    colour.options[2].disabled = !changed;
    state.shade = changed || state.colour !== "change" ? state.colour : "gate"; // what can be shown now
    colour.value = state.shade;
    legend.textContent = `deepest: ${short(state.tops[state.shade])}`;
    forbid(all, !state.awake || state.busy || !state.views.some((view) => view.isOff.size));
    forbid(route, !state.awake || state.busy);
    text.readOnly = !state.awake;
    parts.forEach((part) => part.draw());
    const asleep = model.get("can_compute")
      ? "Run this cell to type a text of your own and to switch experts off."
      : "A recorded trace: its text and experts are fixed.";
    message.textContent = state.busy ? "Computing …" : model.get("message") || (state.awake ? "" : asleep);
    message.classList.toggle("dx-error", !state.busy && Boolean(model.get("message")));
    root.setAttribute("aria-busy", String(Boolean(state.busy)));
    heard.textContent = parts.map((part, i) => (parts.length > 1 ? `${state.views[i].name}: ` : "") + part.say()).join(". ");
  }

  const onViews = () => {
    take();
    draw();
  };
  const onText = () => {
    text.value = model.get("text");
  };
  const onMessage = (content) => {
    if (content.do !== "ready") return;
    state.awake = true;
    draw();
  };

  layers.addEventListener("change", () => keep("layer", Number(layers.value)));
  up.addEventListener("click", () => act.stepLayer(-1));
  down.addEventListener("click", () => act.stepLayer(1));
  colour.addEventListener("change", () => {
    state.colour = colour.value;
    draw();
  });
  all.addEventListener("click", () => refused(all) || ask({ do: "all on" }));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!refused(route)) ask({ do: "route", text: text.value });
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
  ask({ do: "hello" });
  return () => {
    for (const [event, listener] of listeners) model.off(event, listener);
  };
}

export default { render };
