"""Evaluation: held-out loss, the use of experts, recall, and the mode of the model."""

import math
from dataclasses import replace

import pytest
import torch
from training_samples import CONFIG, SMALL, make, small_world

from dsmoe_lite.data.batches import Batch, heldout_batches
from dsmoe_lite.data.tokenizer import END_ID
from dsmoe_lite.data.world import Question
from dsmoe_lite.evaluate import HeldOut, bits_per_byte, domain_use, heldout_loss, recall
from dsmoe_lite.generate import generate
from dsmoe_lite.model import Transformer
from dsmoe_lite.presets import preset
from dsmoe_lite.training.train import train


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    torch.set_num_threads(1)


def test_heldout_loss_is_the_mean_over_tokens_and_domains() -> None:
    model, _ = make()
    world, tokenizer = small_world()
    batches = heldout_batches(world, tokenizer, 4, 32, 8)
    result = heldout_loss(model, batches, world.domains)
    total = {name: [0.0, 0] for name in world.domains}
    model.eval()
    with torch.no_grad():
        for batch in batches:
            log_p = model(batch.tokens[:, :-1]).logits.log_softmax(dim=-1)
            for b in range(4):
                for s in range(32):
                    entry = total[world.domains[int(batch.domains[b, s + 1])]]
                    entry[0] -= float(log_p[b, s, batch.tokens[b, s + 1]])
                    entry[1] += 1
    assert result.loss == pytest.approx(sum(v for v, _ in total.values()) / (8 * 4 * 32), rel=1e-5)
    assert sum(count > 0 for _, count in total.values()) > 1, "the batches should have several domains"
    for name, (value, count) in total.items():
        assert (name in result.by_domain) == (count > 0)
        if count:
            assert result.by_domain[name] == pytest.approx(value / count, rel=1e-5)


def test_heldout_use_of_experts_is_counted_over_all_batches() -> None:
    moe = replace(SMALL.moe, second_choice="all", capacity_factor=0.1, eval_capacity_factor=0.9)
    model, _ = make(moe=moe)
    world, tokenizer = small_world()
    for layer in model.moe_layers:
        torch.nn.init.normal_(layer.router.weight, std=0.3)
    batches = heldout_batches(world, tokenizer, 4, 32, 5)
    uses = heldout_loss(model, batches, world.domains).experts
    assert len(uses) == 2
    K, E, T = 2, 16, 4 * 32
    counts, kept, over = [[0] * E for _ in uses], [0] * 2, [0] * 2
    with torch.no_grad():
        for batch in batches:
            for layer, routing in enumerate(model.eval()(batch.tokens[:, :-1]).routings):
                batch_counts = [0] * E
                for e in routing.topk_ids.flatten().tolist():
                    batch_counts[e] += 1
                counts[layer] = [a + b for a, b in zip(counts[layer], batch_counts, strict=True)]
                kept[layer] += sum(min(n, math.ceil(0.9 * T * K / E)) for n in batch_counts)
                over[layer] += sum(max(0, n - math.ceil(1.25 * T * K / E)) for n in batch_counts)
    n_choices = 5 * T * K
    for use, count, n_kept, n_over in zip(uses, counts, kept, over, strict=True):
        assert use.load == pytest.approx([n * E / n_choices for n in count])
        assert use.max_vio == pytest.approx(max(count) * E / n_choices - 1)
        assert use.drop_rate == pytest.approx(1 - n_kept / n_choices)
        assert use.overflow == pytest.approx(n_over / n_choices)
        assert 0 < use.overflow < use.drop_rate < 1
    dense = replace(preset("course-dense"), d_model=32, vocab_size=tokenizer.get_vocab_size())
    assert heldout_loss(Transformer(dense), batches, world.domains).experts == []


def test_bits_per_byte_are_of_the_bytes_of_the_text() -> None:
    """Two rows of one document each, with letters of one, two and three bytes; the end of a document has none."""
    _, tokenizer = small_world()
    texts, domains = ("a ceiling", "né à 东京"), ("plain", "accents", "absent")
    rows = [[END_ID, *tokenizer.encode(text).ids, END_ID] for text in texts]
    n = [len(row) - 1 for row in rows]  # targets
    width = max(map(len, rows))
    nats, total = {"plain": 3.5, "accents": 1.25}, sum(n)
    batches = [
        Batch(torch.tensor([row]), torch.full((1, len(row)), label, dtype=torch.uint8))
        for label, row in enumerate(rows)
    ]
    assert width > min(n)  # the rows differ, so a mean over rows would be another number
    mean = (3.5 * n[0] + 1.25 * n[1]) / total
    bits = bits_per_byte(HeldOut(mean, nats, []), batches, tokenizer, domains)
    n_bytes = [len(text.encode()) for text in texts]
    assert n_bytes == [9, 13]
    assert bits == pytest.approx(
        {
            "plain": 3.5 * n[0] / 9 / math.log(2),
            "accents": 1.25 * n[1] / 13 / math.log(2),
            "all": (3.5 * n[0] + 1.25 * n[1]) / 22 / math.log(2),
        }
    )


def test_domain_use_counts_the_choices_of_each_domain() -> None:
    model, _ = make()
    world, tokenizer = small_world()
    for layer in model.moe_layers:
        torch.nn.init.normal_(layer.router.weight, std=0.3)
    batches = heldout_batches(world, tokenizer, 4, 32, 8)
    n_domains, E = len(world.domains), 16
    uses = domain_use(model, batches, n_domains)
    pairs: list[list[tuple[int, list[int]]]] = [[], []]
    with torch.no_grad():
        for batch in batches:
            for layer, routing in enumerate(model.eval()(batch.tokens[:, :-1]).routings):
                labels = batch.domains[:, :-1].flatten().tolist()
                pairs[layer] += list(zip(labels, routing.topk_ids.tolist(), strict=True))
    for use, found in zip(uses, pairs, strict=True):
        counts = [[sum(ids.count(e) for label, ids in found if label == d) for e in range(E)] for d in range(n_domains)]
        assert use.counts == counts
        assert use.uncertainty == pytest.approx(theils_u([(label, ids[0]) for label, ids in found]), abs=1e-6)
        assert 0 < use.null < use.uncertainty < 1

    one = [Batch(batch.tokens, torch.zeros_like(batch.domains)) for batch in batches]
    assert [(use.uncertainty, use.null) for use in domain_use(model, one, 1)] == [(0, 0), (0, 0)]


def theils_u(pairs: list[tuple[int, int]]) -> float:
    """How much of the second of a pair the first determines: its mutual information over the second's entropy."""

    def entropy(values: list[object]) -> float:
        return -sum(values.count(v) / len(values) * math.log(values.count(v) / len(values)) for v in set(values))

    first, second = ([pair[i] for pair in pairs] for i in (0, 1))
    return (entropy([*first]) + entropy([*second]) - entropy([*pairs])) / entropy([*second])


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_is_in_evaluation_mode_and_leaves_the_mode_unchanged(training: bool) -> None:
    model, _ = make()
    world, tokenizer = small_world()
    questions = [q for group in ("head", "tail") for q in world.questions(group)]
    assert len(questions) > 10
    model.train(training)
    calls = []
    model.head.register_forward_hook(lambda module, inputs, output: calls.append((model.training, len(output))))
    heldout_loss(model, heldout_batches(world, tokenizer, 4, 32, 1), world.domains)
    assert calls == [(False, 4)]
    calls.clear()
    recall(model, tokenizer, questions * 40)  # more than one batch of a length
    assert {mode for mode, _ in calls} == {False}
    assert sum(rows for _, rows in calls) == 40 * len(questions)
    assert model.training is training


def test_recall_is_greedy_decoding_word_for_word() -> None:
    model, batches = make()
    dropless = replace(model.config.moe, eval_capacity_factor=None)
    for block in model.blocks:
        block.ffn.router.config = dropless  # without drops, an answer does not depend on the batch
    train(model, batches, replace(CONFIG, steps=150))
    world, tokenizer = small_world()
    texts = [document.text.split(" ") for document, _ in zip(world.documents("heldout"), range(12), strict=False)]
    questions = [
        Question(" ".join(words[:i]), " " + words[i], ("odd", "even")[i % 2 == 0], "")
        for words in texts
        for i in range(2, min(9, len(words)))
    ]  # the next word of a sentence: a short training learns function words, but no names
    hits: dict[str, list[bool]] = {"odd": [], "even": []}
    for question in questions:
        prompt, answer = (tokenizer.encode(text).ids for text in (question.prompt, question.answer))
        (generated,) = generate(model, [prompt], len(answer))
        hits[question.group].append(generated == answer)
    expected = {group: sum(right) / len(right) for group, right in hits.items()}
    assert 0 < expected["odd"] < 1, "some answers should be right and some wrong"
    assert recall(model, tokenizer, questions) == expected
