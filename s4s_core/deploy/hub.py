"""A folder that others use: solvers, compiled tables, a scheduler for diffusers, and a model card.

It goes to the Hub as it is. Nothing in it needs this package, and the card says what is in it: for
which model the solvers were learned, from what, and how near they come to their teacher.
"""

from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageError, first_line, optional_import, shown, write_atomically
from .compiled import compile_solver
from .family import SolverFamily

SCHEDULER = "s4s_scheduler.py"


def save_pretrained(family: SolverFamily, scheduler: Any, folder: str | Path) -> None:
    """Write a family into a folder that `push_to_hub` and `SolverFamily.from_pretrained` take.

    scheduler  what `install` has put into the pipeline, or what `make_scheduler` gives

    For N network calls there are solver_N.json and compiled_N.json; beside them stand the scheduler
    with its code, and README.md, a model card. Raises UsageError for another scheduler, and where
    the folder cannot be written.
    """
    held = [len(s["timesteps"]) for s in getattr(scheduler, "config", {}).get("solvers", [])]
    if type(scheduler).__name__ != "S4SScheduler" or held != family.nfes:
        raise UsageError(
            f"the scheduler must hold these solvers, with {', '.join(map(str, family.nfes))} "
            f"network calls, not be a {type(scheduler).__name__} with {held}: install them into "
            "the pipeline, and give pipe.scheduler"
        )
    folder = Path(folder)
    card = model_card(family, folder.resolve().name)
    for solver in family.solvers:
        compiled = compile_solver(solver, scheduler.config["prediction_type"])
        compiled.save(folder / f"compiled_{solver.nfe}.json")
    write_atomically(folder / scheduler.config_name, scheduler.to_json_string().encode())
    write_atomically(folder / SCHEDULER, Path(__file__).with_name(SCHEDULER).read_bytes())
    write_atomically(folder / "README.md", card.encode())
    for solver in family.solvers:  # last: where these are, the others are
        solver.save(folder / f"solver_{solver.nfe}.json")


def push_to_hub(folder: str | Path, repo_id: str, private: bool | None = None) -> str:
    """Upload a folder that `save_pretrained` wrote to a repository of the Hub; return its address.

    The repository, as in "user/my-solver", is made if it is not there; `private` is for a new one,
    and None is what its owner has chosen for all. Raises UsageError for a
    folder without solvers, and where the Hub refuses.
    """
    SolverFamily.load(folder)
    with optional_import("huggingface_hub", "the Hub"):
        from huggingface_hub import HfApi
    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder)
    except (OSError, ValueError) as error:  # the Hub's own errors are of these kinds
        raise UsageError(
            f"the Hub does not take {folder} as {repo_id} ({first_line(error)}): "
            "check the name, and log in with hf auth login"
        ) from None
    return str(address)


def model_card(family: SolverFamily, name: str) -> str:
    """Return the README.md of a family, as the Hub reads it, from the provenance of its solvers.

    name  of the repository, for the lines that show how to use it
    """
    last = family.solvers[-1]
    model, learned = (_entries(last.provenance, key) for key in ("model", "learned"))
    base = learned.get("pipeline") or model.get("name") or "a diffusion model"
    header: dict[str, Any] = {"library_name": "diffusers", "license": "mit"}
    header["tags"] = ["s4s", "diffusion-solver", "scheduler"]
    if "/" in str(base):  # a repository of the Hub, not a folder that only its owner has
        header["base_model"] = base
    calls, guidance = ", ".join(map(str, family.nfes)), model.get("guidance", 1.0)
    told = {
        "prompts": f'"a cat", guidance_scale={guidance}, ',
        "class_labels": f"class_labels=[0], guidance_scale={guidance}, ",
    }
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# Learned solvers for {base}",
        f"These are solvers of the diffusion ODE of {base} with {calls} network calls a sample. "
        "Their coefficients and times were learned by S4S (Frankel et al., ICML 2025) from pairs "
        "of noise and the sample of an accurate teacher. They are numbers, and hold no weights of "
        "a network.",
        _table(family),
        "## What they were learned from\n\n"
        + "\n".join(f"- {key}: {value}" for key, value in _facts(model, learned)),
        _USE.format(
            name=name,
            base=base,
            last=last.nfe,
            guidance=guidance,
            told=next((text for key, text in told.items() if key in learned), ""),
        ),
        "## Licence\n\nThe numbers and the code of the scheduler are under the MIT licence. The "
        "base model, and what it draws, are under its own.\n",
    ]
    return "\n\n".join(part for part in parts if part)


def _entries(provenance: dict[str, Any], key: str) -> dict[str, Any]:
    """An object in what a solver says of itself, empty where it says nothing."""
    found = provenance.get(key)
    return found if isinstance(found, dict) else {}


def _facts(model: dict[str, Any], learned: dict[str, Any]) -> list[tuple[str, Any]]:
    """What the card lists, by name."""
    facts = [("base model", learned["pipeline"])] if "pipeline" in learned else []
    facts += [("model", model["name"])] if "name" in model else []
    facts += [(f"weights of {k}", f"sha256 {v}") for k, v in _entries(model, "weights").items()]
    facts += [("guidance", model["guidance"])] if "guidance" in model else []
    for key, value in learned.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {_short(v)}" for k, v in value.items())
        facts += [(key.replace("_", " "), _short(value))] if key != "pipeline" else []
    return facts


def _short(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)


def _table(family: SolverFamily) -> str:
    """How near each solver comes to the teacher, where that was measured."""
    measured = {s.nfe: h for s in family.solvers if (h := _entries(s.provenance, "held_out"))}
    if not measured:
        return ""
    try:
        rows = [
            f"| {nfe} | {h['distance']:.4f} | {h['published']:.4f} | "
            f"{h['interval'][0]:.4f} to {h['interval'][1]:.4f} |"
            for nfe, h in measured.items()
        ]
        held_out = {name: measured[max(measured)][name] for name in ("noises", "blocks", "rival")}
    except (LookupError, TypeError, ValueError):
        raise UsageError(
            "the provenance of these solvers has a held_out that s4s learn did not write: leave it "
            "out of it"
        ) from None
    return (
        "## How good they are\n\nThe number is the root mean square distance per entry to the "
        "teacher's sample from the same noise, in what the network works on (latents, if it has "
        f"them), over {held_out['noises']} noises "
        "(seeds from 0) that learning never saw; no network of features is "
        f"in it. Beside it stands a published solver, {held_out['rival']}, with as many calls. The "
        "last column is the 95 % interval of the difference on the same noises, over "
        f"{held_out['blocks']} blocks of them and one seed of learning: below zero the learned "
        "solver is nearer.\n\n"
        "| network calls | learned | published | difference |\n| --- | --- | --- | --- |\n"
        + "\n".join(rows)
    )


_USE = """## How to use them

In diffusers, with the code of this folder:

```py
import sys

from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

folder = snapshot_download("user/{name}")
sys.path.insert(0, folder)
from s4s_scheduler import S4SScheduler

pipe = DiffusionPipeline.from_pretrained("{base}")
pipe.scheduler = S4SScheduler.from_pretrained(folder)
image = pipe({told}num_inference_steps={last}).images[0]
```

With the package s4s_core, which checks that the solvers were made for this pipeline and guidance:

```py
family = s4s_core.SolverFamily.from_pretrained("user/{name}")
s4s_core.install(pipe, family, guidance={guidance})
```

In ComfyUI `solver_{last}.json` is a file for the node "S4S sampler" of that package; set `cfg` to
{guidance}.

In numpy, for a network that takes diffusers' times and answers with guidance {guidance}:

```py
c = json.load(open("compiled_{last}.json"))
x_T = x = c["init_noise_sigma"] * noise
outs = []
for t, scale, (a, *b) in zip(c["timesteps"], c["scale"], c["table"]):
    outs.append(network(scale * x, t))
    x = a * x_T + sum(w * out for w, out in zip(b, outs))
```"""
