// ---- One traced model and what follows from it

const NONE = 0xffff; // no expert
const UNKNOWN = 0xff; // the right next token is not known
const WHOLE = 65535;
const N_LIKELY = 3;

function typedArray(view, ArrayType) {
  const copy = new Uint8Array(view.buffer, view.byteOffset, view.byteLength).slice(); // typed arrays need alignment
  return new ArrayType(copy.buffer);
}

// A view with typed arrays; index of ids, gates and kept = (layer * T + token) * K + rank.
function unpack(view) {
  const before = view.before.byteLength ? typedArray(view.before, Float32Array) : null;
  const loss = typedArray(view.loss, Float32Array);
  const ids = typedArray(view.ids, Uint16Array);
  const bits = typedArray(view.kept, Uint8Array);
  return {
    ...view,
    T: view.tokens.length,
    ids,
    gates: typedArray(view.gates, Uint16Array),
    kept: Uint8Array.from(ids, (_, i) => (bits[i >> 3] >> (7 - (i & 7))) & 1),
    loss,
    devices: typedArray(view.devices, Uint8Array),
    before,
    change: before ? loss.map((value, t) => value - before[t]) : null,
    likely: typedArray(view.likely, Uint16Array),
    right: typedArray(view.right, Uint8Array),
    p: typedArray(view.p, Uint16Array),
    before_p: view.before_p.byteLength ? typedArray(view.before_p, Uint16Array) : null,
    isOff: new Set(view.off.map(([layer, expert]) => `${layer} ${expert}`)),
  };
}

// The routed experts of a token: {expert, gate, share of its gates, kept}, highest gate first.
function choices(view, layer, token) {
  const result = [];
  for (let rank = 0; rank < view.top_k; rank += 1) {
    const i = (layer * view.T + token) * view.top_k + rank;
    if (view.ids[i] === NONE) continue;
    const gate = (view.gates[i] / WHOLE) * view.gate_top;
    result.push({ expert: view.ids[i], gate, kept: view.kept[i] === 1 });
  }
  return withShares(result);
}

function withShares(chosen) {
  const sum = chosen.reduce((total, { gate }) => total + gate, 0) || 1;
  return chosen.map((choice) => ({ ...choice, share: choice.gate / sum }));
}

// The likeliest words after a token: {word, p, before (with all experts, else NaN), right}.
function likely(view, token) {
  if (!view.likely.length) return [];
  return Array.from({ length: N_LIKELY }, (_, k) => {
    const i = token * N_LIKELY + k;
    const before = view.before_p ? view.before_p[i] / WHOLE : NaN;
    return { word: word(view.words[view.likely[i]]), p: view.p[i] / WHOLE, before, right: view.right[token] === k };
  });
}

function expertCounts(view, layer) {
  const counts = new Array(view.n_experts).fill(0);
  for (let i = layer * view.T * view.top_k; i < (layer + 1) * view.T * view.top_k; i += 1) {
    if (view.ids[i] !== NONE) counts[view.ids[i]] += 1;
  }
  return counts;
}

// The words that an expert took, most gate first: [word, its highest gate, how often].
function wordsOf(view, layer, expert) {
  const found = new Map();
  view.tokens.forEach((token, t) => {
    const choice = choices(view, layer, t).find((one) => one.expert === expert);
    const [gate, n] = found.get(visible(token)) ?? [0, 0];
    if (choice) found.set(visible(token), [Math.max(choice.gate, gate), n + 1]);
  });
  return [...found].map(([word, [gate, n]]) => [word, gate, n]).sort((a, b) => b[1] - a[1]);
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

const expertName = (view, expert) => (expert === "shared" ? "the shared expert" : view.dense ? "the FFN" : `e${expert}`);
// Layers are numbered over those with experts; a dense model's are its blocks.
const MAX_GRIDS = 3;
const shownLayers = (view, layer) =>
  view.n_layers <= MAX_GRIDS ? Array.from({ length: view.n_layers }, (_, l) => l) : [Math.min(layer, view.n_layers - 1)];
