// What a reader can change: fields for both models and the picture, and the address that carries them.
(function (scope) {
  "use strict";

  const { make, NAMES, LESSONS, configOf, count } = scope.dsmoePlayground;
  const SIZES = { n_routed_experts: "experts", top_k: "per token (top-k)", n_shared_experts: "shared experts", expert_width: "expert width" };
  const FREE = { balance: "balance loss, weight", bias_speed: "bias speed", capacity_factor: "capacity" }; // also while training
  const CHOICES = {
    n_routed_experts: [4, 8, 12, 16, 24, 28, 32, 48, 64],
    top_k: [1, 2, 3, 4, 6, 7, 8],
    n_shared_experts: [0, 1, 2, 4],
    expert_width: [2, 4, 8, 16, 32],
    balance: [0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30],
    bias_speed: [0, 0.001, 0.003, 0.01, 0.03, 0.1],
    capacity_factor: [null, 1, 1.25, 1.5, 2],
  };
  const TASKS = {
    patches: "16 tiles, each its own wave",
    common: "16 tiles, one wave in common",
    quilt: "64 tiles, column wave + row wave",
    columns: "64 tiles, the column's wave",
    uncommon: "16 tiles, slow waves of their own",
  };
  const PHRASES = {
    n_routed_experts: (n) => `${n} experts`,
    top_k: (n) => `${n} experts per token`,
    n_shared_experts: (n) => `${n} shared experts`,
    expert_width: (n) => `experts ${n} wide`,
    balance: (n) => (n ? `a balance loss of weight ${n}` : "no balance loss"),
    bias_speed: (n) => (n ? `a bias of speed ${n}` : "no bias"),
    capacity_factor: (n) => (n === null ? "no capacity limit" : `a capacity of ${n}`),
  };
  const listed = (parts) => (parts.length < 2 ? parts.join("") : `${parts.slice(0, -1).join(", ")} and ${parts.at(-1)}`);

  // What was changed, in a sentence. changes: {model, name, value, step}, the last one of a name counts.
  function changeWords(changes) {
    const last = changes.filter((one, n) => !changes.slice(n + 1).some(({ model, name }) => model === one.model && name === one.name));
    const steps = [...new Set(last.map(({ step }) => step))];
    const sentences = steps.flatMap((step) => {
      const parts = NAMES.map((_, i) => listed(last.filter((one) => one.model === i && one.step === step).map(({ name, value }) => PHRASES[name](value))));
      const since = step ? `, since step ${count(step)}.` : ".";
      if (parts[0] && parts[0] === parts[1]) return [`Both now have ${parts[0]}${since}`];
      return parts.flatMap((words, i) => (words ? [`${NAMES[i]} now has ${words}${since}`] : []));
    });
    return sentences.join(" ");
  }

  // change(i, name, value): a setting of a model; picture(task): another picture. `sync` shows a state in the fields.
  function fieldsOf({ change, picture }) {
    const fields = [];
    const select = (values, words, act) => {
      const node = make("select", {}, ...values.map((value) => make("option", { value: String(value) }, words(value))));
      node.addEventListener("change", () => act(values[node.selectedIndex]));
      return node;
    };
    const tasks = select(Object.keys(TASKS), (name) => TASKS[name], picture);
    const models = NAMES.map((model, i) => make("fieldset", {}, make("legend", {}, `Model ${model}`),
      ...Object.entries({ ...SIZES, ...FREE }).map(([name, words]) => {
        const node = select(CHOICES[name], (value) => (value === null ? "no limit" : String(value)), (value) => change(i, name, value));
        fields.push({ node, i, name });
        return make("label", {}, words, node);
      })));
    const node = make("div", { className: "pg-settings" }, make("label", {}, "Picture", tasks), ...models);
    function sync({ settings, task }) {
      tasks.value = task;
      fields.forEach(({ node: field, i, name }) => (field.value = String(configOf(settings[i])[name])));
    }
    return { node, sync };
  }

  // The address: #lesson=finer&seed=3; for models of one's own their settings, and the lesson they come from.
  function writeAddress({ lesson, seed, control, isOwn, task, settings }) {
    const parts = new URLSearchParams({ lesson: isOwn ? "own" : lesson, seed });
    if (isOwn) {
      parts.set("from", lesson);
      parts.set("task", task);
      settings.forEach((own, i) => parts.set(NAMES[i].toLowerCase(), Object.entries(own).map((pair) => pair.join(":")).join(",")));
    } else if (control) parts.set("control", 1);
    history.replaceState(null, "", `#${parts}`);
  }

  // What an address asks for: {lesson, seed, control, own: {task, settings} or null}. What makes no sense is left out.
  function readAddress(text, lesson) {
    const given = new URLSearchParams(text);
    const isLesson = (name) => Object.hasOwn(LESSONS, name);
    const found = { lesson: isLesson(lesson) ? lesson : "collapse", seed: 1, control: false, own: null };
    const seed = Number(given.get("seed") ?? 1);
    if (Number.isInteger(seed) && seed >= 1 && seed <= 9999) found.seed = seed;
    const name = given.get("lesson");
    if (name !== "own") {
      if (name && isLesson(name)) Object.assign(found, { lesson: name, control: given.has("control") && "control" in LESSONS[name] });
      return found;
    }
    if (isLesson(given.get("from"))) found.lesson = given.get("from");
    const settingsOf = (pairs) => Object.fromEntries((pairs ?? "").split(",").map((pair) => pair.split(":"))
      .map(([key, value]) => [key, value === "null" ? null : Number(value)])
      .filter(([key, value]) => Object.hasOwn(CHOICES, key) && CHOICES[key].includes(value)));
    const settings = ["a", "b"].map((key) => settingsOf(given.get(key)));
    const fits = settings.every((own) => configOf(own).top_k <= configOf(own).n_routed_experts);
    found.own = { task: Object.hasOwn(TASKS, given.get("task")) ? given.get("task") : "patches", settings: fits ? settings : [{}, {}] };
    return found;
  }

  Object.assign(scope.dsmoePlayground, { FREE, changeWords, fieldsOf, writeAddress, readAddress });
})(typeof globalThis === "undefined" ? self : globalThis);
