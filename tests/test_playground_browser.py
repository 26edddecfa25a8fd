"""The playground in headless Chromium: its layer learns as the package's does, and each lesson shows what it says."""

import json
import math
import shutil
from statistics import median

import pytest
import torch

from dsmoe_lite import MoEConfig
from dsmoe_lite.book.playground import PAIRS, SOURCES, TRAIN, write_playground
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.layers import balance
from dsmoe_lite.layers.experts import Experts
from dsmoe_lite.layers.ffn import SwiGLU
from dsmoe_lite.layers.router import Router
from dsmoe_lite.viz.playground import LESSONS, SEEDS, Playground, evidence, script

D = 3  # content: two coordinates and a 1
SETTINGS = {
    "top-1, raw gates": {},
    "top-1, balance loss": {"balance": 1.0},
    "top-1, capacity and balance loss": {"capacity_factor": 1.25, "balance": 0.3},
    "top-4 with shared": {"n_routed_experts": 12, "top_k": 4, "expert_width": 4, "n_shared_experts": 2, "balance": 0.1},
    "top-2, bias, capacity": {"top_k": 2, "bias_speed": 0.05, "capacity_factor": 1.0, "n_shared_experts": 1},
}
MADE = """([settings, nSteps]) => {
  const { MoE, Task, configOf } = dsmoePlayground;
  const task = new Task("quilt", 3);
  const config = configOf(settings);
  const model = new MoE(config, task, 3);
  const copy = (what) => Object.fromEntries(Object.entries({
    router: model.router, gate: model.experts.gate, up: model.experts.up, down: model.experts.down,
    ...(model.shared ? { s_gate: model.shared.gate, s_up: model.shared.up, s_down: model.shared.down } : {}),
  }).map(([name, one]) => [name, Array.from(one[what])]));
  const before = copy("values");
  const batches = Array.from({ length: nSteps }, () => task.batch());
  const { loss, counts, dropped } = model.backward(batches[0]);
  const gradients = copy("gradients");
  batches.forEach((batch) => model.step(batch));
  return { config, tags: task.tags, R: task.n_tags, before, loss, counts: Array.from(counts), dropped, gradients,
           after: copy("values"), bias: Array.from(model.bias),
           batches: batches.map(({ kinds, x, y }) => [Array.from(kinds), Array.from(x), Array.from(y)]) };
}"""


@pytest.fixture(scope="module")
def page(browser):
    page = browser.new_page()
    page.add_script_tag(content=script())
    yield page
    page.close()


class Twin(torch.nn.Module):
    """The same model of the package's parts: the router reads tags, the experts content, the output is channel 0."""

    def __init__(self, made):
        super().__init__()
        config = made["config"]
        self.weight = config.pop("balance")
        self.speed = config.pop("bias_speed")
        moe = MoEConfig(**config, expert_bias=self.speed > 0)
        E, F, S = moe.n_routed_experts, moe.expert_width, moe.n_shared_experts
        self.router = Router(made["R"], moe, 1)
        self.experts = Experts(E, D, F)
        self.shared = SwiGLU(D, S * F) if S else None
        self.double()
        before = {name: torch.tensor(value, dtype=torch.float64) for name, value in made["before"].items()}
        with torch.no_grad():
            self.router.weight.copy_(before["router"].view(E, -1))
            self.experts.gate.copy_(before["gate"].view(E, F, D))
            self.experts.up.copy_(before["up"].view(E, F, D))
            self.experts.down.zero_()[:, 0] = before["down"].view(E, F)
            if self.shared:
                self.shared.gate.weight.copy_(before["s_gate"].view(S * F, D))
                self.shared.up.weight.copy_(before["s_up"].view(S * F, D))
                self.shared.down.weight.zero_()[0] = before["s_down"]

    def forward(self, tags, x):
        routing = self.router(tags, (1, len(x)))
        dispatched = self.experts.dispatch(x, routing)
        y = self.experts.combine(self.experts(dispatched), dispatched)
        return (y if self.shared is None else y + self.shared(x))[:, 0], routing

    def parts(self, of=lambda weight: weight.detach()):
        """Each weight, or what `of` makes of it, by the page's name."""
        found = {"router": of(self.router.weight), "gate": of(self.experts.gate), "up": of(self.experts.up)}
        found["down"] = of(self.experts.down)[:, 0]
        if self.shared:
            found |= {"s_gate": of(self.shared.gate.weight), "s_up": of(self.shared.up.weight)}
            found["s_down"] = of(self.shared.down.weight)[0]
        return found


def losses(twin, made, batch):
    kinds, x, y = batch
    tags = torch.zeros(len(kinds), made["R"], dtype=torch.float64)
    for t, kind in enumerate(kinds):
        tags[t, made["tags"][kind]] = 1
    predicted, routing = twin(tags, torch.tensor(x, dtype=torch.float64).view(-1, D))
    loss = (predicted - torch.tensor(y, dtype=torch.float64)).square().mean()
    return loss, loss + twin.weight * balance.expert_loss(routing), routing


def assert_same(mine, theirs):
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name].flatten(), torch.tensor(value, dtype=torch.float64), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_training_step_equals_the_packages(page, name):
    made = page.evaluate(MADE, [SETTINGS[name], 12])
    twin = Twin(made).train()
    loss, objective, routing = losses(twin, made, made["batches"][0])
    objective.backward()
    assert loss.item() == pytest.approx(made["loss"], rel=1e-9)
    assert routing.counts.tolist() == made["counts"]
    assert (~routing.kept).sum().item() == made["dropped"]
    assert ("capacity" in name) == (made["dropped"] > 0)
    assert_same(twin.parts(lambda weight: weight.grad), made["gradients"])
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.01, betas=(0.9, 0.99), eps=1e-8)
    for batch in made["batches"]:
        optimizer.zero_grad()
        _, objective, routing = losses(twin, made, batch)
        objective.backward()
        optimizer.step()
        if twin.speed:
            balance.update_bias(twin.router.expert_bias, routing.counts, twin.speed)
    assert_same(twin.parts(), made["after"])
    if twin.speed:
        assert_same({"bias": twin.router.expert_bias.double()}, {"bias": made["bias"]})


def ratios(found):
    return [a / b for a, b in zip(found["a"], found["b"], strict=True)]


def test_the_record_shows_what_the_lessons_say():
    """A's error over B's. The seeds are 1 to 10, chosen before any was run; all are in the record."""
    recorded = evidence()
    assert list(recorded) == list(LESSONS)
    for found in recorded.values():
        assert len(found["a"]) == len(found["b"]) == 10
    for lesson, least in {"collapse": 2, "capacity": 4, "finer": 10}.items():
        assert all(ratio > least for ratio in ratios(recorded[lesson])), lesson
    assert all(ratio < 1 / 2 for ratio in ratios(recorded["strong"]))
    assert 0.5 < median(ratios(recorded["bias"])) < 2  # no worse
    assert max(recorded["finer"]["control"]["a"]) < min(recorded["finer"]["a"]) / 2  # there coarse experts do not fail
    assert median(ratios(recorded["shared"]["control"])) < 1.25 < median(ratios(recorded["shared"]))


def test_the_record_can_be_trained_again(page):
    """One seed of each lesson. Browsers differ in the last digits of sin and exp, which training makes larger."""
    recorded = evidence()
    pairs = page.evaluate(PAIRS)
    assert len(pairs) == len(LESSONS) + 2
    for number, (name, task) in enumerate(pairs):
        found = recorded[name] if recorded[name]["task"] == task else recorded[name]["control"]
        seed = 1 + number
        trained = page.evaluate(TRAIN, [name, task, seed])
        assert trained["steps"] == found["steps"]
        for model, error in zip("ab", trained["errors"], strict=True):
            assert abs(math.log(error / found[model][seed - 1])) < math.log(1.5), (name, model)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pages = tmp_path_factory.mktemp("playground")
    (pages / "_static").mkdir()
    shutil.copy(SOURCES.parent / "front" / "front.css", pages / "_static")
    write_playground(pages, "A book", {f"{n:02}": f"{n:02}.html" for n in range(13)})
    return pages / "playground.html"


@pytest.fixture
def opened(browser, site):
    """Open the page at an address; in the end no request has left the machine and the console is quiet."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    outside, errors = [], []

    def only_files(route):
        if route.request.url.startswith(("file:", "blob:", "data:")):
            route.continue_()
        else:
            outside.append(route.request.url)
            route.abort()

    def open_(fragment="", size=None, **media):
        page = context.new_page()
        if size:
            page.set_viewport_size(size)
        page.emulate_media(**media)
        page.route("**/*", only_files)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(f"{site.as_uri()}{fragment}")
        page.wait_for_selector(".pg-experts button")
        return page

    open_.errors = errors
    yield open_
    context.close()
    assert outside == []
    assert errors == []


DONE = ".pg-result p"


def test_a_reader_guesses_trains_a_collapse_and_mends_it(opened):
    page = opened("#lesson=collapse&seed=2")
    page.get_by_role("button", name="A paints better").click()
    page.wait_for_selector(DONE, timeout=60_000)
    text = page.inner_text(".pg-result")
    assert "B paints better." in text
    assert "You said: A paints better." in text
    assert "Recorded with 10 seeds" in text
    before = float(page.inner_text(".pg-a .pg-error").rstrip("%"))
    page.get_by_role("button", name="Give A the loss now").click()
    page.wait_for_function("() => !document.querySelector('.pg-result p')")
    page.wait_for_selector(DONE, timeout=60_000)
    assert float(page.inner_text(".pg-a .pg-error").rstrip("%")) < before / 2
    assert "balance loss 1" in page.inner_text(".pg-a h3")


def test_pause_step_reset_and_experts_switched_off(opened):
    page = opened()
    counter = page.locator(".pg-row .pg-muted")
    page.get_by_role("button", name="Step", exact=True).click()
    assert counter.inner_text().startswith("1 of")
    page.get_by_role("button", name="Go on").click()
    page.wait_for_function("() => parseInt(document.querySelector('.pg-row .pg-muted').textContent) > 40")
    page.get_by_role("button", name="Pause").click()
    error = page.inner_text(".pg-b .pg-error")
    used = page.locator(".pg-b .pg-expert:not(.pg-idle) small").first.inner_text()
    square = page.locator(".pg-b .pg-expert").nth(int(used.removeprefix("e")))
    square.click()
    assert square.get_attribute("aria-pressed") == "true"
    assert page.inner_text(".pg-b .pg-error") != error
    square.click()
    assert page.inner_text(".pg-b .pg-error") == error
    page.get_by_role("button", name="Reset").click()
    assert counter.inner_text().startswith("0 of")


def test_settings_can_be_changed_and_travel_in_the_address(opened):
    page = opened("#lesson=finer&seed=7")
    assert page.locator("input[type=number]").input_value() == "7"
    page.get_by_text("Change the models").click()
    fields = page.locator("fieldset").first
    fields.get_by_role("combobox", name="experts", exact=True).select_option("4")
    fields.get_by_role("combobox", name="per token (top-k)").select_option("8")
    assert "cannot go to 8 of 4 experts" in page.inner_text(".pg-say")
    page.locator("fieldset").first.get_by_role("combobox", name="per token (top-k)").select_option("2")
    fragment = page.evaluate("location.hash")
    again = opened(fragment)
    assert again.inner_text(".pg-a h3") == page.inner_text(".pg-a h3") == "A: 2 of 4 experts, balance loss 0.03"
    for broken in ("#lesson=nothing&seed=x", "#lesson=own&a=top_k:8,n_routed_experts:4", "#lesson=own&task=__proto__"):
        assert opened(broken).locator(".pg-experts button").count() >= 8


def test_ten_seeds_are_trained_and_drawn(opened):
    page = opened("#lesson=own&a=n_routed_experts:4,expert_width:2&b=n_routed_experts:4,expert_width:2,balance:1")
    page.get_by_role("button", name="Try ten seeds").click()
    page.wait_for_selector(".pg-dots", timeout=120_000)
    assert "Of 10 seeds" in page.inner_text(".pg-result")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_can_be_read_by_all(opened, screenshots, width):
    from axe_playwright_python.sync_playwright import Axe

    for scheme in ("light", "dark"):
        page = opened("#lesson=shared", {"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce")
        page.get_by_role("button", name="B paints better").click()
        page.wait_for_selector(DONE, timeout=120_000)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert opened.errors == []
        found = Axe().run(page).response["violations"]
        page.wait_for_timeout(300)
        opened.errors.clear()  # axe asks for style sheets, which file:// refuses
        assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == []
        page.screenshot(path=screenshots / f"playground_{width}_{scheme}.png", full_page=True)


def test_sixteen_experts_learn_thirty_steps_a_frame(page):
    """A frame (30 steps, one drawing) against a loop of multiplications in the same page: medians of nine.

    On two cores of an EPYC server the loop took 12 to 17 ms and a frame 10 to 17; at 1.9 times the slowest loop a frame
    would take 33 ms, which is 30 frames a second.
    """
    frame, loop = page.evaluate(
        """() => {
          const { MoE, Task, configOf } = dsmoePlayground, frames = [], loops = [];
          const task = new Task("patches", 1), model = new MoE(configOf({ balance: 1 }), task, 1);
          const numbers = Float64Array.from({ length: 4096 }, (_, i) => 1 + i / 4096);
          let kept = 0;
          for (let n = 0; n < 19; n += 1) {
            let start = performance.now();
            for (let step = 0; step < 30; step += 1) model.step(task.batch());
            task.paint(model);
            frames.push(performance.now() - start);
            start = performance.now();
            for (let round = 0; round < 3000; round += 1) {
              for (let i = 0; i < 4096; i += 1) kept += numbers[i] * numbers[4095 - i];
            }
            loops.push(performance.now() - start);
          }
          const middle = (list) => list.slice(10).sort((a, b) => a - b)[4]; // once the browser has compiled both
          return [middle(frames), middle(loops), kept];
        }"""
    )[:2]
    print(f"frame {frame:.1f} ms, loop {loop:.1f} ms, ratio {frame / loop:.2f}")
    assert frame < 1.9 * loop


def test_the_widget_is_small_and_refuses_an_unknown_lesson():
    widget = Playground("finer")
    assert widget.lesson == "finer"
    assert len(json.dumps(widget.get_state(), default=str)) < 80_000
    with pytest.raises(InputError, match="lesson = 'none': must be one of collapse"):
        Playground("none")
    assert SEEDS.stat().st_size < 20_000
