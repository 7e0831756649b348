"""Run folders as training would have left them, without training."""

from lowrank_lab.config import RunConfig
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.runs.files import append_jsonl, write_json


def write_run(folder, label, seed=0, loss=2.0, steps=1000, **fields):
    """A finished run folder as training would have left it."""
    config = resolve(RunConfig(model="tiny", corpus="markov", steps=steps, seed=seed, **fields))
    folder.mkdir(parents=True)
    facts = {"label": label, "config": config.model_dump(), "ran_on": {"torch": "2"}}
    write_json(folder / "config.json", facts)
    rows = [
        {"step": s, "tokens_seen": s * 10, "seconds": s / 5, "loss": loss, "lr": 0.1, "events": []}
        for s in range(1, steps + 1)
    ]
    for row in rows[99::100]:
        row["validation_loss"] = loss + 1 / row["step"]
    rows[332]["events"] = [{"event": "reset"}]
    append_jsonl(folder / "metrics.jsonl", rows)
    spectra = [
        {"step": s, "layer": "model.layers.0.self_attn.q_proj", "singular_values": [2.0, 1.0]}
        for s in (0, steps)
    ]
    append_jsonl(folder / "spectra.jsonl", spectra)
    names = ("weights", "gradients", "optimizer_states", "projections", "activations")
    write_json(folder / "memory.json", dict.fromkeys(names, 2**20))
    result = {
        "test_loss": loss, "validation_loss": loss, "test_perplexity": 2.718**loss, "seconds": 200,
        "parameters": 58016, "parameters_without_embeddings": 25248, "weight_bytes": 2**20,
        "optimizer_state_bytes": 2**21, "tokens_seen": steps * 10,
    }  # fmt: skip
    write_json(folder / "result.json", result)
    (folder / "model.safetensors").write_bytes(b"weights")
