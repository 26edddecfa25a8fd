// Answers the routing explorers of a page in the place of Python (viz/explorer.py), with models that the page runs.
(function () {
  "use strict";

  const MAX_TOKENS = 512;
  const MAX_CHARACTERS = 8000;
  const loaded = new Map(); // weights -> promise of an engine's model, with the config of its file

  // The models of the book are scripts, each loaded when a reader first asks for it: file:// refuses a fetch.
  function load({ weights, config }) {
    const key = weights + JSON.stringify(config);
    if (!loaded.has(key)) {
      loaded.set(key, script(weights).then(() => dsmoeEngine.read({ ...window.dsmoeModels[weights], config })));
      loaded.get(key).catch(() => loaded.delete(key));
    }
    return loaded.get(key);
  }

  function script(weights) {
    if (window.dsmoeModels[weights]) return Promise.resolve();
    return new Promise((resolve, reject) => {
      const node = document.createElement("script");
      node.src = window.dsmoeModelFolder + weights + ".js";
      node.onload = resolve;
      node.onerror = () => reject(new Error("The model's file is missing from this copy of the book."));
      document.head.append(node);
    });
  }

  // What the widget draws of one model and text: viz/explorer.py, _view.
  function viewOf(name, model, text, { window: size, n_devices: devices }, off, before) {
    const { ids, pieces } = model.tokenizer.encode(text);
    const { n_routed_experts: E, top_k: K, n_shared_experts, n_group } = model.config.moe;
    const T = ids.length;
    const L = model.nMoeLayers;
    const view = {
      name,
      tokens: pieces,
      n_layers: L,
      n_experts: E,
      n_shared: n_shared_experts,
      n_devices: devices ?? n_group,
      top_k: K,
      ids: new Uint16Array(L * T * K),
      gates: new Float32Array(L * T * K),
      kept: new Uint8Array(L * T * K),
      loss: new Float32Array(T),
      devices: Uint8Array.from({ length: E }, (_, e) => Math.floor((e * (devices ?? n_group)) / E)),
      before: before ?? new Float32Array(0),
      off: [...off].map((pair) => pair.split(" ").map(Number)).sort((a, b) => a[0] - b[0] || a[1] - b[1]),
    };
    const length = size ?? model.config.max_seq_len;
    for (let start = 0; start < T; start += length) {
      const part = ids.slice(start, start + length);
      const { logits, routings } = model.forward(part, { off });
      view.loss.set(model.losses(part, logits), start);
      routings.forEach((routing, layer) => {
        part.forEach((_, t) => {
          const at = (layer * T + start + t) * K;
          const ranks = Array.from({ length: K }, (_, k) => t * K + k);
          ranks.sort((a, b) => routing.gates[b] - routing.gates[a]);
          ranks.forEach((i, k) => {
            for (const what of ["ids", "gates", "kept"]) view[what][at + k] = routing[what][i];
          });
        });
      });
    }
    view.gate_top = view.gates.reduce((a, b) => Math.max(a, b), 0) || 1;
    view.gates = Uint16Array.from(view.gates, (gate) => Math.round((gate / view.gate_top) * 65535));
    return view;
  }

  function checked(text, model) {
    if (text === "") throw new Error("Type something first.");
    if (text.length > MAX_CHARACTERS) throw new Error(`${text.length} characters: the explorer takes at most ${MAX_CHARACTERS}; shorten the text.`);
    const T = model.tokenizer.encode(text).ids.length;
    if (T > MAX_TOKENS) throw new Error(`${T} tokens: the explorer shows at most ${MAX_TOKENS}; shorten the text.`);
  }

  class Answers {
    // saved: the traits of a widget; its trait `live` names weights and configs.
    constructor(saved) {
      this.live = saved.live;
      this.names = saved.views.map((view) => view.name);
      this.off = this.names.map(() => new Set());
    }

    static can(saved) {
      const models = saved.live?.models ?? [];
      return models.length > 0 && models.every(({ weights }) => window.dsmoeShipped?.includes(weights));
    }

    // The messages of the page: {do: "hello" | "route" | "toggle" | "all on", ...}; `widget` has its traits.
    async receive(widget, message) {
      if (message.do === "hello") {
        widget.emit("msg:custom", { do: "ready" });
        return;
      }
      let text = widget.get("text");
      const off = this.off.map((experts) => new Set(experts));
      if (message.do === "route") text = message.text;
      if (message.do === "all on") off.forEach((experts) => experts.clear());
      if (message.do === "toggle") {
        const expert = `${message.layer} ${message.expert}`;
        if (!off[message.view].delete(expert)) off[message.view].add(expert);
      }
      widget.set("message", "");
      widget.set("busy", true);
      try {
        const models = await Promise.all(this.live.models.map(load));
        await new Promise((resolve) => setTimeout(resolve)); // draw "Computing" first
        checked(text, models[0]);
        const views = models.map((model, i) => {
          const before = off[i].size ? viewOf(this.names[i], model, text, this.live, new Set()).loss : null;
          return viewOf(this.names[i], model, text, this.live, off[i], before);
        });
        this.off = off;
        widget.set("token", Math.min(widget.get("token"), views[0].tokens.length - 1));
        widget.set("views", views);
        widget.set("text", text);
      } catch (error) {
        widget.set("message", error.message);
      } finally {
        widget.set("busy", false);
      }
    }
  }

  window.dsmoeAnswers = Answers;
})();
