"""What two models of chapter 07 answer, know and route in the course of their training: a film for the front page."""

from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel

from dsmoe_lite.checkpoint import load_model, read_metadata
from dsmoe_lite.common.files import read_json
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.data.tokenizer import END_ID, read_tokenizer
from dsmoe_lite.data.world import Question, World
from dsmoe_lite.evaluate import recall
from dsmoe_lite.model import Transformer

RUNS = {"GShard": "gshard-seed0", "DeepSeekMoE": "deepseekmoe-seed0"}
SNAPSHOTS = (50, 200, 400, 800)  # steps after which the weights were kept


def learning(questions: list[Question]) -> dict[str, Any]:
    """Return both models at step 0, at each snapshot and at the end: facts known, and how each question is answered.

    `used` of an answer has, for each layer, the experts that the last token of the question chooses, with their gates.
    """
    head = World().questions("head")
    steps: list[int] = []
    models = []
    for name, run in RUNS.items():
        path = DATA / "models" / f"paper-{run}.safetensors"
        tokenizer = read_tokenizer(read_metadata(path)["tokenizer"])
        record = read_json(DATA / "runs" / "paper" / f"{run}.json")
        final = load_model(path)
        torch.manual_seed(record["train"]["seed"])
        kept = [load_model(path.with_stem(f"{path.stem}-step{step}")) for step in SNAPSHOTS]
        states = [Transformer(final.config).eval(), *kept, final]
        steps = [0, *SNAPSHOTS, record["train"]["steps"]]
        assert final.config.moe is not None
        models.append(
            {
                "name": name,
                "n_experts": final.config.moe.n_routed_experts,
                "n_shared": final.config.moe.n_shared_experts,
                "known": [round(len(head) * recall(model, tokenizer, head)["head"]) for model in states],
                "answers": [[_answer(model, tokenizer, question) for question in questions] for model in states],
            }
        )
    return {
        "steps": steps,
        "n_facts": len(head),
        "questions": [question.prompt for question in questions],
        "models": models,
    }


@torch.no_grad()
def _answer(model: Transformer, tokenizer: Any, question: Question) -> dict[str, Any]:
    output = model(torch.tensor([tokenizer.encode(question.prompt).ids]))
    p = output.logits[0, -1].softmax(dim=0)
    right = tokenizer.encode(question.answer).ids[0]
    best = int(p.argmax())
    used = [
        [[int(e), round(float(gate), 3)] for e, gate in zip(routing.topk_ids[-1], routing.gates[-1], strict=True)]
        for routing in output.routings
    ]
    return {
        "says": shown_token(tokenizer, best),
        "p": round(float(p[best]), 3),
        "right": best == right,
        "word": question.answer.strip(),
        "p_right": round(float(p[right]), 3),
        "used": used,
    }


def shown_token(tokenizer: Any, token: int) -> str:
    """A token as a reader sees it: its text, or its bytes in words if they are no character that can be seen."""
    if token == END_ID:
        return "(end)"
    text = str(tokenizer.decode([token])).strip()
    if text and text.isprintable() and "\ufffd" not in text:
        return text if any(map(str.isalnum, text)) else f"“{text}”"
    letters = sorted(ByteLevel.alphabet())
    shown = [letter for letter in map(chr, range(256)) if letter in letters]  # these stand for themselves
    values = dict(
        zip(letters, [*map(ord, shown), *(byte for byte in range(256) if chr(byte) not in shown)], strict=True)
    )
    found = [values[letter] for letter in tokenizer.id_to_token(token)]
    return "∙" if bytes(found).isspace() else f"byte {' '.join(f'{byte:x}' for byte in found)}"
