// A trained model of the course, run by the page itself: byte-level BPE, the Transformer with its experts, generation.
// The package's mathematics once more (data/tokenizer.py, layers/, model.py, generate/), float32 as there.
// A classic script that defines `dsmoeEngine` alone: a page loads it, a worker or a widget runs its text.
// T tokens of a call, D model width, H heads, E routed experts, K of them per token, F expert width, V vocabulary.
(function engine(scope) {
  "use strict";

  // ---- Tokenizer

  // GPT-2's words. \s is not the same in Rust, where the package's tokenizer is written, as in JavaScript.
  const WORDS =
    /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;
  const PIECES = /\p{N}|\P{N}+/gu; // each digit alone

  // GPT-2's letter of each byte: visible Latin-1 stands for itself, the others are moved beyond it.
  function lettersOfBytes() {
    const visible = (byte) => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    let moved = 256;
    return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(visible(byte) ? byte : moved++));
  }

  class Tokenizer {
    // vocabulary: the token of each id; merges: pairs "a b", the first merged first.
    constructor(vocabulary, merges) {
      this.vocabulary = vocabulary;
      this.ids = new Map(vocabulary.map((token, id) => [token, id]));
      this.ranks = new Map(merges.map((pair, rank) => [pair, rank]));
      this.letters = lettersOfBytes();
      this.bytes = new Map(this.letters.map((letter, byte) => [letter, byte]));
      this.known = new Map(); // the parts of words seen before
    }

    // text -> {ids, pieces}: a character of several tokens belongs to the first of them; the others are "".
    encode(text) {
      if (/\p{Surrogate}/u.test(text)) throw new Error("The text has half a character (a lone surrogate); remove it.");
      const ids = [];
      const pieces = [];
      for (const [piece] of text.matchAll(PIECES)) {
        for (const [word] of piece.matchAll(WORDS)) {
          const characters = [...word];
          const ends = characters.flatMap((one, i) => new Array(utf8(one).length).fill(i + 1)); // of each byte
          let byte = 0;
          let start = 0;
          for (const part of this.parts(word)) {
            byte += part.length;
            const end = ends[byte - 1];
            ids.push(this.ids.get(part));
            pieces.push(characters.slice(start, end).join(""));
            start = Math.max(start, end);
          }
        }
      }
      return { ids, pieces };
    }

    decode(ids) {
      const letters = ids.filter((id) => id !== 0).map((id) => this.vocabulary[id]); // 0 ends a document
      return new TextDecoder().decode(Uint8Array.from([...letters.join("")], (letter) => this.bytes.get(letter)));
    }

    // Byte pair encoding: merge the pair of lowest rank, the leftmost of equal ones, until none is left.
    parts(word) {
      let parts = this.known.get(word);
      if (parts) return parts;
      parts = Array.from(utf8(word), (byte) => this.letters[byte]);
      for (;;) {
        let best = Infinity;
        let at = -1;
        for (let i = 0; i + 1 < parts.length; i += 1) {
          const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`);
          if (rank < best) [best, at] = [rank, i];
        }
        if (at < 0) break;
        parts.splice(at, 2, parts[at] + parts[at + 1]);
      }
      this.known.set(word, parts);
      return parts;
    }
  }

  const utf8 = (text) => new TextEncoder().encode(text);

  // ---- Layers: x and y are (T, width), row after row; a weight is (out, in) as in torch

  function linear(x, weight, n_in, n_out) {
    const T = x.length / n_in;
    const y = new Float32Array(T * n_out);
    for (let t = 0; t < T; t += 1) {
      for (let o = 0; o < n_out; o += 1) y[t * n_out + o] = dot(x, t * n_in, weight, o * n_in, n_in);
    }
    return y;
  }

  function dot(a, i, b, j, n) {
    let [even, odd, k] = [0, 0, 0];
    for (; k + 1 < n; k += 2) {
      even += a[i + k] * b[j + k];
      odd += a[i + k + 1] * b[j + k + 1];
    }
    return k < n ? even + odd + a[i + k] * b[j + k] : even + odd;
  }

  function rmsNorm(x, weight, eps) {
    const D = weight.length;
    const y = new Float32Array(x.length);
    for (let start = 0; start < x.length; start += D) {
      const scale = 1 / Math.sqrt(dot(x, start, x, start, D) / D + eps);
      for (let d = 0; d < D; d += 1) y[start + d] = x[start + d] * scale * weight[d];
    }
    return y;
  }

  function softmax(values, from, to) { // in place
    let highest = -Infinity;
    for (let i = from; i < to; i += 1) highest = Math.max(highest, values[i]);
    let sum = 0;
    for (let i = from; i < to; i += 1) sum += values[i] = Math.exp(values[i] - highest);
    for (let i = from; i < to; i += 1) values[i] /= sum;
  }

  // Rotate halves: channel c of a head with channel c + d/2, by position times frequency.
  function rotate(x, H, d, theta, start) {
    for (let t = 0; t < x.length / (H * d); t += 1) {
      for (let c = 0; c < d / 2; c += 1) {
        const angle = (start + t) * theta ** ((-2 * c) / d);
        const cos = Math.fround(Math.cos(angle));
        const sin = Math.fround(Math.sin(angle));
        for (let h = 0; h < H; h += 1) {
          const i = (t * H + h) * d + c;
          const [first, second] = [x[i], x[i + d / 2]];
          x[i] = first * cos - second * sin;
          x[i + d / 2] = second * cos + first * sin;
        }
      }
    }
  }

  // down (silu(gate x) * up x), added to y with a weight. One expert of several begins at `e` in each of its weights.
  function addSwiglu(y, into, x, from, ffn, e, D, F, weight) {
    const hidden = new Float32Array(F);
    for (let f = 0; f < F; f += 1) {
      const gate = dot(ffn.gate, e * F * D + f * D, x, from, D);
      hidden[f] = (gate / (1 + Math.exp(-gate))) * dot(ffn.up, e * F * D + f * D, x, from, D);
    }
    for (let o = 0; o < D; o += 1) y[into + o] += weight * dot(ffn.down, e * F * D + o * F, hidden, 0, F);
  }

  // ---- Routing

  // The ids of the k largest, best first; equal ones by their number. -Infinity is never chosen.
  function largest(values, k) {
    const chosen = [];
    while (chosen.length < k) {
      let best = -1;
      for (let i = 0; i < values.length; i += 1) {
        if (values[i] > (best < 0 ? -Infinity : values[best]) && !chosen.includes(i)) best = i;
      }
      if (best < 0) break;
      chosen.push(best);
    }
    return chosen;
  }

  // Choose K experts for each token from the logits (T, E). `off`: experts that no token may choose.
  function route(logits, moe, bias, off) {
    const { n_routed_experts: E, top_k: K } = moe;
    const T = logits.length / E;
    const ids = new Uint16Array(T * K);
    const gates = new Float32Array(T * K);
    const scores = logits.slice();
    const scale = moe.scale_normalised || !moe.norm_topk_prob ? moe.routed_scaling_factor : 1;
    for (let t = 0; t < T; t += 1) {
      if (moe.scoring_func === "softmax") softmax(scores, t * E, (t + 1) * E);
      else for (let e = t * E; e < (t + 1) * E; e += 1) scores[e] = 1 / (1 + Math.exp(-scores[e]));
      const own = scores.subarray(t * E, (t + 1) * E);
      let ranked = Array.from(own, (score, e) => (off.has(e) ? -Infinity : Math.fround(score + (bias ? bias[e] : 0))));
      if (moe.topk_group < moe.n_group) ranked = limitGroups(ranked, moe);
      const chosen = largest(ranked, K);
      if (chosen.length < K) throw new Error(`Experts left: ${chosen.length}. A token needs ${K}.`);
      const sum = moe.norm_topk_prob ? chosen.reduce((total, e) => total + own[e], 0) : 1;
      chosen.forEach((e, k) => {
        ids[t * K + k] = e;
        gates[t * K + k] = (own[e] / sum) * scale;
      });
    }
    return { ids, gates, kept: keep(ids, T, moe) };
  }

  // -Infinity outside the best groups of a token: a group is worth its best score, or the sum of its best two.
  function limitGroups(ranked, moe) {
    const size = ranked.length / moe.n_group;
    const worth = Array.from({ length: moe.n_group }, (_, g) => {
      const sorted = ranked.slice(g * size, (g + 1) * size).sort((a, b) => b - a);
      return moe.group_score === "top2" ? sorted[0] + sorted[1] : sorted[0];
    });
    const open = largest(worth, moe.topk_group);
    return ranked.map((score, e) => (open.includes(Math.floor(e / size)) ? score : -Infinity));
  }

  // 1 where an expert has a slot left: first choices of all tokens queue before second ones.
  function keep(ids, T, moe) {
    const kept = new Uint8Array(ids.length).fill(1);
    if (moe.eval_capacity_factor === null) return kept;
    const K = moe.top_k;
    const [whole, decimals = ""] = String(moe.eval_capacity_factor).split("."); // no rounding: 1.1 * 50 is 55 here
    const slots = Math.ceil((Number(whole + decimals) * T * K) / (10 ** decimals.length * moe.n_routed_experts));
    const counts = new Uint32Array(moe.n_routed_experts);
    for (let k = 0; k < K; k += 1) {
      for (let t = 0; t < T; t += 1) {
        kept[t * K + k] = counts[ids[t * K + k]] < slots ? 1 : 0;
        counts[ids[t * K + k]] += 1;
      }
    }
    return kept;
  }

  // ---- The model

  // The first setting of a config that this file cannot run, in words.
  function unsupported({ attention, moe, n_hash_layers: hashed }) {
    if ("kv_lora_rank" in attention) return "latent attention";
    if (attention.window !== null || attention.yarn !== null) return attention.yarn ? "YaRN" : "a sliding window";
    if (moe?.chooser === "expert") return "experts that choose their tokens";
    if (hashed || [moe?.scoring_func, moe?.chooser].includes("hash")) return "hash routing";
    if (moe?.scoring_func === "sqrtsoftplus" || moe?.swiglu_limit) return "the experts of DeepSeek-V4";
    return moe && moe.routing_groups !== 1 ? "routing in groups of sequences" : "";
  }

  class Model {
    // tensors: {name in the package's state_dict: Float32Array}.
    constructor(config, tokenizer, tensors) {
      const problem = unsupported(config);
      if (problem) throw new Error(`This page cannot run a model with ${problem}.`);
      Object.assign(this, { config, tokenizer });
      const of = (prefix) => (name) => tensors[`${prefix}.${name}.weight`];
      this.embed = tensors["embed.weight"];
      this.norm = tensors["norm.weight"];
      this.head = tensors["head.weight"] || this.embed;
      this.blocks = Array.from({ length: config.n_layers }, (_, layer) => {
        const prefix = `blocks.${layer}`;
        const weight = of(prefix);
        const block = { attention_norm: weight("attention_norm"), ffn_norm: weight("ffn_norm") };
        for (const part of ["query", "key", "value", "output"]) block[part] = weight(`attention.${part}`);
        const swiglu = (name) => Object.fromEntries(["gate", "up", "down"].map((w) => [w, weight(`${name}.${w}`)]));
        block.router = weight("ffn.router");
        if (!block.router) return { ...block, dense: swiglu("ffn") };
        const experts = `${prefix}.ffn.experts`;
        block.experts = { gate: tensors[`${experts}.gate`], up: tensors[`${experts}.up`], down: tensors[`${experts}.down`] };
        block.bias = tensors[`${prefix}.ffn.router.expert_bias`];
        if (config.moe.n_shared_experts) block.shared = swiglu("ffn.shared");
        return block;
      });
    }

    get nMoeLayers() { return this.blocks.filter((block) => block.router).length; }

    // Whether a token's experts do not depend on the other tokens of the call: then earlier ones need not be read again.
    get routesAlone() { return !this.config.moe || this.config.moe.eval_capacity_factor === null; }

    newCache() {
      const { n_heads, n_kv_heads, head_dim } = this.config.attention;
      const size = this.config.max_seq_len * (n_kv_heads ?? n_heads) * head_dim;
      return { length: 0, layers: this.blocks.map(() => ({ keys: new Float32Array(size), values: new Float32Array(size) })) };
    }

    // Token ids -> {logits (T, V), routings: one {ids (T, K), gates (T, K), kept (T, K)} per MoE layer}.
    // off: "layer expert" of routed experts switched off, layers of experts counted from 0, "layer shared" of shared ones.
    forward(ids, { off = new Set(), cache = null } = {}) {
      const { d_model: D, vocab_size: V, max_seq_len: longest, norm_eps: eps, moe } = this.config;
      const T = ids.length;
      const state = cache ?? this.newCache();
      if (state.length + T > longest) throw new Error(`${state.length + T} tokens: the model reads at most ${longest}.`);
      let x = new Float32Array(T * D);
      ids.forEach((id, t) => x.set(this.embed.subarray(id * D, (id + 1) * D), t * D));
      const routings = [];
      this.blocks.forEach((block, layer) => {
        const mixed = this.attend(rmsNorm(x, block.attention_norm, eps), block, state.layers[layer], state.length);
        x = x.map((value, i) => value + mixed[i]);
        const normed = rmsNorm(x, block.ffn_norm, eps);
        const y = new Float32Array(T * D);
        if (block.dense) {
          for (let t = 0; t < T; t += 1) addSwiglu(y, t * D, normed, t * D, block.dense, 0, D, this.config.ffn_width, 1);
        } else {
          const number = routings.length;
          const { n_routed_experts: E, top_k: K, expert_width: F, n_shared_experts: shared } = moe;
          const isOff = new Set(Array.from({ length: E }, (_, e) => e).filter((e) => off.has(`${number} ${e}`)));
          const routing = route(linear(normed, block.router, D, E), moe, block.bias, isOff);
          routings.push(routing);
          for (let i = 0; i < T * K; i += 1) {
            const at = Math.floor(i / K) * D;
            if (routing.kept[i]) addSwiglu(y, at, normed, at, block.experts, routing.ids[i], D, F, routing.gates[i]);
          }
          if (block.shared && !off.has(`${number} shared`)) {
            for (let t = 0; t < T; t += 1) addSwiglu(y, t * D, normed, t * D, block.shared, 0, D, shared * F, 1);
          }
        }
        x = x.map((value, i) => value + y[i]);
      });
      state.length += T;
      return { logits: linear(rmsNorm(x, this.norm, eps), this.head, D, V), routings };
    }

    // Causal attention of T new tokens over those in the cache and themselves; head h reads the keys of its group.
    attend(x, block, cache, start) {
      const { n_heads: H, n_kv_heads, head_dim: d, rope_theta: theta } = this.config.attention;
      const [D, groups] = [this.config.d_model, n_kv_heads ?? H];
      const T = x.length / D;
      const q = linear(x, block.query, D, H * d);
      const k = linear(x, block.key, D, groups * d);
      rotate(q, H, d, theta, start);
      rotate(k, groups, d, theta, start);
      cache.keys.set(k, start * groups * d);
      cache.values.set(linear(x, block.value, D, groups * d), start * groups * d);
      const mixed = new Float32Array(T * H * d);
      const scores = new Float32Array(start + T);
      for (let t = 0; t < T; t += 1) {
        for (let h = 0; h < H; h += 1) {
          const group = Math.floor((h * groups) / H) * d;
          const seen = start + t + 1;
          const from = (t * H + h) * d;
          for (let j = 0; j < seen; j += 1) scores[j] = dot(q, from, cache.keys, j * groups * d + group, d) / Math.sqrt(d);
          softmax(scores, 0, seen);
          for (let j = 0; j < seen; j += 1) {
            for (let c = 0; c < d; c += 1) mixed[from + c] += scores[j] * cache.values[j * groups * d + group + c];
          }
        }
      }
      return linear(mixed, block.output, H * d, D);
    }

    // The loss of each token but the first, in nats: -log p(token | those before it); NaN for the first.
    losses(ids, logits) {
      const V = this.config.vocab_size;
      return Float32Array.from(ids, (id, t) => {
        if (t === 0) return NaN;
        const row = logits.slice((t - 1) * V, t * V);
        const highest = row.reduce((a, b) => Math.max(a, b));
        return highest + Math.log(row.reduce((sum, value) => sum + Math.exp(value - highest), 0)) - row[id];
      });
    }

    // p(next token) after the last one, (V,).
    probabilities(ids, { off = new Set(), temperature = 1 } = {}) {
      return this.distribution(this.forward(ids, { off }).logits, temperature);
    }

    distribution(logits, temperature) {
      const last = logits.slice(logits.length - this.config.vocab_size).map((value) => value / temperature);
      softmax(last, 0, last.length);
      return last;
    }

    // The id of the next token after logits (T, V). Temperature 0 takes the likeliest; random() is in [0, 1).
    draw(logits, temperature, random = Math.random) {
      const p = this.distribution(logits, temperature || 1);
      let left = random();
      const drawn = p.findIndex((share) => (left -= share) < 0); // -1: rounding left a little
      return temperature === 0 ? largest(p, 1)[0] : drawn < 0 ? p.length - 1 : drawn;
    }

    // Yield n further tokens, one {id, routings} at a time.
    *generate(ids, n, { off = new Set(), temperature = 0, random = Math.random } = {}) {
      const all = [...ids];
      const cache = this.routesAlone ? this.newCache() : null;
      for (let i = 0; i < n && all.length < this.config.max_seq_len; i += 1) {
        const { logits, routings } = this.forward(cache ? all.slice(cache.length) : all, { off, cache });
        const id = this.draw(logits, temperature, random);
        all.push(id);
        yield { id, routings };
      }
    }
  }

  // ---- Files

  // A packed model -> Model. Weights are float16, gzip, base64; tensors: [name, number of weights] in their order.
  async function read(packed) {
    if (!scope.DecompressionStream) throw new Error("This browser is too old to run the model; update it.");
    const letters = atob(packed.weights);
    const compressed = new Uint8Array(letters.length);
    for (let i = 0; i < letters.length; i += 1) compressed[i] = letters.charCodeAt(i);
    const stream = new Blob([compressed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const halves = new Uint16Array(await new Response(stream).arrayBuffer());
    const tensors = {};
    let start = 0;
    for (const [name, size] of packed.tensors) {
      const values = (tensors[name] = new Float32Array(size));
      for (let i = 0; i < size; i += 1) values[i] = NUMBERS[halves[start++]];
    }
    return new Model(packed.config, new Tokenizer(packed.vocabulary, packed.merges), tensors);
  }

  const NUMBERS = Float32Array.from({ length: 65536 }, (_, bits) => { // of each float16
    const [exponent, fraction] = [(bits >> 10) & 31, bits & 1023];
    const size = exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024);
    return bits & 0x8000 ? -size : size;
  });

  scope.dsmoeEngine = { Model, Tokenizer, read, source: String(engine) }; // a worker runs the source once more
})(globalThis);
