// Two models that learn one picture from the same tokens, and what is measured on the way. Models and measurements depend
// on the seed and the step alone, never on the speed of the machine: the curve of a seed is the same in every run.
(function (scope) {
  "use strict";

  const { MoE, Task, configOf } = scope.dsmoePlayground;
  const EVERY = 25; // steps between two points of the curve
  const LAST = 8; // points that count as the recent past, 200 steps

  // Whether the same experts, in any order, paint the tile.
  const sameExperts = (a, b) => a.length === b.length && a.every((e) => b.includes(e));

  class Run {
    constructor(kind, settings, seed, steps) {
      Object.assign(this, { kind, seed, until: steps, task: new Task(kind, seed), marks: [] });
      this.models = settings.map((own) => new MoE(configOf(own), this.task, seed));
      this.points = this.models.map(() => []); // {step, error, used: experts, moved: tiles with other experts}
      this.views = this.models.map(() => null); // what is seen of each model, all from one moment
      this.models.forEach((_, i) => this.record(i));
    }

    get steps() {
      return this.models[0].steps;
    }

    get isDone() {
      return this.steps >= this.until;
    }

    // One step of both; return whether it added points to the curve.
    step() {
      const batch = this.task.batch();
      this.models.forEach((model) => model.step(batch));
      if (this.steps % EVERY) return false;
      this.models.forEach((_, i) => this.record(i));
      return true;
    }

    record(i) {
      const view = this.look(i);
      const { last } = this.points[i];
      const moved = last ? view.tiles.filter(({ ids }, n) => !sameExperts(ids, last[n])).length : 0;
      this.points[i].push({ step: view.step, error: view.error, used: view.used, moved });
      this.points[i].last = view.tiles.map(({ ids }) => ids);
    }

    // See a model as it is now: picture, load and drops from the same moment. loads: of each expert, in equal shares; used:
    // the experts that paint; awake: how many did in the last 200 steps.
    look(i) {
      const model = this.models[i];
      const painted = this.task.paint(model);
      const loads = new Float64Array(model.config.n_routed_experts);
      const all = painted.tiles.reduce((sum, { ids }) => sum + ids.length, 0);
      painted.tiles.forEach(({ ids }) => ids.forEach((e) => (loads[e] += loads.length / all)));
      const used = Array.from(loads.keys()).filter((e) => loads[e] > 0);
      const awake = new Set([...used, ...this.points[i].slice(-LAST).flatMap((point) => point.used)]).size;
      this.views[i] = { ...painted, loads, used, awake, step: model.steps, ...this.task.drops(model), common: this.task.commonIn(painted, loads) };
      return this.views[i];
    }

    // Change settings from now on, for `more` steps.
    change(changes, more, words) {
      this.models.forEach((model, i) => Object.assign(model.config, changes[i]));
      if (words) this.marks.push({ step: this.steps, words });
      this.until = this.steps + more;
    }

    // Remember this moment; the function returned goes back to it.
    keep() {
      const { until } = this;
      const models = this.models.map((model) => ({
        weights: model.all.flatMap(({ values, gradients, first, second }) => [values, gradients, first, second]).map((list) => list.slice()),
        bias: model.bias.slice(),
        config: { ...model.config },
        steps: model.steps,
      }));
      const points = this.points.map((list) => Object.assign([...list], { last: list.last }));
      return () => {
        this.task = new Task(this.kind, this.seed);
        for (let step = 0; step < models[0].steps; step += 1) this.task.batch(); // the tokens go on from there
        this.models.forEach((model, i) => {
          const { weights, bias, config, steps } = models[i];
          model.all.flatMap(({ values, gradients, first, second }) => [values, gradients, first, second]).forEach((list, n) => list.set(weights[n]));
          model.bias.set(bias);
          model.off.clear();
          Object.assign(model, { config: { ...config }, steps });
        });
        this.points = points.map((list) => Object.assign([...list], { last: list.last }));
        Object.assign(this, { until, marks: [] });
        this.models.forEach((_, i) => this.look(i));
      };
    }
  }

  // Train two models on one picture, in pieces of 50 steps: the steps done, and in the end both errors.
  // changes: {model, name, value, step}, made after that step.
  function* trainPair(kind, settings, seed, steps, changes = []) {
    const task = new Task(kind, seed);
    const pair = settings.map((own) => new MoE(configOf(own), task, seed));
    for (let step = 1; step <= steps; step += 1) {
      changes.filter((one) => one.step === step - 1).forEach(({ model, name, value }) => (pair[model].config[name] = value));
      const batch = task.batch();
      pair.forEach((model) => model.step(batch));
      if (step % 50 === 0) yield step;
    }
    yield pair.map((model) => task.paint(model).error);
  }

  Object.assign(scope.dsmoePlayground, { Run, trainPair });
})(typeof globalThis === "undefined" ? self : globalThis);
