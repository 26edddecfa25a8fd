// Bring the page's saved anywidgets to life: their own script and state, without Python behind them.
(function () {
  "use strict";

  // What a widget's script asks of its model. `answers` stands in for Python; without it messages go nowhere.
  class SavedModel {
    constructor(state, answers) {
      this.state = state;
      this.answers = answers;
      this.listeners = new Map();
    }
    get(name) {
      return this.state[name];
    }
    set(name, value) {
      this.state[name] = value;
      this.emit(`change:${name}`);
    }
    emit(event, content) {
      for (const listener of this.listeners.get(event) || []) listener(content);
    }
    save_changes() {}
    send(message) {
      if (this.answers) this.answers.receive(this, message);
    }
    on(event, listener) {
      this.listeners.set(event, [...(this.listeners.get(event) || []), listener]);
    }
    off(event, listener) {
      this.listeners.set(event, (this.listeners.get(event) || []).filter((other) => other !== listener));
    }
  }

  // The state with its binary parts put back where they were.
  function restored(saved) {
    const state = saved.state;
    for (const { path, data } of saved.buffers || []) {
      const parent = path.slice(0, -1).reduce((node, key) => node[key], state);
      const letters = atob(data);
      const numbers = new Uint8Array(letters.length);
      for (let i = 0; i < letters.length; i += 1) numbers[i] = letters.charCodeAt(i);
      parent[path.at(-1)] = new DataView(numbers.buffer);
    }
    return state;
  }

  const { src } = document.currentScript; // empty if the script is in the page itself
  const sheets = new Map(); // CSS -> its style sheet

  // The name of a script's file, as book/widget_modules.py gives it.
  function nameOf(script) {
    let found = 0x811c9dc5;
    for (let i = 0; i < script.length; i += 1) found = Math.imul(found ^ script.charCodeAt(i), 0x01000193) >>> 0;
    return `${script.length}-${found.toString(16).padStart(8, "0")}`;
  }

  // A widget's script: from the server, which a strict policy allows; from a file a page may import only its own text.
  async function load(script) {
    if (src.startsWith("http")) {
      try {
        return await import(new URL(`modules/${nameOf(script)}.js`, src).href);
      } catch {
        // not beside this page
      }
    }
    const address = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
    try {
      return await import(address);
    } finally {
      URL.revokeObjectURL(address);
    }
  }

  function dress(css) {
    if (sheets.has(css)) return;
    const sheet = new CSSStyleSheet();
    sheet.replaceSync(css);
    sheets.set(css, sheet);
    document.adoptedStyleSheets = [...document.adoptedStyleSheets, sheet];
  }

  async function mount(box, saved) {
    const state = restored(saved);
    const { default: widget } = await load(state._esm);
    dress(state._css);
    const el = document.createElement("div");
    state.can_compute = false; // nobody to run a cell here
    state.place = [...document.querySelectorAll(".saved-widget")].indexOf(box); // links name it
    const answers = window.dsmoeAnswers?.can(state) ? new window.dsmoeAnswers(state) : null;
    box.model = new SavedModel(state, answers);
    await widget.render({ model: box.model, el });
    box.replaceChildren(el);
    box.dataset.mounted = "yes";
  }

  window.dsmoeMount = mount;
  document.addEventListener("DOMContentLoaded", () => {
    const script = document.querySelector('script[type="application/vnd.jupyter.widget-state+json"]');
    const all = script ? JSON.parse(script.textContent).state : {};
    for (const box of document.querySelectorAll(".saved-widget")) {
      const saved = all[box.dataset.model];
      if (saved && saved.model_module === "anywidget") mount(box, saved).catch((error) => console.error(error));
      else box.dataset.mounted = "no";
    }
  });
})();
