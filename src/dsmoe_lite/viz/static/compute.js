// What the routing explorers of a page ask, computed without Python: viz/explorer_answers.py once more, with dsmoeEngine.
// A classic script that defines dsmoeComputing alone; answers.js calls it here, or runs its text in a worker, where it
// defines dsmoeCompute(request).
function dsmoeComputing(scope) {
  "use strict";

  const MAX_TOKENS = 512;
  const MAX_CHARACTERS = 8000;
  const MAX_WRITTEN = 256;
  const N_LIKELY = 3;
  const UNKNOWN = 0xff;
  const WHOLE = 65535;
  const REMEMBERED = 8; // readings of each model: a switch asks again for what was just read
  const models = new Map(); // key -> engine's model
  const readings = new WeakMap(); // model -> Map of its last readings
  const begun = new WeakMap(); // model -> {off, ids, cache}: what it read last as it wrote

  const range = (n) => Array.from({ length: n }, (_, i) => i);
  const highest = (values) => values.reduce((best, value, i) => (value > values[best] ? i : best), 0);
  const word = (model, id) => (id === 0 ? "" : model.tokenizer.decode([id]));
  const numbered = (n) => String(n).replace(/\B(?=(\d{3})+$)/g, ",");

  function check(text, model) {
    if (text === "") throw new Error("Type something first.");
    if (/\p{Surrogate}/u.test(text)) throw new Error("text: has half a character (a lone surrogate), which cannot be encoded; remove it");
    const length = [...text].length;
    if (length > MAX_CHARACTERS) throw new Error(`text = ${numbered(length)} characters: the explorer takes at most ${numbered(MAX_CHARACTERS)}; shorten it`);
    const T = model.tokenizer.encode(text).ids.length;
    if (T > MAX_TOKENS) throw new Error(`text = ${numbered(T)} tokens: the explorer shows at most ${MAX_TOKENS}; shorten it`);
  }

  // The errors of `without` in Python. off: a Set of "layer expert" and "layer shared".
  function checkOff(model, off) {
    const { moe } = model.config;
    const within = (name, value, n) => {
      if (!(value < n)) throw new Error(`${name} = ${value}: must be a whole number of at least 0 and at most ${n - 1}`);
    };
    for (const [layer, expert] of [...off].map((pair) => pair.split(" "))) {
      within("layer", Number(layer), model.nMoeLayers);
      if (expert === "shared" && !moe.n_shared_experts) throw new Error("n_shared_experts = 0: the model has no shared experts to remove");
      if (expert !== "shared") within("expert", Number(expert), moe.n_routed_experts);
    }
    const left = fewestLeft(model, off);
    if (moe && left < moe.top_k) throw new Error(`experts left = ${left}: must be at least top_k = ${moe.top_k}: switch fewer off`);
  }

  // Routed experts of the layer that has the fewest left.
  function fewestLeft(model, off) {
    const layers = [...off].filter((pair) => !pair.endsWith("shared")).map((pair) => pair.split(" ")[0]);
    const most = Math.max(0, ...layers.map((layer) => layers.filter((other) => other === layer).length));
    return (model.config.moe?.n_routed_experts ?? 0) - most;
  }

  // A text of T tokens as one model reads it, in windows: {ids, pieces, p (T rows), loss, routings of each window}.
  function read(model, request, off) {
    checkOff(model, off);
    const known = readings.get(model) ?? readings.set(model, new Map()).get(model);
    const name = JSON.stringify([request.text, request.window, request.questions, [...off].sort()]);
    const reading = known.get(name) ?? readNow(model, request, off);
    known.delete(name);
    known.set(name, reading); // the last one asked for is the last one forgotten
    if (known.size > REMEMBERED) known.delete(known.keys().next().value);
    return reading;
  }

  function readNow(model, { text, window, questions }, off) {
    const { ids, pieces } = model.tokenizer.encode(text);
    const V = model.config.vocab_size;
    const known = questions.find(([prompt]) => text.endsWith(prompt));
    const right = [...ids.slice(1), known ? model.tokenizer.encode(known[1]).ids[0] : -1];
    const reading = { ids, pieces, right, p: [], loss: new Float32Array(ids.length), parts: [] };
    const length = window ?? model.config.max_seq_len;
    for (let start = 0; start < ids.length; start += length) {
      const part = ids.slice(start, start + length);
      const { logits, routings } = model.forward(part, { off });
      reading.loss.set(model.losses(part, logits), start);
      reading.parts.push({ start, T: part.length, routings });
      range(part.length).forEach((t) => reading.p.push(model.distribution(logits.subarray(0, (t + 1) * V), 1)));
    }
    return reading;
  }

  // What the widget draws of one model and text: viz/explorer_answers.py, view.
  function viewOf(name, model, request, off) {
    const intact = read(model, request, new Set());
    const reading = off.size ? read(model, request, off) : intact;
    const { moe, d_model: D } = model.config;
    const { n_routed_experts: E, top_k: K, n_shared_experts: shared, n_group, expert_width: F } =
      moe ?? { n_routed_experts: 1, top_k: 1, n_shared_experts: 0, n_group: 1, expert_width: model.config.ffn_width };
    const L = moe ? model.nMoeLayers : model.config.n_layers;
    const T = reading.ids.length;
    const n_devices = moe ? request.n_devices ?? n_group : 1;
    const [ids, gates, kept] = [new Uint16Array(L * T * K), new Float32Array(L * T * K), new Uint8Array(L * T * K)];
    if (!moe) [gates, kept].forEach((all) => all.fill(1));
    for (const { start, T: n, routings } of reading.parts) {
      routings.forEach((routing, layer) => range(n).forEach((t) => {
        const ranks = range(K).map((k) => t * K + k).sort((a, b) => routing.gates[b] - routing.gates[a]);
        ranks.forEach((i, k) => {
          const at = (layer * T + start + t) * K + k;
          [ids[at], gates[at], kept[at]] = [routing.ids[i], routing.gates[i], routing.kept[i]];
        });
      }));
    }
    const gate_top = gates.reduce((a, b) => Math.max(a, b), 0) || 1;
    const bits = new Uint8Array(Math.ceil(kept.length / 8));
    kept.forEach((bit, i) => (bits[i >> 3] |= bit << (7 - (i & 7))));
    return {
      name,
      tokens: reading.pieces,
      n_layers: L,
      n_experts: E,
      n_shared: shared,
      n_devices,
      top_k: K,
      expert_size: 3 * D * F,
      dense: !moe,
      ids,
      gates: Uint16Array.from(gates, (gate) => Math.round((gate / gate_top) * WHOLE)),
      gate_top,
      kept: bits,
      devices: Uint8Array.from({ length: E }, (_, e) => Math.floor((e * n_devices) / E)),
      loss: reading.loss,
      before: off.size ? intact.loss : new Float32Array(0),
      ...likelyOf(model, reading, off.size ? intact : null),
      off: pairs(off),
    };
  }

  // The likeliest next tokens of each position, among them the right one, or else the likeliest with all experts.
  function likelyOf(model, reading, intact) {
    const top = reading.p.flatMap((p, t) => {
      const best = largest(p, N_LIKELY);
      const wanted = reading.right[t] >= 0 ? reading.right[t] : intact ? highest(intact.p[t]) : best[0];
      if (!best.includes(wanted)) best[N_LIKELY - 1] = wanted;
      return best;
    });
    const places = new Map();
    for (const id of top) if (!places.has(id)) places.set(id, places.size);
    const shares = (of) => Uint16Array.from(top, (id, i) => Math.round(of.p[Math.floor(i / N_LIKELY)][id] * WHOLE));
    const rank = (id, t) => (id < 0 ? UNKNOWN : top.slice(t * N_LIKELY, (t + 1) * N_LIKELY).indexOf(id));
    return {
      words: [...places.keys()].map((id) => word(model, id)),
      likely: Uint16Array.from(top, (id) => places.get(id)),
      right: Uint8Array.from(reading.right, rank),
      p: shares(reading),
      before_p: intact ? shares(intact) : new Uint16Array(0),
    };
  }

  function largest(values, n) {
    const best = [];
    values.forEach((value, i) => {
      if (best.length === n && !(value > values[best[n - 1]])) return;
      let at = best.length;
      while (at && value > values[best[at - 1]]) at -= 1;
      best.splice(at, 0, i);
      best.length = Math.min(best.length, n);
    });
    return best;
  }

  // "shared" before the numbers of a layer, as in Python.
  function pairs(off) {
    const split = [...off].map((pair) => pair.split(" ")).map(([layer, e]) => [Number(layer), e === "shared" ? e : Number(e)]);
    const place = (expert) => (expert === "shared" ? -1 : expert);
    return split.sort((a, b) => a[0] - b[0] || place(a[1]) - place(b[1]));
  }

  // `off` and the expert used by the last token whose loss hurts the right answer most.
  function mostNeeded(model, request, off) {
    const [intact, now] = [read(model, request, new Set()), read(model, request, off)];
    const target = intact.right.at(-1) >= 0 ? intact.right.at(-1) : highest(intact.p.at(-1));
    const K = model.config.moe?.top_k ?? 0;
    const { start, routings } = now.parts.at(-1);
    let best = null;
    routings.forEach((routing, layer) => {
      const last = range(K).map((k) => routing.ids.length - K + k).sort((a, b) => routing.gates[b] - routing.gates[a]);
      for (const pair of last.map((i) => `${layer} ${routing.ids[i]}`)) {
        const without = new Set([...off, pair]);
        if (fewestLeft(model, without) < K) continue;
        const p = model.probabilities(now.ids.slice(start), { off: without })[target];
        if (!best || p < best.p) best = { p, pair };
      }
    });
    return best ? new Set([...off, best.pair]) : off;
  }

  // n further tokens after the text and the ids `after` it: {id, word, experts: [expert, gate, kept] per layer}.
  function write(model, { text, window, n, temperature }, off, after) {
    checkOff(model, off);
    if (!(n >= 1 && n <= MAX_WRITTEN)) throw new Error(`n = ${n}: must be a whole number of at least 1 and at most ${MAX_WRITTEN}`);
    const length = window ?? model.config.max_seq_len;
    const { ids } = model.tokenizer.encode(text);
    const all = [...ids.slice(Math.floor((ids.length - 1) / length) * length), ...after];
    const K = model.config.moe?.top_k ?? 0;
    return range(n).map(() => {
      const { logits, routings } = goOn(model, all.slice(-length), off);
      const id = model.draw(logits, temperature);
      all.push(id);
      const experts = routings.map((routing) => {
        const last = range(K).map((k) => routing.ids.length - K + k);
        return last.map((i) => [routing.ids[i], routing.gates[i], routing.kept[i] === 1]);
      });
      return { id, word: word(model, id), experts };
    });
  }

  // Read `ids`, of which those read at the last call are not read again, if the model's experts allow that.
  function goOn(model, ids, off) {
    if (!model.routesAlone) return model.forward(ids, { off });
    const switched = [...off].sort().join();
    let state = begun.get(model);
    const goesOn = state?.off === switched && state.ids.length < ids.length && state.ids.every((id, i) => id === ids[i]);
    if (!goesOn) state = { off: switched, ids: [], cache: model.newCache() };
    const found = model.forward(ids.slice(state.ids.length), { off, cache: state.cache });
    begun.set(model, { ...state, ids });
    return found;
  }

  scope.dsmoeCompute = async (request) => {
    if (request.do === "load") {
      models.set(request.key, await scope.dsmoeEngine.read(request.packed));
      return null;
    }
    const asked = request.keys.map((key) => models.get(key));
    check(request.text, asked[0]);
    let off = request.off.map((all) => new Set(all));
    if (request.do === "write") return asked.map((model, i) => write(model, request, off[i], request.after[i]));
    if (request.do === "break") off = asked.map((model, i) => mostNeeded(model, request, off[i]));
    const views = asked.map((model, i) => viewOf(request.names[i], model, request, off[i]));
    return { views, off: off.map((all) => [...all]) };
  };
}
