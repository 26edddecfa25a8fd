// Answers the routing explorers of a page in the place of Python (viz/explorer.py), with models that the page runs: in a
// worker, so that the page never freezes, or in the page itself if a browser refuses workers. compute.js computes.
(function () {
  "use strict";

  const WORKER = `onmessage = async ({ data: { id, request } }) => {
    try {
      postMessage({ id, result: await dsmoeCompute(request) });
    } catch (error) {
      postMessage({ id, error: error.message });
    }
  };`;

  // One worker for all explorers of a page. A worker that dies, or is silent for too long, is started again.
  class Computer {
    constructor() {
      this.loaded = new Set(); // keys of models that it has
      this.waiting = new Map(); // id -> [resolve, reject, timer]
      this.asked = 0;
      this.deaths = 0;
      this.worker = null;
      this.refused = false; // no workers here
    }

    start() {
      const text = `(${dsmoeEngine.source})(globalThis);(${dsmoeComputing})(globalThis);${WORKER}`;
      try {
        this.worker = new Worker(URL.createObjectURL(new Blob([text], { type: "text/javascript" })));
      } catch {
        this.refuse();
        return;
      }
      this.worker.onmessage = ({ data: { id, result, error } }) => {
        this.answered = true;
        const [resolve, reject, timer] = this.waiting.get(id);
        clearTimeout(timer);
        this.waiting.delete(id);
        if (error === undefined) resolve(result);
        else reject(new Error(error));
      };
      this.worker.onerror = () => this.died();
    }

    refuse() {
      this.refused = true;
      dsmoeComputing(window);
    }

    died() {
      if (!this.answered) this.refuse(); // it never worked: a page that may not start workers
      this.worker?.terminate();
      this.worker = null;
      this.loaded.clear();
      const waiting = [...this.waiting.values()];
      this.waiting.clear();
      for (const [, reject, timer] of waiting) {
        clearTimeout(timer);
        reject(new Died());
      }
    }

    post(request) {
      if (!this.worker && !this.refused) this.start();
      if (this.refused) return new Promise((resolve) => setTimeout(resolve)).then(() => window.dsmoeCompute(request));
      return new Promise((resolve, reject) => {
        this.asked += 1;
        this.waiting.set(this.asked, [resolve, reject, setTimeout(() => this.died(), Answers.patience)]);
        this.worker.postMessage({ id: this.asked, request });
      });
    }

    // The models of the book are scripts, each loaded when a reader first asks for it: file:// refuses a fetch.
    async load({ weights, config }) {
      const key = weights + JSON.stringify(config);
      if (this.loaded.has(key)) return key;
      await script(weights);
      await this.post({ do: "load", key, packed: { ...window.dsmoeModels[weights], config } });
      this.loaded.add(key);
      return key;
    }

    async ask(models, request) {
      const keys = [];
      for (const model of models) keys.push(await this.load(model));
      return this.post({ ...request, keys });
    }
  }

  class Died extends Error {}

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

  // ---- What the widget asks

  class Answers {
    static patience = 20_000; // ms until a silent worker counts as dead
    static computer = new Computer();

    // saved: the traits of a widget; its trait `live` names weights and configs.
    constructor(saved) {
      this.live = saved.live;
      this.names = saved.views.map((view) => view.name);
      this.off = this.names.map(() => []); // "layer expert", "layer shared" of each model
    }

    static can(saved) {
      const models = saved.live?.models ?? [];
      return models.length > 0 && models.every(({ weights }) => window.dsmoeShipped?.includes(weights));
    }

    // The messages of the page: {do: "hello" | "route" | "toggle" | "off" | "all on" | "break" | "write", ...}.
    async receive(widget, message) {
      if (message.do === "hello") {
        widget.emit("msg:custom", { do: "ready" });
        return;
      }
      const { window: size, n_devices } = this.live;
      const request = { names: this.names, window: size, n_devices, questions: widget.get("questions") ?? [] };
      Object.assign(request, { text: widget.get("text"), ...message, off: this.offAfter(message) });
      if (message.do === "write") {
        const steps = await this.compute(widget, request);
        widget.emit("msg:custom", { do: "wrote", steps: steps ?? [] });
        return;
      }
      widget.set("message", "");
      widget.set("busy", true);
      const found = await this.compute(widget, request);
      if (found) {
        this.off = found.off;
        if (request.text !== widget.get("text")) widget.set("token", found.views[0].tokens.length - 1);
        widget.set("views", found.views);
        widget.set("text", request.text);
      }
      widget.set("busy", false);
    }

    // The experts that are off after a message.
    offAfter({ do: what, view, layer, expert, off }) {
      if (what === "all on") return this.off.map(() => []);
      if (what === "off") return off.map((pairs) => pairs.map((pair) => pair.join(" ")));
      if (what !== "toggle") return this.off;
      const one = `${layer} ${expert}`;
      const toggled = (all) => (all.includes(one) ? all.filter((other) => other !== one) : [...all, one]);
      return this.off.map((all, i) => (i === view ? toggled(all) : all));
    }

    // The result, or null after an error that the reader sees. A computation that died is asked once more.
    async compute(widget, request) {
      for (const isLast of [false, true]) {
        try {
          return await Answers.computer.ask(this.live.models, request);
        } catch (error) {
          const died = error instanceof Died;
          widget.set("message", died ? "The computation had stopped and was started again." : error.message);
          if (!died || isLast) return null;
        }
      }
    }
  }

  window.dsmoeAnswers = Answers;
})();
