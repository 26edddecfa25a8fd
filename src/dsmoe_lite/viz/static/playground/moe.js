// A mixture of experts that learns in the page: the package's router, SwiGLU experts and expert-level loss, forward and
// backward, with Adam. The router reads a token's tags, the experts its content (D numbers); the output is one number.
// T tokens of a batch, E routed experts, K of them per token, F expert width, R tags.
(function (scope) {
  "use strict";

  const [RATE, MOMENTUM, DECAY, TINY] = [0.01, 0.9, 0.99, 1e-8]; // of Adam

  // mulberry32: numbers in [0, 1), the same for the same seed in every browser.
  function randomOf(seed) {
    let state = seed >>> 0;
    return () => {
      state = (state + 0x6d2b79f5) >>> 0;
      let mixed = Math.imul(state ^ (state >>> 15), state | 1);
      mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
      return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
    };
  }

  function normal(random) {
    return Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
  }

  // Weights with their gradients and Adam's two moments.
  class Weights {
    constructor(size, std, random) {
      this.values = Float64Array.from({ length: size }, () => std * normal(random));
      this.gradients = new Float64Array(size);
      this.first = new Float64Array(size);
      this.second = new Float64Array(size);
    }

    step(t) {
      const { values, gradients, first, second } = this;
      const [forFirst, forSecond] = [1 - MOMENTUM ** t, 1 - DECAY ** t];
      for (let i = 0; i < values.length; i += 1) {
        first[i] += (1 - MOMENTUM) * (gradients[i] - first[i]);
        second[i] += (1 - DECAY) * (gradients[i] * gradients[i] - second[i]);
        values[i] -= (RATE * (first[i] / forFirst)) / (Math.sqrt(second[i] / forSecond) + TINY);
      }
    }
  }

  // n experts of F hidden units: down (silu(gate x) * up x). gate and up are (n, F, D), down is (n, F).
  class Experts {
    constructor(n, F, D, random) {
      Object.assign(this, { F, D });
      this.gate = new Weights(n * F * D, 1, random);
      this.up = new Weights(n * F * D, 1, random);
      this.down = new Weights(n * F, 1 / Math.sqrt(F), random);
    }

    // The output of expert e for the content at `at` of x. seen: (3 F) numbers that `backward` needs.
    forward(e, x, at, seen) {
      const { F, D } = this;
      const [gate, up, down] = [this.gate.values, this.up.values, this.down.values];
      let y = 0;
      for (let f = 0; f < F; f += 1) {
        const row = (e * F + f) * D;
        let g = 0;
        let u = 0;
        for (let d = 0; d < D; d += 1) {
          g += gate[row + d] * x[at + d];
          u += up[row + d] * x[at + d];
        }
        const s = 1 / (1 + Math.exp(-g));
        y += down[e * F + f] * g * s * u;
        seen[3 * f] = g;
        seen[3 * f + 1] = u;
        seen[3 * f + 2] = s;
      }
      return y;
    }

    // Add the gradients of dy times that output.
    backward(e, x, at, seen, dy) {
      const { F, D } = this;
      const [dGate, dUp, dDown] = [this.gate.gradients, this.up.gradients, this.down.gradients];
      for (let f = 0; f < F; f += 1) {
        const row = (e * F + f) * D;
        const g = seen[3 * f];
        const u = seen[3 * f + 1];
        const s = seen[3 * f + 2];
        const dHidden = dy * this.down.values[e * F + f];
        dDown[e * F + f] += dy * g * s * u;
        const toGate = dHidden * u * s * (1 + g * (1 - s));
        const toUp = dHidden * g * s;
        for (let d = 0; d < D; d += 1) {
          dGate[row + d] += toGate * x[at + d];
          dUp[row + d] += toUp * x[at + d];
        }
      }
    }
  }

  class MoE {
    // config: names as in the package's MoEConfig, with `balance`, the weight of the loss, and `bias_speed`; what is no
    // size may change while the model learns. tags: (N) lists of the tags of each kind of token.
    constructor(config, { tags, n_tags: R, n_content: D }, seed) {
      const { n_routed_experts: E, top_k: K, expert_width: F, n_shared_experts: S } = config;
      const random = randomOf(seed);
      Object.assign(this, { config, tags, R, off: new Set(), steps: 0 });
      this.router = new Weights(E * R, 0.02, random); // (E, R)
      this.experts = new Experts(E, F, D, random);
      this.shared = S ? new Experts(1, S * F, D, random) : null;
      this.bias = new Float64Array(E);
      this.seen = Array.from({ length: K + 1 }, () => new Float64Array(3 * F * Math.max(1, S))); // one is the shared ones'
    }

    get all() {
      const banks = this.shared ? [this.experts, this.shared] : [this.experts];
      return [this.router, ...banks.flatMap(({ gate, up, down }) => [gate, up, down])];
    }

    get nWeights() {
      return this.all.reduce((sum, { values }) => sum + values.length, 0);
    }

    // For tokens of one kind: affinities (E,), the chosen experts, best first, and their gates.
    choose(kind) {
      const { n_routed_experts: E, top_k: K, norm_topk_prob } = this.config;
      const scores = new Float64Array(E);
      for (const tag of this.tags[kind]) {
        for (let e = 0; e < E; e += 1) scores[e] += this.router.values[e * this.R + tag];
      }
      const highest = scores.reduce((a, b) => Math.max(a, b));
      const sum = scores.reduce((total, logit, e) => total + (scores[e] = Math.exp(logit - highest)), 0);
      scores.forEach((score, e) => (scores[e] = score / sum));
      const ids = [];
      while (ids.length < K) {
        let best = -1;
        for (let e = 0; e < E; e += 1) {
          const open = !this.off.has(e) && !ids.includes(e);
          if (open && (best < 0 || scores[e] + this.bias[e] > scores[best] + this.bias[best])) best = e;
        }
        if (best < 0) break; // the others are off
        ids.push(best);
      }
      const total = norm_topk_prob ? ids.reduce((all, e) => all + scores[e], 0) : 1;
      return { scores, ids, gates: ids.map((e) => scores[e] / total), total };
    }

    // The loss of a batch (without the balance loss), its gradients, the number of choices of each expert (E,), and how
    // many were dropped. batch: {kinds: (T), x: (T, D), y: (T)}.
    backward({ kinds, x, y }) {
      const { n_routed_experts: E, top_k: K, norm_topk_prob, balance } = this.config;
      const T = y.length;
      const D = x.length / T;
      this.all.forEach(({ gradients }) => gradients.fill(0));
      const choices = this.tags.map((_, kind) => this.choose(kind));
      const { kept, counts, dropped } = this.queue(kinds, choices);
      const f = Float64Array.from(counts, (n) => (n * E) / (K * T)); // how often; it has no gradient
      const dScores = this.tags.map(() => new Float64Array(E)); // summed over the tokens of a kind, which agree in scores
      const outputs = new Float64Array(K);
      let loss = 0;
      for (let t = 0; t < T; t += 1) {
        const { ids, gates, total } = choices[kinds[t]];
        const toScores = dScores[kinds[t]];
        let mixed = 0;
        for (let k = 0; k < ids.length; k += 1) {
          outputs[k] = kept[t * K + k] ? this.experts.forward(ids[k], x, t * D, this.seen[k]) : 0;
          mixed += gates[k] * outputs[k];
        }
        const error = mixed + (this.shared ? this.shared.forward(0, x, t * D, this.seen[K]) : 0) - y[t];
        loss += (error * error) / T;
        const dy = (2 * error) / T;
        if (this.shared) this.shared.backward(0, x, t * D, this.seen[K], dy);
        for (let k = 0; k < ids.length; k += 1) {
          if (kept[t * K + k]) this.experts.backward(ids[k], x, t * D, this.seen[k], dy * gates[k]);
          toScores[ids[k]] += (dy * (outputs[k] - (norm_topk_prob ? mixed : 0))) / total;
        }
        for (let e = 0; e < E; e += 1) toScores[e] += (balance * f[e]) / T; // of balance * sum of f P
      }
      choices.forEach(({ scores }, kind) => { // through the softmax
        const inner = scores.reduce((sum, score, e) => sum + score * dScores[kind][e], 0);
        for (const tag of this.tags[kind]) {
          scores.forEach((score, e) => (this.router.gradients[e * this.R + tag] += score * (dScores[kind][e] - inner)));
        }
      });
      return { loss, counts, dropped };
    }

    // An expert takes as many choices as its capacity: first choices of all tokens queue before second ones.
    queue(kinds, choices) {
      const { n_routed_experts: E, top_k: K, capacity_factor: factor } = this.config;
      const slots = factor === null ? Infinity : Math.ceil((factor * kinds.length * K) / E);
      const kept = new Uint8Array(kinds.length * K);
      const counts = new Uint32Array(E);
      let dropped = 0;
      for (let k = 0; k < K; k += 1) {
        for (let t = 0; t < kinds.length; t += 1) {
          const e = choices[kinds[t]].ids[k];
          if (e === undefined) continue;
          kept[t * K + k] = counts[e] < slots ? 1 : 0;
          dropped += 1 - kept[t * K + k];
          counts[e] += 1;
        }
      }
      return { kept, counts, dropped };
    }

    // One step of Adam, and of the bias.
    step(batch) {
      const found = this.backward(batch);
      this.steps += 1;
      this.all.forEach((weights) => weights.step(this.steps));
      const mean = found.counts.reduce((a, b) => a + b) / found.counts.length;
      found.counts.forEach((n, e) => (this.bias[e] += this.config.bias_speed * Math.sign(mean - n)));
      return found;
    }
  }

  scope.dsmoePlayground = { MoE, randomOf };
})(typeof globalThis === "undefined" ? self : globalThis);
