// What the playground's models learn: a picture of tiles, each a wave or a sum of waves.
(function (scope) {
  "use strict";

  const BATCH = 256;
  const PIXELS = 24; // of a tile's side
  const ROUNDS = 16; // batches by which drops are measured
  const { randomOf } = scope.dsmoePlayground;

  // 1.41 sin(a z + phase): a random direction and phase, and a frequency near `frequency`.
  function wave(frequency, random) {
    const turn = 2 * Math.PI * random();
    const size = frequency * (0.75 + 0.5 * random());
    const [a, b, phase] = [size * Math.cos(turn), size * Math.sin(turn), 2 * Math.PI * random()];
    return (u, v) => Math.SQRT2 * Math.sin(a * u + b * v + phase);
  }

  const KINDS = {
    // every tile its own wave
    patches: { side: 4, make: (random, n) => {
      const own = Array.from({ length: n * n }, () => wave(3, random));
      return (i, j) => [own[i * n + j]];
    } },
    // every tile its own wave, and one that all have in common
    common: { side: 4, make: (random, n) => {
      const own = Array.from({ length: n * n }, () => wave(2, random));
      const all = wave(5, random);
      return (i, j) => [own[i * n + j], all];
    }, isCommon: true },
    uncommon: { side: 4, make: (random, n) => {
      const own = Array.from({ length: n * n }, () => wave(2, random));
      return (i, j) => [own[i * n + j]];
    } },
    // a wave of the column and one of the row: 16 waves make 64 tiles
    quilt: { side: 8, make: (random, n) => {
      const waves = Array.from({ length: 2 * n }, () => wave(3, random));
      return (i, j) => [waves[i], waves[n + j]];
    } },
    // a wave of the column alone
    columns: { side: 8, make: (random, n) => {
      const waves = Array.from({ length: n }, () => wave(3, random));
      return (i) => [waves[i]];
    } },
  };

  // The squared correlation of two textures.
  function likeness(a, b) {
    const mean = (list) => list.reduce((sum, value) => sum + value, 0) / list.length;
    const [meanA, meanB] = [mean(a), mean(b)];
    let [ab, aa, bb] = [0, 0, 0];
    a.forEach((value, p) => {
      ab += (value - meanA) * (b[p] - meanB);
      aa += (value - meanA) ** 2;
      bb += (b[p] - meanB) ** 2;
    });
    return ab ** 2 / (aa * bb || 1);
  }

  class Task {
    constructor(kind, seed) {
      const { side, make, isCommon } = KINDS[kind];
      Object.assign(this, { kind, side, n_tags: 2 * side, n_content: 3, random: randomOf(2000 + seed) });
      const wavesOf = make(randomOf(1000 + seed), side);
      this.tags = Array.from({ length: side * side }, (_, tile) => [tile % side, side + Math.floor(tile / side)]);
      this.waves = this.tags.map(([column, row]) => wavesOf(column, row - side));
      const grid = Array.from({ length: PIXELS }, (_, p) => (2 * p + 1) / PIXELS - 1);
      this.pixels = Float64Array.from(grid.flatMap((v) => grid.flatMap((u) => [u, v, 1]))); // (PIXELS^2, 3)
      this.pictures = this.waves.map((_, tile) => this.draw((p) => this.target(tile, this.pixels[3 * p], this.pixels[3 * p + 1])));
      const common = isCommon && this.waves[0].at(-1);
      this.common = common ? this.draw((p) => common(this.pixels[3 * p], this.pixels[3 * p + 1])) : null;
      const chance = randomOf(3000 + seed); // of its own: measuring leaves the training as it is
      this.rounds = Array.from({ length: ROUNDS }, () => Uint8Array.from({ length: BATCH }, () => Math.floor(chance() * this.tags.length)));
    }

    target(tile, u, v) {
      const waves = this.waves[tile];
      let sum = 0;
      for (const one of waves) sum += one(u, v);
      return sum / Math.sqrt(waves.length);
    }

    draw(of) {
      return Float64Array.from({ length: PIXELS ** 2 }, (_, p) => of(p));
    }

    // Fresh tokens: a random place in a random tile. Their kind is the tile, their content the place and a 1.
    batch() {
      const { random } = this;
      const found = { kinds: new Uint8Array(BATCH), x: new Float64Array(3 * BATCH), y: new Float64Array(BATCH) };
      for (let t = 0; t < BATCH; t += 1) {
        const tile = Math.floor(random() * this.tags.length);
        const [u, v] = [2 * random() - 1, 2 * random() - 1];
        found.kinds[t] = tile;
        found.x.set([u, v, 1], 3 * t);
        found.y[t] = this.target(tile, u, v);
      }
      return found;
    }

    // What the model paints on each tile, and each of its experts on any; `error`: share of the picture not explained.
    paint(model) {
      const seen = new Float64Array(3 * model.config.expert_width * Math.max(1, model.config.n_shared_experts));
      const textures = Array.from({ length: model.config.n_routed_experts }, (_, e) =>
        this.draw((p) => model.experts.forward(e, this.pixels, 3 * p, seen)));
      const shared = model.shared && this.draw((p) => model.shared.forward(0, this.pixels, 3 * p, seen));
      let [wrong, all] = [0, 0];
      const tiles = this.pictures.map((picture, tile) => {
        const { ids, gates } = model.choose(tile);
        const painted = shared ? shared.slice() : new Float64Array(PIXELS ** 2);
        ids.forEach((e, k) => {
          for (let p = 0; p < painted.length; p += 1) painted[p] += gates[k] * textures[e][p];
        });
        for (let p = 0; p < painted.length; p += 1) {
          wrong += (painted[p] - picture[p]) ** 2;
          all += picture[p] ** 2;
        }
        return { ids, gates, painted };
      });
      return { tiles, textures, shared, error: wrong / all };
    }

    // Under the capacity limit: the share of all choices that is dropped, and of each tile's.
    drops(model) {
      const K = model.config.top_k;
      const [lost, all] = [this.tags.map(() => 0), this.tags.map(() => 0)];
      if (model.config.capacity_factor !== null) {
        const choices = this.tags.map((_, kind) => model.choose(kind));
        for (const kinds of this.rounds) {
          const { kept } = model.queue(kinds, choices);
          kept.forEach((isKept, n) => {
            lost[kinds[Math.floor(n / K)]] += 1 - isKept;
            all[kinds[Math.floor(n / K)]] += 1;
          });
        }
      }
      const total = (list) => list.reduce((a, b) => a + b, 0);
      return { dropped: total(lost) / (total(all) || 1), droppedOf: lost.map((n, tile) => n / (all[tile] || 1)) };
    }

    // How much of what the experts paint is the common wave: its squared correlation with their outputs, 0 to 1. The
    // routed experts are weighted by their loads. null if the tiles have no wave in common.
    commonIn({ textures, shared }, loads) {
      if (!this.common) return null;
      const work = loads.reduce((a, b) => a + b);
      const routed = textures.reduce((sum, texture, e) => sum + (loads[e] / work) * likeness(texture, this.common), 0);
      return { routed, shared: shared && likeness(shared, this.common) };
    }
  }

  Object.assign(scope.dsmoePlayground, { Task, PIXELS, KINDS: Object.keys(KINDS) });
})(typeof globalThis === "undefined" ? self : globalThis);
