// ---- The widget

const COLOURS = { gate: "gate of the expert in focus", loss: "loss of the token", change: "change of the loss" };

function render({ model, el }) {
  const prefix = `dx${Math.random().toString(36).slice(2)}`; // a page can have several explorers
  const place = model.get("place");
  const state = {
    views: [], columns: [], colour: "gate", connected: false, hover: null, onShared: [], finding: "",
    questions: model.get("questions") ?? [], likes: model.get("likes") ?? {}, colours: model.get("colours") ?? [],
    text: () => model.get("text"),
  };
  let panels = [];
  let answered = null; // resolves what was asked
  let wrote = null;
  let helper = null; // answers in the place of the kernel
  const send = (message) => {
    if (helper) {
      helper(message);
      return;
    }
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
  const forget = () => {
    state.finding = "";
    writer.stop(true);
  };
  // Ask for new views; resolves to the message of an error, or "".
  const ask = (message) => new Promise((resolve) => {
    forget();
    answered = resolve;
    send(message);
  });
  const request = (message) => new Promise((resolve) => {
    wrote = resolve;
    send(message);
  });
  const show = (finding, traits) => {
    for (const [name, value] of Object.entries(traits)) setTrait(name, value);
    state.finding = finding;
    draw();
  };
  const act = {
    canCompute: () => state.connected,
    focusOf: (number) => (state.onShared[number] ? "shared" : state.focus[number]),
    focus: (number, layer, expert) => {
      if (act.focusOf(number) === expert && state.layer === layer) return;
      state.onShared[number] = expert === "shared";
      if (layer !== state.layer) setTrait("layer", layer);
      if (expert !== "shared") setTrait("focus", state.focus.map((e, i) => (i === number ? expert : e)));
      draw();
    },
    hover: (number, layer, expert) => {
      state.hover = expert === undefined ? null : { number, layer, expert };
      if (!writer.isWriting()) panels[number].draw();
    },
    token: (t) => {
      forget();
      setTrait("token", t);
    },
    toggle: (number, layer, expert) => {
      if (state.busy) return;
      act.focus(number, layer, expert);
      state.colour = "change";
      ask({ do: "toggle", view: number, layer, expert });
    },
    stepLayer: (by) => {
      const layer = Math.min(depth() - 1, Math.max(0, state.layer + by));
      if (layer !== state.layer) setTrait("layer", layer);
    },
  };
  const discoveries = discoveriesOf(state, ask, show);

  const text = make("textarea", { rows: 2, id: `${prefix}-text`, spellcheck: false });
  const route = make("button", { type: "submit" }, "Read this text");
  const form = make("form", {}, make("label", { htmlFor: text.id }, "Text"), text, route);
  const chips = state.questions.map(([prompt]) => button(prompt, () => ask({ do: "route", text: prompt }), { className: "dx-question" }));
  const questions = make("div", { className: "dx-row dx-questions", role: "group", "aria-label": "Questions that the models know" }, ...chips);
  questions.hidden = !chips.length;
  const needed = button("Break what this answer needs most", discoveries.breakMost);
  const same = button("Same word, other experts", discoveries.sameWordElsewhere);
  const shared = button("Is the shared expert needed?", discoveries.sharedNeeded);
  const allOn = button("All experts on", () => ask({ do: "all on" }));
  const link = button("Copy link", async () => {
    await copy(linkTo(state, place, model.get("text")));
    show("The link is copied: it leads to what you see.", {});
  });
  link.hidden = place === undefined;
  const writer = writerOf(prefix, state, request, () => panels, (what) => {
    announcement.textContent = what;
  });
  const actions = make("div", { className: "dx-row" }, needed, same, shared, writer.node, allOn, link);
  const layers = menu("Layer", `${prefix}-layer`, {});
  const up = button("◀", () => act.stepLayer(-1), { "aria-label": "previous layer" });
  const down = button("▶", () => act.stepLayer(1), { "aria-label": "next layer" });
  layers.select.before(up);
  layers.node.append(down);
  const colour = menu("Colour of the text", `${prefix}-colour`, COLOURS);
  const bar = make("div", { className: "dx-row" }, layers.node, colour.node);
  const message = make("p", { className: "dx-message", role: "status" });
  const announcement = make("p", { className: "dx-spoken", "aria-live": "polite" });
  const body = make("div", { className: "dx-panels" });
  const root = make("div", { className: "dsmoe-explorer" }, questions, form, actions, message, body, bar, announcement);

  function readViews() {
    state.views = model.get("views").map(unpack);
    state.columns = columnsOf(state.views);
    if (panels.length !== state.views.length) {
      panels = state.views.map((_, number) => panelOf(number, prefix, state, act));
      body.replaceChildren(...panels.map((one) => one.node));
    }
    if (layers.select.length === depth()) return;
    layers.select.replaceChildren(...Array.from({ length: depth() }, (_, layer) => make("option", { value: layer }, `${layer}`)));
  }

  function draw() {
    for (const name of ["layer", "token", "focus", "busy"]) state[name] = model.get(name);
    // the selection must stay inside a new text or model
    state.layer = Math.min(state.layer, depth() - 1);
    state.token = Math.min(state.token, state.views[0].T - 1);
    state.focus = state.views.map((view, i) => Math.min(state.focus[i] ?? 0, view.n_experts - 1));
    layers.select.value = state.layer;
    setDisabled(up, state.layer === 0);
    setDisabled(down, state.layer >= depth() - 1);
    const changed = state.views.some((view) => view.change && maxAbsolute(view.change) >= 0.005);
    colour.select.options[2].disabled = !changed;
    state.shade = changed || state.colour !== "change" ? state.colour : "gate"; // only a colour that can be shown
    colour.select.value = state.shade;
    const stuck = !state.connected || state.busy;
    for (const one of [...chips, route, needed, same, shared, writer.toggle]) setDisabled(one, stuck);
    setDisabled(allOn, stuck || !state.views.some((view) => view.isOff.size));
    shared.hidden = !state.views.some((view) => view.n_shared);
    chips.forEach((chip) => chip.setAttribute("aria-pressed", String(chip.textContent === model.get("text"))));
    text.readOnly = !state.connected;
    panels.forEach((one) => one.draw());
    drawMessage();
    announcement.textContent = `Token ${state.token}, ${quoted(state.views[0].tokens[state.token])}: ${panels.map((one) => one.summary()).join(". ")}`;
  }

  function drawMessage() {
    const hint = model.get("can_compute")
      ? "Run this cell to enter your own text and to switch experts off."
      : "A recorded trace: its text and experts are fixed.";
    const error = model.get("message");
    const invitation = state.connected ? "Click a square to switch an expert off; click a token to see its experts." : hint;
    message.textContent = state.busy ? "Computing …" : error || state.finding || invitation;
    message.classList.toggle("dx-error", !state.busy && Boolean(error));
    message.classList.toggle("dx-finding", !state.busy && !error && Boolean(state.finding));
    root.setAttribute("aria-busy", String(Boolean(state.busy)));
  }

  const onViews = () => {
    readViews();
    draw();
  };
  const onText = () => {
    text.value = model.get("text");
  };
  const onBusy = () => {
    draw();
    if (model.get("busy") || !answered) return;
    const resolve = answered;
    answered = null;
    resolve(model.get("message"));
  };
  const onMessage = async (content) => {
    if (content.do === "wrote") wrote?.(content.steps);
    if (content.do !== "ready" || state.connected) return; // a kernel may wake up later
    state.connected = true;
    draw();
    if (place === undefined) return;
    const vain = await follow(state, place, ask, setTrait);
    if (vain) show(vain, { message: "" }); // in the place of what its parts were answered
  };

  layers.select.addEventListener("change", () => setTrait("layer", Number(layers.select.value)));
  colour.select.addEventListener("change", () => {
    state.colour = colour.select.value;
    draw();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!isDisabled(route)) ask({ do: "route", text: text.value });
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
  const listeners = [["change:views", onViews], ["change:text", onText], ["change:busy", onBusy], ["msg:custom", onMessage]];
  for (const name of ["layer", "token", "focus", "message"]) listeners.push([`change:${name}`, draw]);
  for (const [event, listener] of listeners) model.on(event, listener);
  send({ do: "hello" });
  const unanswered = setTimeout(async () => {
    const found = await withoutKernel(model, onMessage);
    if (state.connected || !found) return;
    helper = found;
    send({ do: "hello" });
  }, KERNEL_SAYS_HELLO);
  return () => {
    clearTimeout(unanswered);
    writer.stop();
    for (const [event, listener] of listeners) model.off(event, listener);
  };
}

export default { render };
