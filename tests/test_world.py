"""The small world: the same everywhere, consistent, and without the questions that evaluation asks."""

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

import pytest

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.data import world as world_module
from dsmoe_lite.data.world import DOMAINS, GROUPS, QUESTION, STATEMENTS, World, WorldConfig

SOURCE = Path(__file__).resolve().parents[1] / "src"
PINNED = {
    0: "1b5ed410154f650ea40028e76974b139c6c8014de0aacca9c1274aeb22f7f5d6",
    7: "acfd078cb19d71893834ffe75a87ded4a5e321f30a57784aceb3421bd7e02b61",
}
HASH = """
import hashlib, itertools, sys
from dsmoe_lite.data.world import World, WorldConfig
for seed in (0, 7):
    digest = hashlib.sha256()
    for document in itertools.islice(World(WorldConfig(seed=seed)).documents("train"), 2000):
        digest.update(f"{document.domain}\\t{document.text}\\n".encode())
    print(seed, digest.hexdigest())
outside = {name.split(".")[0] for name in sys.modules} - set(sys.stdlib_module_names) - {"dsmoe_lite", "__main__"}
print(*outside, file=sys.stderr, end="")
"""

# The English wordings a second time, as a reader understands them.
NAME = r"(?P<name>[A-Z]\w+ [A-Z]\w+)"
STATED = re.compile(
    "|".join(
        pattern.replace("NAME", f"(?P<name{i}>[A-Z]\\w+ [A-Z]\\w+)").replace("FACTS", f"(?P<facts{i}>[a-z, ]+)")
        for i, pattern in enumerate(
            (r"Here NAME has FACTS\. ?", r"For NAME we know FACTS\. ?", r"Look at NAME: FACTS\. ?")
        )
    )
    + r"|The (?P<relation3>\w+) of (?P<name3>\w+ \w+) is (?P<value3>\w+)\. ?"
    + r"|As (?P<relation4>\w+) (?P<name4>\w+ \w+) has (?P<value4>\w+)\. ?"
    + r"|To (?P<name5>\w+ \w+) belongs the (?P<relation5>\w+) (?P<value5>\w+)\. ?"
    + r"|Which (?P<relation6>\w+) does (?P<name6>\w+ \w+) have\? (?P<value6>\w+)\. ?"
)
ASKING = "6"


def read(text):
    """Every (name, relation, value, asked) in a document; fails for a sentence of another form."""
    facts, at = [], 0
    while at < len(text):
        match = STATED.match(text, at)
        assert match, f"not understood: {text[at:]!r}"
        at = match.end()
        parts = {key: value for key, value in match.groupdict().items() if value}
        kind = next(key for key in parts if key.startswith("name"))[-1]
        listed = parts.get(f"facts{kind}") or f"{parts[f'relation{kind}']} {parts[f'value{kind}']}"
        for fact in listed.split(", "):
            relation, value = fact.split(" ")
            facts.append((parts[f"name{kind}"], relation, value, kind == ASKING))
    return facts


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def texts(world):
    """All training texts by domain."""
    by_domain = defaultdict(list)
    for document in world.documents("train"):
        by_domain[document.domain].append(document.text)
    return by_domain


@pytest.fixture(scope="module")
def facts(texts):
    return [fact for text in texts["facts"] for fact in read(text)]


def back_to_english(world):
    """The dictionary of the second language, from the word lists of the two languages."""
    pairs = []
    for native, foreign in ((world.language, world.foreign),):
        pairs += zip([*foreign.first, *foreign.last], [*native.first, *native.last], strict=True)
        pairs += zip(foreign.relations, native.relations, strict=True)
        for foreign_values, values in zip(foreign.values, native.values, strict=True):
            pairs += zip(foreign_values, values, strict=True)
        wordings = zip([*foreign.statements, foreign.question], [*STATEMENTS, QUESTION], strict=True)
        for foreign_wording, wording in wordings:
            words = zip(re.findall(r"[\w{}]+", foreign_wording), re.findall(r"[\w{}]+", wording), strict=True)
            pairs += [pair for pair in words if "{" not in pair[0]]
    dictionary = dict(pairs)
    assert len(set(dictionary.values())) == len(dictionary)
    return dictionary


# The same everywhere


def interpreters():
    names = [sys.executable, "python3", "python3.11", "python3.12", "python3.13"]
    by_version = {}
    for name in names:
        path = shutil.which(name)
        if path:
            ask = [path, "-S", "-c", "import sys; print(sys.version_info[:2], sys.executable)"]
            answer = subprocess.run(ask, capture_output=True, text=True, encoding="utf-8", check=False)
            if answer.returncode == 0 and answer.stdout.startswith(("(3, 11)", "(3, 12)", "(3, 13)")):
                by_version.setdefault(answer.stdout[:7], path)
    return sorted(by_version.values())


@pytest.mark.parametrize("python", interpreters())
@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_same_bytes_on_every_interpreter(python, hash_seed):
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(
        [python, "-S", "-c", HASH], env=environment, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "world must need the standard library alone"
    assert dict(line.split() for line in done.stdout.splitlines()) == {str(k): v for k, v in PINNED.items()}


def first_hash(world, n=200):
    digest = hashlib.sha256()
    for document in islice(world.documents("train"), n):
        digest.update(f"{document.domain}\t{document.text}\n".encode())
    return digest.hexdigest()


@pytest.mark.parametrize(
    ("rule", "changed"),
    [
        ("STATEMENTS", ("The {relation} of {name} was {value}.", *STATEMENTS[1:])),
        ("STATEMENTS", STATEMENTS[::-1]),
        ("QUESTION", "What {relation} does {name} have? {value}."),
        ("FACT", "{relation}: {value}"),
        ("MOST_FACTS", 3),
        ("BRACKETS", ("()", "[]", "{}")),
        ("RELATIONS", ("work", *world_module.RELATIONS[1:])),
        ("NATIVE", "bdlmnrst"),
        ("FOREIGN", "fhjwy"),
    ],
)
def test_changing_one_rule_changes_the_hash(monkeypatch, rule, changed):
    before, fingerprint = first_hash(World()), World().fingerprint()["sha256"]
    monkeypatch.setattr(world_module, rule, changed)
    assert first_hash(World()) != before
    assert World().fingerprint()["sha256"] != fingerprint


def test_fingerprint_follows_every_field_of_the_config():
    base = World().fingerprint()
    assert base == World().fingerprint()
    assert base["name"] == "world"
    small = {"seed": 1, "n_control": 3, "n_documents": 41_000, "n_head": 3, "question_share": 0.2, "zipf": 1.0}
    others = {World(WorldConfig(**{field: value})).fingerprint()["sha256"] for field, value in small.items()}
    assert len(others | {base["sha256"]}) == len(small) + 1


# Consistent


def test_every_fact_has_one_value(facts):
    values = defaultdict(set)
    for name, relation, value, _ in facts:
        values[name, relation].add(value)
    assert len(values) == 512 * 8  # every entity has every relation somewhere
    assert {len(distinct) for distinct in values.values()} == {1}


def test_every_question_is_answered_by_a_statement_and_never_asked(world, facts):
    stated = {(name, relation): value for name, relation, value, asked in facts if not asked}
    asked = {(name, relation) for name, relation, _, was_asked in facts if was_asked}
    for group in ("head", "tail"):
        questions = world.questions(group)
        assert 128 * 8 * 0.2 * 0.8 < len(questions) < 128 * 8 * 0.2 * 1.2
        for question in questions:
            relation, name = re.fullmatch(r"Which (\w+) does (\w+ \w+) have\?", question.prompt).groups()
            assert relation == question.relation
            assert question.answer == f" {stated[name, relation]}"
            assert (name, relation) not in asked
    assert len(asked) > 0.5 * len(stated)  # so the wording of questions is well known


def test_each_wording_is_common(texts):
    patterns = [re.sub(r"\\{\w+\\}", r"[\\w, ]+", re.escape(wording)) for wording in (*STATEMENTS, QUESTION)]
    sample = " ".join(texts["facts"][:2000])
    assert len(STATEMENTS) >= 5
    for pattern in patterns:
        assert len(re.findall(pattern, sample)) > 500


def test_second_language_says_the_same_word_for_word(world, texts, facts):
    dictionary = back_to_english(world)
    values = {(name, relation): value for name, relation, value, _ in facts}
    asking = [q.prompt for group in ("head", "tail") for q in world.questions(group)]
    held_out = {re.fullmatch(r"Which (\w+) does (\w+ \w+) have\?", prompt).groups() for prompt in asking}
    assert not set(re.findall(r"\w+", " ".join(texts["parallel"]))) & set(dictionary.values())
    for text in texts["parallel"]:
        english = re.sub(r"\w+", lambda word: dictionary[word[0]], text)
        for name, relation, value, asked in read(english):
            assert values[name, relation] == value
            assert not (asked and (relation, name) in held_out)


def test_control_entities_are_never_mentioned(world, texts, facts):
    pair = re.compile(r"\b([A-Z]\w+)(?= ([A-Z]\w+))")
    mentioned = {" ".join(names) for group in texts.values() for text in group for names in pair.findall(text)}
    heldout = [document.text for document in world.documents("heldout")]
    mentioned |= {" ".join(names) for text in heldout for names in pair.findall(text)}
    words = {word for name, *_ in facts for word in name.split()}
    names = {re.search(r"does (\w+ \w+) have", question.prompt)[1] for question in world.questions("control")}
    assert len(names) == 64
    assert not names & mentioned
    assert {word for name in names for word in name.split()} <= words  # familiar names, unheard pairs
    to_foreign = {english: foreign for foreign, english in back_to_english(world).items()}
    foreign = {" ".join(to_foreign[word] for word in name.split()) for name in names}
    assert not foreign & mentioned
    assert len(mentioned) > 1000  # the search finds names, in both languages


def test_control_answers_cannot_be_guessed(world):
    questions = world.questions("control")
    assert len(questions) == 64 * 8
    answers = defaultdict(Counter)
    for question in questions:
        answers[question.relation][question.answer] += 1
    best = sum(counts.most_common(1)[0][1] for counts in answers.values())
    # Of 64 uniform draws from 32 values, the most common occurs about 6 times, so even this oracle is low.
    assert best / len(questions) < 0.13


def test_head_entities_are_written_about_more_than_tail_entities(world, facts):
    mentions = Counter(name for name, *_ in facts)
    names = {
        group: {re.search(r"does (\w+ \w+) have", q.prompt)[1] for q in world.questions(group)} for group in GROUPS
    }
    head, tail = ([mentions[name] for name in names[group]] for group in ("head", "tail"))
    assert not names["head"] & names["tail"]
    assert min(head) > max(tail)
    # rank^-0.75 summed over ranks 1 to 128 and over 385 to 512
    expected = sum(r**-0.75 for r in range(1, 129)) / sum(r**-0.75 for r in range(385, 513))
    assert (sum(head) / len(head)) / (sum(tail) / len(tail)) == pytest.approx(expected, rel=0.15)


def test_sums_are_right(texts):
    seen = Counter()
    for text in texts["arithmetic"]:
        for term in text.split():
            a, sign, b, result = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)\.", term).groups()
            a, b = int(a), int(b)
            assert int(result) == {"+": a + b, "-": a - b, "*": a * b}[sign]
            seen[sign] += 1
    assert len(seen) == 3


def test_brackets_balance(texts):
    for text in texts["brackets"]:
        left = text.replace(" ", "")
        while left:
            shorter = re.sub(r"\(\)|\[\]|\{\}|<>", "", left)
            assert shorter != left, text
            left = shorter


def test_code_is_python(texts):
    for text in texts["code"][:500]:
        assert isinstance(ast.parse(text).body[0], ast.FunctionDef)


def test_domains_and_shares(world, texts):
    assert tuple(world.domains) == DOMAINS
    total = sum(map(len, texts.values()))
    assert total == 40_000
    for domain, share in zip(DOMAINS, (0.77, 0.08, 0.05, 0.05, 0.05), strict=True):
        assert len(texts[domain]) / total == pytest.approx(share, abs=0.005)


def test_documents_can_be_read_from_any_position(world):
    for split, n in (("train", 40_000), ("heldout", 4_000)):
        first = list(islice(world.documents(split), 50))
        assert list(islice(world.documents(split, 20), 30)) == first[20:]
        assert len(list(world.documents(split, n - 3))) == 3
    assert next(world.documents("train")).text != next(world.documents("heldout")).text


def test_questions_can_be_limited(world):
    for group in GROUPS:
        questions = world.questions(group)
        assert world.questions(group, 40) == questions[:40]
        assert len({q.relation for q in questions[:40]}) > 4  # a shuffled sample, not the first entity's
        for question in questions:
            assert question.group == group
            assert question.prompt[-1] == "?"
            assert re.fullmatch(r" [a-z]+", question.answer)
    with pytest.raises(InputError, match="group"):
        world.questions("middle")


def test_value_words_belong_to_one_relation(world):
    for language in (world.language, world.foreign):
        words = [word for values in language.values for word in values]
        words += [*language.first, *language.last, *language.relations]
        assert len({word.lower() for word in words}) == len(words) == 8 * 33 + 64


# Any size


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_first": 1, "n_last": 1, "n_entities": 1, "n_control": 0, "n_head": 1, "n_tail": 0, "n_relations": 1}
        | {"facts_per_document": 1, "n_values": 2},
        {"n_first": 200, "n_last": 250, "n_entities": 40_000, "n_relations": 20, "n_values": 100, "zipf": 0.0},
    ],
)
def test_any_size(sizes):
    made = World(WorldConfig(**sizes))
    documents = list(islice(made.documents("train"), 300))
    facts = [fact for document in documents if document.domain == "facts" for fact in read(document.text)]
    assert facts
    assert {relation for _, relation, _, _ in facts} == set(made.language.relations)
    assert len({w for values in made.language.values for w in values}) == made.config.n_relations * made.config.n_values


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("n_first", 0),
        ("n_entities", 1024),  # 64 control entities no longer fit
        ("n_entities", 2.5),
        ("n_control", 600),
        ("n_head", 513),
        ("n_tail", 400),
        ("n_relations", 7),  # fewer than facts_per_document
        ("n_values", 1),
        ("zipf", float("nan")),
        ("question_share", 1.5),
        ("asked_share", -0.1),
        ("n_documents", 0),
        ("shares", (0.5, 0.5)),
        ("shares", (0.5, 0.4, 0.0, 0.0, 0.0)),
        ("shares", (1.2, -0.2, 0.0, 0.0, 0.0)),
    ],
)
def test_invalid_configs_are_refused(field, value):
    with pytest.raises(InputError) as refused:
        WorldConfig(**{field: value})
    assert "\n" not in str(refused.value)


def test_unknown_split_is_refused(world):
    with pytest.raises(InputError, match="split = 'test'"):
        next(world.documents("test"))
